"""Tests of GFlowGR, the exercises, and the speed. Tests: python -m pytest -q test_gflowgr.py

    python test_gflowgr.py --list                      the exercises
    python test_gflowgr.py --stub NAME                 the beginning of a file for one of them
    python test_gflowgr.py --grade FILE [NAME …]       what is right in a file, or all of a folder
    python test_gflowgr.py --speed [--tiny]            seconds of two ways to do a thing
"""
import os
os.environ["OMP_NUM_THREADS"] = "1"                             # before torch is imported
import doctest
import glob
import hashlib
import inspect
import io
import itertools
import json
import math
import re
import runpy
import shutil
import subprocess
import sys
import timeit
import traceback
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pytest import approx
from transformers import GPT2LMHeadModel

import data as folder_of_data
import gflowgr
import reward
import tokenizer
from data import InputError, figures, load_data, read_ids, report
from gflowgr import NEVER, RECIPES, SAMPLERS, Policy, Recipe, World, recipe_of
from reward import CollaborativeModel, Guided
from tokenizer import SemanticIDs

ROOT = Path(gflowgr.__file__).parent
TOY = runpy.run_path(str(ROOT / "data/toy/prepare.py"))
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR")    # of torch: it calls them "beta"
close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4, check_dtype=False)

# --- Grading --------------------------------------------------------------------------------------
@dataclass
class Exercise:
    """A function to write again, or one that extends the project."""
    ours: Callable                  # its signature and docstring are the task
    minutes: int
    loops: Callable | None          # an answer in plain loops; None: it extends the project
    cases: Callable                 # () → (what, *arguments); without loops (…, expected)
    mistakes: list                  # wrong answers: each has to fail in a case
    read: Callable = lambda found: found    # what is compared of a result
    tolerance: float = 1e-4

def written(x):                                                 # a value as a short text
    if torch.is_tensor(x) and x.numel() <= 24:
        x = (x.detach().double().round(decimals=4) if x.is_floating_point() else x).tolist()
    return " ".join(repr(x).split())[:150]

def verdict(exercise, answer, file=""):
    """"" for a right answer, else what a student reads; file: where the answer stands."""
    name, names = exercise.ours.__qualname__, inspect.signature(exercise.ours).parameters
    torch.manual_seed(0)
    for number, (what, *arguments) in enumerate(exercise.cases(), 1):
        expected = exercise.read(exercise.loops(*arguments) if exercise.loops else arguments.pop())
        inputs = "; ".join([f"{key} = {written(x)}" for key, x in zip(names, arguments)])
        found = None
        try:
            found = exercise.read(answer(*arguments))
            close(found, expected, atol=exercise.tolerance)
            asked = getattr(expected, "requires_grad", False)
            assert not asked or found.requires_grad, "no gradient flows back"
            if asked and exercise.loops:
                policy = [x for key, x in zip(names, arguments) if key in ("log_pf", "policy_neg")]
                of = partial(torch.autograd.grad, inputs=policy, materialize_grads=True)
                close(of(found), of(expected), msg="the value is right, its gradient is not")
        except (Exception, SystemExit) as error:
            frames = traceback.extract_tb(error.__traceback__)
            lines = [f" in line {frame.lineno}" for frame in frames if frame.filename == file]
            why = " ".join(f"{type(error).__name__}{''.join(lines[-1:])}: {error}".split())
            return (f"{name} is not right yet\nCase {number}: {what}\n{inputs}\n"
                    f"expected {written(expected)}\nfound    {written(found)}\n{why}")
    return ""

def stub(ours):
    text = inspect.getdoc(ours).replace("\n", "\n    ")
    return ("import math\nimport torch\nimport torch.nn.functional as F\n"
            f"from gflowgr import NEVER\n\ndef {ours.__name__}{inspect.signature(ours)}:\n"
            f'    """{text}\n    """\n    raise NotImplementedError')

def grade(file, *names):
    """Print what is right in a student's file: all of it, or what is named → 0 if all is right."""
    try:
        there = runpy.run_path(file, run_name="student")
    except (Exception, SystemExit) as error:
        print(f"{file} raised {type(error).__name__}: {error}")
        return 1
    found = dict.fromkeys(names, "there is no function for it")
    for name in names or EXERCISES:
        answer = there.get(EXERCISES[name].ours.__name__)
        if getattr(answer, "__module__", "") == "student":      # not ours, imported
            found[name] = verdict(EXERCISES[name], answer, file)
    found = found or {file: "there is no function of an exercise in it"}
    for name, message in found.items():
        print(f"{name}: {message or 'right'}")
    return int(any(found.values()))

def grade_class(folder, *names, limit=60):
    """grade for each .py file below a folder, each in a process of its own → 0 if all is right."""
    files = sorted(glob.glob(f"{glob.escape(str(folder))}/**/*.py", recursive=True))
    wrong = 0 if files else f"{folder} has no .py file"         # sys.exit prints it
    for file in files:                                          # glob has left out hidden ones
        print(f"{file}:", flush=True)
        job = [sys.executable, __file__, "--grade", file, *names]
        try:
            wrong |= subprocess.run(job, timeout=limit, stdin=subprocess.DEVNULL).returncode
        except subprocess.TimeoutExpired:
            print(f"no answer in {limit} seconds", flush=True)
            wrong = 1
    return wrong

# --- Exercises ------------------------------------------------------------------------------------
HISTORIES = [[], [3], [5, 0, 7], list(range(4, 24)), [1, 2, 3, 4, 5, 6, 7, 8]]
TRAIN = [np.random.default_rng(u).permutation(20)[:4 + u % 8].tolist() for u in range(30)]
OTHER = dict(window=3, nearness=0.6, backward=0.5, power=0.7, length=4, decay=0.9)
ITEMS = "item_id,title\na,Alpha\nb,Beta\nc,Gamma\nd,Delta\n"
EVENTS = "user_id,item_id,position\nu,a,0\nu,b,1\nu,c,2\nv,b,0\nv,c,1\nv,d,2\n"
IDS = "item_id,x\na,1\nb,2\nc,3\n"
SCORES = [0.08, 0.45, 0.02, 0.25, 0.05, 0.15]

def ranked():
    lists = torch.tensor([[4, 2, 7, 1], [1, 3, -1, -1], [5, 6, 0, 9], [3, 2, 1, 0], [8, 0, 5, 2]])
    return [("one user", lists[:1], torch.tensor([4]), 3), ("one user", lists[:1], lists[:1, 2], 2),
            *[("five users", lists, torch.tensor([7, 9, 5, 2, 2]), k) for k in (1, 3, 4)]]

def points(n, d=4):
    return np.random.default_rng(n).normal(size=(n, d))

def logs(*numbers):
    return torch.tensor(numbers).log().requires_grad_()

def made(n=24, K=4, L=3, ids=None, seed=0):   # a random policy, its P far from even
    torch.manual_seed(seed)
    policy = Policy(ids or SemanticIDs.fit(points(n), K, L), 4, 32, 1, 0.0).eval()
    policy.lm.transformer.wte.weight.data.mul_(5)
    torch.nn.init.normal_(policy.flow_head.weight)
    policy.beams = 60                                           # of all items: exact
    return policy

WORLD = made()

def under(rows, v, l):                         # the items whose ID begins with v's first l codes
    return [w for w, row in enumerate(rows) if row[:l] == rows[v][:l]]

@torch.no_grad()
def one_by_one(policy, history):
    """log P_F of the steps and log F of the prefixes on the paths of all items, both (n, L): each a
    sequence of its own through plain GPT-2, without packing, padding or mask."""
    rows, K = policy.semantic_ids.codes.tolist(), policy.semantic_ids.num_codes
    head = [policy.user_token, *[policy.user_token + 1 + v for v in history[-policy.window:]]]
    tokens = [head + [l * K + code for l, code in enumerate(row[:-1])] for row in rows]
    out = policy.lm(torch.tensor(tokens), output_hidden_states=True)
    log_flow = policy.flow_head(out.hidden_states[-1][:, len(head) - 1:])[..., 0]
    log_pf = torch.full_like(log_flow, -math.inf)               # stays so where it is illegal
    left = {*range(len(rows))} - {*history} or {*range(len(rows))}      # all seen: all is legal
    for v, l in np.ndindex(*log_pf.shape):
        legal = {rows[w][l] for w in left.intersection(under(rows, v, l))}
        logits = out.logits[v, len(head) - 1 + l, l * K:(l + 1) * K]
        if rows[v][l] in legal:
            log_pf[v, l] = logits[rows[v][l]] - logits[sorted(legal)].logsumexp(0)
    return log_pf, log_flow

def ndcg_loops(ranked, target, k, gain=lambda rank: 1 / math.log2(rank + 1)):
    users = zip(ranked.tolist(), target.tolist())
    return torch.tensor([gain(row.index(v) + 1) if v in row[:k] else 0.0 for row, v in users])

recall_loops = partial(ndcg_loops, gain=lambda rank: 1.0)

def balance_loops(log_z, log_pf, log_r, power=2):
    rest = [log_z[b] + log_pf[b, j] - log_r[b, j] for b, j in np.ndindex(*log_pf.shape)]
    return sum(abs(x) ** power for x in rest) / len(rest)

def sdpo_loops(policy_pos, policy_neg, ref_pos, ref_neg, beta):
    total = 0
    for b, negatives in enumerate(policy_neg):
        rise = policy_pos[b] - ref_pos[b]
        gaps = [torch.exp(beta * (x - ref_neg[b, d] - rise)) for d, x in enumerate(negatives)]
        total = total + torch.log(1 + sum(gaps))                # −log σ(−log x) = log(1 + x)
    return total / len(policy_neg)

def grpo_loops(log_p, log_ref, log_r, beta, less=1):
    total = 0
    for c, j in np.ndindex(*log_p.shape):
        r = log_r[c].exp()
        advantage = (r[j] - r.mean()) / max(r.std(correction=less), 1e-8)
        x = torch.exp(log_ref[c, j] - log_p[c, j])
        total = total + beta * (x - torch.log(x) - 1) - advantage * log_p[c, j]
    return total / log_p.numel()

def counted(log, n, debias=0.0, backward=0.25, power=0.5, **options):
    cm = CollaborativeModel.fit(log, n, backward=backward, power=power, **options)
    cm.log, cm.backward, cm.power = log, backward, power        # what cm_loops counts from
    return cm.debiased(debias)

