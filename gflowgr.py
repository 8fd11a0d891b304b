"""GFlowGR: fine-tune a generative recommender so that P(item | user) follows a reward.

A generative recommender reads the items that a user took, and writes the semantic ID of the next
one, code by code. Supervised fine-tuning (SFT) on the log teaches what was shown, not what the user
would like: exposure bias. GFlowGR reads an ID as a path down a tree and trains a GFlowNet on it,
with a loss called trajectory balance (TB): the probability of an item shall be proportional to its
reward R. R mixes the logged action, the score of another recommender, the *teacher* (the paper's
collaborative model, CM), and the similarity of IDs. A step of training (`loss_of`), in short:

    for each logged item v and the history U before it:
        R     = .2 r_a + .75 r_ŷ + .05 r_s + .001/m, of each of the m items that are not in U
                r_a is 1 at v, else 0; r_ŷ: by the teacher's scores; r_s: by codes shared with v
        Z     = the sum of R, about 1
        items = 8 unseen items, drawn from P(· | U)
        L_GR  = −log P(v | U), the loss of SFT
        L_GFN = mean over the items of (log Z + log P − log R)², for instance: TB
    loss = mean over all (U, v) of L_GR + λ · L_GFN

A context (U, v) is a user's history, and the item that was logged next. An ID has L codes, each
from 0 to K − 1. IDs make a tree; a path s_0 … s_L leads from the empty prefix to an item. Nodes are
numbers, first M prefixes, then n items. Here the prefixes (), (0), (1) are 0, 1, 2, items 3, 4, 5:
    ID (0, 0), path 0 1 3        ID (0, 1), path 0 1 4        ID (1, 1), path 0 2 5
The flow F of a node is the sum of R over the items below it. So F(s_0) = Z, and F(s_L) = R.
Letters in shapes: C contexts, J paths each, n items, B users; d width, l codes known, W beams.
"""
import argparse
import copy
import json
import math
import os
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")       # models as small as these: one thread is best
import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional
from tqdm import tqdm

from data import InputError, check, figures, find_item, load_data, read_ids, report
from reward import TEACHERS, Teacher, comprehensive_reward
from tokenizer import SemanticIDs, item_features, look_up, rows_and_columns

NEVER = -1e9            # log P of an illegal code; −inf would make losses nan

# --- The paper's losses: pure functions of tensors, natural logs ----------------------------------
def trajectory_balance(log_z, log_pf, log_r):
    """TB (Malkin et al. 2022): log Z of C contexts (C,), log P and log R of J whole paths in each
    (C, J) → scalar.
    P_F is the policy's probability of the next code, so log P = Σ_l log P_F(s_{l+1} | s_l). Z, the
    paper's Z(U), is the sum of R over all items (ours: unseen ones; P of others is 0). If several
    paths led to an item, TB would also need P_B, how likely each is; in a tree one does: P_B is 1.
    Mean over all paths of (log Z + log P − log R)²:
    >>> log_pf, log_r = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    >>> round(trajectory_balance(torch.zeros(1), log_pf, log_r).item(), 4)   # (0 + (log 1/2)²) / 2
    0.2402
    """
    return (log_z[:, None] + log_pf - log_r).square().mean()

def detailed_balance(log_flow, log_steps):
    """Detailed balance (DB, Bengio et al. 2023) → scalar: each step is in balance. log_flow
    (C, J, L+1): log F of s_0 … s_L, for each path; log_steps (C, J, L): log P_F of its steps.
    Mean over all paths of Σ_l (log F(s_l) + log P_F(s_{l+1} | s_l) − log F(s_{l+1}))²."""
    return (log_flow[..., :-1] + log_steps - log_flow[..., 1:]).square().sum(-1).mean()

