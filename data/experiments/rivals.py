"""Rivals: losses that are not the paper's, registered as a student's own would be, and `product`.

    python data/experiments/rivals.py --methods sft,tb,vargrad,listnet,distill,grpo

The flags are those of gflowgr.py. At the end, each `sft` of the run is told with `product`, which
trains nothing: P of SFT times a teacher's score."""
import sys
from pathlib import Path

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import gflowgr
from data import load_data, report
from gflowgr import METHODS, Policy, Recipe, log_ref_of
from reward import Teacher
from tokenizer import look_up

# --- Losses that make P = R/Z ---------------------------------------------------------------------
def vargrad(log_pf, log_r):
    """VarGrad (Richter et al. 2020), TB that needs no log Z: log P, log R of paths (C, J) → scalar.
    At P = R/Z, log P − log R is −log Z on all paths of a context: its variance has to be 0.
    Mean over contexts of the variance (with 1/J) of log P − log R."""
    return (log_pf - log_r).var(1, correction=0).mean()

def listnet(log_pf, log_r):
    """ListNet (Cao et al. 2007): log P, log R of paths (C, J) → scalar. Among these J items alone,
    P shall have the shares of R; so it needs no Z, and no R of other items.
    Mean over contexts of KL(q ‖ p), q = R / Σ R and p = P / Σ P over the J paths."""
    log_p = log_pf.log_softmax(1)
    log_q = log_r.log_softmax(1)
    return functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True)

def distillation(child_flow, log_probs):
    """Ours → scalar. At each prefix of a path, the flow F divides among the next codes: q(c) is the
    share of code c, and P_F shall be q, for all codes. (TB and DB see those of the path alone.)
    child_flow (C, J, L, K): F after each code; log_probs (C, J, L, K): log P_F of each code.
    Mean over paths of Σ_l KL(q ‖ P_F) = Σ_l Σ_c q(c) · (log q(c) − log P_F(c | s_l))."""
    q = child_flow / child_flow.sum(-1, keepdim=True)           # 0 for an illegal code
    return (q * (q.clamp(min=1e-30).log() - log_probs)).sum((-2, -1)).mean()

# --- One that does not ----------------------------------------------------------------------------
def grpo(log_pf, log_ref, reward, beta):
    """GRPO (Shao et al. 2024), reinforcement learning: log P, log P_ref, a reward (ours: log R) of
    paths (C, J) → scalar. Paths with a reward above the mean become likelier, but P stays near
    P_ref, that of SFT.
    A = (reward − mean) / std, over a context's J paths; std with J − 1, at least 1e-8.
    Mean over paths of β · (x − log x − 1) − A · log P, x = P_ref / P."""
    std = reward.std(1, keepdim=True).clamp(min=1e-8)
    advantage = (reward - reward.mean(1, keepdim=True)) / std
    log_x = log_ref - log_pf
    # Ours: each step learns from new draws. So GRPO's ratio, P to P when drawn, is 1
    return (beta * (log_x.exp() - log_x - 1) - advantage * log_pf).mean()

# --- Methods: a loss reads a Paths ----------------------------------------------------------------
def vargrad_loss(p):
    """VarGrad of a Paths p."""
    return vargrad(p.log_pf, p.log_r)

def listnet_loss(p):
    """ListNet of a Paths p."""
    return listnet(p.log_pf, p.log_r)

def distill_loss(p):
    """Distillation of a Paths p."""
    ids = p.policy.semantic_ids
    child = ids.next_node[ids.nodes[p.items][..., :-1]]         # (C, J, L, K) nodes; −1 is none
    return distillation(look_up(ids.flows(p.batch.r), child), p.log_probs)

def grpo_loss(p):
    """GRPO of a Paths p."""
    return grpo(p.log_pf, log_ref_of(p), p.log_r, p.recipe.beta)

METHODS |= {
    "vargrad": Recipe(vargrad_loss, lam=3.0, dropout=0.1, trajectories=16, epochs=8),
    "listnet": Recipe(listnet_loss, lam=300.0, dropout=0.1, epochs=8),
    "distill": Recipe(distill_loss, lam=30.0, dropout=0.2, trajectories=4, epochs=8),
    "grpo": Recipe(grpo_loss, lam=1.0, beta=0.01, trajectories=16)}

# --- What trains nothing --------------------------------------------------------------------------
def product(policy, teacher, k=100):
    """A recommend(histories): the teacher's k best items, in the order of P · score."""
    def recommend(histories):
        items, scores = teacher.recommend(histories, k)                             # (B, k)
        there = items.clamp(min=0).to(policy.tokens.device)
        log_p = policy.path_log_probs(policy.know(histories), there).sum(2).cpu()
        both = (log_p + scores.clamp(min=1e-30).log()).masked_fill(items < 0, -torch.inf)
        best = both.topk(10, 1)
        return items.gather(1, best.indices), best.values
    return recommend

def product_of(name, data, folder):
    """`product` of a name like product:debias=.75:power=15, with the SFT that a folder holds."""
    fields = dict(change.split("=") for change in name.split(":")[1:])
    teacher = Teacher(fields.get("teacher", "svd" if data.truth else "blend"), data,
                      float(fields.get("debias", 0.75 if data.truth else 0.0)),
                      float(fields.get("power", 15.0 if data.truth else 9.0)))
    return product(Policy.from_pretrained(folder), teacher)

def measured(name, data, folder, seed):
    """A run of `product`, as results.json has it, and the folder of its SFT; see product_of."""
    by_user, ranked = gflowgr.evaluate(product_of(name, data, folder), data.histories)
    lists = ranked.tolist()
    by_user |= report.exposure(lists, data)
    return {"method": name, "seed": seed, "sft": folder, "by_user": by_user, "lists": lists,
            "metrics": report.means(by_user, lists, data), "seconds": {}}

if __name__ == "__main__":
    settings = gflowgr.parse(sys.argv[1:])
    status = gflowgr.main(settings)
    if status == 0 and "sft" in gflowgr.recipes_of(settings):
        data = load_data(settings.data, settings.quick)
        for seed in settings.seeds:
            metrics = measured("product", data, f"{settings.out}/sft-{seed}", seed)["metrics"]
            print(f"product, seed {seed}:", {name: round(x, 4) for name, x in metrics.items()})
    sys.exit(status)
