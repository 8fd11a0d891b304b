"""Does it help on real logs? MovieLens-100K, three seeds; Amazon Beauty, one.

    python data/beauty/prepare.py FOLDER                        once, for Beauty
    python data/experiments/real_logs.py ml-100k                3 hours on one core
    python data/experiments/real_logs.py beauty                 80 minutes on one core

Beauty has the semantic IDs of LETTER's authors. Validation chose the settings. Then thirds: of the
users by the length of their histories, and by how many users took their test item."""
import numpy as np

from common import CHOSEN, LOG, mean, table, trained

FLAGS, SFT, CHANGES = CHOSEN[LOG]
SEEDS, FOLDER, CODES = {"ml-100k": ((42, 43, 44), "ml-100k", "--codes 256 "),
                        "beauty": ((42,), "data/beauty", ""), "toy": ((42,), "toy", "")}[LOG]
RIVAL = f":teacher=blend:debias=0:sharp=4:rate=.0015{CHANGES}"
METHODS = {"pop": "pop", "cm": "cm", "svd": "svd", "blend": "blend", "sft": SFT,
           "paper": "paper:teacher=blend", "tb": "tb-log" + CHANGES,
           "distill": f"distill{RIVAL}:lam=3:sampler=reward_draws:trajectories=2",
           "grpo": f"grpo{RIVAL}:lam=3:trajectories=8", "listnet": f"listnet{RIVAL}:lam=30",
           "product": "product-log"}
if LOG == "beauty":                     # the other losses take an hour or more each on this log
    for name in ("paper", "distill", "grpo", "listnet"):
        del METHODS[name]
METRICS = ["recall@5", "ndcg@5", "recall@10", "ndcg@10", "coverage@10"]

def thirds(run, data):
    """NDCG@10 of thirds of the users: by length of history, by how often their target was taken."""
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

found = trained(FOLDER, [*METHODS.values()], SEEDS, CODES + FLAGS, extra=thirds)
found = {name: found[method] for name, method in METHODS.items()}
rows = []
for name, runs in found.items():
    last = ["", ""]                                             # of what is not trained
    if runs[0]["validation"]:
        last = [mean(runs, "validation", 4), mean(runs, "minutes", 0)]
    cells = [mean(runs, key, 2 if "coverage" in key else 4) for key in METRICS]
    rows.append([f"`{name}`", *cells, *last])
table("data/results.md", [LOG, "Recall@5", "NDCG@5", "Recall@10", "NDCG@10", "coverage@10",
                          "validation NDCG@10", "minutes"], rows)
PARTS = [f"{name} {number}" for name in ("length", "taken") for number in (1, 2, 3)]
rows = [[f"`{name}`", *[mean(found[name], part) for part in PARTS]]
        for name in ("blend", "sft", "tb", "product")]
table("data/results.md", [f"{LOG}: NDCG@10", "short histories", "middle", "long",
                          "rarely taken items", "middle", "often"], rows)
