"""Are the lists diverse? The committed world, three seeds.

    python data/experiments/diversity.py        12 minutes on one core

Of a user's three themes, how many are in the ten items? In the best list, and in a list that is
drawn from P. Draws data/pictures/diverse.png."""
from functools import partial

import numpy as np
import torch

from common import ARGS, ROOT, RUNS, figures, gflowgr, mean, report, table, trained

METHODS = ["svd:debias=.5", "sft", "grpo", "tb", "listnet", "distill"]

def drawn(run, data):
    """Both measures of lists that are drawn from P."""
    folder = RUNS / "toy" / f"{run['method']}-{run['seed']}"
    if not folder.exists():                                     # a teacher has no P
        return {}
    policy = gflowgr.Policy.from_pretrained(folder)
    torch.manual_seed(run["seed"])
    past = [history[:-1] for history in data.histories]
    lists = gflowgr.rank_all(partial(policy.recommend, sample=True), past)
    found = report.exposure(lists.numpy(), data)
    return {f"drawn {key}": float(np.mean(values)) for key, values in found.items()}

found = trained("toy", METHODS, seeds=(42, 43, 44), extra=drawn)
KINDS = ["themes@10", "liked@10", "drawn themes@10", "drawn liked@10"]
rows = []
for name in METHODS:
    kinds = KINDS[:2] if name.startswith("svd") else KINDS
    cells = [mean(found[name], kind, 2 if "themes" in kind else 3) for kind in kinds]
    rows.append([f"`{name}`", *cells, *[""] * (4 - len(cells))])
table("data/results.md", ["method", "best list: themes", "liked@10", "drawn list: themes",
                          "liked@10"], rows)
lines = {}
for name in METHODS:
    numbers = {kind: float(np.mean([run[kind] for run in found[name]])) for kind in KINDS
               if kind in found[name][0]}
    lines[name] = [(numbers["themes@10"], numbers["liked@10"])]
    if "drawn liked@10" in numbers:
        lines[name].append((numbers["drawn themes@10"], numbers["drawn liked@10"]))
if not ARGS.check:
    path = RUNS / "diverse.png" if ARGS.quick else ROOT / "data/pictures/diverse.png"
    figures.plot_lines(path, lines, "themes of the user in the list", "liked@10")
