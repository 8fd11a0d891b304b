"""How were settings chosen? Eight trials a method in worlds 7 and 11, by one rule for all.

    python data/experiments/trials.py [--only METHOD …]

The rule: of the trials whose NDCG@10 is at least that of `sft`, the one with the most liked items;
if there is none, the one with the highest NDCG@10. For `sft`: the highest NDCG@10."""
import common
from common import mean

# All but SFT: a first trial, and what each of seven others has in its place
AROUND = {
    "paper": ({"rate": .003, "epochs": 8, "dropout": .4},
              {"epochs": 4}, {"epochs": 12}, {"dropout": .2}, {"dropout": 0}, {"rate": .0015},
              {"rate": .0009}, {"epochs": 4, "dropout": .2}),
    "tb": ({"rate": .003, "epochs": 8, "dropout": 0, "lam": 10, "trajectories": 8},
           {"lam": 1}, {"lam": 3}, {"epochs": 4}, {"epochs": 12}, {"dropout": .1},
           {"trajectories": 4}, {"trajectories": 16}),
    "db": ({"rate": .003, "epochs": 8, "dropout": .1, "lam": 10, "trajectories": 8},
           {"lam": 1}, {"lam": 3}, {"epochs": 4}, {"dropout": 0}, {"rate": .0015},
           {"trajectories": 4}, {"trajectories": 16}),
    "sdpo": ({"rate": .0009, "epochs": 8, "dropout": .2, "lam": 10, "trajectories": 7, "beta": 1},
             {"lam": 1}, {"beta": .3}, {"beta": .1}, {"rate": .003}, {"epochs": 4},
             {"trajectories": 3}, {"sampler": "uniform"}),
    "vargrad": ({"rate": .003, "epochs": 8, "dropout": .1, "lam": 3, "trajectories": 8},
                {"lam": 1}, {"lam": 10}, {"epochs": 4}, {"dropout": 0}, {"rate": .0015},
                {"trajectories": 4}, {"trajectories": 16}),
    "listnet": ({"rate": .003, "epochs": 8, "dropout": 0, "lam": 300, "trajectories": 8},
                {"lam": 30}, {"lam": 100}, {"epochs": 4}, {"dropout": .1}, {"rate": .0015},
                {"trajectories": 4}, {"trajectories": 16}),
    "distill": ({"rate": .003, "epochs": 8, "dropout": .2, "lam": 30, "trajectories": 8},
                {"lam": 10}, {"lam": 100}, {"epochs": 4}, {"dropout": 0}, {"rate": .0015},
                {"trajectories": 4}, {"trajectories": 16}),
    "grpo": ({"rate": .003, "epochs": 8, "dropout": 0, "lam": 1, "trajectories": 16, "beta": .01},
             {"lam": .3}, {"lam": .1}, {"lam": 3}, {"epochs": 4}, {"rate": .0015},
             {"trajectories": 8}, {"beta": .1}),
    "product": ({"debias": .5, "power": 9},
                {"power": 3}, {"power": 6}, {"power": 15}, {"debias": .75, "power": 3},
                {"debias": .75, "power": 6}, {"debias": .75}, {"debias": .75, "power": 15})}
SFT = ["sft", "sft:epochs=12", "sft:epochs=30", "sft:dropout=.2", "sft:dropout=.5",
       "sft:rate=.003", "sft:rate=.0008", "--batch 16"]

METHODS = ["sft", *AROUND]

def trials_of(method):
    """Names of a method's trials."""
    if method == "sft":
        return SFT
    first, *others = AROUND[method]
    return [":".join([method, *[f"{field}={value}" for field, value in (first | other).items()]])
            for other in ({}, *others)]

def chosen(found, base):
    """The name of the chosen trial: found {trial: its runs}, base: the runs of sft, or None."""
    as_good = [name for name, runs in found.items()
               if base and float(mean(runs, digits=5)) >= float(mean(base, digits=5))]
    key = "liked@10" if as_good else "ndcg@10"
    return max(as_good or found, key=lambda name: float(mean(found[name], key, 5)))

def main(lab):
    """Train what is not kept; print all trials of the methods asked for, and what was chosen."""
    rows = []
    base = lab.over_worlds((7, 11), ["sft"])["sft"]
    for method in lab.args.only:
        trials = trials_of(method)
        names = [name for name in trials if not name.startswith("--")]
        found = lab.over_worlds((7, 11), ["sft"] * (method != "sft") + names)
        for flags in [name for name in trials if name.startswith("--")]:
            found[flags] = lab.over_worlds((7, 11), [method], flags)[method]
        found = {trial: found[trial] for trial in trials}
        for trial, runs in found.items():
            print(trial, mean(runs), mean(runs, "liked@10"), flush=True)
        best = chosen(found, base if method != "sft" else None)
        rows.append([method, len(found), f"`{best}`", mean(found[best]),
                     mean(found[best], "liked@10")])
    if len(rows) == len(METHODS):
        lab.table("data/results.md", ["method", "trials", "chosen", "NDCG@10", "liked@10"], rows)

if __name__ == "__main__":
    main(common.Lab(**{"--only": METHODS}))
