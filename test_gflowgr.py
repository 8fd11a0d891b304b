"""The exercises and their grader, the tests of GFlowGR. Tests: python -m pytest -q

    python test_gflowgr.py --list                           the exercises
    python test_gflowgr.py --stub NAME FILE [--hint]        append the beginning of one to a file
    python test_gflowgr.py --grade FILE [NAME …]            what is right in a file, or of it
    python test_gflowgr.py --grade FOLDER [NAME …]          all .py files below, and a table

Teachers: Linux and macOS. Each exercise of a file runs in a process of its own, for 60 seconds at
most, with your rights: it can read and delete what you can. What it prints is not shown. A function
that simply calls the project's own, or an answer of this file, is not right; who tries harder can
cheat. The exit status is 0 if all is right, 1 if not, 2 for a wrong command.
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
import traceback
import zipfile
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from matplotlib.figure import Figure
from pytest import approx

import data as folder_of_data
import gflowgr
import reward
import tokenizer
from data import InputError, figures, load_data, report
from gflowgr import METHODS, NEVER, Policy, Recipe, SAMPLERS, recipe_of
from reward import SVD, TEACHERS, CollaborativeModel, Teacher
from tokenizer import SemanticIDs

ROOT = Path(gflowgr.__file__).parent
sys.path.append(str(ROOT / "data/experiments"))
PAPERS = copy.copy(METHODS)                   # those of gflowgr.py alone
import rivals                                 # adds its own to METHODS
TOY = runpy.run_path(str(ROOT / "data/toy/prepare.py"))
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR")    # of torch: it calls them "beta"
close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4, check_dtype=False)

# === Exercises, in the order of the course ========================================================
# A block: cases, the first to check by hand; the answer in plain loops, with which a student's is
# compared; typical mistakes, each of which has to fail in a case; the registration.
# A case: what it is, and the inputs.
EXERCISES = {}                                                  # name → Exercise

@dataclass
class Exercise:
    """A function to write. Its signature and docstring are the task that a student reads."""
    session: int
    minutes: int
    task: object                    # the function of the project, or only a docstring
    answer: object                  # in plain loops
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
        self.task.__signature__ = inspect.signature(self.task)  # the grader changes its code

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
    cm = CollaborativeModel(log, n, **options)
    cm.log = log                              # for near_loops, and for messages
    return cm
def cm_cases():
    small = counted([[0, 1, 2]], 4, popularity=0.0)
    # near[0, 1] = 0.8^0 = 1 and near[0, 2] = 0.8^1 = 0.8: shares 1/1.8 and 0.8/1.8
    yield "near[0] = 0, 1, .8, 0; without popularity", (small, [[0]])
    yield "31 histories", (counted(LOG, 25), USERS)
def near_loops(log, j, v):                    # near[j, v]
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
         "self.popular (n,) is count + 1. A row is 0 if the\n"
         "history has all items. The rest is what `shares` does, with s = self.popularity:\n"
         + inspect.getdoc(reward.shares))
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
Exercise(2, 20, rivals.vargrad, vargrad_loops, vargrad_cases, [divides_by_one_less],
         learned=("log_pf",), given=
         "TB without log Z: log P, log R of paths (C, J) → scalar. If P = R/Z, their difference\n"
         "tells log Z on every path. Its mean over a context's J paths replaces log Z in TB.")
# --- Session 2: subtb (30 minutes) ----------------------------------------------------------------
def subtb(log_flow, log_steps):
    """SubTB: log F(s_0) … log F(s_L) = log R (C, J, L+1), log P_F of each step (C, J, L) → scalar.
    At the optimum, a sum like TB's is 0 on every sub-path s_i → s_j, i < j, with F(s_i) and F(s_j)
    in place of Z and R. Mean of its square over all L(L+1)/2 sub-paths, over C and over J."""
def subtb_cases():
    # s_0 → s_1: 2 + 0 − 0; s_0 → s_2: 2; s_1 → s_2: 0. (2² + 2² + 0²) / 3
    log_flow = torch.tensor([[[2.0, 0.0, 0.0]]])
    yield "2 steps: log F = 2, 0, 0; P = 1, 1", (log_flow, torch.zeros(1, 1, 2))
    # the three sub-paths from s_0 are −1 off; the three to s_3 are 3 off: (3/6 + 27/6) / 2
    log_flow = torch.tensor([[[0.0, 1.0, 1.0, 1.0]], [[0.0, 0.0, 0.0, 0.0]]])
    log_steps = torch.tensor([[[0.0, 0.0, 0.0]], [[0.0, 0.0, 3.0]]])
    yield "2 contexts, 3 steps", (log_flow, log_steps)
    yield "2 contexts, 3 paths of 4 steps", (torch.randn(2, 3, 5), torch.randn(2, 3, 4))
def subtb_loops(log_flow, log_steps):
    squares = []
    for c, j in np.ndindex(log_flow.shape[:2]):
        for start, end in itertools.combinations(range(log_flow.shape[2]), 2):
            residual = log_flow[c, j, start] - log_flow[c, j, end]
            for l in range(start, end):
                residual = residual + log_steps[c, j, l]
            squares.append(residual ** 2)
    return sum(squares) / len(squares)
Exercise(2, 30, subtb, subtb_loops, subtb_cases, [averages_the_steps],
         learned=("log_flow", "log_steps"))
# --- Session 2: soft_rl (20 minutes) --------------------------------------------------------------
def soft_rl(log_pf, log_r):
    """REINFORCE for KL(P ‖ R/Z): log P, log R of paths drawn from P (C, J) → scalar.
    The gradient of the KL is the mean over paths of −g · ∇log P, with g = log R − log P. A is g
    minus the mean of g over the J paths of a context, a constant: no gradient flows through it.
    Mean over all paths of −A · log P."""
def soft_rl_cases():
    # g = 2, 0, so A = 1, −1; −(1 · −1 + −1 · −2) / 2 = −0.5; gradient −A / 2
    yield "log P = −1, −2; log R = 1, −2", (torch.tensor([[-1.0, -2]]), torch.tensor([[1.0, -2]]))
    yield "2 users, 3 paths", (torch.randn(2, 3) - 3, torch.randn(2, 3))
def soft_rl_loops(log_pf, log_r):
    total = 0
    for c, j in np.ndindex(log_pf.shape):
        gain = (log_r[c] - log_pf[c]).detach()                  # g of all paths of the context
        total = total - (gain[j] - gain.mean()) * log_pf[c, j]
    return total / log_pf.numel()
def has_half_the_gradient_of_vargrad(log_pf, log_r): return vargrad_loops(log_pf, log_r) / 2
Exercise(2, 20, soft_rl, soft_rl_loops, soft_rl_cases, [has_half_the_gradient_of_vargrad],
         learned=("log_pf",), given=
         "REINFORCE: log P, log R of paths drawn from P (C, J) → scalar. Mean over all paths of\n"
         "−A · log P; A is a constant, no gradient flows through it. Find A such that, on many\n"
         "draws, the gradient is that of KL(P ‖ R/Z). A is a function of the path, minus its mean\n"
         "over the J paths of a context, without a factor.")
# --- Session 3: curriculum (30 minutes) -----------------------------------------------------------
SCORES = [0.02, 0.05, 0.01, 0.80, 0.08, 0.04]
def curriculum_cases():                       # 10000 contexts of two kinds
    batch = SimpleNamespace(scores=torch.tensor([SCORES] * 10000), histories=[[4], [3]] * 5000,
                            following=[[1, 0]] * 10000, next_item=torch.tensor([1] * 10000))
    what = f"scores {SCORES}; half have read 4, half 3; 1 and 0 to come"
    # 2, 3, 5 are left; score/2 + 1/12 is .088, .483, .103: shares .13, .72, .15. Or 2, 4, 5
    yield f"{what}; a pool of 1 item", (batch, 1, None, None, 0.0)
    yield f"{what}; places 2 to 5 of 0 to 6", (batch, 4, None, None, 0.6)
    yield f"{what}; places 2 to 4 of 0 to 4", (batch, 3, None, None, 1.0)
def curriculum_loops(batch, count, policy, known, progress, by_score=0.5):
    n = batch.scores.shape[1]
    start = round(progress * (count - 1))
    rows = []
    for c, scores in enumerate(batch.scores.tolist()):
        weight = [by_score * score + (1 - by_score) / n for score in scores]
        for v in batch.histories[c] + batch.following[c]:
            weight[v] = 0
        pool = random.choices(range(n), weight, k=2 * count - 1)
        pool.sort(key=scores.__getitem__)
        rows.append(pool[start:start + count])
    return torch.tensor(rows)
def shares_at_each_place(items):                                # (C, N) → (6 items, N)
    return torch.stack([(items == v).float().mean(0) for v in range(len(SCORES))])
def shares_told(expected, found):             # where they differ most
    if not torch.is_tensor(found) or found.shape != expected.shape:
        return f"expected items in a tensor of shape (C, count)\nfound    {written(found)}"
    v, place = divmod((found - expected).abs().argmax().item(), expected.shape[1])
    return (f"expected item {v} at place {place} in {expected[v, place]:.0%} of the contexts\n"
            f"found    item {v} at place {place} in {found[v, place]:.0%}")
def begins_with_high_scores(batch, count, policy, known, progress):
    return curriculum_loops(batch, count, policy, known, 1 - progress)
def stops_in_the_middle(batch, count, policy, known, progress):
    return curriculum_loops(batch, count, policy, known, min(progress, 0.6))
def draws_40_of_100_by_score(*given): return curriculum_loops(*given, by_score=0.4)
def draws_60_of_100_by_score(*given): return curriculum_loops(*given, by_score=0.6)
def reads_one_history(batch, count, policy, known, progress):
    same = SimpleNamespace(**{**vars(batch), "histories": batch.histories[:1] * 10000})
    return curriculum_loops(same, count, policy, known, progress)
Exercise(3, 30, gflowgr.curriculum, curriculum_loops, curriculum_cases,
         [begins_with_high_scores, reads_one_history, stops_in_the_middle, draws_40_of_100_by_score,
          draws_60_of_100_by_score], read=shares_at_each_place, tolerance=0.022,
         picture=shares_told,
         note="batch: its scores, histories, following and next_item, see Batch in gflowgr.py.\n"
         "policy and known are None. Draw with replacement. Each item's share at each place,\n"
         "in 10000 contexts, is compared.")
# --- A small policy, and its P by hand ------------------------------------------------------------
HISTORIES = [[], [3], [5, 0, 7], list(range(4, 24)), [1, 2, 3, 4, 5, 6, 7, 8]]
def points(n, d=4):
    return np.random.default_rng(n).normal(size=(n, d))
def made(n=24, K=4, L=3, ids=None, seed=0, window=4):
    """A random policy whose P is far from even."""
    torch.manual_seed(seed)
    policy = Policy(ids or SemanticIDs.fit(points(n), K, L), window, 32, 1, 0.0).eval()
    policy.lm.transformer.wte.weight.data.mul_(15)
    torch.nn.init.normal_(policy.flow_head.weight)
    return policy
def under(rows, v, l):                        # items whose ID begins with l codes of item v
    return [w for w, row in enumerate(rows) if row[:l] == rows[v][:l]]

def one_by_one(policy, history, read=None):
    """log P_F of the steps and log F of the prefixes on the paths of all items, (n, L) each: one
    history through plain GPT-2 (of it, what is in `read`), one path after the other, legal codes by
    a loop over all items."""
    rows = policy.semantic_ids.codes.tolist()
    K, L = policy.semantic_ids.num_codes, len(rows[0])
    wte = policy.lm.transformer.wte.weight
    embeds = [wte[L * K] * L]                                   # <user>
    for item in (history if read is None else read)[-policy.window:]:
        embeds.append(sum(wte[l * K + code] for l, code in enumerate(rows[item])))
    out = policy.lm(inputs_embeds=torch.stack(embeds)[None], output_hidden_states=True)
    state = out.hidden_states[-1][0, -1]
    left = {*range(len(rows))} - {*history}
    log_pf = torch.full((len(rows), L), -math.inf)              # stays so where it is illegal
    log_flow = torch.zeros(len(rows), L)
    for v, l in np.ndindex(log_pf.shape):
        hidden = state
        if l:
            prefix = sum(wte[m * K + rows[v][m]] for m in range(l))
            prefix = (prefix - prefix.mean()) / (prefix.var(correction=0) + 1e-5).sqrt()
            hidden = state + policy.writer(torch.cat([state, prefix]))
        log_flow[v, l] = policy.flow_head(hidden)[0]
        code = rows[v][l]
        legal = sorted({rows[w][l] for w in under(rows, v, l) if w in left})
        if code in legal:
            logits = {c: hidden @ wte[l * K + c] for c in legal}
            log_pf[v, l] = logits[code] - torch.stack([*logits.values()]).logsumexp(0)
    return log_pf, log_flow
# --- Session 3: Policy.sample (25 minutes) --------------------------------------------------------
def sample_cases():
    # item 0 was seen, so all are item 1
    yield "2 items, of which one was seen", *known_of(made(2, 2, 1), [[0]] * 2000, 1)
    yield "6 items, IDs of 3 codes, two were seen", *known_of(made(6, 2, 3), [[2, 4]] * 2000, 2)
    yield "7 items, IDs of 2 codes", *known_of(made(7, 3, 2), [[3], [1, 5]] * 4000, 2)
    yield "7 items, IDs of 1 code", *known_of(made(7, 7, 1), [[3], []] * 4000, 2)
def known_of(policy, histories, count):
    policy.histories = histories              # for sample_loops
    with torch.no_grad():
        return [(policy, policy.know(histories), count)]
def sample_loops(self, known, count, p=lambda log_p: log_p.exp()):
    pasts = {tuple(past) for past in self.histories}
    share = {past: p(one_by_one(self, past)[0].sum(1)).tolist() for past in pasts}
    items = [random.choices(range(len(share[tuple(past)])), share[tuple(past)], k=count)
             for past in self.histories]
    return torch.tensor(items)
def shares_of_items(items):                   # in contexts with even and odd numbers, (2, 7 items)
    return torch.stack([(items[c::2, :, None] == torch.arange(7)).float().mean((0, 1))
                        for c in (0, 1)])
def takes_the_likeliest(self, known, count):
    return sample_loops(self, known, count, lambda log_p: (log_p == log_p.max()).double())
def draws_evenly(self, known, count):
    return sample_loops(self, known, count, lambda log_p: (log_p > -math.inf).double())
def draws_what_was_seen(self, known, count):
    histories, self.histories = self.histories, [[]] * len(self.histories)
    items = sample_loops(self, known, count)
    self.histories = histories
    return items
Exercise(3, 25, Policy.sample, sample_loops, sample_cases,
         [takes_the_likeliest, draws_evenly, draws_what_was_seen], read=shares_of_items,
         tolerance=0.03, note="known = self.know(histories), states and unseen nodes; count: a\n"
         "number. self(known, codes) → log P_F and log F, see Policy.forward. ids.walk(codes)\n"
         "tells nodes, ids = self.semantic_ids; node M + i is item i, M = ids.num_prefixes.\n"
         "Each item's share in thousands of draws is compared.")
# --- Session 3: Policy.recommend (30 minutes) -----------------------------------------------------
def recommend_cases():
    # item 0 was seen, so item 1 is left: P = 1, log P = 0
    yield "2 items, of which one was seen", (made(ids=SemanticIDs([[0], [1]], 2)), [[0]], 2, 9)
    policy = made()
    yield "1 beam, but k = 4", (policy, [[4], [3, 8, 1, 20, 9, 6]], 4, 1)
    for K, L in ((24, 1), (5, 2), (2, 6)):
        yield f"3 beams, IDs of {L} codes", (made(24, K, L), HISTORIES, min(L, 2), 3)
    yield "1 item is left, or none", (policy, [list(range(23)), list(range(24))], 30, 9)
def recommend_loops(self, histories, k=10, beams=20):
    rows = [tuple(row) for row in self.semantic_ids.codes.tolist()]
    items = torch.full((len(histories), k), -1)
    values = torch.full((len(histories), k), -math.inf)
    for b, history in enumerate(histories):
        left = [v for v in range(len(rows)) if v not in history]
        log_p = one_by_one(self, history)[0].cumsum(1)
        best = {(): 0.0}                                        # {prefix: log P}, best first
        for l in range(1, len(rows[0]) + 1):
            score = {rows[v][:l]: log_p[v, l - 1].item() for v in left if rows[v][:l - 1] in best}
            order = sorted(score, key=score.get, reverse=True)[:max(beams, k)]
            best = {prefix: score[prefix] for prefix in order}
        for place, row in enumerate(list(best)[:k]):
            items[b, place] = rows.index(row)
            values[b, place] = best[row]
    return items, values
def recommends_what_was_seen(self, histories, k=10, beams=20):
    return recommend_loops(self, [[]] * len(histories), k, beams)
Exercise(3, 30, Policy.recommend, recommend_loops, recommend_cases,
         [recommends_what_was_seen],
         note="self.know(histories) → known; self(known, codes (B, W, l)): log P_F of the next\n"
         "codes, see Policy.forward; self.semantic_ids.walk(codes): nodes; node M + i is item i,\n"
         "M = self.semantic_ids.num_prefixes. max(beams, k) prefixes go on at each level.")
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
Exercise(4, 20, rivals.grpo, grpo_loops, grpo_cases, [divides_by_the_std_with_j],
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
        x = {"window": x.window, "IDs": x.semantic_ids.codes.tolist()}
    elif torch.is_tensor(x):
        x = x.detach()
    try:
        return textwrap.shorten(repr(x), 150, placeholder=" …")
    except Exception:                         # a student's own class may have a wrong one
        return f"a {type(x).__name__}"

def why(error, file):                         # what was raised, and in which line of the file
    frames = traceback.extract_tb(error.__traceback__)
    lines = ["", *[f" in line {frame.lineno}" for frame in frames if frame.filename == file]]
    text = " ".join(f"{type(error).__name__}{lines[-1]}: {error}".split())
    return text if len(text) <= 500 else text[:499] + "…"

def kind(x):                                  # floats, integers or bools
    return x.is_floating_point(), x.dtype == torch.bool

def difference(expected, found, what, tolerance):   # both, or the first rows that differ
    if torch.is_tensor(found) and found.shape == expected.shape and found.dim() > 1:
        same = torch.isclose(found.double(), expected.double(), 1e-4, tolerance)    # as `close`
        row = same.flatten(1).all(1).int().argmin().item()
        what, expected, found = f"{what}, row {row}", expected[row], found[row]
    return f"expected {what}: {written(expected)}\nfound    {what}: {written(found)}"

def verdict(exercise, answer, file=""):
    """"" for a right answer, else what a student reads; file: where the answer stands."""
    name = exercise.task.__qualname__
    names = inspect.signature(exercise.task).parameters
    torch.manual_seed(0)
    random.seed(0)
    for number, (title, inputs) in enumerate([*exercise.cases()], 1):
        wanted = dict(results(exercise, exercise.answer, inputs))
        what = next(iter(wanted))
        found = None
        try:
            for what, found in results(exercise, answer, inputs):
                if torch.is_tensor(wanted[what]):
                    assert torch.is_tensor(found), f"it is no tensor, but a {type(found).__name__}"
                    shape = tuple(found.shape), tuple(wanted[what].shape)
                    assert shape[0] == shape[1], f"its shape is {shape[0]}, not {shape[1]}"
                    assert kind(found) == kind(wanted[what]), f"it is a tensor of {found.dtype}"
                close(found, wanted[what], atol=exercise.tolerance)
        except BaseException as error:
            given = "; ".join(f"{key} = {written(x)}" for key, x in zip(names, inputs))
            pair = difference(wanted[what], found, what, exercise.tolerance)
            if exercise.picture:
                pair = exercise.picture(wanted[what], found)
            return (f"{name} is not right yet\nCase {number}: {title}\n{given}\n{pair}\n"
                    f"{why(error, file)}")
    return ""

def not_yours(*inputs, **named):
    raise AssertionError("this is the project's own function; write one yourself")

def definitions(file):
    """What a student's file defines, also if its last line fails → names, what was raised."""
    there = {"__name__": "student", "__file__": file}
    try:
        exec(compile(Path(file).read_bytes(), file, "exec"), there)
    except BaseException as error:                              # also that of exit()
        return there, why(error, file)
    return there, ""

