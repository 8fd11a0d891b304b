"""Every picture of the project, drawn from plain dicts, lists and arrays.

`python -m data.figures RUN_FOLDER` draws a finished run for the README, into data/pictures/.
"""
import contextlib
import json
import sys
import textwrap
from pathlib import Path

import numpy as np

from data import load_data

BLUE = "C0"                            # of a style that colour-blind readers can tell apart
ORANGE = "C5"
GREY = "C2"
LIGHT = "0.82"
STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "legend.frameon": False,
         "text.parse_math": False}     # a $ in a title stays a $


@contextlib.contextmanager
def picture(path, rows, columns, figsize, **options):
    """`with picture(…) as axes`: what is drawn on the list of axes is written to path."""
    from matplotlib import style                               # here, since it takes a second
    from matplotlib.figure import Figure
    with style.context(["tableau-colorblind10", STYLE]):
        figure = Figure(figsize)
        yield list(figure.subplots(rows, columns, squeeze=False, **options).flat)
        figure.savefig(path, dpi=120, bbox_inches="tight")


def draw_prefix(axis, flow, shares, items, level, top):
    """Draw the prefix of these items as a bar and, right of it, its four largest children by the
    exact flow, then the rest as one bar. Returns the titles, as (height, text, color)."""
    bottom = top - shares[items].sum()
    color = ORANGE if flow["chosen"] in items else BLUE
    axis.bar(level, top - bottom, 1, bottom, align="edge", color=color, edgecolor="white")
    if top - bottom > 0.04:
        code = flow["codes"][items[0], level - 1] if level else "all"
        axis.text(level + 0.5, (top + bottom) / 2, code, ha="center", va="center", color="white")
    if level == flow["codes"].shape[1]:
        label = ((top + bottom) / 2, f"{top - bottom:.0%}  {flow['titles'][items[0]]}", color)
        return [label] if top - bottom > 0.02 or color == ORANGE else []
    labels = []
    codes = flow["codes"][items, level]
    children = [items[codes == code] for code in np.unique(codes)]
    children.sort(key=lambda child: -flow["exact"][child].sum())
    for rank, child in enumerate(children):
        large = rank < 4 and flow["exact"][child].sum() > 0.015
        if large or flow["chosen"] in child:
            labels += draw_prefix(axis, flow, shares, child, level + 1, top)
            top -= shares[child].sum()
    width = flow["codes"].shape[1] - level
    axis.bar(level + 1, top - bottom, width, bottom, align="edge", color=LIGHT, edgecolor="white")
    if top - bottom > 0.04:
        axis.text(level + 1.1, (top + bottom) / 2, "other codes", va="center", color="0.25")
    return labels


def draw_tree(axis, flow, shares, name):
    """One side of plot_flows: the tree of codes with its root on the left, titles on the right."""
    levels = flow["codes"].shape[1]
    height = 2.0
    for place, text, color in draw_prefix(axis, flow, shares, np.arange(len(shares)), 0, 1.0):
        height = min(place, height - 0.04)                     # lower, where two would overlap
        text = textwrap.shorten(text, 30, placeholder="…")
        axis.text(levels + 1.1, height, text, va="center", color=color)
    for level in range(levels + 1):
        axis.text(level + 0.5, 1.02, f"code {level}" if level else "root", ha="center")
    axis.text(levels + 1.1, 1.02, "share and title")
    axis.set_title(name, pad=20)
    axis.set(xlim=(0, levels + 3.6), ylim=(0, 1))
    axis.axis("off")


