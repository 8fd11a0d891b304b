"""GFlowGR: fine-tune a generative recommender so that P(item | user) follows a reward.

A generative recommender reads a user's history and writes the semantic ID of the next item, code
by code. Supervised fine-tuning (SFT) on the log teaches what was shown, not what the user would
like: exposure bias. GFlowGR reads an ID as a path down a tree and trains a GFlowNet on it, with a
loss called trajectory balance (TB): the probability of an item shall be proportional to its reward
R. R mixes the logged action, the score of another recommender, the *teacher* (the paper's
collaborative model, CM), and the similarity of IDs.
The lecture comes first; it ends with the beam search. A step of training (`loss_of`), in short:

    for each logged item v and the history U before it:
        R     = .2 r_a + .75 r_ŷ + .05 r_s + .001/m, of each of the m items that are not in U
                r_a is 1 at v, else 0; r_ŷ: by the teacher's scores; r_s: by codes shared with v
        Z     = the sum of R, about 1
        items = 8 different draws from P(· | U)
        L_GR  = −log P(v | U), the loss of SFT
        L_GFN = mean over the items of (log Z + log P − log R)², for instance: TB
    loss = mean over all (U, v) of L_GR + λ · L_GFN

A context (U, v) is a user's history, and the item that was logged next. An ID has L codes, each
from 0 to K − 1. IDs make a tree; a path s_0 … s_L leads from the empty prefix to an item. Nodes are
numbers, first M prefixes, then n items. Here the prefixes (), (0), (1) are 0, 1, 2, items 3, 4, 5:
    ID (0, 0), path 0 1 3        ID (0, 1), path 0 1 4        ID (1, 1), path 0 2 5
The flow F of a node is the sum of R over the items below it. So F(s_0) = Z, and F(s_L) = R.
Letters in shapes: C contexts, J paths of each context, n items, B users (or rows of a batch).
"""
import copy
import json
import math
import os
import shutil
import sys
import time
import zlib
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")       # models as small as these: one thread is best
import numpy as np
import torch
import transformers
from torch.nn import functional
from tqdm import tqdm
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, get_cosine_schedule_with_warmup
from transformers.hf_argparser import HfArg, HfArgumentParser

from data import InputError, check, check_numbers, find_item, load_data, read_ids, report
from reward import TEACHERS, Reward, Teacher
from tokenizer import SemanticIDs, at, entries, item_features

transformers.utils.logging.disable_progress_bar()       # small models are loaded and saved at once
NEVER = -1e9            # log P of an illegal code; −inf would make losses nan

# --- Losses: pure functions of tensors, natural logs ----------------------------------------------
def trajectory_balance(log_z, log_pf, log_r):
    """TB (Malkin et al. 2022): log Z of C contexts (C,), log P and log R of J whole paths in each
    (C, J) → scalar.
    A path has the nodes s_0 … s_L. P_F is the policy's probability of the next code; so log P of a
    path is Σ_l log P_F(s_{l+1} | s_l).
    Z, the paper's Z(U), is the sum of R over all items (ours: unseen ones; P of others is 0).
    If several paths led to an item, TB would also need P_B, how likely each of them is. In a tree
    there is one, so P_B is 1.
    Mean over all paths of (log Z + log P − log R)²:
    >>> log_pf, log_r = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    >>> round(trajectory_balance(torch.zeros(1), log_pf, log_r).item(), 4)   # (0 + (log 1/2)²) / 2
    0.2402
    """
    return (log_z[:, None] + log_pf - log_r).square().mean()

# --- What a method is -----------------------------------------------------------------------------
@dataclass
class Recipe:
    """How a method is trained; `--methods tb:epochs=4` changes a field. These defaults are what
    `tb` has in the made-up world of the first command. The loss is gr · L_GR + λ · L_GFN"""
    loss: object = None             # L_GFN, a function of paths, as in RECIPES; None: L_GR alone
    gr: float = 1.0                 # weight of L_GR = −log P(v | U), the loss of SFT
    lam: float = 10.0               # λ, weight of L_GFN
    sampler: str = "policy_draws"   # which N unseen items L_GFN reads; here, N drawn from P
    trajectories: int = 8           # N: the paper has about 3, besides v
    chosen: Literal["", "logged", "reward"] = ""    # one item more: v itself, or drawn ∝ R
    exact: bool = True              # ours: Z is known, as R of all items is; False: it is learned,
                                    # by a linear head on the policy's hidden states
    # R = w_a·r_a + w_ŷ·r_ŷ + w_s·r_s + .001/m at each of m unseen items
    w_a: float = 0.2                # r_a: 1 at v (.1 if a real log says that v was not liked)
    w_y: float = 0.75               # r_ŷ: scores of the teacher, of sum 1
    w_s: float = 0.05               # r_s ∝ number of levels with the same code as v, of sum 1
    teacher: str = "svd"            # one of TEACHERS, the recommenders of reward.py
    debias: float = 0.5             # δ, ours: r_ŷ ∝ (score / popularity^δ)^sharp. Popularity: how
                                    # many users took the item; for `svd`, about √ of this number
    sharp: float = 3.0              # ours: the larger, the fewer items have a high r_ŷ
    rate: float = 3e-3              # peak learning rate: small models like it high
    dropout: float = 0.0            # SFT needs some; `tb`, which learns from many items, none
    epochs: int = 8                 # passes over the training log
    beta: float = 0.1               # S-DPO, GRPO: how strongly P is held near that of SFT

# --- What a loss learns from: contexts and paths --------------------------------------------------
class Batch:
    """C contexts (U, v). In an epoch, each item of a training history is v in one Batch. If a user
    took 5 2 9, three of its contexts are this user's:
        histories  [], [5], [5, 2]    positives  5, 2, 9    following  [5, 2, 9], [2, 9], [9]"""
    def __init__(self, packed, data, reward=None):
        """packed: a Packed, see below the lecture; it has
            contexts     C pairs (user, place of v in the user's history)
            tokens       what GPT-2 reads
            unseen       (C, M + n) bool, of all nodes: does it lead to an item that is not in U?
        data: a Dataset, of all users. reward: a Reward; SFT has none."""
        self.packed = packed
        self.histories = packed.histories                       # C lists U
        self.users = [user for user, _ in packed.contexts]      # whose they are
        # C lists: v, and what the user logged after it
        self.following = [data.train[user][place:] for user, place in packed.contexts]
        liked = [data.liked[user][place] for user, place in packed.contexts]
        device = packed.tokens.device
        self.positives = torch.tensor([items[0] for items in self.following], device=device)  # v
        self.liked = torch.tensor(liked, device=device)         # (C,) bool: did the user like v?
        if reward:
            # r_ŷ (C, n), rows of sum 1: the scores of a teacher that was fitted without these users
            self.scores = reward.teacher.scores(self.histories, self.users).to(device)
            # (C, n) bool: is an item not in U? Items are the last n nodes
            unseen = packed.unseen[:, -self.scores.shape[1]:]
            self.r = reward(self.scores, self.positives, self.liked, unseen)    # R (C, n), 0 in U

def draw(weight, count):
    """count items per context (C, count), with replacement, ∝ weight (C, n)."""
    # At least two are drawn: where it draws one, torch takes 20 times as long
    return torch.multinomial(weight, max(2, count), replacement=True)[:, :count]

