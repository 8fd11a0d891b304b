"""GFlowGR: fine-tune a generative recommender so that P(item | user) follows a reward.

A generative recommender reads the items that a user took, and writes the semantic ID of the next
one, code by code. Supervised fine-tuning (SFT) on the log teaches what was shown, not what the user
would like: exposure bias. GFlowGR reads an ID as a path down a tree and trains a GFlowNet on it,
with a loss called trajectory balance (TB): the probability of an item shall be proportional to its
reward R. R mixes the logged action, the score of another recommender, the *teacher* (the paper's
collaborative model, CM), and the similarity of IDs.
The lecture comes first; it ends with the beam search. A step of training (`loss_of`), in short:

    for each logged item v and the history U before it:
        R     = .2 r_a + .75 r_ŷ + .05 r_s + .001/m, of each of the m items that are not in U
                r_a is 1 at v, else 0; r_ŷ: by the teacher's scores; r_s: by codes shared with v
        Z     = the sum of R, about 1
        items = 8 unseen items, drawn from P(· | U) without replacement
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
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")       # models as small as these: one thread is best
import numpy as np
import torch
import transformers
from torch.nn import functional
from tqdm import tqdm
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, get_cosine_schedule_with_warmup
from transformers.hf_argparser import HfArg, HfArgumentParser

from data import InputError, check, find_item, load_data, read_ids, report
from reward import TEACHERS, Teacher, comprehensive_reward
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
    lam: float = 10.0               # λ, weight of L_GFN, ours; the paper: 1
    sampler: str = "policy_draws"   # which N unseen items L_GFN reads; here, N drawn from P
    trajectories: int = 8           # N, ours; the paper has about 3, besides v
    logged: bool = False            # does L_GFN always read v, too? Ours: no; the paper: yes
    exact: bool = True              # ours: Z (in DB, all flows) is known, as R of all items is;
                                    # False: learned, by a linear head on the hidden states
    # R = w_a·r_a + w_ŷ·r_ŷ + w_s·r_s + .001/m at each of m unseen items. Ours: the weights, and
    # that each signal has the sum 1
    w_a: float = 0.2                # r_a: 1 at v (.1 if a real log says that v was not liked)
    w_y: float = 0.75               # r_ŷ: scores of the teacher, of sum 1
    w_s: float = 0.05               # r_s ∝ number of levels with the same code as v, of sum 1
    teacher: str = "svd"            # one of TEACHERS, the recommenders of reward.py
    debias: float = 0.5             # δ, ours: r_ŷ ∝ (score / popularity^δ)^sharp. Popularity: how
                                    # many users took the item; for `svd`, about √ of this number
    sharp: float = 3.0              # ours: the larger, the fewer items have a high r_ŷ
    # Ours, the next three: the paper's are not known
    rate: float = 3e-3              # peak learning rate: small models like it high
    dropout: float = 0.0            # SFT needs some; `tb`, which learns from many items, none
    epochs: int = 8                 # passes over the training log
    beta: float = 0.1               # S-DPO, GRPO: how strongly P is held near that of SFT

# --- What a loss learns from: contexts and paths --------------------------------------------------
class Batch:
    """C contexts (U, v). If a user's training items are 5 2 9, three contexts are this user's:
        histories  [], [5], [5, 2]    next_item  5, 2, 9    following  [5, 2, 9], [2, 9], [9]"""
    def __init__(self, rows, data, policy, teacher=None, recipe=None):
        """rows: of contexts, by `training_rows` after the lecture. data: a Dataset, of all users.
        teacher, recipe: to compute R; SFT has none."""
        # C pairs (user, place of v); GPT-2 reads a list of items once for several contexts
        contexts, *to_read = unpack(rows, data.train, policy)
        self.users = [user for user, _ in contexts]             # whose they are
        self.histories = [data.train[user][:place] for user, place in contexts]     # C lists U
        self.following = [data.train[user][place:] for user, place in contexts]     # v and later
        next_items = [items[0] for items in self.following]
        liked = [data.liked[user][place] for user, place in contexts]
        device = policy.semantic_ids.codes.device
        self.next_item = torch.tensor(next_items, device=device)                    # (C,) v
        self.liked = torch.tensor(liked, device=device)         # (C,) bool: did the user like v?
        # (C, M + n) bool, of all nodes: does it lead to an item that is not in U?
        self.unseen = policy.semantic_ids.unseen(self.histories)
        self.to_read = self.unseen, *to_read                    # what Policy.read asks for
        if teacher:
            # r_ŷ (C, n), rows of sum 1: of a teacher that was fitted without the user in question
            self.scores = teacher.scores(self.histories, self.users).to(device)
            self.r = comprehensive_reward(                      # R (C, n), 0 at items of U
                policy.semantic_ids, self.scores, self.next_item, self.liked, self.unseen,
                recipe.w_a, recipe.w_y, recipe.w_s)

class Paths:
    """What a loss can read: J unseen items of each of C contexts, and their paths."""
    def __init__(self, recipe, policy, reference, batch, items):
        """policy: is trained. reference: the policy after SFT, frozen; two rivals compare with it.
        items (C, N): those that a sampler drew. J is N, or 1 + N if the recipe has v `logged`."""
        v = batch.next_item[:, None]                            # (C, 1)
        if recipe.logged:
            items = torch.cat([v, items], 1)
        # One forward pass for all paths: that of v, for L_GR, and the J of L_GFN. If v is 7 and
        # 3 and 9 are drawn, it gets [[7, 3, 9]], and J = 2
        log_steps, log_probs, learned_log_flow = policy.follow(
            policy.read(*batch.to_read), torch.cat([v, items], 1))
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
    """TB of a Paths p. Z belongs to the state s_0, a history before any code is written, so it is
    the same for all J paths of a context. If R were not scaled, as in the paper, each context would
    have another Z; ours is 1.001, or less where v was not liked."""
    return trajectory_balance(p.log_z, p.log_pf, p.log_r)

# What each method changes in Recipe. The numbers of `paper` are the paper's, but for its dropout;
# all others are ours, chosen by trials, in data/log.md
RECIPES = {
    "sft": dict(rate=1.5e-3, dropout=0.4, epochs=20),           # the others go on from its weights
    # As we read it, with our w_…: L_GFN reads v, too. R of v is high, so P stays near the log
    "paper": dict(loss=tb_of, logged=True, sampler="curriculum", trajectories=3, exact=False,
                  lam=1.0, debias=0.0, sharp=1.0, dropout=0.4),
    "tb": dict(loss=tb_of)}                                     # all else: as Recipe says

# --- One step of training -------------------------------------------------------------------------
def loss_of(recipe, policy, reference, batch, progress):
    """gr · L_GR + λ · L_GFN: means over the contexts (U, v) of a Batch. reference: the policy after
    SFT, frozen. progress: the share of training that is done, which the curriculum asks for."""
    if not recipe.loss:                                         # SFT
        log_steps, *_ = policy.follow(policy.read(*batch.to_read), batch.next_item[:, None])
        return -log_steps.sum(-1).mean()                        # L_GR = −log P(v | U)
    # N items of each context (C, N), by a function below. P = R/Z makes TB 0 on every path, so the
    # items need not come from P, as they must in reinforcement learning. But which items are drawn
    # decides where P comes near R/Z
    policy.eval()                                               # no dropout while sampling
    items = SAMPLERS[recipe.sampler](batch, recipe.trajectories, policy, progress)
    policy.train()
    check((batch.r.gather(1, items) > 0).all(), f"sampler {recipe.sampler}: it drew an item of the "
          "history, whose R is 0; draw items that are not in batch.histories")
    p = Paths(recipe, policy, reference, batch, items)
    return recipe.gr * -p.log_v.mean() + recipe.lam * recipe.loss(p)

# --- The adaptive trajectory sampler: which items to learn from -----------------------------------
# Functions (batch, N, policy, progress) → unseen items (C, N). Two are here, four after the lecture
# with `draw`, which draws items (C, N) ∝ weights (C, n), and `unlogged`, which makes weights of the
# user's log 0
def curriculum(batch, count, policy, progress):
    """The paper's third and default: items with low scores early in training, with high ones late.
    1. Draw a pool of 2N − 1 items from a mixture (ours): the weight is r_ŷ / 2 + 1 / (2n), half by
       the teacher, half uniform, but 0 in the user's log. An item may be drawn twice.
    2. Sort it from low to high score.
    3. Keep N in a row, from place round(progress · (N − 1)) on: at first those with the lowest
       scores, in the end those with the highest."""
    weight = unlogged(batch, 0.5 * batch.scores + 0.5 / batch.scores.shape[1])
    pool = draw(weight, 2 * count - 1)                                              # (C, 2N-1)
    scores = batch.scores.gather(1, pool)
    ranked = pool.gather(1, scores.argsort(1))                                      # low to high
    start = round(progress * (count - 1))
    return ranked[:, start:start + count]

def policy_draws(batch, count, policy, progress):
    """Ours: N items drawn from P, none twice."""
    items, _ = policy.recommend(batch.histories, count, beams=count, sample=True)
    return items.where(items >= 0, batch.next_item[:, None])    # −1 if fewer are unseen: v instead

# --- The policy: P_F(next code | user, codes so far) ----------------------------------------------
class Policy(torch.nn.Module):
    """A small GPT-2, ours, that reads a history and writes a semantic ID, plus the table of IDs.
        token l·K + c           code c of level l, both from 0
        token L·K               <user>: begins each history, and pads it
        token L·K + 1 + i       item i of a history (ours: one token, not its L codes)
    Letters in shapes: H tokens of a history, d width of the model, W beams of a user."""
    def __init__(self, semantic_ids, window=20, width=64, layers=2, dropout=0.0, catalogue=None,
                 lm=None):
        super().__init__()
        self.semantic_ids = semantic_ids
        self.window = window                                    # items of a history that are read
        self.beams = 20                                         # of recommend: twice the ten items
        self.catalogue = catalogue or {}                        # saved with it: item_ids, titles
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

    def read(self, unseen, lists, row_of=None, ends=None):
        """GPT-2 reads <user> and the last items of B lists, once. Returns what it knows of C
        contexts, for `forward`: its cache of keys and values, hidden states (C, d), ends, unseen.
        In a search, each list is a context; in training, several contexts share a list, and context
        c is the first ends[c] items of list row_of[c].
        unseen (C, M + n): does a node lead to an item that may be recommended?"""
        first = self.user_token                                 # tokens of items come after it
        tokens = [torch.tensor([first, *[first + 1 + item for item in items[-self.window:]]])
                  for items in lists]
        if ends is None:
            ends = torch.tensor([len(row) - 1 for row in tokens], device=unseen.device)
            row_of = torch.arange(len(lists), device=unseen.device)
        tokens = torch.nn.utils.rnn.pad_sequence(               # at the end: no item sees padding
            tokens, batch_first=True, padding_value=first).to(unseen.device)        # (B, H)
        cache = DynamicCache()
        hidden = self.lm.transformer(tokens, cache).last_hidden_state               # (B, H, d)
        cache.batch_select_indices(row_of)                      # from lists to contexts
        return cache, hidden[row_of, ends], ends, unseen

    def forward(self, memory, nodes, codes):
        """What comes next on J paths of each context, of which l codes are known. memory: what
        `read` returned. codes (C, J, l). nodes (C, J, S): the last S of the prefixes s_0 … s_l; in
        training all of a path are asked for, in a search the last alone. Returns where all next
        codes lead (C, J, S, K), −1 if to no unseen item, so that the code is illegal; log P_F of
        these codes, near NEVER if illegal; the learned log F of the prefixes (C, J, S)."""
        cache, root, ends, unseen = memory
        ids = self.semantic_ids
        J, l = codes.shape[1:]
        S = nodes.shape[-1]
        hidden = root[:, None, None].expand(-1, J, 1, -1)       # at s_0: after U (C, J, 1, d)
        if l:
            # The codes of all paths are read at once; a mask, drawn after the lecture, keeps paths
            # apart. A code's position is the number of tokens before it that it sees
            H = cache.get_seq_length()
            mask = tree_mask(ends, H, J, l + 1)
            tokens = codes + ids.num_codes * torch.arange(l, device=codes.device)   # l·K + c
            later = self.lm.transformer(
                tokens.flatten(1), cache, attention_mask=mask[:, None],
                position_ids=mask.sum(-1) - 1).last_hidden_state                    # (C, J·l, d)
            cache.crop(-J * l)                                  # the next call has other codes
            hidden = torch.cat([hidden, later.unflatten(1, (J, l))], 2)[:, :, -S:]  # (C, J, S, d)
        # As in GPT-2, a token's logit is hidden · its embedding. At level l, only its K codes have
        # one: tokens l·K to l·K + K − 1
        heads = self.lm.transformer.wte.weight[:self.user_token]
        heads = heads.unflatten(0, (ids.num_levels, -1))[l + 1 - S:l + 1]           # (S, K, d)
        logits = torch.einsum("cjsd,skd->cjsk", hidden, heads).float()              # (C, J, S, K)
        child = ids.legal_children(nodes, unseen)
        log_probs = logits.masked_fill(child < 0, NEVER).log_softmax(-1)
        return child, log_probs, self.flow_head(hidden)[..., 0]

    def follow(self, memory, items):
        """P along the whole paths of items (C, J): log P_F of each step (C, J, L), log P_F of all
        codes there (C, J, L, K), the learned log F of s_0 … s_{L-1} (C, J, L)."""
        ids = self.semantic_ids
        codes = ids.codes[items]                                                    # (C, J, L)
        _, log_probs, log_flow = self(memory, ids.nodes[items][..., :-1], codes[..., :-1])
        return log_probs.gather(-1, codes[..., None])[..., 0], log_probs, log_flow

    def path_log_probs(self, histories, items):
        """log P_F of each step on the paths of items (B, J) → (B, J, L); if illegal, near NEVER."""
        ids = self.semantic_ids
        memory = self.read(ids.unseen(histories), histories)
        return self.follow(memory, torch.as_tensor(items, device=ids.codes.device))[0]

    @torch.no_grad()
    def recommend(self, histories, k=10, beams=None, guide=None, sample=False):
        """Beam search: the k items of highest P after B histories, items (B, k), best first; log P
        (B, k). Never an item of the history, never a duplicate; −1 and −inf where fewer than k are
        unseen. A beam is a prefix; the best W go on to the next level.
        beams: W (self.beams by default, at least k): the more, the surer the best are found.
        guide (B, n) ≥ 0, ours: the items of highest P · guide, and log of this product.
        sample, ours: k items drawn at random from P, none twice, in the order of drawing.
        Raises InputError for an item that is not in the catalogue, or if nothing is asked for."""
        check(len(histories) and k > 0, "recommend needs a history, and k from 1")
        check(guide is None or not sample, "recommend: a guide, or sample, not both")
        W = max(beams or self.beams, k)
        ids = self.semantic_ids
        unseen = ids.unseen(histories)
        memory = self.read(unseen, histories)
        node = torch.zeros(len(histories), 1, dtype=torch.long, device=unseen.device)   # the root
        codes = torch.zeros(len(histories), 1, 0, dtype=torch.long, device=unseen.device)   # none
        log_p = score = torch.zeros(node.shape, device=unseen.device)               # (B, W = 1)
        if guide is not None:
            # G of a node: the sum of the guide over the unseen items below it
            guide = guide.to(unseen.device) * unseen[:, ids.num_prefixes:]
            log_g = ids.flows(guide).clamp(min=1e-30).log()                         # (B, M + n)
        for _ in range(ids.num_levels):
            child, log_probs, _ = self(memory, node[..., None], codes)
            child = child[:, :, 0]                              # (B, W, K) of all beams
            log_p = log_p[..., None] + log_probs[:, :, 0]       # (B, W, K) log P of prefixes
            if sample:
                score = -race(-score, log_p)        # minus the time of arrival: the first are best
            else:
                score = log_p if guide is None else log_p + at(log_g, child)
            score = score.masked_fill(child < 0, -math.inf).flatten(1)              # (B, W·K)
            score, best = score.topk(min(W, score.shape[1]), 1)                     # (B, new W)
            parent = best // ids.num_codes                      # w·K + c is code c of beam w
            codes = torch.cat([codes.take_along_dim(parent[..., None], 1),
                               best[..., None] % ids.num_codes], 2)                 # (B, W, l + 1)
            node = child.flatten(1).gather(1, best)
            log_p = log_p.flatten(1).gather(1, best)
        items = (node - ids.num_prefixes).clamp(min=-1)         # nodes of items come last
        items = functional.pad(items, (0, k), value=-1)[:, :k]
        values = functional.pad(log_p if sample else score, (0, k))[:, :k]
        return items, values.masked_fill(items < 0, -math.inf)

# === The lecture ends here. Below: the loop, rivals, evaluation, the experiment ===================

# --- Rows: GPT-2 reads a history once, for several contexts ---------------------------------------
def training_rows(histories, window):
    """Yield the rows (user, places of v) of all histories; each item is v in one of them. A user
    who took a b c d e f g h is 8 contexts. GPT-2 can predict a next item after each that it reads:
    so it reads a b c d once, for five contexts. If the window is 4:
        places of v     GPT-2 reads       v             the context ends after so many items
        0 1 2 3 4       <user> a b c d    a b c d e     0 1 2 3 4
        5 6             <user> c d e f    f g           3 4
        7               <user> d e f g    h             4
    A row after the first has at most window / 2 places, so that enough is read before each v."""
    for user, history in enumerate(histories):
        # Where rows begin, here 0 5 7, and the end, 8
        cuts = [0, *range(window + 1, len(history), max(1, window // 2)), len(history)]
        for first, stop in zip(cuts, cuts[1:]):
            yield user, range(first, stop)

def unpack(rows, histories, policy):
    """The C contexts of rows, pairs (user, place of v); the lists of items that GPT-2 reads; of
    each context the number of its list, and after how many items of it the context ends (C,)."""
    contexts = []
    lists = []
    row_of = []
    ends = []
    for row, (user, places) in enumerate(rows):                 # the second row: 1, (user, [5, 6])
        start = max(0, places[-1] - policy.window)              # 2
        lists.append(histories[user][start:places[-1]])         # c d e f
        contexts += [(user, place) for place in places]
        row_of += [row] * len(places)                           # 1 1
        ends += [place - start for place in places]             # 3 4
    return contexts, lists, *torch.tensor([row_of, ends], device=policy.semantic_ids.codes.device)

def batches(rows, size, data, policy, teacher, recipe, rng):
    """One epoch of Batches of `size` rows, in random order. Rows of a Batch have like lengths, for
    less padding: the rows of 32 Batches are sorted by the number of items that GPT-2 reads."""
    rows = [rows[r] for r in rng.permutation(len(rows))]
    for start in range(0, len(rows), 32 * size):
        some = slice(start, start + 32 * size)
        rows[some] = sorted(rows[some], key=lambda row: min(row[1][-1], policy.window))
    for start in rng.permutation(range(0, len(rows), size)):
        yield Batch(rows[start:start + size], data, policy, teacher, recipe)

# --- The training loop ----------------------------------------------------------------------------
def train(name, recipe, policy, rows, size, data, seed, measure):
    """The one training loop: epochs over rows, `size` a step. policy: new for SFT, for others as
    SFT left it. The rate rises to its peak, and falls to 0. After each epoch, measure(policy, data)
    is printed; its last value is returned."""
    teacher = None
    if recipe.loss:
        teacher = Teacher(recipe.teacher, data, recipe.debias, recipe.sharp)
    reference = copy.deepcopy(policy).eval()                    # frozen
    per_epoch = math.ceil(len(rows) / size)
    steps = recipe.epochs * per_epoch
    groups = [{"params": policy.lm.parameters()},               # GPT-2
              {"params": policy.flow_head.parameters(), "lr": 10 * recipe.rate}]    # flows, ours
    optimizer = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(200, steps // 10 + 1), steps)
    losses = []
    for epoch in range(1, recipe.epochs + 1):
        policy.train()
        # The order of batches is numpy's, dropout and drawn items are torch's
        torch.manual_seed(int(np.random.default_rng([seed, epoch]).integers(2 ** 63)))
        rng = np.random.default_rng([seed, epoch])
        epoch_batches = batches(rows, size, data, policy, teacher, recipe, rng)
        for batch in tqdm(epoch_batches, name, per_epoch, leave=False, disable=None):
            loss = loss_of(recipe, policy, reference, batch, len(losses) / steps)
            check(torch.isfinite(loss), f"{name}: the loss is {loss} at step {len(losses)}; is the "
                  f"rate too high? The batch has users {sorted({*batch.users})}, from 0")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        loss = np.mean(losses[-per_epoch:])
        score = measure(policy.eval(), data)
        print(f"  {name}: epoch {epoch}/{recipe.epochs}, loss {loss:.3f}, {measure.__name__} "
              f"{score:.4f}", flush=True)
    return score

# --- More samplers --------------------------------------------------------------------------------
def draw(weight, count):
    """count items per context (C, count), with replacement, ∝ weight (C, n)."""
    # At least two are drawn: where it draws one, torch takes 20 times as long
    return torch.multinomial(weight, max(2, count), replacement=True)[:, :count]

def unlogged(batch, weight):
    """weight (C, n), made 0 at all items of the user's log, as these shall not be drawn. But v
    keeps a very small weight: it is drawn if no other item is left."""
    weight[entries(batch.histories)] = 0                        # entries: their rows and columns
    weight[entries(batch.following)] = 0
    return weight.scatter_(1, batch.next_item[:, None], 1e-12)

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
    """The paper's fourth: the N best items by P itself. Ours: without v (the paper: N − 1)."""
    items, _ = policy.recommend(batch.histories, count + 1, beams=count + 1)
    v = batch.next_item[:, None]
    order = (items == v).int().argsort(dim=1, stable=True)      # if v is among them, it comes last
    items = items.gather(1, order)[:, :count]                   # and is cut off here
    return items.where(items >= 0, v)                           # −1 if fewer are unseen: v instead

