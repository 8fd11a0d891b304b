"""What a run leaves: results.json, the table, gains with intervals, the first user's list."""
import itertools
import json
import os
from functools import lru_cache
from pathlib import Path

import numpy as np

from data import InputError, check, figures

BASES = {"paired": "sft", "paired_continued": "sft-continued"}  # in results.json: gains over …

def write(path, value):
    """Write text or a value as JSON, by a temporary name: the file is whole or not there."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.part").write_text(text, encoding="utf-8")
    os.replace(f"{path}.part", path)

def earlier_run(path, key):
    """The run that --resume keeps; InputError if `key`, all that it depends on, has changed."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        old = run.pop("key")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is of another program; choose another --out") from None
    for name in [*old, *key]:
        was = old.get(name)
        now = key.get(name)
        check(was == now, f"{path} was made with {name} = {was}, now it is {now}; choose another "
              "--out, or leave out --resume to train it anew")
    print(f"{run['method']}, seed {run['seed']}: kept, as it was finished")
    return run

# --- Numbers of each user's list: diversity; exposure bias, where the world's truth is known ------
def diversity(ranked, first_codes):
    """first_codes@10 (B,): how many different first codes the items of lists (B, 10) have."""
    codes = np.where(ranked < 0, first_codes[ranked[:, :1]], first_codes[ranked])   # −1: no other
    return {"first_codes@10": (ranked[:, 0] >= 0) + (np.diff(np.sort(codes, 1), axis=1) > 0).sum(1)}

def table_of_items(lists, num_items):
    """(B, n) bool: which items each of B lists holds; −1 is an empty place."""
    rows = np.repeat(np.arange(len(lists)), [len(items) for items in lists])
    table = np.zeros((len(lists), num_items + 1), bool)         # the last column is that of −1
    table[rows, list(itertools.chain.from_iterable(lists))] = True
    return table[:, :-1]

def exposure(ranked, data):
    """{metric: (B,)} of lists (B, 10); {} without a truth.
    liked@10: share of the listed items that the user truly likes
    hidden@10: share of the liked, never shown items that are listed
    themes@10: how many of the user's three themes, those with the most liked items, are listed"""
    if not data.truth:
        return {}
    n = len(data.titles)
    listed = table_of_items(ranked, n)
    liked = table_of_items(data.truth["liked"], n)
    hidden = liked & ~table_of_items(data.truth["shown"], n)
    theme = np.unique(data.truth["theme"], return_inverse=True)[1]
    of_theme = np.eye(theme.max() + 1)[theme]                                       # (n, themes)
    three = np.argsort(-(liked @ of_theme), axis=1, kind="stable")[:, :3]
    in_list = np.take_along_axis(listed @ of_theme > 0, three, axis=1)              # (B, 3)
    return {"liked@10": (liked & listed).sum(1) / np.maximum(1, listed.sum(1)),
            "hidden@10": (hidden & listed).sum(1) / np.maximum(1, hidden.sum(1)),
            "themes@10": in_list.sum(1)}

# --- Summary, gains, table ------------------------------------------------------------------------
@lru_cache(maxsize=1)
def bootstrap(users):
    """How often each user is drawn in 1,000 samples (1000, users): the same for all methods."""
    draws = np.random.default_rng(0).integers(users, size=(1000, users))
    return np.array([np.bincount(sample, minlength=users) for sample in draws])

def paired_gains(runs, base):
    """{metric: {"gain", "low", "high"}}, shares of the base: .25 is +25 %; means over the seeds.
    The 95 % interval covers the choice of users (bootstrap of the ratio own / base), not the random
    seed of training. Metrics that are 0 in the base are left out."""
    gains = {}
    for metric in base[0]["by_user"]:
        own = np.mean([run["by_user"][metric] for run in runs], 0)                  # (B,)
        other = np.mean([run["by_user"][metric] for run in base], 0)
        if other.any():
            draws = bootstrap(len(own))
            total = draws @ other
            # own / base − 1 in each sample; not a number where the base has drawn only zeros
            ratio = np.divide(draws @ own, total, out=np.full(1000, np.nan), where=total > 0) - 1
            low, high = np.nanquantile(ratio, [0.025, 0.975])
            gains[metric] = {"gain": own.sum() / other.sum() - 1, "low": low, "high": high}
    return gains

def results_of(runs, about):
    """results.json of these runs: what it is about, mean and std over seeds, paired gains."""
    results = {**about, "runs": runs, "summary": {}, "paired": {}, "paired_continued": {}}
    runs_of = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        runs_of.setdefault(run["method"], []).append(run)
    for method, own in runs_of.items():
        summary = results["summary"][method] = {}
        for metric in own[0]["metrics"]:
            values = [run["metrics"][metric] for run in own]
            std = np.std(values, ddof=1) if len(own) > 1 else 0.0
            summary[metric] = {"mean": np.mean(values), "std": std}
        for key, base in BASES.items():
            others = runs_of.get(base, [])
            if method != base and [run["seed"] for run in own] == [run["seed"] for run in others]:
                results[key][method] = paired_gains(own, others)
    return results

def table(results, short=False):
    """The Markdown table: means (± std over seeds), gains in % of the base with 95 % intervals.
    short: for a screen of 120 columns, without ±, recall, gains over sft-continued."""
    summary = results["summary"]
    several = len(results["runs"]) > len(summary) and not short
    mean = "{mean:.4f} ± {std:.4f}" if several else "{mean:.4f}"
    shown = ["recall@10", "ndcg@10", "liked@10", "coverage@10"][short:]
    bases = list(BASES.items())[:1 if short else 2]
    rows = []
    for method, numbers in summary.items():
        row = {"method": method}
        row |= {name: mean.format(**numbers[name]) for name in shown if name in numbers}
        for metric, (key, base) in itertools.product(("ndcg@10", "liked@10"), bases):
            if metric in numbers:
                gain = results[key].get(method, {}).get(metric, {})     # {}: an empty cell
                percent = [round(100 * x, 1 - short) + 0 for x in gain.values()]    # + 0: no "-0"
                form = "{:+.0f} [{:+.0f}, {:+.0f}]" if short else "{:+.1f} [{:+.1f}, {:+.1f}]"
                row[f"{metric} over {base}, %"] = form.format(*percent) if gain else ""
        rows.append(row.values())
    lines = [row, ["---"] * len(row), *rows]                    # row's keys are the header
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

def print_first_user(runs, data):
    """The first user's history, and what each method recommends, by title."""
    hidden = data.truth["liked"][0] - data.truth["shown"][0] if data.truth else set()
    names = [title + "*" * (item in hidden) for item, title in enumerate(data.titles)]
    print(f"user {data.user_ids[0]}:", ", ".join(data.titles[i] for i in data.histories[0][-9:-1]))
    for run in runs:
        if run["seed"] == runs[0]["seed"]:
            listed = [names[item] for item in run["lists"][0][:5] if item >= 0]
            print(f"  {run['method']:>13} ", ", ".join(listed))
    print("  * liked, but never shown" if hidden else "")

def finish(out, runs, about, data):
    """Print the first user's list, the table and what was written; write results and pictures."""
    out = Path(out)
    results = results_of(runs, about)
    write(out / "results.json", results)
    print_first_user(runs, data)
    write(out / "results.md", table(results) + "\n")
    print("", table(results, short=True), "", *figures.draw_run(out, data, results), sep="\n")
    print(f"results.json, results.md (more columns) and what was saved of models are in {out}/")
    return results
