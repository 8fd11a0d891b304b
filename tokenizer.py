"""Item tokenizer: every item becomes a semantic ID, a short path of codes down a tree.

    features of an item  →  residual k-means  →  (c_1, …, c_L)
TIGER and LETTER learn IDs with an RQ-VAE; k-means on residuals also gives similar items the
same first codes. All IDs differ: a prefix of l codes has room for K^(L-l) items, the nearest ones.
Letters: n items, L levels, K codes a level, M prefixes.
"""
from itertools import chain

import numpy as np
import torch

from data import check

def tf_idf(texts):
    """Sparse (n, words) tf-idf over words and word pairs: (rows, columns, values, shape)."""
    column_of = {}                                              # word → column
    places = []
    for row, text in enumerate(texts):
        words = text.lower().translate(str.maketrans("(),|", "    ")).split()
        for term in words + [f"{first} {second}" for first, second in zip(words, words[1:])]:
            places.append((row, column_of.setdefault(term, len(column_of))))
    rows, columns = np.array(places, np.int64).reshape(-1, 2).T
    count = np.bincount(columns)
    # idf = log(n / count of the word in all texts), at least 0; 0 for a word that stands once
    idf = np.log(len(texts) / count).clip(0) * (count > 1)
    return rows, columns, idf[columns], (len(texts), len(count))

def entries(lists):
    """Row and column indices (two arrays) of all items of B lists, to index a (B, n) matrix."""
    rows = np.repeat(np.arange(len(lists)), np.fromiter(map(len, lists), np.int64, len(lists)))
    return rows, np.fromiter(chain.from_iterable(lists), np.int64, len(rows))

def seen_entries(histories, num_items):
    """`entries` of histories, each item once; InputError for one that is not in the catalogue."""
    rows, items = entries([set(history) for history in histories])
    known = not len(items) or 0 <= items.min() and items.max() < num_items
    check(known, f"items of a history are numbers from 0 to {num_items - 1}")
    return rows, items

def cooccurrence(histories, num_items, window, decay, backward):
    """Sparse (n, n) counts of b near a: arrays (rows a, columns b, weights), each pair once.
    For b at d ≤ window places after a, (a, b) gains decay^(d-1), (b, a) backward · decay^(d-1)."""
    user, items = entries(histories)
    keys = []                                                   # a · n + b
    weights = []
    for distance in range(1, window + 1):
        same_user = user[distance:] == user[:-distance]
        a = items[:-distance][same_user]
        b = items[distance:][same_user]
        weight = np.full(len(a), decay ** (distance - 1))
        keys += [a * num_items + b, b * num_items + a]
        weights += [weight, backward * weight]
    keys, place = np.unique(np.concatenate(keys), return_inverse=True)
    return keys // num_items, keys % num_items, np.bincount(place, np.concatenate(weights))

def ppmi(histories, num_items):
    """Sparse (n, n) positive pointwise mutual information: (rows, columns, values, shape)."""
    a, b, w = cooccurrence(histories, num_items, window=5, decay=0.8, backward=1.0)
    count = np.bincount(a, w, num_items)
    # PPMI(a, b) = max(0, log(p(a, b) / (p(a)·p(b)))); p(b) ∝ count^0.75 tames rare pairs
    smooth = count ** 0.75
    ratio = np.maximum(w * smooth.sum(), 1e-12) / np.maximum(count[a] * smooth[b], 1e-12)
    return a, b, np.maximum(0, np.log(ratio)), (num_items, num_items)

def _svd(rows, columns, values, shape, dim, seed):
    """Left singular vectors · √(singular values) of a sparse matrix, rows of length 1 (or 0)."""
    out = np.zeros((shape[0], dim), np.float32)
    if len(values) == 0:
        return out
    rank = min(dim, *shape)
    index = torch.tensor(np.stack([rows, columns]))
    values = torch.tensor(values).float()
    matrix = torch.sparse_coo_tensor(index, values, shape, check_invariants=False).coalesce()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        u, s, _ = torch.svd_lowrank(matrix, q=min(rank + 8, *shape), niter=4)
    out[:, :rank] = (u * s.sqrt())[:, :rank].numpy()
    norm = np.linalg.norm(out, axis=1, keepdims=True)
    return np.divide(out, norm, out=np.zeros_like(out), where=norm > 1e-6)