def reward_draws(batch, count, policy, progress):
    """Ours: items drawn ∝ R, as P shall become. The logged item is often among them."""
    return draw(batch.r, count)

SAMPLERS = {sampler.__name__: sampler for sampler in (
    session, uniform, curriculum, policy_beam, policy_draws, reward_draws)}

# --- Rivals: other losses that make P = R/Z -------------------------------------------------------
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

def distillation(child_flow, log_probs):
    """Ours → scalar: where a path goes down the tree, the flow F divides among the next codes. q(c)
    is the share of code c. P_F shall be q, for all codes. (TB and DB see those of the path alone.)
    child_flow (C, J, L, K): F after each code; log_probs (C, J, L, K): log P_F of each code.
    Mean over paths of Σ_l KL(q ‖ P_F) = Σ_l Σ_c q(c) · (log q(c) − log P_F(c | s_l))."""
    target = child_flow / child_flow.sum(-1, keepdim=True)      # q; 0 for an illegal code
    return (target * (target.clamp(min=1e-30).log() - log_probs)).sum((-2, -1)).mean()

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

# --- What the rivals read of a Paths p ------------------------------------------------------------
def path_flows(p):
    """(C, J, L+1) log F of s_0 … s_L, exact or learned; F(s_L) is R."""
    if not p.recipe.exact:
        return torch.cat([p.learned_log_flow, p.log_r[..., None]], -1)
    flows = p.ids.flows(p.batch.r)                  # (C, M + n) F of all nodes: sums of R below
    return at(flows, p.ids.nodes[p.items]).log()                # at those of the paths

