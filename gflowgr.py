"""GFlowGR in one file: fine-tune a generative recommender so that P(item | user) follows a reward.

A generative recommender reads a user's history and writes the semantic ID of the next item, code
by code. Supervised fine-tuning (SFT) on the log teaches what was shown, not what the user would
like: exposure bias. GFlowGR reads an ID as a path down a tree and trains a GFlowNet on it: the
probability of an item shall be proportional to its reward R. R mixes the logged action, the score
of a collaborative model (CM) and the similarity of IDs. Numbers (1) … (10) are those of README.

Letters in shapes: B users, or rows of a batch (each of one user), H tokens of a row's history, T
targets in a row, C contexts (a target and the history before it), N augmented and J all
trajectories of a context, E branches and S places in a row, L levels, K codes a level, n items, P
prefixes, W beams, d width.
"""
import copy
import itertools
import json
import math
import os
import sys
import time
from collections import namedtuple
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

from transformers.hf_argparser import HfArg, HfArgumentParser

from data import InputError, check, find_item, load_data, read_ids
# load_data → a Dataset of B users and n items; an item is an index, 0 … n−1. histories: B lists of
# items, oldest first; train: the same without the last two (validation, test); liked: bools, one
# for each item of histories; truth: of the toy: "liked" and "shown", B sets of items each; else {}.

PRESETS = {         # ml-100k: 50 beams, since many end at items that are in the history already
    "toy": dict(methods="pop,cm,cm-debiased,sft,sft-continued,tb,fm,fm+cm", width=64, layers=2,
                batch=16, sft_epochs=12, rate=3e-3, epochs=8, fine_rate=3e-3,
                reward="sum", weights="0.2,0.75,0.05", debias=1.0),
    "ml-100k": dict(codes=256, width=96, rate=3e-3, epochs=4, fine_dropout=0.2, beams=50)}

@dataclass
class Settings:
    """All settings, each a command-line flag. PRESETS changes some of the defaults with --data."""
    data: str = HfArg(default="toy", help="toy, ml-100k (see PRESETS), or a folder of two CSVs")
    methods: str = HfArg(default="pop,cm,sft,sft-continued,tb,fm,fm+cm", help="comma-separated: "
                         "pop, cm, cm-debiased, one of RECIPES, or NAME+cm: guided by the CM")
    seeds: str = HfArg(default="42", help="comma-separated: every method runs once with each")
    out: str = HfArg(default="", help="folder for results (default: runs/NAME-OF-DATA)")
    resume: bool = HfArg(default=False, help="keep the finished methods in --out and go on")
    sft: str = HfArg(default="", help="folder of a finished run: start from its SFT models")
    quick: bool = HfArg(default=False, help="a smoke run in seconds: one epoch of everything")
    device: str = HfArg(default="auto", help="where to train: auto, cuda, mps or cpu")
    threads: int = HfArg(default=1, help="CPU threads: for models as small as these, one is best")
    ids: str = HfArg(default="mixed", help="content (text), mixed (text and log), or FILE.csv")
    codes: int = HfArg(default=0, help="K, codes a level (default: a power of 2, about n / 24)")
    levels: int = HfArg(default=3, help="L, levels of an ID: as in the paper's examples")
    window: int = HfArg(default=20, help="items of the history that are read: the last say most")
    width: int = HfArg(default=128, help="hidden size: enough for 10^4 items on two cores")
    layers: int = HfArg(default=3, help="transformer blocks: enough to compare items")
    batch: int = HfArg(default=64, help="rows a step: on a CPU, many small steps learn more")
    dropout: float = HfArg(default=0.2, help="of SFT: a smaller one over-fits")
    rate: float = HfArg(default=1.5e-3, help="peak learning rate of SFT: small models like it high")
    sft_epochs: int = HfArg(default=8, help="epochs of SFT: validation stops rising there")
    fine_rate: float = HfArg(default=1.5e-3, help="peak learning rate of fine-tuning")
    fine_dropout: float | None = HfArg(default=None, help="of fine-tuning (default: RECIPES)")
    epochs: int = HfArg(default=7, help="epochs of fine-tuning: the last ones bring the gain")
    sampler: str | None = HfArg(default=None, help="one of SAMPLERS (default: see RECIPES)")
    trajectories: int | None = HfArg(default=None, help="N, augmented paths (default: RECIPES)")
    gr: float | None = HfArg(default=None, help="weight of L_GR beside L_GFN (default: RECIPES)")
    lam: float | None = HfArg(default=None, help="lambda, weight of L_GFN (default: RECIPES)")
    reward: str | None = HfArg(default=None, help="sum or product: r_y is CM, or SFT x CM^gamma")
    weights: str = HfArg(default="0.3,0.65,0.05", help="w_a,w_y,w_s of R: the CM weighs most")
    debias: float = HfArg(default=0.0, help="delta: divide CM scores by popularity^delta")
    gamma: float = HfArg(default=2.0, help="power of the CM, in the product and in NAME+cm")
    beams: int = HfArg(default=20, help="beam width, saved with a model: twice the ten items")
    oracle: str | None = HfArg(default=None, metadata={"nargs": "?", "const": "tb"},
                               help="train four users with this loss: is P = R/Z?")
    recommend: list[str] = HfArg(default_factory=list, help="print ten titles for this history")
    model: str = HfArg(default="", help="the saved model for --recommend, like runs/toy/tb-42")

