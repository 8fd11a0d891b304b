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


def entries(lists):
    """Row and column numbers of all items of B lists, to index a (B, n) matrix with."""
    return [b for b, items in enumerate(lists) for _ in items], [item for items in lists for item in items]


class CollaborativeModel:
    """CM(U, v) ∝ Σ_j decay^age(j) · T[j, v] over the recent items j of the history, plus a little popularity.

    T[j, v] counts how often v stood within `window` places of j, nearer ones and later ones for more, divided by
    count(j)^power. The defaults were chosen on the validation items of ml-100k and of Amazon Beauty,
    which is not part of this repository.
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

    def to(self, device):
        """Move what scores() works on to a device with sparse matrices: cpu or cuda; returns self."""
        self.transitions, self.popularity, self.count = (x.to(device) for x in (self.transitions, self.popularity, self.count))
        return self

    @property
    def device(self):
        return self.popularity.device

    def scores(self, histories, following=None):
        """r_ŷ of histories (B lists of items, oldest first): (B, n), ≥ 0, rows sum to 1; 0 for items of the history, since
        these data sets hold no repeats.

        score(v) = Σ_j decay^age(j) · T[j, v] over the last `length` items j of the history, age 0 for the newest; T is
        self.transitions (n, n, sparse). Items of the history get 0, then the row is divided by its sum. popular(v) is
        self.popularity (n,), treated in the same way. Result: (1 − s) · score + s · popular, s = self.popularity_share;
        popular alone where no score is left (an empty history, unseen items).

        following: B lists of the items that come next in the same training histories. What those very histories added
        to the counts in T is then taken out (leave one user out): else the CM has seen the answer, and teaches it by
        heart: at random training contexts its NDCG@10 is .19 with and .12 without them (ml-100k; Beauty: .66 and .08).
        If v stands d ≤ window places after j in that history, T[j, v] holds nearness^(d−1) · self.scale[j] of it.
        Scores of at most 1e-6 after that are rounding, and count as 0.

        Example: all counts plain, T[0, 2] = 1, T[1, 2] = 2, T[1, 3] = 1. After 0, 1 item 2 has 2 + ½ · 1 and item 3 has 1,
        2.5 : 1. Without the first user's own 1 + ½ · 1 for item 2 it is 1 : 1.

        >>> cm = CollaborativeModel.fit([[0, 1, 2], [1, 2, 3]], 4, nearness=1, backward=0, power=0, decay=0.5, popularity=0)
        >>> [[round(x, 4) for x in cm.scores([[0, 1]], following)[0].tolist()] for following in (None, [[2]])]
        [[0.0, 0.0, 0.7143, 0.2857], [0.0, 0.0, 0.5, 0.5]]
        """
        rows = [b for b, history in enumerate(histories) for _ in history[-self.length:]]
        recent = [item for history in histories for item in history[-self.length:]]
        weights = [self.decay ** age for h in histories for age in reversed(range(min(len(h), self.length)))]
        shape = (len(histories), self.num_items)
        scores = torch.sparse.mm(_sparse(rows, recent, weights, shape).to(self.device), self.transitions).to_dense()
        own = [(b, item, self.decay ** age * self.nearness ** (age + ahead) * self.scale[j])     # 1 + age + ahead places apart
               for b, (history, after) in enumerate(zip(histories, following or []))
               for age, j in enumerate(reversed(history[-self.length:]))
               for ahead, item in enumerate(after[:max(0, self.window - age)])]
        if own:
            b, item, count = zip(*own)
            place = torch.tensor(b, device=self.device), torch.tensor(item, device=self.device)
            scores.index_put_(place, -torch.tensor(count, dtype=torch.float32, device=self.device), accumulate=True)
        scores.masked_fill_(scores <= 1e-6, 0)                 # what rounding left of a difference is nothing
        popular = self.popularity.repeat(len(histories), 1)
        owned = entries(histories)
        scores[owned] = 0
        popular[owned] = 0
        whole = [b for b, history in enumerate(histories) if len(set(history)) == self.num_items]
        popular[whole] = self.popularity                       # a history of the whole catalogue: nothing is left
        total = scores.sum(1, keepdim=True)                    # 0 for an empty history or one of unseen items
        share = torch.where(total > 0, self.popularity_share, 1.0)
        # In place: at 10^4 items each pass over (B, n) counts
        return scores.mul_((1 - share) / total.clamp(min=1e-12)).add_(popular.mul_(share / popular.sum(1, keepdim=True)))


class Reward:
    """The comprehensive reward R(v' | U, v) = w_a·r_a + w_ŷ·r_ŷ + w_s·r_s + ε/n.

    Each signal sums to one over the catalogue (r_a to 1/10 where v was only clicked), so that the heuristic weights
    are shares of the total flow Z. With the paper's raw signals (10, a score, up to L each for thousands of items)
    the similarity of all the catalogue outweighs the one positive.
    """

    def __init__(self, ids, cm, weights=(0.3, 0.65, 0.05), epsilon=1e-3, debias=0.0):
        """ids: SemanticIDs; cm: CollaborativeModel; weights (w_a, w_ŷ, w_s) ≥ 0; epsilon > 0 keeps log R finite.

        debias: δ ≥ 0, a power of an item's count in the log plus one, that the CM's score is divided by here (not in the row
        CM alone): what was shown more is logged more, and a CM fitted to the log hands that on.
        """
        if min(weights) < 0 or epsilon <= 0:
            raise ValueError("the weights must not be negative, and epsilon must be positive")
        self.ids, self.cm, self.weights, self.epsilon, self.debias = ids, cm, tuple(weights), epsilon, debias

    def to(self, device):
        """Move what rewards are made of to a device with sparse matrices, cpu or cuda, so that training waits for nothing
        on the CPU; returns self."""
        self.ids, self.cm = self.ids.to(device), self.cm.to(device)
        return self

    def action(self, positives, liked):
        """r_a: (B, n), 1 at a liked positive, 0.1 at one only clicked (the paper's 10 : 1), else 0; −1 is no positive."""
        r = torch.zeros(len(positives), len(self.ids.codes), device=positives.device)
        value = torch.where(liked, 1.0, 0.1) * (positives >= 0)
        return r.scatter_(1, positives.clamp(min=0)[:, None], value[:, None])

    def collaborative(self, histories, following=None):
        """r_ŷ: (B, n), the CM's score of every item, over (count + 1)^δ; rows sum to 1."""
        # r_ŷ(v) ∝ CM(U, v) / (count(v) + 1)^δ
        scores = self.cm.scores(histories, following)
        if not self.debias:
            return scores
        scores = scores / (self.cm.count + 1.0) ** self.debias
        return scores / scores.sum(1, keepdim=True)

    def similarity(self, positives):
        """r_s of every item: codes shared with the positive's ID, as a share of the sum over the catalogue → (B, n) floats.

        positives (B,) item indices, −1 where there is none: then all n items are equally similar. self.ids.codes (n, L)
        holds the IDs. With m(v) = Σ_l 1[t_l = t'_l] for the codes t of v and t' of the positive, level by level,
        whatever stands before: r_s(v) = m(v) / Σ_u m(u).

        Example: the IDs (0, 1, 1), (0, 2, 0), (2, 0, 0) share 3, 1 and 0 codes with the first of them.

        >>> from tokenizer import SemanticIDs
        >>> reward = Reward(SemanticIDs([[0, 1, 1], [0, 2, 0], [2, 0, 0]], num_codes=3), cm=None)
        >>> reward.similarity(torch.tensor([0])).tolist()
        [[0.75, 0.25, 0.0]]
        """
        codes = self.ids.codes
        shared = sum((codes[positives, level, None] == codes[None, :, level]).byte() for level in range(codes.shape[1])).float()
        shared[positives < 0] = 1                              # no positive: nothing to be similar to
        return shared / shared.sum(1, keepdim=True)

    def __call__(self, histories, positives, liked, scores=None):
        """R: (B, n) > 0 for every item of the catalogue; histories B lists, positives (B,), liked (B,) bool.

        scores: r_ŷ (B, n), if it is there already, and it is left as it was; in training it has to be
        collaborative(histories, following). Else it is self.collaborative(histories).
        R = w_a · self.action(positives, liked) + w_ŷ · r_ŷ + w_s · self.similarity(positives) + ε/n, with
        (w_a, w_ŷ, w_s) = self.weights, ε = self.epsilon, n items in self.ids.codes.

        Example: item 0 is liked, r_a = (1, 0, 0), r_s = (.75, .25, 0), weights .5, .3, .2, ε/n = .01. Item 0 has
        .5 + 0 + .15 + .01 = .66.

        >>> from tokenizer import SemanticIDs
        >>> reward = Reward(SemanticIDs([[0, 1, 1], [0, 2, 0], [2, 0, 0]], num_codes=3), None, (0.5, 0.3, 0.2), epsilon=0.03)
        >>> r = reward([[2]], torch.tensor([0]), torch.tensor([True]), scores=torch.tensor([[0.0, 0.5, 0.5]]))
        >>> [round(x, 4) for x in r[0].tolist()]
        [0.66, 0.21, 0.16]
        """
        w_a, w_y, w_s = self.weights
        total = w_a * self.action(positives, liked) + self.epsilon / len(self.ids.codes)
        if w_y:
            total += w_y * (self.collaborative(histories) if scores is None else scores)
        if w_s:
            total += w_s * self.similarity(positives)
        return total