def grade_one(pipe, file, name):              # in a process of its own
    os.setsid()                               # it leads a group, which ends with it
    sys.path.insert(0, os.path.dirname(os.path.abspath(file)))  # it may import its neighbours
    for name_of_this_file in ("test_gflowgr", "__main__"):      # but not the answers
        sys.modules[name_of_this_file] = None
    nothing = open(os.devnull, "r+")
    for stream in range(3):                   # no input, no output
        os.dup2(nothing.fileno(), stream)
    task = EXERCISES[name].task
    inspect.unwrap(task).__code__ = not_yours.__code__          # wherever it is imported
    there, raised = definitions(file)
    answer = there.get(task.__name__)
    if getattr(answer, "__module__", "") == "student":          # not ours, imported
        said = verdict(EXERCISES[name], answer, file)
    else:
        said = f"{name}: {raised or f'there is no function {task.__name__}'}"
    pipe.send_bytes(json.dumps(said).encode())

def begun(file):
    """The exercises that a file defines, by its text: it may not run."""
    path = Path(file)
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return [name for name, exercise in EXERCISES.items()
            if re.search(rf"^(def )?{exercise.task.__name__} ?[(=]", text, re.MULTILINE)]

def grade(file, names=(), limit=60):
    """{exercise: its verdict, "" if it is right} of a student's file; by forks of this process, so
    that torch is loaded before the time runs. names: by default, all that the file defines."""
    fork = multiprocessing.get_context("fork")
    found = {}
    for name in names or begun(file):
        here, there = fork.Pipe(duplex=False)
        child = fork.Process(target=grade_one, args=(there, file, name))
        child.start()
        there.close()                         # the child alone has it: we see at once that it ends
        try:
            found[name] = f"{name}: no answer in {limit} seconds"
            if here.poll(limit):
                found[name] = json.loads(here.recv_bytes())
        except (EOFError, OSError):
            found[name] = f"{name}: it left before it was graded"
        finally:
            with suppress(OSError):           # there is no group any more
                os.killpg(child.pid, signal.SIGKILL)
            child.kill()
            child.join()
    return found or {"": "there is no function of an exercise in it"}

