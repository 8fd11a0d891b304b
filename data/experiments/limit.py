"""How good could any method be? Bayes' rule, told how the committed world was made.

    python data/experiments/limit.py            a minute on one core

It knows data/toy/prepare.py, the theme and style of every item, and how often each is shown. It
does not know a user's tastes, and infers them from the log. A user has three favourite themes, and
likes one style in each: so for each theme there are three cases, style 0, style 1, no favourite. In
a favourite theme, a random number of its items was shown, 1 to 17. The chance of each case and
number, given which items are in the history, follows by Bayes' rule; then the chance that the user
likes an item that was not shown, P(liked), and that it is logged next, P(next). The list holds the
ten items with the highest P(liked) + μ · P(next), ordered by P(next)."""
import numpy as np
import torch

import common
from common import ROOT, gflowgr, load_data, report, runpy
from reward import weighted
from tokenizer import rows_and_columns

torch.manual_seed(0)
world = runpy.run_path(str(ROOT / "data/toy/prepare.py"))["make_world"](np.random.default_rng(8))
theme, style, rate, lift = (torch.tensor(values).view(12, 60) for values in world)
# P(shown) of an item (17 numbers of shown items, 12 themes, 60 items), by a race of 2000
arrival = torch.empty(2000, 12, 60).exponential_() / rate
first = arrival.argsort(-1).argsort(-1) < torch.arange(1, 18)[:, None, None, None]
shown = first.double().mean(1).clamp(1e-4, 1 - 1e-4)
left = rate / (rate * (1 - shown)).sum(-1, keepdim=True)        # shown next, if not yet
liked = 0.1 + 0.8 * torch.stack([style, 1 - style])[:, None] + lift     # by favourite style
liked = liked.clamp(0.001, 0.999)
hidden = liked * (1 - shown) / (1 - liked * shown)              # P(liked | not in the log)

def recommend(histories, mu):
    """Ten items (B, 10) for B histories, and their P(next)."""
    x = torch.zeros(len(histories), 720, dtype=torch.double)
    x[rows_and_columns(histories)] = 1
    def evidence(p):                                            # log P(history | case, number)
        seen = torch.einsum("bti,smti->bsmt", x.view(-1, 12, 60), (p / (1 - p)).log())
        return (seen + (1 - p).log().sum(-1)).flatten(1, 2)
    favourite = evidence(liked * shown) - np.log(2 * 17 * 3)    # 3 of 12 themes
    other = evidence(0.01 * shown[None, :1])
    cases = torch.cat([favourite, other], 1).softmax(1)[:, :-1].unflatten(1, (2, 17))
    likes = torch.einsum("bsmt,smti->bti", cases, hidden).flatten(1) * (1 - x)
    mood = weighted(torch.eye(12)[theme.flatten()], histories, lambda age: 0.2 ** age) + 0.02
    follow = torch.einsum("bt,bsmt,smti->bti", mood.double(), cases, hidden * left)
    follow = follow.flatten(1) * (1 - x)
    follow = follow / follow.sum(1, keepdim=True)
    best = (likes + mu * follow).topk(10)[1]
    order = follow.gather(1, best).argsort(1, descending=True)
    return best.gather(1, order), order

def main(lab):
    """Print the table."""
    data = load_data("toy", lab.quick)
    rows = []
    for mu in (1, 10, 1000):
        by_user, ranked = gflowgr.evaluate(lambda past: recommend(past, mu), data.histories)
        by_user |= report.exposure(ranked.tolist(), data)
        rows.append([mu, *[f"{by_user[key].mean():.3f}"[1:] for key in ("ndcg@10", "liked@10")]])
    lab.table("data/results.md", ["μ", "NDCG@10", "liked@10"], rows)

if __name__ == "__main__":
    main(common.Lab())
