"""The collaborative model (CM), a "traditional recommender", and the comprehensive reward.

The CM counts which items follow which in the users' histories. It is fitted in a second, knows
nothing of language models, and is hard to beat on small data: it is a line of every table.
Letters: B users or contexts, n items.
"""
import warnings

import numpy as np
import torch

from tokenizer import cooccurrence

warnings.filterwarnings("ignore", message="Sparse")             # torch calls its sparse CSR "beta"


def entries(lists):
    """Row and column indices (two lists) of all items of B lists, to index a (B, n) matrix."""
    rows = [b for b, items in enumerate(lists) for _ in items]
    return rows, [item for items in lists for item in items]


def _sparse(rows, cols, values, shape):
    index = torch.stack([torch.as_tensor(rows), torch.as_tensor(cols)]).long()
    values = torch.as_tensor(values, dtype=torch.float32)
    return torch.sparse_coo_tensor(index, values, shape, check_invariants=False)


class CollaborativeModel(torch.nn.Module):
    """CM(U, v) ∝ Σ_j decay^age(j) · T[j, v] over the recent items j, plus a little popularity.

    T[j, v] counts how often v stood within `window` places of j, nearer and later ones for more,
    over count(j)^power. The defaults were chosen on the validation items of MovieLens and Beauty.
    """

    @classmethod
    def fit(cls, histories, num_items, window=5, nearness=0.8, backward=0.25, power=0.5,
            length=10, decay=0.6, popularity=0.05):
        """Count transitions in training histories: lists of item indices, oldest first."""
        self = cls()
        self.num_items, self.window, self.nearness = num_items, window, nearness
        self.length, self.decay, self.popularity_share = length, decay, popularity
        a, b, w = cooccurrence(histories, num_items, window, nearness, backward)
        count = np.bincount(entries(histories)[1], minlength=num_items)
        self.scale = 1 / np.maximum(count, 1) ** power          # (n,)
        # T[a, b] = (forward(a, b) + backward · forward(b, a)) / count(a)^power
        transitions = _sparse(a, b, w * self.scale[a], (num_items, num_items)).coalesce()
        popularity = torch.tensor((count + 1) / (count + 1).sum(), dtype=torch.float32)
        self.register_buffer("transitions", transitions)        # T (n, n)
        self.register_buffer("popularity", popularity)          # (n,), never 0
        return self

    def scores(self, histories, following=None):
        """CM(U, ·) of B histories (lists of items, oldest first) → (B, n) ≥ 0, rows sum to 1.

        score(v) = Σ_j decay^age(j) · T[j, v] over the last `length` items j, age 0 for the newest,
        T = self.transitions. Items of the history get 0; the row is divided by its sum.
        popular = self.popularity, treated alike. Result: (1 − s)·score + s·popular with
        s = self.popularity_share; popular alone where no score is left (an empty history).

        following: B lists, what came next in the same training histories. Their own counts are
        taken out of T (leave one user out), or the CM would know the answer: v at d ≤ window places
        after j added nearness^(d−1) · self.scale[j] to T[j, v]. Scores ≤ 1e-6 are then rounding.

        >>> cm = CollaborativeModel.fit([[0, 1, 2], [1, 2, 3]], 4, nearness=1, backward=0, power=0,
        ...                             decay=0.5, popularity=0)
        >>> cm.scores([[0, 1]]).tolist()                        # 2 + ½ · 1 for item 2, 1 for item 3
        [[0.0, 0.0, 0.7142857313156128, 0.2857142984867096]]
        >>> cm.scores([[0, 1]], following=[[2]]).tolist()       # without this user's own 1 + ½ · 1
        [[0.0, 0.0, 0.5, 0.5]]
        """
        device = self.popularity.device
        recent = [history[-self.length:] for history in histories]
        rows, items = entries(recent)
        weights = [self.decay ** age for h in recent for age in reversed(range(len(h)))]
        matrix = _sparse(rows, items, weights, (len(histories), self.num_items)).to(device)
        scores = torch.sparse.mm(matrix, self.transitions).to_dense()
        if following is not None:
            self._leave_out(scores, recent, following)
        scores.masked_fill_(scores <= 1e-6, 0)                  # float rounding
        popular = self.popularity.repeat(len(histories), 1)
        owned = entries(histories)
        scores[owned] = 0
        popular[owned] = 0
        nothing_left = popular.sum(1) == 0                      # the history is the whole catalogue
        popular[nothing_left] = self.popularity
        total = scores.sum(1, keepdim=True)
        share = torch.where(total > 0, self.popularity_share, 1.0)
        # In place: at 10^4 items every pass over (B, n) takes time
        popular.mul_(share / popular.sum(1, keepdim=True))
        return scores.mul_((1 - share) / total.clamp(min=1e-12)).add_(popular)

    def _leave_out(self, scores, recent, following):
        """Subtract from scores (B, n), in place, what the contexts' own histories added to T."""
        rows, items, counts = [], [], []
        for b, (history, after) in enumerate(zip(recent, following)):
            for age, j in enumerate(reversed(history)):
                for ahead, item in enumerate(after[:max(0, self.window - age)]):
                    rows.append(b)                              # item is 1 + age + ahead after j
                    items.append(item)
                    weight = self.decay ** age * self.nearness ** (age + ahead)
                    counts.append(weight * self.scale[j])
        place = torch.tensor([rows, items], dtype=torch.long, device=scores.device)
        counts = torch.tensor(counts, dtype=torch.float32, device=scores.device)
        scores.index_put_(tuple(place), -counts, accumulate=True)


