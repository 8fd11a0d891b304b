"""The comprehensive reward R, and traditional recommenders. R reads one of them, its *teacher*, the
paper's collaborative model (CM).

A recommender is made from training histories, lists of items, oldest first, no repeats, and the
number of items. It has scores(histories) → (B, n) ≥ 0, rows of sum 1, 0 at items of the history,
and `popular` (n,), what `debias` divides its scores by. Letters: U a history, v the item that was
logged next, B users or contexts, n items.
"""
import warnings
from functools import lru_cache, partial

import numpy as np
import torch
from torch.nn import functional

from data import check
from tokenizer import item_vectors, rows_and_columns, sparse

warnings.filterwarnings("ignore", message="Sparse CSR")         # torch calls its sparse CSR "beta"

# --- The reward -----------------------------------------------------------------------------------
def comprehensive_reward(ids, scores, next_item, liked, unseen, w_a, w_y, w_s):
    """R (B, n) of every item i, 0 if it was seen: by the logged action, a teacher's scores, the
    similarity of IDs. Each signal sums to 1, so the heuristic weights w are shares of Z. (In the
    paper, r_a is 10 at v, and r_s the number of equal codes: these sums are far above 1.)
    ids: SemanticIDs. scores (B, n): r_ŷ. next_item (B,): v. liked (B,) bool: did the user like v?
    unseen (B, M + n) bool, of all nodes; items are the last n."""
    unseen = unseen[:, ids.num_prefixes:]                       # (B, n), m of a row are True
    # r_a: 1 at v, .1 if the user did not like it (the paper's 10 : 1), 0 at other items
    r_a = torch.zeros_like(scores)
    r_a.scatter_(1, next_item[:, None], torch.where(liked, 1.0, 0.1)[:, None])
    # r_s = c(i) / Σ c over unseen items; c(i): in how many levels i has the code of v. In one
    # level, codes of the v (B, 1) are compared with codes of all items (n,)
    c = sum((codes[next_item, None] == codes).byte() for codes in ids.codes.T) * unseen
    r_s = c / c.sum(1, keepdim=True)                            # v is unseen, so Σ c is L at least
    epsilon = 1e-3 / unseen.sum(1, keepdim=True)                # (B, 1) ε/m, ours: every R > 0
    # R = w_a · r_a + w_ŷ · r_ŷ + w_s · r_s + ε/m, of the m unseen items
    return (w_a * r_a + w_y * scores + w_s * r_s + epsilon) * unseen

# --- Recommenders ---------------------------------------------------------------------------------
def weighted(table, histories, weight, length=10 ** 9):
    """Of each history, Σ_j weight(age of j) · table[j], j its last `length` items: table (n, m) →
    (B, m). The newest has age 1: if weight is 1/age, [5, 2] becomes table[2] + table[5] / 2."""
    lists = [history[-length:] for history in histories]
    places = rows_and_columns(lists, len(table))                # row b, column j of each item
    ages = np.concatenate([np.arange(len(items), 0, -1) for items in lists])
    weights = weight(torch.tensor(ages).float())
    return (sparse(places, weights, (len(lists), len(table))) @ table).to_dense()

def unit_sum(rows):
    """Rows (B, n) ≥ 0, divided by their sums; those that are 0 stay 0."""
    return rows / rows.sum(1, keepdim=True).clamp(min=1e-12)

