"""The comprehensive reward R, and traditional recommenders. R reads one of them, its *teacher*, the
paper's collaborative model (CM).

A recommender is made by a function fit(histories, num_items): training histories, lists of items,
oldest first, no repeats. It has scores(histories) → (B, n) ≥ 0, rows of sum 1, 0 at items of the
history; InputError for an item that is not in the catalogue. Letters: U a history, v its
*positive*, the item that was logged next, B users or contexts, n items.
"""
import warnings
import zlib
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch.nn import functional

from data import InputError, check
from tokenizer import entries, item_vectors, sparse     # entries: rows, columns of lists' items

warnings.filterwarnings("ignore", message="Sparse CSR")         # torch calls its sparse CSR "beta"

# --- The reward -----------------------------------------------------------------------------------
@dataclass
class Reward:
    """The comprehensive reward R(v' | U, v) = w_a·r_a + w_ŷ·r_ŷ + w_s·r_s + ε/m of the m unseen
    items: by the logged action, a teacher's scores, the similarity of IDs. R of seen items is 0.
    Each signal sums to 1, so the heuristic weights are shares of Z. (If v was not liked, r_a sums
    to .1.) In the paper, r_a is 10 at v, r_s the number of equal codes: in sum, far more."""
    ids: object             # SemanticIDs
    teacher: object         # has scores(histories, users): a Batch asks for them
    weights: tuple          # w_a, w_ŷ, w_s

    def action(self, positives, liked):
        """r_a (B, n): 1 at a liked positive, .1 at another one (the paper's 10 : 1), else 0."""
        r = torch.zeros(len(positives), len(self.ids.codes), device=positives.device)
        return r.scatter_(1, positives[:, None], torch.where(liked, 1.0, 0.1)[:, None])

    def similarity(self, positives, unseen):
        """r_s (B, n), rows sum to 1: codes that unseen IDs share with that of v, positive (B,)."""
        # r_s(v') = c(v') / Σ c over unseen items; c(v'): in how many levels v' has the code of v.
        # In one level, codes of the positives (B, 1) are compared with codes of all items (n,)
        c = sum((codes[positives, None] == codes).byte() for codes in self.ids.codes.T)
        c = c * unseen                                          # v is unseen, so Σ c is L at least
        return c / c.sum(1, keepdim=True)

    def __call__(self, scores, positives, liked, unseen):
        """R (B, n) of every item; r_ŷ: scores (B, n); unseen (B, n) bool; positives, liked (B,)."""
        r_a, r_s = self.action(positives, liked), self.similarity(positives, unseen)
        w_a, w_y, w_s = self.weights
        epsilon = 1e-3 / unseen.sum(1, keepdim=True)            # (B, 1) ε/m
        # R = ε/m + w_ŷ · r_ŷ + w_s · r_s + w_a · r_a, 0 at seen items
        return (epsilon + w_y * scores + w_s * r_s + w_a * r_a) * unseen

# --- Recommenders ---------------------------------------------------------------------------------
def weighted(table, histories, weight, length=10 ** 9):
    """Of each history, Σ_j weight(age of j) · table[j], j its last `length` items: table (n, m) →
    (B, m). The newest has age 1: if weight is 1/age, [5, 2] becomes table[2] + table[5] / 2."""
    lists = [history[-length:] for history in histories]
    places = entries(lists, len(table))                         # row b, column j of each item
    ages = np.concatenate([np.arange(len(items), 0, -1) for items in lists])
    weights = weight(torch.tensor(ages).float())
    return (sparse(places, weights, (len(lists), len(table))) @ table).to_dense()

def shares(scores, histories, popular, s=0.001):
    """Scores (B, n), and a share s of popularity (n,) → (B, n), rows of sum 1.
    1. Both are made 0 at items of the history, then divided by their sums.
    2. (1 − s) · scores + s · popular; s is 1 for a user without any score.
    A user took item 0, s is .1, scores [6, 3, 1, 0], popular [5, 2, 1, 1]:
    .9 · [0, .75, .25, 0] + .1 · [0, .5, .25, .25] = [0, .725, .25, .025]"""
    seen = entries(histories, len(popular))
    scores = functional.threshold(scores, 1e-6, 0.0)            # what is below 1e-6 is rounding: 0
    popular = popular.repeat(len(histories), 1)                 # (B, n)
    scores[seen] = 0
    popular[seen] = 0
    scores /= scores.sum(1, keepdim=True).clamp(min=1e-12)      # a user who saw all items: all 0
    popular /= popular.sum(1, keepdim=True).clamp(min=1e-12)
    share = torch.where(scores.any(1, keepdim=True), s, 1.0)    # (B, 1): s, or 1 without a score
    return (1 - share) * scores + share * popular

