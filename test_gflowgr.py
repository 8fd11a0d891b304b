"""The exercises and their grader, the tests of GFlowGR, the speed. Tests: python -m pytest -q

    python test_gflowgr.py --list                      the exercises
    python test_gflowgr.py --stub NAME                 the beginning of a file for one of them
    python test_gflowgr.py --grade FILE [NAME …]       what is right in a file, or of it
    python test_gflowgr.py --grade FOLDER [NAME …]     all .py files below a folder, and a table
    python test_gflowgr.py --speed [--tiny]            seconds of two ways to do a thing

A file is graded in a process of its own: 60 seconds at most, of which 5 load PyTorch. What the file
prints is not shown. The exit status is 0 if all is right, 1 if not, 2 if the command is wrong.
gflowgr.py and this file hold answers, also of vargrad and detailed_balance; none of subtb, soft_rl.
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
import random
import re
import runpy
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import timeit
import traceback
import zipfile
import zlib
from collections import namedtuple
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from pytest import approx
from transformers import GPT2LMHeadModel

import data as folder_of_data
import gflowgr
import reward
import tokenizer
from data import InputError, figures, load_data, read_ids, report
from gflowgr import NEVER, Policy, RECIPES, Recipe, SAMPLERS, World, recipe_of
from reward import CollaborativeModel, Debiased, Guided, Reward
from tokenizer import SemanticIDs

ROOT = Path(gflowgr.__file__).parent
TOY = runpy.run_path(str(ROOT / "data/toy/prepare.py"))
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR")    # of torch: it calls them "beta"
close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4, check_dtype=False)

# === Exercises, in the order of the course ========================================================
# A block: cases, the first to check by hand; the answer in plain loops, with which a student's is
# compared; typical mistakes, each of which has to fail in a case; the registration.
EXERCISES = {}                                                  # name → Exercise
Case = namedtuple("Case", "what inputs expected", defaults=(None,))    # None: what the loops return

@dataclass
class Exercise:
    """A function to write. Its signature and docstring are the task that a student reads."""
    session: int
    minutes: int
    task: object                    # the function of the project, or a docstring alone
    answer: object                  # in plain loops; None: no answer stands in this file
    cases: object                   # () → list of Case
    mistakes: list
    learned: tuple = ()             # inputs by which the loss has to have the right gradient
    gradient_alone: bool = False    # compare no value: a right loss of another form has another
    note: str = ""                  # stands in the stub: what self has, what the cases leave out
    read: object = lambda found: found      # what is compared of a result
    tolerance: float = 1e-4

    def __post_init__(self):
        EXERCISES[self.task.__qualname__] = self

# --- Session 1: recall_at (5 minutes) -------------------------------------------------------------
def ranking_cases():
    lists = torch.tensor([[4, 2, 7, 1], [1, 3, -1, -1], [5, 6, 0, 9], [3, 2, 1, 0], [8, 0, 5, 2]])
    wanted = torch.tensor([7, 9, 5, 2, 2])
    return [
        # 4 has rank 1: recall 1, NDCG 1 / log2(2) = 1
        Case("one user", (lists[:1], torch.tensor([4]), 3)),
        # 7 has rank 3: not in the first two, so 0 and 0
        Case("one user, whose item comes too late", (lists[:1], lists[:1, 2], 2)),
        *[Case(f"five users, {k} places", (lists, wanted, k)) for k in (1, 3)]]
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
Exercise(1, 10, gflowgr.ndcg_at, ndcg_loops, ranking_cases, [takes_the_natural_logarithm])
# --- Session 1: CollaborativeModel.scores (45 minutes) --------------------------------------------
TRAIN = [np.random.default_rng(u).permutation(20)[:4 + u % 8].tolist() for u in range(30)]
OTHER = dict(window=3, nearness=0.6, backward=0.5, power=0.7, length=4, decay=0.9)
def counted(log, n, backward=0.25, power=0.5, **options):       # for cm_loops
    cm = CollaborativeModel.fit(log, n, backward=backward, power=power, **options)
    vars(cm).update(log=log, backward=backward, power=power)
    return cm
def cm_cases():
    small = counted([[0, 1, 2]], 4, popularity=0.0)
    # near[0, 1] = 0.8^0 = 1 and near[0, 2] = 0.8^1 = 0.8: shares 1/1.8 and 0.8/1.8
    cases = [Case("a CM of one history, 0 1 2, without popularity; 4 items", (small, [[0]]))]
    log = [*TRAIN, [20, 21, 0, 1]]
    long = [24, *range(9, 24)]
    before = [TRAIN[5][:3], [20, 21], []]
    after = [TRAIN[5][3:], [0, 1], TRAIN[2]]
    for options in ({}, OTHER):
        cm = counted(log, 25, **options)
        cases.append(Case("31 histories", (cm, [[24], [3, 7], long, list(range(25))])))
        cases.append(Case("31 histories; their own one is taken out", (cm, before, after)))
    return cases

def near_loops(cm, log, j):                   # near[j, v] of all items v, counted from a log
    row = torch.zeros(len(cm.count))
    for history in log:
        if j in history:
            for place, v in enumerate(history):
                distance = place - history.index(j)             # v stands so far after j
                if 0 < abs(distance) <= cm.window:
                    weight = cm.nearness ** (abs(distance) - 1)
                    row[v] += weight if distance > 0 else cm.backward * weight
    count = sum(cm.log, []).count(j)                            # counts of items stay
    return row / max(count, 1) ** cm.power

def cm_loops(self, histories, following=None):
    popular = torch.ones(len(self.count))
    for v in sum(self.log, []):
        popular[v] += 1
    rows = []
    for b, history in enumerate(histories):
        own = history + following[b] if following else None     # leave this one out
        log = [other for other in self.log if other != own]
        score = torch.zeros(len(popular))
        for age, j in enumerate(reversed(history[-self.length:])):
            score += self.decay ** age * near_loops(self, log, j)
        score[history] = 0
        rest = popular.clone()
        rest[history] = 0
        if rest.sum() == 0:                                     # the user has seen all items
            rest = popular
        s = self.popularity if score.sum() > 0 else 1
        rows.append((1 - s) * score / max(score.sum(), 1e-12) + s * rest / rest.sum())
    return torch.stack(rows)
def knows_the_answer(self, histories, following=None): return cm_loops(self, histories)
Exercise(1, 45, CollaborativeModel.scores, cm_loops, cm_cases,
         [knows_the_answer],
         note="self.index (2, m) and self.value (m,): near[j, v] is value[i] where index[:, i] is "
         "(j, v), else 0\nself.count (n,): how often each item is in the training log\n"
         "self.scale (n,): 1 / count(j)^power\n"
         "self.window, nearness, length, decay, popularity: numbers, see the docstring")
# --- Session 2: trajectory_balance (10 minutes) ---------------------------------------------------
def logs(*numbers):
    return torch.tensor(numbers).log()
def balance_cases():
    return [
        # log 1 + log 1/2 − log 1/4 = log 2; its square is 0.4805
        Case("1 path: Z = 1, P = 1/2, R = 1/4", (logs(1.0), logs([0.5]), logs([0.25]))),
        Case("3 users, 2 paths", (torch.randn(3), torch.randn(3, 2), torch.randn(3, 2)))]
def balance_loops(log_z, log_pf, log_r):
    total = 0
    for c, j in np.ndindex(log_pf.shape):
        total = total + (log_z[c] + log_pf[c, j] - log_r[c, j]) ** 2
    return total / log_pf.numel()
def takes_one_z_for_all_users(log_z, log_pf, log_r):
    return balance_loops(log_z[-1:].expand(len(log_z)), log_pf, log_r)
def trains_z_alone(log_z, log_pf, log_r): return balance_loops(log_z, log_pf.detach(), log_r)
Exercise(2, 10, gflowgr.trajectory_balance, balance_loops, balance_cases,
         [takes_one_z_for_all_users, trains_z_alone], learned=("log_z", "log_pf"))
# --- Session 2: detailed_balance (15 minutes) -----------------------------------------------------
def detailed_cases():
    return [
        # log 2 + log 1/2 − log 1 = 0; log 1 + log 1/2 − log 1/4 = log 2: 0 + 0.4805
        Case("1 path of 2 steps: F = 2, 1, R = 1/4; P = 1/2, 1/2",
             (logs([[2.0, 1.0, 0.25]]), logs([[0.5, 0.5]]))),
        Case("2 contexts, 3 paths of 4 steps", (torch.randn(2, 3, 5), torch.randn(2, 3, 4)))]
def detailed_loops(log_flow, log_pf):
    total = 0
    for c, j, l in np.ndindex(log_pf.shape):
        residual = log_flow[c, j, l] + log_pf[c, j, l] - log_flow[c, j, l + 1]
        total = total + residual ** 2
    return total / log_pf[..., 0].numel()                       # the number of paths
def averages_the_steps(log_flow, log_pf):
    return detailed_loops(log_flow, log_pf) / log_pf.shape[-1]
Exercise(2, 15, gflowgr.detailed_balance, detailed_loops, detailed_cases, [averages_the_steps],
         learned=("log_flow", "log_pf"))
# --- Session 2: vargrad (20 minutes) --------------------------------------------------------------
def vargrad_cases():
    return [
        # log P − log R = 0, −log 4: both are log 2 away from their mean; (log 2)² = 0.4805
        Case("1 user: P = 1, 1; R = 1, 4", (logs([1.0, 1.0]), logs([1.0, 4.0]))),
        Case("3 users, 4 paths", (torch.randn(3, 4), torch.randn(3, 4)))]
def vargrad_loops(log_pf, log_r):
    log_z = [(log_r[c] - log_pf[c]).mean() for c in range(len(log_pf))]
    return balance_loops(torch.stack(log_z), log_pf, log_r)
def divides_by_one_less(log_pf, log_r):
    return vargrad_loops(log_pf, log_r) * log_pf.shape[1] / (log_pf.shape[1] - 1)
Exercise(2, 20, gflowgr.vargrad, vargrad_loops, vargrad_cases, [divides_by_one_less],
         learned=("log_pf",))
# --- Session 2: subtb (30 minutes). No answer stands here, only cases with known results ----------
def subtb(log_flow, log_pf):
    """Sub-trajectory balance (SubTB): balance on every part of a path → scalar.

    log F(s_0) … log F(s_L) = log R (C, J, L+1); log P_F of each step (C, J, L). The residual of a
    sub-path s_i → s_j, i < j, is log F(s_i) + Σ log P_F of its steps − log F(s_j). The loss is the
    mean of its square over all L(L+1)/2 sub-paths, over C and over J.
    """
def subtb_cases():
    log_flow = torch.tensor([[[0.0, 1.0, 1.0, 1.0]], [[0.0, 0.0, 0.0, 0.0]]])
    log_pf = torch.tensor([[[0.0, 0.0, 0.0]], [[0.0, 0.0, 3.0]]])
    gradient = torch.tensor([[[-3.0, -2.0, -1.0]], [[3.0, 6.0, 9.0]]]) / 6
    return [
        # s_0 → s_1: 2 + 0 − 0; s_0 → s_2: 2; s_1 → s_2: 0. (2² + 2² + 0²) / 3
        Case("2 steps: log F = 2, 0, 0; P = 1, 1",
             (torch.tensor([[[2.0, 0.0, 0.0]]]), torch.zeros(1, 1, 2)),
             {"value": torch.tensor(8 / 3), "log_pf": torch.tensor([[[8.0, 4.0]]]) / 3}),
        # the three sub-paths from s_0 are −1 off; the three to s_3 are 3 off: (3/6 + 27/6) / 2
        Case("2 contexts, 3 steps", (log_flow, log_pf),
             {"value": torch.tensor(2.5), "log_pf": gradient})]
Exercise(2, 30, subtb, None, subtb_cases, [averages_the_steps], learned=("log_pf",))
# --- Session 2: soft_rl (20 minutes). No answer stands here, only cases with known results --------
def soft_rl(log_pf, log_r):
    """REINFORCE for KL(P ‖ R/Z), on paths drawn from P: log P, log R of paths (C, J) → scalar.

    The gradient of the KL is the mean, over paths drawn from P, of −(log R − log P) · ∇ log P. So
    the gain of a path is g = log R − log P, and its advantage A is g minus the mean of g over the
    J paths of its context. No gradient flows through A: it is a constant.
    The loss is the mean over all paths of −A · log P.
    """
def soft_rl_cases():
    log_pf = torch.tensor([[-1.0, -2.0, -3.0], [-2.0, -2.0, -2.0]])
    log_r = torch.tensor([[2.0, -2.0, -3.0], [0.0, 6.0, 3.0]])
    A = torch.tensor([[2.0, -1.0, -1.0], [-3.0, 3.0, 0.0]])     # g = 3 0 0 and 2 8 5
    return [
        # g = 2, 0, so A = 1, −1; −(1 · −1 + −1 · −2) / 2 = −0.5; gradient −A / 2
        Case("log P = −1, −2; log R = 1, −2", (log_pf[:1, :2], torch.tensor([[1.0, -2.0]])),
             {"value": torch.tensor(-0.5), "log_pf": torch.tensor([[-0.5, 0.5]])}),
        # A · log P adds up to 3 and 0: −3 / 6
        Case("2 users, 3 paths", (log_pf, log_r), {"value": torch.tensor(-0.5), "log_pf": -A / 6})]
def has_half_the_gradient_of_vargrad(log_pf, log_r): return vargrad_loops(log_pf, log_r) / 2
Exercise(2, 20, soft_rl, None, soft_rl_cases, [has_half_the_gradient_of_vargrad],
         learned=("log_pf",))
# --- Session 3: tree_mask (30 minutes) ------------------------------------------------------------
def mask_cases():
    return [
        # u sees u; the item sees u and itself; the code sees u and itself, not the item
        Case("<user> and an item; 1 branch of 1 code after <user>", (torch.tensor([[0]]), 2, 2)),
        Case("2 rows, 3 branches", (torch.tensor([[0, 3, 2], [1, 1, 3]]), 4, 3))]
def sees(ends, i, j, H, L):                   # does place i of a row see place j?
    if i < H:
        return j <= i
    branch = (i - H) // (L - 1)
    if j < H:
        return j <= ends[branch]
    return H + branch * (L - 1) <= j <= i
def mask_loops(ends, H, L):
    S = H + ends.shape[1] * (L - 1)
    mask = torch.full((len(ends), S, S), NEVER)
    for b, i, j in np.ndindex(mask.shape):
        if sees(ends[b], i, j, H, L):
            mask[b, i, j] = 0
    return mask
def makes_one_branch_of_all(ends, H, L):
    return mask_loops(ends[:, :1], H, 1 + ends.shape[1] * (L - 1))
Exercise(3, 30, gflowgr.tree_mask, mask_loops, mask_cases, [makes_one_branch_of_all])
# --- Session 3: curriculum (30 minutes) -----------------------------------------------------------
SCORES = [0.08, 0.45, 0.02, 0.25, 0.05, 0.15]
def curriculum_cases():                       # 3000 contexts that are all the same
    batch = SimpleNamespace(scores=torch.tensor([SCORES] * 3000), histories=[[4]] * 3000,
                            following=[[1, 0]] * 3000, positives=torch.tensor([1] * 3000))
    what = f"scores {SCORES}, 4 read, 1 and 0 to come"
    return [
        # 2, 3, 5 are left; score/2 + 1/12 is .093, .208, .158: shares .20, .45, .34
        Case(f"{what}; a pool of 1 item", (batch, 1, None, 0.0)),
        Case(f"{what}; places 2 to 5 of 0 to 6", (batch, 4, None, 0.6))]
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
Exercise(3, 30, gflowgr.curriculum, curriculum_loops, curriculum_cases, [begins_with_high_scores],
         read=shares_at_each_place, tolerance=0.07,
         note="batch.scores (C, n); batch.histories, batch.following: C lists of items;\n"
         "batch.positives (C,): the first of following. There is more: see Batch in gflowgr.py.\n"
         "policy is None. In 3000 equal contexts, each item's share at each place is compared.")
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
    policy = made()
    pair = made(ids=SemanticIDs([[0], [1]], 2))
    guide = torch.rand(5, 24) ** 4
    return [
        # item 0 was seen, so item 1 is left: P = 1, log P = 0
        Case("2 items, of which one was seen", (pair, [[0]], 2)),
        Case("1 beam, but k = 4", (policy, [[4], [3, 8, 1, 20, 9, 6]], 4, 1)),
        Case("3 beams, guided", (policy, HISTORIES, 2, 3, guide)),
        Case("1 item is left, or none", (policy, [list(range(23)), list(range(24))], 30))]
def under(rows, v, l):                        # items whose ID begins with l codes of item v
    return [w for w, row in enumerate(rows) if row[:l] == rows[v][:l]]

@torch.no_grad()
def one_by_one(policy, history):
    """log P_F of the steps and log F of the prefixes on the paths of all items, (n, L) each: every
    path a sequence of its own through plain GPT-2, without packing, padding or mask."""
    rows = policy.semantic_ids.codes.tolist()
    K = policy.semantic_ids.num_codes
    past = [1 + item for item in history[-policy.window:]]
    start = [policy.user_token + number for number in (0, *past)]
    tokens = []
    for row in rows:
        tokens.append(start + [l * K + code for l, code in enumerate(row[:-1])])
    out = policy.lm(torch.tensor(tokens), output_hidden_states=True)
    end = len(start) - 1
    log_flow = policy.flow_head(out.hidden_states[-1][:, end:])[..., 0]
    everything = set(range(len(rows)))
    left = everything - set(history) or everything              # all seen: all is legal
    log_pf = torch.full_like(log_flow, -math.inf)               # stays so where it is illegal
    for v, l in np.ndindex(log_pf.shape):
        legal = {rows[w][l] for w in left.intersection(under(rows, v, l))}
        logits = out.logits[v, end + l, l * K:(l + 1) * K]
        code = rows[v][l]
        if code in legal:
            log_pf[v, l] = logits[code] - logits[sorted(legal)].logsumexp(0)
    return log_pf, log_flow

def beam_loops(policy, history, beams, guide):     # {ID: score} where the beam ends, best first
    rows = [tuple(row) for row in policy.semantic_ids.codes.tolist()]
    left = [v for v in range(len(rows)) if v not in history]
    log_p = one_by_one(policy, history)[0].cumsum(1)
    best = {(): 0.0}
    for l in range(1, len(rows[0]) + 1):
        score = {}                                              # of each prefix of l codes
        for v in left:
            if rows[v][:l - 1] in best:
                below = [w for w in under(rows, v, l) if w in left]
                more = 0.0 if guide is None else guide[below].sum().log()
                score[rows[v][:l]] = (log_p[v, l - 1] + more).item()
        order = sorted(score, key=score.get, reverse=True)
        best = {prefix: score[prefix] for prefix in order[:beams]}
    return best
def recommend_loops(self, histories, k=10, beams=None, guide=None):
    rows = [tuple(row) for row in self.semantic_ids.codes.tolist()]
    items = torch.full((len(histories), k), -1)
    values = torch.full((len(histories), k), -math.inf)
    for b, history in enumerate(histories):
        own = None if guide is None else guide[b]
        best = beam_loops(self, history, max(beams or self.beams, k), own)
        for place, row in enumerate(list(best)[:k]):
            items[b, place] = rows.index(row)
            values[b, place] = best[row]
    return items, values
def recommends_what_was_seen(self, histories, k=10, beams=None, guide=None):
    return recommend_loops(self, [[]] * len(histories), k, beams, guide)
Exercise(3, 60, Policy.recommend, recommend_loops, recommend_cases, [recommends_what_was_seen],
         note="self.semantic_ids.codes (n, L): the ID of each item; self.beams: a number\n"
         "self.path_log_probs(histories, items (B, J)): log P_F of each step, (B, J, L)\n"
         "In all cases, sample is 0.")
# --- Session 4: sdpo, S-DPO (20 minutes) ----------------------------------------------------------
def sdpo_cases():
    return [
        # Δ_p = log 2, Δ_d = log 1/2: −log σ(log 4) = −log(4/5) = 0.2231
        Case("P of the chosen item rose from 1/2 to 1, P of the other fell from 1/4 to 1/8",
             (logs(1.0), logs([0.125]), logs(0.5), logs([0.25]), 1.0)),
        Case("3 users, 3 rejected items",
             (torch.randn(3), torch.randn(3, 3), torch.randn(3), torch.randn(3, 3), 0.3))]
def sdpo_loops(policy_pos, policy_neg, ref_pos, ref_neg, beta):
    total = 0
    for c in range(len(policy_neg)):
        rise = policy_pos[c] - ref_pos[c]                       # Δ_p
        odds = torch.exp(beta * (policy_neg[c] - ref_neg[c] - rise)).sum()
        total = total + torch.log(1 + odds)                     # −log σ(−log x) = log(1 + x)
    return total / len(policy_neg)
def forgets_the_reference(policy_pos, policy_neg, ref_pos, ref_neg, beta):
    return sdpo_loops(policy_pos, policy_neg, 0 * ref_pos, 0 * ref_neg, beta)
Exercise(4, 20, gflowgr.sdpo, sdpo_loops, sdpo_cases, [forgets_the_reference],
         learned=("policy_pos", "policy_neg"))
# --- Session 4: grpo (20 minutes) -----------------------------------------------------------------
def grpo_cases():
    return [
        # mean R = 2, std R = √2: A = −0.7071, 0.7071; the gradient is −A / 2
        Case("R = 1, 3; beta = 0", (logs([0.5, 0.2]), logs([0.3, 0.3]), logs([1.0, 3.0]), 0.0)),
        Case("all R are the same, A = 0: the KL alone",
             (logs([0.5, 0.5]), logs([0.25, 0.25]), logs([1.0, 1.0]), 0.1)),
        Case("3 users, 4 paths", (torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4), 0.3))]
def grpo_loops(log_pf, log_ref, log_r, beta, less=1):
    total = 0
    for c, j in np.ndindex(log_pf.shape):
        r = log_r[c].exp()
        advantage = (r[j] - r.mean()) / max(r.std(correction=less), 1e-8)
        x = torch.exp(log_ref[c, j] - log_pf[c, j])
        kl = x - torch.log(x) - 1
        total = total + beta * kl - advantage * log_pf[c, j]
    return total / log_pf.numel()
def divides_by_the_std_with_j(log_pf, log_ref, log_r, beta):
    return grpo_loops(log_pf, log_ref, log_r, beta, less=0)
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
        yield from zip(exercise.learned, gradients)

def why(error, file):                         # what was raised, and in which line of the file
    frames = traceback.extract_tb(error.__traceback__)
    lines = ["", *[f" in line {frame.lineno}" for frame in frames if frame.filename == file]]
    return " ".join(f"{type(error).__name__}{lines[-1]}: {error}".split())
def written(x):
    return " ".join(repr(x.detach() if torch.is_tensor(x) else x).split())[:150]

def verdict(exercise, answer, file=""):
    """"" for a right answer, else what a student reads; file: where the answer stands."""
    name = exercise.task.__qualname__
    names = inspect.signature(exercise.task).parameters
    torch.manual_seed(0)
    random.seed(0)
    for number, case in enumerate(exercise.cases(), 1):
        wanted = case.expected or dict(results(exercise, exercise.answer, case.inputs))
        what = next(iter(wanted))
        found = None
        try:
            for what, found in results(exercise, answer, case.inputs):
                message = None if what == "value" else f"its gradient by {what} is not right"
                close(found, wanted[what], atol=exercise.tolerance, msg=message)
        except BaseException as error:
            inputs = [f"{key} = {written(x)}" for key, x in zip(names, case.inputs)]
            return (f"{name} is not right yet\nCase {number}: {case.what}\n{'; '.join(inputs)}\n"
                    f"expected {written(wanted[what])}\nfound    {written(found)}\n"
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

def grade(file, names=(), limit=60):
    """`verdicts` of a file, from a process of its own. It gets a secret, which a student's file
    is not told, and writes it before the verdicts: a file that only prints or exits cannot pass for
    the grader (one that searches the grader's memory can)."""
    secret = secrets.token_hex().encode()
    quiet = subprocess.DEVNULL
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "verdicts")
        path.touch()
        command = [sys.executable, __file__, "--grade-to", path, file, *names]
        try:
            subprocess.run(command, input=secret, stdout=quiet, stderr=quiet, timeout=limit)
        except subprocess.TimeoutExpired:
            return {"": f"no answer in {limit} seconds"}
        said = path.read_bytes()
    if said.startswith(secret):
        return json.loads(said[len(secret):])
    return {"": "it left before it was graded"}

