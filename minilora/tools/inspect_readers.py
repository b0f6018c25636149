"""Which tools read a model or an adapter: why one does not, as far as the files show it. No tool is asked but minilora.

PEFT        each tensor under its own name and of the rank that the config gives, and of each kind that the config names
vLLM        A and B of linears and of the embedding, and one scale for all of them: α/r, or α/√r with rsLoRA
llama.cpp   as convert_lora_to_gguf.py passes it on: A and B of matrices, each pair with the scale α/r, r its own rank
mlx-lm      a layout of its own; it has no reader for that of PEFT

Where a tool reads an adapter and computes something else, that is no reading: vLLM takes no notice of patterns, nor
llama.cpp of rsLoRA, and neither of a start that changes the base's weights. These are the rules of their releases up
to 2026.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from minilora.adapters.config import LoraConfig, matches
from minilora.adapters.functional import lora_scale
from minilora.adapters.layout import INFORMATION, PEFT_DEFAULTS, PLAIN_INITS, PREFIX, READ, is_name, understood
from minilora.errors import MiniloraError

ENDINGS = {  # how PEFT spells the tensors of a module
    "lora_A": ("lora_A.weight", "lora_embedding_A"),
    "lora_B": ("lora_B.weight", "lora_embedding_B"),
    "lora_bias": ("lora_B.bias",),
    "magnitude": ("lora_magnitude_vector", "lora_magnitude_vector.weight"),
    "bias": ("base_layer.bias",),
    "weight": ("base_layer.weight",),
    "rows": ("token_adapter.trainable_tokens_delta",),
}
BRINGS = {"use_dora": "magnitude", "lora_bias": "lora_bias", "trainable_token_indices": "rows"}
VLLM = {  # fields that it refuses, or that bring tensors that it refuses
    "use_dora": "it has no DoRA",
    "bias": "it takes no biases",
    "lora_bias": "it takes no biases",
    "modules_to_save": "it takes no module that was trained in full",
    "trainable_token_indices": "it takes no rows of an embedding",
    "target_parameters": "it takes experts in one tensor for a few models only",
    "fan_in_fan_out": "it takes no adapters for models whose weights lie that way, such as GPT-2",
}
LLAMA_CPP = {
    "use_dora": "it has no DoRA",
    "target_parameters": "A and B of experts in one tensor belong to no weight that it knows",
    "fan_in_fan_out": "it turns such weights around, and A and B with them",
}
MLX_LM = "its layout is its own: adapters.safetensors with lora_a (in, r), lora_b (r, out) and one scale in the JSON"
ENDS = ("embed_tokens", "lm_head")
FACTORS = (*ENDINGS["lora_A"], *ENDINGS["lora_B"])
NOTHING: tuple[Any, ...] = (None, False, "none", [], {})


class Part(NamedTuple):
    """One tensor: the path of its module and what it is there, as `layout.understood` has it, and its spelling."""

    where: str
    key: str
    ending: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Seen:
    """What a reader looks at: the JSON, the config that it means (None where it cannot be known) and the tensors.

    `ranks` and `scales` are those of the modules; a scale is None where it is unknown. `is_tied`: the base's head is
    known to be its embedding.
    """

    values: Mapping[str, Any]
    config: LoraConfig | None
    parts: Mapping[str, Part]
    ranks: Mapping[str, int]
    scales: Mapping[str, float | None]
    is_tied: bool


def part(name: str, shape: tuple[int, ...]) -> Part:
    where, key = understood(name)
    return Part(where, key, name.removeprefix(PREFIX).removeprefix(f"{where}."), shape)


def minilora_problems(read: Callable[[], object]) -> list[str]:
    """What minilora says when it tries."""
    try:
        read()
    except MiniloraError as error:
        first, *details = (line.strip() for line in str(error).splitlines())
        return details or [first]
    return []


def transformers_problems(config: Mapping[str, Any], metadata: Iterable[Mapping[str, str]]) -> list[str]:
    problems = [] if isinstance(config.get("model_type"), str) else ["config.json has no model_type"]
    return problems + ['the metadata of a file has no "format"'] * any("format" not in found for found in metadata)


def other_problems(seen: Seen) -> dict[str, list[str]]:
    """Tool -> why it does not read an adapter of PEFT's layout as it is."""
    return {
        "PEFT": peft_problems(seen),
        "vLLM": vllm_problems(seen),
        "llama.cpp": llama_cpp_problems(seen),
        "mlx-lm": [MLX_LM],
    }