def cm_cases():
    what, cm = "a CM of one history, 0 1 2; 4 items", counted([[0, 1, 2]], 4, popularity=0.0)
    yield from [(what, cm, [history]) for history in ([0], [0, 1], [2], [])]
    yield f"{what}; without it", cm, [[0]], [[1, 2]]
    for options in ({}, {**OTHER, "debias": 0.7}):
        cm = counted([*TRAIN, [20, 21, 0, 1]], 25, **options)
        yield "31 histories", cm, [[24], [3, 7], list(range(9, 25)), list(range(25))]
        yield "31 histories, without the own one", cm, [TRAIN[5][:3], [20, 21], []], [
            TRAIN[5][3:], [0, 1], TRAIN[2]]

def cm_loops(self, histories, following=None, length=None):
    s, out, n = self.popularity, [], len(self.count)
    counts = torch.bincount(torch.tensor(sum(self.log, [])), minlength=n)
    for b, history in enumerate(histories):
        own = history + following[b] if following else None     # leave one user out
        row, popular = torch.zeros(len(counts)), counts + 1.0
        for age, j in enumerate(reversed(history[-(length or self.length):])):
            for h in [h for h in self.log if j in h and h != own]:
                for d, v in enumerate(h, -h.index(j)):          # v stands d places after j
                    if 0 < abs(d) <= self.window:
                        weight = self.nearness ** (abs(d) - 1) * (1 if d > 0 else self.backward)
                        row[v] += self.decay ** age * weight / counts[j] ** self.power
        row[history] = popular[history] = 0
        popular = popular if popular.sum() else counts + 1.0    # the whole catalogue was seen
        popular, total = popular / popular.sum(), row.sum()
        row = (1 - s) * row / total + s * popular if total > 0 else popular
        row /= (counts + 1.0) ** self.debias
        out.append(row / row.sum())
    return torch.stack(out)

def mask_loops(ends, H, L, order=True):
    S = H + ends.shape[1] * (L - 1)
    mask = torch.full((len(ends), S, S), NEVER)
    for b, i, j in np.ndindex(*mask.shape):
        branch = (i - H) // (L - 1)
        last = ends[b, branch] if i >= H else i if order else H
        if j <= last if j < H else i >= j >= H + branch * (L - 1):
            mask[b, i, j] = 0
    return mask

def scored(own):                              # what `curriculum` reads of a Batch; own: logged
    return SimpleNamespace(scores=torch.tensor([SCORES]).repeat(3000, 1), histories=[[]] * 3000,
                           following=[[own]] * 3000, positives=torch.tensor([own] * 3000))

def curriculum_loops(batch, count, policy, progress, even=0.5, more=-1):
    weight = (1 - even) * batch.scores + even / batch.scores.shape[1]
    weight[:, batch.positives[0]] = 0
    pools = torch.multinomial(weight, 2 * count + more, replacement=True).tolist()
    start = round(progress * (count - 1))
    return torch.tensor([sorted(pool, key=row.__getitem__)[start:start + count]
                         for row, pool in zip(batch.scores.tolist(), pools)])

def recommend_loops(self, histories, k=10, beams=20, guide=None, new=True):
    rows, items, values = list(map(tuple, self.semantic_ids.codes.tolist())), [], []
    for b, history in enumerate(histories):
        score = one_by_one(self, history if new else [])[0].cumsum(1)
        best = left = [v for v in range(len(rows)) if v not in history or not new]
        for l in range(1, len(rows[0]) + 1):
            value = {}                                          # of each prefix of l codes
            for v in best:
                below = [w for w in under(rows, v, l) if w in left]
                more = guide[b, below].sum().log() if guide is not None else 0
                value[rows[v][:l]] = (score[v, l - 1] + more).item()
            order = sorted(value, key=value.get, reverse=True)
            best = [v for v in best if rows[v][:l] in order[:max(beams, k)]]
        best = [rows.index(row) for row in order][:k] if left else []
        items.append(best + [-1] * (k - len(best)))
        values.append([value[rows[v]] for v in best] + [-math.inf] * (k - len(best)))
    return torch.tensor(items), torch.tensor(values)

# Two exercises extend the project. No answer stands here, only what has to hold.
def vargrad(log_pf, log_r):
    """VarGrad, trajectory balance without a head for log Z(U): log P_F, log R (C, J) → scalar.

    Where P_F = R/Z, log R − log P_F is log Z(U) on all paths of a context. So put the mean of
    log R − log P_F over the context's J paths in the place of log Z(U) in trajectory balance.
    """

def vargrad_cases():
    squared, log_r = logs(2.0).sum() ** 2, torch.randn(3, 4)
    P, R = torch.zeros(2, 2, requires_grad=True), torch.tensor([[1.0, 4.0], [2.0, 8.0]]).log()
    yield "1 user, P = 1, 1, R = 1, 4", P[:1], R[:1], squared
    yield "P = R/Z, Z differs by user", log_r - torch.randn(3, 1), log_r, torch.tensor(0.0)
    yield "2 users, each as far off as in case 1", P, R, squared

def subtb(log_flow, log_pf):
    """Sub-trajectory balance (SubTB): balance on every part of a path → scalar.

    log F(s_0) … log F(s_L) = log R (C, J, L+1); log P_F of each step (C, J, L). The residual of a
    sub-path s_i → s_j, i < j, is log F(s_i) + Σ log P_F of its steps − log F(s_j). The loss is the
    mean of its square over all L(L+1)/2 sub-paths, over C and over J.
    """

def subtb_cases():
    log_flow = torch.randn(2, 3, 4, requires_grad=True)
    for by, at, off, share in ((0, 0, 0, 0), (0, 1, 2, 3), (0, 3, 2, 3), (1, 1, 2, 4)):
        inputs = [log_flow, log_flow.diff(dim=-1)]
        inputs[by] = inputs[by] + off * torch.eye(4 - by)[at]
        what = f"exact flows, {off} added to log {'FP'[by]} number {at}: {share} of 6 sub-paths"
        yield what, *inputs, torch.tensor(share * off ** 2 / 6, requires_grad=True)

ALL = [
    Exercise(gflowgr.recall_at, 5, recall_loops, ranked, [
        lambda r, t, k: recall_loops(r, t, k - 1), lambda r, t, k: recall_loops(r, t, k) / k]),
    Exercise(gflowgr.ndcg_at, 10, ndcg_loops, ranked, [
        partial(ndcg_loops, gain=lambda rank: 1 / math.log(rank + 1)),
        lambda r, t, k: ndcg_loops(r, t, k + 1), lambda r, t, k: ndcg_loops(r, t, k).mean()]),
    Exercise(gflowgr.trajectory_balance, 10, balance_loops, lambda: [
        ("1 path: Z = 1, P = 1/2, R = 1/4", logs(1.0), logs([0.5]), logs([0.25])),
        ("2 paths, of which the second is off", logs(2.0), logs([0.5, 0.5]), logs([1.0, 4.0])),
        ("3 users, 2 paths", torch.randn(3), torch.randn(3, 2), torch.randn(3, 2))], [
        lambda z, p, r: balance_loops(z, p, -r), lambda z, p, r: balance_loops(z[[-1] * 3], p, r),
        partial(balance_loops, power=1), lambda z, p, r: balance_loops(z, p.detach(), r)]),
    Exercise(gflowgr.sdpo, 20, sdpo_loops, lambda: [
        ("policy = reference: log 2", *[torch.zeros(1), torch.zeros(1, 1)] * 2, 0.1),
        ("P of the positive rose from 1/2 to 1", logs(1.0), logs([0.5]), logs(0.5), logs([0.5]), 1),
        ("3 users", *[torch.randn(3, 4)[:, i] for i in (0, slice(1, 4)) * 2], 0.3)], [
        lambda p, n, rp, rn, beta: sdpo_loops(p, n.detach(), rp, rn, beta),
        lambda p, n, rp, rn, beta: sdpo_loops(p, n[:, :1], rp, rn, beta)]),         # DPO
    Exercise(gflowgr.grpo, 20, grpo_loops, lambda: [
        ("R = 1, 3; beta = 0", logs([0.5, 0.2]), logs([0.3, 0.3]), logs([1.0, 3.0]), 0.0),
        ("R is the same: the KL alone", *[logs([x, x]) for x in (0.5, 0.25, 1.0)], 0.1),
        ("3 users, 4 paths", *[torch.randn(3, 4) for _ in range(3)], 0.3)], [
        partial(grpo_loops, less=0), lambda p, ref, r, beta: grpo_loops(p.detach(), ref, r, beta),
        lambda p, ref, r, beta: grpo_loops(p, ref, r.exp(), beta)]),
    Exercise(CollaborativeModel.scores, 45, cm_loops, cm_cases, [
        partial(cm_loops, length=99), lambda self, histories, *more: cm_loops(self, histories)]),
    Exercise(gflowgr.tree_mask, 30, mask_loops, lambda: [
        ("<user> and an item; 1 branch of 1 code after <user>", torch.tensor([[0]]), 2, 2),
        ("the example of the docstring", torch.tensor([[1, 2]]), 3, 3),
        ("2 rows, 3 branches", torch.tensor([[0, 3, 2], [1, 1, 3]]), 4, 3)], [
        partial(mask_loops, order=False), lambda e, H, L: mask_loops(e - 1, H, L),
        lambda e, H, L: mask_loops(e[:, :1], H, 1 + e.shape[1] * (L - 1))]),        # one branch
    Exercise(gflowgr.curriculum, 30, curriculum_loops, lambda: [
        (f"3000 contexts, scores {SCORES}, item 1 logged; shares of the 6 items at each place",
         scored(1), count, None, progress)
        for count, progress in ((1, 0.0), (3, 0.0), (3, 1.0), (4, 0.3))], [
        lambda b, count, policy, progress: curriculum_loops(b, count, policy, 1 - progress),
        partial(curriculum_loops, even=0), partial(curriculum_loops, more=0)],
        lambda items: torch.stack([(items == v).float().mean(0) for v in range(6)]), 0.07),
    Exercise(Policy.recommend, 60, recommend_loops, lambda: [
        ("an empty history, k = 1, 60 beams: the most likely item", WORLD, [[]], 1, 60),
        ("1 beam, but k = 4", WORLD, [[4], [3, 8, 1, 20, 9, 6]], 4, 1),
        ("3 beams, guided", WORLD, HISTORIES, 2, 3, torch.rand(5, 24) ** 4),
        ("1 item is left, or none", WORLD, [list(range(23)), list(range(24))], 30, 60)], [
        partial(recommend_loops, new=False), lambda *inputs: recommend_loops(*inputs[:4])]),
    Exercise(vargrad, 20, None, vargrad_cases, [
        lambda p, r: (r + p).var(1, False).mean(), lambda p, r: (r - p).var(1, False).sum()]),
    Exercise(subtb, 30, None, subtb_cases, [
        lambda f, p: (f[..., :-1] + p - f[..., 1:]).square().mean(),                # one step
        lambda f, p: (f[..., :1] + p.cumsum(-1) - f[..., 1:]).square().mean()])]    # from s_0
