"""Is SFT, over which all gains are counted, tuned as well as the others? Worlds 7 and 11, seed 42.

    python data/experiments/sft.py              12 minutes on one core

Eight trials, as for the other methods. Prints the table of data/log.md."""
from common import mean, over_worlds, table

TRIALS = ["sft", "sft:epochs=12", "sft:epochs=30", "sft:rate=.0007", "sft:rate=.003",
          "sft:dropout=.2", "sft:dropout=.5", "sft:epochs=30:rate=.003:dropout=.5"]
rows = []
for name, runs in over_worlds((7, 11), TRIALS).items():
    rows.append([f"`{name}`", mean(runs), mean(runs, "liked@10"), mean(runs, "validation")])
table("data/log.md", ["trial of `sft`", "NDCG@10", "liked@10", "validation NDCG@10"], rows)
