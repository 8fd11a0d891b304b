"""Does the gain last, if users are shown the lists? The committed world, two seeds.

    python data/experiments/loop.py

Exposure bias is a loop: lists are shown, what users like of them is logged, and new lists are
learned from this log. Each round adds the liked items of ten recommended ones, in random order, and
trains anew, with as many steps as at first. Draws data/pictures/loop.png."""
from dataclasses import replace

import numpy as np

import common
from common import ROOT, gflowgr, load_data
from data import figures
from reward import Teacher

METHODS = {"teacher": "svd:debias=.5", "counts": "cm:debias=.5", "sft": "sft", "tb": "tb"}

def model_of(name, settings, data, seed, share):
    """recommend of a method, trained on all of data.train; share: of each recipe's epochs."""
    ids = gflowgr.make_ids(settings, data, seed)
    settings.methods = name
    policy = None
    for method, recipe in gflowgr.recipes_of(settings).items():
        if method.partition(":")[0] in gflowgr.TEACHERS:
            return Teacher(recipe.teacher, data, recipe.debias, recipe.power).recommend
        sft = policy
        policy = gflowgr.make_policy(settings, data, ids, seed, recipe.dropout)
        if sft:
            policy.load_state_dict(sft.state_dict())
        recipe = replace(recipe, epochs=max(1, round(recipe.epochs * share)))
        gflowgr.train(method, recipe, policy, data, settings.batch, seed)
    return policy.eval().recommend

def shares_found(name, seed, quick):
    """Share of all liked items that the log holds, at first (round 0) and after each round."""
    settings = gflowgr.parse(["--quick"] * quick)
    data = load_data("toy", quick)
    liked = data.truth["liked"]
    log = [list(history) for history in data.histories]
    first = sum(map(len, log))
    rng = np.random.default_rng(seed)
    shares = {"0": first / sum(map(len, liked))}
    for number in range(1, 2 if quick else 6):
        data = replace(data, train=log, liked=[[True] * len(history) for history in log])
        recommend = model_of(name, settings, data, seed, first / sum(map(len, log)))
        # evaluate leaves the last item of each log out: here, there is one more
        _, ranked = gflowgr.evaluate(recommend, [[*items, 0] for items in log])
        for user, items in enumerate(ranked.tolist()):
            hits = [item for item in items if item in liked[user]]
            log[user] = rng.permutation(log[user] + hits).tolist()
        shares[str(number)] = sum(map(len, log)) / sum(map(len, liked))
    return shares

def main(lab):
    """Train what is not kept; print the shares, draw the picture."""
    lines = {}
    for name, method in METHODS.items():
        runs = [lab.keep(f"{method} {seed}", lambda: shares_found(method, seed, lab.quick))
                for seed in (42, 43)[:1 if lab.quick else 2]]
        lines[name] = [(int(number), float(np.mean([run[number] for run in runs])))
                       for number in runs[0]]
        print(name, [round(y, 3) for _, y in lines[name]])
    if not lab.check:
        path = lab.runs / "loop.png" if lab.quick else ROOT / "data/pictures/loop.png"
        title = "Of all items that users like, how many are in the log?"
        figures.plot_lines(path, {title: lines}, "round", [x for x, _ in lines["tb"]])

if __name__ == "__main__":
    main(common.Lab())