def code_flows(p):
    """(C, J, L, K) exact F after each code from s_0 … s_{L-1}; 0 if it is illegal."""
    child = p.ids.next_node[p.ids.nodes[p.items][..., :-1]]     # the nodes there; −1: none
    return at(p.ids.flows(p.batch.r), child)

def log_ref_of(p):
    """(C, J) log P by the policy after SFT."""
    with torch.no_grad():
        log_steps, *_ = p.reference.follow(p.reference.read(*p.batch.to_read), p.items)
    return log_steps.sum(-1)

RECIPES |= {
    "db": dict(loss=lambda p: detailed_balance(path_flows(p), p.log_steps), dropout=0.1),
    "vargrad": dict(loss=lambda p: vargrad(p.log_pf, p.log_r), lam=3.0, dropout=0.1),
    "listnet": dict(loss=lambda p: listnet(p.log_pf, p.log_r), lam=300.0),
    # Path 0, the chosen one, is v. Ours: seven rejected items, drawn from P, β 1, and L_GR beside
    # it; in the paper three, and β .1
    "sdpo": dict(loss=lambda p: sdpo(p.log_pf, log_ref_of(p), p.recipe.beta), logged=True,
                 trajectories=7, beta=1.0, rate=9e-4, dropout=0.2),
    "grpo": dict(loss=lambda p: grpo(p.log_pf, log_ref_of(p), p.log_r, p.recipe.beta),
                 beta=0.01, trajectories=16),       # with R instead of log R: fewer liked items
    "distill": dict(loss=lambda p: distillation(code_flows(p), p.log_probs), lam=30.0, dropout=0.2),
    # P of the SFT before it, times a teacher's score
    "product": dict(sharp=9.0),
    # For real logs, ours
    "sft-log": dict(rate=1.5e-3, dropout=0.2, epochs=8),
    "tb-log": dict(loss=tb_of, teacher="blend", debias=0.0, sharp=4.0, lam=0.3, rate=1.5e-3,
                   epochs=5, sampler="reward_draws", trajectories=2),
    "product-log": dict(teacher="blend", debias=0.0, sharp=9.0)}
