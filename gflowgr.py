"""GFlowGR: fine-tune a generative recommender so that P(item | user) follows a reward.

A generative recommender reads a user's history and writes the semantic ID of the next item, code
by code. Supervised fine-tuning (SFT) on the log teaches what was shown, not what the user would
like: exposure bias. GFlowGR reads an ID as a path down a tree and trains a GFlowNet on it, with a
loss called trajectory balance (TB): the probability of an item shall be proportional to its reward
R. R mixes the logged action, the score of a collaborative model (CM) and the similarity of IDs.
This file is the method, down to `beam_search`; then the experiment.

Letters in shapes: B users or rows of a batch, H tokens of history, T targets per row, C contexts (a
target and the history before it), J paths per context (N sampled, maybe the logged one), S places
per row, E branches (paths that share a row's history), L levels, K codes per level, n items, W
beams, d width. The tree of IDs has P prefixes, nodes 0 (the root) to P − 1; item i is node P + i.
"""
import copy
import inspect
import json
import math
import os
import sys
import time
import zlib
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")       # models as small as these: one thread is best
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, get_cosine_schedule_with_warmup
from transformers.hf_argparser import HfArg, HfArgumentParser

from data import InputError, check, find_item, load_data, read_ids, report
from reward import CollaborativeModel, Guided, Reward, best_unseen, entries
from tokenizer import SemanticIDs, item_features

transformers.utils.logging.disable_progress_bar()
NEVER = -1e9                            # log P of what is illegal; not −inf, since 0 · −inf is nan

# --- Losses: pure functions of tensors, natural logs ----------------------------------------------
def trajectory_balance(log_z, log_pf, log_r):
    """TB (Malkin et al. 2022): log Z(U) (C,); Σ_l log P_F and log R of J paths (C, J) → scalar.

    >>> log_pf, log_r = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    >>> round(trajectory_balance(torch.zeros(1), log_pf, log_r).item(), 4)   # (0 + (log 1/2)²) / 2
    0.2402
    """
    # mean of (log Z(U) + Σ_l log P_F(s_{l+1} | s_l) − log R(s_L))²; P_B is 1 on a tree
    return (log_z[:, None] + log_pf - log_r).square().mean()

def huber_balance(log_z, log_pf, log_r):
    """Ours: TB as above, but a few paths with R far from P cannot outweigh all others."""
    # mean of h(log Z(U) + Σ_l log P_F − log R): h(x) = x²/2 up to 1 nat, |x| − 1/2 beyond
    return F.huber_loss(log_z[:, None] + log_pf, log_r)

def vargrad(log_pf, log_r):
    """VarGrad (Richter et al. 2020): TB without log Z; log P_F, log R (C, J) → scalar. At P = R/Z,
    log R − log P is log Z(U) on all J paths of a context, so their mean stands for log Z(U)."""
    # mean of (log P − log R − mean over the context's paths)²: the variance of log P − log R
    return (log_pf - log_r).var(1, correction=0).mean()

def detailed_balance(log_flow, log_pf):
    """Detailed balance (DB, Bengio et al. 2023): the mean over all paths of Σ_l (log F(s_l) +
    log P_F(s_{l+1} | s_l) − log F(s_{l+1}))²; log F (C, J, L+1), F(s_L) = R; log P_F (C, J, L)."""
    return (log_flow[..., :-1] + log_pf - log_flow[..., 1:]).square().sum(-1).mean()

def distillation(child_flow, log_probs):
    """Ours, KL(R/Z ‖ P): flows F* of all children (C, J, L, K), log P_F (C, J, L, K) → scalar.
    The flow of a prefix is the sum of R below it (0 for an illegal child). TB and DB see only the
    codes that a path takes; this loss, a yardstick for them, compares all children at each step.
    Averaged over paths drawn ∝ R, it is the KL of whole items, by the chain rule."""
    # Σ_l Σ_c F*(c)/F*(s_l) · (log F*(c)/F*(s_l) − log P_F(c | s_l)), mean over paths
    target = child_flow / child_flow.sum(-1, keepdim=True)
    return (target * (target.clamp(min=1e-30).log() - log_probs)).sum((-2, -1)).mean()

def sdpo(policy_pos, policy_neg, ref_pos, ref_neg, beta):
    """S-DPO (Chen et al. 2024): log P of positives (C,), negatives (C, J−1); and by a reference."""
    # mean of −log σ(−log Σ_d exp(β[Δ_d − Δ_p])), Δ = log P_policy − log P_reference
    margin = beta * ((policy_neg - ref_neg) - (policy_pos - ref_pos)[:, None])
    return -F.logsigmoid(-margin.logsumexp(1)).mean()

def grpo(log_pf, log_ref, log_r, beta):
    """GRPO (Shao et al. 2024), a maximiser of R: log P, log P_ref, log R (C, J) → scalar. New paths
    are drawn for every step of training, so the ratio of new to old policy is 1. (They are drawn
    without replacement here: means over them are only close to means over P.)"""
    # mean of −A · log P + β · KL; A = (R − mean R) / std R over a context's paths;
    # KL(P ‖ P_ref) is estimated by x − log x − 1, x = P_ref / P
    r = log_r.exp()
    advantage = (r - r.mean(1, keepdim=True)) / r.std(1, keepdim=True).clamp(min=1e-8)
    log_x = log_ref - log_pf
    return (beta * (log_x.exp() - log_x - 1) - advantage * log_pf).mean()

# --- Recipes: how a method is fine-tuned ----------------------------------------------------------
@dataclass
class Recipe:
    """How a method is trained. `--methods tb:epochs=4` changes a field of an entry of RECIPES."""
    loss: Callable | None = None    # L_GFN; None: the next-token loss L_GR alone, as SFT
    given: str = ""                 # the loss's arguments in order, like "log_z log_pf log_r"; each
                                    # is a field of Paths (what we know of J paths) or of Recipe
    gr: float = 0.0                 # weight of L_GR beside L_GFN; 0: R rewards the logged item, too
    lam: float = 1.0                # λ, weight of L_GFN; matters if gr > 0: Adam ignores mere scale
    sampler: str = "reward"         # where the N sampled paths come from; "reward": drawn ∝ R
    trajectories: int = 2           # N: the paper's best is about 3
    first: bool = False             # path 0 is τ_1, the chosen one: for L_GR, S-DPO, the paper's TB
    chosen: str = "logged"          # which one that is: the "logged" item, or one drawn ∝ "reward"
    exact: bool = True              # ours: F(s), Z(U) are sums of R, since R of all items is known;
                                    # False: flow_head learns them, if the loss needs them
    # R = w_a·r_a + w_ŷ·r_ŷ + w_s·r_s + .001/n; r_ŷ and r_s each sum to 1 over the items
    w_a: float = 0.3                # r_a: 1 at the logged item v if it is liked, .1 if only clicked
    w_y: float = 0.65               # r_ŷ: the scores of the teacher
    w_s: float = 0.05               # r_s: codes shared with v
    teacher: str = "product"        # r_ŷ: "cm", its score; or "product", ours: P_SFT · CM^γ at the
                                    # items where a beam search ends (--beams of them), 0 elsewhere
    gamma: float = 2.0              # γ of the product
    debias: float = 0.0             # δ, ours: the CM's scores are divided by popularity^δ
    beta: float = 0.1               # S-DPO, GRPO: how strongly P is held near that of SFT
    rate: float = 1.5e-3            # peak learning rate: small models like it high
    dropout: float = 0.0            # none is needed if R rewards many items; L_GR over-fits
    epochs: int = 7                 # the table TUNED has changes for toy and ml-100k