# --- The policy: P_F(next code | user, codes so far) ----------------------------------------------
class Policy(torch.nn.Module):
    """A small GPT-2 reads a history, a small net writes the next item's ID. Plus the table of IDs.
        token l·K + c       code c of level l, both from 0
        token L·K           <user>, which begins each history
    An item of a history is one position: the sum of the embeddings of its codes (ours; the paper
    has a position for each code). If K = 64, an item with the ID (3, 5) is token 3 + token 69.
    GPT-2 looks back only. So its state at a place knows the items up to there and none after it:
    a log that is read once gives the states of all its histories, as in any language model.
    The net that writes sees the history through this one state (ours, as RQ-Transformer, Lee et al.
    2022; in the paper, one transformer reads and writes)."""
    def __init__(self, semantic_ids, window=20, width=64, layers=2, dropout=0.0, catalogue=None):
        super().__init__()
        self.semantic_ids = semantic_ids
        self.window = window                                    # items of a history that are read
        self.catalogue = catalogue or {}                        # saved with it: item_ids, titles
        L, K = semantic_ids.num_levels, semantic_ids.num_codes
        size = transformers.GPT2Config(
            vocab_size=L * K + 1, n_embd=width, n_layer=layers,
            n_head=1 if width % 32 else width // 32,            # heads of 32 dimensions
            n_positions=window + 1,                             # <user>, items
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=0.0,
            bos_token_id=None, eos_token_id=None,
            activation_function="gelu_pytorch_tanh")            # GPT-2's own, computed faster
        self.lm = transformers.GPT2LMHeadModel(size)            # from scratch, not pretrained
        self.writer = torch.nn.Sequential(torch.nn.Linear(2 * width, 4 * width), torch.nn.GELU(),
                                          torch.nn.Linear(4 * width, width))
        self.flow_head = torch.nn.Linear(width, 1)              # log F(s); log Z at s_0
        torch.nn.init.zeros_(self.flow_head.weight)     # it begins near log Z = 0: Z is about 1
        # (n + 1, L) tokens of each item; the last row, found by −1, is <user>, L times
        tokens = semantic_ids.codes + K * torch.arange(L)
        tokens = functional.pad(tokens, (0, 0, 0, 1), value=L * K)
        self.register_buffer("tokens", tokens, persistent=False)

    def read(self, rows):
        """The states of GPT-2 in rows, lists of at most `window` items → (C, d), row after row. A
        row of 3 items has 4 states: after <user> alone, and after each of its items."""
        items = [torch.tensor([-1, *row], device=self.tokens.device) for row in rows]
        items = torch.nn.utils.rnn.pad_sequence(items, True, -1)        # at the end: never seen
        embeds = self.lm.transformer.wte(self.tokens[items]).sum(2)
        states = self.lm.transformer(inputs_embeds=embeds, use_cache=False).last_hidden_state
        return torch.cat([line[:len(row) + 1] for line, row in zip(states, rows)])

    def know(self, histories):
        """What `forward` needs of C histories: states after their last items (C, d), which nodes
        lead to unseen items (C, M + n). InputError for an item that is not in the catalogue."""
        unseen = self.semantic_ids.unseen(histories)
        rows = [history[-self.window:] for history in histories]
        ends = torch.tensor([len(row) + 1 for row in rows]).cumsum(0) - 1   # the last of each row
        return self.read(rows)[ends.to(unseen.device)], unseen

    def forward(self, known, codes):
        """What comes next on J paths of each of C histories, of which l codes are known: codes
        (C, J, l). At the l + 1 prefixes s_0 … s_l of each path: log P_F of each code (C, J, l + 1,
        K), NEVER if it leads to no unseen item; the learned log F (C, J, l + 1)."""
        ids = self.semantic_ids
        states, unseen = known
        wte = self.lm.transformer.wte                           # the embeddings of all tokens
        C, J, l = codes.shape
        tokens = codes + ids.num_codes * torch.arange(l, device=codes.device)   # l·K + c
        prefix = wte(tokens).cumsum(2)                          # (C, J, l, d) the codes so far
        prefix = functional.layer_norm(prefix, prefix.shape[3:])    # or it drowns beside the state
        state = states[:, None, None].expand(-1, J, l + 1, -1)
        more = self.writer(torch.cat([state[:, :, 1:], prefix], 3))             # at s_1 … s_l
        hidden = state + functional.pad(more, (0, 0, 1, 0))     # (C, J, l + 1, d); 0 more at s_0
        # As in GPT-2, a token's logit is hidden · its embedding. Here: of the K codes of a level
        heads = wte.weight[:-1].unflatten(0, (ids.num_levels, -1))[:l + 1]      # (l + 1, K, d)
        logits = torch.einsum("cjsd,skd->cjsk", hidden, heads)
        # A code is legal if it leads to an unseen item (ours: P of what was seen is 0). Twice, as
        # log_softmax makes all codes equally likely below a prefix without unseen items
        legal = look_up(unseen, ids.next_node[ids.walk(codes)])                 # (C, J, l + 1, K)
        log_probs = logits.masked_fill(~legal, NEVER).log_softmax(-1).masked_fill(~legal, NEVER)
        return log_probs, self.flow_head(hidden)[..., 0]

    def path_log_probs(self, known, items):
        """log P_F of each step on the paths of items (C, J) → (C, J, L); NEVER if it is illegal."""
        codes = self.semantic_ids.codes[items]                                      # (C, J, L)
        log_probs, _ = self(known, codes[..., :-1])                                 # (C, J, L, K)
        return log_probs.gather(3, codes[..., None])[..., 0]

    @torch.no_grad()
    def sample(self, known, count):
        """`count` items drawn from P for each history (C, count), code by code, so with repeats."""
        ids = self.semantic_ids
        codes = ids.codes.new_zeros(len(known[0]), count, 0)                        # none yet
        for _ in range(ids.num_levels):
            log_probs, _ = self(known, codes)
            log_probs = log_probs[:, :, -1]                     # (C, count, K) of the next code
            # Gumbel's random number is −log of an exponential one. The code with the largest
            # log P + Gumbel's number is a draw from P
            code = (log_probs - torch.empty_like(log_probs).exponential_().log()).argmax(2)
            codes = torch.cat([codes, code[..., None]], 2)                          # (C, count, l)
        return ids.walk(codes)[..., -1] - ids.num_prefixes      # nodes of items come last

    @torch.no_grad()
    def beam_search(self, known, k, beams):
        """The k items of highest P (C, k), best first, and log P (C, k); −1 and −inf where fewer
        are unseen. A beam is the codes of a prefix. Of all beams with one code more, the W best are
        the next beams. A prefix of low P is cut off with all items below it: more beams miss less.
        """
        ids = self.semantic_ids
        codes = ids.codes.new_zeros(len(known[0]), 1, 0)        # one beam, which has no code yet
        log_p = known[0].new_zeros(len(known[0]), 1)                                # (C, W = 1)
        for _ in range(ids.num_levels):
            log_probs, _ = self(known, codes)
            log_p = (log_p[..., None] + log_probs[:, :, -1]).flatten(1)             # (C, W·K)
            log_p, best = log_p.topk(min(max(beams, k), log_p.shape[1]), 1)         # (C, new W)
            beam = best[..., None] // ids.num_codes             # w·K + c is code c of beam w
            codes = torch.cat([codes.take_along_dim(beam, 1), best[..., None] % ids.num_codes], 2)
        nodes = functional.pad(ids.walk(codes)[..., -1], (0, k), value=-1)[:, :k]   # (C, k)
        log_p = functional.pad(log_p, (0, k))[:, :k]
        unseen = look_up(known[1], nodes)                       # False at −1, which is no node
        items = (nodes - ids.num_prefixes).masked_fill(~unseen, -1)
        return items, log_p.masked_fill(~unseen, -math.inf)

    def recommend(self, histories, k=10, beams=20):
        """Beam search after B histories → items (B, k), log P (B, k): never an item of the history,
        never a duplicate. InputError for an item that is not in the catalogue."""
        return self.beam_search(self.know(histories), k, beams)

    def save_pretrained(self, folder):
        """Write a folder that `from_pretrained` loads: see `save`, after the lecture."""
        save(self, folder)

    @staticmethod
    def from_pretrained(folder):
        """The saved Policy, in eval mode; InputError if the folder holds none."""
        return load(folder)

