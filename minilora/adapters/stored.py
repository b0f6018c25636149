"""An adapter's files as tensors by module, and as specs for a given model."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.adapters.combine import Factors
from minilora.adapters.config import LoraConfig
from minilora.adapters.copies import TrainedCopy
from minilora.adapters.initialize import moved_factors
from minilora.adapters.layout import (
    CONFIG_FILE,
    PREFIX,
    REPEATED,
    REPEATED_BIAS,
    WEIGHTS_FILE,
    check_keys,
    config_from,
    parse_tensor_name,
)
from minilora.adapters.parameters import AdapterParameters, experts_of
from minilora.adapters.parts import LINEARS, AdapterSpec, build_specs, kind_of, parameter_specs, stacked
from minilora.errors import ConfigError, FormatError, TargetError
from minilora.lora import AdapterLinear, Shape, lora_scale
from minilora.storage import TensorFile, read_json

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NESTED = ".base_layer"  # of PEFT's wrappers around one module, one for each of its parameters
BRINGS = {"magnitude": "use_dora", "lora_bias": "lora_bias", "rows": "trainable_token_indices", "bias": "bias"}


@dataclass(frozen=True)
class Stored:
    """The contents of an adapter's directory.

    Attributes:
        path: its directory.
        values: those of the JSON, checked.
        tensors: path of a module -> name -> tensor, in float32 at least (see `layout.parse_tensor_name`).
    """

    path: Path
    values: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]

    def config(self, ranks: Mapping[str, int] | None = None) -> LoraConfig:
        """Return the config of the adapter with these ranks (path -> r), by default those of its A."""
        if ranks is None:
            ranks = {where: held["lora_A"].size(0) for where, held in self.tensors.items() if "lora_A" in held}
        return config_from(self.path / CONFIG_FILE, self.values, ranks)

    def factors(self) -> dict[str, Factors]:
        """Return A, B and s by path, of an adapter that has nothing else."""
        config, pairs = self.config(), {w: (held["lora_A"], held["lora_B"]) for w, held in self.tensors.items()}
        scale = {w: lora_scale(len(A), config.alpha(w), config.use_rslora) for w, (A, _) in pairs.items()}
        return {where: Factors(*pair, scale[where]) for where, pair in pairs.items()}


def read_adapter(directory: Path) -> Stored:
    """Read an adapter's two files.

    Raises:
        FormatError: one is missing or malformed, or has a setting that is not supported.
    """
    values = read_json(directory / CONFIG_FILE)
    check_keys(directory / CONFIG_FILE, values)
    path = directory / WEIGHTS_FILE
    file = TensorFile(path)
    tensors: dict[str, dict[str, Tensor]] = {}
    if strange := [name for name in file.shapes if not name.startswith(PREFIX)]:
        raise FormatError(f"{path}: {strange[:5]} are not an adapter's: names have to begin with {PREFIX}")
    for name in file.shapes:
        if (repeated := REPEATED_BIAS.fullmatch(name)) and "".join(repeated.groups()) in file.shapes:
            continue
        where, key = parse_tensor_name(name)
        if key in tensors.setdefault(where, {}):
            raise FormatError(f"{path}: {where} has more than one {key}")
        tensor = file.read(name)
        if tensor.dtype not in DTYPES or not tensor.isfinite().all():
            raise FormatError(f"{path}: {name} is {tensor.dtype} or not finite; need finite {DTYPES}")
        if key in ("lora_A", "lora_B") and (tensor.dim() < 2 or 0 in tensor.shape):
            raise FormatError(f"{path}: {name} is {tuple(tensor.shape)}, need a matrix that is not empty")
        tensors[where][key] = tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
    if not tensors:
        raise FormatError(f"{path}: holds no tensors, so it is no adapter")
    half = [where for where, held in tensors.items() if ("lora_A" in held) != ("lora_B" in held)]
    if half:
        raise FormatError(f"{path}: {half[:5]} have only one of lora_A and lora_B")
    lone = [where for where, held in tensors.items() if where and not held.keys() & {"lora_A", "rows"}]
    if lone:
        raise FormatError(f"{path}: {lone[:5]} have {sorted(tensors[lone[0]])} and no lora_A")
    return Stored(directory, values, tensors)


def _saved(own: Iterable[str], entries: Sequence[str]) -> tuple[str, ...]:
    """Return the paths of the modules that a file holds in full; PEFT matches the ends of their paths as text.

    An entry that matches nothing is kept, so that it is reported as missing.
    """
    paths = []
    for name in own:
        prefixes = itertools.accumulate(name.split("."), lambda path, part: f"{path}.{part}")
        paths += [path for path in prefixes if path.endswith(tuple(entries))][:1]
    return (*dict.fromkeys(paths), *(entry for entry in entries if not any(path.endswith(entry) for path in paths)))


def stored_specs(stored: Stored, modules: Mapping[str, Any]) -> tuple[LoraConfig, dict[str, AdapterSpec]]:
    """Return the adapter's config, and its specs by path for a model of these modules.

    The file must hold exactly the tensors that the config asks for, in the shapes that the model needs.

    Raises:
        FormatError: config and tensors contradict each other.
        TargetError: the model has no such modules, or others in shape; all of them are named, with both shapes.
    """
    held = _by_module(stored, modules)
    config, init = stored.config(_ranks(held, modules)), stored.values.get("init_lora_weights")
    config = replace(config, modules_to_save=_saved(held.get("", {}), config.modules_to_save))
    embedding = next((path for path in held if "rows" in held[path]), None)
    if config.trainable_token_indices and embedding is None:
        found = f"trainable_token_indices: found {config.trainable_token_indices}"
        raise _at_odds(stored, [f"{found}, and there are no rows"])
    specs, misfits, odds = build_specs(modules, config, _blank_specs(held, modules, config), embedding), [], []
    own = held.pop("", {})
    for path, spec in specs.items():
        if spec.kind is TrainedCopy:
            tensors = {key: own.pop(f"{path}.{key}") for key in spec.tensors if f"{path}.{key}" in own}
        else:
            tensors = held.pop(path, {})
        misfits += _misfits(path, spec, tensors, modules[path])
        odds += _odds(path, spec, tensors, config)
        if spec.kind in LINEARS and init in REPEATED and not misfits:  # PEFT takes the word for True on other layers
            tensors |= _start(init, path, spec.kind, modules[path], config)
        specs[path] = spec._replace(tensors=spec.tensors | tensors)
    misfits += [f"{path}: the model has no such layer" for path in held if kind_of(modules.get(path)) is None]
    others = [*own, *(path for path in held if kind_of(modules.get(path)) is not None)]
    misfits += [f"{name}: is no part of an adapter that the config speaks of" for name in others]
    if misfits:
        base = stored.values.get("base_model_name_or_path")
        of_base = f"; it was trained on {base!r:.200}" if base else ""
        raise TargetError(f"{stored.path} does not fit the model{of_base}:\n  {_listed(misfits)}")
    if odds:
        raise _at_odds(stored, odds)
    return config, specs


def _at_odds(stored: Stored, odds: Sequence[str]) -> FormatError:
    return FormatError(f"{stored.path / CONFIG_FILE}: does not go with {WEIGHTS_FILE}:\n  {_listed(odds)}")


def _listed(problems: Sequence[str]) -> str:
    more = f"\n  … and {len(problems) - 10} more" if len(problems) > 10 else ""
    return "\n  ".join(problems[:10]) + more


def _by_module(stored: Stored, modules: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Return path -> key of `build_adapter` -> tensor; the path of the model's own parameters is ""."""
    held = {where: dict(tensors) for where, tensors in stored.tensors.items()}
    wrappers: Counter[str] = Counter()
    for name in reversed(stacked(modules, stored.config({}))):
        path, _, last = name.rpartition(".")
        for key, tensor in held.pop(path + wrappers[path] * NESTED, {}).items():
            held.setdefault(path, {})[f"{last}.{key}"] = tensor
        wrappers[path] += 1
    return held


