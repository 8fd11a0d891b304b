"""The collaborative model (CM), a "traditional recommender", and the comprehensive reward.

The CM counts which items follow which. It is fitted in a second, and hard to beat on small data.
Letters: B users or contexts, n items.
"""
import warnings
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F

from tokenizer import cooccurrence

warnings.filterwarnings("ignore", message="Sparse CSR")         # torch calls its sparse CSR "beta"

def entries(lists):
    """Row and column indices (two lists) of all items of B lists, to index a (B, n) matrix."""
    rows = np.repeat(np.arange(len(lists)), np.fromiter(map(len, lists), int))
    return rows.tolist(), list(chain.from_iterable(lists))

def best_unseen(scores, histories, k=10):
    """The k items with the highest scores (B, n), none of the histories: items, scores (B, k);
    −1 and −inf where none is left."""
    scores = scores.clone()
    scores[entries(histories)] = -torch.inf
    value, items = F.pad(scores, (0, k), value=-torch.inf).topk(k, 1)   # fewer than k may be left
    return items.masked_fill(value == -torch.inf, -1), value

class CollaborativeModel(torch.nn.Module):
    """CM(U, v) ∝ Σ_j decay^age(j) · T[j, v] over the recent items j, plus a little popularity (4).

    T[j, v] = (forward(j, v) + backward · forward(v, j)) / count(j)^power; forward(j, v) adds up
    nearness^(d−1) where v stands d ≤ window places after j. debias = δ > 0 divides (8) by
    (count(v) + 1)^δ: items that were shown more are logged more. The defaults were chosen on the
    validation items of MovieLens and Beauty.
    """

    @classmethod
    def fit(cls, histories, num_items, window=5, nearness=0.8, backward=0.25, power=0.5,
            length=10, decay=0.6, popularity=0.05, debias=0.0):
        """Count transitions in training histories: lists of items, oldest first, no repeats."""
        # w = forward(a, b) + backward · forward(b, a), of T[j = a, v = b]
        a, b, w = cooccurrence(histories, num_items, window, nearness, backward)
        count = np.bincount(entries(histories)[1], minlength=num_items)
        scale = 1 / np.maximum(count, 1) ** power               # (n,)
        options = dict(window=window, nearness=nearness, length=length, decay=decay,
                       popularity=popularity, debias=debias)
        return cls(options, index=torch.tensor(np.stack([a, b])), value=torch.tensor(w * scale[a]),
                   count=torch.tensor(count), scale=torch.tensor(scale))

    def __init__(self, options, **tables):
        super().__init__()
        self.__dict__.update(options)
        self.options = options
        for name, table in tables.items():                      # index (2, nnz), value, count, …
            self.register_buffer(name, table)

    def scores(self, histories, following=None):
        """CM(U, ·) of B histories (lists of items, oldest first) → (B, n) ≥ 0, rows sum to 1.

        score(v) = Σ_j decay^age(j) · T[j, v] over the last `length` items j, age 0 for the newest;
        popular(v) = count(v) + 1. At items of the history both are set to 0; then both are divided
        by their sums. Result: (1 − s)·score + s·popular, s = self.popularity, or 1 if all score 0.
        following: B lists, what came next in the same training histories. For each v in it, d ≤
        window places after j, `fit` had added nearness^(d−1) · self.scale[j] to T[j, v]. That is
        subtracted, else the CM would know the answer (leave one user out). Item counts stay.
        """
        n = len(self.count)
        device = self.count.device
        recent = [history[-self.length:] for history in histories]
        index = torch.tensor(entries(recent), dtype=torch.long, device=device)
        ages = chain.from_iterable(reversed(range(len(history))) for history in recent)
        weight = self.decay ** torch.tensor([*ages], device=device).float()
        # score = H · T, H (B, n) with decay^age at each recent item
        H = torch.sparse_coo_tensor(index, weight, (len(histories), n), check_invariants=False)
        T = torch.sparse_coo_tensor(self.index, self.value.float(), (n, n), is_coalesced=True,
                                    check_invariants=False)
        scores = torch.sparse.mm(H, T).to_dense()
        if following is not None:
            self._take_out(scores, recent, following)
        # From here in place: at 10^4 items every pass over (B, n) takes time
        F.threshold_(scores, 1e-6, 0.0)                         # ≤ 1e-6: float rounding
        owned = entries([set(history) for history in histories])
        scores[owned] = 0
        popular = (self.count + 1.0) / (self.count + 1.0).sum()                     # (n,)
        rows = torch.tensor(owned[0], dtype=torch.long, device=device)
        had = torch.bincount(rows, popular[owned[1]], len(histories))   # Σ popular over the history
        total = scores.sum(1)                                                       # (B,)
        s = torch.where(total > 0, self.popularity, 1.0)                            # (B,)
        # (1 − s) · score / total + s · popular / (1 − had), 0 at the history
        scores.mul_(((1 - s) / total.clamp(min=1e-12))[:, None])
        scores.addr_(s / (1 - had).clamp(min=1e-12), popular)
        scores[owned] = 0
        whole = [len(set(history)) == n for history in histories]
        scores[whole] = popular                                 # nothing is left: all is popular
        if self.debias:
            scores /= (self.count + 1.0) ** self.debias
            scores /= scores.sum(1, keepdim=True)
        return scores

    def _take_out(self, scores, recent, following):
        """Subtract from scores (B, n), in place, what the contexts' own histories added to T."""
        places = []                                             # (row, item) of each count
        counts = []
        scale = self.scale.tolist()
        for b, (history, after) in enumerate(zip(recent, following)):
            for age, j in enumerate(reversed(history)):
                for ahead, item in enumerate(after[:max(0, self.window - age)]):
                    places.append((b, item))                    # 1 + age + ahead places after j
                    counts.append(self.decay ** age * self.nearness ** (age + ahead) * scale[j])
        places = torch.tensor(places, dtype=torch.long, device=scores.device).reshape(-1, 2)
        counts = torch.tensor(counts, dtype=torch.float32, device=scores.device)
        scores.index_put_(tuple(places.T), -counts, accumulate=True)

