"""What becomes of items that nobody took? Worlds 7 and 11, seed 42.

    python data/experiments/nobody.py           15 minutes on one core

A third of the items are in no training history. Their vectors by the log are 0, so they share first
codes, and the teacher scores them 0. Tried: vectors from items with similar texts, for the IDs
alone, or for the teacher as well; similarity of IDs by the common prefix, not by common codes."""
from functools import partial

import numpy as np

from common import ARGS, gflowgr, load_data, mean, table, trained, world
import reward
import tokenizer

METHODS = ["svd:debias=.5", "sft", "tb"]

def of_texts(texts):
    """Unit vectors (n, 64) of texts."""
    return tokenizer.unit(tokenizer.leading_vectors(tokenizer.tf_idf(texts), 64, 0, power=0.5))

def borrowed(log, text):
    """Vectors by the log (n, d); where they are 0, the mean of those of items with similar text."""
    have = np.linalg.norm(log, axis=1) > 1e-6
    near = np.maximum(text[~have] @ text[have].T, 0) ** 4
    log = log.astype(np.float64)
    log[~have] = tokenizer.unit(near @ tokenizer.unit(log[have]))
    return log, have

def features(kind, texts, histories, seed):
    """item_features with borrowed vectors."""
    log = tokenizer.unit(tokenizer.item_vectors(histories, len(texts)).astype(np.float64))
    return np.hstack([of_texts(texts), 2 * borrowed(log, of_texts(texts))[0]])

def teacher_vectors(text, histories, num_items, rank=0):
    """item_vectors with borrowed ones, as long as those of items that one user took."""
    log, have = borrowed(tokenizer.item_vectors(histories, num_items, rank), text)
    once = np.bincount(tokenizer.entries(histories)[1], minlength=num_items) == 1
    log[~have] *= np.median(np.linalg.norm(log[once], axis=1))
    return log.astype(np.float32)

def prefix_reward(ids, scores, next_item, liked, unseen, w_a, w_y, w_s):
    """comprehensive_reward, with r_s by the length of the common prefix."""
    R = reward.comprehensive_reward(ids, scores, next_item, liked, unseen, w_a, w_y, 0.0)
    same = (ids.codes[next_item][:, None] == ids.codes).long().cumprod(-1).sum(-1)  # (B, n)
    same = same * unseen[:, ids.num_prefixes:]
    return R + w_s * same / same.sum(1, keepdim=True)

def listed(run, data):
    """How many of ten listed items nobody took, and how many of these the user likes."""
    taken = {item for history in data.train for item in history}
    new = liked = 0
    for items, likes in zip(run["lists"], data.truth["liked"]):
        new += sum(item not in taken for item in items)
        liked += sum(item not in taken and item in likes for item in items)
    return {"new": new / len(run["lists"]), "liked of new": liked / max(1, new)}

found = {}
for label in ("as it is", "IDs borrow", "IDs and teacher borrow", "common prefix"):
    for seed in (7, 11)[:1 if ARGS.quick else 2]:
        text = of_texts(load_data(world(seed)).texts) if not ARGS.check else None
        gflowgr.item_features = tokenizer.item_features if "IDs" not in label else features
        reward.item_vectors = tokenizer.item_vectors
        if "teacher" in label:
            reward.item_vectors = partial(teacher_vectors, text)
        gflowgr.comprehensive_reward = (
            prefix_reward if "prefix" in label else reward.comprehensive_reward)
        for method, runs in trained(world(seed), METHODS, variant=label, extra=listed).items():
            found.setdefault((label, method), []).extend(runs)
rows = [[label, f"`{method}`", mean(runs), mean(runs, "liked@10"), mean(runs, "new", 2),
         mean(runs, "liked of new", 2)] for (label, method), runs in found.items()]
table("data/log.md", ["variant", "method", "NDCG@10", "liked@10", "listed items that nobody took",
                      "share of these that are liked"], rows)
