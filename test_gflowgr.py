"""The exercises and their grader, the tests of GFlowGR, the speed. Tests: python -m pytest -q

    python test_gflowgr.py --list                      the exercises
    python test_gflowgr.py --stub NAME [--hint]        begins a file for one [with the formula]
    python test_gflowgr.py --grade FILE [NAME …]       what is right in a file, or of it
    python test_gflowgr.py --grade FOLDER [NAME …]     all .py files below a folder, and a table
    python test_gflowgr.py --speed [--tiny]            seconds of two ways to do a thing

Teachers: a graded file runs with your rights. It can read and delete what you can. It has a process
of its own (Linux, macOS) and 60 seconds. What it prints is not shown. A file that searches the
grader's memory can cheat. The exit status is 0 if all is right, 1 if not, 2 for a wrong command.
"""
import os
os.environ["OMP_NUM_THREADS"] = "1"                             # before torch is imported
import copy
import doctest
import glob
import hashlib
import inspect
import io
import itertools
import json
import math
import multiprocessing
import random
import re
import runpy
import shlex
import signal
import subprocess
import sys
import textwrap
import timeit
import traceback
import zipfile
import zlib
from contextlib import nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from pytest import approx

import data as folder_of_data
import gflowgr
import reward
import tokenizer
from data import InputError, check_numbers, figures, load_data, report
from gflowgr import NEVER, Policy, RECIPES, Recipe, SAMPLERS, Setup, policy_draws, recipe_of
from reward import SVD, TEACHERS, CollaborativeModel, Reward, Teacher
from tokenizer import SemanticIDs

ROOT = Path(gflowgr.__file__).parent
TOY = runpy.run_path(str(ROOT / "data/toy/prepare.py"))
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR")    # of torch: it calls them "beta"
close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4, check_dtype=False)

# === Exercises, in the order of the course ========================================================
# A block: cases, the first to check by hand; the answer in plain loops, with which a student's is
# compared; typical mistakes, each of which has to fail in a case; the registration.
# A case: what it is, the inputs, and where this file has no answer, the results.
EXERCISES = {}                                                  # name → Exercise

@dataclass
class Exercise:
    """A function to write. Its signature and docstring are the task that a student reads."""
    session: int
    minutes: int
    task: object                    # the function of the project; without an answer, a docstring
    answer: object                  # in plain loops; None: no answer stands in this file
    cases: object                   # a generator of cases
    mistakes: list
    learned: tuple = ()             # inputs by which the loss has to have the right gradient
    gradient_alone: bool = False    # compare no value: a right loss of another form has another
    given: str = ""                 # docstring of the stub without --hint: it tells no formula
    note: str = ""                  # stands in the stub: what self has, what the cases leave out
    read: object = lambda found: found      # what is compared of a result
    tolerance: float = 1e-4
    picture: object = None          # (expected, found) → text, where numbers are hard to read

    def __post_init__(self):
        EXERCISES[self.task.__qualname__] = self

# --- Session 1: recall_at (5 minutes) -------------------------------------------------------------
def ranking_cases():
    # 4 has rank 1: recall 1, NDCG 1 / log2(2) = 1
    yield "one user", (torch.tensor([[4, 2, 7, 1]]), torch.tensor([4]), 3)
    # 7 has rank 3. It is not among the first two: 0, 0. It is among three: 1, 1 / log2(4) = 0.5
    for k in (2, 3):
        yield "−1, an empty place, has rank 2", (torch.tensor([[4, -1, 7]]), torch.tensor([7]), k)
    lists = torch.tensor([[4, 2, 7, 1], [1, 3, -1, -1], [5, 6, 0, 9], [3, 2, 1, 0], [8, 0, 5, 2]])
    for k in (1, 3):
        yield f"five users, {k} places", (lists, torch.tensor([7, 9, 5, 2, 2]), k)
def recall_loops(ranked, target, k):
    hits = [float(wanted in items[:k]) for items, wanted in zip(ranked.tolist(), target.tolist())]
    return torch.tensor(hits)
def reads_one_place_less(ranked, target, k): return recall_loops(ranked, target, k - 1)
Exercise(1, 5, gflowgr.recall_at, recall_loops, ranking_cases, [reads_one_place_less])
# --- Session 1: ndcg_at (10 minutes) --------------------------------------------------------------
def ndcg_loops(ranked, target, k, log=math.log2):
    gains = []
    for items, wanted in zip(ranked.tolist(), target.tolist()):
        gain = 0.0
        for rank, item in enumerate(items[:k], 1):
            if item == wanted:
                gain = 1 / log(rank + 1)
        gains.append(gain)
    return torch.tensor(gains)
def takes_the_natural_logarithm(ranked, target, k): return ndcg_loops(ranked, target, k, math.log)
def skips_empty_places(ranked, target, k):
    items_first = (ranked < 0).int().argsort(dim=1, stable=True)
    return ndcg_loops(ranked.gather(1, items_first), target, k)
Exercise(1, 10, gflowgr.ndcg_at, ndcg_loops, ranking_cases,
         [takes_the_natural_logarithm, skips_empty_places])
# --- Session 1: CollaborativeModel.scores (30 minutes) --------------------------------------------
TRAIN = [np.random.default_rng(u).permutation(20)[:4 + u % 8].tolist() for u in range(30)]
LOG = [*TRAIN, [20, 21, 0, 1]]                # of 25 items, 22 to 24 in no history
USERS = [[24], [3, 7], [24, *range(9, 24)], list(range(25)), []]
def counted(log, n, **options):
    cm = CollaborativeModel.fit(log, n, **options)
    cm.log = log                              # for near_loops, and for messages
    return cm
def cm_cases():
    small = counted([[0, 1, 2]], 4, popularity=0.0)
    # near[0, 1] = 0.8^0 = 1 and near[0, 2] = 0.8^1 = 0.8: shares 1/1.8 and 0.8/1.8
    yield "near[0] = 0, 1, .8, 0; without popularity", (small, [[0]])
    yield "31 histories", (counted(LOG, 25), USERS)
def near_loops(log, j, v):                    # near[j, v] with the constants of `fit`
    total = 0.0
    for history in log:
        if j in history and v in history:
            d = history.index(v) - history.index(j)             # v stands d places after j
            if 0 < abs(d) <= 5:
                total += 0.8 ** (abs(d) - 1) * (1 if d > 0 else 0.25)
    return total / max(1, sum(log, []).count(j)) ** 0.5
def shares_loops(score, popular, history, s=0.001):         # of one user
    seen = [v in history for v in range(len(popular))]
    if all(seen):
        return 0 * popular
    score = torch.tensor([0.0 if out or x <= 1e-6 else x for x, out in zip(score.tolist(), seen)])
    rest = torch.tensor([0.0 if out else x for x, out in zip(popular.tolist(), seen)])
    if score.sum() == 0:
        return rest / rest.sum()
    return (1 - s) * score / score.sum() + s * rest / rest.sum()
def cm_loops(self, histories, decay=0.6, shares=shares_loops):
    rows = []
    for history in histories:
        score = torch.zeros(len(self.popular))
        for age, j in enumerate(reversed(history[-10:])):
            for v in range(len(score)):
                score[v] += decay ** age * near_loops(self.log, j, v)
        popular = torch.tensor([1.0 + sum(self.log, []).count(v) for v in range(len(score))])
        rows.append(shares(score, popular, history, self.popularity))
    return torch.stack(rows)
def forgets_the_age(self, histories): return cm_loops(self, histories, decay=1.0)
def zeroed_last(score, popular, history, s):
    share = shares_loops(score, popular, [], s)
    share[history] = 0
    return share
def divides_before_it_zeroes(self, histories): return cm_loops(self, histories, shares=zeroed_last)
Exercise(1, 30, CollaborativeModel.scores, cm_loops, cm_cases,
         [forgets_the_age, divides_before_it_zeroes],
         note=f"{inspect.getdoc(CollaborativeModel)}\n\nself.near.to_dense() is near (n, n); "
         "self.popular (n,) is count + 1. The rest is what `shares` does,\n"
         "with s = self.popularity:\n" + inspect.getdoc(reward.shares))
# --- Session 2: trajectory_balance (10 minutes) ---------------------------------------------------
def logs(*numbers):
    return torch.tensor(numbers).log()
def balance_cases():
    # log 1 + log 1/2 − log 1/4 = log 2; its square is 0.4805
    yield "1 path: Z = 1, P = 1/2, R = 1/4", (logs(1.0), logs([0.5]), logs([0.25]))
    yield "3 users, 2 paths", (torch.randn(3), torch.randn(3, 2), torch.randn(3, 2))
def balance_loops(log_z, log_pf, log_r):
    total = 0
    for c, j in np.ndindex(log_pf.shape):
        total = total + (log_z[c] + log_pf[c, j] - log_r[c, j]) ** 2
    return total / log_pf.numel()
def takes_one_z_for_all_users(log_z, log_pf, log_r):
    return balance_loops(log_z[-1:].expand(len(log_z)), log_pf, log_r)
def trains_z_alone(log_z, log_pf, log_r): return balance_loops(log_z, log_pf.detach(), log_r)
Exercise(2, 10, gflowgr.trajectory_balance, balance_loops, balance_cases,
         [takes_one_z_for_all_users, trains_z_alone], learned=("log_z", "log_pf"), given=
         "TB: log Z(U) (C,), log P and log R of whole paths (C, J) → scalar. Take logs of\n"
         "P = R/Z: what is 0 on every path? Mean of its square over all paths.")
# --- Session 2: detailed_balance (15 minutes) -----------------------------------------------------
def detailed_cases():
    # log 2 + log 1/2 − log 1 = 0; log 1 + log 1/2 − log 1/4 = log 2: 0 + 0.4805
    yield "1 path: F = 2, 1, R = 1/4; P = 1/2, 1/2", (logs([[2, 1, 0.25]]), logs([[0.5, 0.5]]))
    yield "2 contexts, 3 paths of 4 steps", (torch.randn(2, 3, 5), torch.randn(2, 3, 4))
def detailed_loops(log_flow, log_steps):
    total = 0
    for c, j, l in np.ndindex(log_steps.shape):
        residual = log_flow[c, j, l] + log_steps[c, j, l] - log_flow[c, j, l + 1]
        total = total + residual ** 2
    return total / log_steps[..., 0].numel()                       # the number of paths
def averages_the_steps(log_flow, log_steps):
    return detailed_loops(log_flow, log_steps) / log_steps.shape[-1]
Exercise(2, 15, gflowgr.detailed_balance, detailed_loops, detailed_cases, [averages_the_steps],
         learned=("log_flow", "log_steps"), given=
         "DB: log F of the prefixes s_0 … s_L of each path (C, J, L+1), F(s_L) = R; log P_F of\n"
         "its steps (C, J, L) → scalar. At the optimum, F(s) · P_F(s′ | s) = F(s′) on every step.\n"
         "Take logs: what is 0? Sum of its square over the steps of a path, mean over all paths.")
# --- Session 2: vargrad (20 minutes) --------------------------------------------------------------
def vargrad_cases():
    # log P − log R = 0, −log 4: both are log 2 away from their mean; (log 2)² = 0.4805
    yield "1 user: P = 1, 1; R = 1, 4", (logs([1.0, 1.0]), logs([1.0, 4.0]))
    yield "3 users, 4 paths", (torch.randn(3, 4), torch.randn(3, 4))
def vargrad_loops(log_pf, log_r):
    log_z = [(log_r[c] - log_pf[c]).mean() for c in range(len(log_pf))]
    return balance_loops(torch.stack(log_z), log_pf, log_r)
def divides_by_one_less(log_pf, log_r):
    return vargrad_loops(log_pf, log_r) * log_pf.shape[1] / (log_pf.shape[1] - 1)
Exercise(2, 20, gflowgr.vargrad, vargrad_loops, vargrad_cases, [divides_by_one_less],
         learned=("log_pf",), given=
         "TB without log Z: log P, log R of paths (C, J) → scalar. If P = R/Z, their difference\n"
         "tells log Z on every path. Its mean over a context's J paths replaces log Z in TB.")
# --- Session 2: subtb (30 minutes). No answer stands here, only cases with known results ----------
def subtb(log_flow, log_steps):
    """SubTB: log F(s_0) … log F(s_L) = log R (C, J, L+1), log P_F of each step (C, J, L) → scalar.
    At the optimum, a sum like TB's is 0 on every sub-path s_i → s_j, i < j, with F(s_i) and F(s_j)
    in place of Z and R. Mean of its square over all L(L+1)/2 sub-paths, over C and over J."""
