"""Item tokenizer: every item becomes a semantic ID, a short path of codes down a tree.

    features of an item  →  residual k-means  →  (c_1, c_2, c_3)

Like RQ-VAE in TIGER and LETTER, k-means on residuals gives similar items the same first codes; it needs no
training loop and reads in a minute. Uniqueness is built in: below a prefix of l codes there is room for K^(L-l)
items, so a code that is full refuses the items farthest from its centroid, and they take their next-best code.
"""
import copy

import numpy as np
import torch


def text_features(texts, dim, seed):
    """(n, dim) float32: truncated SVD of tf-idf over words and neighbouring word pairs; zeros where there is no text."""
    words, rows, cols = {}, [], []
    for i, text in enumerate(texts):
        parts = text.lower().replace("(", " ").replace(")", " ").replace(",", " ").split()
        for term in parts + [a + " " + b for a, b in zip(parts, parts[1:])]:
            rows.append(i), cols.append(words.setdefault(term, len(words)))
    rows, cols = np.array(rows, np.int64), np.array(cols, np.int64)
    document_frequency = np.bincount(cols, minlength=len(words))
    idf = np.log(len(texts) / np.maximum(document_frequency, 1))
    idf[document_frequency < 2] = 0                            # a word of one item says nothing of similarity
    return _svd(rows, cols, idf[cols], (len(texts), len(words)), dim, seed)


def cooccurrence(histories, num_items, window, decay, backward):
    """Sparse (n, n) counts of b near a: rows a, columns b, weights; each pair (a, b) once.

    Where b stands d ≤ window places after a, (a, b) gains decay^(d-1), and (b, a) gains backward · decay^(d-1).
    """
    flat = np.fromiter((i for h in histories for i in h), np.int64)
    user = np.repeat(np.arange(len(histories)), [len(h) for h in histories])
    keys, weights = [], []
    for distance in range(1, window + 1):
        same = user[distance:] == user[:-distance]
        a, b = flat[:-distance][same], flat[distance:][same]
        keys += [a * num_items + b, b * num_items + a]
        weights += [np.full(len(a), decay ** (distance - 1)), np.full(len(a), backward * decay ** (distance - 1))]
    keys, place = np.unique(np.concatenate(keys), return_inverse=True)
    return keys // num_items, keys % num_items, np.bincount(place, np.concatenate(weights), len(keys))


def collaborative_features(histories, num_items, dim, seed):
    """(n, dim) float32: truncated SVD of the positive pointwise mutual information of items close in a history."""
    a, b, w = cooccurrence(histories, num_items, window=5, decay=0.8, backward=1.0)
    total = np.bincount(a, w, num_items)
    # PPMI(a, b) = max(0, log(p(a, b) / (p(a)·p(b)))), with p(b) ∝ count^0.75 so that rare pairs do not dominate
    smooth = total ** 0.75
    ppmi = np.maximum(0, np.log(np.maximum(w * smooth.sum(), 1e-12) / np.maximum(total[a] * smooth[b], 1e-12)))
    return _svd(a, b, ppmi, (num_items, num_items), dim, seed)


def _svd(rows, cols, values, shape, dim, seed):
    """Left singular vectors times √(singular values) of a sparse matrix, each row scaled to length 1 (or 0)."""
    out = np.zeros((shape[0], dim), np.float32)
    rank = min(dim, *shape)
    if rank == 0 or not len(values):
        return out
    matrix = torch.sparse_coo_tensor(np.stack([rows, cols]), torch.tensor(values, dtype=torch.float32), shape, check_invariants=False).coalesce()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        u, s, _ = torch.svd_lowrank(matrix, q=min(rank + 8, *shape), niter=4)
    out[:, :rank] = (u * s.sqrt())[:, :rank].numpy()
    norm = np.linalg.norm(out, axis=1, keepdims=True)
    return np.divide(out, norm, out=np.zeros_like(out), where=norm > 1e-6)


