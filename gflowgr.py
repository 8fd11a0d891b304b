"""GFlowGR in one file: fine-tune a generative recommender so that P(item | user) follows a reward.

A generative recommender writes the next item's semantic ID, code by code, after a user's history.
Supervised fine-tuning (SFT) on the log teaches it what was shown, not what would be liked: exposure
bias. GFlowGR reads an ID as a path down a tree and trains a GFlowNet on it: the probability of an
item shall be proportional to its reward R, which mixes the logged action, the score of a
collaborative model (CM) and the similarity of IDs. Trajectory balance (TB) is the main loss.

Letters in shapes: B rows of a batch (users), H tokens of a row's history, T targets in a row,
M contexts a row, C contexts in all, N augmented trajectories a context, J trajectories, E branches
in a row, L levels, K codes a level, n items, P prefixes, W beams, d hidden size.
The order: settings, rows, policy, losses, sampler, training, evaluation, experiment, command line.
"""
import copy
import itertools
import json
import math
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

from transformers.hf_argparser import HfArg, HfArgumentParser

from data import InputError, find_item, load_data

METHODS = {"pop": "Popularity", "cm": "CM alone", "sft": "SFT", "sft-continued": "SFT (continued)",
           "sdpo": "S-DPO", "db": "GFlowGR-DB", "tb": "GFlowGR-TB", "fm": "GFlowGR-FM",
           "sft+cm": "SFT, guided", "tb+cm": "GFlowGR-TB, guided", "fm+cm": "GFlowGR-FM, guided"}
# λ of each loss. Squared log-ratios are large and drown L_GR; a KL or a preference is small.
LAM = {"sdpo": 1.0, "db": 0.1, "tb": 0.1, "fm": 1.0}


@dataclass
class Settings:
    """All settings; each field is a flag, the help says why the default is what it is."""
    data: str = HfArg(default="toy", help="toy, ml-100k, or a folder with two CSV files")
    methods: str = HfArg(default="pop,cm,sft,sft-continued,tb,fm,tb+cm",
                         help="comma-separated, of " + ", ".join(METHODS))
    seeds: str = HfArg(default="42", help="comma-separated: every method runs once with each")
    out: str = HfArg(default="", help="folder for results (default: runs/NAME-OF-DATA)")
    device: str = HfArg(default="auto", help="auto, cuda, mps or cpu")
    threads: int = HfArg(default=1, help="CPU threads: these models are small, one is enough")
    quick: bool = HfArg(default=False, help="a smoke run in seconds: one epoch of everything")
    resume: bool = HfArg(default=False, help="keep the finished methods in --out and go on")
    sft: str = HfArg(default="", help="folder of a finished run: start from its SFT models")
    ids: str = HfArg(default="mixed", help="semantic IDs: content (text alone, as TIGER), mixed "
                     "(with co-occurrence, as LETTER)")
    codes: int = HfArg(default=512, help="K, codes a level: many make the later codes easy")
    levels: int = HfArg(default=3, help="L, levels of an ID: the paper's example")
    window: int = HfArg(default=20, help="items of the history that are read: the last say most")
    width: int = HfArg(default=128, help="hidden size: enough for 10^4 items on two cores")
    layers: int = HfArg(default=3, help="transformer blocks: enough to compare items")
    dropout: float = HfArg(default=0.2, help="less over-fits in ten epochs on 10^5 interactions")
    batch: int = HfArg(default=64, help="rows a step: on a CPU many small steps learn more")
    rate: float = HfArg(default=1.5e-3, help="peak learning rate of SFT: small models like it high")
    fine_rate: float = HfArg(default=5e-4, help="peak rate of fine-tuning: a high one undoes SFT")
    sft_epochs: int = HfArg(default=8, help="epochs of SFT: validation stops rising there")
    epochs: int = HfArg(default=2, help="epochs of each fine-tuning: more over-fit")
    sampler: str = HfArg(default="curriculum", help="session, random, curriculum or policy")
    trajectories: int = HfArg(default=3, help="N, augmented trajectories a context: as the paper")
    positions: int = HfArg(default=3, help="M, contexts a row: a step stays near 2 x SFT's")
    weights: str = HfArg(default="0.3,0.65,0.05", help="w_a,w_y,w_s of the reward: action, CM, "
                         "similarity; the CM says most about what was not shown")
    lam: float = HfArg(default=-1.0, help=f"lambda; negative: each loss's own, {LAM}")
    beta: float = HfArg(default=0.1, help="beta of S-DPO: the paper's")
    gamma: float = HfArg(default=2.0, help="power of the CM that guides NAME+cm: best of 1/2 to 4")
    debias: float = HfArg(default=0.0, help="delta: the CM's score is over popularity^delta")
    beams: int = HfArg(default=20, help="beam width: twice the ten that are shown")
    validate_users: int = HfArg(default=2000, help="users that choose the epoch: +-.004 in NDCG")
    oracle: str = HfArg(default="", help="train with this loss alone until P = R/Z, and draw it")
    recommend: str = HfArg(default="", help="print ten titles for a history")
    model: str = HfArg(default="", help="the saved model for --recommend, such as runs/toy/tb-42")


# Settings that differ on the data sets that come by themselves. Histories of a hundred items fill a
# narrow beam with what the user already had, so ml-100k has 50 beams.
PRESETS = {"toy": dict(codes=16, width=64, layers=2, sft_epochs=8, epochs=4, rate=2e-3),
           "ml-100k": dict(codes=256, width=96, sft_epochs=8, epochs=2, rate=3e-3, beams=50)}


def parse(argv):
    """Settings from the command line; exit status 2 and one line on stderr for what is unknown."""
    parser = HfArgumentParser(Settings, allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.error = lambda message: parser.exit(2, f"error: {message}; see --help\n")
    known, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown argument {unknown[0]}")
    parser.set_defaults(**PRESETS.get(known.data, {}))
    if known.quick:
        parser.set_defaults(sft_epochs=1, epochs=1)
    settings = parser.parse_args_into_dataclasses(argv)[0]
    name = Path(settings.data).resolve().name + "-quick" * settings.quick
    settings.out = settings.out or f"runs/{name}"
    return settings


if __name__ == "__main__":
    SETTINGS = parse(sys.argv[1:])                              # before torch, so --help is fast
    os.environ["OMP_NUM_THREADS"] = str(SETTINGS.threads)       # torch reads it when imported

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from data import figures
from reward import CollaborativeModel, Reward, entries
from tokenizer import SemanticIDs, item_features

transformers.utils.logging.disable_progress_bar()
NEVER = -1e9                                # log-probability of what cannot be; finite: 0 · NEVER = 0
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))   # torchrun's


