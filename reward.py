"""The collaborative model (CM), what is made of it, and the comprehensive reward.

The CM, a "traditional recommender", counts which items follow which. It is fitted in a second, and
hard to beat on small data. Example: in the log 0 1 2, item 1 follows 0 at once, item 2 at distance
2, so near[0, 1] = 1 and near[0, 2] = .8, each divided by √(count of 0) = 1. A user who took 0 gets
the scores 1 : .8 for 1 and 2.

A *teacher* is what r_ŷ of the reward comes from: an object with scores(histories, following).
`following` is given in training: the items that the user took next, which the scores must not know.
Letters: B users or contexts, n items, W beams.
"""
import warnings
from itertools import chain

import numpy as np
import torch
from torch.nn import functional

from data import check
from tokenizer import cooccurrence, entries, seen_entries

warnings.filterwarnings("ignore", message="Sparse CSR")         # torch calls its sparse CSR "beta"

class CollaborativeModel:
    """CM(U, v) ∝ Σ_j decay^age(j) · near[j, v] over the recent items j, plus a little popularity.
    near[j, v] = (forward(j, v) + backward · forward(v, j)) / count(j)^power; forward(j, v) adds up
    nearness^(d−1) where v stands d ≤ window places after j. The paper's CM is neural. The defaults
    were chosen on the validation items of MovieLens and Beauty.
    """
    @classmethod
    def fit(cls, histories, num_items, window=5, nearness=0.8, backward=0.25, power=0.5,
            length=10, decay=0.6, popularity=0.05):
        """Count transitions in training histories: lists of items, oldest first, no repeats."""
        cm = cls()
        # w = forward(a, b) + backward · forward(b, a), of near[j = a, v = b]
        a, b, w = cooccurrence(histories, num_items, window, nearness, backward)
        count = np.bincount(entries(histories)[1], minlength=num_items)
        scale = 1 / np.maximum(count, 1) ** power
        cm.index = torch.tensor(np.stack([a, b]))               # (2, m): near[j, v] is value[i]
        cm.value = torch.tensor(w * scale[a])                   # (m,) where index[:, i] is (j, v)
        cm.count = torch.tensor(count)                          # (n,) how often an item was logged
        cm.scale = torch.tensor(scale)                          # (n,) 1 / count^power
        cm.window = window
        cm.nearness = nearness
        cm.length = length
        cm.decay = decay
        cm.popularity = popularity
        return cm

    def scores(self, histories, following=None):
        """CM(U, ·) of B histories (lists of items, oldest first) → (B, n) ≥ 0, rows sum to 1.
        score(v) = Σ_j decay^age(j) · near[j, v] over the last `length` items j of the history, age
        0 for the newest; popular(v) = count(v) + 1. Both are set to 0 at items of the history, then
        divided by their sums. The result is (1 − s) · score + s · popular; s is self.popularity, or
        1 if no score is above 1e-6. Who has seen all items gets `popular` of all n.
        following, in training: B lists, what came next in the same histories. There, `fit` has
        added nearness^(d−1) · self.scale[j] to near[j, v] for v at d ≤ window places after j. This
        is subtracted from the score: the CM must not know v. Counts of items stay.
        Raises InputError for an item that is not in the catalogue.
        """
        n = len(self.count)
        owned = seen_entries(histories, n)                      # (rows, items)
        # score = aged · near; aged (B, n) holds decay^age at each recent item
        recent = [history[-self.length:] for history in histories]
        ages = chain.from_iterable(reversed(range(len(history))) for history in recent)
        weight = self.decay ** torch.tensor([*ages]).float()
        index = torch.tensor(np.stack(entries(recent)))
        aged = torch.sparse_coo_tensor(index, weight, (len(histories), n), check_invariants=False)
        near = torch.sparse_coo_tensor(self.index, self.value.float(), (n, n), is_coalesced=True,
                                       check_invariants=False)
        scores = torch.sparse.mm(aged, near).to_dense()         # (B, n)
        if following is not None:
            self._take_out(scores, recent, following)
        # From here in place: at 10^4 items every pass over (B, n) takes time
        functional.threshold_(scores, 1e-6, 0.0)                # ≤ 1e-6: float rounding
        scores[owned] = 0
        popular = (self.count + 1.0) / (self.count + 1.0).sum()                     # (n,)
        rows = torch.tensor(owned[0])
        had = torch.bincount(rows, popular[owned[1]], len(histories))   # Σ popular of the history
        total = scores.sum(1)                                                       # (B,)
        s = torch.where(total > 0, self.popularity, 1.0)                            # (B,)
        scores.mul_(((1 - s) / total.clamp(min=1e-12))[:, None])
        scores.addr_(s / (1 - had).clamp(min=1e-12), popular)
        scores[owned] = 0
        whole = [len(set(history)) == n for history in histories]
        scores[whole] = popular                                 # nothing is left: all is popular
        return scores

    def _take_out(self, scores, recent, following):
        """Subtract from scores (B, n), in place, what the contexts' own histories added."""
        places = []                                             # (row, item) of each count
        counts = []
        scale = self.scale.tolist()
        for b, (history, after) in enumerate(zip(recent, following)):
            for age, j in enumerate(reversed(history)):
                for ahead, item in enumerate(after[:max(0, self.window - age)]):
                    places.append((b, item))                    # 1 + age + ahead places after j
                    counts.append(self.decay ** age * self.nearness ** (age + ahead) * scale[j])
        places = torch.tensor(places, dtype=torch.long).reshape(-1, 2)
        scores.index_put_(tuple(places.T), -torch.tensor(counts).float(), accumulate=True)

