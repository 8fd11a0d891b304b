"""The report: results.json, the Markdown table, the pictures. Nothing in here knows how a policy is trained."""
import contextlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

def write_json(path, value):
    """Write under a temporary name, then rename, so that a file is whole or not there."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    part = Path(f"{path}.part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    os.replace(part, path)


def _per_user(rows, method, metric):
    """recall@k, ndcg@k, or a figure of "by_user", of each user (B,), averaged over a method's seeds."""
    if "by_user" in rows[0] and metric in rows[0]["by_user"]:
        return np.mean([row["by_user"][metric] for row in rows if row["method"] == method], axis=0)
    name, k = metric.split("@")
    ranks = np.array([row["ranks"] for row in rows if row["method"] == method])          # (seeds, users), 0: not found
    hit = (ranks > 0) & (ranks <= int(k))
    return (hit if name == "recall" else hit / np.log2(ranks + 1, where=ranks > 0, out=np.ones(ranks.shape))).mean(0)


def paired_gains(rows, methods, base, metrics, seed=0, samples=1000):
    """{method: {metric: gain over the base, with a 95 % bootstrap interval over users}}; users are drawn once for all.

    The seeds are taken as they are: their luck is not in the interval.
    """
    pairs = [(method, metric) for method in methods for metric in metrics]
    gains = np.array([_per_user(rows, method, metric) - _per_user(rows, base, metric) for method, metric in pairs])
    rng, users = np.random.default_rng(seed), gains.shape[-1]
    means = [gains @ np.bincount(rng.integers(users, size=users), minlength=users) / users for _ in range(samples)]
    out = {method: {} for method in methods}
    for (method, metric), gain, (low, high) in zip(pairs, gains, np.quantile(means, [0.025, 0.975], axis=0).T):
        out[method][metric] = {"gain": gain.mean(), "low": low, "high": high}
    return out


def results_of(rows, data, settings):
    """results.json: sizes, settings, versions, every run, mean and standard deviation, paired gains over SFT."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    of = {m: [row["metrics"] for row in rows if row["method"] == m] for m in methods}
    summary = {m: {k: {"mean": float(np.mean([r[k] for r in of[m]])), "std": float(np.std([r[k] for r in of[m]], ddof=len(of[m]) > 1))}
                   for k in of[m][0]} for m in methods}
    ranking = [f"{name}@{k}" for k in (5, 10) for name in ("recall", "ndcg")]
    out = {"data": data.sizes, "settings": asdict(settings),
           "versions": {"python": sys.version.split()[0], **{m: sys.modules[m].__version__ for m in ("torch", "transformers", "numpy")}},
           "runs": [{k: v for k, v in row.items() if k not in ("ranks", "by_user", "example")} for row in rows], "summary": summary}
    for key, base in (("paired", "sft"), ("paired_continued", "sft-continued")):
        others = [m for m in methods if base in of and m != base and len(of[m]) == len(of[base])]
        out[key] = paired_gains(rows, others, base, [*ranking, *rows[0]["by_user"]]) if others else {}
    return out


def _percent(results, key, base, method, metric="ndcg@10"):
    """The gain in a figure over a base row as text: percent of the base's mean, with its interval."""
    gain = results[key].get(method, {}).get(metric)
    scale = results["summary"].get(base, {}).get(metric, {}).get("mean", 0) / 100
    return f"{gain['gain'] / scale:+.1f} [{gain['low'] / scale:+.1f}, {gain['high'] / scale:+.1f}]" if gain and scale else ""


def _cells(results, method, columns):
    """mean ± standard deviation over seeds; empty where the row has no such figure."""
    row, seeds = results["summary"][method], sum(run["method"] == method for run in results["runs"])
    return [f"{row[c]['mean']:.4f}" + (f" ± {row[c]['std']:.4f}" if seeds > 1 else "") if c in row else "" for c in columns]


