"""Does it help on real logs? MovieLens-100K, three seeds; Amazon Beauty, two.

    python data/beauty/prepare.py FOLDER                once, for Beauty
    python data/experiments/real_logs.py [--logs ml-100k]

Settings were chosen by NDCG@10 of validation items, six trials a method, seed 42 (--trials trains
and prints them). Thirds of the users: by how many users took their test item."""
import numpy as np

import common
from common import mean

REAL = ":teacher=blend:debias=0:power=4:rate=.0015:sampler=reward_draws"
LOGS = {"ml-100k": ("ml-100k", "--width 128 --layers 3 --batch 6", (42, 43, 44)),
        "beauty": ("data/beauty", "--width 128 --layers 3 --batch 32", (42, 43)),
        "toy": ("toy", "", (42,))}
# The first of each is the chosen one
TRIALS = {
    "ml-100k": {
        "sft": ["sft:dropout=.2:epochs=8", "sft:dropout=.2:epochs=12", "sft:dropout=.3:epochs=12",
                "sft:dropout=.2:epochs=8:rate=.003", "sft:dropout=.1:epochs=6", "sft:dropout=.4"],
        "tb": [f"tb{REAL}:trajectories=2:epochs=5:lam={lam}" for lam in (.3, .1, 1)]
        + [f"tb{REAL}:trajectories=2:epochs=3:lam=.3", f"tb{REAL}:epochs=5:lam=.3",
           f"tb{REAL}:trajectories=2:epochs=8:lam=.3:dropout=.2"],
        "paper": [f"paper:teacher=blend:rate=.0015:epochs=5:dropout={drop}:lam={lam}"
                  for drop in (.2, .4) for lam in (1, .3, .1)],
        "distill": [f"distill{REAL}:trajectories=2:epochs=5:lam={lam}" for lam in (3, 1, 10)]
        + [f"distill{REAL}:trajectories=2:epochs={n}:lam=3" for n in (3, 8)]
        + [f"distill{REAL}:epochs=5:lam=3"]},
    "toy": {name: [name] for name in ("sft", "tb", "paper", "distill")}}
TRIALS["beauty"] = TRIALS["ml-100k"]

def rare(run, data):
    """NDCG@10 of the third of the users whose test items were taken least."""
    count = np.bincount([item for history in data.train for item in history],
                        minlength=len(data.titles))
    order = np.argsort([count[history[-1]] for history in data.histories], kind="stable")
    return {"rare": run["by_user"]["ndcg@10"][np.array_split(order, 3)[0]].mean()}

def main(lab):
    """Train what is not kept; print the table of each log, beside each other."""
    logs = ["toy"] if lab.quick else lab.args.logs
    columns = {}
    for log in logs:
        folder, flags, seeds = LOGS[log]
        best = {method: tried[0] for method, tried in TRIALS[log].items()}
        if lab.args.trials:
            tried = sum(TRIALS[log].values(), [])
            tried.sort(key=lambda name: name.startswith("sft") and name != best["sft"])
            for name, runs in lab.trained(folder, tried, seeds[:1], flags, rare).items():
                print(log, name, mean(runs, "validation", 4), mean(runs, digits=4), flush=True)
        names = {"cm": "cm", "blend": "blend", "sft": best["sft"], "paper": best["paper"],
                 "tb": best["tb"], "distill": best["distill"], "product": "product",
                 "sft, epochs of both": "sft:dropout=.2:epochs=13"}
        found = lab.trained(folder, [*names.values()], seeds, flags, rare)
        columns[log] = {name: [mean(found[method], "ndcg@10", 4), mean(found[method], "rare", 4),
                               mean(found[method], "coverage@10", 2)]
                        for name, method in names.items()}
    header = [cell for log in logs for cell in (f"{log}: NDCG@10", "rarest third", "coverage")]
    rows = [[f"`{name}`", *sum([columns[log][name] for log in logs], [])]
            for name in columns[logs[0]]]
    lab.table("data/results.md", ["", *header], rows)

if __name__ == "__main__":
    main(common.Lab(**{"--logs": ["ml-100k", "beauty"], "--trials": None}))