def followers(histories, num_items):
    """Sparse (n, n): how often b soon follows a. If it is d places after a, d up to 5, this counts
    .8^(d − 1). The log [[0, 1, 2]] has 1 at (0, 1) and (1, 2), .8 at (0, 2)."""
    pairs = [[], []]                                            # all a, all b
    weights = []
    for history in histories:
        for distance in range(1, 6):
            later = history[distance:]
            pairs[0] += history[:len(later)]
            pairs[1] += later
            weights += [0.8 ** (distance - 1)] * len(later)
    return sparse(np.array(pairs, np.int64), np.array(weights), (num_items, num_items))

class CollaborativeModel:
    """Counts of which item follows which. forward[j, i] says how often i soon follows j;
    near[j, i] = (forward[j, i] + .25 · forward[i, j]) / √count(j);
    CM(U, i) ∝ Σ_j .6^(age(j) − 1) · near[j, i], j the last ten items of U, and some popularity.
    If the log is 0 1 2, near[0] is 0, 1, .8: so, after 0, the sums are 1 for item 1, .8 for 2.
    Constants were chosen on validation items of MovieLens and Beauty."""
    def __init__(self, histories, num_items, popularity=0.05):
        forward = followers(histories, num_items)               # sparse (n, n)
        both = (forward + 0.25 * forward.T).coalesce()
        count = torch.tensor(np.bincount(entries(histories)[1], minlength=num_items)).double()
        self.near = (both * count.clamp(min=1)[:, None] ** -0.5).float()
        self.popular = (count + 1).float()                      # (n,)
        self.popularity = popularity                            # its share

    @classmethod
    def fit(cls, histories, num_items, **options):
        """CollaborativeModel(histories, num_items), by the name that other libraries have."""
        return cls(histories, num_items, **options)

    def scores(self, histories):
        """CM(U, ·) (B, n) of B histories."""
        scores = weighted(self.near, histories, lambda age: 0.6 ** (age - 1), length=10)
        return shares(scores, histories, self.popular, self.popularity)

class SVD:
    """Matrix factorisation, PureSVD (Cremonesi et al. 2010): items that the same users took have
    similar vectors x. CM(U, i) ∝ max(0, Σ_j ⟨x_j, x_i⟩ / age(j)^.75) over all items j of U."""
    def __init__(self, histories, num_items, rank=0):
        self.vectors = torch.tensor(item_vectors(histories, num_items, rank))       # (n, rank)
        # (n,) the length of a vector: as measured, about √(number of users who took the item)
        self.popular = self.vectors.norm(dim=1).clamp(min=1e-4)

    def scores(self, histories):
        """CM(U, ·) (B, n) of B histories."""
        users = weighted(self.vectors, histories, lambda age: age ** -0.75)         # (B, rank)
        return shares(users @ self.vectors.T, histories, self.popular)      # below 0 becomes 0

class Blend:
    """Ours, for real logs: a quarter CollaborativeModel, three quarters SVD. Each finds items that
    the other misses."""
    def __init__(self, histories, num_items):
        self.counts = CollaborativeModel(histories, num_items)
        self.svd = SVD(histories, num_items)

    def scores(self, histories):
        """CM(U, ·) (B, n) of B histories."""
        return self.counts.scores(histories) / 4 + self.svd.scores(histories) * 3 / 4

# A teacher's name: its fit(histories, num_items)
TEACHERS = {"pop": partial(CollaborativeModel, popularity=1.0),     # popularity alone
            "cm": CollaborativeModel, "svd": SVD, "blend": Blend}

