"""What does the paper's recipe gain, and what stands in its way? Worlds 21 to 23, seed 42.

    python data/experiments/paper_recipe.py     25 minutes on one core

From the paper's settings, as we read them, to those of `tb`, one change a row; then the middle row
with one change taken back or made. v is the item that was logged next."""
from common import mean, over_worlds, table

MIDDLE = "paper:logged=0:debias=.5:sharp=3:lam=.3"
STEPS = {"`sft`": "sft", "`paper`": "paper", "λ .3": "paper:lam=.3",
         "v not in L_TB": "paper:logged=0:lam=.3", "δ .5": "paper:logged=0:debias=.5:lam=.3",
         "`sharp` 3 (the middle row)": MIDDLE,
         "three items from P": MIDDLE + ":sampler=policy_draws",
         "λ 10": MIDDLE.replace("lam=.3", "lam=10") + ":sampler=policy_draws",
         "eight items, exact Z, no dropout: `tb`": "tb"}
CHANGES = {"v in L_TB": "paper:debias=.5:sharp=3:lam=.3", "δ 0": "paper:logged=0:sharp=3:lam=.3",
           "`sharp` 1": "paper:logged=0:debias=.5:lam=.3", "exact Z": MIDDLE + ":exact=1",
           "no dropout": MIDDLE + ":dropout=0", "eight items": MIDDLE + ":trajectories=8",
           "λ 1": MIDDLE.replace("lam=.3", "lam=1"), "λ 10": MIDDLE.replace("lam=.3", "lam=10")}
SAMPLERS = {name: "paper:lam=.3:sampler=" + name for name in ("session", "uniform", "policy_beam")}
methods = dict.fromkeys([*STEPS.values(), *CHANGES.values(), *SAMPLERS.values()])
found = over_worlds((21, 22, 23), [*methods])

def row(label, method, base):
    """A row of the table: both measures, and the difference from the base in %."""
    cells = []
    for metric in ("ndcg@10", "liked@10"):
        own, other = [sum(run[metric] for run in found[name]) for name in (method, base)]
        cells += [mean(found[method], metric), f"{own / other - 1:+.0%}"]
    return [label, *cells]

HEADER = ["NDCG@10", "over `sft`", "liked@10", "over `sft`"]
table("data/results.md", ["each row keeps the changes above it", *HEADER],
      [row(label, method, "sft") for label, method in STEPS.items()])
table("data/results.md", ["the middle row with one change", *[
    cell.replace("over `sft`", "over the middle row") for cell in HEADER]],
      [row(label, method, MIDDLE) for label, method in CHANGES.items()])
table("data/results.md", ["`paper:lam=.3` with another sampler", *HEADER],
      [row(f"`{label}`", method, "sft") for label, method in SAMPLERS.items()])