def item_features(kind, texts, histories, seed, dim=64):
    """(n, d) features for the IDs: kind "content" (text alone, as TIGER) or "mixed" (text + training co-occurrence, as LETTER).

    Pass training histories only: a validation or test interaction in here would leak into every row of the table.
    """
    text = text_features(texts, dim, seed)
    if kind == "content":
        return text
    # Co-occurrence counts double, a choice by hand: who liked what should outweigh seven words.
    return np.hstack([text, 2 * collaborative_features(histories, len(texts), dim, seed)])


def kmeans(points, k, rng, steps=20):
    """(k, d) centroids of points (n, d): k-means++ seeding, then Lloyd's steps; an empty cluster stays where it is.

    Of more than 100 points a centroid only so many are read, drawn at random: the others move a mean by little.
    """
    if len(points) > 100 * k:
        points = points[rng.choice(len(points), 100 * k, replace=False)]
    centroids, cost = np.empty((k, points.shape[1])), np.full(len(points), np.inf)
    for j in range(k):
        # The next seed is a point drawn with probability ∝ its squared distance from the nearest seed so far.
        p = cost / cost.sum() if j and cost.sum() > 0 else None
        centroids[j] = points[rng.choice(len(points), p=p)]
        cost = np.minimum(cost, ((points - centroids[j]) ** 2).sum(1))
    for _ in range(steps):
        nearest = _squared_distances(points, centroids).argmin(1)
        count = np.bincount(nearest, minlength=k)
        total = np.stack([np.bincount(nearest, column, k) for column in points.T], 1) if points.size else centroids
        centroids = np.where(count[:, None] > 0, total / np.maximum(count, 1)[:, None], centroids)
    return centroids


def _squared_distances(points, centroids):
    return np.maximum((points ** 2).sum(1)[:, None] - 2 * points @ centroids.T + (centroids ** 2).sum(1), 0)   # (n, k)


def assign_with_capacity(cost, parent, capacity):
    """Each item takes its cheapest code, but no (parent, code) cell takes more than `capacity` items.

    Like school admission (deferred acceptance): all items ask for their cheapest code that has not refused them; a
    cell that is asked too often keeps the cheapest `capacity` of them and refuses the others for good; until none is.

    cost (n, K) floats, parent (n,) integers, the cell that each item is already in → (n,) integers, the codes; cost is
    left as it was. A parent of at most capacity·K items always suffices. It is what makes semantic IDs unique: with
    room for K^(L-l) items below a prefix of l codes, the last level has room for one.

    Example: three of four items find code 0 cheapest, and it takes two; item 1 loses the most there, and goes to code 1.

    >>> cost = np.array([[0.0, 5.0], [1.0, 2.0], [0.5, 9.0], [3.0, 0.0]])
    >>> assign_with_capacity(cost, np.array([0, 0, 0, 0]), capacity=2).tolist()
    [0, 1, 0, 1]
    """
    cost = cost.copy()
    items = np.arange(len(cost))
    while True:
        code = cost.argmin(1)
        cell = parent * cost.shape[1] + code
        order = np.lexsort((cost[items, code], cell))          # by cell, the cheapest first
        sorted_cell = cell[order]
        first = np.searchsorted(sorted_cell, sorted_cell)      # where each cell begins
        refused = order[np.arange(len(order)) - first >= capacity]
        if not len(refused):
            return code
        cost[refused, code[refused]] = np.inf