def subtb_cases():
    # s_0 → s_1: 2 + 0 − 0; s_0 → s_2: 2; s_1 → s_2: 0. (2² + 2² + 0²) / 3
    known = {"value": torch.tensor(8 / 3),
             "gradient by log_flow": torch.tensor([[[8.0, -4.0, -4.0]]]) / 3,
             "gradient by log_steps": torch.tensor([[[8.0, 4.0]]]) / 3}
    log_flow = torch.tensor([[[2.0, 0.0, 0.0]]])
    yield "2 steps: log F = 2, 0, 0; P = 1, 1", (log_flow, torch.zeros(1, 1, 2)), known
    # the three sub-paths from s_0 are −1 off; the three to s_3 are 3 off: (3/6 + 27/6) / 2
    flow = torch.tensor([[[-3.0, 1.0, 1.0, 1.0]], [[3.0, 3.0, 3.0, -9.0]]]) / 6
    steps = torch.tensor([[[-3.0, -2.0, -1.0]], [[3.0, 6.0, 9.0]]]) / 6
    known = {"value": torch.tensor(2.5), "gradient by log_flow": flow,
             "gradient by log_steps": steps}
    log_flow = torch.tensor([[[0.0, 1.0, 1.0, 1.0]], [[0.0, 0.0, 0.0, 0.0]]])
    log_steps = torch.tensor([[[0.0, 0.0, 0.0]], [[0.0, 0.0, 3.0]]])
    yield "2 contexts, 3 steps", (log_flow, log_steps), known
Exercise(2, 30, subtb, None, subtb_cases, [averages_the_steps], learned=("log_flow", "log_steps"))
# --- Session 2: soft_rl (20 minutes). No answer stands here, only cases with known results --------
def soft_rl(log_pf, log_r):
    """REINFORCE for KL(P ‖ R/Z): log P, log R of paths drawn from P (C, J) → scalar.
    The gradient of the KL is the mean over paths of −g · ∇log P, with g = log R − log P. A is g
    minus the mean of g over the J paths of a context, a constant: no gradient flows through it.
    Mean over all paths of −A · log P."""
def soft_rl_cases():
    # g = 2, 0, so A = 1, −1; −(1 · −1 + −1 · −2) / 2 = −0.5; gradient −A / 2
    known = {"value": torch.tensor(-0.5), "gradient by log_pf": torch.tensor([[-0.5, 0.5]])}
    inputs = (torch.tensor([[-1.0, -2.0]]), torch.tensor([[1.0, -2.0]]))
    yield "log P = −1, −2; log R = 1, −2", inputs, known
    # g = 3 0 0 and 2 8 5; A · log P adds up to 3 and 0: −3 / 6
    A = torch.tensor([[2.0, -1.0, -1.0], [-3.0, 3.0, 0.0]])
    known = {"value": torch.tensor(-0.5), "gradient by log_pf": -A / 6}
    log_pf = torch.tensor([[-1.0, -2.0, -3.0], [-2.0, -2.0, -2.0]])
    yield "2 users, 3 paths", (log_pf, torch.tensor([[2.0, -2.0, -3.0], [0.0, 6.0, 3.0]])), known
def has_half_the_gradient_of_vargrad(log_pf, log_r): return vargrad_loops(log_pf, log_r) / 2
Exercise(2, 20, soft_rl, None, soft_rl_cases, [has_half_the_gradient_of_vargrad],
         learned=("log_pf",), given=
         "REINFORCE: log P, log R of paths drawn from P (C, J) → scalar. Mean over all paths of\n"
         "−A · log P; A is a constant, no gradient flows through it. Find A such that, on many\n"
         "draws, the gradient is that of KL(P ‖ R/Z). A is a function of the path, minus its mean\n"
         "over the J paths of a context, without a factor.")
# --- Session 3: tree_mask (30 minutes) ------------------------------------------------------------
def mask_cases():
    # The code sees u and itself, not the item
    yield "<user> and an item; 1 branch of 1 code after <user>", (torch.tensor([0]), 2, 1, 2)
    yield "2 contexts, 3 branches", (torch.tensor([0, 3]), 4, 3, 3)
def mask_loops(ends, H, J, L):
    mask = torch.zeros(len(ends), J * (L - 1), H + J * (L - 1), dtype=torch.bool)
    for c, j, l in np.ndindex(len(ends), J, L - 1):
        code = j * (L - 1) + l
        mask[c, code, :ends[c] + 1] = True                      # the history up to its end
        mask[c, code, H + j * (L - 1):H + code + 1] = True      # the branch up to itself
    return mask
def makes_one_branch_of_all(ends, H, J, L):
    return mask_loops(ends, H, 1, 1 + J * (L - 1))
def masks(expected, found):
    if getattr(found, "shape", None) != expected.shape:
        found = torch.full(expected.shape, math.nan)            # nothing to compare with
    different = (found != expected).nonzero().tolist()
    if not different:
        return f"expected Bools, found {found.dtype}"
    b, i, j = different[0]
    lines = [f"expected | found mask[{b}]; x is True, . is False, ? is neither"]
    for pair in zip(expected[b].tolist(), found[b].tolist()):
        rows = [" ".join({1: "x", 0: "."}.get(x, "?") for x in row) for row in pair]
        lines.append(" | ".join(rows))
    return "\n".join([*lines, f"first difference: row {i}, column {j}, counted from 0"])
Exercise(3, 30, gflowgr.tree_mask, mask_loops, mask_cases, [makes_one_branch_of_all], picture=masks)
# --- Session 3: curriculum (30 minutes) -----------------------------------------------------------
SCORES = [0.08, 0.45, 0.02, 0.25, 0.05, 0.15]
def curriculum_cases():                       # 3000 contexts of two kinds
    batch = SimpleNamespace(scores=torch.tensor([SCORES] * 3000), histories=[[4], [3]] * 1500,
                            following=[[1, 0]] * 3000, positives=torch.tensor([1] * 3000))
    what = f"scores {SCORES}; half have read 4, half 3; 1 and 0 to come"
    # 2, 3, 5 are left; score/2 + 1/12 is .093, .208, .158: shares .20, .45, .34. Or 2, 4, 5
    yield f"{what}; a pool of 1 item", (batch, 1, None, 0.0)
    yield f"{what}; places 2 to 5 of 0 to 6", (batch, 4, None, 0.6)
def curriculum_loops(batch, count, policy, progress):
    n = batch.scores.shape[1]
    start = round(progress * (count - 1))
    rows = []
    for c, scores in enumerate(batch.scores.tolist()):
        weight = [score / 2 + 1 / (2 * n) for score in scores]
        for v in batch.histories[c] + batch.following[c]:
            weight[v] = 0
        pool = random.choices(range(n), weight, k=2 * count - 1)
        pool.sort(key=scores.__getitem__)
        rows.append(pool[start:start + count])
    return torch.tensor(rows)
def shares_at_each_place(items):                                # (C, N) → (6 items, N)
    return torch.stack([(items == v).float().mean(0) for v in range(len(SCORES))])
def begins_with_high_scores(batch, count, policy, progress):
    return curriculum_loops(batch, count, policy, 1 - progress)
def reads_one_history(batch, count, policy, progress):
    same = SimpleNamespace(**{**vars(batch), "histories": batch.histories[:1] * 3000})
    return curriculum_loops(same, count, policy, progress)
Exercise(3, 30, gflowgr.curriculum, curriculum_loops, curriculum_cases,
         [begins_with_high_scores, reads_one_history], read=shares_at_each_place, tolerance=0.07,
         note="batch: its scores, histories, following and positives, see Batch in gflowgr.py.\n"
         "policy is None. Draw with replacement. Each item's share at each place, in 3000\n"
         "contexts, is compared.")
# --- Session 3: Policy.recommend (60 minutes) -----------------------------------------------------
HISTORIES = [[], [3], [5, 0, 7], list(range(4, 24)), [1, 2, 3, 4, 5, 6, 7, 8]]
def points(n, d=4):
    return np.random.default_rng(n).normal(size=(n, d))
def made(n=24, K=4, L=3, ids=None, seed=0):
    """A random policy whose P is far from even, and whose beam is exact: 60 beams, n < 60."""
    torch.manual_seed(seed)
    policy = Policy(ids or SemanticIDs.fit(points(n), K, L), 4, 32, 1, 0.0).eval()
    policy.lm.transformer.wte.weight.data.mul_(5)
    torch.nn.init.normal_(policy.flow_head.weight)
    policy.beams = 60
    return policy
def recommend_cases():
    # item 0 was seen, so item 1 is left: P = 1, log P = 0
    yield "2 items, of which one was seen", (made(ids=SemanticIDs([[0], [1]], 2)), [[0]], 2)
    policy = made()
    yield "1 beam, but k = 4", (policy, [[4], [3, 8, 1, 20, 9, 6]], 4, 1)
    for K, L in ((24, 1), (5, 2), (2, 6)):
        yield f"3 beams, IDs of {L} codes", (made(24, K, L), HISTORIES, min(L, 2), 3)
    yield "3 beams, guided", (policy, HISTORIES, 2, 3, torch.rand(5, 24) ** 4)
    yield "1 item is left, or none", (policy, [list(range(23)), list(range(24))], 30)
def under(rows, v, l):                        # items whose ID begins with l codes of item v
    return [w for w, row in enumerate(rows) if row[:l] == rows[v][:l]]

@torch.no_grad()
def one_by_one(policy, history):
    """log P_F of the steps and log F of the prefixes on the paths of all items, (n, L) each: every
    path a sequence of its own through plain GPT-2, without packing, padding or mask."""
    rows = policy.semantic_ids.codes.tolist()
    K = policy.semantic_ids.num_codes
    start = [policy.user_token + 1 + item for item in (-1, *history[-policy.window:])]
    tokens = []
    for row in rows:
        tokens.append(start + [l * K + code for l, code in enumerate(row[:-1])])
    out = policy.lm(torch.tensor(tokens), output_hidden_states=True)
    end = len(start) - 1
    log_flow = policy.flow_head(out.hidden_states[-1][:, end:])[..., 0]
    left = {*range(len(rows))} - {*history}
    log_pf = torch.full_like(log_flow, -math.inf)               # stays so where it is illegal
    for v, l in np.ndindex(log_pf.shape):
        code = rows[v][l]
        legal = {rows[w][l] for w in under(rows, v, l) if w in left}
        if code in legal:
            logits = out.logits[v, end + l, l * K:(l + 1) * K]
            log_pf[v, l] = logits[code] - logits[sorted(legal)].logsumexp(0)
    return log_pf, log_flow

def recommend_loops(self, histories, k=10, beams=None, guide=None):
    rows = [tuple(row) for row in self.semantic_ids.codes.tolist()]
    items = torch.full((len(histories), k), -1)
    values = torch.full((len(histories), k), -math.inf)
    for b, history in enumerate(histories):
        left = [v for v in range(len(rows)) if v not in history]
        log_p = one_by_one(self, history)[0].cumsum(1)
        best = {(): 0.0}                                        # {prefix: score}, best first
        for l in range(1, len(rows[0]) + 1):
            score = {}                                          # of each prefix of l codes
            for v in left:
                if rows[v][:l - 1] in best:
                    below = [w for w in under(rows, v, l) if w in left]
                    more = 0.0 if guide is None else guide[b, below].sum().log()
                    score[rows[v][:l]] = (log_p[v, l - 1] + more).item()
            order = sorted(score, key=score.get, reverse=True)[:max(beams or self.beams, k)]
            best = {prefix: score[prefix] for prefix in order}
        for place, row in enumerate(list(best)[:k]):
            items[b, place] = rows.index(row)
            values[b, place] = best[row]
    return items, values
def recommends_what_was_seen(self, histories, k=10, beams=None, guide=None):
    return recommend_loops(self, [[]] * len(histories), k, beams, guide)
Exercise(3, 60, Policy.recommend, recommend_loops, recommend_cases, [recommends_what_was_seen],
         note="self.semantic_ids.codes (n, L): the ID of each item; self.beams: a number\n"
         "self.path_log_probs(histories, items (B, J)): log P_F of each step, (B, J, L)\n"
         "Write a beam search: max(beams or self.beams, k) prefixes go on at each level; with a\n"
         "guide, those of highest P times the sum of the guide over unseen items below. In all\n"
         "cases, sample is 0, and nothing has to be raised.")
# --- Session 4: sdpo, S-DPO (20 minutes) ----------------------------------------------------------
def sdpo_cases():
    # Δ_p = log 2, Δ_d = log 1/2: −log σ(log 4) = −log(4/5) = 0.2231
    yield ("P of the chosen item rose from 1/2 to 1, P of the other fell from 1/4 to 1/8",
           (logs([1.0, 0.125]), logs([0.5, 0.25]), 1.0))
    yield "3 users, 3 rejected items", (torch.randn(3, 4), torch.randn(3, 4), 0.3)
def sdpo_loops(log_pf, log_ref, beta):
    total = 0
    for rise in log_pf - log_ref:                               # Δ of the paths of a context
        odds = torch.exp(beta * (rise[1:] - rise[0])).sum()
        total = total + torch.log(1 + odds)                     # −log σ(−log x) = log(1 + x)
    return total / len(log_pf)
def forgets_the_reference(log_pf, log_ref, beta): return sdpo_loops(log_pf, 0 * log_ref, beta)
def takes_the_last_as_chosen(log_pf, log_ref, beta):
    return sdpo_loops(log_pf.flip(1), log_ref.flip(1), beta)
Exercise(4, 20, gflowgr.sdpo, sdpo_loops, sdpo_cases,
         [forgets_the_reference, takes_the_last_as_chosen], learned=("log_pf",))