# What the others do not read, so it cannot be changed in their names
UNREAD = {"exact": "vargrad listnet sdpo grpo distill",
          "beta": "paper tb tb-log db vargrad listnet distill"}

# --- Paths that are read at once, and draws without replacement -----------------------------------
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

def race(time, log_p):
    """When do the children of prefixes arrive? (B, W, K), for draws without replacement (Kool et
    al. 2019, stochastic beams). time (B, W): when the prefixes arrived; log P of children.
    Each item arrives at a random time, exponential with rate P: the likelier, the sooner. The first
    k to arrive are drawn. To run the race down the tree, let a prefix arrive when the first item
    below it does: this time is exponential, too, and its rate is P of the prefix.
    1. A prefix has arrived at time t. Each of its children draws a time, with its own rate.
    2. The first child has to arrive at t. So the least time is subtracted from all, and t added: if
       t is 1, and .5 and .8 are drawn, 1 and 1.3. (Exponential times have no memory.)
    The k children that arrive first are enough as beams: one item below each arrives with it, so
    the first k items are below these."""
    rate = log_p.exp().clamp(min=1e-30)
    drawn = torch.empty_like(rate).exponential_() / rate        # exponential, with this rate
    return time[..., None] + drawn - drawn.amin(-1, keepdim=True)

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

