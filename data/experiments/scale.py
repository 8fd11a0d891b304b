"""From which size of the log on does `tb` pass its teacher? Draws data/pictures/scale.png.

    python data/experiments/scale.py

Worlds 61 to 63 with 700 to 11,200 users: the same items, and the first users are the same. With
11,200 users GPT-2 is twice as wide; `sft` and `tb` have settings of their own there, of three
trials each in world 51."""
import common
from common import ROOT, mean
from data import figures

FLAGS = {700: "", 1400: "", 2800: "", 11200: "--width 128 --batch 32"}
SFT = {700: "sft", 1400: "sft", 2800: "sft:epochs=12:dropout=.2", 11200: "sft:epochs=12:dropout=.2"}
TB = {700: "tb", 1400: "tb", 2800: "tb", 11200: "tb:epochs=3:lam=1"}
TRIED = ["sft:epochs=12:dropout=.2", "tb:epochs=3:lam=1", "tb:epochs=3:lam=3",
         "tb:epochs=3:lam=10", "sft:epochs=12:dropout=.1", "sft:epochs=8:dropout=.2"]

def main(lab):
    """Train what is not kept; print the figures, draw the picture."""
    panels = {"NDCG@10: does the list predict the log?": {},
              "liked@10: does the user like the list?": {}}
    sizes = [700] if lab.quick else FLAGS
    for size in sizes:
        if size == 11200:
            found = lab.over_worlds((51,), TRIED, FLAGS[size], num_users=size)
            for name, runs in found.items():
                print("world 51:", name, mean(runs), mean(runs, "liked@10"))
        methods = {"teacher": "svd:debias=.5", "sft": SFT[size], "tb": TB[size],
                   "product": "product"}
        found = lab.over_worlds((61, 62, 63), [*methods.values()], FLAGS[size], num_users=size)
        for name, method in methods.items():
            print(size, name, mean(found[method]), mean(found[method], "liked@10"),
                  mean(found[method], "minutes", 1) if name in ("sft", "tb") else "")
            for lines, metric in zip(panels.values(), ("ndcg@10", "liked@10")):
                lines.setdefault(name, []).append((size, float(mean(found[method], metric))))
    if not lab.check:
        path = lab.runs / "scale.png" if lab.quick else ROOT / "data/pictures/scale.png"
        figures.plot_lines(path, panels, "users", [*sizes], log=True)

if __name__ == "__main__":
    main(common.Lab())
