"""The exact oracle: on a catalogue that can be listed, what a GFlowNet should learn is known, and it can be seen to learn it.

By enumeration of all items: R, the partition function Z = Σ R, the flow F*(s) of every prefix, and P* = R/Z.
"""
import math

import torch
from tqdm import tqdm

from data.report import picture


def exact(reward, histories, positives):
    """R (B, n), log Z (B,) in nats, and P* = R/Z (B, n) of each user's context, by enumeration; every positive is liked."""
    r = reward(histories, positives.to(reward.cm.device), torch.ones(len(positives), dtype=torch.bool, device=reward.cm.device)).cpu()
    return r, r.sum(1).log(), r / r.sum(1, keepdim=True)


@torch.no_grad()
def distribution(policy, histories, size=256):
    """P(v | U) of every item under the policy (B, n), and the head's log Z (B,)."""
    policy.eval()
    n = len(policy.semantic_ids.codes)
    tokens, lengths = policy.tokens(histories)
    parts, log_z = [], None
    for items in torch.arange(n).split(size):
        items = items.expand(len(histories), -1)
        log_probs, log_flow = policy(tokens, lengths[:, None].expand(items.shape), items)
        parts.append(policy.steps(log_probs, items).sum(-1).exp())
        log_z = log_flow[:, 0, 0]
    return torch.cat(parts, 1), log_z


def rate_at(step, steps, warm):
    """The share of the peak learning rate at a step: linear warm-up over `warm` steps, then a cosine to 0."""
    return min(1, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train_to_the_oracle(policy, loss, reward, histories, positives, steps=1200, samples=64, rate=2e-3, seed=0):
    """Trajectory balance alone (loss), from a policy with random weights, on a few contexts, until P = R/Z and the head
    says log Z. The curve: [(step, mean L1 distance of P from P*, largest |log Z head − log Z*|)].

    Half of each context's trajectories are drawn evenly, half from P*: any sampler that reaches every item has the same
    fixed point, but with even draws alone the few items that hold most of the flow come up too seldom. R is multiplied
    by 1, 2, 3, … from user to user: normalised signals make every Z about 1, and then a head has nothing to learn.
    """
    torch.manual_seed(seed)
    scale = torch.arange(1, len(histories) + 1)
    r, log_z, target = exact(reward, histories, positives)
    log_r, log_z = (r * scale[:, None]).log(), log_z + scale.log()
    optimizer = torch.optim.Adam([{"params": policy.lm.parameters()}, {"params": policy.flow_head.parameters(), "lr": 10 * rate}], lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, steps, warm=50))
    tokens, lengths = policy.tokens(histories)
    ends, curve = lengths[:, None].expand(-1, samples), []
    for step in tqdm(range(steps + 1), desc="oracle", disable=None):
        if step % 50 == 0:
            found, head = distribution(policy, histories)
            curve.append((step, (found - target).abs().sum(1).mean().item(), (head - log_z).abs().max().item()))
        even = torch.randint(target.shape[1], (len(histories), samples - samples // 2))
        items = torch.cat([even, torch.multinomial(target, samples // 2, replacement=True)], 1)
        policy.train()
        log_probs, log_flow = policy(tokens, ends, items)
        error = loss(log_flow[:, 0, 0], policy.steps(log_probs, items).sum(-1), log_r.gather(1, items))
        optimizer.zero_grad()
        error.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step(), schedule.step()
    return curve


def plot_flows(path, ids, exact_flow, learned_flow, titles, curve=(), branches=5, exact_title="exact, R/Z"):
    """flow.png: the tree of one user, where the flow goes: exact beside learned, both (n,) over items, summing to one.

    A bar is a prefix, as wide as its share of the flow; below it stand its `branches` largest children by the exact flow,
    in the same order on both sides, and a gap for the rest. With a curve, the distances against steps stand beside it.
    """
    flows = torch.stack([ids.flows(f[None].float())[0] for f in (exact_flow, learned_flow)])        # (2, P + n)
    with picture(path, 1, 3 if curve else 2, figsize=(15 if curve else 11, 4.2)) as axes:
        for axis, flow, name in zip(axes, flows, (exact_title, "learned, P_F")):
            _draw(axis, ids, flow, flows[0], titles, 0, 0, 0.0, branches)
            axis.set_xlim(0, 1), axis.set_ylim(-ids.num_levels - 0.6, 1), axis.axis("off"), axis.set_title(name)
        if curve:
            step, distance, z = zip(*curve)
            axes[2].semilogy(step, distance, label="mean L1(P, R/Z)"), axes[2].semilogy(step, z, label="largest |log Z head − log Z*|")
            axes[2].set_xlabel("step of trajectory balance"), axes[2].legend()


def _draw(axis, ids, flow, order, titles, node, level, left, branches):
    """A prefix as a bar of width F(s), and its children under it, in the order of the exact flow so that both trees line up."""
    share = flow[node].item()
    axis.bar(left, 0.8, share, -level, align="edge", color=f"C{level}", edgecolor="white", linewidth=1)
    if level == ids.num_levels:
        if share > 0.02:
            axis.text(left + share / 2, -level - 0.05, titles[node - ids.num_prefixes], rotation=90, ha="center", va="top", fontsize=7, parse_math=False)
        return
    if share > 0.06:
        axis.text(left + share / 2, 0.4 - level, f"{share:.2f}", ha="center", va="center", fontsize=8, color="white")
    children = ids.children[node]
    children = children[children >= 0]
    for child in children[order[children].argsort(descending=True)][:branches].tolist():
        _draw(axis, ids, flow, order, titles, child, level + 1, left, branches)
        left += flow[child].item()