def validation_ndcg(policy, data):
    """NDCG@10 on validation items of at most 2,000 users."""
    step = math.ceil(len(data.train) / 2000)
    # A history's last item is for the test, the one before it for validation; train has neither
    target = torch.tensor([history[-2] for history in data.histories[::step]])
    return ndcg_at(rank_all(policy.recommend, data.train[::step]), target, 10).mean().item()

def evaluate(recommend, data):
    """Rank last items by recommend(all before) → {metric: mean}, {metric: by user}, ten items."""
    ranked = rank_all(recommend, [history[:-1] for history in data.histories])
    target = torch.tensor([history[-1] for history in data.histories])
    by_user = {}
    for k in (5, 10):
        by_user[f"recall@{k}"] = recall_at(ranked, target, k).double().numpy()
        by_user[f"ndcg@{k}"] = ndcg_at(ranked, target, k).double().numpy()
    by_user |= report.exposure(ranked.numpy(), data)            # liked@10, if the truth is known
    metrics = {name: float(numbers.mean()) for name, numbers in by_user.items()}
    metrics["coverage@10"] = len(ranked[ranked >= 0].unique()) / len(data.titles)
    return metrics, by_user, ranked.tolist()

# --- Saved models ---------------------------------------------------------------------------------
def save_pretrained(policy, folder):
    """Write config.json and model.safetensors, which GPT2LMHeadModel loads as well (the flow head
    is not saved), and semantic_ids.json. Old files are replaced when all new ones are complete."""
    part = Path(f"{folder}.part")
    policy.lm.save_pretrained(part)
    ids = policy.semantic_ids
    report.write(part / "semantic_ids.json", {
        "num_codes": ids.num_codes, "codes": ids.codes.tolist(), "catalogue": policy.catalogue})
    Path(folder).mkdir(parents=True, exist_ok=True)
    for file in part.iterdir():
        file.replace(Path(folder) / file.name)
    part.rmdir()

