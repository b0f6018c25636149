"""What an adapter directory holds, also one that minilora does not load, and how large its changes are.

    ΔW = s·B A,   ‖ΔW‖ / ‖W‖   in the norm of Frobenius
    effective rank  exp(-Σ pᵢ log pᵢ),  pᵢ = σᵢ² / Σ σ²,  σ the singular values of ΔW

The effective rank is the number of equally strong directions that would spread ΔW's squared norm as evenly: 1 if all of
it lies in one direction, r if all r directions are equally strong. Deltas are never formed, and read one at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.errors import FormatError
from minilora.inspect.readers import RESHAPED, Reader, adapter_readers
from minilora.inspect.tensors import TensorFacts, dtype_counts, file_facts
from minilora.lora.config import LoraConfig
from minilora.lora.files import BASE_COPY, CONFIG_FILE, DTYPES, PREFIX, WEIGHTS_FILE, check_keys, config_from, is_name
from minilora.lora.functional import lora_scale
from minilora.model.checkpoint import tensor_files
from minilora.storage import TensorFile, read_json

# The adapter's own name may stand before "weight"; an embedding's factors have no "weight".
FACTOR = re.compile(r"(?P<module>.+)\.(?:lora_(?P<linear>[AB])(?:\.[^.]+)?\.weight|lora_embedding_(?P<embedding>[AB]))")
CHUNK = 2**22  # numbers that are widened to float64 at a time

Pairs = dict[str, dict[str, TensorFacts]]  # path of a module -> its A and B


@dataclass(frozen=True)
class ModuleFacts:
    """One adapted module. None: not known, because the config or the base does not say, or a number is not finite."""

    module: str
    rank: int
    shape: tuple[int, int]
    alpha: float | None
    scale: float | None
    delta_norm: float | None
    base_norm: float | None
    relative_norm: float | None
    effective_rank: float | None


@dataclass(frozen=True)
class AdapterFacts:
    """An adapter; `config` is what its file says, `base` where the base model was found."""

    path: str
    config: dict[str, Any]
    base: str | None
    modules: tuple[ModuleFacts, ...]
    other_tensors: tuple[str, ...]
    parameters: int
    dtypes: dict[str, int]
    bytes: int
    readers: tuple[Reader, ...]


def adapter_facts(directory: Path, base: Path | None = None) -> AdapterFacts:
    """What the adapter in a directory holds; `base` is the directory of its base model, where that is to be had.

    Raises:
        FormatError: a file is missing or damaged.
    """
    values, file = read_json(directory / CONFIG_FILE), file_facts(directory / WEIGHTS_FILE)
    pairs, others = _pairs(file.tensors)
    ranks = {module: pair["A"].shape[0] for module, pair in pairs.items()}
    modules = _modules(directory, values, pairs, tensor_files(base) if base is not None else {})
    problems = [*_problems(directory, values, file.tensors, others), *(problem for _, problem in modules if problem)]
    scales = {facts.module: facts.scale for facts, _ in modules}
    names = [tensor.name for tensor in file.tensors]
    return AdapterFacts(
        path=str(directory),
        config=values,
        base=None if base is None else str(base),
        modules=tuple(facts for facts, _ in modules),
        other_tensors=tuple(others),
        parameters=sum(tensor.count for tensor in file.tensors),
        dtypes=dtype_counts(file.tensors),
        bytes=file.bytes,
        readers=adapter_readers(values, names, ranks, _declared_ranks(directory, values, ranks), scales, problems),
    )


def delta_spectrum(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Singular values of B A, without B A: those of R_B R_Aᵀ, where B = Q_B R_B and Aᵀ = Q_A R_A.

    Q_B and Q_A have orthonormal columns, which change no singular value. The shorter way to the norm,
    tr((BᵀB)(AAᵀ)), loses half of the digits where B and A nearly cancel.

    Shapes: lora_A (r, in), lora_B (out, r) -> (k,) with k = min(r, in, out), the largest first;
    nan where a product is too large for a float64.
    """
    R_A, R_B = (torch.linalg.qr(factor, mode="r").R for factor in (lora_A.T, lora_B))
    core = R_B @ R_A.T
    is_finite = bool(core.isfinite().all())  # the singular values of other matrices are an error
    return torch.linalg.svdvals(core) if is_finite else torch.full((min(core.shape),), math.nan)


def effective_rank(singular_values: Tensor) -> float:
    """exp(-Σ pᵢ log pᵢ),  pᵢ = σᵢ² / Σ σ²; 0 for zero. The largest comes first.

    >>> effective_rank(torch.tensor([3.0, 3.0, 0.0]))
    2.0
    """
    if not singular_values.numel() or singular_values[0] == 0:
        return 0.0
    energy = (singular_values / singular_values[0]).square()  # whose squares neither overflow nor vanish
    return torch.special.entr(energy / energy.sum()).sum().exp().item()


def _pairs(tensors: Sequence[TensorFacts]) -> tuple[Pairs, list[str]]:
    """The factors by module, and the names of all tensors that are not one of two matrices which fit together."""
    found: Pairs = {}
    others = []
    for tensor in tensors:
        name = FACTOR.fullmatch(tensor.name)
        pair = found.setdefault(name["module"].removeprefix(PREFIX), {}) if name else {}
        side = (name["linear"] or name["embedding"]) if name else ""
        if name is None or len(tensor.shape) != 2 or side in pair:
            others.append(tensor.name)
        else:
            pair[side] = tensor
    fitting = {m: p for m, p in found.items() if len(p) == 2 and p["A"].shape[0] == p["B"].shape[1] > 0}
    others += [tensor.name for module, pair in found.items() if module not in fitting for tensor in pair.values()]
    return fitting, others