# --- The teacher: a recommender as R reads it -----------------------------------------------------
@lru_cache(maxsize=8)
def folds_of(data):
    """Which of 20 folds each user is in (users,), by a checksum of the user's training items: users
    with the same ones share a fold."""
    return np.array([zlib.crc32(np.array(items, np.int64).tobytes()) % 20 for items in data.train])

@lru_cache(maxsize=8 * 21)                                      # kept for all seeds, of 8 teachers
def fitted(fit, data, fold):
    """What fit makes of all training histories but those in a fold, 0 to 19; −1: of all."""
    # Copies: the fit may be yours, and change them
    others = [[*data.train[user]] for user in np.flatnonzero(folds_of(data) != fold)]
    return fit(others, len(data.titles))

class Teacher:
    """A recommender of TEACHERS whose scores are (score / popularity^δ)^sharp, ours. δ: what is
    shown more is logged more. sharp: P learns few high scores more easily than many middling ones.
    An item's popularity is its count + 1; for `SVD`, the length of its vector, about √count.
    Users are in 20 folds. In training, a user's scores come from a recommender that was fitted on
    the other 19 folds: so it does not know what this user logged next. (Popularity knows it, a
    little.) Users to be served get one that was fitted on all."""
    def __init__(self, name, data, debias=0.0, sharp=1.0):
        check(name in TEACHERS, f"there is no teacher {name!r}; there are {', '.join(TEACHERS)}")
        self.fit = TEACHERS[name]
        self.data = data
        self.debias = debias                                    # δ
        self.sharp = sharp
        whole = fitted(self.fit, data, -1)
        count = torch.tensor(np.bincount(entries(data.train)[1], minlength=len(data.titles)))
        self.popular = whole.popular if isinstance(whole, SVD) else (count + 1.0).float()   # (n,)

    def checked(self, histories, fold):
        """Scores (B, n) by the recommender without this fold, or InputError: it may be yours."""
        cm = fitted(self.fit, self.data, fold)
        scores = cm.scores([[*history] for history in histories])   # copies, as in `fitted`
        shape = (len(histories), len(self.popular))
        total = torch.tensor([len({*history}) < shape[1] for history in histories]).float()
        asked = (f"{type(cm).__name__}.scores has to return a tensor of floats {shape}, ≥ 0, 0 at "
                 "items of the history, each row of sum 1")
        found = (scores.dtype, *scores.shape) if torch.is_tensor(scores) else type(scores).__name__
        right = torch.is_tensor(scores) and scores.shape == shape and scores.is_floating_point()
        check(right, f"{asked}, not {found}")
        sums = scores.sum(1)
        right = scores.min() >= 0 and not scores[entries(histories)].any()
        right = right and (sums - total).abs().max() < 1e-3             # 1, or 0 if all are seen
        if not right:                                           # the numbers are only then needed
            raise InputError(f"{asked}; here they are {scores.min():.3g} to {scores.max():.3g}, "
                             f"sums {sums.min():.3g} to {sums.max():.3g}, or one is not 0 there")
        return scores.float()

    def scores(self, histories, users=None):
        """(B, n) ≥ 0, rows sum to 1. users: in training, whose histories these are; None: users to
        be served."""
        folds = np.full(len(histories), -1) if users is None else folds_of(self.data)[users]
        scores = torch.empty(len(histories), len(self.popular))
        for fold in np.unique(folds).tolist():
            rows = np.flatnonzero(folds == fold)
            scores[rows] = self.checked([histories[row] for row in rows], fold)
        powers = (scores / self.popular ** self.debias) ** self.sharp
        total = powers.sum(1, keepdim=True)
        # All scores are 0 for a user who took all items; else, powers may be too small or large
        right = ((total > 0) & (total < torch.inf)) | ~scores.any(1, keepdim=True)
        check(right.all(), "the scores of a teacher vanish: debias or sharp is too large")
        return powers / total.clamp(min=1e-30)

    def recommend(self, histories, k=10):
        """The k unseen items (B, k) with the highest scores, −1 where none is left; the scores."""
        scores = functional.pad(self.scores(histories), (0, k), value=-torch.inf)
        scores[entries(histories)] = -torch.inf
        value, items = scores.topk(k, 1)
        return items.masked_fill(value == -torch.inf, -1), value
