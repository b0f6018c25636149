"""What an adapter's files hold, and which part of it belongs where in a model."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.adapters.adapted import Shape
from minilora.adapters.combine import Factors
from minilora.adapters.config import LoraConfig
from minilora.adapters.copies import TrainedCopy
from minilora.adapters.decompose import moved_factors
from minilora.adapters.functional import lora_scale
from minilora.adapters.layers import AdapterLayer, AdapterLinear, magnitude_shape
from minilora.adapters.layout import (
    CONFIG_FILE,
    PREFIX,
    REPEATED,
    REPEATED_BIAS,
    WEIGHTS_FILE,
    check_keys,
    config_from,
    understood,
)
from minilora.adapters.parameters import AdapterParameters, experts_of
from minilora.adapters.parts import LINEARS, Part, completed, kind_of, parameter_parts, stacked
from minilora.errors import ConfigError, FormatError, TargetError
from minilora.quant.linear import dense_weight
from minilora.storage import TensorFile, read_json

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NESTED = ".base_layer"  # of PEFT's wrappers around one module, one for each of its parameters
BRINGS = {"magnitude": "use_dora", "lora_bias": "lora_bias", "rows": "trainable_token_indices", "bias": "bias"}


@dataclass(frozen=True)
class Stored:
    """An adapter as it lies on disk.

    Attributes:
        path: its directory.
        values: those of the JSON, checked.
        tensors: path of a module -> name -> tensor, in float32 at least (see `layout.understood`).
    """

    path: Path
    values: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]

    def config(self, ranks: Mapping[str, int] | None = None) -> LoraConfig:
        """The values as the config of an adapter of these ranks, path -> r; if not given, those of all A."""
        if ranks is None:
            ranks = {where: held["lora_A"].size(0) for where, held in self.tensors.items() if "lora_A" in held}
        return config_from(self.path / CONFIG_FILE, self.values, ranks)

    def factors(self) -> dict[str, Factors]:
        """Path -> A, B and s, of an adapter that has them everywhere."""
        config, pairs = self.config(), {w: (held["lora_A"], held["lora_B"]) for w, held in self.tensors.items()}
        scale = {w: lora_scale(len(A), config.alpha(w), config.use_rslora) for w, (A, _) in pairs.items()}
        return {where: Factors(*pair, scale[where]) for where, pair in pairs.items()}


def read_adapter(directory: Path) -> Stored:
    """Read an adapter's two files.

    Raises:
        FormatError: one is missing or malformed, or asks for something that is not understood.
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
        where, key = understood(name)
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
    """Paths of the modules that a file holds in full, which PEFT knows by the last letters of their paths.

    An entry of which there is nothing stays as it is, to be missed.
    """
    paths = []
    for name in own:
        prefixes = itertools.accumulate(name.split("."), lambda path, part: f"{path}.{part}")
        paths += [path for path in prefixes if path.endswith(tuple(entries))][:1]
    return (*dict.fromkeys(paths), *(entry for entry in entries if not any(path.endswith(entry) for path in paths)))


def stored_parts(stored: Stored, modules: Mapping[str, Any]) -> tuple[LoraConfig, dict[str, Part]]:
    """The adapter's config, and path -> what it has there in a model of these modules.

    What an adapter of this config needs, the file has to have, in the same shapes, and nothing else.

    Raises:
        FormatError: the config does not say what a tensor is, or speaks of some that are not there.
        TargetError: the model lacks modules, or has them in other shapes; all of them are named, with both shapes.
    """
    held = _by_module(stored, modules)
    config, init = stored.config(_ranks(held, modules)), stored.values.get("init_lora_weights")
    config = replace(config, modules_to_save=_saved(held.get("", {}), config.modules_to_save))
    embedding = next((path for path in held if "rows" in held[path]), None)
    if config.trainable_token_indices and embedding is None:
        found = f"trainable_token_indices: found {config.trainable_token_indices}"
        raise _at_odds(stored, [f"{found}, and there are no rows"])
    parts, misfits, odds = completed(modules, config, _blank_parts(held, modules, config), embedding), [], []
    own = held.pop("", {})
    for path, part in parts.items():
        if part.kind is TrainedCopy:
            tensors = {key: own.pop(f"{path}.{key}") for key in part.tensors if f"{path}.{key}" in own}
        else:
            tensors = held.pop(path, {})
        misfits += _misfits(path, part, tensors, modules[path])
        odds += _odds(path, part, tensors, config)
        if part.kind in LINEARS and init in REPEATED and not misfits:  # PEFT takes the word for True on other layers
            tensors |= _start(init, path, part.kind, modules[path], config)
        parts[path] = part._replace(tensors=part.tensors | tensors)
    misfits += [f"{path}: the model has no such layer" for path in held if kind_of(modules.get(path)) is None]
    others = [*own, *(path for path in held if kind_of(modules.get(path)) is not None)]
    misfits += [f"{name}: is no part of an adapter that the config speaks of" for name in others]
    if misfits:
        raise TargetError(f"{stored.path} does not fit the model:\n  {_listed(misfits)}")
    if odds:
        raise _at_odds(stored, odds)
    return config, parts


def _at_odds(stored: Stored, odds: Sequence[str]) -> FormatError:
    return FormatError(f"{stored.path / CONFIG_FILE}: does not go with {WEIGHTS_FILE}:\n  {_listed(odds)}")