def _ranks(held: Mapping[str, Mapping[str, Tensor]], modules: Mapping[str, Any]) -> dict[str, int]:
    """Return the rank of each A, by the path of its module or the full name of its parameter."""
    ranks = {}
    for path, key in ((path, key) for path, tensors in held.items() for key in tensors if path):
        last, _, factor = key.rpartition(".")
        if factor == "lora_A":
            experts = experts_of(modules[path].get_parameter(last)) if last else 1
            ranks[f"{path}.{last}".rstrip(".")] = held[path][key].size(0) // experts
    return ranks


def _blank_specs(
    held: Mapping[str, Mapping[str, Tensor]], modules: Mapping[str, Any], config: LoraConfig
) -> dict[str, AdapterSpec]:
    """Return the low-rank specs that the config asks for, with tensors on the device "meta"."""

    def blank(*shapes: Shape) -> list[Tensor]:
        return [torch.empty(shape, device="meta") for shape in shapes]

    specs = parameter_specs(modules, config, blank)
    for path, tensors in held.items():
        if "lora_A" not in tensors or (kind := kind_of(modules.get(path))) is None:
            continue
        try:
            lora_A, lora_B = blank(*kind.shapes(modules[path], config.rank(path)))
        except ConfigError as error:
            raise TargetError(f"{path}: {error}") from error
        magnitude, bias = blank(_magnitude_shape(lora_B), (lora_B.size(0),))
        asked = {"magnitude": (magnitude, config.use_dora), "lora_bias": (bias, config.lora_bias)}
        asked["bias"] = (bias, "bias" in tensors and modules[path]._parameters.get("bias") is not None)
        more = {key: tensor for key, (tensor, is_asked) in asked.items() if is_asked and key in kind.PEFT_NAMES}
        specs[path] = AdapterSpec(kind, {"lora_A": lora_A, "lora_B": lora_B, **more})
    return specs