def item_features(kind, texts, histories, seed, dim=64):
    """(n, d) features: "content" is text (as TIGER), "mixed" adds co-occurrence (as LETTER).
    Pass training histories only: validation or test items would leak into every result."""
    text = _svd(*tf_idf(texts), dim, seed)
    if kind == "content":
        return text
    collaborative = _svd(*ppmi(histories, len(texts)), dim, seed)
    return np.hstack([text, 2 * collaborative])                 # 2: it says more than a few words

def kmeans(points, k, rng, steps=20):
    """(k, d) centroids of points (n, d): k-means++ seeds, then Lloyd's steps."""
    centroids = np.empty((k, points.shape[1]))
    cost = np.full(len(points), np.inf)                         # squared distance to the nearest
    for j in range(k):
        # k-means++: the next seed is a point, P ∝ squared distance from the nearest seed so far
        p = cost / cost.sum() if j and cost.sum() > 0 else None
        centroids[j] = points[rng.choice(len(points), p=p)]
        cost = np.minimum(cost, ((points - centroids[j]) ** 2).sum(1))
    for _ in range(steps):
        nearest = _squared_distances(points, centroids).argmin(1)
        count = np.bincount(nearest, minlength=k)[:, None]
        total = np.stack([np.bincount(nearest, column, k) for column in points.T], 1)
        centroids = np.where(count > 0, total / np.maximum(count, 1), centroids)
    return centroids

def _squared_distances(points, centroids):
    cross = points @ centroids.T                                                    # (n, k)
    return np.maximum((points ** 2).sum(1)[:, None] - 2 * cross + (centroids ** 2).sum(1), 0)

def assign_with_capacity(cost, parent, capacity):
    """Give each item its cheapest code, but at most `capacity` items to a cell (parent, code).
    Every item asks for the cheapest code that has not refused it. A cell keeps its `capacity`
    cheapest items and refuses the others for good. Repeat until no item is refused.
    cost (n, K), unchanged; parent (n,), the item's cell one level up → codes (n,)."""
    cost = cost.copy()
    items = np.arange(len(cost))
    while True:
        code = cost.argmin(1)
        cell = parent * cost.shape[1] + code
        order = np.lexsort((cost[items, code], cell))           # by cell, the cheapest first
        first = np.searchsorted(cell[order], cell[order])       # the place where its cell begins
        refused = order[np.arange(len(order)) - first >= capacity]
        if not len(refused):
            return code
        cost[refused, code[refused]] = np.inf