# --- The adaptive trajectory sampler: which items to learn from -----------------------------------
# A sampler: (batch, N, policy, known, progress) → N unseen items of each context (C, N)
def unlogged(batch, weight):
    """weight (C, n), made 0 at all items of the user's log, as these shall not be drawn. But v
    keeps a very small weight: it is drawn if no other item is left."""
    weight[rows_and_columns(batch.histories)] = 0
    weight[rows_and_columns(batch.following)] = 0
    return weight.scatter_(1, batch.next_item[:, None], 1e-12)

def session(batch, count, policy, known, progress):
    """The paper's first: other items of the user's log. Ours: those after v (R of those before it,
    in U, is 0). If v is the last, v."""
    later = [items[1:] or items for items in batch.following]   # following: v, and those after it
    weight = torch.zeros_like(batch.r)
    weight[rows_and_columns(later)] = 1
    return weight.multinomial(count, replacement=True)

def uniform(batch, count, policy, known, progress):
    """The paper's second, "random": any items that are not in the user's log."""
    return unlogged(batch, torch.ones_like(batch.r)).multinomial(count, replacement=True)

def curriculum(batch, count, policy, known, progress):
    """The paper's third and default: items with low scores early in training, with high ones late.
    1. Draw a pool of 2N − 1 items from a mixture (ours): the weight is r_ŷ / 2 + 1 / (2n), half by
       the teacher, half uniform, but 0 in the user's log. An item may be drawn twice.
    2. Sort it from low to high score.
    3. Keep N in a row, from place round(progress · (N − 1)) on: at first those with the lowest
       scores, in the end those with the highest."""
    weight = unlogged(batch, 0.5 * batch.scores + 0.5 / batch.scores.shape[1])
    pool = weight.multinomial(2 * count - 1, replacement=True)                      # (C, 2N-1)
    scores = batch.scores.gather(1, pool)
    ranked = pool.gather(1, scores.argsort(1))                                      # low to high
    start = round(progress * (count - 1))
    return ranked[:, start:start + count]

def policy_beam(batch, count, policy, known, progress):
    """The paper's fourth: the N best items by P itself. Ours: without v (the paper: N − 1)."""
    items, _ = policy.beam_search(known, count + 1, beams=count + 1)
    v = batch.next_item[:, None]
    order = (items == v).int().argsort(dim=1, stable=True)      # if v is among them, it comes last
    items = items.gather(1, order)[:, :count]                   # and is cut off here
    return items.where(items >= 0, v)                           # −1 if fewer are unseen: v instead

def policy_draws(batch, count, policy, known, progress):
    """Ours: N items drawn from P, perhaps v among them, to correct what P would recommend."""
    return policy.sample(known, count)