class Paths:
    """What a loss can read: J unseen items of each of C contexts, and their paths."""
    def __init__(self, recipe, policy, reference, batch, items):
        """policy: is trained. reference: the policy after SFT, frozen; two rivals compare with it.
        items (C, N): those that a sampler drew. J is N, or 1 + N if the recipe has `chosen`."""
        positives = batch.positives[:, None]                    # (C, 1) v
        if recipe.chosen == "logged":
            items = torch.cat([positives, items], 1)
        if recipe.chosen == "reward":
            items = torch.cat([draw(batch.r, 1), items], 1)
        # One forward pass for all paths: that of v, for L_GR, and the J of L_GFN. If v is 7 and
        # 3 and 9 are drawn, all_items is [[7, 3, 9]], and J = 2
        all_items = torch.cat([positives, items], 1)            # (C, 1 + J)
        log_steps, log_probs, learned_log_flow = policy(batch.packed, all_items)
        self.recipe = recipe
        self.reference = reference
        self.batch = batch
        self.ids = policy.semantic_ids
        self.items = items                                      # (C, J)
        self.log_v = log_steps[:, 0].sum(-1)                    # (C,) log P(v | U)
        self.log_steps = log_steps[:, 1:]                       # (C, J, L) log P_F of each step
        self.log_probs = log_probs[:, 1:]                       # (C, J, L, K) of all codes there
        self.log_pf = self.log_steps.sum(-1)                    # (C, J) log P of whole paths
        self.log_r = batch.r.gather(1, items).log()             # (C, J) log R
        self.learned_log_flow = learned_log_flow[:, 1:]         # (C, J, L) log F of s_0 … s_{L-1}
        learned_log_z = self.learned_log_flow[:, 0, 0]          # log F(s_0), equal on all J paths
        self.log_z = batch.r.sum(1).log() if recipe.exact else learned_log_z        # (C,)

def tb_of(p):
    """TB of a Paths p."""
    return trajectory_balance(p.log_z, p.log_pf, p.log_r)

# What each method changes in Recipe. Numbers were chosen by trials, in data/log.md
RECIPES = {
    "sft": dict(rate=1.5e-3, dropout=0.4, epochs=20),           # the others go on from its weights
    # As we read it, with our w_…: L_GFN reads v, too. R of v is high, so P stays near the log
    "paper": dict(loss=tb_of, chosen="logged", sampler="curriculum", trajectories=3, exact=False,
                  lam=1.0, debias=0.0, sharp=1.0, dropout=0.4),
    # Ours: v is in L_GR alone, and R is that of `tb`
    "tb-paper": dict(loss=tb_of, sampler="curriculum", trajectories=3, exact=False, lam=0.3,
                     dropout=0.4),
    "tb": dict(loss=tb_of)}                                     # all else: as Recipe says

# --- One step of training, and the loop -----------------------------------------------------------
def loss_of(recipe, policy, reference, batch, progress):
    """gr · L_GR + λ · L_GFN: means over the contexts (U, v) of a Batch. reference: the policy after
    SFT, frozen. progress: the share of training that is done, which the curriculum asks for."""
    if not recipe.loss:                                         # SFT
        log_steps, *_ = policy(batch.packed, batch.positives[:, None])             # (C, 1, L)
        return -log_steps.sum(-1).mean()                        # L_GR = −log P(v | U)
    # N items of each context (C, N), by a function below. Any will do: if P = R/Z, TB is 0 on all
    policy.eval()                                               # no dropout while sampling
    items = SAMPLERS[recipe.sampler](batch, recipe.trajectories, policy, progress)
    policy.train()
    check_drawn(items, recipe, batch)                           # InputError if one of U is drawn
    p = Paths(recipe, policy, reference, batch, items)
    L_GR = -p.log_v.mean()
    L_GFN = recipe.loss(p)
    check_loss(L_GFN, recipe)                                   # InputError if not one number
    return recipe.gr * L_GR + recipe.lam * L_GFN