class SemanticIDs(torch.nn.Module):
    """The table item ↔ semantic ID, and the tree of its prefixes. A Module, so that .to() moves it.
    Nodes: 0 is the root, 1 … M−1 the other prefixes, level by level, M + i is item i."""
    def __init__(self, codes, num_codes):
        """codes (n, L) integers in [0, num_codes), all rows different; ValueError otherwise."""
        codes = np.asarray(codes)
        right = codes.ndim == 2 and codes.dtype.kind in "iu" and 0 <= codes.min()
        if not right or codes.max() >= num_codes or len(np.unique(codes, axis=0)) < len(codes):
            raise ValueError(f"IDs: (n, L) integers from 0 to {num_codes - 1}, all rows different")
        super().__init__()
        self.num_codes = int(num_codes)
        self.num_levels = codes.shape[1]
        nodes = [np.zeros(len(codes), np.int64)]
        count = 1
        for column in codes.T[:-1]:
            prefix, place = np.unique(nodes[-1] * num_codes + column, return_inverse=True)
            nodes.append(count + place)
            count += len(prefix)
        nodes = np.stack(nodes + [count + np.arange(len(codes))], 1)
        # next_node[node, code]: the node that the code leads to, or −1. The last row is all −1.
        # Index −1 reads that row, so a walk that has left the tree stays outside.
        next_node = np.full((count + 1, num_codes), -1, np.int64)
        next_node[nodes[:, :-1], codes] = nodes[:, 1:]
        self.num_prefixes = count                               # M
        size = np.bincount(nodes.ravel())                       # (M + n,) items below each node
        # codes (n, L); next_node (M + 1, K); nodes (n, L + 1): s_0 … s_L of each item
        tables = {"codes": codes, "next_node": next_node, "nodes": nodes, "size": size}
        for name, table in tables.items():
            self.register_buffer(name, torch.tensor(table, dtype=torch.long), persistent=False)

    @classmethod
    def fit(cls, features, num_codes, num_levels=3, seed=0):
        """Residual k-means of features (n, d); same seed, same IDs; ValueError for n > K^L."""
        residual = np.array(features, np.float64)
        check(len(residual) <= num_codes ** num_levels, f"{len(residual)} items do not fit into "
              f"{num_codes}^{num_levels} IDs; raise --codes")
        rng = np.random.default_rng(seed)
        codes = []
        parent = np.zeros(len(residual), np.int64)
        for level in range(num_levels):
            centroids = kmeans(residual, num_codes, rng)
            capacity = num_codes ** (num_levels - 1 - level)    # items below one code of this level
            code = assign_with_capacity(_squared_distances(residual, centroids), parent, capacity)
            residual = residual - centroids[code]
            codes.append(code)
            parent = np.unique(parent * num_codes + code, return_inverse=True)[1]
        return cls(np.stack(codes, 1), num_codes)

    def node(self, prefix):
        """The node (...) of prefixes (..., l) of codes, l ≤ L; −1 for a prefix that no item has."""
        prefix = torch.as_tensor(prefix, dtype=torch.long, device=self.codes.device)
        node = torch.zeros_like(prefix.sum(-1))
        for code in prefix.unbind(-1):
            inside = (code >= 0) & (code < self.num_codes)
            node = torch.where(inside, self.next_node[node, code.clamp(0, self.num_codes - 1)], -1)
        return node

    def legal(self, prefix):
        """Codes that lead from a prefix of l < L codes on to an item: (..., l) → (..., K) bool.
        Entry c is True where some row of self.codes begins with the prefix and then c."""
        return self.next_node[self.node(prefix)] >= 0

    def unseen(self, histories):
        """(B, M + n) bool: is an item below this node not in the history? If a user has seen all
        items, all count as unseen. Ours: in the paper, P is over all items, seen ones included.
        Raises InputError for an item that is not in the catalogue."""
        rows, items = map(torch.as_tensor, seen_entries(histories, len(self.codes)))
        rows, items = rows.to(self.nodes.device), items.to(self.nodes.device)
        place = rows[:, None] * len(self.size) + self.nodes[items]  # above each seen item, and it
        place, seen = place.unique(return_counts=True)
        full = place[seen == self.size[place % len(self.size)]]     # all items below were seen
        unseen = torch.ones(len(histories), len(self.size), dtype=torch.bool, device=rows.device)
        unseen.view(-1)[full] = False
        unseen[~unseen[:, 0]] = True                            # node 0: nothing is left
        return unseen

    def legal_children(self, nodes, unseen):
        """Where each code leads: nodes (B, W), unseen (B, M + n) → nodes (B, W, K), −1: illegal.
        Legal is a code that leads to an unseen item. The rule of P, R, beams and draws."""
        child = self.next_node[nodes]                           # (B, W, K)
        legal = unseen.gather(1, child.clamp(min=0).flatten(1)).view_as(child)
        return child.where(legal, -1)

    def lookup(self, codes):
        """Item index (...) of whole IDs (..., L); −1 where no item has that ID."""
        return (self.node(codes) - self.num_prefixes).clamp(min=-1)

    def flows(self, values):
        """Exact flow F*(s) of every node: values (C, n), such as R → (C, M + n).
        F*(s) = Σ values over the items below s. Node 0 is the root: its flow is Z. Node M + i is
        item i. self.nodes (n, L + 1) holds the nodes from the root to each item."""
        flow = values.new_zeros(self.num_prefixes, len(values))
        items = values.T.contiguous()                           # (n, C): rows are faster to add
        for level in range(self.num_levels):
            flow.index_add_(0, self.nodes[:, level], items)
        return torch.cat([flow, items]).T                       # (C, M + n)

    def child_flows(self, values, items):
        """F* of all children of s_0 … s_{L-1} on the paths of items (C, J) → (C, J, L, K)."""
        child = self.next_node[self.nodes[items][..., :-1]]                          # (C, J, L, K)
        flow = self.flows(values).gather(1, child.clamp(min=0).flatten(1)).reshape(child.shape)
        return flow * (child >= 0)                              # 0 where a code is illegal