# --- Session 4: grpo (20 minutes) -----------------------------------------------------------------
def grpo_cases():
    # mean 2, std √2: A = −0.7071, 0.7071; the gradient is −A / 2
    rewards = torch.tensor([[1.0, 3.0]])
    yield "rewards 1, 3; beta = 0", (logs([0.5, 0.2]), logs([0.3, 0.3]), rewards, 0.0)
    yield ("all rewards are the same, A = 0: the KL alone",
           (logs([0.5, 0.5]), logs([0.25, 0.25]), torch.ones(1, 2), 0.1))
    yield "3 users, 4 paths", (torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4), 0.3)
def grpo_loops(log_pf, log_ref, reward, beta, less=1):
    total = 0
    for c, j in np.ndindex(log_pf.shape):
        r = reward[c]
        advantage = (r[j] - r.mean()) / max(r.std(correction=less), 1e-8)
        x = torch.exp(log_ref[c, j] - log_pf[c, j])
        kl = x - torch.log(x) - 1
        total = total + beta * kl - advantage * log_pf[c, j]
    return total / log_pf.numel()
def divides_by_the_std_with_j(log_pf, log_ref, reward, beta):
    return grpo_loops(log_pf, log_ref, reward, beta, less=0)
Exercise(4, 20, gflowgr.grpo, grpo_loops, grpo_cases, [divides_by_the_std_with_j],
         learned=("log_pf",), gradient_alone=True, tolerance=1e-3)

# === The grader ===================================================================================
def results(exercise, answer, inputs):
    """Yield what is compared: ("value", what an answer returns), then the gradients."""
    inputs = [copy.deepcopy(x) for x in inputs]                 # an answer may change them
    named = dict(zip(inspect.signature(exercise.task).parameters, inputs))
    learned = [named[name].requires_grad_() for name in exercise.learned]
    value = answer(*inputs)
    if not exercise.gradient_alone:
        yield "value", exercise.read(value)
    if learned:
        assert getattr(value, "requires_grad", False), "no gradient flows back"
        gradients = torch.autograd.grad(value, learned, materialize_grads=True)
        for name, gradient in zip(exercise.learned, gradients):
            yield f"gradient by {name}", gradient

def written(x):                               # an input or a result, on one line
    if isinstance(x, CollaborativeModel):
        x = {name: value for name, value in vars(x).items() if not torch.is_tensor(value)}
    elif isinstance(x, Policy):
        x = {"beams": x.beams, "IDs": x.semantic_ids.codes.tolist()}
    elif torch.is_tensor(x):
        x = x.detach()
    return textwrap.shorten(repr(x), 150, placeholder=" …")

def why(error, file):                         # what was raised, and in which line of the file
    frames = traceback.extract_tb(error.__traceback__)
    lines = ["", *[f" in line {frame.lineno}" for frame in frames if frame.filename == file]]
    return " ".join(f"{type(error).__name__}{lines[-1]}: {error}".split())

def kind(x):                                  # floats, integers or bools
    return x.is_floating_point(), x.dtype == torch.bool

def verdict(exercise, answer, file=""):
    """"" for a right answer, else what a student reads; file: where the answer stands."""
    name = exercise.task.__qualname__
    names = inspect.signature(exercise.task).parameters
    torch.manual_seed(0)
    random.seed(0)
    for number, (title, inputs, *known) in enumerate([*exercise.cases()], 1):
        wanted = known[0] if known else dict(results(exercise, exercise.answer, inputs))
        what = next(iter(wanted))
        found = None
        try:
            for what, found in results(exercise, answer, inputs):
                close(found, wanted[what], atol=exercise.tolerance)
                if torch.is_tensor(found):
                    assert kind(found) == kind(wanted[what]), f"it is a tensor of {found.dtype}"
        except BaseException as error:
            given = "; ".join(f"{key} = {written(x)}" for key, x in zip(names, inputs))
            pair = (f"expected {what}: {written(wanted[what])}\n"
                    f"found    {what}: {written(found)}")
            if exercise.picture:
                pair = exercise.picture(wanted[what], found)
            return (f"{name} is not right yet\nCase {number}: {title}\n{given}\n{pair}\n"
                    f"{why(error, file)}")
    return ""

def verdicts(file, names=()):
    """{exercise: its verdict} of a student's file; "" stands for the file as a whole."""
    try:
        there = runpy.run_path(file, run_name="student")
    except BaseException as error:                              # also that of exit()
        return {"": why(error, file)}
    found = {}
    for name in names or EXERCISES:
        function = EXERCISES[name].task.__name__
        answer = there.get(function)
        if getattr(answer, "__module__", "") == "student":      # not ours, imported
            found[name] = verdict(EXERCISES[name], answer, file)
        elif names:
            found[name] = f"{name} is not right yet\nthere is no function {function}"
    return found or {"": "there is no function of an exercise in it"}

def send_verdicts(pipe, file, names):         # in a process of its own
    os.setsid()                               # it leads a group, which ends with it
    sys.path.insert(0, os.path.dirname(os.path.abspath(file)))  # it may import its neighbours
    nothing = open(os.devnull, "r+")
    for stream in range(3):                   # no input, no output
        os.dup2(nothing.fileno(), stream)
    pipe.send_bytes(json.dumps(verdicts(file, names)).encode())

def grade(file, names=(), limit=60):
    """`verdicts` of a file, from a fork of this process: torch is loaded before the time runs."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    child = fork.Process(target=send_verdicts, args=(there, file, names))
    child.start()
    there.close()                             # the child alone has it: we see at once that it ends
    try:
        if not here.poll(limit):
            return {"": f"no answer in {limit} seconds"}
        return json.loads(here.recv_bytes())
    except (EOFError, OSError):
        return {"": "it left before it was graded"}
    finally:
        with suppress(OSError):               # there is no group any more
            os.killpg(child.pid, signal.SIGKILL)
        child.kill()
        child.join()

def print_table(graded, names):               # a row for each file, a column for each exercise
    columns = names or [name for name in EXERCISES if any(name in row for row in graded.values())]
    print("\n" + " | ".join(["file", *columns]))
    marks = {None: "–", "": "right"}
    for file, found in graded.items():
        cells = [marks.get(found.get(name), "not yet") for name in columns]
        print(" | ".join([file, *cells, found.get("", "")]).removesuffix(" | "))

def grade_all(path, names=()):
    """Grade a file, or all .py files below a folder, and print it → 0 if all is right."""
    sys.stdout.reconfigure(errors="backslashreplace")           # a message may hold anything
    folder = os.path.isdir(path)
    below = os.path.join(glob.escape(path), "**/*.py")          # no hidden files and folders
    files = glob.glob(below, recursive=True) if folder else [path]
    graded = {}
    for file in sorted(filter(os.path.isfile, files)):
        graded[file] = grade(file, names)
        for name, message in graded[file].items():
            said = message or f"{name} is right"
            print(f"{file}: {said}" if folder or not name else said, flush=True)
    if not graded:
        print(f"{path} is no .py file, and no folder with one", file=sys.stderr)
        return 2
    if folder:
        print_table(graded, names)
    return int(any(any(found.values()) for found in graded.values()))

def stub(exercise, hint=False):               # the beginning of a student's file
    task = exercise.task
    doc = inspect.getdoc(task) if hint or not exercise.given else exercise.given
    text = textwrap.indent(doc, "    ").lstrip()
    more = " Its gradient is compared." if exercise.learned else ""
    notes = f"{exercise.minutes} minutes.{more}\n{exercise.note}"
    return ("import math\nimport torch\nimport torch.nn.functional as F\n"
            f"\n{textwrap.indent(notes.strip(), '# ')}\n"
            f"def {task.__name__}{inspect.signature(task)}:\n"
            f'    """{text}\n    """\n    raise NotImplementedError')

# --- Its tests ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", EXERCISES)
def test_exercise(name, tmp_path, capsys):
    exercise = EXERCISES[name]
    if exercise.answer:
        assert verdict(exercise, exercise.task) == ""           # ours, against the loops
    for mistake in exercise.mistakes:
        assert "\nAssertionError: " in verdict(exercise, mistake), mistake
    formula = inspect.getdoc(exercise.task).splitlines()[-1]
    for hint in (["--hint"], []):
        assert main(["--stub", name, *hint]) == 0
        text = capsys.readouterr().out
        assert (formula in text) == bool(hint or not exercise.given)
    mine = tmp_path / "mine.py"
    mine.write_text(text, encoding="utf-8")
    assert "\nNotImplementedError in line " in verdicts(str(mine), [name])[name]

RIGHT = """from gflowgr import grpo
def trajectory_balance(z, p, r):
    return (z[:, None] + p - r).square().mean()
def grpo(*inputs, ours=grpo):                 # another form: its value is 0
    return ours(*inputs) - ours(*inputs).detach()
"""

@pytest.mark.parametrize("text, said", [
    ("def recall_at(ranked, target, k):\n    exit()",
     "recall_at is not right yet\nCase 1: one user\n"
     "ranked = tensor([[4, 2, 7, 1]]); target = tensor([4]); k = 3\n"
     "expected value: tensor([1.])\nfound    value: None\nSystemExit in line 2: None"),
    (RIGHT.replace("+ p", "+ p.detach()"), "\nexpected gradient by log_pf: tensor([[1.3863]])\n"
     "found    gradient by log_pf: tensor([[0.]])\nAssertionError: "),
    ("import torch\ndef tree_mask(ends, H, J, L):\n    return torch.zeros(1, 1, 3)",
     "\nx . x | . . .\nfirst difference: row 0, column 0, "),
    ("from gflowgr import tree_mask as ours\ndef tree_mask(*inputs):\n    return 1 * ours(*inputs)",
     "\nexpected Bools, found torch.int64\n"),
    ("def scores(self, histories): pass", "Case 1: near[0] = 0, 1, .8, 0; without popularity\n"
     "self = {'popularity': 0.0, 'log': [[0, 1, 2]]}; ")])
def test_what_a_student_reads(text, said, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(text)
    assert said in "\n".join(verdicts(str(mine)).values())

def test_a_folder_is_graded_file_by_file(tmp_path):
    (tmp_path / "anna/.venv").mkdir(parents=True)
    texts = {"anna/mine.py": "print('loud')\n" + RIGHT, "anna/.venv/copy.py": "1 / 0",
             "asks.py": "input()", "leaves.py": "import os\nos.system('echo loud')\nos._exit(0)",
             "zoe.py": RIGHT.replace("+ p", "- p") + "def ndcg_at(*inputs): 1 / 0"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    command = [sys.executable, __file__, "--grade", "."]
    done = subprocess.run(command, cwd=tmp_path, input=b"answer\n", capture_output=True)
    out = done.stdout.decode("utf-8")
    assert (done.returncode, done.stderr) == (1, b"")
    assert "loud" not in out
    assert "./anna/mine.py: trajectory_balance is right\n" in out
    assert out.endswith("""