def print_table(graded, names):               # a row for each file, a column for each exercise
    columns = names or [name for name in EXERCISES if any(name in row for row in graded.values())]
    print("\n" + " | ".join(["file", *columns]))
    marks = {None: "–", "": "right"}
    for file, found in graded.items():
        cells = [marks.get(found.get(name), "not yet") for name in columns]
        print(" | ".join([file, *cells, found.get("", "")]).removesuffix(" | "))

def grade_all(path, names=()):
    """Grade a file, or all .py files below a folder, and print it → 0 if all is right."""
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
        return wrong(f"{path} is no .py file, and no folder with one")
    if folder:
        print_table(graded, names)
    return int(any(any(found.values()) for found in graded.values()))

def stub(exercise, hint=False):               # the beginning of a student's function
    task = exercise.task
    doc = inspect.getdoc(task) if hint or not exercise.given else exercise.given
    text = textwrap.indent(doc, "    ").lstrip()
    more = " Its gradient is compared." if exercise.learned else ""
    notes = f"{exercise.minutes} minutes.{more}\n{exercise.note}"
    return ("\nimport math\nimport torch\nimport torch.nn.functional as F\n"
            f"\n{textwrap.indent(notes.strip(), '# ')}\n"
            f"def {task.__name__}{inspect.signature(task)}:\n"
            f'    """{text}\n    """\n    raise NotImplementedError\n')

# --- Its tests ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", EXERCISES)
def test_exercise(name, tmp_path, capsys):
    exercise = EXERCISES[name]
    if getattr(exercise.task, "__module__", "") != __name__:
        assert verdict(exercise, exercise.task) == ""           # ours, against the loops
    for mistake in exercise.mistakes:
        assert "\nAssertionError: " in verdict(exercise, mistake), mistake
    formula = inspect.getdoc(exercise.task).splitlines()[-1]
    mine = tmp_path / "mine.py"
    for hint in (["--hint"], []):
        mine.unlink(missing_ok=True)
        assert main(["--stub", name, str(mine), *hint]) == 0
        assert (formula in mine.read_text("utf-8")) == bool(hint or not exercise.given)
    assert "\nNotImplementedError in line " in grade(str(mine))[name]

RIGHT = """def trajectory_balance(z, p, r):
    return (z[:, None] + p - r).square().mean()
def vargrad(p, r):
    return (p - r - (p - r).mean(1, keepdim=True)).square().mean()
"""

@pytest.mark.parametrize("text, said", [
    ("def recall_at(ranked, target, k):\n    exit()",
     "recall_at is not right yet\nCase 1: one user\n"
     "ranked = tensor([[4, 2, 7, 1]]); target = tensor([4]); k = 3\n"
     "expected value: tensor([1.])\nfound    value: None\nSystemExit in line 2: None"),
    (RIGHT.replace("+ p", "+ p.detach()"),
     "\nexpected gradient by log_pf, row 0: tensor([1.3863])\n"
     "found    gradient by log_pf, row 0: tensor([0.])\nAssertionError: "),
    ("import torch\ndef ndcg_at(ranked, target, k):\n    return torch.zeros(1, 2)",
     "AssertionError: its shape is (1, 2), not (1,)"),
    ("recall_at = lambda *inputs: [1.0]", "AssertionError: it is no tensor, but a list"),
    ("import sys\ndef recall_at(*inputs): return sys.modules['__main__'].recall_loops(*inputs)",
     "AttributeError in line 2: "),
    ("def recall_at(ranked, target, k):\n    return (ranked[:, :k] == target[:, None]).any(1)\n",
     "AssertionError: it is a tensor of torch.bool"),
    ("import torch\ndef curriculum(batch, *given):\n    return torch.ones(10000, 1).long()\n",
     "found    item 1 at place 0 in 100%"),
    ("def ndcg_at(*inputs):\n    raise ValueError('long ' * 999)", "ValueError in line 2: long "),
    ("from test_gflowgr import recall_loops\ndef recall_at(*inputs): return recall_loops(*inputs)",
     "ModuleNotFoundError in line 1: "),
    ("from gflowgr import recall_at as ours\ndef recall_at(*inputs): return ours(*inputs)",
     "this is the project's own function; write one yourself"),
    ("import gflowgr\ndef recommend(self, *inputs): return gflowgr.Policy.recommend(self, *inputs)",
     "this is the project's own function; write one yourself"),
    ("def scores(self, histories): pass", "Case 1: near[0] = 0, 1, .8, 0; without popularity\n"
     "self = {'popularity': 0.0, 'log': [[0, 1, 2]]}; ")])
def test_what_a_student_reads(text, said, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(text)
    found = "\n".join(grade(str(mine)).values())
    assert said in found
    assert len(found) < 1200

def test_the_row_that_is_told_differs_by_more_than_the_tolerance():
    said = difference(torch.zeros(3, 1), torch.tensor([[0.01], [1.0], [2.0]]), "value", 0.1)
    assert said == "expected value, row 1: tensor([0.])\nfound    value, row 1: tensor([1.])"

def test_a_folder_is_graded_file_by_file(tmp_path):
    (tmp_path / "anna/.venv").mkdir(parents=True)
    texts = {"anna/mine.py": "print('loud')\n" + RIGHT + "1 / 0", "anna/.venv/copy.py": "1 / 0",
             "asks.py": "x = 1", "zoe.py": RIGHT.replace("+ p", "- p") + "def ndcg_at(*inputs):\n"
             "    import os\n    os.system('echo loud')\n    os._exit(0)"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    command = [sys.executable, __file__, "--grade", "."]
    done = subprocess.run(command, cwd=tmp_path, input=b"answer\n", capture_output=True)
    out = done.stdout.decode("utf-8")
    assert (done.returncode, done.stderr) == (1, b"")
    assert "loud" not in out
    assert "./anna/mine.py: trajectory_balance is right\n" in out     # though its last line fails
    assert "./zoe.py: ndcg_at: it left before it was graded\n" in out
    assert out.endswith("""
file | ndcg_at | trajectory_balance | vargrad
./anna/mine.py | – | right | right
./asks.py | – | – | – | there is no function of an exercise in it
./zoe.py | not yet | not yet | right
""")

def test_an_exercise_that_hangs_does_not_hide_the_others(tmp_path, capsys):
    mine = tmp_path / "mine.py"
    mine.write_text("from near import hits\ndef recall_at(*inputs): return hits(*inputs).float()\n"
                    "def ndcg_at(*inputs):\n    while True: pass\n")
    near = "def hits(items, wanted, k): return (items[:, :k].T == wanted).any(0)"
    (tmp_path / "near.py").write_text(near)
    late = "ndcg_at: no answer in 2 seconds"                    # they run when torch is loaded
    assert grade(str(mine), limit=2) == {"recall_at": "", "ndcg_at": late}
    assert main(["--grade", str(mine), "recall_at"]) == 0
    assert capsys.readouterr().out == "recall_at is right\n"

def test_a_stub_is_appended_and_a_wrong_command_is_told(tmp_path, capsys):
    mine = tmp_path / "mine.py"
    mine.write_text("x = 1")                                    # its last line has no end
    for name in ("trajectory_balance", "curriculum"):
        assert main(["--stub", name, str(mine)]) == 0
    assert runpy.run_path(str(mine))["x"] == 1
    text = mine.read_text("utf-8")
    assert "def trajectory_balance(" in text and "def curriculum(" in text and "mixture" in text
    names = "there is no exercise nonsense; there are recall_at, "
    for command, said in ((f"--stub nonsense {mine} --hint", names),
                          (f"--grade {mine} nonsense", names),
                          ("--grade nowhere", "nowhere is no .py file, and no folder with one"),
                          ("--stub grpo", "--stub needs NAME and FILE"), ("", "--list  "),
                          (f"--stub curriculum {mine}", "has this function already"),
                          ("--grade", "--grade needs a file"),
                          (f"--grade {mine} b.py", "--grade takes one file"),
                          ("--grades x", "there is no command --grades"),
                          ("--stub grpo nowhere/mine.py", "No such file or directory")):
        assert main(command.split()) == 2
        assert said in capsys.readouterr().err, command
    assert mine.read_text("utf-8") == text

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

@pytest.fixture
def told(tmp_path):                           # refused before anything is written
    def check(message, *flags):
        refused(message, *flags, f"--out={tmp_path / 'out'}")
        assert not (tmp_path / "out/results.json").exists()
    return check

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):                   # flags of a tiny world: 60 users, 48 items
    folder = tmp_path_factory.mktemp("tiny")
    TOY["write"](folder, 60, 8, 6, 1)
    return [f"--data={folder}", *"--codes=8 --width=32 --layers=1 --batch=16 --window=8".split()]

def prepared(*flags, dropout=0.0, shift=0):   # shift changes the validation and test items
    settings = gflowgr.parse(list(flags))
    settings.device = "cpu"
    data = load_data(settings.data)
    data.histories = [h[:-2] + [(item + shift) % 48 for item in h[-2:]] for h in data.histories]
    ids = gflowgr.make_ids(settings, data, 0)
    return SimpleNamespace(settings=settings, data=data, ids=ids,
                           policy=gflowgr.make_policy(settings, data, ids, 0, dropout))

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

def left_vectors(table):                      # times √(singular values), rows of length 1
    u, size, _ = np.linalg.svd(table)
    rows = u * np.sqrt(size)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)

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