EXERCISES = {exercise.ours.__qualname__: exercise for exercise in ALL}

@pytest.mark.parametrize("name", EXERCISES)
def test_exercise(name, tmp_path, capsys):
    exercise, mine = EXERCISES[name], tmp_path / "mine.py"
    assert not exercise.loops or verdict(exercise, exercise.ours) == ""
    for mistake in exercise.mistakes:
        assert "AssertionError: " in verdict(exercise, mistake)
    assert main(["--stub", name]) == 0
    mine.write_text(capsys.readouterr().out, encoding="utf-8")
    assert main(["--grade", str(mine)]) == 1 and main(["--list"]) == 0
    graded, listed = capsys.readouterr().out.split("NotImplementedError in line")
    assert f"{name} is not right yet" in graded and f"\n{name:28}{exercise.minutes:3}" in listed

def test_what_a_student_reads(tmp_path, capfd):
    (tmp_path / "anna/.venv").mkdir(parents=True)
    mine, right = tmp_path / "anna/mine.py", """from gflowgr import *
def trajectory_balance(z, p, r):
    return (z[:, None] + p - r).square().mean()"""
    def graded(text, *names, status=1):
        mine.write_text(text)
        assert main(["--grade", str(mine), *names]) == status
        return capfd.readouterr().out.splitlines()
    assert graded("def recall_at(ranked, target, k):\n    exit()") == [
        "recall_at: recall_at is not right yet", "Case 1: one user",
        "ranked = [[4, 2, 7, 1]]; target = [4]; k = 3", "expected [1.0]", "found    None",
        "SystemExit in line 2: None"]
    *_, found, why = graded(right + ".detach()")
    assert found == "found    0.4805" and "no gradient flows back" in why
    assert graded(right, "ndcg_at") == ["ndcg_at: there is no function for it"]
    assert graded("x = 0") == [f"{mine}: there is no function of an exercise in it"]
    assert graded("1 / 0") == [f"{mine} raised ZeroDivisionError: division by zero"]
    assert graded(right, status=0) == ["trajectory_balance: right"]     # ours are not graded
    shutil.copy(mine, tmp_path / "anna/.venv")                  # a copy that is not a student's
    assert main(["--grade", str(tmp_path)]) == 0
    assert capfd.readouterr().out == f"{mine}:\ntrajectory_balance: right\n"
    (tmp_path / "loop.py").write_text("while True:\n    pass")
    assert grade_class(tmp_path, limit=0.2) == 1
    assert capfd.readouterr().out.count("no answer in 0.2 seconds") == 2
    assert "has no .py file" in grade_class(tmp_path / "empty")
    with pytest.raises(SystemExit, match="(?s)--grade FILE.*recall_at"):
        main(["--stub", "nonsense"])

# --- Tests, in the order of the story -------------------------------------------------------------
@pytest.mark.parametrize("features, K, L", [
    (points(50), 4, 3), (np.ones((27, 3)), 3, 3), (points(9), 9, 1), (points(40), 2, 6),
    (np.zeros((1, 2)), 2, 2), (points(81), 3, 4)])
def test_ids_are_all_different_and_those_of_a_plain_loop(features, K, L):
    n, rng, left = len(features), np.random.default_rng(3), np.array(features)
    ids = SemanticIDs.fit(features, K, L, seed=3)
    rows = list(map(tuple, ids.codes.tolist()))
    assert len(set(rows)) == n and len(rows[0]) == L
    for level in range(L):
        centroids = tokenizer.kmeans(left, K, rng)
        cost = ((left[:, None] - centroids) ** 2).sum(-1)
        for i, c in np.ndindex(n, K):
            if cost[i, c] < cost[i, rows[i][level]]:            # a full cell of nearer items
                inside = [j for j in range(n) if rows[j][:level + 1] == (*rows[i][:level], c)]
                assert len(inside) == K ** (L - 1 - level) and max(cost[inside, c]) < cost[i, c]
        left = left - centroids[[row[level] for row in rows]]
    every = [*itertools.product(range(K), repeat=L), (-1,) * L, (K,) * L]
    assert ids.lookup(every).tolist() == [rows.index(x) if x in rows else -1 for x in every]
    for row, l in itertools.product(every[::7], range(L)):
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
    words = [re.findall(r"\w+", text.lower()) for text in texts]
    terms = [row + [*itertools.pairwise(row)] for row in words]
    found_in = np.array([[term in row for row in terms] for term in {*sum(terms, [])}]).T
    table = found_in * np.log(5 / found_in.sum(0)) * (found_in.sum(0) > 1)
    near, histories = np.zeros((5, 5)), [[0, 1, 2, 3], [2, 1, 0, 4], [3, 2], [1, 0, 4, 2, 3], []]
    for history in histories:
        for (i, a), (j, b) in itertools.permutations(enumerate(history), 2):
            near[a, b] += 0.8 ** (abs(i - j) - 1)
    q = near.sum(0) ** 0.75 / (near.sum(0) ** 0.75).sum()
    mutual = np.log(np.maximum(near / near.sum(1)[:, None] / q, 1))
    def gram(matrix):                                           # cosines of the rows of U · √S
        u, s, _ = np.linalg.svd(matrix)
        rows = u * np.sqrt(s) / np.linalg.norm(u * np.sqrt(s), axis=1, keepdims=True)
        return rows @ rows.T
    for kind, expected in (("content", gram(table)), ("mixed", gram(table) + 4 * gram(mutual))):
        found = tokenizer.item_features(kind, texts, histories, seed=0)
        np.testing.assert_allclose(found @ found.T, expected, atol=1e-4)

