"""What an adapter directory holds, also one that minilora does not load: each module's rank, scale and norm of change.

ΔW = s·B A is never formed, except for DoRA, whose change is m ⊙ (W + s·B A) / ‖W + s·B A‖ - W and needs the base.
Modules are read one at a time. None stands for what neither config nor base tells, or what is not finite.

    effective rank = exp(-Σ pᵢ log pᵢ),  pᵢ = σᵢ² / Σ σ²,  σ the singular values of ΔW

It is 1 if ΔW lies in one direction, and r if all r directions are equally strong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.adapters.config import LoraConfig, matches
from minilora.adapters.files import load_adapter
from minilora.adapters.layout import (
    CONFIG_FILE,
    DTYPES,
    NESTED,
    WEIGHTS_FILE,
    classes_of,
    config_from,
    is_name,
    parse_tensor_name,
    read_adapter,
    vocabulary_of,
)
from minilora.errors import FormatError, MiniloraError
from minilora.lora import dora_norm, lora_delta, lora_scale
from minilora.models.bitsandbytes import packed_weights, read_packed
from minilora.models.classifier import grow_vocabulary, load_for
from minilora.nf4 import unpack
from minilora.storage import TensorFile, read_json, tensor_files
from minilora.tools.export import features

CHUNK = 2**22  # numbers that are widened to float64 at a time
RESHAPED = ("use_qalora", "use_bdlora", "kasa_config")  # variants whose change is not s·B A


@dataclass(frozen=True)
class _Adapter:
    """The files of an adapter and of its base; `names`: (path of a module, key) -> name of the tensor."""

    values: Mapping[str, Any]
    file: TensorFile
    names: Mapping[tuple[str, str], str]
    base: Mapping[str, TensorFile]
    config: LoraConfig | None = None

    def shape(self, module: str, key: str) -> tuple[int, ...]:
        return self.file.shapes.get(self.names.get((module, key), ""), ())

    def read(self, module: str, key: str) -> Tensor | None:
        name = self.names.get((module, key))
        return None if name is None else _read(self.file, name)

    def read_base(self, name: str) -> Tensor | None:
        """Read a tensor of the base, a packed one dequantized; a tied head is the embedding."""
        if name == "lm_head.weight" and name not in self.base:
            name = "model.embed_tokens.weight"
        if packed := packed_weights(part for part in self.base if part.startswith(name)).get(name):
            return unpack(*read_packed(self.base, packed, torch.device("cpu")), torch.float32)
        return _read(self.base[name], name) if name in self.base else None

    def is_transposed(self, size: int, out: int) -> bool:
        """Does a weight with `size` rows lie as (in, out) in the base?"""
        return size != out or bool(self.values.get("fan_in_fan_out"))


def _read(file: TensorFile, name: str) -> Tensor | None:
    """Read a tensor; None if its dtype has no norm."""
    tensor = file.read(name)
    return tensor if tensor.dtype in DTYPES else None


def adapter_facts(directory: Path, base: Path | None = None) -> dict[str, Any]:
    """Describe the adapter in a directory; `base` is the directory of its base model, if there is one.

    "modules" are those with an A and a B, "other_tensors" the rest; "features" is what plain readers ignore or refuse
    (see `tools.export`), "problems" why minilora does not load the adapter.

    Raises:
        FormatError: a file is missing or damaged.
    """
    values, file = read_json(directory / CONFIG_FILE), TensorFile(directory / WEIGHTS_FILE)
    names = {
        parse_tensor_name(name): name for name in reversed(file.shapes)
    }  # of two names for one tensor the first counts
    adapter = _Adapter(values, file, names, tensor_files(base) if base is not None else {})
    modules = _modules(adapter)
    ranks = {module: adapter.shape(module, "lora_A")[0] for module in modules if not _experts(adapter, module)}
    adapter = replace(adapter, config=_config(directory / CONFIG_FILE, values, ranks))
    used = {names[module, factor] for module in modules for factor in ("lora_A", "lora_B")}
    state = directory / "state.json"
    return {
        "path": str(directory),
        "config": values,
        "base": None if base is None else str(base),
        "step": read_json(state).get("step") if state.is_file() else None,
        "tensors": file.entries,
        "modules": [_module_facts(adapter, module) for module in modules],
        "other_tensors": {name: _other_facts(adapter, name) for name in file.shapes if name not in used},
        "features": features(values, file.shapes),
        "problems": problems_of(lambda: _load(directory, base)),
    }


def problems_of(load: Callable[[], object]) -> list[str]:
    """List what minilora says when it tries to load something; nothing if it succeeds."""
    try:
        load()
    except MiniloraError as error:
        first, *details = (line.strip() for line in str(error).splitlines())
        return details or [first]
    return []


def _load(directory: Path, base: Path | None) -> None:
    """Do what `load_adapter` does; without the base, the part of it that checks the adapter alone."""
    if base is None:
        read_adapter(directory).config()
        return
    # A model without storage is enough, unless the adapter holds copies of the base's weights, which are compared.
    has_copies = any(parse_tensor_name(name)[1] == "weight" for name in TensorFile(directory / WEIGHTS_FILE).shapes)
    model = load_for(*classes_of(directory), base, "auto", "cpu" if has_copies else "meta", None)
    grow_vocabulary(model, vocabulary_of(directory))
    load_adapter(model, directory)


def _modules(adapter: _Adapter) -> list[str]:
    """List the modules that have an A and a B which fit together and whose product is the change."""
    parameters = adapter.values.get("target_parameters") or []
    is_list = isinstance(parameters, list) and all(isinstance(name, str) for name in parameters)
    if not is_list or any(adapter.values.get(key) for key in RESHAPED):
        return []
    shapes = {m: (adapter.shape(m, "lora_A"), adapter.shape(m, "lora_B")) for m, _ in sorted(adapter.names) if m}
    return [module for module, (A, B) in shapes.items() if len(A) == len(B) >= 2 and A[0] == B[1] > 0]


def _experts(adapter: _Adapter, module: str) -> tuple[str, ...]:
    """Name the `target_parameters` that the A and B of a module may belong to."""
    while module.endswith(NESTED):
        module = module.removesuffix(NESTED)
    split = [name.rpartition(".") for name in adapter.values.get("target_parameters") or ()]
    return tuple(f"{module}.{last}" for before, _, last in split if matches((before,), module))


def _config(path: Path, values: Mapping[str, Any], ranks: Mapping[str, int]) -> LoraConfig | None:
    """Read the config that scales come from; None if it is damaged, or has regular expressions as patterns."""
    patterns = [values.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
    if not all(isinstance(pattern, dict) for pattern in patterns) or not all(map(is_name, patterns[1])):
        return None
    try:
        return config_from(path, values, ranks)
    except FormatError:
        return None


def _module_facts(adapter: _Adapter, module: str) -> dict[str, Any]:
    """Describe the change of a module; for stacked experts the rank is that of each, and the norms are those of all."""
    A, B = adapter.shape(module, "lora_A"), adapter.shape(module, "lora_B")
    shape, experts, config = (B[0], math.prod(A[1:])), _experts(adapter, module), adapter.config
    ranks, alphas = {A[0]}, set()
    if experts:  # whose rows of A are as many as their ranks together: only the config tells the rank of each
        ranks = {config.rank(name) for name in experts} if config else set()
    if config:
        alphas = {config.alpha(name) for name in experts or (module,)}
    rank = next(iter(ranks)) if len(ranks) == 1 and A[0] % min(ranks) == 0 else None
    scale = lora_scale(rank, alphas.pop(), config.use_rslora) if config and rank and len(alphas) == 1 else None
    weight = _base_weight(adapter, module, experts, shape)
    base_norm = None if weight is None else frobenius_norm(weight)
    delta_norm, spread = _size(adapter, module, rank, scale, weight) if rank else (None, None)
    return {
        "module": module,
        "rank": rank or A[0],
        "shape": shape,
        "scale": scale,
        "delta_norm": delta_norm,
        "base_norm": base_norm,
        "relative_norm": delta_norm / base_norm if delta_norm is not None and base_norm else None,
        "effective_rank": spread,
    }


def _size(
    adapter: _Adapter, module: str, rank: int, scale: float | None, weight: Tensor | None
) -> tuple[float | None, float | None]:
    """Compute the norm of a module's change, and the effective rank of its B A."""
    lora_A, lora_B = adapter.read(module, "lora_A"), adapter.read(module, "lora_B")
    if lora_A is None or lora_B is None:
        return None, None
    lora_A, lora_B = lora_A.flatten(1), lora_B.flatten(1)
    # A holds stacked experts one below the other, B as (out, rank, experts).
    each_A, each_B = lora_A.unflatten(0, (-1, rank)), lora_B.unflatten(1, (rank, -1)).permute(2, 0, 1)
    spectrum = delta_spectrum(each_A.double(), each_B.double()).flatten()
    if not spectrum.isfinite().all():
        return None, None
    spread = effective_rank(spectrum)
    if scale is None or not adapter.values.get("use_dora"):
        return None if scale is None else scale * torch.linalg.vector_norm(spectrum).item(), spread
    magnitude = adapter.read(module, "magnitude")
    if weight is None or magnitude is None or magnitude.numel() != len(weight):
        return None, spread
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight, lora_A, lora_B = weight.to(wide), lora_A.to(wide), lora_B.to(wide)
    k = magnitude.to(wide).flatten() / dora_norm(weight, lora_A, lora_B, scale)
    return frobenius_norm(k[:, None] * (weight + lora_delta(lora_A, lora_B, scale)) - weight), spread


