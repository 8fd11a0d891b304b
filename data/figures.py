"""Every picture: of a run with --oracle, and of the experiments."""
import contextlib
import os

import numpy as np

# Told apart by colour-blind readers, too; of methods that are not here: #cc79a7
COLORS = {"sft": "#8a8a8a", "paper": "#8a8a8a", "tb": "#d55e00", "teacher": "#0072b2",
          "product": "#009e73"}
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
    """Where the flow goes, for one user: a box is a prefix, as high as the share of its items; to
    its right are its branches. Small ones are left out. Dark: the way to the item with the largest
    R. codes (n, L), titles (n); panels: {title: n shares, of sum 1}, one of them "R/Z"."""
    codes = np.asarray(codes)
    levels = codes.shape[1]
    target = np.asarray(panels["R/Z"])
    keys = []                       # below a prefix, the branch with the largest share comes first
    prefixes = []                   # of each level: the prefix of each item, as a number (n,)
    for level in range(levels + 1):
        prefix = np.unique(codes[:, :level], axis=0, return_inverse=True)[1]
        prefixes.append(prefix)
        keys += [-np.bincount(prefix, target)[prefix], prefix]
    order = np.lexsort(keys[::-1])
    with picture(path, len(panels), (3 * len(panels), 4)) as axes:
        for axis, (title, shares) in zip(axes, panels.items()):
            shares = np.asarray(shares)
            for level, prefix in enumerate(prefixes):
                first = np.flatnonzero(np.diff(prefix[order], prepend=-1))
                heights = np.add.reduceat(shares[order], first)
                bottoms = 1 - heights.cumsum()
                large = heights > 0.005
                items = order[first[large]]                    # one item below each prefix
                dark = prefix[items] == prefix[target.argmax()]
                axis.bar(level, heights[large], 1, bottoms[large], align="edge",
                         color=np.where(dark, "#333333", "#b8c4ce"), edgecolor="white")
                name = f"code {level}" if level else "all"
                axis.text(level + 0.5, -0.02, name, ha="center", va="top")
            distance = abs(shares - target).sum()
            axis.text(0, -0.09, "" if title == "R/Z" else f"L1 distance from R/Z: {distance:.2f}",
                      va="top")
            axis.set(title=title, xlim=(0, levels + 1), ylim=(0, 1))
            axis.axis("off")
        for middle, height, item in zip(bottoms[large] + heights[large] / 2, heights[large], items):
            if height > 0.04:                                  # of the last panel's items
                axis.text(levels + 1.1, middle, f"{height:.0%} {titles[item][:24]}", va="center")

def plot_lines(path, panels, xlabel, xticks, log=False):
    """Lines in panels, {title: {name: [(x, y), …]}}; each ends in its name and its last value."""
    with picture(path, len(panels), (4.5 * len(panels), 3.6)) as axes:
        for axis, (title, lines) in zip(axes, panels.items()):
            ends = sorted((line[-1][1], name) for name, line in lines.items())
            spread = np.ptp([y for line in lines.values() for _, y in line])
            height = -np.inf
            for y, name in ends:
                color, weight = COLORS.get(name.split()[0], "#cc79a7"), "normal"
                if name == "tb":
                    weight = "bold"
                axis.plot(*zip(*lines[name]), marker="o", markersize=3, color=color)
                height = max(y, height + 0.07 * spread)        # so that names do not meet
                axis.annotate(f"{name} {y:.3f}".replace("0.", ".", 1), (1.02, height), color=color,
                              xycoords=("axes fraction", "data"), va="center", weight=weight)
            axis.set(title=title, xlabel=xlabel, xscale="log" if log else "linear")
            axis.set_xticks(xticks, [f"{tick:,}" for tick in xticks])
            axis.minorticks_off()
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].figure.subplots_adjust(wspace=0.6)

def draw_squares(path, title, rows):
    """An SVG: of ten squares, so many are full. rows: {name in words: (number, color)}."""
    lines = [f'<text x="0" y="18" font-weight="bold">{title}</text>']
    for place, (name, (number, color)) in enumerate(rows.items()):
        y = 34 + 38 * place
        lines.append(f'<text x="0" y="{y + 18}">{name}</text>')
        for square in range(10):
            x = 350 + 30 * square
            full = 26 * min(max(number - square, 0), 1)
            lines.append(f'<rect x="{x}" y="{y}" width="26" height="26" fill="#ececec"/>')
            lines.append(f'<rect x="{x}" y="{y}" width="{full:.1f}" height="26" fill="{color}"/>')
        lines.append(f'<text x="660" y="{y + 18}">{number:.1f}</text>')
    head = ('<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="15" '
            f'width="700" height="{40 + 38 * len(rows)}">')
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *lines,
                              "</svg>", ""]))
