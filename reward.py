"""Traditional recommenders, what is made of them, and the comprehensive reward.

A recommender is made by a function fit(histories, num_items): training histories, lists of items,
oldest first, no repeats. It has scores(histories) → (B, n) ≥ 0, rows of sum 1, 0 at items of the
history. The one that R reads is called *teacher*, the paper's collaborative model (CM). Letters: B
users or contexts, n items.
"""
import warnings
import zlib
from functools import partial

import numpy as np
import torch
from torch.nn import functional

from data import check
from tokenizer import entries, followers, item_features, item_vectors, sparse

warnings.filterwarnings("ignore", message="Sparse CSR")         # torch calls its sparse CSR "beta"

def weighted(table, histories, weight, length=10 ** 9):
    """(B, columns of table): Σ_j weight(age(j)) · table[j] over the last `length` items j of each of
    B histories; age 1: the newest. [5, 2] with weight 1/age: table[2] + table[5] / 2."""
    lists = [history[-length:] for history in histories]
    _, ages = entries([range(len(items), 0, -1) for items in lists])
    weights = sparse(entries(lists, len(table)), weight(torch.tensor(ages).float()),
                     (len(lists), len(table)))
    return (weights @ table).to_dense()

def shares(scores, histories, popular, s=0.001):
    """Scores (B, n), which are overwritten → (1 − s) · scores + s · popular (n,). Both are set to 0
    at items of the history first, and divided by their sum. Who has no score gets s = 1: popularity
    alone. (Who has seen all items gets 0.) With s = .1, scores [6, 3, 1, 0], history [0], popular
    [5, 2, 1, 1]: .9 · [0, .75, .25, 0] + .1 · [0, .5, .25, .25] = [0, .725, .25, .025]."""
    functional.threshold_(scores, 1e-6, 0.0)                    # ≤ 1e-6: float rounding, so 0
    popular = popular.repeat(len(histories), 1)                 # (B, n)
    seen = entries(histories, popular.shape[1])
    for table in (scores, popular):                             # in place: these are large
        table[seen] = 0
        table /= table.sum(1, keepdim=True).clamp(min=1e-12)
    s = torch.where(scores.any(1, keepdim=True), s, 1.0)        # (B, 1)
    return (1 - s) * scores + s * popular

class CollaborativeModel:
    """Counts of which item follows which: CM(U, v) ∝ Σ_j decay^(age(j) − 1) · near[j, v] over the
    last `length` items j, age 1: the newest, plus a little popularity. near[j, v] = (forward(j, v)
    + backward · forward(v, j)) / count(j)^power, where forward(j, v) adds up nearness^(d − 1) if v
    stands d ≤ window places after j. In the log 0 1 2, near[0, 1] = 1 and near[0, 2] = .8: after 0,
    the scores of 1 and 2 are 1 : .8. Chosen on validation items of MovieLens and Beauty.
    """
    @classmethod
    def fit(cls, histories, num_items, window=5, nearness=0.8, backward=0.25, power=0.5,
            length=10, decay=0.6, popularity=0.05):
        """A fitted model; see the class."""
        cm = cls()
        # near = (forward + backward · forwardᵀ) / count^power, a row of it for each item j
        forward = followers(histories, num_items, window, nearness)     # sparse (n, n)
        both = (forward + backward * forward.T).coalesce()
        count = np.bincount(entries(histories)[1], minlength=num_items)             # (n,)
        cm.near = (both * torch.tensor(count).clamp(min=1).double()[:, None] ** -power).float()
        cm.popular = torch.tensor(count).float() + 1            # (n,)
        cm.length = length
        cm.decay = decay
        cm.popularity = popularity                              # its share
        return cm

    def scores(self, histories):
        """CM(U, ·) (B, n) of B histories; InputError for an item that is not in the catalogue."""
        def weight(age):
            return self.decay ** (age - 1)
        scores = weighted(self.near, histories, weight, self.length)
        return shares(scores, histories, self.popular, self.popularity)