def plot_flows(path, flow):
    """Where the flow goes, for one user: exact on the left, learned on the right.

    flow: "codes" (n, L), "titles" (n), "exact" and "learned" (n), which sum to 1, "history"
    (titles), "exact_name", "learned_name", maybe "caption", and maybe "curve", a list of
    (step, mean L1 distance, largest error of log Z), drawn beside the trees.
    """
    flow = {**flow, "codes": np.array(flow["codes"]), "exact": np.array(flow["exact"])}
    chosen = flow["chosen"] = flow["exact"].argmax()
    columns = 3 if flow.get("curve") else 2
    width = 2.8 + 0.8 * max(3, flow["codes"].shape[1])         # inches of each panel
    with picture(path, 1, columns, (width * columns, 4.8)) as axes:
        draw_tree(axes[0], flow, flow["exact"], flow["exact_name"])
        draw_tree(axes[1], flow, np.array(flow["learned"]), flow["learned_name"])
        if flow.get("curve"):
            steps, distance, error = np.array(flow["curve"]).T
            axes[2].semilogy(steps, distance, color=BLUE, label="mean L1 distance from the left")
            axes[2].semilogy(steps, error, color=ORANGE, label="largest error of log Z")
            axes[2].yaxis.set_major_formatter("{x:g}")
            axes[2].set(title="How far the learned flow is off", xlabel="training step")
            axes[2].legend()
        history = ("…, " if len(flow["history"]) > 8 else "") + ", ".join(flow["history"][-8:])
        codes = ", ".join(map(str, flow["codes"][chosen]))
        text = (f"The user's history: {history}. Height: share of the flow. In orange: "
                f"{flow['titles'][chosen]} = ({codes}); in grey: other codes, drawn as one. "
                f"{flow.get('caption', '')}")
        axes[0].text(0, -0.05, textwrap.fill(text, int(22 * width)), va="top")


def plot_curves(path, results, names):
    """Validation NDCG@10 of every method and seed by epoch; SFT ends where the others begin."""
    runs = [run for run in results["runs"] if run["curve"]]
    methods = list(dict.fromkeys(run["method"] for run in runs))
    with picture(path, 1, 1, (8, 4)) as [axis]:
        for run in runs:
            start = run["curve"][-1]["epoch"] if run["method"] == "sft" else 0
            epochs = [point["epoch"] - start for point in run["curve"]]
            scores = [point["ndcg@10"] for point in run["curve"]]
            color = f"C{methods.index(run['method'])}"
            label = names[run["method"]] if run["seed"] == runs[0]["seed"] else None
            axis.plot(epochs, scores, color=color, marker=".", label=label)
        low, high = axis.get_ylim()
        axis.set(ylim=(max(low, 0.6 * high), high), ylabel="validation NDCG@10",
                 title=f"{results['data']['name']}: how well the next item is ranked",
                 xlabel="epoch of fine-tuning, from SFT's best epoch; SFT itself ends at 0")
        axis.axvline(0, color=LIGHT, zorder=0)
        axis.legend()


def typical_user(hidden, before, after):
    """The user whose change in hidden items found, between two (B, 10) lists, is the median one."""
    users = [user for user, items in enumerate(hidden) if items]
    change = [len(hidden[user] & set(after[user])) - len(hidden[user] & set(before[user]))
              for user in users]
    off = np.abs(change - np.median(change))
    return min(zip(off, users), key=lambda pair: (pair[0], -len(hidden[pair[1]])))[1]


def plot_exposure(path, data, results, names):
    """For a typical user, what was logged, shown, and is liked, and what each method recommends.

    data has a truth; the runs of results hold "lists" (B, 10), −1 where empty, one of them SFT's.
    """
    lists = {run["method"]: run["lists"] for run in reversed(results["runs"])}   # first seed's
    others = [method for method in results["summary"] if method != "cm" and "+" not in method]
    best = "fm" if "fm" in lists else others[-1]
    hidden = [liked - shown for liked, shown in zip(data.truth["liked"], data.truth["shown"])]
    user = typical_user(hidden, lists["sft"], lists[best])
    liked = data.truth["liked"][user]
    lines = {"in the log": data.histories[user], "shown": data.truth["shown"][user],
             "truly liked": liked}
    for method in results["summary"]:
        lines[names[method]] = lists[method][user]
    themes = [text.removeprefix(title) for text, title in zip(data.texts, data.titles)]
    count = np.bincount(np.concatenate(data.train), minlength=len(themes))
    order = sorted(range(len(themes)), key=lambda item: (themes[item], -count[item]))
    with picture(path, 1, 1, (8.5, 1 + 0.28 * len(lines))) as [axis]:
        for row, items in enumerate(lines.values()):
            for item in set(items) - {-1}:
                color = ORANGE if item in hidden[user] else BLUE if item in liked else LIGHT
                axis.bar(order.index(item), 0.8, 1, row - 0.4, color=color)
            found = len(hidden[user] & set(items))
            axis.text(len(order) + 1, row, found, va="center", color=ORANGE)
        axis.axhline(2.5, color="black", linewidth=1)
        for theme in set(themes):
            places = [place for place, item in enumerate(order) if themes[item] == theme]
            axis.axvline(places[-1] + 0.5, color=GREY, linewidth=0.5)
            axis.text(np.mean(places), len(lines) - 0.3, theme, ha="center", va="top")
        axis.set_yticks(range(len(lines)), lines)
        axis.set(xlim=(-0.5, len(order) - 0.5), ylim=(len(lines) - 0.5, -0.5), xticks=[],
                 xlabel="\n\nItems by theme, the most logged first. Typical: the median change "
                        f"from SFT to {names[best]} in orange items found.")
        axis.set_title("What a typical user was shown, likes, and is recommended", pad=22)
        for color, text in ((ORANGE, "liked, never shown (counted on the right)"),
                            (BLUE, "liked, shown"), (LIGHT, "not liked")):
            axis.bar(0, 0, color=color, label=text)
        axis.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 0.99))