TB = "log_z log_pf log_r"           # fields of Paths
# The paper's L = L_GR + λ · L_GFN, λ = 1, curriculum, N = 3, learned log Z. We do not know the
# paper's weights of R, rate and dropout, nor whether its S-DPO has L_GR: these are our choices.
PAPER = dict(gr=1.0, sampler="curriculum", trajectories=3, first=True, exact=False, teacher="cm",
             rate=4.5e-4, dropout=0.2)
RECIPES = {
    "sft": Recipe(dropout=0.2, epochs=8),
    "sft-continued": Recipe(dropout=0.2, rate=4.5e-4),          # more of the same, to compare
    "sdpo": Recipe(sdpo, "policy_pos policy_neg ref_pos ref_neg beta", **PAPER),
    "sdpo-reward": Recipe(sdpo, "policy_pos policy_neg ref_pos ref_neg beta", first=True,
                          chosen="reward", sampler="drawn", trajectories=7, exact=False),
    "grpo": Recipe(grpo, "log_pf log_ref log_r beta", sampler="drawn", trajectories=8, exact=False),
    "tb-paper": Recipe(trajectory_balance, TB, **PAPER),
    "db": Recipe(detailed_balance, "log_flow log_steps"),       # log P_F of each step, no sum
    "tb": Recipe(trajectory_balance, TB),
    "vargrad": Recipe(vargrad, "log_pf log_r", sampler="drawn", trajectories=8, exact=False),
    "tb-huber": Recipe(huber_balance, TB),
    "distill": Recipe(distillation, "child_flow log_probs", trajectories=1)}

# --- What a step of training works on -------------------------------------------------------------
@dataclass
class Batch:
    """B rows, each a part of a user's history. Every target v in it makes a context: v and the
    history before it. A row with the targets a, b, c reads <user> a b, one token each, at places
    0, 1, 2. The history before a ends at place 0, that before b at 1, before c at 2: the `ends`."""
    tokens: torch.Tensor            # (B, H) <user>, the items read, padding on the right
    ends: torch.Tensor              # (B, T) where the history of each target ends; −1: padding
    users: list                     # the user of each of C contexts; contexts go row by row
    histories: list                 # C lists: the user's items before the target
    following: list                 # C lists: the target and the user's later training items
    positives: torch.Tensor         # (C,) the targets v
    liked: torch.Tensor             # (C,) bool: v was liked, not only clicked
    unseen: torch.Tensor            # (C, P + n) bool: of each node, see SemanticIDs.unseen
    scores: torch.Tensor = None     # (C, n) the teacher's, of sum 1, filled in by `fill`
    r: torch.Tensor = None          # (C, n) R of every item, filled in by `fill`

    def fill(self, reward):
        """Fill in the teacher's scores and R of all items. The CM has counted the training log, so
        also v and later items. We tell it these (`following`), and it subtracts their counts."""
        device = reward.ids.codes.device
        self.positives = self.positives.to(device)
        self.scores = reward.teacher.scores(self.histories, self.following).to(device)
        unseen = self.unseen[:, reward.ids.num_prefixes:].to(device)                # (C, n)
        self.r = reward(self.scores, self.positives, self.liked.to(device), unseen)

@dataclass
class Paths:
    """J paths at each of C contexts: what a loss may be given. A recipe names the fields."""
    log_steps: torch.Tensor         # (C, J, L) log P_F(s_{l+1} | s_l) of the codes taken
    log_probs: torch.Tensor         # (C, J, L, K) log P_F of all codes, < NEVER/2 where illegal
    log_flow: torch.Tensor          # (C, J, L+1) log F of s_0 … s_L; loss_of adds the last, log R
    log_pf: torch.Tensor = None     # (C, J) log P of the whole path, Σ_l log P_F
    log_z: torch.Tensor = None      # (C,) log Z(U)
    log_r: torch.Tensor = None      # (C, J) log R
    child_flow: torch.Tensor = None     # (C, J, L, K) exact F* of all children, if recipe.exact
    policy_pos: torch.Tensor = None     # (C,) log P of path 0, the logged one if recipe.first
    policy_neg: torch.Tensor = None     # (C, J-1) of the others; where one is v again, NEVER, so
                                        # that it adds nothing to the sum over negatives
    log_ref: torch.Tensor = None        # (C, J) log P by the frozen SFT policy
    ref_pos: torch.Tensor = None        # (C,) that of path 0
    ref_neg: torch.Tensor = None        # (C, J-1) those of the others

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
    branch = F.pad(branch, (H, 0), value=-1)                    # (S,) −1: the history
    own = (branch[:, None] == branch).tril()                    # (S, S) same branch, not later
    place = torch.arange(len(branch), device=ends.device)
    # How far into the history a place sees: up to itself; a code, up to the end that it starts from
    last = torch.cat([place[:H].expand(len(ends), H), ends.repeat_interleave(L - 1, 1)], 1)
    return torch.where(own | (place <= last[..., None]), 0.0, NEVER)                # (B, S, S)

