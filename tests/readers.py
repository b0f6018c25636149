"""Adapters as they are found elsewhere, on a model and on one in a wrapper, and what each reader makes of them."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

import minilora as ml
from minilora.adapters.layout import WEIGHTS_FILE
from tests.files import edit, save_file, write_adapter, write_base

PREFIX, INNER = "base_model.model.", "model.language_model."
RIGHT, REFUSED = "acts as trained", "refuses it"
NOTHING, ZERO = "nothing attaches", "does nothing: B A is zero"
PART, SCALE = "loses a part", "takes another scale"
READERS = ("minilora", "peft", "vllm", "mlx-lm", "llama.cpp")
ALL_RIGHT = (RIGHT,) * 5
NONE: Mapping[str, Any] = MappingProxyType({})
EXPERTS = {"rank_pattern": {}, "target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}


class Case(NamedTuple):
    """An adapter of a tiny Llama: its config, what becomes of names and config, and the verdicts of `READERS`."""

    verdicts: tuple[str, ...]
    config: Mapping[str, Any] = NONE
    rename: tuple[str, str] = ("", "")
    changes: Mapping[str, Any] = NONE
    is_tied: bool = False
    zero: bool = False


CASES = {
    "plain": Case(ALL_RIGHT),
    "rsLoRA": Case((RIGHT, RIGHT, RIGHT, RIGHT, SCALE), {"use_rslora": True}),
    "rank pattern": Case((RIGHT, RIGHT, SCALE, RIGHT, RIGHT), {"rank_pattern": {"q_proj": 2}}),
    "alpha pattern": Case((RIGHT, RIGHT, SCALE, RIGHT, SCALE), {"alpha_pattern": {"q_proj": 2}}),
    "DoRA": Case((RIGHT, RIGHT, REFUSED, RIGHT, REFUSED), {"use_dora": True}),
    "module in full": Case((RIGHT, RIGHT, REFUSED, REFUSED, REFUSED), {"modules_to_save": ("lm_head",)}),
    "token rows": Case((RIGHT, RIGHT, REFUSED, REFUSED, REFUSED), {"trainable_token_indices": (3, 5)}),
    "bias of B": Case((RIGHT, RIGHT, REFUSED, REFUSED, REFUSED), {"lora_bias": True}),
    "embedding and head": Case(ALL_RIGHT, {"target_modules": ("embed_tokens", "lm_head", "q_proj")}),
    "tied embedding": Case(
        (RIGHT, RIGHT, RIGHT, REFUSED, REFUSED), {"target_modules": ("embed_tokens", "q_proj")}, is_tied=True
    ),
    "experts": Case(
        (REFUSED, RIGHT, RIGHT, REFUSED, REFUSED),
        rename=(".down_proj.", ".experts."),
        changes=EXPERTS,
    ),
    "_orig_mod": Case((RIGHT, NOTHING, NOTHING, RIGHT, REFUSED), rename=(PREFIX, f"{PREFIX}_orig_mod.")),
    "base_layer": Case((RIGHT, NOTHING, NOTHING, RIGHT, REFUSED), rename=(".lora_", ".base_layer.lora_")),
    "default": Case((RIGHT, RIGHT, REFUSED, RIGHT, REFUSED), rename=(".weight", ".default.weight")),
    "no prefix": Case((REFUSED, NOTHING, RIGHT, REFUSED, RIGHT), rename=(PREFIX, "")),
    "another model": Case((REFUSED, PART, PART, REFUSED, REFUSED), rename=("layers.1.", "layers.9.")),
    "wrapper's names": Case((RIGHT, NOTHING, NOTHING, RIGHT, RIGHT), rename=("model.layers", f"{INNER}layers")),
    "zero": Case((ZERO,) * 5, zero=True),
}
IN_WRAPPER = {  # verdicts of minilora, PEFT on a causal model, PEFT on the wrapper, and the others of `READERS`
    "plain": (RIGHT, RIGHT, NOTHING, NOTHING, RIGHT, RIGHT),
    "wrapper's names": (RIGHT, NOTHING, RIGHT, RIGHT, RIGHT, RIGHT),
}


def rename_tensors(adapter: Path, old: str, new: str) -> None:
    """Replace a part of the names; PREFIX is the first one, and the model's own."""
    tensors = load_file(adapter / WEIGHTS_FILE)
    save_file({name.replace(old, new, 1) if old else name: t for name, t in tensors.items()}, adapter / WEIGHTS_FILE)


def write_case(directory: Path, name: str) -> tuple[Path, Path]:
    """Write the base and the adapter of a case; their directories."""
    base, adapter = write_base_of(directory, name), directory / "adapter"
    write_adapter(ml.load_model(base), adapter, **config_of(name))
    return base, spoil(adapter, name)


def write_base_of(directory: Path, name: str) -> Path:
    return write_base(directory / "base", num_hidden_layers=2, tie_word_embeddings=CASES[name].is_tied)


def config_of(name: str) -> dict[str, Any]:
    return {"target_modules": ("q_proj", "v_proj", "down_proj"), "r": 3, "lora_alpha": 21, **CASES[name].config}


def spoil(adapter: Path, name: str) -> Path:
    """Do to an adapter's files what the case asks for."""
    case = CASES[name]
    if case.zero:
        tensors = load_file(adapter / WEIGHTS_FILE)
        save_file({k: t * ("lora_A" in k) for k, t in tensors.items()}, adapter / WEIGHTS_FILE)
    if case.rename[0]:
        rename_tensors(adapter, *case.rename)
    if case.changes:
        edit(adapter, **case.changes)
    return adapter


def write_wrapper(directory: Path) -> Path:
    """Write a tiny Llama in a wrapper with another part."""
    text = write_base(directory / "text", num_hidden_layers=2, tie_word_embeddings=True)
    out = directory / "wrapper"
    out.mkdir()
    tensors = {n.replace("model.", INNER, 1): t for n, t in load_file(text / "model.safetensors").items()}
    save_file({**tensors, "model.visual.proj.weight": torch.ones(3, 4)}, out / "model.safetensors")
    config = {"model_type": "seeing", "text_config": json.loads((text / "config.json").read_text())}
    (out / "config.json").write_text(json.dumps(config))
    return out