def from_pretrained(folder):
    """The saved Policy in eval mode; InputError if the folder holds none."""
    try:
        table = json.loads((Path(folder) / "semantic_ids.json").read_text(encoding="utf-8"))
        ids = SemanticIDs(table["codes"], table["num_codes"])
        lm = GPT2LMHeadModel.from_pretrained(folder, use_safetensors=True)          # no pickle
        window = lm.config.n_positions - ids.num_levels         # as Policy has them: window + L
        policy = Policy(ids, window, catalogue=table["catalogue"], lm=lm)
        check(lm.config.vocab_size == policy.user_token + 1 + len(ids.codes), "its IDs do not fit")
        return policy.eval()
    except Exception as error:                                  # a wrong folder can raise anything
        raise InputError(f"{folder} holds no saved model of this version (untrained methods are "
                         f"never saved): {error}") from None

Policy.save_pretrained = save_pretrained                        # the names of transformers
Policy.from_pretrained = staticmethod(from_pretrained)

# --- Settings: flags, names of methods ------------------------------------------------------------
@dataclass
class Settings:
    """All settings, each a command-line flag."""
    data: str = HfArg(default="toy", help="toy, ml-100k, or a folder of two CSV files")
    methods: str = HfArg(default="pop,cm,svd,svd:debias=.5,sft,tb,product",
                         help="comma-separated; with changes: tb:epochs=4:sampler=policy_beam")
    seeds: str = HfArg(default="42", help="comma-separated: every method runs once with each")
    out: str = HfArg(default="", help="folder for results (default: runs/NAME-OF-DATA)")
    quick: bool = HfArg(default=False, help="a smoke run in seconds: 100 users, one epoch")
    device: str = HfArg(default="auto", help="where to train: auto, cuda, mps or cpu")
    ids: str = HfArg(default="mixed", help="content (text), mixed (text and log), or FILE.csv")
    codes: int = HfArg(default=0, help="K, codes a level (0: a power of 2, about n / 24)")
    levels: int = HfArg(default=3, help="L, levels of an ID: as in the paper's examples")
    window: int = HfArg(default=20, help="items of the history that are read: the last say most")
    width: int = HfArg(default=64, help="hidden size: 128 is enough for 10^4 items")
    layers: int = HfArg(default=2, help="transformer blocks: enough to compare items")
    batch: int = HfArg(default=16, help="rows a step: on a CPU, many small steps learn more")
    oracle: str | None = HfArg(default=None, metadata={"nargs": "?", "const": "tb"},
                               help="train four users with this method's loss: is P = R/Z?")
    recommend: list[str] = HfArg(default_factory=list, help="print ten titles for this history")
    model: str = HfArg(default="", help="the saved model for --recommend, like runs/toy/tb-42")

