"""Which loss? The committed world, five seeds. Draws data/pictures/liked.svg.

    python data/experiments/losses.py"""
import common
from common import ROOT, mean, mean_and_spread
from data import figures

SEEDS = (42, 43, 44, 45, 46)
METHODS = {"svd:debias=.5": "the teacher", "product": "not trained",
           "sft": "", "sft:epochs=24": "as many epochs as `sft` and `tb`", "paper": "",
           "sdpo": "", "grpo": "", "db": "", "tb": "", "vargrad": "", "listnet": "", "distill": ""}
SQUARES = {"fine-tuned on the log (SFT)": "sft",
           "GFlowGR, the paper's settings as we read them": "paper",
           "GFlowGR, this script (tb)": "tb", "its teacher (not a language model)": "svd:debias=.5"}

def main(lab):
    """Train what is not kept; print the table, draw the picture."""
    # What goes on from `sft` comes before the longer SFT
    order = sorted(METHODS, key=lambda name: name.startswith("sft:"))
    order = ["sft", *[name for name in order if name != "sft"]]
    found = lab.trained("toy", order, SEEDS)
    rows = []
    for method, what in METHODS.items():
        runs = found[method]
        cells = [mean_and_spread(runs, metric) for metric in ("ndcg@10", "liked@10")]
        rows.append([f"`{method}`" + (f", {what}" if what else ""), *cells,
                     mean(runs, "themes@10", 1)])
    lab.table("data/results.md", ["method", "NDCG@10", "liked@10", "themes of three"], rows)
    if not lab.check:
        path = lab.runs / "liked.svg" if lab.quick else ROOT / "data/pictures/liked.svg"
        squares = {words: (10 * float(mean(found[method], "liked@10", 5)),
                           figures.COLORS.get(method, figures.COLORS["teacher"]))
                   for words, method in SQUARES.items()}
        figures.draw_squares(path, "Of ten recommended items, how many does the user like?",
                             squares)

if __name__ == "__main__":
    main(common.Lab())
