"""Does it help on real logs? MovieLens-100K, three seeds; Amazon Beauty, two.

    python data/beauty/prepare.py FOLDER                once, for Beauty
    python data/experiments/real_logs.py [--logs ml-100k]

Six trials a method, seed 42 (on Beauty, three of all but SFT); the one with the highest NDCG@10 of
validation items is trained with the other seeds. Beauty's IDs, those of LETTER's authors or ours,
are chosen so by the first trial of SFT. Rarest third: users whose test item fewest others took."""
from functools import partial

import numpy as np

import common
from common import gflowgr, mean, rivals, saved
from reward import Teacher

SIZE = "--width 128 --layers 3"
# Folder, flags to choose from, seeds, trials of a method other than SFT
LOGS = {"ml-100k": ("ml-100k", [f"{SIZE} --batch 6"], (42, 43, 44), 6),
        "beauty": ("data/beauty", [f"{SIZE} --batch 32 --ids {ids}" for ids in (
            "mixed", "data/beauty/letter_ids.csv")], (42, 43), 3),
        "toy": ("toy", [""], (42,), 1)}
TB = ":teacher=blend:debias=0:power=4:rate=.0015:sampler=reward_draws:trajectories=2:epochs=5"
TRIALS = {
    "sft": [f"sft:{changes}" for changes in (
        "dropout=.2:epochs=8", "dropout=.2:epochs=12", "dropout=.3:epochs=12",
        "dropout=.2:epochs=8:rate=.003", "dropout=.1:epochs=6", "dropout=.4:epochs=20")],
    "tb": [f"tb{TB}:{changes}" for changes in (
        "lam=.3", "lam=1", "lam=.1", "lam=.3:epochs=3", "lam=.3:trajectories=8",
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
        folder, choices, seeds, count = LOGS[log]
        extra = partial(more, out=lab.runs / common.Path(folder).name)
        trials = {method: names if method == "sft" and not lab.quick else names[:count]
                  for method, names in TRIALS.items()}
        def tried(methods, flags):
            return lab.trained(folder, methods, seeds[:1], flags, extra)
        by_ids = {flags: tried(trials["sft"][:1], flags) for flags in choices}
        flags = max(by_ids, key=lambda flags: validation(by_ids[flags], trials["sft"][0]))
        found = tried(trials["sft"], flags)
        best = {"sft": max(trials["sft"], key=partial(validation, found))}
        # SFT first: all others go on from its best trial
        found |= tried([best["sft"], *sum([*trials.values()][1:], [])], flags)
        for method, names in trials.items():
            best[method] = max(names, key=partial(validation, found))
            for name in names:
                print(log, name, mean(found[name], "validation", 4), mean(found[name], digits=4))
        names = {"cm": "cm", "blend": "blend", **best, "sft, longer": longer(best)}
        found = lab.trained(folder, [*names.values()], seeds, flags, extra)
        columns[log] = {name: [mean(found[method], digits=4), mean(found[method], "rare", 4),
                               mean(found[method], "coverage@10", 2)]
                        for name, method in names.items()}
    header = [cell for log in columns for cell in (f"{log}: NDCG@10", "rarest third", "coverage")]
    rows = [[f"`{name}`", *sum([column[name] for column in columns.values()], [])]
            for name in ("cm", "blend", "product", "sft", "sft, longer", "paper", "tb", "distill")]
    lab.table("data/results.md", ["", *header], rows)

def validation(found, name):
    """NDCG@10 of validation items in the trial of a method."""
    return found[name][0]["validation"]

def longer(best):
    """The best SFT with as many epochs as it and the best `tb` have together."""
    epochs = sum(gflowgr.recipe_of(best[name]).epochs for name in ("sft", "tb"))
    return f"{best['sft']}:epochs={epochs}"

if __name__ == "__main__":
    main(common.Lab(**{"--logs": ["ml-100k", "beauty"]}))
