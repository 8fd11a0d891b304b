"""What does the paper's recipe gain, and what stands in its way? Worlds 21 to 23, seed 42.

    python data/experiments/paper_recipe.py     50 minutes on one core

From the paper's settings, as we read them, to those of `tb`, one change a row; then `tb` with one
setting of the paper, and the middle row with one change. v is the item that was logged next."""
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
BACK = {"v in L_TB": "tb:logged=1", "δ 0": "tb:debias=0", "`sharp` 1": "tb:sharp=1",
        "items from the curriculum": "tb:sampler=curriculum", "three items": "tb:trajectories=3",
        "λ 1": "tb:lam=1", "learned Z": "tb:exact=0", "dropout .4": "tb:dropout=.4"}
SAMPLERS = {name: "paper:lam=.3:sampler=" + name for name in ("session", "uniform", "policy_beam")}
methods = dict.fromkeys([*STEPS.values(), *BACK.values(), *CHANGES.values(), *SAMPLERS.values()])
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
for base, changed, title in (("tb", BACK, "`tb`"), (MIDDLE, CHANGES, "the middle row")):
    header = [cell.replace("`sft`", title) for cell in HEADER]
    table("data/results.md", [f"{title} with one change", *header],
          [row(label, method, base) for label, method in changed.items()])
table("data/results.md", ["`paper:lam=.3` with another sampler", *HEADER],
      [row(f"`{label}`", method, "sft") for label, method in SAMPLERS.items()])
