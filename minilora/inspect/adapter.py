"""What an adapter directory holds, also one that minilora does not load, and how large its changes are.

    ΔW = s·B A,   ‖ΔW‖ / ‖W‖   in the norm of Frobenius
    effective rank  exp(-Σ pᵢ log pᵢ),  pᵢ = σᵢ² / Σ σ²,  σ the singular values of ΔW

The effective rank is the number of equally strong directions that would spread ΔW's squared norm as evenly: 1 if all of
it lies in one direction, r if all r directions are equally strong. Deltas are never formed, and read one at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.errors import FormatError
from minilora.inspect.readers import minilora_problems, peft_problems, vllm_problems
from minilora.lora.config import LoraConfig
from minilora.lora.files import (
    BASE_COPY,
    CONFIG_FILE,
    DTYPES,
    PREFIX,
    WEIGHTS_FILE,
    check_keys,
    config_from,
    is_name,
    load_adapter,
    read_factors,
)
from minilora.lora.functional import lora_scale
from minilora.model.checkpoint import load_model
from minilora.model.shards import tensor_files
from minilora.quant.files import packed_weights, read_packed
from minilora.quant.nf4 import unpack
from minilora.storage import TensorEntry, TensorFile, read_json

# The adapter's own name may stand before "weight"; an embedding's factors have no "weight".
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?:embedding_)?(?P<side>[AB])(?:(?:\.[^.]+)?\.weight)?")
RESHAPED = ("target_parameters", "use_qalora", "use_bdlora", "kasa_config")  # whose B A is not the change
CHUNK = 2**22  # numbers that are widened to float64 at a time


@dataclass(frozen=True)
class ModuleFacts:
    """One adapted module. None: not known, because the config or the base does not say, or a number is not finite."""

    module: str
    rank: int
    shape: tuple[int, int]
    scale: float | None
    delta_norm: float | None
    base_norm: float | None
    relative_norm: float | None
    effective_rank: float | None


@dataclass(frozen=True)
class AdapterFacts:
    """An adapter: its config as it is, where its base model was found, of a checkpoint the step.

    `problems` maps a tool to why it does not read the adapter: to nothing, if it does.
    """

    path: str
    config: dict[str, Any]
    base: str | None
    step: Any
    tensors: dict[str, TensorEntry]
    modules: tuple[ModuleFacts, ...]
    other_tensors: tuple[str, ...]
    problems: dict[str, list[str]]


def adapter_facts(directory: Path, base: Path | None = None) -> AdapterFacts:
    """What the adapter in a directory holds; `base` is the directory of its base model, where that is to be had.

    Raises:
        FormatError: a file is missing or damaged.
    """
    values, file = read_json(directory / CONFIG_FILE), TensorFile(directory / WEIGHTS_FILE)
    pairs = {} if any(values.get(key) for key in RESHAPED) else _pairs(file)
    ranks = {module: file.shapes[lora_A][0] for module, (lora_A, _) in pairs.items()}
    declared, config = (_config(directory / CONFIG_FILE, values, given) for given in ({}, ranks))
    weights = tensor_files(base) if base is not None else {}
    modules = [_module_facts(module, file, pair, config, weights) for module, pair in pairs.items()]
    used, state = {name for pair in pairs.values() for name in pair}, directory / "state.json"
    return AdapterFacts(
        path=str(directory),
        config=values,
        base=None if base is None else str(base),
        step=read_json(state).get("step") if state.is_file() else None,
        tensors=file.entries,
        modules=tuple(modules),
        other_tensors=tuple(name for name in file.shapes if name not in used),
        problems={
            "minilora": minilora_problems(lambda: _load(directory, values, base)),
            "PEFT": peft_problems(values, declared, file.shapes, ranks),
            "vLLM": vllm_problems(values, declared, file.shapes, [facts.scale for facts in modules]),
        },
    )


def delta_spectrum(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Singular values of B A, without B A: those of R_B R_Aᵀ, where B = Q_B R_B and Aᵀ = Q_A R_A.

    Q_B and Q_A have orthonormal columns, which change no singular value. The shorter way to the norm,
    tr((BᵀB)(AAᵀ)), loses half of the digits where B and A nearly cancel.

    Shapes: lora_A (r, in), lora_B (out, r) -> (k,) with k = min(r, in, out), the largest first;
    nan where a number or a product is not finite.
    """
    R_A, R_B = (torch.linalg.qr(factor, mode="r").R for factor in (lora_A.T, lora_B))
    core = R_B @ R_A.T
    # The singular values of what is not finite are an error.
    return torch.linalg.svdvals(core) if core.isfinite().all() else torch.full((1,), math.nan)