def markdown_table(head, rows):
    """A Markdown table of lists of text."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table_of(results, names):
    """The Markdown tables: ranking, with the gains in NDCG@10 and their intervals and seconds; then what the lists are like."""
    ranking = ["recall@5", "ndcg@5", "recall@10", "ndcg@10"]
    beyond = ["coverage@10", "tail@10", "diversity@10", "entropy"]
    bias = [metric for metric in ("hidden@10", "liked@10", "lift@10") if all(metric in row for row in results["summary"].values())]

    def seconds(method):
        return f"{np.mean([run['seconds']['train'] for run in results['runs'] if run['method'] == method]):.0f}"
    tables = [markdown_table(["method", *ranking, "NDCG@10 over SFT, % [95 %]", "over SFT (continued), %", "train s"],
                        [[names[m], *_cells(results, m, ranking), _percent(results, "paired", "sft", m),
                          _percent(results, "paired_continued", "sft-continued", m), seconds(m)] for m in results["summary"]]),
              markdown_table(["method", *beyond], [[names[m], *_cells(results, m, beyond)] for m in results["summary"]])]
    if bias:
        tables.append(markdown_table(["method", *bias, "hidden@10 over SFT, % [95 %]"],
                                [[names[m], *_cells(results, m, bias), _percent(results, "paired", "sft", m, "hidden@10")]
                                 for m in results["summary"]]))
    return "\n\n".join(tables)


@contextlib.contextmanager
def picture(path, *grid, **options):
    """`with picture(path, rows, columns, figsize=…) as axes`: what is drawn there is written to path. matplotlib loads late."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(*grid, **options)
    yield axes
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def plot_curves(results, names, path):
    """curves.png: validation NDCG@10 of every method and seed; SFT's epochs end at 0, where the fine-tunings begin."""
    from matplotlib.ticker import MaxNLocator
    with picture(path, figsize=(7, 4)) as axis:
        trained = [run for run in results["runs"] if run["curve"]]
        for color, method in enumerate(dict.fromkeys(run["method"] for run in trained)):
            for run in (run for run in trained if run["method"] == method):
                start = run["curve"][-1]["epoch"] if method == "sft" else 0
                axis.plot([p["epoch"] - start for p in run["curve"]], [p["ndcg@10"] for p in run["curve"]], color=f"C{color}",
                          marker=".", label=names[method] if run["seed"] == trained[0]["seed"] else None)
        if trained:
            best = max(p["ndcg@10"] for run in trained for p in run["curve"])
            axis.set_ylim(0.6 * best, 1.03 * best or 1)            # what happens far below is only SFT's first epoch
            axis.legend()
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_title(results["data"]["name"], parse_math=False), axis.set_ylabel("validation NDCG@10")
        axis.set_xlabel("epoch of fine-tuning; SFT ends at 0")


def plot_exposure(rows, data, names, path):
    """exposure.png: for the first user, what was logged, what was shown, what is truly liked, what each row recommends.

    One column an item, the catalogue sorted by genre and, within it, by how often it stands in the log.
    """
    counts = np.bincount(np.concatenate(data.train), minlength=len(data.item_ids))
    genre = [text.removeprefix(title).strip() for text, title in zip(data.texts, data.titles)]
    order = sorted(range(len(counts)), key=lambda i: (genre[i], -counts[i], i))
    place = {item: x for x, item in enumerate(order)}
    liked, shown, logged = data.truth["liked"][0], data.truth["shown"][0], set(data.histories[0])
    first = {row["method"]: row["example"] for row in reversed(rows)}
    lines = {"logged": logged, "shown": shown, "truly liked": liked,
             **{names[m]: [i for i in items if i >= 0] for m, items in reversed(first.items())}}
    with picture(path, figsize=(12, 0.5 + 0.32 * len(lines))) as axis:
        for y, items in enumerate(lines.values()):
            for item in items:
                color = "C2" if item in liked - shown else "C0" if item in liked else "0.75"
                axis.plot([place[item]] * 2, [-y - 0.4, -y + 0.4], color=color, linewidth=2)
        for x in (x for x in range(1, len(order)) if genre[order[x]] != genre[order[x - 1]]):
            axis.axvline(x - 0.5, color="0.9", zorder=0)
        axis.set_yticks([-y for y in range(len(lines))], list(lines)), axis.set_xlim(-1, len(counts))
        axis.set_xlabel("items, by genre, the most logged first; green: liked but never shown, blue: liked, grey: not liked")
        axis.set_xticks([])
