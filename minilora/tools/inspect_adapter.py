"""What an adapter directory holds, also one that minilora does not load, and how large its changes are.

    ΔW = s·B A,   ‖ΔW‖ / ‖W‖   in the norm of Frobenius
    effective rank  exp(-Σ pᵢ log pᵢ),  pᵢ = σᵢ² / Σ σ²,  σ the singular values of B A

The effective rank is the number of equally strong directions that would spread ΔW's squared norm as evenly: 1 if all of
it lies in one direction, r if all r directions are equally strong. ΔW is never formed, but for DoRA, whose change is
m ⊙ (W + s·B A) / ‖W + s·B A‖ - W and is known only with the base; and modules are read one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.adapters.classes import classes_of
from minilora.adapters.config import LoraConfig, matches
from minilora.adapters.files import load_adapter, vocabulary_of
from minilora.adapters.functional import lora_scale
from minilora.adapters.layout import CONFIG_FILE, WEIGHTS_FILE, config_from, is_name, understood
from minilora.adapters.stored import DTYPES, NESTED, read_adapter
from minilora.errors import FormatError
from minilora.models.classifier import load_for
from minilora.models.shards import tensor_files
from minilora.models.vocabulary import grow_vocabulary
from minilora.storage import TensorEntry, TensorFile, read_json
from minilora.tools.inspect_change import (
    base_tensor,
    delta_spectrum,
    distance,
    effective_rank,
    frobenius_norm,
    stretched_change,
)
from minilora.tools.inspect_readers import Part, Seen, minilora_problems, other_problems, part

RESHAPED = ("use_qalora", "use_bdlora", "kasa_config")  # whose B A is not the change


@dataclass(frozen=True)
class ModuleFacts:
    """One adapted module. None: not known, because the config or the base does not say, or a number is not finite.

    Of experts that are stacked in one tensor, the rank is that of each, and the norms are those of all.
    """

    module: str
    rank: int
    shape: tuple[int, int]
    scale: float | None
    delta_norm: float | None
    base_norm: float | None
    relative_norm: float | None
    effective_rank: float | None


@dataclass(frozen=True)
class OtherFacts:
    """A tensor besides A and B; `relative_change` is that from the base's own, None where it is not known."""

    shape: tuple[int, ...]
    relative_change: float | None


@dataclass(frozen=True)
class AdapterFacts:
    """An adapter: its config as it is, where its base model was found, of a checkpoint the step.

    `other_tensors` are those besides the A and B of `modules`, by name. `problems` maps a tool to why it does not read
    the adapter: to nothing, if it does.
    """

    path: str
    config: dict[str, Any]
    base: str | None
    step: Any
    tensors: dict[str, TensorEntry]
    modules: tuple[ModuleFacts, ...]
    other_tensors: dict[str, OtherFacts]
    problems: dict[str, list[str]]


@dataclass(frozen=True)
class _Files:
    """An adapter's files and its base's; `held`: path of a module -> what it has there -> the tensor's name."""

    values: Mapping[str, Any]
    file: TensorFile
    held: Mapping[str, Mapping[str, str]]
    weights: Mapping[str, TensorFile]

    def read(self, where: str, key: str) -> Tensor | None:
        """One tensor, None where there is none, or its numbers are of a dtype that has no norm."""
        if key not in self.held[where]:
            return None
        tensor = self.file.read(self.held[where][key])
        return tensor if tensor.dtype in DTYPES else None