def _magnitude_shape(lora_B: Tensor) -> Shape:
    """Return the shape that PEFT has for DoRA's m: (out), of a convolution (1, out, 1, …)."""
    return (lora_B.size(0),) if lora_B.dim() == 2 else (1, lora_B.size(0), *lora_B.shape[2:])


def _misfits(path: str, spec: AdapterSpec, held: dict[str, Tensor], module: Any) -> list[str]:
    """Return what does not fit the model: wrong shapes, unknown tensors, another base weight (which is removed)."""
    shapes = {key: tuple(tensor.shape) for key, tensor in held.items()}
    needed = {key: tuple(tensor.shape) for key, tensor in spec.tensors.items()}
    wrong = [key for key in shapes if key in needed and shapes[key] != needed[key]]
    found = [f"{path}.{key}: the adapter has {shapes[key]}, the model needs {needed[key]}" for key in wrong]
    if issubclass(spec.kind, AdapterLinear) and {"lora_A", "lora_B"} & {*wrong}:
        factors = f"A {shapes['lora_A']} and B {shapes['lora_B']}"
        found = [f"{path}: the adapter has {factors}, the model's weight is {tuple(module.weight.shape)}"]
    if issubclass(spec.kind, AdapterLinear) and "weight" in held:
        base = module.weight
        if not torch.equal(held.pop("weight").to(base.device, base.dtype), base):
            found.append(f"{path}.base_layer.weight is not the weight of this model")
    strange = [key for key in held if key not in needed and key not in ("magnitude", "lora_bias")]
    return found + [f"{path}.{key}: is no part of an adapter that the config speaks of" for key in strange]


def _odds(path: str, spec: AdapterSpec, held: Mapping[str, Tensor], config: LoraConfig) -> list[str]:
    """Return the contradictions between what the config says is trained and what the file has."""
    lacking = [key for key in spec.tensors if key not in held and key != "ids"]
    if spec.kind is AdapterParameters or (spec.kind is TrainedCopy and spec.tensors.keys() != {"bias"}):
        field = "target_parameters" if spec.kind is AdapterParameters else "modules_to_save"
        return [f"{field}: means {path}, of which there is no {key}" for key in lacking]
    found = []
    for key in BRINGS:
        if (key in held) != (key in spec.tensors):
            has = (
                f"{'a' if key in held else 'no'} {AdapterLinear.PEFT_NAMES.get(key, key)}" if key != "bias" else "none"
            )
            found.append(f"{BRINGS[key]}: found {getattr(config, BRINGS[key])!r}, and {path} has {has}")
    return found


def _start(init: str, path: str, kind: type[AdapterLinear], module: nn.Module, config: LoraConfig) -> dict[str, Tensor]:
    """Return the part of the weight that the adapter started from."""
    r = config.rank(path)
    scale = lora_scale(r, config.alpha(path), config.use_rslora)
    start = moved_factors(
        init, kind(module, path).as_matrix(module.get_parameter("weight")), r, scale, torch.Generator()
    )
    return dict(zip(("start_A", "start_B"), start, strict=True))