# --- A recipe, a batch, a step --------------------------------------------------------------------
@dataclass
class Recipe:
    """How a method is trained, with L_GR + λ · L_GFN. These are the settings of `tb` in the made-up
    world of the first command; `--methods tb:epochs=8:lam=3` changes some."""
    loss: object = None             # L_GFN, a function of Paths, like tb_loss; None: L_GR alone
    lam: float = 10.0               # λ, weight of L_GFN, ours; the paper: 1
    sampler: str = "policy_draws"   # which N unseen items L_GFN reads, one of SAMPLERS
    trajectories: int = 8           # N, ours; the paper has about 3, besides v
    positive: bool = False          # does L_GFN read v, too? Ours: no; the paper: yes
    exact: bool = True              # ours: Z (in DB, all flows) is known, as R of all items is;
                                    # False: learned, by a linear head on the hidden states
    # R as above. Ours: the weights, and that each signal has the sum 1
    w_a: float = 0.2                # r_a: 1 at v (.1 if a real log says that v was not liked)
    w_y: float = 0.75               # r_ŷ: scores of the teacher, of sum 1
    w_s: float = 0.05               # r_s ∝ number of levels with the same code as v, of sum 1
    teacher: str = "svd"            # one of TEACHERS, the recommenders of reward.py
    debias: float = 0.5             # δ, ours: r_ŷ ∝ (score / popularity^δ)^power, with popularity
                                    # as the teacher has it in reward.py
    power: float = 3.0              # ours: the larger, the fewer items have a high r_ŷ
    # Ours, the next three: the paper's are not known
    rate: float = 3e-3              # peak learning rate: small models like it high
    dropout: float = 0.0            # SFT needs some; `tb`, which learns from many items, none
    epochs: int = 4                 # passes over the training log
    beta: float = 0.1               # S-DPO: how strongly P is held near that of SFT

class Batch:
    """The contexts (U, v) of some pieces of users' logs. If a user's training items are 5 2 9, and
    the piece is all of them, three contexts are this user's:
        histories  [], [5], [5, 2]    next_item  5, 2, 9    following  [5, 2, 9], [2, 9], [9]"""
    def __init__(self, pieces, data, ids, recipe, teacher=None):
        """pieces: (user, first, stop), with a place of v from first to stop − 1 in each context.
        ids: SemanticIDs. teacher, recipe: to compute R; SFT has no teacher."""
        self.rows = [data.train[user][first:stop - 1] for user, first, stop in pieces]  # to be read
        contexts = [(user, place) for user, *piece in pieces for place in range(*piece)]
        self.users = [user for user, _ in contexts]             # whose they are
        self.histories = [data.train[user][:place] for user, place in contexts]     # C lists U
        self.following = [data.train[user][place:] for user, place in contexts]     # v and later
        device = ids.codes.device
        self.next_item = torch.tensor([items[0] for items in self.following], device=device)    # v
        self.unseen = ids.unseen(self.histories)                                    # (C, M + n)
        if teacher:
            liked = torch.tensor([data.liked[user][place] for user, place in contexts])     # (C,)
            # r_ŷ (C, n), rows of sum 1: of a teacher that was fitted without the user in question
            self.scores = teacher.scores(self.histories, self.users).to(device)
            self.r = comprehensive_reward(                      # R (C, n), 0 at items of U
                ids, self.scores, self.next_item, liked.to(device), self.unseen,
                recipe.w_a, recipe.w_y, recipe.w_s)

    def known(self, policy):
        """As policy.know(histories) has it, but a piece is read once for all its contexts. Ours,
        for speed: P does not know what stands before a piece of a log; R does."""
        return policy.read(self.rows), self.unseen

class Paths:
    """What a loss can read: J items of each of C contexts, with P, F and R on their paths."""
    def __init__(self, recipe, policy, reference, batch, known, items):
        """policy: is trained. reference: the policy after SFT, frozen. items (C, J)."""
        self.recipe = recipe
        self.policy = policy
        self.reference = reference
        self.batch = batch
        self.items = items
        ids = policy.semantic_ids
        codes = ids.codes[items]                                # (C, J, L)
        # log P_F of all codes at s_0 … s_{L-1} (C, J, L, K), and of those on the path (C, J, L)
        self.log_probs, log_flow = policy(known, codes[..., :-1])
        self.log_steps = self.log_probs.gather(3, codes[..., None])[..., 0]
        self.log_pf = self.log_steps.sum(2)                     # (C, J) log P of whole paths
        self.log_r = batch.r.gather(1, items).log()             # (C, J) log R
        # (C, J, L + 1) log F of s_0 … s_L: the sum of R below a node; or learned, but F(s_L) = R
        self.log_flow = torch.cat([log_flow, self.log_r[..., None]], 2)
        if recipe.exact:
            self.log_flow = look_up(ids.flows(batch.r), ids.nodes[items]).log()
        self.log_z = self.log_flow[:, 0, 0]                     # (C,) log F(s_0): each path has it

def tb_loss(p):
    """TB of a Paths p. Z belongs to s_0, a history before any code is written, so the J paths of a
    context have one Z. P = R/Z makes TB 0 on every path, so the items may be drawn from anything;
    this decides where P comes near R/Z. Drawn from P, the mean gradient is twice that of the KL
    divergence of P from R/Z."""
    return trajectory_balance(p.log_z, p.log_pf, p.log_r)

