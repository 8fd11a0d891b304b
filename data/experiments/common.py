"""What the experiments share: made-up worlds, trainings that are kept, means, tables.

A finished training is kept in data/experiments/kept/NAME.json, under the data, method, seed and
flags that it was made with; delete this file to train anew. An experiment prints the tables of its
page. --check trains nothing: it fails if a table is not on its page. --quick is a smoke run."""
import argparse
import json
import runpy
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import gflowgr
from data import figures, load_data, report

PARSER = argparse.ArgumentParser()
PARSER.add_argument("--quick", action="store_true", help="a smoke run: 100 users, one epoch")
PARSER.add_argument("data", nargs="?", choices=["ml-100k", "beauty"], help="a real log")
PARSER.add_argument("--check", action="store_true", help="are the tables those of the page?")
ARGS, _ = PARSER.parse_known_args()
NAME = Path(sys.argv[0]).stem
TOY = runpy.run_path(str(ROOT / "data/toy/prepare.py"))
RUNS = Path("runs/quick" if ARGS.quick else "runs/experiments")     # worlds, saved models
LOG = ARGS.data or ("toy" if ARGS.quick else "ml-100k")
# Flags, the SFT, and what fine-tuned methods change, chosen on validation items; toy: a smoke run
CHOSEN = {"ml-100k": ("--width 96", "sft-log:rate=.003",
                      f":epochs={1 if ARGS.quick else 4}:dropout=0.2"),
          "beauty": ("--ids data/beauty/letter_ids.csv", "sft-log",
                     f":epochs={1 if ARGS.quick else 5}:dropout=0"),
          "toy": ("", "sft-log", ":epochs=1:dropout=0")}
KEPT = RUNS / f"{NAME}.json" if ARGS.quick else ROOT / f"data/experiments/kept/{NAME}.json"

def world(seed, **options):
    """The folder of a made-up world; options: num_users, items_per_theme, quality."""
    name = "-".join(["world", str(seed), *[f"{key}={value}" for key, value in options.items()]])
    if not ARGS.check and not (RUNS / name / "truth.csv").exists():
        TOY["write"](RUNS / name, seed=seed, **options)
    return str(RUNS / name)

def trained(data, methods, seeds=(42,), flags="", variant="", extra=None):
    """{method: [{metric: value} of each seed]}; trains what is not kept. methods: names, each SFT
    before those that go on from it. variant: a name for what the caller changed. extra(run,
    Dataset) → more metrics."""
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    found = {method: [] for method in methods}
    for seed in seeds[:1] if ARGS.quick else seeds:
        place = {method: f"{Path(data).name} {method} {seed} {flags} {variant}".strip()
                 for method in methods}
        missing = [method for method in methods if place[method] not in kept]
        if missing and ARGS.check:
            sys.exit(f"{NAME}: not trained yet: {place[missing[0]]}")
        if missing:
            argv = ["--data", data, *flags.split(), "--out", str(RUNS / Path(data).name)]
            settings = gflowgr.parse(argv + ["--quick"] * ARGS.quick)
            dataset = load_data(settings.data, settings.quick)
            needed, start = set(missing), ""            # what is missing, and the SFT before it
            for method in methods:
                start = method if method.startswith("sft") else start
                if method in missing and method.partition(":")[0] not in gflowgr.TEACHERS:
                    needed.add(start)
            names = [method for method in methods if method in needed]
            KEPT.parent.mkdir(parents=True, exist_ok=True)
            recipes = {name: gflowgr.recipe_of(name, settings.quick) for name in names}
            for run in gflowgr.runs_of(settings, dataset, seed, recipes):
                metrics = {**run["metrics"], "minutes": sum(run["seconds"].values()) / 60,
                           **(extra(run, dataset) if extra else {})}
                metrics["validation"] = run.get("validation", 0.0)
                kept[place[run["method"]]] = {key: round(x, 5) for key, x in metrics.items()}
                report.write(KEPT, json.dumps(kept, indent=0))
        for method in methods:
            found[method].append(kept[place[method]])
    return found

def over_worlds(seeds, methods, flags="", extra=None, **options):
    """What `trained` returns, with a run of each made-up world in place of each seed."""
    found = {method: [] for method in methods}
    for seed in seeds[:1] if ARGS.quick else seeds:
        for method, runs in trained(world(seed, **options), methods, flags=flags,
                                    extra=extra).items():
            found[method] += runs
    return found

def mean(runs, metric="ndcg@10", digits=3):
    """The mean of a metric over runs, as the pages write it: .333."""
    return f"{np.mean([run[metric] for run in runs]):.{digits}f}".replace("0.", ".", 1)

def point(runs):
    """A point of a picture: the means of NDCG@10 and liked@10."""
    return float(mean(runs)), float(mean(runs, "liked@10"))

def mean_and_spread(runs, metric):
    """The mean ± the standard deviation (of a sample; 0 for one run)."""
    spread = np.std([run[metric] for run in runs], ddof=min(1, len(runs) - 1))
    return f"{mean(runs, metric)} ± {spread:.3f}".replace("± 0.", "± .")

def table(page, header, rows):
    """Print a Markdown table; with --check, fail if it is not on the page, a path below the top."""
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
    print(f"\n{text}\n", flush=True)
    if ARGS.check and text not in (ROOT / page).read_text(encoding="utf-8"):
        sys.exit(f"{NAME}: this table is not in {page}")