file | ndcg_at | trajectory_balance | grpo
./anna/mine.py | – | right | right
./asks.py | – | – | – | EOFError in line 1: EOF when reading a line
./leaves.py | – | – | – | it left before it was graded
./zoe.py | not yet | not yet | right
""")                                          # ours, imported, are not graded

def test_the_time_runs_when_torch_is_loaded(tmp_path, capsys):
    mine = tmp_path / "mine.py"
    mine.write_text("from near import hits\ndef recall_at(*inputs): return hits(*inputs).float()")
    near = "def hits(items, wanted, k): return (items[:, :k].T == wanted).any(0)"
    (tmp_path / "near.py").write_text(near)
    assert grade(str(mine), limit=1) == {"recall_at": ""}
    assert main(["--grade", str(mine)]) == 0
    assert capsys.readouterr().out == "recall_at is right\n"
    mine.write_text("while True: pass")
    assert grade(str(mine), limit=1) == {"": "no answer in 1 seconds"}

def test_a_wrong_name_is_told(capsys):
    wrong = "there is no exercise nonsense; there are recall_at, "
    for command, said in (("--stub nonsense --hint", wrong), ("--grade FILE grpo nonsense", wrong),
                          ("--grade nowhere", "nowhere is no .py file, and no folder with one")):
        assert main(command.split()) == 2
        assert said in capsys.readouterr().err

# === Tests by topic, in the order of the story ====================================================
def cli(*arguments):                          # → exit status, what is on stdout, on stderr
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            status = gflowgr.main(gflowgr.parse([str(argument) for argument in arguments]))
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()

def refused(message, *flags):                 # one line on stderr, exit status 2
    status, _, err = cli(*flags)
    assert status == 2
    assert re.fullmatch(f"error: .*{re.escape(message)}.*\n", err), err
    assert (".py, line" in err) == ("Error" in message)       # of own code

@pytest.fixture
def told(tmp_path):                           # refused before anything is written
    def check(message, *flags):
        refused(message, *flags, f"--out={tmp_path / 'out'}")
        assert not (tmp_path / "out").exists()
    return check

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):                   # flags of a tiny world: 60 users, 48 items
    folder = tmp_path_factory.mktemp("tiny")
    TOY["write"](folder, 60, 8, 6, 1)
    return [f"--data={folder}", *"--codes=8 --width=32 --layers=1 --batch=16 --window=8".split(),
            "--sft=epochs=2:rate=.005", "--recipe=epochs=2:rate=.005", "--beams=11"]

def prepared(*flags, shift=0):                # shift changes the validation and test items
    settings = gflowgr.parse(list(flags))
    settings.device = "cpu"
    data = load_data(settings.data)
    data.histories = [h[:-2] + [(item + shift) % 48 for item in h[-2:]] for h in data.histories]
    return Setup(0, data, settings)

# --- Semantic IDs ---------------------------------------------------------------------------------
@pytest.mark.parametrize("features, K, L", [
    (points(50), 4, 3), (np.ones((27, 3)), 3, 3), (points(9), 9, 1), (points(40), 2, 6)])
def test_ids_differ_and_only_a_full_cell_refuses_an_item(features, K, L):
    ids = SemanticIDs.fit(features, K, L, seed=3)
    rows = list(map(tuple, ids.codes.tolist()))
    assert len({*rows}) == len(features)
    rng = np.random.default_rng(3)
    left = np.array(features)
    for level in range(L):
        centroids = tokenizer.kmeans(left, K, rng)
        cost = ((left[:, None] - centroids) ** 2).sum(-1)
        for i, c in np.ndindex(len(rows), K):
            if cost[i, c] < cost[i, rows[i][level]]:            # c is nearer, but its cell is full
                cell = (*rows[i][:level], c)
                inside = [j for j, row in enumerate(rows) if row[:level + 1] == cell]
                assert len(inside) == K ** (L - 1 - level)
                assert max(cost[inside, c]) < cost[i, c]
        left = left - centroids[[row[level] for row in rows]]

def left_vectors(table):                      # times √(singular values), rows of length 1
    u, size, _ = np.linalg.svd(table)
    rows = u * np.sqrt(size)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)

@pytest.mark.parametrize("codes", [[[0.0], [1.0]], [[-1], [0]], [[0], [2]], [[1], [1]], [0, 1]])
def test_ids_have_to_be_different_rows_of_small_integers(codes):
    with pytest.raises(InputError, match="all rows different"):
        SemanticIDs(codes, 2)

def test_the_tree_of_the_example():
    ids = SemanticIDs([[0, 0], [0, 1], [1, 1]], 2)
    assert ids.nodes.tolist() == [[0, 1, 3], [0, 1, 4], [0, 2, 5]]
    assert ids.next_node.tolist() == [[1, 2], [3, 4], [-1, 5], [-1, -1]]

def test_centroids_begin_far_apart():
    points = np.repeat(np.eye(8), 5, axis=0)                    # seeds at random would miss some
    centroids = tokenizer.kmeans(points, 8, np.random.default_rng(0))
    assert np.array_equal(np.unique(centroids, axis=0), np.unique(points, axis=0))
    for seed in range(9):                                       # also if 0 is not a first centroid
        centroids = tokenizer.kmeans(np.array([[0], [4], [5], [6]]), 2, np.random.default_rng(seed))
        assert sorted(centroids.ravel()) == [0, 5]

def test_features_against_loops():
    texts = ["Red fox (tales),part", "red|Fox", "blue fox part", "blue whale", "whale",
             "red part", "whale blue"]
    terms = []
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        terms.append(words + [*itertools.pairwise(words)])
    found_in = np.array([[term in row for row in terms] for term in {*sum(terms, [])}]).T
    text = left_vectors(found_in * np.log(7 / found_in.sum(0)) * (found_in.sum(0) > 1))
    histories = [[0, 1, 2, 3], [2, 1, 0, 4], [3, 2], [1, 0, 4, 2, 6, 5, 3], [], [5, 6], [4, 5]]
    vectors = tokenizer.item_vectors(histories, 7)
    log = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for kind, of_log in {"content": 0, "mixed": 4 * log @ log.T}.items():
        found = tokenizer.item_features(kind, texts, histories, seed=0)
        np.testing.assert_allclose(found @ found.T, text @ text.T + of_log, atol=1e-4)
    some = [[user % 700] for user in range(1000)]
    ranks = [tokenizer.item_vectors(some, n).shape[1] for n in (1499, 1500)]
    assert ranks == [24, 1500 // 30]

# --- Traditional recommenders ---------------------------------------------------------------------
def log_data(n=25):                           # equals itself alone, as a Dataset does
    return type("Data", (), dict(titles=[str(v) for v in range(n)], train=LOG))
@pytest.fixture(scope="module")
def vectors():                                # of LOG's items (25, 8), signs of columns aside
    x = np.zeros((31, 25), np.float32)
    for user, history in enumerate(LOG):
        x[user, history] = 1
    x /= np.maximum(x.sum(0), 1) ** 0.25
    return torch.tensor(np.linalg.svd(x)[2][:8].T)

def test_svd_and_blend_against_loops(vectors):
    long = vectors.norm(dim=1).clamp(min=1e-4)
    users = [*USERS, list(range(23)), [3] * 200 + [7] * 90]
    of_8 = SVD(LOG, 25, rank=8).scores(users)
    for user, history in enumerate(users):
        score = torch.zeros(25)
        for age, j in enumerate(reversed(history), 1):
            score += vectors @ vectors[j] / age ** 0.75
        close(of_8[user], shares_loops(score, long, history), atol=1e-3)    # it is approximate
    counts, svd, blend = [TEACHERS[name](LOG, 25).scores(users) for name in ("cm", "svd", "blend")]
    close(blend, 0.25 * counts + 0.75 * svd)
    assert SVD(LOG, 25).vectors.shape == (25, 24)
    rounded = reward.shares(torch.tensor([[9.0, 1e-7, 0]]), [[0]], torch.tensor([9.0, 1, 3]))
    close(rounded, torch.tensor([[0, 0.25, 0.75]]))             # 1e-7 counts as 0
    after = reward.followers([[0, 1, 2]], 3).to_dense()
    assert after.tolist() == [[0, 1, 0.8], [0, 0, 1], [0, 0, 0]]

def test_seeds_share_teachers_data_do_not(tiny):
    one, other = prepared(*tiny), prepared(*tiny)
    shared = Setup(1, one.data, one.settings)
    first, second, third = [setup.teacher(Recipe()).popular for setup in (one, shared, other)]
    assert first is second is not third                         # of the recommender that is fitted

def test_a_fold_does_not_know_its_users_and_who_is_served_gets_all(monkeypatch):
    monkeypatch.setitem(TEACHERS, "counted", counted)
    data = log_data()
    teacher = Teacher("counted", data)
    past = [history[:2] for history in LOG]
    found = teacher.scores(past[::-1], range(len(LOG))[::-1]).flip(0)
    whole, *parts = [reward.fitted(counted, data, fold) for fold in range(-1, 20)]
    for user, history in enumerate(LOG):
        [one] = [cm for cm in parts if history not in cm.log]   # one of the fits
        close(found[user], one.scores([past[user]])[0])
    given = [history for cm in (whole, *parts) for history in cm.log]
    assert not {*map(id, given)} & {*map(id, LOG)}              # copies: a fit may change them
    whole = CollaborativeModel.fit(LOG, 25).scores(past)
    close(teacher.scores(past), whole)
    assert ((found - whole).abs().amax(1) > 0.001).all()

@pytest.mark.parametrize("name", ["cm", "svd"])
def test_scores_are_divided_by_popularity_or_length_and_guide_beams(name):
    popular = torch.tensor([1.0 + sum(LOG, []).count(v) for v in range(25)])
    if name == "svd":
        popular = SVD(LOG, 25).vectors.norm(dim=1).clamp(min=1e-4)
    data = log_data()
    cm = Teacher(name, data)
    users = USERS[:3]
    wanted = (cm.scores(users) / popular ** 0.7) ** 3
    close(Teacher(name, data, 0.7, 3.0).scores(users), wanted / wanted.sum(1, keepdim=True))
    close(cm.scores([[5, 6] * 13]).sum(1), torch.ones(1))       # as long as the catalogue
    policy = made(25)
    policy.teacher = cm
    close(policy.recommend(users, 4), recommend_loops(policy, users, 4, None, cm.scores(users)))
    close(policy.recommend(users, 4, guide=wanted), recommend_loops(policy, users, 4, None, wanted))

# --- Rows of a batch, P, beams, drawn lists -------------------------------------------------------
@pytest.mark.parametrize("window", [1, 4, 7])
def test_every_item_is_a_target_once_and_reads_what_stands_before_it(window):
    histories = [list(range(length)) for length in (1, 2, 4, 5, 8, 9, 30)]
    liked = [[item % 3 > 0 for item in history] for history in histories]
    setup = SimpleNamespace(data=SimpleNamespace(train=histories, liked=liked), size=3,
                            rows=list(gflowgr.training_rows(histories, window)))
    policy = Policy(SemanticIDs([[0, i] for i in range(200)], 200), window, 65, 1)  # one head
    order, lengths = [], []                     # of v; of rows: similar ones are in one batch
    for batch in gflowgr.batches(setup, policy, None, np.random.default_rng(0)):
        tokens, rows, ends = batch.packed.tokens, batch.packed.row_of, batch.packed.ends
        lengths.append(sorted(dict(zip(rows.tolist(), ends.tolist())).values()))
        for c, (row, end) in enumerate(zip(rows.tolist(), ends.tolist())):
            past = batch.histories[c]
            v = batch.positives[c].item()
            read = tokens[row, :end + 1] - policy.user_token - 1    # −1: <user>
            assert read.tolist() == [-1, *past[len(past) - end:]]
            assert min(len(past), window // 2 + 1) <= end <= window
            assert batch.liked[c] == (v % 3 > 0)
            assert past + batch.following[c] == histories[batch.users[c]]
            assert batch.following[c][0] == v
            order.append((batch.users[c], v))
    assert len({*order}) == len(order) == len(sum(histories, []))
    assert sum(sorted(lengths), []) == sorted(sum(lengths, []))

def test_rows_are_those_of_the_example():
    history = [*range(8)]
    rows = [*gflowgr.training_rows([history], 4)]
    assert [[*places] for _, places in rows] == [[0, 1, 2, 3, 4], [5, 6], [7]]
    policy = Policy(SemanticIDs([[0, item] for item in history], 8), 4, 32, 1)
    read = gflowgr.Packed(rows, [history], policy).tokens[:, 1:] - policy.user_token - 1
    assert read.tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [3, 4, 5, 6]]

def test_the_pool_of_the_curriculum_is_drawn_half_by_score(monkeypatch):
    _, (batch, *given) = next(curriculum_cases())
    def multinomial(weight, count, replacement):
        close(weight[0], torch.tensor([0, 0, 0.01 + 1 / 12, 0.125 + 1 / 12, 0, 0.075 + 1 / 12]))
        return torch.full((len(weight), count), 2)
    monkeypatch.setattr(torch, "multinomial", multinomial)
    assert SAMPLERS["curriculum"](batch, *given).shape == (3000, 1)

def test_a_distribution_has_no_dropout_and_sum_1():
    policy = made(25)
    policy.lm.transformer.drop.p = 0.5
    found = [gflowgr.distribution(policy.train(), USERS[:3]) for _ in range(2)]
    close(found[0], found[1])
    close(found[0].sum(1), torch.ones(3))

def test_a_list_ends_where_no_item_is_left(monkeypatch):
    seen = list(range(24))
    monkeypatch.setitem(TEACHERS, "bare", partial(CollaborativeModel.fit, popularity=0.0))
    cm = Teacher("bare", log_data(24), 1.0)
    sharp = made()
    sharp.lm.transformer.wte.weight.data *= 1e3                 # nearly all P are below 1e-30
    drawn = [partial(policy.recommend, sample=1.0) for policy in (made(), sharp)]
    for recommend in (made().recommend, *drawn, cm.recommend):
        items, scores = recommend([seen, seen[1:], [0, 0, 3]], 24)
        assert (items >= 0).sum(1).tolist() == [0, 1, 22]
        assert scores.isfinite().equal(items >= 0)
        assert {*items[2].tolist()} == {-1, *seen} - {0, 3}

def test_what_cannot_be_recommended_is_told():
    ask = made().recommend
    said = "items of a history are numbers from 0 to 23|recomm|IDs: "
    for wrong in (partial(CollaborativeModel.fit([[0, 1]], 24).scores, [[3, 24]]),
                  partial(ask, [[-1]]), partial(ask, []), partial(ask, [[3]], k=0),
                  partial(ask, [[3]], guide=torch.rand(1, 24), sample=1.0),
                  partial(ask, [[3]], sample=-1.0), partial(SemanticIDs, [[4]], 4)):
        with pytest.raises(InputError, match=said):
            wrong()

@pytest.mark.parametrize("sample, past", [(1.0, [2]), (1.0, [0, 3, 5]), (0.5, []), (2.0, [4])])
def test_lists_are_drawn_without_replacement(sample, past):     # k items need only k beams
    policy = made(6, 2, 3)
    rows = policy.semantic_ids.codes.tolist()
    weight = one_by_one(policy, past)[0].exp() ** (1 / sample)  # of each step
    p = torch.ones(6)                                           # that an item is drawn first
    for v, l in np.ndindex(6, 3):
        weight_of = {rows[w][l]: weight[w, l] for w in under(rows, v, l)}       # of each code
        p[v] *= weight[v, l] / max(1e-30, sum(weight_of.values()))
    wanted = (p[:, None] * p / (1 - p[:, None])).fill_diagonal_(0)      # of the first two
    first, second = policy.recommend([past] * 4000, 2, 2, sample=sample)[0].T
    pairs = torch.bincount(6 * first + second, minlength=36).view(6, 6) / 4000
    close(pairs, wanted, atol=0.025, rtol=0)
    assert (pairs[wanted == 0] == 0).all()

# --- Samplers, what a loss is given ---------------------------------------------------------------
PAST = [[3], [5, 0, 7], [9, 1]]
NEXT = [[4, 11, 6], [8, 20], [2, 23]]

def contexts(past, following):                # what samplers read of a Batch
    r = torch.rand(len(past), 24) ** 4
    r[tokenizer.entries(past)] = 0
    positives = torch.tensor([row[0] for row in following])
    return SimpleNamespace(r=r, scores=r / r.sum(1, keepdim=True), positives=positives,
                           histories=past, following=following)

def weight(name, batch, c, v):                # of item v in context c; an item is drawn ∝ it
    return {"session": v in batch.following[c][1:],
            "uniform": v not in batch.histories[c] + batch.following[c],
            "reward_draws": batch.r[c, v]}[name]

@pytest.mark.parametrize("name", ["session", "uniform", "reward_draws"])
def test_samplers_draw_from_where_they_say(name):
    torch.manual_seed(0)
    batch = contexts(PAST, NEXT)
    before = batch.r.clone()
    items = SAMPLERS[name](batch, 2000, None, 0.5)
    assert batch.r.equal(before)                                # the loss needs it, too
    for c, row in enumerate(items):
        p = torch.tensor([float(weight(name, batch, c, v)) for v in range(24)])
        share = torch.bincount(row, minlength=24) / 2000
        assert (share - p / p.sum()).abs().max() < 0.04
        assert (share[p == 0] == 0).all()

def test_samplers_that_ask_the_policy():
    policy = made()
    batch = contexts(PAST, NEXT)
    best = policy.recommend(PAST, 7, beams=7)[0].tolist()
    best = [[v for v in row if v != rest[0]][:6] for row, rest in zip(best, NEXT)]
    assert SAMPLERS["policy_beam"](batch, 6, policy, 0.5).tolist() == best
    torch.manual_seed(3)
    drawn = SAMPLERS["policy_draws"](batch, 7, policy, 0.5)
    torch.manual_seed(3)
    assert drawn.equal(policy.recommend(PAST, 7, beams=7, sample=1.0)[0])

@pytest.mark.parametrize("name", SAMPLERS)
def test_where_one_item_is_left_it_is_drawn(name):
    batch = contexts([[v for v in range(24) if v != 8]], [[8]])     # the logged one
    items = SAMPLERS[name](batch, 5, made(), 0.5)
    assert items.tolist() == [[8] * 5]

def paths_by_hand(recipe, setup, models, user, past, items):    # {attribute of Paths: its row}
    after = setup.data.train[user][len(past):]
    codes = setup.ids.codes.tolist()
    log_pf, learned_flow = one_by_one(models[0], past)
    teacher = setup.teacher(replace(recipe, debias=0.0, sharp=1.0))
    signal = teacher.scores([past], [user])[0] / teacher.popular ** recipe.debias
    signal = signal ** recipe.sharp
    alike = torch.tensor([sum(x == y for x, y in zip(row, codes[after[0]])) for row in codes])
    alike[past] = 0
    few = 1e-3 / (len(codes) - len({*past}))                    # the ε of each unseen item
    R = recipe.w_y * signal / signal.sum() + recipe.w_s * alike / alike.sum() + few
    R[after[0]] += recipe.w_a * (1 if after[0] % 3 else 0.1)    # liked, or only clicked
    R[past] = 0
    flow = torch.zeros(len(codes), len(codes[0]) + 1)           # F of the prefixes of all items
    for v, l in np.ndindex(*flow.shape):
        flow[v, l] = R[under(codes, v, l)].sum()
    log_flow = flow.log()
    if not recipe.exact:
        log_flow[:, :-1] = learned_flow
    child_flow = torch.zeros(len(items), len(codes[0]), setup.ids.num_codes)
    log_probs = torch.full_like(child_flow, NEVER)
    for j, l in np.ndindex(child_flow.shape[:2]):
        for w in under(codes, items[j], l):
            child_flow[j, l, codes[w][l]] = flow[w, l + 1]
            log_probs[j, l, codes[w][l]] = log_pf[w, l]
    return dict(log_steps=log_pf[items], log_pf=log_pf[items].sum(1), log_r=R[items].log(),
                log_flow=log_flow[items], log_z=log_flow[0, 0], child_flow=child_flow,
                log_probs=log_probs, log_ref=one_by_one(models[1], past)[0].sum(1)[items])

def losses_by_hand(p):                        # {recipe: its loss}, of a Paths
    rejected = 0
    for c, items in enumerate(p.items.tolist()):                # S-DPO leaves out what comes again
        left = [j for j, item in enumerate(items) if j == 0 or item != items[0]]
        pair = p.log_pf[c:c + 1, left], p.log_ref[c:c + 1, left]
        rejected += sdpo_loops(*pair, p.recipe.beta) / len(p.items)
    balance = balance_loops(p.log_z, p.log_pf, p.log_r)
    gap = (p.log_z[:, None] + p.log_pf - p.log_r).abs()
    huber = torch.where(gap < 1, gap ** 2 / 2, gap - 0.5).mean()
    q = p.child_flow
    q = q / q.sum(-1, keepdim=True)
    kl = torch.nn.functional.kl_div(p.log_probs, q, reduction="sum") / p.log_pf.numel()
    shares = 0
    for log_pf, log_r in zip(p.log_pf, p.log_r):                # of the paths of a context
        q = log_r.exp() / log_r.exp().sum()
        shares += (q * (q / log_pf.exp() * log_pf.exp().sum()).log()).sum() / len(p.items)
    return {"listnet": shares, "sdpo": rejected, "sdpo-reward": rejected, "paper": balance,
            "tb-paper": balance, "tb": balance,
            "grpo": grpo_loops(p.log_pf, p.log_ref, p.log_r, p.recipe.beta),
            "db": detailed_loops(p.log_flow, p.log_steps), "tb-huber": huber,
            "vargrad": vargrad_loops(p.log_pf, p.log_r), "distill": kl}

@pytest.mark.parametrize("name, K, L", [
    ("tb:gr=.7:lam=.3", 8, 3), ("tb:exact=0:chosen=logged:teacher=blend", 4, 3),
    ("tb:chosen=reward:gr=0", 3, 4), ("tb:debias=0", 48, 1), ("tb:teacher=cm", 2, 6)])
def test_what_a_loss_is_given_and_what_is_made_of_it(name, K, L, tiny, monkeypatch):
    weights = "--recipe=w_a=.3:w_y=.5:w_s=.2:debias=.5:trajectories=3:sharp=2"
    setup = prepared(*tiny, weights, f"--codes={K}", f"--levels={L}")
    recipe = recipe_of(name, setup.settings)
    recipe.loss = lambda p: p.log_pf.cumsum(1).square().mean()      # asks for the order
    policy = made(ids=setup.ids)
    frozen = made(ids=setup.ids, seed=1)
    train = setup.data.train = [history[:5] for history in setup.data.train]    # all is read
    setup.data.liked = [[item % 3 > 0 for item in history] for history in train]
    rows = [*gflowgr.training_rows(train, 4)][:3]
    packed = gflowgr.Packed(rows, setup.data.train, policy)
    batch = gflowgr.Batch(packed, setup.data, setup.reward(recipe))
    chosen = batch.r.bool().float().multinomial(1)              # what shall be drawn ∝ R
    drawn = batch.r.bool().float().multinomial(3)
    drawn[0, 1] = batch.positives[0]                            # path 0 again, if v is chosen
    drawn[1, 1] = chosen[1, 0]                                  # or if it is drawn ∝ R
    monkeypatch.setattr(gflowgr, "draw", lambda r, count: chosen if r is batch.r else None)
    def sampler(batch, *others):
        assert (*others, policy.training) == (3, policy, 0.5, False)    # no dropout
        return drawn
    monkeypatch.setitem(SAMPLERS, recipe.sampler, sampler)
    found = gflowgr.loss_of(recipe, policy.train(), frozen, batch, 0.5)
    assert policy.training
    first = {"logged": batch.positives[:, None], "reward": chosen, "": drawn[:, :0]}
    items = torch.cat([first[recipe.chosen], drawn], 1)
    p = gflowgr.Paths(recipe, policy, frozen, batch, drawn)
    p.log_flow, p.child_flow = gflowgr.path_flows(p), gflowgr.code_flows(p)
    p.log_ref = gflowgr.log_ref_of(p)
    for c, past in enumerate(batch.histories):
        wanted = paths_by_hand(recipe, setup, (policy, frozen), batch.users[c], past,
                               items[c].tolist())
        for what, row in wanted.items():
            have = getattr(p, what)
            close(have[c].clamp(min=-99), row.clamp(min=-99), msg=what)
    log_v = policy.path_log_probs(batch.histories, batch.positives[:, None]).sum((1, 2))
    close(p.log_v, log_v)
    close(found, recipe.lam * recipe.loss(p) - recipe.gr * log_v.mean())
    assert p.recipe == recipe and p.items.tolist() == items.tolist() and not p.log_ref.requires_grad
    close({name: fields["loss"](p) for name, fields in RECIPES.items() if "loss" in fields},
          losses_by_hand(p))
    close(gflowgr.loss_of(Recipe(), policy, None, batch, 0.5), -log_v.mean())       # SFT

# --- Training, changes in recipes -----------------------------------------------------------------
def trained(flags, name="sft", shift=0):      # from random weights → curve, all that was used
    setup = prepared(*flags, shift=shift)
    recipe = recipe_of(name, setup.settings)
    policy = setup.policy(0.1)
    curve = gflowgr.train(name, recipe, policy, setup)
    return curve, [setup.ids.codes, *policy.parameters()]

def test_same_seed_same_curve_and_no_leak_from_test_or_validation_items(tiny):
    one, again, other = [trained(tiny, "distill:teacher=blend", shift) for shift in (0, 0, 1)]
    assert one[0] == again[0] != other[0]                       # other validation items
    close(one[1], other[1], atol=0, rtol=0)

def test_a_run_depends_on_the_content_of_its_data_not_on_their_folder(tiny):
    setup = prepared(*tiny)
    made = gflowgr.made_with("tb", setup, {"sft": Recipe(), "tb": Recipe()})["data"]
    assert made["checksum"] == setup.data.sizes["checksum"] and "name" not in made
    assert setup.size == math.ceil(len(setup.rows) / 20) < setup.settings.batch

def test_rates_clipping_and_progress(tiny, monkeypatch):
    rates = []
    progress = []
    def loss_of(recipe, policy, reference, batch, share):
        progress.append(share if policy.training else "no dropout")
        return 100 * policy.flow_head.weight.sum()              # a gradient that has to be clipped
    def step(self, *_):
        rates.append([group["lr"] for group in self.param_groups])
        assert self.param_groups[1]["params"][0].grad.norm() < 1.001
    monkeypatch.setattr(gflowgr, "loss_of", loss_of)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    trained([*tiny, "--sft=epochs=4:rate=.005"])
    assert progress == [i / len(progress) for i in range(len(progress))]
    assert max(rates) == approx([0.005, 0.05])                  # ten-fold: the learned flows

def test_a_loss_that_is_nan_stops_its_run(tiny, monkeypatch):
    monkeypatch.setitem(RECIPES, "mine", dict(loss=lambda p: p.log_pf.mean() * math.nan))
    with pytest.raises(InputError, match=r"mine: loss nan at step 0; .* Users, from 0: \[\d+, "):
        trained(tiny, "mine")

def test_changes_come_in_the_order_real_recipe_name(monkeypatch):
    toy = gflowgr.parse([f"--data={ROOT / 'data/toy'}"])      # its truth.csv says: made up
    assert recipe_of("tb", toy) == recipe_of("tb", gflowgr.parse([])) == Recipe(**RECIPES["tb"])
    monkeypatch.setitem(RECIPES, "mine", dict(RECIPES["tb"], lam=10.0))
    monkeypatch.setattr(gflowgr, "REAL", {
        "Settings": dict(width=96), "sft": dict(epochs=3), "tb": dict(lam=5.0),
        "Recipe": dict(epochs=4, lam=4.0, sharp=4.0, w_s=0.0, dropout=0.3, teacher="blend")})
    settings = gflowgr.parse(["--data=real", "--recipe=w_a=6:beta=6", "--sft=rate=.5:dropout=.5"])
    assert settings.width == 96
    common = dict(epochs=4, sharp=4, w_a=6, beta=6, w_s=0, teacher="blend")
    for name, own, changes in (
            ("tb:exact=no", RECIPES["tb"], dict(common, lam=5, exact=False, dropout=0.3)),
            ("db:w_a=7", RECIPES["db"], dict(common, lam=4, w_a=7)),        # its own dropout stays
            ("mine", RECIPES["mine"], dict(common, dropout=0.3)),   # its lam, though that of Recipe
            ("tb+cm:debias=.5", dict(w_a=6, beta=6), dict(sharp=9, debias=0.5, teacher="blend")),
            ("cm:debias=1", dict(teacher="cm", sharp=1.0), dict(debias=1)),
            ("sft:epochs=8:rate=.1", RECIPES["sft"], dict(epochs=8, rate=0.1, dropout=0.5))):
        assert recipe_of(name, settings) == Recipe(**{**own, **changes}), name
    assert gflowgr.parse(["--quick", "--recipe=epochs=3"]).recipe == "epochs=1:epochs=3"

def test_guided_methods_need_their_policy_and_sft():
    settings = gflowgr.parse(["--methods=tb+cm:debias=1,sft+cm,cm"])
    names = ["sft", "tb", "tb+cm:debias=1", "sft+cm", "cm"]
    recipes, seeds = gflowgr.check_settings(settings)
    assert ([*recipes], seeds) == (names, [42])

# --- Own code: a mistake is one line, status 2, nothing trained, nothing written ------------------
def own(returned):                            # fit of a CM; returned: right scores → its scores
    def fit(histories, num_items):
        histories[0].clear()                                    # a copy: the data stay as they are
        return SimpleNamespace(scores=scores, popular="not used")
    def scores(histories):
        right = torch.ones(len(histories), 48)
        right[tokenizer.entries(histories)] = 0
        histories[0].clear()                                    # a copy, too
        return returned(right / right.sum(1, keepdim=True))
    return fit

def test_an_own_teacher(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(TEACHERS, "mine", own(torch.Tensor.double))     # as numpy has it
    methods = "--methods=mine:debias=9,sft+cm:teacher=mine:debias=1:sharp=3"
    settings = gflowgr.parse([*tiny, f"--out={tmp_path}", methods])
    lists = [run["lists"] for run in gflowgr.run(settings)["runs"]]
    data = load_data(settings.data)
    count = sum(data.train, []).count
    for history, row in zip(data.histories, lists[0]):          # divided by counts: rarer first
        assert [*map(count, row)] == sorted(map(count, {*range(48)} - {*history[:-1]}))[:10]
    saved = f"{tmp_path}/sft+cm,teacher=mine,debias=1,sharp=3-42"
    past = [history[:-1] for history in data.histories]
    assert gflowgr.load_model(saved).recommend(past)[0].tolist() == lists[2]
    monkeypatch.delitem(TEACHERS, "mine")
    refused("there is no teacher 'mine'; there are pop, cm, ", "--recommend=x", f"--model={saved}")

def raises(*given):
    return given[0].nothing

NO_CM = "scores has to return a tensor of floats ("
LINE = f"test_gflowgr.py, line {raises.__code__.co_firstlineno + 1}, in raises: AttributeError"

@pytest.mark.parametrize("what, wrong, said", [
    ("cm", own(lambda right: right * math.nan), NO_CM),
    ("cm", own(lambda right: right * 48), NO_CM), ("cm", own(lambda right: right / 48), NO_CM),
    ("cm", own(lambda right: 2 * right - torch.eye(48)[0]), NO_CM),
    ("cm", own(lambda right: right * 0), NO_CM),
    ("cm", own(lambda right: right[:, 1:]), NO_CM), ("cm", own(lambda right: None), NO_CM),
    ("cm", own(lambda right: torch.full_like(right, 1 / 48)), NO_CM),
    ("cm", own(raises), LINE), ("cm", raises, LINE), ("sampler", raises, LINE),
    ("sampler", lambda *given: policy_draws(*given).tolist(), ", 8], not list"),
    ("sampler", lambda *given: policy_draws(*given)[:, 1:], ", 7]"),
    ("sampler", lambda *given: policy_draws(*given) - 48, "items from 0 to 47"),
    ("sampler", lambda *given: policy_draws(*given) + 48, "items from 0 to 47"),
    ("sampler", lambda batch, *_: batch.r.topk(8, largest=False)[1], "not in batch.histories"),
    ("a,b", {}, "there is no method 'a'; there are "),
    ("recipe", raises, "RECIPES: ['recipe']: it has to be a dict"),
    ("svd", {}, "RECIPES: ['svd']: it has to be a dict, and not the name"),
    ("recipe", dict(loss=lambda p: (p.log_pf - p.log_z).mean()), "in <lambda>: RuntimeError The "),
    ("recipe", dict(loss=lambda p: p.log_pf.mean() * math.nan),
     "recipe: with an untrained policy, the loss is nan"),
    ("recipe", dict(RECIPES["tb"], lamda=2), "rate, dropout, epochs, beta, not ['lamda']"),
    ("recipe", dict(lam=2.0), "of recipe, one can change rate, dropout, epochs, not ['lam']"),
    ("recipe", dict(loss=lambda p: p.log_pf.sum(1)), "number that depends on P, not tensor(["),
    ("recipe", dict(loss=lambda p: 0.5), "loss <lambda>: "),
    ("recipe", dict(loss=lambda p: p.log_r.mean()), "number that depends on P, not tensor(-")])
def test_wrong_own_code(what, wrong, said, told, tiny, monkeypatch):
    method = {"cm": "sft+cm:teacher=cm", "sampler": "tb:sampler=sampler"}.get(what, what)
    place = {"cm": TEACHERS, "sampler": SAMPLERS}.get(what, RECIPES)
    monkeypatch.setitem(place, what, wrong)
    told(said, *tiny, f"--methods=sft,{method}")
    other = {"cm": "--methods=sft,cm", "recipe": "--oracle=recipe"}
    if what in other:
        told(said, *tiny, other[what])

def test_a_sampler_is_checked_at_each_step(tiny, tmp_path, monkeypatch):
    def late(batch, count, policy, progress):                   # right at the first step alone
        return batch.r.topk(count, largest=not progress)[1]
    monkeypatch.setitem(SAMPLERS, "late", late)
    refused("not in batch.histories", *tiny, f"--out={tmp_path}", "--methods=tb:sampler=late")

# --- The oracle, metrics, gains -------------------------------------------------------------------
@pytest.mark.parametrize("method", ["tb", "tb:exact=0"])                  # log Z: exact, learned
def test_trajectory_balance_reaches_the_reward(method, tmp_path, monkeypatch):
    TOY["write"](tmp_path, 30, 4, 3, 1)                         # P is .6 from R/Z at first
    drawn = []
    monkeypatch.setattr(figures, "plot_flows", lambda *arguments: drawn.append(arguments))
    flags = f"--codes=3 --width=32 --layers=1 --oracle={method}:trajectories=12".split()
    flags += ["--recipe=rate=.005:epochs=4"]
    status, out, err = cli(f"--data={tmp_path}", *flags, f"--out={tmp_path / 'a/new'}")
    assert status == 0, err
    before, after = map(float, re.findall(r"\d\.\d{4}", out[out.index("mean L1"):]))
    assert before > 0.5
    assert after <= 0.02
    [[*_, panels]] = drawn
    np.testing.assert_allclose(*panels.values(), atol=0.02)

def test_flows_are_drawn_as_bars_with_codes_and_titles(monkeypatch):
    axes = [*Figure().subplots(1, 2)]
    monkeypatch.setattr(figures, "picture", lambda *sizes: nullcontext(axes))
    panels = {"R/Z": [0.5, 0.2, 0.3], "P": [0.02, 0.004, 0.976]}
    figures.plot_flows("path", [[0, 0], [0, 1], [1, 1]], ["Ash", "Bay", "Cat"], panels)
    names = "root", "code 1", "code 2"
    for axis, title, bars, texts in zip(axes, panels, (
            # (level, from, height) of the root, of (0) and (1), of the items
            [(0, 0, 1), (1, 0.3, 0.7), (1, 0, 0.3), (2, 0.5, 0.5), (2, 0.3, 0.2), (2, 0, 0.3)],
            [(0, 0, 1), (1, 0.976, 0.024), (1, 0, 0.976), (2, 0.98, 0.02), (2, 0, 0.976)]), (
            ["all", *"01", *"011", "50% Ash", "20% Bay", "30% Cat"], ["all", "1", "1", "98% Cat"])):
        found = [(bar.get_x(), bar.get_y(), bar.get_height()) for bar in axis.patches]
        np.testing.assert_allclose(found, bars, atol=1e-9)      # without Bay's .004
        assert axis.get_title() == title
        said = [text.get_text() for text in axis.texts if text.get_text()]
        assert sorted(said) == sorted([*texts, *names])
        below = [(text.get_position()[0], text.get_text()) for text in axis.texts
                 if text.get_position()[1] < 0]
        assert below == [*zip((0.5, 1.5, 2.5), names)]          # each in the middle of its bars
        assert axis.get_xlim()[1] > max(text.get_position()[0] for text in axis.texts) > 3
        assert axis.get_xlim()[0] == axis.get_ylim()[0] == 0
        colors = [bar.get_facecolor() for bar in axis.patches]  # that of the root leads to Ash
        assert [color == colors[0] for color in colors] == [sum(bar[1:]) == 1 for bar in bars]
        assert {bar.get_width() for bar in axis.patches} == {1}

def test_lines_are_named_in_a_legend(monkeypatch, tmp_path):
    found = []
    def legend(axis):
        found.extend(axis.get_legend_handles_labels()[1])
    monkeypatch.setattr("matplotlib.axes.Axes.legend", legend)
    lines = {"one": [(0, 0), (1, 1)], "a point": [(0, 1)], "two": [(1, 0), (0, 1)]}
    report.figures.plot_lines(tmp_path / "lines.png", lines, "x", "y")
    assert found == ["one", "two"]

def test_exposure_of_several_users_by_hand():
    data = SimpleNamespace(titles=list("012345"), truth={
        "liked": [{0, 1, 2, 5}, {2, 3}, set(), {1, 2, 4}, {0}], "theme": list("bcdacb"),
        "shown": [{0, 1, 2}, {2, 3, 4}, {2}, set(), set()]})
    lists = np.array([[5, 2, 3], [2, -1, -1], [1, 0, 4], [2, 4, 0], [-1, -1, -1]])
    found = report.exposure(lists, data)
    assert found["hidden@10"].tolist() == [1 / 1, 0, 0, 2 / 3, 0 / 1]
    assert found["liked@10"].tolist() == [2 / 3, 1, 0, 2 / 3, 0]
    # Their three themes: bcd, adb, abc, cda, bac. Of themes with as many liked items, a comes first
    assert found["themes@10"].tolist() == [2, 1, 2, 2, 0]

def test_paired_gains_resample_the_ratio():
    base, other = np.random.default_rng(0).random((2, 2, 500))
    few = np.array([[1.0, 0, 0, 0]])                            # many samples hold only zeros
    cases = ((1.2 * base + 0.05 * other, base), (other, base), (0 * base, base), (3 * few, few))
    for own, base in cases:                                     # of (seeds, users)
        ratio = own.mean() / base.mean()                        # its standard error: delta method
        error = (own - ratio * base).mean(0).std() / math.sqrt(base.shape[1]) / base.mean()
        gain = ratio - 1
        wanted = {"gain": gain, "low": gain - 1.96 * error, "high": gain + 1.96 * error}
        runs = [[{"by_user": {"x": x, "zero": 0 * x}} for x in method] for method in (own, base)]
        assert report.paired_gains(*runs) == {"x": approx(wanted, abs=error / 4 + 1e-9)}
    assert (report.bootstrap(7).sum(1) == [7] * 500).all()      # 500 samples of 7 of 7 users

# --- A run, --resume, saved models ----------------------------------------------------------------
METHODS = "pop cm:debias=.5 sft tb tb:trajectories=3 sft-continued tb+cm:sharp=3".split()

def results_in(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))

@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "a/new/place"
    names = [*METHODS[:2], *METHODS[3:]]                        # where they begin is added: sft
    flags = [*tiny, f"--out={out}", "--seeds=1, 2", f"--methods={', '.join(names)}"]
    status, printed, err = cli(*flags)
    assert status == 0, err
    return SimpleNamespace(out=out, flags=flags, printed=printed, data=load_data(flags[0][7:]),
                           results=results_in(out), runs=results_in(out)["runs"])

def test_every_run_counts_and_its_saved_model_serves_what_was_measured(finished):
    assert [run["method"] for run in finished.runs] == 2 * METHODS
    past = [history[:-1] for history in finished.data.histories]
    targets = torch.tensor([history[-2:] for history in finished.data.histories])
    for run in finished.runs:
        name = run["method"]
        assert all(0 <= seconds < 600 for seconds in run["seconds"].values())
        lists = torch.tensor(run["lists"])
        expected = ndcg_loops(lists, targets[:, 1], 10)
        assert run["by_user"]["ndcg@10"] == approx(expected.tolist(), abs=1e-6)
        expected = recall_loops(lists, targets[:, 1], 5)
        assert run["metrics"]["recall@5"] == approx(expected.mean().item(), abs=1e-6)
        listed = {*lists.flatten().tolist()} - {-1}
        assert run["metrics"]["coverage@10"] == len(listed) / 48
        if name in METHODS[2:]:
            model = gflowgr.load_model(finished.out / f"{name}-{run['seed']}".replace(":", ","))
            assert model.recommend(past)[0].tolist() == run["lists"]
        if name in METHODS[2:6]:                                # trained; the last epoch was saved
            ndcg = ndcg_loops(model.recommend(finished.data.train)[0], targets[:, 0], 10).mean()
            assert run["curve"][-1]["score"] == approx(ndcg.item())
    pop, _, sft, *others = finished.runs[:6]
    for run in others:                                          # fine-tuning starts from SFT
        assert run["curve"][0]["score"] == sft["curve"][-1]["score"]
    counts = np.bincount(sum(finished.data.train, []), minlength=48)
    for history, row in zip(past, pop["lists"]):
        assert counts[row].tolist() == sorted(np.delete(counts, history))[:-11:-1]

def test_a_run_leaves_the_table_and_the_picture(finished, monkeypatch, tmp_path):
    table = (finished.out / "results.md").read_text("utf-8")
    assert table in finished.printed
    assert (finished.out / "measures.png").read_bytes()[:4] == b"\x89PNG"
    drawn = {}                                # name at the end of a line: its points
    def annotate(axis, name, place, *_, **__):
        drawn["axes"] = axis
        drawn[name] = [[*place]] + axis.lines[-1].get_xydata().tolist()
    monkeypatch.setattr("matplotlib.axes.Axes.annotate", annotate)
    about = {what: finished.results[what] for what in ("data", "settings", "versions")}
    report.finish(tmp_path, finished.runs, about, finished.data)
    assert (drawn["axes"].get_xlabel(), drawn["axes"].get_ylabel()) == ("NDCG@10", "liked@10")
    summary = finished.results["summary"]
    base = summary["sft"]["ndcg@10"]["mean"]
    for method, metrics in summary.items():
        own = [run["metrics"]["ndcg@10"] for run in finished.runs if run["method"] == method]
        mean = np.mean(own)
        assert metrics["ndcg@10"] == approx({"mean": mean, "std": np.std(own, ddof=1)})
        assert f"| {method} | {mean:.4f} |" in table
        assert method == "sft" or f"| {mean / base - 1:+.0%} [" in table
        assert drawn[method] == 2 * [[approx(mean), metrics["liked@10"]["mean"]]]

def test_a_killed_run_goes_on_and_nothing_finished_is_lost(finished, tmp_path, monkeypatch):
    flags = [*finished.flags, f"--out={tmp_path}", "--seeds=1"]
    dropouts = []                                               # a policy is measured 3 times
    def validate(policy, data, original=gflowgr.validate):
        dropouts.append(policy.lm.transformer.drop.p)
        if len(dropouts) in (8, 15):                            # in the second tb; in the third SFT
            raise KeyboardInterrupt
        return original(policy, data)
    monkeypatch.setattr(gflowgr, "validate", validate)
    stopped = (130, "stopped; --resume keeps the finished methods of a run\n")
    assert cli(*flags)[::2] == stopped
    assert dropouts == [0.4] * 3 + [0.0] * 5                    # of sft, tb, tb:trajectories=3
    assert cli(*flags, "--resume")[1].count("kept, as it was finished") == 4
    runs = results_in(tmp_path)["runs"]
    for run, other in zip(runs, finished.runs[:7], strict=True):    # of a run without a break
        assert run == {**other, "seconds": run["seconds"]}
    assert cli(*flags)[::2] == stopped                          # without --resume: all anew
    left = {path.parent.name for path in tmp_path.glob("*/run.json")}
    assert left == {f"{name}-1".replace(":", ",") for name in METHODS} - {"sft-1"}
    assert results_in(tmp_path)["runs"] == runs
    gflowgr.load_model(tmp_path / "tb-1")
    assert not (tmp_path / "sft-1/semantic_ids.json").exists()  # the old model went with its run
    assert "kept" in cli(*flags, "--resume", "--methods=pop", "--width=16")[1]  # pop has no width
    report.write(tmp_path / "pop-1/run.json", [])
    refused("pop-1/run.json cannot be read; delete this file", *flags, "--resume")

@pytest.mark.parametrize("flag, said", [
    ("--window=9", "--window = 8, now it is 9; choose another --out"), ("--width=16", "--width = "),
    ("--data=toy --codes=16", "data = "), ("--ids=content", "IDs ("), ("--batch=8", "--batch = "),
    ("--layers=2", "--layers = "), ("--sft=epochs=3:rate=.005", "sft: epochs = "),
    ("--recipe=epochs=2:rate=.005:w_s=.5", "w_s = 0.05, now it is 0.5")])
def test_resume_refuses_what_was_made_otherwise(flag, said, finished):
    for resume in (["--resume"], []):                           # nothing finished is overwritten
        refused(said, *finished.flags, *resume, *flag.split())

@pytest.mark.parametrize("file, text", [
    ("semantic_ids.json", None), ("config.json", "{"), ("model.safetensors", None),
    ("semantic_ids.json", '{"num_codes": 4, "codes": [[1]], "beams": 9, "catalogue": {}}')])
def test_a_spoiled_folder_is_one_line_and_no_pickle_is_read(file, text, tmp_path):
    policy = made()
    policy.save_pretrained(tmp_path)
    close(Policy.from_pretrained(tmp_path).recommend(HISTORIES), policy.recommend(HISTORIES))
    mode, other = [(tmp_path / f).stat().st_mode for f in ("config.json", "model.safetensors")]
    assert mode == other                                        # who can read one can read both
    torch.save(policy.lm.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / file).unlink()
    if text:
        (tmp_path / file).write_text(text)
    refused("holds no saved model", "--recommend=x", "--model", tmp_path)

def test_while_weights_are_written_the_folder_holds_no_model(tmp_path, monkeypatch):
    policy = made()
    policy.save_pretrained(tmp_path)
    monkeypatch.setattr(policy.lm, "save_pretrained", lambda folder: 1 / 0)     # a full disk
    with pytest.raises(ZeroDivisionError):
        policy.save_pretrained(tmp_path)
    refused("holds no saved model", "--recommend=x", "--model", tmp_path)

@pytest.mark.parametrize("name", ["tb-1", "tb+cm,sharp=3-1"])
def test_recommend_prints_ten_titles(name, finished, monkeypatch):
    titles = finished.data.titles
    monkeypatch.chdir(finished.out / name)
    asked = ["--model=.", "--recommend", titles[3].upper(), "5"]
    items, _ = gflowgr.load_model(".").recommend([[3, 5]])
    assert cli(*asked)[1].splitlines()[-10:] == [titles[v] for v in items[0]]
    refused(titles[3], *asked[:-1], titles[3][:-1] + "x")
    refused("none is left", *asked[:-2], *titles)
    assert cli(*asked[:-2], *titles[1:])[1].splitlines()[-1] == titles[0]       # it alone is left
    if "+cm" in name:                         # it is served while its data last
        text = Path("semantic_ids.json").read_text()
        Path("semantic_ids.json").write_text(text.replace('"interactions": ', '"interactions": 1'))
        refused("changed since", *asked)
        Path("semantic_ids.json").write_text(text)

# --- Data -----------------------------------------------------------------------------------------
ITEMS = "item_id,title\na,Alpha\nb,Beta\nc,Gamma\nd,Delta\n"
EVENTS = "user_id,item_id,position\nu,a,0\nu,b,1\nu,c,2\nv,b,0\nv,c,1\nv,d,2\n"

def folder_of(path, items=ITEMS, events=EVENTS):
    path.mkdir(exist_ok=True)
    (path / "items.csv").write_text(items)
    (path / "interactions.csv").write_text(events)
    return path

def test_ids_from_a_file_and_devices(tmp_path, capsys, monkeypatch):
    folder = folder_of(tmp_path)
    for a, b, c in (("70000,5", "9,0", "70001,0"), ("1,1", "0,0", "2,0")):      # no gaps
        (folder / "ids.csv").write_text(f"item_id,x,y\na,{a}\nb,{b}\nc,{c}\nd,{b}\nz,7,7\n")
        ids = prepared(f"--data={folder}", f"--ids={folder / 'ids.csv'}").ids
        assert ids.num_codes == 3                               # b and d had the same:
        assert ids.codes.tolist() == [[1, 1, 0], [0, 0, 0], [2, 0, 0], [0, 0, 1]]
    assert "1 items have the ID of another" in capsys.readouterr().out
    assert load_data("toy", quick=True).sizes["users"] == 100   # of 698, each seventh
    setup = prepared("--data=toy")
    assert setup.ids.num_codes == 32                            # 720 / 24 = 30; a power of 2
    setup.settings.device = "meta"
    assert all(x.is_meta for x in setup.policy().state_dict().values())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = gflowgr.parse([])
    gflowgr.check_settings(settings)
    assert settings.device == "cuda"

def test_two_users_and_nine_items_without_text_or_truth_work_as_they_are(tmp_path):
    events = EVENTS.replace("b,1", "b,2") + "u ,a ,9\nw,a,1\nw,b,1\n"
    folder = folder_of(tmp_path / "d", "\n".join(["item_id", *"abcdefghi"]), events)
    status, out, err = cli("--data", folder, "--out", tmp_path / "out", "--quick")
    assert status == 0, err
    assert "dropped: 1 repeats of an item, 1 users with < 3 items" in out
    assert "| sft+cm | " in out
    printed = dict(re.findall(r"(\S+), seed 42: (\S+=\S+)\n", out))    # what is not as in Recipe
    assert printed["sft"].endswith("epochs=1")
    for change in ":".join(printed.values()).split(":"):
        assert str(gflowgr.FIELDS[change.partition("=")[0]]) != change.partition("=")[2]
    assert "liked@10" not in out
    assert cli("--data", folder, "--out", tmp_path / "no_sft", "--methods=cm")[0] == 0

def test_the_toy_world_is_as_committed_and_popularity_can_be_earned(tmp_path, monkeypatch):
    def prepare(*flags):
        monkeypatch.setattr("sys.argv", ["prepare.py", f"--out={tmp_path}", *flags])
        runpy.run_path(str(ROOT / "data/toy/prepare.py"), run_name="__main__")
    prepare()
    for name in ("items.csv", "interactions.csv", "truth.csv"):
        assert (tmp_path / name).read_bytes() == (ROOT / "data/toy" / name).read_bytes()
    assert len({*TOY["make_titles"](120, 12)}) == 1440
    together = []                                               # how far likes go with showing
    for quality in (0, 0.5, 1):
        prepare(f"--quality={quality}", "--items=40")
        data = load_data(str(tmp_path))
        users = [data.truth[what] for what in ("liked", "shown")]
        counts = [np.bincount([*itertools.chain(*sets)], minlength=480) for sets in users]
        together.append(np.corrcoef(*counts)[0, 1])
    assert -0.2 < together[0] < 0.1
    assert together[0] + 0.2 < together[1] < together[2] - 0.2
    (tmp_path / "truth.csv").unlink()                           # so it may be somebody's own log
    for flag in ("--items=121", "--quality=1.1", "--seed=-1", "--seed=4"):
        with pytest.raises(SystemExit, match="2"):
            prepare(flag)
    assert load_data(str(tmp_path)).histories == data.histories

SOURCES = {
    "beauty": {"index": json.dumps({v: [f"<a_{v}>", "<b_7>", "<c_2>", "<d_6>"] for v in "0123"}),
               "inter": '{"u": ["0", "2", "1"]}',
               "item": '{"0": {"title": "A\\nsoap", "brand": null, "categories": [["Hair"]]}}'},
    "ml-100k": {"item": "id\ttitle\tyear\tclass\na\tA\t1990\tx\nb\tB\t1991\tx\nc\tC\t1992\ty",
                "inter": "user\tid\tstars\ttime\nu\ta\t1\t3\nu\tb\t2\t2\nu\tc\t3\t1"}}

@pytest.mark.parametrize("name, titles, history, liked", [
    ("beauty", ["A soap", "1", "2", "3"], [0, 2, 1], [True] * 3),
    ("ml-100k", ["A (1990)", "B (1991)", "C (1992)"], [2, 1, 0], [True, False, False])])
def test_real_logs_are_converted_or_refused(name, titles, history, liked, tmp_path):
    script = runpy.run_path(str(ROOT / f"data/{name}/prepare.py"))
    source = tmp_path if name == "beauty" else tmp_path / "wheel"
    with zipfile.ZipFile(tmp_path / "wheel", "w") as wheel:
        for table, text in SOURCES[name].items():
            wheel.writestr(f"recbole/dataset_example/ml-100k/ml-100k.{table}", text)
            (tmp_path / f"Beauty.{table}.json").write_text(text)
    for table in script["SHA256"]:                              # each is refused, then read
        with pytest.raises(OSError, match="has another SHA-256"):
            script["prepare"](source)
        script["SHA256"][table] = hashlib.sha256(SOURCES[name][table].encode()).hexdigest()
    script["prepare"](source, tmp_path)
    data = load_data(str(tmp_path))
    assert (data.titles, data.histories, data.liked) == (titles, [history], [liked])
    assert data.train == [history[:1]]                          # two are for validation and test
    if name == "beauty":
        assert (tmp_path / "letter_ids.csv").read_text().split()[-1] == "3,3,7,2,6"

# --- Help, docstrings, pages ----------------------------------------------------------------------
def test_help_names_all_and_shows_an_example():
    words = " ".join(cli("--help")[1].split()).replace("- ", "-")     # wrapped there
    for name in (*gflowgr.FIELDS, *SAMPLERS, *RECIPES, *TEACHERS, "example: --methods"):
        assert re.search(rf"\b{name}\b", words)

@pytest.mark.parametrize("module", [gflowgr, reward, tokenizer, folder_of_data, report, figures])
def test_examples_in_docstrings(module):
    assert doctest.testmod(module).failed == 0

@pytest.fixture
def by_itself(tmp_path, monkeypatch):         # what a page replaces, adds, writes is gone after it
    for name in ("RECIPES", "SAMPLERS", "REAL"):
        monkeypatch.setattr(gflowgr, name, copy.deepcopy(getattr(gflowgr, name)))
    monkeypatch.setitem(TEACHERS, "near", None)
    monkeypatch.chdir(tmp_path)

@pytest.mark.parametrize("page", ["README", *"data/example data/own data/course data/log "
                                  "data/results".split()])
def test_code_and_commands_on_the_pages(page, by_itself):
    text = (ROOT / f"{page}.md").read_text(encoding="utf-8").replace("```", "")
    test = doctest.DocTestParser().get_doctest(text, {}, page, None, 0)
    assert doctest.DocTestRunner().run(test).failed == 0        # one script, in order
    for line in re.findall(r"(?:gflowgr\.py |[`\"])(--[^`\"\n]+)", text.replace("\\\n", "")):
        if re.search("--(methods|oracle|recipe|sft) (?!.*(…|[A-Z]{3}))", line):     # it is whole
            settings = gflowgr.parse(shlex.split(line, comments=True))
            for name in (*gflowgr.check_settings(settings)[0], settings.oracle or "tb"):
                recipe_of(name, settings)

def test_the_figures_on_the_pages_were_made_with_these_defaults():
    made = [Recipe(), gflowgr.Settings()]
    for data in ("toy", "real"):                                # "real" is no made-up world
        settings = gflowgr.parse([f"--data={data}"])
        made += [settings, *[recipe_of(name, settings) for name in (*RECIPES, "sft+cm")]]
    for function in (CollaborativeModel, Policy, Reward, Teacher, TOY["write"],
                     tokenizer.item_vectors, tokenizer.item_features, tokenizer.kmeans,
                     Setup.policy):
        made.append(inspect.signature(function))
    text = re.sub(" at 0x[0-9a-f]+", "", repr(made))
    checksum = zlib.crc32(text.encode())
    assert checksum == 2498366704, "run the commands of the pages anew, then change this number"

@pytest.mark.parametrize("page, pictures", [
    ("course", ["loop"]), ("results", ["diverse", "measures"])])
def test_scripts_on_the_pages_in_short(page, pictures, by_itself, monkeypatch):
    def parse(argv, original=gflowgr.parse):
        return original([*argv, "--quick", "--seeds=42"])
    monkeypatch.setattr(gflowgr, "parse", parse)
    Path("data/pictures").mkdir(parents=True)
    text = (ROOT / f"data/{page}.md").read_text("utf-8")
    if page == "results":                                       # what its command leaves behind
        gflowgr.run(parse(["--methods=sft", "--out=runs/all"]))
        [names] = re.findall("--methods (.*) --out runs/all", text)
        metrics = {"ndcg@10": {"mean": 0.3}, "liked@10": {"mean": 0.5}}
        report.write("runs/all/results.json", {"summary": dict.fromkeys(names.split(","), metrics)})
    for script in re.findall("```\n((?:from|import) .*?)```", text, re.DOTALL):
        script = re.sub(r"\(42, [\d, ]+\)", "(42,)", script.replace("rounds=5", "rounds=1"))
        script = re.sub('for name in .".*".:', 'for name in ("sft",):', script)
        exec(script, {"__name__": page})
    assert sorted(path.stem for path in Path("data/pictures").iterdir()) == pictures
    if page == "results":                                       # who knows the world is far above
        few = json.loads(Path("runs/few/results.json").read_text())["paired"]
        assert {*few} == {"tb", "tb-few", "vargrad-few", "listnet-few", "grpo-few"}
        found = json.loads(Path("runs/limit.json").read_text())
        assert (np.max(found["limit"], 0) > (0.42, 0.92)).all()
        assert (np.array(found["groups"]) > [(0.4, 0.77), (0.37, 0.88)]).all()

# --- Bad flags and files: one line on stderr, exit status 2, nothing written ----------------------
@pytest.mark.parametrize("name, largest", [
    ("dropout", 0.9), ("debias", 9.9), ("sharp", 19.9), ("trajectories", 128), ("codes", 65536),
    ("levels", 16), ("window", 1024), ("width", 1024), ("layers", 16), ("beams", 1024),
    ("batch", 1024), ("epochs", 10 ** 9 - 1)])
def test_the_largest_numbers(name, largest):
    check_numbers("--", SimpleNamespace(**{name: largest}))
    with pytest.raises(InputError, match=f"--{name} .* is out of range"):
        check_numbers("--", SimpleNamespace(**{name: largest + 1}))

@pytest.mark.parametrize("said, flag", [
    ("no folder nowhere", "--data=nowhere"),
    ("go together", "--recommend=x"),
    ("--seeds 9999999999999999999 are not numbers", "--seeds=9999999999999999999"),
    ("--device nonsense", "--device=nonsense"),
    ("--ids nonsense is not content, mixed or", "--ids=nonsense"),
    ("do not fit into 2^1", "--codes=2 --levels=1"),
    ("--width 100000 is out of range: above 0, below 1025", "--width=100000"),
    ("--ids content needs", "--ids=content"),
    ("--codes 65537 is out of range", "--codes=65537"),
    ("--codes 2002: more than the 2001 items", "--codes=2002"),
    ("--oracle sft", "--oracle=sft"), ("there is no method 'x'", "--oracle=x"),
    ("there is no method ''; there are pop, ", "--methods=tb,"),
    ("tb:sampler=x: sampler has to be one of ['session', ",
     "--data=nowhere --methods=tb:sampler=x"),
    ("fields are ['gr', 'lam', 'sampler', ", "--recipe=loss=x"),
    ("of tb, one can change gr, lam, ", "--methods=tb:loss=x"),
    ("of sft, one can change rate, dropout, epochs, not ['lam=3']", "--methods=sft:lam=3"),
    ("of sft, one can change rate, dropout, epochs, not ['w_s=0']", "--sft=w_s=0:rate=.1"),
    ("rate nan is out of range", "--methods=tb:rate=nan"),
    ("debias or sharp is too large", "--methods=sft+cm:teacher=pop:sharp=19"),
    ("there is no method 'cm+cm'", "--methods=cm+cm"),
    ("sharp, not ['lam=9']", "--methods=tb+cm:lam=9"),
    ("nowhere.csv", "--ids=nowhere.csv"),
    ("it compares paths: trajectories > 1", "--methods=listnet:trajectories=1"),
    ("it compares paths: trajectories > 1", "--methods=vargrad:trajectories=1"),
    ("it compares paths: trajectories > 1", "--methods=grpo:trajectories=1")])
def test_a_wrong_flag_is_one_line_and_status_2(said, flag, told, tmp_path):
    folder = folder_of(tmp_path / "d", "\n".join(["item_id", *"abcd", *map(str, range(1997))]))
    told(said, f"--data={folder}", *flag.split())

def test_without_beauty_one_line_says_how_to_get_it(told, tmp_path, monkeypatch):
    (tmp_path / "beauty").mkdir()
    script = (ROOT / "data/beauty/prepare.py").read_text("utf-8")
    (tmp_path / "beauty/prepare.py").write_text(script, "utf-8")
    monkeypatch.setattr(folder_of_data, "__file__", str(tmp_path / "__init__.py"))
    told("no Beauty yet; download Beauty.inter.json", "--data=beauty")
    (tmp_path / "ml-100k").mkdir()                              # this one is fetched
    (tmp_path / "ml-100k/prepare.py").write_text("def fetch(): raise OSError('no network')")
    told("no network", "--data=ml-100k")

@pytest.mark.parametrize("said, file, text", [
    ("no column item_id", "items", ""),
    ("UTF-8", "items", "é\n"),
    ("the same name", "items", "item_id,x,x\n"),
    ("expected after", "items", 'item_id,x\n"a"b,x\n'),
    ("items.csv, line 6: item 'a' stands twice", "items", ITEMS + "a,Again\n"),
    ("no user has three", "interactions", EVENTS[:37] + "u,a,2\n"),
    ("line 8 needs as many fields", "interactions", f"{EVENTS}w,a,1,1\n"),
    ("line 8: user_id is blank", "interactions", f"{EVENTS}\t,a,0\n"),
    ("line 8: items.csv has no item 'x'", "interactions", f"{EVENTS}w,x,0\n"),
    ("line 8: inf and nan", "interactions", f"{EVENTS}w,a,nan\n"),
    ("line 8: inf and nan", "interactions", f"{EVENTS}w,a,inf\n"),
    ("shown: items.csv has no item 'x'", "truth", "user_id,liked,shown\nu,a,a x\nv,a,a\n"),
    ("no line for 1 items of items.csv, ['d']", "ids", "item_id,x\na,1\nb,2\nc,3\n"),
    ("ids.csv, line 3: item 'a' stands twice", "ids", "item_id,x\na,1\na,2\n"),
    ("line 2: write 1 to 6 codes", "ids", "item_id,x\na,1.5\n")])
def test_a_wrong_file_is_one_line_and_status_2(said, file, text, told, tmp_path):
    folder = folder_of(tmp_path / "d")
    (folder / "ids.csv").write_text("item_id,x\na,1\nb,2\nc,3\nd,4\n")
    (folder / f"{file}.csv").write_text(text, "latin-1")
    told(said, f"--data={folder}", f"--ids={folder / 'ids.csv'}")

def test_the_speed_of_jobs_is_told(capsys):
    assert main(["--speed", "--tiny"]) == 0
    assert len(re.findall(r" \d+\.\d{3} \(", capsys.readouterr().out)) == 8

# === Speed, in the world of the first command =====================================================
def decoding(policy, histories):              # generate is held to the legal codes
    ids = policy.semantic_ids
    allowed = {}
    for row in (ids.codes + ids.num_codes * torch.arange(3)).tolist():
        for level, token in enumerate(row):
            allowed.setdefault(tuple(row[:level]), {})[token] = None
    tokens = gflowgr.pack_histories(histories, policy).tokens
    generate = partial(
        policy.lm.generate, tokens, attention_mask=tokens * 0 + 1, num_beams=20, max_new_tokens=3,
        num_return_sequences=20, renormalize_logits=True, pad_token_id=policy.user_token,
        prefix_allowed_tokens_fn=lambda _, row: list(allowed[tuple(row[21:].tolist())]))
    return {"recommend": partial(policy.recommend, histories), "generate": generate,
            "drawn": partial(policy.recommend, histories, sample=1.0)}

def packing(policy, histories):               # a step on rows of 8 branches; on 8 times the rows
    items = torch.randint(720, (len(histories), 8))
    packed = gflowgr.pack_histories(histories, policy)
    one_a_row = gflowgr.pack_histories([past for past in histories for _ in range(8)], policy)
    def step(packed, items):
        policy(packed, items)[0].sum().backward()
    return {"packed": partial(step, packed, items),
            "one a row": partial(step, one_a_row, items.view(-1, 1))}

def steps(policy, setup):                     # four steps of methods
    def run(method):
        recipe = recipe_of(method, setup.settings)
        reward = recipe.loss and setup.reward(recipe)
        some = gflowgr.batches(setup, policy, reward, np.random.default_rng(0))
        for batch in itertools.islice(some, 4):
            gflowgr.loss_of(recipe, policy, policy, batch, 0.5).backward()
    return {method: partial(run, method) for method in ("sft", "distill", "tb")}

def speed(tiny):                              # least seconds of each; how many times the first's
    setup = Setup(0, load_data("toy", quick=tiny), gflowgr.parse(["--device=cpu"]))
    policy = setup.policy().eval()
    histories = [list(range(user, user + 20)) for user in range(4 if tiny else 64)]
    for what, jobs in (("lists", decoding(policy, histories)),
                       ("8 paths", packing(policy, histories)), ("4 steps", steps(policy, setup))):
        seconds = [min(timeit.repeat(job, number=1, repeat=4)) for job in jobs.values()]
        cells = [f"{name} {s:.3f} ({s / seconds[0]:.1f})" for name, s in zip(jobs, seconds)]
        print(f"{what:8}", *cells, sep="  ", flush=True)

def main(argv):                               # → exit status
    match argv:
        case ["--stub", name] | ["--stub", name, "--hint"] if name in EXERCISES:
            print(stub(EXERCISES[name], hint="--hint" in argv))
        case ["--stub", *names] | ["--grade", _, *names] if {*names} - {*EXERCISES}:
            there = ", ".join(EXERCISES)
            wrong = max({*names} - {*EXERCISES})
            print(f"there is no exercise {wrong}; there are {there}", file=sys.stderr)
            return 2
        case ["--list"]:
            for name, exercise in EXERCISES.items():
                more = "" if exercise.answer else ", no answer in this file"
                part = "project" if exercise.session == 4 else f"session {exercise.session}"
                print(f"{part:10} {name:28}{exercise.minutes:3} minutes{more}")
        case ["--grade", path, *names]:
            return grade_all(path, names)
        case ["--speed"] | ["--speed", "--tiny"]:
            speed(tiny="--tiny" in argv)
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0

if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main(sys.argv[1:]))
    sys.exit(130)
