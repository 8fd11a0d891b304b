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
sys.path[:0] = [str(ROOT), str(ROOT / "data/experiments")]
import gflowgr
import rivals                                                   # registers its methods
from data import load_data, report

class Lab:
    """One run of an experiment: its flags, its worlds, its kept trainings."""
    def __init__(self, **flags):
        """flags: further ones, {name: its choices}; None: a switch."""
        parser = argparse.ArgumentParser()
        parser.add_argument("--quick", action="store_true", help="a smoke run, one seed or world")
        parser.add_argument("--check", action="store_true", help="are the tables on their pages?")
        for name, choices in flags.items():
            parser.add_argument(name, **({"nargs": "*", "choices": choices, "default": choices}
                                         if choices else {"action": "store_true"}))
        self.args = parser.parse_args()
        self.quick, self.check = self.args.quick, self.args.check
        self.name = Path(sys.argv[0]).stem
        self.runs = Path("runs/quick" if self.quick else "runs/experiments")
        kept = ROOT / "data/experiments/kept"
        self.file = (self.runs if self.quick else kept) / f"{self.name}.json"
        old = self.file.exists() and not self.quick
        self.kept = json.loads(self.file.read_text()) if old else {}

    def world(self, seed, **options):
        """The folder of a made-up world; options: num_users, items_per_theme, quality."""
        options = {"num_users": 1400} | options
        name = "-".join(["world", str(seed), *[f"{key}={x}" for key, x in options.items()]])
        if not self.check and not (self.runs / name / "truth.csv").exists():
            toy = runpy.run_path(str(ROOT / "data/toy/prepare.py"))
            toy["write"](self.runs / name, seed=seed, **options)
        return str(self.runs / name)

    def keep(self, place, make):
        """The kept figures {metric: value} under a place; make() if there are none yet."""
        if place not in self.kept:
            if self.check:
                sys.exit(f"{self.name}: not made yet: {place}")
            figures = {key: round(float(x), 5) for key, x in make().items()}
            self.kept[place] = figures
            self.file.parent.mkdir(parents=True, exist_ok=True)
            report.write(self.file, json.dumps(self.kept, indent=0))
        return self.kept[place]

    def trained(self, data, methods, seeds=(42,), flags="", extra=None):
        """{method: [{metric: value} of each seed]}; trains what is not kept. methods: as --methods
        has them, each after the SFT that it goes on from; product:power=9 trains nothing.
        extra(run, Dataset) → more metrics."""
        found = {method: [] for method in methods}
        for seed in seeds[:1] if self.quick else seeds:
            places = {method: " ".join(f"{Path(data).name} {method} {seed} {flags}".split())
                      for method in methods}
            if not self.check and any(place not in self.kept for place in places.values()):
                self.train(data, places, seed, flags, extra)
            for method, place in places.items():
                found[method].append(self.keep(place, None))
        return found

    def train(self, data, places, seed, flags, extra):
        """Train the methods {name: place} that are not kept, and the SFT before each."""
        out = self.runs / Path(data).name
        settings = gflowgr.parse(["--data", data, *flags.split(), "--out", str(out)]
                                 + ["--quick"] * self.quick)
        dataset = load_data(settings.data, settings.quick)
        needed, products, sft = set(), {}, ""                   # products: {name: its SFT}
        for method, place in places.items():
            sft = method if method.startswith("sft") else sft
            if place not in self.kept:
                untrained = method.partition(":")[0] in gflowgr.TEACHERS
                needed |= {method} if untrained else {method, sft}
                products |= {method: sft} if method.startswith("product") else {}
        recipes = {name: gflowgr.recipe_of(name, settings.quick) for name in places
                   if name in needed and name not in products}
        def runs():
            yield from gflowgr.runs_of(settings, dataset, seed, recipes)
            for name, base in products.items():
                yield rivals.measured(name, dataset, saved(out, base, seed), seed)
        for run in runs():
            more = {"minutes": sum(run["seconds"].values()) / 60,
                    "validation": run.get("validation", 0.0)}
            more |= extra(run, dataset) if extra else {}
            self.keep(places[run["method"]], lambda: run["metrics"] | more)

    def over_worlds(self, seeds, methods, flags="", extra=None, **options):
        """What `trained` returns, with a run of each made-up world in place of each seed."""
        found = {method: [] for method in methods}
        for seed in seeds[:1] if self.quick else seeds:
            there = self.trained(self.world(seed, **options), methods, (42,), flags, extra)
            for method in methods:
                found[method] += there[method]
        return found

    def table(self, page, header, rows):
        """Print a Markdown table; --check fails if it is not on the page, a path below the top."""
        lines = [header, ["---"] * len(header), *rows]
        text = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
        print(f"\n{text}\n", flush=True)
        if self.check and text not in (ROOT / page).read_text(encoding="utf-8"):
            sys.exit(f"{self.name}: this table is not in {page}")

def saved(out, method, seed):
    """Where a run saves a trained method."""
    return Path(out) / f"{method.replace(':', ',')}-{seed}"

def mean(runs, metric="ndcg@10", digits=3):
    """The mean of a metric over runs, as the pages write it: .333."""
    return f"{np.mean([run[metric] for run in runs]):.{digits}f}".replace("0.", ".", 1)

def mean_and_spread(runs, metric="ndcg@10"):
    """The mean ± the standard deviation (of a sample; 0 for one run)."""
    spread = np.std([run[metric] for run in runs], ddof=min(1, len(runs) - 1))
    return f"{mean(runs, metric)} ± {spread:.3f}".replace("± 0.", "± .")
