"""What a run leaves: results.json, the table, gains over SFT with intervals."""
import json
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np

def write(path, value):
    """Write text or a value as JSON, by a temporary name: the file is whole or not there."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    part = Path(f"{path}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)

def exposure(lists, data):
    """{metric: (B,)} of lists, ten items each; {} without a truth.
    liked@10: share of the listed items that the user truly likes
    hidden@10: share of the liked, never shown items that are listed
    themes@10: how many of the user's three themes, those with the most liked items, are listed"""
    if not data.truth:
        return {}
    theme = data.truth["theme"]
    themes = sorted({*theme})
    rows = []
    for items, liked, shown in zip(lists, data.truth["liked"], data.truth["shown"]):
        listed = {*items} - {-1}                                # −1 is an empty place
        hidden = liked - shown
        count = Counter(theme[item] for item in liked)
        three = sorted(themes, key=lambda name: -count[name])[:3]
        rows.append((len(liked & listed) / max(1, len(listed)),
                     len(hidden & listed) / max(1, len(hidden)),
                     len({*three} & {theme[item] for item in listed})))
    return dict(zip(("liked@10", "hidden@10", "themes@10"), np.array(rows).T))

def means(by_user, lists, data):
    """{metric: mean over users}, and coverage@10, the share of all items that any list has."""
    listed = {item for items in lists for item in items} - {-1}
    metrics = {name: float(numbers.mean()) for name, numbers in by_user.items()}
    return {**metrics, "coverage@10": len(listed) / len(data.titles)}

@lru_cache(maxsize=1)
def bootstrap(users):
    """How often each user is drawn in 500 samples (500, users): the same for all methods."""
    draws = np.random.default_rng(0)
    samples = (draws.integers(users, size=users) for _ in range(500))
    return np.array([np.bincount(sample, minlength=users) for sample in samples], np.int32)

def paired_gains(runs, base):
    """{metric: {"gain", "low", "high"}}, shares of the base: .25 is +25 %; means over the seeds.
    The 95 % interval covers the choice of users (bootstrap of the ratio own / base), not the random
    seed of training. Metrics that are 0 in the base are left out."""
    gains = {}
    for metric in base[0]["by_user"]:
        own = np.mean([run["by_user"][metric] for run in runs], 0)                  # (B,)
        other = np.mean([run["by_user"][metric] for run in base], 0)
        if other.any():
            draws = [(sample @ own, sample @ other) for sample in bootstrap(len(own))]
            ratios = [mine / theirs - 1 for mine, theirs in draws if theirs > 0]
            low, high = np.quantile(ratios, [0.025, 0.975])
            gains[metric] = {"gain": own.sum() / other.sum() - 1, "low": low, "high": high}
    return gains

def results_of(runs, about):
    """results.json of these runs: what it is about, mean and std over seeds, gains over the first
    method whose name begins with sft."""
    results = {**about, "runs": runs, "summary": {}, "paired": {}}
    runs_of = {}
    for run in runs:
        runs_of.setdefault(run["method"], []).append(run)
    first = next((method for method in runs_of if method.startswith("sft")), None)
    base = runs_of.get(first, [])
    for method, own in runs_of.items():
        summary = results["summary"][method] = {}
        for metric in own[0]["metrics"]:
            values = [run["metrics"][metric] for run in own]
            std = np.std(values, ddof=1) if len(own) > 1 else 0.0
            summary[metric] = {"mean": np.mean(values), "std": std}
        if method != first and [run["seed"] for run in own] == [run["seed"] for run in base]:
            results["paired"][method] = paired_gains(own, base)
    return results

def table(results):
    """The Markdown table: means over seeds, gains over SFT in % with 95 % intervals over users."""
    seeds = len({run["seed"] for run in results["runs"]})
    known = results["runs"][0]["metrics"]                       # liked@10: if the truth is known
    metrics = [metric for metric in ("ndcg@10", "liked@10") if metric in known]
    header = ["method", *metrics, "coverage@10", *[f"{metric} over sft" for metric in metrics]]
    lines = [header, ["---"] * len(header)]
    for method, numbers in results["summary"].items():
        means = [f"{numbers[metric]['mean']:.4f}" for metric in (*metrics, "coverage@10")]
        gains = [results["paired"].get(method, {}).get(metric) for metric in metrics]
        cells = ["{gain:+.0%} [{low:+.0%}, {high:+.0%}]".format(**gain) if gain else ""
                 for gain in gains]
        lines.append([method, *means, *cells])
    caption = f"Means over {seeds} seed(s). In brackets: 95 % intervals over users."
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", caption])

def finish(out, runs, about):
    """Print the table and where all is; write results.json and results.md."""
    results = results_of(runs, about)
    short = [{what: run[what] for what in run if what != "by_user"} for run in runs]
    write(f"{out}/results.json", {**results, "runs": short})    # lists tell the rest
    write(f"{out}/results.md", table(results) + "\n")
    print("", table(results), "", sep="\n")
    print(f"results.json, results.md and the saved models are in {out}/")
    return results

def two_lists(folder, first="sft", second="tb"):
    """Print what a user took, and both lists, with ticks at liked items: of the users whose lists
    have as many ticks as the means, the first with the fewest items. folder: of a run with truth"""
    from data import load_data
    results = json.loads(Path(folder, "results.json").read_text(encoding="utf-8"))
    data = load_data(results["settings"]["data"], results["settings"]["quick"])
    runs = {run["method"]: run for run in results["runs"]}
    wanted = [round(10 * runs[name]["metrics"]["liked@10"]) for name in (first, second)]
    users = []
    for user, liked in enumerate(data.truth["liked"]):
        lists = [runs[name]["lists"][user] for name in (first, second)]
        if [len({*items} & liked) for items in lists] == wanted:
            users.append((len(data.histories[user]), user, lists, liked))
    _, user, lists, liked = min(users)
    print("took", *[data.titles[item] for item in data.histories[user][:-1]], sep="\n  ")
    for pair in zip(*lists):
        print(*[f"{data.titles[item]:21}{'✓' * (item in liked):3}" for item in pair])

if __name__ == "__main__":
    two_lists(sys.argv[1])