class Debiased:
    """A CM, maybe of your own; its scores are divided by popularity^δ, ours: what is shown more is
    logged more. Popularity is count + 1; count (n,): how often each item was logged."""
    def __init__(self, cm, count, delta):
        self.cm = cm
        self.delta = delta
        self.weight = (count + 1.0) ** delta                    # (n,)

    def scores(self, histories, following=None):
        """(B, n) ≥ 0, rows sum to 1; InputError if those of your own CM are not."""
        scores = self.cm.scores(histories, following)
        shape = (len(histories), len(self.weight))
        right = torch.is_tensor(scores) and scores.shape == shape and scores.is_floating_point()
        right = right and scores.min() >= 0 and (scores.sum(1) - 1).abs().max() < 1e-3
        check(right, f"{type(self.cm).__name__}.scores has to return a tensor of floats {shape}, "
              f"≥ 0, each row of sum 1, not {' '.join(str(scores).split())[:100]} …")
        if self.delta:
            scores = scores / self.weight
            scores = scores / scores.sum(1, keepdim=True)
        return scores

    def recommend(self, histories, k=10):
        """The k unseen items (B, k) with the highest scores, −1 where none is left; the scores."""
        scores = functional.pad(self.scores(histories), (0, k), value=-torch.inf)
        scores[entries(histories)] = -torch.inf
        value, items = scores.topk(k, 1)
        return items.masked_fill(value == -torch.inf, -1), value

class Guided:
    """A policy and the CM that guides its beam search: the best items by log P + γ · log CM, ours.
    `recommend` serves the methods NAME+cm. `scores` is a teacher, the *product* of what supervised
    fine-tuning (SFT) and the CM know: SFT orders the items of a session, the CM knows rare items.
    """
    def __init__(self, policy, cm, gamma=2.0):
        self.policy = policy
        self.cm = cm
        self.gamma = gamma
        self.catalogue = policy.catalogue
        self.memory = {}            # context: (items (W,), shares (W,)), filled as contexts come

    def recommend(self, histories, k=10, following=None):
        """The k best items (B, k) of B histories, and log P + γ · log CM (B, k); see Policy."""
        guide = self.cm.scores(histories, following) ** self.gamma
        return self.policy.recommend(histories, k, guide=guide)

    def scores(self, histories, following=None):
        """(B, n) ∝ P(v | U) · CM(U, v)^γ at the W items that the guided beam finds, 0 at others.
        Rows sum to 1, or to 0 if the user has seen all items. following: as in the CM's scores."""
        later = following or [()] * len(histories)
        keys = [(*past, -1, *after) for past, after in zip(histories, later)]
        new = [b for b, key in enumerate(keys) if key not in self.memory]
        new.sort(key=lambda b: len(histories[b]))               # similar lengths: less padding
        for start in range(0, len(new), 256):
            chunk = new[start:start + 256]
            past = [histories[b] for b in chunk]
            after = following and [following[b] for b in chunk]
            items, score = self.recommend(past, self.policy.beams, after)   # log P + γ · log CM
            shares = score.softmax(1).nan_to_num()              # nan if all items were seen
            self.memory.update(zip([keys[b] for b in chunk], zip(items.clamp(min=0), shares)))
        items, shares = map(torch.stack, zip(*[self.memory[key] for key in keys]))  # (B, W)
        table = shares.new_zeros(len(keys), len(self.policy.semantic_ids.codes))
        return table.scatter_add_(1, items, shares)

class Reward:
    """R(v' | U, v) = w_a·r_a + w_ŷ·r_ŷ + w_s·r_s + ε/m of the m unseen items, the comprehensive
    reward; R of an item of the history is 0. Each signal sums to 1 over the unseen items (r_a to
    1/10 where v was only clicked), so the heuristic weights are shares of Z: where v is liked,
    Z = w_a + w_ŷ + w_s + ε. The paper's raw signals are 10, a score, and up to L for each item:
    over thousands of items the similarity would outweigh the one logged item.
    """
    def __init__(self, ids, teacher, weights, epsilon=1e-3):
        """ids: SemanticIDs; teacher: has scores(histories, following); weights w_a, w_ŷ, w_s."""
        self.ids = ids
        self.teacher = teacher
        self.weights = weights
        self.epsilon = epsilon

    def action(self, positives, liked):
        """r_a (B, n): 1 at a liked positive, 0.1 at a clicked one (the paper's 10 : 1), else 0."""
        r = torch.zeros(len(positives), len(self.ids.codes), device=positives.device)
        return r.scatter_(1, positives[:, None], torch.where(liked, 1.0, 0.1)[:, None])

    def similarity(self, positives, unseen):
        """r_s (B, n), rows sum to 1: codes that unseen IDs share with that of v, positive (B,)."""
        # r_s(v') = m(v') / Σ m; m(v') = Σ_l 1[t_l = t'_l], t of v and t' of v', each level alone
        shared = sum((column[positives, None] == column).byte() for column in self.ids.codes.T)
        shared = shared * unseen
        return shared / shared.sum(1, keepdim=True)

    def __call__(self, scores, positives, liked, unseen):
        """R (B, n) of every item, > 0 at unseen (B, n; bool) ones; r_ŷ is scores (B, n);
        positives and liked (bool) are (B,)."""
        w_a, w_y, w_s = self.weights
        r = torch.add(self.epsilon / unseen.sum(1, keepdim=True), scores, alpha=w_y)
        r.add_(self.similarity(positives, unseen), alpha=w_s)
        return r.add_(self.action(positives, liked), alpha=w_a).mul_(unseen)
