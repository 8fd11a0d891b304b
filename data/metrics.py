"""Figures of a table's row, from the ten items that each user is recommended."""
import torch


def recall_at(ranked, target, k):
    """Recall@k: the share of users whose target is among the first k places of their list → scalar tensor in [0, 1].

    ranked (B, ≥ k) are item indices, best first, −1 for an empty place; target (B,) is the one held-out item of each user.
    Recall@k = 1/B · Σ_b 1[target_b is one of ranked_b,1 … ranked_b,k].

    Example: the first user's target stands on place 3, the second's nowhere.

    >>> ranked, target = torch.tensor([[4, 2, 7], [1, 3, -1]]), torch.tensor([7, 9])
    >>> [recall_at(ranked, target, k).item() for k in (2, 3)]
    [0.0, 0.5]
    """
    return (ranked[:, :k] == target[:, None]).any(1).float().mean()


def ndcg_at(ranked, target, k):
    """NDCG@k: the mean over users of 1/log2(rank + 1) of the target, 0 where it is not in the first k → scalar tensor.

    ranked (B, ≥ k) are item indices, best first, −1 for an empty place; target (B,) is the one held-out item of each user;
    rank counts from 1.

    Example: targets on places 1 and 3 give 1/log2(2) = 1 and 1/log2(4) = 1/2.

    >>> ranked, target = torch.tensor([[4, 2, 7], [1, 3, 5]]), torch.tensor([4, 5])
    >>> [ndcg_at(ranked, target, k).item() for k in (2, 3)]
    [0.5, 0.75]
    """
    # With one target the ideal DCG is 1, so NDCG = DCG = Σ_r 1[ranked_r = target] / log2(r + 1)
    ranked = ranked[:, :k]
    discount = 1 / torch.log2(torch.arange(2, ranked.shape[1] + 2, device=ranked.device))
    return ((ranked == target[:, None]) * discount).sum(1).mean()


def beyond_accuracy(ranked, codes, counts):
    """What the lists ranked (B, k) are like, whoever is right: {"coverage@10", "tail@10", "diversity@10"}.

    codes (n, L) semantic IDs; counts (n,) of the items in training.
    """
    n, filled = len(codes), ranked >= 0
    # tail: share of the recommendations that go to the less popular half of the catalogue (ties: the later item)
    tail = torch.zeros(n, dtype=torch.bool)
    tail[counts.argsort(descending=True, stable=True)[n - n // 2:]] = True
    # diversity, to be compared under the same IDs alone: share of the codes in which two items of a list differ, 1 − Σ_l 1[t_l = t'_l] / L, mean over all pairs
    first, second = torch.combinations(torch.arange(ranked.shape[1])).T
    both = filled[:, first] & filled[:, second]
    differ = (codes[ranked[:, first]] != codes[ranked[:, second]]).float().mean(-1)
    return {"coverage@10": len(ranked[filled].unique()) / n,
            "tail@10": tail[ranked[filled]].float().mean().item(),
            "diversity@10": ((differ * both).sum() / both.sum().clamp(min=1)).item()}


def exposure_bias(ranked, truth, histories, counts):
    """What the lists ranked (B, k) do about exposure bias where the true preferences are known (the toy world), by user.

    truth: {"liked": B sets, "shown": B sets} of items; histories: what the recommender read, B lists; counts (n,) of the
    items in the log. Returns three lists of B numbers: "hidden@10", the share of the items that the user likes but was
    never shown that are in the list (0 if there are none; ten of more than ten at most, .43 in the toy world); "liked@10", the share of the list that is truly liked;
    "lift@10", how often the list's items stand in the log, over how often those stand there that the user likes and has
    not had: 1 is fair, more is popularity bias.
    """
    out = {"hidden@10": [], "liked@10": [], "lift@10": []}
    for items, liked, shown, history in zip(ranked.tolist(), truth["liked"], truth["shown"], histories):
        items, new, hidden = {i for i in items if i >= 0}, liked - set(history), liked - shown
        out["hidden@10"].append(len(hidden & items) / max(1, len(hidden)))
        out["liked@10"].append(len(new & items) / max(1, len(items)))
        popular, fair = (counts[list(group)].float().mean().item() if group else 1.0 for group in (items, new))
        out["lift@10"].append(popular / max(1.0, fair))
    return out