def _base_weight(adapter: _Adapter, module: str, experts: tuple[str, ...], shape: tuple[int, int]) -> Tensor | None:
    """Read the base's weight as W (out, in), stacked experts one below the other; None unless exactly one fits."""
    tensors = [adapter.read_base(name) for name in experts or (f"{module}.weight",)]
    matrices = [
        tensor if experts and tensor.dim() == 3 else tensor.flatten(1)
        for tensor in tensors
        if tensor is not None and tensor.dim() > 1
    ]
    fitting = [each for each in matrices if tuple(each.shape[-2:]) in (shape, shape[::-1])]
    if len(fitting) != 1:
        return None
    (weight,) = fitting
    return (weight.mT if adapter.is_transposed(weight.shape[-2], shape[0]) else weight).flatten(0, -2)


def _other_facts(adapter: _Adapter, name: str) -> dict[str, Any]:
    """Describe a tensor besides A and B, and compare it with the base's tensor in its place."""
    tensor, old = _read(adapter.file, name), _base_tensor(adapter, name)
    change = None if tensor is None or old is None else relative_change(tensor, old)
    return {"shape": adapter.file.shapes[name], "relative_change": change}


def _base_tensor(adapter: _Adapter, name: str) -> Tensor | None:
    """Read what the base has in the place of a tensor: a parameter, rows of one, or the norms of its rows."""
    (module, key), config = parse_tensor_name(name), adapter.config
    if key in ("weight", "bias") or not module:
        return adapter.read_base(f"{module}.{key}".removeprefix("."))
    weight = adapter.read_base(f"{module}.weight")
    if weight is None or weight.dim() != 2:
        return None
    if key == "magnitude":
        size = adapter.file.shapes[name][:1] or (0,)
        return torch.linalg.vector_norm(weight.float(), dim=0 if adapter.is_transposed(len(weight), *size) else 1)
    ids = config.trainable_token_indices if config and key == "rows" else None
    if isinstance(ids, Mapping):
        ids = next((tuple(rows) for entry, rows in ids.items() if matches((entry,), module)), None)
    return weight[[*ids]] if ids and max(ids) < len(weight) else None


