"""GFlowGR: fine-tune a generative recommender so that P(item | user) follows a reward.

A generative recommender reads a user's history and writes the semantic ID of the next item, code
by code. Supervised fine-tuning (SFT) on the log teaches what was shown, not what the user would
like: exposure bias. GFlowGR reads an ID as a path down a tree and trains a GFlowNet on it, with a
loss called trajectory balance (TB): the probability of an item shall be proportional to its reward
R. R mixes the logged action, the score of a collaborative model (CM) and the similarity of IDs.
This file is the method, down to `beam_search`; then the experiment.

A context (U, v): a user's history, the item logged next. s_0 … s_L are the prefixes of an ID, a
path; P_F(s_{l+1} | s_l) is the policy's P of the next code; the flow F(s) is the sum of R below s.
Letters in shapes: B users or rows of a batch, C contexts, J paths at each context, L levels of an
ID, K codes at each level, n items, d width of the model, W beams of a user. A node of the tree is a
number: 0 is the root, then come the other prefixes, then the n items; −1 stands for no node.
"""
import argparse
import copy
import inspect
import json
import math
import os
import re
import sys
import time
import zlib
from collections import namedtuple
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")       # models as small as these: one thread is best
import numpy as np
import safetensors.torch
import torch
import transformers
from torch.nn import functional
from tqdm import tqdm
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, get_cosine_schedule_with_warmup
from transformers.hf_argparser import HfArg, HfArgumentParser, string_to_bool

from data import InputError, check, find_item, load_data, read_ids, report
from reward import CollaborativeModel, Debiased, Guided, Reward
from tokenizer import SemanticIDs, entries, item_features

NEVER = -1e9                            # log P of what is illegal; not −inf, since 0 · −inf is nan

# --- Losses: pure functions of tensors, natural logs ----------------------------------------------
def trajectory_balance(log_z, log_pf, log_r):
    """TB (Malkin et al. 2022): log Z(U) (C,), log P and log R of J whole paths (C, J) → scalar.
    Each context has its own Z(U), the sum of R over all items. A general graph would also subtract
    log P_B of the backward policy; in a tree, one way leads to each prefix s_l, so P_B = 1.
    >>> log_pf, log_r = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    >>> round(trajectory_balance(torch.zeros(1), log_pf, log_r).item(), 4)   # (0 + (log 1/2)²) / 2
    0.2402

    Mean over all paths of (log Z(U) + Σ_l log P_F(s_{l+1} | s_l) − log R(s_L))²."""
    return (log_z[:, None] + log_pf - log_r).square().mean()

def huber_balance(log_z, log_pf, log_r):
    """Ours: TB, but a few paths with R far from P cannot outweigh all others. Shapes as in TB.
    Mean of h(log Z(U) + log P − log R): h(x) = x²/2 up to 1 nat, |x| − 1/2 beyond."""
    return functional.huber_loss(log_z[:, None] + log_pf, log_r)

def vargrad(log_pf, log_r):
    """VarGrad (Richter et al. 2020), TB that needs no log Z: log P, log R of paths (C, J) → scalar.
    At P = R/Z, log R − log P is log Z(U) on all paths of a context; its mean over them replaces
    log Z(U). So TB becomes the variance (with 1/J) of log P − log R, averaged over contexts."""
    return (log_pf - log_r).var(1, correction=0).mean()

def detailed_balance(log_flow, log_pf):
    """Detailed balance (DB, Bengio et al. 2023) → scalar. log_flow (C, J, L+1): log F of the
    prefixes s_0 … s_L of each path, F(s_L) = R; log_pf (C, J, L): log P_F of each of its steps.
    Mean over all paths of Σ_l (log F(s_l) + log P_F(s_{l+1} | s_l) − log F(s_{l+1}))²."""
    return (log_flow[..., :-1] + log_pf - log_flow[..., 1:]).square().sum(-1).mean()

def distillation(child_flow, log_probs):
    """Ours, KL(R/Z ‖ P): flows F* (sums of R) of all children (C, J, L, K), log P_F of all codes
    (C, J, L, K) → scalar. TB and DB see only the codes that a path takes. This loss compares all
    children at each step. Its minimum is P = R/Z; on paths drawn ∝ R it is KL(R/Z ‖ P) of items.
    Mean over paths of Σ_l Σ_c q(c) · (log q(c) − log P_F(c | s_l)), q(c) = F*(c) / F*(s_l)."""
    target = child_flow / child_flow.sum(-1, keepdim=True)      # q; 0 for an illegal child
    return (target * (target.clamp(min=1e-30).log() - log_probs)).sum((-2, -1)).mean()

def sdpo(policy_pos, policy_neg, ref_pos, ref_neg, beta):
    """S-DPO (Chen et al. 2024) → scalar: the chosen item p above the rejected items d. policy_*,
    ref_*: log P by the policy, by a frozen reference; *_pos (C,) of p, *_neg (C, J−1) of the d.
    Mean over contexts of −log σ(−log Σ_d exp(β[Δ_d − Δ_p])), Δ = log P_policy − log P_reference."""
    margin = beta * ((policy_neg - ref_neg) - (policy_pos - ref_pos)[:, None])
    return -functional.logsigmoid(-margin.logsumexp(1)).mean()

def grpo(log_pf, log_ref, log_r, beta):
    """GRPO (Shao et al. 2024), a maximiser of R: log P, log P_ref, log R of paths (C, J) → scalar.
    Its paths are new draws by P (ours: no item twice), so P / P_old is 1, the ratio's ∇ is ∇ log P.
    A = (R − mean R) / std R over a context's J paths: std with J − 1, at least 1e-8; A is constant.
    Mean over paths of β · (x − log x − 1) − A · log P, x = P_ref / P: a KL, and the gain of R."""
    r = log_r.exp()
    advantage = (r - r.mean(1, keepdim=True)) / r.std(1, keepdim=True).clamp(min=1e-8)
    log_x = log_ref - log_pf
    return (beta * (log_x.exp() - log_x - 1) - advantage * log_pf).mean()

# --- What a method is, and what a step of training works on ---------------------------------------
@dataclass
class Recipe:
    """How a method is trained; `--methods tb:epochs=4` changes a field."""
    loss: object = None             # L_GFN, a function (arguments: known_of); None: SFT, L_GR alone
    gr: float = 0.0                 # weight of L_GR; 0, ours: R rewards v, so its path is not added
    lam: float = 1.0                # λ, weight of L_GFN; if gr = 0, it only changes what is clipped
    sampler: str = "reward_draws"   # of SAMPLERS: where the N sampled paths come from
    trajectories: int = 2           # N: the paper's best is about 3
    chosen: str = "logged"          # S-DPO's chosen item: the "logged" one, or drawn ∝ "reward"
    exact: bool = True              # ours: F(s), Z(U) are sums of R, since R of all items is known;
                                    # False: flow_head learns them, if the loss needs them
    # R = w_a·r_a + w_ŷ·r_ŷ + w_s·r_s + .001/m, m unseen items; r_ŷ and r_s each sum to 1
    w_a: float = 0.3                # r_a: 1 at the logged item v if it is liked, .1 if only clicked
    w_y: float = 0.65               # r_ŷ: the scores of the teacher
    w_s: float = 0.05               # r_s ∝ number of levels with the same code as v
    teacher: str = "product"        # r_ŷ: "cm", its score; or "product", ours: P_SFT · CM^γ for the
                                    # --beams items that a beam search returns, 0 for others
    gamma: float = 2.0              # γ of the product
    debias: float = 0.0             # δ, ours: the CM's scores are divided by popularity^δ
    beta: float = 0.1               # S-DPO, GRPO: how strongly P is held near that of SFT
    rate: float = 1.5e-3            # peak learning rate: small models like it high
    dropout: float = 0.0            # none is needed if R rewards many items; L_GR over-fits
    epochs: int = 7                 # passes over the training log