def vectors_of_log():                         # of LOG's items (25, 8), signs of columns aside
    x = np.zeros((31, 25), np.float32)
    for user, history in enumerate(LOG):
        x[user, history] = 1
    x /= np.maximum(x.sum(0), 1) ** 0.25
    return torch.tensor(np.linalg.svd(x)[2][:8].T)

def test_svd_and_blend_against_loops():
    vectors = vectors_of_log()
    long = vectors.norm(dim=1).clamp(min=1e-4)
    users = [*USERS, list(range(23)), [3] * 200 + [7] * 90]
    of_8 = SVD(LOG, 25, rank=8)
    close(of_8.popular, long, atol=1e-3)
    for user, history in enumerate(users):
        score = torch.zeros(25)
        for age, j in enumerate(reversed(history), 1):
            score += vectors @ vectors[j] / age ** 0.75
        found = of_8.scores(users)[user]
        close(found, shares_loops(score, long, history), atol=1e-3)     # it is approximate
    counts, svd, blend = [TEACHERS[name](LOG, 25) for name in ("cm", "svd", "blend")]
    close(blend.scores(users), 0.25 * counts.scores(users) + 0.75 * svd.scores(users))
    close(blend.popular, counts.popular)
    assert svd.vectors.shape == (25, 24)
    rounded = reward.shares(torch.tensor([[9.0, 1e-7, 0]]), [[0]], torch.tensor([9.0, 1, 3]))
    close(rounded, torch.tensor([[0, 0.25, 0.75]]))             # 1e-7 counts as 0
    after = reward.followers([[0, 1, 2]], 3).to_dense()
    assert after.tolist() == [[0, 1, 0.8], [0, 0, 1], [0, 0, 0]]

def test_a_fold_does_not_know_its_users_and_who_is_served_gets_all(monkeypatch):
    made = []
    def remembered(log, n):
        made.append(counted(log, n))
        return made[-1]
    monkeypatch.setitem(TEACHERS, "counted", remembered)
    data = log_data()
    teacher = Teacher("counted", data)
    past = [history[:2] for history in LOG]
    found = teacher.scores(past[::-1], range(len(LOG))[::-1]).flip(0)
    for user, history in enumerate(LOG):
        [without] = [cm for cm in made if history not in cm.log]        # one of the fits
        others = {u for u, h in enumerate(LOG) if h not in without.log}
        assert others == {u for u in range(len(LOG)) if u % 20 == user % 20}
        close(found[user], without.scores([past[user]])[0])
    whole = CollaborativeModel(LOG, 25).scores(past)
    close(teacher.scores(past), whole)
    assert ((found - whole).abs().amax(1) > 0.001).all()
    assert len(made) == 21
    close(Teacher("counted", data, 0.5).scores(past, range(len(LOG))).sum(1), torch.ones(31))
    assert len(made) == 21                                      # all seeds share the fits

@pytest.mark.parametrize("name", ["cm", "svd"])
def test_scores_are_divided_by_popularity_or_length(name):
    popular = torch.tensor([1.0 + sum(LOG, []).count(v) for v in range(25)])
    if name == "svd":
        popular = SVD(LOG, 25).vectors.norm(dim=1).clamp(min=1e-4)
    data = log_data()
    cm = Teacher(name, data)
    users = USERS[:3]
    wanted = (cm.scores(users) / popular ** 0.7) ** 3
    close(Teacher(name, data, 0.7, 3.0).scores(users), wanted / wanted.sum(1, keepdim=True))
    close(cm.scores([[5, 6] * 13]).sum(1), torch.ones(1))       # as long as the catalogue
    close(Teacher(name, data, 2.0, 30.0).scores(users).sum(1), torch.ones(3))   # nothing vanishes

def own(returned):                            # a recommender; returned: right scores → its scores
    def scores(histories):
        right = torch.ones(len(histories), 48)
        right[tokenizer.rows_and_columns(histories)] = 0
        return returned(right / right.sum(1, keepdim=True))
    return lambda histories, num_items: SimpleNamespace(scores=scores, popular=torch.ones(48))

@pytest.mark.parametrize("returned", [
    lambda right: right * math.nan, lambda right: right * 48, lambda right: right / 48,
    lambda right: (x := right * torch.tensor([3.0, -1] * 24)) / x.sum(1, keepdim=True),     # < 0
    lambda right: right * 0, lambda right: right[:, 1:],
    lambda right: torch.full_like(right, 1 / 48)])
def test_scores_of_a_wrong_teacher_are_refused(returned, tiny, told, monkeypatch):
    monkeypatch.setitem(TEACHERS, "mine", own(returned))
    asked = "mine: scores(histories) has to return a tensor (B, n) "
    told(asked, *tiny, "--quick", "--methods=mine")
    refused(asked, *tiny, "--quick", "--methods=tb:teacher=mine", f"--out={tiny[0][7:]}/out")

# --- Pieces of logs, P, beams, draws --------------------------------------------------------------
def test_a_log_is_cut_into_pieces_that_hold_each_item_once():
    logs = [list(range(length)) for length in (1, 2, 4, 5, 8, 30)]
    rng = np.random.default_rng(0)
    epochs = [gflowgr.cut(logs, 5, rng) for _ in range(40)]
    every = [(user, place) for user, items in enumerate(logs) for place in range(len(items))]
    for pieces in epochs:
        held = [(user, place) for user, *piece in pieces for place in range(*piece)]
        assert sorted(held) == every
        assert all(stop - first <= 5 for _, first, stop in pieces)
        assert {(0, 0, 1), (3, 0, 5)} < {*pieces}               # what is short stays whole
    assert {first for pieces in epochs for user, first, _ in pieces if user == 5} == {*range(30)}
    assert len({tuple(user for user, *_ in pieces) for pieces in epochs}) > 30      # other orders

def test_a_batch_has_the_contexts_of_its_pieces():
    data = SimpleNamespace(train=[[5, 2, 9], [3], [7, 1, 0, 4]])
    ids = SemanticIDs.fit(points(24), 5, 2)
    batch = gflowgr.Batch([(2, 1, 4), (0, 0, 3), (1, 0, 1)], data, ids, Recipe())
    assert batch.users == [2, 2, 2, 0, 0, 0, 1]
    assert batch.histories == [[7], [7, 1], [7, 1, 0], [], [5], [5, 2], []]
    assert batch.next_item.tolist() == [1, 0, 4, 5, 2, 9, 3]
    assert batch.following == [[1, 0, 4], [0, 4], [4], [5, 2, 9], [2, 9], [9], [3]]
    seen = [[v for v in range(24) if not batch.unseen[c, ids.num_prefixes + v]] for c in range(7)]
    assert seen == [sorted(past) for past in batch.histories]
    policy = made(ids=ids)
    states, unseen = batch.known(policy)
    read = [[], [1], [1, 0], [], [5], [5, 2], []]               # nothing before a piece
    close(states, torch.cat([policy.read([row])[-1:] for row in read]))
    assert unseen is batch.unseen

@pytest.mark.parametrize("K, L", [(24, 1), (5, 2), (3, 3), (2, 6)])
def test_p_is_that_of_one_history_and_one_path_at_a_time(K, L):
    policy = made(24, K, L)
    known = policy.know(HISTORIES)
    every = torch.arange(24).expand(len(HISTORIES), -1)
    codes = policy.semantic_ids.codes[every]
    steps = policy.path_log_probs(known, every)
    log_probs, log_flow = policy(known, codes[..., :-1])
    items, values = policy.recommend(HISTORIES, 24, beams=99)   # all, ranked
    for c, past in enumerate(HISTORIES):
        log_pf, flow = one_by_one(policy, past)
        close(steps[c].clamp(min=-99), log_pf.clamp(min=-99))
        close(log_flow[c], flow)
        close(values[c], log_pf.sum(1).sort(descending=True).values)
        there = values[c] > -math.inf
        close(values[c][there], log_pf.sum(1)[items[c][there]])
        legal = log_pf.sum(1) > -math.inf                       # the gradients are the same, too
        wte = policy.lm.transformer.wte.weight
        close(*[torch.autograd.grad(log_p[legal].square().sum(), wte, retain_graph=True)[0]
                for log_p in (log_pf, steps[c])], atol=1e-3)
    close(steps.sum(2).exp().sum(1), torch.ones(len(HISTORIES)))
    assert (log_probs.max() <= 0) and (log_probs.exp().sum(-1) < 1.001).all()