def _problems(
    directory: Path, values: Mapping[str, Any], tensors: Sequence[TensorFacts], others: Sequence[str]
) -> list[str]:
    """Why `load_adapter` refuses the adapter, as far as the config and the names say."""
    problems: list[str] = []
    try:
        check_keys(directory / CONFIG_FILE, values)
        config_from(directory / CONFIG_FILE, values, {})
    except FormatError as error:
        problems += [line.strip() for line in str(error).partition(":\n")[2].splitlines()] or [str(error)]
    odd = [tensor.name for tensor in tensors if not tensor.name.startswith(PREFIX) or ".lora_embedding_" in tensor.name]
    odd += [name for name in others if name not in odd and not re.fullmatch(BASE_COPY, name)]
    return problems + ([f"{len(odd)} tensors are not the A or B of a linear: {odd[0]}"] if odd else [])


def _scaling(path: Path, values: Mapping[str, Any], ranks: Mapping[str, int]) -> LoraConfig | None:
    """The config that scales come from; None where it has none, or tells them by regular expressions."""
    patterns = [values.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
    if not all(isinstance(pattern, dict) for pattern in patterns) or not all(map(is_name, patterns[1])):
        return None
    try:
        return config_from(path, values, ranks)
    except FormatError:
        return None


def _declared_ranks(directory: Path, values: Mapping[str, Any], modules: Iterable[str]) -> dict[str, int]:
    """The rank that the config, not the tensors, gives to each module; none where only regular expressions tell it."""
    config = _scaling(directory / CONFIG_FILE, values, {})
    if config is None or not all(map(is_name, values.get("rank_pattern") or {})):
        return {}
    return {module: config.rank(module) for module in modules}


def _modules(
    directory: Path, values: Mapping[str, Any], pairs: Pairs, weights: Mapping[str, TensorFile]
) -> list[tuple[ModuleFacts, str | None]]:
    """Each module, and what is wrong with it; its factors and its base's weight are let go before the next."""
    config = _scaling(directory / CONFIG_FILE, values, {module: pair["A"].shape[0] for module, pair in pairs.items()})
    file, found = TensorFile(directory / WEIGHTS_FILE), []
    is_product = not any(values.get(key) for key in RESHAPED)
    for module, pair in pairs.items():
        factors, weight, problem = _factors(file, pair), _base_weight(weights, module), None
        if factors is None:
            problem = f"{module}: A or B is not of finite floating-point numbers"
        elif weights and is_product and (misfit := _misfit(pair, weight, bool(values.get("fan_in_fan_out")))):
            problem, weight = f"{module}: {misfit}", None
        found.append((_module_facts(module, pair, config, factors if is_product else None, weight), problem))
    return found


def _module_facts(
    module: str,
    pair: Mapping[str, TensorFacts],
    config: LoraConfig | None,
    factors: tuple[Tensor, Tensor] | None,
    weight: Tensor | None,
) -> ModuleFacts:
    rank, shape = pair["A"].shape[0], (pair["B"].shape[0], pair["A"].shape[1])
    alpha = config.alpha(module) if config is not None else None
    scale = lora_scale(rank, alpha, config.use_rslora) if config is not None and alpha is not None else None
    delta_norm = base_norm = relative_norm = spread = None
    spectrum = delta_spectrum(*factors) if factors is not None else None
    if spectrum is not None and bool(spectrum.isfinite().all()):
        spread = effective_rank(spectrum)
        delta_norm = scale * torch.linalg.vector_norm(spectrum).item() if scale is not None else None
    if weight is not None and weight.dtype in DTYPES:
        base_norm = frobenius_norm(weight)
    if delta_norm is not None and base_norm:
        relative_norm = delta_norm / base_norm
    return ModuleFacts(module, rank, shape, alpha, scale, delta_norm, base_norm, relative_norm, spread)


def frobenius_norm(weight: Tensor) -> float:
    """‖W‖_F, summed in float64, a few rows at a time.

    Shapes: weight (out, in) -> a number
    """
    rows = max(1, CHUNK // max(1, weight.shape[-1]))
    return math.sqrt(sum(part.double().square().sum().item() for part in weight.split(rows)))


def _base_weight(weights: Mapping[str, TensorFile], module: str) -> Tensor | None:
    """The weight of a module of the base; a tied head has that of the embedding."""
    tied = ["model.embed_tokens.weight"] if module == "lm_head" else []
    name = next((name for name in (f"{module}.weight", *tied) if name in weights), None)
    return weights[name].read(name) if name is not None else None


def _misfit(pair: Mapping[str, TensorFacts], weight: Tensor | None, is_transposed: bool) -> str | None:
    """What is wrong with the weight that the base has for a module; a packed one is not judged."""
    if weight is None:
        return "the base has no such weight"
    shape = (pair["B"].shape[0], pair["A"].shape[1])
    if is_transposed or ".lora_embedding_" in pair["A"].name:
        shape = shape[::-1]
    if weight.shape == shape or weight.dtype not in DTYPES:
        return None
    return f"the adapter is for {shape}, the base's weight is {tuple(weight.shape)}"


def _factors(file: TensorFile, pair: Mapping[str, TensorFacts]) -> tuple[Tensor, Tensor] | None:
    """A and B in float64; None if they are no finite numbers."""
    lora_A, lora_B = (file.read(pair[side].name) for side in "AB")
    if not {lora_A.dtype, lora_B.dtype} <= set(DTYPES):
        return None
    wide = lora_A.double(), lora_B.double()
    return wide if all(bool(factor.isfinite().all()) for factor in wide) else None
