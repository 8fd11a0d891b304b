"""Who should choose candidates for the teacher? The committed world, three seeds.

    python data/experiments/candidates.py       12 minutes on one core

A slow teacher can only order a few items at each request. It orders the 20 or 50 best items of a
model, or of counts of which item follows which (`cm`), and the ten that it ranks first are
recommended."""
from common import RUNS, gflowgr, load_data, mean, table, trained
from reward import Teacher

METHODS = ["cm", "cm:debias=.5", "sft", "tb", "distill", "listnet", "grpo"]
teacher = Teacher("svd", load_data("toy"), debias=0.5)

def ordered(run, data):
    """Both measures when the teacher orders the k best items of this run's method."""
    if run["method"].startswith("cm"):
        model = Teacher("cm", data, run["recipe"]["debias"])
    else:
        model = gflowgr.Policy.from_pretrained(RUNS / "toy" / f"{run['method']}-{run['seed']}")
    found = {}
    for k in (20, 50):
        def recommend(past):
            items, _ = model.recommend(past, k)
            best, order = teacher.scores(past).gather(1, items).topk(10)
            return items.gather(1, order), best
        metrics, *_ = gflowgr.evaluate(recommend, data)
        found |= {f"ndcg of {k}": metrics["ndcg@10"], f"liked of {k}": metrics["liked@10"]}
    return found

found = trained("toy", METHODS, seeds=(42, 43, 44), extra=ordered)
rows = [[f"`{name}`", *[mean(found[name], metric) for metric in (
    "ndcg@10", "liked@10", "ndcg of 20", "liked of 20", "ndcg of 50", "liked of 50")]]
        for name in METHODS]
table("data/results.md", ["model", "alone: NDCG@10", "liked@10", "20 ordered: NDCG@10", "liked@10",
                          "50 ordered: NDCG@10", "liked@10"], rows)