def train(name, recipe, policy, setup):
    """The one training loop → the curve, a list of {"epoch", "loss", "score"}, epoch 0: before.
    policy: new for SFT, for the others as SFT left it. The rate rises to its peak and falls to 0.
    setup: a Setup, what all methods of one seed share. Of it, the loop asks for its seed, and
        batches(setup, …)       Batches of setup.size of the setup.rows; a row: contexts of a user
        setup.reward(recipe)    a Reward, to compute R
        setup.measure(policy)   the score of an epoch, called setup.measured"""
    reward = setup.reward(recipe) if recipe.loss else None
    reference = copy.deepcopy(policy).eval()                    # frozen
    per_epoch = math.ceil(len(setup.rows) / setup.size)
    steps = recipe.epochs * per_epoch
    groups = [{"params": policy.lm.parameters()},               # GPT-2
              {"params": policy.flow_head.parameters(), "lr": 10 * recipe.rate}]    # learned flows
    optimizer = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(200, steps // 10 + 1), steps)
    curve = [{"epoch": 0, "loss": None, "score": setup.measure(policy)}]
    losses = []
    for epoch in range(1, recipe.epochs + 1):
        policy.train()
        seed = [setup.seed, epoch]      # for numpy (order of batches), torch (dropout, drawn items)
        torch.manual_seed(int(np.random.default_rng(seed).integers(2 ** 63)))
        epoch_batches = batches(setup, policy, reward, np.random.default_rng(seed))
        for batch in tqdm(epoch_batches, name, per_epoch, leave=False, disable=None):
            loss = loss_of(recipe, policy, reference, batch, len(losses) / steps)
            if not torch.isfinite(loss):
                raise InputError(f"{name}: loss {loss} at step {len(losses)}; is the rate too "
                                 f"high? Users, from 0: {sorted({*batch.users})}")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        loss = float(np.mean(losses[-per_epoch:]))
        curve.append({"epoch": epoch, "loss": loss, "score": setup.measure(policy)})
        print(f"  {name}: epoch {epoch}/{recipe.epochs}, loss {loss:.3f}, {setup.measured} "
              f"{curve[-1]['score']:.4f}", flush=True)
    return curve

# --- The adaptive trajectory sampler: which items to learn from -----------------------------------
# Functions (batch, N, policy, progress) → unseen items (C, N). Two are here, four after the lecture
def unlogged(batch, weight):
    """weight (C, n), made 0 at all items of the user's log, as these shall not be drawn. But v
    keeps a very small weight: it is drawn if no other item is left."""
    weight[entries(batch.histories)] = 0                        # entries: their rows and columns
    weight[entries(batch.following)] = 0
    return weight.scatter_(1, batch.positives[:, None], 1e-12)

def curriculum(batch, count, policy, progress):
    """The paper's third and default: items with low scores early in training, with high ones late.
    1. Draw a pool of 2N − 1 items, none of the user's log (ours: half by score, half at random).
       An item may be drawn twice.
    2. Sort it from low to high score.
    3. Keep N in a row: at first those with the lowest scores, in the end those with the highest."""
    weight = unlogged(batch, 0.5 * batch.scores + 0.5 / batch.scores.shape[1])
    pool = draw(weight, 2 * count - 1)                                              # (C, 2N-1)
    scores = batch.scores.gather(1, pool)
    ranked = pool.gather(1, scores.argsort(1))                                      # low to high
    start = round(progress * (count - 1))
    return ranked[:, start:start + count]

def policy_draws(batch, count, policy, progress):
    """Ours: N items drawn from P, none twice (by drawn_search, after the lecture)."""
    items, _ = policy.recommend(batch.histories, count, beams=count, sample=1.0)
    return items.where(items >= 0, batch.positives[:, None])    # −1 if fewer are unseen: v instead

# --- The policy: P_F(next code | user, codes so far) ----------------------------------------------
class Policy(torch.nn.Module):
    """A small GPT-2, ours, that reads a history and writes a semantic ID, plus the table of IDs.
        token l·K + c           code c of level l, both from 0
        token L·K               <user>: begins each history, and pads it
        token L·K + 1 + i       item i of a history (ours: one token, not its L codes)
    Letters in shapes: H tokens of a history, d width of the model, W beams of a user."""
    def __init__(self, semantic_ids, window=20, width=64, layers=2, dropout=0.0, beams=20,
                 catalogue=None, lm=None):
        super().__init__()
        self.semantic_ids = semantic_ids
        self.window = window                                    # items of a history that are read
        self.beams = beams                                      # beam width of recommend
        self.catalogue = catalogue or {}                        # saved with it: item_ids, titles
        self.teacher = None                                     # NAME+cm has one: see recommend
        self.user_token = semantic_ids.num_levels * semantic_ids.num_codes
        self.lm = lm or GPT2LMHeadModel(GPT2Config(             # from scratch, not pretrained
            vocab_size=self.user_token + 1 + len(semantic_ids.codes), n_embd=width, n_layer=layers,
            n_head=1 if width % 32 else width // 32,            # heads of 32 dimensions
            n_positions=window + semantic_ids.num_levels,       # <user>, items, L−1 codes
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=0.0,
            bos_token_id=self.user_token, eos_token_id=self.user_token,
            activation_function="gelu_pytorch_tanh"))           # GPT-2's own, computed faster
        self.flow_head = torch.nn.Linear(self.lm.config.n_embd, 1)   # log F(s); log Z at s_0
        for parameter in self.flow_head.parameters():
            torch.nn.init.zeros_(parameter)     # learning begins at log Z = 0, as Z is about 1

    def forward(self, packed, items):
        """P on the paths of items (C, J), J of each of the C histories U that are `packed`. Returns
        log P_F of each step (C, J, L), log P_F of all codes there (C, J, L, K), near NEVER if
        illegal, and the learned log F of s_0 … s_{L-1} (C, J, L)."""
        ids = self.semantic_ids
        L = ids.num_levels
        # GPT-2's hidden states at s_0 … s_{L-1}, as if it read <user>, the items of U and all codes
        # but the last, path by path (how all are read at once comes after the lecture)
        hidden = read_packed(self, packed, items)                                   # (C, J, L, d)
        # As in GPT-2, a token's logit is hidden · its embedding. At level l, only its K codes have
        # one: tokens l·K to l·K + K − 1
        heads = self.lm.transformer.wte.weight[:self.user_token].unflatten(0, (L, -1))  # (L, K, d)
        logits = torch.einsum("cjld,lkd->cjlk", hidden, heads).float()              # (C, J, L, K)
        nodes = ids.nodes[items][..., :-1]                      # s_0 … s_{L-1} (C, J, L)
        # The nodes that all codes lead to from there; −1: none, or none with an unseen item below
        child = ids.legal_children(nodes, packed.unseen)                            # (C, J, L, K)
        log_probs = logits.masked_fill(child < 0, NEVER).log_softmax(-1)
        log_steps = log_probs.gather(-1, ids.codes[items][..., None])[..., 0]       # (C, J, L)
        return log_steps, log_probs, self.flow_head(hidden)[..., 0]

    def path_log_probs(self, histories, items):
        """log P_F of each step on the paths of items (B, J) → (B, J, L); if illegal, near NEVER."""
        items = torch.as_tensor(items, device=self.semantic_ids.codes.device)
        return self(pack_histories(histories, self), items)[0]

    @torch.no_grad()
    def recommend(self, histories, k=10, beams=None, guide=None, sample=0.0):
        """The k items of highest P after B histories: items (B, k), best first; log P (B, k).
        Never an item of the history, never a duplicate; −1 and −inf where fewer than k are unseen.
        beams (self.beams by default, at least k): the more, the surer the best are found.
        guide (B, n) ≥ 0, or scores of self.teacher: items of highest P · guide, and log of this.
        sample > 0: items drawn at random from P at this temperature, none twice; scores that fall.
        Raises InputError for an item that is not in the catalogue, or if nothing is asked for."""
        check(len(histories) and k > 0, "recommend needs a history, and k from 1")
        if self.teacher and guide is None:
            guide = self.teacher.scores(histories)
        check(sample == 0 or guide is None and sample > 0, "recommend: sample ≥ 0; with a guide, 0")
        search = drawn_search if sample else beam_search
        tree = Beams(self, histories, guide, temperature=sample or 1.0)
        return search(tree, k, beams=max(beams or self.beams, k))

# --- Recommending: beam search down the tree ------------------------------------------------------
def beam_search(tree, k, beams):
    """The best prefixes go on to the next level → items (B, k) and log P. A beam is a prefix that
    is left. `tree` has W of them for each user; it asks GPT-2, as Policy.forward does:
        tree.node (B, W)            the beams, nodes of tree.ids; at first W = 1: the root, s_0
        tree.children()             where all next codes lead, log P_F of these codes (B, W, K)
        tree.keep(child, best)      go on with the children at the places `best`, as new beams
        tree.items(log_p, k)        after L codes, a beam is an item: the first k of each user"""
    log_p = torch.zeros_like(tree.node, dtype=torch.float)      # (B, W) log P of the beams
    for _ in range(tree.ids.num_levels):
        child, log_probs = tree.children()
        log_p = (log_p[..., None] + log_probs).flatten(1)       # (B, W·K) of all children
        log_p, best = log_p.topk(min(beams, log_p.shape[1]), 1)     # (B, new W), their places
        tree.keep(child, best)
    return tree.items(log_p, k)

# === The lecture ends here. Below: rivals, packing, drawing, evaluation, the experiment ===========

# --- More samplers --------------------------------------------------------------------------------
def session(batch, count, policy, progress):
    """The paper's first: other items of the user's log. Ours: those after v (R of those before it,
    in U, is 0). If v is the last, v."""
    later = [items[1:] or items for items in batch.following]   # following: v, and those after it
    weight = torch.zeros_like(batch.r)
    weight[entries(later)] = 1
    return draw(weight, count)

def uniform(batch, count, policy, progress):
    """The paper's second, "random": any items that are not in the user's log."""
    return draw(unlogged(batch, torch.ones_like(batch.r)), count)

def policy_beam(batch, count, policy, progress):
    """The paper's fourth: the N best items by P itself, without v (the paper: N−1)."""
    items, _ = policy.recommend(batch.histories, count + 1, beams=count + 1)
    v = batch.positives[:, None]
    order = (items == v).int().argsort(dim=1, stable=True)      # if v is among them, it comes last
    items = items.gather(1, order)[:, :count]                   # and is cut off here
    return items.where(items >= 0, v)                           # −1 if fewer are unseen: v instead

def reward_draws(batch, count, policy, progress):
    """Ours: items drawn ∝ R, as P shall become. The logged item is often among them."""
    return draw(batch.r, count)

SAMPLERS = {sampler.__name__: sampler for sampler in (
    session, uniform, curriculum, policy_beam, policy_draws, reward_draws)}

# --- Other losses that make P = R/Z ---------------------------------------------------------------
def vargrad(log_pf, log_r):
    """VarGrad (Richter et al. 2020), TB that needs no log Z: log P, log R of paths (C, J) → scalar.
    At P = R/Z, log P − log R is −log Z on all paths of a context. So its variance has to be 0.
    Mean over contexts of the variance (with 1/J) of log P − log R."""
    return (log_pf - log_r).var(1, correction=0).mean()

def listnet(log_pf, log_r):
    """ListNet (Cao et al. 2007) → scalar: among J items, P shall have R's shares. It needs R of
    these alone, and no Z: log P, log R of paths (C, J).
    Mean over contexts of KL(q ‖ p), q = R / Σ R and p = P / Σ P over the J paths."""
    log_p = log_pf.log_softmax(1)
    log_q = log_r.log_softmax(1)
    return functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True)

def detailed_balance(log_flow, log_steps):
    """Detailed balance (DB, Bengio et al. 2023) → scalar: each step is in balance. log_flow
    (C, J, L+1): log F of s_0 … s_L, for each path; log_steps (C, J, L): log P_F of its steps.
    Mean over all paths of Σ_l (log F(s_l) + log P_F(s_{l+1} | s_l) − log F(s_{l+1}))²."""
    return (log_flow[..., :-1] + log_steps - log_flow[..., 1:]).square().sum(-1).mean()

def path_flows(p):
    """Of a Paths p: (C, J, L+1) log F of s_0 … s_L, exact or learned; F(s_L) is R."""
    if not p.recipe.exact:
        return torch.cat([p.learned_log_flow, p.log_r[..., None]], -1)
    flows = p.ids.flows(p.batch.r)                  # (C, M + n) F of all nodes: sums of R below
    return at(flows, p.ids.nodes[p.items]).log()                # at those of the paths

def distillation(child_flow, log_probs):
    """Ours → scalar: where a path goes down the tree, the flow F divides among the next codes. q(c)
    is the share of code c. P_F shall be q, for all codes. (TB and DB see those of the path alone.)
    child_flow (C, J, L, K): F after each code; log_probs (C, J, L, K): log P_F of each code.
    Mean over paths of Σ_l KL(q ‖ P_F) = Σ_l Σ_c q(c) · (log q(c) − log P_F(c | s_l))."""
    target = child_flow / child_flow.sum(-1, keepdim=True)      # q; 0 for an illegal code
    return (target * (target.clamp(min=1e-30).log() - log_probs)).sum((-2, -1)).mean()

