"""Exercises, by topic: for each a right answer in plain loops, the cases that are tried, and the typical wrong answers.

    python test_gflowgr.py --list                       # names, difficulty, minutes
    python test_gflowgr.py --stub recall_at > mine.py   # imports, signature, and the docstring, which is the statement
    MINE=mine.py python -m pytest -q test_gflowgr.py -k recall_at

The right answers here are slow, and share no code with the project's own. A wrong answer is the right one with a piece
of its text changed, or a function. An answer to a method is a function whose first argument is self.
"""
import functools
import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import torch

import gflowgr
import tokenizer
from data.grading import exercise, require
from gflowgr import NEVER, Policy
from reward import CollaborativeModel, Reward
from tokenizer import SemanticIDs


@functools.cache
def world():
    """24 items with random IDs (L = 3, K = 4), and a random policy that tells their paths well apart."""
    ids = SemanticIDs(random.Random(0).sample(list(itertools.product(range(4), repeat=3)), 24), num_codes=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = Policy(ids, window=4, width=32, layers=1).eval()
    policy.lm.transformer.wte.weight.data.mul_(6)
    return ids, policy


def learnable(*shape):
    return torch.randn(*shape, requires_grad=True)


# --- Metrics ---------------------------------------------------------------------------------------------------------
def lists_and_targets():
    t = torch.tensor
    lists, targets = t([[4, 2, 7, 1], [1, 3, -1, -1], [5, 6, 0, 9], [3, 2, 1, 0], [8, 0, 5, 2]]), t([7, 9, 5, 2, 2])
    return [("one user, target on the first place", t([[5, 6, 7]]), t([5]), 3),
            ("one user, target on place k itself", t([[5, 6, 7]]), t([7]), 3),
            ("one user, target just behind place k", t([[5, 6, 7]]), t([7]), 2),
            ("two users, one of them served", t([[5, 6], [7, 8]]), t([5, 1]), 2),
            *(("five users", lists, targets, k) for k in (1, 2, 3, 4))]


@exercise(gflowgr, 1, 5, lists_and_targets, {
    "one place too few": ("[:k]", "[:k - 1]"), "not cut at k": ("[:k]", ""),
    "the first place alone": ("in row[:k]", "== row[0]"), "mean over places": ("/ len(hits)", "/ len(hits) / k"),
    "over users, not places": lambda ranked, target, k: (ranked[:, :k] == target[:, None]).any(0).float().mean(),
    "sum for mean": ("/ len(hits)", "/ 1")})
def recall_at(ranked, target, k):
    hits = [t in row[:k] for row, t in zip(ranked.tolist(), target.tolist())]
    return torch.tensor(sum(hits) / len(hits))


@exercise(gflowgr, 1, 10, lists_and_targets, {
    "natural log": ("log2", "log"), "one off: + 1 twice": ("place + 1", "place + 2"),
    "1/rank": ("math.log2(place + 1)", "place"), "a log for a discount": ("1 / math", "math"),
    "one place too many": ("[:k]", "[:k + 1]"), "sum for mean": ("/ len(gains)", "/ 1"),
    "mean over places": ("/ len(gains)", "/ len(gains) / k"),
    "mean over hits": ("/ len(gains)", "/ max(1, sum(gain > 0 for gain in gains))")})
def ndcg_at(ranked, target, k):
    gains = [sum(1 / math.log2(place + 1) for place, item in enumerate(row[:k], 1) if item == t)
             for row, t in zip(ranked.tolist(), target.tolist())]
    return torch.tensor(sum(gains) / len(gains)).float()


# --- Semantic IDs ----------------------------------------------------------------------------------------------------
def prefixes():
    ids, _ = world()
    out = []
    for prefix in [[], [0], [1], [2], [3], *map(list, itertools.product(range(4), repeat=2))]:
        begin = [row for row in ids.codes.tolist() if row[:len(prefix)] == prefix]
        out.append((f"the IDs that begin with {prefix} are {begin}", ids, prefix))
    return out + [("a prefix with a 4, where codes are 0 … 3", ids, [4, 0]),
                  ("prefixes of shape (2, 3, 2)", ids, torch.randint(4, (2, 3, 2)))]


@exercise(SemanticIDs, 1, 15, prefixes, {
    "whatever the prefix": ("row[:len(start)] == start", "True"),
    "the last code of the prefix alone": ("row[:len(start)] == start", "row[:len(start)][-1:] == start[-1:]"),
    "one level off": ("[row[len(start)]]", "[row[len(start) - 1]]"), "illegal for legal": ("return mask", "return ~mask"),
    "anything at a dead end": ("return mask", "return mask | ~mask.any(-1, keepdim=True)")})
def legal(self, prefix):
    prefix = torch.as_tensor(prefix, dtype=torch.long)
    mask = torch.zeros(*prefix.shape[:-1], self.num_codes, dtype=torch.bool)
    for place in itertools.product(*map(range, prefix.shape[:-1])):
        start = prefix[place].tolist()
        for row in self.codes.tolist():
            if row[:len(start)] == start:
                mask[place][row[len(start)]] = True
    return mask


def unique_and_stable(code, cost, parent, capacity):
    """The plain mistakes: two items with one ID, or a code that an item would rather have and could."""
    for i, c in itertools.product(range(len(cost)), range(cost.shape[1])):
        inside = [j for j in range(len(cost)) if (parent[j], code[j]) == (parent[i], c)]
        require(len(inside) <= capacity, f"Items {inside} all got parent {parent[i]} and code {c}: room is for {capacity}")
        if cost[i, c] < cost[i, code[i]]:
            require(len(inside) == capacity, f"Item {i} got code {code[i]}, but code {c} is cheaper for it and has room")
            require(max(cost[inside, c]) < cost[i, c], f"Code {c} refused item {i} and kept one that is farther from it")


def costs():
    rng = np.random.default_rng(0)
    return [(f"{n} items, K = {K}, parents 0 … {parents - 1}, capacity {capacity}",
             rng.random((n, K)) + np.arange(K), rng.permutation(np.arange(n) % parents), capacity)
            for n, K, parents, capacity in ((6, 6, 1, 2), (8, 8, 2, 1), (8, 4, 1, 2), (40, 5, 3, 4), (12, 12, 2, 1))]


@exercise(tokenizer, 3, 40, costs, first=unique_and_stable, wrong={
    "no capacity": ("len(held) > capacity", "False"), "room for one too many": ("> capacity", "> capacity + 1"),
    "room for one too few": ("> capacity", ">= capacity"), "first come, first kept": ("cost[j, c]", "0"),
    "the nearest are refused": ("cost[j, c]", "-cost[j, c]"), "one cell for all parents": ("(parent[i], c)", "c"),
    "the costs are changed": ("held.pop())", "held.pop()); cost[waiting[-1], c] = 1e9"),
    "a list": ("np.array(code)", "code")})
def assign_with_capacity(cost, parent, capacity):
    code, cells, waiting = [None] * len(cost), {}, list(range(len(cost)))
    wishes = [sorted(range(len(row)), key=row.__getitem__) for row in cost.tolist()]
    while waiting:
        i = waiting.pop()
        c = code[i] = wishes[i].pop(0)
        held = cells.setdefault((parent[i], c), [])
        held.append(i)
        if len(held) > capacity:
            held.sort(key=lambda j: cost[j, c])
            waiting.append(held.pop())
    return np.array(code)


@exercise(SemanticIDs, 2, 20, lambda: [("3 users, 24 items", world()[0], torch.rand(3, 24) + 0.1)], {
    "the last item overwrites the others": ("+=", "="), "no root": ("in way:", "in way[1:]:"),
    "no items": ("in way:", "in way[:-1]:"),
    "mean for sum": ("return flow", "return flow / torch.bincount(self.nodes.flatten())"),
    "one flow for all users": ("values[:, item]", "values[:, item].sum()"),
    "logs are added": ("values[:, item]", "values[:, item].log()"),
    "one item off": ("values[:, item]", "values[:, item - 1]")})
def flows(self, values):
    flow = values.new_zeros(len(values), self.num_prefixes + len(self.codes))
    for item, way in enumerate(self.nodes.tolist()):
        for node in way:
            flow[:, node] += values[:, item]
    return flow


# --- Losses ----------------------------------------------------------------------------------------------------------
def balanced_paths():
    log_z, log_r = torch.randn(3), torch.randn(3, 3)
    return [("P_F = R/Z on every path", log_z, (log_r - log_z[:, None]).requires_grad_(), log_r),
            ("3 users, 3 paths each", learnable(3), learnable(3, 3), torch.randn(3, 3)),
            ("2 users, 5 paths each", learnable(2), learnable(2, 5), torch.randn(2, 5))]


@exercise(gflowgr, 1, 10, balanced_paths, {
    "sign of log R": ("- log_r", "+ log_r"), "sign of log Z": ("(log_z[b]", "(-log_z[b]"), "no Z": ("log_z[b] + ", ""),
    "Z beside the wrong axis": ("log_z[b]", "log_z[j]"), "R for log R": ("log_r[b, j]", "log_r[b, j].exp()"),
    "no square": (") ** 2", ").abs()"), "sum for mean": ("/ (B * J)", "/ 1"), "sum over paths": ("/ (B * J)", "/ B"),
    "no gradient": ("(log_z[b] + log_pf[b, j] -", "(log_z[b].item() + log_pf[b, j].item() -")})
def trajectory_balance(log_z, log_pf, log_r):
    B, J = log_pf.shape
    return sum((log_z[b] + log_pf[b, j] - log_r[b, j]) ** 2 for b in range(B) for j in range(J)) / (B * J)


def balanced_steps():
    log_flow = torch.randn(2, 3, 4)
    return [("P_F = F(child)/F(parent) at every step", log_flow, log_flow.diff(dim=-1).requires_grad_()),
            ("1 user, 1 path, 3 steps", learnable(1, 1, 4), learnable(1, 1, 3)),
            ("2 users, 3 paths each, 3 steps", learnable(2, 3, 4), learnable(2, 3, 3))]


@exercise(gflowgr, 2, 15, balanced_steps, {
    "sign of log P_F": ("+ log_pf", "- log_pf"),
    "sign of the next flow": ("- log_flow[b, j, l + 1]", "+ log_flow[b, j, l + 1]"), "one step off": ("l + 1]", "l]"),
    "the last step, and so the reward, left out": ("range(L)", "range(L - 1)"),
    "the whole path at once, which is TB": lambda log_flow, log_pf: (
        log_flow[..., 0] + log_pf.sum(-1) - log_flow[..., -1]).square().mean(),
    "mean over steps": ("/ (B * J)", "/ (B * J * L)"), "sum over paths": ("/ (B * J)", "/ B")})
def detailed_balance(log_flow, log_pf):
    B, J, L = log_pf.shape
    return sum((log_flow[b, j, l] + log_pf[b, j, l] - log_flow[b, j, l + 1]) ** 2
               for b in range(B) for j in range(J) for l in range(L)) / (B * J)


def preferences():
    pos, neg = torch.randn(2), torch.randn(2, 3)
    return [("policy = reference, 3 negatives", pos.clone().requires_grad_(), neg, pos, neg, 0.1),
            ("the positive raised by 1", (pos + 1).requires_grad_(), neg, pos, neg, 0.1),
            ("one negative: DPO", learnable(4), learnable(4, 1), torch.randn(4), torch.randn(4, 1), 0.5),
            ("3 users, 3 negatives", learnable(3), learnable(3, 3), torch.randn(3), torch.randn(3, 3), 0.3)]


@exercise(gflowgr, 2, 20, preferences, {
    "prefers the negatives": ("beta * (", "-beta * ("), "no reference for the negatives": ("- ref_neg[b, d]", ""),
    "no reference at all": lambda pos, neg, ref_pos, ref_neg, beta: (beta * (neg - pos[:, None])).exp().sum(1).log1p().mean(),
    "no β": ("beta * (", "1 * ("), "mean over negatives": ("sum(gaps)", "sum(gaps) / J"),
    "the first negative alone": ("range(J)", "range(1)"),
    "σ for log σ": ("torch.log(1 + sum(gaps))", "-1 / (1 + sum(gaps))"), "sum for mean": ("/ B", "/ 1")})
def sdpo(policy_pos, policy_neg, ref_pos, ref_neg, beta):
    (B, J), total = policy_neg.shape, 0
    for b in range(B):
        up = policy_pos[b] - ref_pos[b]
        gaps = [torch.exp(beta * (policy_neg[b, d] - ref_neg[b, d] - up)) for d in range(J)]
        total = total + torch.log(1 + sum(gaps))               # −log σ(−log x) = log(1 + x)
    return total / B


# --- Collaborative model and reward ----------------------------------------------------------------------------------
def positives():
    teacher = Reward(world()[0], None)
    return [("one positive", teacher, torch.tensor([5])), ("three", teacher, torch.tensor([0, 7, 23])),
            ("no positive, and one", teacher, torch.tensor([-1, 3]))]


@exercise(Reward, 1, 15, positives, {
    "counts, not shares": ("m / sum(shared)", "float(m)"), "shares of L": ("sum(shared)", "self.ids.num_levels"),
    "shares over users": ("torch.tensor(out)", "torch.tensor(out) / torch.tensor(out).sum(0)"),
    "up to the first difference": ("x == y for x, y in zip(row, rows[p])", "row[:l] == rows[p][:l] for l in (1, 2, 3)"),
    "codes of any level": ("x == y for x, y in zip(row, rows[p])", "x in rows[p] for x in row"),
    "no positive is the last item": ("if p >= 0 else 1", "")})
def similarity(self, positives):
    rows, out = self.ids.codes.tolist(), []
    for p in positives.tolist():
        shared = [sum(x == y for x, y in zip(row, rows[p])) if p >= 0 else 1 for row in rows]
        out.append([m / sum(shared) for m in shared])
    return torch.tensor(out)


def contexts():
    scores = torch.rand(3, 24).softmax(1)
    cm = SimpleNamespace(scores=lambda histories, following=None: scores.clone())
    teacher = Reward(world()[0], cm, weights=(0.5, 0.3, 0.2), epsilon=0.24)
    who = [[1], [2, 3], []], torch.tensor([4, 7, -1]), torch.tensor([True, False, True])
    return [("a liked positive, a clicked one, none; r_ŷ not given", teacher, *who),
            ("the same, r_ŷ given", teacher, *who, torch.rand(3, 24).softmax(1))]


@exercise(Reward, 2, 15, contexts, {
    "no ε": ("+ self.epsilon / n", ""), "ε for each item": ("self.epsilon / n", "self.epsilon"),
    "weights exchanged": ("w_a, w_y, w_s =", "w_a, w_s, w_y ="), "no weights": ("= self.weights", "= 1, 1, 1"),
    "a clicked item counts as liked": ("else 0.1", "else 1.0"),
    "the scores that were given are ignored": ("if scores is None", "if True"),
    "the scores that were given are changed": ("w_y * scores", "scores.mul_(w_y)"),
    "a product": ("* scores + w_s", "* scores * w_s")})
def __call__(self, histories, positives, liked, scores=None):
    w_a, w_y, w_s = self.weights
    n = len(self.ids.codes)
    r_a, r_s = torch.zeros(len(positives), n), similarity(self, positives)
    for b, p in enumerate(positives.tolist()):
        if p >= 0:
            r_a[b, p] = 1.0 if liked[b] else 0.1
    if scores is None:
        scores = self.cm.scores(histories)
    return w_a * r_a + w_y * scores + w_s * r_s + self.epsilon / n


def histories_to_score():
    rng = np.random.default_rng(0)
    train = [rng.permutation(20)[:rng.integers(4, 16)].tolist() for _ in range(30)] + [[22, 23], [20, 21, 0, 1, 2, 3]]
    cm = CollaborativeModel.fit(train, 25)                     # item 24 was never seen
    return [("an empty history", cm, [[]]), ("an item that nobody had", cm, [[24]]), ("one item", cm, [[3]]),
            ("two items", cm, [[3, 7]]), ("15 items, of which `length` = 10 count", cm, [train[0] + list(range(25))[-15:]]),
            ("four users", cm, [[5], [], [6, 1, 2], [3, 7]]),
            ("a training history, without what it added itself", cm, [train[0][:3]], [train[0][3:]]),
            ("three, without what they added; of the first nothing is left", cm,
             [[20, 21], train[1][:2], []], [[0, 1, 2, 3], train[1][2:], []])]


def shares(found, cm, histories, following=None):
    require(all((found[b, history] == 0).all() for b, history in enumerate(histories)), "Items of the history must get 0")
    require((found.sum(1) - 1).abs().max() < 1e-4, "Every row must sum to 1")


@exercise(CollaborativeModel, 3, 45, histories_to_score, first=shares, wrong={
    "the oldest item weighs most": ("reversed(history[-self.length:])", "history[-self.length:]"),
    "the whole history counts": ("history[-self.length:]", "history"), "no decay": ("self.decay ** age * T", "T"),
    "items of the history stay": ("row[history] = popular[history] = 0", "pass"),
    "a share of what the history takes with it": ("row[history] = popular[history] = 0\n        total = row.sum()",
                                                  "total = row.sum()\n        row[history] = popular[history] = 0"),
    "no popularity": ("(1 - s) * row / total + s * popular", "row / total"),
    "sums, not shares": ("row / total +", "row +"),
    "shares over users": ("torch.stack(out)", "torch.stack(out) / torch.stack(out).sum(0)"),
    "the answer is known: nothing is taken out": ("if distance <= self.window", "if False"),
    "one place too many is taken out": ("<= self.window", "<= self.window + 1"),
    "distance from 0": ("** (distance - 1)", "** distance")})
def scores(self, histories, following=None):
    T, s, out = self.transitions.to_dense(), self.popularity_share, []
    for b, history in enumerate(histories):
        row, popular = torch.zeros(self.num_items), self.popularity.clone()
        for age, j in enumerate(reversed(history[-self.length:])):
            row += self.decay ** age * T[j]
            for distance, v in enumerate(following[b] if following else [], age + 1):
                if distance <= self.window:
                    row[v] -= self.decay ** age * self.nearness ** (distance - 1) * self.scale[j]
        row[row <= 1e-6] = 0
        row[history] = popular[history] = 0
        total = row.sum()
        popular /= popular.sum()
        out.append((1 - s) * row / total + s * popular if total > 0 else popular)
    return torch.stack(out)


# --- Sampler ---------------------------------------------------------------------------------------------------------
def draws():
    scores = [0.08, 0.45, 0.02, 0.25, 0.05, 0.15]
    table = torch.tensor([scores]).expand(3000, 6)
    return [(f"N = {N}, progress {p}; 3000 contexts, each with the scores {scores}, item 1 logged", table, [[1]] * 3000, N, p)
            for N, p in ((3, 0.0), (3, 0.5), (3, 1.0), (0, 0.5))]


def unlogged_and_sorted(found, scores, logged, count, progress):
    require(not any(set(row) & set(own) for row, own in zip(found.tolist(), logged)), "A logged item was drawn")
    require((scores.gather(1, found).diff(dim=1) >= 0).all(), "A context's items must go from low to high score")


def as_often(found, expected):
    """Each item as often on each place, within 7 %: more than five standard deviations of chance."""
    for place, item in itertools.product(range(found.shape[1]), range(6)):
        f, e = ((x[:, place] == item).float().mean().item() for x in (found, expected))
        require(abs(f - e) < 0.07, f"Item {item} stands on place {place} in {f:.0%} of the contexts, expected about {e:.0%}")


@exercise(gflowgr, 3, 30, draws, first=unlogged_and_sorted, compare=as_often, wrong={
    "hard first": ("progress * (count - 1)", "(1 - progress) * (count - 1)"),
    "no progress": ("progress * (count - 1)", "0.5 * (count - 1)"),
    "one place off": ("progress * (count - 1)", "progress * count"), "logged items too": ("weight[b, own] = 0", "pass"),
    "the CM alone": ("0.5 * scores + 0.5 / scores.shape[1]", "scores.clone()"),
    "even alone": ("0.5 * scores + 0.5 / scores.shape[1]", "torch.ones(scores.shape)"),
    "without replacement": ("replacement=True", "replacement=False"), "a pool of 2N": ("2 * count - 1", "2 * count"),
    "sorted by number": ("key=lambda i: row[i]", "reverse=True")})
def curriculum(scores, logged, count, progress):
    if count == 0:
        return torch.empty(len(scores), 0, dtype=torch.long)
    weight = 0.5 * scores + 0.5 / scores.shape[1]
    for b, own in enumerate(logged):
        weight[b, own] = 0
    out, start = [], round(progress * (count - 1))
    for row, pool in zip(scores.tolist(), torch.multinomial(weight, 2 * count - 1, replacement=True).tolist()):
        out.append(sorted(pool, key=lambda i: row[i])[start:start + count])
    return torch.tensor(out)


# --- The policy ------------------------------------------------------------------------------------------------------
def rows_of_branches():
    return [("one branch", torch.tensor([[1]]), 3, 3), ("two branches", torch.tensor([[1, 2]]), 3, 3),
            ("two rows, L = 4", torch.tensor([[0, 2, 1], [3, 3, 0]]), 4, 4), ("L = 2", torch.tensor([[2, 0, 1]]), 4, 2)]


def no_leak(found, ends, C, L):
    seen, branch = found == 0, (torch.arange(found.shape[1]) - C).div(L - 1, rounding_mode="floor")
    require((seen | (found == NEVER)).all(), "Every entry must be 0 or NEVER")
    require(seen.diagonal(0, 1, 2).all(), "A place does not look at itself")
    require(not seen[:, :C, C:].any(), "A place of the history looks into a branch")
    require(not (seen & (branch[:, None] != branch))[:, C:, C:].any(), "A code looks into another branch")
    behind = torch.arange(C) > ends.repeat_interleave(L - 1, 1)[..., None]
    require(not (seen[:, C:, :C] & behind).any(), "A code looks at items behind those that its branch goes on from")
    require(not seen.triu(1).any(), "A place looks at one that comes later in the row")


@exercise(gflowgr, 3, 30, rows_of_branches, first=no_leak, wrong={
    "branches see each other": ("branch == other and ", ""),
    "the whole history, so the future too": ("j <= ends[b, branch]", "True"),
    "an item too few": ("j <= ends", "j < ends"), "an item too many": ("ends[b, branch]", "ends[b, branch] + 1"),
    "one row's ends for all": ("ends[b, branch]", "ends[0, branch]"),
    "not itself": ("other and j <= i", "other and j < i"), "later codes of the branch": ("other and j <= i", "other"),
    "the history sees its future": ("seen = j <= i", "seen = j < C"),
    "the history sees the branches": ("seen = j <= i", "seen = j <= i or j >= C"),
    "1 and 0": ("return mask", "return (mask == 0).float()"),
    "who is seen for who sees": ("return mask", "return mask.transpose(1, 2)")})
def tree_mask(ends, C, L):
    B, S = len(ends), C + ends.shape[1] * (L - 1)
    mask = torch.full((B, S, S), NEVER)
    for b, i, j in itertools.product(range(B), range(S), range(S)):
        branch, other = (i - C) // (L - 1), (j - C) // (L - 1)
        if i < C:
            seen = j <= i
        elif j < C:
            seen = j <= ends[b, branch]
        else:
            seen = branch == other and j <= i
        if seen:
            mask[b, i, j] = 0
    return mask


def users():
    _, policy = world()
    return [("the whole catalogue", policy, [[]], 24, 60), ("room for all paths", policy, [[1, 2], [9]], 5, 60),
            ("a history longer than the window of 4", policy, [[3, 8, 1, 20, 9, 6]], 4, 60),
            ("k = 1, 1 beam", policy, [[i] for i in range(9)], 1, 1), ("k = 1, 2 beams", policy, [[], [7], [2]], 1, 2),
            ("k = 4, 1 beam: k is the larger", policy, [[], [4]], 4, 1),
            ("an item is left", policy, [list(range(23)), [0]], 3, 60)]


def new_and_distinct(found, policy, histories, k, beams):
    for row, values, history in zip(found[0].tolist(), found[1].tolist(), histories):
        given = [item for item in row if item != -1]
        require(row == given + [-1] * (k - len(given)), f"Empty places, -1, must come last: {row}")
        require(all(0 <= item < 24 for item in given), f"Not all are items of the catalogue: {row}")
        require(len(set(given)) == len(given), f"An item stands twice: {row}")
        require(not set(given) & set(history), f"After {history}, an item of the history is recommended: {row}")
        require(row.count(-1) or values == sorted(values, reverse=True), "The log-probabilities must fall")
        require(k < 24 or abs(sum(map(math.exp, values)) - 1) < 1e-4, "The catalogue's probabilities must sum to 1")


@exercise(Policy, 3, 60, users, first=new_and_distinct, wrong={
    "illegal codes in the softmax": ("logits[legal].logsumexp", "logits.logsumexp"),
    "the last step's log P alone": ("score + log_p[c]", "log_p[c]"),
    "the logit for its log P": ("log_p[c].item()", "logits[c].item()"), "one beam": ("max(beams, k) if", "1 if"),
    "no beam: all paths": ("max(beams, k) if", "None if"),
    "`beams` beams, though k is more": ("max(beams, k) if", "beams if"),
    "items of the history too": ("if rows.index(path) not in history", ""),
    "cut to k before the history is left out": ("in paths if", "in paths[:k] if"),
    "the oldest items of a long history": ("history[-self.window:]", "history[:self.window]"),
    "worst first": ("reverse=True", "reverse=False")})
def recommend(self, histories, k=10, beams=20):
    K, rows, out = self.semantic_ids.num_codes, self.semantic_ids.codes.tolist(), []
    for history in histories:
        paths = [(0.0, [])]
        for level in range(len(rows[0])):
            grown = []
            for score, prefix in paths:
                tokens = [self.user_token] + [self.user_token + 1 + item for item in history[-self.window:]]
                tokens += [l * K + code for l, code in enumerate(prefix)]
                logits = self.lm(torch.tensor([tokens])).logits[0, -1, level * K:(level + 1) * K]
                legal = [c for c in range(K) if any(row[:level + 1] == prefix + [c] for row in rows)]
                log_p = logits - logits[legal].logsumexp(0)
                grown += [(score + log_p[c].item(), prefix + [c]) for c in legal]
            paths = sorted(grown, reverse=True)[:max(beams, k) if level < len(rows[0]) - 1 else None]
        best = [(rows.index(path), score) for score, path in paths if rows.index(path) not in history]
        out.append(best[:k] + [(-1, -math.inf)] * (k - len(best)))
    return torch.tensor([[i for i, _ in row] for row in out]), torch.tensor([[score for _, score in row] for row in out])