class Reward(torch.nn.Module):
    """The comprehensive reward R(v' | U, v) = w_a·r_a + w_ŷ·r_ŷ + w_s·r_s + ε/n (METHOD.md, Reward).

    Each signal sums to 1 over the catalogue (r_a to 1/10 where v was only clicked), so that the
    heuristic weights are shares of Z. With the paper's raw signals (10, a score, up to L for each
    of thousands of items) the similarity of the catalogue outweighs the one logged item.
    """

    def __init__(self, ids, cm, weights=(0.3, 0.65, 0.05), epsilon=1e-3, debias=0.0, counts=None):
        """ids SemanticIDs; cm has scores(histories, following); weights (w_a, w_ŷ, w_s) ≥ 0.

        debias: δ ≥ 0; counts (n,): how often each item was logged, needed where δ > 0.
        """
        super().__init__()
        self.ids, self.cm, self.weights = ids, cm, tuple(weights)
        self.epsilon, self.debias = epsilon, debias
        self.register_buffer("counts", counts)

    def action(self, positives, liked):
        """r_a (B, n): 1 at a liked positive, 0.1 at a clicked one (the paper's 10 : 1), else 0."""
        r = torch.zeros(len(positives), len(self.ids.codes), device=positives.device)
        return r.scatter_(1, positives[:, None], torch.where(liked, 1.0, 0.1)[:, None])

    def collaborative(self, histories, following=None):
        """r_ŷ (B, n), rows sum to 1: the CM's score, its popularity bias taken out where δ > 0."""
        # r_ŷ(v) ∝ CM(U, v) / (count(v) + 1)^δ
        scores = self.cm.scores(histories, following)
        if not self.debias:
            return scores
        scores = scores / (self.counts + 1.0) ** self.debias
        return scores / scores.sum(1, keepdim=True)

    def similarity(self, positives):
        """r_s (B, n), rows sum to 1: codes shared with the ID of the positive, positives (B,).

        m(v) = Σ_l 1[t_l = t'_l], t and t' the IDs (self.ids.codes) of v and of the positive,
        compared level by level whatever stands before. r_s(v) = m(v) / Σ_u m(u).

        >>> from tokenizer import SemanticIDs
        >>> ids = SemanticIDs([[0, 1, 1], [0, 2, 0], [2, 0, 0]], num_codes=3)
        >>> Reward(ids, cm=None).similarity(torch.tensor([0])).tolist()   # they share 3, 1 and 0
        [[0.75, 0.25, 0.0]]
        """
        codes = self.ids.codes
        shared = torch.zeros(len(positives), len(codes), device=codes.device)
        for column in codes.T:
            shared += column[positives, None] == column
        return shared / shared.sum(1, keepdim=True)

    def forward(self, histories, positives, liked, scores=None):
        """R (B, n) > 0 of every item; histories B lists, positives (B,), liked (B,) bool.

        R = w_a · self.action(positives, liked) + w_ŷ · r_ŷ + w_s · self.similarity(positives) + ε/n,
        (w_a, w_ŷ, w_s) = self.weights, ε = self.epsilon. scores: r_ŷ (B, n), unchanged, if known
        (in training: self.collaborative(histories, following)); else self.collaborative(histories).

        >>> from tokenizer import SemanticIDs
        >>> ids = SemanticIDs([[0, 1, 1], [0, 2, 0], [2, 0, 0]], num_codes=3)
        >>> reward = Reward(ids, None, weights=(0.5, 0.3, 0.2), epsilon=0.03)
        >>> scores, liked = torch.tensor([[0.0, 0.5, 0.5]]), torch.tensor([True])
        >>> r = reward([[2]], torch.tensor([0]), liked, scores)   # item 0: .5 + 0 + .2·.75 + .01
        >>> [round(x, 4) for x in r[0].tolist()]
        [0.66, 0.21, 0.16]
        """
        w_a, w_y, w_s = self.weights
        scores = self.collaborative(histories) if scores is None else scores
        total = w_a * self.action(positives, liked) + self.epsilon / len(self.ids.codes)
        total += w_y * scores
        return total + w_s * self.similarity(positives)