class SVD:
    """Matrix factorisation, PureSVD (Cremonesi et al. 2010), with the vectors of `item_vectors`:
    CM(U, i) ∝ max(0, Σ_j ⟨v_j, v_i⟩ / age(j)^.75) over all items j of U, age 1: the newest."""
    def __init__(self, histories, num_items):
        self.vectors = torch.tensor(item_vectors(histories, num_items))             # (n, rank)
        self.popular = self.vectors.norm(dim=1).clamp(min=1e-4)     # (n,) of popular items: long

    def scores(self, histories):
        """CM(U, ·) (B, n) of B histories; InputError for an item that is not in the catalogue."""
        users = weighted(self.vectors, histories, lambda age: age ** -0.75)         # (B, rank)
        return shares(users @ self.vectors.T, histories, self.popular)

def similar_items(features, most=200):
    """Sparse (n, n): max(0, cosine of features (n, d))³ of each item and its `most` nearest."""
    unit = functional.normalize(torch.tensor(features).float())
    n = len(unit)
    values, near = (unit @ unit.T).clamp(min=0).pow(3).topk(min(most, n))           # (n, most)
    return sparse(entries(near.tolist()), values.flatten(), (n, n))

class Blend:
    """Ours, for real logs: (√(counts · neighbours) + SVD / √(length of vector))², each of the two
    terms with sum 1; squared, since P learns few high scores more easily than many middling ones.
    Neighbours: Σ_j similar[j, i] / age(j) over the last 20 items j, age 1: the newest."""
    def __init__(self, histories, num_items, similar):
        """similar: a sparse (n, n) tensor, of `similar_items`."""
        self.counts = CollaborativeModel.fit(histories, num_items)
        self.svd = SVD(histories, num_items)
        self.similar = similar
        self.popular = self.counts.popular

    def scores(self, histories):
        """CM(U, ·) (B, n) of B histories; InputError for an item that is not in the catalogue."""
        near = weighted(self.similar, histories, lambda age: 1 / age, 20)
        near = shares(near, histories, self.popular)
        first = (self.counts.scores(histories) * near).sqrt()
        second = self.svd.scores(histories) / self.svd.popular.sqrt()
        total = shares(first, histories, self.popular) + shares(second, histories, self.popular)
        total /= total.amax(1, keepdim=True).clamp(min=1e-12)   # `shares` drops what is ≤ 1e-6
        return shares(total.square(), histories, self.popular)

def fit_of(name, data):
    """The function fit(histories, num_items) of the recommender with this name."""
    if name == "blend":
        features = item_features("mixed", data.texts, data.train, seed=0)
        return partial(Blend, similar=similar_items(features))
    return {"cm": CollaborativeModel.fit, "svd": SVD}[name]

