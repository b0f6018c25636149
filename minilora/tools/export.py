"""The plain form of an adapter, for readers that know A, B and α/r and nothing else.

    B ← s·B,   A and B with zeros up to one rank r,   α = r:    α/r·B A = s·B A

Readers that take no notice of rsLoRA, or of patterns of ranks and α, then compute what the adapter does. A stays as it
is. A number of B is rounded once, to float32, and not at all where s is a power of two, so that what becomes of ΔW is

    |ΔW′ - ΔW| ≤ 2⁻²⁴·|s|·|B| |A|,   number by number
"""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from minilora.adapters.combine import NOT_ADDED
from minilora.adapters.files import write_adapter
from minilora.adapters.layout import PREFIX, REPEATED, WEIGHTS_FILE, factor_name, understood
from minilora.adapters.stored import BRINGS, Stored, read_adapter
from minilora.errors import ConfigError
from minilora.models.hub import fetch
from minilora.storage import TensorFile

PLAIN = {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True}
NOT_PLAIN = {field: why for field, why in NOT_ADDED.items() if field != "task_type"}


def export_adapter(path: str | Path, out: str | Path) -> int:
    """Write the plain form of an adapter as one of PEFT's layout; its rank.

    `path` is the adapter's directory, or a repository of the hub, "org/name" or "org/name@revision".

    Raises:
        FormatError: the adapter is missing or malformed.
        ConfigError: it does more than add s·B A; all of that is named, with the reasons.
    """
    stored = read_adapter(fetch(path, "adapter"))
    if reasons := more_than_plain(stored):
        raise ConfigError(
            f"{stored.path} has no plain form:\n  "
            + "\n  ".join(reasons)
            + "\nevery reader takes the model that minilora merge makes with it"
        )
    rank, tensors = plain_tensors(stored)
    fields = {**stored.values, **PLAIN, "r": rank, "lora_alpha": rank}
    metadata = TensorFile(stored.path / WEIGHTS_FILE).metadata
    write_adapter(Path(out), fields, tensors, metadata)
    return rank


def more_than_plain(stored: Stored) -> list[str]:
    """What an adapter does besides adding s·B A, each with the reason why B A cannot do it."""
    held = {key for each in stored.tensors.values() for key in each}
    fields = {key for key in NOT_PLAIN if stored.values.get(key) not in (None, False, "none", [], {})}
    fields |= {field for key, field in BRINGS.items() if key in held}
    reasons = [f"{field}: {why}" for field, why in NOT_PLAIN.items() if field in fields]
    if stored.tensors.get("") and not fields & {"modules_to_save", "bias"}:
        reasons.append(f"{next(iter(stored.tensors['']))}: a parameter of the model itself, trained in full")
    if (init := stored.values.get("init_lora_weights")) in REPEATED:
        reasons.append(f"init_lora_weights: {init!r} has its start in the base's weights")
    return reasons


def plain_tensors(stored: Stored) -> tuple[int, dict[str, Tensor]]:
    """The largest rank, and the tensors by their names in PEFT's file, each pair of this rank and of scale 1.

    Raises:
        ConfigError: a convolution in groups, whose A is of one rank and B of another, has not the largest.
    """
    factors = stored.factors()
    ranks = {where: len(lora_A) for where, (lora_A, _, _) in factors.items()}
    rank, tensors = max(ranks.values()), {}
    if uneven := [where for where, r in ranks.items() if r != rank and factors[where].lora_B.size(1) != r]:
        raise ConfigError(f"{uneven[0]}: a convolution in groups takes no zeros, and others have the rank {rank}")
    for name in TensorFile(stored.path / WEIGHTS_FILE).shapes:
        where, key = understood(name)
        tensor = stored.tensors[where][key]
        if key == "weight":
            tensors[f"{PREFIX}{where}.base_layer.weight"] = tensor
            continue
        if key == "lora_B":  # in float64, or s would be rounded too
            tensor = (factors[where].scale * tensor.double()).to(tensor.dtype)
        is_embedding = "lora_embedding_" in name
        tensors[factor_name(where, key, is_embedding)] = _widened(tensor, 0 if key == "lora_A" else 1, rank)
    return rank, tensors


def _widened(factor: Tensor, dim: int, rank: int) -> Tensor:
    """Zeros after the factor, up to the rank."""
    missing = rank - factor.size(dim)
    return F.pad(factor, (0, 0) * (factor.dim() - 1 - dim) + (0, missing))