@pytest.mark.parametrize("window", [1, 4, 7])
def test_every_item_is_a_target_once_and_reads_what_stands_before_it(window):
    histories = [list(range(length)) for length in (1, 2, 4, 5, 8, 9, 30)]
    data = SimpleNamespace(train=histories, liked=[[v % 3 > 0 for v in row] for row in histories])
    rows, orders = [*gflowgr.training_rows(histories, window)], []
    policy = Policy(SemanticIDs([[0, i] for i in range(200)], 200), window, 65, 1)  # one head
    for seed in (0, 0, 1):
        order, widths = [], []
        for batch in gflowgr.batches(rows, data, 3, policy, np.random.default_rng(seed)):
            assert len(batch.tokens) <= 3
            widths.append(batch.tokens.shape[1])
            for c, (b, t) in enumerate((batch.ends >= 0).nonzero()):
                past, after, end = batch.histories[c], batch.following[c], batch.ends[b, t].item()
                read = batch.tokens[b, :end + 1] - policy.user_token - 1    # −1: <user>
                assert read.tolist() == [-1, *past[len(past) - end:]]
                assert min(len(past), max(1, window // 2)) <= end <= window
                assert past + after == histories[batch.users[c]] and batch.positives[c] == after[0]
                assert batch.liked[c] == (after[0] % 3 > 0)
                seen = (~batch.unseen[c, -200:]).nonzero().flatten()
                assert seen.tolist() == sorted(past)
                order.append((batch.users[c], after[0]))
        assert len({*order}) == len(order) == sum(map(len, histories))
        orders.append(order)
    assert orders[0] == orders[1] != orders[2]
    assert window == 1 or widths != sorted(widths)              # not from short to long rows

@pytest.mark.parametrize("K, L", [(24, 1), (5, 2), (4, 3), (3, 4), (2, 5), (2, 6)])
def test_packed_paths_and_beams_against_one_path_at_a_time(K, L):
    policy, everything = made(24, K, L), torch.arange(24).expand(5, 24)
    unseen = policy.semantic_ids.unseen(HISTORIES)
    paths = policy(*policy.tokens(HISTORIES), unseen, everything)
    p = paths.log_steps.sum(-1).exp()
    assert p.equal(policy.path_log_probs(HISTORIES, everything).sum(-1).exp())
    close(p.sum(1), torch.ones(5))                              # P lies on unseen items alone
    for c, history in enumerate(HISTORIES):
        log_pf, log_flow = one_by_one(policy, history)
        left = [v for v in range(24) if v not in history]
        assert (p[c] > 0).nonzero().flatten().tolist() == left
        close(paths.log_flow[c], log_flow)
        close(paths.log_steps[c, left], log_pf[left])
    for k, beams, guide in itertools.product((24, 2), (24, 3), (None, torch.rand(5, 24) ** 4)):
        found = policy.recommend(HISTORIES, k, beams, guide)
        close(found, recommend_loops(policy, HISTORIES, k, beams, guide))

def test_who_has_seen_everything_may_be_written_anything_and_gets_an_empty_list():
    policy, seen = made(), list(range(24))
    p = policy.path_log_probs([seen], [seen]).sum(-1).exp()
    close(p[0], one_by_one(policy, seen)[0].sum(1).exp())
    close(p.sum(), torch.tensor(1.0))
    assert policy.recommend([seen, seen[1:]], 2, beams=2)[0].tolist() == [[-1, -1], [0, -1]]
    assert policy.recommend([[0, 0, 3]], 24)[0].tolist()[0].count(-1) == 2      # an item twice

@pytest.mark.parametrize("sample, past, beams, scale", [
    (1.0, [2], 2, None), (1.0, [0, 3, 5], 2, None), (0.5, [], 2, None), (2.0, [4], 2, 0.02)])
def test_lists_are_drawn_without_replacement(sample, past, beams, scale):   # None: no guide
    policy, p = made(6, 2, 3), torch.ones(6)
    rows, log_pf = policy.semantic_ids.codes.tolist(), one_by_one(policy, past)[0]
    flow = torch.rand(6) ** 2 * scale if scale else None
    for v, l in np.ndindex(6, 3):                               # a step is ∝ P_F^(1/T) · flow
        weight = {}                                             # of each code
        for w in under(rows, v, l):
            below = [u for u in under(rows, w, l + 1) if u not in past]
            more = flow[below].sum() if scale else 1
            weight[rows[w][l]] = log_pf[w, l].exp() ** (1 / sample) * more
        p[v] = p[v] * weight[rows[v][l]] / max(1e-30, sum(weight.values()))
    assert (p[past] == 0).all() and abs(p.sum() - 1) < 1e-5     # over unseen items
    wanted = (p[:, None] * p / (1 - p[:, None])).fill_diagonal_(0)      # of the first two
    guide = flow.expand(4000, 6) if scale else None
    first, second = policy.recommend([past] * 4000, 2, beams, guide, sample)[0].T
    pairs = torch.bincount(6 * first + second, minlength=36).view(6, 6) / 4000
    close(pairs, wanted, atol=0.025, rtol=0)
    assert (pairs[wanted == 0] == 0).all()

def test_a_drawn_list_of_k_needs_no_more_than_k_beams():
    policy = made(6, 2, 3)
    for k, past in itertools.product((1, 2, 5), ([2], [0, 1], [5, 0, 3, 2])):
        found = policy.recommend([past] * 300, k, k, sample=1.0)[0]
        assert ((found >= 0).sum(1) == min(k, 6 - len(past))).all()     # no empty place
        assert not torch.isin(found, torch.tensor(past)).any()

def test_the_product_against_loops_remembers_and_knows_no_order(monkeypatch):
    past = [*HISTORIES[:3], HISTORIES[4], list(range(23)), list(range(24))]
    after, cm = [[1, 2], [], [9], [], [23], []], CollaborativeModel.fit(TRAIN, 24)
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

def same(found, other):
    return all(x.equal(y) for x, y in zip(found, other, strict=True))

def test_models_come_back_and_a_guide_leaves_the_policy_unguided(tmp_path):
    policy, cm = made(), CollaborativeModel.fit(TRAIN, 24, **OTHER)
    guided = Guided(policy, cm.debiased(0.7), 3.0)
    policy.save_pretrained(tmp_path)
    assert same(gflowgr.load_model(tmp_path).recommend(HISTORIES), policy.recommend(HISTORIES))
    gflowgr.save_model(guided, tmp_path)                        # takes its place
    assert same(gflowgr.load_model(tmp_path).recommend(HISTORIES), guided.recommend(HISTORIES))
    tokens = torch.arange(4)[None]
    close(GPT2LMHeadModel.from_pretrained(tmp_path)(tokens).logits, policy.lm(tokens).logits)
    back = Policy.from_pretrained(tmp_path, dropout=0.3)
    assert same(back.recommend(HISTORIES), policy.recommend(HISTORIES)) and cm.debias == 0
    assert back.lm.transformer.drop.p == 0.3 and back.window == 4 and not back.training
    table = json.loads((tmp_path / "semantic_ids.json").read_text("utf-8"))
    report.write(tmp_path / "semantic_ids.json", {**table, "codes": table["codes"][1:]})
    with pytest.raises(InputError, match="its IDs do not fit its weights"):
        gflowgr.load_model(tmp_path)
    report.write(tmp_path / "semantic_ids.json", table)
    torch.save(policy.lm.state_dict(), tmp_path / "pytorch_model.bin")  # a pickle, never read
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no saved model"):
        Policy.from_pretrained(tmp_path)

# --- Samplers, the loss, training -----------------------------------------------------------------
@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    TOY["write"](folder, 60, 8, 6, 1)
    return [f"--data={folder}", *"--codes=8 --width=32 --layers=1 --batch=16 --window=8".split(),
            *"--sft=epochs=2:rate=.005 --recipe=epochs=2:rate=.005 --beams=11".split()]

def prepared(*flags, shift=0):                # shift changes the validation and test items
    settings = gflowgr.parse(list(flags))
    settings.device, data = "cpu", load_data(settings.data)
    data.histories = [h[:-2] + [(item + shift) % 48 for item in h[-2:]] for h in data.histories]
    return World.prepare(0, data, settings)

def test_samplers_draw_from_where_they_say():
    policy, positives = made(), torch.tensor([4, 8, 2])
    before, after = [[3], [5, 0, 7], [9, 1]], [[4, 11], [8, 20], [2, 23]]
    logged, r = [past + rest for past, rest in zip(before, after)], torch.rand(3, 24) ** 4
    r[tokenizer.entries(before)] = 0
    def sampled(name, count, past=before):
        batch = SimpleNamespace(r=r.clone(), positives=positives, histories=past, following=after)
        items = SAMPLERS[name](batch, count, policy, 0.5)
        assert batch.r.equal(r)                                 # the loss needs it, too
        return items
    own, later = torch.zeros(2, 3, 24)
    own[tokenizer.entries(logged)] = 1
    later[tokenizer.entries([row[1:] for row in after])] = 1
    for name, weight in (("reward", r), ("random", 1 - own), ("session", later),
                         ("even", (r / r.sum(1, keepdim=True) + 1 / 24) * (r > 0))):
        for row, p in zip(sampled(name, 2000), weight / weight.sum(1, keepdim=True)):
            share = torch.bincount(row, minlength=24) / 2000
            assert (share - p).abs().max() < 0.04 and (share[p == 0] == 0).all(), name
    best = policy.recommend(before, 7, beams=7)[0].tolist()
    best = [[v for v in row if v != own][:6] for row, own in zip(best, positives)]
    assert sampled("policy", 6).tolist() == best
    torch.manual_seed(3)
    drawn = sampled("drawn", 7)
    torch.manual_seed(3)
    assert drawn.equal(policy.recommend(before, 7, beams=7, sample=1.0)[0])
    most = [[v for v in range(22) if v != p] for p in positives]
    for name in ("policy", "drawn"):                            # 3 are left: the positive fills
        few = sampled(name, 4, most).tolist()
        assert [sorted({*row}) for row in few] == [[p, 22, 23] for p in (4, 8, 2)], name
        assert few[0].count(4) == 2
    most = [[v for v in range(24) if v != p] for p in positives]
    after[:] = [[4], [8], [2]]                                  # no others: the positive
    for name in ("session", "random"):
        assert sampled(name, 2, most).tolist() == [[4, 4], [8, 8], [2, 2]]

def reward_by_hand(recipe, codes, signal, past, after):         # R of all items (n,) in a context
    alike = torch.tensor([sum(x == y for x, y in zip(row, codes[after[0]])) for row in codes])
    alike[past] = 0
    few = 1e-3 / (len(codes) - len({*past}))                    # the ε of each unseen item
    R = recipe.w_y * signal / signal.sum() + recipe.w_s * alike / alike.sum() + few
    R[after[0]] += recipe.w_a * (1 if after[0] % 3 else 0.1)    # liked, or only clicked
    R[past] = 0
    liked_or_not = 1 if after[0] % 3 else 0.1
    close(R.sum(), torch.tensor(recipe.w_a * liked_or_not + recipe.w_y + recipe.w_s + 1e-3))    # Z
    return R

def loss_by_hand(name, log_flow, log_pf, log_r, reference, beta):     # of the J paths of a context
    log_p = log_pf.sum(1)
    if "huber" in name:                                         # half a square up to 1 nat
        gaps = (log_flow[0, 0] + log_p - log_r).abs()
        return sum(0.5 * x * x if x < 1 else x - 0.5 for x in gaps) / len(gaps)
    if name == "vargrad":                                       # the mean stands for log Z
        return balance_loops((log_r - log_p).mean()[None], log_p[None], log_r[None])
    if "tb" in name:
        return balance_loops(log_flow[:1, 0], log_p[None], log_r[None])
    if "db" in name:
        log_f = torch.cat([log_flow, log_r[:, None]], 1)
        return (log_f.diff(dim=1) - log_pf).square().sum() / len(log_r)
    if "grpo" in name:
        return grpo_loops(log_p[None], reference[None], log_r[None], beta)
    return sdpo_loops(log_p[:1], log_p[None, 1:], reference[:1], reference[None, 1:], beta)

@pytest.mark.parametrize("name, K, L", [
    ("sft", 48, 1), ("distill:teacher=product", 2, 6), ("distill:gr=.5:first=1", 8, 3),
    ("sdpo:beta=1:sampler=drawn:trajectories=7", 8, 3), ("sdpo:gr=0:beta=.7", 4, 3),
    ("sdpo-reward:beta=.7", 8, 3), ("vargrad", 8, 3),
    ("tb:gr=.7:lam=.3:first=1", 3, 4), ("tb-paper:trajectories=1", 4, 3), ("db:exact=0", 8, 3),
    ("grpo:beta=.7:first=1", 7, 2), ("db:sampler=policy", 48, 1), ("db:debias=0", 3, 5),
    ("tb:teacher=product:gamma=1.3", 8, 3), ("tb-huber:trajectories=9", 8, 3)])
def test_the_whole_loss_against_one_path_at_a_time(name, K, L, tiny, monkeypatch):
    common = "--recipe=teacher=cm:w_a=.4:w_y=.4:w_s=.2:debias=.5"
    world = prepared(*tiny, common, f"--codes={K}", f"--levels={L}")
    recipe, data, codes = recipe_of(name, world.settings), world.data, world.ids.codes.tolist()
    data.train = [history[:5] for history in data.train]        # read is all that stands before v
    data.liked = [[item % 3 > 0 for item in history] for history in data.train]
    policy, reference = (made(ids=world.ids, seed=seed) for seed in (0, 1))
    monkeypatch.setattr(World, "policy", lambda world, method: {"sft": reference}[method])
    batch = gflowgr.batch_of([*gflowgr.training_rows(data.train, 4)][:5], data, policy)
    left = batch.unseen[:, world.ids.num_prefixes:].float()
    chosen = left.multinomial(1)                                # path 0 if it is drawn ∝ R
    drawn = left.multinomial(recipe.trajectories, True)
    drawn[0, 0] = batch.positives[0]                            # v is no negative of itself
    drawn[1, 0] = chosen[1, 0]
    monkeypatch.setattr(gflowgr, "draw", lambda r, count: chosen if r is batch.r else None)
    def sampler(batch, *others):
        assert others == (recipe.trajectories, policy, 0.5) and not policy.training     # no dropout
        return drawn
    monkeypatch.setitem(SAMPLERS, recipe.sampler, sampler)
    found = gflowgr.loss_of(recipe, policy.train(), reference, batch, world.reward(recipe), 0.5)
    assert policy.training
    gr, lam = (recipe.gr, recipe.lam) if recipe.loss else (1, 0)
    total = 0
    for c, (past, after) in enumerate(zip(batch.histories, batch.following)):
        (log_pf, log_flow), (frozen, _) = one_by_one(policy, past), one_by_one(reference, past)
        total -= gr * log_pf[after[0]].sum()                    # L_GR
        first = chosen[c].tolist() if recipe.chosen == "reward" else after[:recipe.first]
        again = first if "sdpo" in name else []
        paths = first + [v for v in drawn[c].tolist() if v not in again]
        signal = world.cm.scores([past], [after])[0] / (world.cm.count + 1.0) ** recipe.debias
        if recipe.teacher == "product":
            signal = signal ** recipe.gamma * frozen.sum(1).exp()
        R = reward_by_hand(recipe, codes, signal, past, after)
        below = torch.zeros(len(codes), L + 1)                  # exact flows
        for v, l in np.ndindex(*below.shape):
            below[v, l] = R[under(codes, v, l)].sum()
        log_flow = below[:, :L].log() if recipe.exact else log_flow
        if name.startswith("distill"):                          # KL, prefix by prefix
            for item, l in itertools.product(paths, range(L)):
                legal = [v for v in under(codes, item, l) if below[v, l + 1] > 0]
                v = [*{codes[v][l]: v for v in legal}.values()]     # one item a legal code
                p = below[v, l + 1] / below[v, l + 1].sum()
                total += lam * (p * (p.log() - log_pf[v, l])).sum() / len(paths)
        else:
            shown = log_flow[paths], log_pf[paths], R[paths].log(), frozen[paths].sum(1)
            total += lam * loss_by_hand(name, *shown, recipe.beta)
    close(found.detach(), total / len(batch.users))

def test_where_r_takes_two_values_tb_and_distill_lead_to_different_means():
    R = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.1, 0.4, 0.3, 0.2]])      # one history, two targets
    items = torch.tensor([0, 0, 1, 1, 2, 2, 2, 3, 3])           # as the geometric mean draws them
    def tb(log_p):
        return gflowgr.trajectory_balance(torch.zeros(2), log_p[:, items], R.log()[:, items])
    def distill(log_p):
        return gflowgr.distillation(R[:, None, None], log_p[:, None, None])
    geometric, plain = R.log().mean(0).requires_grad_(), R.mean(0).log().requires_grad_()
    for loss, logits, settled in ((tb, geometric, True), (distill, geometric, False),
                                  (distill, plain, True)):
        [slope] = torch.autograd.grad(loss(logits.log_softmax(0).expand(2, 4)), logits)
        assert (slope.abs().max() < 1e-6) == settled            # without a slope, training ends

