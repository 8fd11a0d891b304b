"""Does it help on real logs? MovieLens-100K, three seeds; Amazon Beauty, two seeds.

    python data/beauty/prepare.py FOLDER                        once, for Beauty
    python data/experiments/real_logs.py ml-100k                3 hours on one core
    python data/experiments/real_logs.py beauty                 9 hours on one core

Beauty has the semantic IDs of LETTER's authors. Validation chose the settings. Then thirds: of the
users by the length of their histories, and of the items by how many users took them."""
import sys

import numpy as np

from common import ARGS, mean, table, trained

DATA = sys.argv[1] if sys.argv[1:] and sys.argv[1][0] != "-" else "toy" if ARGS.quick else "ml-100k"
SETS = {"ml-100k": ("--codes 256 --width 96", "sft-log:rate=.003", 4, .2, (42, 43, 44), "ml-100k"),
        "beauty": ("--ids data/beauty/letter_ids.csv", "sft-log", 5, 0, (42, 43), "data/beauty"),
        "toy": ("", "sft-log", 1, 0, (42,), "toy")}             # a smoke run
flags, sft, epochs, dropout, seeds, folder = SETS[DATA]
changes = f":epochs={epochs}:dropout={dropout}"
LOG = f":teacher=blend:debias=0:sharp=4:rate=.0015{changes}"
METHODS = {"pop": "pop", "cm": "cm", "svd": "svd", "blend": "blend", "sft": sft,
           "paper": "paper:teacher=blend", "tb": "tb-log" + changes,
           "distill": f"distill{LOG}:lam=3:sampler=reward_draws:trajectories=2",
           "grpo": f"grpo{LOG}:lam=3:trajectories=8", "listnet": f"listnet{LOG}:lam=30",
           "product": "product-log"}
METRICS = ["recall@5", "ndcg@5", "recall@10", "ndcg@10"]

def thirds(run, data):
    """NDCG@10 of each third of the users, and of each third of the target items."""
    count = np.bincount([item for history in data.train for item in history],
                        minlength=len(data.titles))
    values = {"length": [len(history) for history in data.histories],
              "taken": [count[history[-1]] for history in data.histories]}
    found = {}
    for name, value in values.items():
        order = np.argsort(value, kind="stable")
        for number, part in enumerate(np.array_split(order, 3), 1):
            found[f"{name} {number}"] = float(run["by_user"]["ndcg@10"][part].mean())
    return found

found = trained(folder, [*METHODS.values()], seeds, flags, extra=thirds)
found = {name: found[method] for name, method in METHODS.items()}
rows = []
for name, runs in found.items():
    last = [mean(runs, "validation", 4), mean(runs, "minutes", 0)]
    trains = runs[0]["validation"] > 0
    rows.append([f"`{name}`", *[mean(runs, key, 4) for key in METRICS], *last[:2 * trains]])
    rows[-1] += [""] * 2 * (not trains)
table("data/results.md", [DATA, "Recall@5", "NDCG@5", "Recall@10", "NDCG@10",
                          "validation NDCG@10", "minutes"], rows)
PARTS = [f"{name} {number}" for name in ("length", "taken") for number in (1, 2, 3)]
rows = [[f"`{name}`", *[mean(found[name], part) for part in PARTS]]
        for name in ("blend", "sft", "tb", "product")]
table("data/results.md", [f"{DATA}: NDCG@10", "short histories", "middle", "long",
                          "rarely taken items", "middle", "often"], rows)