def shares(scores, histories, popular, s=0.001):
    """Scores (B, n), and a share s of popularity (n,) → (B, n), rows of sum 1.
    1. Both are made 0 at items of the history, then divided by their sums.
    2. (1 − s) · scores + s · popular; popular alone for a user without any score.
    A user took item 0, s is .1, scores [6, 3, 1, 0], popular [5, 2, 1, 1]:
    .9 · [0, .75, .25, 0] + .1 · [0, .5, .25, .25] = [0, .725, .25, .025]"""
    seen = rows_and_columns(histories, len(popular))
    scores = functional.threshold(scores, 1e-6, 0.0)            # what is below 1e-6 is rounding: 0
    popular = popular.repeat(len(histories), 1)                 # (B, n)
    scores[seen] = 0
    popular[seen] = 0
    return unit_sum((1 - s) * unit_sum(scores) + s * unit_sum(popular))

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
        _, items = rows_and_columns(histories)
        count = torch.tensor(np.bincount(items, minlength=num_items)).double()
        self.near = (both * count.clamp(min=1)[:, None] ** -0.5).float()
        self.popular = (count + 1).float()                      # (n,)
        self.popularity = popularity                            # its share

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
        self.popular = self.counts.popular                      # (n,)

    def scores(self, histories):
        """CM(U, ·) (B, n) of B histories."""
        return self.counts.scores(histories) / 4 + self.svd.scores(histories) * 3 / 4

# A teacher's name: what makes it of (histories, num_items)
TEACHERS = {"pop": partial(CollaborativeModel, popularity=1.0),     # popularity alone
            "cm": CollaborativeModel, "svd": SVD, "blend": Blend}

# --- The teacher: a recommender as R reads it -----------------------------------------------------
@lru_cache(maxsize=8 * 21)                                      # kept for all seeds, of 8 teachers
def fitted(make, data, fold):
    """What `make` makes of all training histories but those in a fold, 0 to 19; −1: of all."""
    others = [history for user, history in enumerate(data.train) if user % 20 != fold]
    return make(others, len(data.titles))

class Teacher:
    """A recommender of TEACHERS whose scores are (score / popularity^δ)^power, ours. δ: what is
    shown more is logged more. power: P learns few high scores more easily than many middling ones.
    Users are in 20 folds (ours). In training, a user's scores come from a recommender fitted on
    the other 19 folds: so it does not know what this user logged next. (Popularity knows it, a
    little.) Users to be served get one that was fitted on all."""
    def __init__(self, name, data, debias=0.0, power=1.0):
        check(name in TEACHERS, f"there is no teacher {name!r}; there are {', '.join(TEACHERS)}")
        self.name = name
        self.data = data
        self.debias = debias                                    # δ
        self.power = power

    def scores(self, histories, users=None):
        """(B, n) ≥ 0, rows sum to 1. users: in training, whose histories these are; None: users to
        be served. InputError if a recommender, maybe your own, returns something else."""
        folds = np.full(len(histories), -1) if users is None else np.array(users) % 20
        n = len(self.data.titles)
        scores = torch.empty(len(histories), n)
        asked = (f"{self.name}: scores(histories) has to return a tensor (B, n) ≥ 0, 0 at items of "
                 "the history, each row of sum 1")
        for fold in np.unique(folds).tolist():
            rows = np.flatnonzero(folds == fold)
            recommender = fitted(TEACHERS[self.name], self.data, fold)
            found = recommender.scores([histories[row] for row in rows])
            check(found.shape == (len(rows), n), f"{asked}; its shape is {tuple(found.shape)}")
            scores[rows] = found.float()
        some_left = torch.tensor([len({*history}) < n for history in histories]).float()
        right = ((scores.sum(1) - some_left).abs() < 1e-3).all() and (scores >= 0).all()
        check(right and not scores[rows_and_columns(histories)].any(), asked)
        if self.debias:
            scores /= fitted(TEACHERS[self.name], self.data, -1).popular ** self.debias
        scores /= scores.amax(1, keepdim=True).clamp(min=1e-30)     # or small powers would vanish
        return unit_sum(scores ** self.power)

    def recommend(self, histories, k=10):
        """The k unseen items (B, k) with the highest scores, −1 where none is left; the scores."""
        scores = functional.pad(self.scores(histories), (0, k), value=-torch.inf)
        scores[rows_and_columns(histories)] = -torch.inf
        value, items = scores.topk(k, 1)
        return items.masked_fill(value == -torch.inf, -1), value