def trained(flags, name="sft", shift=0, rows=None):
    # From random weights, which are the SFT of the product as well → the curve, all that was used
    world = prepared(*flags, shift=shift)
    recipe, world.rows = recipe_of(name, world.settings), world.rows[:rows]
    world.products[recipe.debias, recipe.gamma] = Guided(world.policy().eval(), world.cm)
    policy = world.policy("", 0.1)
    curve = gflowgr.train(name, recipe, policy, world)
    return curve, [world.ids.codes, *world.cm.buffers(), *policy.parameters()]

@pytest.mark.parametrize("name", RECIPES)
def test_training_lowers_its_loss(name, tiny):
    curve, _ = trained([*tiny, "--recipe=epochs=4:rate=.005"], name)
    assert len(curve) == (3 if name == "sft" else 5) and curve[-1]["loss"] < curve[1]["loss"]

def test_what_was_learned_against_loops():
    policy, cm, log, numbers = made(), CollaborativeModel.fit(TRAIN, 24), 2 * TRAIN, []
    liked = [[v % 3 > 0 for v in history] for history in log]
    data = SimpleNamespace(histories=log, liked=liked, train=[history[:-2] for history in log])
    recipe, codes = RECIPES["tb"], policy.semantic_ids.codes.tolist()
    job = reward.Reward(policy.semantic_ids, cm, (recipe.w_a, recipe.w_y, recipe.w_s))
    for *past, v, _ in log[::2]:                                # 30 of 60 users: at most 50
        p = one_by_one(policy, past)[0].sum(1).exp()
        R = reward_by_hand(recipe, codes, cm.scores([past])[0], past, [v])
        left = [w for w in range(24) if w not in past]
        target, p = R[left] / R.sum(), p[left]
        ten = p.topk(min(10, len(left))).indices
        numbers.append([sum(target * (target / p).log()), -sum(p * p.log()), sum(target[ten])])
    wanted = dict(zip(("kl", "entropy", "reward@10"), np.mean(numbers, 0)))
    assert gflowgr.learned(policy, job, data) == approx(wanted, abs=1e-4)

def test_same_seed_same_curve_and_no_leak_from_test_or_validation_items(tiny):
    one, again, other = (trained(tiny, "distill", shift=shift) for shift in (0, 0, 1))
    assert one[0] == again[0] != other[0] and same(one[1], other[1])    # other validation items

def test_rates_and_progress_over_the_steps(tiny, monkeypatch):
    rates, progress = [], []
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

def test_a_method_that_over_fits_is_told(tiny, tmp_path, monkeypatch, capsys):
    world = prepared(*tiny, f"--out={tmp_path}")
    for name, curve, told in (("sft", (0, 0.5, 0.44), "after epoch 1 .* try --sft "),
                              ("tb", (0.5, 0.4), "after epoch 0 .* try --recipe "),
                              ("sft", (0.9, 0.5, 0.46), "^$")):     # SFT's first is by chance
        points = [{"epoch": epoch, "ndcg@10": ndcg} for epoch, ndcg in enumerate(curve)]
        monkeypatch.setattr(gflowgr, "train", lambda *arguments: points)
        gflowgr.model_of(name, recipe_of(name, world.settings), world)
        assert re.search(told, capsys.readouterr().out)

def test_a_loss_that_is_not_finite_stops_with_step_and_users(tiny, monkeypatch):
    monkeypatch.setitem(RECIPES, "mine", Recipe(lambda log_r: log_r.sum() * math.nan, "log_r"))
    with pytest.raises(FloatingPointError, match=r"mine: loss nan at step 0; users 0$"):
        trained(tiny, "mine", rows=2)

# --- Methods by name ------------------------------------------------------------------------------
def test_changes_in_the_order_tuned_recipe_name(monkeypatch):
    for data, name in itertools.product(gflowgr.TUNED, RECIPES):    # those of the file make sense
        settings, other = map(gflowgr.parse, (["--data", data], ["--data=d", f"--preset={data}"]))
        assert recipe_of(name, settings) == recipe_of(name, other)
        assert (settings.width, settings.beams) == (other.width, other.beams)
    monkeypatch.setattr(gflowgr, "TUNED", {"toy": {
        "sft": "epochs=3", "*": "epochs=4:lam=4:gamma=4:w_s=0", "tb": "lam=5:beta=5"}})
    settings = gflowgr.parse(["--recipe=gamma=6:beta=6", "--sft=rate=.5:dropout=.5"])
    common = dict(epochs=4, lam=4, gamma=6, beta=6, w_s=0)
    for name, changes in (                                      # NAME+cm: the end is the guide's
            ("tb+cm", common), ("tb:lam=2:debias=2+cm:gamma=3", {**common, "gamma": 3}),
            ("tb:exact=0", {**common, "lam": 5, "exact": False}),
            ("db:gamma=7:gr=1:first=1", {**common, "gamma": 7, "gr": 1, "first": True}),
            ("cm:debias=1", dict(debias=1)),
            ("sft:epochs=8:rate=.1", dict(epochs=8, rate=0.1, dropout=0.5))):
        own = RECIPES.get(gflowgr.base_of(name), Recipe())
        assert recipe_of(name, settings) == replace(own, **changes), name
    settings.methods = "tb:lam=2+cm:gamma=3,tb, cm:debias=1,tb:lam=3"
    assert gflowgr.check_settings(settings)[0] == [             # all start from SFT
        "cm:debias=1", "sft", "tb:lam=2", "tb", "tb:lam=3", "tb:lam=2+cm:gamma=3"]

def another_loss(log_z, log_pf, log_r):
    return (log_z[:, None] + log_pf - log_r).square().max()

def newest(batch, count, policy, progress):
    assert policy.lm.transformer.drop.p == 0.25
    return torch.tensor([[after[-1]] * count for after in batch.following])

def test_an_own_loss_and_sampler_and_a_bug_that_keeps_its_traceback(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "mine", Recipe(another_loss, gflowgr.TB, sampler="newest"))
    monkeypatch.setitem(RECIPES, "bug", Recipe(lambda log_pf: log_pf.shape[2], "log_pf"))
    monkeypatch.setitem(SAMPLERS, "newest", newest)
    flags = [*tiny, f"--out={tmp_path}", "--sft=epochs=1", "--recipe=epochs=1:dropout=.25"]
    status, out, err = cli(*flags, "--methods=mine:trajectories=3,tb:sampler=newest")
    assert status == 0 and "loss=another_loss" in out and "| tb:sampler=newest |" in out, err
    with pytest.raises(IndexError):                             # with its traceback
        cli(*flags, "--methods=bug")
    settings = gflowgr.parse([*flags, "--oracle=mine", "--quick"])
    before = settings.recipe
    gflowgr.run_oracle(settings)
    assert settings.recipe == before                            # a script may go on with them
    monkeypatch.setattr(gflowgr, "train", None)                 # before anything is trained
    monkeypatch.setitem(RECIPES, "typo", Recipe(another_loss, "log_z log_P log_r"))
    refused("log_P is not available", *flags, "--methods=typo")

# --- The experiment -------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["tb", "tb:exact=0:trajectories=60"])    # log Z: exact, learned
def test_trajectory_balance_reaches_the_reward(method, tmp_path, monkeypatch):
    data, drawn = tmp_path / "d", []
    TOY["write"](data, 30, 4, 3, 3)
    monkeypatch.setattr(figures, "plot_flows", lambda *arguments: drawn.append(arguments))
    flags = f"--codes=3 --width=32 --layers=1 --oracle={method} --recipe=rate=.003:epochs=5".split()
    status, out, err = cli(f"--data={data}", *flags, f"--out={tmp_path / 'a/new'}")
    before, after = map(float, re.findall(r"\d\.\d{4}", out[out.index("mean L1"):]))
    assert status == 0 and before > 0.5 and after <= 0.02, err
    paths = 60 if "exact" in method else 64
    assert f" trajectories={paths} first=True " in out and "epoch 5/5" in out
    [(path, flow)], data = drawn, load_data(str(data))
    assert path.name == "oracle.png" and path.parent.is_dir()
    assert flow["history"] == [data.titles[item] for item in data.train[0][:-1]]
    np.testing.assert_allclose(flow["teacher"], flow["learned"], atol=0.02)

