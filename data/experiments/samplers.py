"""Which items should TB read? Worlds 21 to 23, seed 42.

    python data/experiments/samplers.py

Every sampler gives `tb` eight items of each context in each epoch. λ of each is chosen in worlds 7
and 11, by the rule of trials.py. Two columns say what is read: of the items that a user likes, but
was never shown (if anybody took them), those that are read at least once; and of all that is read,
what the user likes."""
from functools import wraps

import numpy as np

import common
from common import gflowgr, mean
from trials import chosen

LAMS = (1, 3, 10, 30)
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
    truth = data.truth
    hidden = [(liked - shown) & taken for liked, shown in zip(truth["liked"], truth["shown"])]
    reached = [len(own.intersection(items)) / max(1, len(own)) for own, items in zip(hidden, read)]
    liked = [np.mean([item in own for item in items] or 0)
             for own, items in zip(truth["liked"], read)]
    return {"reached": np.mean(reached), "liked of read": np.mean(liked)}

def main(lab):
    """Train what is not kept; print the table."""
    samplers = dict(gflowgr.SAMPLERS)
    gflowgr.SAMPLERS.update({name: recorded(sampler) for name, sampler in samplers.items()})
    names = {sampler: [f"tb:sampler={sampler}:lam={lam}" for lam in LAMS] for sampler in samplers}
    found = lab.over_worlds((7, 11), ["sft", *sum(names.values(), [])], extra=what_was_read)
    best = {sampler: chosen({name: found[name] for name in names[sampler]}, found["sft"])
            for sampler in samplers}
    found = lab.over_worlds((21, 22, 23), ["sft", *best.values()], extra=what_was_read)
    rows = [["`sft`", "", mean(found["sft"]), mean(found["sft"], "liked@10"), "", ""]]
    for sampler, method in best.items():
        rows.append([f"`{sampler}`", method.rpartition("=")[2], mean(found[method]),
                     mean(found[method], "liked@10"), mean(found[method], "reached", 2),
                     mean(found[method], "liked of read", 2)])
    lab.table("data/results.md", ["items that `tb` reads", "λ", "NDCG@10", "liked@10",
                                  "liked, never shown: read", "of what is read: liked"], rows)
    gflowgr.SAMPLERS.update(samplers)

if __name__ == "__main__":
    main(common.Lab())
