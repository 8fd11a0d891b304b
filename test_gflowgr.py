"""Tests: each checks the code against an independent reference (enumeration, plain loops), none against a stored number.

    python -m pytest -q test_gflowgr.py
    python test_gflowgr.py --list                       # exercises that the tests grade
"""
import argparse
import ast
import contextlib
import copy
import doctest
import inspect
import io
import itertools
import json
import math
import os
import runpy
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from transformers import GPT2LMHeadModel

import gflowgr
import reward
import tokenizer
from data import (batches, benchmark, diagnosis, example, exercises, grading, make_toy, metrics, ml_100k, oracle,    # noqa: F401
                  report)                                      # exercises fills grading.EXERCISES
from data.inputs import InputError, check_size, find_item, parse_arguments, read_folder
from gflowgr import Policy, Settings
from reward import CollaborativeModel, Reward
from tokenizer import SemanticIDs

torch.set_num_threads(1)                                       # tiny models: a second thread only gets in the way
ROOT = Path(__file__).parent
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR")     # what torch.sparse.mm works in, and says once
HISTORIES = [[], [3], [5, 0, 7], list(range(20, 40)), [1, 2, 3, 4, 5, 6, 7, 8]]


@pytest.fixture(scope="module")
def small():
    """A random policy over 60 items with K = 5, its IDs and features; weights large enough to tell paths apart."""
    torch.manual_seed(0)
    ids = SemanticIDs.fit(np.random.default_rng(0).normal(size=(60, 6)), num_codes=5, seed=0)
    policy = Policy(ids, window=10, width=32, layers=2, dropout=0.1).eval()
    with torch.no_grad():
        policy.lm.transformer.wte.weight.mul_(20)
    return policy


def run_cli(*args):
    """The command line in this process → (exit status, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = gflowgr.main(*parse_arguments([str(a) for a in args], Settings, gflowgr.PRESETS, gflowgr.QUICK))
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


# --- semantic IDs ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, features, K", [
    ("random", np.random.default_rng(1).normal(size=(50, 4)), 4),
    ("all equal and full", np.ones((27, 3)), 3),
    ("two kinds, full", np.repeat([[0.0], [1.0]], 32, 0), 4),
    ("more than k-means reads", np.random.default_rng(1).normal(size=(1300, 4)), 11),
    ("one item", np.zeros((1, 2)), 2),
    ("no features", np.zeros((8, 0)), 2)])
def test_ids_are_unique_and_decodable(name, features, K):
    ids = SemanticIDs.fit(features, K, seed=3)
    assert len({tuple(row) for row in ids.codes.tolist()}) == len(features)
    assert ids.codes.shape == (len(features), 3) and ids.codes.dtype == torch.int64
    every = torch.tensor(list(itertools.product(range(K), repeat=3)))
    table = {tuple(row): i for i, row in enumerate(ids.codes.tolist())}
    assert ids.lookup(every).tolist() == [table.get(tuple(row), -1) for row in every.tolist()]


def test_ids_refuse_what_cannot_be_unique():
    with pytest.raises(ValueError, match="9 items"):
        SemanticIDs.fit(np.zeros((9, 2)), 2)
    with pytest.raises(ValueError, match="same semantic ID"):
        SemanticIDs([[0, 1, 1], [0, 1, 1]], 2)
    with pytest.raises(ValueError, match="finite"):
        SemanticIDs.fit(np.array([[0.0], [np.nan]]), 2)
    with pytest.raises(ValueError):
        SemanticIDs([[0, 1, 2]], 2)
    for num_codes in (10 ** 9, 10 ** 30, 3.0, "3", None, math.inf, -3):    # nor is a table for 10^9 codes begun
        with pytest.raises(ValueError, match="whole number"):
            SemanticIDs([[0, 1, 2]], num_codes)
    with pytest.raises(ValueError, match="too large"):
        SemanticIDs([[i, i, 0] for i in range(4096)], 65536)
    with pytest.raises(InputError, match="lower --codes"):
        check_size(Settings(codes=65536), argparse.Namespace(item_ids=[""] * 4096))


def test_ids_same_seed_same_ids_and_similar_items_share_codes():
    rng = np.random.default_rng(0)
    cluster = rng.integers(0, 5, 80)
    features = rng.normal(size=(5, 8))[cluster] * 10 + rng.normal(size=(80, 8))
    ids = SemanticIDs.fit(features, 6, seed=1)
    assert ids.codes.equal(SemanticIDs.fit(features, 6, seed=1).codes)
    same = cluster[:, None] == cluster[None]
    shared = (ids.codes[:, None, 0] == ids.codes[None, :, 0]).numpy()
    assert shared[same].mean() > 0.6 and shared[~same].mean() < 0.05


def test_legal_codes_against_the_list_of_ids():
    ids = SemanticIDs.fit(np.random.default_rng(2).normal(size=(30, 3)), 4, seed=0)
    rows = [tuple(row) for row in ids.codes.tolist()]
    for length in range(3):
        for prefix in itertools.product(range(4), repeat=length):
            expected = [any(row[:length + 1] == prefix + (c,) for row in rows) for c in range(4)]
            assert ids.legal(prefix).tolist() == expected, prefix
    assert not ids.legal([[4, 0], [-1, 0]]).any()              # no codes at all: a dead end, not an IndexError


def test_the_table_of_legal_codes_grows_with_the_prefixes():
    """Of 10^9 possible IDs five are in use: 11 prefixes at most, and a row of K for each."""
    for n in (5, 50):
        ids = SemanticIDs(np.random.default_rng(n).integers(0, 1000, (n, 3)), num_codes=1000)
        assert ids.num_prefixes <= 1 + 2 * n and ids.children.shape == (ids.num_prefixes + 1, 1000)
        size = sum(x.numel() for x in vars(ids).values() if torch.is_tensor(x))
        assert size <= (2 + 2 * n) * 1000 + 7 * n


def test_capacity_keeps_the_nearest():
    cost = np.array([[0.0, 5.0], [1.0, 2.0], [0.5, 9.0], [3.0, 0.0]])
    code = tokenizer.assign_with_capacity(cost, np.zeros(4, np.int64), 2)
    assert code.tolist() == [0, 1, 0, 1]                       # item 1 is the farthest of three that want code 0


def test_flows_are_sums_over_subtrees():
    ids = SemanticIDs.fit(np.random.default_rng(2).normal(size=(30, 3)), 4, seed=0)
    values = torch.rand(2, 30)
    flow = ids.flows(values)
    for length in range(3):
        for prefix in itertools.product(range(4), repeat=length):
            below = [i for i, row in enumerate(ids.codes.tolist()) if tuple(row[:length]) == prefix]
            if below:
                torch.testing.assert_close(flow[:, ids.node(prefix)], values[:, below].sum(1))


def test_cooccurrence_against_loops():
    histories, n = [[0, 1, 2, 0], [2, 1], [3]], 4
    expected = np.zeros((n, n))
    for h in histories:
        for i, j in itertools.combinations(range(len(h)), 2):
            if j - i <= 2:
                expected[h[i], h[j]] += 0.5 ** (j - i - 1)
                expected[h[j], h[i]] += 0.3 * 0.5 ** (j - i - 1)
    a, b, w = tokenizer.cooccurrence(histories, n, window=2, decay=0.5, backward=0.3)
    assert len(set(zip(a, b))) == len(a)                       # a pair that comes both ways is one entry, not two
    found = np.zeros((n, n))
    found[a, b] = w
    np.testing.assert_allclose(found, expected)


# --- collaborative model and reward ----------------------------------------------------------------------------------
def cm_by_loops(train, n, history, window=5, nearness=0.8, backward=0.25, power=0.5, length=10, decay=0.6, share=0.05):
    T, count = np.zeros((n, n)), np.zeros(n)
    for h in train:
        for i, a in enumerate(h):
            count[a] += 1
            for j in range(i + 1, min(len(h), i + window + 1)):
                T[a, h[j]] += nearness ** (j - i - 1)
                T[h[j], a] += backward * nearness ** (j - i - 1)
    scores = sum((decay ** age * T[j] / max(count[j], 1) ** power for age, j in enumerate(history[::-1][:length])), np.zeros(n))
    popular = (count + 1) / (count + 1).sum()
    scores[history], popular[history] = 0, 0
    popular = popular / popular.sum()
    scores = scores / scores.sum() if scores.sum() else popular
    return (1 - share) * scores + share * popular


def test_cm_scores_against_loops():
    rng = np.random.default_rng(0)
    train = [rng.permutation(25)[:rng.integers(1, 12)].tolist() for _ in range(40)]
    cm = CollaborativeModel.fit(train, 30)                     # items 25 … 29 were never seen
    histories = [[], [27], [3, 4], train[0], rng.permutation(25).tolist()]
    found = cm.scores(histories)
    for row, history in zip(found, histories):
        np.testing.assert_allclose(row.numpy(), cm_by_loops(train, 30, history), atol=1e-6)
    assert (found >= 0).all() and torch.allclose(found.sum(1), torch.ones(5))


def test_cm_without_the_own_history_is_a_cm_that_never_saw_it():
    rng = np.random.default_rng(0)
    train = [rng.permutation(25)[:rng.integers(4, 12)].tolist() for _ in range(40)]
    cm = CollaborativeModel.fit(train, 30, popularity=1e-9, power=0)   # power 0: counts do not differ between the two
    other = CollaborativeModel.fit(train[1:], 30, popularity=1e-9, power=0)
    for cut in range(1, len(train[0])):
        history, after = train[0][:cut], train[0][cut:]
        torch.testing.assert_close(cm.scores([history], [after]), other.scores([history]), atol=1e-5, rtol=1e-4)
    # Two items that one user alone had: all that is left of T is rounding, and the answer must be popularity
    cm = CollaborativeModel.fit([[0, 1, 2, 3, 4, 5], [6, 7, 8]], 9)
    popular = cm.popularity.clone()
    popular[:2] = 0
    torch.testing.assert_close(cm.scores([[0, 1]], [[2, 3, 4, 5]])[0], popular / popular.sum())


def test_reward_signals_against_loops():
    ids = SemanticIDs.fit(np.random.default_rng(2).normal(size=(30, 3)), 4, seed=0)
    cm = CollaborativeModel.fit([[0, 1, 2], [2, 3, 4, 5]], 30)
    r = Reward(ids, cm, weights=(0.5, 0.3, 0.2), epsilon=0.01)
    positives, liked, histories = torch.tensor([4, 7, -1]), torch.tensor([True, False, True]), [[0], [1, 2], []]
    total = r(histories, positives, liked)
    for b in range(3):
        shared = np.array([sum(x == y for x, y in zip(ids.codes[v].tolist(), ids.codes[positives[b]].tolist()))
                           if positives[b] >= 0 else 1 for v in range(30)])
        for v in range(30):
            action = (1.0 if liked[b] else 0.1) if v == positives[b] else 0.0
            expected = 0.5 * action + 0.3 * cm.scores([histories[b]])[0, v].item() + 0.2 * shared[v] / shared.sum() + 0.01 / 30
            assert total[b, v].item() == pytest.approx(expected, rel=1e-5)
    assert (total > 0).all()
    with pytest.raises(ValueError):
        Reward(ids, cm, weights=(-1, 1, 1))


# --- losses ----------------------------------------------------------------------------------------------------------
def test_debias_divides_by_popularity():
    train = [[0, 1], [0, 1], [0, 2], [3, 0, 1]]
    cm = CollaborativeModel.fit(train, 5)
    ids = SemanticIDs([[0, 0, i] for i in range(5)], 5)
    plain, fair = Reward(ids, cm).collaborative([[0]])[0], Reward(ids, cm, debias=1.5).collaborative([[0]])[0]
    expected = np.array([p / (1 + sum(i in h for h in train)) ** 1.5 for i, p in enumerate(plain.tolist())])
    assert fair.tolist() == pytest.approx((expected / expected.sum()).tolist())
    assert fair[2] / fair[1] > plain[2] / plain[1]             # seen once, against three times


def exact_flow_world():
    """log F*, log P_F and log R of every item's path for two users, by enumeration."""
    ids = SemanticIDs.fit(np.random.default_rng(2).normal(size=(30, 3)), 4, seed=0)
    R = torch.rand(2, 30, dtype=torch.float64) + 0.01
    log_flow = torch.stack([torch.stack([R[u, [i for i, row in enumerate(ids.codes.tolist())
                                               if row[:l] == ids.codes[v, :l].tolist()]].sum().log()
                                         for v in range(30) for l in range(4)]).reshape(30, 4) for u in range(2)])
    return ids, R, log_flow, log_flow[..., 1:] - log_flow[..., :-1]


