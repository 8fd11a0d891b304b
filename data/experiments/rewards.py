"""Which teacher, which signal? The committed world, two seeds.

    python data/experiments/rewards.py          20 minutes on one core

R with another teacher, without the logged action (w_a 0), without a teacher (w_ŷ 0), without the
similarity of IDs (w_s 0): does P follow R, up and down?"""
from common import mean, table, trained

LOSSES = ["tb", "distill"]
SIGNALS = {"`svd`, δ .5": "", "without the logged action": ":w_a=0:w_y=.95",
           "without similar IDs": ":w_s=0:w_y=.8", "`cm`, δ .5": ":teacher=cm",
           "`pop`, δ .5": ":teacher=pop", "without a teacher": ":w_y=0:w_a=.95"}
alone = ["svd:debias=.5", "cm:debias=.5", "pop:debias=.5"]
methods = [loss + signal for loss in LOSSES for signal in SIGNALS.values()]
found = trained("toy", ["sft", *alone, *methods], seeds=(42, 43))
for metric, title in (("ndcg@10", "NDCG@10"), ("liked@10", "liked@10")):
    rows = []
    for label, signal in SIGNALS.items():
        teacher = {"": alone[0], ":teacher=cm": alone[1], ":teacher=pop": alone[2]}.get(signal)
        cells = [mean(found[loss + signal], metric) for loss in LOSSES]
        rows.append([label, mean(found[teacher], metric) if teacher else "", *cells])
    table("data/results.md", [f"{title}, R of", "alone", *[f"`{loss}`" for loss in LOSSES]], rows)
print("sft:", mean(found["sft"]), mean(found["sft"], "liked@10"))