class Reward(torch.nn.Module):
    """R(v' | U, v) = w_a·r_a + w_ŷ·r_ŷ + w_s·r_s + ε/n, the comprehensive reward (5).

    Each signal sums to 1 over the catalogue (r_a to 1/10 where v was only clicked), so the
    heuristic weights are shares of Z. The paper's raw signals are 10, a score, and up to L for each
    item: over thousands of items the similarity would outweigh the one logged item.
    """

    def __init__(self, ids, cm, weights, epsilon=1e-3):
        """ids: SemanticIDs; cm: has scores(histories, following); weights w_a, w_ŷ, w_s."""
        super().__init__()
        self.ids = ids
        self.cm = cm
        self.weights = weights
        self.epsilon = epsilon
        self.product = {}                                       # gflowgr.product_of, once made

    def action(self, positives, liked):
        """r_a (B, n): 1 at a liked positive, 0.1 at a clicked one (the paper's 10 : 1), else 0."""
        r = torch.zeros(len(positives), len(self.ids.codes), device=positives.device)
        return r.scatter_(1, positives[:, None], torch.where(liked, 1.0, 0.1)[:, None])

    def similarity(self, positives):
        """r_s (B, n), rows sum to 1: codes that an ID shares with that of the positive (B,)."""
        # r_s(v') = m(v') / Σ m; m(v') = Σ_l 1[t_l = t'_l], t of v and t' of v', each level alone
        shared = sum((column[positives, None] == column).byte() for column in self.ids.codes.T)
        return shared / shared.sum(1, keepdim=True)

    def forward(self, signal, positives, liked):
        """R (B, n) > 0 of every item: signal (B, n) is r_ŷ; positives and liked (bool) (B,)."""
        # R = w_a · r_a + w_ŷ · r_ŷ + w_s · r_s + ε/n, in place
        w_a, w_y, w_s = self.weights
        r = torch.add(self.epsilon / signal.shape[1], signal, alpha=w_y)
        r.add_(self.similarity(positives), alpha=w_s)
        return r.add_(self.action(positives, liked), alpha=w_a)