class Folds:
    """For training: scores that do not know what the user logged later. Each user is in one of 20
    folds, chosen by a checksum of the training history. The scores of a user come from a recommender
    that was fitted on the other 19 folds. fit(histories, num_items) → a recommender, maybe of your
    own."""
    def __init__(self, fit, histories, num_items, folds=20):
        self.fit = fit
        self.histories = histories
        self.folds = folds
        self.whole = fit(histories, num_items)                  # of all folds, for serving
        count = np.bincount(entries(histories)[1], minlength=num_items)
        self.popular = getattr(self.whole, "popular", torch.tensor(count).float() + 1)     # (n,)
        self.parts = {}                                         # fold → fitted without it

    def fold(self, history):
        """The number of its fold."""
        return zlib.crc32(np.array(history, np.int64).tobytes()) % self.folds

    def without(self, fold):
        """The recommender that does not know a fold, fitted when it is first asked for."""
        if fold not in self.parts:
            others = [history for history in self.histories if self.fold(history) != fold]
            self.parts[fold] = self.fit(others, len(self.popular))
        return self.parts[fold]

    def scores(self, histories, following=None):
        """(B, n). following, in training: B lists, history + following is the user's training
        history. None: users to be served. InputError if your own scores are not as ours."""
        if following is None:
            return self.checked(self.whole, histories)
        folds = [self.fold([*past, *after]) for past, after in zip(histories, following)]
        scores = torch.empty(len(histories), len(self.popular))
        for fold in set(folds):
            rows = [row for row, other in enumerate(folds) if other == fold]
            scores[rows] = self.checked(self.without(fold), [histories[row] for row in rows])
        return scores

    def checked(self, cm, histories):
        """The scores of a recommender as float32, or InputError."""
        scores = cm.scores(histories)
        shape = (len(histories), len(self.popular))
        right = torch.is_tensor(scores) and scores.shape == shape and scores.is_floating_point()
        right = right and scores.min() >= 0 and (scores.sum(1) - 1).abs().max() < 1e-3
        right = right and not scores[entries(histories)].any()
        found = " ".join(str(scores).split())[:100]
        check(right, f"{type(cm).__name__}.scores has to return a tensor of floats {shape}, ≥ 0, 0 "
              f"at items of the history, each row of sum 1, not {found} …")
        return scores.float()

class Debiased:
    """A recommender whose scores are divided by popularity^δ, ours: what is shown more is logged
    more. Its `popular` (n,) says how popular an item is: count + 1, or the length of its vector."""
    def __init__(self, cm, delta):
        self.cm = cm
        self.weight = cm.popular ** delta                                           # (n,)

    def scores(self, histories, *following):
        """(B, n) ≥ 0, rows sum to 1."""
        scores = self.cm.scores(histories, *following) / self.weight
        return scores / scores.sum(1, keepdim=True).clamp(min=1e-30)

    def recommend(self, histories, k=10):
        """The k unseen items (B, k) with the highest scores, −1 where none is left; the scores."""
        scores = functional.pad(self.scores(histories), (0, k), value=-torch.inf)
        scores[entries(histories)] = -torch.inf
        value, items = scores.topk(k, 1)
        return items.masked_fill(value == -torch.inf, -1), value

class Guided:
    """A policy and the CM that guides its beam search: the best items by log P + γ · log CM, ours.
    It serves the methods NAME+cm."""
    def __init__(self, policy, cm, gamma=2.0):
        self.policy = policy
        self.cm = cm
        self.gamma = gamma
        self.catalogue = policy.catalogue

    def recommend(self, histories, k=10):
        """The k best items (B, k) of B histories, and log P + γ · log CM (B, k); see Policy."""
        return self.policy.recommend(histories, k, guide=self.cm.scores(histories) ** self.gamma)

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
        # r_s(v') = c(v') / Σ c; c(v') = Σ_l 1[t_l = t'_l], t of v and t' of v', each level alone
        shared = torch.zeros_like(unseen, dtype=torch.uint8)    # c
        for codes in self.ids.codes.T:                          # (n,) of all items, at one level
            shared += codes[positives, None] == codes
        shared *= unseen
        return shared / shared.sum(1, keepdim=True)

    def __call__(self, scores, positives, liked, unseen):
        """R (B, n) of every item, > 0 at unseen (B, n; bool) ones; r_ŷ is scores (B, n);
        positives and liked (bool) are (B,)."""
        # R = w_a · r_a + w_ŷ · r_ŷ + w_s · r_s + ε/m, 0 at seen items. Last term first
        w_a, w_y, w_s = self.weights
        r = self.epsilon / unseen.sum(1, keepdim=True)          # (B, 1)
        r = r.add(scores, alpha=w_y)                            # (B, n) r + w_ŷ · r_ŷ
        r.add_(self.similarity(positives, unseen), alpha=w_s)   # in place: r is large
        r.add_(self.action(positives, liked), alpha=w_a)
        return r.mul_(unseen)
