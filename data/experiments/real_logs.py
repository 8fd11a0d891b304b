"""Does it help on real logs? MovieLens-100K, three seeds; Amazon Beauty, two, one of two rivals.

    python data/beauty/prepare.py FOLDER                        once, for Beauty
    python data/experiments/real_logs.py ml-100k                5 hours on one core
    python data/experiments/real_logs.py beauty                 8 hours on one core

Beauty has the semantic IDs of LETTER's authors. λ was chosen by the NDCG@10 of validation items on
MovieLens (a table of data/log.md), epochs and dropout in earlier trials on both logs. The last
table has thirds: of the users by the length of their histories, and by how many users took their
test item. Minutes are those of the fastest training, because others ran beside it."""
import numpy as np

from common import CHOSEN, LOG, mean, table, trained

FLAGS, SFT, CHANGES = CHOSEN[LOG]
FOLDER, CODES, SEEDS = {"ml-100k": ("ml-100k", "--codes 256 ", (42, 43, 44)),
                        "beauty": ("data/beauty", "", (42, 43)), "toy": ("toy", "", (42,))}[LOG]
R = f":teacher=blend:debias=0:sharp=4:rate=.0015{CHANGES}"
LOSSES = {"paper": f"paper:teacher=blend:rate=.0015{CHANGES}", "tb": f"tb-log{CHANGES}",
          "distill": f"distill{R}:sampler=reward_draws:trajectories=2",
          "grpo": f"grpo{R}:trajectories=8", "listnet": f"listnet{R}"}
TRIED = {"paper": (.3, 1, 3), "tb": (.3, 1, 3), "distill": (1, 3, 10), "grpo": (1, 3, 10),
         "listnet": (10, 30, 100)}
EPOCHS = 13 if LOG == "beauty" else 12                      # of `sft` and `tb` together
LONGER = f"{SFT}:epochs={EPOCHS}"
SFT_TRIED = {"as chosen": SFT, "rate .0015": "sft-log", f"{EPOCHS} epochs": LONGER}
LAM = {"paper": 1, "tb": .3, "distill": 3, "grpo": 3, "listnet": 30}
ONCE = ["grpo", "listnet"] if LOG == "beauty" else []       # two hours each
METRICS = ["recall@5", "ndcg@5", "recall@10", "ndcg@10", "coverage@10"]
PARTS = [f"{name} {number}" for name in ("length", "taken") for number in (1, 2, 3)]

def named(loss, lam):
    """The name of a method: its loss, the settings of real logs, λ."""
    return f"{LOSSES[loss]}:lam={lam}"

def thirds(run, data):
    """NDCG@10 of thirds of the users: by length of history, by how often their target was taken."""
    count = np.bincount([item for history in data.train for item in history],
                        minlength=len(data.titles))
    length = [len(history) for history in data.histories]
    taken = [count[history[-1]] for history in data.histories]
    order = [users for value in (length, taken)
             for users in np.array_split(np.argsort(value, kind="stable"), 3)]
    return {part: float(run["by_user"]["ndcg@10"][users].mean())
            for part, users in zip(PARTS, order)}

def results(methods, seeds):
    """What `trained` returns, with thirds."""
    return trained(FOLDER, methods, seeds, CODES + FLAGS, extra=thirds)

METHODS = {"pop": "pop", "cm": "cm", "svd": "svd", "blend": "blend", "sft": SFT,
           **{loss: named(loss, lam) for loss, lam in LAM.items()}, "product": "product-log"}
names = list(METHODS.values())
trials = {loss: {f"λ {lam}": named(loss, lam) for lam in lams} for loss, lams in TRIED.items()}
trials["sft"] = SFT_TRIED           # last, because a loss goes on from the last SFT before it
if LOG == "ml-100k":
    names += [name for tried in trials.values() for name in tried.values()]
LONG = f"sft, {EPOCHS} epochs"
METHODS[LONG] = LONGER
found = results(list(dict.fromkeys(names)), SEEDS[:1])      # in one call: SFT is trained once
if LOG == "ml-100k":
    rows = [[f"`{loss}`", *[f"{label}: {mean(found[name], 'validation', 4)}"
                            for label, name in trials[loss].items()]] for loss in ["sft", *TRIED]]
    table("data/log.md", ["validation NDCG@10, MovieLens", "", "", ""], rows)

found |= results([method for name, method in METHODS.items() if name not in ONCE], SEEDS)
rows = []
for name, method in METHODS.items():
    runs = found[method]
    cells = [mean(runs, key, 2 if "coverage" in key else 4) for key in METRICS]
    last = ["", "", ""]                                         # of what is not trained
    if runs[0]["validation"]:
        last = [mean(runs, "validation", 4), len(runs), round(min(r["minutes"] for r in runs))]
    rows.append([f"`{name}`", *cells, *last])
table("data/results.md", [LOG, "Recall@5", "NDCG@5", "Recall@10", "NDCG@10", "coverage@10",
                          "validation NDCG@10", "trainings", "minutes"], rows)
rows = [[f"`{name}`", *[mean(found[METHODS[name]], part) for part in PARTS]]
        for name in ("blend", "sft", LONG, "tb", "product")]
table("data/results.md", [f"{LOG}: NDCG@10", "short histories", "middle", "long",
                          "rarely taken items", "middle", "often"], rows)