FIELDS = [name for name in vars(Recipe()) if name != "loss"]
# Real logs have other defaults: all data but made-up worlds, which have a truth.csv
REAL = dict(methods="pop,cm,blend,sft-log,tb-log,product-log", width=128, layers=3, batch=64)

def parse(argv):
    """Settings from the command line; a mistake ends in one line on stderr and status 2."""
    parser = HfArgumentParser(
        Settings, allow_abbrev=False, description=__doc__.splitlines()[0],
        epilog=f"methods: {', '.join(TEACHERS | RECIPES)}. samplers: {', '.join(SAMPLERS)}. fields "
        f"of a method, to change in its name: {', '.join(FIELDS)}. "
        "example: --methods sft:epochs=12,tb:trajectories=4,tb:debias=.5")
    parser.error = lambda message: parser.exit(2, f"error: {message}; see --help\n")
    data = Path(parser.parse_args(argv).data)                   # read first: it decides defaults
    if data != Path("toy") and not (data / "truth.csv").exists():
        parser.set_defaults(**REAL)
    settings = Settings(**vars(parser.parse_args(argv)))
    settings.out = settings.out or f"runs/{data.resolve().name}" + "-quick" * settings.quick
    devices = [name for name in ("cuda", "mps") if getattr(torch, name).is_available()] + ["cpu"]
    if settings.device == "auto":
        settings.device = devices[0]
    if settings.device not in devices:
        parser.error(f"--device {settings.device}: there is only {devices}")
    if not all(seed.strip().isdecimal() for seed in settings.seeds.split(",")):
        parser.error(f"--seeds {settings.seeds} are not numbers like 42,43")
    for name in ("levels", "window", "width", "layers", "batch"):
        if getattr(settings, name) < 1:
            parser.error(f"--{name} has to be above 0")
    if bool(settings.recommend) != bool(settings.model):
        parser.error("--recommend and --model go together")
    return settings

def recipe_of(name, quick=False):
    """The Recipe of a method like tb:epochs=4, or InputError. What comes later wins: the defaults
    of Recipe, RECIPES["tb"], one epoch if it is `quick`, the changes in the name."""
    base, *changes = name.split(":")
    check(base in TEACHERS | RECIPES, f"there is no method {base!r}; there are "
          f"{', '.join(TEACHERS | RECIPES)}")
    fields = dict(RECIPES.get(base) or dict(teacher=base, debias=0.0, sharp=1.0))
    kinds = {"sft": ["rate", "dropout", "epochs"], "product": ["teacher", "debias", "sharp"],
             **dict.fromkeys(TEACHERS, ["debias"])}             # which fields a method uses
    used = [field for field in FIELDS if base not in UNREAD.get(field, "").split()]
    used = kinds.get(base.removesuffix("-log"), used)
    odd = [change for change in changes if change.partition("=")[0] not in used]
    check(not odd, f"{name}: of {base}, one can change {', '.join(used)}, not {odd}")
    # A parser checks names and values
    parser = HfArgumentParser(Recipe, allow_abbrev=False, add_help=False)
    parser.error = lambda message: check(False, f"{name}: {message}; fields are {FIELDS}")
    parser.set_defaults(**fields | dict(epochs=1) if quick else fields)
    recipe = Recipe(**vars(parser.parse_args([f"--{change}" for change in changes])))
    for field, there in {"sampler": SAMPLERS, "teacher": TEACHERS}.items():
        check(getattr(recipe, field) in there, f"{name}: {field} has to be one of {[*there]}")
    for field in ("trajectories", "rate", "epochs", "sharp"):
        check(getattr(recipe, field) > 0, f"{name}: {field} has to be above 0")
    check(0 <= recipe.dropout < 1, f"{name}: dropout has to be from 0 to below 1")
    return recipe

def recipes_of(settings):
    """{method: its Recipe}, in order. What follows an SFT goes on from it. If none comes before the
    first method that needs one, the usual one is added."""
    names = [name.strip() for name in settings.methods.split(",")]
    others = [name for name in names if name.partition(":")[0] not in TEACHERS]
    if others and not others[0].startswith("sft"):
        names.insert(0, "sft-log" if others[0].partition(":")[0].endswith("-log") else "sft")
    return {name: recipe_of(name, settings.quick) for name in names}

# --- The experiment: data → IDs, teacher → SFT → fine-tuned policies → table ----------------------
def make_ids(settings, data, seed):
    """The SemanticIDs that --ids asks for: k-means on features of items, or those of a file."""
    n = len(data.titles)
    if settings.ids in ("content", "mixed"):
        # K: the next power of 2 from the smaller of n / 24 and 512 on, so large that K^L ≥ n
        least = max(2, min(n / 24, 512), n ** (1 / settings.levels))
        K = settings.codes or 2 ** math.ceil(math.log2(least))
        check(settings.codes <= n, f"--codes {K}: more than the {n} items")
        print(f"seed {seed}: {n} semantic IDs of {settings.levels} codes, 0 to {K - 1}")
        features = item_features(settings.ids, data.texts, data.train, seed)
        return SemanticIDs.fit(features, K, settings.levels, seed)
    check("." in settings.ids, f"--ids {settings.ids} is not content, mixed or a file")
    codes = read_ids(settings.ids, data.item_ids)
    return SemanticIDs(codes, max(map(max, codes)) + 1)

