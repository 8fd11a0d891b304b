"""Other worlds, other IDs: two worlds a row, seed 42.

    python data/experiments/other_worlds.py     20 minutes on one core

Half as many items, popularity that is chance (quality 0) or merit (1), IDs of one code, IDs of text
alone."""
from common import mean, over_worlds, table

METHODS = ["svd:debias=.5", "sft", "tb", "distill"]
CASES = {"as the committed world": ((21, 22), {}, ""),
         "30 items a theme": ((31, 32), dict(items_per_theme=30), ""),
         "quality 0: popularity is chance": ((35, 36), dict(quality=0), ""),
         "quality 1: popularity is merit": ((37, 38), dict(quality=1), ""),
         "IDs of one code": ((21, 22), {}, "--levels 1 --codes 720"),
         "IDs of text alone": ((21, 22), {}, "--ids content")}
cells = {metric: [] for metric in ("ndcg@10", "liked@10")}
for label, (seeds, options, flags) in CASES.items():
    found = over_worlds(seeds, METHODS, flags, **options)
    for metric, rows in cells.items():
        rows.append([label, *[mean(found[method], metric) for method in METHODS]])
for metric, rows in cells.items():
    title = {"ndcg@10": "NDCG@10"}.get(metric, metric)
    table("data/results.md", [title, *[f"`{method}`" for method in METHODS]], rows)
