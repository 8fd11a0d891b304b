"""Saved models: the layout of transformers beside the table of IDs, written whole and read with distrust."""
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from data.inputs import InputError, one_line, read_json
from data.report import write_json
from tokenizer import SemanticIDs


def save_policy(policy, folder):
    """Write config.json and model.safetensors (plain GPT-2) and semantic_ids.json (IDs, item ids, titles)."""
    part = Path(f"{folder}.part")                              # written beside it, then moved, so no file is ever half there
    policy.lm.config.save_pretrained(part)
    # Not by lm.save_pretrained, which writes in the first of several processes alone. lm_head is tied to wte.
    save_file({name: w.cpu().contiguous() for name, w in policy.lm.state_dict().items() if name != "lm_head.weight"},
              part / "model.safetensors", metadata={"format": "pt"})
    ids = {"num_codes": policy.semantic_ids.num_codes, "codes": policy.semantic_ids.codes.tolist(), **policy.catalogue}
    write_json(part / "semantic_ids.json", ids)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for file in part.iterdir():
        os.replace(file, Path(folder) / file.name)
    part.rmdir()


def load_policy(cls, folder):
    """The Policy (cls) that save_policy wrote, or InputError; its flow head, used in training alone, starts anew.

    Only JSON and safetensors are read, never a pickle, and the model is built here, not as config.json may ask for.
    """
    folder = Path(folder)
    try:
        ids, config = read_json(folder / "semantic_ids.json"), read_json(folder / "config.json")
        semantic_ids = SemanticIDs(ids.get("codes"), ids.get("num_codes"))
        n, L = semantic_ids.codes.shape
        weights = {name.removeprefix("transformer."): w for name, w in load_file(folder / "model.safetensors").items()}
        (tokens, width), places = weights["wte.weight"].shape, len(weights["wpe.weight"])
        expected = L * semantic_ids.num_codes + 1 + n
        if tokens != expected or places <= L:
            raise ValueError(f"the IDs need {expected} tokens and over {L} places, the model has {tokens} and {places}")
        if not all(w.is_floating_point() and w.isfinite().all() for w in weights.values()):
            raise ValueError("model.safetensors holds weights that are not finite numbers")
        layers = sum(name.endswith(".ln_1.weight") for name in weights)
        with torch.random.fork_rng(devices=[]):            # the random weights are thrown away, and so are their draws
            policy = cls(semantic_ids, places - L, width, layers, config.get("resid_pdrop"))
        policy.lm.transformer.load_state_dict(weights)     # all of them and no others, each of its shape
        for name in ("model_type", "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "activation_function"):
            if config.get(name) != getattr(policy.lm.config, name):
                raise ValueError(f"config.json has {name} {config.get(name)}, not {getattr(policy.lm.config, name)}")
        policy.catalogue = {name: ids[name] for name in ("item_ids", "titles") if name in ids}
        if any(not isinstance(names, list) or len(names) != n or not all(isinstance(name, str) for name in names)
               for names in policy.catalogue.values()) or len(set(ids.get("item_ids", range(n)))) < n:
            raise ValueError("semantic_ids.json needs one id, its own, and one title for each item")
    except Exception as error:                             # a stranger's files can fail in any way; it all means this
        reason = f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise InputError(f"{folder} holds no saved model; name another (pop and cm have none), or train it again: "
                         f"{one_line(reason)[:300]}") from None
    return policy.eval()