def adapter_facts(directory: Path, base: Path | None = None) -> AdapterFacts:
    """What the adapter in a directory holds; `base` is the directory of its base model, where that is to be had.

    Raises:
        FormatError: a file is missing or damaged.
    """
    values, file = read_json(directory / CONFIG_FILE), TensorFile(directory / WEIGHTS_FILE)
    parts = {name: part(name, shape) for name, shape in file.shapes.items()}
    held: dict[str, dict[str, str]] = {}
    for name, each in parts.items():
        held.setdefault(each.where, {}).setdefault(each.key, name)
    files = _Files(values, file, held, tensor_files(base) if base is not None else {})
    is_odd = any(values.get(key) for key in RESHAPED) or not _are_names(values.get("target_parameters") or [])
    pairs = [] if is_odd else _pairs(files)
    stacks = {where: names for where in pairs if (names := _stacked(where, values))}
    ranks = {where: file.shapes[held[where]["lora_A"]][0] for where in pairs if where not in stacks}
    declared, config = (_config(directory / CONFIG_FILE, values, given) for given in ({}, ranks))
    modules = [_module_facts(files, where, config, stacks.get(where, ())) for where in pairs]
    used = {held[where][key] for where in pairs for key in ("lora_A", "lora_B")}
    state, scales = directory / "state.json", {facts.module: facts.scale for facts in modules}
    head = any(name.startswith("lm_head.") for name in files.weights)
    seen = Seen(values, declared, parts, ranks, scales, is_tied=bool(files.weights) and not head)
    return AdapterFacts(
        path=str(directory),
        config=values,
        base=None if base is None else str(base),
        step=read_json(state).get("step") if state.is_file() else None,
        tensors=file.entries,
        modules=tuple(modules),
        other_tensors={
            name: _other_facts(files, name, each, config) for name, each in parts.items() if name not in used
        },
        problems={"minilora": minilora_problems(lambda: _load(directory, base)), **other_problems(seen)},
    )


def _pairs(files: _Files) -> list[str]:
    """Paths of modules that have an A and a B which fit together."""
    found = []
    for where, held in files.held.items():
        A, B = (files.file.shapes.get(held.get(key, ""), ()) for key in ("lora_A", "lora_B"))
        if where and len(A) == len(B) >= 2 and A[0] == B[1] > 0:
            found.append(where)
    return found


