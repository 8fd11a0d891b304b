"""Histories to padded batches: which items a row holds, which of them are targets, and which contexts get trajectories."""
from dataclasses import dataclass

import torch


@dataclass
class Batch:
    """Rows of training histories: users, where each row starts, and its tokens, ends, targets and validity."""
    users: list
    starts: list
    tokens: torch.Tensor                                       # (B, C)
    ends: torch.Tensor                                         # (B, T) items of the row before each target
    targets: torch.Tensor                                      # (B, T)
    valid: torch.Tensor                                        # (B, T) bool, False on padding
    weights: tuple                                             # of this process's means over targets and over rows; (1, 1) alone


def training_rows(histories, window):
    """(user, start, first, stop): items[start:stop] is a row whose targets are items[first:stop].

    A history longer than the window is cut into rows that overlap, so that every target but the earliest has at
    least half a window of history before it.
    """
    rows = []
    for user, history in enumerate(histories):
        first, stop = 0, min(len(history), window + 1)
        while first < len(history):
            rows.append((user, max(0, stop - 1 - window), first, stop))
            first, stop = stop, min(len(history), stop + max(1, window // 2))
    return rows


def batches(rows, histories, size, policy, rng, rank=0, world=1):
    """The rows of one epoch in random order, as Batches of rows of like length (less padding, twice the speed).

    With `world` processes each gets every world-th row of a batch, and weights that make the average of the processes'
    means the mean over the whole batch.
    """
    order = rng.permutation(len(rows))
    chunks = [sorted(order[i:i + 32 * size], key=lambda r: rows[r][3] - rows[r][1]) for i in range(0, len(rows), 32 * size)]
    groups = [chunk[i:i + size] for chunk in chunks for i in range(0, len(chunk), size)]
    for g in rng.permutation(len(groups)):
        shares = [[rows[r] for r in groups[g][process::world] or groups[g]] for process in range(world)]
        chosen, num_targets = shares[rank], [sum(stop - first for _, _, first, stop in share) for share in shares]
        weights = (num_targets[rank] * world / sum(num_targets), len(chosen) * world / sum(map(len, shares)))
        tokens, _ = policy.tokens([histories[u][start:stop - 1] for u, start, _, stop in chosen])
        count = torch.tensor([stop - first for _, _, first, stop in chosen])
        valid = torch.arange(int(count.max()))[None] < count[:, None]
        ends, targets = torch.zeros(valid.shape, dtype=torch.long), torch.zeros(valid.shape, dtype=torch.long)
        for i, (u, start, first, stop) in enumerate(chosen):
            ends[i, :count[i]] = torch.arange(first - start, stop - start)
            targets[i, :count[i]] = torch.tensor(histories[u][first:stop])
        yield Batch([row[0] for row in chosen], [row[1] for row in chosen], tokens, ends, targets, valid, weights)


def pick_contexts(batch, data, count):
    """`count` of each row's targets, at random with repeats, as contexts to learn from.

    Returns their places in the row and the length of history before each, both (B, M); and for each of the B·M
    contexts the history, the items that followed it in training, and whether the first of them was liked.
    """
    valid = batch.valid.sum(1, keepdim=True)
    chosen = (torch.rand(len(valid), count) * valid).long()                                          # (B, M)
    ends = batch.ends.gather(1, chosen)
    where = [(u, start + end) for u, start, row in zip(batch.users, batch.starts, ends.tolist()) for end in row]
    histories, following = [data.train[u][:end] for u, end in where], [data.train[u][end:] for u, end in where]
    return chosen, ends, histories, following, torch.tensor([data.liked[u][end] for u, end in where])