def print_table(graded, names):               # a row for each file, a column for each exercise
    columns = names or [name for name in EXERCISES if any(name in row for row in graded.values())]
    print("\n" + " | ".join(["file", *columns]))
    for file, found in graded.items():
        cells = [file]
        for name in columns:
            cells.append("–" if name not in found else "not yet" if found[name] else "right")
        print(" | ".join(cells + [found.get("", "")]).removesuffix(" | "))

def grade_all(path, names=()):
    """Grade a file, or all .py files below a folder, and print it → 0 if all is right."""
    files = [path]
    if Path(path).is_dir():                                     # no hidden files and folders
        files = sorted(glob.glob(f"{glob.escape(path)}/**/*.py", recursive=True))
    if not files or not Path(files[0]).is_file():
        print(f"{path} is no .py file, and no folder with one", file=sys.stderr)
        return 2
    graded = {}
    for file in files:
        graded[file] = grade(file, names)
        for name, message in graded[file].items():
            said = message or f"{name} is right"
            print(said if file == path and name else f"{file}: {said}", flush=True)
    if Path(path).is_dir():
        print_table(graded, names)
    return int(any(any(found.values()) for found in graded.values()))

def stub(exercise):                           # the beginning of a student's file
    task = exercise.task
    text = textwrap.indent(inspect.getdoc(task), "    ").lstrip()
    more = " Its gradient is compared." if exercise.learned else ""
    notes = f"{exercise.minutes} minutes.{more}\n{exercise.note}"
    return ("import math\nimport torch\nimport torch.nn.functional as F\n"
            f"from gflowgr import NEVER\n\n{textwrap.indent(notes.strip(), '# ')}\n"
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
    assert main(["--stub", name]) == 0
    mine = tmp_path / "mine.py"
    mine.write_text(capsys.readouterr().out, encoding="utf-8")
    assert "\nNotImplementedError in line " in verdicts(str(mine), [name])[name]

def test_a_right_answer_of_another_form_passes():
    def centred(*inputs):                     # its value is 0
        return gflowgr.grpo(*inputs) - gflowgr.grpo(*inputs).detach()
    assert verdict(EXERCISES["grpo"], centred) == ""

RIGHT = """from gflowgr import *
def trajectory_balance(z, p, r):
    return (z[:, None] + p - r).square().mean()
"""

@pytest.mark.parametrize("text, said", [
    ("def recall_at(ranked, target, k):\n    exit()",
     "recall_at is not right yet\nCase 1: one user\n"
     "ranked = tensor([[4, 2, 7, 1]]); target = tensor([4]); k = 3\n"
     "expected tensor([1.])\nfound    None\nSystemExit in line 2: None"),
    (RIGHT.replace("+ p", "+ p.detach()"),
     "expected tensor([[1.3863]])\nfound    tensor([[0.]])\n"
     "AssertionError: its gradient by log_pf is not right"),
    ("print('recall_at is right')\nexit()", "SystemExit in line 2: None"),
    ("1 / 0", "ZeroDivisionError in line 1: division by zero")])
def test_what_a_student_reads(text, said, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(text)
    [found] = verdicts(str(mine)).values()
    assert found.endswith(said)

def test_a_verdict_is_not_forged(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("import os, sys\nprint('vargrad is right')\n"
                    "open(sys.argv[2], 'w').write('{\"vargrad\": \"\"}')\nos._exit(0)")
    assert [*grade(str(mine), ["vargrad"])] == [""]             # nothing is said of vargrad

def test_a_folder_is_graded_file_by_file(tmp_path, capfd):
    (tmp_path / "anna/.venv").mkdir(parents=True)
    texts = {"anna/mine.py": RIGHT, "anna/.venv/copy.py": "1 / 0",
             "zoe.py": RIGHT.replace("+ p", "- p") + "def ndcg_at(*inputs): 1 / 0"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    assert main(["--grade", str(tmp_path)]) == 1
    *_, head, anna, zoe = capfd.readouterr().out.splitlines()
    assert head == "file | ndcg_at | trajectory_balance"
    assert anna == f"{tmp_path}/anna/mine.py | – | right"       # ours, imported, are not graded
    assert zoe == f"{tmp_path}/zoe.py | not yet | not yet"
    assert grade(str(tmp_path / "zoe.py"), limit=0.1) == {"": "no answer in 0.1 seconds"}

def test_a_wrong_name_is_told(capsys):
    for command in ("--stub nonsense", "--grade FILE recall_at nonsense"):
        assert main(command.split()) == 2
        assert "there is no exercise nonsense; there are recall_at, " in capsys.readouterr().err

# === Tests by topic, in the order of the story ====================================================
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

@pytest.mark.parametrize("n, K, L", [(50, 4, 3), (9, 9, 1), (1, 2, 2)])
def test_the_tree_knows_its_prefixes_and_refuses_wrong_ids(n, K, L):
    ids = SemanticIDs.fit(points(n), K, L)
    rows = list(map(tuple, ids.codes.tolist()))
    for row in itertools.product(range(-1, K + 1), repeat=L):
        assert ids.lookup(row) == (rows.index(row) if row in rows else -1)
        for l in range(L):
            below = {other[l] for other in rows if other[:l] == row[:l]}
            assert ids.legal(row[:l]).tolist() == [code in below for code in range(K)]
    for wrong in ([[0, 0], [0, 0]], [[0, K]], [[-1, 0]], [0, 1], [[0.5, 0]]):
        with pytest.raises(ValueError, match="IDs:"):
            SemanticIDs(wrong, K)
    with pytest.raises(InputError, match=f"{K ** L + 1} items do not fit"):
        SemanticIDs.fit(points(K ** L + 1), K, L)

def test_kmeans_finds_clusters_and_ends_at_their_means():
    clouds = 100 * points(5)[:, None] + points(200).reshape(5, 40, 4)
    for seed in range(5):
        found = tokenizer.kmeans(clouds.reshape(200, 4), 5, np.random.default_rng(seed))
        np.testing.assert_allclose(sorted(found.tolist()), sorted(clouds.mean(1).tolist()))

def test_features_against_loops():
    texts = ["Red fox (tales),part", "red|Fox", "blue fox part", "blue whale", "whale"]
    terms = []
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        terms.append(words + [*itertools.pairwise(words)])
    found_in = np.array([[term in row for row in terms] for term in {*sum(terms, [])}]).T
    table = found_in * np.log(5 / found_in.sum(0)) * (found_in.sum(0) > 1)
    histories = [[0, 1, 2, 3], [2, 1, 0, 4], [3, 2], [1, 0, 4, 2, 3], []]
    near = np.zeros((5, 5))
    for history in histories:
        for (i, a), (j, b) in itertools.permutations(enumerate(history), 2):
            near[a, b] += 0.8 ** (abs(i - j) - 1)
    q = near.sum(0) ** 0.75 / (near.sum(0) ** 0.75).sum()
    gram = 0
    for matrix, weight in ((table, 1), (np.log(np.maximum(near / near.sum(1)[:, None] / q, 1)), 4)):
        u, s, _ = np.linalg.svd(matrix)
        rows = u * np.sqrt(s)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        gram = gram + weight * rows @ rows.T
    found = tokenizer.item_features("mixed", texts, histories, seed=0)
    np.testing.assert_allclose(found @ found.T, gram, atol=1e-4)
    alone = tokenizer.item_features("content", texts, histories, seed=0)
    assert (alone == found[:, :64]).all()

# --- Rows of a batch ------------------------------------------------------------------------------
LENGTHS = (1, 2, 4, 5, 8, 9, 30)              # of the histories, which are 0, 1, 2 …

def check_context(batch, c, place, window, policy):     # place: row and column in batch.ends
    past = batch.histories[c]
    v = batch.positives[c].item()
    end = batch.ends[tuple(place)].item()
    read = batch.tokens[place[0], :end + 1] - policy.user_token - 1             # −1: <user>
    assert read.tolist() == [-1, *past[len(past) - end:]]
    assert min(len(past), max(1, window // 2)) <= end <= window
    assert batch.liked[c] == (v % 3 > 0)
    assert past + batch.following[c] == list(range(LENGTHS[batch.users[c]]))
    assert batch.following[c][0] == v
    seen = (~batch.unseen[c, policy.semantic_ids.num_prefixes:]).nonzero().flatten()
    assert seen.tolist() == past
    return batch.users[c], v

@pytest.mark.parametrize("window", [1, 4, 7])
def test_every_item_is_a_target_once_and_reads_what_stands_before_it(window):
    histories = [list(range(length)) for length in LENGTHS]
    liked = [[item % 3 > 0 for item in history] for history in histories]
    data = SimpleNamespace(train=histories, liked=liked)
    rows = list(gflowgr.training_rows(histories, window))
    policy = Policy(SemanticIDs([[0, i] for i in range(200)], 200), window, 65, 1)  # one head
    orders = []
    for seed in (0, 0, 1):
        order = []
        for batch in gflowgr.batches(rows, data, 3, policy, np.random.default_rng(seed)):
            for c, place in enumerate((batch.ends >= 0).nonzero().tolist()):
                order.append(check_context(batch, c, place, window, policy))
        assert len({*order}) == len(order) == sum(LENGTHS)
        orders.append(order)
    assert orders[0] == orders[1] != orders[2]

# --- P and beams ----------------------------------------------------------------------------------
@pytest.mark.parametrize("K, L", [(24, 1), (5, 2), (4, 3), (2, 6)])
def test_packed_paths_and_beams_against_one_path_at_a_time(K, L):
    policy = made(24, K, L)
    everything = torch.arange(24).expand(5, 24)
    unseen = policy.semantic_ids.unseen(HISTORIES)
    log_steps, log_probs, log_flow = policy(*policy.tokens(HISTORIES), unseen, everything)
    p = log_steps.sum(-1).exp()
    close(p.sum(1), torch.ones(5))                              # P lies on unseen items alone
    for c, history in enumerate(HISTORIES):
        left = [v for v in range(24) if v not in history]
        assert p[c].nonzero().flatten().tolist() == left
        close(log_probs[c, left].exp().sum(-1), torch.ones(len(left), L))
        plain_steps, plain_flow = one_by_one(policy, history)
        close(log_steps[c, left], plain_steps[left])
        close(log_flow[c], plain_flow)
    for guide in (None, torch.rand(5, 24) ** 4):
        found = policy.recommend(HISTORIES, 2, 3, guide)
        close(found, recommend_loops(policy, HISTORIES, 2, 3, guide))

def test_after_everything_was_seen_all_is_legal_but_the_list_is_empty():
    policy = made()
    seen = list(range(24))
    p = policy.path_log_probs([seen], [seen]).sum(-1).exp()
    close(p[0], one_by_one(policy, seen)[0].sum(1).exp())
    close(p.sum(), torch.tensor(1.0))
    for sample in (0.0, 1.0):
        items, scores = policy.recommend([seen, seen[1:]], 2, beams=2, sample=sample)
        assert items.tolist() == [[-1, -1], [0, -1]]
        assert scores.isfinite().tolist() == [[False, False], [True, False]]
    assert policy.recommend([[0, 0, 3]], 24)[0].tolist()[0].count(-1) == 2      # an item twice
    for ask in (policy.recommend, CollaborativeModel.fit([[0, 1]], 24).scores):
        for item in (999, 24, -1):
            with pytest.raises(InputError, match="items of a history are numbers from 0 to 23"):
                ask([[3, item]])

# --- Drawn lists ----------------------------------------------------------------------------------
def drawn_first(policy, past, sample, flow):  # P that an item is drawn first, by enumeration
    rows = policy.semantic_ids.codes.tolist()
    log_pf = one_by_one(policy, past)[0]
    p = torch.ones(6)
    for v, l in np.ndindex(6, 3):                               # a step is ∝ P_F^(1/T) · flow
        weight = {}                                             # of each code
        for w in under(rows, v, l):
            below = [u for u in under(rows, w, l + 1) if u not in past]
            weight[rows[w][l]] = log_pf[w, l].exp() ** (1 / sample) * flow[below].sum()
        p[v] *= weight[rows[v][l]] / max(1e-30, sum(weight.values()))
    return p

@pytest.mark.parametrize("sample, past", [(1.0, [2]), (1.0, [0, 3, 5]), (0.5, []), (2.0, [4])])
def test_lists_are_drawn_without_replacement(sample, past):     # k items need only k beams
    policy = made(6, 2, 3)
    flow = torch.rand(6) ** 2 / 50
    p = drawn_first(policy, past, sample, flow)
    assert (p[past] == 0).all()
    close(p.sum(), torch.tensor(1.0))
    wanted = (p[:, None] * p / (1 - p[:, None])).fill_diagonal_(0)      # of the first two
    first, second = policy.recommend([past] * 4000, 2, 2, flow.expand(4000, 6), sample)[0].T
    pairs = torch.bincount(6 * first + second, minlength=36).view(6, 6) / 4000
    close(pairs, wanted, atol=0.025, rtol=0)
    assert (pairs[wanted == 0] == 0).all()
    for row in policy.recommend([past] * 99, 5, 5, sample=1.0)[0].tolist():     # no guide
        items = [v for v in row if v >= 0]
        assert len({*items} - {*past}) == len(items) == min(5, 6 - len(past))

# --- The product ----------------------------------------------------------------------------------
def test_the_product_against_loops_remembers_and_knows_no_order(monkeypatch):
    past = [*HISTORIES[:3], HISTORIES[4], list(range(23)), list(range(24))]
    after = [[1, 2], [], [9], [], [23], []]
    cm = CollaborativeModel.fit(TRAIN, 24)
    teacher = Guided(made(), cm, gamma=1.5)
    teacher.policy.beams = 3
    teacher.scores(past[2:4], after[2:4])                       # whatever came first
    found = teacher.scores(past, after)
    items, score = recommend_loops(made(), past, 3, 3, cm.scores(past, after) ** 1.5)
    expected = torch.zeros(6, 25).scatter(1, items % 25, score.exp())[:, :24]       # 24: none
    close(found, expected / expected.sum(1, keepdim=True).clamp(min=1e-30))
    monkeypatch.setattr(teacher.policy, "recommend", None)      # from here on all is remembered
    assert teacher.scores(past[::-1], after[::-1]).equal(found.flip(0))
    for history, later in (([], [2, 1]), ([1], [2])):           # not where other items follow
        with pytest.raises(TypeError):
            teacher.scores([history], [later])

# --- The reward -----------------------------------------------------------------------------------
def reward_by_hand(recipe, codes, signal, past, v):     # R of all items (n,)
    alike = torch.tensor([sum(x == y for x, y in zip(row, codes[v])) for row in codes])
    alike[past] = 0
    few = 1e-3 / (len(codes) - len({*past}))                    # the ε of each unseen item
    R = recipe.w_y * signal / signal.sum() + recipe.w_s * alike / alike.sum() + few
    R[v] += recipe.w_a * (1 if v % 3 else 0.1)                  # liked, or only clicked
    R[past] = 0
    return R

def test_r_against_loops_and_its_sum():
    ids = made().semantic_ids
    recipe = Recipe(w_a=0.5, w_y=0.3, w_s=0.2)
    past = [[], [3], [5, 0, 7], list(range(4, 23))]
    v = torch.tensor([1, 6, 2, 3])
    unseen = ids.unseen(past)[:, ids.num_prefixes:]
    signal = torch.rand(4, 24) * unseen
    signal /= signal.sum(1, keepdim=True)
    found = Reward(ids, None, (0.5, 0.3, 0.2))(signal, v, v % 3 > 0, unseen)
    for c, history in enumerate(past):
        close(found[c], reward_by_hand(recipe, ids.codes.tolist(), signal[c], history, v[c].item()))
        assert found[c].nonzero().flatten().tolist() == [w for w in range(24) if w not in history]
        z = 0.5 * (1 if v[c] % 3 else 0.1) + 0.3 + 0.2 + 1e-3
        assert found[c].sum().item() == approx(z)

# --- Saved models ---------------------------------------------------------------------------------
def same(found, other):
    return all(x.equal(y) for x, y in zip(found, other, strict=True))

def changed(path, content):
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

def test_a_guided_model_comes_back_and_its_policy_is_plain_gpt2(tmp_path):
    policy = made()
    cm = CollaborativeModel.fit(TRAIN, 24, **OTHER)
    guided = Guided(policy, Debiased(cm, cm.count, 0.7), 3.0)
    gflowgr.save_model(guided, tmp_path)
    assert same(gflowgr.load_model(tmp_path).recommend(HISTORIES), guided.recommend(HISTORIES))
    assert Policy.from_pretrained(tmp_path, dropout=0.3).lm.transformer.drop.p == 0.3
    tokens = torch.arange(4)[None]
    close(GPT2LMHeadModel.from_pretrained(tmp_path)(tokens).logits, policy.lm(tokens).logits)

@pytest.mark.parametrize("file, text", [
    ("semantic_ids.json", b"[]"), ("config.json", b"{"), ("model.safetensors", None),
    ("cm.safetensors", b"x" * 99)])
def test_a_spoiled_folder_is_one_line_and_no_pickle_is_read(file, text, tmp_path):
    policy = made()
    gflowgr.save_model(Guided(policy, CollaborativeModel.fit(TRAIN, 24)), tmp_path)
    torch.save(policy.lm.state_dict(), tmp_path / "pytorch_model.bin")
    changed(tmp_path / file, text)
    refused("holds no saved model", "--recommend=x", "--model", tmp_path)

# --- Samplers -------------------------------------------------------------------------------------
PAST = [[3], [5, 0, 7], [9, 1]]
NEXT = [[4, 11], [8, 20], [2, 23]]

def contexts(past, following):                # what samplers read of a Batch
    r = torch.rand(len(past), 24) ** 4
    r[tokenizer.entries(past)] = 0
    positives = torch.tensor([row[0] for row in following])
    return SimpleNamespace(r=r, scores=r / r.sum(1, keepdim=True), positives=positives,
                           histories=past, following=following)

def weight_by_hand(name, batch, c, v):        # of item v in context c; an item is drawn ∝ it
    if name == "session":
        return v in batch.following[c][1:]
    if name == "uniform":
        return v not in batch.histories[c] + batch.following[c]
    if name == "even":
        return (v not in batch.histories[c]) * (batch.r[c, v] / batch.r[c].sum() + 1 / 24)
    return batch.r[c, v]                                        # reward_draws

@pytest.mark.parametrize("name", ["session", "uniform", "even", "reward_draws"])
def test_samplers_draw_from_where_they_say(name):
    torch.manual_seed(0)
    batch = contexts(PAST, [[4, 11, 6], *NEXT[1:]])
    before = batch.r.clone()
    items = SAMPLERS[name](batch, 2000, None, 0.5)
    assert batch.r.equal(before)                                # the loss needs it, too
    for c, row in enumerate(items):
        p = torch.tensor([float(weight_by_hand(name, batch, c, v)) for v in range(24)])
        share = torch.bincount(row, minlength=24) / 2000
        assert (share - p / p.sum()).abs().max() < 0.04
        assert (share[p == 0] == 0).all()

def test_samplers_that_ask_the_policy():
    policy = made()
    batch = contexts([*PAST, [v for v in range(22) if v != 4]], [*NEXT, [4, 23]])
    best = policy.recommend(PAST, 7, beams=7)[0].tolist()
    best = [[v for v in row if v != rest[0]][:6] for row, rest in zip(best, NEXT)]
    found = SAMPLERS["policy_beam"](batch, 6, policy, 0.5).tolist()
    assert found[:3] == best
    torch.manual_seed(3)
    drawn = SAMPLERS["policy_draws"](batch, 7, policy, 0.5)
    torch.manual_seed(3)
    assert drawn[:3].equal(policy.recommend(batch.histories, 7, beams=7, sample=1.0)[0][:3])
    for row in (found[3], drawn[3].tolist()):                   # three are left; v = 4 fills up
        assert sorted(row) == [4] * (len(row) - 2) + [22, 23]

@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_never_returns_an_item_of_the_history(name):
    items = SAMPLERS[name](contexts(PAST, NEXT), 20, made(), 0.5)
    for history, row in zip(PAST, items.tolist()):
        assert not {*history} & {*row}
    batch = contexts([[v for v in range(24) if v != 8]], [[8]])     # one item is left: the logged
    items = SAMPLERS[name](batch, 5, made(), 0.5)
    gflowgr.check_items(items, Recipe(sampler=name, trajectories=5), batch)     # as in training
    assert items.tolist() == [[8] * 5]

# --- The whole loss -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tiny(tmp_path_factory):                   # flags of a tiny world
    folder = tmp_path_factory.mktemp("tiny")
    TOY["write"](folder, 60, 8, 6, 1)
    return [f"--data={folder}", *"--codes=8 --width=32 --layers=1 --batch=16 --window=8".split(),
            "--sft=epochs=2:rate=.005", "--recipe=epochs=2:rate=.005", "--beams=11"]

def prepared(*flags, shift=0):                # shift changes the validation and test items
    settings = gflowgr.parse(list(flags))
    settings.device = "cpu"
    data = load_data(settings.data)
    data.histories = [h[:-2] + [(item + shift) % 48 for item in h[-2:]] for h in data.histories]
    return World.prepare(0, data, settings)

def loss_by_hand(recipe, log_flow, log_pf, log_r, reference):   # of the J paths of a context
    log_p = log_pf.sum(-1)                                      # (1, J), as log_r and reference
    log_z = log_flow[:, 0, 0]
    match recipe.loss.__name__:
        case "trajectory_balance":
            return balance_loops(log_z, log_p, log_r)
        case "vargrad":
            return vargrad_loops(log_p, log_r)
        case "detailed_balance":
            return detailed_loops(torch.cat([log_flow, log_r[..., None]], -1), log_pf)
        case "grpo":
            return grpo_loops(log_p, reference, log_r, recipe.beta)
        case "sdpo":
            frozen = (reference[:, 0], reference[:, 1:])
            return sdpo_loops(log_p[:, 0], log_p[:, 1:], *frozen, recipe.beta)
    gap = (log_z[:, None] + log_p - log_r).abs()                # huber_balance
    return torch.where(gap < 1, gap ** 2 / 2, gap - 0.5).mean()

def distill_by_hand(codes, below, log_pf, paths):       # KL, prefix by prefix
    total = 0
    for item, l in itertools.product(paths, range(len(codes[0]))):
        legal = [v for v in under(codes, item, l) if below[v, l + 1] > 0]
        v = list({codes[v][l]: v for v in legal}.values())      # one item a legal code
        p = below[v, l + 1] / below[v, l + 1].sum()
        total += (p * (p.log() - log_pf[v, l])).sum() / len(paths)
    return total

def context_by_hand(recipe, world, models, past, after, paths):     # L_GFN; models: policy, SFT
    codes = world.ids.codes.tolist()
    log_pf, log_flow = one_by_one(models[0], past)
    frozen = one_by_one(models[1], past)[0].sum(1)
    signal = world.cm.scores([past], [after])[0] / (world.cm.count + 1.0) ** recipe.debias
    if recipe.teacher == "product":
        signal = signal ** recipe.gamma * frozen.exp()
    R = reward_by_hand(recipe, codes, signal, past, after[0])
    below = torch.zeros(len(codes), len(codes[0]) + 1)          # exact flows
    for v, l in np.ndindex(*below.shape):
        below[v, l] = R[under(codes, v, l)].sum()
    if recipe.loss is gflowgr.distillation:
        return distill_by_hand(codes, below, log_pf, paths)
    log_flow = below[:, :-1].log() if recipe.exact else log_flow
    known = (log_flow, log_pf, R.log(), frozen)
    return loss_by_hand(recipe, *[x[paths][None] for x in known])

def paths_by_hand(recipe, logged, chosen, drawn):
    if recipe.loss is gflowgr.sdpo:
        first = chosen if recipe.chosen == "reward" else logged
        return [first, *[item for item in drawn if item != first]]
    return [logged, *drawn] if recipe.gr else drawn

@pytest.mark.parametrize("name, K, L", [
    ("sft", 48, 1), ("distill:teacher=product", 2, 6), ("distill:gr=.5", 8, 3),
    ("sdpo:beta=1:sampler=policy_draws:trajectories=7", 8, 3), ("sdpo:gr=0:beta=.7", 4, 3),
    ("sdpo-reward:beta=.7", 8, 3), ("vargrad", 8, 3), ("tb:gr=.7:lam=.3", 3, 4),
    ("tb:teacher=product:gamma=1.3", 8, 3), ("tb-paper:trajectories=1", 4, 3),
    ("db:exact=0", 8, 3), ("db:sampler=policy_beam", 48, 1), ("grpo:beta=.7", 7, 2),
    ("db:debias=0", 3, 5), ("tb-huber:gr=1", 8, 3)])
def test_the_whole_loss_against_one_path_at_a_time(name, K, L, tiny, monkeypatch):
    common = "--recipe=teacher=cm:w_a=.4:w_y=.4:w_s=.2:debias=.5"
    world = prepared(*tiny, common, f"--codes={K}", f"--levels={L}")
    recipe = recipe_of(name, world.settings)
    policy = made(ids=world.ids)
    frozen = made(ids=world.ids, seed=1)
    monkeypatch.setattr(World, "policy", lambda world, method: {"sft": frozen}[method])
    job = world.reward(recipe)
    world.data.train = [history[:5] for history in world.data.train]    # read whole before v
    world.data.liked = [[item % 3 > 0 for item in history] for history in world.data.train]
    rows = [*gflowgr.training_rows(world.data.train, 4)][:5]
    batch = gflowgr.batch_of(rows, world.data, policy)
    left = batch.unseen[:, world.ids.num_prefixes:].float()
    chosen = left.multinomial(1)                                # S-DPO's, if it is drawn ∝ R
    drawn = left.multinomial(recipe.trajectories, True)
    drawn[0, 0] = batch.positives[0]                            # v is no negative of itself
    drawn[1, 0] = chosen[1, 0]
    monkeypatch.setattr(gflowgr, "draw", lambda r, count: chosen if r is batch.r else None)
    def sampler(batch, *others):
        assert others == (recipe.trajectories, policy, 0.5)
        assert not policy.training                              # no dropout
        return drawn
    monkeypatch.setitem(SAMPLERS, recipe.sampler, sampler)
    found = gflowgr.loss_of(recipe, policy.train(), frozen, batch, job, 0.5)
    assert policy.training
    total = 0
    for c, (past, after) in enumerate(zip(batch.histories, batch.following)):
        L_GR = -one_by_one(policy, past)[0][after[0]].sum()
        total += L_GR * (recipe.gr if recipe.loss else 1)
        if recipe.loss:
            paths = paths_by_hand(recipe, after[0], chosen[c].item(), drawn[c].tolist())
            models = (policy, frozen)
            total += recipe.lam * context_by_hand(recipe, world, models, past, after, paths)
    close(found.detach(), total / len(batch.users))

def test_where_r_takes_two_values_tb_and_distill_lead_to_different_means():
    R = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.1, 0.4, 0.3, 0.2]])      # one history, two targets
    items = torch.tensor([0, 0, 1, 1, 2, 2, 2, 3, 3])           # as the geometric mean draws them
    def tb(log_p):
        return gflowgr.trajectory_balance(torch.zeros(2), log_p[:, items], R.log()[:, items])
    def distill(log_p):
        return gflowgr.distillation(R[:, None, None], log_p[:, None, None])
    geometric = R.log().mean(0).requires_grad_()
    plain = R.mean(0).log().requires_grad_()
    for loss, logits, settled in ((tb, geometric, True), (distill, geometric, False),
                                  (distill, plain, True)):
        slope = torch.autograd.grad(loss(logits.log_softmax(0).expand(2, 4)), logits)[0]
        assert (slope.abs().max() < 1e-6) == settled            # without a slope, training ends

# --- Training -------------------------------------------------------------------------------------
def trained(flags, name="sft", shift=0, rows=None):
    # From random weights, which are the SFT of the product as well → the curve, all that was used
    world = prepared(*flags, shift=shift)
    recipe = recipe_of(name, world.settings)
    world.rows = world.rows[:rows]
    world.products[recipe.debias, recipe.gamma] = Guided(world.policy().eval(), world.cm)
    policy = world.policy("", 0.1)
    curve = gflowgr.train(name, recipe, policy, world)
    return curve, [world.ids.codes, *world.cm.buffers(), *policy.parameters()]

@pytest.mark.parametrize("name", RECIPES)
def test_training_lowers_its_loss(name, tiny):
    curve, _ = trained([*tiny, "--recipe=epochs=4:rate=.005"], name)
    assert len(curve) == (3 if name == "sft" else 5)
    assert curve[-1]["loss"] < curve[1]["loss"]

def test_same_seed_same_curve_and_no_leak_from_test_or_validation_items(tiny):
    one, again, other = [trained(tiny, "distill", shift=shift) for shift in (0, 0, 1)]
    assert one[0] == again[0] != other[0]                       # other validation items
    assert same(one[1], other[1])

def test_rates_and_progress_over_the_steps(tiny, monkeypatch):
    rates = []
    progress = []
    def loss_of(recipe, policy, *others):
        progress.append(others[-1])
        return 100 * policy.flow_head.weight.sum()              # a gradient that has to be clipped
    def step(self, *_):
        rates.append([group["lr"] for group in self.param_groups])
        assert self.param_groups[1]["params"][0].grad.norm() < 1.001
    monkeypatch.setattr(gflowgr, "loss_of", loss_of)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    trained([*tiny, "--sft=epochs=4:rate=.005"])
    steps = len(progress)
    warm = steps // 10 + 1                                      # then half a cosine
    shares = [min(i / warm, math.cos(math.pi / 2 * max(0, i - warm) / (steps - warm)) ** 2)
              for i in range(steps)]
    np.testing.assert_allclose(rates, np.outer(shares, [0.005, 0.05]), atol=1e-9)
    assert progress == [i / steps for i in range(steps)]

def test_target_metrics_against_loops():
    policy = made()
    cm = CollaborativeModel.fit(TRAIN, 24)
    log = 2 * TRAIN
    liked = [[v % 3 > 0 for v in history] for history in log]
    data = SimpleNamespace(histories=log, liked=liked, train=[history[:-2] for history in log])
    recipe = RECIPES["tb"]
    job = Reward(policy.semantic_ids, cm, (recipe.w_a, recipe.w_y, recipe.w_s))
    codes = policy.semantic_ids.codes.tolist()
    numbers = []
    for *past, v, _ in log[::2]:                                # 30 of 60 users: at most 50
        left = [w for w in range(24) if w not in past]
        p = one_by_one(policy, past)[0].sum(1).exp()[left]
        R = reward_by_hand(recipe, codes, cm.scores([past])[0], past, v)
        target = R[left] / R.sum()
        numbers.append([sum(target * (target / p).log()), -sum(p * p.log())])
    wanted = dict(zip(("kl", "entropy"), np.mean(numbers, 0)))
    assert gflowgr.target_metrics(policy, job, data) == approx(wanted, abs=1e-4)

# --- Recipes: changes -----------------------------------------------------------------------------
def test_changes_come_in_the_order_preset_recipe_name(monkeypatch):
    for data, name in itertools.product(("toy", "ml-100k", "d"), RECIPES):  # those of the file work
        recipe_of(name, gflowgr.parse([f"--data={data}"]))
    world = gflowgr.parse([f"--data={ROOT / 'data/toy'}"])      # its truth.csv says: made up
    assert recipe_of("tb", world) == recipe_of("tb", gflowgr.parse([]))
    monkeypatch.setattr(gflowgr, "PRESETS", {"toy": {
        "settings": dict(width=96), "sft": dict(epochs=3), "tb": dict(lam=5.0),
        "*": dict(epochs=4, lam=4.0, gamma=4.0, w_s=0.0)}})
    settings = gflowgr.parse(["--recipe=gamma=6:beta=6", "--sft=rate=.5:dropout=.5"])
    assert settings.width == 96
    common = dict(epochs=4, gamma=6, beta=6, w_s=0)
    for name, own, changes in (
            ("tb:exact=no", RECIPES["tb"], dict(common, lam=5, exact=False)),
            ("db:gamma=7:gr=1", RECIPES["db"], dict(common, lam=4, gamma=7, gr=1)),
            ("tb+cm:debias=.5", Recipe(), dict(common, lam=4, debias=0.5)),
            ("cm:debias=1", Recipe(), dict(debias=1)),
            ("sft:epochs=8", RECIPES["sft"], dict(epochs=8, rate=0.5, dropout=0.5))):
        assert recipe_of(name, settings) == replace(own, **changes), name
    settings.methods = "tb+cm:gamma=3, cm:debias=1,db:lam=3"
    names = ["cm:debias=1", "sft", "db:lam=3", "tb", "tb+cm:gamma=3"]   # they start from SFT
    assert gflowgr.check_settings(settings)[0] == names
    assert gflowgr.parse(["--quick", "--recipe=epochs=3"]).recipe == "epochs=1:epochs=3"

# --- Own losses and samplers ----------------------------------------------------------------------
def cli(*arguments):
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

def with_default(log_z, log_pf, log_r, power=2):
    assert power == 2
    return (log_z[:, None] + log_pf - log_r).abs().max() ** power

def newest(batch, count, policy, progress):
    assert policy.lm.transformer.drop.p == 0.25
    return torch.tensor([[after[-1]] * count for after in batch.following])

def test_an_own_loss_and_sampler(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "mine", Recipe(with_default, sampler="newest"))
    monkeypatch.setitem(SAMPLERS, "newest", newest)
    flags = [*tiny, f"--out={tmp_path}", "--sft=epochs=1", "--recipe=epochs=1:dropout=.25"]
    status, out, err = cli(*flags, "--methods=mine:trajectories=3")
    assert status == 0, err
    assert "with_default on 3 items by newest" in out

@pytest.mark.parametrize("said, items", [
    ("not ('list',)", [[1, 2, 3], [1, 2, 3]]), ("not (torch.float32, 2, 3)", torch.ones(2, 3)),
    ("that are not in batch.histories", torch.tensor([[1, 2, 3], [1, 2, 0]])),
    ("items from 0 to 4", torch.tensor([[1, 2, 3], [1, 2, 5]]))])
def test_a_wrong_sampler_is_told(said, items):
    r = torch.tensor([[1.0, 1, 1, 1, 1], [0, 1, 1, 1, 1]])      # the second user has seen item 0
    with pytest.raises(InputError, match=f"sampler mine.* has to return .*{re.escape(said)}"):
        gflowgr.check_items(items, Recipe(sampler="mine", trajectories=3), SimpleNamespace(r=r))

@pytest.mark.parametrize("returned, said", [
    (torch.ones(2), "has to return .* not .2,."), (0.5, "has to return .* not float"),
    (torch.tensor(1.0), "does not depend on P: no gradient")])
def test_a_wrong_loss_is_told(returned, said):
    def mine(log_r):
        return returned
    with pytest.raises(InputError, match=f"tb: its loss {said}"):
        gflowgr.check_recipe("tb", Recipe(mine))

def test_a_loss_is_tried_on_as_many_paths_as_it_gets():
    def in_fours(log_pf, policy_pos):
        return log_pf.view(-1, 2, 4).mean() + policy_pos.mean()
    gflowgr.check_recipe("tb", Recipe(in_fours, trajectories=7))        # and the logged item

def seen(batch, count, policy, progress):
    return torch.tensor([[(past or [99])[0]] * count for past in batch.histories])
def infinite(log_pf):
    return log_pf.sum() * math.nan
def typo(log_z, log_P):
    return log_P.mean()

def test_what_stops_a_run_and_when(tiny, tmp_path, monkeypatch):
    for name, recipe in {"infinite": Recipe(infinite, teacher="cm"), "typo": Recipe(typo),
                         "partial": Recipe(partial(infinite)), "function": infinite}.items():
        monkeypatch.setitem(RECIPES, name, recipe)
    monkeypatch.setitem(SAMPLERS, "seen", seen)
    message = r"infinite: loss nan at step 0, rate 0.005 \(maybe too high\); users 0$"
    with pytest.raises(FloatingPointError, match=message):
        trained(tiny, "infinite", rows=2)
    with pytest.raises(InputError, match="sampler seen"):
        trained(tiny, "tb:teacher=cm:sampler=seen", rows=2)
    monkeypatch.setattr(gflowgr, "train", None)                 # before anything is trained
    for name, said in (("typo", "parameter log_P of its loss is not available"),
                       ("partial", "its loss has to be a function"),
                       ("function", "RECIPES['function'] is a function, no Recipe")):
        refused(said, *tiny, f"--out={tmp_path}", f"--methods=tb,{name}")

def all_of_it(log_pf, log_z, log_r, log_flow, child_flow, log_probs, policy_pos, policy_neg,
              log_ref, ref_pos, ref_neg, beta):
    assert list(locals()) == list(gflowgr.SHAPES)
    assert log_pf.shape == log_probs.shape[:3] == child_flow.shape[:3]
    assert policy_neg.shape[1] == ref_neg.shape[1] == log_r.shape[1] - 1
    assert torch.isfinite(log_flow).all()
    if log_pf.shape != (2, 3, 2):                               # not in the trial of check_loss
        close(policy_pos, log_pf[:, 0].sum(-1))
        close(log_z, log_flow[:, 0, 0])
    return log_pf.mean() * beta

def test_a_loss_may_ask_for_all_that_is_given(tiny, monkeypatch):
    monkeypatch.setitem(RECIPES, "mine", Recipe(all_of_it, teacher="cm"))
    known_of = gflowgr.known_of
    keys = []
    def spy(*arguments):
        given = known_of(*arguments)
        keys.append(list(given))
        shapes = {name: len(getattr(value, "shape", ())) for name, value in given.items()}
        wanted = {what: len(shape) for what, shape in gflowgr.SHAPES.items()}
        assert shapes == wanted | {"log_pf": 3}
        return given
    monkeypatch.setattr(gflowgr, "known_of", spy)
    trained(tiny, "mine", rows=2)
    assert keys[0] == list(gflowgr.SHAPES)

# --- The oracle -----------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["tb", "tb:exact=0:trajectories=60"])    # log Z: exact, learned
def test_trajectory_balance_reaches_the_reward(method, tmp_path, monkeypatch):
    TOY["write"](tmp_path, 30, 4, 3, 3)
    drawn = []
    monkeypatch.setattr(figures, "plot_flows", lambda *arguments: drawn.append(arguments))
    flags = f"--codes=3 --width=32 --layers=1 --oracle={method} --recipe=rate=.003:epochs=4".split()
    status, out, err = cli(f"--data={tmp_path}", *flags, f"--out={tmp_path / 'a/new'}")
    assert status == 0, err
    before, after = map(float, re.findall(r"\d\.\d{4}", out[out.index("mean L1"):]))
    told = re.findall(r"epoch \d/4, .*, L1 distance of P from R/Z (\d\.\d{4})\n", out)
    assert len(told) == 4
    assert before > 0.5
    assert after == float(told[-1]) <= 0.02
    [[path, flow]] = drawn
    assert path.parent.is_dir()
    np.testing.assert_allclose(flow["teacher"], flow["learned"], atol=0.02)

# --- Metrics, gains -------------------------------------------------------------------------------
def test_exposure_and_diversity_of_several_users_by_hand():
    data = SimpleNamespace(titles=list("012345"), truth={
        "liked": [{0, 1, 2, 5}, {2, 3}, set(), {1, 2, 4}, {0}], "theme": list("bcdacb"),
        "shown": [{0, 1, 2}, {2, 3, 4}, {2}, set(), set()]})
    lists = np.array([[5, 2, 3], [2, -1, -1], [1, 0, 4], [2, 4, 0], [-1, -1, -1]])
    found = report.exposure(lists, data)
    assert found["hidden@10"].tolist() == [1 / 1, 0, 0, 2 / 3, 0 / 1]
    assert found["liked@10"].tolist() == [2 / 3, 1, 0, 2 / 3, 0]
    # Their three themes: bcd, adb, abc, cda, bac. Of themes with as many liked items, a comes first
    assert found["themes@10"].tolist() == [2, 1, 2, 2, 0]
    found = report.diversity(lists, np.array([0, 3, 1, 1, 3, 0]))
    assert found["first_codes@10"].tolist() == [2, 1, 2, 3, 0]

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

# --- A run ----------------------------------------------------------------------------------------
METHODS = "pop cm:debias=.5 sft sft-continued tb tb:trajectories=3 tb+cm:gamma=3".split()

def results_in(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))

@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "a/new/place"
    flags = [*tiny, f"--out={out}", "--seeds=1, 2", f"--methods={', '.join(METHODS)}"]
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
        lists = torch.tensor(run["lists"])
        for metric, loops, k in (("ndcg@10", ndcg_loops, 10), ("recall@5", recall_loops, 5)):
            expected = loops(lists, targets[:, 1], k)
            assert run["by_user"][metric] == approx(expected.tolist(), abs=1e-6)
            assert run["metrics"][metric] == approx(expected.mean().item(), abs=1e-6)
        listed = {*lists.flatten().tolist()} - {-1}
        assert run["metrics"]["coverage@10"] == len(listed) / 48
        if name in METHODS[2:]:
            model = gflowgr.load_model(finished.out / f"{name}-{run['seed']}".replace(":", ","))
            assert model.recommend(past)[0].tolist() == run["lists"]
        if name in METHODS[2:6]:                                # trained; the last epoch was saved
            ndcg = ndcg_loops(model.recommend(finished.data.train)[0], targets[:, 0], 10).mean()
            assert run["curve"][-1]["ndcg@10"] == approx(ndcg.item())
            assert run["train_examples"] == 2 * sum(map(len, finished.data.train))
            assert "kl" in run["metrics"]
    pop, _, sft, *others = finished.runs[:6]
    for run in others:                                          # fine-tuning starts from SFT
        assert run["curve"][0]["ndcg@10"] == sft["curve"][-1]["ndcg@10"]
    counts = np.bincount(sum(finished.data.train, []), minlength=48)
    for history, row in zip(past, pop["lists"]):
        assert counts[row].tolist() == sorted(np.delete(counts, history))[:-11:-1]

def test_a_cm_lists_unseen_items_alone():
    items, _ = gflowgr.best_unseen(CollaborativeModel.fit(TRAIN, 24), [list(range(22))], 3)
    assert sorted(items[0].tolist()) == [-1, 22, 23]

def test_a_run_leaves_the_table(finished):
    table = (finished.out / "results.md").read_text("utf-8")
    assert table in finished.printed
    assert "pop, seed 1: no training; lists have the most popular items" in finished.printed
    assert "cm:debias=.5, seed 1: no training; lists have the highest CM / pop" in finished.printed
    assert "Means over 2 seed(s)." in table
    summary = finished.results["summary"]
    base = summary["sft"]["ndcg@10"]["mean"]
    for method, metrics in summary.items():
        own = [run["metrics"]["ndcg@10"] for run in finished.runs if run["method"] == method]
        wanted = {"mean": np.mean(own), "std": np.std(own, ddof=1)}
        assert metrics["ndcg@10"] == approx(wanted)
        assert f"| {method} | {np.mean(own):.4f} |" in table
        assert method == "sft" or f"| {100 * (np.mean(own) / base - 1):+.0f} [" in table

def test_bars_of_the_exposure_picture_against_loops(finished, monkeypatch):
    assert (finished.out / "exposure.png").read_bytes()[:4] == b"\x89PNG"
    bars = {}
    def barh(self, name, width, left, **_):
        close(torch.tensor(left), torch.tensor(width).cumsum(0) - torch.tensor(width))
        bars[name] = width
    monkeypatch.setattr(Axes, "barh", barh)
    figures.main([str(finished.out)])                           # draws them again
    truth = finished.data.truth
    times = [sum(item in row for row in truth["shown"]) for item in range(48)]
    order = sorted(range(48), key=times.__getitem__)            # the least shown first
    lists = {run["method"]: run["lists"] for run in finished.runs}      # of the last seed
    rows = {"in the log": finished.data.histories, "truly liked": truth["liked"], **lists}
    assert list(bars) == list(rows)
    for name, users in rows.items():
        items = itertools.chain.from_iterable(users)
        tenths = [10 * order.index(item) // 48 for item in items if item >= 0]
        assert bars[name] == approx([tenths.count(tenth) / len(tenths) for tenth in range(10)])

def test_a_wrong_folder_is_not_drawn(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        figures.main([str(tmp_path)])
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/results.json: FileNotFound")

# --- Resume ---------------------------------------------------------------------------------------
def test_a_killed_run_goes_on_as_if_nothing_had_been(finished, tmp_path, monkeypatch):
    flags = [*finished.flags, f"--out={tmp_path}", "--seeds=1"]
    steps = []
    def loss_of(recipe, *others, original=gflowgr.loss_of):
        steps.append(recipe.loss)
        if steps.count(gflowgr.trajectory_balance) == 3:        # in the middle of tb
            raise KeyboardInterrupt
        return original(recipe, *others)
    monkeypatch.setattr(gflowgr, "loss_of", loss_of)
    stopped = (130, "stopped; --resume keeps the finished methods of a run\n")
    (tmp_path / "exposure.png").touch()                         # of an earlier run
    assert cli(*flags)[::2] == stopped
    assert not (tmp_path / "exposure.png").exists()
    assert cli(*flags, "--resume")[1].count("kept, as it was finished") == 4
    runs = results_in(tmp_path)["runs"]
    for run, other in zip(runs, finished.runs[:7], strict=True):    # of a run without a break
        assert run == {**other, "seconds": run["seconds"]}
    steps.clear()                                               # without --resume: all anew,
    assert cli(*flags)[::2] == stopped                          # and nothing old is left
    assert len([*tmp_path.glob("*/run.json")]) == 4
    assert not (tmp_path / "tb,trajectories=3-1/semantic_ids.json").exists()
    report.write(tmp_path / "pop-1/run.json", [])
    refused("another program", *flags, "--resume")

@pytest.mark.parametrize("flag, said", [
    ("--window=9", "--window = 8, now it is 9; choose another --out"),
    ("--data=OTHER", "data = "), ("--ids=content", "checksum of ids"),
    ("--width=16", "--width = 32"), ("--layers=2", "--layers = 1"), ("--batch=8", "--batch = 16"),
    ("--beams=9", "--beams = 11"), ("--sft=epochs=3:rate=.005", "sft: epochs = "),
    ("--recipe=epochs=2:rate=.005:w_s=.5", "tb: w_s = ")])
def test_resume_refuses_what_was_made_otherwise(flag, said, finished, tmp_path):
    flag = flag.replace("OTHER", str(folder_of(tmp_path)))
    refused(said, *finished.flags, "--resume", flag)

def test_only_what_a_method_uses_is_compared():
    for name, used in {"sft": "loss rate dropout epochs", "sft+cm:gamma=3": "gamma debias"}.items():
        assert [*gflowgr.facts_of(name, Recipe())] == used.split()

# --- A CM of your own -----------------------------------------------------------------------------
def test_an_own_cm(tiny, tmp_path, capsys):
    class Mine(CollaborativeModel):                             # is not saved as ours, either
        def scores(self, past, following=None):
            return torch.eye(48)[[7, 8]].mean(0).expand(len(past), -1)
    methods = "--methods=cm,cm:debias=9,sft+cm:debias=1:gamma=3"
    settings = gflowgr.parse([*tiny, f"--out={tmp_path}", methods])
    cm, debiased, *_ = gflowgr.run(settings, Mine.fit([[0, 1]], 48))["runs"]
    data = load_data(settings.data)
    rarer = min((7, 8), key=sum(data.train, []).count)
    for history, row, other in zip(data.histories, cm["lists"], debiased["lists"]):
        if not {7, 8} & {*history[:-1]}:
            assert {*row[:2]} == {7, 8}
            assert other[0] == rarer
    out = capsys.readouterr().out
    assert "make it with Guided, Debiased, {'gamma': 3.0, 'debias': 1.0}" in out
    folder = tmp_path / "sft+cm,debias=1,gamma=3-42"
    refused("never saved", "--recommend", "x", "--model", folder)

def test_a_guided_model_that_serves_makes_up_no_later_items():
    calls = []
    def scores(past, following=None):
        calls.append(following)
        return torch.eye(48)[[0] * len(past)]
    Guided(made(48), SimpleNamespace(scores=scores)).scores([[1]])
    assert calls == [None]

# --- Recommend from the command line --------------------------------------------------------------
@pytest.mark.parametrize("name, flags", [
    ("tb-1", []), ("tb-1", ["--sample=3"]), ("tb+cm,gamma=3-1", ["--sample"])])
def test_recommend_prints_ten_titles(finished, name, flags):
    titles = finished.data.titles
    asked = ["--model", finished.out / name, *flags, "--recommend", titles[3].upper(), "5"]
    sample = gflowgr.parse(list(map(str, asked))).sample
    torch.manual_seed(0)
    items, scores = gflowgr.load_model(asked[1]).recommend([[3, 5]], sample=sample)
    torch.manual_seed(0)
    lines = [line.rpartition("  ") for line in cli(*asked)[1].splitlines()[1:]]
    assert [title for *_, title in lines] == [titles[v] for v in items[0]]
    shares = [float(share.strip("%")) / 100 for share, *_ in lines if share]
    assert shares == ([] if sample else approx(scores[0].softmax(0).tolist(), abs=6e-4))
    refused(titles[3], *asked[:-1], titles[3][:-1] + "x")
    refused("none is left", *asked[:-2], *titles)

# --- Data -----------------------------------------------------------------------------------------
ITEMS = "item_id,title\na,Alpha\nb,Beta\nc,Gamma\nd,Delta\n"
EVENTS = "user_id,item_id,position\nu,a,0\nu,b,1\nu,c,2\nv,b,0\nv,c,1\nv,d,2\n"

def folder_of(path, items=ITEMS, events=EVENTS):
    path.mkdir(exist_ok=True)
    (path / "items.csv").write_text(items)
    (path / "interactions.csv").write_text(events)
    return path

def test_ids_from_a_file_and_devices(tmp_path, capsys):
    folder = folder_of(tmp_path)
    (folder / "ids.csv").write_text("item_id,x,y\na,1,5\nb,2,0\nc,3,0\nd,2,0\nz,7,7\ny,7,8\n")
    codes = prepared(f"--data={folder}", f"--ids={folder / 'ids.csv'}").ids.codes.tolist()
    assert codes == [[1, 5, 0], [2, 0, 0], [3, 0, 0], [2, 0, 1]]    # b and d had the same
    printed = capsys.readouterr().out
    assert "left out 2 items that items.csv does not have" in printed
    assert "1 items have the ID of another" in printed
    world = prepared(f"--data={folder}")
    assert world.count.tolist() == [1, 1, 0, 0]                 # of training items
    assert prepared("--data=toy").ids.num_codes == 32           # 720 / 24 = 30; a power of 2
    world.settings.device = "meta"                              # a policy moves, not the shared IDs
    assert world.policy().semantic_ids.codes.is_meta
    assert not world.ids.codes.is_meta

def run_script(monkeypatch, name, *flags):
    monkeypatch.setattr("sys.argv", ["prepare.py", *flags])
    runpy.run_path(str(ROOT / f"data/{name}/prepare.py"), run_name="__main__")

def test_two_users_and_nine_items_without_text_or_truth_work_as_they_are(tmp_path):
    events = EVENTS.replace("b,1", "b,2") + "u,a,9\nw,a,1\nw,b,1\n"      # b, c of u: one in six
    folder = folder_of(tmp_path / "d", "\n".join(["item_id", *"abcdefghi"]), events)
    status, out, err = cli("--data", folder, "--out", tmp_path / "out", "--quick")
    assert status == 0, err
    assert "--quick: the figures below mean nothing" in out
    assert "16.7% have the time of the user's interaction before" in out
    assert "| tb-huber+cm | " in out
    assert "liked@10" not in out

def test_the_toy_world_is_as_committed_and_popularity_can_be_earned(tmp_path, monkeypatch):
    TOY["write"](tmp_path)
    for name in ("items.csv", "interactions.csv", "truth.csv"):
        assert (tmp_path / name).read_bytes() == (ROOT / "data/toy" / name).read_bytes()
    assert len({title for title, *_ in TOY["make_titles"](120, 12)}) == 120 * 12
    run_script(monkeypatch, "toy", "--quality=1", f"--out={tmp_path}")
    for folder, least, most in (("toy", -0.2, 0.2), (str(tmp_path), 0.5, 1)):
        truth = load_data(folder).truth
        table = [report.table_of_items(truth[what], 720).sum(0) for what in ("liked", "shown")]
        assert least < np.corrcoef(*table)[0, 1] < most         # how far likes go with showing
    with pytest.raises(SystemExit, match="2"):
        run_script(monkeypatch, "toy", f"--out={tmp_path}", "--items=121")

def converted(name, source, tables, monkeypatch, tmp_path):     # each table is refused, then read
    shutil.copytree(ROOT / "data" / name, tmp_path / name)
    monkeypatch.setattr(folder_of_data, "__file__", str(tmp_path / "__init__.py"))
    script = runpy.run_path(str(tmp_path / name / "prepare.py"))
    with pytest.raises(OSError, match="No such file"):
        script["prepare"](tmp_path / "nowhere")
    for table, text in tables.items():
        with pytest.raises(OSError, match="has another SHA-256"):
            script["prepare"](source)
        script["SHA256"][table] = hashlib.sha256(text.encode()).hexdigest()
    script["prepare"](source, tmp_path / name)
    return load_data(name)

def test_beauty_is_converted_or_refused(tmp_path, monkeypatch):
    text = {"a": {"title": " A\nsoap", "brand": None, "categories": [["Hair", "x"]]}}
    codes = {item: [f"<a_{item}>", "<b_7>", "<c_232>", "<d_6>"] for item in "123"}
    tables = {"index": json.dumps({"a": codes["1"], **codes}), "inter": '{"u": ["a", "2", "1"]}'}
    for name, table in {"item": json.dumps(text), **tables}.items():
        (tmp_path / f"Beauty.{name}.json").write_text(table)
    data = converted("beauty", tmp_path, tables, monkeypatch, tmp_path)
    assert data.titles == ["A soap", "1", "2", "3"]
    assert data.histories == [[0, 2, 1]]
    assert data.texts[0] == "A soap Hair x"
    assert read_ids(tmp_path / "beauty/letter_ids.csv", ["3"]) == [[3, 7, 232, 6]]

def test_movielens_is_read_from_a_wheel_or_refused(tmp_path, monkeypatch):
    tables = {"item": "id\ttitle\tyear\tclass\na\tA\t1990\tx\nb\tB\t1991\tx\nc\tC\t1992\ty",
              "inter": "user\tid\tstars\ttime\nu\ta\t1\t3\nu\tb\t2\t2\nu\tc\t3\t1"}
    with zipfile.ZipFile(tmp_path / "wheel", "w") as file:
        for name, text in tables.items():
            file.writestr(f"recbole/dataset_example/ml-100k/ml-100k.{name}", text)
    data = converted("ml-100k", tmp_path / "wheel", tables, monkeypatch, tmp_path)
    assert data.titles == ["A (1990)", "B (1991)", "C (1992)"]
    assert data.histories == [[2, 1, 0]]
    assert data.liked == [[True, False, False]]

# --- Help, docstrings, pages, speed ---------------------------------------------------------------
def test_help_names_all_and_shows_an_example():
    status, out, _ = cli("--help")
    assert status == 0
    assert all(f"--{name} " in out for name in vars(gflowgr.parse([])))
    words = " ".join(out.split())
    assert all(re.search(rf"\b{name}\b", words) for name in (*gflowgr.FIELDS, *SAMPLERS, *RECIPES))
    assert "example: --methods" in words
    assert "64)" in words                                       # the width in the toy world
    assert "(default: )" not in words

@pytest.mark.parametrize("module", [gflowgr, reward, tokenizer, folder_of_data, report, figures])
def test_examples_in_docstrings(module):
    assert doctest.testmod(module).failed == 0

@pytest.fixture
def by_itself(tmp_path, monkeypatch):         # what a page adds or writes is gone after it
    for name in ("RECIPES", "SAMPLERS", "PRESETS"):
        monkeypatch.setattr(gflowgr, name, copy.deepcopy(getattr(gflowgr, name)))
    monkeypatch.chdir(tmp_path)

@pytest.mark.parametrize("page", ["README", *"data/example data/own data/course data/log "
                                  "data/results".split()])
def test_code_and_commands_on_the_pages(page, by_itself):
    text = (ROOT / f"{page}.md").read_text(encoding="utf-8").replace("```", "")
    there = {}
    exec("from gflowgr import *", there)                        # as a script begins
    test = doctest.DocTestParser().get_doctest(text, there, page, None, 0)
    assert doctest.DocTestRunner().run(test).failed == 0        # one script, in order
    for line in re.findall(r"(?:gflowgr\.py |[`\"])(--[^`\"\n]+)", text.replace("\\\n", "")):
        if re.search("--(methods|oracle|recipe|sft) (?!.*(…|[A-Z]{3}))", line):     # it is whole
            settings = gflowgr.parse(shlex.split(line, comments=True))
            for name in (*gflowgr.check_settings(settings)[0], settings.oracle or "tb"):
                recipe_of(name, settings)

def test_the_figures_on_the_pages_were_made_with_these_defaults():
    made = [RECIPES, gflowgr.PRESETS, Recipe(), gflowgr.Settings()]
    for function in (CollaborativeModel.fit, Guided, Policy, Reward, TOY["write"],
                     tokenizer.item_features, tokenizer.kmeans, World.policy):
        made.append(inspect.signature(function))
    text = re.sub(" at 0x[0-9a-f]+", "", repr(made))
    checksum = zlib.crc32(text.encode())
    assert checksum == 594696078, "run the commands of the pages anew, then change this number"

SHORT = {"rounds=5": "rounds=1", "(42, 43, 44, 45, 46)": "(42,)", "(20, 40, 60, 120)": "(4,)",
         "(2, 4, 8, 16, 64)": "(2,)", '"grpo", "distill", "tb", ': "", "sft,grpo,tb,distill": "sft",
         '"runs/few", "--resume"': '"runs/all", "--data", "runs/tail4"',
         '"vargrad", "tb:exact=0", "centred"': '"centred"', '"few", "grpo"': '"few"'}

PICTURES = {"course": ["loop"], "results": ["few", "tail"]}

@pytest.mark.parametrize("page", PICTURES)
def test_scripts_on_the_pages_in_short(page, by_itself, monkeypatch):
    def parse(argv, original=gflowgr.parse):
        return original([*argv, "--quick", "--seeds=42"])
    monkeypatch.setattr(gflowgr, "parse", parse)
    for name in ("batch_of", "check_items"):                # a script replaces them: put back later
        monkeypatch.setattr(gflowgr, name, getattr(gflowgr, name))
    Path("data/pictures").mkdir(parents=True)
    course, results = [(ROOT / f"data/{name}.md").read_text("utf-8") for name in PICTURES]
    assert all(long in course + results for long in SHORT)      # else a script runs in full
    text = course if page == "course" else results
    for script in re.findall("```\n(from gflowgr.*?)```", text, re.DOTALL):
        for long, short in SHORT.items():
            script = script.replace(long, short)
        exec(script, {"__name__": page})
    assert sorted(path.stem for path in Path("data/pictures").iterdir()) == PICTURES[page]

def test_the_speed_of_seven_jobs_is_told(capsys):
    assert main(["--speed", "--tiny"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 7

# --- Bad flags: one line on stderr, exit status 2, nothing written --------------------------------
@pytest.mark.parametrize("said, flag", [
    ("no folder nowhere", "--data=nowhere"),
    ("go together", "--recommend=x"),
    ("no saved model", "--recommend=x --model=nowhere"),
    ("sample -1.0 is out of range", "--recommend=x --model=nowhere --sample=-1"),
    ("--seeds 9999999999999999999 are not numbers", "--seeds=9999999999999999999"),
    ("--device nonsense is not available", "--device=nonsense"),
    ("nowhere.csv", "--ids=nowhere.csv"),
    ("do not fit into 2^1", "--codes=2 --levels=1"),
    ("--layers 0 is out of range", "--layers=0"),
    ("--oracle sdpo is not available", "--oracle=sdpo"),
    ("there is no field nonsense", "--recipe=nonsense=1"),
    ("--methods cm+cm is not available", "--methods=cm+cm"),
    ("--methods ',' names no method", "--methods=,"),
    ("sampler=x is not available", "--methods=tb:sampler=x"),
    ("chosen=x is not available", "--methods=sdpo:chosen=x"),
    ("there is no field loss", "--methods=tb:loss=x"),
    ("exact has to be a bool, not 'maybe'", "--methods=tb:exact=maybe"),
    ("rate nan is out of range", "--methods=tb:rate=nan"),
    ("dropout 1.0 is out of range", "--methods=tb:dropout=1"),
    ("at most 128, memory", "--methods=tb:trajectories=129"),
    ("at most 128, memory", "--oracle=tb:trajectories=129"),
    ("its loss needs exact=1", "--methods=distill:exact=0"),
    ("w_a, w_y and w_s are all 0", "--methods=tb:w_a=0:w_y=0:w_s=0"),
    ("it compares paths: trajectories > 1", "--methods=grpo:trajectories=1"),
    ("it compares paths: trajectories > 1", "--methods=vargrad:trajectories=1"),
    ("gr > 0 needs chosen=logged", "--methods=sdpo-reward:gr=.5")])
def test_a_wrong_flag_is_one_line_and_status_2(said, flag, tmp_path):
    folder = folder_of(tmp_path / "d")
    refused(said, f"--data={folder}", f"--out={tmp_path / 'out'}", *flag.split())
    assert not (tmp_path / "out").exists()

def test_what_does_not_fit_the_data_is_one_line_and_status_2(tmp_path):
    folder = folder_of(tmp_path, "\n".join(["item_id", *"abcd", *map(str, range(1997))]))
    refused("needs a text column", f"--data={folder}", "--ids=content")
    refused("at most 2,000 items", f"--data={folder}", "--oracle")

# --- Bad files: one line on stderr, exit status 2, nothing written --------------------------------
@pytest.mark.parametrize("said, file, text", [
    ("no column item_id", "items", ""),
    ("UTF-8", "items", b"\xe9\n"),
    ("the same name", "items", "item_id,x,x\n"),
    ("items.csv, line 6: item 'a' stands twice", "items", ITEMS + "a,Again\n"),
    ("interactions.csv", "interactions", None),
    ("no user has three", "interactions", EVENTS[:37] + "u,a,2\n"),
    ("no column position or timestamp", "interactions", EVENTS.replace("position", "x")),
    ("both position and", "interactions", "user_id,item_id,position,timestamp\nu,a,0,0\n"),
    ("line 8 needs as many fields", "interactions", f"{EVENTS}w,a,1,1\n"),
    ("line 8: items.csv has no item 'x'", "interactions", f"{EVENTS}w,x,0\n"),
    ("line 8: inf and nan", "interactions", f"{EVENTS}w,a,nan\n"),
    ("line 2: inf and nan", "interactions", "user_id,item_id,position,rating\nu,a,0,inf"),
    ("no line for 1 items of items.csv, ['d']", "ids", "item_id,x\na,1\nb,2\nc,3\n"),
    ("line 3: item 'a' stands twice", "ids", "item_id,x\na,1\na,2\n"),
    ("line 2: write 1 to 6 codes", "ids", "item_id,x\na,1.5\n"),
    ("line 2: write 1 to 6 codes", "ids", "item_id,x\na,65536\n"),
    ("write 1 to 6 codes", "ids", "item_id\na\nb\nc\nd\n")])
def test_a_wrong_file_is_one_line_and_status_2(said, file, text, tmp_path):
    folder = folder_of(tmp_path / "d")
    (folder / "ids.csv").write_text("item_id,x\na,1\nb,2\nc,3\nd,4\n")
    changed(folder / f"{file}.csv", text)
    refused(said, f"--data={folder}", f"--out={tmp_path / 'out'}", f"--ids={folder / 'ids.csv'}")
    assert not (tmp_path / "out").exists()

# === Speed ========================================================================================
def random_policy(n, window=20, K=256):
    number = np.random.default_rng(0).choice(K ** 3, n, replace=False)
    return Policy(SemanticIDs(np.stack(np.unravel_index(number, (K, K, K)), 1), K), window)

def decoding(n, users, drawn=False):          # recommend; generate, held to the legal tokens
    policy = random_policy(n).eval()
    histories = [list(range(user, user + 20)) for user in range(users)]
    ours = partial(policy.recommend, histories)
    if drawn:
        return ours, partial(policy.recommend, histories, sample=1.0)
    allowed = {}
    for row in (policy.semantic_ids.codes + 256 * torch.arange(3)).tolist():
        for level, token in enumerate(row):
            allowed.setdefault(tuple(row[:level]), {})[token] = None
    def legal(_, row):
        return list(allowed[tuple(row[21:].tolist())])
    tokens = policy.tokens(histories)[0]
    generate = partial(
        policy.lm.generate, tokens, attention_mask=tokens * 0 + 1, num_beams=20, max_new_tokens=3,
        num_return_sequences=20, renormalize_logits=True, pad_token_id=policy.user_token,
        prefix_allowed_tokens_fn=legal)
    return ours, generate

def packing(J, n, length, rows):              # a step on rows of J branches; on J times the rows
    policy = random_policy(n, length)
    items = torch.randint(n, (rows, J))
    histories = [list(range(row, row + length)) for row in range(rows)]
    context = (*policy.tokens(histories), policy.semantic_ids.unseen(histories))
    one_a_row = [x.repeat_interleave(J, 0) for x in context]
    def step(context, items):
        policy(*context, items)[0].sum().backward()
    return partial(step, context, items), partial(step, one_a_row, items.view(-1, 1))

def steps(method, n, size):                   # four steps of SFT; of a method with the CM's scores
    policy = random_policy(n, K=512)
    rng = np.random.default_rng(0)
    train = [rng.choice(n, 3 + rng.geometric(0.25), False).tolist() for _ in range(2 * n)]
    data = SimpleNamespace(train=train, liked=[[True] * len(history) for history in train])
    job = reward.Reward(policy.semantic_ids, CollaborativeModel.fit(train, n), (0.3, 0.65, 0.05))
    rows = list(gflowgr.training_rows(train, policy.window))
    four = list(itertools.islice(gflowgr.batches(rows, data, size, policy, rng), 4))
    def run(method):
        for batch in four:
            gflowgr.loss_of(RECIPES[method], policy, policy, batch, job, 0.5).backward()
    return partial(run, "sft"), partial(run, method)

def speed(tiny):                              # least seconds of both, their ratio, what is asked
    many, few, users, length = (300, 200, 4, 5) if tiny else (12000, 1000, 64, 100)
    for what, asked, make, *arguments in (
            (f"{users} users, {many} items: recommend, generate", ">= 19", decoding, many, users),
            (f"{users} users, {few} items: recommend, generate", ">= 9", decoding, few, users),
            (f"{users} users, {many} items: best, drawn lists", "<= 1.3", decoding, many, users, 1),
            ("a step on 8 paths: packed, one a row", ">= 7", packing, 8, many, length, users // 2),
            ("a step on 16 paths", ">= 12", packing, 16, many, length, users // 2),
            (f"4 steps of {users} rows: sft, distill", "<= 2.6", steps, "distill", many, users),
            (f"4 steps of {users} rows: sft, tb", "", steps, "tb", many, users)):
        one, other = [min(timeit.repeat(job, number=1, repeat=4)) for job in make(*arguments)]
        print(f"{what:50} {one:8.3f} {other:8.3f} {other / one:6.1f}  {asked}", flush=True)

def main(argv):                               # → exit status
    match argv:
        case ["--stub", *names] | ["--grade", _, *names] if {*names} - {*EXERCISES}:
            there = ", ".join(EXERCISES)
            wrong = min({*names} - {*EXERCISES})
            print(f"there is no exercise {wrong}; there are {there}", file=sys.stderr)
            return 2
        case ["--list"]:
            for name, exercise in EXERCISES.items():
                more = "" if exercise.answer else ", no answer in this file"
                part = "project" if exercise.session == 4 else f"session {exercise.session}"
                print(f"{part:10} {name:28}{exercise.minutes:3} minutes{more}")
        case ["--stub", name]:
            print(stub(EXERCISES[name]))
        case ["--grade", path, *names]:
            return grade_all(path, names)
        case ["--grade-to", path, file, *names]:                # hidden: the process of `grade`
            secret = sys.stdin.read()
            Path(path).write_text(secret + json.dumps(verdicts(file, names)))
        case ["--speed"] | ["--speed", "--tiny"]:
            speed(tiny="--tiny" in argv)
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
