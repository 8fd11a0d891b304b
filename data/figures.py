"""Every picture that a run draws."""
import contextlib
import os
import textwrap

import numpy as np

BLUE = "C0"                            # of a style that colour-blind readers can tell apart
ORANGE = "C5"
GREY = "0.82"
# Of lines, to be told apart by colour-blind readers as well
LINES = "#0072B2 #D55E00 #009E73 #CC79A7 0.5 #E69F00 #56B4E9".split()
STYLE = {"font.size": 9, "text.parse_math": False}             # a $ in a title stays a $

@contextlib.contextmanager
def picture(path, rows, columns, figsize, **options):
    """`with picture(…) as axes`: what is drawn on the list of axes is written to path."""
    from matplotlib import style                               # here, since it takes a second
    from matplotlib.figure import Figure
    with style.context(["tableau-colorblind10", STYLE]):
        figure = Figure(figsize)
        yield list(figure.subplots(rows, columns, squeeze=False, **options).flat)
        figure.savefig(f"{path}.part", format="png", dpi=120, bbox_inches="tight")
        os.replace(f"{path}.part", path)                       # renamed when it is whole

def draw_prefix(axis, tree, shares, items, level, top):
    """Draw the prefix of these items as a bar. To its right: the child with tree["chosen"], the
    three other children with the largest sum of tree["target"], one bar for all other codes."""
    levels = tree["codes"].shape[1]
    bottom = top - shares[items].sum()
    middle = (top + bottom) / 2
    room = top - bottom > 0.035                                # else no text
    color = ORANGE if tree["chosen"] in items else BLUE
    axis.bar(level, top - bottom, 1, bottom, align="edge", color=color, edgecolor="white")
    code = tree["codes"][items[0], level - 1] if level else "all"
    axis.text(level + 0.5, middle, code, ha="center", va="center", color="white", visible=room)
    if level == levels:
        label = f"{top - bottom:.0%} {textwrap.shorten(tree['titles'][items[0]], 24)}"
        axis.text(level + 1.1, middle, label, va="center", color=color, visible=room)
        return
    codes = tree["codes"][items, level]
    children = [items[codes == code] for code in np.unique(codes)]
    children.sort(key=lambda child: (tree["chosen"] not in child, -tree["target"][child].sum()))
    for child in children[:4]:
        draw_prefix(axis, tree, shares, child, level + 1, top)
        top -= shares[child].sum()
    axis.bar(level + 1, top - bottom, levels - level, bottom, align="edge", color=GREY)
    axis.text(level + 1.04, bottom, "other codes", va="bottom", visible=top - bottom > 0.035)

def plot_flows(path, codes, titles, history, panels):
    """Where the flow goes, for one user. codes (n, L), titles (n) and the user's history: items.
    panels: {title: n shares, of sum 1}, the target first."""
    codes = np.asarray(codes)
    panels = {title: np.asarray(shares) for title, shares in panels.items()}
    target = next(iter(panels.values()))
    chosen = target.argmax()
    tree = {"codes": codes, "titles": titles, "target": target, "chosen": chosen}
    levels = codes.shape[1]
    width = 2.8 + 0.8 * max(3, levels)                         # inches of each panel
    with picture(path, 1, 2, (width * 2, 4.8)) as axes:
        for axis, (title, shares) in zip(axes, panels.items()):
            draw_prefix(axis, tree, shares, np.arange(len(codes)), 0, 1.0)
            for level in range(levels + 1):
                axis.text(level + 0.5, -0.05, f"code {level}" if level else "root", ha="center")
            axis.set(title=title, xlim=(0, levels + 3.6), ylim=(0, 1))
            axis.axis("off")
        last = ", ".join(titles[item] for item in history[-8:])
        code = tuple(codes[chosen].tolist())
        text = (f"The user's last items: {last}. Height: share. Orange: the path to the left "
                f"panel's largest item, {titles[chosen]}, ID {code}.")
        axes[0].text(0, -0.09, textwrap.fill(text, int(22 * width)), va="top")

def plot_lines(path, lines, xlabel, ylabel):
    """Draw {name: [(x, y), …]}: a line of points, named in a legend, or a point beside its name."""
    with picture(path, 1, 1, (7.5, 5.5)) as [axis]:
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