def test_a_row_that_is_read_once_has_the_states_of_all_its_histories():
    policy = made()
    rows = [[5, 0, 7, 9], [], [3, 1]]
    alone = [policy.read([row[:place]])[-1] for row in rows for place in range(len(row) + 1)]
    close(policy.read(rows), torch.stack(alone))

def test_a_list_ends_where_no_item_is_left(monkeypatch):
    seen = list(range(24))
    monkeypatch.setitem(TEACHERS, "bare", partial(CollaborativeModel, popularity=0.0))
    cm = Teacher("bare", log_data(24), 1.0)
    sharp = made()
    sharp.lm.transformer.wte.weight.data *= 1e3                 # nearly all P are below 1e-30
    for recommend in (made().recommend, sharp.recommend, cm.recommend):
        items, scores = recommend([seen, seen[1:], [0, 0, 3]], 24)
        assert (items >= 0).sum(1).tolist() == [0, 1, 22]
        assert scores.isfinite().equal(items >= 0)
        assert {*items[2].tolist()} == {-1, *seen} - {0, 3}

def test_what_cannot_be_recommended_is_told():
    for wrong in (partial(CollaborativeModel([[0, 1]], 24).scores, [[3, 24]]),
                  partial(made().recommend, [[-1]]), partial(made().recommend, [[24]])):
        with pytest.raises(InputError, match="items of a history are numbers from 0 to 23"):
            wrong()

# --- Samplers, what a loss is given ---------------------------------------------------------------
PAST = [[3], [5, 0, 7], [9, 1]]
NEXT = [[4, 11, 6], [8, 20], [2, 23]]