def code_flows(p):
    """Of a Paths p: (C, J, L, K) exact F after each code from s_0 … s_{L-1}; 0 if it is illegal."""
    child = p.ids.next_node[p.ids.nodes[p.items][..., :-1]]     # the nodes there; −1: none
    return at(p.ids.flows(p.batch.r), child)

# --- Rivals that do not make P = R/Z --------------------------------------------------------------
def sdpo(log_pf, log_ref, beta):
    """S-DPO (Chen et al. 2024) → scalar: P of the chosen item, path 0, shall rise above that of the
    rejected items d, the other paths. log P (C, J) is the policy's, log P_ref (C, J) that of SFT.
    Mean over contexts of −log σ(−log Σ_d exp(β[Δ_d − Δ_0])), Δ = log P − log P_ref."""
    delta = log_pf - log_ref
    margin = beta * (delta[:, 1:] - delta[:, :1])
    return -functional.logsigmoid(-margin.logsumexp(1)).mean()

def grpo(log_pf, log_ref, reward, beta):
    """GRPO (Shao et al. 2024), reinforcement learning: log P, log P_ref, a reward (ours: log R) of
    paths (C, J) → scalar. Paths with a reward above the mean become likelier, but P stays near
    P_ref, that of SFT.
    A = (reward − mean) / std, over a context's J paths; std with J − 1, at least 1e-8.
    Mean over paths of β · (x − log x − 1) − A · log P, x = P_ref / P."""
    std = reward.std(1, keepdim=True).clamp(min=1e-8)
    advantage = (reward - reward.mean(1, keepdim=True)) / std
    log_x = log_ref - log_pf
    # Ours: a step learns from new draws. So GRPO's ratio, P to P when drawn, is 1
    return (beta * (log_x.exp() - log_x - 1) - advantage * log_pf).mean()

def log_ref_of(p):
    """Of a Paths p: (C, J) log P by the policy after SFT."""
    with torch.no_grad():
        return p.reference(p.batch.packed, p.items)[0].sum(-1)

def sdpo_of(p):
    """S-DPO of a Paths p. If the chosen item was drawn once more, as another path, it is no
    rejected item: log P of that path becomes NEVER, which adds 0 to the sum."""
    again = p.items == p.items[:, :1]                           # (C, J)
    again[:, 0] = False                                         # path 0 itself
    return sdpo(p.log_pf.masked_fill(again, NEVER), log_ref_of(p), p.recipe.beta)

RECIPES |= {
    "db": dict(loss=lambda p: detailed_balance(path_flows(p), p.log_steps), dropout=0.1),
    "vargrad": dict(loss=lambda p: vargrad(p.log_pf, p.log_r), lam=3.0, dropout=0.1),
    "listnet": dict(loss=lambda p: listnet(p.log_pf, p.log_r), lam=300.0),
    # Ours: TB in which a few paths with large errors count less. Mean over all paths of
    # h(log Z + log P − log R); h(x) = x²/2 if |x| ≤ 1, else |x| − 1/2
    "tb-huber": dict(loss=lambda p: functional.huber_loss(p.log_z[:, None] + p.log_pf, p.log_r)),
    "sft-continued": dict(rate=9e-4, dropout=0.4),              # SFT, for longer
    # Ours: seven rejected items, in the paper three; drawn from P on real logs, too
    "sdpo": dict(loss=sdpo_of, chosen="logged", sampler="policy_draws", trajectories=7, beta=1.0,
                 rate=9e-4, dropout=0.2),
    "sdpo-reward": dict(loss=sdpo_of, chosen="reward", sampler="policy_draws", trajectories=7,
                        lam=100.0, rate=1e-3),
    "grpo": dict(loss=lambda p: grpo(p.log_pf, log_ref_of(p), p.log_r, p.recipe.beta),
                 beta=0.01, trajectories=16),       # with R instead of log R: fewer liked items
    "distill": dict(loss=lambda p: distillation(code_flows(p), p.log_probs), lam=30.0, dropout=0.2)}

