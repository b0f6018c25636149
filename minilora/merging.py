"""Adapters merged into a model directory, one weight after the other: what is held at a time is one file of the result.

    W′ = W + ΔW,    ΔW = Σ s·B A over the adapters

What W is, the *target* says:

    original      the directory's weight, which is not quantized
    dequantized   the weight as it is held; what is in four bits becomes dense, with an adapter and without
    requantized   the same; what is in four bits is quantized again, and stays as it is where there is no adapter
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from minilora.errors import ConfigError, TrainingError
from minilora.hub import fetch
from minilora.lora.attach import adapter_layers, base_held, set_adapter
from minilora.lora.files import BASE_COPY, WEIGHTS_FILE, load_adapter
from minilora.lora.layers import AdapterLinear
from minilora.model.checkpoint import (
    EMBEDDING,
    HEAD,
    Weight,
    assign,
    load_model,
    read_config,
    resolve_dtype,
    save_model,
    skeleton,
    stored_dtype,
    stored_weights,
)
from minilora.model.shards import SHARD_BYTES
from minilora.model.tokenizer import Tokenizer
from minilora.quant.config import Quantize, QuantizeConfig
from minilora.quant.files import is_four_bit
from minilora.quant.linear import NF4Linear, dense_weight
from minilora.quant.nf4 import pack, unpack
from minilora.storage import TensorFile

Target = Literal["original", "dequantized", "requantized"]
DENSE = QuantizeConfig("none")
CHUNK = 2**16  # numbers of a weight that are worked on at a time in float64, in memory that stays in a cache


@dataclass(frozen=True)
class Deviation:
    """‖W′ - (W + ΔW)‖ / ‖ΔW‖, W being what was trained on: over all adapted layers, and in the worst one.

    The norms are those of Frobenius. Of inputs that favour no direction, x xᵀ being σ²·1 on average, a matrix M makes
    outputs with the mean square σ²‖M‖² / out. So this is the error of the layers' outputs relative to what the adapters
    change of them, as root mean squares.

    None where the adapters change nothing; a layer in which they do not is never the worst.
    """

    overall: float | None
    worst: float | None
    layer: str | None


def merge_directory(
    name_or_path: str | Path,
    adapters: Sequence[str | Path],
    out: str | Path,
    target: Target | None = None,
    quantize: QuantizeConfig | Quantize | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    tokenizer: Tokenizer | None = None,
    shard_bytes: int = SHARD_BYTES,
    trained: QuantizeConfig | Quantize | None = None,
) -> Deviation:
    """Write the model that adapters make of another one, and tell how far it is from what was trained.

    It is, bit for bit, what `load_model`, `load_adapter`, `merge` and `save_model` write: with `quantize` for
    "dequantized", without for "original".

    Args:
        name_or_path: the base model, as `load_model` takes it.
        adapters: directories or names of the hub; all of them act.
        out: the directory that is written.
        target: what to merge into; None is "dequantized" if the base is held in four bits, else "original".
        quantize: how the base is held, as `load_model` takes it.
        dtype: of what is dense; "auto" is the checkpoint's own, also where this machine computes it slowly.
        device: where to compute.
        tokenizer: its files are written beside the model.
        shard_bytes: how large a file may be.
        trained: how the base was held in training, if that is not `quantize`; the error is measured against it.

    Raises:
        ConfigError: no adapter is named, or this base cannot be merged into that target.
        TrainingError: a merged weight is not finite; no file is left in `out`.
        FormatError, TargetError: as of `load_model` and `load_adapter`; nothing was written.
    """
    base = _Base(fetch(name_or_path, "model"), dtype, torch.device(device), quantize, trained)
    if base.trained != base.quantize:
        load_model(base.directory, base.dtype, "meta", base.trained)  # what is wrong with it is said before writing
    held = load_model(base.directory, base.dtype, "meta", base.quantize)
    layers = _adapted(base, [fetch(adapter, "adapter") for adapter in adapters])
    kind = base_held(held)["quantize"]
    if target is None:
        target = "original" if kind == "none" else "dequantized"
    _check(base, target, kind)
    model = held if target == "requantized" else skeleton(base.config).to(base.dtype)
    if base.config.tie_word_embeddings and "lm_head" in layers:
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))  # tied no longer
    squares: dict[str, tuple[float, float]] = {}
    save_model(model, out, tokenizer, shard_bytes, _merged_weights(base, layers, target, squares))
    return _deviation(squares)


class _Base:
    """A model directory whose weights are read one after the other, into `dtype` on `device`."""

    def __init__(
        self,
        directory: Path,
        dtype: torch.dtype | str,
        device: torch.device,
        quantize: QuantizeConfig | Quantize | None,
        trained: QuantizeConfig | Quantize | None,
    ):
        self.directory, self.device = directory, device
        self.quantize = QuantizeConfig.of(quantize)
        self.trained = self.quantize if trained is None else QuantizeConfig.of(trained)
        self.config = read_config(directory)
        source = self.config.source
        self.dtype = resolve_dtype(stored_dtype(source) if dtype == "auto" else dtype, source, device)

    def weights(self, quantize: QuantizeConfig, has_head: bool) -> Iterator[tuple[str, Weight]]:
        """Names and weights; with `has_head` that of a tied head, too, by the head's name."""
        bare = skeleton(self.config)
        for name, weight in stored_weights(self.directory, bare, self.dtype, self.device, quantize):
            yield name, weight
            if name == EMBEDDING and has_head and self.config.tie_word_embeddings:
                yield HEAD, weight

    def pairs(self, target: Target, has_head: bool) -> Iterator[tuple[str, Weight, Weight]]:
        """Names, the weights to merge into, and those that were trained on."""
        held = DENSE if target == "original" else self.quantize
        if held == self.trained:
            yield from ((name, weight, weight) for name, weight in self.weights(held, has_head))
        else:
            trained = self.weights(self.trained, has_head)
            for (name, weight), (_, known) in zip(self.weights(held, has_head), trained, strict=True):
                yield name, weight, known