def test_exposure_and_diversity_of_several_users_by_hand():
    data = SimpleNamespace(titles=list("012345"), truth={
        "liked": [{0, 1, 2, 5}, {2, 3}, set(), {1, 2, 4}, {0}], "theme": list("bcdacb"),
        "shown": [{0, 1, 2}, {2, 3, 4}, {2}, set(), set()]})
    lists = np.array([[5, 2, 3], [2, -1, -1], [1, 0, 4], [2, 4, 0], [-1, -1, -1]])
    assert report.exposure(lists, data)["hidden@10"].tolist() == [1 / 1, 0, 0, 2 / 3, 0 / 1]
    assert report.exposure(lists, data)["liked@10"].tolist() == [2 / 3, 1, 0, 2 / 3, 0]
    # Their three themes: bcd, adb, abc, cda, bac. Of themes with as many liked items, a comes first
    assert report.exposure(lists, data)["themes@10"].tolist() == [2, 1, 2, 2, 0]
    found = report.diversity(lists, np.array([0, 3, 1, 1, 3, 0]))
    assert found["first_codes@10"].tolist() == [2, 1, 2, 3, 0]

def test_paired_gains_resample_the_ratio():
    def gains(*methods):
        seeds = [[{"by_user": {"ndcg": x, "zero": 0 * x}} for x in method] for method in methods]
        return report.paired_gains(*seeds)
    base, other = np.random.default_rng(0).random((2, 2, 500))
    for own in (1.2 * base + 0.05 * other, other, 0 * base):
        ratio = own.mean() / base.mean()                        # its standard error: delta method
        half = 1.96 * (own - ratio * base).mean(0).std() / math.sqrt(500) / base.mean()
        wanted = {"gain": ratio - 1, "low": ratio - 1 - half, "high": ratio - 1 + half}
        assert gains(own, base) == {"ndcg": approx(wanted, abs=half / 8 + 1e-9)}
    few = np.array([[1.0, 0, 0, 0]])                            # many samples hold only zeros
    assert gains(3 * few, few)["ndcg"] == approx({"gain": 2, "low": 2, "high": 2})

def folder_of(path, items=ITEMS, events=EVENTS, **more):
    path.mkdir(exist_ok=True)
    for name, text in {"items.csv": items, "interactions.csv": events, **more}.items():
        if text is not None:
            (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return path

def cli(*arguments):
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            status = gflowgr.main(gflowgr.parse([str(argument) for argument in arguments]))
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()

def refused(message, *flags):                 # one line on stderr, exit status 2
    status, _, err = cli(*flags)
    assert status == 2 and re.fullmatch(f"error: .*{re.escape(message)}.*\n", err), err

def results_in(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))

METHODS = "pop cm sft sft-continued tb:lam=2 tb:lam=2+cm".split()

@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "a/new/place"
    flags = [*tiny, f"--out={out}", "--seeds=1, 2", f"--methods={', '.join(METHODS)}"]
    flags += ["--temperatures", "1", "0.5"]
    status, printed, err = cli(*flags)
    assert status == 0, err
    data, results = load_data(flags[0][7:]), results_in(out)
    return SimpleNamespace(out=out, flags=flags, printed=printed, data=data, results=results,
                           runs=results["runs"], past=[row[:-1] for row in data.histories])

def test_every_run_says_its_recipe_and_its_model_serves_what_was_measured(finished):
    data, past = finished.data, finished.past
    targets = torch.tensor([history[-2:] for history in data.histories])
    assert [run["method"] for run in finished.runs] == 2 * METHODS
    assert finished.printed.startswith("epochs: sft 2, sft-continued 2, tb:lam=2 2\n")
    for run in finished.runs:
        method, seed, trained = run["method"], run["seed"], run["method"] in METHODS[2:5]
        facts = gflowgr.facts_of(method, recipe_of(method, gflowgr.parse(finished.flags)))
        said = [f"{method}, seed {seed}:", *[f"{what}={value}" for what, value in facts.items()]]
        assert run["recipe"] == facts and f"\n{' '.join(said)}\n" in finished.printed
        assert len(run["curve"]) == (3 if trained else 0)
        assert run["train_examples"] == (2 * sum(map(len, data.train)) if trained else 0)
        assert 0 < run["seconds"]["train"] < 99 and 0 < run["seconds"]["eval"] < 99
        lists = torch.tensor(run["lists"])
        for metric, loops, k in (("ndcg@10", ndcg_loops, 10), ("recall@5", recall_loops, 5)):
            gains = loops(lists, targets[:, 1], k).tolist()
            assert run["by_user"][metric] == approx(gains, abs=1e-6)
        means = {metric: np.mean(numbers) for metric, numbers in run["by_user"].items()}
        means["coverage@10"] = len({*lists.flatten().tolist()} - {-1}) / 48
        assert {metric: run["metrics"][metric] for metric in means} == approx(means)
        assert ("kl" in run["metrics"]) == trained
        if method not in ("pop", "cm"):
            model = gflowgr.load_model(finished.out / f"{method}-{seed}".replace(":", ","))
            assert model.recommend(past)[0].tolist() == run["lists"]
            ids = getattr(model, "policy", model).semantic_ids
            torch.manual_seed(seed)
            drawn = gflowgr.evaluate(partial(model.recommend, sample=0.5), data, ids)[0]
            assert run["drawn"]["0.5"] == drawn
        if trained:                                             # the last epoch was saved
            ndcg = ndcg_loops(model.recommend(data.train)[0], targets[:, 0], 10).mean()
            assert run["curve"][-1]["ndcg@10"] == approx(ndcg)

def test_fine_tuning_starts_from_sft_and_pop_counts(finished):
    sft, continued, tb = [run["curve"] for run in finished.runs[-4:-1]]
    assert sft[-1]["ndcg@10"] == continued[0]["ndcg@10"] == tb[0]["ndcg@10"] != sft[0]["ndcg@10"]
    counts = np.bincount(sum(finished.data.train, []), minlength=48)
    for past, row in zip(finished.past, finished.runs[0]["lists"]):     # pop
        rest = sorted({*range(48)} - {*past}, key=lambda v: -counts[v])
        assert counts[row].tolist() == counts[rest[:10]].tolist() and {*row} <= {*rest}

def test_a_run_leaves_the_table(finished):
    data, past = finished.data, finished.past[0]
    first = [data.titles[v] for v in past]
    assert f"\nuser {data.user_ids[0]}: {', '.join(first[-8:])}\n" in finished.printed
    room = len("tb-paper:sampler=drawn:trajectories=7") - len("tb:lam=2+cm")    # of README's names
    assert len(re.search(r"(?m)^\| tb:lam=2\+cm .*", finished.printed)[0]) + room <= 120
    hidden = data.truth["liked"][0] - data.truth["shown"][0]
    for run in finished.runs[:6]:                               # of the first seed
        five = [data.titles[v] + "*" * (v in hidden) for v in run["lists"][0][:5]]
        assert f" {run['method']}  {', '.join(five)}\n" in finished.printed
    longer, summary = (finished.out / "results.md").read_text("utf-8"), finished.results["summary"]
    for method, own in summary.items():
        a, b = [run["metrics"]["ndcg@10"] for run in finished.runs if run["method"] == method]
        own = own["ndcg@10"]
        assert own == approx({"mean": (a + b) / 2, "std": abs(a - b) / math.sqrt(2)})
        for table, cell in ((finished.printed, "{mean:.4f} |"), (longer, "{mean:.4f} ± {std:.4f}")):
            line = table.split(f"| {method} |")[1].split("\n")[0]
            assert cell.format(**own) in line
        for key, base in (("paired", "sft"), ("paired_continued", "sft-continued")):
            gain = own["mean"] / summary[base]["ndcg@10"]["mean"] - 1
            assert (method == base) == (method not in finished.results[key])
            assert method == base or f"| {100 * gain:+.1f} [" in line

def test_pictures_are_drawn_again_and_for_the_readme(finished, tmp_path, monkeypatch, capsys):
    run, pictures = tmp_path / "run", tmp_path / "pictures"
    names = "diversity.png exposure.png".split()
    shutil.copytree(finished.out, run, ignore=shutil.ignore_patterns("*.png"))
    pictures.mkdir()
    monkeypatch.setattr(figures, "__file__", str(tmp_path / "figures.py"))
    for command in ([], ["--readme"]):
        figures.main([str(run), *command])
    for picture in [pictures / names[0], *[run / name for name in names]]:
        assert picture.read_bytes()[:4] == b"\x89PNG" and (finished.out / picture.name).exists()
    for results, message in (({**finished.results, "data": {}}, "have changed"), ([], "TypeError")):
        (run / "results.json").write_text(json.dumps(results))
        with pytest.raises(SystemExit, match="2"):
            figures.main([str(run)])
        assert re.fullmatch(f"error: .*/results.json: .*{message}.*\n", capsys.readouterr().err)

def test_a_killed_run_goes_on_as_if_nothing_had_been(finished, tmp_path, monkeypatch):
    flags, steps = [*finished.flags, f"--out={tmp_path}", "--seeds=1"], []
    def loss_of(recipe, *others, original=gflowgr.loss_of):
        steps.append(recipe.loss)
        if steps.count(gflowgr.trajectory_balance) == 3:        # in the middle of tb
            raise KeyboardInterrupt
        return original(recipe, *others)
    monkeypatch.setattr(gflowgr, "loss_of", loss_of)
    stopped = (130, "stopped; --resume keeps the finished methods of a run\n")
    (tmp_path / "exposure.png").touch()                         # of an earlier run
    assert cli(*flags)[::2] == stopped and not (tmp_path / "exposure.png").exists()
    for path in tmp_path.glob("*/run.json"):                    # these four are kept
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "train_examples": -1}))
    assert cli(*flags, "--resume")[0] == 0
    for number, run in enumerate(results_in(tmp_path)["runs"]):     # as of a run without a break
        changes = {"seconds": run["seconds"]} | ({"train_examples": -1} if number < 4 else {})
        assert run == {**finished.runs[number], **changes}
    steps.clear()                                               # without --resume: all anew,
    assert number == 5 and cli(*flags)[::2] == stopped          # and nothing old is left
    assert -1 not in [run["train_examples"] for run in results_in(tmp_path)["runs"]]
    assert len([*tmp_path.glob("*/run.json")]) == 4

