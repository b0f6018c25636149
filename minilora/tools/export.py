"""Write the plain form of an adapter, for readers that know only A, B and α/r.

    B ← s·B,   A and B padded with zeros to one rank r,   α = r:    α/r·B A = s·B A

Readers that ignore rsLoRA, or patterns of ranks and α, then compute the same change. A is not rounded. An element of B
is rounded once, to float32, and not at all if s is a power of two, so that the error of ΔW is bounded by

    |ΔW′ - ΔW| ≤ 2⁻²⁴·|s|·|B| |A|,   element by element
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from minilora.adapter import PREFIX
from minilora.adapters.combine import NOT_ADDED
from minilora.adapters.layout import (
    FIELD_OF_TENSOR,
    PLAIN_INITS,
    WEIGHTS_FILE,
    Stored,
    factor_name,
    parse_tensor_name,
    read_adapter,
    unknown_fields,
    write_adapter,
)
from minilora.errors import ConfigError
from minilora.models.hub import fetch
from minilora.storage import TensorFile

FOLDED = {
    "use_rslora": "the scale is lora_alpha / √r",
    "rank_pattern": "modules have ranks of their own",
    "alpha_pattern": "modules have a lora_alpha of their own",
}
KEPT = {"embeddings": "A and B of an embedding", "convolutions": "A and B of a convolution"}
NOT_PLAIN = {field: why for field, why in NOT_ADDED.items() if field != "task_type"}
PLAIN = {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True}


def features(values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Return the features of an adapter beyond A and B of linears with one scale α/r, each with its effect.

    `values` is its adapter_config.json, `shapes` has the shapes of its tensors by their names in the file.
    """
    places = {name: parse_tensor_name(name) for name in shapes}
    found = {field for field in FOLDED | NOT_PLAIN if values.get(field) not in (None, False, "none", [], {})}
    found |= {FIELD_OF_TENSOR[key] for _, key in places.values() if key in FIELD_OF_TENSOR}
    if any(not module for module, _ in places.values()) and not found & {"modules_to_save", "bias"}:
        found.add("modules_to_save")
    if any("lora_embedding_" in name for name in places):
        found.add("embeddings")
    if any(key == "lora_A" and len(shapes[name]) > 2 for name, (_, key) in places.items()):
        found.add("convolutions")
    effects = {name: effect for name, effect in (FOLDED | NOT_PLAIN | KEPT).items() if name in found}
    if (init := values.get("init_lora_weights", True)) not in PLAIN_INITS:
        effects["init_lora_weights"] = f"{init!r:.60} changes the base's weights at the start"
    return effects | {key: f"{value!r:.60}" for key, value in unknown_fields(values).items()}


def export_adapter(path: str | Path, out: str | Path) -> int:
    """Write the plain form of an adapter in PEFT's layout, and return its rank.

    `path` is a directory, or a repository of the hub, "org/name" or "org/name@revision".

    Raises:
        FormatError: the adapter is missing or malformed.
        ConfigError: the adapter has features without a plain form, all of which are named.
    """
    stored = read_adapter(fetch(path, "adapter"))
    file = TensorFile(stored.path / WEIGHTS_FILE)
    found = features(stored.values, file.shapes)
    if reasons := [f"{name}: {why}" for name, why in found.items() if name not in FOLDED | KEPT]:
        raise ConfigError(
            f"{stored.path} has no plain form:\n  "
            + "\n  ".join(reasons)
            + "\n`minilora merge` writes a model, which every reader can load"
        )
    rank, tensors = plain_tensors(stored, file.shapes)
    write_adapter(Path(out), {**stored.values, **PLAIN, "r": rank, "lora_alpha": rank}, tensors, file.metadata)
    return rank


def plain_tensors(stored: Stored, names: Iterable[str]) -> tuple[int, dict[str, Tensor]]:
    """Return the largest rank, and the tensors of these names in PEFT's file, all A and B of this rank and scale 1.

    Raises:
        ConfigError: a convolution in groups has a smaller rank; its A and B differ in rank and cannot be padded.
    """
    factors = stored.factors()
    ranks = {where: len(lora_A) for where, (lora_A, _, _) in factors.items()}
    rank, tensors = max(ranks.values()), {}
    if uneven := [where for where, r in ranks.items() if r != rank and factors[where].lora_B.size(1) != r]:
        raise ConfigError(f"{uneven[0]}: a convolution in groups cannot be padded to the rank {rank} of others")
    for name in names:
        where, key = parse_tensor_name(name)
        tensor = stored.tensors[where][key]
        if key == "weight":
            tensors[f"{PREFIX}{where}.base_layer.weight"] = tensor
            continue
        if key == "lora_B":  # in float64, or s would be rounded too
            tensor = (factors[where].scale * tensor.double()).to(tensor.dtype)
        dim = 0 if key == "lora_A" else 1  # of the rank; F.pad counts from the last
        padding = (0, 0) * (tensor.dim() - 1 - dim) + (0, rank - tensor.size(dim))
        tensors[factor_name(where, key, "lora_embedding_" in name)] = F.pad(tensor, padding)
    return rank, tensors