def parse(argv):
    """Settings from the command line; a mistake ends in one line on stderr and status 2."""
    parser = HfArgumentParser(Settings, allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.error = lambda message: parser.exit(2, f"error: {message}; see --help\n")
    known = parser.parse_args(argv)                             # once for --data, once for all
    if bool(known.recommend) != bool(known.model):
        parser.error("--recommend and --model go together")
    parser.set_defaults(**PRESETS.get(known.data, {}))
    if known.quick:
        parser.set_defaults(sft_epochs=1, epochs=1)
    settings = parser.parse_args_into_dataclasses(argv)[0]
    name = Path(settings.data).resolve().name
    settings.out = settings.out or f"runs/{name}" + "-quick" * settings.quick
    return settings

if __name__ == "__main__":
    SETTINGS = parse(sys.argv[1:])                              # before torch: --help is fast
    os.environ["OMP_NUM_THREADS"] = str(SETTINGS.threads)       # torch reads it when imported

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from data import figures
from reward import CollaborativeModel, Reward, best_unseen, entries
from tokenizer import SemanticIDs, item_features

transformers.utils.logging.disable_progress_bar()
NEVER = -1e9                                    # log P of what is illegal; 0 · −inf would be nan

# --- Rows of a batch ------------------------------------------------------------------------------
def pad(lists, value):
    """Lists of integers as one tensor, filled up with `value` on the right."""
    rows = [torch.tensor(items) for items in lists]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

Row = namedtuple("Row", "user start first stop")    # read: start … stop-2; targets: first … stop-1

def training_rows(histories, window):
    """Rows in which every item is a target once. The last target of a row sees the `window` items
    before it (or all, if fewer), the first of a user's later rows at least half as many. Ten items,
    window 4, read → targets: 0–3 → 0–4, 2–5 → 5–6, 4–7 → 7–8, 5–8 → 9."""
    rows = []
    for user, history in enumerate(histories):
        cuts = [0, *range(window + 1, len(history), max(1, window // 2)), len(history)]
        for first, stop in zip(cuts, cuts[1:]):
            rows.append(Row(user, max(0, stop - 1 - window), first, stop))
    return rows

def contexts_of(rows):
    """The contexts of rows: a pair (user, place) for every target, in order."""
    return [(row.user, place) for row in rows for place in range(row.first, row.stop)]

def batches(rows, histories, size, policy, rng):
    """One epoch of batches in random order; rows of similar length together, for less padding.
    A batch: tokens (B, H) of the items read; ends (B, T), how many of its row's items stand before
    each target, −1 on padding; contexts, a pair (user, place) for each of the C targets."""
    rows = [rows[r] for r in rng.permutation(len(rows))]
    groups = []
    for i in range(0, len(rows), 32 * size):
        chunk = sorted(rows[i:i + 32 * size], key=lambda row: row.stop - row.start)
        groups += [chunk[j:j + size] for j in range(0, len(chunk), size)]
    rng.shuffle(groups)
    for chosen in groups:
        tokens, _ = policy.tokens([histories[row.user][row.start:row.stop - 1] for row in chosen])
        ends = pad([range(row.first - row.start, row.stop - row.start) for row in chosen], -1)
        yield SimpleNamespace(tokens=tokens, ends=ends, contexts=contexts_of(chosen))

# --- The policy: P_F(next code | user, codes so far) ----------------------------------------------
def tree_mask(ends, H, L):
    """Which places see which in a packed row: floats (B, S, S), 0 where i sees j, else NEVER.

    A row is H tokens of history, <user> first, then E branches of L−1 codes: S = H + E·(L−1). A
    place of the history sees itself and all before it. A code sees its own branch up to itself, and
    the history up to place ends[b, e], after which branch e of row b begins; ends (B, E).
    <user> a b, with branch c d after a, and e f after b:
    >>> for place, row in zip("uabcdef", tree_mask(torch.tensor([[1, 2]]), H=3, L=3)[0]):
    ...     print(place, *["1" if x == 0 else "." for x in row])
    u 1 . . . . . .
    a 1 1 . . . . .
    b 1 1 1 . . . .
    c 1 1 . 1 . . .
    d 1 1 . 1 1 . .
    e 1 1 1 . . 1 .
    f 1 1 1 . . 1 1
    """
    place = torch.arange(H + ends.shape[1] * (L - 1), device=ends.device)           # (S,)
    branch = ((place - H) // max(1, L - 1)).clamp(min=-1)       # (S,) −1: the history
    own = (branch[:, None] == branch).tril()                    # (S, S) of its branch, up to itself
    last = F.pad(ends.repeat_interleave(L - 1, 1), (H, 0))      # (B, S) history that a code sees
    return torch.where(own | (place <= last[..., None]), 0.0, NEVER)                # (B, S, S)

class Policy(torch.nn.Module):
    """A small GPT-2 that reads a history and writes a semantic ID, plus the table of IDs.

    Tokens: code c of level l is l·K + c; L·K is <user>, which opens every row; L·K + 1 + i is
    catalogue item i in a history, one token (2). A row is a packed tree: the history once, then a
    branch for each path, its first L−1 codes (the last is predicted, never read). <user> also pads.
    """

    def __init__(self, semantic_ids, window=20, width=128, layers=3, dropout=0.2, lm=None):
        super().__init__()
        self.semantic_ids = semantic_ids
        self.window = window
        self.user_token = semantic_ids.num_levels * semantic_ids.num_codes
        self.cm = None                                          # guides the beam by scores^gamma
        self.gamma = 2.0
        self.beams = 20                                         # beam width of recommend
        self.catalogue = {}                                     # item_ids and titles, for saving
        self.lm = lm or GPT2LMHeadModel(GPT2Config(             # from scratch (1)
            vocab_size=self.user_token + 1 + len(semantic_ids.codes), n_embd=width, n_layer=layers,
            n_head=math.gcd(width, max(1, width // 32)),        # of 32 numbers, if that divides
            n_positions=window + semantic_ids.num_levels,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=0.0,   # 0: else twice the time
            bos_token_id=self.user_token, eos_token_id=self.user_token,
            activation_function="gelu_pytorch_tanh"))           # gelu_new's values, faster on CPU
        self.flow_head = torch.nn.Linear(self.lm.config.n_embd, 1)   # log F(s); log Z(U) at s_0
        for parameter in self.flow_head.parameters():
            torch.nn.init.zeros_(parameter)                     # log F = 0: R sums to about 1 (5)

    def tokens(self, histories):
        """Tokens (B, H): <user>, the last `window` items, padding; counts (B, 1) of the items."""
        rows = [[-1, *history[-self.window:]] for history in histories]     # −1 becomes <user>
        return pad(rows, -1) + self.user_token + 1, torch.tensor([[len(row) - 1] for row in rows])

    def forward(self, tokens, ends, items):
        """J paths at each of C contexts → log_pf (C, J, L) of the codes taken; log_probs
        (C, J, L, K) of all, NEVER where illegal; log_flow (C, J, L) of s_0 … s_{L-1}, by the head.
        tokens (B, H), ends (B, T): as in `batches`; items (C, J): where the paths lead."""
        ids = self.semantic_ids
        tokens, ends, items = (x.to(ids.codes.device) for x in (tokens, ends, items))
        H = tokens.shape[1]
        L = ids.num_levels
        K = ids.num_codes
        J = items.shape[1]
        valid = ends >= 0
        # The C rows of items go to the C valid ends → (B, E = T·J)
        packed = items.new_zeros(*ends.shape, J).masked_scatter(valid[..., None], items).flatten(1)
        ends = ends.clamp(min=0).repeat_interleave(J, 1)                            # (B, E)
        codes = ids.codes[packed] + K * torch.arange(L, device=items.device)        # (B, E, L)
        mask = tree_mask(ends, H, L)
        hidden = self.lm.transformer(                           # position: how many it sees, less 1
            torch.cat([tokens, codes[..., :-1].flatten(1)], 1), attention_mask=mask[:, None],
            position_ids=(mask == 0).sum(-1) - 1, use_cache=False).last_hidden_state    # (B, S, d)
        root = hidden.take_along_dim(ends[..., None], 1)                            # (B, E, d)
        later = hidden[:, H:].unflatten(1, (ends.shape[1], L - 1))                  # (B, E, L-1, d)
        prefixes = torch.cat([root[:, :, None], later], 2)                          # (B, E, L, d)
        # The output weights of a level are the embeddings of its codes. Slice the embedding once:
        # a slice per level would allocate a full-size gradient for each.
        heads = self.lm.transformer.wte.weight[:L * K].unflatten(0, (L, K))         # (L, K, d)
        logits = torch.einsum("beld,lkd->belk", prefixes, heads).float()            # (B, E, L, K)
        illegal = ids.next_node[ids.nodes[packed][..., :-1]] < 0
        log_probs = logits.masked_fill(illegal, NEVER).log_softmax(-1)
        log_flow = self.flow_head(prefixes)[..., 0]                                 # (B, E, L)
        log_probs, log_flow = (x.unflatten(1, (-1, J))[valid] for x in (log_probs, log_flow))
        log_pf = log_probs.gather(-1, ids.codes[items][..., None])[..., 0]          # (C, J, L)
        return SimpleNamespace(log_pf=log_pf, log_probs=log_probs, log_flow=log_flow)

    def path_log_probs(self, histories, items):
        """log P_F of each step on the paths of items (B, J) after B histories → (B, J, L)."""
        return self(*self.tokens(histories), torch.as_tensor(items)).log_pf

    @torch.no_grad()
    def recommend(self, histories, k=10, beams=None):
        """The k best items of B histories: items (B, k), best first, and their scores (B, k).
        Never an item of the history, never a duplicate; −1 and −inf where the beam holds no more.

        Beam search over legal codes: the score of a prefix is Σ log P_F of its codes, and the best
        max(beams or self.beams, k) of a user go on to the next level: exact with enough beams. With
        self.cm (9), log Σ CM^γ over the items below is added: an item has log P_F + γ · log CM.
        """
        ids = self.semantic_ids
        K = ids.num_codes
        beams = max(beams or self.beams, k)
        tokens, lengths = (x.to(ids.codes.device) for x in self.tokens(histories))
        cache = DynamicCache()
        hidden = self.lm.transformer(tokens, cache).last_hidden_state   # (B, H, d); fills the cache
        hidden = hidden.take_along_dim(lengths[..., None], 1)                       # (B, W = 1, d)
        place = torch.arange(tokens.shape[1], device=tokens.device)
        mask = torch.where(place > lengths[..., None], NEVER, 0.0)                  # (B, W, H + …)
        score = torch.zeros_like(lengths, dtype=torch.float)    # (B, W) Σ log P_F of each beam
        node = torch.zeros_like(lengths)                        # (B, W) its place in the tree
        if self.cm is not None:
            power = self.cm.scores(histories).to(mask.device) ** self.gamma         # (B, n)
            log_flow = ids.flows(power).clamp(min=1e-30).log()                      # (B, P + n)
        for level in range(ids.num_levels):
            head = self.lm.transformer.wte.weight[level * K:(level + 1) * K]        # (K, d)
            child = ids.next_node[node]                         # (B, W, K), −1 where illegal
            # Work in place: a pass over (B, W, K) takes as long as a transformer block.
            total = (hidden @ head.T).masked_fill_(child < 0, NEVER).log_softmax(-1)
            total = total.add_(score[..., None]).flatten(1)                         # (B, W·K)
            child = child.flatten(1)
            value = total                                       # what beams compete by
            if self.cm is not None:
                value = total + log_flow.gather(1, child.clamp(min=0))      # illegal: still NEVER
            if level == ids.num_levels - 1:                     # children are items, node P + i
                scores = value.new_full((len(value), ids.num_prefixes + len(ids.codes)), -math.inf)
                scores.scatter_(1, child.clamp(min=0), value)   # illegal: to the root, unused
                return best_unseen(scores[:, ids.num_prefixes:], histories, k)
            best = value.topk(min(beams, value.shape[1]), 1).indices                # (B, W)
            score = total.gather(1, best)
            node = child.gather(1, best)
            # Usual beam search copies the cache of the parents that go on. Here the cache keeps all
            # beams: a beam takes its parent's row of the mask, and gets a new column for itself.
            W = best.shape[1]
            seen = mask.take_along_dim((best // K)[..., None], 1)
            itself = torch.full((W, W), NEVER, device=mask.device).fill_diagonal_(0)
            mask = torch.cat([seen, itself.expand(len(seen), W, W)], 2)
            hidden = self.lm.transformer(
                level * K + best % K, cache, attention_mask=mask[:, None],
                position_ids=(lengths + 1 + level).expand_as(best)).last_hidden_state  # (B, W, d)

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors (plain GPT-2), and IDs, titles, CM beside it."""
        path = Path(folder) / "semantic_ids.json"
        path.unlink(missing_ok=True)                            # written last: marks a whole model
        self.lm.save_pretrained(folder)
        tables = Path(folder) / "cm.safetensors"
        tables.unlink(missing_ok=True)
        guide = None if self.cm is None else "not saved"        # a user's CM: loading will fail
        if type(self.cm) is CollaborativeModel:
            guide = self.cm.options
            save_file(self.cm.state_dict(), tables)
        ids = self.semantic_ids
        write_json(path, {"num_codes": ids.num_codes, "codes": ids.codes.tolist(), "cm": guide,
                          "gamma": self.gamma, "beams": self.beams, "catalogue": self.catalogue})

    @classmethod
    def from_pretrained(cls, folder, dropout=0.0):
        """The Policy that save_pretrained wrote, in eval mode; InputError where there is none.
        Its flow head, which training alone needs, starts anew."""
        try:
            table = json.loads((Path(folder) / "semantic_ids.json").read_text(encoding="utf-8"))
            ids = SemanticIDs(table["codes"], table["num_codes"])
            lm = GPT2LMHeadModel.from_pretrained(               # safetensors: no pickle
                folder, use_safetensors=True, resid_pdrop=dropout, embd_pdrop=dropout)
            policy = cls(ids, lm.config.n_positions - ids.num_levels, lm=lm)
            for name in ("gamma", "beams", "catalogue"):
                setattr(policy, name, table[name])
            if table["cm"]:
                tables = load_file(Path(folder) / "cm.safetensors")
                policy.cm = CollaborativeModel(table["cm"], **tables)
        except Exception as error:      # whatever is wrong with the files; an own CM is not in them
            raise InputError(f"{folder} holds no saved model of this program: {error}") from None
        return policy.eval()

# --- Losses: pure functions of tensors, natural logs ----------------------------------------------
def trajectory_balance(log_z, log_pf, log_r):
    """TB of J paths a user: log Z(U) (B,), Σ_l log P_F (B, J), log R (B, J) → scalar.

    >>> log_pf, log_r = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    >>> round(trajectory_balance(torch.zeros(1), log_pf, log_r).item(), 4)   # (0 + (log 1/2)²) / 2
    0.2402
    """
    # mean of (log Z(U) + Σ_l log P_F(s_{l+1} | s_l) − log R(s_L))²; P_B is 1 on a tree
    return (log_z[:, None] + log_pf - log_r).square().mean()

def detailed_balance(log_flow, log_pf):
    """DB: log F(s_0) … log F(s_L) (B, J, L+1), the last is log R; log P_F (B, J, L) → scalar."""
    # Σ_l (log F(s_l) + log P_F(s_{l+1} | s_l) − log F(s_{l+1}))², mean over paths
    return (log_flow[..., :-1] + log_pf - log_flow[..., 1:]).square().sum(-1).mean()

def flow_matching(flow, log_probs):
    """FM (8): exact flows of all children (..., L, K) ≥ 0, log P_F (..., L, K) → scalar.
    In the literature FM demands inflow = outflow. Here F* is known: P_F is fitted to it."""
    # KL: Σ_l Σ_c F*(c)/F*(s_l) · (log F*(c)/F*(s_l) − log P_F(c | s_l)), mean over paths
    target = flow / flow.sum(-1, keepdim=True)
    return (target * (target.clamp(min=1e-30).log() - log_probs)).sum((-2, -1)).mean()

def sdpo(policy_pos, policy_neg, ref_pos, ref_neg, beta):
    """S-DPO: log P of a positive (B,) and of negatives (B, J), by policy, reference → scalar."""
    # mean of −log σ(−log Σ_d exp(β[Δ_d − Δ_p])), Δ = log P_policy − log P_reference
    margin = beta * ((policy_neg - ref_neg) - (policy_pos - ref_pos)[:, None])
    return -F.logsigmoid(-margin.logsumexp(1)).mean()

@dataclass
class Recipe:
    """How a method is trained. A new method is a loss and an entry in RECIPES."""
    loss: object = None             # L_GFN, a function of paths; None: L_GR alone
    gr: float = 0.0                 # weight of L_GR beside it
    lam: float = 1.0                # λ, weight of L_GFN
    sampler: str = "reward"         # one of SAMPLERS: where the N augmented trajectories come from
    trajectories: int = 1           # N
    exact: bool = False             # with the exact flows of R, in place of the learned log F
    rates: tuple = (1.0,)           # peak rates to try, times --fine-rate (SFT: --rate)
    fine_dropout: float | None = 0.0    # None: that of SFT
    reference: bool = False         # with log P_F of the frozen SFT policy
    reward: str = "sum"             # r_ŷ is the CM's score; "product": see product_of (10)

# The losses of RECIPES are functions of `paths`, J paths at each of C contexts:
#   log_pf (C, J, L)         log P_F of the codes taken
#   log_probs (C, J, L, K)   log P_F of all codes
#   log_r (C, J)             log R
#   log_flow (C, J, L)       log F of s_0 … s_{L-1}: from the head, or exact=True: log F* of R
#   child_flow (C, J, L, K)  exact=True: F* of all children of s_0 … s_{L-1}
#   reference (C, J, L)      reference=True: log_pf of the frozen SFT policy
def tb_loss(paths):
    """TB: log Z(U) is log F of s_0."""
    return trajectory_balance(paths.log_flow[:, 0, 0], paths.log_pf.sum(-1), paths.log_r)

def db_loss(paths):
    """DB: log R is log F of s_L."""
    return detailed_balance(torch.cat([paths.log_flow, paths.log_r[..., None]], -1), paths.log_pf)

def fm_loss(paths):
    """FM: P_F against the exact flows, at every step of the paths."""
    return flow_matching(paths.child_flow, paths.log_probs)

def sdpo_loss(paths):
    """S-DPO: the first path is the positive, the others are negatives."""
    policy = paths.log_pf.sum(-1)
    reference = paths.reference.sum(-1)
    return sdpo(policy[:, 0], policy[:, 1:], reference[:, 0], reference[:, 1:], beta=0.1)

# tb-paper is the paper's L_GR + λ · L_GFN, but λ is .1 here (paper: about 1), since squared
# log-ratios are large beside L_GR. tb, db, fm need no L_GR (7): r_a in R teaches the logged item. A
# flag or PRESETS overrides an entry: in the toy world PRESETS makes reward "sum" for all.
PAPER = dict(gr=1, sampler="curriculum", trajectories=3, fine_dropout=None, rates=(0.3,))
RECIPES = {
    "sft": Recipe(fine_dropout=None),
    "sft-continued": Recipe(fine_dropout=None, rates=(1.0, 0.3)),
    "sdpo": Recipe(sdpo_loss, reference=True, **PAPER),
    "tb-paper": Recipe(tb_loss, lam=0.1, **PAPER),
    "db": Recipe(db_loss, trajectories=2, exact=True, reward="product"),
    "tb": Recipe(tb_loss, trajectories=2, exact=True, reward="product"),
    "fm": Recipe(fm_loss, exact=True, reward="product")}
SAMPLERS = ["session", "random", "curriculum", "policy", "reward", "even"]

# --- The adaptive trajectory sampler: which items to learn from beside the logged one -------------
def known_of(contexts, data, reward, kind="sum"):
    """What is known at C training contexts (user, place): logged, C lists of the user's training
    items; histories, C lists of those before the place; positives (C,), the targets; scores (C, n)
    of the CM, less what this user's later items have added; r (C, n), R of this kind: r_ŷ is the
    scores, or with "product" the shares of product_of (below), 0 at all other items."""
    logged = [data.train[user] for user, _ in contexts]
    histories = [data.train[user][:place] for user, place in contexts]
    following = [data.train[user][place:] for user, place in contexts]
    device = reward.ids.codes.device
    positives = torch.tensor([items[0] for items in following], device=device)
    liked = torch.tensor([data.liked[user][place] for user, place in contexts], device=device)
    scores = reward.cm.scores(histories, following).to(device)
    signal = scores                                             # r_ŷ
    if kind == "product":
        items, shares = map(torch.stack, zip(*[reward.product[context] for context in contexts]))
        signal = torch.zeros_like(scores)
        signal.scatter_add_(1, items.to(device), shares.to(device))                 # both (C, W)
    return SimpleNamespace(logged=logged, histories=histories, positives=positives, scores=scores,
                           r=reward(signal, positives, liked))

def curriculum(scores, logged, count, progress):
    """N = count unobserved items a context (C, N): low CM scores early in training, high ones late.
    scores (C, n) of the CM, logged C lists, progress in [0, 1]. Draw 2N−1 items, item i with
    P ∝ scores[i]/2 + 1/(2n), unlogged ones alone; sort them from low to high score; keep N
    neighbours from place round(progress · (N−1)) on. 1/(2n) is ours (6): it adds low scores. If all
    are high, log R − log P is alike on all paths: log Z absorbs it, and P learns nothing."""
    weight = 0.5 * scores + 0.5 / scores.shape[1]
    weight[entries(logged)] = 1e-12                             # not 0: all items may be logged
    pool = torch.multinomial(weight, 2 * count - 1, replacement=True)               # (C, 2N-1)
    ranked = pool.gather(1, scores.gather(1, pool).argsort(1))
    start = round(progress * (count - 1))
    return ranked[:, start:start + count]

def augmented(recipe, known, policy, progress):
    """The N augmented items (C, N) of each context by the recipe's sampler; known: of known_of."""
    count = recipe.trajectories
    positives = known.positives[:, None]
    if count == 0:                                              # without augmentation
        return positives[:, :0]
    if recipe.sampler == "curriculum":                          # the paper's default
        return curriculum(known.scores, known.logged, count, progress)
    if recipe.sampler == "policy":                              # N of its beam (6)
        policy.eval()
        items = policy.recommend(known.histories, count + 1, beams=count + 1)[0].to(known.r.device)
        policy.train()
        order = (items == positives).int().argsort(dim=1, stable=True)      # the positive goes last
        items = items.gather(1, order)[:, :count]
        return items.where(items >= 0, positives)               # fewer than N found: the positive
    weight = known.r                                            # "reward", ours (7): P ∝ R
    if recipe.sampler == "even":                                # for --oracle: P ∝ R/Z + 1/n
        weight = weight / weight.sum(1, keepdim=True) + 1 / weight.shape[1]
    elif recipe.sampler == "random":                            # any unobserved items
        weight = torch.ones_like(weight)
        weight[entries(known.logged)] = 1e-12
    elif recipe.sampler == "session":                           # others of the user's own items
        weight = torch.zeros_like(weight)
        weight[entries(known.logged)] = 1
        weight.scatter_(1, positives, 1e-6)                     # the positive if there is no other
    # torch.multinomial is slower for one draw than for two
    return torch.multinomial(weight, max(2, count), replacement=True)[:, :count]

def product_of(policy, rows, data, reward):
    """Ours (10): r_ŷ ∝ P_SFT(v | U) · CM(U, v)^γ at the W items that the SFT policy's beam, guided
    by the CM, finds; 0 at all others → {context: (items (W,), shares (W,))} for all contexts of
    rows; shares sum to 1, or to 0 if the beam found no new item."""
    contexts = sorted(contexts_of(rows), key=lambda context: context[1])  # by length: less padding
    print(f"  product: the beam at {len(contexts)} contexts, once a seed", flush=True)
    policy = copy.copy(policy)                                  # the original is not guided
    product = {}
    for i in tqdm(range(0, len(contexts), 256), "product", leave=False, disable=None):
        chunk = contexts[i:i + 256]
        known = known_of(chunk, data, reward)
        policy.cm = SimpleNamespace(scores=lambda histories: known.scores)  # CM, less the answer
        items, score = policy.recommend(known.histories, k=policy.beams)    # log P_SFT + γ · log CM
        shares = score.softmax(1).nan_to_num()                  # nan if no item was found
        product.update(zip(chunk, zip(items.clamp(min=0), shares)))
    return product

# --- Training -------------------------------------------------------------------------------------
def loss_of(recipe, policy, reference, batch, reward, data, progress):
    """L = gr · L_GR(U, v) + λ · L_GFN, the means over the batch. L_GR alone without recipe.loss.
    reference: the frozen SFT policy, for S-DPO; progress: the share of training that is done."""
    if not recipe.loss:
        logged = torch.tensor([[data.train[user][place]] for user, place in batch.contexts])
        return -policy(batch.tokens, batch.ends, logged).log_pf.sum(-1).mean()
    known = known_of(batch.contexts, data, reward, recipe.reward)
    items = augmented(recipe, known, policy, progress)                              # (C, N)
    # The logged path τ_1 is put first, but not with the sampler "reward", which draws it often (7),
    # unless L_GR or S-DPO needs it, or N = 0.
    if recipe.gr or recipe.reference or recipe.sampler != "reward" or recipe.trajectories == 0:
        items = torch.cat([known.positives[:, None], items], 1)                     # (C, J)
    # The paths come from a sampler, not from the policy: GFlowNet losses are off-policy. log Z(U)
    # is log F(s_0), s_0 the state after the history. The mean is over J paths of C contexts.
    paths = policy(batch.tokens, batch.ends, items)
    device = paths.log_pf.device
    paths.log_r = known.r.gather(1, items).log().to(device)                         # (C, J)
    if recipe.exact:
        paths.child_flow = reward.ids.child_flows(known.r, items).to(device)        # (C, J, L, K)
        paths.log_flow = paths.child_flow.sum(-1).log()         # log F*(s); at s_0 log Z = log Σ R
    if recipe.reference:
        with torch.no_grad():
            paths.reference = reference(batch.tokens, batch.ends, items).log_pf     # (C, J, L)
    L_GR = -paths.log_pf[:, 0].sum(-1).mean() if recipe.gr else 0.0    # of the first, logged path
    return recipe.gr * L_GR + recipe.lam * recipe.loss(paths)

def train(method, recipe, policy, reward, data, rows, rate, seed, settings):
    """The one training loop → the curve, a list of {"epoch", "loss", "ndcg@10"}, 0 being the start.
    The last epoch counts: there the rate has come down to 0."""
    epochs = settings.sft_epochs if method == "sft" else settings.epochs
    size = min(settings.batch, math.ceil(len(rows) / 20))       # small data: about 20 steps
    per_epoch = math.ceil(len(rows) / size)
    steps = epochs * per_epoch
    groups = [{"params": policy.lm.parameters()},
              {"params": policy.flow_head.parameters(), "lr": 10 * rate}]           # log Z: fast
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = transformers.get_cosine_schedule_with_warmup(    # up to the peak rate, down to 0
        optimizer, min(200, steps // 10 + 1), steps)
    reference = copy.deepcopy(policy).eval()                    # frozen; in fine-tuning it is SFT
    if recipe.loss and recipe.reward == "product":              # made once a seed, for all methods
        reward.product = reward.product or product_of(reference, rows, data, reward)
    curve = [{"epoch": 0, "loss": None, "ndcg@10": validate(policy, data)}]
    losses = []
    for epoch in range(1, epochs + 1):
        policy.train()
        # The same seed twice: for dropout and samplers (torch), and for the order of rows (numpy)
        torch.manual_seed(int(np.random.default_rng((seed, epoch)).integers(2 ** 63)))
        everything = batches(rows, data.train, size, policy, np.random.default_rng((seed, epoch)))
        for batch in tqdm(everything, method, per_epoch, leave=False, disable=None):
            progress = len(losses) / steps
            loss = loss_of(recipe, policy, reference, batch, reward, data, progress)
            if not torch.isfinite(loss):
                users = ", ".join(sorted({data.user_ids[user] for user, _ in batch.contexts}))
                message = f"{method}: loss {loss} at step {len(losses)}; users {users}"
                raise FloatingPointError(message)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        loss = float(np.mean(losses[-per_epoch:]))
        ndcg = validate(policy, data)
        print(f"  {method}: epoch {epoch}/{epochs}, loss {loss:.3f}, validation NDCG@10 {ndcg:.4f}",
              flush=True)
        curve.append({"epoch": epoch, "loss": loss, "ndcg@10": ndcg})
    return curve

# --- Evaluation: leave one out, the whole catalogue, the same for every method --------------------
def recall_at(ranked, target, k):
    """Recall@k: share of users whose target (B,) is in the first k of ranked (B, ≥ k) → scalar."""
    return (ranked[:, :k] == target[:, None]).any(1).float().mean()

def ndcg_at(ranked, target, k):
    """NDCG@k: mean over users of 1/log2(rank + 1), rank from 1; 0 where rank > k → scalar."""
    # One target, so the ideal DCG is 1 and NDCG = DCG = Σ_r 1[ranked_r = target] / log2(r + 1)
    hits = ranked[:, :k] == target[:, None]
    return (hits / torch.log2(torch.arange(2, hits.shape[1] + 2, device=hits.device))).sum(1).mean()

def exposure_bias(listed, liked, shown, history, counts):
    """Three numbers of one user's list; new is what is not in the history.
    hidden@10: share of the liked, never shown items that are listed
    liked@10: share of the listed items that are liked and new
    lift@10: mean count in training of the listed items / of all liked, new items
    """
    hidden = liked - shown
    liked_new = liked - set(history)
    fair = counts[list(liked_new)].mean().item() if liked_new else 1.0
    size = max(1, len(listed))
    return {"hidden@10": len(hidden.intersection(listed)) / max(1, len(hidden)),
            "liked@10": len(liked_new.intersection(listed)) / size,
            "lift@10": counts[listed].sum().item() / size / max(1.0, fair)}

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
    return ndcg_at(rank_all(policy.eval().recommend, data.train[::step]), target, 10).item()

def evaluate(recommend, data):
    """Test: {metric: list of one number a user}, and the lists (B, 10)."""
    ranked = rank_all(recommend, [history[:-1] for history in data.histories])
    counts = torch.tensor(entries(data.train)[1]).bincount(minlength=len(data.titles)).float()
    rows = []
    for user, (*history, target) in enumerate(data.histories):
        found = (ranked[user:user + 1], torch.tensor([target]))
        rows.append({"recall@5": recall_at(*found, 5), "ndcg@5": ndcg_at(*found, 5),
                     "recall@10": recall_at(*found, 10), "ndcg@10": ndcg_at(*found, 10)})
        if data.truth:
            listed = ranked[user][ranked[user] >= 0].tolist()
            truth = [data.truth[name][user] for name in ("liked", "shown")]
            rows[user] |= exposure_bias(listed, *truth, history, counts)
    return {name: [round(float(row[name]), 6) for row in rows] for name in rows[0]}, ranked

# --- The experiment: data → IDs, CM → SFT → fine-tuned policies → table ---------------------------
def write_json(path, value):
    """Write under a temporary name, then rename: the file is whole or not there."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.part").write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    os.replace(f"{path}.part", path)

def prepare(seed, data, settings, cm=None):
    """The Reward, with IDs and CM, of one seed, from training items only."""
    weights = [float(weight) for weight in settings.weights.split(",")]
    fine = len(weights) == 3 and min(weights) >= 0 and sum(weights) < math.inf
    check(fine, f"--weights {settings.weights}: give three numbers, none negative")
    kind = settings.ids if settings.ids in ("content", "mixed") else "mixed"
    features = item_features(kind, data.texts, data.train, seed)
    n = len(data.titles)
    if settings.ids == kind:
        K = settings.codes or 2 ** math.ceil(math.log2(max(2, n / 24, n ** (1 / settings.levels))))
        ids = SemanticIDs.fit(features, K, settings.levels, seed)
    else:
        codes = read_ids(settings.ids, data.item_ids)
        ids = SemanticIDs(codes, max(map(max, codes)) + 1)
    print(f"seed {seed}: {ids.health()}", flush=True)
    cm = cm or CollaborativeModel.fit(data.train, n, debias=settings.debias)
    # On mps the reward stays on the CPU, where torch has sparse matrices
    return Reward(ids, cm, weights).to("cuda" if settings.device == "cuda" else "cpu")

def policy_of(name, seed, dropout, reward, data, settings):
    """A policy to go on with: a new one (name "new"), or the saved one of a method."""
    ids = copy.deepcopy(reward.ids).cpu()                       # a copy: .to moves it
    sizes = (settings.window, settings.width, settings.layers)
    if name == "new":
        torch.manual_seed(seed)
        policy = Policy(ids, *sizes, dropout)
        policy.catalogue = {"item_ids": data.item_ids, "titles": data.titles}
    else:
        folder = settings.sft if settings.sft and name == "sft" else settings.out
        source = Path(folder) / f"{name}-{seed}"
        policy = Policy.from_pretrained(source, dropout)
        found = (policy.window, policy.lm.config.n_embd, policy.lm.config.n_layer)
        check(found == sizes, f"{source} has window, width, layers {found}, not {sizes}")
        fits = policy.semantic_ids.codes.equal(ids.codes)
        check(fits, f"the semantic IDs of {source} do not fit the data")
    policy.gamma = settings.gamma
    policy.beams = settings.beams
    return policy.to(settings.device)

def trained(method, seed, reward, data, settings):
    """Train a method at its rates, save the best policy in OUT/METHOD-SEED → its curve."""
    recipe = RECIPES[method]
    flags = {name: getattr(settings, name, None) for name in vars(recipe)}      # gr, lam, …
    recipe = replace(recipe, **{name: flag for name, flag in flags.items() if flag is not None})
    is_sft = method == "sft"
    peak = settings.rate if is_sft else settings.fine_rate
    dropout = settings.dropout if is_sft or recipe.fine_dropout is None else recipe.fine_dropout
    rows = training_rows(data.train, settings.window)
    best = []
    for share in recipe.rates:
        policy = policy_of("new" if is_sft else "sft", seed, dropout, reward, data, settings)
        curve = train(method, recipe, policy, reward, data, rows, peak * share, seed, settings)
        if not best or curve[-1]["ndcg@10"] > best[-1]["ndcg@10"]:
            best = curve
            policy.save_pretrained(Path(settings.out) / f"{method}-{seed}")
    return best

def run_method(method, seed, reward, data, settings):
    """Train and test one method with one seed → its entry of results.json["runs"]."""
    started = time.time()
    cm = copy.copy(reward.cm)                                   # a copy, to set its debias
    policy = None
    curve = []
    if method == "pop":
        cm = CollaborativeModel.fit(data.train, len(data.titles), popularity=1.0)
    elif method == "cm":
        cm.debias = 0.0
    elif method != "cm-debiased":                               # a policy; cm as it is, for +cm
        if method in RECIPES and not (method == "sft" and settings.sft):
            curve = trained(method, seed, reward, data, settings)
        policy = policy_of(method.removesuffix("+cm"), seed, 0.0, reward, data, settings)
    if method.endswith("+cm"):
        policy.cm = cm
        policy.save_pretrained(Path(settings.out) / f"{method}-{seed}")
    def by_cm(histories):
        return best_unseen(cm.scores(histories), histories)
    middle = time.time()
    by_user, ranked = evaluate(policy.recommend if policy else by_cm, data)
    metrics = {name: float(np.mean(numbers)) for name, numbers in by_user.items()}
    metrics["coverage@10"] = len(ranked[ranked >= 0].unique()) / len(data.titles)
    epochs = len(curve[1:]) * len(RECIPES.get(method, Recipe()).rates)
    entry = {"method": method, "seed": seed, "metrics": metrics, "curve": curve, "by_user": by_user,
             "seconds": {"train": middle - started, "eval": time.time() - middle},
             "train_examples": epochs * sum(map(len, data.train)),
             "lists": (ranked if data.truth else ranked[:1]).tolist()}     # ranked[:1]: user 0
    if method in ("tb", "fm") and len(data.titles) <= 2000:     # flow_of: a branch for every item
        history = data.histories[0][:-1]
        teacher = cm.scores([history])[0].cpu()
        entry["flow"] = flow_of(policy, history, teacher, data, "CM, with --debias", method)
    return entry

@torch.no_grad()
def distribution(policy, histories):
    """P(v | U) of every item (B, n)."""
    items = torch.arange(len(policy.semantic_ids.codes)).expand(len(histories), -1)
    return policy.eval().path_log_probs(histories, items).sum(-1).exp().cpu()

def flow_of(policy, history, teacher, data, teacher_name, learned_name):
    """What figures.plot_flows draws: P of the teacher (n,), and what was learned."""
    both = torch.stack([teacher, distribution(policy, [history])[0]])               # (2, n)
    both[:, history] = 0                                        # never recommended
    teacher, learned = (both / both.sum(1, keepdim=True)).tolist()
    return {"codes": policy.semantic_ids.codes.tolist(), "titles": data.titles,
            "history": [data.titles[item] for item in history], "teacher": teacher,
            "learned": learned, "teacher_name": teacher_name, "learned_name": learned_name}

BASES = {"paired": "sft", "paired_continued": "sft-continued"}  # in results.json: gains over …

@lru_cache(maxsize=1)
def bootstrap(users):
    """How often each user is drawn in 1,000 samples (1000, users): the same for all methods."""
    draws = np.random.default_rng(0).integers(users, size=(1000, users))
    return np.array([np.bincount(sample, minlength=users) for sample in draws])

def paired_gains(runs, base):
    """{metric: {"gain", "low", "high"}} of runs over base runs (their seeds are the same ones).
    The 95 % interval covers the choice of users (bootstrap), not the random seed of training."""
    own = [list(run["by_user"].values()) for run in runs]                    # (seeds, metrics, B)
    other = [list(run["by_user"].values()) for run in base]
    gains = np.mean(own, 0) - np.mean(other, 0)                                     # (metrics, B)
    users = gains.shape[1]
    low, high = np.quantile(gains @ bootstrap(users).T / users, [0.025, 0.975], axis=1)
    rows = zip(runs[0]["by_user"], gains.mean(1), low, high)
    return {metric: {"gain": gain, "low": a, "high": b} for metric, gain, a, b in rows}

def results_of(runs, data, settings):
    """results.json of runs {(method, seed): run}, with mean and std over seeds and paired gains."""
    versions = {module.__name__: module.__version__ for module in (torch, transformers, np)}
    results = {"data": data.sizes, "settings": asdict(settings), "versions": versions,
               "runs": list(runs.values()), "summary": {}, "paired": {}, "paired_continued": {},
               "flow": None}
    runs_of = {}
    for run in sorted(runs.values(), key=lambda run: run["seed"]):
        runs_of.setdefault(run["method"], []).append(run)
        results["flow"] = run.get("flow", results["flow"])      # the last one
    for method, own in runs_of.items():
        summary = results["summary"][method] = {}
        for metric in own[0]["metrics"]:
            values = [run["metrics"][metric] for run in own]
            std = np.std(values, ddof=1) if len(own) > 1 else 0.0
            summary[metric] = {"mean": np.mean(values), "std": std}
        for key, base in BASES.items():
            others = runs_of.get(base, [])
            if method != base and [run["seed"] for run in own] == [run["seed"] for run in others]:
                results[key][method] = paired_gains(own, others)
    return results

def table_of(results):
    """The Markdown table: means (± std over seeds), gains in % of the base with 95 % intervals."""
    summary = results["summary"]
    form = "{mean:.4f} ± {std:.4f}" if len(results["runs"]) > len(summary) else "{mean:.4f}"
    shown = ("recall@10", "ndcg@10", "coverage@10", "hidden@10", "liked@10", "lift@10")
    rows = []
    for method, numbers in summary.items():
        row = {"method": method}
        row |= {name: form.format(**numbers[name]) for name in shown if name in numbers}
        for metric, (key, base) in itertools.product(("ndcg@10", "hidden@10"), BASES.items()):
            if metric in numbers:
                gain = results[key].get(method, {}).get(metric, {})     # {}: an empty cell
                mean = summary.get(base, numbers)[metric]["mean"] or math.nan
                percent = [100 * x / mean for x in gain.values()]
                cell = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*percent) if gain else ""
                row[f"{metric} over {base}, %"] = cell
        rows.append(row.values())
    lines = [row, ["---"] * len(row), *rows]                    # row's keys are the header
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

# --- Command line ---------------------------------------------------------------------------------
def check_settings(settings):
    """Check the settings, set threads and device → (methods in the table's order, seeds)."""
    torch.set_num_threads(settings.threads)
    methods = [method.strip() for method in settings.methods.split(",")]
    known = ["pop", "cm", "cm-debiased", *RECIPES, *[f"{method}+cm" for method in RECIPES]]
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": 1}
    devices = [device for device in there if there[device]]
    if settings.device == "auto":
        settings.device = devices[0]
    losses = [name for name, recipe in RECIPES.items() if recipe.loss and not recipe.reference]
    choices = {"methods": known, "sampler": SAMPLERS, "device": devices, "oracle": losses,
               "reward": ["sum", "product"]}
    zero = ("dropout", "fine_dropout", "debias", "gr", "lam", "codes", "trajectories")
    for name, value in vars(settings).items():
        if type(value) in (int, float):
            least = 0 if name in zero else 1e-9
            most = 1 if "dropout" in name else 1e9
            check(least <= value < most, f"--{name.replace('_', '-')} {value} is out of range")
        elif name in choices and value is not None:
            message = f"is not available; choose from {', '.join(choices[name])}"
            for asked in methods if name == "methods" else [value]:
                check(asked in choices[name], f"--{name} {asked} {message}")
    seeds = [seed.strip() for seed in settings.seeds.split(",")]
    fine = all(map(str.isdecimal, seeds))
    check(fine, f"--seeds {settings.seeds}: give whole numbers from 0 on")
    seeds = list(dict.fromkeys(map(int, seeds)))
    for seed in seeds if settings.sft else []:                  # fail now, not after hours
        Policy.from_pretrained(Path(settings.sft) / f"sft-{seed}")
    needed = {*methods, *[method.removesuffix("+cm") for method in methods]}
    if needed & RECIPES.keys() and not settings.sft:
        needed.add("sft")                                       # all the others start from it
    return [method for method in known if method in needed], seeds

def earlier_runs(settings, data, asked):
    """{(method, seed): run} of OUT, for --resume. InputError if its settings or data are others, or
    if, without --resume, a run would be lost: one that is not among the pairs asked for."""
    path = Path(settings.out) / "results.json"
    if not path.exists():
        return {}
    old = json.loads(path.read_text(encoding="utf-8"))
    ours = {"data", "settings", "runs"} <= {*old}
    check(ours, f"{path} is of another program; choose another --out")
    free = ("data", "methods", "seeds", "out", "device", "threads", "resume")
    for name, was in old["settings"].items():
        fine = name in free or was == getattr(settings, name, None)
        check(fine, f"{path} holds a run with {name} {was}; choose another --out")
    check(old["data"] == data.sizes, f"{path} is of a run of other data; choose another --out")
    runs = {(run["method"], run["seed"]): run for run in old["runs"]}
    fine = settings.resume or runs.keys() <= asked
    check(fine, f"{path} holds more methods or seeds; add --resume")
    return runs if settings.resume else {}

def run(settings, cm=None):
    """The whole job → results; each method is written when it is finished. cm: your own CM, with
    scores(histories, following=None) as CollaborativeModel has; it is not saved with a model."""
    methods, seeds = check_settings(settings)
    check(cm is None or not settings.debias, "--debias is of the built-in CM: pass --debias 0")
    data = load_data(settings.data)
    runs = earlier_runs(settings, data, set(itertools.product(methods, seeds)))
    out = Path(settings.out)
    for seed in seeds:
        todo = [method for method in methods if (method, seed) not in runs]
        reward = prepare(seed, data, settings, cm) if todo else None
        for method in todo:
            runs[method, seed] = run_method(method, seed, reward, data, settings)
            write_json(out / "results.json", results_of(runs, data, settings))
    results = results_of(runs, data, settings)
    # For the first user: the history, and what each method recommends, by title
    hidden = data.truth["liked"][0] - data.truth["shown"][0] if data.truth else set()
    names = [title + "*" * (item in hidden) for item, title in enumerate(data.titles)]
    print(f"user {data.user_ids[0]}:", ", ".join(data.titles[i] for i in data.histories[0][-9:-1]))
    for (method, seed), entry in runs.items():
        if seed == seeds[0]:
            listed = [names[item] for item in entry["lists"][0][:5] if item >= 0]
            print(f"  {method:>13} ", ", ".join(listed))
    print("  * liked, but never shown" if hidden else "")
    table = table_of(results)
    (out / "results.md").write_text(table + "\n", encoding="utf-8")
    print("", table, "", *figures.draw_run(out, data, results), sep="\n")
    print(f"results.json, results.md and the saved models are in {out}/")
    error = 1.96 * math.sqrt(0.1 * 0.9 / len(data.train))
    print(f"With {len(data.train)} users, a share of .1 is known to ± {error:.3f}.")
    return results

def run_oracle(settings):
    """Train from random weights on four contexts, where R/Z is known: does P reach it?"""
    _, seeds = check_settings(settings)
    data = load_data(settings.data)
    check(len(data.titles) <= 2000, "--oracle scores every item at once: at most 2,000 items")
    seed = seeds[0]
    reward = prepare(seed, data, settings)
    data = replace(data, train=data.train[:4], histories=data.histories[:4])
    last = [len(history) - 1 for history in data.train]         # one context a user
    rows = [Row(user, max(0, i - settings.window), i, i + 1) for user, i in enumerate(last)]
    known = known_of(contexts_of(rows), data, reward)
    target = (known.r / known.r.sum(1, keepdim=True)).cpu()     # P* = R/Z
    torch.manual_seed(seed)
    sizes = (settings.window, settings.width, settings.layers)
    policy = Policy(copy.deepcopy(reward.ids), *sizes, dropout=0.0).to(settings.device)
    recipe = RECIPES[settings.oracle]                           # its loss and exact, no more
    recipe = Recipe(recipe.loss, sampler="even", trajectories=64, exact=recipe.exact)
    def distance():                                             # L1, of P from P*
        return (distribution(policy, known.histories) - target).abs().sum(1).mean()
    before = distance()
    print("training on four contexts alone; their validation says nothing")
    train(settings.oracle, recipe, policy, reward, data, rows * 100, rate=2e-3, seed=seed,
          settings=replace(settings, batch=4, epochs=15))       # 400 rows: 100 steps an epoch
    path = Path(settings.out) / "oracle.png"
    print(f"mean L1 distance of P from R/Z: {before:.4f} before, {distance():.4f} after;",
          f"picture: {path}")
    flow = flow_of(policy, known.histories[0], target[0], data, "R/Z of unseen items",
                   f"P of unseen items, learned by {settings.oracle}")
    write_json(path.with_suffix(".json"), flow)
    figures.plot_flows(path, flow)

def print_recommendations(settings):
    """Ten titles by a saved model, for a history of titles or ids, oldest first."""
    policy = Policy.from_pretrained(settings.model)
    titles = policy.catalogue["titles"]
    ids = policy.catalogue["item_ids"]
    items, scores = policy.recommend([[find_item(x, ids, titles) for x in settings.recommend]])
    print(" share  of the weight of these ten; title")
    for item, share in zip(items[0].tolist(), scores[0].softmax(0).tolist()):
        if item >= 0:
            print(f"{share:6.1%}  {titles[item]}")

def main(settings):
    """Do what the settings ask for → exit status; an error is one line on stderr."""
    job = print_recommendations if settings.recommend else run_oracle if settings.oracle else run
    try:
        job(settings)
        return 0
    except (ValueError, OSError, FloatingPointError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; --resume keeps the finished methods of a run", file=sys.stderr)
        return 130

if __name__ == "__main__":
    sys.exit(main(SETTINGS))