def test_losses_vanish_at_the_exact_flows():
    ids, R, log_flow, log_pf = exact_flow_world()
    zero = pytest.approx(0, abs=1e-10)
    assert gflowgr.trajectory_balance(log_flow[:, 0, 0], log_pf.sum(-1), R.log()).item() == zero
    assert gflowgr.detailed_balance(log_flow, log_pf).item() == zero
    assert gflowgr.vargrad(log_pf.sum(-1), R.log()).item() == zero


def test_training_with_trajectory_balance_alone_reaches_the_oracle(tmp_path):
    """From random weights to P = R/Z, and to a log Z that differs from user to user."""
    settings = tiny_settings(tmp_path)
    data = gflowgr.load_data(settings.data)
    _, ids, reward = gflowgr.prepare(0, data, settings)
    torch.manual_seed(0)
    policy, positives = Policy(ids, window=20, width=64, layers=1, dropout=0.0), torch.tensor([h[-2] for h in data.histories[:3]])
    r, log_z, target = oracle.exact(reward, data.train[:3], positives)
    torch.testing.assert_close(log_z, torch.tensor([math.log(sum(row)) for row in r.tolist()]))
    curve = oracle.train_to_the_oracle(policy, gflowgr.trajectory_balance, reward, data.train[:3], positives, steps=500, samples=32)
    assert curve[0][1] > 0.5 and curve[0][2] > 1               # far off at first
    assert curve[-1][1] <= 0.02 and curve[-1][2] <= 0.01
    found, head = oracle.distribution(policy, data.train[:3])
    assert (found - target).abs().sum(1).max() <= 0.04
    assert found.sum(1).tolist() == pytest.approx([1, 1, 1], abs=1e-4)
    flows, exact_flows = ids.flows(found), ids.flows(target)   # and so every prefix gets its exact flow
    assert (flows - exact_flows).abs().max() < 0.02
    oracle.plot_flows(tmp_path / "flow.png", ids, target[0], found[0], data.titles, curve)
    assert (tmp_path / "flow.png").read_bytes()[:4] == b"\x89PNG"


def test_losses_against_loops():
    rng = np.random.default_rng(0)
    log_z, log_pf, log_r, log_flow = rng.normal(size=2), rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 5)), rng.normal(size=(2, 5, 4))
    path, t = log_pf.sum(-1), torch.tensor
    tb = np.mean([(log_z[b] + path[b, j] - log_r[b, j]) ** 2 for b in range(2) for j in range(5)])
    assert gflowgr.trajectory_balance(t(log_z), t(path), t(log_r)).item() == pytest.approx(tb)
    db = np.mean([sum((log_flow[b, j, l] + log_pf[b, j, l] - log_flow[b, j, l + 1]) ** 2 for l in range(3)) for b in range(2) for j in range(5)])
    assert gflowgr.detailed_balance(t(log_flow), t(log_pf)).item() == pytest.approx(db)
    vg = np.mean([(log_r[b, j] - path[b, j] - np.mean(log_r[b] - path[b])) ** 2 for b in range(2) for j in range(5)])
    assert gflowgr.vargrad(t(path), t(log_r)).item() == pytest.approx(vg)


def test_flow_matching_is_the_divergence_from_the_flows():
    flow, log_pf = torch.rand(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64).log_softmax(-1)
    flow[0, 0, 1] = 0                                          # an illegal code carries no flow, and costs nothing
    expected = 0
    for j in range(2):
        for l in range(3):
            share = (flow[j, l] / flow[j, l].sum()).tolist()
            expected += sum(p * (math.log(p) - log_pf[j, l, c].item()) for c, p in enumerate(share) if p) / 2
    assert gflowgr.flow_matching(flow, log_pf).item() == pytest.approx(expected)
    assert gflowgr.flow_matching(flow, (flow / flow.sum(-1, keepdim=True)).clamp(min=1e-30).log()).item() == pytest.approx(0, abs=1e-12)


def test_sdpo_against_loops_and_dpo():
    rng = np.random.default_rng(0)
    pos, neg, ref_pos, ref_neg = rng.normal(size=3), rng.normal(size=(3, 4)), rng.normal(size=3), rng.normal(size=(3, 4))
    expected = 0
    for b in range(3):
        gap = sum(math.exp(0.3 * ((neg[b, d] - ref_neg[b, d]) - (pos[b] - ref_pos[b]))) for d in range(4))
        expected += math.log(1 + gap) / 3                      # −log σ(−log gap) = log(1 + gap)
    t = torch.tensor
    assert gflowgr.sdpo(t(pos), t(neg), t(ref_pos), t(ref_neg), 0.3).item() == pytest.approx(expected)
    dpo = np.mean([math.log(1 + math.exp(-0.3 * ((pos[b] - ref_pos[b]) - (neg[b, 0] - ref_neg[b, 0])))) for b in range(3)])
    assert gflowgr.sdpo(t(pos), t(neg[:, :1]), t(ref_pos), t(ref_neg[:, :1]), 0.3).item() == pytest.approx(dpo)


def test_metrics_against_loops():
    ranked, target = torch.tensor([[4, 2, 7], [1, -1, -1], [5, 6, 0], [3, 2, 1]]), torch.tensor([7, 1, 9, 2])
    for k in (1, 2, 3):
        recall = ndcg = 0
        for row, t in zip(ranked.tolist(), target.tolist()):
            if t in row[:k]:
                recall += 1 / 4
                ndcg += 1 / math.log2(row.index(t) + 2) / 4
        assert gflowgr.recall_at(ranked, target, k).item() == pytest.approx(recall)
        assert gflowgr.ndcg_at(ranked, target, k).item() == pytest.approx(ndcg)


def test_the_interval_is_that_of_a_mean_over_users():
    rng = np.random.default_rng(0)
    rows = [{"method": m, "by_user": {}, "ranks": rng.integers(0, 11, 800).tolist()} for m in ("sft", "tb") for _ in range(2)]
    found = report.paired_gains(rows, ["tb"], "sft", ["ndcg@10"])["tb"]["ndcg@10"]
    by_user = {m: np.mean([[1 / math.log2(r + 1) if r else 0 for r in row["ranks"]] for row in rows if row["method"] == m], 0) for m in ("sft", "tb")}
    gain = by_user["tb"] - by_user["sft"]
    assert found["gain"] == pytest.approx(gain.mean())
    assert [found["low"], found["high"]] == pytest.approx([gain.mean() + z * gain.std() / math.sqrt(800) for z in (-1.96, 1.96)], abs=0.15 * gain.std() / math.sqrt(800))


def test_beyond_accuracy_against_loops():
    codes = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0], [1, 1, 1]])
    counts = torch.tensor([9, 1, 5, 3, 5])                     # the less popular half, two of five: items 1 and 3
    ranked = torch.tensor([[0, 1, 4], [1, 3, -1], [2, -1, -1]])
    found = metrics.beyond_accuracy(ranked, codes, counts)
    pairs = [(0, 1), (0, 4), (1, 4), (1, 3)]                   # within a list, empty places left out
    assert found["diversity@10"] == pytest.approx(np.mean([(codes[a] != codes[b]).float().mean().item() for a, b in pairs]))
    assert found["coverage@10"] == pytest.approx(5 / 5) and found["tail@10"] == pytest.approx(3 / 6)


def test_exposure_bias_by_hand():
    truth = {"liked": [{0, 1, 2, 3}, {4}], "shown": [{0, 1, 5}, {4}]}
    counts = torch.tensor([10, 4, 2, 2, 8, 6])
    found = metrics.exposure_bias(torch.tensor([[1, 2, 5], [4, -1, -1]]), truth, [[0], [5]], counts)
    assert found["hidden@10"] == pytest.approx([1 / 2, 0])     # of 2 and 3 the first user gets 2; the second has none hidden
    assert found["liked@10"] == pytest.approx([2 / 3, 1])      # 1 and 2 of three; 4
    assert found["lift@10"] == pytest.approx([((4 + 2 + 6) / 3) / ((4 + 2 + 2) / 3), 1])


# --- the policy ------------------------------------------------------------------------------------------------------
def path_by_plain_gpt2(policy, history, item):
    """log P_F of each step, one prefix at a time, no packing, no padding, no mask of ours."""
    K, codes, out = policy.semantic_ids.num_codes, policy.semantic_ids.codes[item].tolist(), []
    tokens = [policy.user_token] + [policy.user_token + 1 + i for i in history[-policy.window:]]
    for level, code in enumerate(codes):
        logits = policy.lm(torch.tensor([tokens])).logits[0, -1, level * K:(level + 1) * K]
        legal = policy.semantic_ids.legal(codes[:level])
        out.append(logits[code] - logits[legal].logsumexp(0))
        tokens.append(level * K + code)
    return torch.stack(out)