def _stacked(where: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    """Paths of the `target_parameters` that the A and B of a path may be for."""
    module = where
    while module.endswith(NESTED):
        module = module.removesuffix(NESTED)
    split = [name.rpartition(".") for name in values.get("target_parameters") or ()]
    return tuple(f"{module}.{last}" for before, _, last in split if matches((before,), module))


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _config(path: Path, values: Mapping[str, Any], ranks: Mapping[str, int]) -> LoraConfig | None:
    """The config that scales come from; None where it is damaged, or tells them by regular expressions."""
    patterns = [values.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
    if not all(isinstance(pattern, dict) for pattern in patterns) or not all(map(is_name, patterns[1])):
        return None
    try:
        return config_from(path, values, ranks)
    except FormatError:
        return None


def _module_facts(files: _Files, where: str, config: LoraConfig | None, stack: tuple[str, ...]) -> ModuleFacts:
    A, B = (files.file.shapes[files.held[where][key]] for key in ("lora_A", "lora_B"))
    shape, experts = (B[0], math.prod(A[1:])), _experts(A[0], config, stack)
    scale = _scale(A[0] // experts, config, stack or (where,)) if experts else None
    weight = _base_matrix(files, where, shape, stack)
    delta_norm, spread = _size(files, where, experts, scale, weight) if experts else (None, None)
    base_norm = frobenius_norm(weight) if weight is not None else None
    relative_norm = delta_norm / base_norm if delta_norm is not None and base_norm else None
    rank = A[0] // experts if experts else A[0]
    return ModuleFacts(where, rank, shape, scale, delta_norm, base_norm, relative_norm, spread)


def _experts(rows: int, config: LoraConfig | None, stack: tuple[str, ...]) -> int:
    """How many share the rows of an A, 0 if that cannot be known: only the config says which rank each has."""
    ranks = {config.rank(name) for name in stack} if config is not None else set()
    if not stack:
        return 1
    return rows // ranks.pop() if len(ranks) == 1 and all(rows % rank == 0 for rank in ranks) else 0


def _scale(rank: int, config: LoraConfig | None, names: tuple[str, ...]) -> float | None:
    """s, where the config gives the same α by all names that a module may have."""
    alphas = {config.alpha(name) for name in names} if config is not None else set()
    return lora_scale(rank, alphas.pop(), config.use_rslora) if config is not None and len(alphas) == 1 else None


def _size(
    files: _Files, where: str, experts: int, scale: float | None, weight: Tensor | None
) -> tuple[float | None, float | None]:
    """The norm of the change of a module, and the effective rank of its B A."""
    lora_A, lora_B = (files.read(where, key) for key in ("lora_A", "lora_B"))
    if lora_A is None or lora_B is None:
        return None, None
    lora_A, lora_B = lora_A.flatten(1), lora_B.flatten(1)
    each_A, each_B = lora_A.unflatten(0, (experts, -1)), lora_B.unflatten(1, (-1, experts)).permute(2, 0, 1)
    spectrum = delta_spectrum(each_A.double(), each_B.double()).flatten()
    if not spectrum.isfinite().all():
        return None, None
    spread, norm = effective_rank(spectrum), torch.linalg.vector_norm(spectrum).item()
    if scale is None or not files.values.get("use_dora"):
        return (None if scale is None else scale * norm), spread
    magnitude = files.read(where, "magnitude")
    if weight is None or magnitude is None or magnitude.numel() != len(weight):
        return None, spread
    return frobenius_norm(stretched_change(weight, lora_A, lora_B, scale, magnitude)), spread


def _base_matrix(files: _Files, where: str, shape: tuple[int, int], stack: tuple[str, ...]) -> Tensor | None:
    """The base's weight as W (out, in), that of stacked experts one below the other; None if none of it fits."""
    found = [base_tensor(files.weights, name) for name in stack or (f"{where}.weight",)]
    matrices = [
        each if stack and each.dim() == 3 else each.flatten(1) for each in found if each is not None and each.dim() > 1
    ]
    fitting = [each for each in matrices if tuple(each.shape[-2:]) in (shape, shape[::-1])]
    if len(fitting) != 1:
        return None
    (weight,) = fitting
    is_turned = tuple(weight.shape[-2:]) != shape or bool(files.values.get("fan_in_fan_out"))
    return (weight.mT if is_turned else weight).flatten(0, -2)


def _other_facts(files: _Files, name: str, each: Part, config: LoraConfig | None) -> OtherFacts:
    """A tensor besides A and B, beside what the base has in its place."""
    tensor = files.file.read(name)
    old = _in_its_place(files, each, config) if tensor.dtype in DTYPES else None
    return OtherFacts(each.shape, None if old is None else distance(tensor, old))


def _in_its_place(files: _Files, each: Part, config: LoraConfig | None) -> Tensor | None:
    """What the base has in the place of a tensor of an adapter: a parameter, rows of one, or lengths of its rows."""
    if each.key in ("weight", "bias") or not each.where:
        return base_tensor(files.weights, f"{each.where}.{each.key}".removeprefix("."))
    weight = base_tensor(files.weights, f"{each.where}.weight")
    if weight is None or weight.dim() != 2:
        return None
    if each.key == "magnitude":
        is_turned = each.shape[:1] != (len(weight),) or bool(files.values.get("fan_in_fan_out"))
        return torch.linalg.vector_norm(weight.float(), dim=0 if is_turned else 1)
    wanted = config.trainable_token_indices if config is not None and each.key == "rows" else None
    ids = wanted or ()
    if isinstance(ids, Mapping):
        ids = next((tuple(those) for entry, those in ids.items() if matches((entry,), each.where)), ())
    return weight[list(ids)] if ids and max(ids) < len(weight) else None


def _load(directory: Path, base: Path | None) -> None:
    """What `load_adapter` does; without the base, the part of it that looks at the adapter alone."""
    if base is not None:
        # Without storage all is checked but copies of the base's weights, whose numbers are compared.
        names = TensorFile(directory / WEIGHTS_FILE).shapes
        has_copies = any(understood(name)[1] == "weight" for name in names)
        device = "cpu" if has_copies else "meta"
        model = load_for(*classes_of(directory), base, "auto", device, None)
        grow_vocabulary(model, vocabulary_of(directory))
        load_adapter(model, directory)
    else:
        stored = read_adapter(directory)
        ranks = {where: held["lora_A"].size(0) for where, held in stored.tensors.items() if "lora_A" in held}
        config_from(directory / CONFIG_FILE, stored.values, ranks)