def test_resume_refuses_what_was_made_otherwise(finished, tmp_path, monkeypatch):
    flags = [*finished.flags, "--resume"]
    for message, *changes in (
            ("sft-1/run.json was made with window = 8, now it is 9; choose", "--window=9"),
            ("gamma = 2.0, now it is 7.0", "--recipe=epochs=2:rate=.005:gamma=7"),
            ("sft-1/run.json was made with sft epochs = 2", "--sft=epochs=3:rate=.005"),
            ("was made with checksum of data", f"--data={folder_of(tmp_path / 'd')}"),
            ("was made with checksum of ids", "--ids=content")):
        refused(message, *flags, *changes)
    monkeypatch.setattr(another_loss, "__name__", "trajectory_balance")     # other code alone
    for table, name, value in ((RECIPES, "tb", Recipe(another_loss, gflowgr.TB)),
                               (SAMPLERS, "reward", SAMPLERS["random"])):
        with monkeypatch.context() as patch:
            patch.setitem(table, name, value)
            refused("checksum of loss and sampler", *flags)
    assert results_in(finished.out) == finished.results         # as it was: all is kept
    assert cli(*flags)[1].count("kept, as it was finished") == len(finished.runs)
    world = prepared(*flags, "--sft=epochs=3")
    made_with = [gflowgr.key_of(name, world).get("sft epochs") for name in ("pop", "cm", "tb+cm")]
    assert made_with == [None, None, 3]
    report.write(tmp_path / "pop-1/run.json", [])
    refused("another program", *flags, f"--out={tmp_path}")

def test_an_own_cm(tiny, tmp_path, capsys):
    mine = SimpleNamespace(scores=lambda rows, following=None: torch.eye(48)[[7] * len(rows)])
    settings = gflowgr.parse([*tiny, f"--out={tmp_path}", "--methods=cm"])
    found, past = gflowgr.run(settings, mine), load_data(settings.data).histories
    lists = zip(past, found["runs"][0]["lists"])
    assert all(7 in history[:-1] or row[0] == 7 for history, row in lists)
    assert found["summary"]["cm"]["ndcg@10"]["std"] == 0        # of one seed
    with pytest.raises(InputError, match="built-in CM"):
        gflowgr.run(replace(settings, methods="tb:debias=.5"), mine)
    capsys.readouterr()
    gflowgr.run(replace(settings, methods="sft+cm"))            # saved; the next takes its place
    gflowgr.run(replace(settings, methods="sft+cm"), mine)
    assert "sft+cm: not saved" in capsys.readouterr().out
    gflowgr.run(replace(settings, resume=True), mine)           # the same CM: its run is kept
    assert "cm, seed 42: kept" in capsys.readouterr().out
    mine.scores = lambda rows, following=None: torch.eye(48)[[8] * len(rows)]
    with pytest.raises(InputError, match="was made with checksum of CM"):
        gflowgr.run(replace(settings, resume=True), mine)
    train = [[], *load_data(settings.data).train]               # the first call is as in training
    calls = []
    good = torch.eye(48)[[0] * len(train)]
    mine.scores = lambda rows, after=None: calls.append((rows, after)) or good
    gflowgr.check_cm(mine, load_data(settings.data))
    assert [past + after for past, after in zip(*calls[1])] == train and calls[0][1] is None
    Guided(made(48), mine).scores([[1]])                        # no `following`: none is made up
    assert calls[2][1] is None
    refused("never saved", "--recommend", "x", "--model", tmp_path / "sft+cm-42")
    for bad, kind in ((good.numpy(), "'ndarray', .*60, 48"), (good[:1], "torch.float32, 1, 48"),
                      (good[:, 1:], "'Tensor'"), (good.long(), "torch.int64"), ([], "'list'")):
        mine.scores = lambda rows, following=None: bad
        with pytest.raises(InputError, match=rf"of floats \(B, n\), here \(60, 48\), not .*{kind}"):
            gflowgr.run(settings, mine)
    for bad, said in ((good - 1 / 48, "is -0.02"), (2 * good, "2 to 2"), (0 / good, "is nan")):
        mine.scores = lambda rows, following=None: bad
        with pytest.raises(InputError, match=f"sum is 1; here .*{said}"):
            gflowgr.run(settings, mine)

def test_ids_from_a_file_one_code_an_item_and_devices(tmp_path):
    folder = folder_of(tmp_path, ids="item_id,x,y\na,1,5\nb,2,0\nc,3,0\nd,2,0\n")
    codes = prepared(f"--data={folder}", f"--ids={folder / 'ids'}").ids.codes.tolist()
    assert codes == [[1, 5, 0], [2, 0, 0], [3, 0, 0], [2, 0, 1]]    # b and d had the same
    world = prepared(f"--data={folder}", "--ids=item")
    assert world.ids.codes.tolist() == [[0], [1], [2], [3]] and world.ids.num_codes == 4
    world.settings.device = "meta"                              # a policy moves, not the shared IDs
    assert world.policy().semantic_ids.codes.is_meta and not world.ids.codes.is_meta

@pytest.mark.parametrize("name", ["tb,lam=2-1", "tb,lam=2+cm-1"])
@pytest.mark.parametrize("sample, flags", [(0, []), (1, ["--sample"]), (3, ["--sample", "3"])])
def test_recommend_prints_ten_titles(finished, name, sample, flags):
    path, titles = finished.out / name, finished.data.titles
    torch.manual_seed(0)
    items, scores = gflowgr.load_model(path).recommend([[3, 5]], sample=sample)
    torch.manual_seed(0)
    asked = ["--recommend", titles[3].upper(), "5", "--model", path, *flags]
    lines = [line.rpartition("  ") for line in cli(*asked)[1].splitlines()[1:]]
    assert [title for *_, title in lines] == [titles[v] for v in items[0]]
    shares = [float(share.strip("%")) / 100 for share, *_ in lines if share]
    assert shares == ([] if sample else approx(scores[0].softmax(0).tolist(), abs=6e-4))
    refused(titles[3], "--recommend", titles[3][:-1] + "x", "--model", path)

def test_two_users_and_nine_items_without_text_or_truth_work_as_they_are(tmp_path):
    events = EVENTS.replace("b,1", "b,2")                       # as u,c,2: one in six
    folder = folder_of(tmp_path / "d", "\n".join(["item_id", *"abcdefghi"]), events)
    status, out, err = cli("--data", folder, "--out", tmp_path / "out", "--quick")
    assert "17% have the time of the user's interaction before" in out
    assert status == 0 and "| tb-huber+cm | " in out and "hidden@10" not in out, err

