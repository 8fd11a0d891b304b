"""GFlowGR in one file: fine-tune a generative recommender so that P(item | user) follows a reward.

A generative recommender writes the next item's semantic ID code by code. Fine-tuning on the log alone (SFT) teaches it
what was shown, not what would be liked: exposure bias. GFlowGR reads an ID as a path down a tree and trains a GFlowNet
on it: logged items, and unobserved ones picked with the help of a collaborative model (CM), get probabilities in
proportion to their reward.

Where this departs from the paper, or had to guess (the formulas are known second-hand, from notes on its later version):

 1. The policy is a GPT-2 trained from scratch with a few hundred thousand weights, not a pre-trained model.
 2. An item of the history is one token, not L: rows are a third as long, and SFT learns faster (Policy).
 3. Semantic IDs come from residual k-means with capacities, not from a trained RQ-VAE (tokenizer.py).
 4. The CM counts item-to-item transitions; the paper uses a neural recommender. A training context is scored without
    the counts of its own user, else the CM would know the answer (reward.py).
 5. Every reward signal is normalised over the catalogue before it is weighted, so Z(U) is about 1 (Reward).
 6. The curriculum's pool is drawn half from the CM's scores and half evenly, not evenly alone (curriculum).
 7. L_GR is taken at every item of a row, L_GFN at a few of them, and with a smaller λ than the paper's (loss_of). Items
    that were only clicked are targets as well; their r_a is a tenth.
 8. S-DPO keeps L_GR beside its own loss, and its negatives are the augmented items, of which the CM likes some. VarGrad
    and FM are extra rows; FM is ours: where the catalogue can be enumerated, the flow of every prefix is a sum over its
    subtree, an exact target for each step (flow_matching). DB's flow head starts at the flow of an even reward: from
    log F = 0 everywhere its residuals are as large as log n, and drown L_GR (Policy.even_flow).
 9. The rows NAME+cm are ours: beam search guided by the exact flows of r_ŷ^γ, so they need the CM when serving.
    Of the samplers, mixture is ours, and so is δ, which takes the log's popularity out of r_ŷ (Reward.debias). The policy
    sampler gives N items, not N−1, and may give one that is logged later.
10. Of an item that a user had twice the first time alone is read, and items of the history are never recommended, in any row.

Begin with data/example.py, one user followed by hand from titles to a ranked list; data/oracle.py shows that TB reaches R/Z.

The order below is that of the story: settings, policy, losses, sampler, training, evaluation, experiment, command line.
"""
import copy
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from data.inputs import InputError, check, check_out, check_size, load_data, one_line, parse_arguments, read_row

# --- Settings --------------------------------------------------------------------------------------------------------
METHODS = {"pop": "Popularity", "cm": "CM alone", "sft": "SFT", "sft-continued": "SFT (continued)",
           "sdpo": "S-DPO", "db": "GFlowGR-DB", "vargrad": "GFlowGR-VarGrad", "tb": "GFlowGR-TB", "fm": "GFlowGR-FM",
           "sft+cm": "SFT, guided", "tb+cm": "GFlowGR-TB, guided", "fm+cm": "GFlowGR-FM, guided"}   # guided: needs the CM when serving


# λ of each row's own loss beside L_GR, where --lam does not say otherwise. Squared log-ratios are large, and more of them
# drowns L_GR; a divergence (FM) or a preference (S-DPO) is small.
LAM = {"sdpo": 1.0, "db": 0.1, "vargrad": 0.1, "tb": 0.1, "fm": 1.0}


def setting(default, help):
    """A field of Settings whose flag has this help text."""
    return field(default=default, metadata={"help": help})


@dataclass
class Settings:
    """Everything that can be set; each field is a flag of the same name."""
    data: str = setting("toy", "toy, ml-100k, or a folder with interactions.csv and items.csv")
    methods: str = setting("pop,cm,sft,sft-continued,tb,fm,tb+cm", "rows of the table, of: " + ", ".join(METHODS))
    seeds: str = setting("42", "comma-separated; every method runs once with each")
    out: str = setting("", "folder for results, picture and models (default: runs/NAME-OF-DATA)")
    device: str = setting("auto", "auto, cuda, mps or cpu")
    ids: str = setting("mixed", "semantic IDs from content (text alone, as TIGER) or mixed (with training co-occurrence, as LETTER)")
    codes: int = setting(512, "K, codes a level: large ones leave few items below a first code, and the later codes easy")
    window: int = setting(20, "items of the history that the policy reads: the last ones say most")
    width: int = setting(128, "hidden size: enough for 10^4 items, trains on two cores")
    layers: int = setting(3, "transformer blocks: enough to compare an item with those before it")
    dropout: float = setting(0.2, "less over-fits in ten epochs on 10^5 interactions")
    batch: int = setting(64, "rows a step: on two cores more and smaller steps learn more in the same minutes")
    rate: float = setting(1.5e-3, "peak learning rate of SFT, by AdamW with warm-up and cosine: small models like it high")
    fine_rate: float = setting(5e-4, "peak learning rate of every fine-tuning: a fresh high rate first undoes what SFT learned")
    sft_epochs: int = setting(8, "passes of SFT over the training rows: validation stops rising there")
    epochs: int = setting(2, "passes of each fine-tuning, the same for every method: more only over-fit")
    sampler: str = setting("curriculum", "who picks the augmented trajectories: session, random, curriculum, policy or mixture")
    trajectories: int = setting(3, "N, augmented trajectories a context: the paper's best")
    positions: int = setting(3, "M, contexts a row that get trajectories: few enough to keep a step near twice that of SFT")
    weights: str = setting("0.3,0.65,0.05", "w_a,w_ŷ,w_s of the reward, its shares of action, CM and ID similarity: the CM says most about the unobserved")
    lam: float = setting(-1.0, f"λ, the weight of the second loss beside L_GR; negative: each loss's own, {LAM}")
    beta: float = setting(0.1, "β of S-DPO: the paper's")
    gamma: float = setting(2.0, "γ, power of the CM's scores that guide the rows NAME+cm: about the best of 1/2 … 4 on validation (--sweep gamma)")
    debias: float = setting(0.0, "δ, power of an item's count that r_ŷ is divided by: 1 or more finds what was never shown, but not what the log holds")
    beams: int = setting(20, "beam width when ranking: twice the ten that are shown; as many as items would be exact")
    validate_users: int = setting(2000, "users that choose the epoch: standard error about .004 in NDCG, in seconds")


