"""Speed, as ratios of two things measured side by side: decoding, packing, fine-tuning, growth; and a large catalogue.

What is compared runs in turn, A, B, A, B, …, and the least time of each counts: other work on the machine can only add
to it. (Threads that wait for one another are another matter: on a busy machine set OMP_NUM_THREADS=1.) The models have
random weights, which cost the same as trained ones. All of it is on the CPU.
"""
import copy
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from data.batches import batches, training_rows
from data.make_toy import make_world, titles
from data.report import picture
from reward import CollaborativeModel
from tokenizer import SemanticIDs, item_features


def side_by_side(repeats, *jobs):
    """Call the jobs in turn, `repeats` times after one that does not count → the least seconds of each."""
    seconds = [[] for _ in jobs]
    for _ in range(repeats + 1):
        for job, times in zip(jobs, seconds):
            started = time.perf_counter()
            job()
            times.append(time.perf_counter() - started)
    return [min(times[1:]) for times in seconds]


def random_policy(Policy, n, codes, history, users, width=128, layers=3):
    """A policy over n items with random IDs of three codes, and `users` random histories of `history` different items."""
    rng = np.random.default_rng(0)
    number = rng.choice(codes ** 3, n, replace=False)
    torch.manual_seed(0)
    policy = Policy(SemanticIDs(np.stack([number // codes ** 2, number // codes % codes, number % codes], 1), codes),
                    window=history + 1, width=width, layers=layers, dropout=0.0).eval()
    policy.lm.transformer.wte.weight.data.mul_(6)              # else all paths are as likely, and their order is rounding
    return policy, [rng.choice(n, history, replace=False).tolist() for _ in range(users)]


# --- Decoding --------------------------------------------------------------------------------------------------------
def allowed_tokens(ids):
    """{tokens of a prefix: the tokens that may follow}, looked up by `generate`, so that only its own work is timed."""
    allowed = {}
    for row in (ids.codes + torch.arange(ids.num_levels) * ids.num_codes).tolist():
        for level, token in enumerate(row):
            allowed.setdefault(tuple(row[:level]), set()).add(token)
    return {prefix: sorted(tokens) for prefix, tokens in allowed.items()}


def by_generate(policy, histories, k, beams, allowed, scores=False):
    """What Policy.recommend returns, by transformers' constrained beam search. Histories are of one length: no padding.

    Both keep the `beams` best prefixes by the sum of log P. But `generate` masks what the prefix function forbids *after*
    its log-softmax over the whole vocabulary; with renormalize_logits a second one makes it a softmax over legal tokens,
    as the policy's. length_penalty 0 leaves the sums as they are, 1 would divide them by the length. All beams are
    returned and items of the history dropped, since recommend has none. scores=True gives the log-probabilities too, at
    the price of a copy of all logits, so they are left out when it is timed.
    """
    ids, (tokens, _) = policy.semantic_ids, policy.tokens(histories)
    out = policy.lm.generate(
        tokens, attention_mask=torch.ones_like(tokens), pad_token_id=policy.user_token, do_sample=False, num_beams=beams,
        num_return_sequences=beams, max_new_tokens=ids.num_levels, length_penalty=0.0, renormalize_logits=True,
        prefix_allowed_tokens_fn=lambda _, row: allowed[tuple(row[tokens.shape[1]:].tolist())],
        return_dict_in_generate=True, output_scores=scores)
    codes = out.sequences[:, tokens.shape[1]:] - torch.arange(ids.num_levels) * ids.num_codes
    items = ids.lookup(codes).view(len(histories), beams)
    new = torch.tensor([[item not in history for item in row] for row, history in zip(items.tolist(), map(set, histories))])
    first = new.int().argsort(dim=1, descending=True, stable=True)[:, :k]        # the best k of those that are new
    return items.gather(1, first), out.sequences_scores.view(len(histories), beams).gather(1, first) if scores else None


def decoding(Policy, n, repeats=3, users=64, beams=20, k=10, history=20, codes=256, width=128, layers=3):
    """Seconds of recommend, of generate, of generate in batches of 16; users with equal items, and log P to 1e-4."""
    policy, histories = random_policy(Policy, n, codes, history, users, width, layers)
    allowed = allowed_tokens(policy.semantic_ids)
    ours, theirs = policy.recommend(histories, k, beams), by_generate(policy, histories, k, beams, allowed, scores=True)
    same = (ours[0] == theirs[0]).all(1) & torch.isclose(ours[1], theirs[1], atol=1e-4, rtol=0).all(1)

    def generate(size):
        for i in range(0, users, size):
            by_generate(policy, histories[i:i + size], k, beams, allowed)
    return *side_by_side(repeats, lambda: policy.recommend(histories, k, beams), lambda: generate(users),
                         lambda: generate(16)), int(same.sum())


# --- Training --------------------------------------------------------------------------------------------------------
def step(loss, policy, optimizer):
    """One step of the optimiser, as in train."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()


def packing(Policy, trajectory_balance, J, history, repeats=2, users=32, n=12000, codes=256, width=128, layers=3):
    """(seconds of a TB step with J trajectories a row, seconds with a row for each, largest difference in log P_F)."""
    policy, histories = random_policy(Policy, n, codes, history, users, width, layers)
    tokens, lengths = policy.tokens(histories)
    items, log_r = torch.randint(n, (users, J)), torch.randn(users, J)
    optimizer, found = torch.optim.AdamW(policy.parameters(), lr=0.0), {}        # the weights stay, so both see the same

    def tb(name, tokens, ends, items):
        log_probs, log_flow = policy(tokens, ends, items)
        found[name] = policy.steps(log_probs, items).sum(-1).view(users, J)
        log_z = log_flow[:, 0, 0].view(users, -1)[:, 0]
        step(trajectory_balance(log_z, found[name], log_r), policy, optimizer)
    ends = lengths[:, None].expand(users, J)
    seconds = side_by_side(repeats, lambda: tb("packed", tokens, ends, items),
                           lambda: tb("rows", tokens.repeat_interleave(J, 0), ends.reshape(-1, 1), items.view(-1, 1)))
    return *seconds, (found["packed"] - found["rows"]).abs().max().item()


def fine_tuning(methods, settings, data, prepared, Policy, loss_of, count=6, repeats=3):
    """Seconds of a step of each method, on the same batches: everything from CM scores to the optimiser."""
    _, ids, reward = prepared
    policy = Policy(ids, settings.window, settings.width, settings.layers, settings.dropout).train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0)
    rows, rng = training_rows(data.train, settings.window), np.random.default_rng(0)
    reference, total = copy.deepcopy(policy).eval(), np.zeros(len(methods))
    for batch, _ in zip(batches(rows, data.train, settings.batch, policy, rng), range(count)):
        total += side_by_side(repeats, *(
            lambda method=method: step(loss_of(method, policy, reference, batch, reward, data, settings, 0.5), policy, optimizer)
            for method in methods))
    return total / count


# --- Growth ----------------------------------------------------------------------------------------------------------
def growth(Policy, repeats=5, users=64):
    """{what grows: {its value: seconds of recommend}}: items, beams, length of the histories; one of them at a time."""
    def decode(n=10 ** 4, beams=20, history=20):
        policy, histories = random_policy(Policy, n, 256, history, users, width=64, layers=2)
        return lambda: policy.recommend(histories, 10, beams)
    found = {}
    grows = {"n": (10 ** 3, 10 ** 4, 10 ** 5), "beams": (10, 20, 50, 100), "history": (5, 10, 20, 50, 100)}
    for name, values in grows.items():
        found[name] = dict(zip(values, side_by_side(repeats, *(decode(**{name: value}) for value in values))))
    return found


def plot_growth(found, path):
    """benchmark.png: the three curves of growth."""
    with picture(path, 1, 3, figsize=(11, 3.2), sharey=True) as axes:
        for axis, (name, times), label in zip(axes, found.items(), ("items", "beams", "items of the history")):
            axis.plot(list(times), [1000 * t for t in times.values()], marker="o")
            axis.set_xlabel(label)
        axes[0].set_xscale("log"), axes[0].set_ylim(bottom=0), axes[0].set_ylabel("ms for 64 users")


# --- A large catalogue -----------------------------------------------------------------------------------------------
def large_world(users=107_800, themes=500, items_per_theme=200, codes=512, share=40):
    """IDs and CM of 10^5 items and 10^6 interactions, then 1/share of an SFT epoch's steps → figures as a dict.

    It is run in a process of its own (at the end of this file), so that the peak of memory is its own as well;
    `python -m data.benchmark 1` measures the whole epoch.
    """
    import resource                                            # not on Windows

    from gflowgr import Policy, Settings, loss_of              # not at the top: there gflowgr is the script that runs
    log = make_world(users, items_per_theme, themes, seed=7, truth=False)[0]
    train = [history[:-2] for history in log if len(history) >= 3]
    texts, started = [f"{title} {genre}" for title, genre in titles(themes, items_per_theme)], time.perf_counter()
    features = item_features("mixed", texts, train, seed=0)
    ids = SemanticIDs.fit(features, codes, seed=0)
    CollaborativeModel.fit(train, len(texts))
    found = {"items": len(texts), "interactions": sum(map(len, log)), "seconds": time.perf_counter() - started,
             "GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)}
    settings = Settings()
    policy = Policy(ids, settings.window, settings.width, settings.layers, settings.dropout).train()
    policy.start_from(features)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.rate)
    rows = training_rows(train, settings.window)
    found["steps"] = -(-len(rows) // settings.batch)
    found["measured"] = -(-found["steps"] // share)
    started = time.perf_counter()
    for batch, _ in zip(batches(rows, train, settings.batch, policy, np.random.default_rng(0)), range(found["measured"])):
        step(loss_of("sft", policy, None, batch, None, None, settings, 0.0), policy, optimizer)
    found["epoch"] = (time.perf_counter() - started) / found["measured"] * found["steps"]
    return found


# --- The table -------------------------------------------------------------------------------------------------------
def machine():
    """The processor, how busy it is, threads and versions, as one line."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.open() if "model name" in line] if info.exists() else []
    return (f"{[*names, platform.machine()][0]}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
            f"load {os.getloadavg()[0]:.1f} at the start; Python {platform.python_version()}, torch {torch.__version__}, "
            f"transformers {transformers.__version__}, numpy {np.__version__}")


def row(what, ours, other, goal="", ratio=None):
    """A line of the table; where no ratio is given, it is how many times as long the other takes."""
    seconds = [f"{t * 1000:.0f} ms" if t < 1 else f"{t:.1f} s" for t in (ours, other)]
    return f"| {what} | {seconds[0]} | {seconds[1]} | {ratio or other / ours:.2f} × | {goal} |"


def benchmark(settings, data, prepared, Policy, loss_of, trajectory_balance):
    """Measure all of it, in about three minutes: prints the table and writes OUT/benchmark.md and OUT/benchmark.png."""
    where, lines = machine(), ["| what | ours | other | ratio | goal |", "|---|---|---|---|---|"]
    print("decoding, beside generate …", flush=True)
    for n, goal in ((12000, "≥ 19 ×"), (1000, "")):
        ours, theirs, small, same = decoding(Policy, n)
        lines += [row(f"decoding, {n:,} items: recommend, generate; {same} of 64 answers equal", ours, theirs, goal),
                  row("the same, generate in batches of 16", ours, small)]
    print("packed trajectories …", flush=True)
    for history, goals in ((100, ("≥ 7 ×", "≥ 12 ×")), (20, ("", ""))):
        for J, goal in zip((8, 16), goals):
            ours, other, error = packing(Policy, trajectory_balance, J, history)
            lines.append(row(f"TB step, J = {J}, {history} items of history: packed, a row each; log P_F within {error:.0e}",
                             ours, other, goal))
    print("a step of fine-tuning, and growth …", flush=True)
    methods = ("sft", "tb", "db", "vargrad", "fm", "sdpo")
    sft, *others = fine_tuning(methods, settings, data, prepared, Policy, loss_of)
    lines += [row(f"training step, {data.name}: {method}, sft", seconds, sft, "≤ 2.1 ×", seconds / sft)
              for method, seconds in zip(methods[1:], others)]
    found = growth(Policy)
    for (name, times), label, goal in zip(found.items(), ("items", "beams", "items of history"), ("≤ 1.5 ×", "", "")):
        (few, fast), (many, slow) = min(times.items()), max(times.items())
        lines.append(row(f"growth: decoding, {many:,} {label}, {few:,} {label}", slow, fast, goal, slow / fast))
    plot_growth(found, Path(settings.out) / "benchmark.png")
    print("last, 10^5 items and 10^6 interactions, in a process of its own: about two minutes …", flush=True)
    command = [sys.executable, "-m", "data.benchmark"]
    large = json.loads(subprocess.check_output(command, cwd=Path(__file__).parents[1]))
    lines.append("""| IDs and CM, {items:,} items, {interactions:,} interactions | {seconds:.0f} s | | | < 180 s |
| peak memory of that | {GB:.1f} GB | | | < 4 GB |
| an SFT epoch of that, from {measured} of its {steps} steps | {epoch:.0f} s | | | |""".format(**large))
    text = "\n".join(lines) + "\n\n" + where + """.
What is compared ran in turn, and the least time of each counts; the epoch is from the mean of its steps.
Decoding: 64 users, histories of 20 items, 20 beams, 3 layers of width 128 (growth: 2 of 64); `generate` has to score the
item tokens too. Packing: 32 rows of that model; counting tokens alone, C = 1 + history before J branches of two codes, the
ratio is J(C + 2)/(C + 2J): 7.0 and 12.4 for 100 items, 5.0 and 6.9 for 20."""
    (Path(settings.out) / "benchmark.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\nAlso in {settings.out}/benchmark.md; the three curves of growth are in benchmark.png there")


if __name__ == "__main__":
    print(json.dumps(large_world(share=int(sys.argv[1]) if len(sys.argv) > 1 else 40)))
