"""What the command line does beside the main job, and how several processes share that."""
import atexit
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from data.inputs import InputError, find_item, one_line
from data.oracle import distribution, exact, plot_flows, train_to_the_oracle


def show_oracle(policy, loss, reward, data, out, seed, users=4):
    """GFlowNet training alone, on a few users' contexts, until P = R/Z: prints the distances, draws OUT/oracle.png."""
    histories, positives = data.train[:users], torch.tensor([history[-2] for history in data.histories[:users]])
    curve = train_to_the_oracle(policy, loss, reward, histories, positives, seed=seed)
    for step, distance, log_z in curve[::4]:
        print(f"  step {step:4d}: mean L1(P, R/Z) {distance:.4f}, largest |log Z head − log Z*| {log_z:.4f}")
    plot_flows(Path(out) / "oracle.png", policy.semantic_ids, exact(reward, histories, positives)[2][0],
               distribution(policy, histories)[0][0], data.titles, curve)
    print(f"the learned tree beside the exact one: {out}/oracle.png")


def print_recommendations(policy, names):
    """Ten titles for a history of titles or ids, oldest first, from a saved model."""
    if len(policy.catalogue) < 2:
        raise InputError("that model was saved without item ids and titles")
    ids, titles = policy.catalogue["item_ids"], policy.catalogue["titles"]
    items, log_probs = policy.recommend([[find_item(name, ids, titles) for name in names]])
    if items.max() < 0:
        raise InputError("nothing is left to recommend: all that the search found is in the history")
    for item, log_prob in zip(items[0].tolist(), log_probs[0].tolist()):
        if item >= 0:
            print(f"{math.exp(log_prob):.4f}  {one_line(titles[item])}")


def join_processes(settings, resume):
    """Under torchrun: one of several processes. All but the first do the same, unseen, in a folder that is thrown away."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    on_gpu = torch.cuda.is_available() and settings.device in ("auto", "cuda")
    dist.init_process_group("nccl" if on_gpu else "gloo")
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if dist.get_rank() > 0:
        copy_of, settings.out = settings.out, tempfile.mkdtemp()
        atexit.register(shutil.rmtree, settings.out, ignore_errors=True)
        if resume and Path(copy_of).exists():
            shutil.copytree(copy_of, settings.out, dirs_exist_ok=True)
        sys.stdout = open(os.devnull, "w")
    dist.barrier()                                             # until every copy is made
