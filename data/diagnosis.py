"""What holds fine-tuning back? The models of a finished run, measured: what the reward could give, how much of the CM is in
the policy, where it over-fits, how noisy the losses are.

    python -m data.diagnosis runs/ml-100k               # wants the rows sft, and any of sft-continued, tb, db, fm, sdpo
    python -m data.diagnosis runs/beauty 200 30         # rankings of 200 users, divergences of 30: 12,000 items take a second each

On validation items, all items ranked by their exact probabilities instead of a beam; the first seed of the run.
"""
import sys
from pathlib import Path

import numpy as np
import torch

import gflowgr
from data.batches import batches, training_rows
from data.inputs import load_data, read_json
from data.metrics import ndcg_at
from data.oracle import distribution
from data.report import markdown_table

ROWS = ("sft", "sft-continued", "sdpo", "db", "tb", "fm")


def without(share, histories):
    """Shares (B, n) of the catalogue without the items of the histories, summing to one again."""
    share = share.clone()
    share[gflowgr.entries(histories)] = 0
    return share / share.sum(1, keepdim=True)


def divergence(ids, target, share):
    """KL(target ‖ share) of each code given those before it (L,), mean over users, in nats; target, share (B, n).

    Their sum is the KL of the items.
    """
    target, share = (ids.flows(x).clamp(min=1e-30) for x in (target, share))               # (B, P + n), of all prefixes
    kl = (target * (target / share).log()).mean(0)
    # KL(c_l | c_1 … c_{l−1}) = KL(c_1 … c_l) − KL(c_1 … c_{l−1}): a sum over a level's prefixes less that over the one before
    return torch.stack([kl[level.unique()].sum() for level in ids.nodes.T]).diff()


def gradient_noise(method, policy, reward, data, settings, steps=40):
    """Noise over signal of a step's gradient of a row's own loss (of L_GR for sft): tr Σ / ‖g‖², over `steps` batches."""
    torch.manual_seed(0)
    rows, gradients = training_rows(data.train, settings.window), []
    for batch, _ in zip(batches(rows, data.train, settings.batch, policy, np.random.default_rng(0)), range(steps)):
        policy.zero_grad()
        batch.weights = (1, 0) if method == "sft" else (0, 1)  # of L_GR and of λ · the row's own loss, of which λ cancels below
        gflowgr.loss_of(method, policy, policy, batch, reward, data, settings, 0.5).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.lm.parameters()]))
    gradients = torch.stack(gradients)
    noise = gradients.var(0).sum()
    return (noise / (gradients.mean(0).square().sum() - noise / len(gradients))).item()


def diagnose(out, users=1000, few=100):
    """Print the tables for the run in folder `out`: rankings of at most `users` users, divergences of at most `few` of them."""
    results = read_json(Path(out) / "results.json")
    settings = gflowgr.Settings(**results["settings"])
    settings.device, seed = "cpu", results["runs"][0]["seed"]
    data = load_data(settings.data)
    _, _, reward = gflowgr.prepare(seed, data, settings)
    some = [u for u in range(0, len(data.train), -(-len(data.train) // users)) if len(data.train[u]) > 2]
    contexts = [data.train[u] for u in some]
    target = torch.tensor([data.histories[u][-2] for u in some])
    parts = [data.train[u][:2 * len(data.train[u]) // 3] for u in some]                    # contexts of training, for the CM
    following = [data.train[u][len(part):] for u, part in zip(some, parts)]                # without what came next in them
    cm = reward.cm.scores(contexts)
    step = -(-len(some) // few)

    def share(method, histories):
        policy = gflowgr.Policy.from_pretrained(Path(out) / f"{method}-{seed}")
        return torch.cat([distribution(policy, histories[i:i + 32], size=64)[0] for i in range(0, len(histories), 32)])

    def distance(method, histories, following=None):
        kl = divergence(reward.ids, reward.cm.scores(histories, following), without(share(method, histories), histories))
        return [f"{nats:.3f}" for nats in (kl.sum(), *kl)]

    codes = [f"code {level}" for level in range(1, reward.ids.num_levels + 1)]
    print("\nKL(CM ‖ policy) in nats, items of the history left out; of each code given those before it\n")
    print(markdown_table(["row", "at validation contexts", *codes, "at training contexts", *codes], [
        [method, *distance(method, contexts[::step]), *distance(method, parts[::step], following[::step])]
        for method in ROWS if (Path(out) / f"{method}-{seed}/row.json").exists()]), flush=True)
    sft, (w_a, w_y, _) = without(share("sft", contexts), contexts), reward.weights
    print("\nWhat SFT and the CM could be together, exact ranking\n")
    print(markdown_table(["ranked by", "NDCG@10"], [[name, f"{ndcg_at(score.topk(10).indices, target, 10).item():.4f}"] for name, score in (
        ("SFT", sft), ("CM", cm), ("w_a·SFT + w_ŷ·CM, the reward in expectation", w_a * sft + w_y * cm),
        ("SFT · CM^γ, what guiding ranks by", sft * cm ** settings.gamma))]))
    policy = gflowgr.Policy.from_pretrained(Path(out) / f"sft-{seed}").eval()
    print("\nNoise over signal of a step's gradient, at the SFT model\n")
    print(markdown_table(["loss", "tr Σ / ‖g‖²"], [["L_GR" if method == "sft" else method,
                                                   f"{gradient_noise(method, policy, reward, data, settings):.1f}"]
                                                  for method in ("sft", "sdpo", "db", "vargrad", "tb", "fm")]), flush=True)


if __name__ == "__main__":
    diagnose(sys.argv[1], *map(int, sys.argv[2:]))