def contexts(past, following):                # what samplers read of a Batch
    r, scores = torch.rand(2, len(past), 24) ** 4
    r[tokenizer.rows_and_columns(past)] = scores[tokenizer.rows_and_columns(past)] = 0
    next_item = torch.tensor([row[0] for row in following])
    return SimpleNamespace(r=r, scores=scores / scores.sum(1, keepdim=True), next_item=next_item,
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
    items = SAMPLERS[name](batch, 2000, None, None, 0.5)
    assert batch.r.equal(before)                                # the loss needs it, too
    for c, row in enumerate(items):
        p = torch.tensor([float(weight(name, batch, c, v)) for v in range(24)])
        share = torch.bincount(row, minlength=24) / 2000
        assert (share - p / p.sum()).abs().max() < 0.04
        assert (share[p == 0] == 0).all()

def test_samplers_that_ask_the_policy():
    policy = made()
    batch = contexts(PAST, NEXT)
    best = recommend_loops(policy, PAST, 7, beams=7)[0].tolist()
    best = [[v for v in row if v != rest[0]][:6] for row, rest in zip(best, NEXT)]
    known = policy.know(PAST)
    assert SAMPLERS["policy_beam"](batch, 6, policy, known, 0.5).tolist() == best
    drawn = SAMPLERS["policy_draws"](batch, 4000, policy, known, 0.5)
    for past, row in zip(PAST, drawn):
        p = one_by_one(policy, past)[0].sum(1).exp()
        close(torch.bincount(row, minlength=24) / 4000, p, atol=0.04)

@pytest.mark.parametrize("name", SAMPLERS)
def test_where_one_item_is_left_it_is_drawn(name):
    past = [[v for v in range(24) if v != 8]]                   # 8 is the logged one
    policy = made()
    items = SAMPLERS[name](contexts(past, [[8]]), 5, policy, policy.know(past), 0.5)
    assert items.tolist() == [[8] * 5]

def paths_by_hand(recipe, data, models, user, read, past, items):   # {attribute of Paths: its row}
    after = data.train[user][len(past):]
    ids = models[0].semantic_ids
    codes = ids.codes.tolist()
    log_pf, learned_flow = one_by_one(models[0], past, read)
    signal = Teacher(recipe.teacher, data).scores([past], [user])[0]
    popular = TEACHERS[recipe.teacher](data.train, len(codes)).popular
    signal = (signal / popular ** recipe.debias) ** recipe.power
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
    child_flow = torch.zeros(len(items), len(codes[0]), ids.num_codes)
    log_probs = torch.full_like(child_flow, NEVER)
    for j, l in np.ndindex(child_flow.shape[:2]):
        for w in under(codes, items[j], l):
            child_flow[j, l, codes[w][l]] = flow[w, l + 1]
            log_probs[j, l, codes[w][l]] = log_pf[w, l]
    return dict(log_steps=log_pf[items], log_pf=log_pf[items].sum(1), log_r=R[items].log(),
                log_flow=log_flow[items], log_z=log_flow[0, 0], log_probs=log_probs,
                child_flow=child_flow, log_ref=one_by_one(models[1], past, read)[0].sum(1)[items])

def losses_by_hand(p, log_ref, child_flow):   # {method: its loss}, of a Paths
    balance = balance_loops(p.log_z, p.log_pf, p.log_r)
    q = child_flow / child_flow.sum(-1, keepdim=True)
    kl = torch.nn.functional.kl_div(p.log_probs, q, reduction="sum") / p.log_pf.numel()
    shares = 0
    for log_pf, log_r in zip(p.log_pf, p.log_r):                # of the paths of a context
        q = log_r.exp() / log_r.exp().sum()
        shares += (q * (q / log_pf.exp() * log_pf.exp().sum()).log()).sum() / len(p.items)
    return {"paper": balance, "tb": balance, "db": detailed_loops(p.log_flow, p.log_steps),
            "sdpo": sdpo_loops(p.log_pf, log_ref, p.recipe.beta),
            "vargrad": vargrad_loops(p.log_pf, p.log_r), "listnet": shares, "distill": kl,
            "grpo": grpo_loops(p.log_pf, log_ref, p.log_r, p.recipe.beta)}

@pytest.mark.parametrize("changes, K, L", [
    (dict(lam=0.3), 8, 2), (dict(exact=False, positive=True, teacher="blend"), 4, 3),
    (dict(debias=0.0), 48, 1), (dict(teacher="cm"), 2, 6)])
def test_what_a_loss_is_given_and_what_is_made_of_it(changes, K, L, tiny, monkeypatch):
    data = prepared(*tiny, f"--codes={K}", f"--levels={L}").data
    recipe = Recipe(**dict(w_a=0.3, w_y=0.5, w_s=0.2, trajectories=3, power=2.0) | changes)
    recipe.loss = lambda p: p.log_pf.cumsum(1).square().mean()      # asks for the order
    ids = SemanticIDs.fit(points(48), K, L)
    policy = made(ids=ids)
    frozen = made(ids=ids, seed=1)
    train = data.train = [history[:5] for history in data.train]    # all is read
    data.liked = [[item % 3 > 0 for item in history] for history in train]
    teacher = Teacher(recipe.teacher, data, recipe.debias, recipe.power)
    pieces = [(2, 0, 3), (0, 1, 4), (5, 0, len(train[5]))]
    batch = gflowgr.Batch(pieces, data, ids, recipe, teacher)
    drawn = batch.r.bool().float().multinomial(3)
    drawn[0, 1] = batch.next_item[0]                            # v again
    def sampler(batch, count, asked, known, progress):
        assert (count, asked, progress) == (3, policy, 0.5) and not torch.is_grad_enabled()
        close(known[0], batch.known(policy)[0])
        return drawn
    monkeypatch.setitem(SAMPLERS, recipe.sampler, sampler)
    found = gflowgr.loss_of(recipe, policy, frozen, batch, 0.5)
    first = batch.next_item[:, None] if recipe.positive else drawn[:, :0]
    items = torch.cat([first, drawn], 1)
    p = gflowgr.Paths(recipe, policy, frozen, batch, batch.known(policy), items)
    begins = [first for _, first, stop in pieces for _ in range(first, stop)]
    rows = []
    for c, past in enumerate(batch.histories):
        rows.append(paths_by_hand(recipe, data, (policy, frozen), batch.users[c], past[begins[c]:],
                                  past, items[c].tolist()))
    by_hand = {what: torch.stack([row[what] for row in rows]) for what in rows[0]}
    log_ref, child_flow = by_hand.pop("log_ref"), by_hand.pop("child_flow")
    for what, wanted in by_hand.items():
        close(getattr(p, what).clamp(min=-99), wanted.clamp(min=-99), msg=what)
    log_v = [one_by_one(policy, past, past[begins[c]:])[0][v].sum()
             for c, (past, v) in enumerate(zip(batch.histories, batch.next_item))]
    sft = -torch.stack(log_v).mean()
    close(found, recipe.lam * recipe.loss(p) + sft)
    alone = gflowgr.loss_of(Recipe(), policy, None, batch, 0.5)
    close(alone, sft)
    wte = policy.lm.transformer.wte.weight
    close(*[torch.autograd.grad(loss, wte, retain_graph=True)[0] for loss in (alone, sft)])
    close({name: recipe.loss(p) for name, recipe in METHODS.items() if recipe.loss},
          losses_by_hand(p, log_ref, child_flow))
    assert p.policy is policy and p.items is items and not gflowgr.log_ref_of(p).requires_grad
    drawn[-1] = batch.histories[-1][0]                          # one of its history, R = 0
    with pytest.raises(InputError, match=f"{recipe.sampler}: it drew an item of the history"):
        gflowgr.loss_of(recipe, policy, frozen, batch, 0.5)

# --- Training, changes in recipes -----------------------------------------------------------------
def trained(flags, name="sft:epochs=2:rate=.005", shift=0):     # from random weights
    made = prepared(*flags, dropout=0.1, shift=shift)
    score = gflowgr.train(name, recipe_of(name), made.policy, made.data, 3, 0)
    return score, [made.ids.codes, *made.policy.parameters()]

def test_same_seed_same_policy_and_no_leak_from_test_or_validation_items(tiny):
    name = "distill:teacher=blend:epochs=2:rate=.005"
    one, again, other = [trained(tiny, name, shift) for shift in (0, 0, 1)]
    assert one[0] == again[0] != other[0]                       # other validation items
    close(one[1], other[1], atol=0, rtol=0)

def test_validation_is_on_at_most_500_users(tiny, monkeypatch):
    asked = []
    def evaluate(recommend, logs):
        asked.append(logs)
        return {"ndcg@10": torch.ones(1)}, None
    monkeypatch.setattr(gflowgr, "evaluate", evaluate)
    made = prepared(*tiny)
    histories = made.data.histories
    made.data.histories = histories * 10                        # 600
    gflowgr.train("sft", recipe_of("sft", quick=True), made.policy, made.data, 3, 0)
    [logs] = asked
    assert logs == [items[:-1] for items in made.data.histories][::2]

def test_rates_clipping_and_progress(tiny, monkeypatch):
    rates = []
    progress = []
    def loss_of(recipe, policy, reference, batch, share):
        assert policy.training and not reference.training
        progress.append(share)
        return 100 * policy.flow_head.weight.sum()              # a gradient that has to be clipped
    def step(self, *_):
        [group] = self.param_groups
        rates.append(group["lr"])
        norms = [x.grad.norm() for x in group["params"] if x.grad is not None]
        assert torch.stack(norms).norm() < 1.001
    monkeypatch.setattr(gflowgr, "loss_of", loss_of)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    trained(tiny, "sft:epochs=4:rate=.005")
    steps = len(progress)
    assert progress == [number / steps for number in range(steps)]
    rise = steps // 10 + 1
    cosine = [(1 + math.cos(math.pi * number / (steps - rise))) / 2 for number in range(steps)]
    shares = [number / rise for number in range(rise)] + cosine
    assert rates == approx([0.005 * share for share in shares[:steps]])

def test_training_has_the_weights_of_its_recipe(tiny, monkeypatch):
    seen = set()
    def reward(*given, original=gflowgr.comprehensive_reward):
        seen.add(given[-3:])
        return original(*given)
    monkeypatch.setattr(gflowgr, "comprehensive_reward", reward)
    trained(tiny, "tb:epochs=1:w_s=.25")
    assert seen == {(0.2, 0.75, 0.25)}

def test_a_loss_that_is_nan_stops_its_run_and_own_code_that_raises_is_not_hidden(tiny, monkeypatch):
    monkeypatch.setitem(METHODS, "mine", Recipe(lambda p: p.log_pf.mean() * math.nan))
    with pytest.raises(InputError, match="mine: the loss is nan at step 0; lower its rate"):
        trained(tiny, "mine")
    monkeypatch.setitem(METHODS, "mine", Recipe(lambda p: p.nothing))
    with pytest.raises(AttributeError, match="nothing"):
        cli(*tiny, "--quick", "--methods=mine", f"--out={tiny[0][7:]}/out")

def test_a_recipe_is_the_method_then_what_its_name_changes(monkeypatch):
    assert recipe_of("tb") is METHODS["tb"]
    monkeypatch.setitem(METHODS, "mine", Recipe(gflowgr.tb_loss, lam=4.0, epochs=5))
    for name, wanted in (
            ("mine:exact=0", Recipe(gflowgr.tb_loss, lam=4.0, epochs=5, exact=False)),
            ("paper:exact=1:sampler=uniform", replace(METHODS["paper"], exact=True,
                                                      sampler="uniform")),
            ("cm:debias=1", Recipe(teacher="cm", power=1.0, debias=1.0)),
            ("sft:epochs=8:rate=.1", replace(METHODS["sft"], epochs=8, rate=0.1))):
        assert recipe_of(name) == wanted, name
    assert recipe_of("tb", quick=True).epochs == 1
    assert recipe_of("tb:epochs=3", quick=True).epochs == 3

def test_an_sft_comes_first_and_a_real_log_has_its_file_of_flags():
    for methods, wanted in (("cm", ["cm"]), ("cm, tb", ["sft", "cm", "tb"]),
                            ("sft:epochs=1,tb,sft", ["sft:epochs=1", "tb", "sft"])):
        settings = gflowgr.parse([f"--methods={methods}"])
        assert [*gflowgr.recipes_of(settings)] == wanted
    real = gflowgr.parse([f"@{ROOT / 'data/real.txt'}", "--data=ml-100k"])
    assert (real.width, real.layers, real.data) == (128, 3, "ml-100k")
    recipes = gflowgr.recipes_of(real)
    assert [name.partition(":")[0] for name in recipes] == ["pop", "cm", "blend", "sft", "tb"]
    assert [*recipes.values()][-1].teacher == "blend"

# --- The oracle, pictures, metrics, gains ---------------------------------------------------------
@pytest.mark.parametrize("method", ["tb", "db:exact=0"])                  # flows: exact, learned
def test_the_oracle_reaches_the_reward(method, tmp_path, monkeypatch):
    TOY["write"](tmp_path, 30, 4, 3, 1)                         # P is .6 from R/Z at first
    drawn = []
    monkeypatch.setattr(figures, "plot_flows", lambda *arguments: drawn.append(arguments))
    flags = "--codes=3 --levels=3 --width=32 --layers=1".split()
    status, out, err = cli(f"--data={tmp_path}", *flags, f"--oracle={method}",
                           f"--out={tmp_path / 'a/new'}")
    assert status == 0, err
    distances = [*map(float, re.findall(r"\(2 at most\) (\d\.\d{4})", out))]
    assert len(distances) == 11
    assert distances[0] > 0.5
    assert distances[-1] <= 0.02
    [[*_, panels]] = drawn
    assert [*panels] == ["P before training", "R/Z", "P after training"]
    before, goal, after = [panel.numpy() for panel in panels.values()]
    np.testing.assert_allclose(after, goal, atol=0.02)
    assert abs(before - goal).sum() > 0.3

def test_flows_are_drawn_as_bars_with_titles(monkeypatch):
    axes = [*Figure().subplots(1, 3)]
    monkeypatch.setattr(figures, "picture", lambda *sizes: nullcontext(axes))
    panels = {"P before": [0.02, 0.004, 0.976], "R/Z": [0.5, 0.2, 0.3], "P": [0.44, 0.26, 0.3]}
    figures.plot_flows("path", [[0, 0], [0, 1], [1, 1]], ["Ash", "Bay", "Cat"], panels)
    names = ["all", "code 1", "code 2"]
    for axis, title, bars, texts in zip(axes, panels, (
            # (level, from, height) of the root, of (0) and (1), of the items
            [(0, 0, 1), (1, 0.976, 0.024), (1, 0, 0.976), (2, 0.98, 0.02), (2, 0, 0.976)],
            [(0, 0, 1), (1, 0.3, 0.7), (1, 0, 0.3), (2, 0.5, 0.5), (2, 0.3, 0.2), (2, 0, 0.3)],
            [(0, 0, 1), (1, 0.3, 0.7), (1, 0, 0.3), (2, 0.56, 0.44), (2, 0.3, 0.26), (2, 0, 0.3)]
            ), (["L1 distance from R/Z: 1.35"], [],
                ["L1 distance from R/Z: 0.12", "44% Ash", "26% Bay", "30% Cat"])):
        found = [(bar.get_x(), bar.get_y(), bar.get_height()) for bar in axis.patches]
        np.testing.assert_allclose(found, bars, atol=1e-9)      # without Bay's .004
        assert axis.get_title() == title
        assert sorted(filter(None, (text.get_text() for text in axis.texts))) == sorted(
            names + texts)
        colors = [bar.get_facecolor() for bar in axis.patches]  # that of the root leads to Ash
        assert [color == colors[0] for color in colors] == [sum(bar[1:]) == 1 for bar in bars]

def test_lines_end_in_names_that_do_not_meet(tmp_path, monkeypatch):
    drawn = []
    def kept(*sizes, original=figures.picture):
        with original(*sizes) as axes:
            yield axes
            drawn.extend(axes)
    monkeypatch.setattr(figures, "picture", contextmanager(kept))
    lines = {"sft": [(1, 0.3), (2, 0.4)], "tb": [(1, 0.1), (2, 0.401)], "teacher": [(2, 0.8)]}
    figures.plot_lines(tmp_path / "a.png", {"NDCG@10": lines}, "users", [1, 2])
    [axis] = drawn
    assert [text.get_text() for text in axis.texts] == ["sft .400", "tb .401", "teacher .800"]
    boxes = [text.get_window_extent() for text in axis.texts]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"

def test_squares_are_as_full_as_their_number(tmp_path):
    figures.draw_squares(tmp_path / "a.svg", "of ten", {"sft": (6.2, "#888888"), "tb": (10, "red")})
    text = (tmp_path / "a.svg").read_text()
    for color, wanted in (("#888888", [26] * 6 + [5.2, 0, 0, 0]), ("red", [26] * 10)):
        full = re.findall(f'width="([0-9.]+)" height="26" fill="{color}"', text)
        assert [*map(float, full)] == wanted
    assert ">6.2</text>" in text and text.count("<rect") == 41

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
    assert report.means({}, [[0, -1], [0, 1]], SimpleNamespace(titles="abcd"))["coverage@10"] == 0.5

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

# --- A run, saved models --------------------------------------------------------------------------
ASKED = ["pop", "cm:debias=.5", "sft:epochs=2:rate=.005", "tb:epochs=2",
         "tb:trajectories=3:epochs=2"]

@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "a/new/place"
    flags = [*tiny, f"--out={out}", "--seeds=1, 2", f"--methods={', '.join(ASKED)}"]
    status, printed, err = cli(*flags)
    assert status == 0, err
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return SimpleNamespace(out=out, flags=flags, printed=printed, data=load_data(flags[0][7:]),
                           results=results, runs=results["runs"])

def test_every_run_counts_and_its_saved_model_serves_what_was_measured(finished):
    assert [run["method"] for run in finished.runs] == 2 * ASKED
    past = [history[:-1] for history in finished.data.histories]
    targets = torch.tensor([history[-2:] for history in finished.data.histories])
    for run in finished.runs:
        name = run["method"]
        assert all(0 <= seconds < 600 for seconds in run["seconds"].values())
        lists = torch.tensor(run["lists"])
        expected = ndcg_loops(lists, targets[:, 1], 10)
        assert run["metrics"]["ndcg@10"] == approx(expected.mean().item(), abs=1e-6)
        expected = recall_loops(lists, targets[:, 1], 5)
        assert run["metrics"]["recall@5"] == approx(expected.mean().item(), abs=1e-6)
        listed = {*lists.flatten().tolist()} - {-1}
        assert run["metrics"]["coverage@10"] == len(listed) / 48
        folder = finished.out / f"{name}-{run['seed']}".replace(":", ",")
        assert folder.exists() == ("validation" in run) == (name in ASKED[2:])
        if folder.exists():                                     # the last epoch was saved
            model = Policy.from_pretrained(folder)
            assert model.recommend(past)[0].tolist() == run["lists"]
            ndcg = ndcg_loops(model.recommend(finished.data.train)[0], targets[:, 0], 10).mean()
            assert run["validation"] == approx(ndcg.item())
    counts = np.bincount(sum(finished.data.train, []), minlength=48)
    for history, row in zip(past, finished.runs[0]["lists"]):
        assert counts[row].tolist() == sorted(np.delete(counts, history))[:-11:-1]

def test_the_product_orders_the_best_of_the_teacher_by_both(finished):
    past = [history[:-1] for history in finished.data.histories]
    folder = finished.out / f"{ASKED[2]}-1".replace(":", ",")
    sft = Policy.from_pretrained(folder)
    teacher = Teacher("svd", finished.data, 0.5, 3.0)
    scores = teacher.scores(past)
    items, _ = rivals.product(sft, teacher, k=14)(past)
    for c, history in enumerate(past[:20]):
        left = [v for v in range(48) if v not in history]
        both = one_by_one(sft, history)[0].sum(1).exp() * scores[c]
        best = sorted(left, key=scores[c].__getitem__)[:-15:-1]
        assert items[c].tolist() == sorted(best, key=both.__getitem__)[:-11:-1]
    run = rivals.measured("product:debias=.5:power=3", finished.data, folder, 1)
    assert run["lists"] == rivals.product(sft, teacher)(past)[0].tolist()

def test_fine_tuning_starts_from_the_last_sft_with_its_own_dropout(tiny, tmp_path, monkeypatch):
    begun = []
    def train(name, recipe, policy, *others):
        own, block = policy.lm.transformer.drop.p, policy.lm.transformer.h[0]
        assert block.attn.resid_dropout.p == block.mlp.dropout.p == own
        begun.append((own, policy.lm.transformer.wpe.weight.sum().item()))
        torch.nn.init.constant_(policy.lm.transformer.wpe.weight, len(begun))
        begun.append(policy.lm.transformer.wpe.weight.sum().item())
        return 0.0
    monkeypatch.setattr(gflowgr, "train", train)
    methods = "--methods=sft,tb,sft:dropout=.3,paper"
    assert cli(*tiny, methods, f"--out={tmp_path}")[0] == 0
    (sft, new), first, (tb, of_first), _, (again, same), second, (paper, of_second), _ = begun
    assert (sft, tb, again, paper) == (0.4, 0.0, 0.3, 0.4)
    assert (of_first, of_second, same) == (first, second, new)
    assert len({new, first, second}) == 3

def test_a_run_leaves_the_table(finished):
    table = (finished.out / "results.md").read_text("utf-8")
    assert table in finished.printed
    summary = finished.results["summary"]
    base = summary[ASKED[2]]["ndcg@10"]["mean"]
    for method, metrics in summary.items():
        own = [run["metrics"]["ndcg@10"] for run in finished.runs if run["method"] == method]
        mean = np.mean(own)
        assert metrics["ndcg@10"] == approx({"mean": mean, "std": np.std(own, ddof=1)})
        assert f"| {method} | {mean:.4f} |" in table
        assert method == ASKED[2] or f"| {mean / base - 1:+.0%} [" in table
    for low, high in re.findall(r"\[(.*?)%, (.*?)%\]", table):
        assert int(low) <= int(high)

def test_two_lists_are_of_a_user_who_is_like_the_mean(tmp_path, capsys):
    data = load_data("toy", quick=True)
    lists = np.random.default_rng(0).integers(720, size=(2, 100, 10))
    likes = [[sum(item in liked for item in items) for items, liked in
              zip(own.tolist(), data.truth["liked"])] for own in lists]
    wanted = (1, 1)                                             # means of .06 and .14 round to it
    runs = [{"method": name, "lists": own.tolist(), "metrics": {"liked@10": mean}}
            for name, own, mean in zip(("sft", "tb"), lists, (.06, .14))]
    settings = {"data": "toy", "quick": True}
    report.write(tmp_path / "results.json", {"runs": runs, "settings": settings})
    report.two_lists(tmp_path)
    first = min((len(data.histories[user]), user) for user in range(100)
                if (likes[0][user], likes[1][user]) == wanted)[1]
    took, *rows = capsys.readouterr().out.partition("took\n")[2].splitlines()
    took = [took, *rows[:-10]]
    assert [line.strip() for line in took] == [data.titles[v] for v in data.histories[first][:-1]]
    for own, shown in zip(lists, zip(*[(row[:24], row[24:]) for row in rows[-10:]])):
        for item, cell in zip(own[first], shown):
            assert cell.split("✓")[0].strip() == data.titles[item]
            assert ("✓" in cell) == (item in data.truth["liked"][first])

def test_the_first_table_of_the_readme_is_that_of_the_first_command(finished):
    rows = re.findall(r"^\|.*\|$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    methods = gflowgr.parse([]).methods.split(",")
    assert rows[:2] == finished.printed[finished.printed.index("| method"):].splitlines()[:2]
    assert [row.split(" | ")[0][2:] for row in rows[2:2 + len(methods)]] == methods

def test_ctrl_c_leaves_the_finished_methods_and_an_old_run_until_then(tiny, tmp_path, monkeypatch):
    flags = [*tiny, "--quick", f"--out={tmp_path}", "--methods=pop,sft,tb"]
    assert cli(*flags)[0] == 0
    old = (tmp_path / "results.json").read_text()
    saved = (tmp_path / "tb-42/model.safetensors").read_bytes()
    def stop(*others):
        raise KeyboardInterrupt
    monkeypatch.setattr(gflowgr, "train", stop)
    status, out, err = cli(*flags, "--methods=sft")             # nothing is finished
    assert (status, err) == (130, "stopped; a run's table has the methods that are finished\n")
    assert (tmp_path / "results.json").read_text() == old
    status, out, err = cli(*flags)
    assert status == 130 and "| pop | " in out and "| sft | " not in out
    assert [*json.loads((tmp_path / "results.json").read_text())["summary"]] == ["pop"]
    assert (tmp_path / "tb-42/model.safetensors").read_bytes() == saved
    monkeypatch.setattr(report, "write", lambda *others: 1 / 0) # a full disk
    with pytest.raises(ZeroDivisionError):
        made().save_pretrained(tmp_path / "tb-42")
    assert (tmp_path / "tb-42/model.safetensors").read_bytes() == saved

@pytest.mark.parametrize("file, text", [
    ("semantic_ids.json", None), ("config.json", "{"), ("model.safetensors", None),
    ("writer.safetensors", None),
    ("semantic_ids.json", '{"num_codes": 4, "codes": [[1]], "catalogue": {}}')])
def test_a_spoiled_folder_is_one_line_and_no_pickle_is_read(file, text, tmp_path):
    policy = made()
    policy.save_pretrained(tmp_path)
    close(Policy.from_pretrained(tmp_path).recommend(HISTORIES), policy.recommend(HISTORIES))
    plain = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)   # transformers alone
    close(plain.state_dict(), policy.lm.state_dict())
    torch.save(policy.lm.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / file).unlink()
    if text:
        (tmp_path / file).write_text(text)
    refused("holds no saved model", "--recommend=x", "--model", tmp_path)

def test_recommend_prints_ten_titles(finished, monkeypatch):
    titles = finished.data.titles
    monkeypatch.chdir(finished.out / "tb,epochs=2-1")
    asked = ["--model=.", "--recommend", titles[3].upper(), "5"]
    items, _ = Policy.from_pretrained(".").recommend([[3, 5]])
    assert cli(*asked)[1].splitlines()[-10:] == [titles[v] for v in items[0]]
    refused(titles[3], *asked[:-1], titles[3][:-1] + "x")
    refused("none is left", *asked[:-2], *titles)
    assert cli(*asked[:-2], *titles[1:])[1].splitlines()[-1] == titles[0]       # it alone is left

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
    assert load_data("toy", quick=True).sizes["users"] == 100   # of 1395
    toy = prepared("--data=toy")
    assert toy.ids.num_codes == 64                              # 64² ≥ 4 · 720 > 32²
    toy.settings.device = "meta"
    policy = gflowgr.make_policy(toy.settings, toy.data, toy.ids, 0)
    assert all(x.is_meta for x in policy.state_dict().values())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gflowgr.parse([]).device == "cuda"

def test_two_users_and_nine_items_without_text_or_truth_work_as_they_are(tmp_path):
    events = EVENTS.replace("b,1", "b,2") + "u ,a ,9\nw,a,1\nw,b,1\n"
    folder = folder_of(tmp_path / "d", "\n".join(["item_id", *"abcdefghi"]), events)
    status, out, err = cli("--data", folder, "--out", tmp_path / "out", "--quick")
    assert status == 0, err
    assert "dropped: 1 repeats of an item, 1 users with < 3 items" in out
    assert "a real log needs other settings: python gflowgr.py @data/real.txt --data DIR\n" in out
    for method in gflowgr.parse([]).methods.split(","):
        assert f"| {method} | " in out
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
    assert together[0] + 0.2 < together[1] < together[2] - 0.1
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
                "inter": "user\tid\tstars\ttime\nu\ta\t1\t3\nu\tb\t7\t2\nu\tc\t10\t1"}}