def test_the_toy_world_is_as_committed_and_popularity_can_be_earned(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--quality=0", f"--out={tmp_path}"])
    runpy.run_path(str(ROOT / "data/toy/prepare.py"), run_name="__main__")
    for name in ("items.csv", "interactions.csv", "truth.csv"):
        assert (tmp_path / name).read_bytes() == (ROOT / "data/toy" / name).read_bytes()
    TOY["write"](tmp_path, quality=1)
    for folder, least, most in (("toy", -0.2, 0.2), (str(tmp_path), 0.5, 1)):
        truth = load_data(folder).truth
        table = [report.table_of_items(truth[what], 720).sum(0) for what in ("liked", "shown")]
        assert least < np.corrcoef(*table)[0, 1] < most         # how far likes go with showing

def test_beauty_is_converted_or_refused(tmp_path, monkeypatch, capsys):
    here = tmp_path / "beauty"
    shutil.copytree(ROOT / "data/beauty", here, ignore=shutil.ignore_patterns("*.csv"))
    monkeypatch.setattr(folder_of_data, "__file__", str(tmp_path / "__init__.py"))
    refused("no Beauty yet; download", "--data=beauty")
    monkeypatch.setattr(sys, "argv", ["prepare.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(here / "prepare.py"), run_name="__main__")
    assert re.fullmatch("error: .*No such file.*\n", capsys.readouterr().err)
    text = {"a": {"title": " A\nsoap", "brand": None, "categories": [["Hair", "x"]]}}
    codes = {item: [f"<a_{v}>", "<b_7>", "<c_232>", "<d_6>"] for v, item in enumerate("abcd")}
    tables = {"item": text, "index": codes, "inter": {"u": ["a", "b", "c", "d"]}}
    prepare = runpy.run_path(str(here / "prepare.py"))["prepare"]
    for name, table in tables.items():
        (tmp_path / f"Beauty.{name}.json").write_text(json.dumps(table))
    for name in ("index", "inter"):
        with pytest.raises(OSError, match=f"{name}.json has another SHA-256"):
            prepare(tmp_path, here)
        digest = hashlib.sha256(json.dumps(tables[name]).encode()).hexdigest()
        monkeypatch.setitem(prepare.__globals__["SHA256"], name, digest)
    prepare(tmp_path, here)
    data = load_data("beauty")
    assert (data.titles, data.histories) == (["A soap", "b", "c", "d"], [[0, 1, 2, 3]])
    assert data.texts[0] == "A soap Hair x" and not [*here.glob("*.part")]
    assert read_ids(here / "letter_ids.csv", list("abcd")) == [[v, 7, 232, 6] for v in range(4)]

def test_movielens_is_read_from_a_wheel_or_refused(tmp_path, monkeypatch):
    here, wheel = tmp_path / "ml-100k", tmp_path / "recbole.whl"
    shutil.copytree(ROOT / "data/ml-100k", here, ignore=shutil.ignore_patterns("*.csv"))
    monkeypatch.setattr(folder_of_data, "__file__", str(tmp_path / "__init__.py"))
    script = runpy.run_path(str(here / "prepare.py"))
    films = "\n".join([f"{item}\tFilm {item}\t199{item}\tComedy" for item in range(3)])
    events = "\n".join([f"u\t{item}\t{item + 1}\t{3 - item}" for item in range(3)])
    tables = {"item": f"id\ttitle\tyear\tclass\n{films}", "inter": f"u\tid\tstars\ttime\n{events}"}
    with zipfile.ZipFile(wheel, "w") as file:
        for name, text in tables.items():
            file.writestr(script["INSIDE"] + name, text)
    for name, text in tables.items():
        with pytest.raises(OSError, match=f"{name} has another SHA-256"):
            script["prepare"](wheel, here)
        script["SHA256"][name] = hashlib.sha256(text.encode()).hexdigest()
    script["prepare"](wheel, here)
    data = load_data("ml-100k")                                 # it is there: nothing is fetched
    assert data.titles == ["Film 0 (1990)", "Film 1 (1991)", "Film 2 (1992)"]
    assert data.histories == [[2, 1, 0]] and data.liked == [[True, False, False]]

def test_help_and_speed_in_tiny(capsys):
    status, out, _ = cli("--help")
    assert status == 0 and all(f"--{name} " in out for name in vars(gflowgr.parse([])))
    assert "64)" in out                                         # the width in the toy world
    assert main(["--speed", "--tiny"]) == 0
    assert len(re.findall(r"(?m)^.{50}( +\d+\.\d+){3}", capsys.readouterr().out)) == 7

def test_examples_in_docstrings_and_the_readme(tiny, tmp_path, monkeypatch):
    assert not any([doctest.testmod(module).failed for module in (gflowgr, reward, tokenizer)])
    monkeypatch.setattr(gflowgr, "RECIPES", dict(RECIPES))      # the README adds a loss, a sampler
    monkeypatch.setattr(gflowgr, "SAMPLERS", dict(SAMPLERS))
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("```", "")
    test = doctest.DocTestParser().get_doctest(text, {}, "README", None, 0)
    assert doctest.DocTestRunner().run(test).failed == 0 < len(test.examples)
    flags = [*tiny, f"--out={tmp_path}", "--quick"]             # and runs them, in a script
    script = doctest.script_from_examples(text) + f"settings = parse({flags} + ['--methods', "
    (tmp_path / "mine.py").write_text(script + "settings.methods])\nrun(settings)", "utf-8")
    runpy.run_path(str(tmp_path / "mine.py"))
    assert [run["method"] for run in results_in(tmp_path)["runs"]] == [
        "sft", "tb:sampler=independent", "kl"]

@pytest.mark.parametrize("page", ["README.md", "data/results.md"])
def test_methods_of_commands_on_the_pages_are_known(page):
    commands = re.findall(r"[`\"](?:gflowgr.py )?(--[^`\"]+)", (ROOT / page).read_text("utf-8"))
    commands = [line for line in commands if re.search(r"--methods \w", line)]
    for command in commands:
        if re.search("fm|kl|…", command):       # of an old commit, of README's loss, not whole
            continue
        settings = gflowgr.parse(command.split())
        for name in gflowgr.check_settings(settings)[0]:
            recipe_of(name, settings)
    assert len(commands) > 1

# --- Bad input: one line on stderr, exit status 2, nothing written --------------------------------
FLAGS = {  # what the line must say: flags, or methods, each of which alone is wrong
    "no folder nowhere": "--data=nowhere", "go together": "--recommend=x --sample --sample=.5",
    "is not available": "--oracle=sdpo --oracle=tb,distill --device=nonsense --sft=lam=3 sft:lam=3 "
                        "cm:gamma=3 sft+cm:rate=1 nonsense+cm nonsense:lam=2 cm+cm tb:sampler=x "
                        "pop:debias=1 tb:beta=1 tb:teacher=cm:gamma=3",
    "unrecognized": "--layer=2", "not numbers": "--seeds=99999999999999999999",
    "nonsense": "--preset=nonsense --seeds=nonsense --ids=nonsense --batch=nonsense --nonsense=1 "
                "--sft=nonsense tb:teacher=nonsense tb:nonsense=1",
    "out of range": "--layers=0 --beams=-1 --codes=-1 --temperatures=-1 --temperatures=nan "
                    "tb:trajectories=0 tb:rate=nan tb:dropout=1 tb:lam=-1 tb:w_s=inf "
                    "tb+cm:gamma=0",
    "no method of this run uses it": "--recipe=beta=5 --recipe=epochs=2:gr=0:beta=1",
    "given": "tb:given=x", "lam": "tb:lam=x", "loss": "tb:loss=x", "exact=1": "distill:exact=0",
    "w_a, w_y": "tb:w_a=0:w_y=0:w_s=0", "first=1": "sdpo:gr=0:first=0 tb:gr=1 --recipe=gr=1",
    "trajectories": "sdpo:trajectories=0 grpo:trajectories=1"}

@pytest.mark.parametrize("message", FLAGS)
def test_a_wrong_flag_is_one_line_and_status_2(message, tmp_path):
    flags = [f"--data={folder_of(tmp_path / 'd')}", f"--out={tmp_path / 'out'}"]
    for wrong in FLAGS[message].split():
        refused(message, *flags, wrong if wrong[0] == "-" else f"--methods={wrong}")
    refused("items.csv", *flags, "--oracle", f"--out={tmp_path / 'd/items.csv'}")
    refused("do not fit into 2^1", *flags, "--codes=2", "--levels=1")
    refused("nonsense", *flags, "--methods=pop", "--recipe=nonsense")
    folder_of(tmp_path / "d", "item_id\na\nb\nc\nd\n")
    refused("needs a text column", *flags, "--ids=content")
    refused("no saved model", "--recommend=x", "--model=nowhere")
    refused("sample -1.0 is out of range", "--recommend=x", "--model=nowhere", "--sample=-1")
    assert not (tmp_path / "out").exists()

FILES = [  # the file, its text, what the line must say
    ("items", None, "items.csv"), ("items", "", "no column item_id"), ("items", b"\xe9\n", "UTF-8"),
    ("items", "title\nA\n", "line 1: there is no"), ("items", "item_id,x,x\n", "the same name"),
    ("items", ITEMS + "a,Again\n", "items.csv, line 6: item 'a' stands twice"),
    ("events", None, "interactions.csv"), ("events", "", "no column"), ("events", b"\xff", "UTF-8"),
    ("events", EVENTS[:37] + "u,a,2\n", "no user has three"),
    *[("events", EVENTS.replace(name, "x"), name) for name in ("user_id", "item_id", "position")],
    *[("events", f"{EVENTS}w,{line}\n", "line 8")
      for line in "a a,1,1 x,0 a,one a,nan a,1e999 a,".split()],
    *[("events", f"user_id,item_id,position,rating\nu,a,0,{x}", "line 2") for x in ("x", "inf")],
    ("ids", IDS, "1 items of items.csv have no line"),
    *[("ids", f"{IDS}{line}\n", "line 5") for line in "z,2 a,2 d,1.5 d,-1 d,x".split()]]

@pytest.mark.parametrize("file, text, message", FILES)
def test_a_wrong_file_is_one_line_and_status_2(file, text, message, tmp_path):
    folder, out = folder_of(tmp_path / "d", **{"ids": IDS + "d,4", file: text}), tmp_path / "out"
    refused(message, f"--data={folder}", f"--out={out}", f"--ids={folder / 'ids'}")
    assert not out.exists()

# --- Speed: the least seconds of two ways to do a thing -------------------------------------------
def random_policy(n, window=20, K=256):
    number = np.random.default_rng(0).choice(K ** 3, n, replace=False)
    return Policy(SemanticIDs(np.stack(np.unravel_index(number, (K, K, K)), 1), K), window)

def decoding(n, users, drawn=False):          # recommend; generate, held to the legal tokens
    policy, allowed = random_policy(n).eval(), {}
    histories = [list(range(user, user + 20)) for user in range(users)]
    for row in (policy.semantic_ids.codes + 256 * torch.arange(3)).tolist():
        for level, token in enumerate(row):
            allowed.setdefault(tuple(row[:level]), {})[token] = None
    tokens = policy.tokens(histories)[0]
    generate = partial(
        policy.lm.generate, tokens, attention_mask=tokens * 0 + 1, num_beams=20, max_new_tokens=3,
        num_return_sequences=20, renormalize_logits=True, pad_token_id=policy.user_token,
        prefix_allowed_tokens_fn=lambda _, row: list(allowed[tuple(row[21:].tolist())]))
    other = partial(policy.recommend, histories, sample=1.0) if drawn else generate
    return partial(policy.recommend, histories), other

def packing(J, n, length, rows):              # a step on rows of J branches; on J times the rows
    policy, items = random_policy(n, length), torch.randint(n, (rows, J))
    histories = [list(range(row, row + length)) for row in range(rows)]
    inputs = *policy.tokens(histories), policy.semantic_ids.unseen(histories)
    def step(*inputs):
        policy(*inputs).log_steps.sum().backward()
    one_a_row = [x.repeat_interleave(J, 0) for x in inputs]
    return partial(step, *inputs, items), partial(step, *one_a_row, items.view(-1, 1))

def steps(method, n, size):                   # four steps of SFT; of a method with the CM's scores
    policy, rng = random_policy(n, K=512), np.random.default_rng(0)
    train = [rng.choice(n, 3 + rng.geometric(0.25), False).tolist() for _ in range(2 * n)]
    data = SimpleNamespace(train=train, liked=[[True] * len(history) for history in train])
    job = reward.Reward(policy.semantic_ids, CollaborativeModel.fit(train, n), (0.3, 0.65, 0.05))
    rows = [*gflowgr.training_rows(train, policy.window)]
    four = [*itertools.islice(gflowgr.batches(rows, data, size, policy, rng), 4)]
    def run(method):
        for batch in four:
            gflowgr.loss_of(RECIPES[method], policy, policy, batch, job, 0.5).backward()
    return partial(run, "sft"), partial(run, method)

def speed(tiny):                              # seconds of both, their ratio, what is asked
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
        case ["--list"]:
            for name, exercise in EXERCISES.items():
                more = "" if exercise.loops else ", extends the project"
                print(f"{name:28}{exercise.minutes:3} minutes{more}")
        case ["--stub", name] if name in EXERCISES:
            print(stub(EXERCISES[name].ours))
        case ["--grade", file, *names] if {*names} <= {*EXERCISES}:
            return (grade_class if Path(file).is_dir() else grade)(file, *names)
        case ["--speed"] | ["--speed", "--tiny"]:
            speed(tiny="--tiny" in argv)
        case _:
            sys.exit(f"{__doc__}\nExercises: {' '.join(EXERCISES)}")
    return 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))