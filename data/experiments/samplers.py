"""Which items should TB read? Worlds 21 to 23, seed 42.

    python data/experiments/samplers.py         45 minutes on one core

Every sampler gives `tb` eight items of each context in each of eight epochs. λ was chosen for each
in worlds 7 and 11 (a table of data/log.md). Two shares say what is read: of the items that a user
likes, but was never shown (if anybody took them), those that are read at least once; and of all
that is read, what the user likes."""
from functools import wraps

import numpy as np

from common import gflowgr, mean, over_worlds, table

LAMS = (.3, 1, 3, 10)
READ = []                       # (user, items) of all contexts of a training

def recorded(sampler):
    """The sampler, which writes down what it returns."""
    @wraps(sampler)
    def record(batch, *given):
        items = sampler(batch, *given)
        READ.extend(zip(batch.users, items.tolist()))
        return items
    return record

def what_was_read(run, data):
    """Both shares, means over users, of the training since the last call."""
    read = [[] for _ in data.train]
    for user, items in READ:
        read[user] += items
    READ.clear()
    taken = {item for history in data.train for item in history}
    hidden = [(liked - shown) & taken
              for liked, shown in zip(data.truth["liked"], data.truth["shown"])]
    reached = [len(own.intersection(items)) / max(1, len(own)) for own, items in zip(hidden, read)]
    liked = [np.mean([item in own for item in items] or 0)
             for own, items in zip(data.truth["liked"], read)]
    return {"reached": float(np.mean(reached)), "liked of read": float(np.mean(liked))}

gflowgr.SAMPLERS = {name: recorded(sampler) for name, sampler in gflowgr.SAMPLERS.items()}

def name_of(sampler, lam):
    """`tb` with this sampler and λ."""
    return f"tb:sampler={sampler}:lam={lam}"

def chosen(sampler):
    """λ by the rule of the log: most liked items, if the log is predicted as well as by `sft`."""
    def ndcg(name):
        return sum(run["ndcg@10"] for run in trials[name])
    names = {lam: name_of(sampler, lam) for lam in LAMS}
    good = [lam for lam in LAMS if ndcg(names[lam]) >= ndcg("sft")]
    if good:
        return max(good, key=lambda lam: sum(run["liked@10"] for run in trials[names[lam]]))
    return max(LAMS, key=lambda lam: ndcg(names[lam]))

names = [name_of(sampler, lam) for sampler in gflowgr.SAMPLERS for lam in LAMS]
trials = over_worlds((7, 11), ["sft", *names], extra=what_was_read)
rows = []
for sampler in gflowgr.SAMPLERS:
    runs = [trials[name_of(sampler, lam)] for lam in LAMS]
    rows.append([f"`{sampler}`", *[f"{mean(run)}, {mean(run, 'liked@10')}" for run in runs],
                 chosen(sampler)])
table("data/log.md", ["NDCG@10, liked@10", *[f"λ {lam}" for lam in LAMS], "chosen"], rows)

METHODS = {sampler: name_of(sampler, chosen(sampler)) for sampler in gflowgr.SAMPLERS}
found = over_worlds((21, 22, 23), ["sft", *METHODS.values()], extra=what_was_read)
rows = [["`sft`", "", mean(found["sft"]), mean(found["sft"], "liked@10"), "", ""]]
for sampler, method in METHODS.items():
    shares = [f"{mean(found[method], share, 2)}" for share in ("reached", "liked of read")]
    rows.append([f"`{sampler}`", chosen(sampler), mean(found[method]),
                 mean(found[method], "liked@10"), *shares])
table("data/results.md", ["items that `tb` reads", "λ", "NDCG@10", "liked@10",
                          "liked, never shown: read", "of what is read: liked"], rows)
