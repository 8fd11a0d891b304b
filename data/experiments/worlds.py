"""Other worlds, other IDs? Two worlds a row, seed 42.

    python data/experiments/worlds.py

Half as many items, popularity that is chance (quality 0) or merit (1), IDs of one or of three
codes, IDs of text alone."""
import common
from common import mean

METHODS = ["svd:debias=.5", "sft", "tb"]
CASES = {"as the committed world": ((21, 22), {}, ""),
         "30 items a theme": ((31, 32), dict(items_per_theme=30), ""),
         "quality 0: popularity is chance": ((35, 36), dict(quality=0), ""),
         "quality 1: popularity is merit": ((37, 38), dict(quality=1), ""),
         "IDs of one code": ((21, 22), {}, "--levels 1 --codes 720"),
         "IDs of three codes": ((21, 22), {}, "--levels 3 --codes 32"),
         "IDs of text alone": ((21, 22), {}, "--ids content")}

def main(lab):
    """Train what is not kept; print the table."""
    rows = []
    for label, (seeds, options, flags) in CASES.items():
        found = lab.over_worlds(seeds, METHODS, flags, **options)
        rows.append([label, *[mean(found[method], metric) for metric in ("ndcg@10", "liked@10")
                              for method in METHODS]])
    names = ["teacher", "`sft`", "`tb`"]
    lab.table("data/results.md", ["", *[f"NDCG@10: {names[0]}", *names[1:]],
                                  *[f"liked@10: {names[0]}", *names[1:]]], rows)

if __name__ == "__main__":
    main(common.Lab())
