"""From which size of the log on is the policy better than its teacher?

    python data/experiments/scale.py            5 hours on one core

Three worlds with 700, 2,800 and 11,200 users: the same items, and the first users are the same. A
larger log gets a larger GPT-2. The λ of the larger sizes are chosen in world 51, with as many
trials for each loss; those of 700 users are the defaults. The tables are of worlds 61 to 63. Draws
data/pictures/scale.png."""
from common import ARGS, ROOT, RUNS, figures, mean, mean_and_spread, over_worlds, point, table

FLAGS = {700: "", 2800: "", 11200: "--width 128 --batch 32"}
SFT = {700: "sft", 2800: "sft", 11200: "sft:epochs=12:dropout=.2"}
EPOCHS = {700: "", 2800: ":epochs=5", 11200: ":epochs=3"}
SFT_TRIED = {700: [], 2800: ["sft:dropout=.2", "sft:epochs=12:dropout=.2", "sft:epochs=12"],
             11200: []}
TRIED = {700: {}, 2800: {"tb": (1, 3, 10), "distill": (3, 10, 30), "listnet": (30, 100, 300),
                         "grpo": (1, 3, 10)},
         11200: {"tb": (1, 3), "distill": (3, 10), "listnet": (30, 100)}}  # grpo: twice as slow
CHOSEN = {700: dict(tb=10, distill=30, listnet=300, grpo=10),
          2800: dict(tb=3, distill=30, listnet=300, grpo=3),
          11200: dict(tb=1, distill=3, listnet=30)}
# With the division of the last product, which is above the chosen `tb`; not in the picture
OTHERS = {700: [], 2800: [], 11200: ["tb:epochs=3:lam=1:debias=.75"]}
TEACHERS = ["svd", "svd:debias=.25", "svd:debias=.5", "svd:debias=.75"]

def named(loss, lam, size):
    """The name of a method: its loss, epochs and λ."""
    return f"{loss}{EPOCHS[size]}:lam={lam}"

lines = {}
for size in [2800] if ARGS.quick else FLAGS:
    names = [named(loss, lam, size) for loss, lams in TRIED[size].items() for lam in lams]
    if names:
        # Every loss goes on from the last SFT before it, so other trials of SFT come after them
        names = ["svd:debias=.5", SFT[size], *names, *SFT_TRIED[size]]
        found = over_worlds((51,), names, FLAGS[size], num_users=size)
        rows = [[f"`{name}`", mean(runs), mean(runs, "liked@10")] for name, runs in found.items()]
        table("data/log.md", [f"world 51, {size:,} users", "NDCG@10", "liked@10"], rows)
    names = [named(loss, lam, size) for loss, lam in CHOSEN[size].items()]
    drawn = ["svd:debias=.5", SFT[size], *names, "product"]
    methods = [*TEACHERS, SFT[size], *names, *OTHERS[size], "product", "product:debias=.75"]
    found = over_worlds((61, 62, 63), methods, FLAGS[size], num_users=size)
    rows = []
    for method, runs in found.items():
        cells = [mean_and_spread(runs, metric) for metric in ("ndcg@10", "liked@10")]
        minutes = mean(runs, "minutes", 1) if runs[0]["validation"] else ""
        rows.append([f"`{method}`", *cells, minutes])
        if method in drawn:
            lines.setdefault(method.partition(":")[0], []).append(point(runs))
    table("data/results.md", [f"{size:,} users", "NDCG@10", "liked@10", "minutes"], rows)
if not ARGS.check:
    path = RUNS / "scale.png" if ARGS.quick else ROOT / "data/pictures/scale.png"
    figures.plot_lines(path, lines, "NDCG@10", "liked@10")
