"""Should I serve it? Who chooses candidates for a slow teacher: the committed world, three seeds.

    python data/experiments/serve.py

A slow teacher can only order a few items at each request. It orders the 20 or 50 best items of a
model, and the ten that it ranks first are recommended. `cm` counts which item follows which."""
import time

import common
from common import gflowgr, load_data, mean, report
from reward import Teacher

METHODS = {"counts, `cm:debias=.5`": "cm:debias=.5", "`sft`": "sft", "`tb`": "tb",
           "the teacher itself": "svd:debias=.5"}
teacher = Teacher("svd", load_data("toy"), debias=0.5)

def measured(run, data, folder):
    """Both measures when the teacher orders the k best items of a run's method; its seconds."""
    name, _, debias = run["method"].partition(":debias=")
    if name in gflowgr.TEACHERS:
        model = Teacher(name, data, float(debias))
    else:
        model = gflowgr.Policy.from_pretrained(folder / f"{run['method']}-{run['seed']}")
    found = {}
    for k in (20, 50):
        def recommend(past):
            items, _ = model.recommend(past, k)
            scores, order = teacher.scores(past).gather(1, items).topk(10)
            return items.gather(1, order), scores
        by_user, ranked = gflowgr.evaluate(recommend, data.histories)
        metrics = report.means(by_user | report.exposure(ranked.tolist(), data),
                               ranked.tolist(), data)
        found |= {f"ndcg of {k}": metrics["ndcg@10"], f"liked of {k}": metrics["liked@10"]}
    started = time.time()
    gflowgr.evaluate(model.recommend, data.histories[:1000])
    return found | {"seconds": time.time() - started}

def main(lab):
    """Train what is not kept; print the table."""
    found = lab.trained("toy", [*METHODS.values()], (42, 43, 44),
                        extra=lambda run, data: measured(run, data, lab.runs / "toy"))
    rows = []
    for label, method in METHODS.items():
        runs = found[method]
        cells = [f"{mean(runs, ndcg)}, {mean(runs, liked)}" for ndcg, liked in (
            ("ndcg@10", "liked@10"), ("ndcg of 20", "liked of 20"), ("ndcg of 50", "liked of 50"))]
        rows.append([label, *cells, mean(runs, "seconds", 1), mean(runs, "minutes", 1)])
    lab.table("data/results.md", ["NDCG@10, liked@10 of", "alone", "20 ordered", "50 ordered",
                                  "seconds for 1,000 users", "minutes to train"], rows)

if __name__ == "__main__":
    main(common.Lab())
