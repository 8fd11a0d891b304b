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
            axis.text(0, -0.1, "white: items and prefixes with less than 0.5 % each")
            axis.axis("off")

def place_names(axis, names, points):
    """Write each name beside its point, where it meets no other name and no edge of the frame."""
    taken = []
    axis.figure.draw_without_rendering()                       # the limits are known after it
    frame = axis.get_window_extent()
    for name, point in zip(names, points):
        for x, y in ((6, 4), (6, -11), (-6, 4), (-6, -11), (6, 15), (-6, 15), (6, -22), (-6, -22)):
            text = axis.annotate(name, point, (x, y), textcoords="offset points",
                                 ha="left" if x > 0 else "right")
            box = text.get_window_extent()
            inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 < frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:                                                  # no free place: the first one
            text = axis.annotate(name, point, (6, 4), textcoords="offset points")
        taken.append(text.get_window_extent())

def plot_lines(path, lines, xlabel, ylabel):
    """Draw {name: [(x, y), …]}: a line of points, named in a legend, or a point beside its name.
    Single points that would squeeze the rest are left out, and named below: those that are five
    times as far from the median point as others are in the median."""
    points = np.concatenate([*lines.values()])
    middle = np.median(points, 0)
    most = 5 * np.median(abs(points - middle), 0) + 1e-9
    shown = {}
    out = []
    for name, (point, *more) in lines.items():
        if not more and (abs(point - middle) > most).any():
            out.append(f"{name} ({point[0]:.2f}, {point[1]:.2f})")
        elif not more:
            shown[name] = point
    with picture(path, 1, (7.5, 5.5)) as [axis]:
        axis.set_prop_cycle(color=LINES)
        for name, several in lines.items():
            if len(several) > 1:
                axis.plot(*zip(*several), marker="o", markersize=4, label=name)
        for point in shown.values():
            axis.plot(*point, marker="o", markersize=4, color="black", zorder=3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)   # above the frame
        axis.set(xlabel=xlabel + (f"\nleft out: {', '.join(out)}" if out else ""), ylabel=ylabel)
        axis.margins(0.12)                                     # room for the names
        place_names(axis, shown, shown.values())