def loss_of(recipe, policy, reference, batch, progress):
    """L_GR + λ · L_GFN, means over the contexts (U, v) of a Batch. reference: the policy after SFT,
    frozen. progress: the share of training that is done, which the curriculum asks for."""
    v = batch.next_item[:, None]                                # (C, 1)
    known = batch.known(policy)                                 # GPT-2 reads
    loss = -policy.path_log_probs(known, v).sum(2).mean()       # L_GR = −log P(v | U)
    if recipe.loss:
        with torch.no_grad():
            items = SAMPLERS[recipe.sampler](batch, recipe.trajectories, policy, known, progress)
        check((batch.r.gather(1, items) > 0).all(), f"sampler {recipe.sampler}: it drew an item of "
              "the history, whose R is 0; draw where batch.r is above 0")
        if recipe.positive:
            items = torch.cat([v, items], 1)                    # (C, J), J = 1 + N
        paths = Paths(recipe, policy, reference, batch, known, items)
        loss = loss + recipe.lam * recipe.loss(paths)           # the mean over C · J paths
    return loss

# --- Training, and measures: leave one out, the whole catalogue, the same for every method --------
def cut(logs, size, rng):
    """Pieces (user, first, stop) of at most `size` items, in random order: a log of 50 items and
    size 21 may become 0 to 8, 8 to 29, 29 to 50; in the next epoch it is cut elsewhere."""
    pieces = []
    for user, items in enumerate(logs):
        start = -int(rng.integers(size)) if len(items) > size else 0
        for first in range(start, len(items), size):
            pieces.append((user, max(first, 0), min(first + size, len(items))))
    return [pieces[number] for number in rng.permutation(len(pieces))]

