"""Item tokenizer: every item becomes a semantic ID, a short path of codes down a tree.

    features of an item  →  residual k-means  →  (c_1, …, c_L), each code from 0 to K − 1
By hand, K = 2 and L = 2. Of three items with one feature each:
    features                      0      1     10       first centroids: 0.5 and 10
    code of the nearest one       0      0      1
    features − its centroid    −0.5    0.5      0       new centroids of these: −0.5 and 0.25
    code of the nearest one       0      1      1
So the IDs are (0, 0), (0, 1), (1, 1): all differ, similar items begin alike. The k-means is ours;
the paper's IDs (TIGER, LETTER) come from a trained network.
Letters: n items, L levels, K codes, M prefixes, C contexts.
"""
import re
from itertools import chain

import numpy as np
import torch
from tqdm import tqdm

from data import check

def rows_and_columns(lists, num_items=np.inf):
    """Places of the items of B histories in a (B, n) matrix, arrays of rows and columns: [[5, 2],
    [7]] → [0, 0, 1], [5, 2, 7]. InputError for an item that is not in the catalogue."""
    rows = np.repeat(np.arange(len(lists)), list(map(len, lists)))
    items = np.fromiter(chain.from_iterable(lists), np.int64, len(rows))
    known = (0 <= items) & (items < num_items)
    check(known.all(), f"items of a history are numbers from 0 to {num_items - 1}")
    return rows, items

def sparse(index, values, shape):
    """A sparse tensor with m values; index: their rows (m,), columns (m,). Equal places add up."""
    index = np.stack(index)
    return torch.sparse_coo_tensor(index, values, shape, check_invariants=False).coalesce()

# --- Features of items: vectors of their text and of the log --------------------------------------
def leading_vectors(matrix, rank, seed, power=0.0):
    """Singular value decomposition (SVD) of a sparse matrix (n, m): the left singular vectors of
    the `rank` largest singular values, columns of (n, rank), each times its value^power."""
    rank = min(rank, *matrix.shape)
    with torch.random.fork_rng(devices=[]):                     # no other random numbers change
        torch.manual_seed(seed)
        u, s, _ = torch.svd_lowrank(matrix, q=min(rank + 8, *matrix.shape), niter=4)
    return u[:, :rank].numpy() * s[:rank].numpy() ** power

def tf_idf(texts):
    """Sparse (n, terms): how often a term is in a text, times idf = log(n / count in all texts), as
    rare terms say more. Terms are words and pairs of words; one that stands once counts 0."""
    column_of = {}                                              # term → its column
    columns = []                                                # n lists, of the terms of a text
    for text in texts:
        words = re.findall(r"[^\s(),|]+", text.lower())
        pairs = [f"{first} {second}" for first, second in zip(words, words[1:])]
        # setdefault: a new term gets the next column
        columns.append([column_of.setdefault(term, len(column_of)) for term in words + pairs])
    rows, terms = rows_and_columns(columns)                     # here, texts and their terms
    count = np.bincount(terms)                                  # (terms,)
    idf = np.log(len(texts) / count).clip(0) * (count > 1)
    return sparse((rows, terms), idf[terms].astype(np.float32), (len(texts), len(count)))