class SemanticIDs:
    """The table item ↔ ID, and the tree of legal prefixes.

    Example: items 0, 1, 2 with the IDs (0, 1, 1), (0, 2, 0) and (2, 0, 0), K = 3:

    >>> ids = SemanticIDs([[0, 1, 1], [0, 2, 0], [2, 0, 0]], num_codes=3)
    >>> ids.legal([]).tolist()                                 # an ID begins with 0 or 2
    [True, False, True]
    >>> ids.legal([0]).tolist()                                # after 0 comes 1 or 2
    [False, True, True]
    >>> ids.lookup([[0, 2, 0], [0, 2, 1]]).tolist()            # the second leads nowhere
    [1, -1]
    """

    def __init__(self, codes, num_codes):
        """codes (n, L) integers in [0, num_codes), all rows different; num_codes an int ≤ 65536. ValueError otherwise."""
        codes = np.asarray(codes)
        if codes.ndim != 2 or codes.size == 0 or not np.issubdtype(codes.dtype, np.integer):
            raise ValueError(f"semantic IDs must be an (n, L) table of integers, not {codes.dtype} of shape {codes.shape}")
        if not isinstance(num_codes, int) or num_codes > 65536 or codes.min() < 0 or codes.max() >= num_codes:
            raise ValueError(f"codes must lie in [0, {num_codes}), a whole number of at most 65536")
        self.codes = torch.from_numpy(codes.astype(np.int64))   # (n, L)
        self.num_codes, self.num_levels = int(num_codes), codes.shape[1]
        # The tree's nodes: 0 is the empty prefix, 1 … P-1 the others, level by level, and P + i is item i.
        nodes, count = [np.zeros(len(codes), np.int64)], 1
        for level in range(self.num_levels - 1):
            prefix, below = np.unique(nodes[level] * num_codes + codes[:, level], return_inverse=True)
            nodes.append(count + below)
            count += len(prefix)
        if count * num_codes > 2 ** 28:                         # 2 GB, of which only a hostile file makes use
            raise ValueError(f"a tree of {count} prefixes with {num_codes} codes each is too large")
        nodes = np.stack(nodes + [count + np.arange(len(codes))], 1)
        # children[node, code] is the node that the code leads to, −1 if there is none. The last row is all −1: index
        # −1 reaches it, so a walk that has left the tree stays outside. It grows with the prefixes, not with K^L.
        children = np.full((count + 1, num_codes), -1, np.int64)
        children[nodes[:, :-1], codes] = nodes[:, 1:]
        if (children[nodes[:, -2], codes[:, -1]] != nodes[:, -1]).any():
            raise ValueError("two items have the same semantic ID")
        self.num_prefixes = count                               # P
        self.children = torch.from_numpy(children)              # (P + 1, K)
        self.nodes = torch.from_numpy(nodes)                    # (n, L + 1): s_0 … s_L on the way to each item

    @classmethod
    def fit(cls, features, num_codes, num_levels=3, seed=0):
        """IDs by residual k-means of features (n, d); the same seed gives the same IDs.

        Raises ValueError for more than K^L items, or for features that are not finite.
        """
        residual = np.array(features, np.float64)
        if residual.ndim != 2 or not len(residual) or not np.isfinite(residual).all():
            raise ValueError("features must be a finite (n, d) array with at least one row")
        if len(residual) > num_codes ** num_levels:
            raise ValueError(f"{len(residual)} items do not fit into {num_codes}^{num_levels} = "
                             f"{num_codes ** num_levels} semantic IDs; use more codes or levels")
        rng = np.random.default_rng(seed)
        codes, parent = [], np.zeros(len(residual), np.int64)
        for level in range(num_levels):
            centroids = kmeans(residual, num_codes, rng)
            capacity = num_codes ** (num_levels - 1 - level)    # room below one code of this level
            code = assign_with_capacity(_squared_distances(residual, centroids), parent, capacity)
            residual = residual - centroids[code]
            codes.append(code)
            parent = np.unique(parent * num_codes + code, return_inverse=True)[1]
        return cls(np.stack(codes, 1), num_codes)

    def to(self, device):
        """A copy with its tables on that device; the policy keeps tables of its own."""
        moved = copy.copy(self)
        moved.codes, moved.children, moved.nodes = (x.to(device) for x in (self.codes, self.children, self.nodes))
        return moved

    def node(self, prefix):
        """The node (...) of a prefix (..., l) of codes, l ≤ L; −1 for one that no item has."""
        prefix = torch.as_tensor(prefix, dtype=torch.long)
        node = torch.zeros(prefix.shape[:-1], dtype=torch.long)
        for level in range(prefix.shape[-1]):
            code = prefix[..., level]
            inside = (code >= 0) & (code < self.num_codes)
            node = torch.where(inside, self.children[node, code.clamp(0, self.num_codes - 1)], -1)
        return node

    def legal(self, prefix):
        """The codes that lead from a prefix of l codes, 0 ≤ l < L, on to an item: (..., l) integers → (..., K) bool.

        Entry c is True where some item's ID, a row of self.codes (n, L), begins with the prefix and then c. A prefix
        that no item has, or with a number that is no code at all, leads nowhere: all False.

        Example: IDs begin with 0 or 2; behind (0,) stands 1 or 2, behind (2,) only 0, and (1,) leads nowhere.

        >>> ids = SemanticIDs([[0, 1, 1], [0, 2, 0], [2, 0, 0]], num_codes=3)
        >>> ids.legal([]).int().tolist(), ids.legal(torch.tensor([[0], [2], [1]])).int().tolist()
        ([1, 0, 1], [[0, 1, 1], [1, 0, 0], [0, 0, 0]])
        """
        return self.children[self.node(prefix)] >= 0

    def lookup(self, codes):
        """Item index (...) of whole IDs (..., L); −1 where no item has that ID."""
        codes = torch.as_tensor(codes, dtype=torch.long)
        if codes.shape[-1] != self.num_levels:
            raise ValueError(f"an ID has {self.num_levels} codes, not {codes.shape[-1]}")
        return (self.node(codes) - self.num_prefixes).clamp(min=-1)

    def flows(self, values):
        """Exact flows F*(s): for each node of the tree the sum of values over the items below it: (C, n) → (C, P + n).

        values are of C users (contexts) and n items, such as R. Node 0 is the root, whose flow is Z; 1 … P−1 are the
        other prefixes, P = self.num_prefixes; P + i is item i. self.nodes (n, L + 1) holds the nodes on the way to each
        item, root first. F*(s) = Σ of values[i] over the items i whose way leads through s.

        Example: root, prefixes (0,) (2,) (0, 1) (0, 2) (2, 0), and the three items: 9 flows.

        >>> ids = SemanticIDs([[0, 1, 1], [0, 2, 0], [2, 0, 0]], num_codes=3)
        >>> ids.nodes[1].tolist()                               # to item 1: root, (0,), (0, 2), item
        [0, 1, 4, 7]
        >>> ids.flows(torch.tensor([[4.0, 3.0, 2.0]])).tolist()
        [[9.0, 7.0, 2.0, 4.0, 3.0, 2.0, 4.0, 3.0, 2.0]]
        """
        flow = values.new_zeros(self.num_prefixes, len(values))
        below = values.T.contiguous()                           # adding whole rows is 6 times as fast as columns
        for level in range(self.num_levels):
            flow.index_add_(0, self.nodes[:, level].to(values.device), below)
        return torch.cat([flow, below]).T                       # (C, P + n)

    def child_flows(self, values, items):
        """F* of every child of s_0 … s_{L-1} on the paths of items (C, J) → (C, J, L, K); 0 where a code is illegal."""
        child = self.children[self.nodes[items][..., :-1]]                                      # (C, J, L, K)
        flow = self.flows(values).gather(1, child.clamp(min=0).flatten(1)).reshape(child.shape)
        return flow * (child >= 0)

    def health(self):
        """One line: codes used and perplexity (e^entropy of the code counts) per level, and the largest cell."""
        used, perplexity = [], []
        for level in range(self.num_levels):
            share = np.bincount(self.codes[:, level].numpy(), minlength=self.num_codes) / len(self.codes)
            share = share[share > 0]
            used.append(str(len(share)))
            perplexity.append(f"{np.exp(-(share * np.log(share)).sum()):.0f}")
        largest = int(torch.bincount(self.nodes[:, -2]).max())
        return (f"semantic IDs: {len(self.codes)} items, K = {self.num_codes}, used codes {'/'.join(used)}, "
                f"perplexity {'/'.join(perplexity)}, largest last-level cell {largest}")
