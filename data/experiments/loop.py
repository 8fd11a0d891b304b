"""Does the gain last, if users are shown the lists? The committed world, two seeds.

    python data/experiments/loop.py             20 minutes on one core

Exposure bias is a loop: lists are shown, what users like of them is logged, and new lists are
learned from this log. Each round adds the liked items of ten recommended ones, in random order, and
trains anew, with as many steps as at first. Draws data/pictures/loop.png."""
from dataclasses import replace

import numpy as np

from common import ARGS, KEPT, ROOT, RUNS, figures, gflowgr, json, load_data, report, sys, table
from reward import Teacher

METHODS = ["svd", "svd:debias=.5", "cm:debias=.5", "sft", "tb", "product"]
ROUNDS = 1 if ARGS.quick else 5

def model_of(name, settings, data, seed, epochs):
    """recommend of a method, trained on all of data.train; epochs: of each recipe, a factor."""
    rows = list(gflowgr.training_rows(data.train, settings.window))
    size = min(settings.batch, -(-len(rows) // 20))
    ids = gflowgr.make_ids(settings, data, seed)
    sft = None
    for method, recipe in gflowgr.recipes_of(replace(settings, methods=name)).items():
        teacher = Teacher(recipe.teacher, data, recipe.debias, recipe.sharp)
        if method == "product":
            return lambda past: sft.recommend(past, guide=teacher.scores(past))
        if method.partition(":")[0] in gflowgr.TEACHERS:
            return teacher.recommend
        recipe.epochs = max(1, round(recipe.epochs * epochs))
        policy = gflowgr.make_policy(settings, data, ids, seed, recipe.dropout)
        if sft:
            policy.load_state_dict(sft.state_dict())
        def nothing(policy, data):                              # no item is kept for validation
            return 0.0
        gflowgr.train(method, recipe, policy, rows, size, data, seed, nothing)
        sft = policy
    return sft.recommend

def found(name, seed):
    """Share of all liked items that the log holds, at first and after each round."""
    settings = gflowgr.parse(["--quick"] * ARGS.quick)
    data = load_data("toy", ARGS.quick)
    liked = data.truth["liked"]
    log = [list(history) for history in data.histories]
    first = sum(map(len, log))
    rng = np.random.default_rng(seed)
    shares = [first / sum(map(len, liked))]
    for _ in range(ROUNDS):
        data = replace(data, train=log, liked=[[True] * len(history) for history in log])
        recommend = model_of(name, settings, data, seed, first / sum(map(len, log)))
        for user, items in enumerate(gflowgr.rank_all(recommend, log).tolist()):
            hits = [item for item in items if item in liked[user]]
            log[user] = rng.permutation(log[user] + hits).tolist()
        shares.append(sum(map(len, log)) / sum(map(len, liked)))
    return shares

kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
for name in METHODS:
    for seed in (42, 43)[:1 if ARGS.quick else 2]:
        if f"{name} {seed}" not in kept:
            if ARGS.check:
                sys.exit(f"loop: not trained yet: {name} {seed}")
            kept[f"{name} {seed}"] = found(name, seed)
            KEPT.parent.mkdir(parents=True, exist_ok=True)
            report.write(KEPT, json.dumps(kept, indent=0))
lines = {name: np.mean([shares for key, shares in kept.items() if key[:-3] == name], 0)
         for name in METHODS}
rounds = range(1, ROUNDS + 1, 2)
table("data/results.md", ["after round", *rounds],
      [[f"`{name}`", *[f"{lines[name][r]:.3f}"[1:] for r in rounds]] for name in METHODS])
if not ARGS.check:
    path = RUNS / "loop.png" if ARGS.quick else ROOT / "data/pictures/loop.png"
    figures.plot_lines(path, {name: list(enumerate(shares)) for name, shares in lines.items()},
                       "round", "share of liked items found")