@pytest.mark.parametrize("name, titles, history, liked", [
    ("beauty", ["A soap", "1", "2", "3"], [0, 2, 1], [True] * 3),
    ("ml-100k", ["A (1990)", "B (1991)", "C (1992)"], [2, 1, 0], [True, True, False])])
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
    for name in (*gflowgr.FIELDS, *SAMPLERS, *PAPERS, *TEACHERS, "example: --methods"):
        assert re.search(rf"\b{name}\b", words)

@pytest.mark.parametrize("module", [gflowgr, reward, tokenizer, folder_of_data, report, figures])
def test_examples_in_docstrings(module):
    assert doctest.testmod(module).failed == 0

@pytest.fixture
def by_itself(tmp_path, monkeypatch):         # what a page adds and writes is gone after it
    for name in ("METHODS", "SAMPLERS"):
        monkeypatch.setattr(gflowgr, name, copy.deepcopy(getattr(gflowgr, name)))
    monkeypatch.setitem(TEACHERS, "near", None)
    monkeypatch.chdir(tmp_path)

@pytest.mark.parametrize("page", "README data/example data/own data/course data/results".split())
def test_code_and_commands_on_the_pages(page, by_itself):
    text = (ROOT / f"{page}.md").read_text(encoding="utf-8").replace("```", "")
    test = doctest.DocTestParser().get_doctest(text, {}, page, None, 0)
    assert doctest.DocTestRunner().run(test).failed == 0        # one script, in order
    for line in re.findall(r"(?:gflowgr\.py |[`\"])(--[^`\"\n]+)", text.replace("\\\n", "")):
        if re.search("--(methods|oracle) (?!.*(…|[A-Z]{3}))", line):     # it is whole
            settings = gflowgr.parse(shlex.split(line, comments=True))
            gflowgr.recipes_of(settings)
            recipe_of(settings.oracle or "tb")