# --- Fast: GPT-2 reads a history once, for all contexts of a row and their paths ------------------
# A user who took a b c d e f g h is 8 contexts: v is each of these items in turn. GPT-2 can predict
# a v after each item that it reads: so it reads a b c d once, for five contexts. A row is some
# places of a history, from 0, where v stands. If the window is 4, the items that GPT-2 may read:
#     places of v     GPT-2 reads       v             each after so many items
#     0 1 2 3 4       <user> a b c d    a b c d e     0 1 2 3 4
#     5 6             <user> c d e f    f g           3 4
#     7               <user> d e f g    h             4
# A row after the first has at most window / 2 places, so that GPT-2 reads enough before each v
def training_rows(histories, window):
    """Yield the rows (user, places) of all histories. Each item is v in one of them."""
    for user, history in enumerate(histories):
        # Where rows begin, here 0 5 7, and the end, 8
        cuts = [0, *range(window + 1, len(history), max(1, window // 2)), len(history)]
        for first, stop in zip(cuts, cuts[1:]):
            yield user, range(first, stop)

class Packed:
    """The tokens of B rows, and the C contexts in them, row by row."""
    def __init__(self, rows, histories, policy):
        first = policy.user_token               # <user>; the tokens of items come after it
        self.contexts = []                      # pairs (user, place of v)
        tokens = []                             # of each row: <user>, the items that are read
        row_of = []                             # the row of each context; above, 0 0 0 0 0 1 1 2
        ends = []                               # v is after so many items; above, 0 1 2 3 4 3 4 4
        for number, (user, places) in enumerate(rows):          # the second row: 1, (user, [5, 6])
            start = max(0, places[-1] - policy.window)          # 2
            read = histories[user][start:places[-1]]            # c d e f
            tokens.append(torch.tensor([first, *[first + 1 + item for item in read]]))
            self.contexts += [(user, place) for place in places]
            row_of += [number] * len(places)                    # 1 1
            ends += [place - start for place in places]         # 3 4
        self.histories = [histories[user][:place] for user, place in self.contexts]     # U
        self.tokens = torch.nn.utils.rnn.pad_sequence(                                  # (B, H)
            tokens, batch_first=True, padding_value=first).to(policy.semantic_ids.codes.device)
        self.row_of, self.ends = torch.tensor([row_of, ends], device=self.tokens.device)    # (C,)
        self.unseen = policy.semantic_ids.unseen(self.histories)        # (C, M + n) bool

def pack_histories(histories, policy):
    """The Packed of B histories, each a row of one context: v, unknown, stands at the end."""
    return Packed([(b, [len(past)]) for b, past in enumerate(histories)], histories, policy)

def batches(setup, policy, reward, rng):
    """One epoch of Batches, in random order. Rows of a Batch have like lengths: less padding."""
    def length(row):                                            # items that GPT-2 reads of it
        return min(row[1][-1], policy.window)
    rows = [setup.rows[r] for r in rng.permutation(len(setup.rows))]
    many = 32 * setup.size                                      # the rows of 32 Batches are sorted
    for start in range(0, len(rows), many):
        rows[start:start + many] = sorted(rows[start:start + many], key=length)
    for start in rng.permutation(range(0, len(rows), setup.size)):
        some = rows[start:start + setup.size]
        yield Batch(Packed(some, setup.data.train, policy), setup.data, reward)

def tree_mask(ends, H, J, L):
    """Which tokens does a code see? Bools (C, J·(L−1), H + J·(L−1)). GPT-2 reads H tokens of a
    history, then J branches: of each path, all codes but the last. In context c, a code sees the
    history up to token ends[c], and its own branch up to itself. After <user> a b, the branches
    1 2 and 3 4 belong to a context that ends at a:
    >>> print(" ", *"uab1234")
      u a b 1 2 3 4
    >>> for code, row in zip("1234", tree_mask(torch.tensor([1]), H=3, J=2, L=3)[0]):
    ...     print(code, *["x" if seen else "." for seen in row])
    1 x x . x . . .
    2 x x . x x . .
    3 x x . . . x .
    4 x x . . . x x
    """
    branch = torch.arange(J, device=ends.device).repeat_interleave(L - 1)
    own = (branch[:, None] == branch).tril()                    # same branch, not later
    past = torch.arange(H, device=ends.device) <= ends[:, None, None]               # (C, 1, H)
    return torch.cat([past.expand(-1, len(own), -1), own.expand(len(ends), -1, -1)], 2)

def read_packed(policy, packed, items):
    """Hidden states (C, J, L, d) of the prefixes s_0 … s_{L-1} on the paths of items (C, J). GPT-2
    reads a row once. Then it reads the codes of all paths: its cache holds what it knows of the
    row. (Padding comes last, so no token of a row sees it.)"""
    tokens, row_of, ends = packed.tokens, packed.row_of, packed.ends
    ids = policy.semantic_ids
    J = items.shape[1]
    cache = DynamicCache()
    hidden = policy.lm.transformer(tokens, cache).last_hidden_state                 # (B, H, d)
    root = hidden[row_of, ends][:, None, None].expand(-1, J, 1, -1)     # s_0: after U (C, J, 1, d)
    if ids.num_levels == 1:
        return root
    cache.batch_select_indices(row_of)                          # from a row each to a context each
    # Code c of level l is token l·K + c
    codes = ids.codes[items] + ids.num_codes * torch.arange(ids.num_levels, device=ends.device)
    mask = tree_mask(ends, tokens.shape[1], J, ids.num_levels)
    later = policy.lm.transformer(
        codes[..., :-1].flatten(1), cache, attention_mask=mask[:, None],
        # A code's position is the number of tokens before it that it sees
        position_ids=mask.sum(-1) - 1).last_hidden_state                 # (C, J·(L-1), d)
    return torch.cat([root, later.unflatten(1, (J, -1))], 2)

class Beams:
    """W beams of each of B users: the prefixes that are left, of equal length. GPT-2 reads a code
    once: its keys and values stay in a cache, those of dropped beams, too. `seen` says which keys a
    beam sees: of the history, and of its own codes. After <user> a, the beams 1 and 2 went on as
    1 3 and 2 4:
          u a 1 2 3 4
        3 x x x . x .
        4 x x . x . x
    With a guide (B, n) ≥ 0, ours, beam_search finds items of highest P · guide: a beam's score is
    log P + log G, G the sum of the guide over the unseen items below it."""
    def __init__(self, policy, histories, guide=None, temperature=1.0):
        packed = pack_histories(histories, policy)
        tokens, ends, self.unseen = packed.tokens, packed.ends, packed.unseen
        self.ids = policy.semantic_ids
        self.lm = policy.lm.transformer
        self.temperature = temperature
        self.level = 0                                          # number of codes so far
        self.node = torch.zeros_like(ends[:, None])             # (B, W = 1) the beams: at the root
        self.cache = DynamicCache()
        hidden = self.lm(tokens, self.cache).last_hidden_state
        self.hidden = hidden.take_along_dim(ends[:, None, None], 1)                 # (B, W, d)
        place = torch.arange(tokens.shape[1], device=tokens.device)
        self.seen = place <= ends[:, None, None]                # (B, W, keys) bool: all but padding
        self.log_guide = None                                   # log G (B, M + n)
        if guide is not None:
            guide = guide.to(tokens.device) * self.unseen[:, self.ids.num_prefixes:]
            self.log_guide = self.ids.flows(guide).clamp(min=1e-30).log()
            self.log_guide[:, 0] = 0                            # the search begins with a score 0

    def children(self):
        """Of all beams: the nodes of all next codes, −1 if illegal; log P_F of them (B, W, K). With
        a guide, + log G(child) − log G(beam): the sum over a path is its score."""
        K = self.ids.num_codes                  # code c of level l is token l·K + c
        head = self.lm.wte.weight[self.level * K:(self.level + 1) * K]              # (K, d)
        child = self.ids.legal_children(self.node, self.unseen)                     # (B, W, K)
        logits = (self.hidden @ head.T).masked_fill_(child < 0, NEVER)
        log_probs = (logits / self.temperature).log_softmax(-1)
        if self.log_guide is not None:
            log_probs += at(self.log_guide, child) - at(self.log_guide, self.node)[..., None]
        return child, log_probs

    def keep(self, child, best):
        """Go on with W of the children; best (B, W): w·K + c is code c of the old beam w. If fewer
        than W are legal, some new nodes are −1; log P of these is near NEVER, and stays so."""
        K = self.ids.num_codes
        parent, code = best // K, best % K
        self.node = child.flatten(1).gather(1, best)
        if self.level < self.ids.num_levels - 1:
            # The codes of W beams are W more keys. A beam sees what its parent saw, and itself
            W = best.shape[1]
            old = self.seen.take_along_dim(parent[..., None], 1)                    # (B, W, keys)
            itself = torch.eye(W, device=old.device).bool()
            self.seen = torch.cat([old, itself.expand(len(old), W, W)], 2)
            tokens = self.level * K + code                      # code c of level l: l·K + c
            self.hidden = self.lm(
                tokens, self.cache, attention_mask=self.seen[:, None],
                position_ids=self.seen.sum(-1) - 1).last_hidden_state       # as in read_packed
        self.level += 1

    def items(self, scores, k):
        """After the last level, the first k beams as items (B, k), −1: none, and scores (B, k)."""
        items = (self.node - self.ids.num_prefixes).clamp(min=-1)   # nodes of items come last
        items = functional.pad(items, (0, k), value=-1)[:, :k]
        scores = functional.pad(scores, (0, k))[:, :k]
        return items, scores.masked_fill(items < 0, -math.inf)

# --- A search that draws at random ----------------------------------------------------------------
def drawn_search(tree, k, beams):
    """Draw k items by the P_F of `tree`, none twice (Kool et al. 2019, stochastic beams): a race.
    Each item arrives at a random time, exponential with rate P: the likelier, the sooner. The first
    k are drawn. To run it down the tree, let a prefix arrive when the first item below it does:
    this time is exponential, too, and its rate is P of the prefix.
    1. A prefix has arrived at time t. Each of its children draws a time, with its own rate.
    2. The first child has to arrive at t. So the least time is subtracted from all, and t added: if
       t is 1, and .5 and .8 are drawn, 1 and 1.3. (Exponential times have no memory.)
    3. The W children that arrive first are the next beams. One item below each arrives with it; so
       the first k items are below the first k children, and W ≥ k beams are enough.
    The scores of items are −log(time)."""
    # P of the beams, and their times (B, W); the root may arrive at any time, here at 1
    p = time = torch.ones_like(tree.node, dtype=torch.float)
    for _ in range(tree.ids.num_levels):
        child, log_probs = tree.children()
        p = (p[..., None] * log_probs.exp()).clamp(min=1e-30)                       # (B, W, K)
        drawn = torch.empty_like(p).exponential_() / p          # exponential, with rate p
        # Time of a child = time of its prefix + (what it draws − the least that is drawn there)
        time = time[..., None] + drawn - drawn.amin(-1, keepdim=True)
        time = time.masked_fill(child < 0, 1e37).flatten(1)     # (B, W·K); illegal ones come last
        time, best = time.topk(min(beams, time.shape[1]), 1, largest=False)
        p = p.flatten(1).gather(1, best)
        tree.keep(child, best)
    return tree.items(-time.log(), k)

# --- Evaluation: leave one out, the whole catalogue, the same for every method --------------------
def recall_at(ranked, target, k):
    """Recall@k of users, floats (B,): is target (B,) in the first k of ranked (B, ≥ k)? −1 in
    ranked is an empty place. With one target, 1 if it is among ranked_1 … ranked_k, else 0."""
    return (ranked[:, :k] == target[:, None]).any(1).float()

def ndcg_at(ranked, target, k):
    """NDCG@k of users, floats (B,): one target (B,) each, in ranked (B, ≥ k); −1 counts as a place.
    1 / log2(r + 1) if the target is ranked_r, r from 1 to k; else 0. NDCG divides this by the best
    possible, which is 1 for one target."""
    hits = ranked[:, :k] == target[:, None]
    return (hits / torch.log2(torch.arange(2, hits.shape[1] + 2, device=hits.device))).sum(1)

def rank_all(recommend, histories):
    """The ten best items (B, 10) by recommend(histories), 256 users at a time."""
    parts = [histories[start:start + 256] for start in range(0, len(histories), 256)]
    return torch.cat([recommend(part)[0].cpu() for part in parts])

def validate(policy, data):
    """NDCG@10 on validation items of at most 2,000 users; leaves the policy in eval mode."""
    step = math.ceil(len(data.train) / 2000)
    # A history's last item is for the test, the one before it for validation; train has neither
    target = torch.tensor([history[-2] for history in data.histories[::step]])
    ranked = rank_all(policy.eval().recommend, data.train[::step])
    return ndcg_at(ranked, target, 10).mean().item()

def evaluate(recommend, data):
    """Rank last items by recommend(all before) → {metric: mean}, {metric: by user}, ten items."""
    ranked = rank_all(recommend, [history[:-1] for history in data.histories])
    target = torch.tensor([history[-1] for history in data.histories])
    by_user = {}
    for k in (5, 10):
        by_user[f"recall@{k}"] = recall_at(ranked, target, k).numpy()
        by_user[f"ndcg@{k}"] = ndcg_at(ranked, target, k).numpy()
    by_user |= report.exposure(ranked.numpy(), data)            # liked@10, if the truth is known
    by_user = {name: numbers.astype(float).round(6).tolist() for name, numbers in by_user.items()}
    metrics = {name: float(np.mean(numbers)) for name, numbers in by_user.items()}
    metrics["coverage@10"] = len(ranked[ranked >= 0].unique()) / len(data.titles)
    return metrics, by_user, ranked

# --- Saved models ---------------------------------------------------------------------------------
def save_policy(policy, folder):
    """Write a GPT-2 (config.json, model.safetensors; no flow head), then semantic_ids.json."""
    path = Path(folder) / "semantic_ids.json"
    path.unlink(missing_ok=True)        # load_model needs it, so it finds no half-written weights
    policy.lm.save_pretrained(folder)
    # safetensors lets the owner alone read the weights; here, all who may read config.json
    shutil.copymode(path.with_name("config.json"), path.with_name("model.safetensors"))
    ids = policy.semantic_ids
    report.write(path, {"num_codes": ids.num_codes, "codes": ids.codes.tolist(),
                        "beams": policy.beams, "catalogue": policy.catalogue})

def load_model(folder, dropout=0.0):
    """The saved Policy in eval mode, that of NAME+cm with its teacher; InputError if the folder
    holds none. dropout: for those who go on to train it."""
    try:
        table = json.loads((Path(folder) / "semantic_ids.json").read_text(encoding="utf-8"))
        ids = SemanticIDs(table["codes"], table["num_codes"])
        lm = GPT2LMHeadModel.from_pretrained(                   # safetensors: no pickle
            folder, use_safetensors=True, resid_pdrop=dropout, embd_pdrop=dropout)
        window = lm.config.n_positions - ids.num_levels         # as Policy has them: window + L
        policy = Policy(ids, window, beams=table["beams"], catalogue=table["catalogue"], lm=lm)
        check(lm.config.vocab_size == policy.user_token + 1 + len(ids.codes), "its IDs do not fit")
    except Exception as error:                                  # a wrong folder can raise anything
        raise InputError(f"{folder} holds no saved model of this version (untrained methods are "
                         f"never saved): {error}") from None
    guide = policy.catalogue.get("guide")
    if guide:                                                   # NAME+cm: fit its teacher again
        data = load_data(guide["data"]["name"], guide["data"]["quick"])
        check(guide["data"] == data.sizes, f"the data have changed since {folder}")
        policy.teacher = Teacher(guide["teacher"], data, guide["debias"], guide["sharp"])
    return policy.eval()

Policy.save_pretrained = save_policy                            # the names of transformers
Policy.from_pretrained = staticmethod(load_model)

# --- Settings: flags, names of methods ------------------------------------------------------------
@dataclass
class Settings:
    """All settings, each a command-line flag. REAL changes some of the defaults."""
    data: str = HfArg(default="toy", help="toy, ml-100k, beauty, or a folder of two CSV files")
    methods: str = HfArg(default="pop,cm,svd,svd:debias=.5,sft,tb,sft+cm",
                         help="comma-separated; with changes: tb:epochs=4:sampler=policy_beam")
    sft: str = HfArg(default="", help="changes in the recipe of sft, like epochs=12:rate=.003")
    recipe: str = HfArg(default="", help="changes in all other recipes, like epochs=6:w_s=0")
    seeds: str = HfArg(default="42", help="comma-separated: every method runs once with each")
    out: str = HfArg(default="", help="folder for results (default: runs/NAME-OF-DATA)")
    resume: bool = HfArg(default=False, help="keep the finished methods of a run that was killed")
    quick: bool = HfArg(default=False, help="a smoke run in seconds: 100 users, one epoch")
    device: str = HfArg(default="auto", help="where to train: auto, cuda, mps or cpu")
    ids: str = HfArg(default="mixed", help="content (text), mixed (text and log), or FILE.csv")
    codes: int = HfArg(default=0, help="K, codes a level (0: a power of 2, about n / 24)")
    levels: int = HfArg(default=3, help="L, levels of an ID: as in the paper's examples")
    window: int = HfArg(default=20, help="items of the history that are read: the last say most")
    width: int = HfArg(default=64, help="hidden size: 128 is enough for 10^4 items")
    layers: int = HfArg(default=2, help="transformer blocks: enough to compare items")
    batch: int = HfArg(default=16, help="rows a step: on a CPU, many small steps learn more")
    beams: int = HfArg(default=20, help="beam width, saved with a model: twice the ten items")
    oracle: str | None = HfArg(default=None, metadata={"nargs": "?", "const": "tb"},
                               help="train four users with this method's loss: is P = R/Z?")
    recommend: list[str] = HfArg(default_factory=list, help="print ten titles for this history")
    model: str = HfArg(default="", help="the saved model for --recommend, like runs/toy/tb-42")

FIELDS = {name: value for name, value in vars(Recipe()).items() if name != "loss"}     # defaults

def parse(argv):
    """Settings from the command line; a mistake ends in one line on stderr and status 2."""
    parser = HfArgumentParser(
        Settings, allow_abbrev=False, description=__doc__.splitlines()[0],
        epilog=f"methods: {', '.join(TEACHERS | RECIPES)}, NAME+cm (with a teacher). samplers: "
        f"{', '.join(SAMPLERS)}. fields of a recipe, to change in --methods, --sft and --recipe: "
        f"{', '.join(FIELDS)}. example: --methods sft,tb:trajectories=4,tb:debias=.5")
    parser.error = lambda message: parser.exit(2, f"error: {message}; see --help\n")
    real = real_of(parser.parse_args(argv).data)                # read first: it decides defaults
    parser.set_defaults(**real.get("Settings", {}))
    settings = Settings(**vars(parser.parse_args(argv)))
    if bool(settings.recommend) != bool(settings.model):
        parser.error("--recommend and --model go together")
    name = Path(settings.data).resolve().name
    settings.out = settings.out or f"runs/{name}" + "-quick" * settings.quick
    if settings.quick:                                          # one's own epochs come later, win
        settings.sft = f"epochs=1:{settings.sft}"
        settings.recipe = f"epochs=1:{settings.recipe}"
    return settings

REAL = {    # what real logs have instead: in Settings, in Recipe, in some methods
    "Settings": dict(methods="pop,cm,blend,sft,tb-huber,sft+cm", width=128, layers=3, batch=64),
    "Recipe": dict(teacher="blend", debias=0.0, sharp=4.0, lam=3.0, rate=1.5e-3, epochs=5,
                   sampler="reward_draws", trajectories=2),
    "sft": dict(dropout=0.2, epochs=8),
    "sft-continued": dict(dropout=0.2, rate=4.5e-4),
    "vargrad": dict(sampler="policy_draws", trajectories=8),
    "grpo": dict(sampler="policy_draws", trajectories=8),
    "listnet": dict(sampler="policy_draws", trajectories=8, lam=30.0),
    "distill": dict(lam=3.0)}

def real_of(data):
    """REAL, or {} if the data are a made-up world, one with truth.csv."""
    return {} if data == "toy" or (Path(data) / "truth.csv").exists() else REAL

def recipe_of(name, settings):
    """The Recipe of a method like tb:epochs=4, or InputError. What stands lower wins:
        defaults        of Recipe; on real logs REAL["Recipe"] changes them
        the method      RECIPES["tb"]; on real logs, REAL["tb"] as well
        the flag        --recipe; but sft has --sft, and a teacher alone has none
        the name        :epochs=4"""
    base, *changes = name.split(":")                            # "tb", ["epochs=4"]
    flag = settings.recipe.split(":")
    if base in TEACHERS:                                        # a teacher alone
        method = dict(teacher=base, debias=0.0, sharp=1.0)
        used = ["debias"]                                       # fields that change what it does
        flag = []
    elif base.endswith("+cm") and base.removesuffix("+cm") in RECIPES:
        method = dict(sharp=9.0)
        used = ["teacher", "debias", "sharp"]
    else:
        check(base in RECIPES, f"there is no method {base!r}; there are "
              f"{', '.join(TEACHERS | RECIPES)}, and NAME+cm")
        method = RECIPES[base]
        used = [*FIELDS] if "loss" in method else ["rate", "dropout", "epochs"]
    if base == "sft":
        flag = []
        changes = settings.sft.split(":") + changes
    odd = [change for change in changes if change.partition("=")[0] not in ("", *used)]
    odd += RECIPES.get(base, {}).keys() - {"loss", *used}       # a method may be your own
    check(not odd, f"{name}: of {base}, one can change {', '.join(used)}, not {odd}")
    real = real_of(settings.data)
    defaults = {what: value for what, value in real.get("Recipe", {}).items() if what in used}
    fields = defaults | method | real.get(base, {})             # of two values, the later one
    loss = fields.pop("loss", None)
    texts = [f"{what}={value}" for what, value in fields.items()] + flag + changes
    # A parser checks fields and values. Of --epochs=8 --epochs=4, the last wins
    parser = HfArgumentParser(Recipe, allow_abbrev=False, add_help=False)
    parser.error = lambda message: check(False, f"{name}: {message}; fields are {[*FIELDS]}")
    parser.set_defaults(loss=loss)
    recipe = Recipe(**vars(parser.parse_args([f"--{text}" for text in texts if text])))
    check_numbers(f"{name}: ", recipe)
    for what, there in {"sampler": SAMPLERS, "teacher": TEACHERS}.items():
        check(getattr(recipe, what) in there, f"{name}: {what} has to be one of {[*there]}")
    compares = base in ("grpo", "vargrad", "listnet")
    check(recipe.trajectories > 1 or not compares, f"{name}: it compares paths: trajectories > 1")
    return recipe

# --- The experiment: data → IDs, teacher → SFT → fine-tuned policies → table ----------------------
def run(settings):
    """The whole job → results."""
    recipes, seeds = check_settings(settings)
    data = load_data(settings.data, settings.quick)             # a Dataset
    versions = {module.__name__: module.__version__ for module in (torch, transformers, np)}
    about = {"data": data.sizes, "settings": vars(settings), "versions": versions}
    setups = [Setup(seed, data, settings) for seed in seeds]
    jobs = [(name, setup) for setup in setups for name in recipes]
    made = {}                                   # {job: what its run depends on}
    kept = {}                                   # {job: its finished run}
    for job in jobs:                            # InputError if --out has it with other settings
        name, setup = job
        made[job] = made_with(name, setup, recipes)
        found = report.earlier_run(setup.folder(name) / "run.json", made[job])
        if found and settings.resume:
            kept[job] = found
            print(f"{name}, seed {setup.seed}: kept, as it was finished")
    for name, recipe in recipes.items():
        if (name, setups[0]) not in kept:
            try_out(name, recipe, setups[0])
    runs = [kept.get(job) or run_method(*job, recipes[job[0]], made[job]) for job in jobs]
    return report.finish(settings.out, runs, about, data)

def check_settings(settings):
    """Check the settings, set the device → {method: Recipe}, what they need first; seeds."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    devices = [device for device, found in there.items() if found]
    if settings.device == "auto":
        settings.device = devices[0]
    check(settings.device in devices, f"--device {settings.device}: there is only {devices}")
    check_numbers("--", settings)
    seeds = [seed.strip() for seed in settings.seeds.split(",")]
    whole = all(seed.isdecimal() and len(seed) < 19 for seed in seeds)
    check(whole, f"--seeds {settings.seeds} are not numbers like 42,43")
    # Methods may be your own
    odd = [name for name, own in RECIPES.items() if name in TEACHERS or not isinstance(own, dict)]
    check(not odd, f"RECIPES: {odd}: it has to be a dict, and not the name of a teacher")
    names = []
    for name in map(str.strip, settings.methods.split(",")):
        base = name.partition(":")[0]
        if base not in TEACHERS:
            names.append("sft")                                 # all others start from it
        if base.endswith("+cm"):
            names.append(base.removesuffix("+cm"))              # the policy to be guided
        names.append(name)
    # A mistake in a name is told before the data are read
    recipes = {name: recipe_of(name, settings) for name in dict.fromkeys(names)}
    if settings.quick:
        print("--quick: the figures below mean nothing; they only show that everything works")
    return recipes, list(dict.fromkeys(map(int, seeds)))

class Setup:
    """What all methods of one seed share, made from training items alone."""
    def __init__(self, seed, data, settings):
        self.seed = seed                                        # of IDs, new policies, training
        self.data = data
        self.settings = settings
        self.rows = list(training_rows(data.train, settings.window))
        # Rows of a batch: settings.batch, or of a small log a 20th
        self.size = min(settings.batch, math.ceil(len(self.rows) / 20))
        self.measure = partial(validate, data=data)             # policy → what an epoch prints
        self.measured = "validation NDCG@10"

    @cached_property                                            # untrained methods need none
    def ids(self):
        """The SemanticIDs that --ids asks for: k-means on features of items, or those of a file."""
        settings = self.settings
        n = len(self.data.titles)
        if settings.ids in ("content", "mixed"):
            # K: the next power of 2 from the smaller of n / 24 and 512 on, so large that K^L ≥ n
            least = max(2, min(n / 24, 512), n ** (1 / settings.levels))
            K = settings.codes or 2 ** math.ceil(math.log2(least))
            check(settings.codes <= n, f"--codes {K}: more than the {n} items")
            print(f"seed {self.seed}: {n} semantic IDs of {settings.levels} codes, 0 to {K - 1}")
            features = item_features(settings.ids, self.data.texts, self.data.train, self.seed)
            ids = SemanticIDs.fit(features, K, settings.levels, self.seed)
        else:
            check("." in settings.ids, f"--ids {settings.ids} is not content, mixed or a file")
            codes = read_ids(settings.ids, self.data.item_ids)
            ids = SemanticIDs(codes, max(map(max, codes)) + 1)
        return ids.to(settings.device)

    def folder(self, name):
        """Where a method's run.json and model are; without ":", which some systems forbid."""
        return Path(self.settings.out) / f"{name.replace(':', ',')}-{self.seed}"

    def saved(self, name, dropout=0.0):
        """The policy that a method has saved."""
        return load_model(self.folder(name), dropout).to(self.settings.device)

    def policy(self, dropout=0.0):
        """A new policy."""
        settings = self.settings
        torch.manual_seed(self.seed)
        catalogue = {"item_ids": self.data.item_ids, "titles": self.data.titles}
        return Policy(self.ids, settings.window, settings.width, settings.layers, dropout,
                      settings.beams, catalogue).to(settings.device)

    def teacher(self, recipe):
        """The teacher of a recipe, its scores as debias and sharp say."""
        return Teacher(recipe.teacher, self.data, recipe.debias, recipe.sharp)

    def reward(self, recipe):
        """The comprehensive reward of a recipe."""
        return Reward(self.ids, self.teacher(recipe), (recipe.w_a, recipe.w_y, recipe.w_s))

def made_with(name, setup, recipes):
    """All that a run depends on, except code: --resume compares it."""
    made = {"data": {what: size for what, size in setup.data.sizes.items() if what != "name"}}
    parts = [name]
    if name.partition(":")[0] not in TEACHERS:                  # all others start from SFT
        made["IDs (--ids, --codes, --levels)"] = zlib.crc32(setup.ids.codes.cpu().numpy())
        for what in "window width layers batch beams".split():
            made[f"--{what}"] = getattr(setup.settings, what)
        parts = ["sft", name.partition("+cm")[0], name]         # NAME of NAME+cm, and itself
    for part in parts:
        made |= {f"{part}: {what}": getattr(recipes[part], what) for what in FIELDS}
    return made

def check_drawn(items, recipe, batch):
    """InputError unless a sampler, maybe your own, drew N items of each context, all unseen."""
    C, n = batch.r.shape
    wanted = [torch.int64, C, recipe.trajectories]
    found = [items.dtype, *items.shape] if torch.is_tensor(items) else type(items).__name__
    asked = f"sampler {recipe.sampler}(batch, count, policy, progress) has to return"
    check(found == wanted, f"{asked} a tensor of items (C, N), here {wanted}, not {found}")
    unseen = 0 <= items.min() and items.max() < n and batch.r.gather(1, items).min() > 0
    check(unseen, f"{asked} items from 0 to {n - 1} that are not in batch.histories")

def check_loss(loss, recipe):
    """InputError unless a loss, maybe your own, is one number with a gradient."""
    if not (torch.is_tensor(loss) and loss.shape == () and loss.requires_grad):
        name = getattr(recipe.loss, "__name__", recipe.loss)
        raise InputError(f"loss {name}: it has to return a tensor of one number that depends on P, "
                         f"not {loss!r}")

def try_out(name, recipe, setup):
    """One step with an untrained policy: a mistake in your own teacher, sampler or loss shows now,
    not after hours."""
    if recipe.loss:
        policy = setup.policy()
        batch = next(batches(setup, policy, setup.reward(recipe), np.random.default_rng(0)))
        loss = loss_of(recipe, policy, policy, batch, 0.0)
        check(torch.isfinite(loss), f"{name}: with an untrained policy, the loss is {loss}")
        loss.backward()
    elif "+cm" in name or name.partition(":")[0] in TEACHERS:
        setup.teacher(recipe).scores(setup.data.train[:2])

def run_method(name, setup, recipe, made):
    """Train and test one method with one seed → its entry of results.json["runs"]. made: what
    made_with says of it."""
    data = setup.data
    fields = {what: getattr(recipe, what) for what in FIELDS}
    changes = [f"{what}={value}" for what, value in fields.items() if value != FIELDS[what]]
    print(f"{name}, seed {setup.seed}: {':'.join(changes) or 'as Recipe says'}")
    finished = setup.folder(name) / "run.json"
    finished.parent.mkdir(parents=True, exist_ok=True)          # fails now, not after training
    for file in (finished, finished.with_name("semantic_ids.json")):
        file.unlink(missing_ok=True)                            # the old run goes when a new begins
    started = time.time()
    model, curve = model_of(name, recipe, setup)
    middle = time.time()
    metrics, by_user, ranked = evaluate(model.recommend, data)
    entry = {"method": name, "seed": setup.seed, "data": data.sizes["name"], "recipe": fields,
             "metrics": metrics, "curve": curve, "by_user": by_user,
             "lists": ranked.tolist() if data.truth else [],
             "seconds": {"train": middle - started, "eval": time.time() - middle}}
    report.write(finished, {"made_with": made, **entry})
    return entry

def model_of(name, recipe, setup):
    """Train a method, or put it together → its model, with recommend(histories), and its curve."""
    base = name.partition(":")[0]
    if base in TEACHERS:
        return setup.teacher(recipe), []
    if base.endswith("+cm"):
        policy = setup.saved(base.removesuffix("+cm"))
        # What load_model needs to fit the teacher again
        policy.catalogue["guide"] = {"data": setup.data.sizes, "teacher": recipe.teacher,
                                     "debias": recipe.debias, "sharp": recipe.sharp}
        save_policy(policy, setup.folder(name))
        policy.teacher = setup.teacher(recipe)
        return policy, []
    if base == "sft":
        policy = setup.policy(recipe.dropout)
    else:
        policy = setup.saved("sft", recipe.dropout)
    curve = train(name, recipe, policy, setup)
    save_policy(policy, setup.folder(name))
    return setup.saved(name), curve                             # tested as it was saved

# --- The oracle: does P reach R/Z? ----------------------------------------------------------------
@torch.no_grad()
def distribution(policy, histories):
    """P(v | U) of every item (B, n); 256 paths at a time, or tree_mask would be too large."""
    policy.eval()
    parts = torch.arange(len(policy.semantic_ids.codes)).expand(len(histories), -1).split(256, 1)
    steps = [policy.path_log_probs(histories, items) for items in parts]            # (B, 256, L)
    return torch.cat(steps, 1).sum(-1).exp().cpu()

def run_oracle(settings):
    """Train from random weights on four users' last training items: does P reach R/Z?"""
    _, seeds = check_settings(settings)
    changes = "gr=0:lam=1:sampler=policy_draws:trajectories=64:rate=.002:epochs=15"
    settings = replace(settings, recipe=f"{changes}:{settings.recipe}")     # one's own come later
    recipe = recipe_of(settings.oracle, settings)
    check(recipe.loss, f"--oracle {settings.oracle}: it needs a method with a loss of paths")
    data = load_data(settings.data, settings.quick)
    setup = Setup(seeds[0], data, settings)
    policy = setup.policy()
    rows = [(user, [len(items) - 1]) for user, items in enumerate(data.train[:4])]
    batch = Batch(Packed(rows, data.train, policy), data, setup.reward(recipe))
    target = (batch.r / batch.r.sum(1, keepdim=True)).cpu()     # R/Z of the four (4, n)
    def distance(policy):
        return (distribution(policy, batch.histories) - target).abs().sum(1).mean().item()
    setup.measure = distance
    setup.measured = "L1 distance of P from R/Z"
    setup.rows = 100 * rows                                     # an epoch: each context 100 times
    setup.size = 4
    try_out(settings.oracle, recipe, setup)
    path = Path(settings.out) / "oracle.png"
    path.parent.mkdir(parents=True, exist_ok=True)              # fails now, not after training
    curve = train(settings.oracle, recipe, policy, setup)
    print("mean L1 distance of P from R/Z (2 at most): {:.4f} before, {:.4f} after; {}".format(
        curve[0]["score"], curve[-1]["score"], path))
    panels = {"R/Z": target[0], "P": distribution(policy, batch.histories)[0]}
    report.figures.plot_flows(path, setup.ids.codes.cpu(), data.titles, panels)

# --- Command line ---------------------------------------------------------------------------------
def print_recommendations(settings):
    """Ten titles by a saved model, best first, for a history of titles or ids, oldest first."""
    model = load_model(settings.model)
    titles = model.catalogue["titles"]
    history = [find_item(name, model.catalogue["item_ids"], titles) for name in settings.recommend]
    items, _ = model.recommend([history])
    check(items.max() >= 0, "the history has all items: none is left")
    print(*[titles[item] for item in items[0].tolist() if item >= 0], sep="\n")

def main(settings):
    """Do what the settings ask for → exit status; a mistake is one line on stderr."""
    try:
        if settings.recommend:
            print_recommendations(settings)
        elif settings.oracle:
            run_oracle(settings)
        else:
            run(settings)
        return 0
    except KeyboardInterrupt:
        print("stopped; --resume keeps the finished methods of a run", file=sys.stderr)
        return 130
    except Exception as error:
        print(report.one_line(error), file=sys.stderr)
        return 2

if __name__ == "__main__":
    sys.exit(main(parse(sys.argv[1:])))