def _check(base: _Base, target: Target, kind: str) -> None:
    """Can the base, whose linears are held as `kind`, be merged into the target?"""
    if target not in get_args(Target):
        raise ConfigError(f"target is {target!r}, accepted are {list(get_args(Target))}")
    if target == "original" and is_four_bit(base.config.source):
        raise ConfigError(
            f"{base.directory}: is quantized as {kind}; the target 'original' needs the 16-bit model that it was "
            "made of, accepted here are 'dequantized' and 'requantized'"
        )
    if target == "requantized" and kind != "nf4":
        raise ConfigError(
            f"{base.directory}: the target 'requantized' needs linears held as nf4, found {kind}; "
            + ("give --quantize nf4 or " if kind == "none" else "")
            + "another target"
        )


def _adapted(base: _Base, adapters: Sequence[Path]) -> dict[str, AdapterLinear]:
    """The layers that have adapters, all of them active, on linears without numbers.

    PEFT writes a copy of the base's weight beside some adapters, to compare: such a linear gets its weight for that.
    """
    if not adapters:
        raise ConfigError("there is nothing to merge: name an adapter")
    model, names = skeleton(base.config), [f"adapter{i}" for i in range(len(adapters))]
    stored = {name for path in adapters for name in TensorFile(path / WEIGHTS_FILE).shapes}
    if copied := {f"{found[1]}.weight" for name in stored if (found := re.fullmatch(BASE_COPY, name))}:
        for name, weight in base.weights(base.quantize, has_head=True):
            if name in copied:
                assign(model, name, weight)
    for name, path in zip(names, adapters, strict=True):
        load_adapter(model, path, name)
    set_adapter(model, names)
    layers = adapter_layers(model)
    for layer in layers.values():
        layer.base.to("meta")
        layer.lora_A.to(base.device)
        layer.lora_B.to(base.device)
    return layers


def _merged_weights(
    base: _Base, layers: Mapping[str, AdapterLinear], target: Target, squares: dict[str, tuple[float, float]]
) -> Iterator[tuple[str, Weight]]:
    """Names and weights of the result; what `squared_norms` says of an adapted layer goes into `squares`."""
    for name, weight, trained in base.pairs(target, has_head="lm_head" in layers):
        path = name.removesuffix(".weight")
        if path in layers:
            merged = layers[path].merged_weight(_dense(weight))
            if not merged.isfinite().all():
                raise TrainingError(f"{path}: the merged weight has numbers that are not finite in {base.dtype}")
            result = _packed_like(weight, merged) if target == "requantized" else merged
            squares[path] = squared_norms(result, trained, layers[path])
            yield name, result
        else:
            yield name, weight if target == "requantized" else _dense(weight)


def _dense(weight: Weight) -> Tensor:
    return dense_weight(weight) if isinstance(weight, NF4Linear) else weight


def _packed_like(example: Weight, weight: Tensor) -> Weight:
    """The weight in four bits with the settings of the example, if that is."""
    if not isinstance(example, NF4Linear):
        return weight
    parts = pack(weight, example.scales is not None, example.layout.block_size)
    return NF4Linear(parts, example.layout, None, example.dtype)


def squared_norms(merged: Weight, trained: Weight, layer: AdapterLinear) -> tuple[float, float]:
    """‖W′ - (W + ΔW)‖² and ‖ΔW‖², of the numbers that W and W′ stand for, in float64, a few rows at a time.

    Shapes: merged (out, in), trained (out, in) -> two numbers
    """
    exact = [
        (unpack(w.parts, w.layout, torch.float32) if isinstance(w, NF4Linear) else w.detach()).cpu()
        for w in (merged, trained)
    ]
    down = torch.cat([_float64(layer.lora_A[name]) for name in layer.active])
    up = torch.cat([layer.scales[name] * _float64(layer.lora_B[name]) for name in layer.active], dim=1)
    error = effect = 0.0
    rows = max(1, CHUNK // down.size(1))
    for begin in range(0, up.size(0), rows):
        part = slice(begin, begin + rows)
        now, before = (weight[part].double() for weight in exact)
        delta = up[part] @ down
        error += torch.linalg.vector_norm(now - before - delta).item() ** 2
        effect += torch.linalg.vector_norm(delta).item() ** 2
    return error, effect


def _float64(tensor: Tensor) -> Tensor:
    """On the CPU: not every device has such numbers."""
    return tensor.detach().cpu().double()


def _deviation(squares: Mapping[str, tuple[float, float]]) -> Deviation:
    ratios = {path: math.sqrt(error / effect) for path, (error, effect) in squares.items() if effect}
    if not ratios:
        return Deviation(None, None, None)
    error, effect = map(sum, zip(*squares.values(), strict=True))
    worst = max(ratios, key=ratios.__getitem__)
    return Deviation(math.sqrt(error / effect), ratios[worst], worst)