WORDS = {"README": 1500, "data/paper": 950, "data/results": 3050, "data/course": 2000,
         "data/own": 1300, "data/example": 700, "data/experiments/README": 300}

@pytest.mark.parametrize("page", WORDS)
def test_a_page_keeps_its_length_and_its_links(page):
    path = ROOT / f"{page}.md"
    text = path.read_text("utf-8")
    assert len(text.split()) <= 1.03 * WORDS[page]
    for link in re.findall(r"\]\((?!https:)([^)]+)\)", text):
        file, _, anchor = link.partition("#")
        there = path.parent / file if file else path
        assert there.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)", there.read_text("utf-8"), re.MULTILINE)
            names = [re.sub(r"[^\w -]", "", heading.lower()) for heading in headings]
            assert anchor in [name.replace(" ", "-") for name in names], link

EXPERIMENTS = sorted({path.stem for path in (ROOT / "data/experiments").glob("*.py")} - {"common"})

@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_runs_and_prints_its_tables(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    def evaluate(recommend, logs, original=gflowgr.evaluate):   # eight lists serve all users
        by_user, ranked = original(recommend, logs[:8])
        by_user = {metric: np.resize(values, len(logs)) for metric, values in by_user.items()}
        return by_user, ranked.repeat(len(logs), 1)[:len(logs)]
    monkeypatch.setattr(gflowgr, "evaluate", evaluate)
    monkeypatch.setattr(gflowgr, "train", lambda *given: 0.0)   # random weights will do
    monkeypatch.setattr(gflowgr, "METHODS", {**METHODS})
    monkeypatch.setattr(gflowgr, "SAMPLERS", {**SAMPLERS})
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--quick"])
    monkeypatch.delitem(sys.modules, "common", raising=False)
    with suppress(SystemExit):                                  # rivals.py is a command
        runpy.run_path(str(ROOT / f"data/experiments/{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert re.search(r"\n\| .* \|\n\| ---.*\n\| .*\d", said) or name in ("loop", "scale")

@pytest.mark.parametrize("name", sorted({*EXPERIMENTS} - {"rivals", "limit"}))  # no table; slow
def test_the_pages_have_the_kept_figures(name, monkeypatch):
    flags = ["--logs", "ml-100k"] if name == "real_logs" else []
    monkeypatch.setattr(gflowgr, "METHODS", {**METHODS})
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--check", *flags])
    monkeypatch.delitem(sys.modules, "common", raising=False)
    runpy.run_path(str(ROOT / f"data/experiments/{name}.py"), run_name="__main__")

def test_the_first_table_is_that_of_the_kept_trainings():
    kept = json.loads((ROOT / "data/experiments/kept/losses.json").read_text())
    page = (ROOT / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| (\S+) \| (0\.\d+) \| (0\.\d+) \|", page, re.MULTILINE)
    assert [row[0] for row in rows] == gflowgr.parse([]).methods.split(",")
    for method, *row in rows[1:]:                               # `svd` alone is not kept
        run = kept[f"toy {method} 42"]
        assert [run["ndcg@10"], run["liked@10"]] == pytest.approx([*map(float, row)], abs=2e-4)

# --- Bad flags and files: one line on stderr, exit status 2, nothing written ----------------------
@pytest.mark.parametrize("said, flag", [
    ("no folder nowhere", "--data=nowhere"),
    ("go together", "--recommend=x"),
    ("--seeds: invalid seeds value: '42,x'", "--seeds=42,x"),
    ("--device: invalid choice: 'nonsense'", "--device=nonsense"),
    ("--ids nonsense is not content, mixed or", "--ids=nonsense"),
    ("do not fit into 2^1", "--codes=2 --levels=1"),
    ("--width: 0 is not a whole number above 0", "--width=0"),
    ("--levels: -1 is not a whole number above 0", "--levels=-1"),
    ("unrecognized arguments: --lam=3", "--lam=3"),
    ("No such file or directory: 'nowhere.txt'", "@nowhere.txt"),
    ("--ids content needs", "--ids=content"),
    ("--codes 2002: more than the 2001 items", "--codes=2002"),
    ("there is no method 'x'", "--oracle=x"), ("needs a method with a loss", "--oracle=sft"),
    ("there is no method ''; there are sft, ", "--methods=tb,"),
    ("tb:sampler=x: sampler is one of session, ", "--data=nowhere --methods=tb:sampler=x"),
    ("tb:teacher=x: teacher is one of pop, cm, ", "--methods=tb:teacher=x"),
    ("tb:loss=x: no field 'loss'; there are lam, sampler, ", "--methods=tb:loss=x"),
    ("tb:lam=x: lam is not 'x', but like 10", "--methods=tb:lam=x"),
    ("tb:exact=no: exact is not 'no', but like 1", "--methods=tb:exact=no"),
    ("tb:rate=nan: rate has to be above 0", "--methods=tb:rate=nan"),
    ("dropout has to be from 0 to below 1", "--methods=sft:dropout=1"),
    ("tb:w_s=-1: w_s has to be 0 or more", "--methods=tb:w_s=-1"),
    ("there is no method 'cm+cm'", "--methods=cm+cm"),
    ("nowhere.csv", "--ids=nowhere.csv")])
def test_a_wrong_flag_is_one_line_and_status_2(said, flag, told, tmp_path):
    folder = folder_of(tmp_path / "d", "\n".join(["item_id", *"abcd", *map(str, range(1997))]))
    told(said.removeprefix("x: "), f"--data={folder}", *flag.split())

def test_without_a_network_one_line_says_so(told, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_of_data, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "ml-100k").mkdir()
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

# === The commands of the exercises ================================================================
def wrong(message):                           # → exit status of a wrong command
    print(f"error: {message}", file=sys.stderr)
    return 2

def main(argv):                               # → exit status
    for stream in (sys.stdout, sys.stderr):   # titles and messages may hold anything
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    hint = "--hint" in argv
    command, *others = [word for word in argv if word != "--hint"] or [""]
    names = others[:1] if command == "--stub" else others[1:] if command == "--grade" else []
    odd = [name for name in names if name not in EXERCISES]
    if odd and odd[0].endswith(".py"):
        return wrong("--grade takes one file, or a folder of files")
    if odd:
        return wrong(f"there is no exercise {odd[0]}; there are {', '.join(EXERCISES)}")
    if command == "--list":
        for name, exercise in EXERCISES.items():
            part = "project" if exercise.session == 4 else f"session {exercise.session}"
            print(f"{part:10} {name:28}{exercise.minutes:3} minutes")
    elif command == "--stub":
        if len(others) != 2:
            return wrong("--stub needs NAME and FILE, to which the stub is appended")
        file = Path(others[1])
        try:
            if others[0] in begun(file):
                return wrong(f"{file} has this function already; rename it first")
            with open(file, "a", encoding="utf-8") as end:
                end.write(stub(EXERCISES[others[0]], hint))
        except OSError as error:
            return wrong(error)
        print(f"{others[1]}: write {EXERCISES[others[0]].task.__name__} at its end")
    elif command == "--grade":
        if not others:
            return wrong("--grade needs a file, or a folder of files")
        return grade_all(others[0], others[1:])
    else:
        return wrong(f"there is no command {command}\n{__doc__}" if command else __doc__)
    return 0

if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main(sys.argv[1:]))
    sys.exit(130)
