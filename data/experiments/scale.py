"""From which size of the log on does `tb` pass its teacher? Draws data/pictures/scale.png.

    python data/experiments/scale.py

Worlds 61 to 63 with 700 to 11,200 users: the same items, and the first users are the same. From
2,800 users on, `sft` and `tb` have settings of their own, of three trials each in world 51, by the
rule of trials.py; with 11,200, GPT-2 is twice as wide."""
import common
from common import ROOT, mean
from data import figures
from trials import chosen

FLAGS = {700: "", 1400: "", 2800: "", 11200: "--width 128 --batch 32"}
TRIED = ["sft:epochs=12:dropout=.2", "tb:epochs=3:lam=1", "tb:epochs=3:lam=3",
         "tb:epochs=3:lam=10", "sft:epochs=12:dropout=.1", "sft:epochs=8:dropout=.2"]

def settings_of(size, lab):
    """The methods `sft` and `tb` with the settings for this size of the log."""
    if size < 2800:
        return "sft", "tb"
    found = lab.over_worlds((51,), TRIED, FLAGS[size], num_users=size)
    for name, runs in found.items():
        print(size, "world 51:", name, mean(runs), mean(runs, "liked@10"))
    sft = max(TRIED[:1] + TRIED[4:], key=lambda name: found[name][0]["ndcg@10"])
    # All trials of tb go on from the first SFT
    return sft, chosen({name: found[name] for name in TRIED[1:4]}, found[TRIED[0]])

def main(lab):
    """Train what is not kept; print the figures, draw the picture."""
    panels = {"NDCG@10: does the list predict the log?": {},
              "liked@10: does the user like the list?": {}}
    sizes = [700] if lab.quick else FLAGS
    for size in sizes:
        sft, tb = settings_of(size, lab)
        methods = {"teacher": "svd:debias=.5", "sft": sft, "tb": tb, "product": "product"}
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