def effective_rank(singular_values: Tensor) -> float:
    """exp(-Σ pᵢ log pᵢ),  pᵢ = σᵢ² / Σ σ²; 0 for zero. The largest comes first.

    >>> effective_rank(torch.tensor([3.0, 3.0, 0.0]))
    2.0
    """
    if not singular_values.numel() or singular_values[0] == 0:
        return 0.0
    energy = (singular_values / singular_values[0]).square()  # whose squares neither overflow nor vanish
    return torch.special.entr(energy / energy.sum()).sum().exp().item()


def frobenius_norm(weight: Tensor) -> float:
    """‖W‖_F, summed in float64, a few rows at a time.

    Shapes: weight (out, in) -> a number
    """
    rows = max(1, CHUNK // max(1, weight.shape[-1]))
    return math.sqrt(sum(part.double().square().sum().item() for part in weight.split(rows)))


def _pairs(file: TensorFile) -> dict[str, tuple[str, str]]:
    """Path of a module -> the names of its A and its B, where they are matrices that fit together."""
    found: dict[str, dict[str, str]] = {}
    for name, shape in file.shapes.items():
        factor = FACTOR.fullmatch(name)
        if factor and len(shape) == 2:
            found.setdefault(factor["module"].removeprefix(PREFIX), {}).setdefault(factor["side"], name)
    pairs = {module: (pair["A"], pair["B"]) for module, pair in found.items() if len(pair) == 2}
    return {module: (A, B) for module, (A, B) in pairs.items() if file.shapes[A][0] == file.shapes[B][1] > 0}


def _config(path: Path, values: Mapping[str, Any], ranks: Mapping[str, int]) -> LoraConfig | None:
    """The config that scales come from; None where it is damaged, or tells them by regular expressions."""
    patterns = [values.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
    if not all(isinstance(pattern, dict) for pattern in patterns) or not all(map(is_name, patterns[1])):
        return None
    try:
        return config_from(path, values, ranks)
    except FormatError:
        return None


def _module_facts(
    module: str,
    file: TensorFile,
    pair: tuple[str, str],
    config: LoraConfig | None,
    weights: Mapping[str, TensorFile],
) -> ModuleFacts:
    lora_A, lora_B = (file.read(name) for name in pair)
    rank, shape = lora_A.size(0), (lora_B.size(0), lora_A.size(1))
    scale = lora_scale(rank, config.alpha(module), config.use_rslora) if config is not None else None
    delta_norm = spread = None
    if {lora_A.dtype, lora_B.dtype} <= set(DTYPES):
        spectrum = delta_spectrum(lora_A.double(), lora_B.double())
        if spectrum.isfinite().all():
            spread = effective_rank(spectrum)
            delta_norm = scale * torch.linalg.vector_norm(spectrum).item() if scale is not None else None
    base_norm = _base_norm(weights, module, shape)
    relative_norm = delta_norm / base_norm if delta_norm is not None and base_norm else None
    return ModuleFacts(module, rank, shape, scale, delta_norm, base_norm, relative_norm, spread)


def _base_norm(weights: Mapping[str, TensorFile], module: str, shape: tuple[int, int]) -> float | None:
    """‖W‖ of a module of the base, where its shape is that or the transposed one; of a packed one as it acts."""
    tied = ["model.embed_tokens.weight"] if module == "lm_head" else []
    name = next((name for name in (f"{module}.weight", *tied) if name in weights), None)
    if name is None:
        return None
    if packed := packed_weights(part for part in weights if part.startswith(name)):
        parts, layout = read_packed(weights, packed[name], torch.device("cpu"))
        return frobenius_norm(unpack(parts, layout, torch.float32)) if layout.shape == shape else None
    if weights[name].shapes[name] not in (shape, shape[::-1]):
        return None
    weight = weights[name].read(name)
    return frobenius_norm(weight) if weight.dtype in DTYPES else None


def _load(directory: Path, values: Mapping[str, Any], base: Path | None) -> None:
    """What `load_adapter` does; without the base, the part of it that looks at the adapter alone."""
    if base is not None:
        # Without storage all is checked but copies of the base's weights, whose numbers are compared.
        has_copies = any(re.fullmatch(BASE_COPY, name) for name in TensorFile(directory / WEIGHTS_FILE).shapes)
        load_adapter(load_model(base, device="cpu" if has_copies else "meta"), directory)
    else:
        check_keys(directory / CONFIG_FILE, values)
        ranks = {module: lora_A.size(0) for module, (lora_A, _) in read_factors(directory).items()}
        config_from(directory / CONFIG_FILE, values, ranks)