def plot_bars(path, results, names, metrics):
    """Gains over SFT in percent, with 95 % intervals over users: one panel a metric."""
    titles = {"hidden@10": "Finding liked items\nthat were never shown (hidden@10)",
              "ndcg@10": "Ranking the next item\nof the log (NDCG@10)"}
    methods = [method for method in results["paired"] if method != "pop"]
    size = (4.5 * len(metrics), 1 + 0.3 * len(methods))
    with picture(path, 1, len(metrics), size, sharey=True) as axes:
        for axis, metric in zip(axes, metrics):
            paired = [results["paired"][method][metric] for method in methods]
            gains = np.array([[gain["low"], gain["gain"], gain["high"]] for gain in paired])
            low, gain, high = 100 / results["summary"]["sft"][metric]["mean"] * gains.T
            colors = np.where(low > 0, BLUE, np.where(high < 0, ORANGE, GREY))
            bars = axis.barh([names[method] for method in methods], gain, color=colors,
                             xerr=[gain - low, high - gain], error_kw={"linewidth": 1})
            axis.bar_label(bars, fmt="%+.1f %%", padding=3)
            axis.axvline(0, color="black", linewidth=1)
            axis.margins(x=0.35)
            axis.set(title=titles.get(metric, metric), xlabel="gain over SFT, %; blue: above 0,\n"
                     "orange: below, grey: the 95 % interval holds 0")
        axes[0].invert_yaxis()


def draw_run(out, data, results, names):
    """Draw all that a run has into the folder `out`; returns a sentence on each picture."""
    said = []
    sft = results["summary"].get("sft", {})
    if sft:
        plot_curves(Path(out) / "curves.png", results, names)
        said.append("curves.png: how well each method ranks, on validation, after each epoch")
    metrics = [metric for metric in ("hidden@10", "ndcg@10") if sft.get(metric, {}).get("mean")]
    if metrics and set(results["paired"]) - {"pop"}:
        plot_bars(Path(out) / "bars.png", results, names, metrics)
        said.append("bars.png: how much better or worse than SFT each method is")
    if sft and data.truth:
        plot_exposure(Path(out) / "exposure.png", data, results, names)
        said.append("exposure.png: which liked but never shown items a typical user is recommended")
    if results.get("flow"):
        plot_flows(Path(out) / "flow.png", results["flow"])
        said.append("flow.png: which codes the reward favours, and which the policy, for one user")
    return said


if __name__ == "__main__":
    run = Path(sys.argv[1])
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    names = results.get("names") or {method: method for method in results["summary"]}
    pictures = Path(__file__).parent / "pictures"
    pictures.mkdir(exist_ok=True)
    print(*draw_run(pictures, load_data(results["settings"]["data"]), results, names), sep="\n")
    if (run / "oracle.json").exists():
        oracle = json.loads((run / "oracle.json").read_text(encoding="utf-8"))
        plot_flows(pictures / "oracle.png", oracle)