# --- Rows of a batch ------------------------------------------------------------------------------
def training_rows(histories, window):
    """(user, start, first, stop): the row is items[start:stop], its targets are items[first:stop].

    A history longer than the window is cut into rows that overlap by half a window, so that
    all but the first targets have half a window of history or more.
    """
    rows = []
    for user, history in enumerate(histories):
        first, stop = 0, min(len(history), window + 1)
        while first < len(history):
            rows.append((user, max(0, stop - 1 - window), first, stop))
            first, stop = stop, min(len(history), stop + max(1, window // 2))
    return rows


def batches(rows, histories, size, policy, rng):
    """One epoch of batches in random order; the rows of a batch have like lengths (less padding).

    A batch: users and starts (lists), tokens (B, H), ends (B, T) = items of the row before each
    target, targets (B, T), valid (B, T) bool, False on padding.
    """
    order = rng.permutation(len(rows))
    groups = []
    for i in range(0, len(rows), 32 * size):
        chunk = sorted(order[i:i + 32 * size], key=lambda r: rows[r][3] - rows[r][1])
        groups += [chunk[j:j + size] for j in range(0, len(chunk), size)]
    for g in rng.permutation(len(groups)):
        chosen = [rows[r] for r in groups[g]]
        tokens, _ = policy.tokens([histories[u][start:stop - 1] for u, start, _, stop in chosen])
        count = torch.tensor([stop - first for _, _, first, stop in chosen])
        valid = torch.arange(int(count.max())) < count[:, None]                     # (B, T)
        ends, targets = torch.zeros_like(valid, dtype=torch.long), torch.zeros_like(valid).long()
        for b, (u, start, first, stop) in enumerate(chosen):
            ends[b, :count[b]] = torch.arange(first - start, stop - start)
            targets[b, :count[b]] = torch.tensor(histories[u][first:stop])
        yield SimpleNamespace(users=[row[0] for row in chosen], starts=[row[1] for row in chosen],
                              tokens=tokens, ends=ends, targets=targets, valid=valid)


# --- The policy: P_F(next code | user, codes so far) ----------------------------------------------
def tree_mask(ends, H, L):
    """Who sees whom in a packed row: floats (B, S, S), 0 where place i sees place j, else NEVER.

    A row is H tokens of history, <user> first, then E branches of L−1 codes: S = H + E·(L−1).
    Branch e of row b goes on from the first ends[b, e] items (ends (B, E)) and sees the places
    0 … ends[b, e]. A place of the history sees itself and those before it, never a branch; a code
    sees its own branch up to itself, never another branch.

    The history <user> a b, one branch c d that goes on from a, one e f from b; L = 3:

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
    (B, E), device = ends.shape, ends.device
    place = torch.arange(H, device=device)
    last = torch.cat([place.expand(B, H), ends.repeat_interleave(L - 1, 1)], 1)     # (B, S)
    sees_history = place <= last[..., None]                                         # (B, S, H)
    block = torch.ones(L - 1, L - 1, device=device).tril()
    sees_branch = F.pad(torch.block_diag(*[block] * E), (0, 0, H, 0)) > 0           # (S, E·(L-1))
    seen = torch.cat([sees_history, sees_branch.expand(B, -1, -1)], 2)
    return torch.zeros(seen.shape, device=device).masked_fill_(~seen, NEVER)


class Policy(torch.nn.Module):
    """A small GPT-2 that reads a history and writes a semantic ID, plus the table of IDs.

    Tokens: code c of level l is l·K + c; L·K is <user>, which opens every row; L·K + 1 + i is item
    i of a history. A row is a packed tree: the history once, then branches, each the first L−1
    codes of one path (the last code is predicted, never read). 1 + M·N paths cost one pass.
    """

    def __init__(self, semantic_ids, window=20, width=128, layers=3, dropout=0.2):
        super().__init__()
        K, L, n = semantic_ids.num_codes, semantic_ids.num_levels, len(semantic_ids.codes)
        self.semantic_ids, self.window, self.user_token = semantic_ids, window, K * L
        self.catalogue = {}                                     # item_ids and titles, if known
        self.guide = None                                       # histories → (B, n) ≥ 0, if guided
        self.lm = GPT2LMHeadModel(GPT2Config(
            vocab_size=L * K + 1 + n, n_positions=window + L, n_embd=width, n_layer=layers,
            n_head=max(1, width // 32), bos_token_id=L * K, eos_token_id=L * K,
            activation_function="gelu_pytorch_tanh",            # gelu_new's values, faster on CPU
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=0.0))   # attn_pdrop doubles a step
        # log F(s) = the head's output + log of the share of all items below s: without the second
        # part the residuals start as large as log n, and drown L_GR. At the root it is log Z(U).
        self.flow_head = torch.nn.Linear(width, 1)
        torch.nn.init.zeros_(self.flow_head.weight)
        torch.nn.init.zeros_(self.flow_head.bias)
        even_flow = semantic_ids.flows(torch.full((1, n), 1 / n))[0].log()          # (P + n,)
        self.register_buffer("even_flow", even_flow, persistent=False)

    @property
    def device(self):
        return self.even_flow.device

    @torch.no_grad()
    def start_from(self, features):
        """Token embeddings from features (n, d'): an item's is its features, projected at random;
        a code's is the mean, over the items with that code, of what earlier codes left over."""
        n, d = len(features), self.lm.config.n_embd
        K, wte = self.semantic_ids.num_codes, self.lm.transformer.wte.weight
        mixing = torch.randn(features.shape[1], d)              # a random projection keeps angles
        vector = torch.as_tensor(features, dtype=torch.float32)
        vector = (vector - vector.mean(0)) @ mixing
        vector *= self.lm.config.initializer_range / vector.std().clamp(min=1e-6)
        wte[-n:] = vector
        for level, code in enumerate(self.semantic_ids.codes.T):
            total = torch.zeros(K, d).index_add_(0, code, vector)
            count = torch.bincount(code, minlength=K).clamp(min=1)
            wte[level * K:(level + 1) * K] = total / count[:, None]
            vector = vector - wte[level * K + code]

    def tokens(self, histories):
        """(B, H) tokens of the last `window` items, <user> first, padded right; (B,) lengths."""
        recent = [history[-self.window:] for history in histories]
        lengths = torch.tensor([len(history) for history in recent])
        rows = torch.full((len(recent), 1 + int(lengths.max())), self.user_token)
        for row, history in zip(rows, recent):
            row[1:1 + len(history)] = torch.tensor(history, dtype=torch.long) + self.user_token + 1
        return rows, lengths

    def forward(self, tokens, ends, items):
        """log P_F of all next codes, and log F of all prefixes, along packed branches.

        tokens (B, H); branch e of row b is the path of items[b, e] after the first ends[b, e] items
        of the history, both (B, E) → (B, E, L, K) log-probabilities, NEVER where a code is illegal,
        and (B, E, L) log flows of s_0 … s_{L-1}.
        """
        tokens, ends, items = tokens.to(self.device), ends.to(self.device), items.to(self.device)
        ids, (B, H), E = self.semantic_ids, tokens.shape, ends.shape[1]
        K, L = ids.num_codes, ids.num_levels
        depth = torch.arange(L - 1, device=self.device)
        branches = (ids.codes[items][..., :-1] + depth * K).flatten(1)              # (B, E·(L-1))
        place = torch.arange(H, device=self.device).expand(B, H)
        branch_place = (ends[..., None] + 1 + depth).flatten(1)                     # (B, E·(L-1))
        hidden = self.lm.transformer(
            torch.cat([tokens, branches], 1), attention_mask=tree_mask(ends, H, L)[:, None],
            position_ids=torch.cat([place, branch_place], 1), use_cache=False).last_hidden_state
        d = hidden.shape[-1]
        root = hidden.gather(1, ends[..., None].expand(-1, -1, d))                  # (B, E, d)
        later = hidden[:, H:].reshape(B, E, L - 1, d)
        prefixes = torch.cat([root[:, :, None], later], 2)                          # (B, E, L, d)
        # One head a level: its rows of the embedding. Slice once: a slice for each level would
        # allocate a gradient of the size of the whole embedding for each.
        heads = self.lm.transformer.wte.weight[:L * K].unflatten(0, (L, K))         # (L, K, d)
        logits = torch.einsum("beld,lkd->belk", prefixes, heads).float()            # (B, E, L, K)
        nodes = ids.nodes[items][..., :-1]                                          # (B, E, L)
        log_probs = logits.masked_fill(ids.next_node[nodes] < 0, NEVER).log_softmax(-1)
        return log_probs, self.flow_head(prefixes)[..., 0] + self.even_flow[nodes]

    def steps(self, log_probs, items):
        """log P_F of the codes taken: log_probs (B, E, L, K), items (B, E) → (B, E, L)."""
        return log_probs.gather(-1, self.semantic_ids.codes[items.to(self.device)][..., None])[..., 0]

    def path_log_probs(self, histories, items):
        """log P_F of each step on the paths of items (B, J) after B histories → (B, J, L)."""
        tokens, lengths = self.tokens(histories)
        items = torch.as_tensor(items)
        return self.steps(self(tokens, lengths[:, None].expand_as(items), items)[0], items)

    @torch.no_grad()
    def recommend(self, histories, k=10, beams=20):
        """The k best items of B histories: items (B, k), best first, and their scores (B, k).

        Beam search over legal codes: a prefix scores Σ log P_F of its codes, P_F a softmax over the
        legal codes alone; max(beams, k) prefixes a user go on to the next level. Never an item of
        the history, never a duplicate; −1 and −inf where no item is left; exact with enough beams.
        If self.guide is set, prefixes are compared by log P_F(s) + log F_guide(s), the guide's flow.

        >>> ids = SemanticIDs([[0, 1, 1], [0, 2, 0], [2, 0, 0]], num_codes=3)
        >>> policy = Policy(ids, width=32, layers=1).eval()
        >>> _ = policy.lm.transformer.wte.weight.data.zero_()   # all legal codes are equally likely
        >>> items, log_probs = policy.recommend([[1]], k=3)     # items 0, 1, 2: 1/4, 1/4, 1/2
        >>> items.tolist(), log_probs.exp().tolist()
        ([[2, 0, -1]], [[0.5, 0.25, 0.0]])
        """
        ids, device = self.semantic_ids, self.device
        beams, L, K = max(beams, k), ids.num_levels, ids.num_codes
        tokens, lengths = (x.to(device) for x in self.tokens(histories))
        B, H = tokens.shape
        place = torch.arange(H, device=device)
        causal = torch.zeros(H, H, device=device).masked_fill_(place > place[:, None], NEVER)
        cache = DynamicCache()
        hidden = self.lm.transformer(tokens, cache, attention_mask=causal.expand(B, 1, H, H),
                                     position_ids=place.expand(B, H)).last_hidden_state
        hidden = hidden.gather(1, lengths[:, None, None].expand(-1, 1, hidden.shape[-1]))
        mask = torch.zeros(B, 1, H, device=device)              # what each beam sees: (B, W, H + …)
        mask.masked_fill_(place > lengths[:, None, None], NEVER)
        log_flow = None
        if self.guide is not None:
            log_flow = ids.flows(self.guide(histories)).clamp(min=1e-30).log().to(device)
        score = torch.zeros(B, 1, device=device)                # (B, W) Σ log P_F of each beam
        node = torch.zeros(B, 1, dtype=torch.long, device=device)
        for level in range(L):
            heads = self.lm.transformer.wte.weight[level * K:(level + 1) * K]
            child = ids.next_node[node]                                              # (B, W, K)
            # In place: a pass over (B, W, K) costs as much as a block of the model. Illegal paths
            # keep a score below NEVER / 2.
            total = (hidden @ heads.T).masked_fill_(child < 0, NEVER).log_softmax(-1)
            total = total.add_(score[..., None]).flatten(1)                         # (B, W·K)
            child = child.flatten(1)
            value = total if log_flow is None else total + log_flow.gather(1, child.clamp(min=0))
            if level == L - 1:
                break                                           # the children are items
            best = value.topk(min(beams, value.shape[1]), 1).indices                # (B, W)
            score, node, parent, W = total.gather(1, best), child.gather(1, best), best // K, best.shape[1]
            # A beam sees what its parent saw, and itself; so the cache is never reordered.
            itself = torch.full((W, W), NEVER, device=device).fill_diagonal_(0).expand(B, W, W)
            seen = mask.gather(1, parent[..., None].expand(-1, -1, mask.shape[2]))
            mask = torch.cat([seen, itself], 2)
            hidden = self.lm.transformer(
                level * K + best % K, cache, attention_mask=mask[:, None],
                position_ids=(lengths[:, None] + 1 + level).expand(B, W)).last_hidden_state
        # So many of the best that k are left without the items of the history
        value, best = value.topk(min(k + max(map(len, histories)), value.shape[1]), 1)
        item = child.gather(1, best) - ids.num_prefixes
        owned = torch.zeros(B, len(ids.codes), dtype=torch.bool)
        owned[entries(histories)] = True
        gone = (value < NEVER / 2) | owned.to(device).gather(1, item.clamp(min=0))
        value = F.pad(value.masked_fill(gone, -math.inf), (0, k), value=-math.inf)
        score, best = value.topk(k, 1)
        item = F.pad(item, (0, k), value=-1).gather(1, best)
        return item.masked_fill(score == -math.inf, -1), score

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors (plain GPT-2), and IDs and titles beside them."""
        part = Path(f"{folder}.part")                           # renamed when it is whole
        self.lm.save_pretrained(part)
        ids = {"num_codes": self.semantic_ids.num_codes, "codes": self.semantic_ids.codes.tolist()}
        write_json(part / "semantic_ids.json", ids | self.catalogue)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)

    @classmethod
    def from_pretrained(cls, folder):
        """The Policy that save_pretrained wrote, in eval mode; InputError where there is none.

        Its flow head, which only training needs, starts anew. No pickle is read.
        """
        try:
            ids = json.loads((Path(folder) / "semantic_ids.json").read_text(encoding="utf-8"))
            lm = GPT2LMHeadModel.from_pretrained(folder)
            semantic_ids = SemanticIDs(ids.pop("codes"), ids.pop("num_codes"))
            window = lm.config.n_positions - semantic_ids.num_levels
            policy = cls(semantic_ids, window, lm.config.n_embd, lm.config.n_layer)
            policy.lm.load_state_dict(lm.state_dict())
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise InputError(f"{folder} holds no saved model of this program ({error})") from None
        policy.lm, policy.catalogue = lm, ids
        return policy.eval()


# --- Losses: pure functions of tensors, natural logs (METHOD.md, Losses) ---------------------------
def trajectory_balance(log_z, log_pf, log_r):
    """TB: log Z(U) log_z (B,), log P_F of J paths a user log_pf (B, J), log R log_r (B, J) → scalar.

    Z = 1; a path with P = R = 1/2 costs 0, one with P = 1/4, R = 1/2 costs (log 1/2)² = .4805:

    >>> log_pf, log_r = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    >>> round(trajectory_balance(torch.zeros(1), log_pf, log_r).item(), 4)
    0.2402
    """
    # mean of (log Z(U) + Σ_l log P_F(s_{l+1} | s_l) − log R(s_L))²; P_B is 1 on a tree
    return (log_z[:, None] + log_pf - log_r).square().mean()


def detailed_balance(log_flow, log_pf):
    """DB: log F of s_0 … s_L log_flow (B, J, L+1), last column log R; log_pf (B, J, L) → scalar.

    >>> log_flow = torch.tensor([[[1.0, 0.5, 0.25]]]).log()   # 1 → 1/2 → 1/4: steps of 1/2 fit
    >>> [round(detailed_balance(log_flow, torch.tensor([[[0.5, p]]]).log()).item(), 4)
    ...  for p in (0.5, 0.25)]
    [0.0, 0.4805]
    """
    # Σ_l (log F(s_l) + log P_F(s_{l+1} | s_l) − log F(s_{l+1}))², mean over paths
    return (log_flow[..., :-1] + log_pf - log_flow[..., 1:]).square().sum(-1).mean()


def flow_matching(flow, log_pf):
    """FM, ours: exact flows of all children flow (..., L, K) ≥ 0, log P_F (..., L, K) → scalar."""
    # KL: Σ_l Σ_c F*(c)/F*(s_l) · (log F*(c)/F*(s_l) − log P_F(c | s_l)), mean over paths
    target = flow / flow.sum(-1, keepdim=True)
    return (target * (target.clamp(min=1e-30).log() - log_pf)).sum((-2, -1)).mean()


def sdpo(policy_pos, policy_neg, ref_pos, ref_neg, beta):
    """S-DPO: log-probabilities of a positive (B,) and J negatives (B, J) by policy and reference.

    >>> pos, neg = torch.tensor([-2.0]), torch.tensor([[-3.0, -4.0, -5.0]])
    >>> round(sdpo(pos, neg, pos, neg, beta=0.1).item(), 4)   # policy = reference: log(1 + 3)
    1.3863
    """
    # mean of −log σ(−log Σ_d exp(β[Δ_d − Δ_p])), Δ = log P_policy − log P_reference
    margin = beta * ((policy_neg - ref_neg) - (policy_pos - ref_pos)[:, None])
    return -F.logsigmoid(-margin.logsumexp(1)).mean()


# --- The adaptive trajectory sampler: which items to learn from beside the logged one ---------------
def draw(weight, excluded, count):
    """Items (C, count) with replacement, P ∝ weight (C, n), none of the C lists `excluded`."""
    weight = weight.clone()
    weight[entries(excluded)] = 0
    return torch.multinomial(weight + 1e-12, count, replacement=True)


def curriculum(scores, logged, count, progress):
    """N = count unobserved items a context, low CM scores early in training, high scores late.

    scores (C, n) of the CM, logged C lists, progress in [0, 1] → items (C, N). Draw 2N−1 items,
    item i with P ∝ scores[i]/2 + 1/(2n), 0 if logged; sort them from low to high score; keep N
    neighbours, from place round(progress · (N−1)) on. The half drawn evenly shows TB unlikely
    items too; with likely ones alone, a large log Z could hide that all are found too unlikely.

    >>> scores = torch.tensor([[0.7, 0.2, 0.1]])
    >>> curriculum(scores, [[0, 2]], count=3, progress=0.5).tolist()
    [[1, 1, 1]]
    """
    pool = draw(0.5 * scores + 0.5 / scores.shape[1], logged, 2 * count - 1)        # (C, 2N-1)
    ranked = pool.gather(1, scores.gather(1, pool).argsort(1))
    start = round(progress * (count - 1))
    return ranked[:, start:start + count]


def augmented(sampler, count, scores, logged, positives, histories, policy, progress):
    """The N = count augmented items (C, N) of each context, by one of the paper's four samplers."""
    if count == 0:
        return positives.new_zeros(len(positives), 0)
    if sampler == "session":                                    # others of the user's own items
        own = torch.zeros_like(scores)
        own[entries(logged)] = 1
        return draw(own.scatter_(1, positives[:, None], 0), [], count)
    if sampler == "random":                                     # unobserved items, all alike
        return draw(torch.ones_like(scores), logged, count)
    if sampler == "curriculum":
        return curriculum(scores, logged, count, progress)
    training = policy.training                                  # "policy": its own beam
    policy.eval()                                               # no dropout while sampling
    items = policy.recommend(histories, count, beams=count)[0].to(positives.device)
    policy.train(training)
    return items.where(items >= 0, positives[:, None])          # fewer than N unseen: the positive


# --- Training ---------------------------------------------------------------------------------------
def tb_loss(paths):
    return trajectory_balance(paths.log_flow[:, 0, 0], paths.log_pf.sum(-1), paths.log_r)


def db_loss(paths):
    return detailed_balance(torch.cat([paths.log_flow, paths.log_r[..., None]], -1), paths.log_pf)


def fm_loss(paths):
    return flow_matching(paths.child_flow, paths.log_probs)


def sdpo_loss(paths):
    policy, reference = paths.log_pf.sum(-1), paths.reference_log_pf.sum(-1)
    return sdpo(policy[:, 0], policy[:, 1:], reference[:, 0], reference[:, 1:], paths.beta)


LOSSES = {"sdpo": sdpo_loss, "db": db_loss, "tb": tb_loss, "fm": fm_loss}


def loss_of(method, model, reference, batch, reward, data, settings, progress):
    """L = L_GR(U, v) + λ · mean over τ_1 … τ_{N+1} of L_GFN (METHOD.md); SFT is its first term.

    model is the policy, or DistributedDataParallel around it; reference: S-DPO's frozen policy.
    """
    policy, N, M = getattr(model, "module", model), settings.trajectories, settings.positions
    (B, T), targets = batch.targets.shape, batch.targets.to(policy.device)
    if method in ("sft", "sft-continued"):
        return next_token_loss(policy.steps(model(batch.tokens, batch.ends, targets)[0], targets), batch.valid)
    # Contexts: M of each row's targets, drawn at random, and the reward R of every item there.
    chosen = (torch.rand(B, M) * batch.valid.sum(1, keepdim=True)).long()           # (B, M)
    ends = batch.ends.gather(1, chosen)
    firsts = (torch.tensor(batch.starts)[:, None] + ends).flatten().tolist()        # (B·M,) = C
    users = [user for user in batch.users for _ in range(M)]
    logged = [data.train[user] for user in users]
    histories = [items[:first] for items, first in zip(logged, firsts)]
    following = [items[first:] for items, first in zip(logged, firsts)]
    liked = torch.tensor([data.liked[user][first] for user, first in zip(users, firsts)])
    positives = batch.targets.gather(1, chosen).flatten().to(reward.counts.device)         # (C,)
    scores = reward.collaborative(histories, following)                             # (C, n)
    r = reward(histories, positives, liked.to(positives.device), scores)               # (C, n)
    # Trajectories: in one packed row a branch for every target, then N for each context.
    others = augmented(settings.sampler, N, scores, logged, positives, histories, policy, progress)
    items = torch.cat([targets, others.to(policy.device).reshape(B, M * N)], 1)        # (B, T + M·N)
    ends = torch.cat([batch.ends, ends.repeat_interleave(N, 1)], 1)
    log_probs, log_flow = model(batch.tokens, ends, items)                          # (B, E, L, K)
    steps = policy.steps(log_probs, items)                                          # (B, E, L)
    # The paths τ_1 (the logged target's branch) … τ_{N+1} of every context: (C, 1 + N).
    own = torch.arange(T, T + M * N).view(M, N).expand(B, M, N)
    branch = torch.cat([chosen[..., None], own], 2).to(policy.device)               # (B, M, 1 + N)
    row = torch.arange(B, device=policy.device)[:, None, None]
    paths = SimpleNamespace(beta=settings.beta, **{name: x[row, branch].flatten(0, 1) for name, x in (
        ("items", items), ("log_probs", log_probs), ("log_pf", steps), ("log_flow", log_flow))})
    paths.log_r = r.gather(1, paths.items.to(r.device)).log().to(policy.device)     # (C, 1 + N)
    if method == "fm":
        paths.child_flow = reward.ids.child_flows(r, paths.items.to(r.device)).to(policy.device)
    if reference is not None:
        with torch.no_grad():
            compared = paths.items.view(B, -1)
            after = batch.ends.gather(1, chosen).repeat_interleave(1 + N, 1)
            reference_pf = reference.steps(reference(batch.tokens, after, compared)[0], compared)
            paths.reference_log_pf = reference_pf.view(B * M, 1 + N, -1)
    # These trajectories come from the sampler, not from the policy: GFlowNet losses are off-policy.
    # Z(U) is read from the flow of s_0, the state after the history. The mean is over C · (1 + N).
    lam = settings.lam if settings.lam >= 0 else LAM[method]
    return next_token_loss(steps[:, :T], batch.valid) + lam * LOSSES[method](paths)


def next_token_loss(steps, valid):
    """L_GR: −Σ_l log P_F of the logged item's codes (B, T, L), mean over valid targets (B, T)."""
    valid = valid.to(steps.device)
    return -(steps.sum(-1) * valid).sum() / valid.sum()


def rate_at(step, steps, warm):
    return min(1, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(method, policy, reward, data, settings, seed, folder, reference=None):
    """The one training loop; the best epoch on validation is saved in `folder`.

    → the curve, a list of {"epoch", "loss", "ndcg@10"}; epoch 0, the start, is reported, never
    saved. Raises FloatingPointError when the loss is not finite.
    """
    rows = training_rows(data.train, settings.window)
    epochs = settings.sft_epochs if method == "sft" else settings.epochs
    rate = settings.rate if method == "sft" else settings.fine_rate
    steps = epochs * (math.ceil(len(rows) / settings.batch) // WORLD)
    optimizer = torch.optim.AdamW([
        {"params": policy.lm.parameters()},
        {"params": policy.flow_head.parameters(), "lr": 10 * rate}],               # Z(U) learns fast
        lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm = min(200, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, steps, warm))
    model = DistributedDataParallel(policy, find_unused_parameters=True) if WORLD > 1 else policy
    curve = [{"epoch": 0, "loss": None, "ndcg@10": validate(policy, data, settings)}]
    bar, losses = tqdm(total=steps, desc=method, disable=None, leave=False), []
    for epoch in range(1, epochs + 1):
        rng = np.random.default_rng((seed, epoch))
        torch.manual_seed(int(np.random.default_rng((seed, epoch, RANK)).integers(2 ** 63)))
        policy.train()
        epoch_batches = batches(rows, data.train, settings.batch, policy, rng)
        for batch in itertools.islice(epoch_batches, RANK, steps // epochs * WORLD, WORLD):
            with torch.autocast("cuda", torch.bfloat16, enabled=settings.device == "cuda"):
                loss = loss_of(method, model, reference, batch, reward, data, settings, len(losses) / steps)
            if not torch.isfinite(loss):
                users = ", ".join(data.user_ids[user] for user in batch.users[:5])
                raise FloatingPointError(f"{method}: loss {loss.item()} at step {len(losses) + 1} ({users} …)")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update()
            losses.append(loss.item())
        ndcg = validate(policy, data, settings)
        curve.append({"epoch": epoch, "loss": float(np.mean(losses[-(steps // epochs):])), "ndcg@10": ndcg})
        tqdm.write(f"  {method}: epoch {epoch}/{epochs}, loss {curve[-1]['loss']:.3f}, "
                   f"validation NDCG@10 {ndcg:.4f}")
        if ndcg > max((point["ndcg@10"] for point in curve[1:-1]), default=-1) and RANK == 0:
            policy.save_pretrained(folder)
    if WORLD > 1:
        dist.barrier()                                          # until the first has saved it
    return curve


# --- Evaluation: leave one out, the whole catalogue, the same for every method ----------------------
def recall_at(ranked, target, k):
    """Recall@k: share of users whose target (B,) is in the first k of ranked (B, ≥ k) items.

    >>> ranked, target = torch.tensor([[4, 2, 7], [1, 3, -1]]), torch.tensor([7, 9])
    >>> [recall_at(ranked, target, k).item() for k in (2, 3)]   # places 3 and none
    [0.0, 0.5]
    """
    return (ranked[:, :k] == target[:, None]).any(1).float().mean()


def ndcg_at(ranked, target, k):
    """NDCG@k: mean over users of 1/log2(rank + 1), rank from 1; 0 where it is not in the first k.

    >>> ranked, target = torch.tensor([[4, 2, 7], [1, 3, 5]]), torch.tensor([4, 5])
    >>> [ndcg_at(ranked, target, k).item() for k in (2, 3)]     # ranks 1 and 3: 1 and 1/2
    [0.5, 0.75]
    """
    # One target, so the ideal DCG is 1 and NDCG = DCG = Σ_r 1[ranked_r = target] / log2(r + 1)
    ranked = ranked[:, :k]
    discount = 1 / torch.log2(torch.arange(2, ranked.shape[1] + 2, device=ranked.device))
    return ((ranked == target[:, None]) * discount).sum(1).mean()


def exposure_bias(ranked, data, counts):
    """By user, where the truth is known: {"hidden@10", "liked@10", "lift@10"}, lists of B numbers.

    hidden: share of the liked but never shown items that are in the list; liked: share of the list
    that is truly liked; lift: mean count in the log of the list over that of what is liked and new.
    """
    out = {"hidden@10": [], "liked@10": [], "lift@10": []}
    for b, items in enumerate(ranked.tolist()):
        items, liked = set(items) - {-1}, data.truth["liked"][b]
        new, hidden = liked - set(data.histories[b][:-1]), liked - data.truth["shown"][b]
        out["hidden@10"].append(len(hidden & items) / max(1, len(hidden)))
        out["liked@10"].append(len(new & items) / max(1, len(items)))
        popular, fair = (counts[list(x)].float().mean().item() if x else 1.0 for x in (items, new))
        out["lift@10"].append(popular / max(1.0, fair))
    return out


def rank_all(recommend, histories, k=10, size=256):
    """Top-k items (B, k) by recommend(histories, k) → (items, scores), users of like length together."""
    order = sorted(range(len(histories)), key=lambda u: len(histories[u]))
    ranked = torch.full((len(histories), k), -1)
    for i in range(0, len(order), size):
        users = order[i:i + size]
        ranked[users] = recommend([histories[u] for u in users], k)[0].cpu()
    return ranked


def recommender(policy, settings):
    policy.eval()
    return lambda histories, k: policy.recommend(histories, k, settings.beams)


def by_scores(scores_of):
    """recommend(histories, k) from scores_of(histories) → (B, n)."""
    def recommend(histories, k):
        scores = scores_of(histories)
        scores[entries(histories)] = -1
        value, items = scores.topk(min(k, scores.shape[1]), 1)
        items = F.pad(items.masked_fill(value < 0, -1), (0, k - items.shape[1]), value=-1)
        return items, value
    return recommend


def validate(policy, data, settings, recommend=None):
    """NDCG@10 on the validation items of at most `validate_users` users, evenly spread."""
    users = range(0, len(data.train), math.ceil(len(data.train) / settings.validate_users))
    recommend = recommend or recommender(policy, settings)
    ranked = rank_all(recommend, [data.train[u] for u in users])
    return ndcg_at(ranked, torch.tensor([data.histories[u][-2] for u in users]), 10).item()


# --- The experiment: data → IDs, CM → SFT → fine-tuned policies → table -----------------------------
def write_json(path, value):
    """Write under a temporary name, then rename: the file is whole or not there."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    part = Path(f"{path}.part")
    part.write_text(json.dumps(value, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    os.replace(part, path)


def prepare(seed, data, settings):
    """Features, SemanticIDs and Reward (with its CM) of one seed, from training interactions only."""
    features = item_features(settings.ids, data.texts, data.train, seed)
    ids = SemanticIDs.fit(features, settings.codes, settings.levels, seed)
    cm = CollaborativeModel.fit(data.train, len(data.item_ids))
    weights = [float(w) for w in settings.weights.split(",")]
    counts = torch.bincount(torch.tensor(entries(data.train)[1]), minlength=len(data.item_ids))
    reward = Reward(copy.deepcopy(ids), cm, weights, debias=settings.debias, counts=counts)
    print(f"seed {seed}: {ids.health()}", flush=True)
    return features, ids, reward.to("cuda" if settings.device == "cuda" else "cpu")


def trained(method, seed, features, ids, reward, data, settings):
    """Train one method with one seed → (the policy of its best epoch, read back from disk; curve)."""
    out = Path(settings.out)
    torch.manual_seed(seed)
    if method == "sft":
        policy = Policy(ids, settings.window, settings.width, settings.layers, settings.dropout)
        policy.start_from(features)
    else:                                                       # all start from the same SFT model
        policy = Policy.from_pretrained(Path(settings.sft or out) / f"sft-{seed}")
        if not policy.semantic_ids.codes.equal(ids.codes):
            raise InputError(f"the IDs of {settings.sft or out}/sft-{seed} do not fit the data")
    policy.catalogue = {"item_ids": data.item_ids, "titles": data.titles}
    policy.to(settings.device)
    reference = copy.deepcopy(policy).eval() if method == "sdpo" else None
    curve = train(method, policy, reward, data, settings, seed, out / f"{method}-{seed}", reference)
    return Policy.from_pretrained(out / f"{method}-{seed}").to(settings.device), curve


def run_method(method, seed, prepared, data, settings):
    """Train and test one method with one seed → its entry of results.json["runs"]."""
    features, ids, reward = prepared
    curve, started, base = [], time.time(), method.removesuffix("+cm")
    if method in ("pop", "cm"):
        scores = reward.cm.popularity.expand(1, -1)
        recommend = by_scores(reward.cm.scores if method == "cm" else lambda h: scores.repeat(len(h), 1))
    elif method != base:                                        # guided: no training
        policy = Policy.from_pretrained(Path(settings.out) / f"{base}-{seed}").to(settings.device)
        policy.guide = lambda histories: reward.collaborative(histories) ** settings.gamma
        recommend = recommender(policy, settings)
    else:
        policy, curve = trained(method, seed, features, ids, reward, data, settings)
        recommend = recommender(policy, settings)
    train_seconds, started = time.time() - started, time.time()
    histories = [history[:-1] for history in data.histories]
    target = torch.tensor([history[-1] for history in data.histories])
    ranked = rank_all(recommend, histories)
    metrics = {f"{name}@{k}": f(ranked, target, k).item()
               for name, f in (("recall", recall_at), ("ndcg", ndcg_at)) for k in (5, 10)}
    metrics["coverage@10"] = len(set(ranked.flatten().tolist()) - {-1}) / len(data.item_ids)
    place = torch.arange(1, ranked.shape[1] + 1)
    entry = {"method": method, "seed": seed, "metrics": metrics, "curve": curve,
             "seconds": {"train": train_seconds, "eval": time.time() - started},
             "train_examples": max(0, len(curve) - 1) * sum(map(len, data.train)),
             "ranks": ((ranked == target[:, None]) * place).sum(1).tolist()}        # 0: not in ten
    if data.truth:
        entry["by_user"] = exposure_bias(ranked, data, reward.counts.cpu())
        metrics |= {name: float(np.mean(x)) for name, x in entry["by_user"].items()}
        entry["lists"] = ranked.tolist()
    return entry


def per_user(runs, metric):
    """recall@k, ndcg@k or a figure of "by_user", averaged over runs (seeds) → (B,)."""
    name, k = metric.split("@")
    if name not in ("recall", "ndcg"):
        return np.mean([run["by_user"][metric] for run in runs], axis=0)
    ranks = np.array([run["ranks"] for run in runs])
    hit = (ranks > 0) & (ranks <= int(k))
    return (hit if name == "recall" else hit / np.log2(np.maximum(ranks, 1) + 1)).mean(0)


def paired_gains(runs, method, base, metrics, samples=1000):
    """{metric: {"gain", "low", "high"}} of a method over a base: 95 % bootstrap interval over users.

    The interval covers the choice of users, not the random seed of training.
    """
    gains = np.array([per_user(runs[method], m) - per_user(runs[base], m) for m in metrics])
    rng, users = np.random.default_rng(0), gains.shape[1]
    draws = [np.bincount(rng.integers(users, size=users), minlength=users) for _ in range(samples)]
    low, high = np.quantile(gains @ np.array(draws).T / users, [0.025, 0.975], axis=1)
    return {m: {"gain": g, "low": a, "high": b} for m, g, a, b in zip(metrics, gains.mean(1), low, high)}


def results_of(runs, data, settings):
    """results.json: sizes, settings, versions, every run, mean and std over seeds, paired gains."""
    by_method, summary = {}, {}
    for run in runs:
        by_method.setdefault(run["method"], []).append(run)
    for method, own in by_method.items():
        values = {metric: [run["metrics"][metric] for run in own] for metric in own[0]["metrics"]}
        summary[method] = {metric: {"mean": np.mean(x), "std": np.std(x, ddof=len(x) > 1)}
                           for metric, x in values.items()}
    versions = {module.__name__: module.__version__ for module in (torch, transformers, np)}
    results = {"data": data.sizes, "settings": asdict(settings), "versions": versions,
               "runs": runs, "summary": summary, "paired": {}, "paired_continued": {}}
    metrics = ["recall@5", "ndcg@5", "recall@10", "ndcg@10", *runs[0].get("by_user", {})]
    for key, base in (("paired", "sft"), ("paired_continued", "sft-continued")):
        for method in by_method:
            if base in by_method and len(by_method[method]) == len(by_method[base]) and method != base:
                results[key][method] = paired_gains(by_method, method, base, metrics)
    return results


def table_of(results):
    """The Markdown table of results.json: mean (± std over seeds), and gains in % with intervals."""
    first = next(iter(results["summary"].values()))
    columns = [m for m in ("recall@10", "ndcg@10", "coverage@10", "hidden@10", "liked@10") if m in first]
    gains = [("paired", "sft", m) for m in ("ndcg@10", "hidden@10") if m in first]
    gains.append(("paired_continued", "sft-continued", "ndcg@10"))
    head = ["method", *columns, *[f"{m} over {base}, % [95 %]" for _, base, m in gains]]
    lines = [head, ["---"] * len(head)]
    for method, row in results["summary"].items():
        seeds = sum(run["method"] == method for run in results["runs"])
        cells = [METHODS.get(method, method)]
        for m in columns:
            cells.append(f"{row[m]['mean']:.4f}" + f" ± {row[m]['std']:.4f}" * (seeds > 1))
        for key, base, m in gains:
            gain = results[key].get(method, {}).get(m)
            percent = [100 * x / results["summary"][base][m]["mean"] for x in gain.values()] if gain else []
            cells.append("{:+.1f} [{:+.1f}, {:+.1f}]".format(*percent) if gain else "")
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- Command line ------------------------------------------------------------------------------------
def check(settings):
    """Lists of methods (in the table's order) and seeds; InputError for settings that cannot be."""
    known = [*METHODS, *[loss for loss in LOSSES if loss not in METHODS]]
    asked = settings.methods.split(",")
    for method in asked:
        if method not in known:
            raise InputError(f"--methods: unknown method {method!r}; choose of {', '.join(known)}")
    needed = {method.removesuffix("+cm") for method in asked} | set(asked)
    if needed - {"pop", "cm"} and not settings.sft:
        needed.add("sft")                                       # all others start from it
    may_be_zero = ("dropout", "trajectories", "debias")
    for name, value in asdict(settings).items():
        if type(value) in (int, float) and name != "lam" and not (value > 0 or value == 0 and name in may_be_zero):
            raise InputError(f"--{name} {value} is out of range")
    try:
        seeds = [int(seed) for seed in settings.seeds.split(",")]
        weights = [float(w) for w in settings.weights.split(",")]
        if len(weights) != 3 or min(weights) < 0 or min(seeds) < 0:
            raise ValueError("three weights; nothing negative")
    except ValueError as error:
        raise InputError(f"--seeds takes whole numbers, --weights three numbers: {error}") from None
    devices = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if settings.device == "auto":
        settings.device = next(name for name, there in devices.items() if there)
    if not devices.get(settings.device):
        raise InputError(f"--device {settings.device} is not here; choose auto or cpu")
    return [method for method in known if method in needed], seeds


def earlier_runs(settings, data):
    """The runs of OUT/results.json for --resume; InputError where it is of other settings or data."""
    path = Path(settings.out) / "results.json"
    if not path.exists():
        return []
    old = json.loads(path.read_text(encoding="utf-8"))
    free = ("methods", "seeds", "out", "device", "threads", "resume")
    for name, value in asdict(settings).items():
        if name not in free and old["settings"].get(name) != value:
            raise InputError(f"{settings.out} holds a run with --{name} {old['settings'].get(name)}, "
                             f"not {value}; choose another --out or delete it")
    if old["data"] != data.sizes:
        raise InputError(f"{settings.out} holds a run on other data; choose another --out")
    return old["runs"] if settings.resume else []


def run(settings):
    """The whole job → results; every finished method is written at once."""
    methods, seeds = check(settings)
    data = load_data(settings.data)
    runs = earlier_runs(settings, data)
    done = [(entry["method"], entry["seed"]) for entry in runs]
    for seed in seeds:
        prepared = None
        for method in methods:
            if (method, seed) not in done:
                prepared = prepared or prepare(seed, data, settings)
                runs.append(run_method(method, seed, prepared, data, settings))
                results = results_of(runs, data, settings)
                if RANK == 0:
                    write_json(Path(settings.out) / "results.json", results)
    (Path(settings.out) / "results.md").write_text(table_of(results) + "\n", encoding="utf-8")
    print("\n" + table_of(results) + "\n")
    for line in figures.draw_run(settings.out, data, results, METHODS):
        print(line)
    print(f"results.json, results.md and the models are in {settings.out}/")
    return results


def print_recommendations(policy, names):
    """Ten titles for a history of titles or ids, oldest first."""
    ids, titles = policy.catalogue["item_ids"], policy.catalogue["titles"]
    items, log_probs = policy.recommend([[find_item(name, ids, titles) for name in names]])
    for item, log_prob in zip(items[0].tolist(), log_probs[0].tolist()):
        if item >= 0:
            print(f"{math.exp(log_prob):.4f}  {titles[item]}")


def distribution(policy, histories):
    """P(v | U) of every item (B, n), and the head's log Z (B,), in eval mode."""
    policy.eval()
    tokens, lengths = policy.tokens(histories)
    items = torch.arange(len(policy.semantic_ids.codes)).expand(len(histories), -1)
    with torch.no_grad():
        log_probs, log_flow = policy(tokens, lengths[:, None].expand(items.shape), items)
    return policy.steps(log_probs, items).sum(-1).exp(), log_flow[:, 0, 0]


def run_oracle(settings, users=4, steps=1200, samples=64, rate=2e-3):
    """One loss alone, from random weights, on a few users, until P = R/Z (known by enumeration)."""
    _, seeds = check(settings)
    settings.device = "cpu"
    data = load_data(settings.data)
    _, ids, reward = prepare(seeds[0], data, settings)
    torch.manual_seed(seeds[0])
    policy = Policy(ids, settings.window, settings.width, settings.layers, dropout=0.0)
    histories = data.train[:users]
    positives = torch.tensor([history[-2] for history in data.histories[:users]])
    # R times 1, 2, 3, 4 from user to user: else every Z is about 1 and there is nothing to learn
    r = reward(histories, positives, positives >= 0) * torch.arange(1, users + 1)[:, None]
    target, log_z = r / r.sum(1, keepdim=True), r.sum(1).log()
    torch.manual_seed(seeds[0])
    optimizer = torch.optim.Adam([{"params": policy.lm.parameters()},
                                  {"params": policy.flow_head.parameters(), "lr": 10 * rate}], lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, steps, 50))
    tokens, lengths = policy.tokens(histories)
    ends, curve = lengths[:, None].expand(-1, samples), []
    for step in tqdm(range(steps + 1), desc="oracle", disable=None):
        if step % 50 == 0:
            found, head = distribution(policy, histories)
            curve.append((step, (found - target).abs().sum(1).mean().item(), (head - log_z).abs().max().item()))
        even = torch.randint(target.shape[1], (users, samples - samples // 2))
        items = torch.cat([even, torch.multinomial(target, samples // 2, replacement=True)], 1)
        policy.train()
        log_probs, log_flow = policy(tokens, ends, items)
        loss = LOSSES[settings.oracle](SimpleNamespace(
            log_probs=log_probs, log_flow=log_flow, log_pf=policy.steps(log_probs, items),
            log_r=r.gather(1, items).log(), child_flow=ids.child_flows(r, items)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(curve[0], curve[-1])


def main(settings):
    """Do what was asked for → exit status; one line on stderr where it cannot be done."""
    try:
        if settings.recommend:
            print_recommendations(Policy.from_pretrained(settings.model), settings.recommend)
        elif settings.oracle:
            run_oracle(settings)
        else:
            run(settings)
        return 0
    except (InputError, OSError, FloatingPointError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        print(f"\nstopped; --resume goes on after the finished methods", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(SETTINGS))
