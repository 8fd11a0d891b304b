"""The paper's studies: fine-tune again and again from one SFT model, with one thing changed; a table and a picture."""
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.inputs import InputError, check_out, load_data, read_json
from data.report import markdown_table, picture, write_json


def studies(settings):
    """{study: {label: the settings that differ}}."""
    w_a, w_y, w_s = settings.weights.split(",")
    return {
        "lam": {f"λ = {v}": {"lam": v} for v in (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)},
        "trajectories": {f"N = {v}": {"trajectories": v} for v in (0, 1, 3, 5, 8)},
        "positions": {f"M = {v}": {"positions": v} for v in (1, 3, 6, 10)},
        "reward": {"all three signals": {},
                   "no action": {"weights": f"0,{w_y},{w_s}"},
                   "no CM in the reward": {"weights": f"{w_a},0,{w_s}"},
                   "no similarity": {"weights": f"{w_a},{w_y},0"},
                   "no augmentation": {"trajectories": 0},
                   "no CM at all": {"weights": f"{w_a},0,{w_s}", "sampler": "random"}},
        "sampler": {v: {"sampler": v} for v in ("curriculum", "random", "session", "policy", "mixture")},
        "gamma": {f"γ = {v}": {"gamma": v} for v in (0.5, 1.0, 2.0, 4.0)},
        "debias": {f"δ = {v}": {"debias": v} for v in (0.0, 0.5, 1.0, 1.5, 2.0)},
    }


def sweep(name, settings, run):
    """Run one study for the fine-tuned and guided rows of --methods; OUT/sweep-NAME.md and .png. Finished runs are kept.

    The figure is the validation NDCG@10 of the best epoch, mean ± standard deviation over seeds: a study is there to
    choose by, and what is chosen by test figures is no test. In the toy world, hidden@10 stands beside it.
    """
    known = studies(settings)
    if name not in known:
        raise InputError(f"--sweep: unknown study {name!r}; choose of {', '.join(known)}")
    methods = [m for m in settings.methods.split(",") if m not in ("pop", "cm", "sft", "sft-continued")]
    if not methods:
        raise InputError("--sweep needs a row that it changes in --methods, such as tb, or sft+cm for gamma and debias")
    missing = [seed for seed in settings.seeds.split(",") if not (Path(settings.out) / f"sft-{seed}" / "row.json").exists()]
    if missing and (Path(settings.out) / "results.json").exists():
        raise InputError(f"--sweep starts from the SFT models in {settings.out}, which has none for seed {','.join(missing)}; "
                         "run them there first, without --sweep, or choose another --out")
    if missing:
        run(replace(settings, methods="sft"))
    check_out(settings, load_data(settings.data), resume=True)   # else a study would start from models of other settings
    figures = {}
    for label, changes in tqdm(known[name].items(), desc=f"sweep {name}", disable=None):
        variant = replace(settings, methods=",".join(methods), out=f"{settings.out}/sweep-{name}/{label.replace(' ', '')}", **changes)
        out = Path(variant.out)
        for folder in Path(settings.out).glob("sft-[0-9]*"):   # all start from the same SFT models
            if not (out / folder.name).exists():
                shutil.copytree(folder, out / folder.name)
        if not (out / "results.json").exists():                # what --resume knows a folder's settings by
            write_json(out / "results.json", {**read_json(Path(settings.out) / "results.json"), "settings": asdict(variant)})
        results = run(variant, resume=True)
        for method in methods:
            rows = [row for row in results["runs"] if row["method"] == method]
            figures.setdefault(method, {})[label] = [row["validation"] for row in rows]
            if "hidden@10" in rows[0]["metrics"]:              # the toy world tells what no log can
                figures.setdefault(f"{method}: hidden@10", {})[label] = [row["metrics"]["hidden@10"] for row in rows]
    methods = list(figures)
    rows = [[label] + [f"{np.mean(figures[m][label]):.4f} ± {np.std(figures[m][label], ddof=len(figures[m][label]) > 1):.4f}"
                       for m in methods] for label in known[name]]
    table = markdown_table([name, *methods], rows)
    path = Path(settings.out) / f"sweep-{name}.md"
    path.write_text(table + "\n", encoding="utf-8")
    _plot(name, figures, path.with_suffix(".png"))
    return table + f"\n\nvalidation NDCG@10 where no other figure is named, {len(settings.seeds.split(','))} seeds; also in {path} and {path.with_suffix('.png')}"


def _plot(name, figures, path):
    with picture(path, figsize=(7, 3.5)) as axis:
        for i, (method, by_label) in enumerate(figures.items()):
            place = np.arange(len(by_label)) + 0.1 * i
            axis.errorbar(place, [np.mean(v) for v in by_label.values()], [np.std(v, ddof=len(v) > 1) for v in by_label.values()],
                          fmt="o", capsize=3, label=method)
        axis.set_xticks(range(len(by_label)), by_label, rotation=20)
        axis.set_ylabel("validation NDCG@10, or as named"), axis.set_title(f"study: {name}"), axis.legend()