def train(name, recipe, policy, data, size, seed):
    """Epochs over all contexts of the log, those of `size` pieces a step. policy: new for SFT, for
    others as SFT left it. Returns NDCG@10 on validation items after the last epoch."""
    # A history's last item is for the test, the one before it for validation; train has neither
    validation = [items[:-1] for items in data.histories][::math.ceil(len(data.histories) / 500)]
    rng = np.random.default_rng(seed)                           # the order of pieces
    torch.manual_seed(seed)                                     # dropout, drawn items
    epochs = [cut(data.train, policy.window + 1, rng) for _ in range(recipe.epochs)]
    size = min(size, math.ceil(len(data.train) / 20))           # of a small log, 20 steps an epoch
    steps = sum(math.ceil(len(pieces) / size) for pieces in epochs)
    teacher = Teacher(recipe.teacher, data, recipe.debias, recipe.power) if recipe.loss else None
    reference = copy.deepcopy(policy).eval()                    # frozen
    optimizer = torch.optim.AdamW(policy.parameters(), recipe.rate, (0.9, 0.98), weight_decay=0.01)
    schedule = transformers.get_cosine_schedule_with_warmup(    # the rate rises, and falls to 0
        optimizer, min(200, steps // 10 + 1), steps)
    step = 0
    for epoch, pieces in enumerate(epochs, 1):
        policy.train()
        losses = []
        for start in tqdm(range(0, len(pieces), size), name, leave=False, disable=None):
            batch = Batch(pieces[start:start + size], data, policy.semantic_ids, recipe, teacher)
            loss = loss_of(recipe, policy, reference, batch, step / steps)
            check(loss.isfinite(), f"{name}: the loss is {loss} at step {step}; lower its rate")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            step += 1
        score = evaluate(policy.eval().recommend, validation)[0]["ndcg@10"].mean()
        print(f"  {name}: epoch {epoch}/{recipe.epochs}, loss {np.mean(losses):.3f}, "
              f"NDCG@10 {score:.4f} on validation items", flush=True)
    return float(score)

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

def evaluate(recommend, logs):
    """Rank each log's last item by recommend(all before it), 256 logs at a time → {measure: an
    array, a number each log}, and the ten best items (B, 10)."""
    pasts = [log[:-1] for log in logs]
    ranked = torch.cat([recommend(pasts[i:i + 256])[0].cpu() for i in range(0, len(pasts), 256)])
    target = torch.tensor([log[-1] for log in logs])
    by_user = {f"{name}@{k}": measure(ranked, target, k).double().numpy()
               for name, measure in (("recall", recall_at), ("ndcg", ndcg_at)) for k in (5, 10)}
    return by_user, ranked

# === The lecture ends here. Below: methods, the experiment, saved models, the command line ========

# --- Methods --------------------------------------------------------------------------------------
def db_loss(p):
    """DB of a Paths p."""
    return detailed_balance(p.log_flow, p.log_steps)

def sdpo(log_pf, log_ref, beta):
    """S-DPO (Chen et al. 2024), the paper's rival → scalar: P of the chosen item, path 0, shall
    rise above that of the rejected ones d, the other paths. log P (C, J) is the policy's, log P_ref
    (C, J) that of SFT.
    Mean over contexts of −log σ(−log Σ_d exp(β[Δ_d − Δ_0])), Δ = log P − log P_ref."""
    delta = log_pf - log_ref
    margin = beta * (delta[:, 1:] - delta[:, :1])
    return -functional.logsigmoid(-margin.logsumexp(1)).mean()

def log_ref_of(p):
    """log P (C, J) of the paths of a Paths p, by the policy after SFT."""
    with torch.no_grad():
        return p.reference.path_log_probs(p.batch.known(p.reference), p.items).sum(2)

def sdpo_loss(p):
    """S-DPO of a Paths p. Path 0, the chosen one, is v, since its recipe has positive=True."""
    return sdpo(p.log_pf, log_ref_of(p), p.recipe.beta)

def reward_draws(batch, count, policy, known, progress):
    """A sampler of ours, for real logs: N items drawn in proportion to R, as P shall become."""
    return batch.r.multinomial(count, replacement=True)

SAMPLERS = {"session": session, "uniform": uniform, "curriculum": curriculum,
            "policy_beam": policy_beam, "policy_draws": policy_draws, "reward_draws": reward_draws}

# `paper` has the paper's numbers, but for rate, dropout and epochs. All others are ours, by trials
# (data/experiments/trials.py). All but `sft` go on from the weights of the last `sft`
METHODS = {
    "sft": Recipe(rate=1.5e-3, dropout=0.4, epochs=20),
    # As we read it, with our weights w. L_GFN reads v, too; R of v is high, so P stays near the log
    "paper": Recipe(tb_loss, positive=True, sampler="curriculum", trajectories=3, exact=False,
                    lam=1.0, debias=0.0, power=1.0, rate=9e-4, dropout=0.4, epochs=8),
    "tb": Recipe(tb_loss),                                      # all else: as Recipe says
    "db": Recipe(db_loss, lam=3.0, dropout=0.1, epochs=8),
    # Ours: seven rejected items, drawn from P, and β 1; in its paper three, and β .1
    "sdpo": Recipe(sdpo_loss, positive=True, trajectories=7, beta=1.0, dropout=0.2, epochs=8)}

FIELDS = [field.name for field in fields(Recipe) if field.name != "loss"]

def recipe_of(name, quick=False):
    """The Recipe of a method like tb:epochs=4:sampler=uniform, or InputError."""
    base, *changes = name.split(":")
    recipes = METHODS | {teacher: Recipe(teacher=teacher, debias=0.0, power=1.0)
                         for teacher in TEACHERS}
    check(base in recipes, f"there is no method {base!r}; there are {', '.join(recipes)}")
    recipe = replace(recipes[base], epochs=1) if quick else recipes[base]
    for change in changes:
        field, _, text = change.partition("=")
        check(field in FIELDS, f"{name}: no field {field!r}; there are {', '.join(FIELDS)}")
        old = getattr(recipe, field)
        try:
            value = {"0": False, "1": True}[text] if isinstance(old, bool) else type(old)(text)
        except (KeyError, ValueError):
            raise InputError(f"{name}: {field} is not {text!r}, but like {old:n}") from None
        recipe = replace(recipe, **{field: value})
    for field, names in (("sampler", SAMPLERS), ("teacher", TEACHERS)):
        check(getattr(recipe, field) in names, f"{name}: {field} is one of {', '.join(names)}")
    for field in ("trajectories", "rate", "epochs", "power"):
        check(getattr(recipe, field) > 0, f"{name}: {field} has to be above 0")
    for field in ("lam", "w_a", "w_y", "w_s"):
        check(getattr(recipe, field) >= 0, f"{name}: {field} has to be 0 or more")
    check(0 <= recipe.dropout < 1, f"{name}: dropout has to be from 0 to below 1")
    return recipe

def recipes_of(settings):
    """{method: its Recipe}, in order. If the first that is trained needs an SFT, `sft` is added."""
    names = [name.strip() for name in settings.methods.split(",")]
    recipes = {name: recipe_of(name, settings.quick) for name in names}
    trained = [name for name in names if name.startswith("sft") or recipes[name].loss]
    if trained and recipes[trained[0]].loss:
        recipes = {"sft": recipe_of("sft", settings.quick)} | recipes
    return recipes

# --- The experiment: data → IDs, teacher → SFT → fine-tuned policies → table ----------------------
def make_ids(settings, data, seed):
    """The SemanticIDs that --ids asks for: k-means on features of items, or those of a file."""
    n = len(data.titles)
    if settings.ids in ("content", "mixed"):
        # K is a power of 2, at most n. K^L is 4n or more, so that alike items can begin alike
        K = settings.codes or min(n, 2 ** math.ceil(math.log2(4 * n) / settings.levels))
        check(K <= n, f"--codes {K}: more than the {n} items")
        print(f"seed {seed}: {n} semantic IDs of {settings.levels} codes, 0 to {K - 1}")
        features = item_features(settings.ids, data.texts, data.train, seed)
        return SemanticIDs.fit(features, K, settings.levels, seed)
    check("." in settings.ids, f"--ids {settings.ids} is not content, mixed or a file")
    codes = read_ids(settings.ids, data.item_ids)
    return SemanticIDs(codes, max(map(max, codes)) + 1)

def make_policy(settings, data, ids, seed, dropout=0.0):
    """A new Policy with random weights, on the device of the settings."""
    torch.manual_seed(seed)
    return Policy(ids, settings.window, settings.width, settings.layers, dropout,
                  {"item_ids": data.item_ids, "titles": data.titles}).to(settings.device)

def runs_of(settings, data, seed, recipes):
    """Train and test the methods, {name: Recipe}, with one seed. Yield a run, as results.json has
    it, as soon as a method is finished."""
    ids = make_ids(settings, data, seed)
    for name, recipe in recipes.items():
        print(f"{name}, seed {seed}", flush=True)
        entry = {"method": name, "seed": seed,
                 "recipe": {field: getattr(recipe, field) for field in FIELDS}}
        started = time.time()
        if name.partition(":")[0] in TEACHERS:
            model = Teacher(recipe.teacher, data, recipe.debias, recipe.power)
        else:
            model = make_policy(settings, data, ids, seed, recipe.dropout)
            if recipe.loss:
                model.load_state_dict(sft.state_dict())
            entry["validation"] = train(name, recipe, model, data, settings.batch, seed)
            model.save_pretrained(f"{settings.out}/{name.replace(':', ',')}-{seed}")
            if not recipe.loss:
                sft = model                                     # the next ones go on from it
        trained = time.time()
        by_user, ranked = evaluate(model.recommend, data.histories)
        lists = ranked.tolist()
        by_user |= report.exposure(lists, data)                 # liked@10, if the truth is known
        metrics = report.means(by_user, lists, data)
        seconds = {"train": trained - started, "eval": time.time() - trained}
        yield entry | dict(metrics=metrics, by_user=by_user, lists=lists, seconds=seconds)

def run(settings):
    """The whole job: print the table; write results.json, results.md and the saved models."""
    if settings.quick:
        print("--quick: the figures below mean nothing; they only show that everything works")
    recipes = recipes_of(settings)                              # a wrong name is told at once
    data = load_data(settings.data, settings.quick)             # a Dataset
    if not data.truth and settings.methods == parse([]).methods:
        print("a real log needs other settings: python gflowgr.py @data/real.txt --data DIR")
    Path(settings.out).mkdir(parents=True, exist_ok=True)       # fails now, not after training
    versions = {module.__name__: module.__version__ for module in (torch, transformers, np)}
    about = {"data": data.sizes, "settings": vars(settings), "versions": versions}
    runs = []
    try:
        for seed in settings.seeds:
            runs.extend(runs_of(settings, data, seed, recipes))     # one after the other
    finally:                                                    # after Ctrl-C, too
        if runs:
            report.finish(settings.out, runs, about)

# --- Saved models ---------------------------------------------------------------------------------
transformers.utils.logging.disable_progress_bar()       # small models are loaded and saved at once

def save(policy, folder):
    """Write config.json and model.safetensors, which GPT2LMHeadModel loads as well, the net that
    writes, and semantic_ids.json. Old files are replaced when all new ones are complete."""
    part = Path(f"{folder}.part")
    policy.lm.save_pretrained(part)
    own = {name: x for name, x in policy.state_dict().items() if not name.startswith("lm.")}
    save_file(own, part / "writer.safetensors")
    ids = policy.semantic_ids
    report.write(part / "semantic_ids.json", {
        "num_codes": ids.num_codes, "codes": ids.codes.tolist(), "catalogue": policy.catalogue})
    Path(folder).mkdir(parents=True, exist_ok=True)
    for file in part.iterdir():
        file.replace(Path(folder) / file.name)
    part.rmdir()

def load(folder):
    """The saved Policy, in eval mode; InputError if the folder holds none."""
    try:
        table = json.loads((Path(folder) / "semantic_ids.json").read_text(encoding="utf-8"))
        ids = SemanticIDs(table["codes"], table["num_codes"])
        lm = transformers.GPT2LMHeadModel.from_pretrained(folder, use_safetensors=True)
        size = lm.config
        policy = Policy(ids, size.n_positions - 1, size.n_embd, size.n_layer,
                        catalogue=table["catalogue"])
        policy.lm.load_state_dict(lm.state_dict())              # raises if the IDs do not fit
        own = load_file(Path(folder) / "writer.safetensors")
        policy.load_state_dict(policy.state_dict() | own)
        return policy.eval()
    except Exception as error:                                  # a wrong folder can raise anything
        raise InputError(f"{folder} holds no saved model of this version (untrained methods are "
                         f"never saved): {error}") from None

# --- The oracle: does P reach R/Z? ----------------------------------------------------------------
def run_oracle(settings):
    """Train on four users' last training items, from random weights, with a method's loss alone:
    does P reach R/Z? Each step reads 64 items, drawn from P without replacement."""
    recipe = recipe_of(settings.oracle)
    check(recipe.loss, f"--oracle {settings.oracle}: it needs a method with a loss, like tb")
    data = load_data(settings.data, settings.quick)
    path = Path(settings.out) / "oracle.png"
    path.parent.mkdir(parents=True, exist_ok=True)              # fails now, not after training
    ids = make_ids(settings, data, settings.seeds[0])
    policy = make_policy(settings, data, ids, settings.seeds[0])
    teacher = Teacher(recipe.teacher, data, recipe.debias, recipe.power)
    pieces = [(user, len(items) - 1, len(items)) for user, items in enumerate(data.train[:4])]
    batch = Batch(pieces, data, ids, recipe, teacher)
    every = torch.arange(len(data.titles), device=settings.device).expand(4, -1)
    goal = batch.r / batch.r.sum(1, keepdim=True)               # (4, n)
    panels = {"P before training": None, "R/Z": goal[0]}
    steps = 20 if settings.quick else 1000
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.003)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for step in range(steps + 1):
        known = policy.know(batch.histories)
        log_p = policy.path_log_probs(known, every).detach().sum(2)                 # (4, n)
        panels["P after training" if step else "P before training"] = log_p[0].exp()
        if step % (steps // 10) == 0:
            far = (log_p.exp() - goal).abs().sum(1).mean()
            print(f"step {step}: mean L1 distance of P from R/Z (2 at most) {far:.4f}")
        # The items with the largest log P + Gumbel's random number are draws without replacement
        noise = -torch.empty_like(log_p).exponential_().log()
        items = (log_p + noise).topk(min(64, (batch.r > 0).sum(1).min())).indices
        items = torch.cat([batch.next_item[:, None], items], 1) if recipe.positive else items
        optimizer.zero_grad()
        recipe.loss(Paths(recipe, policy, policy, batch, known, items)).backward()
        optimizer.step()
        schedule.step()
    figures.plot_flows(path, ids.codes.cpu(), data.titles, panels)
    print(f"{path}: P and R/Z of one user, as flows down the tree")

# --- Command line ---------------------------------------------------------------------------------
def print_recommendations(settings):
    """Ten titles by a saved model, best first, for a history of titles or ids, oldest first."""
    model = Policy.from_pretrained(settings.model)
    titles = model.catalogue["titles"]
    history = [find_item(name, model.catalogue["item_ids"], titles) for name in settings.recommend]
    items, _ = model.recommend([history])
    check(items.max() >= 0, "the history has all items: none is left")
    print(*[titles[item] for item in items[0].tolist() if item >= 0], sep="\n")

def positive(text):
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)

def seeds(text):
    """42,43 → [42, 43]"""
    return [int(number) for number in text.split(",")]

def parse(argv):
    """Settings, an object with a field for each flag; a mistake is one line and status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False, fromfile_prefix_chars="@",
        epilog=f"methods: {', '.join(TEACHERS | METHODS)}. samplers: {', '.join(SAMPLERS)}. fields "
        f"of a method, to change in its name: {', '.join(FIELDS)}. example: --methods "
        "sft:epochs=12,tb:trajectories=4,tb:debias=.5. A file of flags: @data/real.txt")
    parser.error = lambda message: parser.exit(2, f"error: {message}; see --help\n")
    parser.convert_arg_line_to_args = lambda line: line.partition("#")[0].split()
    there = {"cuda": torch.cuda, "mps": torch.backends.mps}
    devices = [name for name in there if there[name].is_available()] + ["cpu"]
    flag = parser.add_argument
    flag("--data", default="toy", help="toy, ml-100k, or a folder of two CSV files; %(default)s")
    flag("--methods", default="svd,svd:debias=.5,sft,paper,tb", help="by default %(default)s")
    flag("--seeds", default=[42], type=seeds, help="every method runs with each, like 42,43")
    flag("--out", help="folder for results; by default runs/NAME-OF-DATA")
    flag("--quick", action="store_true", help="a smoke run in seconds: 100 users, one epoch")
    flag("--device", default="auto", choices=["auto", *devices], help="where to train")
    flag("--ids", default="mixed", help="content (text), mixed (text and log), or FILE.csv")
    flag("--levels", default=2, type=positive, help="L, levels of an ID; %(default)s")
    flag("--codes", type=positive, help="K, codes a level; by default a power of 2, K^L ≥ 4n")
    flag("--window", default=20, type=positive, help="last items that are read; %(default)s")
    flag("--width", default=64, type=positive, help="hidden size; %(default)s")
    flag("--layers", default=2, type=positive, help="transformer blocks; %(default)s")
    flag("--batch", default=8, type=positive, help="pieces of logs a step; %(default)s")
    flag("--oracle", nargs="?", const="tb", help="train four users with a method's loss: P = R/Z?")
    flag("--recommend", nargs="+", metavar="ITEM", help="print ten titles for this history")
    flag("--model", help="the saved model for --recommend, like runs/toy/tb-42")
    settings = parser.parse_args(argv)
    if settings.device == "auto":
        settings.device = devices[0]
    name = Path(settings.data).resolve().name
    settings.out = settings.out or f"runs/{name}" + "-quick" * settings.quick
    if bool(settings.recommend) != bool(settings.model):
        parser.error("--recommend and --model go together")
    return settings

def main(settings):
    """Do what the settings ask for → exit status; a mistake in data or settings is one line on
    stderr. Own code that raises is not caught: its author needs the traceback."""
    try:
        if settings.recommend:
            print_recommendations(settings)
        elif settings.oracle:
            run_oracle(settings)
        else:
            run(settings)
        return 0
    except KeyboardInterrupt:
        print("stopped; a run's table has the methods that are finished", file=sys.stderr)
        return 130
    except (InputError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2

if __name__ == "__main__":
    sys.exit(main(parse(sys.argv[1:])))