def _listed(problems: Sequence[str]) -> str:
    more = f"\n  … and {len(problems) - 10} more" if len(problems) > 10 else ""
    return "\n  ".join(problems[:10]) + more


def _by_module(stored: Stored, modules: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Path of a module -> key as `Adapted.add` has it -> tensor. Of the model's own parameters the path is ""."""
    held = {where: dict(tensors) for where, tensors in stored.tensors.items()}
    wrappers: Counter[str] = Counter()
    for name in reversed(stacked(modules, stored.config({}))):
        path, _, last = name.rpartition(".")
        for key, tensor in held.pop(path + wrappers[path] * NESTED, {}).items():
            held.setdefault(path, {})[f"{last}.{key}"] = tensor
        wrappers[path] += 1
    return held


def _ranks(held: Mapping[str, Mapping[str, Tensor]], modules: Mapping[str, Any]) -> dict[str, int]:
    """Path of a module, or full name of a parameter, -> the rank of its A."""
    ranks = {}
    for path, key in ((path, key) for path, tensors in held.items() for key in tensors if path):
        last, _, factor = key.rpartition(".")
        if factor == "lora_A":
            experts = experts_of(modules[path].get_parameter(last)) if last else 1
            ranks[f"{path}.{last}".rstrip(".")] = held[path][key].size(0) // experts
    return ranks


def _blank_parts(
    held: Mapping[str, Mapping[str, Tensor]], modules: Mapping[str, Any], config: LoraConfig
) -> dict[str, Part]:
    """The parts of low rank that the config means, of tensors without numbers."""

    def blank(*shapes: Shape) -> list[Tensor]:
        return [torch.empty(shape, device="meta") for shape in shapes]

    parts = parameter_parts(modules, config, blank)
    for path, tensors in held.items():
        if "lora_A" not in tensors or (kind := kind_of(modules.get(path))) is None:
            continue
        try:
            lora_A, lora_B = blank(*kind.shapes(modules[path], config.rank(path)))
        except ConfigError as error:
            raise TargetError(f"{path}: {error}") from error
        magnitude, bias = blank(magnitude_shape(lora_B), (lora_B.size(0),))
        asked = {"magnitude": (magnitude, config.use_dora), "lora_bias": (bias, config.lora_bias)}
        asked["bias"] = (bias, "bias" in tensors and modules[path]._parameters.get("bias") is not None)
        more = {key: tensor for key, (tensor, is_asked) in asked.items() if is_asked and key in kind.KEYS}
        parts[path] = Part(kind, {"lora_A": lora_A, "lora_B": lora_B, **more})
    return parts


def _misfits(path: str, part: Part, held: dict[str, Tensor], module: Any) -> list[str]:
    """What is of another shape than the model needs, or not its own; a copy of the base's weight is taken out."""
    shapes = {key: tuple(tensor.shape) for key, tensor in held.items()}
    needed = {key: tuple(tensor.shape) for key, tensor in part.tensors.items()}
    wrong = [key for key in shapes if key in needed and shapes[key] != needed[key]]
    found = [f"{path}.{key}: the adapter has {shapes[key]}, the model needs {needed[key]}" for key in wrong]
    if issubclass(part.kind, AdapterLayer) and {"lora_A", "lora_B"} & {*wrong}:
        factors = f"A {shapes['lora_A']} and B {shapes['lora_B']}"
        found = [f"{path}: the adapter has {factors}, the model's weight is {tuple(dense_weight(module).shape)}"]
    if issubclass(part.kind, AdapterLayer) and "weight" in held:
        base = dense_weight(module)
        if not torch.equal(held.pop("weight").to(base.device, base.dtype), base):
            found.append(f"{path}.base_layer.weight is not the weight of this model")
    strange = [key for key in held if key not in needed and key not in ("magnitude", "lora_bias")]
    return found + [f"{path}.{key}: is no part of an adapter that the config speaks of" for key in strange]


def _odds(path: str, part: Part, held: Mapping[str, Tensor], config: LoraConfig) -> list[str]:
    """What the config says is trained and the file does not have, or the other way round."""
    lacking = [key for key in part.tensors if key not in held and key != "ids"]
    if part.kind is AdapterParameters or (part.kind is TrainedCopy and part.tensors.keys() != {"bias"}):
        field = "target_parameters" if part.kind is AdapterParameters else "modules_to_save"
        return [f"{field}: means {path}, of which there is no {key}" for key in lacking]
    found = []
    for key in BRINGS:
        if (key in held) != (key in part.tensors):
            has = f"{'a' if key in held else 'no'} {AdapterLinear.KEYS.get(key, key)}" if key != "bias" else "none"
            found.append(f"{BRINGS[key]}: found {getattr(config, BRINGS[key])!r}, and {path} has {has}")
    return found


def _start(init: str, path: str, kind: type[AdapterLayer], module: nn.Module, config: LoraConfig) -> dict[str, Tensor]:
    """The part of the weight that such an adapter began as."""
    r = config.rank(path)
    scale = lora_scale(r, config.alpha(path), config.use_rslora)
    start = moved_factors(init, kind(module, path).matrix(dense_weight(module)), r, scale, torch.Generator())
    return dict(zip(("start_A", "start_B"), start, strict=True))