def test_packed_paths_equal_one_path_at_a_time(small):
    items = torch.randint(60, (len(HISTORIES), 4), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        packed = small.path_log_probs(HISTORIES, items)
        for b, history in enumerate(HISTORIES):
            for j, item in enumerate(items[b].tolist()):
                torch.testing.assert_close(packed[b, j], path_by_plain_gpt2(small, history, item), atol=1e-5, rtol=1e-5)


def test_a_branch_sees_its_history_and_nothing_else(small):
    """Later items of the row and other branches change nothing: no leak from the future."""
    ends, items = torch.tensor([[4, 2, 2]]), torch.tensor([[20, 14, 8]])
    with torch.no_grad():
        log_probs, flow = small(small.tokens([[5, 0, 7, 9]])[0], ends, items)
        other, other_flow = small(small.tokens([[5, 0, 33, 2]])[0], ends, torch.tensor([[20, 50, 8]]))
        alone = small.path_log_probs([[5, 0]], [[8]])
    torch.testing.assert_close(small.steps(log_probs, items)[0, 2], alone[0, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(log_probs[0, 2], other[0, 2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(flow[0, 2], other_flow[0, 2], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(log_probs[0, 0], other[0, 0], atol=1e-3)    # its history did change


def test_probabilities_of_the_catalogue_sum_to_one(small):
    everything = torch.arange(60).expand(len(HISTORIES), 60)
    with torch.no_grad():
        total = small.path_log_probs(HISTORIES, everything).sum(-1).logsumexp(1)
    torch.testing.assert_close(total, torch.zeros(len(HISTORIES)), atol=1e-5, rtol=0)


def test_beam_search_equals_ranking_the_catalogue(small):
    everything = torch.arange(60).expand(len(HISTORIES), 60)
    with torch.no_grad():
        log_p = small.path_log_probs(HISTORIES, everything).sum(-1)
    for row, history in zip(log_p, HISTORIES):
        row[history] = -math.inf
    items, found = small.recommend(HISTORIES, k=10, beams=60)
    expected = log_p.topk(10, 1)
    assert items.tolist() == expected.indices.tolist()
    torch.testing.assert_close(found, expected.values, atol=1e-5, rtol=1e-5)


def test_guided_beams_rank_by_the_product_of_policy_and_guide(small):
    guide = torch.rand(len(HISTORIES), 60, generator=torch.Generator().manual_seed(4)) ** 8
    guide[:, 7] = 0                                            # a guide that rules an item out
    with torch.no_grad():
        value = small.path_log_probs(HISTORIES, torch.arange(60).expand(len(HISTORIES), 60)).sum(-1) + guide.clamp(min=1e-30).log()
    for row, history in zip(value, HISTORIES):
        row[history] = -math.inf
    expected = value.topk(10, 1)
    items, found = small.recommend(HISTORIES, k=10, beams=60, guide=guide)
    assert items.tolist() == expected.indices.tolist()
    torch.testing.assert_close(found, expected.values, atol=1e-4, rtol=1e-5)
    # The exact flows steer the beam as well: with ten beams the guide's own top items are not lost on the way.
    sharp = guide ** 4
    narrow = small.recommend(HISTORIES, k=10, beams=10, guide=sharp)[0][:, 0]
    wide = small.recommend(HISTORIES, k=10, beams=60, guide=sharp)[0][:, 0]
    assert narrow.tolist() == wide.tolist()


def test_samples_follow_the_policy(small):
    torch.manual_seed(0)
    items, log_p = small.sample([[3], [5, 0, 7]], 4000)
    with torch.no_grad():
        exact = small.path_log_probs([[3], [5, 0, 7]], torch.arange(60).expand(2, 60)).sum(-1)
    torch.testing.assert_close(log_p, exact.gather(1, items), atol=1e-4, rtol=1e-4)
    for drawn, p in zip(items, exact.exp()):
        assert (torch.bincount(drawn, minlength=60) / 4000 - p).abs().sum() < 0.15
    assert -log_p[0].mean().item() == pytest.approx(-(exact[0].exp() * exact[0]).sum().item(), abs=0.1)   # the entropy


def test_recommendations_do_not_depend_on_the_batch(small):
    together, log_p = small.recommend(HISTORIES, k=10)
    for row, values, history in zip(together, log_p, HISTORIES):
        alone, alone_p = small.recommend([history], k=10)
        assert alone[0].tolist() == row.tolist()
        torch.testing.assert_close(alone_p[0], values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beams", [1, 5, 60])
def test_recommendations_are_new_distinct_catalogue_items(small, beams):
    histories = HISTORIES + [list(range(57)), list(range(60))]
    items, log_p = small.recommend(histories, k=10, beams=beams)
    for row, values, history in zip(items.tolist(), log_p.tolist(), histories):
        given = [i for i in row if i >= 0]
        assert row == given + [-1] * (10 - len(given))         # empty places come last
        assert len(set(given)) == len(given) and not set(given) & set(history) and all(i < 60 for i in given)
        assert values == sorted(values, reverse=True) and [v == -math.inf for v in values] == [i < 0 for i in row]
    if beams == 60:
        assert [sum(i >= 0 for i in row) for row in items.tolist()] == [10] * 5 + [3, 0]


def test_generate_gives_the_same_answers_as_recommend():
    *seconds, same = benchmark.decoding(Policy, 300, repeats=1, users=8, codes=24, history=6, width=32, layers=1)
    assert same == 8 and len(seconds) == 3 and min(seconds) > 0
    policy, histories = benchmark.random_policy(Policy, 300, 24, 6, 2, width=32, layers=1)
    theirs = benchmark.by_generate(policy, histories, 10, 20, benchmark.allowed_tokens(policy.semantic_ids), scores=True)
    assert not any(set(row) & set(history) for row, history in zip(theirs[0].tolist(), histories))
    torch.testing.assert_close(policy.path_log_probs(histories, theirs[0]).sum(-1), theirs[1], atol=1e-4, rtol=0)


def test_packed_trajectories_are_the_same_as_a_row_for_each():
    packed, rows, error = benchmark.packing(Policy, gflowgr.trajectory_balance, 8, 6, repeats=1, users=3, n=300, codes=24,
                                            width=32, layers=1)
    assert error < 1e-5 and min(packed, rows) > 0


def test_saved_model_is_a_plain_gpt2_and_comes_back(small, tmp_path):
    small.catalogue = {"item_ids": [f"i{i}" for i in range(60)], "titles": [f"Title {i}" for i in range(60)]}
    small.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors", "semantic_ids.json"} <= {p.name for p in tmp_path.iterdir()}
    plain, back = GPT2LMHeadModel.from_pretrained(tmp_path).eval(), Policy.from_pretrained(tmp_path)
    tokens, _ = small.tokens([[5, 0, 7]])
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens).logits, small.lm(tokens).logits)
    assert back.recommend(HISTORIES)[0].equal(small.recommend(HISTORIES)[0])
    assert back.catalogue == small.catalogue and back.window == small.window
    state = torch.get_rng_state()                              # loading draws nothing, and the flow head starts anew
    assert not Policy.from_pretrained(tmp_path).flow_head.bias.any() and torch.get_rng_state().equal(state)


# --- sampler and training --------------------------------------------------------------------------------------------
def test_curriculum_goes_from_easy_to_hard_and_skips_what_was_logged():
    torch.manual_seed(0)
    scores = torch.rand(200, 50).softmax(1)
    logged = [row.topk(3).indices.tolist() for row in scores]
    mean = []
    for progress in (0.0, 0.5, 1.0):
        items = gflowgr.curriculum(scores, logged, 3, progress)
        assert items.shape == (200, 3) and not any(set(row) & set(own) for row, own in zip(items.tolist(), logged))
        mean.append(scores.gather(1, items).mean().item())
    assert mean[0] < mean[1] < mean[2]
    assert gflowgr.curriculum(scores, logged, 0, 0.5).shape == (200, 0)


def test_samplers_draw_from_where_they_say(small):
    torch.manual_seed(0)
    histories, positives = [[3], [5, 0, 7], [9, 1]], torch.tensor([4, 8, 2])
    logged = [[3, 4, 11], [5, 0, 7, 8, 20], [9, 1, 2, 30]]
    scores = torch.rand(3, 60).softmax(1)
    small.train()
    drawn = {name: gflowgr.augmented(name, 6, scores, logged, positives, histories, small, 0.5) for name in gflowgr.SAMPLERS}
    assert small.training
    small.eval()
    for name, items in drawn.items():
        assert items.shape == (3, 6), name
        for row, own, positive in zip(items.tolist(), logged, positives.tolist()):
            if name == "session":
                assert set(row) <= set(own) - {positive}
            elif name in ("random", "curriculum"):
                assert not set(row) & set(own)
    with torch.no_grad():
        log_p = small.path_log_probs(histories, torch.arange(60).expand(3, 60)).sum(-1)
    for row, history, own in zip(log_p, histories, drawn["policy"].tolist()):
        row[history] = -math.inf
        assert row[own].min() >= row.sort().values[-15] and len(set(own)) == 6   # a beam of six finds most of the best
    assert drawn["mixture"][:, 0].equal(drawn["policy"][:, 0])
    assert all(gflowgr.augmented(name, 0, scores, logged, positives, histories, small, 0.5).shape == (3, 0)
               for name in gflowgr.SAMPLERS)


def test_training_walks_through_the_whole_curriculum(tmp_path, monkeypatch):
    """Progress goes from 0 to nearly 1, also where there is no terminal and no progress bar."""
    settings, seen = tiny_settings(tmp_path), []
    data = gflowgr.load_data(settings.data)
    features, ids, reward = gflowgr.prepare(0, data, settings)
    curriculum = gflowgr.curriculum
    monkeypatch.setattr(gflowgr, "curriculum", lambda *args: seen.append(args[-1]) or curriculum(*args))
    gflowgr.train("tb", Policy(ids, 8, 32, 1), reward, data, settings, 2, 0, tmp_path / "model")
    assert seen[0] == 0 and seen[-1] == 1 - 1 / len(seen) and seen == sorted(set(seen))


@pytest.mark.parametrize("window", [1, 4, 7])
def test_training_rows_cover_every_target_once(window):
    histories = [list(range(100, 100 + n)) for n in (1, 2, 4, 5, 6, 30)]
    seen = []
    for user, start, first, stop in batches.training_rows(histories, window):
        assert start <= first < stop <= len(histories[user]) and stop - 1 - start <= window
        seen += [(user, t) for t in range(first, stop)]
        assert start == 0 or first - start >= window // 2      # a late target has half a window before it
    assert sorted(seen) == [(u, t) for u, h in enumerate(histories) for t in range(len(h))]


def test_batches_hold_the_histories(small):
    histories, rng = [[1, 2, 3], [4], [5, 6, 7, 8, 9], list(range(10, 40))], np.random.default_rng(0)
    rows, seen = batches.training_rows(histories, small.window), []
    for batch in batches.batches(rows, histories, 2, small, rng):
        for b, (user, start) in enumerate(zip(batch.users, batch.starts)):
            for end, target, valid in zip(batch.ends[b].tolist(), batch.targets[b].tolist(), batch.valid[b].tolist()):
                if valid:
                    assert histories[user][start + end] == target
                    context = [t - small.user_token - 1 for t in batch.tokens[b, 1:end + 1].tolist()]
                    assert context == histories[user][start:start + end]
                    seen.append((user, start + end))
    assert sorted(seen) == [(u, t) for u, h in enumerate(histories) for t in range(len(h))]


@pytest.mark.parametrize("method", ["tb", "db", "vargrad", "fm", "sdpo"])
def test_the_whole_loss_against_one_path_at_a_time(method, tmp_path, monkeypatch):
    """loss_of packs, gathers and pairs; here every context and every path is computed alone, and only then put together."""
    settings = tiny_settings(tmp_path)
    data = gflowgr.load_data(settings.data)
    data.liked = [[i % 3 > 0 for i in range(len(h))] for h in data.histories]
    _, ids, reward = gflowgr.prepare(0, data, settings)
    torch.manual_seed(0)
    policy, reference = (Policy(ids, settings.window, settings.width, settings.layers, 0.0).eval() for _ in range(2))
    torch.nn.init.normal_(policy.flow_head.weight)
    rows, kept = batches.training_rows(data.train, settings.window), {}
    batch = next(batches.batches(rows, data.train, 5, policy, np.random.default_rng(0)))
    for name in ("pick_contexts", "augmented"):
        def keep(*args, name=name, original=getattr(gflowgr, name)):
            kept[name] = original(*args)
            return kept[name]
        monkeypatch.setattr(gflowgr, name, keep)
    with torch.no_grad():
        found = gflowgr.loss_of(method, policy, reference, batch, reward, data, settings, 0.5).item()
        (_, ends, *_), others = kept["pick_contexts"], kept["augmented"]
        l_gr = [-path_by_plain_gpt2(policy, data.train[u][start:start + end], target).sum()
                for u, start, *row in zip(batch.users, batch.starts, batch.ends.tolist(), batch.targets.tolist(), batch.valid.tolist())
                for end, target, valid in zip(*row) if valid]
        l_gfn = []
        for c, (b, m) in enumerate(np.ndindex(*ends.shape)):
            u, start, end = batch.users[b], batch.starts[b], ends[b, m].item()
            past, read, v = data.train[u][:start + end], data.train[u][start:start + end], data.train[u][start + end]
            r_y = reward.collaborative([past], [data.train[u][start + end:]])
            R = reward([past], torch.tensor([v]), torch.tensor([data.liked[u][start + end]]), r_y)[0]
            paths = [v, *others[c].tolist()]
            log_p = torch.stack([path_by_plain_gpt2(policy, read, item) for item in paths])            # (1 + N, L)
            even = [[sum(row[:l] == ids.codes[item, :l].tolist() for row in ids.codes.tolist()) for l in range(3)] for item in paths]
            hidden = [policy.lm.transformer(torch.tensor([[policy.user_token] + [policy.user_token + 1 + i for i in read]
                      + [l * ids.num_codes + ids.codes[item, l].item() for l in range(2)]])).last_hidden_state[0, len(read):] for item in paths]
            log_f = policy.flow_head(torch.stack(hidden))[..., 0] + (torch.tensor(even) / len(ids.codes)).log()   # (1 + N, L)
            log_r = R[paths].log()
            if method == "tb":
                l_gfn.append(np.mean([(log_f[0, 0] + log_p[j].sum() - log_r[j]).item() ** 2 for j in range(len(paths))]))
            elif method == "db":
                f = torch.cat([log_f, log_r[:, None]], 1)
                l_gfn.append(np.mean([sum((f[j, l] + log_p[j, l] - f[j, l + 1]).item() ** 2 for l in range(3)) for j in range(len(paths))]))
            elif method == "vargrad":
                l_gfn.append(np.var([(log_r[j] - log_p[j].sum()).item() for j in range(len(paths))]))
            elif method == "sdpo":
                up = [(log_p[j].sum() - path_by_plain_gpt2(reference, read, item).sum()).item() for j, item in enumerate(paths)]
                l_gfn.append(math.log(1 + sum(math.exp(settings.beta * (x - up[0])) for x in up[1:])))
            else:                                              # FM: KL from the exact flows, prefix by prefix
                kl, codes = 0.0, ids.codes.tolist()
                for item in paths:
                    for l in range(3):
                        below = {}
                        for i, row in enumerate(codes):
                            if row[:l] == codes[item][:l]:
                                below.setdefault(row[l], []).append(i)
                        total = sum(R[i].item() for items in below.values() for i in items)
                        for items in below.values():
                            share = sum(R[i].item() for i in items) / total
                            kl += share * (math.log(share) - path_by_plain_gpt2(policy, read, items[0])[l].item()) / len(paths)
                l_gfn.append(kl)
    assert found == pytest.approx(torch.stack(l_gr).mean().item() + gflowgr.LAM[method] * np.mean(l_gfn), rel=1e-4)


@pytest.mark.parametrize("method", ["sft", "sdpo", "db", "vargrad", "tb", "fm"])
def test_training_lowers_its_own_loss(method, tmp_path, monkeypatch):
    """On the same rows, contexts and draws before and after; L_GR is left out where there is a second loss."""
    settings = tiny_settings(tmp_path)
    settings.beta = 1.0
    data = gflowgr.load_data(settings.data)
    features, ids, reward = gflowgr.prepare(0, data, settings)
    torch.manual_seed(0)
    policy = Policy(ids, settings.window, settings.width, settings.layers, 0.0)
    start = copy.deepcopy(policy)
    if method != "sft":
        monkeypatch.setattr(gflowgr, "next_token_loss", lambda step, valid: 0 * step.sum())
    rows = batches.training_rows(data.train, settings.window)
    batch = next(batches.batches(rows, data.train, len(rows), policy, np.random.default_rng(0)))

    def loss(policy):
        torch.manual_seed(0)
        with torch.no_grad():
            return gflowgr.loss_of(method, policy.eval(), start, batch, reward, data, settings, 0.5).item()
    curve = gflowgr.train(method, policy, reward, data, settings, 4, 0, tmp_path / "model", start)
    assert loss(policy) < 0.98 * loss(start)
    saved = Policy.from_pretrained(tmp_path / "model")         # and the best epoch is the one that is kept
    assert gflowgr.validate(gflowgr.policy_ranker(saved, settings), data, settings) == max(point["ndcg@10"] for point in curve[1:])


@pytest.mark.parametrize("method", ["sft", "sdpo", "db", "vargrad", "tb", "fm"])
def test_losses_in_bf16_are_those_in_full_precision(method, tmp_path):
    """What a GPU does under autocast; here the CPU's stands in for it. Log-probabilities and losses stay float32."""
    settings = tiny_settings(tmp_path)
    data = gflowgr.load_data(settings.data)
    features, ids, reward = gflowgr.prepare(0, data, settings)
    policy = Policy(ids, settings.window, settings.width, settings.layers, 0.0)
    policy.start_from(features)
    batch = next(batches.batches(batches.training_rows(data.train, 8), data.train, 16, policy, np.random.default_rng(0)))
    found = []
    for bf16 in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            found.append(gflowgr.loss_of(method, policy, policy, batch, reward, data, settings, 0.5))
    assert found[1].dtype == torch.float32 and found[1].item() == pytest.approx(found[0].item(), rel=0.01)


@pytest.mark.parametrize("method, sampler", [("sft", "curriculum"), *itertools.product(["tb"], gflowgr.SAMPLERS),
                                             *itertools.product(["db", "vargrad", "fm", "sdpo"], ["curriculum"])])
def test_a_step_waits_for_nothing_on_the_cpu(method, sampler, tmp_path, monkeypatch):
    """On the meta device, whose tensors hold no numbers, so whatever would be copied back from a GPU raises. The sparse
    product alone does not exist there."""
    settings = tiny_settings(tmp_path)
    settings.sampler = sampler
    data = gflowgr.load_data(settings.data)
    _, ids, reward = gflowgr.prepare(0, data, settings)
    reward.to("meta")
    monkeypatch.setattr(torch.sparse, "mm", lambda a, b: torch.zeros(a.shape[0], b.shape[1], device="meta"))
    policy = Policy(ids, settings.window, settings.width, settings.layers).to("meta")
    batch = next(batches.batches(batches.training_rows(data.train, 8), data.train, 16, policy, np.random.default_rng(0)))
    loss = gflowgr.loss_of(method, policy, policy, batch, reward, data, settings, 0.5)
    loss.backward()
    assert loss.device.type == policy.recommend([[1], []], guide=reward.collaborative([[1], []]))[0].device.type == "meta"


def test_a_loss_that_is_not_finite_stops_with_step_and_users(tmp_path, monkeypatch):
    settings = tiny_settings(tmp_path)
    data = gflowgr.load_data(settings.data)
    features, ids, reward = gflowgr.prepare(0, data, settings)
    monkeypatch.setattr(gflowgr, "next_token_loss", lambda *_: torch.tensor(math.nan))
    with pytest.raises(FloatingPointError, match=r"sft: the loss became nan at step 1 \(users "):
        gflowgr.train("sft", Policy(ids, 8, 32, 1), reward, data, settings, 1, 0, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_validation_and_test_items_never_reach_training(tmp_path):
    """Other last two items: same IDs, same CM, and weight for weight the same policy after an epoch."""
    settings, found = tiny_settings(tmp_path), []
    for shift in (0, 1):
        data = gflowgr.load_data(settings.data)
        data.histories = [h[:-2] + [(i + shift) % 48 for i in h[-2:]] for h in data.histories]
        features, ids, reward = gflowgr.prepare(0, data, settings)
        torch.manual_seed(0)
        policy = Policy(ids, settings.window, settings.width, settings.layers)
        gflowgr.train("tb", policy, reward, data, settings, 1, 0, tmp_path / f"model{shift}")
        found.append([torch.tensor(features), ids.codes, reward.cm.transitions.to_dense(), *policy.state_dict().values()])
    assert all(one.equal(other) for one, other in zip(*found))


# --- data ------------------------------------------------------------------------------------------------------------
ITEMS = "item_id,title\na,Alpha\nb,Beta\nc,Gamma\nd,Delta\n"
EVENTS = "user_id,item_id,position\nu,a,0\nu,b,1\nu,c,2\nv,b,0\nv,c,1\nv,d,2\n"


def folder_of(path, items=ITEMS, events=EVENTS):
    path.mkdir(exist_ok=True)
    for name, text in (("items.csv", items), ("interactions.csv", events)):
        if text is not None:
            (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


BAD = {  # name: (items.csv, interactions.csv, what the message must name)
    "no items file": (None, EVENTS, r"items\.csv does not exist"),
    "no interactions file": (ITEMS, None, r"interactions\.csv does not exist"),
    "empty file": (ITEMS, "", r"interactions\.csv is empty"),
    "header only": (ITEMS, "user_id,item_id,position\n", "no interactions"),
    "no items": ("item_id,title\n", EVENTS, "no items"),
    "missing column": (ITEMS, "user,item_id,position\nu,a,0\n", "no column 'user_id'"),
    "no order": (ITEMS, "user_id,item_id\nu,a\n", "'position' or 'timestamp'"),
    "column twice": (ITEMS, "user_id,item_id,item_id,position\nu,a,a,0\n", "twice"),
    "too few fields": (ITEMS, EVENTS + "w,a\n", "line 8: 2 fields"),
    "too many fields": (ITEMS, EVENTS + "w,a,1,1\n", "line 8: 4 fields"),
    "item twice": (ITEMS + "a,Again\n", EVENTS, "line 6: item 'a' stands twice"),
    "unknown item": (ITEMS, EVENTS + "w,x,0\n", "line 8: item 'x' is not in items.csv"),
    "empty item id": (ITEMS + ",Nameless\n", EVENTS, "line 6: item_id is empty"),
    "empty user id": (ITEMS, EVENTS + ",a,0\n", "line 8: user_id is empty"),
    "position is text": (ITEMS, EVENTS + "w,a,first\n", "line 8: position 'first' is not a finite number"),
    "position is nan": (ITEMS, EVENTS + "w,a,nan\n", "line 8: position 'nan'"),
    "position is infinite": (ITEMS, EVENTS + "w,a,1e999\n", "line 8: position '1e999'"),
    "rating is text": (ITEMS, "user_id,item_id,position,rating\nu,a,0,good\n", "line 2: rating 'good'"),
    "not utf-8": (ITEMS, EVENTS.encode() + b"\xff\xfe,a,0\n", "line 8: not UTF-8"),
    "latin-1": (ITEMS.encode() + "e,Été\n".encode("latin-1"), EVENTS, r"items\.csv, line 6: not UTF-8"),
    "half a surrogate pair": (ITEMS, EVENTS.encode() + b"w\xed\xa0\x80,a,0\n", "line 8: not UTF-8"),
    "utf-16": (ITEMS, EVENTS.encode("utf-16"), "line 1: not UTF-8"),
    "utf-16 without a mark": (ITEMS, EVENTS.encode("utf-16-le"), "line 1: (not UTF-8|.*NUL)"),   # NUL: Python 3.10's word
    "null character": (ITEMS, EVENTS + "w\0,a,0\n", "line 8: (not UTF-8|.*NUL)"),
    "gzip": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00", EVENTS, "line 1: not UTF-8.*unpack"),
    "zip": (b"PK\x03\x04\x14\x00\x00\x00", EVENTS, "line 1: (not UTF-8|.*NUL)"),
    "web page": ("<html><body>Not found</body></html>\n", EVENTS, "no column 'item_id' in the first line.*'<html>"),
    "semicolons": (ITEMS, EVENTS.replace(",", ";"), "no column 'user_id'.*commas"),
    "no header": (ITEMS, EVENTS.split("\n", 1)[1], "which reads 'u,a,0'"),
    "item twice but for spaces": (ITEMS + " a ,Again\n", EVENTS, "line 6: item 'a' stands twice"),
    "long item twice": (ITEMS + 2 * ("y" * 10 ** 5 + ",Y\n"), EVENTS, "line 7: item 'yyy"),
    "item in another form of Unicode": (ITEMS + "\u00e9,E\n", EVENTS + "w,e\u0301,0\n", "line 8: item"),
    "field too long": (ITEMS + "e," + "x" * 140000 + "\n", EVENTS, "line 6: field larger"),
    "position is empty": (ITEMS, EVENTS + "w,a,\n", "line 8: position ''"),
    "position is a date": (ITEMS, EVENTS + "w,a,2024-02-30\n", "line 8: position '2024-02-30'.*seconds"),
    "position in sixteens": (ITEMS, EVENTS + "w,a,0x10\n", "line 8: position '0x10'"),
    "position with underscores": (ITEMS, EVENTS + "w,a,1_0.5\n", "line 8: position '1_0.5'"),
    "position of 5000 digits": (ITEMS, EVENTS + f"w,a,{'1' * 5000}\n", "line 8: position '1111"),
    "rating of 400 digits": (ITEMS, f"user_id,item_id,position,rating\nu,a,0,{'9' * 400}\n", "line 2: rating '9999"),
    "ratings all negative": (ITEMS, "user_id,item_id,position,rating\nu,a,0,-1\nu,b,1,-2\n", "ratings are negative"),
    "line ends in a bad row": (ITEMS, EVENTS + '"w\n\nw",x,0\n', "line 8: item 'x'"),
    "line ends before a bad row": (ITEMS, EVENTS + '"w\n\nw",a,0\nw,x,0\n', "line 11: item 'x'"),
    "quote left open": (ITEMS, EVENTS + 'w,"a,0\n' + 9 * "w,b,1\n", "line 8: unexpected end"),
    "quotes inside quotes": ('item_id,title\na,"Say "Hi" twice"\n', EVENTS, r"items\.csv, line 2.*double"),
    "a space before the quote": ('item_id,title\na, "Hi, you"\n', EVENTS, "line 2: 3 fields"),
    "one item": ("item_id\na\n", "user_id,item_id,position\nu,a,0\nv,a,1\n", "no user has three"),
    "three of nobody": (ITEMS, "user_id,item_id,position\nu,a,0\nu,b,1\nv,a,0\n", "no user has three"),
    "repeats only": (ITEMS, "user_id,item_id,position\nu,a,0\nu,a,1\nu,a,2\n", "no user has three"),
    "open quote": (ITEMS, EVENTS + 'w,"a,0\n', "line 8"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_refused_with_file_line_and_cure(name, tmp_path):
    items, events, message = BAD[name]
    with pytest.raises(InputError, match=message) as refused:
        read_folder(folder_of(tmp_path / "d", items, events))
    assert len(str(refused.value).splitlines()) == 1 and len(str(refused.value)) < 500


@pytest.mark.parametrize("obstacle", ["a folder in its place", "no rights", "a link to itself"])
def test_what_cannot_be_opened_is_refused(obstacle, tmp_path, monkeypatch):
    path = folder_of(tmp_path / "d") / "items.csv"
    def refuse(*args, **kw):
        raise PermissionError(13, "Permission denied")
    if obstacle == "no rights":                                # tests may run as root, to whom chmod means nothing
        monkeypatch.setattr("data.inputs.open", refuse, raising=False)
    else:
        path.unlink()
        path.mkdir() if obstacle == "a folder in its place" else path.symlink_to(path)
    with pytest.raises(InputError, match=r"cannot read .*items\.csv: "):
        read_folder(tmp_path / "d")
    with pytest.raises(InputError, match="is not a folder"):
        read_folder(tmp_path / "d/interactions.csv")


def times(*values):
    """Interactions of one user with items a, b, c … at these times."""
    return "user_id,item_id,timestamp\n" + "".join(f"u,{item},{time}\n" for item, time in zip("abcd", values))


TWO, HUGE = [[0, 1, 2], [1, 2, 3]], "y" * 10 ** 5                # the histories of EVENTS; an id of 100,000 characters
HARMLESS = {  # name: (items.csv, interactions.csv, the histories they mean)
    "Windows line ends": (ITEMS.replace("\n", "\r\n"), EVENTS.replace("\n", "\r\n"), TWO),
    "old Mac line ends": (ITEMS.replace("\n", "\r"), EVENTS.replace("\n", "\r"), TWO),
    "no line end at the end": (ITEMS[:-1], EVENTS[:-1], TWO),
    "byte order marks": ("\ufeff" + ITEMS, "\ufeff" + EVENTS, TWO),
    "spaces and capitals in headers": (ITEMS.replace("item_id", " ITEM_ID "), EVENTS.replace("item_id,", "Item_id ,\t"),
                                       TWO),
    "quotes around everything": (ITEMS, '"' + EVENTS.strip().replace(",", '","').replace("\n", '"\n"') + '"\n', TWO),
    "columns without a name": (ITEMS, EVENTS.replace("\n", ",,\n"), TWO),
    "blank lines and rows of commas": (ITEMS + "\n , \n", EVENTS.replace("v,b", "\n,,\nv,b"), TWO),
    "spaces around ids": (ITEMS, EVENTS.replace("u,", " u ,\u00a0"), TWO),
    "line ends, quotes and commas in ids": ('item_id\n"a\nb"\n"a,b"\n"""a"""\n',
                                            times() + 'u,"a,b",1\nu,"""a""",2\nu,"a\nb",3\n', [[1, 2, 0]]),
    "ids that are nearly the same": ("item_id\n1\n01\n1.0\nA\na\n", times() + "u,1.0,1\nu,01,2\nu,1,3\nu,a,4\nu,A,5\n",
                                     [[2, 1, 0, 4, 3]]),
    "huge ids and other scripts": (f"item_id\n{HUGE}\n🎬\nفيلم\n", times() + f"用户,🎬,1\n用户,فيلم,2\n用户,{HUGE},3\n",
                                   [[1, 2, 0]]),
    "all titles alike": ("item_id,title\na,Same\nb,Same\nc,Same\n", times(1, 2, 3), [[0, 1, 2]]),
    "no text at all": ("item_id\na\nb\nc\n", times(1, 2, 3), [[0, 1, 2]]),
    "a position and a timestamp": (ITEMS, "user_id,item_id,timestamp,position\nu,a,1,3\nu,b,2,2\nu,c,3,1\n", [[2, 1, 0]]),
    "negative and floating times": (ITEMS, times(1.5, -2, "-1e3", "+.25"), [[2, 1, 3, 0]]),
    "times beyond 2^53": (ITEMS, times(2 ** 53 + 1, 2 ** 53, 2 ** 53 + 3, 2 ** 53 + 2), [[1, 0, 3, 2]]),
    "floating times beyond 2^53": (ITEMS, times(f"{2 ** 53 + 1}.0", f"{2 ** 53}.0", 2 ** 53 + 3, f"{2 ** 53 + 2}.5"),
                                   [[1, 0, 3, 2]]),
    "nanoseconds": (ITEMS, times("1700000000.123456789", "1700000000.123456788", "1700000000.12345679"), [[1, 0, 2]]),
    "other digits": (ITEMS, times("٣", "٢", "١"), [[2, 1, 0]]),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_oddities_are_read_as_meant(name, tmp_path):
    items, events, histories = HARMLESS[name]
    assert read_folder(folder_of(tmp_path / "d", items, events)).histories == histories


def test_all_times_equal_or_zero_of_either_sign_are_one_order(tmp_path):
    found = [read_folder(folder_of(tmp_path / str(i), events=times(*values))).histories
             for i, values in enumerate([(0, 0, 0, 0), ("-0", "0.0", "-0.0", "0e9"), (5, "5.0", "+5", "0.5e1")])]
    assert found[0] == found[1] == found[2] and sorted(found[0][0]) == [0, 1, 2, 3]


def test_titles_lose_what_a_terminal_would_obey(tmp_path):
    items = 'item_id,title\na,"\x1b[31mRed\r\n\u2028\x85 Tide\x07"\nb,می\u200cروم\nc,\u3000\n'
    data = read_folder(folder_of(tmp_path / "d", items, times(1, 2, 3)))
    assert data.titles == ["[31mRed Tide", "می\u200cروم", "c"]


def test_a_history_of_100000_items(tmp_path):
    n = 10 ** 5
    items, events = "".join(f"{i}\n" for i in range(n)), "".join(f"u,{i},{n - i}\n" for i in range(n))
    data = read_folder(folder_of(tmp_path / "d", "item_id\n" + items, times() + events))
    assert data.histories == [list(range(n))[::-1]] and len(data.train[0]) == n - 2


def test_folder_is_read_as_written(tmp_path):
    events = ("\ufeffuser_id , item_id,timestamp,rating\r\n\r\nv,d,3.5,5\r\nu,c,-1e3,4\r\nu,b,12345678901234567891,1\r\n"
              "u,a,12345678901234567890,2\r\nv,b,1,3\r\nv,c,2,3.5\r\nv,b,9,5\r\nw,a,0,5\r\n")
    data = read_folder(folder_of(tmp_path / "d", 'item_id,title,genres\na,"Al, ""pha""\nOne",x y\nb,,z\nc,Ünï,\nd,D,d\n', events))
    assert data.user_ids == ["u", "v"] and data.histories == [[2, 0, 1], [1, 2, 3]]   # w has one item; b repeats for v
    assert data.liked == [[True, False, False], [False, True, True]]                  # 3.5 and more of 5
    assert data.titles == ['Al, "pha" One', "b", "Ünï", "D"] and data.texts[1] == "z"
    assert (data.dropped_repeats, data.dropped_users, data.train) == (1, 1, [[2], [1]])


def test_order_of_rows_changes_nothing(tmp_path):
    header, *rows = EVENTS.splitlines()
    tied = [row.rsplit(",", 1)[0] + ",7" for row in rows]
    for case, lines in enumerate((rows, tied)):
        found = [read_folder(folder_of(tmp_path / f"{case}{i}", events="\n".join([header, *order]) + "\n")).histories
                 for i, order in enumerate((lines, lines[::-1], sorted(lines, key=lambda r: r[2])))]
        assert found[0] == found[1] == found[2]
        assert case == 1 or found[0] == [[0, 1, 2], [1, 2, 3]]
    # One item at one time with two ratings
    header, *rows = ["user_id,item_id,position,rating", "u,a,0,1", "u,a,0,5", "u,b,1,4", "u,c,2,5"]
    liked = [read_folder(folder_of(tmp_path / "r", events="\n".join([header, *order]))).liked
             for order in (rows, rows[::-1])]
    assert liked[0] == liked[1] == [[False, True, True]]


def test_ties_are_broken_by_nothing_that_says_which_item_is_popular(tmp_path):
    items = "item_id\n" + "".join(f"{i}\n" for i in range(40))
    events = "user_id,item_id,timestamp\n" + "".join(f"{u},{i},5\n" for u in range(60) for i in range(40))
    last = [history[-1] for history in read_folder(folder_of(tmp_path / "d", items, events)).histories]
    assert len(set(last)) > 20 and 14 < np.mean(last) < 25       # any item may be the one held out


def test_toy_files_are_what_the_script_writes(tmp_path):
    make_toy.write(tmp_path)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == sorted(p.name for p in (ROOT / "data/toy").iterdir())
    for name in names:
        assert (tmp_path / name).read_bytes() == (ROOT / "data/toy" / name).read_bytes(), name
    assert sum((ROOT / "data/toy" / name).stat().st_size for name in names) < 500_000


def test_toy_log_is_what_was_shown_and_liked():
    data = read_folder(ROOT / "data/toy")
    for history, liked, shown in zip(data.histories, data.truth["liked"], data.truth["shown"]):
        assert set(history) <= liked & shown and liked - shown


def test_a_log_without_the_truth_is_as_one_with_it():
    """The same shares of items liked and of items that were shown often, though only shown items get a like or none."""
    worlds = [make_toy.make_world(1500, 20, 12, seed=1, truth=truth) for truth in (True, False)]
    liked, top = [], []
    for log, likes, shown in worlds:
        assert all(set(kept) == set(a) & set(b) and len(set(b)) == len(b) for kept, a, b in zip(log, likes, shown))
        liked.append(sum(map(len, log)) / sum(map(len, shown)))
        top.append(np.sort(np.bincount(np.concatenate(shown), minlength=240))[-24:].sum() / sum(map(len, shown)))
    assert liked[0] == pytest.approx(liked[1], abs=0.02) and top[0] == pytest.approx(top[1], abs=0.02)
    assert all(set(a) <= set(b) for a, b in zip(worlds[1][1], worlds[1][2]))


def test_ml_100k_explains_itself_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/")     # nothing listens there
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    with pytest.raises(OSError, match="could not download.*pip download --no-deps recbole==1.2.1"):
        ml_100k.fetch(tmp_path / "ml-100k")
    assert not (tmp_path / "ml-100k").exists()
    (tmp_path / "x.whl").write_bytes(b"not a wheel")
    with pytest.raises(OSError, match="is not the wheel"):
        ml_100k.unpack(tmp_path / "x.whl")


# --- the command line ------------------------------------------------------------------------------------------------
def tiny_settings(path):
    make_toy.write(path / "tiny", num_users=60, items_per_theme=8, num_themes=6, seed=1)
    return Settings(data=str(path / "tiny"), out=str(path / "out"), device="cpu", codes=8, width=32, layers=1, batch=16,
                    window=8, sft_epochs=1, epochs=1)


def tiny_flags(settings):
    return [flag for f in ("data", "out", "codes", "width", "layers", "batch", "window", "sft_epochs", "epochs")
            for flag in ("--" + f.replace("_", "-"), getattr(settings, f))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run of the command line on a tiny world, all of its rows."""
    path = tmp_path_factory.mktemp("run")
    settings = tiny_settings(path)
    status, out, err = run_cli(*tiny_flags(settings), "--seeds", "1,2")
    assert status == 0, err
    return path, settings, out


def test_a_run_leaves_table_results_pictures_and_models(finished):
    path, settings, printed = finished
    results = json.loads((path / "out/results.json").read_text())
    assert (path / "out/results.md").read_text() in printed and "| GFlowGR-TB |" in printed
    assert (path / "out/curves.png").read_bytes()[:4] == b"\x89PNG" and " ± " in printed
    methods = ["pop", "cm", "sft", "sft-continued", "tb", "fm", "tb+cm"]
    assert [(r["method"], r["seed"]) for r in results["runs"]] == [(m, s) for s in (1, 2) for m in methods]
    data = read_folder(settings.data)
    for run in results["runs"]:
        rows = json.loads((path / f"out/{run['method']}-{run['seed']}/row.json").read_text())
        ranks = np.array(rows["ranks"])
        assert len(ranks) == results["data"]["users"] == len(data.histories)
        assert run["metrics"]["recall@5"] == pytest.approx(np.mean((ranks > 0) & (ranks <= 5)))
        assert run["metrics"]["ndcg@10"] == pytest.approx(np.mean([1 / math.log2(r + 1) if r else 0 for r in ranks]), abs=1e-6)
    for m in methods:
        values = [r["metrics"]["ndcg@10"] for r in results["runs"] if r["method"] == m]
        assert results["summary"][m]["ndcg@10"]["mean"] == pytest.approx(np.mean(values))
        gain = results["paired"].get(m, {}).get("ndcg@10")
        if m != "sft":
            assert gain["gain"] == pytest.approx(np.mean(values) - results["summary"]["sft"]["ndcg@10"]["mean"], abs=1e-6)
            assert gain["low"] <= gain["gain"] <= gain["high"]


def test_the_saved_model_gives_the_rank_that_was_reported(finished):
    path, settings, _ = finished
    data, policy = read_folder(settings.data), Policy.from_pretrained(path / "out/tb-1")
    ranked = gflowgr.rank_all(gflowgr.policy_ranker(policy, settings), [h[:-1] for h in data.histories])
    ranks = json.loads((path / "out/tb-1/row.json").read_text())["ranks"]
    for row, history, rank in zip(ranked.tolist(), data.histories, ranks):
        assert rank == (row.index(history[-1]) + 1 if history[-1] in row else 0)


def test_same_seed_same_figures_and_methods_do_not_lean_on_each_other(finished, tmp_path):
    path, settings, _ = finished
    settings.out, old = str(tmp_path / "again"), settings.out
    status, _, err = run_cli(*tiny_flags(settings), "--seeds", "1", "--methods", "tb")
    settings.out = old
    assert status == 0, err
    for name in ("sft-1", "tb-1"):
        first, again = [json.loads((p / name / "row.json").read_text()) for p in (path / "out", tmp_path / "again")]
        assert first["metrics"] == again["metrics"] and first["curve"] == again["curve"] and first["ranks"] == again["ranks"]


def test_resume_keeps_finished_rows_and_other_settings_are_refused(finished):
    path, settings, _ = finished
    shutil.rmtree(path / "out/tb-2")
    kept = (path / "out/tb-1/row.json").stat().st_mtime_ns
    before = json.loads((path / "out/results.json").read_text())
    status, _, _ = run_cli(*tiny_flags(settings), "--seeds", "1,2", "--resume")
    assert status == 0 and (path / "out/tb-1/row.json").stat().st_mtime_ns == kept
    after = json.loads((path / "out/results.json").read_text())
    assert [r["metrics"] for r in before["runs"]] == [r["metrics"] for r in after["runs"]]
    status, _, err = run_cli(*tiny_flags(settings), "--lam", "7")
    assert status == 2 and f"holds a run with --lam {settings.lam}, not 7.0" in err


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_training_that_was_killed_goes_on_to_the_same_figures(epoch, tmp_path, monkeypatch):
    """Killed in the middle of an epoch, after `epoch` whole ones: weights, optimiser, random numbers, rates come back."""
    settings = tiny_settings(tmp_path)
    data = gflowgr.load_data(settings.data)
    _, ids, reward = gflowgr.prepare(0, data, settings)
    torch.manual_seed(0)
    start = Policy(ids, settings.window, settings.width, settings.layers)

    def train(folder):
        policy = copy.deepcopy(start)
        return gflowgr.train("tb", policy, reward, data, settings, 3, 0, tmp_path / folder), policy.state_dict()
    (whole, weights), calls = train("whole"), []
    loss_of = gflowgr.loss_of

    def power_cut(*args):
        calls.append(args)
        if args[-1] > (epoch + 0.5) / 3:
            raise KeyboardInterrupt
        return loss_of(*args)
    monkeypatch.setattr(gflowgr, "loss_of", power_cut)
    with pytest.raises(KeyboardInterrupt):
        train("cut")
    monkeypatch.setattr(gflowgr, "loss_of", loss_of)
    resumed, resumed_weights = train("cut")
    assert resumed == whole and all(resumed_weights[name].equal(value) for name, value in weights.items())


@pytest.mark.parametrize("world", [2, 3, 7])
def test_the_average_over_processes_is_the_mean_over_the_batch(small, world):
    histories = [list(range(1 + i % 9)) for i in range(21)]
    rows = batches.training_rows(histories, 10)
    whole, *parts = [list(batches.batches(rows, histories, 4, small, np.random.default_rng(0), rank, size))
                     for rank, size in [(0, 1), *((rank, world) for rank in range(world))]]
    for batch, *shares in zip(whole, *parts):
        def means(one):                                        # a figure of each target, and one of each row
            return [(one.targets * one.valid).sum().item() / one.valid.sum().item(), np.mean([len(histories[u]) for u in one.users])]
        for i in (0, 1):
            assert np.mean([share.weights[i] * means(share)[i] for share in shares]) == pytest.approx(means(batch)[i])


def test_two_processes_train_as_one(tmp_path):
    """torchrun with two processes: the batches are one process's, halved; only random draws, as dropout's, would differ."""
    settings = tiny_settings(tmp_path)
    flags = [str(flag) for flag in tiny_flags(settings)] + ["--methods", "sft,sft-continued,tb", "--dropout", "0", "--epochs", "2"]
    status, _, err = run_cli(*flags)
    assert status == 0, err
    alone = json.loads((tmp_path / "out/results.json").read_text())
    flags[flags.index("--out") + 1] = str(tmp_path / "two")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           str(ROOT / "gflowgr.py"), *flags], capture_output=True, text=True, cwd=tmp_path, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    together = json.loads((tmp_path / "two/results.json").read_text())
    for one, two in zip(alone["runs"], together["runs"]):
        for a, b in zip(one["curve"][1:], two["curve"][1:]):
            exact = one["method"] != "tb"                      # whose trajectories are drawn
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-4 if exact else 1)
            assert not exact or a["ndcg@10"] == pytest.approx(b["ndcg@10"], abs=1e-4)
    assert done.stdout.count("semantic IDs:") == 1             # one process speaks
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(p.name for p in (tmp_path / "out").iterdir())


def test_a_damaged_checkpoint_is_named(finished, tmp_path):
    path, settings, _ = finished
    shutil.copytree(path / "out", tmp_path / "out")
    (tmp_path / "out/tb-2/row.json").unlink()
    (tmp_path / "out/tb-2/checkpoint.safetensors").write_bytes(b"\x00" * 40)
    flags = [tmp_path / "out" if flag == settings.out else flag for flag in tiny_flags(settings)]
    status, _, err = run_cli(*flags, "--seeds", "1,2", "--resume")
    assert status == 2 and "tb-2/checkpoint.safetensors is damaged" in err and err.count("\n") == 1


def test_diagnosis_against_the_rankers_and_a_loop(finished, capsys):
    path, settings, _ = finished
    data = read_folder(settings.data)
    diagnosis.diagnose(path / "out", few=3)
    printed = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in capsys.readouterr().out.splitlines()}
    _, _, reward = gflowgr.prepare(1, data, settings)
    policy = Policy.from_pretrained(path / "out/sft-1").eval()
    everything = argparse.Namespace(beams=48, gamma=settings.gamma, validate_users=60)
    users = [u for u in range(60) if len(data.train[u]) > 2]
    data.train, data.histories = [data.train[u] for u in users], [data.histories[u] for u in users]
    for name, ranker in (("SFT", gflowgr.policy_ranker(policy, everything)), ("CM", gflowgr.baseline_ranker("cm", reward.cm)),
                         ("SFT · CM^γ, what guiding ranks by", gflowgr.policy_ranker(policy, everything, reward))):
        assert float(printed[name][0]) == pytest.approx(gflowgr.validate(ranker, data, everything), abs=1e-4)
    whole, first = [], []                                      # KL of the items, and of the first codes alone
    for history in data.train[::-(-len(users) // 3)]:
        p = policy.path_log_probs([history], torch.arange(48)[None]).sum(-1)[0].exp().tolist()
        cm, allowed = reward.cm.scores([history])[0].tolist(), [v for v in range(48) if v not in history]
        left = sum(p[v] for v in allowed)
        cells = {code: [v for v in allowed if reward.ids.codes[v, 0] == code] for code in set(reward.ids.codes[allowed, 0].tolist())}
        for kl, groups in (whole, [[v] for v in allowed]), (first, cells.values()):
            kl.append(sum(sum(cm[v] for v in group) * math.log(sum(cm[v] for v in group) * left / sum(p[v] for v in group))
                          for group in groups))
    assert float(printed["sft"][0]) == pytest.approx(np.mean(whole), abs=1e-3)
    assert float(printed["sft"][1]) == pytest.approx(np.mean(first), abs=1e-3)
    for columns in (printed["sft"][:4], printed["sft"][4:]):
        assert float(columns[0]) == pytest.approx(sum(map(float, columns[1:])), abs=2e-3)
    assert all(float(printed[loss][0]) != 0 for loss in ("L_GR", "db", "tb", "fm", "sdpo", "vargrad"))


@pytest.mark.parametrize("study, methods, labels", [
    ("reward", "tb,fm", ["all three signals", "no action", "no CM in the reward", "no similarity", "no augmentation", "no CM at all"]),
    ("debias", "sft+cm", [f"δ = {v}" for v in (0.0, 0.5, 1.0, 1.5, 2.0)])])
def test_sweep_compares_settings_on_validation(finished, tmp_path, study, methods, labels):
    path, settings, _ = finished
    shutil.copytree(path / "out", tmp_path / "out")
    before = (tmp_path / "out/results.json").read_bytes()
    flags = [tmp_path / "out" if flag == settings.out else flag for flag in tiny_flags(settings)]
    status, out, err = run_cli(*flags, "--seeds", "1", "--methods", "pop," + methods, "--sweep", study)
    assert status == 0, err
    lines = (tmp_path / f"out/sweep-{study}.md").read_text().splitlines()
    columns = [name for m in methods.split(",") for name in (m, f"{m}: hidden@10")]
    assert lines[0] == f"| {study} | {' | '.join(columns)} |" and [line.split(" | ")[0][2:] for line in lines[2:]] == labels
    assert (tmp_path / f"out/sweep-{study}.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "out/results.json").read_bytes() == before     # the main table stays what it was
    rows = [json.loads(p.read_text()) for p in sorted((tmp_path / f"out/sweep-{study}").glob("*/*/row.json"))]
    tuned = [row for row in rows if row["method"] in methods.split(",")]
    assert len(tuned) == len(labels) * len(methods.split(",")) and len({row["validation"] for row in tuned}) > 1
    assert all(f"{row['validation']:.4f}" in "".join(lines) for row in tuned)
    status, _, err = run_cli(*flags, "--methods", "pop", "--sweep", study)
    assert status == 2 and "needs a row that it changes" in err
    status, _, err = run_cli(*flags, "--seeds", "1", "--width", "64", "--methods", "tb", "--sweep", study)
    assert status == 2 and "holds a run with --width 32, not 64" in err


def test_without_resume_every_row_is_made_anew(finished, tmp_path):
    """No old row may stand beside the model of a new, unfinished run."""
    path, settings, _ = finished
    shutil.copytree(path / "out", tmp_path / "out")
    flags = [tmp_path / "out" if flag == settings.out else flag for flag in tiny_flags(settings)]
    old = (tmp_path / "out/pop-1/row.json").read_text()
    (tmp_path / "out/pop-1/row.json").write_text("{}")
    status, _, err = run_cli(*flags, "--seeds", "1", "--methods", "pop")
    assert status == 0, err
    assert json.loads((tmp_path / "out/pop-1/row.json").read_text())["ranks"] == json.loads(old)["ranks"]


def test_benchmark_writes_its_table_and_picture(tmp_path, monkeypatch):
    """With stand-ins for what takes minutes; nothing here looks at a time."""
    large = benchmark.large_world(users=200, themes=4, items_per_theme=30, codes=8, share=3)
    assert large["items"] == 120 and large["measured"] * 3 >= large["steps"] and large["GB"] > 0
    monkeypatch.setattr(benchmark.subprocess, "check_output", lambda *_, **kw: json.dumps(large))
    monkeypatch.setattr(benchmark, "decoding", lambda Policy, n: (0.1, 2.0, 3.0, 64))
    monkeypatch.setattr(benchmark, "packing", lambda *_: (0.1, 0.75, 1e-6))
    monkeypatch.setattr(benchmark, "growth", lambda Policy: {name: {1: 0.02, 9: 0.03} for name in ("n", "beams", "history")})
    status, out, err = run_cli("--benchmark", *tiny_flags(tiny_settings(tmp_path)))
    assert status == 0, err
    text = (tmp_path / "out/benchmark.md").read_text()
    assert text in out and (tmp_path / "out/benchmark.png").read_bytes()[:4] == b"\x89PNG"
    assert "64 of 64 answers equal | 100 ms | 2.0 s | 20.00 × | ≥ 19 × |" in text and "| 100 ms | 750 ms | 7.50 × | ≥ 7 × |" in text
    assert all(line.count("|") == 6 for line in text.splitlines() if line.startswith("|")) and "transformers" in text


def test_recommend_prints_ten_titles_for_titles_or_ids(finished):
    path, settings, _ = finished
    data = read_folder(settings.data)
    status, out, _ = run_cli("--recommend", data.titles[3].upper(), "5", "--model", path / "out/tb-1")
    printed = [line.split("  ", 1)[1] for line in out.splitlines()]
    assert status == 0 and len(printed) == len(set(printed)) == 10 and set(printed) <= set(data.titles)
    assert not {data.titles[3], data.titles[5]} & set(printed)
    status, _, err = run_cli("--recommend", data.titles[3][:-1] + "x", "--model", path / "out/tb-1")
    assert status == 2 and "no item has the id or title" in err and repr(data.titles[3]) in err


def keys(**changes):
    """A change of a JSON file: these keys."""
    return lambda old: json.dumps({**json.loads(old), **changes}).encode()


def weight(name, value):
    """A change of a file of weights: this one, taken out if None."""
    return lambda old: save({k: w for k, w in {**load(old), f"transformer.{name}": value}.items() if w is not None})


def first_code(code):
    """A change of the IDs: the first item's first code."""
    return lambda old: json.dumps({**json.loads(old), "codes": [[code, 1, 2]] + json.loads(old)["codes"][1:]}).encode()


WEIGHTS, CONFIG, IDS = "model.safetensors", "config.json", "semantic_ids.json"
BROKEN = {  # name: (file, its new content from the old, or None to take it away)
    "no weights": (WEIGHTS, None),
    "half the weights": (WEIGHTS, lambda old: old[:5000]),
    "weights are empty": (WEIGHTS, lambda old: b""),
    "weights are a pickle": (WEIGHTS, lambda old: pickle.dumps({"transformer.wte.weight": [0.0]})),
    "a weight is missing": (WEIGHTS, weight("ln_f.bias", None)),
    "the tokens are missing": (WEIGHTS, weight("wte.weight", None)),
    "a weight too many": (WEIGHTS, weight("h.7.ln_1.weight", torch.ones(32))),
    "a weight of another shape": (WEIGHTS, weight("ln_f.bias", torch.ones(31))),
    "a weight is not finite": (WEIGHTS, weight("ln_f.bias", torch.full((32,), math.nan))),
    "a weight is whole numbers": (WEIGHTS, weight("ln_f.bias", torch.ones(32).int())),
    "weights of another model": (WEIGHTS, lambda old: save({f"bert.{name}": w for name, w in load(old).items()})),
    "no place for a history": (WEIGHTS, weight("wpe.weight", torch.ones(3, 32))),
    "no config": (CONFIG, None),
    "config is no JSON": (CONFIG, lambda old: old[:-9]),
    "config is a list": (CONFIG, lambda old: b"[]"),
    "another model type": (CONFIG, keys(model_type="bert")),
    "more layers": (CONFIG, keys(n_layer=2)),
    "more heads": (CONFIG, keys(n_head=2)),
    "another width": (CONFIG, keys(n_embd="wide")),
    "another activation": (CONFIG, keys(activation_function="relu")),
    "dropout is text": (CONFIG, keys(resid_pdrop="much")),
    "no IDs": (IDS, None),
    "IDs are no JSON": (IDS, lambda old: old[:-20]),
    "IDs are nested without end": (IDS, lambda old: b"[" * 10 ** 5),
    "IDs are not UTF-8": (IDS, lambda old: old.decode().encode("utf-16")),
    "IDs are a single value": (IDS, lambda old: b"null"),
    "IDs are text": (IDS, keys(codes="none")),
    "IDs are ragged": (IDS, keys(codes=[[0, 1, 2], [0, 1]])),
    "an ID twice": (IDS, keys(codes=[[0, 1, 2], [0, 1, 2]])),
    "fewer items than the model": (IDS, keys(codes=[[0, 1, 2], [0, 1, 3]])),
    "no codes": (IDS, lambda old: b"{}"),
    "codes for no item": (IDS, keys(codes=[])),
    "codes without levels": (IDS, keys(codes=[[]] * 48)),
    "codes of three dimensions": (IDS, lambda old: keys(codes=[json.loads(old)["codes"]])(old)),
    "a code is a fraction": (IDS, first_code(0.5)),
    "a code is text": (IDS, first_code("0")),
    "a code is negative": (IDS, first_code(-1)),
    "a code is huge": (IDS, first_code(10 ** 30)),
    "another K": (IDS, keys(num_codes=9)),
    "K is a billion": (IDS, keys(num_codes=10 ** 9)),
    "K is beyond all integers": (IDS, keys(num_codes=10 ** 30)),
    "K is infinite": (IDS, keys(num_codes=math.inf)),
    "K is a fraction": (IDS, keys(num_codes=8.0)),
    "K is text": (IDS, keys(num_codes="8")),
    "no titles": (IDS, keys(titles=None)),
    "titles are numbers": (IDS, keys(titles=[1] * 48)),
    "titles are one text": (IDS, keys(titles="x" * 48)),
    "fewer titles than items": (IDS, keys(titles=["one"])),
    "an item id twice": (IDS, keys(item_ids=["x"] * 48)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_saved_model_that_is_broken_is_refused(finished, tmp_path, name):
    file, change = BROKEN[name]
    path, settings, _ = finished
    shutil.copytree(path / "out/tb-1", tmp_path / "m")
    if change:
        (tmp_path / "m" / file).write_bytes(change((tmp_path / "m" / file).read_bytes()))
    else:
        (tmp_path / "m" / file).unlink()
    with pytest.raises(ValueError):
        Policy.from_pretrained(tmp_path / "m")
    status, out, err = run_cli("--recommend", "1", "--model", tmp_path / "m")
    assert status == 2 and len(err.strip().splitlines()) == 1 and len(err) < 1000 and not out
    assert err.startswith(f"error: {tmp_path / 'm'} holds no saved model")


class Trap:
    """Makes a folder when it is unpickled."""
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("content", ["weights", "trap"])
def test_no_pickle_is_ever_read(finished, tmp_path, content):
    """Not even one that torch.load would call safe, and not by way of an index."""
    path, _, _ = finished
    shutil.copytree(path / "out/tb-1", tmp_path / "m")
    weights = load((tmp_path / "m/model.safetensors").read_bytes())
    (tmp_path / "m/model.safetensors").unlink()
    torch.save(weights if content == "weights" else Trap(tmp_path / "sprung"), tmp_path / "m/pytorch_model.bin")
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (tmp_path / "m" / index).write_text(json.dumps({"weight_map": dict.fromkeys(weights, "pytorch_model.bin")}))
    status, out, err = run_cli("--recommend", "1", "--model", tmp_path / "m")
    assert status == 2 and "model.safetensors" in err and len(err.strip().splitlines()) == 1 and not out
    assert not (tmp_path / "sprung").exists()


def test_a_huge_file_of_ids_is_refused_unread(finished, tmp_path):
    path, _, _ = finished
    shutil.copytree(path / "out/tb-1", tmp_path / "m")
    os.truncate(tmp_path / "m/semantic_ids.json", 2 ** 29)       # sparse: it takes no room on the disk
    with pytest.raises(InputError, match="semantic_ids.json.*more than 268435456 bytes"):
        Policy.from_pretrained(tmp_path / "m")


def test_titles_of_a_saved_model_do_not_command_the_terminal(finished, tmp_path):
    path, _, _ = finished
    shutil.copytree(path / "out/tb-1", tmp_path / "m")
    file = tmp_path / "m/semantic_ids.json"
    file.write_bytes(keys(titles=[f"a\n\x1b[2J\ud800\u2028{i}" for i in range(48)])(file.read_bytes()))
    status, out, _ = run_cli("--recommend", "1", "--model", tmp_path / "m")
    assert status == 0 and len(out.splitlines()) == 10 and "\x1b" not in out and out.encode()


@pytest.mark.parametrize("names, message", [
    ([""], "no item has the id or title ''"),
    (["1", "x" * 10 ** 5], "no item has the id or title 'xxx"),
    (["\udcff\n"], r"'\udcff\n'"),
    ([str(i) for i in range(48)], "nothing is left to recommend")])
def test_names_that_cannot_be_recommended_for(finished, names, message):
    path, _, _ = finished
    status, out, err = run_cli("--recommend", *names, "--model", path / "out/tb-1")
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1 and len(err) < 500 and not out


def test_titles_are_found_in_any_case_spacing_and_form_of_unicode():
    titles = ["Caf\u00e9  del Mar", "Straße", "Other", "Other"]
    for name, index in (("cafe\u0301 DEL mar ", 0), ("STRASSE", 1), (" c ", 2)):
        assert find_item(name, ["a", "b", "c", "d"], titles) == index
    with pytest.raises(InputError, match="several items have the title 'other': give one's id, c, d"):
        find_item("other", ["a", "b", "c", "d"], titles)


def test_recommend_needs_ids_and_titles(finished, tmp_path):
    path, _, _ = finished
    policy = Policy.from_pretrained(path / "out/tb-1")
    del policy.catalogue["titles"]
    policy.save_pretrained(tmp_path / "m")
    status, _, err = run_cli("--recommend", "1", "--model", tmp_path / "m")
    assert status == 2 and "saved without item ids and titles" in err


def test_a_world_of_one_user_and_three_items_works(tmp_path):
    data = folder_of(tmp_path / "d", "item_id\na\nb\nc\n", "user_id,item_id,position\nu,a,0\nu,b,1\nu,c,2\n")
    status, out, err = run_cli("--data", data, "--out", tmp_path / "out", "--quick", "--codes", "3", "--width", "32", "--device", "cpu")
    assert status == 0 and "| GFlowGR-TB | 1.0000" in out, err      # one item is left to recommend: it is the target


@pytest.mark.parametrize("args, message", [
    (["--seeds", "-1"], "must not be negative"),
    (["--seeds", str(2 ** 64)], "below 2^63"),
    (["--seeds", "1,,2"], "--seeds takes whole numbers"),
    (["--seeds", ""], "--seeds takes whole numbers"),
    (["--weights", "0,-0.0,0"], "not all 0"),
    (["--weights", "nan,1,1"], "three numbers"),
    (["--weights", "1e308,1,1"], "three numbers"),
    (["--methods", ""], "unknown method ''"),
    (["--methods", "pop, sft"], "unknown method ' sft'"),
    (["--methods", "tb,sdpo", "--trajectories", "0"], "--trajectories 0"),
    (["--method", "pop"], "unrecognized arguments: --method"),          # no abbreviations: --epoch is not --epochs
    (["a\nb"], "unrecognized arguments: a b"),
    (["--lam", "nan"], "--lam nan"),
    (["--lam", "-2"], "--lam -2.0: it is at least -1"),
    (["--rate", "inf"], "--rate inf: it is at least 1e-12 and at most"),
    (["--fine-rate", "1e300"], "--fine-rate 1e+300"),
    (["--dropout", "1"], "--dropout 1.0"),
    (["--layers", "1000000"], "--layers 1000000"),
    (["--width", "33"], "multiple of 32, not 33"),
    (["--width", str(10 ** 9)], f"--width {10 ** 9}"),
    (["--window", str(10 ** 12)], f"--window {10 ** 12}"),
    (["--data", "a\nb"], "a b is not a folder"),
    (["--data", "\udcff"], "'\\udcff' is not UTF-8"),
    (["--data", str(ROOT / "data/toy/items.csv")], "is not a folder"),
    (["--codes", "1000000"], "at most 65536"),
    (["--methods", "sft,gpt"], "unknown method 'gpt'"),
    (["--nonsense", "1"], "unrecognized arguments"),
    (["--seeds", "one"], "--seeds"),
    (["--batch", "0"], "--batch 0"),
    (["--batch", "many"], "--batch"),
    (["--rate", "nan"], "--rate"),
    (["--weights", "1,2"], "three numbers"),
    (["--ids", "magic"], "--ids"),
    (["--device", "tpu"], "--device tpu is not here"),
    (["--data", "nowhere"], "nowhere is not a folder"),
    (["--codes", "2"], "do not fit into 2^3"),
    (["--recommend", "x"], "go together"),
    (["--recommend", "x", "--model", "nowhere"], "nowhere holds no saved model")])
def test_bad_arguments_get_one_line_and_status_2(args, message, tmp_path):
    out = tmp_path / "out"
    status, _, err = run_cli(*args, "--out", out)
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1 and not out.exists()


def unusual_out(path, case):
    """A folder for --out that cannot be used."""
    content = {"a list": [], "no settings": {"runs": []}, "settings are a list": {"settings": [], "data": {}},
               "another run": {"settings": {}, "data": {}}}
    path.mkdir()
    if case == "a file":
        (path / "out").write_text("mine")
    elif case == "a data folder":
        folder_of(path / "out")
    elif case == "rows of unknown settings":
        (path / "out/pop-42").mkdir(parents=True)
        (path / "out/pop-42/row.json").write_text("{}")
    else:
        (path / "out").mkdir()
        (path / "out/results.json").write_text("[" * 10 ** 5 if case == "nested without end" else json.dumps(content[case]))
    return path / "out"


@pytest.mark.parametrize("case, message", [
    ("a file", "cannot write into --out"),
    ("a data folder", "is a data folder"),
    ("a list", "not a JSON file of this program"),
    ("nested without end", "not a JSON file of this program"),
    ("no settings", "not a results file of this program"),
    ("settings are a list", "not a results file of this program"),
    ("another run", "holds a run with --codes 512, not 16"),
    ("rows of unknown settings", "their settings are unknown")])
def test_an_out_that_cannot_be_used_is_refused_and_left_as_it_is(case, message, tmp_path):
    out = unusual_out(tmp_path / "place", case)
    before = {p: p.read_bytes() for p in (tmp_path / "place").rglob("*") if p.is_file()}
    status, _, err = run_cli("--methods", "pop", "--resume", "--out", out)
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1
    assert before == {p: p.read_bytes() for p in (tmp_path / "place").rglob("*") if p.is_file()}
    status, _, err = run_cli("--methods", "pop", "--out", ROOT / "README.md" / "below")
    assert status == 2 and "cannot write into --out" in err


@pytest.mark.parametrize("damage", [
    lambda row: {}, lambda row: [row], lambda row: {**row, "seed": 2}, lambda row: {**row, "method": "cm"},
    lambda row: {**row, "ranks": row["ranks"][1:]}, lambda row: {**row, "ranks": ["1"] * len(row["ranks"])},
    lambda row: {**row, "ranks": None}, lambda row: {**row, "metrics": {"ndcg@10": 0.5}}, lambda row: {**row, "curve": [1]},
    lambda row: {**row, "metrics": {**row["metrics"], "ndcg@10": "good"}}, lambda row: {**row, "seconds": {}}])
def test_resume_refuses_a_damaged_row(finished, tmp_path, damage):
    path, settings, _ = finished
    (tmp_path / "out/pop-1").mkdir(parents=True)
    shutil.copy(path / "out/results.json", tmp_path / "out")
    row = json.loads((path / "out/pop-1/row.json").read_text())
    (tmp_path / "out/pop-1/row.json").write_text(json.dumps(damage(row)))
    flags = [tmp_path / "out" if flag == settings.out else flag for flag in tiny_flags(settings)]
    status, _, err = run_cli(*flags, "--seeds", "1", "--methods", "pop", "--resume")
    assert status == 2 and "pop-1/row.json" in err and len(err.strip().splitlines()) == 1


def test_a_run_on_files_that_have_changed_is_refused(tmp_path):
    """In a folder whose name is half a formula, with a line end and an accent."""
    folder = folder_of(tmp_path / "$x^$\né")
    flags = ["--data", folder, "--out", tmp_path / "out", "--methods", "pop", "--codes", "2"]
    status, _, err = run_cli(*flags)
    assert status == 0, err
    (folder / "items.csv").write_text(ITEMS.replace("Alpha", "Omega"))
    status, _, err = run_cli(*flags, "--resume")
    assert status == 2 and "holds a run on other data" in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("error, message", [
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "not enough memory; lower --batch"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
    (MemoryError("Unable to allocate 112 GiB"), "not enough memory"),
    (SafetensorError("No space left\non device"), "No space left on device"),
    (OSError(28, "No space left on device", "out/row.json"), "out/row.json")])
def test_a_full_memory_or_disk_is_one_line(error, message, monkeypatch):
    def fail(*_):
        raise error
    monkeypatch.setattr(gflowgr, "run", fail)
    status, _, err = run_cli()
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1
    error = RuntimeError("a mistake of ours")
    with pytest.raises(RuntimeError, match="ours"):
        run_cli()


def test_the_script_itself_exits_with_status_2_and_no_traceback():
    done = subprocess.run([sys.executable, str(ROOT / "gflowgr.py"), "--data", "nowhere"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: nowhere is not a folder") and done.stdout == ""


@pytest.mark.parametrize("module", [tokenizer, reward, metrics, gflowgr, example])
def test_examples_in_docstrings(module):
    assert doctest.testmod(module).failed == 0


def test_help_answers_before_torch_is_loaded():
    done = subprocess.run([sys.executable, "-X", "importtime", str(ROOT / "gflowgr.py"), "--help"], capture_output=True,
                          text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})       # a terminal without a ŷ
    assert done.returncode == 0 and "--recommend" in done.stdout and " torch" not in done.stderr


# --- exercises -------------------------------------------------------------------------------------------------------
MINE = os.environ.get("MINE")                                  # a student's file


@pytest.mark.parametrize("name", grading.EXERCISES)
def test_exercise(name):
    """Grades the function in the file MINE, where that is set, else the reference."""
    message = None
    try:
        grading.grade(name, MINE)
    except (grading.Wrong, grading.Broken) as error:
        message = str(error)
    if message:                                                # not in the except, which would print it twice
        pytest.fail(message, pytrace=False)


@pytest.mark.parametrize("name, label", [(name, label) for name, e in grading.EXERCISES.items() for label in e.wrong])
def test_wrong_answer_is_caught(name, label):
    with pytest.raises(grading.Wrong, match="is not right yet"):   # Broken, an accident, would not do
        grading.grade(name, grading.EXERCISES[name].wrong[label])


@pytest.mark.parametrize("name", grading.EXERCISES)
def test_stub_is_the_statement_and_its_imports_are_enough(name, tmp_path):
    e, mine, stub = grading.EXERCISES[name], tmp_path / "mine.py", grading.stub(name)
    mine.write_text(stub, encoding="utf-8")
    function = inspect.unwrap(grading.load(mine, e.attribute))
    assert inspect.signature(function) == inspect.signature(e.reference) and ">>> " in inspect.getdoc(function)
    assert inspect.getdoc(function) == inspect.getdoc(e.reference)
    assert len(ast.parse(stub).body[-1].body) == 2             # the docstring and "your turn"
    with pytest.raises(grading.Broken, match="is not yet written"):
        grading.grade(name, mine)
    source = textwrap.dedent(inspect.getsource(e.reference))
    mine.write_text(stub[:stub.index(source.splitlines()[0])] + source, encoding="utf-8")
    grading.grade(name, mine)


@pytest.mark.parametrize("text, message", [
    ("def recall_at(ranked, target, k):\n    while True:\n        pass", "had not ended after 0.2 seconds"),
    ("while True:\n    pass", "had not ended after 0.2 seconds"),
    ("def recall_at(ranked, target, k):\n    return ranked[99]", r"raised IndexError: .*mine\.py, line 2"),
    ("def recall_at(ranked, target, k):\n    raise SystemExit", "raised SystemExit"),
    ("def recall_at(ranked, target):\n    return ranked", "raised TypeError: .* 2 positional arguments but 3"),
    ("import gflowgr\ndef recall_at(*a):\n    return gflowgr.recall_at(*a)", "raised RecursionError"),
    ("from gflowgr import recall_at", "defines no function recall_at"),
    ("def ndcg_at(ranked, target, k):\n    return ranked", "defines no function recall_at"),
    ("recall_at = 0.5", "defines no function recall_at"),
    ("def recall_at(ranked, target, k)\n    return 0", r"mine\.py, line 1: expected ':'"),
    ("import no_such_module", "cannot be loaded: ModuleNotFoundError"),
    (None, "cannot be loaded: FileNotFoundError"),
    ("def recall_at(ranked, target, k):\n    return 0.5", r"must be a torch tensor of float, shape \(\), not a float"),
    ("def recall_at(ranked, target, k):\n    return ranked", "not a torch tensor of int, shape"),
    ("def recall_at(ranked, target, k):\n    pass", "not a NoneType")])
def test_an_answer_that_cannot_be_graded_says_why(text, message, tmp_path):
    mine, reference = tmp_path / "mine.py", gflowgr.recall_at
    if text:
        mine.write_text(text)
    with pytest.raises((grading.Broken, grading.Wrong), match=message):
        grading.grade("recall_at", mine, seconds=0.2 if "while" in str(text) else 5)
    assert gflowgr.recall_at is reference


def test_a_student_sees_only_the_result_of_their_own_file(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("import torch\ndef recall_at(ranked, target, k):\n    return torch.tensor(0.0)")
    monkeypatch.setenv("MINE", str(tmp_path / "mine.py"))
    tests = {name: value for name, value in runpy.run_path(__file__).items() if name.startswith("test_")}
    assert list(tests) == ["test_exercise"]
    with pytest.raises(pytest.fail.Exception, match="Found 0.0, expected 1.0\nCase: one user, target on the first place"):
        tests["test_exercise"]("recall_at")


@pytest.mark.parametrize("args, printed", [(["--list"], "Policy.recommend            ***         60       gflowgr.py\n"),
                                           (["--stub", "ndcg_at"], "def ndcg_at(ranked, target, k):\n")])
def test_this_file_lists_exercises_and_writes_stubs(args, printed, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["test_gflowgr.py", *args])
    runpy.run_path(__file__, run_name="__main__")
    assert printed in capsys.readouterr().out


if MINE:                                                       # a student sees the result of their own function alone
    for name in [name for name in globals() if name.startswith("test_") and name != "test_exercise"]:
        del globals()[name]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The exercises: list them, or write the stub of one.")
    parser.add_argument("--list", action="store_true", help="names, difficulty and minutes")
    parser.add_argument("--stub", metavar="NAME", choices=grading.EXERCISES, help="imports, signature and statement of one")
    name = parser.parse_args().stub
    print(grading.stub(name) if name else grading.listing(), end="")