@dataclass
class Batch:
    """B rows, each a part of a user's history. Every target v in it makes a context: v and the
    history before it. A user's first row, targets a, b, c, reads <user>, a, b at places 0, 1, 2
    (c is only predicted). The history before a ends at place 0, of b at 1, of c at 2: the `ends`.
    H tokens and T targets in the longest row; contexts go row by row, without padding."""
    tokens: torch.Tensor            # (B, H) <user>, the items read, padding on the right
    ends: torch.Tensor              # (B, T) where the history of each target ends; −1: padding
    users: list                     # the user of each of C contexts
    histories: list                 # C lists: the user's items before the target
    following: list                 # C lists: the target and the user's later training items
    positives: torch.Tensor         # (C,) the targets v
    liked: torch.Tensor             # (C,) bool: v was liked, not only clicked
    unseen: torch.Tensor            # (C, nodes) bool: True at a node with an unseen item below it
    scores: torch.Tensor = None     # (C, n) the teacher's, of sum 1; SFT needs none
    r: torch.Tensor = None          # (C, n) R of every item; SFT needs none

    def fill(self, reward):
        """Compute the teacher's scores, and R of all items, 0 at seen ones. The CM counts what
        follows what in the log; the counts from this history to `following` are taken out: v must
        not leak. (With the product it does: P_SFT was trained on v.)"""
        device = reward.ids.codes.device
        self.positives = self.positives.to(device)
        self.scores = reward.teacher.scores(self.histories, self.following).to(device)
        unseen = self.unseen[:, reward.ids.num_prefixes:].to(device)    # (C, n): nodes of items
        self.r = reward(self.scores, self.positives, self.liked.to(device), unseen)

# --- The policy: P_F(next code | user, codes so far) ----------------------------------------------
def tree_mask(ends, H, L):
    """Which places see which in a packed row: floats (B, S, S), 0 where i sees j, else NEVER.
    A row is H tokens of history, <user> first, then E branches of L−1 codes: S = H + E·(L−1). A
    place of the history sees itself and all before it. A code of branch e in row b sees the history
    up to place ends[b, e], and its own branch up to itself; ends (B, E).
    <user> a b, with the codes 1 2 after a, and 3 4 after b:
    >>> for place, row in zip("uab1234", tree_mask(torch.tensor([[1, 2]]), H=3, L=3)[0]):
    ...     print(place, *["x" if x == 0 else "." for x in row])
    u x . . . . . .
    a x x . . . . .
    b x x x . . . .
    1 x x . x . . .
    2 x x . x x . .
    3 x x x . . x .
    4 x x x . . x x
    """
    branch = torch.arange(ends.shape[1], device=ends.device).repeat_interleave(L - 1)
    branch = functional.pad(branch, (H, 0), value=-1)           # (S,) −1: the history
    own = (branch[:, None] == branch).tril()                    # (S, S) same branch, not later
    place = torch.arange(len(branch), device=ends.device)
    # (B, S) how far into the history a place sees: up to itself; a code of branch e, to ends[b, e]
    last = torch.cat([place[:H].expand(len(ends), H), ends.repeat_interleave(L - 1, 1)], 1)
    return torch.where(own | (place <= last[..., None]), 0.0, NEVER)                # (B, S, S)