class Policy(torch.nn.Module):
    """A small GPT-2 that reads a history and writes a semantic ID, plus the table of IDs.
    Tokens: code c of level l is l·K + c; L·K is <user>, which begins each row, and pads it. An item
    i of a history is one token, L·K + 1 + i (ours: L codes make rows L times as long). A row is
    packed as in `tree_mask`: of a path, its first L−1 codes (the last is predicted, never read)."""
    def __init__(self, semantic_ids, window=20, width=128, layers=3, dropout=0.2, lm=None):
        super().__init__()
        self.semantic_ids = semantic_ids
        self.window = window
        self.user_token = semantic_ids.num_levels * semantic_ids.num_codes
        self.beams = 20                                         # beam width of recommend
        self.catalogue = {}                                     # item_ids and titles, for saving
        self.lm = lm or GPT2LMHeadModel(GPT2Config(             # from scratch, not pretrained
            vocab_size=self.user_token + 1 + len(semantic_ids.codes), n_embd=width, n_layer=layers,
            n_head=math.gcd(width, max(1, width // 32)),        # a divisor, at most width / 32
            n_positions=window + semantic_ids.num_levels,       # <user>, items, L−1 codes
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=0.0,   # at 0.2, twice the time
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
        """items (C, J), J at each context → their Paths; tokens, ends, unseen are a Batch's."""
        ids = self.semantic_ids
        device = ids.codes.device
        tokens, ends, unseen, items = (x.to(device) for x in (tokens, ends, unseen, items))
        H = tokens.shape[1]
        L = ids.num_levels
        J = items.shape[1]
        valid = ends >= 0
        # The J items of a context become J branches of its row, E = T·J; padding gets item 0
        packed = items.new_zeros(*ends.shape, J)                                    # (B, T, J)
        packed[valid] = items                                   # contexts go row by row
        ends = ends.clamp(min=0).repeat_interleave(J, 1)                            # (B, E)
        levels = torch.arange(L, device=ends.device)
        code_tokens = ids.codes[packed.flatten(1)] + ids.num_codes * levels         # (B, E, L)
        mask = tree_mask(ends, H, L)
        # A place's position is the number of places that it sees, less 1
        hidden = self.lm.transformer(
            torch.cat([tokens, code_tokens[..., :-1].flatten(1)], 1), attention_mask=mask[:, None],
            position_ids=(mask == 0).sum(-1) - 1, use_cache=False).last_hidden_state    # (B, S, d)
        root = hidden.take_along_dim(ends[..., None], 1)        # (B, E, d) s_0: the history's end
        later = hidden[:, H:].unflatten(1, (ends.shape[1], L - 1))                  # (B, E, L-1, d)
        prefixes = torch.cat([root[:, :, None], later], 2)                          # (B, E, L, d)
        # Back from rows to contexts, without padding: (B, E, …) → (B, T, J, …) → (C, J, …)
        prefixes = prefixes.unflatten(1, (-1, J))[valid]                            # (C, J, L, d)
        # A level's output weights are its codes' embeddings (all levels at once: it is faster)
        heads = self.lm.transformer.wte.weight[:self.user_token].unflatten(0, (L, -1))  # (L, K, d)
        logits = torch.einsum("cjld,lkd->cjlk", prefixes, heads).float()            # (C, J, L, K)
        states = ids.nodes[items][..., :-1]                     # (C, J, L) nodes s_0…s_{L-1}
        illegal = ids.legal_children(states.flatten(1), unseen).view_as(logits) < 0
        log_probs = logits.masked_fill(illegal, NEVER).log_softmax(-1)
        log_flow = self.flow_head(prefixes)[..., 0]                                 # (C, J, L)
        log_steps = log_probs.gather(-1, ids.codes[items][..., None])[..., 0]       # (C, J, L)
        return Paths(log_steps, log_probs, log_flow)

    def path_log_probs(self, histories, items):
        """log P_F of each step on the paths of items (B, J) after B histories → (B, J, L). A step
        that leads to no unseen item has −1e9 or less."""
        tokens, ends = self.tokens(histories)                   # one target, after all items
        unseen = self.semantic_ids.unseen(histories)
        return self(tokens, ends, unseen, torch.as_tensor(items)).log_steps

    def recommend(self, histories, k=10, beams=None, guide=None, sample=0.0):
        """The k best items of B histories: items (B, k), best first, and their scores (B, k).
        Never an item of the history, never a duplicate; −1 and −inf where fewer than k are unseen.
        Beam search over legal codes: the score of a prefix is Σ log P_F of its codes, and the best
        max(beams or self.beams, k) of a user go on to the next level: exact with enough beams.
        guide (B, n) ≥ 0 multiplies P: the score of an item is log P + log guide, that of a prefix
        Σ log P_F + log(sum of guide over the items below it).
        sample > 0, a temperature, draws k items at random instead, without replacement (see
        with_noise): codes ∝ P_F^(1/sample) · Σ guide over the items below. The scores are noisy."""
        return beam_search(self, histories, k, max(beams or self.beams, k), guide, sample)

    def save_pretrained(self, folder):
        """Write config.json, model.safetensors (plain GPT-2), IDs and titles; no flow_head."""
        save_model(self, folder)

    @classmethod
    def from_pretrained(cls, folder, dropout=0.0):
        """The saved Policy in eval mode, or InputError."""
        return load_model(folder, dropout, guided=False)

# --- The adaptive trajectory sampler: which items to learn from -----------------------------------
def draw(weight, count):
    """N = count items per context (C, N), with replacement, ∝ weight (C, n)."""
    # torch is slow at drawing one item, so draw two at least, and keep `count`
    return torch.multinomial(weight, max(2, count), replacement=True)[:, :count]

def session(batch, count, policy, progress):
    """Later items of the user's own log; the positive v if there is none."""
    weight = torch.zeros_like(batch.r)
    weight[entries(batch.following)] = 1
    return draw(weight.scatter_(1, batch.positives[:, None], 1e-6), count)      # v: if alone

def unlogged(batch, weight):
    """weight (C, n), 0 at all logged items of the user; the positive if no other item is left."""
    weight[entries([past + after for past, after in zip(batch.histories, batch.following)])] = 0
    return weight.scatter_(1, batch.positives[:, None], 1e-12)

def random(batch, count, policy, progress):
    """Any unobserved items."""
    return draw(unlogged(batch, torch.ones_like(batch.r)), count)

def curriculum(batch, count, policy, progress):
    """The paper's default: unobserved items with low scores early in training, high ones late. The
    scores are the teacher's. Draw a pool of 2N−1 unobserved items, item i ∝ scores[i]/2 + 1/(2n)
    (1/(2n) is ours: without it, few low ones are drawn). Sort it from low to high score. Keep N
    neighbours, from place round(progress · (N−1)) on."""
    weight = unlogged(batch, 0.5 * batch.scores + 0.5 / batch.scores.shape[1])
    pool = torch.multinomial(weight, 2 * count - 1, replacement=True)               # (C, 2N-1)
    ranked = pool.gather(1, batch.scores.gather(1, pool).argsort(1))
    start = round(progress * (count - 1))
    return ranked[:, start:start + count]

def beam(batch, count, policy, progress):
    """The best of the policy's own beam, without the positive (the paper: N−1 of them)."""
    items = policy.recommend(batch.histories, count + 1, beams=count + 1)[0].to(batch.r.device)
    positives = batch.positives[:, None]
    order = (items == positives).int().argsort(dim=1, stable=True)      # the positive goes last
    items = items.gather(1, order)[:, :count]
    return items.where(items >= 0, positives)                   # fewer than N unseen: the positive

def drawn(batch, count, policy, progress):
    """Ours: N items drawn from the policy itself, without replacement."""
    items = policy.recommend(batch.histories, count, beams=count, sample=1.0)[0].to(batch.r.device)
    return items.where(items >= 0, batch.positives[:, None])    # fewer than N unseen: the positive

def by_reward(batch, count, policy, progress):
    """Ours: items drawn ∝ R, as P shall become. The logged item is often among them."""
    return draw(batch.r, count)

# A sampler of your own is a function (batch, N, policy, progress) → items (C, N), entered here.
SAMPLERS = {"session": session, "random": random, "curriculum": curriculum, "policy": beam,
            "drawn": drawn, "reward": by_reward}

# --- Training -------------------------------------------------------------------------------------
def loss_of(recipe, policy, reference, batch, reward, progress):
    """L = gr · L_GR(U, v) + λ · L_GFN, the means over the batch. L_GR alone without recipe.loss.
    reference: the frozen SFT policy, or None; progress: the share of training that is done."""
    if not recipe.loss:
        paths = policy(batch.tokens, batch.ends, batch.unseen, batch.positives[:, None])
        return -paths.log_steps.sum(-1).mean()
    batch.fill(reward)
    # Which paths to learn from: N of the sampler, maybe after the logged one. Off-policy: at
    # P = R/Z, TB and DB are 0 on every path, whoever drew it. (If several v follow one history, it
    # has several R, and no P fits them all. Which P training ends at, depends on the sampler.)
    policy.eval()                                               # no dropout while sampling
    items = SAMPLERS[recipe.sampler](batch, recipe.trajectories, policy, progress)  # (C, N)
    policy.train()
    if recipe.first:
        logged = recipe.chosen == "logged"
        chosen = batch.positives[:, None] if logged else draw(batch.r, 1)           # (C, 1)
        items = torch.cat([chosen, items], 1)                                       # (C, J)
    # What the policy says of them, and R. log F(s_L) is log R.
    asked = batch.tokens, batch.ends, batch.unseen, items
    paths = policy(*asked)
    device = paths.log_steps.device     # the policy's; if it is a Mac's "mps", R is on the CPU
    paths.log_pf = paths.log_steps.sum(-1)                      # Σ_l log P_F      (C, J)
    paths.log_r = batch.r.gather(1, items).log().to(device)                         # (C, J)
    if recipe.exact:                                            # F*(s) = Σ R of the items below s
        paths.child_flow = reward.ids.child_flows(batch.r, items).to(device)        # (C, J, L, K)
        paths.log_flow = paths.child_flow.sum(-1).log()         # F*(s) = Σ F* of its children
    paths.log_flow = torch.cat([paths.log_flow, paths.log_r[..., None]], -1)        # (C, J, L+1)
    paths.log_z = paths.log_flow[:, 0, 0]                       # Z = F(s_0); all paths begin there
    paths.policy_pos = paths.log_pf[:, 0]                       # the logged path, if recipe.first
    again = (items[:, 1:] == items[:, :1]).to(device)
    paths.policy_neg = paths.log_pf[:, 1:].masked_fill(again, NEVER)
    if reference:
        with torch.no_grad():
            paths.log_ref = reference(*asked).log_steps.sum(-1)                     # (C, J)
        paths.ref_pos = paths.log_ref[:, 0]
        paths.ref_neg = paths.log_ref[:, 1:]
    values = vars(recipe) | vars(paths)                         # TB is given log_z, log_pf, log_r
    L_GFN = recipe.loss(*[values[name] for name in recipe.given.split()])
    L_GR = -paths.policy_pos.mean() if recipe.gr else 0.0       # recipe_of refuses gr without first
    return recipe.gr * L_GR + recipe.lam * L_GFN

def train(name, recipe, policy, world):
    """The one training loop → the curve, a list of {"epoch", "loss", "ndcg@10"}, epoch 0: before.
    The rate rises to its peak and falls to 0; the weights after the last epoch are kept. policy:
    SFT's, or new for SFT itself; world: data, rows to train on, seed, settings, reward(recipe)."""
    reward = world.reward(recipe) if recipe.loss else None
    size = min(world.settings.batch, math.ceil(len(world.rows) / 20))   # few rows: small batches
    per_epoch = math.ceil(len(world.rows) / size)
    steps = recipe.epochs * per_epoch
    groups = [{"params": policy.lm.parameters()},
              {"params": policy.flow_head.parameters(), "lr": 10 * recipe.rate}]    # learned flows
    optimizer = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(200, steps // 10 + 1), steps)
    reference = copy.deepcopy(policy).eval() if "ref" in recipe.given else None  # log_ref, …
    curve = [{"epoch": 0, "loss": None, "ndcg@10": validate(policy, world.data)}]
    losses = []
    for epoch in range(1, recipe.epochs + 1):
        policy.train()
        seed = (world.seed, epoch)              # torch takes one number: it is made of this pair
        torch.manual_seed(int(np.random.default_rng(seed).integers(2 ** 63)))
        epoch_batches = batches(world.rows, world.data, size, policy, np.random.default_rng(seed))
        for batch in tqdm(epoch_batches, name, per_epoch, leave=False, disable=None):
            loss = loss_of(recipe, policy, reference, batch, reward, len(losses) / steps)
            if not torch.isfinite(loss).all():
                who = ", ".join(sorted({world.data.user_ids[user] for user in batch.users}))
                raise FloatingPointError(f"{name}: loss {loss} at step {len(losses)}; users {who}")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        loss = float(np.mean(losses[-per_epoch:]))
        ndcg = validate(policy, world.data)
        print(f"  {name}: epoch {epoch}/{recipe.epochs}, loss {loss:.3f}, "
              f"validation NDCG@10 {ndcg:.4f}", flush=True)
        curve.append({"epoch": epoch, "loss": loss, "ndcg@10": ndcg})
    return curve

# --- Recommending: beam search down the tree ------------------------------------------------------
def with_noise(log_p, parent):
    """Values by which children (B, W, K) compete when a list is drawn (Kool et al. 2019, Stochastic
    beams); log_p: their log P, parent (B, W, 1): values of their parents (the root's: any number).
    If each item had the value log P + Gumbel noise, the k items with the largest values would be a
    draw without replacement. A prefix has the largest value of the items below it, so one of its
    children has the same value as it. Here the prefix comes first: its children get noise, then
    they are moved, keeping their order, so that the largest has the value of the prefix."""
    own = log_p - torch.empty_like(log_p).exponential_().log_()     # − log Exp(1): Gumbel noise
    largest = own.amax(-1, keepdim=True)
    # −log(exp(−parent) + exp(−own) − exp(−largest)) is `parent` for the largest. Without overflow:
    #     parent − log(1 + exp(v)), v = parent − own + log(1 − exp(own − largest))
    v = parent - own + torch.log1p(-torch.exp(own - largest))
    return parent - F.softplus(v)                               # softplus(v) = log(1 + exp(v))

def grown(mask, parents):
    """A new beam sees all that its parent saw, and itself: mask (B, old W, keys), parents (B, W) →
    (B, W, keys + W). The cache keeps the beams of all levels; the mask hides what is not seen."""
    B, W = parents.shape
    itself = torch.full((W, W), NEVER, device=mask.device).fill_diagonal_(0)
    return torch.cat([mask.take_along_dim(parents[..., None], 1), itself.expand(B, W, W)], 2)

@torch.no_grad()
def beam_search(policy, histories, k, beams, guide=None, sample=0.0):
    """See Policy.recommend → items (B, k), scores (B, k)."""
    ids = policy.semantic_ids
    K = ids.num_codes
    lm = policy.lm.transformer
    tokens, ends = (x.to(ids.codes.device) for x in policy.tokens(histories))       # ends (B, 1)
    cache = DynamicCache()                                      # keys and values; lm fills it
    hidden = lm(tokens, cache).last_hidden_state                # (B, H, d), padding comes last
    hidden = hidden.take_along_dim(ends[..., None], 1)                              # (B, W = 1, d)
    place = torch.arange(tokens.shape[1], device=tokens.device)
    mask = torch.where(place > ends[..., None], NEVER, 0.0)                         # (B, W, keys)
    unseen = ids.unseen(histories)                              # (B, P + n), by node
    node = torch.zeros_like(ends)                               # (B, W) nodes of the tree; 0: root
    score = value = hidden.new_zeros(node.shape)    # (B, W): log P so far; what ranks the beams
    below = 0.0                                                 # log Σ guide of the items below
    if guide is not None:
        guide = guide.to(mask.device) * unseen[:, ids.num_prefixes:]                # (B, n)
        log_guide = ids.flows(guide).clamp(min=1e-30).log()     # (B, P + n), by node
    for level in range(ids.num_levels):
        head = lm.wte.weight[level * K:(level + 1) * K]                             # (K, d)
        child = ids.legal_children(node, unseen)                      # (B, W, K) −1: illegal
        # If fewer than W children are legal, illegal ones, nodes −1, fill the beam, at score NEVER.
        # At the next level, next_node[−1], an extra last row, makes all their children −1 as well
        logits = (hidden @ head.T).masked_fill_(child < 0, NEVER)
        if guide is not None:           # an illegal child may have any guide, here that of the root
            below = log_guide.gather(1, child.clamp(min=0).flatten(1)).view_as(logits)
        if sample:          # draw a code ∝ P_F^(1/sample) · Σ guide: the guide is part of its P
            score = (logits / sample + below).log_softmax(-1) + score[..., None]    # (B, W, K)
            value = with_noise(score, value[..., None])
        else:               # the guide only ranks beams: the next level has a finer one of its own
            score = logits.log_softmax(-1) + score[..., None]
            value = score + below
        child, score, value = (x.flatten(1) for x in (child, score, value))         # (B, W·K)
        best = value.topk(min(beams, value.shape[1]), 1).indices                    # (B, W)
        node, score, value = (x.gather(1, best) for x in (child, score, value))
        if level == ids.num_levels - 1:                         # children are items, nodes P + i
            break
        mask = grown(mask, parents=best // K)
        hidden = lm(level * K + best % K, cache, attention_mask=mask[:, None],
                    position_ids=(ends + 1 + level).expand_as(best)).last_hidden_state  # (B,W,d)
    nothing = [len(set(history)) == len(ids.codes) for history in histories]    # all were seen
    node[nothing] = -1
    items = F.pad((node - ids.num_prefixes).clamp(min=-1), (0, k), value=-1)[:, :k]
    return items, F.pad(value, (0, k))[:, :k].masked_fill(items < 0, -math.inf)

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
    """Recall@k of users (B,): is target (B,) in the first k of ranked (B, ≥ k)? −1: empty place."""
    # 1[target is among ranked_1 … ranked_k]: with one target, a user's recall is 0 or 1
    return (ranked[:, :k] == target[:, None]).any(1).float()

def ndcg_at(ranked, target, k):
    """NDCG@k of each user (B,): 1/log2(rank + 1), rank from 1; 0 where rank > k."""
    # One target, so the ideal DCG is 1 and NDCG = DCG = Σ_r 1[ranked_r = target] / log2(r + 1)
    hits = ranked[:, :k] == target[:, None]
    return (hits / torch.log2(torch.arange(2, hits.shape[1] + 2, device=hits.device))).sum(1)

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

# --- Saved models ---------------------------------------------------------------------------------
def save_model(model, folder):
    """Write a Policy or a Guided; the CM of a Guided has to be the built-in one."""
    path = Path(folder) / "semantic_ids.json"
    path.unlink(missing_ok=True)                                # written last: marks a whole model
    policy = getattr(model, "policy", model)
    policy.lm.save_pretrained(folder)
    guide = None
    if isinstance(model, Guided):
        guide = {"gamma": model.gamma, "cm": model.cm.options}
        safetensors.torch.save_file(model.cm.state_dict(), path.with_name("cm.safetensors"))
    ids = policy.semantic_ids
    report.write(path, {"num_codes": ids.num_codes, "codes": ids.codes.tolist(),
                        "beams": policy.beams, "catalogue": policy.catalogue, "guide": guide})

def load_model(folder, dropout=0.0, guided=True):
    """The saved Policy or Guided in eval mode, with recommend(histories, k); or InputError."""
    try:
        table = json.loads((Path(folder) / "semantic_ids.json").read_text(encoding="utf-8"))
        ids = SemanticIDs(table["codes"], table["num_codes"])
        lm = GPT2LMHeadModel.from_pretrained(                   # safetensors: no pickle
            folder, use_safetensors=True, resid_pdrop=dropout, embd_pdrop=dropout)
        policy = Policy(ids, lm.config.n_positions - ids.num_levels, lm=lm).eval()
        fits = lm.config.vocab_size == policy.user_token + 1 + len(ids.codes)
        check(fits, "its IDs do not fit its weights")
        policy.beams = table["beams"]
        policy.catalogue = table["catalogue"]
        if not (guided and table["guide"]):
            return policy
        tables = safetensors.torch.load_file(Path(folder) / "cm.safetensors")
        cm = CollaborativeModel(table["guide"]["cm"], **tables)
        return Guided(policy, cm, table["guide"]["gamma"])
    except Exception as error:                                  # whatever is wrong with the files
        raise InputError(f"{folder} holds no saved model of this program (a guided one with a CM "
                         f"of your own is never saved): {error}") from None

# --- Settings, and methods by name ----------------------------------------------------------------
@dataclass
class Settings:
    """All settings, each a command-line flag. PRESETS changes some of the defaults with --data."""
    data: str = HfArg(default="toy", help="toy, ml-100k (see PRESETS), or a folder of two CSVs")
    preset: str = HfArg(default="", help="whose PRESETS and TUNED (default: those of --data)")
    methods: str = HfArg(default="pop,cm,sft,sft-continued,tb-huber,sft+cm,tb-huber+cm", help="pop,"
                         " cm, RECIPES, NAME+cm: guided by CM; changes: tb:lam=2:sampler=policy")
    sft: str = HfArg(default="", help="changes in the recipe of sft, like epochs=12:rate=.003")
    recipe: str = HfArg(default="", help="changes in all other recipes, like epochs=6:w_s=0")
    seeds: str = HfArg(default="42", help="comma-separated: every method runs once with each")
    out: str = HfArg(default="", help="folder for results (default: runs/NAME-OF-DATA)")
    resume: bool = HfArg(default=False, help="keep the finished methods in --out and go on")
    quick: bool = HfArg(default=False, help="a smoke run in seconds: 100 users, one epoch")
    device: str = HfArg(default="auto", help="where to train: auto, cuda, mps or cpu")
    ids: str = HfArg(default="mixed", help="content (text), mixed (text, log), item, or FILE.csv")
    codes: int = HfArg(default=0, help="K, codes a level (default: a power of 2, about n / 24)")
    levels: int = HfArg(default=3, help="L, levels of an ID: as in the paper's examples")
    window: int = HfArg(default=20, help="items of the history that are read: the last say most")
    width: int = HfArg(default=128, help="hidden size: enough for 10^4 items on two cores")
    layers: int = HfArg(default=3, help="transformer blocks: enough to compare items")
    batch: int = HfArg(default=64, help="rows a step: on a CPU, many small steps learn more")
    beams: int = HfArg(default=20, help="beam width, saved with a model: twice the ten items")
    temperatures: list[float] = HfArg(default_factory=list, help="test lists drawn at these, too")
    oracle: str | None = HfArg(default=None, metadata={"nargs": "?", "const": "tb"},
                               help="train four users with this method's loss: is P = R/Z?")
    recommend: list[str] = HfArg(default_factory=list, help="print ten titles for this history")
    model: str = HfArg(default="", help="the saved model for --recommend, like runs/toy/tb-42")
    sample: float = HfArg(default=0.0, metadata={"nargs": "?", "const": 1.0},
                          help="draw the titles of --recommend, at this temperature")

PRESETS = {
    "toy": dict(methods="pop,cm,cm:debias=1,sft,tb,sft+cm,tb+cm", width=64, layers=2, batch=16),
    "ml-100k": dict(codes=256, width=96, beams=50)}     # many beams end at items of the history
TUNED = {           # changes of RECIPES for a data set, chosen on validation; "*": all but sft
    "toy": {"sft": "epochs=12:rate=.003",
            "*": "epochs=8:rate=.003:teacher=cm:debias=1:w_a=.2:w_y=.75",
            "sdpo": "rate=.0009:beta=1:sampler=drawn:trajectories=7",
            "grpo": "beta=.03",
            "tb-paper": "lam=10:dropout=0",
            "db": "sampler=drawn:trajectories=8",
            "tb": "sampler=drawn:trajectories=8",
            "tb-huber": "sampler=drawn:trajectories=8",
            "distill": "dropout=.1"},
    "ml-100k": {"sft": "rate=.003", "sft-continued": "rate=.00045", "*": "epochs=4:dropout=.2"}}

def parse(argv):
    """Settings from the command line; a mistake ends in one line on stderr and status 2."""
    parser = HfArgumentParser(Settings, allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.error = lambda message: parser.exit(2, f"error: {message}; see --help\n")
    asked = [word for word in argv if word not in ("-h", "--help")]
    first = parser.parse_args(asked)            # once for the preset, which --help shows; then all
    parser.set_defaults(**PRESETS.get(first.preset or first.data, {}))
    settings = Settings(**vars(parser.parse_args(argv)))
    if bool(settings.recommend) != bool(settings.model) or settings.sample and not settings.model:
        parser.error("--recommend and --model go together, and --sample with them")
    name = Path(settings.data).resolve().name
    settings.out = settings.out or f"runs/{name}" + "-quick" * settings.quick
    settings.sft += ":epochs=1" * settings.quick
    settings.recipe += ":epochs=1" * settings.quick
    return settings

def check_numbers(where, values):
    """Raise InputError if a number of a Settings or Recipe is out of its range."""
    zero = "codes gr lam debias dropout w_a w_y w_s sample".split()
    for name, found in vars(values).items():
        for value in found if name == "temperatures" else [found]:
            if type(value) in (int, float):
                least = 0 if name in zero else 1e-9
                most = 1 if name == "dropout" else 1e9
                check(least <= value < most, f"{where}{name} {value} is out of range")

def check_choice(value, choices, what):
    """Raise InputError, which says what was chosen, if a value is not one of the choices."""
    check(value in choices, f"{what} is not available; choose from {', '.join(choices) or '–'}")

def base_of(name):
    """A method's name without its changes: tb:lam=2+cm:gamma=3 → tb+cm."""
    policy, plus, guide = name.partition("+cm")
    return policy.partition(":")[0] + plus + guide.partition(":")[0]

def recipe_of(name, settings):
    """The Recipe of a method, or InputError: the entry of RECIPES, changed by TUNED, --sft or
    --recipe, and the name itself. NAME+cm uses only debias and gamma, for its guide."""
    base = base_of(name)
    tuned = TUNED.get(settings.preset or settings.data, {})
    parts = [tuned.get("*", ""), tuned.get(base, ""), settings.recipe]
    own = name.rpartition("+cm")[2].partition(":")[2]           # tb:X → X, tb:X+cm:Y → Y
    if base == "sft":
        parts = [tuned.get("sft", "")]
        own = f"{settings.sft}:{own}"
    elif base in ("pop", "cm"):
        parts = []
    parts.append(own)
    changes = [change for change in ":".join(parts).split(":") if change]
    fields = vars(Recipe())
    parser = HfArgumentParser(Recipe, allow_abbrev=False, add_help=False)
    parser.set_defaults(**vars(RECIPES.get(base, Recipe())))
    parser.error = lambda message: check(False, f"{name}: {message}; fields: {', '.join(fields)}")
    recipe = Recipe(**vars(parser.parse_args([f"--{change}" for change in changes])))
    for what in filter(None, own.split(":")):
        check_choice(what.partition("=")[0], facts_of(name, recipe), f"{name}: {what}")
    check_numbers(f"{name}: ", recipe)
    check_choice(recipe.sampler, SAMPLERS, f"{name}: sampler={recipe.sampler}")
    check_choice(recipe.teacher, ("cm", "product"), f"{name}: teacher={recipe.teacher}")
    check(recipe.given == RECIPES.get(base, Recipe()).given, f"{name}: given belongs to the loss")
    for what in recipe.given.split():
        check_choice(what, [*Paths.__dataclass_fields__, *fields], f"{name}: given: {what}")
    check(recipe.w_a + recipe.w_y + recipe.w_s > 0, f"{name}: w_a, w_y and w_s are all 0")
    check(recipe.exact or "child" not in recipe.given, f"{name}: its loss needs exact=1")
    several = "log_ref" not in recipe.given or recipe.first + recipe.trajectories > 1
    check(several, f"{name}: it compares paths: trajectories > 1")
    positive = recipe.loss and recipe.gr > 0 or "pos" in recipe.given       # needs the logged path
    check(recipe.first or not positive, f"{name}: gr > 0 and policy_pos need first=1")
    return recipe

def facts_of(name, recipe):
    """The fields of a recipe that matter for a method, as numbers and words."""
    facts = {**vars(recipe), "loss": getattr(recipe.loss, "__name__", "L_GR alone")}
    base = base_of(name)
    if base not in RECIPES:                                     # NAME+cm: of its guide
        matter = {"pop": (), "cm": ("debias",)}.get(base, ("debias", "gamma"))
    elif recipe.loss is None:
        matter = ("loss", "rate", "dropout", "epochs")
    else:
        idle = {"beta"} - {*recipe.given.split()} | ({"gamma"} if recipe.teacher == "cm" else set())
        matter = facts.keys() - idle
    return {what: value for what, value in facts.items() if what in matter}

def check_settings(settings):
    """Check the settings and set the device → (names of methods in the table's order, seeds)."""
    there = {"cuda": torch.cuda, "mps": torch.backends.mps}
    devices = [device for device in there if there[device].is_available()] + ["cpu"]
    settings.device = devices[0] if settings.device == "auto" else settings.device
    check_choice(settings.device, devices, f"--device {settings.device}")
    check_numbers("--", settings)
    if settings.preset:
        check_choice(settings.preset, PRESETS, f"--preset {settings.preset}")
    seeds = [seed.strip() for seed in settings.seeds.split(",")]
    whole = all(seed.isdecimal() and len(seed) < 19 for seed in seeds)
    check(whole, f"--seeds {settings.seeds} are not numbers like 42,43")
    methods = ["pop", "cm", *RECIPES, *[f"{method}+cm" for method in RECIPES]]
    names = []
    for name in map(str.strip, settings.methods.split(",")):
        check_choice(base_of(name), methods, f"--methods {name}")
        if base_of(name) not in ("pop", "cm"):
            names += ["sft", name.partition("+cm")[0]]          # all start from SFT
        names.append(name)
    names = sorted(dict.fromkeys(names), key=lambda name: methods.index(base_of(name)))
    return names, list(dict.fromkeys(map(int, seeds)))

# --- The experiment: data → IDs, CM → SFT → fine-tuned policies → table ---------------------------
def check_cm(cm, data):
    """Raise InputError if a CM of your own does not return what r_ŷ and the guide need."""
    histories = [[], *data.train[:99]]                          # an empty history, too
    past = [history[:len(history) // 2] for history in histories]
    after = [history[len(history) // 2:] for history in histories]
    asked = "scores(histories, following) of a CM gets B lists of items and has to return"
    size = (len(past), len(data.titles))
    for scores in (cm.scores(past), cm.scores(past, after)):    # as when it serves, as in training
        kind = (type(scores).__name__, getattr(scores, "dtype", ""), *getattr(scores, "shape", ()))
        check(torch.is_tensor(scores) and scores.is_floating_point() and scores.shape == size,
              f"{asked} a tensor of floats (B, n), here {size}, not {kind}")
        sums = scores.sum(1)
        check(scores.min() >= 0 and (sums - 1).abs().max() < 1e-3,
              f"{asked} numbers ≥ 0, a row's sum is 1; here the smallest number is "
              f"{scores.min():.3g}, the sums go from {sums.min():.3g} to {sums.max():.3g}")

@dataclass
class World:
    """What all methods of one seed share, made from training items alone."""
    data: object                    # the Dataset of load_data: see data/__init__.py
    settings: Settings              # as the command line has set them
    seed: int                       # of the IDs, of new policies, of training
    ids: SemanticIDs                # one row of codes an item
    cm: object                      # CollaborativeModel, or a CM of your own
    rows: list                      # rows to train on, of training_rows
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
        elif settings.ids == "item":                            # a softmax over items, no tree
            ids = SemanticIDs(np.arange(n)[:, None], n)
        else:
            codes = read_ids(settings.ids, data.item_ids)
            ids = SemanticIDs(codes, max(map(max, codes)) + 1)
        print(f"seed {seed}: {ids.health()}", flush=True)
        device = "cuda" if settings.device == "cuda" else "cpu"     # mps has no sparse matrices
        cm = cm or CollaborativeModel.fit(data.train, n).to(device)
        rows = list(training_rows(data.train, settings.window))
        return cls(data, settings, seed, ids.to(device), cm, rows)

    def folder(self, name):
        """Where a method's run.json and model are; without ":", which some systems forbid."""
        return Path(self.settings.out) / f"{name.replace(':', ',')}-{self.seed}"

    def policy(self, name="", dropout=0.0):
        """A new policy, or the one that a method has saved."""
        settings = self.settings
        if name:
            return Policy.from_pretrained(self.folder(name), dropout).to(settings.device)
        torch.manual_seed(self.seed)
        ids = copy.deepcopy(self.ids)                           # a copy: .to moves it
        policy = Policy(ids, settings.window, settings.width, settings.layers, dropout)
        policy.beams = settings.beams
        policy.catalogue = {"item_ids": self.data.item_ids, "titles": self.data.titles}
        return policy.to(settings.device)

    def cm_of(self, recipe):
        """The CM, divided by popularity if the recipe says so."""
        return self.cm.debiased(recipe.debias) if recipe.debias else self.cm

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

def key_of(name, world):
    """The inputs of a run that --resume compares; of the code, the loss and the sampler alone."""
    scores = world.cm.scores(world.data.train[:20]).cpu().numpy()
    key = {"checksum of data": world.data.sizes["checksum"],
           "checksum of CM": zlib.crc32(scores.round(6).tobytes()),
           "checksum of ids": zlib.crc32(world.ids.codes.cpu().numpy().tobytes())}
    if base_of(name) in ("pop", "cm"):
        parts = [name]
    else:                                                       # trained, or of a trained policy
        parts = dict.fromkeys(("sft", name.partition("+cm")[0], name))
        matter = ("window", "width", "layers", "batch", "beams", "temperatures")
        key |= {what: vars(world.settings)[what] for what in matter}
    for part in parts:
        recipe = recipe_of(part, world.settings)
        key |= {f"{part} {what}": value for what, value in facts_of(part, recipe).items()}
        if recipe.loss:
            code = inspect.getsource(recipe.loss) + inspect.getsource(SAMPLERS[recipe.sampler])
            key["checksum of loss and sampler"] = zlib.crc32(code.encode())
    return key

def model_of(name, recipe, world):
    """Train a method, or put it together → its model, its curve. A CM has scores, no recommend."""
    base = base_of(name)
    if base == "pop":
        return CollaborativeModel.fit(world.data.train, len(world.data.titles), popularity=1.0), []
    if base == "cm":
        return world.cm_of(recipe), []
    if base.endswith("+cm"):
        model = Guided(world.policy(name.partition("+cm")[0]), world.cm_of(recipe), recipe.gamma)
        if isinstance(model.cm, CollaborativeModel):
            save_model(model, world.folder(name))
        else:
            print(f"{name}: not saved, as its CM is yours; use Guided(load_model(…), cm).recommend")
        return model, []
    policy = world.policy("" if base == "sft" else "sft", recipe.dropout)
    curve = train(name, recipe, policy, world)
    best = max(curve[base == "sft":], key=lambda point: point["ndcg@10"])   # SFT starts by chance
    if curve[-1]["ndcg@10"] < 0.9 * best["ndcg@10"]:
        flag = "--sft" if base == "sft" else "--recipe"
        print(f"{name}: validation was best after epoch {best['epoch']} (0: before training), the "
              f"last is kept; try {flag} with fewer epochs=… or a lower rate=…")
    save_model(policy, world.folder(name))
    return world.policy(name), curve                            # tested as it was saved

def run_method(name, world, key):
    """Train and test one method with one seed → its entry of results.json["runs"]."""
    data = world.data
    recipe = recipe_of(name, world.settings)
    facts = facts_of(name, recipe)
    print(f"{name}, seed {world.seed}:", *[f"{what}={value}" for what, value in facts.items()])
    started = time.time()
    model, curve = model_of(name, recipe, world)
    middle = time.time()
    recommend = getattr(model, "recommend", lambda past: best_unseen(model.scores(past), past))
    metrics, by_user, ranked = evaluate(recommend, data, world.ids)
    drawn = {}                                                  # metrics of lists that are drawn
    for temperature in world.settings.temperatures if hasattr(model, "recommend") else ():
        torch.manual_seed(world.seed)
        drawn[temperature] = evaluate(partial(recommend, sample=temperature), data, world.ids)[0]
    entry = {"method": name, "seed": world.seed, "recipe": facts, "metrics": metrics,
             "drawn": drawn, "curve": curve, "by_user": by_user,
             "seconds": {"train": middle - started, "eval": time.time() - middle},
             "train_examples": len(curve[1:]) * sum(map(len, data.train)),
             "lists": (ranked if data.truth else ranked[:1]).tolist()}     # ranked[:1]: user 0
    if curve and len(data.titles) <= 2000:                      # P of all n items at once
        # SFT is judged by the R of tb, as it is without --recipe: so --resume may keep the numbers
        plain = "" if isinstance(world.cm, CollaborativeModel) else "debias=0"
        judge = recipe if recipe.loss else recipe_of("tb", replace(world.settings, recipe=plain))
        metrics |= learned(model, world.reward(judge), data)
    report.write(world.folder(name) / "run.json", {"key": key, **entry})
    return entry

@torch.no_grad()
def distribution(policy, histories):
    """P(v | U) of every item (B, n), 256 paths at a time: attention is quadratic in a row."""
    policy.eval()
    parts = torch.arange(len(policy.semantic_ids.codes)).expand(len(histories), -1).split(256, 1)
    steps = [policy.path_log_probs(histories, items) for items in parts]            # (B, 256, L)
    return torch.cat(steps, 1).sum(-1).exp().cpu()

def learned(policy, reward, data):
    """At 50 validation contexts: KL(R/Z ‖ P), entropy of P (nats), R's share in the ten best."""
    users = range(0, len(data.train), math.ceil(len(data.train) / 50))
    histories = [data.train[user] for user in users]
    device = reward.ids.codes.device
    positives = torch.tensor([data.histories[user][-2] for user in users], device=device)
    liked = torch.tensor([data.liked[user][-2] for user in users], device=device)
    unseen = reward.ids.unseen(histories)[:, reward.ids.num_prefixes:]              # (50, n)
    r = reward(reward.teacher.scores(histories).to(device), positives, liked, unseen).cpu()
    target = r / r.sum(1, keepdim=True)                                             # R/Z (50, n)
    p = torch.cat([distribution(policy, [history]) for history in histories]).clamp(min=1e-30)
    ten = policy.recommend(histories)[0].cpu()
    share = target.gather(1, ten.clamp(min=0)) * (ten >= 0)
    return {"kl": F.kl_div(p.log(), target, reduction="batchmean").item(),
            "entropy": -(p * p.log()).sum(1).mean().item(), "reward@10": share.sum(1).mean().item()}

# --- Command line ---------------------------------------------------------------------------------
def run(settings, cm=None):
    """The whole job → results. cm: a CM of your own, with scores(histories, following=None)."""
    names, seeds = check_settings(settings)
    # sft and tb also if not asked for: a wrong --sft or --recipe fails now, not after hours
    recipes = {name: recipe_of(name, settings) for name in (*names, "sft", "tb")}
    for name, recipe in recipes.items():
        check(not (recipe.debias and cm),
              f"{name}: debias is of the built-in CM; pass --recipe debias=0, and no cm:debias")
    trained = [name for name in names if base_of(name) in RECIPES]
    used = set()                                                # fields of recipes
    for name in names:
        used |= facts_of(name, recipes[name]).keys()
    for change in filter(None, settings.recipe.split(":") if trained else ()):
        check(change.partition("=")[0] in used, f"--recipe {change}: no method of this run uses it")
    epochs = [f"{name} {recipes[name].epochs}" for name in trained]
    print("epochs:", ", ".join(epochs) or "nothing is trained")
    data = load_data(settings.data, settings.quick)
    if cm:
        check_cm(cm, data)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, np)}
    about = {"data": data.sizes, "settings": vars(settings), "versions": versions}
    worlds = [World.prepare(seed, data, settings, cm) for seed in seeds]
    jobs = []
    for world in worlds:
        jobs += [(name, world, key_of(name, world)) for name in names]
    kept = {}
    for name, world, key in jobs:                               # refuse now, not after hours
        path = world.folder(name) / "run.json"                  # written last: a finished run
        if settings.resume and path.exists():
            kept[name, world.seed] = report.earlier_run(path, key)
        elif path.exists():
            path.unlink()                                       # train all of it anew
            path.with_name("semantic_ids.json").unlink(missing_ok=True)
    for old in ("results.md", "diversity.png", "exposure.png"):
        (Path(settings.out) / old).unlink(missing_ok=True)      # of an earlier run in this folder
    runs = []
    for name, world, key in jobs:                               # results so far; finish: all
        report.write(Path(settings.out) / "results.json", report.results_of(runs, about))
        runs.append(kept.get((name, world.seed)) or run_method(name, world, key))
    return report.finish(settings.out, runs, about, data)

def even(batch, count, policy, progress):
    """The sampler of --oracle: P ∝ R/Z + 1/n of unseen items, so that none is forgotten."""
    target = batch.r / batch.r.sum(1, keepdim=True)
    return draw((target + 1 / target.shape[1]) * (target > 0), count)
SAMPLERS["even"] = even

def run_oracle(settings):
    """Train from random weights on four contexts, where R/Z is known: does P reach it?"""
    _, seeds = check_settings(settings)
    losses = [name for name, recipe in RECIPES.items() if recipe.loss and "ref" not in recipe.given]
    check_choice(base_of(settings.oracle), losses, f"--oracle {settings.oracle}")
    changes = "gr=0:lam=1:first=1:sampler=even:trajectories=64:teacher=cm:rate=.002:dropout=0"
    settings = replace(settings, recipe=f"{changes}:epochs=15:{settings.recipe}")
    recipe = recipe_of(settings.oracle, settings)
    data = load_data(settings.data, settings.quick)
    check(len(data.titles) <= 2000, "--oracle scores every item at once: at most 2,000 items")
    world = World.prepare(seeds[0], data, settings)
    policy = world.policy()
    data = replace(data, train=data.train[:4], histories=data.histories[:4])
    last = {row.user: row for row in training_rows(data.train, settings.window)}    # of each user
    rows = [row._replace(target=row.stop - 1) for row in last.values()]     # its last item alone
    world = replace(world, data=data, rows=100 * rows, settings=replace(settings, batch=4))
    batch = batch_of(rows, data, policy)
    batch.fill(world.reward(recipe))
    target = (batch.r / batch.r.sum(1, keepdim=True)).cpu()     # P* = R/Z
    before = distribution(policy, batch.histories)
    path = Path(settings.out) / "oracle.png"
    path.parent.mkdir(parents=True, exist_ok=True)              # fails now, not after training
    facts = [f"{what}={value}" for what, value in facts_of(settings.oracle, recipe).items()]
    print("on four contexts; their validation says nothing:", *facts)
    train(settings.oracle, recipe, policy, world)               # 400 rows: 100 steps an epoch
    after = distribution(policy, batch.histories)
    distance = [f"{(P - target).abs().sum(1).mean():.4f}" for P in (before, after)]     # L1
    print("mean L1 distance of P from R/Z: {} before, {} after; picture:".format(*distance), path)
    report.figures.plot_flows(path, {
        "codes": world.ids.codes.tolist(), "titles": data.titles,
        "history": [data.titles[item] for item in batch.histories[0]],
        "teacher": target[0].tolist(), "teacher_name": "R/Z",
        "learned": after[0].tolist(), "learned_name": f"P, learned by {settings.oracle}"})

def print_recommendations(settings):
    """Ten titles by a saved model, for a history of titles or ids, oldest first."""
    check_numbers("--", settings)
    model = load_model(settings.model)
    titles = model.catalogue["titles"]
    history = [find_item(name, model.catalogue["item_ids"], titles) for name in settings.recommend]
    items, scores = model.recommend([history], sample=settings.sample)
    print("drawn in this order" if settings.sample else " share  of the weight of these ten; title")
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