# What differs from the defaults above on the two data sets that come by themselves, and in a smoke run. Histories of a
# hundred items fill a narrow beam with what the user had: on ml-100k 20 beams cost SFT 4 % of its NDCG, guided rows nothing.
PRESETS = {"toy": dict(codes=16, width=64, layers=2, sft_epochs=8, epochs=4, rate=2e-3),
           "ml-100k": dict(codes=256, width=96, sft_epochs=8, epochs=2, rate=3e-3, beams=50)}
QUICK = dict(sft_epochs=1, epochs=1)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")          # a terminal that knows no ± or é still gets the rest
    SETTINGS, ARGUMENTS = parse_arguments(sys.argv[1:], Settings, PRESETS, QUICK)   # before torch, so --help answers at once

import numpy as np                                             # noqa: E402
import torch                                                   # noqa: E402
import torch.distributed as dist                               # noqa: E402
import torch.nn.functional as F                                # noqa: E402
import transformers                                            # noqa: E402
from safetensors import SafetensorError                        # noqa: E402
from torch.nn.parallel import DistributedDataParallel          # noqa: E402
from tqdm import tqdm                                          # noqa: E402
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel   # noqa: E402

from data.batches import batches, pick_contexts, training_rows  # noqa: E402
from data.benchmark import benchmark                           # noqa: E402
from data.checkpoint import load_checkpoint, save_checkpoint   # noqa: E402
from data.commands import join_processes, print_recommendations, show_oracle   # noqa: E402
from data.metrics import beyond_accuracy, exposure_bias, ndcg_at, recall_at   # noqa: E402
from data.oracle import distribution, exact, plot_flows, rate_at   # noqa: E402
from data.report import plot_curves, plot_exposure, results_of, table_of, write_json   # noqa: E402
from data.saved import load_policy, save_policy                # noqa: E402
from data.sweep import sweep                                   # noqa: E402
from reward import CollaborativeModel, Reward, entries         # noqa: E402
from tokenizer import SemanticIDs, item_features               # noqa: E402

transformers.utils.logging.disable_progress_bar()              # these models load in no time
NEVER = -1e9                                                   # log-probability of what cannot be; finite, so 0 · NEVER is 0


# --- The policy: P_F(next code | user, codes so far) -----------------------------------------------------------------
# All paths of a user in one row: the history once, then a branch for each path, so that 1 + M·N paths cost one pass.
def tree_mask(ends, C, L):
    """Who sees whom in a packed row: floats (B, S, S), S = C + E·(L−1); 0 where place i may look at place j, else NEVER.

    A row holds the C tokens of a history, <user> first, and behind them E branches of L−1 codes, one after the other.
    ends (B, E): branch e of row b goes on from the first ends[b, e] items, so it may look at the places 0 … ends[b, e] of
    the history. A place of the history looks at itself and at those before it, never at a branch; a code looks at its
    own branch up to itself, and never at another branch.

    Example: the history <user> a b, one branch c d that goes on from a, and one e f that goes on from b; L = 3.

    >>> for place, row in zip("uabcdef", tree_mask(torch.tensor([[1, 2]]), C=3, L=3)[0]):
    ...     print(place, "", *["1" if x == 0 else "." for x in row])
    u  1 . . . . . .
    a  1 1 . . . . .
    b  1 1 1 . . . .
    c  1 1 . 1 . . .
    d  1 1 . 1 1 . .
    e  1 1 1 . . 1 .
    f  1 1 1 . . 1 1
    """
    (B, E), device = ends.shape, ends.device
    place = torch.arange(C, device=device)
    last = torch.cat([place.expand(B, C), ends.repeat_interleave(L - 1, 1)], 1)  # (B, S) history that each may see
    sees_history = place <= last[..., None]                                      # (B, S, C)
    block = torch.ones(L - 1, L - 1, device=device).tril()
    sees_branch = F.pad(torch.block_diag(*[block] * E), (0, 0, C, 0)) > 0        # (S, E·(L-1))
    seen = torch.cat([sees_history, sees_branch.expand(B, -1, -1)], 2)
    return torch.zeros(seen.shape, device=device).masked_fill_(~seen, NEVER)


