"""What if the teacher scores only two items a history? The committed world, three seeds.

    python data/experiments/few_scores.py       12 minutes on one core

Here R of the drawn items is known, and no other's: their scores are dot products of an SVD that
does not know the user, not divided by the sum over all items. So R of all has no fixed sum, and
`tb` learns Z. `distill` and `db`, which need flows, are impossible."""
import numpy as np
import torch

from common import gflowgr, load_data, mean, table, trained
from reward import SVD, fitted, weighted

data = load_data("toy")

def log_r_of_few(p):
    """log R of the drawn items (C, J) of a Paths p, by SVDs without the users' fold."""
    folds = np.array(p.batch.users) % 20
    items = p.items.cpu()
    score = torch.empty(items.shape)
    for fold in np.unique(folds).tolist():
        rows = np.flatnonzero(folds == fold)
        svd = fitted(SVD, data, fold)
        past = [p.batch.histories[row] for row in rows]
        users = weighted(svd.vectors, past, lambda age: age ** -0.75)
        found = torch.einsum("cd,cjd->cj", users, svd.vectors[items[rows]]).clamp(min=0)
        score[rows] = found / svd.popular[items[rows]] ** 0.5
    logged = p.items == p.batch.next_item[:, None]
    # .65 makes the sum over all items about 1, in the mean of some histories
    return (0.75 * (score / 0.65).to(logged.device) ** 3 + 0.2 * logged + 1e-6).log()

def of_few(loss):
    """The loss with R of the drawn items alone."""
    def with_few(p):
        p.log_r = log_r_of_few(p)
        return loss(p)
    return with_few

# λ: the best of four or five on worlds 7 and 11, for each method
for name, lam in {"tb": 10, "vargrad": 10, "listnet": 10, "grpo": 3}.items():
    few = dict(loss=of_few(gflowgr.RECIPES[name]["loss"]), lam=lam, exact=False, trajectories=2)
    gflowgr.RECIPES[f"{name}-few"] = gflowgr.RECIPES[name] | few
methods = ["sft", "tb-few", "vargrad-few", "listnet-few", "grpo-few", "tb"]
found = trained("toy", methods, seeds=(42, 43, 44))
table("data/results.md", ["method", "NDCG@10", "liked@10"],
      [[f"`{name}`", mean(found[name]), mean(found[name], "liked@10")] for name in methods])
