"""Which teacher, which signal? `tb` in the committed world, three seeds.

    python data/experiments/rewards.py

R with another teacher, without the logged action (w_a 0), without a teacher (w_ŷ 0), without the
similarity of IDs (w_s 0)."""
import common
from common import mean

SIGNALS = {"`svd`, δ .5: `tb`": ("svd:debias=.5", "tb"),
           "without the logged action": (None, "tb:w_a=0:w_y=.95"),
           "without similar IDs": (None, "tb:w_s=0:w_y=.8"),
           "`cm`, δ .5": ("cm:debias=.5", "tb:teacher=cm"),
           "`pop`, δ .5": ("pop:debias=.5", "tb:teacher=pop"),
           "without a teacher": (None, "tb:w_y=0:w_a=.95"), "`sft`": (None, "sft")}

def main(lab):
    """Train what is not kept; print the table."""
    names = [name for pair in SIGNALS.values() for name in pair if name and name != "sft"]
    found = lab.trained("toy", ["sft", *names], (42, 43, 44))
    rows = []
    for label, (teacher, method) in SIGNALS.items():
        cells = []
        for name in (teacher, method):
            cells += [mean(found[name], metric) if name else "" for metric in ("ndcg@10",
                                                                               "liked@10")]
        rows.append([label, *cells])
    lab.table("data/results.md", ["R of", "teacher alone: NDCG@10", "liked@10", "`tb`: NDCG@10",
                                  "liked@10"], rows)

if __name__ == "__main__":
    main(common.Lab())