def delta_spectrum(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Compute the singular values of B A without B A: those of R_B R_Aᵀ, where B = Q_B R_B and Aᵀ = Q_A R_A.

    Q_B and Q_A have orthonormal columns, which change no singular value. The shorter way to the norm,
    tr((BᵀB)(AAᵀ)), loses half of the digits where B and A nearly cancel.

    Shapes: lora_A (..., r, in), lora_B (..., out, r) -> (..., k) with k = min(r, in, out), the largest first;
    nan where a number or a product is not finite.
    """
    R_A, R_B = (torch.linalg.qr(factor, mode="r").R for factor in (lora_A.mT, lora_B))
    core = R_B @ R_A.mT
    # svdvals raises an error if a number is not finite.
    return torch.linalg.svdvals(core) if core.isfinite().all() else torch.full((1,), math.nan)


def effective_rank(singular_values: Tensor) -> float:
    """Count the equally strong directions whose energy has the same entropy; 0 for zero.

    >>> effective_rank(torch.tensor([3.0, 3.0, 0.0]))
    2.0
    """
    if not singular_values.numel() or singular_values.max() == 0:
        return 0.0
    energy = (singular_values / singular_values.max()).square()  # whose squares neither overflow nor vanish
    return torch.special.entr(energy / energy.sum()).sum().exp().item()


def frobenius_norm(weight: Tensor, other: Tensor | None = None) -> float:
    """Compute ‖W‖_F, or ‖W - other‖_F, summed in float64, a few rows at a time.

    Shapes: weight (out, in), other (out, in) -> a number
    """
    rows = max(1, CHUNK // max(1, weight.shape[-1]))
    parts = (part.double() for part in weight.split(rows))
    if other is not None:
        parts = (part - old.double() for part, old in zip(parts, other.split(rows), strict=True))
    return math.sqrt(sum(part.square().sum().item() for part in parts))


def relative_change(new: Tensor, old: Tensor) -> float | None:
    """Compute ‖new - old‖ / ‖old‖; None if the sizes differ, a number is not finite, or `old` is zero."""
    old = torch.atleast_1d(old)
    if new.numel() != old.numel() or not (size := frobenius_norm(old)):
        return None
    ratio = frobenius_norm(new.reshape(old.shape), old) / size
    return ratio if math.isfinite(ratio) else None