def peft_problems(seen: Seen) -> list[str]:
    """It builds the adapter from the config alone, and passes over what has no place there without a word."""
    values, held = seen.values, {(each.where, each.key) for each in seen.parts.values()}
    keys = {key for _, key in held}
    problems = _damage(values)
    if values.get("peft_type") != "LORA" and any(each.ending in FACTORS for each in seen.parts.values()):
        problems.append(f"peft_type is {values.get('peft_type')!r:.60}, and the tensors are those of LORA")
    problems += _first(f"{name} does not begin with {PREFIX}" for name in seen.parts if not name.startswith(PREFIX))
    problems += _first(
        f"{name} has a name that it does not give"
        for name, each in seen.parts.items()
        if each.where and each.ending.replace(".default", "") not in ENDINGS[each.key]
    )
    problems += _first(f"{name} has no numbers" for name, each in seen.parts.items() if 0 in each.shape)
    for field, key in BRINGS.items():
        if bool(values.get(field)) != (key in keys):
            problems.append(f"{field} is {values.get(field)!r:.60}, and there is {'a' if key in keys else 'no'} {key}")
    for factor, other in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
        lone = sorted(where for where, key in held if key == factor and (where, other) not in held)
        problems += _first(f"{where} has no {other}" for where in lone)
    whole, own = (
        values.get("modules_to_save"),
        [each.key.rpartition(".")[0] for each in seen.parts.values() if not each.where],
    )
    for name in whole if isinstance(whole, list) else []:
        if not any(matches((str(name),), path) for path in own):
            problems.append(f"modules_to_save has {name!r}, of which there is no tensor")
    if seen.config is not None and all(map(is_name, values.get("rank_pattern") or {})):
        rank = seen.config.rank
        problems += _first(
            f"{at} has rank {r}, by the config {rank(at)}" for at, r in seen.ranks.items() if rank(at) != r
        )
    return problems


def _damage(values: Mapping[str, Any]) -> list[str]:
    """What it stumbles over while it builds an adapter from the config."""
    r, alpha = values.get("r", 8), values.get("lora_alpha", 8)
    problems = [] if isinstance(values.get("peft_type"), str) else ["adapter_config.json has no peft_type"]
    problems += [f"r is {r!r:.60}, need a whole number above 0"] * (not isinstance(r, int) or r < 1)
    problems += [f"lora_alpha is {alpha!r:.60}, need a number"] * (not isinstance(alpha, int | float))
    return problems + [
        f"{key} is {values[key]!r:.60}, need an object"
        for key in ("rank_pattern", "alpha_pattern")
        if not isinstance(values.get(key, {}), dict)
    ]


def vllm_problems(seen: Seen) -> list[str]:
    """It refuses by field and by name, and gives every module the scale that r, α and rsLoRA of the config make."""
    values, config = seen.values, seen.config
    problems = [f"there is no {key}" for key in ("r", "lora_alpha", "target_modules") if values.get(key) is None]
    problems += _refused(values, VLLM)
    only = lora_scale(config.r, config.lora_alpha, config.use_rslora) if config is not None else None
    problems += _first(
        f"{at} has another scale than all: minilora export folds scales into B"
        for at, scale in seen.scales.items()
        if only is None or scale != only
    )
    return problems + _first(
        f"{name.removeprefix(PREFIX)}: it loads no such tensor"
        for name, each in seen.parts.items()
        if not _vllm_loads(each)
    )


def _vllm_loads(each: Part) -> bool:
    """Copies of the base are passed over where they are the embedding's or the head's."""
    last = each.where.rpartition(".")[2]
    if each.key == "weight":
        return last in ENDS
    is_embedding = last == "embed_tokens" and each.ending in ("lora_embedding_A", "lora_embedding_B")
    return (is_embedding or each.ending in ("lora_A.weight", "lora_B.weight")) and len(each.shape) == 2


def llama_cpp_problems(seen: Seen) -> list[str]:
    """Its converter stops at tensors other than A, B and norms; its runtime computes α/r from the rank of each B."""
    problems = [] if seen.values.get("lora_alpha") is not None else ["there is no lora_alpha"]
    problems += _refused(seen.values, LLAMA_CPP)
    alpha = seen.config.lora_alpha if seen.config is not None else None
    problems += _first(
        f"{at} has another scale than lora_alpha / r: minilora export folds scales into B"
        for at, scale in seen.scales.items()
        if alpha is None or scale != lora_scale(seen.ranks.get(at, 1), alpha)
    )
    problems += _first(
        f"{at}: embedding and head are one tensor there, which takes no adapter for one of them"
        for at in seen.scales
        if seen.is_tied and at.rpartition(".")[2] in ENDS
    )
    return problems + _first(
        f"{name.removeprefix(PREFIX)}: {'norms stay as they are' if _is_norm(name) else 'its converter stops there'}"
        for name, each in seen.parts.items()
        if each.key != "weight" and not (each.ending in FACTORS and len(each.shape) == 2)
    )


def _is_norm(name: str) -> bool:
    """Does its converter take it for a norm, which its runtime then passes over?"""
    return "_layernorm" in name or ".norm" in name


def _refused(values: Mapping[str, Any], fields: Mapping[str, str]) -> list[str]:
    """Fields that say something which a reader refuses, or that it does not know."""
    problems = [f"{field}: {why}" for field, why in fields.items() if values.get(field) not in NOTHING]
    init = values.get("init_lora_weights", True)
    if init not in PLAIN_INITS:
        problems.append(f"init_lora_weights is {init!r}, which changes the base's weights")
    known = READ | INFORMATION
    strange = [key for key, value in values.items() if value and key not in known and PEFT_DEFAULTS.get(key) != value]
    return problems + [f"{key} is {values[key]!r:.60}, of which it takes no notice" for key in strange]


def _first(reasons: Iterable[str]) -> list[str]:
    """One is enough where they are all of a kind."""
    return list(itertools.islice(reasons, 1))