def item_vectors(histories, num_items, rank=0):
    """Vectors of items (n, rank), alike if the same users took them: the first left singular
    vectors of items × users; at (i, u), there is 1 / count(i)^.25 if user u took item i, else 0.
    rank: by default 24, or for 1,500 items and more n / 30."""
    users, items = rows_and_columns(histories)
    values = np.bincount(items)[items] ** -0.25
    x = sparse((items, users), values.astype(np.float32), (num_items, len(histories)))
    return leading_vectors(x, rank or (24 if num_items < 1500 else num_items // 30), seed=0)

def unit(rows):
    """Rows (n, d), divided by their lengths; those that are 0 stay 0."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(length > 1e-6, length, np.inf)

def item_features(kind, texts, histories, seed, dim=64):
    """(n, d): "content" is an item's text (TIGER); InputError if no item has any. "mixed" is its
    text and its vector by the log (in the spirit of LETTER).
    Pass training histories only: validation or test items would leak into every result."""
    text = unit(leading_vectors(tf_idf(texts), dim, seed, power=0.5))       # times √singular value
    if kind == "content":
        check(text.any(), "--ids content needs text in items.csv")
        return text
    log = unit(item_vectors(histories, len(texts)).astype(np.float64))
    return np.hstack([text, 2 * log])                           # 2: it says more than a few words

# --- Residual k-means -----------------------------------------------------------------------------
def squared_distances(points, centroids):
    """(n, k) of points (n, d) and centroids (k, d): |p − c|² = |p|² − 2 p·c + |c|²."""
    cross = points @ centroids.T
    return np.maximum((points ** 2).sum(1)[:, None] - 2 * cross + (centroids ** 2).sum(1), 0)

def kmeans(points, k, rng, steps=20):
    """(k, d) centroids of points (n, d): k-means++ seeds, then Lloyd's steps."""
    centroids = np.empty((k, points.shape[1]))
    cost = np.full(len(points), np.inf)                         # squared distance to the nearest
    for j in tqdm(range(k), "k-means++ seeds", disable=None, leave=False):
        p = cost / cost.sum() if j and cost.sum() > 0 else None     # None: all are equally likely
        centroids[j] = points[rng.choice(len(points), p=p)]         # likely far from all others
        cost = np.minimum(cost, ((points - centroids[j]) ** 2).sum(1))
    for _ in tqdm(range(steps), "k-means steps", disable=None, leave=False):
        nearest = squared_distances(points, centroids).argmin(1)                        # (n,)
        count = np.bincount(nearest, minlength=k)[:, None]                              # (k, 1)
        total = np.stack([np.bincount(nearest, column, k) for column in points.T], 1)   # (k, d)
        centroids = np.where(count > 0, total / np.maximum(count, 1), centroids)    # else as it was
    return centroids

def assign_with_capacity(cost, parent, capacity):
    """Give each item its next code → (n,). cost (n, K) of each code, overwritten. parent (n,): a
    number for the codes that an item has so far. Items with one parent that get one code are a
    cell: at most `capacity`, as there are no more IDs that begin so.
    1. Every item asks for the cheapest code that has not refused it.
    2. In each cell, the `capacity` items with the least cost stay; the others are refused for good.
    3. Repeat until no item is refused.
    With one parent, capacity 1 and costs [[1, 3], [2, 9]], both items ask for code 0. It keeps
    item 0, which costs less; item 1 has to take code 1."""
    items = np.arange(len(cost))
    while True:
        code = cost.argmin(1)
        cell = parent * cost.shape[1] + code                    # a number for each cell (n,)
        order = np.lexsort((cost[items, code], cell))           # by cell, then by cost
        begins = np.flatnonzero(np.diff(cell[order])) + 1
        refused = np.concatenate([inside[capacity:] for inside in np.split(order, begins)])
        if not len(refused):
            return code
        cost[refused, code[refused]] = np.inf                   # never the cheapest again

# --- The table of IDs, and the tree of their prefixes ---------------------------------------------
def look_up(table, nodes):
    """What a table (B, M + n) has at nodes (B, …); 0 (or False) at −1, which is no node."""
    found = table.gather(1, nodes.clamp(min=0).flatten(1)).view_as(nodes)
    return found.masked_fill(nodes < 0, 0)

class SemanticIDs(torch.nn.Module):
    """The table item ↔ semantic ID, and the tree of its prefixes. A Module, so that .to() moves it.
    A node of the tree is a number: 0 is the root, 1 … M−1 are the other prefixes, level by level,
    M + i is item i. The example, IDs (0, 0), (0, 1), (1, 1), has M = 3:
        0 = () ─┬─ code 0 ─ 1 = (0) ─┬─ code 0 ─ 3 = item 0
                │                    └─ code 1 ─ 4 = item 1
                └─ code 1 ─ 2 = (1) ─── code 1 ─ 5 = item 2
    codes (n, L)            the IDs
    nodes (n, L + 1)        [[0, 1, 3], [0, 1, 4], [0, 2, 5]]: from the root to each item
    next_node (M + 1, K)    [[1, 2], [3, 4], [−1, 5], [−1, −1]]: where codes lead from 0, 1, 2, −1.
    −1 is no node. As an index, −1 is the last row: from no node, all codes lead to no node."""
    def __init__(self, codes, num_codes):
        codes = np.asarray(codes)
        right = codes.ndim == 2 and codes.dtype.kind in "iu" and 0 <= codes.min()
        right = right and codes.max() < num_codes and len(np.unique(codes, axis=0)) == len(codes)
        check(right, f"IDs: (n, L) integers from 0 to {num_codes - 1}, all rows different")
        super().__init__()
        self.num_codes = int(num_codes)
        self.num_levels = L = codes.shape[1]
        ids = list(map(tuple, codes.tolist()))
        number = {}                                             # prefix → its node; () is 0
        for level in range(L):
            for prefix in sorted({path[:level] for path in ids}):
                number[prefix] = len(number)
        self.num_prefixes = M = len(number)
        check(M * num_codes < 2 ** 28, f"a tree of {M} prefixes · {num_codes} codes is too large "
              "for the memory; use fewer codes")
        nodes = np.empty((len(ids), L + 1), np.int64)
        for item, path in enumerate(ids):
            nodes[item] = [number[path[:level]] for level in range(L)] + [M + item]
        next_node = np.full((M + 1, num_codes), -1, np.int64)
        next_node[nodes[:, :-1], codes] = nodes[:, 1:]          # code c_l leads from s_{l-1} to s_l
        for name, table in {"codes": codes, "next_node": next_node, "nodes": nodes}.items():
            self.register_buffer(name, torch.tensor(table, dtype=torch.long), persistent=False)

    @classmethod
    def fit(cls, features, num_codes, num_levels=2, seed=0):
        """Residual k-means of features (n, d); same seed, same IDs; InputError for n > K^L."""
        residual = np.array(features, np.float64)
        check(len(residual) <= num_codes ** num_levels, f"{len(residual)} items do not fit into "
              f"{num_codes}^{num_levels} IDs; raise --codes")
        check(len(residual) * num_codes < 2 ** 28, f"{len(residual)} items · {num_codes} codes are "
              "too many for the memory; lower --codes")
        rng = np.random.default_rng(seed)
        codes = []                                              # (n,) of each level
        parent = np.zeros(len(residual), np.int64)              # a number for the codes so far
        for level in range(num_levels):
            centroids = kmeans(residual, num_codes, rng)
            capacity = num_codes ** (num_levels - 1 - level)    # IDs below level + 1 codes
            code = assign_with_capacity(squared_distances(residual, centroids), parent, capacity)
            residual = residual - centroids[code]
            codes.append(code)
            _, parent = np.unique(parent * num_codes + code, return_inverse=True)   # 0, 1, …
        return cls(np.stack(codes, 1), num_codes)

    def flows(self, values):
        """Exact flow F(s) of every node: Σ of values (C, n), such as R, over the items below it;
        Z at node 0. In the example, [.5, .2, .3] → [1, .7, .3, .5, .2, .3]."""
        flow = values.new_zeros(self.num_prefixes, len(values))
        items = values.T.contiguous()                           # (n, C): rows are faster to add
        for level in range(self.num_levels):
            flow.index_add_(0, self.nodes[:, level], items)
        return torch.cat([flow, items]).T                       # (C, M + n)

    def unseen(self, histories):
        """(B, M + n) bool: does a node lead to an item that is not in the history? Ours: in the
        paper, P is over all items. In the example, if item 2 was seen, nodes 5 and 2 are False."""
        left = torch.ones(len(histories), len(self.codes), device=self.codes.device)
        left[rows_and_columns(histories, len(self.codes))] = 0
        return self.flows(left) > 0                             # flow: number of unseen items below

    def walk(self, codes):
        """Where codes (…, l) lead from the root: nodes (…, l + 1), −1 from where on no ID begins
        so. In the example, the codes 0, 1 lead to the nodes 0, 1, 4."""
        nodes = [codes.new_zeros(codes.shape[:-1])]             # the root
        for code in codes.unbind(-1):
            nodes.append(self.next_node[nodes[-1], code])
        return torch.stack(nodes, -1)
