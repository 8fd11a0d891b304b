"""Every picture that a run draws."""
import contextlib
import os

import numpy as np

# These, and those of the style below, are told apart by colour-blind readers, too
LINES = "#0072B2 #D55E00 #009E73 #CC79A7 0.5 #E69F00 #56B4E9".split()
STYLE = {"font.size": 9, "text.parse_math": False}             # a $ in a title stays a $

@contextlib.contextmanager
def picture(path, columns, figsize):
    """`with picture(…) as axes`: what is drawn on the list of axes is written to path."""
    from matplotlib import style                               # here, since it takes a second
    from matplotlib.figure import Figure
    with style.context(["tableau-colorblind10", STYLE]):
        figure = Figure(figsize)
        yield list(figure.subplots(1, columns, squeeze=False).flat)
        figure.savefig(f"{path}.part", format="png", dpi=120, bbox_inches="tight")
        os.replace(f"{path}.part", path)                       # renamed when it is whole

def plot_flows(path, codes, titles, panels):
    """Where the flow goes, for one user: a bar is a prefix, as high as the share of its items; to
    its right are its branches. Small ones are left out. Orange: the path to the first panel's
    largest item. codes (n, L), titles (n); panels: {title: n shares, of sum 1}."""
    codes = np.asarray(codes)
    levels = codes.shape[1]
    target = np.asarray([*panels.values()][0])
    keys = []                       # below a prefix, the branch with the largest share comes first
    prefixes = []                   # of each level: the prefix of each item, as a number (n,)
    for level in range(levels + 1):
        prefix = np.unique(codes[:, :level], axis=0, return_inverse=True)[1]
        prefixes.append(prefix)
        keys += [-np.bincount(prefix, target)[prefix], prefix]
    order = np.lexsort(keys[::-1])
    with picture(path, 2, (5.6 + 1.6 * max(3, levels), 4.8)) as axes:
        for axis, (title, shares) in zip(axes, panels.items()):
            for level, prefix in enumerate(prefixes):
                first = np.flatnonzero(np.diff(prefix[order], prepend=-1))
                heights = np.add.reduceat(np.asarray(shares)[order], first)
                bottoms = 1 - heights.cumsum()
                large = heights > 0.005
                items = order[first[large]]                    # one item below each prefix
                colors = np.where(prefix[items] == prefix[target.argmax()], "C5", "C0")
                bars = axis.bar(level, heights[large], 1, bottoms[large], align="edge",
                                color=colors, edgecolor="white")
                room = heights[large] > 0.035                  # for text
                names = codes[items, level - 1].astype(str) if level else "all"
                axis.bar_label(bars, np.where(room, names, ""), label_type="center", color="white")
                axis.text(level + 0.5, -0.05, f"code {level}" if level else "root", ha="center")
            for bar, item, color in zip(bars, items, colors):  # of the last level
                if bar.get_height() > 0.035:
                    label = f"{bar.get_height():.0%} {titles[item][:24]}"
                    axis.text(levels + 1.1, bar.get_center()[1], label, va="center", color=color)
            axis.set(title=title, xlim=(0, levels + 3.6), ylim=(0, 1))
            axis.axis("off")

def plot_lines(path, lines, xlabel, ylabel):
    """Draw {name: [(x, y), …]}: a line of points, named in a legend, or a point beside its name."""
    with picture(path, 1, (7.5, 5.5)) as [axis]:
        axis.set_prop_cycle(color=LINES)
        for name, points in lines.items():
            if len(points) > 1:
                axis.plot(*zip(*points), marker="o", markersize=4, label=name)
            else:
                axis.plot(*points[0], marker="o", markersize=4, color="black", zorder=3)
                axis.annotate(name, points[0], (5, 3), textcoords="offset points")
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
        axis.set(xlabel=xlabel, ylabel=ylabel)
        axis.margins(0.15)                                     # room for the names
