"""Does it help on real logs? MovieLens-100K, three seeds; Amazon Beauty, two.

    python data/beauty/prepare.py FOLDER                once, for Beauty
    python data/experiments/real_logs.py [--logs ml-100k]

Six trials a method, seed 42; of them, the one with the highest NDCG@10 of validation items is
trained with the other seeds. Rarest third: users whose test item was taken by fewest others."""
from functools import partial

import numpy as np

import common
from common import gflowgr, mean, rivals, saved
from reward import Teacher

SIZE = "--width 128 --layers 3"
LOGS = {"ml-100k": ("ml-100k", f"{SIZE} --batch 6", (42, 43, 44)),
        "beauty": ("data/beauty", f"{SIZE} --batch 32", (42, 43)),
        "letter": ("data/beauty", f"{SIZE} --batch 32 --ids data/beauty/letter_ids.csv", (42, 43)),
        "toy": ("toy", "", (42,))}
TB = ":teacher=blend:debias=0:power=4:rate=.0015:sampler=reward_draws:trajectories=2:epochs=5"
TRIALS = {                                                      # SFT first: all go on from its best
    "sft": [f"sft:{changes}" for changes in (
        "dropout=.2:epochs=8", "dropout=.2:epochs=12", "dropout=.3:epochs=12",
        "dropout=.2:epochs=8:rate=.003", "dropout=.1:epochs=6", "dropout=.4:epochs=20")],
    "tb": [f"tb{TB}:{changes}" for changes in (
        "lam=.3", "lam=.1", "lam=1", "lam=.3:epochs=3", "lam=.3:trajectories=8",
        "lam=.3:epochs=8:dropout=.2")],
    "paper": [f"paper:teacher=blend:rate=.0015:epochs=5:dropout={dropout}:lam={lam}"
              for dropout in (.2, .4) for lam in (1, .3, .1)],
    "distill": [f"distill{TB}:{changes}" for changes in (
        "lam=3", "lam=1", "lam=10", "lam=3:epochs=3", "lam=3:trajectories=8", "lam=3:epochs=8")],
    "product": [f"product:debias={debias}:power={power}" for debias in (0, .25)
                for power in (3, 9, 15)]}

def more(run, data, out):
    """NDCG@10 of the rarest third, and of the validation items of all users."""
    count = np.bincount([item for history in data.train for item in history],
                        minlength=len(data.titles))
    order = np.argsort([count[history[-1]] for history in data.histories], kind="stable")
    name = run["method"]
    if name.startswith("product"):
        recommend = rivals.product_of(name, data, run["sft"])
    elif name in gflowgr.TEACHERS:
        recommend = Teacher(name, data).recommend
    else:
        recommend = gflowgr.Policy.from_pretrained(saved(out, name, run["seed"])).recommend
    by_user, _ = gflowgr.evaluate(recommend, [history[:-1] for history in data.histories])
    return {"rare": run["by_user"]["ndcg@10"][np.array_split(order, 3)[0]].mean(),
            "validation": by_user["ndcg@10"].mean()}

def main(lab):
    """Train what is not kept; print the trials, and the table of all logs beside each other."""
    columns = {}
    for log in ["toy"] if lab.quick else lab.args.logs:
        folder, flags, seeds = LOGS[log]
        extra = partial(more, out=lab.runs / common.Path(folder).name)
        best = {}
        for method, trials in TRIALS.items():
            trials = trials[:1] if lab.quick else trials
            before = [best["sft"]] if best else []
            found = lab.trained(folder, before + trials, seeds[:1], flags, extra)
            best[method] = max(trials, key=lambda name: found[name][0]["validation"])
            for name in trials:
                print(log, name, mean(found[name], "validation", 4), mean(found[name], digits=4))
        names = {"cm": "cm", "blend": "blend", **best, "sft, longer": longer(best)}
        found = lab.trained(folder, [*names.values()], seeds, flags, extra)
        columns[log] = {name: [mean(found[method], digits=4), mean(found[method], "rare", 4),
                               mean(found[method], "coverage@10", 2)]
                        for name, method in names.items()}
    header = [cell for log in columns for cell in (f"{log}: NDCG@10", "rarest third", "coverage")]
    rows = [[f"`{name}`", *sum([column[name] for column in columns.values()], [])]
            for name in next(iter(columns.values()))]
    lab.table("data/results.md", ["", *header], rows)

def longer(best):
    """The best SFT with as many epochs as it and the best `tb` have together."""
    epochs = sum(gflowgr.recipe_of(best[name]).epochs for name in ("sft", "tb"))
    return f"{best['sft']}:epochs={epochs}"

if __name__ == "__main__":
    main(common.Lab(**{"--logs": ["ml-100k", "beauty"]}))
