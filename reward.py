"""The collaborative model (CM) and the comprehensive reward: the teacher side of GFlowGR.

The CM is a "traditional recommender" in the paper's words: which items follow which in the users' histories. It
knows nothing of language models, takes a second to fit, and on small data is hard to beat: a row of every table.
"""
import warnings

import numpy as np
import torch

from tokenizer import cooccurrence

warnings.filterwarnings("ignore", message="Sparse CSR")         # torch.sparse.mm works in it and says so once


def _sparse(rows, cols, values, shape):
    index = torch.stack([torch.as_tensor(rows), torch.as_tensor(cols)]).long()
    return torch.sparse_coo_tensor(index, torch.as_tensor(values, dtype=torch.float32), shape, check_invariants=False)


class CollaborativeModel:
    """CM(U, v) ∝ Σ_j decay^age(j) · T[j, v] over the recent items j of the history, plus a little popularity.

    T[j, v] counts how often v stood within `window` places of j, nearer ones and later ones for more, divided by
    count(j)^power. The defaults were chosen on the validation items of Beauty and ml-100k.
    """

    @classmethod
    def fit(cls, histories, num_items, window=5, nearness=0.8, backward=0.25, power=0.5,
            length=10, decay=0.6, popularity=0.05):
        """Count transitions in training histories (lists of item indices, oldest first); n × n, but sparse."""
        self = cls()
        self.num_items, self.window, self.nearness = num_items, window, nearness
        self.length, self.decay, self.popularity_share = length, decay, popularity
        # T[a, b] = (forward(a, b) + backward · forward(b, a)) / count(a)^power
        a, b, w = cooccurrence(histories, num_items, window, nearness, backward)
        count = np.bincount(np.fromiter((i for h in histories for i in h), np.int64), minlength=num_items)
        self.count = torch.tensor(count)                        # (n,) how often each item stands in training
        self.scale = 1 / np.maximum(count, 1) ** power
        self.transitions = _sparse(a, b, w * self.scale[a], (num_items, num_items)).coalesce()
        self.popularity = torch.tensor((count + 1) / (count + 1).sum(), dtype=torch.float32)   # (n,), never 0
        return self

    def scores(self, histories, following=None):
        """r_ŷ: (B, n), ≥ 0, rows sum to 1; 0 for items of the history, since these data sets hold no repeats.

        following: B lists of the items that come next in the same training histories. What those very histories added
        to the counts in T is then taken out (leave one user out): else the CM has seen the answer, and teaches it by
        heart: at random training contexts its NDCG@10 is .19 with and .12 without them (ml-100k; Beauty: .66 and .08).
        """
        rows = [b for b, history in enumerate(histories) for _ in history[-self.length:]]
        recent = [item for history in histories for item in history[-self.length:]]
        weights = [self.decay ** age for h in histories for age in reversed(range(min(len(h), self.length)))]
        shape = (len(histories), self.num_items)
        scores = torch.sparse.mm(_sparse(rows, recent, weights, shape), self.transitions).to_dense()
        own = [(b, item, self.decay ** age * self.nearness ** (age + ahead) * self.scale[j])     # 1 + age + ahead places apart
               for b, (history, after) in enumerate(zip(histories, following or []))
               for age, j in enumerate(reversed(history[-self.length:]))
               for ahead, item in enumerate(after[:max(0, self.window - age)])]
        if own:
            b, item, count = zip(*own)
            scores.index_put_((torch.tensor(b), torch.tensor(item)), -torch.tensor(count, dtype=torch.float32), accumulate=True)
        scores = scores * (scores > 1e-6)                      # what rounding left of a difference is nothing
        popular = self.popularity.repeat(len(histories), 1)
        owners = [b for b, history in enumerate(histories) for _ in history]
        owned = [item for history in histories for item in history]
        scores[owners, owned] = 0
        popular[owners, owned] = 0
        popular[popular.sum(1) == 0] = self.popularity         # a history of the whole catalogue: nothing is left
        popular = popular / popular.sum(1, keepdim=True)
        total = scores.sum(1, keepdim=True)                    # 0 for an empty history or one of unseen items
        scores = torch.where(total > 0, scores / total.clamp(min=1e-12), popular)
        return (1 - self.popularity_share) * scores + self.popularity_share * popular


class Reward:
    """The comprehensive reward R(v' | U, v) = w_a·r_a + w_ŷ·r_ŷ + w_s·r_s + ε/n of METHOD.md, "Reward".

    Each signal sums to one over the catalogue (r_a to 1/10 where v was only clicked), so that the heuristic weights
    are shares of the total flow Z. With the paper's raw signals (10, a score, up to L each for thousands of items)
    the similarity of all the catalogue outweighs the one positive.
    """

    def __init__(self, ids, cm, weights=(0.3, 0.65, 0.05), epsilon=1e-3):
        """ids: SemanticIDs; cm: CollaborativeModel; weights (w_a, w_ŷ, w_s) ≥ 0; epsilon > 0 keeps log R finite."""
        if min(weights) < 0 or epsilon <= 0:
            raise ValueError("the weights must not be negative, and epsilon must be positive")
        self.ids, self.cm, self.weights, self.epsilon = ids, cm, tuple(weights), epsilon

    def action(self, positives, liked):
        """r_a: (B, n), 1 at a liked positive, 0.1 at one only clicked (the paper's 10 : 1), else 0; −1 is no positive."""
        r = torch.zeros(len(positives), len(self.ids.codes))
        known = positives >= 0
        r[known.nonzero()[:, 0], positives[known]] = torch.where(liked[known], 1.0, 0.1)
        return r

    def collaborative(self, histories, following=None):
        """r_ŷ: (B, n), the CM's score of every item."""
        return self.cm.scores(histories, following)

    def similarity(self, positives):
        """r_s: (B, n), codes shared with the positive's ID, Σ_l 1[t_l = t'_l], as a share of the sum over the catalogue."""
        codes = self.ids.codes
        shared = sum((codes[positives, level, None] == codes[None, :, level]).float() for level in range(codes.shape[1]))
        shared[positives < 0] = 1                              # no positive: nothing to be similar to
        return shared / shared.sum(1, keepdim=True)

    def __call__(self, histories, positives, liked, scores=None):
        """R: (B, n) > 0 for every item of the catalogue; histories B lists, positives (B,), liked (B,) bool.

        scores: r_ŷ, if it is there already; in training it has to be collaborative(histories, following).
        """
        w_a, w_y, w_s = self.weights
        total = w_a * self.action(positives, liked) + self.epsilon / len(self.ids.codes)
        if w_y:
            total += w_y * (self.collaborative(histories) if scores is None else scores)
        if w_s:
            total += w_s * self.similarity(positives)
        return total
