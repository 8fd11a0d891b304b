"""Where a training stood after its last epoch, so that --resume goes on as if nothing had happened; no pickle is read."""
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data.inputs import InputError


def save_checkpoint(path, policy, optimizer, curve):
    """Weights, optimiser and the curve so far (a list for JSON), in one file that is whole or not there.

    No random generator: every epoch has numbers of its own.
    """
    tensors = {f"policy.{name}": value for name, value in policy.state_dict().items() if name != "lm.lm_head.weight"}   # tied to wte
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": torch.as_tensor(value) for name, value in state.items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, f"{path}.part",
              metadata={"curve": json.dumps(curve)})
    os.replace(f"{path}.part", path)


def load_checkpoint(path, policy, optimizer):
    """Put everything back as save_checkpoint found it → the curve; None where there is no checkpoint. InputError if it is damaged."""
    if not Path(path).exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            tensors, curve = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["curve"])
        state = optimizer.state_dict()
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, i, key = name.split(".")
                state["state"].setdefault(int(i), {})[key] = value
        weights = {name[7:]: value for name, value in tensors.items() if name.startswith("policy.")}
        policy.load_state_dict(weights | {"lm.lm_head.weight": weights["lm.transformer.wte.weight"]})
        optimizer.load_state_dict(state)
        return curve
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is damaged; delete it, and this row is trained anew ({str(error).splitlines()[0]})") from None
