"""Which loss? The committed world, five seeds (other settings: three); worlds 21 to 23, one seed.

    python data/experiments/losses.py       100 minutes on one core

Prints the tables of data/results.md, and draws data/pictures/measures.png: both measures of each
method, lines for different λ."""
from common import (ARGS, ROOT, RUNS, figures, mean, mean_and_spread, over_worlds, point, table,
                    trained)

PAPER = "paper:logged=0:debias=.5:sharp=3:lam=.3"               # the paper's recipe, v out of L_TB
METHODS = ["svd:debias=.5", "sft", "paper", PAPER, "sdpo", "grpo", "db", "tb", "vargrad", "listnet",
           "distill", "product"]
CURVES = {"svd": ["svd", "svd:debias=.25", "svd:debias=.5", "svd:debias=.75"],
          "tb": ["sft", "tb:lam=.3", "tb:lam=1", "tb:lam=3", "tb"],
          "listnet": ["sft", "listnet:lam=30", "listnet:lam=100", "listnet", "listnet:lam=1000"],
          "distill": ["sft", "distill:lam=3", "distill:lam=10", "distill"],
          "grpo": ["sft", "grpo:lam=1", "grpo:lam=3", "grpo", "grpo:lam=30"]}
SEEDS = (42, 43, 44, 45, 46)
found = trained("toy", METHODS, SEEDS)
worlds = over_worlds((21, 22, 23), METHODS)
others = [name for curve in CURVES.values() for name in curve if name not in METHODS]
others.append("sft:epochs=28")                  # as many as `sft` and `tb` have together
found = trained("toy", ["sft", *others], SEEDS[:3]) | found

rows = []
for method in METHODS:
    cells = [mean_and_spread(found[method], metric) for metric in ("ndcg@10", "liked@10")]
    cells += [mean(worlds[method], "ndcg@10"), mean(worlds[method], "liked@10")]
    rows.append([f"`{method}`", *cells])
table("data/results.md", ["method", "NDCG@10", "liked@10", "NDCG@10, worlds 21 to 23",
                          "liked@10, worlds 21 to 23"], rows)

rows = [[f"`{method}`", mean(found[method]), mean(found[method], "liked@10")] for method in others]
table("data/results.md", ["other settings", "NDCG@10", "liked@10"], rows)

labels = {"svd": "svd, scores divided by popularity^0 to .75", "tb": "tb, λ .3 to 10",
          "listnet": "listnet, λ 30 to 1000", "distill": "distill, λ 3 to 30",
          "grpo": "grpo, λ 1 to 30"}
lines = {labels[name]: [point(found[method]) for method in curve] for name, curve in CURVES.items()}
for method, label in {"sft": "sft", "paper": "paper", PAPER: "paper, v not in L_TB",
                      "product": "product", "sdpo": "sdpo"}.items():
    lines[label] = [point(found[method])]
if not ARGS.check:
    path = RUNS / "measures.png" if ARGS.quick else ROOT / "data/pictures/measures.png"
    figures.plot_lines(path, lines, "NDCG@10", "liked@10")