class Policy(torch.nn.Module):
    """A small GPT-2 that reads a history and writes a semantic ID, plus the table of IDs.

    Vocabulary: L·K codes (code c of level l is token l·K + c), one <user> token that opens every row, and one token
    for each item of the history. A row of tokens is a *packed tree*: the history once, and behind it any number of
    branches, each the first L−1 codes of one item; a branch sees the history up to its own end and itself, no other
    branch. The last code of a path is predicted but never read.

    Example: three items with L = 3, K = 3, so tokens 0–8 are codes, 9 is <user>, and 10, 11, 12 are the items.

    >>> ids = SemanticIDs([[0, 1, 1], [0, 2, 0], [2, 0, 0]], num_codes=3)
    >>> policy = Policy(ids, window=4, width=32, layers=1).eval()
    >>> policy.tokens([[2, 0]])[0].tolist()                    # a user who liked item 2, then item 0
    [[9, 12, 10]]
    >>> ids.legal([]).tolist(), ids.legal([0]).tolist()        # first code: 0 or 2; after 0: 1 or 2
    ([True, False, True], [False, True, True])
    >>> steps = policy.path_log_probs([[2, 0]], [[0, 1, 2]])   # (1 user, 3 items, 3 steps)
    >>> steps[0, :, 2].tolist()                                # after two codes one item is left: log 1 = 0
    [0.0, 0.0, 0.0]
    >>> round(steps.sum(-1).exp().sum().item(), 4)             # the whole catalogue
    1.0
    >>> policy.recommend([[2, 0]], k=2)[0].tolist()            # item 1 is all that the user has not had
    [[1, -1]]
    """

    def __init__(self, semantic_ids, window=20, width=128, layers=3, dropout=0.2):
        super().__init__()
        K, L, n = semantic_ids.num_codes, semantic_ids.num_levels, len(semantic_ids.codes)
        self.semantic_ids, self.window, self.user_token = semantic_ids, window, K * L
        self.catalogue = {}                                    # item_ids and titles, when they are known
        self.lm = GPT2LMHeadModel(GPT2Config(
            vocab_size=L * K + 1 + n, n_positions=window + L, n_embd=width, n_layer=layers, n_head=max(1, width // 32),
            activation_function="gelu_pytorch_tanh",           # gelu_new's values, faster on CPU
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=0.0,   # attention dropout would double the time of a step
            bos_token_id=L * K, eos_token_id=L * K))
        # log F(s), of the root log Z(U), is the head's output plus even_flow: log of the share of all items that lie below s
        self.flow_head = torch.nn.Linear(self.lm.config.n_embd, 1)
        torch.nn.init.zeros_(self.flow_head.weight), torch.nn.init.zeros_(self.flow_head.bias)
        self.register_buffer("even_flow", semantic_ids.flows(torch.full((1, n), 1 / n))[0].log(), persistent=False)   # (P + n,)
        for name in ("codes", "nodes", "children"):            # buffers move with .to(device); not saved
            self.register_buffer("id_" + name, getattr(semantic_ids, name), persistent=False)

    @torch.no_grad()
    def start_from(self, features):
        """Set the token embeddings from item features (n, d): an item's token is its features, projected; a code's is
        the mean over all items with that code at that level of what the levels before have left of them.

        So a history starts out near the codes of similar items, which the same features made.
        """
        n, d = len(features), self.lm.config.n_embd
        K, wte = self.semantic_ids.num_codes, self.lm.transformer.wte.weight
        mixing = torch.randn(features.shape[1], d)             # a random projection keeps the angles
        vector = torch.as_tensor(features, dtype=torch.float32)
        vector = (vector - vector.mean(0)) @ mixing
        vector *= self.lm.config.initializer_range / vector.std().clamp(min=1e-6)
        wte[-n:] = vector
        for level in range(self.semantic_ids.num_levels):
            code = self.id_codes[:, level]
            total = torch.zeros(K, d).index_add_(0, code, vector)
            wte[level * K:(level + 1) * K] = total / torch.bincount(code, minlength=K).clamp(min=1)[:, None]
            vector = vector - wte[level * K + code]

    def tokens(self, histories):
        """Token rows (B, C) of the last `window` items, <user> first, padded on the right; and their lengths in items (B,)."""
        recent = [history[-self.window:] if history else [] for history in histories]
        lengths = torch.tensor([len(history) for history in recent])
        rows = torch.full((len(recent), 1 + int(lengths.max())), self.user_token)
        for row, history in zip(rows, recent):
            row[1:1 + len(history)] = torch.tensor(history, dtype=torch.long) + self.user_token + 1
        return rows, lengths

    @property
    def device(self):
        return self.id_codes.device

    def _logits(self, hidden, level):
        """(..., d) → (..., K): one head per level, the level's rows of the embedding, since no other code is ever legal."""
        K = self.semantic_ids.num_codes
        return hidden @ self.lm.transformer.wte.weight[level * K:(level + 1) * K].T

    def forward(self, tokens, ends, items):
        """log P_F of every next code along packed branches, and log F of every prefix.

        tokens (B, C) histories; branch e of a row goes on from the history's first ends[b, e] items and is the path
        of items[b, e]: both (B, E). → (B, E, L, K) log-probabilities over the legal codes (NEVER elsewhere), and
        (B, E, L) log flows of the prefixes s_0 … s_{L-1}.
        """
        tokens, ends, items = tokens.to(self.device), ends.to(self.device), items.to(self.device)
        (B, C), E, L, K = tokens.shape, ends.shape[1], self.semantic_ids.num_levels, self.semantic_ids.num_codes
        depth = torch.arange(L - 1, device=tokens.device)
        branches = (self.id_codes[items][..., :-1] + depth * K).reshape(B, -1)           # (B, E·(L-1)) tokens
        branch_end = ends[..., None].expand(B, E, L - 1).reshape(B, -1)          # history that each may see
        place = torch.arange(C, device=tokens.device).expand(B, C)
        position = torch.cat([place, branch_end + 1 + depth.repeat(E)], 1)       # (B, C + E·(L-1))
        mask = tree_mask(ends, C, L)[:, None]                                    # (B, 1, S, S), S = C + E·(L-1)
        hidden = self.lm.transformer(torch.cat([tokens, branches], 1), attention_mask=mask, position_ids=position,
                                     use_cache=False).last_hidden_state                  # (B, C + E·(L-1), d)
        root = hidden.gather(1, ends[..., None].expand(-1, -1, hidden.shape[-1]))        # (B, E, d)
        prefixes = torch.cat([root[:, :, None], hidden[:, C:].reshape(B, E, L - 1, -1)], 2)   # (B, E, L, d)
        # One slice of the embedding for all levels' heads: the gradient of each is as large as the whole, items and all
        heads = self.lm.transformer.wte.weight[:L * K].unflatten(0, (L, K))      # (L, K, d)
        logits = torch.einsum("beld,lkd->belk", prefixes, heads).float()         # (B, E, L, K); float also in bf16
        legal = self.id_children[self.id_nodes[items][..., :-1]] >= 0            # (B, E, L, K)
        log_probs = logits.masked_fill(~legal, NEVER).log_softmax(-1)
        return log_probs, self.flow_head(prefixes)[..., 0] + self.even_flow[self.id_nodes[items][..., :-1]]

    def steps(self, log_probs, items):
        """log P_F of the codes that were taken: (B, E, L, K), items (B, E) → (B, E, L)."""
        return log_probs.gather(-1, self.id_codes[items.to(self.device)][..., None])[..., 0]

    def path_log_probs(self, histories, items):
        """log P_F of each step on the paths of items (B, J) after histories (B lists) → (B, J, L), natural logs."""
        tokens, lengths = self.tokens(histories)
        items = torch.as_tensor(items)
        log_probs, _ = self(tokens, lengths[:, None].expand_as(items), items)
        return self.steps(log_probs, items)

    @torch.no_grad()
    def recommend(self, histories, k=10, beams=20, guide=None):
        """The k best items after each history: (items (B, k), log_probs (B, k)), best first; −1 and −inf where none is left.

        Beam search over legal codes, all beams of a user as extra positions of one row under a tree mask. Never an
        item of the history, never a duplicate; with enough beams it is exact. log_probs are log P_F of the whole path.

        guide: (B, n) ≥ 0, such as CM^γ: then beams are kept by log P_F(s) + log F_guide(s), F_guide(s) being the guide's
        sum over the items below the prefix s, its exact flow; at the end by log P_F(v) + log guide(v), which is returned.

        Start from the empty prefix with score 0. At each level l = 0 … L−1 give every beam all its legal next codes c:
        score(prefix + c) = score(prefix) + log P_F(c | history, prefix), natural logs, P_F a softmax over the legal codes
        alone. Before the last level keep the max(beams, k) best of each user; after it leave out the items of the
        history and give the k best of all. The model reads <user>, the last `window` items (self.tokens), then the
        prefix (code c of level l is token l·K + c, at the position behind what it follows); self._logits(hidden, l)
        scores the codes of level l. One prefix at a time and without a cache is slow, and as right.

        Example: a model of zeros, so all legal codes are equally likely. The first code is 0 or 2, the second after 0 is
        1 or 2: items 0, 1, 2 have 1/4, 1/4, 1/2. Item 1 is in the history, and there are two others.

        >>> policy = Policy(SemanticIDs([[0, 1, 1], [0, 2, 0], [2, 0, 0]], num_codes=3), width=32, layers=1).eval()
        >>> _ = policy.lm.transformer.wte.weight.data.zero_()
        >>> items, log_probs = policy.recommend([[1]], k=3)
        >>> items.tolist(), log_probs.exp().tolist()
        ([[2, 0, -1]], [[0.5, 0.25, 0.0]])
        """
        beams, (L, K) = max(beams, k), (self.semantic_ids.num_levels, self.semantic_ids.num_codes)
        tokens, lengths = (x.to(self.device) for x in self.tokens(histories))
        B, C = tokens.shape
        place = torch.arange(C, device=self.device)
        causal = torch.zeros(C, C, device=self.device).masked_fill_(place[None] > place[:, None], NEVER)
        cache = DynamicCache()
        hidden = self.lm.transformer(tokens, cache, attention_mask=causal.expand(B, 1, C, C),
                                     position_ids=place.expand(B, C), use_cache=True).last_hidden_state
        hidden = hidden.gather(1, lengths[:, None, None].expand(-1, 1, hidden.shape[-1]))      # (B, 1, d)
        beam_mask = torch.zeros(B, 1, C, device=self.device).masked_fill_(place > lengths[:, None, None], NEVER)
        flow = None if guide is None else self.semantic_ids.flows(guide).clamp(min=1e-30).log().to(self.device)   # (B, P + n)
        score = torch.zeros(B, 1, device=self.device)          # (B, W) log P_F of each beam's prefix
        node = torch.zeros(B, 1, dtype=torch.long, device=self.device)
        for level in range(L):
            child = self.id_children[node]                                                     # (B, W, K)
            # In place: passes over (B, W, K) cost as much as a block of the model. A path that does not exist keeps a
            # score below NEVER / 2, whatever is added to it.
            total = self._logits(hidden, level).masked_fill_(child < 0, NEVER).log_softmax(-1).add_(score[..., None]).flatten(1)
            child = child.flatten(1)                                                           # (B, W·K)
            value = total if flow is None else total + flow.gather(1, child.clamp(min=0))
            if level == L - 1:
                break                                          # the children are items now
            best = value.topk(min(beams, value.shape[1]), 1).indices                           # (B, W)
            score = total.gather(1, best)
            node, parent, W = child.gather(1, best), best // K, best.shape[1]
            # A beam sees what its parent saw, and itself; the cache is never reordered.
            itself = torch.full((W, W), NEVER, device=self.device).fill_diagonal_(0).expand(B, W, W)
            beam_mask = torch.cat([beam_mask.gather(1, parent[..., None].expand(-1, -1, beam_mask.shape[2])), itself], 2)
            hidden = self.lm.transformer(level * K + best % K, cache, attention_mask=beam_mask[:, None],
                                         position_ids=(lengths[:, None] + 1 + level).expand(B, W),
                                         use_cache=True).last_hidden_state                     # (B, W, d)
        # Enough of the best that k are left without the items of the history
        value, best = value.topk(min(k + max(map(len, histories)), value.shape[1]), 1)
        item = child.gather(1, best) - self.semantic_ids.num_prefixes
        owned = torch.zeros(B, len(self.id_codes), dtype=torch.bool)
        for b, history in enumerate(histories):
            owned[b, history] = True
        gone = (value < NEVER / 2) | owned.to(self.device).gather(1, item.clamp(min=0))
        value, item = F.pad(value.masked_fill(gone, -math.inf), (0, k), value=-math.inf), F.pad(item, (0, k), value=-1)
        score, best = value.topk(k, 1)
        return item.gather(1, best).masked_fill(score == -math.inf, -1), score

    @torch.no_grad()
    def sample(self, histories, count):
        """Items (B, count) drawn from P_F, code by code, and their log-probabilities (B, count)."""
        tokens, lengths = self.tokens(histories)
        ends = lengths[:, None].expand(-1, count).to(self.device)
        children, below = self.id_children, self.id_nodes.new_zeros(int(self.id_nodes.max()) + 1)
        below[self.id_nodes] = torch.arange(len(self.id_nodes), device=self.device)[:, None]   # some item below each node
        node = torch.zeros_like(ends)
        for level in range(self.semantic_ids.num_levels):      # any item below a prefix will do to ask for its next code
            log_probs, _ = self(tokens, ends, below[node])
            code = torch.distributions.Categorical(logits=log_probs[:, :, level]).sample()
            node = children[node, code]
        return below[node], self.steps(log_probs, below[node]).sum(-1)

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors (plain GPT-2) and semantic_ids.json (IDs, item ids, titles) into a folder."""
        save_policy(self, folder)

    @classmethod
    def from_pretrained(cls, folder):
        """The Policy that save_pretrained wrote, or InputError; its flow head, used in training alone, starts anew."""
        return load_policy(cls, folder)


# --- Losses: pure functions of tensors, all in natural logs ----------------------------------------------------------
def trajectory_balance(log_z, log_pf, log_r):
    """Trajectory balance, TB: mean over b, j of (log_z[b] + log_pf[b, j] − log_r[b, j])² → scalar tensor, natural logs.

    log_z (B,) is log Z of each user (context); log_pf (B, J) is log P_F of whole paths, J of them a user, already summed
    over their steps; log_r (B, J) is log R of the items they end in. It is 0 where P_F(path) = R/Z for all of them.

    Example: Z = 1; the first path has P = R = 1/2, which costs 0; the second P = 1/4, R = 1/2, which costs (log 1/2)² =
    0.4805; the mean is 0.2402.

    >>> log_pf, log_r = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    >>> round(trajectory_balance(torch.zeros(1), log_pf, log_r).item(), 4)
    0.2402
    """
    # (log Z(U) + Σ_l log P_F(s_{l+1} | s_l) − log R(s_L))²; P_B is 1 on a tree
    return (log_z[:, None] + log_pf - log_r).square().mean()


def detailed_balance(log_flow, log_pf):
    """Detailed balance, DB: squares of the flow's imbalance, summed over a path's steps, mean over paths → scalar tensor.

    log_flow (B, J, L+1) is log F(s_0) … log F(s_L) along each of J paths a user, so the last column is log R; log_pf
    (B, J, L) is log P_F(s_{l+1} | s_l) of each step; natural logs. Loss = mean over b, j of
    Σ_l (log F(s_l) + log P_F(s_{l+1} | s_l) − log F(s_{l+1}))². It is 0 where each step passes on its share of the flow.

    Example: flows 1 → 1/2 → 1/4 on one path. Steps of 1/2 and 1/2 fit; for 1/2 and 1/4, the second is off by log 1/2.

    >>> log_flow = torch.tensor([[[1.0, 0.5, 0.25]]]).log()
    >>> [round(detailed_balance(log_flow, torch.tensor([[[0.5, p]]]).log()).item(), 4) for p in (0.5, 0.25)]
    [0.0, 0.4805]
    """
    # Σ_l (log F(s_l) + log P_F(s_{l+1} | s_l) − log F(s_{l+1}))²
    return (log_flow[..., :-1] + log_pf - log_flow[..., 1:]).square().sum(-1).mean()


def vargrad(log_pf, log_r):
    """VarGrad: TB with log Z(U) replaced by the mean over a user's trajectories; log_pf, log_r (B, J) → scalar."""
    # log Z(U) ≈ mean_j (log R − log P): what is left is the variance of the difference over j
    difference = log_r - log_pf
    return (difference - difference.mean(1, keepdim=True)).square().mean()


def flow_matching(flow, log_pf):
    """FM: child flows F* (..., L, K), ≥ 0, against log P_F (..., L, K) → scalar, KL summed over steps, mean over the rest.

    Our name: not the flow matching of Bengio et al. 2021 (in-flow = out-flow), but the divergence of each step from the
    exact flows.
    """
    # Σ_l Σ_c F*(c)/F*(s_l) · (log F*(c)/F*(s_l) − log P_F(c | s_l)), 0 where P_F follows the exact flows
    target = flow / flow.sum(-1, keepdim=True)
    return (target * (target.clamp(min=1e-30).log() - log_pf)).sum((-2, -1)).mean()


def sdpo(policy_pos, policy_neg, ref_pos, ref_neg, beta):
    """S-DPO: prefer one positive item to J negatives, more than the reference does; with J = 1 it is DPO → scalar tensor.

    policy_pos, ref_pos (B,) and policy_neg, ref_neg (B, J) are log-probabilities of whole paths (natural logs) by the
    policy and by the frozen reference. With Δ = log P_policy − log P_reference,
    loss = mean over b of −log σ(−log Σ_d exp(β[Δ_d − Δ_p])), d the negatives, p the positive, σ(x) = 1/(1 + e^−x).

    Example: policy = reference, 3 negatives: log(1 + 3) = 1.3863. The positive raised by 1, β = 0.1: log(1 + 3·e^−0.1).

    >>> pos, neg = torch.tensor([-2.0]), torch.tensor([[-3.0, -4.0, -5.0]])
    >>> [round(sdpo(pos + up, neg, pos, neg, beta=0.1).item(), 4) for up in (0, 1)]
    [1.3863, 1.3122]
    """
    # −log σ(−log Σ_d exp(β[Δ_d − Δ_p])), Δ = log P_policy − log P_reference
    margin = beta * ((policy_neg - ref_neg) - (policy_pos - ref_pos)[:, None])
    return -F.logsigmoid(-margin.logsumexp(1)).mean()


# --- The adaptive trajectory sampler: which items to learn from beside the logged one ---------------------------------
SAMPLERS = ("session", "random", "curriculum", "policy", "mixture")


def draw(weight, logged, count):
    """Items (B, count) drawn with replacement in proportion to weight (B, n), none of the B lists `logged`."""
    if count < 1:
        return torch.empty(len(weight), 0, dtype=torch.long, device=weight.device)
    weight = weight.clone()
    weight[entries(logged)] = 0
    return torch.multinomial(weight + 1e-12, count, replacement=True)


def curriculum(scores, logged, count, progress):
    """N unobserved items a context, easy (low CM score) early in training, hard (high) late.

    scores (B, n) of the CM, logged B lists of the user's own items, progress in [0, 1] → items (B, count). The paper
    ranks a pool of about 2N−1 unobserved items by the CM. This pool is drawn, with replacement, half from the CM's
    scores, since of a catalogue of thousands an even draw finds next to nothing that the CM likes; and half evenly:
    with likely items alone, a large log Z could hide that the policy finds all of them too unlikely.

    For each context draw 2N−1 items (N = count), item i with a chance ∝ scores[i]/2 + 1/(2n), 0 if it is logged; sort them
    from low to high score; keep N neighbours, from place round(progress · (N−1)) on, places from 0.

    Example: N = 3, a pool of 5. Progress 0 keeps places 0–2, one half 1–3, and 1 keeps 2–4. Of items with scores .7, .2,
    .1, the first unlogged, chances are .52, .27, .22; where two of them are logged, the third is all that can be drawn.

    >>> scores = torch.tensor([[0.7, 0.2, 0.1]])
    >>> curriculum(scores, [[0, 2]], count=3, progress=0.5).tolist()
    [[1, 1, 1]]
    >>> easy, hard = (curriculum(scores.expand(99, 3), [[]] * 99, 3, p) for p in (0.0, 1.0))
    >>> bool(scores[0, easy].mean() < scores[0, hard].mean())
    True
    """
    pool = draw(0.5 * scores + 0.5 / scores.shape[1], logged, 2 * count - 1)             # (B, 2N-1)
    ranked = pool.gather(1, scores.gather(1, pool).argsort(1))                           # low scores first
    start = round(progress * (count - 1))
    return ranked[:, start:start + count]


def augmented(sampler, count, scores, logged, positives, histories, policy, progress):
    """The N augmented items (B, count) of each context, by one of the paper's four samplers or a mixture of two.

    session: others of the user's own items; random: any unobserved ones; curriculum: see there; policy: the policy's
    own beam, what it would recommend now; mixture: one of the policy's for each two of the curriculum's.
    """
    if sampler == "session":
        own = torch.zeros_like(scores)
        own[entries(logged)] = 1
        return draw(own.scatter_(1, positives[:, None], 0), [], count)
    if sampler == "random":
        return draw(torch.ones_like(scores), logged, count)
    if sampler == "curriculum":
        return curriculum(scores, logged, count, progress)
    own_share = count if sampler == "policy" else count // 3
    training = policy.training
    policy.eval()                                              # what it would do, not what dropout makes of it
    items = policy.recommend(histories, own_share, beams=max(1, own_share))[0].to(positives.device)
    policy.train(training)
    items = items.where(items >= 0, positives[:, None])        # a catalogue with nothing left
    return torch.cat([items, augmented("curriculum", count - own_share, scores, logged, positives, histories, policy, progress)], 1)


# --- Training --------------------------------------------------------------------------------------------------------
def next_token_loss(step_log_probs, valid):
    """L_GR: −log P_F of the logged item's codes, summed over the path (B, T, L), mean over valid targets (B, T)."""
    valid = valid.to(step_log_probs.device)
    return -(step_log_probs.sum(-1) * valid).sum() / valid.sum()


def loss_of(method, model, reference, batch, reward, data, settings, progress):
    """L = L_GR(U, v) + λ · mean over n = 1..N+1 of L_GFN(τ_n); SFT is its first term alone.

    L_GR is taken at all of a row's targets, L_GFN at M of them. The S-DPO row has its own loss in L_GFN's place. model is
    the policy, or DistributedDataParallel around it.
    """
    policy = getattr(model, "module", model)
    (B, T), N, M = batch.targets.shape, settings.trajectories, settings.positions
    if method in ("sft", "sft-continued"):
        log_probs, _ = model(batch.tokens, batch.ends, batch.targets)
        return batch.weights[0] * next_token_loss(policy.steps(log_probs, batch.targets), batch.valid)
    chosen, context_ends, histories, following, liked = pick_contexts(batch, data, M)
    positives = batch.targets.gather(1, chosen).flatten().to(reward.cm.device)                       # (B·M,)
    scores = reward.collaborative(histories, following)                                              # (B·M, n)
    r = reward(histories, positives, liked.to(positives.device), scores)                             # (B·M, n)
    logged = [past + future for past, future in zip(histories, following)]
    others = augmented(settings.sampler, N, scores, logged, positives, histories, policy, progress)  # (B·M, N)
    # One packed row: a branch for each target (for L_GR, and τ_1), and N for each of the M contexts (τ_2 … τ_{N+1})
    items = torch.cat([batch.targets.to(policy.device), others.to(policy.device).reshape(B, M * N)], 1)   # (B, T + M·N)
    ends = torch.cat([batch.ends, context_ends.repeat_interleave(N, 1)], 1)
    log_probs, log_flow = model(batch.tokens, ends, items)                                           # (..., L, K), (..., L)
    step = policy.steps(log_probs, items)                                                            # (..., L)

    def by_context(x):         # (B, T + M·N, ...) → (B·M, 1 + N, ...): of each context the logged branch, then its N others
        logged_branch = x[torch.arange(B)[:, None], chosen]                                          # (B, M, ...)
        return torch.cat([logged_branch[:, :, None], x[:, T:].unflatten(1, (M, N))], 2).flatten(0, 1)
    paths, flow, log_pf = by_context(items), by_context(log_flow), by_context(step)
    log_r = r.gather(1, paths.to(r.device)).log().to(policy.device)                              # (B·M, 1 + N)
    if method == "tb":
        gfn = trajectory_balance(flow[:, 0, 0], log_pf.sum(-1), log_r)
    elif method == "db":
        gfn = detailed_balance(torch.cat([flow, log_r[..., None]], -1), log_pf)
    elif method == "vargrad":
        gfn = vargrad(log_pf.sum(-1), log_r)
    elif method == "fm":
        gfn = flow_matching(reward.ids.child_flows(r, paths.to(r.device)).to(policy.device), by_context(log_probs))
    else:                                                      # S-DPO: prefer the positive to the augmented items
        with torch.no_grad():
            compared, after = paths.view(B, M * (1 + N)), context_ends.repeat_interleave(1 + N, 1)
            reference_pf = reference.steps(reference(batch.tokens, after, compared)[0], compared).sum(-1).view(B * M, 1 + N)
        log_pf = log_pf.sum(-1)
        gfn = sdpo(log_pf[:, 0], log_pf[:, 1:], reference_pf[:, 0], reference_pf[:, 1:], settings.beta)
    lam = settings.lam if settings.lam >= 0 else LAM[method]
    return batch.weights[0] * next_token_loss(step[:, :T], batch.valid) + batch.weights[1] * lam * gfn


def train(method, policy, reward, data, settings, epochs, seed, folder, reference=None):
    """The one training loop; the best epoch on validation is saved in `folder` at once, so that a crash leaves it.

    Returns the curve, a list of {"epoch", "loss", "ndcg@10"} with the start as epoch 0 (which is never the one that is
    saved: a row is what its training does); raises FloatingPointError when the loss is not finite. Goes on from
    folder/checkpoint.safetensors where that is left from a training that was interrupted.
    """
    rows = training_rows(data.train, settings.window)
    steps = epochs * math.ceil(len(rows) / settings.batch)
    rate = settings.rate if method == "sft" else settings.fine_rate
    optimizer = torch.optim.AdamW([{"params": policy.lm.parameters()},
                                   {"params": policy.flow_head.parameters(), "lr": 10 * rate}],   # one number a user: faster
                                  lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = DistributedDataParallel(policy, find_unused_parameters=True) if world > 1 else policy   # SFT leaves the flow head out
    warm = min(200, steps // 10 + 1)
    checkpoint, full_rates = Path(folder) / "checkpoint.safetensors", [group["lr"] for group in optimizer.param_groups]
    curve = load_checkpoint(checkpoint, policy, optimizer)
    curve = curve or [{"epoch": 0, "loss": None, "ndcg@10": validate(policy_ranker(policy, settings), data, settings)}]
    step = (len(curve) - 1) * steps // epochs
    with tqdm(total=steps, initial=step, desc=method, disable=None, leave=False) as bar:
        for epoch in range(len(curve), epochs + 1):
            # Each epoch has its own random numbers, on every device: one that is resumed draws what it would have drawn.
            rng, losses = np.random.default_rng((seed, epoch)), []   # the order of the rows, the same in all processes
            torch.manual_seed(int(np.random.default_rng((seed, epoch, rank)).integers(2 ** 63)))
            policy.train()
            for batch in batches(rows, data.train, settings.batch, policy, rng, rank, world):
                for group, full in zip(optimizer.param_groups, full_rates):
                    group["lr"] = full * rate_at(step, steps, warm)
                with torch.autocast("cuda", torch.bfloat16, enabled=settings.device.startswith("cuda")):
                    loss = loss_of(method, model, reference, batch, reward, data, settings, step / steps)
                if not torch.isfinite(loss):
                    raise FloatingPointError(f"{method}: the loss became {loss.item()} at step {step + 1} "
                                             f"(users {', '.join(data.user_ids[u] for u in batch.users[:5])}, ...)")
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
                optimizer.step()
                bar.update()
                step += 1                                      # tqdm's own count stands still where there is no terminal
                losses.append(loss.item())
            mean = torch.tensor(float(np.mean(losses)) / world, device=policy.device)
            if world > 1:
                dist.all_reduce(mean)
            curve.append({"epoch": epoch, "loss": mean.item(),
                          "ndcg@10": validate(policy_ranker(policy, settings), data, settings)})
            tqdm.write(f"  {method}: epoch {epoch}/{epochs}, loss {curve[-1]['loss']:.3f}, validation NDCG@10 {curve[-1]['ndcg@10']:.4f}")
            if curve[-1]["ndcg@10"] > max((point["ndcg@10"] for point in curve[1:-1]), default=-1):
                policy.save_pretrained(folder)
            save_checkpoint(checkpoint, policy, optimizer, curve)
    return curve


# --- Evaluation ------------------------------------------------------------------------------------------------------
def rank_all(recommend, histories, k=10, size=256):
    """Top-k items (B, k) of recommend(histories, k) for all users, in batches of users with like histories."""
    order = sorted(range(len(histories)), key=lambda u: len(histories[u]))
    ranked = torch.full((len(histories), k), -1)
    for i in range(0, len(order), size):
        users = order[i:i + size]
        ranked[users] = recommend([histories[u] for u in users], k).cpu()
    return ranked


def policy_ranker(policy, settings, reward=None):
    """recommend(histories, k) for rank_all from a policy, guided by r_ŷ^γ where a reward is given."""
    policy.eval()
    guide = (lambda histories: reward.collaborative(histories) ** settings.gamma) if reward else lambda histories: None
    return lambda histories, k: policy.recommend(histories, k, settings.beams, guide(histories))[0]


def validate(ranker, data, settings):
    """NDCG@10 on the validation items of at most `validate_users` users, evenly spread."""
    users = range(0, len(data.train), math.ceil(len(data.train) / settings.validate_users))
    ranked = rank_all(ranker, [data.train[u] for u in users])
    return ndcg_at(ranked, torch.tensor([data.histories[u][-2] for u in users]), 10).item()


# --- The experiment: data → IDs, CM → SFT → fine-tuned policies → table ----------------------------------------------
def baseline_ranker(method, cm):
    """recommend(histories, k) for the rows without a language model: pop and cm."""
    def recommend(histories, k):
        scores = cm.scores(histories) if method == "cm" else cm.popularity.repeat(len(histories), 1)
        for row, history in zip(scores, histories):
            row[history] = -1
        best = scores.topk(min(k, scores.shape[1]), 1)
        return F.pad(best.indices.masked_fill(best.values < 0, -1), (0, k - best.indices.shape[1]), value=-1)
    return recommend


def prepare(seed, data, settings):
    """Features, SemanticIDs and Reward (with its CM) of one seed, from training interactions only."""
    started = time.time()
    features = item_features(settings.ids, data.texts, data.train, seed)
    ids = SemanticIDs.fit(features, settings.codes, seed=seed)
    cm = CollaborativeModel.fit(data.train, len(data.item_ids))
    reward = Reward(ids, cm, [float(w) for w in settings.weights.split(",")], debias=settings.debias)
    reward.to("cuda" if settings.device == "cuda" else "cpu")  # rewards and samples are made there; mps has no sparse matrices
    print(f"seed {seed}: {ids.health()} ({time.time() - started:.1f} s with the CM)", flush=True)
    if settings.codes >= len(data.item_ids):
        print(f"  the first code alone tells all items apart, and the tree is no tree: --codes {settings.codes} is large for them")
    return features, ids, reward


def trained_policy(method, seed, prepared, data, settings):
    """Train one method with one seed → its best epoch, saved in OUT/METHOD-SEED and read back from there; and its curve."""
    features, ids, reward = prepared
    out = Path(settings.out)
    torch.manual_seed(seed)
    if method == "sft":
        policy = Policy(ids, settings.window, settings.width, settings.layers, settings.dropout)
        policy.start_from(features)
    else:                                                      # every fine-tuned row starts from the same SFT model
        policy = Policy.from_pretrained(out / f"sft-{seed}")
        if not policy.semantic_ids.codes.equal(ids.codes):
            raise InputError(f"the IDs saved in {out}/sft-{seed} do not fit the data; delete {out} and run again")
    policy.catalogue = {"item_ids": data.item_ids, "titles": data.titles}
    policy.to(settings.device)
    reference = copy.deepcopy(policy).eval() if method == "sdpo" else None
    epochs = settings.sft_epochs if method == "sft" else settings.epochs
    curve = train(method, policy, reward, data, settings, epochs, seed, out / f"{method}-{seed}", reference)
    return Policy.from_pretrained(out / f"{method}-{seed}").to(settings.device), curve


def run_row(method, seed, prepared, data, settings):
    """Train, save and test one method with one seed → its entry of results.json, with curve, ranks and by_user beside it."""
    _, ids, reward = prepared
    curve, started, cm = [], time.time(), reward.cm
    base, guided = method.split("+")[0], "+" in method
    if guided:                                                 # nothing to train: the model of row `base`, decoded otherwise
        policy = Policy.from_pretrained(Path(settings.out) / f"{base}-{seed}").to(settings.device)
    elif base not in ("pop", "cm"):
        policy, curve = trained_policy(method, seed, prepared, data, settings)
    trained = time.time()
    if method == "tb":                                         # where the flow goes for the first user's held-out item
        context, positive = [data.histories[0][:-1]], torch.tensor([data.histories[0][-1]])
        plot_flows(Path(settings.out) / "flow.png", ids, exact(reward, context, positive)[2][0],
                   distribution(policy, context)[0][0].cpu(), data.titles, exact_title="R/Z, which knows the held-out item")
    ranker = baseline_ranker(base, cm) if base in ("pop", "cm") else policy_ranker(policy, settings, reward if guided else None)
    histories = [history[:-1] for history in data.histories]
    ranked, target = rank_all(ranker, histories), torch.tensor([history[-1] for history in data.histories])
    metrics = {f"{name}@{k}": f(ranked, target, k).item() for k in (5, 10) for name, f in (("recall", recall_at), ("ndcg", ndcg_at))}
    metrics |= beyond_accuracy(ranked, ids.codes, cm.count.cpu())
    bias = exposure_bias(ranked, data.truth, histories, cm.count.cpu()) if data.truth else {}
    metrics |= {name: float(np.mean(values)) for name, values in bias.items()}
    if not guided and base not in ("pop", "cm"):
        # H(P_F) = −E log P(v) in nats, by 16 draws from the policy for each of at most `validate_users` users
        torch.manual_seed(seed)
        some = histories[::math.ceil(len(histories) / settings.validate_users)]
        metrics["entropy"] = -torch.cat([policy.sample(some[i:i + 256], 16)[1] for i in range(0, len(some), 256)]).mean().item()
    return {"method": method, "seed": seed, "metrics": metrics,
            "seconds": {"train": trained - started, "eval": time.time() - trained},
            "train_examples": max(0, len(curve) - 1) * sum(map(len, data.train)), "curve": curve,
            "validation": max(point["ndcg@10"] for point in curve[1:]) if curve else validate(ranker, data, settings), "by_user": bias, "example": ranked[0].tolist(),
            "ranks": ((ranked == target[:, None]) * torch.arange(1, ranked.shape[1] + 1)).sum(1).tolist()}   # 0: not among the ten


# --- Command line ----------------------------------------------------------------------------------------------------
def run(settings, resume=False):
    """The whole job → results. Every finished row is written at once, so an interruption loses only the row that it hits."""
    devices = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    methods, seeds = check(settings, METHODS, SAMPLERS, devices)
    settings.device = devices[0] if settings.device == "auto" else settings.device
    data, out, rows = load_data(settings.data), Path(settings.out), []
    check_size(settings, data)
    check_out(settings, data, resume)
    if not resume:                                             # a row must never stand beside a model of another run
        for folder in (out / f"{method}-{seed}" for seed in seeds for method in methods):
            for name in ("row.json", "checkpoint.safetensors"):
                (folder / name).unlink(missing_ok=True)
    for seed in seeds:
        prepared = None
        for method in methods:
            path = out / f"{method}-{seed}" / "row.json"
            if not path.exists():
                prepared = prepared or prepare(seed, data, settings)
                write_json(path, run_row(method, seed, prepared, data, settings))
                path.with_name("checkpoint.safetensors").unlink(missing_ok=True)   # the row is whole
            rows.append(read_row(path, method, seed, len(data.histories)))
            results = results_of(rows, data, settings)
            write_json(out / "results.json", results)
    (out / "results.md").write_text(table_of(results, METHODS) + "\n", encoding="utf-8")
    plot_curves(results, METHODS, out / "curves.png")
    if data.truth:
        plot_exposure(rows, data, METHODS, out / "exposure.png")
    return results


def prepare_alone(settings):
    """What --oracle and --benchmark work on, on the CPU: the data, the first seed, and what prepare makes of them."""
    seed = check(settings, METHODS, SAMPLERS, ["cpu"])[1][0]
    data = load_data(settings.data)
    check_out(settings, data, resume=True)
    return data, seed, prepare(seed, data, settings)


def run_oracle(settings):
    """GFlowNet training alone, on a few users' contexts, until P = R/Z: prints the distances, draws OUT/oracle.png."""
    data, seed, (_, ids, reward) = prepare_alone(settings)
    torch.manual_seed(seed)
    policy = Policy(ids, settings.window, settings.width, settings.layers, dropout=0.0)
    show_oracle(policy, trajectory_balance, reward, data, settings.out, seed)


def run_benchmark(settings):
    """Speed side by side with the usual ways of doing the same: a table on the screen, OUT/benchmark.md and .png."""
    data, _, prepared = prepare_alone(settings)
    benchmark(settings, data, prepared, Policy, loss_of, trajectory_balance)


def main(settings, arguments):
    """Run what was asked for → the exit status; one line on stderr where it cannot be done."""
    try:
        if arguments.recommend:
            print_recommendations(Policy.from_pretrained(arguments.model), arguments.recommend)
        elif arguments.oracle:
            run_oracle(settings)
        elif arguments.benchmark:
            run_benchmark(settings)
        elif arguments.sweep:
            print("\n" + sweep(arguments.sweep, settings, run))
        else:
            join_processes(settings, arguments.resume)
            results = run(settings, arguments.resume)
            print("\n" + table_of(results, METHODS) + "\n\nAn interval that holds 0 shows no difference"
                  + (", and one epoch is a smoke test, not a result" if settings.epochs == 1 else "")
                  + f". results.json, results.md, curves.png and the models are in {settings.out}/")
        return 0
    except (InputError, OSError, SafetensorError, FloatingPointError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except (MemoryError, RuntimeError) as error:               # torch says it in its own words, on each device
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        print("error: not enough memory; lower --batch, --width, --layers, --window or --codes", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped; the finished rows are in {settings.out}/, and --resume goes on from them", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(SETTINGS, ARGUMENTS))