class Policy(torch.nn.Module):
    """A small GPT-2 that reads a history and writes a semantic ID, plus the table of IDs.
    Tokens: code c of level l is l·K + c; L·K is <user>, which begins each row, and pads it. An item
    i of a history is one token, L·K + 1 + i (ours: its L codes would take L tokens). A row is
    packed as in `tree_mask`, with the first L−1 codes of each path (the last is only predicted)."""
    def __init__(self, semantic_ids, window=20, width=128, layers=3, dropout=0.2, beams=20,
                 catalogue=None, lm=None):
        super().__init__()
        self.semantic_ids = semantic_ids
        self.window = window
        self.beams = beams                                      # beam width of recommend
        self.catalogue = catalogue or {}                        # item_ids and titles, for saving
        self.user_token = semantic_ids.num_levels * semantic_ids.num_codes
        self.lm = lm or GPT2LMHeadModel(GPT2Config(             # from scratch, not pretrained
            vocab_size=self.user_token + 1 + len(semantic_ids.codes), n_embd=width, n_layer=layers,
            n_head=math.gcd(width, max(1, width // 32)),        # a divisor, at most width / 32
            n_positions=window + semantic_ids.num_levels,       # <user>, items, L−1 codes
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=0.0,   # dropout here is slow
            bos_token_id=self.user_token, eos_token_id=self.user_token,
            activation_function="gelu_pytorch_tanh"))           # gelu_new's values, faster on CPU
        self.flow_head = torch.nn.Linear(self.lm.config.n_embd, 1)   # log F(s); log Z(U) at s_0
        for parameter in self.flow_head.parameters():
            torch.nn.init.zeros_(parameter)                     # log Z ≈ 0: R's weights sum to 1

    def tokens(self, histories):
        """Tokens (B, H): <user>, the last `window` items, padding; ends (B, 1): the last item."""
        rows = [[-1, *history[-self.window:]] for history in histories]     # −1 becomes <user>
        return pad(rows, -1) + self.user_token + 1, torch.tensor([[len(row) - 1] for row in rows])

    def forward(self, tokens, ends, unseen, items):
        """Of a Batch: tokens (B, H), ends (B, T), −1 is padding, unseen (C, nodes); items (C, J).
        Returns, on the paths of the items: log P_F of each step (C, J, L), log P_F of all codes
        (C, J, L, K), near NEVER if illegal, and the learned log F of s_0 … s_{L-1} (C, J, L)."""
        ids = self.semantic_ids
        device = ids.codes.device
        tokens, ends, unseen, items = (x.to(device) for x in (tokens, ends, unseen, items))
        H = tokens.shape[1]
        L = ids.num_levels
        J = items.shape[1]
        valid = ends >= 0
        # The J items of a context become J branches of its row, E = T·J; padding gets item 0
        packed = items.new_zeros(*ends.shape, J)                                    # (B, T, J)
        packed[valid] = items
        ends = ends.clamp(min=0).repeat_interleave(J, 1)                            # (B, E)
        levels = torch.arange(L, device=device)
        code_tokens = ids.codes[packed.flatten(1)] + ids.num_codes * levels         # (B, E, L)
        mask = tree_mask(ends, H, L)
        # A place's position is the number of places that it sees, less 1
        hidden = self.lm.transformer(
            torch.cat([tokens, code_tokens[..., :-1].flatten(1)], 1), attention_mask=mask[:, None],
            position_ids=(mask == 0).sum(-1) - 1, use_cache=False).last_hidden_state    # (B, S, d)
        root = hidden.take_along_dim(ends[..., None], 1)        # (B, E, d) s_0: the history's end
        later = hidden[:, H:].unflatten(1, (ends.shape[1], L - 1))                  # (B, E, L-1, d)
        prefixes = torch.cat([root[:, :, None], later], 2)      # (B, E, L, d) s_0 … s_{L-1}
        prefixes = prefixes.unflatten(1, (-1, J))[valid]        # (C, J, L, d) back to contexts
        # A level's output weights are its codes' embeddings (all levels at once: it is faster)
        heads = self.lm.transformer.wte.weight[:self.user_token].unflatten(0, (L, -1))  # (L, K, d)
        logits = torch.einsum("cjld,lkd->cjlk", prefixes, heads).float()            # (C, J, L, K)
        states = ids.nodes[items][..., :-1]                     # (C, J, L) nodes s_0 … s_{L-1}
        # Node that each code leads to; −1 if illegal: no unseen item is below
        child = ids.legal_children(states.flatten(1), unseen).view_as(logits)       # (C, J, L, K)
        log_probs = logits.masked_fill(child < 0, NEVER).log_softmax(-1)
        log_steps = log_probs.gather(-1, ids.codes[items][..., None])[..., 0]       # (C, J, L)
        return log_steps, log_probs, self.flow_head(prefixes)[..., 0]

    def path_log_probs(self, histories, items):
        """log P_F of each step on the paths of items (B, J) after B histories → (B, J, L). On the
        path of a seen item, the first illegal step is near NEVER, and so is the sum."""
        tokens, ends = self.tokens(histories)                   # one target, after all items
        unseen = self.semantic_ids.unseen(histories)
        return self(tokens, ends, unseen, torch.as_tensor(items))[0]

    def recommend(self, histories, k=10, beams=None, guide=None, sample=0.0):
        """The k best items of B histories: items (B, k), best first, and their scores (B, k).
        Never an item of the history, never a duplicate; −1 and −inf where fewer than k are unseen.
        Beam search over legal codes: the score of a prefix is Σ log P_F of its codes, and the best
        max(beams or self.beams, k) of a user go on to the next level: exact with enough beams.
        guide (B, n) ≥ 0 multiplies P: the score of an item is log P + log guide, that of a prefix
        Σ log P_F + log(sum of guide over the unseen items below it).
        sample > 0, a temperature, draws k items at random instead, without replacement: codes ∝
        P_F^(1/sample) · Σ guide over the items below. The scores are noisy then.
        Raises InputError for an item that is not in the catalogue."""
        return beam_search(self, histories, k, max(beams or self.beams, k), guide, sample)

    def save_pretrained(self, folder):
        """Write config.json, model.safetensors (plain GPT-2), IDs and titles; no flow_head."""
        save_model(self, folder)

    @classmethod
    def from_pretrained(cls, folder, dropout=0.0):
        """The saved Policy in eval mode, or InputError."""
        return load_model(folder, dropout, guided=False)

# --- The adaptive trajectory sampler: which items to learn from -----------------------------------
# Functions (batch, N, policy, progress) → unseen items (C, N); progress: share of training done
def draw(weight, count):
    """N = count items per context (C, N), with replacement, ∝ weight (C, n)."""
    # torch is slow at drawing one item, so draw two at least, and keep `count`
    return torch.multinomial(weight, max(2, count), replacement=True)[:, :count]

def session(batch, count, policy, progress):
    """The paper's first: other items of the user's log (ours: later ones alone); else v."""
    weight = torch.zeros_like(batch.r)
    weight[entries(batch.following)] = 1                        # row and column of each item
    weight.scatter_(1, batch.positives[:, None], 1e-6)          # v is in `following`: down to 1e-6
    return draw(weight, count)

def unlogged(batch, weight):
    """weight (C, n), set to 0 at the user's logged items, to 1e-12 at v: no row is all 0."""
    weight[entries([past + after for past, after in zip(batch.histories, batch.following)])] = 0
    return weight.scatter_(1, batch.positives[:, None], 1e-12)

def uniform(batch, count, policy, progress):
    """The paper's second, "random": any items that are not in the user's log."""
    return draw(unlogged(batch, torch.ones_like(batch.r)), count)

def curriculum(batch, count, policy, progress):
    """The paper's default: items with low scores early in training, items with high ones late.
    Draw a pool of 2N−1 items with replacement, none of the user's log (batch.histories +
    batch.following), item i ∝ batch.scores[i]/2 + 1/(2n). (How to draw is ours; without 1/(2n), few
    low ones are drawn.) Sort the pool from low to high score. Keep places start … start + N − 1 of
    it, counted from 0; start = round(progress · (N−1))."""
    weight = unlogged(batch, 0.5 * batch.scores + 0.5 / batch.scores.shape[1])
    pool = torch.multinomial(weight, 2 * count - 1, replacement=True)               # (C, 2N-1)
    ranked = pool.gather(1, batch.scores.gather(1, pool).argsort(1))
    start = round(progress * (count - 1))
    return ranked[:, start:start + count]

def policy_beam(batch, count, policy, progress):
    """The paper's fourth: the best of the policy's own beam, without v (the paper: N−1 of them)."""
    items = policy.recommend(batch.histories, count + 1, beams=count + 1)[0].to(batch.r.device)
    positives = batch.positives[:, None]
    order = (items == positives).int().argsort(dim=1, stable=True)      # v goes last
    items = items.gather(1, order)[:, :count]
    return items.where(items >= 0, positives)                   # fewer than N unseen: v instead

def policy_draws(batch, count, policy, progress):
    """Ours: N items drawn from the policy itself, without replacement."""
    items = policy.recommend(batch.histories, count, beams=count, sample=1.0)[0].to(batch.r.device)
    return items.where(items >= 0, batch.positives[:, None])    # fewer than N unseen: v instead

def reward_draws(batch, count, policy, progress):
    """Ours: items drawn ∝ R, as P shall become. The logged item is often among them."""
    return draw(batch.r, count)

def even(batch, count, policy, progress):
    """For --oracle: unseen items, drawn ∝ R/Z + 1/n, so that none is forgotten."""
    target = batch.r / batch.r.sum(1, keepdim=True)             # > 0 at unseen items alone
    return draw((target + 1 / target.shape[1]) * (target > 0), count)

SAMPLERS = {sampler.__name__: sampler for sampler in (
    session, uniform, curriculum, policy_beam, policy_draws, reward_draws, even)}

# --- Training -------------------------------------------------------------------------------------
def loss_of(recipe, policy, reference, batch, reward, progress):
    """L = gr · L_GR(U, v) + λ · L_GFN, the means over the batch; L_GR alone without recipe.loss.
    reference: the frozen SFT policy, or None; progress: the share of training that is done."""
    context = batch.tokens, batch.ends, batch.unseen
    if not recipe.loss:
        log_steps, *_ = policy(*context, batch.positives[:, None])
        return -log_steps.sum(-1).mean()                        # L_GR = −log P(v | U)
    batch.fill(reward)
    asked = asked_by(recipe)                # the loss's parameters, by name: what it needs
    # Off-policy: at P = R/Z, TB is 0 on every path, whoever drew it. (But if several users have one
    # history, other v, P settles between their R/Z; how often paths are drawn matters then.)
    policy.eval()                                               # no dropout while sampling
    items = SAMPLERS[recipe.sampler](batch, recipe.trajectories, policy, progress)  # (C, N)
    check_items(items, recipe, batch)
    policy.train()
    if recipe.gr or "policy_pos" in asked:                      # column 0: the logged or chosen one
        logged = recipe.gr or recipe.chosen == "logged"
        first = batch.positives[:, None] if logged else draw(batch.r, 1)            # (C, 1)
        items = torch.cat([first, items], 1)                                        # (C, J)
    given = known_of(recipe, asked, policy, reference, batch, reward, items)
    L_GFN = recipe.loss(**{name: given[name] for name in asked if name in given})   # or default
    L_GR = -given["policy_pos"].mean() if recipe.gr else 0.0
    return recipe.gr * L_GR + recipe.lam * L_GFN

def known_of(recipe, asked, policy, reference, batch, reward, items):
    """What a loss may ask for, by name, of the paths of items (C, J)."""
    context = batch.tokens, batch.ends, batch.unseen
    log_steps, log_probs, log_flow = policy(*context, items)
    device = log_steps.device           # the policy's; if it is a Mac's "mps", R is on the CPU
    log_pf = log_steps.sum(-1)                                  # Σ_l log P_F      (C, J)
    log_r = batch.r.gather(1, items).log().to(device)                               # (C, J)
    child_flow = None
    if recipe.exact and asked.keys() & {"log_z", "log_flow", "child_flow"}:
        # F*(s) is the sum of R of the items below s, so it is the sum of its children's F*, too
        child_flow = reward.ids.child_flows(batch.r, items).to(device)              # (C, J, L, K)
        log_flow = child_flow.sum(-1).log()                                         # (C, J, L)
    log_ref = torch.zeros_like(log_pf)
    if reference:
        with torch.no_grad():
            log_ref = reference(*context, items)[0].sum(-1)
    again = (items[:, 1:] == items[:, :1]).to(device)   # a draw equal to the chosen item
    return {
        # (C, J) log P of whole paths; but of each step (C, J, L), if a loss asks for log_flow: DB
        "log_pf": log_steps if "log_flow" in asked else log_pf,
        "log_z": log_flow[:, 0, 0],         # (C,) log Z(U) = log F(s_0), where the history ends
        "log_r": log_r,                     # (C, J) log R
        "log_flow": torch.cat([log_flow, log_r[..., None]], -1),    # (C, J, L+1) of s_0 … s_L
        "child_flow": child_flow,           # (C, J, L, K) exact F* of all children of s_0 … s_{L-1}
        "log_probs": log_probs,             # (C, J, L, K) log P_F of all codes
        "policy_pos": log_pf[:, 0],         # (C,) log P of path 0, the logged or the chosen one
        "policy_neg": log_pf[:, 1:].masked_fill(again, NEVER),      # (C, J-1) of those rejected
        "log_ref": log_ref,                 # (C, J) log P by the frozen SFT policy
        "ref_pos": log_ref[:, 0],
        "ref_neg": log_ref[:, 1:],
        "beta": recipe.beta}

def train(name, recipe, policy, world):
    """The one training loop → the curve, a list of {"epoch", "loss", "ndcg@10"}, epoch 0: before.
    The rate rises to its peak and falls to 0; the weights after the last epoch are kept."""
    reward = world.reward(recipe) if recipe.loss else None
    size = min(world.settings.batch, math.ceil(len(world.rows) / 20))   # few rows: small batches
    per_epoch = math.ceil(len(world.rows) / size)
    steps = recipe.epochs * per_epoch
    groups = [{"params": policy.lm.parameters()},
              {"params": policy.flow_head.parameters(), "lr": 10 * recipe.rate}]    # learned flows
    optimizer = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(200, steps // 10 + 1), steps)
    reference = copy.deepcopy(policy).eval() if asks_reference(recipe) else None
    curve = [{"epoch": 0, "loss": None, "ndcg@10": world.measure(policy)}]
    losses = []
    for epoch in range(1, recipe.epochs + 1):
        policy.train()
        seed = (world.seed, epoch)              # one number for torch is made of this pair
        torch.manual_seed(int(np.random.default_rng(seed).integers(2 ** 63)))
        epoch_batches = batches(world.rows, world.data, size, policy, np.random.default_rng(seed))
        for batch in tqdm(epoch_batches, name, per_epoch, leave=False, disable=None):
            loss = loss_of(recipe, policy, reference, batch, reward, len(losses) / steps)
            check_finite(loss, name, recipe, len(losses), batch, world.data)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        loss = float(np.mean(losses[-per_epoch:]))
        curve.append({"epoch": epoch, "loss": loss, "ndcg@10": world.measure(policy)})
        print(f"  {name}: epoch {epoch}/{recipe.epochs}, loss {loss:.3f}, {world.measured} "
              f"{curve[-1]['ndcg@10']:.4f}", flush=True)
    return curve

# --- Recommending: beam search down the tree ------------------------------------------------------
def grown(mask, parents):
    """A new beam sees all that its parent saw, and itself: mask (B, old W, keys), parents (B, W) →
    (B, W, keys + W). The cache keeps the beams of all levels; the mask hides what is not seen."""
    B, W = parents.shape
    itself = torch.full((W, W), NEVER, device=mask.device).fill_diagonal_(0)
    return torch.cat([mask.take_along_dim(parents[..., None], 1), itself.expand(B, W, W)], 2)

@torch.no_grad()
def beam_search(policy, histories, k, beams, guide=None, sample=0.0):
    """The search of Policy.recommend; guide (B, n) multiplies P; sample > 0: draw items instead."""
    ids = policy.semantic_ids
    K = ids.num_codes
    lm = policy.lm.transformer
    unseen = ids.unseen(histories)                  # (B, nodes) bool; all True if all were seen
    tokens, ends = (x.to(ids.codes.device) for x in policy.tokens(histories))       # ends (B, 1)
    cache = DynamicCache()                                      # keys and values
    hidden = lm(tokens, cache).last_hidden_state                # (B, tokens, d), padding comes last
    hidden = hidden.take_along_dim(ends[..., None], 1)                              # (B, W = 1, d)
    place = torch.arange(tokens.shape[1], device=tokens.device)
    mask = torch.where(place > ends[..., None], NEVER, 0.0)                         # (B, W, keys)
    node = torch.zeros_like(ends)                               # (B, W) nodes of the beams; 0: root
    log_p = value = hidden.new_zeros(node.shape)    # (B, W) log P so far; `value` ranks the beams
    below = 0.0                                                 # log Σ guide of the items below
    if guide is not None:
        guide = guide.to(mask.device) * unseen[:, ids.num_prefixes:]                 # (B, n)
        log_guide = ids.flows(guide).clamp(min=1e-30).log()                         # (B, nodes)
    for level in range(ids.num_levels):
        head = lm.wte.weight[level * K:(level + 1) * K]                             # (K, d)
        # −1: illegal. If fewer than W are legal, illegal ones fill the beam; children of −1 are −1
        child = ids.legal_children(node, unseen)                                    # (B, W, K)
        logits = (hidden @ head.T).masked_fill_(child < 0, NEVER)
        if guide is not None:           # an illegal child may have any guide, here that of the root
            below = log_guide.gather(1, child.clamp(min=0).flatten(1)).view_as(logits)
        if sample:      # P here: P_F^(1/sample) · Σ guide, normalised; log P + noise ranks
            log_p = (logits / sample + below).log_softmax(-1) + log_p[..., None]    # (B, W, K)
            gumbel = -torch.empty_like(log_p).exponential_().log_()                 # − log Exp(1)
            value = moved_to(value[..., None], log_p + gumbel)  # shifted: max is the parent's
        else:           # P · Σ guide ranks; P alone goes on, the next level has its own guide
            log_p = logits.log_softmax(-1) + log_p[..., None]
            value = log_p + below
        best = value.flatten(1).topk(min(beams, value[0].numel()), 1).indices       # (B, W)
        node, log_p, value = (x.flatten(1).gather(1, best) for x in (child, log_p, value))
        if level < ids.num_levels - 1:
            mask = grown(mask, parents=best // K)
            hidden = lm(level * K + best % K, cache, attention_mask=mask[:, None],
                        position_ids=(ends + 1 + level).expand_as(best)).last_hidden_state
    items = (node - ids.num_prefixes).clamp(min=-1)             # (B, W) prefixes first, then items
    items[[len({*past}) == len(ids.codes) for past in histories]] = -1  # saw all: all was legal
    items = functional.pad(items, (0, k), value=-1)[:, :k]
    return items, functional.pad(value, (0, k))[:, :k].masked_fill(items < 0, -math.inf)

def moved_to(parent, noisy):
    """To draw k items without replacement (Kool et al. 2019, Stochastic beams): give each item the
    value log P + Gumbel noise, keep the k largest. The value of a prefix is the largest value of
    the items below it. Top-down, the value of the parent (B, W, 1) is drawn first. Then noisy
    (B, W, K), log P + noise of its children, are shifted so that their largest is this value.
    >>> moved_to(torch.tensor([0.5]), torch.tensor([0.3, 1.2, -2.0]))
    tensor([-0.0451,  0.5000, -2.0405])

    It is −log(exp(−parent) + exp(−noisy) − exp(−largest)); without overflow: parent − softplus(x),
    x = parent − noisy + log(1 − exp(noisy − largest)), softplus(x) = log(1 + exp(x))."""
    x = parent - noisy + torch.log1p(-torch.exp(noisy - noisy.amax(-1, keepdim=True)))
    return parent - functional.softplus(x)

# --- Rows of a batch ------------------------------------------------------------------------------
# A row reads the items start … stop-2 of a user's history, and its targets are target … stop-1.
# <user> has place 0 and item i place i − start + 1, so the history before item i ends at i − start
Row = namedtuple("Row", "user start target stop")

def training_rows(histories, window):
    """Rows in which every item is a target once. The last target of a row sees the `window` items
    before it, or all, if fewer; in a user's later rows, the first target sees window/2 or more.
    Window 4, items 0–9: the rows read 0–3, 2–5, 4–7, 5–8; their targets are 0–4, 5–6, 7–8, 9."""
    for user, history in enumerate(histories):
        cuts = [0, *range(window + 1, len(history), max(1, window // 2)), len(history)]
        for target, stop in zip(cuts, cuts[1:]):
            yield Row(user, max(0, stop - 1 - window), target, stop)

def pad(lists, value):
    """Lists of integers as one tensor, filled up with `value` on the right."""
    rows = [torch.tensor(items) for items in lists]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

def batch_of(rows, data, policy):
    """The Batch of some rows: a context for every target, row by row."""
    tokens, _ = policy.tokens([data.train[row.user][row.start:row.stop - 1] for row in rows])
    ends = pad([range(row.target - row.start, row.stop - row.start) for row in rows], -1)
    which, indices = entries([range(row.target, row.stop) for row in rows])
    users = [rows[i].user for i in which]
    histories = [data.train[user][:index] for user, index in zip(users, indices)]
    following = [data.train[user][index:] for user, index in zip(users, indices)]
    positives = torch.tensor([items[0] for items in following])
    liked = torch.tensor([data.liked[user][index] for user, index in zip(users, indices)])
    unseen = policy.semantic_ids.unseen(histories)
    return Batch(tokens, ends, users, histories, following, positives, liked, unseen)

def batches(rows, data, size, policy, rng):
    """One epoch of Batches in random order; rows of similar length together, for less padding."""
    rows = [rows[r] for r in rng.permutation(len(rows))]
    # By length, but only within 32 batches: the order of an epoch has to stay random
    order = sorted(range(len(rows)), key=lambda i: (i // (32 * size), rows[i].stop - rows[i].start))
    for start in rng.permutation(range(0, len(rows), size)):
        yield batch_of([rows[i] for i in order[start:start + size]], data, policy)

# --- Evaluation: leave one out, the whole catalogue, the same for every method --------------------
def recall_at(ranked, target, k):
    """Recall@k of users, floats (B,): is target (B,) in the first k of ranked (B, ≥ k)? −1 in
    ranked is an empty place. With one target, 1 if it is among ranked_1 … ranked_k, else 0."""
    return (ranked[:, :k] == target[:, None]).any(1).float()

def ndcg_at(ranked, target, k):
    """NDCG@k of users, floats (B,): one target (B,) each, in ranked (B, ≥ k); −1: empty place.
    DCG = Σ_r 1[ranked_r = target] / log2(r + 1), r from 1; the ideal DCG is 1, so NDCG = DCG."""
    hits = ranked[:, :k] == target[:, None]
    return (hits / torch.log2(torch.arange(2, hits.shape[1] + 2, device=hits.device))).sum(1)

def best_unseen(model, histories, k=10):
    """The k unseen items (B, k) with a CM's highest scores, −1 where none is left; the scores."""
    scores = functional.pad(model.scores(histories), (0, k), value=-torch.inf)
    scores[entries(histories)] = -torch.inf
    value, items = scores.topk(k, 1)
    return items.masked_fill(value == -torch.inf, -1), value

def rank_all(recommend, histories):
    """The ten best items (B, 10) by recommend(histories); users of similar length together."""
    order = torch.tensor([len(history) for history in histories]).argsort(stable=True)
    ranked = torch.full((len(histories), 10), -1)
    for users in order.split(256):
        ranked[users] = recommend([histories[user] for user in users])[0].cpu()
    return ranked

def validate(policy, data):
    """NDCG@10 on the validation items of at most 2,000 users, evenly spread over all."""
    step = math.ceil(len(data.train) / 2000)
    target = torch.tensor([history[-2] for history in data.histories[::step]])
    ranked = rank_all(policy.eval().recommend, data.train[::step])
    return ndcg_at(ranked, target, 10).mean().item()

def evaluate(recommend, data, ids):
    """Test items → means {metric: number}, per user {metric: list}, the lists (B, 10)."""
    ranked = rank_all(recommend, [history[:-1] for history in data.histories])
    target = torch.tensor([history[-1] for history in data.histories])
    by_user = {}
    for k in (5, 10):
        by_user[f"recall@{k}"] = recall_at(ranked, target, k).numpy()
        by_user[f"ndcg@{k}"] = ndcg_at(ranked, target, k).numpy()
    by_user |= report.diversity(ranked.numpy(), ids.codes[:, 0].cpu().numpy())
    by_user |= report.exposure(ranked.numpy(), data)
    by_user = {name: numbers.astype(float).round(6).tolist() for name, numbers in by_user.items()}
    metrics = {name: float(np.mean(numbers)) for name, numbers in by_user.items()}
    metrics["coverage@10"] = len(ranked[ranked >= 0].unique()) / len(data.titles)
    return metrics, by_user, ranked

@torch.no_grad()
def distribution(policy, histories):
    """P(v | U) of every item (B, n), 256 paths at a time: attention is quadratic in a row."""
    policy.eval()
    parts = torch.arange(len(policy.semantic_ids.codes)).expand(len(histories), -1).split(256, 1)
    steps = [policy.path_log_probs(histories, items) for items in parts]            # (B, 256, L)
    return torch.cat(steps, 1).sum(-1).exp().cpu()

def target_metrics(policy, reward, data):
    """At up to 50 validation contexts: KL(R/Z ‖ P) and the entropy of P, in nats."""
    users = range(0, len(data.train), math.ceil(len(data.train) / 50))
    histories = [data.train[user] for user in users]
    device = reward.ids.codes.device
    positives = torch.tensor([data.histories[user][-2] for user in users], device=device)
    liked = torch.tensor([data.liked[user][-2] for user in users], device=device)
    unseen = reward.ids.unseen(histories)[:, reward.ids.num_prefixes:]                  # (50, n)
    r = reward(reward.teacher.scores(histories).to(device), positives, liked, unseen).cpu()
    target = r / r.sum(1, keepdim=True)                                             # R/Z (50, n)
    p = torch.cat([distribution(policy, [history]) for history in histories]).clamp(min=1e-30)
    kl = functional.kl_div(p.log(), target, reduction="batchmean")
    return {"kl": kl.item(), "entropy": -(p * p.log()).sum(1).mean().item()}

# --- Saved models ---------------------------------------------------------------------------------
transformers.utils.logging.disable_progress_bar()               # a small model is loaded at once

def save_model(model, folder):
    """Write a Policy or a Guided; the CM of a Guided has to be the built-in one."""
    path = Path(folder) / "semantic_ids.json"
    path.unlink(missing_ok=True)                                # written last: marks a whole model
    policy = getattr(model, "policy", model)
    policy.lm.save_pretrained(folder)
    guide = None
    if isinstance(model, Guided):
        delta = getattr(model.cm, "delta", 0.0)
        cm = model.cm.cm if delta else model.cm
        options = {name: getattr(cm, name) for name in cm.OPTIONS}
        guide = {"gamma": model.gamma, "debias": delta, "cm": options}
        safetensors.torch.save_file(cm.state_dict(), path.with_name("cm.safetensors"))
    ids = policy.semantic_ids
    report.write(path, {"num_codes": ids.num_codes, "codes": ids.codes.tolist(), "legal": "unseen",
                        "beams": policy.beams, "catalogue": policy.catalogue, "guide": guide})

def load_model(folder, dropout=0.0, guided=True):
    """The saved Policy or Guided in eval mode, with recommend(histories, k); or InputError."""
    try:
        table = json.loads((Path(folder) / "semantic_ids.json").read_text(encoding="utf-8"))
        check(table["legal"] == "unseen", "it was trained with P over seen items, too")
        ids = SemanticIDs(table["codes"], table["num_codes"])
        lm = GPT2LMHeadModel.from_pretrained(                   # safetensors: no pickle
            folder, use_safetensors=True, resid_pdrop=dropout, embd_pdrop=dropout)
        policy = Policy(ids, lm.config.n_positions - ids.num_levels, beams=table["beams"],
                        catalogue=table["catalogue"], lm=lm).eval()
        fits = lm.config.vocab_size == policy.user_token + 1 + len(ids.codes)
        check(fits, "its IDs do not fit its weights")
        guide = table["guide"] if guided else None
        if not guide:
            return policy
        tables = safetensors.torch.load_file(Path(folder) / "cm.safetensors")
        cm = CollaborativeModel(tables, **guide["cm"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError,
            safetensors.SafetensorError) as error:              # what a wrong folder can raise
        raise InputError(f"{folder} holds no saved model of this version (pop, cm and NAME+cm with "
                         f"a CM of your own are never saved): {error}") from None
    if guide["debias"]:
        cm = Debiased(cm, cm.count, guide["debias"])
    return Guided(policy, cm, guide["gamma"])

# --- Methods and settings -------------------------------------------------------------------------
# The paper's L = L_GR + λ · L_GFN, λ = 1, curriculum, N = 3, learned log Z. We do not know the
# paper's weights of R, rate and dropout, nor whether its S-DPO has L_GR: our choices, see PRESETS.
PAPER = dict(gr=1.0, sampler="curriculum", trajectories=3, exact=False, teacher="cm",
             rate=4.5e-4, dropout=0.2)
RECIPES = {
    "sft": Recipe(dropout=0.2, epochs=8),                       # all others start from it
    "sft-continued": Recipe(dropout=0.2, rate=4.5e-4),          # more of the same, to compare
    "sdpo": Recipe(sdpo, **PAPER),                              # the logged item above others
    "sdpo-reward": Recipe(sdpo, sampler="policy_draws", trajectories=7, chosen="reward"),
    "grpo": Recipe(grpo, sampler="policy_draws", trajectories=8),           # the highest R
    "tb-paper": Recipe(trajectory_balance, **PAPER),            # our reading of the paper
    "db": Recipe(detailed_balance),                             # P = R/Z, here and below
    "tb": Recipe(trajectory_balance),
    "tb-huber": Recipe(huber_balance),                          # the default on real logs
    "vargrad": Recipe(vargrad, sampler="policy_draws", trajectories=8),     # R of N items alone
    "distill": Recipe(distillation, trajectories=1)}            # without a GFlowNet's loss

DRAWS = dict(sampler="policy_draws", trajectories=8)
PRESETS = {         # by --data: settings, and changes of RECIPES; "*": of all recipes but sft's
    "toy": {        # chosen on two other worlds, see data/log.md
        "settings": dict(methods="pop,cm,cm:debias=.75,sft,tb,sft+cm",
                         width=64, layers=2, batch=16),
        "sft": dict(epochs=20, dropout=0.4),
        "*": dict(epochs=8, rate=0.003, teacher="cm", debias=1.0, w_a=0.2, w_y=0.75),
        "sft-continued": dict(rate=0.0009, dropout=0.4),
        "sdpo": dict(rate=0.0009, beta=1.0, lam=10.0, sampler="policy_draws", trajectories=7),
        "sdpo-reward": dict(rate=0.001),
        "grpo": dict(beta=0.03, trajectories=16),
        "db": dict(DRAWS, dropout=0.1),
        "tb": DRAWS,
        "tb-huber": DRAWS,
        "distill": dict(DRAWS, dropout=0.2)},
    "ml-100k": {
        "settings": dict(codes=256, width=96),
        "sft": dict(rate=0.003),
        "*": dict(epochs=4, dropout=0.2),
        "sft-continued": dict(rate=0.00045)}}

@dataclass
class Settings:
    """All settings, each a command-line flag. PRESETS changes some of the defaults with --data."""
    data: str = HfArg(default="toy", help="toy, ml-100k, beauty, or a folder of two CSV files")
    methods: str = HfArg(default="pop,cm,sft,sft-continued,tb-huber,sft+cm,tb-huber+cm",
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
    width: int = HfArg(default=128, help="hidden size: enough for 10^4 items on two cores")
    layers: int = HfArg(default=3, help="transformer blocks: enough to compare items")
    batch: int = HfArg(default=64, help="rows a step: on a CPU, many small steps learn more")
    beams: int = HfArg(default=20, help="beam width, saved with a model: twice the ten items")
    oracle: str | None = HfArg(default=None, metadata={"nargs": "?", "const": "tb"},
                               help="train four users with this method's loss: is P = R/Z?")
    recommend: list[str] = HfArg(default_factory=list, help="print ten titles for this history")
    model: str = HfArg(default="", help="the saved model for --recommend, like runs/toy/tb-42")
    sample: float = HfArg(default=0.0, metadata={"nargs": "?", "const": 1.0},
                          help="draw the titles of --recommend, at this temperature")

FIELDS = {name: value for name, value in vars(Recipe()).items() if name != "loss"}     # defaults

def preset_of(settings):
    """What PRESETS holds for this data. All made-up worlds, those with truth.csv, are "toy"."""
    made_up = (Path(settings.data) / "truth.csv").exists()
    return PRESETS.get("toy" if made_up else settings.data, {})

def parse(argv):
    """Settings from the command line; a mistake ends in one line on stderr and status 2."""
    parser = HfArgumentParser(
        Settings, allow_abbrev=False, description=__doc__.splitlines()[0],
        epilog=f"methods: pop, cm, {', '.join(RECIPES)}, and NAME+cm, guided by the CM. samplers: "
        f"{', '.join(SAMPLERS)}. fields of a recipe, to change in --methods, --sft and --recipe: "
        f"{', '.join(FIELDS)}. example: --methods sft,tb:trajectories=4,tb:debias=.5")
    parser.error = lambda message: parser.exit(2, f"error: {message}; see --help\n")
    asked = [word for word in argv if word not in ("-h", "--help")]
    first = parser.parse_args(asked)            # once for the preset, which --help shows; then all
    parser.set_defaults(**preset_of(first).get("settings", {}))
    if asked != list(argv):                     # help, without the empty "(default: )"
        print(re.sub(r"\s*\(default:\s(None|\[\])?\)", "", parser.format_help()))
        parser.exit()
    settings = Settings(**vars(parser.parse_args(asked)))
    if bool(settings.recommend) != bool(settings.model) or settings.sample and not settings.model:
        parser.error("--recommend and --model go together, and --sample with them")
    name = Path(settings.data).resolve().name
    settings.out = settings.out or f"runs/{name}" + "-quick" * settings.quick
    if settings.quick:                                          # your own epochs come later
        settings.sft = f"epochs=1:{settings.sft}"
        settings.recipe = f"epochs=1:{settings.recipe}"
    return settings

def recipe_of(name, settings):
    """The Recipe of a method, or InputError: that of RECIPES, changed by PRESETS (also if it is
    your own: PRESETS["toy"][NAME] comes after "*"), by --sft or --recipe, then by the name itself,
    NAME:field=value. NAME+cm uses debias and gamma alone."""
    base, *changes = name.split(":")
    tuned = preset_of(settings)
    recipe = RECIPES.get(base, Recipe())
    check(isinstance(recipe, Recipe), f"RECIPES[{base!r}] is a {type(recipe).__name__}, no Recipe")
    if base == "sft":
        recipe = replace(recipe, **tuned.get("sft", {}))
        changes = settings.sft.split(":") + changes
    elif base not in ("pop", "cm"):
        recipe = replace(recipe, **tuned.get("*", {}) | tuned.get(base, {}))
        changes = settings.recipe.split(":") + changes
    for change in filter(None, changes):
        what, _, text = change.partition("=")
        kind = type(FIELDS.get(what))
        check(what in FIELDS, f"{name}: there is no field {what}; there are {', '.join(FIELDS)}")
        try:
            value = string_to_bool(text) if kind is bool else kind(text)
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            raise InputError(f"{name}: {what} has to be a {kind.__name__}, not {text!r}") from None
        recipe = replace(recipe, **{what: value})
    check_recipe(name, recipe)
    return recipe

def sentence(name, recipe):
    """What a method does, for a person; run.json has the whole recipe."""
    cm = f"CM / popularity^{recipe.debias:g}" if recipe.debias else "CM"
    product = f"P · ({cm})^{recipe.gamma:g}"
    base = name.partition(":")[0]
    if base == "pop":
        return "no training; lists have the most popular items"
    if base == "cm" or "+cm" in name:
        return f"no training; lists have the highest {product if '+cm' in name else cm}"
    training = f"rate {recipe.rate:g}, dropout {recipe.dropout:g}, {recipe.epochs} epochs"
    if not recipe.loss:
        return f"next-token loss; {training}"
    teacher = cm if recipe.teacher == "cm" else f"P_SFT{product[1:]}"
    reward = f"R = {recipe.w_a:g} logged + {recipe.w_y:g} {teacher} + {recipe.w_s:g} similar ID"
    items = f"{recipe.trajectories} items by {recipe.sampler}"
    return f"{recipe.loss.__name__} on {items}; {reward}; {training}"

def facts_of(name, recipe):
    """The fields of a recipe that matter, for run.json."""
    facts = {**vars(recipe), "loss": getattr(recipe.loss, "__name__", "L_GR")}
    trained = name.partition(":")[0] in RECIPES
    without = ("loss", "rate", "dropout", "epochs") if trained else ("gamma", "debias")
    return facts if recipe.loss else {what: facts[what] for what in without}    # without L_GFN

# --- Checks: one sentence that says what is wrong and what is right -------------------------------
# What known_of gives a loss. Shapes: C contexts, J paths, L levels, K codes; I = J−1, M = L+1
SHAPES = {"log_pf": "CJ", "log_z": "C", "log_r": "CJ", "log_flow": "CJM", "child_flow": "CJLK",
          "log_probs": "CJLK", "policy_pos": "C", "policy_neg": "CI", "log_ref": "CJ",
          "ref_pos": "C", "ref_neg": "CI", "beta": ""}

def asked_by(recipe):
    """What the recipe's loss asks for: its parameters by name."""
    return inspect.signature(recipe.loss).parameters if recipe.loss else {}

def asks_reference(recipe):
    """Does the recipe's loss need the frozen SFT policy?"""
    return bool({"log_ref", "ref_pos", "ref_neg"} & asked_by(recipe).keys())

def check_numbers(where, values):
    """Raise InputError if a number of a Settings or Recipe is out of its range."""
    zero = "codes gr lam debias dropout w_a w_y w_s sample".split()
    for name, value in vars(values).items():
        if type(value) in (int, float):
            least = "from 0" if name in zero else "above 0"
            most = 1 if name == "dropout" else 1e9
            right = 0 <= value < most and (value or name in zero)
            check(right, f"{where}{name} {value} is out of range: {least}, below {most:g}")

def check_choice(value, choices, what):
    """Raise InputError, which says what was chosen, if a value is not one of the choices."""
    check(value in choices, f"{what} is not available; choose from {', '.join(choices) or '–'}")

def check_recipe(name, recipe):
    """Raise InputError if a recipe cannot work."""
    check_numbers(f"{name}: ", recipe)
    right = recipe.loss is None or inspect.isfunction(recipe.loss)
    check(right, f"{name}: its loss has to be a function, not {recipe.loss!r}")
    check_choice(recipe.sampler, SAMPLERS, f"{name}: sampler={recipe.sampler}")
    check_choice(recipe.teacher, ("cm", "product"), f"{name}: teacher={recipe.teacher}")
    check_choice(recipe.chosen, ("logged", "reward"), f"{name}: chosen={recipe.chosen}")
    few = recipe.trajectories <= 128
    check(few, f"{name}: trajectories: at most 128, memory grows with the square of their number")
    check(recipe.w_a + recipe.w_y + recipe.w_s > 0, f"{name}: w_a, w_y and w_s are all 0")
    asked = asked_by(recipe)
    check(recipe.exact or "child_flow" not in asked, f"{name}: its loss needs exact=1")
    paths = recipe.trajectories + bool(recipe.gr or "policy_pos" in asked)
    compares = {"policy_neg", "log_ref"} & asked.keys() or recipe.loss is vargrad
    check(paths > 1 or not compares, f"{name}: it compares paths: trajectories > 1")
    logged = recipe.chosen == "logged"
    check(logged or not recipe.gr, f"{name}: gr > 0 needs chosen=logged: path 0 is that of L_GR")
    if recipe.loss:
        check_loss(name, recipe, paths)

def check_loss(name, recipe, paths):
    """Raise InputError if a loss asks for what is not given, or if its value cannot be trained."""
    asked = asked_by(recipe)
    for what, parameter in asked.items():
        if parameter.default is parameter.empty:
            check_choice(what, SHAPES, f"{name}: parameter {what} of its loss")
    size = {"C": 2, "J": paths, "I": paths - 1, "L": 2, "M": 3, "K": 4}     # a made-up batch
    trial = {}
    for what, shape in SHAPES.items():
        trial[what] = torch.full([size[letter] for letter in shape], -1.0)
    for what in ("log_pf", "log_probs", "policy_pos", "policy_neg"):                # P is trained
        trial[what].requires_grad_()
    if "log_flow" in asked:                                     # then of each step, as in known_of
        trial["log_pf"] = trial["log_pf"][..., None].expand(-1, -1, 2)
    loss = recipe.loss(**{what: trial[what] for what in asked if what in trial})
    found = tuple(loss.shape) if torch.is_tensor(loss) else type(loss).__name__
    check(found == (), f"{name}: its loss has to return a tensor of one number, the mean over all "
          f"paths, not {found}")
    check(loss.requires_grad, f"{name}: its loss does not depend on P: no gradient")

def check_items(items, recipe, batch):
    """Raise InputError if a sampler does not return N unseen items a context."""
    C, n = batch.r.shape
    wanted = (torch.int64, C, recipe.trajectories)
    found = (getattr(items, "dtype", type(items).__name__), *getattr(items, "shape", ()))
    asked = f"sampler {recipe.sampler}(batch, count, policy, progress) has to return"
    check(found == wanted, f"{asked} a tensor of items (C, N), here {wanted}, not {found}")
    unseen = 0 <= items.min() and items.max() < n and batch.r.gather(1, items).min() > 0
    check(unseen, f"{asked} items from 0 to {n - 1} that are not in batch.histories")

def check_finite(loss, name, recipe, step, batch, data):
    """Raise FloatingPointError, with the step and its users, if the loss is not a finite number."""
    if not torch.isfinite(loss):
        who = ", ".join(sorted({data.user_ids[user] for user in batch.users}))
        raise FloatingPointError(f"{name}: loss {loss} at step {step}, rate {recipe.rate:g} (maybe "
                                 f"too high); users {who}")

def check_settings(settings):
    """Check the settings and set the device → (names of methods in the table's order, seeds)."""
    there = {"cuda": torch.cuda, "mps": torch.backends.mps}
    devices = [device for device in there if there[device].is_available()] + ["cpu"]
    settings.device = devices[0] if settings.device == "auto" else settings.device
    check_choice(settings.device, devices, f"--device {settings.device}")
    check_numbers("--", settings)
    seeds = [seed.strip() for seed in settings.seeds.split(",")]
    whole = all(seed.isdecimal() and len(seed) < 19 for seed in seeds)
    check(whole, f"--seeds {settings.seeds} are not numbers like 42,43")
    methods = ["pop", "cm", *RECIPES, *[f"{method}+cm" for method in RECIPES]]  # own ones, too
    names = []
    for name in filter(None, map(str.strip, settings.methods.split(","))):
        base = name.partition(":")[0]
        check_choice(base, methods, f"--methods {name}")
        if base not in ("pop", "cm"):                           # all others start from SFT
            names += ["sft", base.removesuffix("+cm")] if "+cm" in base else ["sft"]
        names.append(name)
    check(names, f"--methods {settings.methods!r} names no method")
    names.sort(key=lambda name: methods.index(name.partition(":")[0]))
    if settings.quick:
        print("--quick: the figures below mean nothing; they only show that everything works")
    return list(dict.fromkeys(names)), list(dict.fromkeys(map(int, seeds)))

# --- The experiment: data → IDs, CM → SFT → fine-tuned policies → table ---------------------------
@dataclass
class World:
    """What all methods of one seed share, made from training items alone."""
    data: object                    # the Dataset of load_data: see data/__init__.py
    settings: Settings              # as the command line has set them
    seed: int                       # of the IDs, of new policies, of training
    ids: SemanticIDs                # a row of codes for each item
    cm: object                      # CollaborativeModel, or a CM of your own
    count: torch.Tensor             # (n,) how often each item is in the training log
    rows: list                      # rows to train on, of training_rows
    measure: object                 # policy → a number, printed after each epoch of training
    measured: str = "validation NDCG@10"                        # what this number is
    products: dict = field(default_factory=dict)    # (debias, gamma) → teacher "product", a Guided

    @classmethod
    def prepare(cls, seed, data, settings, cm=None):
        """IDs, CM and rows of one seed."""
        n = len(data.titles)
        if settings.ids in ("content", "mixed"):
            check(settings.ids == "mixed" or any(data.texts), "--ids content needs a text column")
            least = max(2, n / 24, n ** (1 / settings.levels))
            K = settings.codes or 2 ** math.ceil(math.log2(least))
            features = item_features(settings.ids, data.texts, data.train, seed)
            ids = SemanticIDs.fit(features, K, settings.levels, seed)
        else:
            known = Path(settings.ids).suffix
            check(known, f"--ids {settings.ids} is not content, mixed or a CSV file")
            codes = read_ids(settings.ids, data.item_ids)
            ids = SemanticIDs(codes, max(map(max, codes)) + 1)
        print(f"seed {seed}: {n} semantic IDs; {ids.num_levels} codes, of {ids.num_codes} each")
        device = "cuda" if settings.device == "cuda" else "cpu"     # mps has no sparse matrices
        cm = cm or CollaborativeModel.fit(data.train, n).to(device)
        count = torch.tensor(np.bincount(entries(data.train)[1], minlength=n))
        rows = list(training_rows(data.train, settings.window))
        measure = partial(validate, data=data)
        return cls(data, settings, seed, ids.to(device), cm, count, rows, measure)

    def folder(self, name):
        """Where a method's run.json and model are; without ":", which some systems forbid."""
        return Path(self.settings.out) / f"{name.replace(':', ',')}-{self.seed}"

    def policy(self, name="", dropout=0.0):
        """A new policy, or the one that a method has saved."""
        settings = self.settings
        if name:
            return Policy.from_pretrained(self.folder(name), dropout).to(settings.device)
        torch.manual_seed(self.seed)
        catalogue = {"item_ids": self.data.item_ids, "titles": self.data.titles}
        return Policy(copy.deepcopy(self.ids), settings.window, settings.width, settings.layers,
                      dropout, settings.beams, catalogue).to(settings.device)   # .to moves the copy

    def cm_of(self, recipe):
        """The CM, divided by popularity if the recipe says so."""
        return Debiased(self.cm, self.count, recipe.debias) if recipe.debias else self.cm

    def teacher(self, recipe):
        """Where r_ŷ of this recipe comes from. Methods share a product: its beams are costly."""
        if recipe.teacher == "cm":
            return self.cm_of(recipe)
        key = (recipe.debias, recipe.gamma)
        if key not in self.products:
            self.products[key] = Guided(self.policy("sft"), self.cm_of(recipe), recipe.gamma)
        return self.products[key]

    def reward(self, recipe):
        """The comprehensive reward of a recipe."""
        return Reward(self.ids, self.teacher(recipe), (recipe.w_a, recipe.w_y, recipe.w_s))

def made_with(name, world):
    """All inputs of a run that --resume compares, but code, and what a CM of your own is like."""
    settings = vars(world.settings)
    same = "ids codes levels window width layers batch beams".split()
    made = {"data": world.data.sizes, "checksum of ids": zlib.crc32(world.ids.codes.cpu().numpy())}
    made["cm"] = type(world.cm).__name__
    made |= {f"--{what}": settings[what] for what in same}
    for part in ("sft", name.partition("+cm")[0], name):        # NAME of NAME+cm, and itself
        facts = facts_of(part, recipe_of(part, world.settings))
        made |= {f"{part}: {what}": value for what, value in facts.items()}
    return made

def model_of(name, recipe, world):
    """Train a method, or put it together → its model, its curve. A CM has scores, no recommend."""
    base = name.partition(":")[0]
    if base == "pop":
        return CollaborativeModel.fit(world.data.train, len(world.data.titles), popularity=1.0), []
    if base == "cm":
        return world.cm_of(recipe), []
    if base.endswith("+cm"):
        model = Guided(world.policy(base.removesuffix("+cm")), world.cm_of(recipe), recipe.gamma)
        if type(world.cm) is CollaborativeModel:
            save_model(model, world.folder(name))
        else:
            how = facts_of(name, recipe)                        # debias and gamma
            print(f"{name}: not saved, as its CM is yours; make it with Guided, Debiased, {how}")
        return model, []
    policy = world.policy("" if base == "sft" else "sft", recipe.dropout)
    curve = train(name, recipe, policy, world)
    save_model(policy, world.folder(name))
    return world.policy(name), curve                            # tested as it was saved

def run_method(name, world):
    """Train and test one method with one seed → its entry of results.json["runs"]."""
    data = world.data
    recipe = recipe_of(name, world.settings)
    print(f"{name}, seed {world.seed}: {sentence(name, recipe)}")
    started = time.time()
    model, curve = model_of(name, recipe, world)
    middle = time.time()
    recommend = getattr(model, "recommend", partial(best_unseen, model))
    metrics, by_user, ranked = evaluate(recommend, data, world.ids)
    if curve and len(data.titles) <= 2000:                      # P of all n items at once
        # SFT is judged by the R of tb, without --recipe: so --resume may keep its numbers
        judge = recipe if recipe.loss else recipe_of("tb", replace(world.settings, recipe=""))
        metrics |= target_metrics(model, world.reward(judge), data)
    entry = {"method": name, "seed": world.seed, "recipe": facts_of(name, recipe),
             "metrics": metrics, "curve": curve, "by_user": by_user,
             "seconds": {"train": middle - started, "eval": time.time() - middle},
             "train_examples": len(curve[1:]) * sum(map(len, data.train)),
             "lists": ranked.tolist() if data.truth else []}
    report.write(world.folder(name) / "run.json", {"made_with": made_with(name, world), **entry})
    return entry

# --- Command line ---------------------------------------------------------------------------------
def run(settings, cm=None):
    """The whole job → results. cm: a CM of your own, with scores(histories, following=None)."""
    names, seeds = check_settings(settings)
    for name in (*names, "sft", "tb"):          # now: a wrong change fails not after hours
        recipe_of(name, settings)
    data = load_data(settings.data, settings.quick)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, np)}
    about = {"data": data.sizes, "settings": vars(settings), "versions": versions}
    worlds = [World.prepare(seed, data, settings, cm) for seed in seeds]
    jobs = [(name, world) for world in worlds for name in names]
    kept = {}
    for name, world in jobs:                                    # refuse now, not after hours
        path = world.folder(name) / "run.json"                  # written last: a finished run
        if settings.resume and path.exists():
            kept[name, world.seed] = report.earlier_run(path, made_with(name, world))
        elif path.exists():
            path.unlink()                                       # train all of it anew
            path.with_name("semantic_ids.json").unlink(missing_ok=True)
    for old in ("results.md", "exposure.png"):
        (Path(settings.out) / old).unlink(missing_ok=True)      # of an earlier run in this folder
    runs = []
    for name, world in jobs:                                    # results so far; finish: all
        report.write(Path(settings.out) / "results.json", report.results_of(runs, about))
        runs.append(kept.get((name, world.seed)) or run_method(name, world))
    return report.finish(settings.out, runs, about, data)

def run_oracle(settings):
    """Train from random weights on four contexts, where R/Z is known: does P reach it?"""
    _, seeds = check_settings(settings)
    changes = "gr=0:lam=1:sampler=even:trajectories=64:teacher=cm:rate=.002:dropout=0:epochs=15"
    settings = replace(settings, recipe=f"{changes}:{settings.recipe}")
    recipe = recipe_of(settings.oracle, settings)
    fits = [name for name, known in RECIPES.items() if known.loss and not asks_reference(known)]
    check_choice(settings.oracle.partition(":")[0], fits, f"--oracle {settings.oracle}")
    data = load_data(settings.data, settings.quick)
    check(len(data.titles) <= 2000, "--oracle scores every item at once: at most 2,000 items")
    world = World.prepare(seeds[0], data, settings)
    policy = world.policy()
    data = replace(data, train=data.train[:4], histories=data.histories[:4])
    last = {row.user: row for row in training_rows(data.train, settings.window)}    # of each user
    rows = [row._replace(target=row.stop - 1) for row in last.values()]     # its last item alone
    batch = batch_of(rows, data, policy)
    batch.fill(world.reward(recipe))
    target = (batch.r / batch.r.sum(1, keepdim=True)).cpu()     # P* = R/Z
    def distance(policy):                                       # mean L1 of P from R/Z
        return (distribution(policy, batch.histories) - target).abs().sum(1).mean().item()
    path = Path(settings.out) / "oracle.png"
    path.parent.mkdir(parents=True, exist_ok=True)              # fails now, not after training
    world = replace(world, data=data, rows=100 * rows, settings=replace(settings, batch=4),
                    measure=distance, measured="L1 distance of P from R/Z")
    print(f"four contexts, {settings.oracle}: {sentence(settings.oracle, recipe)}")
    curve = train(settings.oracle, recipe, policy, world)       # 400 rows: 100 steps an epoch
    print("mean L1 distance of P from R/Z (2 at most): {:.4f} before, {:.4f} after; {}".format(
        curve[0]["ndcg@10"], curve[-1]["ndcg@10"], path))
    report.figures.plot_flows(path, {
        "codes": world.ids.codes.tolist(), "titles": data.titles,
        "history": [data.titles[item] for item in batch.histories[0]],
        "teacher": target[0].tolist(), "teacher_name": "R/Z",
        "learned": distribution(policy, batch.histories)[0].tolist(),
        "learned_name": f"P, learned by {settings.oracle}"})

def print_recommendations(settings):
    """Ten titles by a saved model, for a history of titles or ids, oldest first."""
    check_numbers("--", settings)
    model = load_model(settings.model)
    titles = model.catalogue.get("titles")
    check(titles, f"{settings.model} was saved without titles")
    history = [find_item(name, model.catalogue["item_ids"], titles) for name in settings.recommend]
    items, scores = model.recommend([history], sample=settings.sample)
    check(items.max() >= 0, "the history has all items: none is left")
    print("drawn in this order" if settings.sample else " share  of the list's weight; title")
    for item, share in zip(items[0].tolist(), scores[0].softmax(0).tolist()):
        if item >= 0:
            print("" if settings.sample else f"{share:6.1%}", "", titles[item])

def main(settings):
    """Do what the settings ask for → exit status; a user's error is one line on stderr."""
    job = print_recommendations if settings.recommend else run_oracle if settings.oracle else run
    try:
        job(settings)
        return 0
    except (InputError, OSError, FloatingPointError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; --resume keeps the finished methods of a run", file=sys.stderr)
        return 130

if __name__ == "__main__":
    sys.exit(main(parse(sys.argv[1:])))
