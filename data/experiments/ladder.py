"""From the paper's settings, as we read them, to `tb`. Worlds 21 to 23, seed 42.

    python data/experiments/ladder.py

Two tables: one change a row, each row keeps the changes above it; and `tb` with one setting of the
paper. v is the item that was logged next."""
import common
from common import mean

PAPER = "paper:positive=0:debias=.5:power=3"
STEPS = {"`sft`": "sft", "`paper`": "paper", "TB leaves v to L_GR": "paper:positive=0",
         "scores divided by a root of popularity": "paper:positive=0:debias=.5",
         "scores to the power 3": PAPER, "λ 10": f"{PAPER}:lam=10",
         "items drawn from P, not by the curriculum": f"{PAPER}:lam=10:sampler=policy_draws",
         "eight items": f"{PAPER}:lam=10:sampler=policy_draws:trajectories=8",
         "Z computed, not learned; rate, epochs, dropout of `tb`": "tb"}
BACK = {"`tb`": "tb", "TB reads v": "tb:positive=1", "δ 0": "tb:debias=0", "power 1": "tb:power=1",
        "items from the curriculum": "tb:sampler=curriculum", "three items": "tb:trajectories=3",
        "λ 1": "tb:lam=1", "learned Z": "tb:exact=0", "dropout .4": "tb:dropout=.4"}

def main(lab):
    """Train what is not kept; print both tables."""
    found = lab.over_worlds((21, 22, 23), list(dict.fromkeys([*STEPS.values(), *BACK.values()])))
    for page, title, steps, base in (
            ("README.md", "each row keeps the changes above it", STEPS, "sft"),
            ("data/paper.md", "`tb` with one of the paper's choices", BACK, "tb")):
        other = sum(run["liked@10"] for run in found[base])
        rows = []
        for label, name in steps.items():
            gain = sum(run["liked@10"] for run in found[name]) / other - 1
            rows.append([label, mean(found[name]), mean(found[name], "liked@10"),
                         "" if name == base else f"{round(100 * gain):+d}%"])
        lab.table(page, [title, "NDCG@10", "liked@10", f"over `{base}`"], rows)

if __name__ == "__main__":
    main(common.Lab())
