"""Does a denser real log help? One training each.

    python data/experiments/dense.py ml-100k        20 minutes on one core
    python data/experiments/dense.py beauty         40 minutes on one core

The log is cut to the items that most users took: the fewer items, the more users took each. Which
items these are is counted with the test items, the same for every method. Data and settings are
those of real_logs.py, but for K, whose default goes by the number of items."""
import csv
from collections import Counter

from common import ARGS, CHOSEN, LOG, ROOT, RUNS, mean, table, trained

SIZES = {"ml-100k": (300, 800), "beauty": (300, 1000, 3000), "toy": (100,)}[LOG]
FLAGS, SFT, CHANGES = CHOSEN[LOG]
METHODS = ["blend", SFT, "tb-log" + CHANGES, "product-log"]

def rows_of(name):
    """The names of the columns, and the rows of a CSV file of the whole log."""
    with open(ROOT / "data" / LOG / name, newline="", encoding="utf-8") as file:
        names, *rows = csv.reader(file)
    return names, rows

def cut(n):
    """The folder of the log cut to its n most taken items. When it is read, users who are left with
    less than three items are dropped."""
    folder = RUNS / f"{LOG}-{n}"
    if not ARGS.check:
        folder.mkdir(parents=True, exist_ok=True)
        names, events = rows_of("interactions.csv")
        place = names.index("item_id")
        most = Counter(row[place] for row in events).most_common(n)
        kept = {item for item, _ in most}
        for name in ("interactions.csv", "items.csv"):
            names, rows = rows_of(name)
            place = names.index("item_id")
            with open(folder / name, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([names, *[row for row in rows if row[place] in kept]])
    return str(folder)

def size_of(run, data):
    """How many users, and how often an item was taken in training, in the mean."""
    return {"users": len(data.train), "takes": sum(map(len, data.train)) / len(data.titles)}

rows = []
for n in SIZES:
    found = trained(cut(n), METHODS, flags=FLAGS, extra=size_of)
    [run] = found["blend"]
    rows.append([f"{n:,}", f"{run['users']:,}", round(run["takes"]),
                 *[mean(found[method]) for method in METHODS]])
table("data/results.md", [f"{LOG}: items", "users", "users who took an item", "`blend`", "`sft`",
                          "`tb`", "`product`"], rows)