def make_policy(settings, data, ids, seed, dropout=0.0):
    """A new Policy with random weights, on the device of the settings."""
    torch.manual_seed(seed)
    catalogue = {"item_ids": data.item_ids, "titles": data.titles}
    return Policy(ids, settings.window, settings.width, settings.layers, dropout,
                  catalogue).to(settings.device)

def runs_of(settings, data, seed, recipes):
    """Train and test the methods, {name: Recipe}, with one seed. Yield a run, as results.json has
    it, as soon as a method is finished."""
    ids = make_ids(settings, data, seed)
    rows = list(training_rows(data.train, settings.window))
    size = min(settings.batch, math.ceil(len(rows) / 20))       # of a small log, 20 steps an epoch
    for name, recipe in recipes.items():
        print(f"{name}, seed {seed}", flush=True)
        fields = {field: getattr(recipe, field) for field in FIELDS}
        entry = {"method": name, "seed": seed, "recipe": fields}
        started = time.time()
        if name.partition(":")[0] in TEACHERS or name.startswith("product"):
            teacher = Teacher(recipe.teacher, data, recipe.debias, recipe.sharp)
            recommend = teacher.recommend
            if name.startswith("product"):
                recommend = lambda past: sft.recommend(past, guide=teacher.scores(past))
        else:
            policy = make_policy(settings, data, ids, seed, recipe.dropout)
            if recipe.loss:
                policy.load_state_dict(sft.state_dict())
            entry["validation"] = train(
                name, recipe, policy, rows, size, data, seed, validation_ndcg)
            policy.save_pretrained(f"{settings.out}/{name.replace(':', ',')}-{seed}")
            recommend = policy.recommend
            if not recipe.loss:
                sft = policy                                    # the others go on from it
        trained = time.time()
        metrics, by_user, lists = evaluate(recommend, data)
        seconds = {"train": trained - started, "eval": time.time() - trained}
        yield entry | dict(metrics=metrics, by_user=by_user, lists=lists, seconds=seconds)

def run(settings):
    """The whole job → results.json, as a dict."""
    if settings.quick:
        print("--quick: the figures below mean nothing; they only show that everything works")
    recipes = recipes_of(settings)                              # a wrong name is told at once
    data = load_data(settings.data, settings.quick)             # a Dataset
    Path(settings.out).mkdir(parents=True, exist_ok=True)       # fails now, not after training
    versions = {module.__name__: module.__version__ for module in (torch, transformers, np)}
    about = {"data": data.sizes, "settings": vars(settings), "versions": versions}
    runs = []
    try:
        for seed in map(int, settings.seeds.split(",")):
            for entry in runs_of(settings, data, seed, recipes):
                runs.append(entry)
    except KeyboardInterrupt:
        if runs:
            report.finish(settings.out, runs, about, data)
        raise
    return report.finish(settings.out, runs, about, data)

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
    base, *own = settings.oracle.split(":")
    changes = ["gr=0", "lam=1", "sampler=policy_draws", "trajectories=64", "rate=.002"]
    changes += [] if settings.quick else ["epochs=15"]
    recipe = recipe_of(":".join([base, *changes, *own]), settings.quick)
    data = load_data(settings.data, settings.quick)
    path = Path(settings.out) / "oracle.png"
    path.parent.mkdir(parents=True, exist_ok=True)              # fails now, not after training
    seed = int(settings.seeds.split(",")[0])
    policy = make_policy(settings, data, make_ids(settings, data, seed), seed)
    rows = [(user, [len(items) - 1]) for user, items in enumerate(data.train[:4])]
    teacher = Teacher(recipe.teacher, data, recipe.debias, recipe.sharp)
    batch = Batch(rows, data, policy, teacher, recipe)
    target = (batch.r / batch.r.sum(1, keepdim=True)).cpu()     # R/Z of the four (4, n)
    def l1_distance(policy, data=None):
        return (distribution(policy, batch.histories) - target).abs().sum(1).mean().item()
    before = l1_distance(policy)
    # An epoch is 100 steps, each on all four contexts
    after = train(settings.oracle, recipe, policy, 100 * rows, 4, data, seed, l1_distance)
    print(f"mean L1 distance of P from R/Z (2 at most): {before:.4f} before, {after:.4f} after")
    panels = {"R/Z": target[0], "P": distribution(policy, batch.histories)[0]}
    report.figures.plot_flows(path, policy.semantic_ids.codes.cpu(), data.titles, panels)
    print(f"{path}: R/Z and P of one user, as flows down the tree")

# --- Command line ---------------------------------------------------------------------------------
def print_recommendations(settings):
    """Ten titles by a saved model, best first, for a history of titles or ids, oldest first."""
    model = Policy.from_pretrained(settings.model)
    titles = model.catalogue["titles"]
    history = [find_item(name, model.catalogue["item_ids"], titles) for name in settings.recommend]
    items, _ = model.recommend([history])
    check(items.max() >= 0, "the history has all items: none is left")
    print(*[titles[item] for item in items[0].tolist() if item >= 0], sep="\n")

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
        print("stopped; the table has the methods that are finished", file=sys.stderr)
        return 130
    except (InputError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2

if __name__ == "__main__":
    sys.exit(main(parse(sys.argv[1:])))
