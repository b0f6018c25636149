"""Merge adapters into a model directory, one weight at a time: the next ones are read while others are written.

    W′ = W + ΔW,    ΔW = Σ s·B A over the adapters

The *target* decides what W is:

    original      the directory's weight, which is not quantized
    dequantized   the weight as it is loaded; every 4-bit weight becomes dense, with an adapter or without
    requantized   the same; 4-bit weights are quantized again, and stay unchanged where there is no adapter
"""

import functools
import itertools
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from minilora.adapter import adapter_layers, set_adapter
from minilora.adapters.files import load_adapter
from minilora.adapters.layers import LowRankWrapper, as_matrix
from minilora.adapters.layout import CONFIG_FILE, DETERMINISTIC_INITS, WEIGHTS_FILE, parse_tensor_name
from minilora.adapters.modules_to_save import ModulesToSave, unties
from minilora.errors import ConfigError
from minilora.files import INDEX, MANIFEST, TensorFile, check_link, entry_bytes, read_json, tensor_files, write_json
from minilora.llama import Llama, LlamaConfig, assign
from minilora.lora import AdapterWrapper, LoraAdapter, merge_weight
from minilora.models import checkpoint
from minilora.models.bitsandbytes import QuantizeConfig, Weight, describe_quantization, is_four_bit
from minilora.models.checkpoint import CODE_KEYS, EMBEDDING, HEAD, SHARD_BYTES
from minilora.models.config import is_wrapper, read_config, text_files, text_name, text_path
from minilora.models.tokenizer import Tokenizer
from minilora.nf4 import NF4Linear

MergeTarget = Literal["original", "dequantized", "requantized"]
IN_WRAPPER = "is inside a wrapper: merging needs the target original, and the head tied as before"


@dataclass(frozen=True)
class Merge:
    """Adapters, all of which are merged into a model on disk.

    "auto" is the checkpoint's own dtype, even if this machine computes it slowly. In a wrapper only changed weights
    have the dtype, and with "auto" each keeps its own.
    """

    model: Path  # the directory of the base model
    adapters: Sequence[Path]
    target: MergeTarget | None = None  # None is "dequantized" if the base is quantized, else "original"
    quantize: QuantizeConfig = QuantizeConfig()  # how the base is quantized, as in the adapters' training
    dtype: torch.dtype | str = "auto"  # of dense weights
    device: torch.device = torch.device("cpu")  # where to compute
    rows: int = 256  # that are drawn of each weight to measure the error, or all if there are no more

    @functools.cached_property
    def config(self) -> LlamaConfig:
        return read_config(self.model)

    @property
    def weight_dtype(self) -> torch.dtype:
        dtype = checkpoint.stored_dtype(self.config.source) if self.dtype == "auto" else self.dtype
        return checkpoint.resolve_dtype(dtype, self.config.source, self.device)

    def dense_model(self) -> Llama:
        """Build the model without its weights, all of it dense."""
        return checkpoint.build_on_meta(self.config).to(self.weight_dtype)

    def weights(
        self, quantize: QuantizeConfig, is_wanted: Callable[[str], object] | None = None
    ) -> Iterator[tuple[str, Weight]]:
        """Read names and weights, one at a time; the weight of a tied head comes last, by the head's name."""
        bare = checkpoint.build_on_meta(self.config)
        head: Weight | None = None
        dtype, device = self.weight_dtype, self.device
        for name, weight in checkpoint.stored_weights(self.model, bare, dtype, device, quantize, is_wanted=is_wanted):
            if name == EMBEDDING and self.config.tie_word_embeddings:
                head = weight
            yield name, weight
        if head is not None:
            yield HEAD, head


class Squares(NamedTuple):
    """What is measured of an adapted weight W (out, in)."""

    errors: Tensor  # (n), ‖W′ - (W + ΔW)‖² of each drawn row
    effects: Tensor  # (n), ‖ΔW‖² of each
    out: int  # rows that they were drawn from


class RelativeError(NamedTuple):
    """An estimate, and half the width of its 95 % interval, which is 0 where every row was measured."""

    value: float
    margin: float


def relative_error(squares: Sequence[Squares]) -> RelativeError | None:
    """Estimate ‖W′ - (W + ΔW)‖ / ‖ΔW‖ over the adapted layers; None if nothing is changed.

    q = Σ out·mean(errors) / Σ out·mean(effects) over the weights,    Var q ≈ Σ out·(out - n)/n·Var(errors - q·effects)
    over the square of that denominator,    error = √q

    For inputs without a preferred direction, E[x xᵀ] = σ²·1, the outputs of a matrix M have the mean square
    σ²‖M‖² / out. So this is the error of the layers' outputs relative to the adapters' effect, as root mean squares.
    """
    effect = sum(each.out * each.effects.mean().item() for each in squares)
    if not effect:
        return None
    q = sum(each.out * each.errors.mean().item() for each in squares) / effect
    variance = 0.0
    for errors, effects, out in squares:
        residual = (errors - q * effects).var(correction=0).item()
        variance += out * (out - len(errors)) / len(errors) * residual
    return RelativeError(math.sqrt(q), 1.96 * math.sqrt(variance / q) / effect / 2 if q else 0.0)


def merge_directory(merge: Merge, out: Path, tokenizer: Tokenizer | None = None) -> RelativeError | None:
    """Merge, write the model with its tokenizer, and return its `relative_error`, with W as in training.

    The result is, bit for bit, what `load_model`, `load_adapter`, `merge` and `save_model` write: with `quantize` for
    "dequantized", without for "original". A model in a wrapper is written in its wrapper. An error leaves no file in
    `out`.
    """
    quantized = checkpoint.load_model(merge.model, merge.weight_dtype, "meta", merge.quantize)
    layers = _load_adapters(merge)
    target = _target_of(merge, describe_quantization(quantized)["quantize"])
    model = quantized if target == "requantized" else merge.dense_model()
    ends = [layers.get(name.removesuffix(".weight")) for name in (HEAD, EMBEDDING)]
    is_tied = merge.config.tie_word_embeddings
    if is_tied and unties(ends):
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
        is_tied = False
    squares: list[Squares] = []
    weights = _merged_weights(merge, quantized, layers, target, squares)
    written = ((name, weight) for name, weight in weights if name != HEAD or not is_tied)
    if is_wrapper(merge.model):
        if target != "original" or is_tied != merge.config.tie_word_embeddings:
            raise ConfigError(f"{merge.model}: {IN_WRAPPER}")
        _save_wrapper(merge.model, out, ((name, dense(weight)) for name, weight in written), is_tied)
        if tokenizer is not None:
            tokenizer.save(out)
    else:
        checkpoint.save_model_files(model, out, tokenizer, SHARD_BYTES, written)
    return relative_error(squares)


def _save_wrapper(source: Path, directory: Path, changed: Iterable[tuple[str, Tensor]], is_tied: bool) -> None:
    """Write a wrapper's directory again with changed tensors of its text model; all others keep their bytes.

    Of the other files, configs and texts are copied, without names of code.
    """
    files = tensor_files(source)
    stored = {text_name(name): name for name in files}
    rest = dict(files)

    def tensors() -> Iterator[dict[str, Tensor]]:
        for name, tensor in changed:
            del rest[stored[name]]
            if name == EMBEDDING and is_tied:
                rest.pop(stored.get(HEAD, ""), None)  # a copy of the old embedding
            yield {stored[name]: tensor}
        for name, file in rest.items():
            yield {name: file.read(name)}

    directory.mkdir(parents=True, exist_ok=True)
    header_bytes = sum(entry_bytes(name, len(file.shapes[name])) for name, file in files.items())
    checkpoint.write_shards(directory, tensors(), SHARD_BYTES, header_bytes)
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja", ".txt", ".model") and path.name not in (INDEX, MANIFEST):
            check_link(path)
            shutil.copyfile(path, directory / path.name)
    for path in directory.glob("*config.json"):
        if CODE_KEYS & (values := read_json(path)).keys():
            write_json(path, {key: value for key, value in values.items() if key not in CODE_KEYS})


def _target_of(merge: Merge, kind: str) -> MergeTarget:
    """Return what to merge into, or raise an error if a base with linears of this kind cannot be merged into that."""
    target = merge.target or ("original" if kind == "none" else "dequantized")
    if target == "original" and is_four_bit(merge.config.source):
        raise ConfigError(
            f"{merge.model}: is quantized as {kind}; the target 'original' needs the 16-bit model that it was made "
            "from, accepted here are 'dequantized' and 'requantized'"
        )
    if target == "requantized" and kind != "nf4":
        raise ConfigError(f"{merge.model}: the target 'requantized' needs linears quantized as nf4, found {kind}")
    return target


def _load_adapters(merge: Merge) -> dict[str, AdapterWrapper]:
    """Load all adapters onto a model without weights, and return its adapted modules, with all adapters active.

    Two kinds of adapters need weights of the base: those with copies of weights by PEFT, which are compared, and those
    that started as a part of the weights.
    """
    model = merge.dense_model()
    names = [f"adapter{i}" for i in range(len(merge.adapters))]
    if needed := {f"{path}.weight" for adapter in merge.adapters for path in _needed_modules(adapter)}:
        for name, weight in merge.weights(merge.quantize):
            if name in needed:
                assign(model, name, weight)
    for name, path in zip(names, merge.adapters, strict=True):
        load_adapter(model, path, name)
    set_adapter(model, names)
    layers = adapter_layers(model)
    for layer in layers.values():
        layer.base.to("meta")
        if not isinstance(layer, ModulesToSave):  # that shares parameters with its base
            layer.adapters.to(merge.device)
    return layers


def _needed_modules(adapter: Path) -> set[str]:
    """Return the paths of the modules whose weights are needed to read an adapter."""
    keys = [parse_tensor_name(name) for name in TensorFile(adapter / WEIGHTS_FILE).shapes]
    is_repeated = read_json(adapter / CONFIG_FILE).get("init_lora_weights") in DETERMINISTIC_INITS
    return {text_path(path) for path, key in keys if path and (key == "weight" or (is_repeated and key == "lora_A"))}


def _merged_weights(
    merge: Merge, quantized: Llama, layers: Mapping[str, AdapterWrapper], target: MergeTarget, squares: list[Squares]
) -> Iterator[tuple[str, Weight]]:
    """Yield names and weights of the result, and add what is measured of each adapted layer to `squares`.

    The adapters were trained on the weights of `quantized`, a model on "meta". Of a wrapper only their layers are read.
    """
    generator = torch.Generator().manual_seed(0)
    files = text_files(merge.model) if is_wrapper(merge.model) else {}
    is_wanted = functools.partial(_adapted_module, layers=layers) if files else None
    read = checkpoint.prefetch(merge.weights(QuantizeConfig() if target == "original" else merge.quantize, is_wanted))
    for path, group in itertools.groupby(read, key=lambda named: _adapted_module(named[0], layers)):
        if path is None:
            yield from ((name, weight if target == "requantized" else dense(weight)) for name, weight in group)
            continue
        layer, weights = layers[path], {name.removeprefix(f"{path}."): weight for name, weight in group}
        merged = _merge_layer(layer, {key: dense(weight) for key, weight in weights.items()})
        if more := merged.keys() - weights.keys():
            raise ConfigError(f"{path}: the adapters add {sorted(more)}, but the model has no such parameter")
        for key, weight in weights.items():
            name = f"{path}.{key}"
            result: Weight = merged[key]
            if name in files and merge.dtype == "auto":  # a tied head may have no tensor
                result = merged[key].to(files[name].read(name).dtype)
            if target == "requantized" and isinstance(weight, NF4Linear):
                result = NF4Linear.quantize(merged[key], None, weight.scales is not None)
            if key == "weight" and isinstance(layer, LowRankWrapper):
                is_trained_packed = target == "original" and isinstance(quantized.get_submodule(path), NF4Linear)
                asked = merge.quantize if is_trained_packed else QuantizeConfig()
                squares.append(measure_rows(result, weight, layer, asked, merge.rows, generator))
            yield name, result


def _adapted_module(name: str, layers: Mapping[str, AdapterWrapper]) -> str | None:
    """Return the path of the adapted module that a parameter belongs to."""
    paths = itertools.accumulate(name.split("."), lambda path, part: f"{path}.{part}")
    return next((path for path in paths if path in layers), None)


@torch.no_grad()
def _merge_layer(layer: AdapterWrapper, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merge the adapters into the parameters of a module, by name, in the same dtype."""
    for key, weight in weights.items():
        assign(layer.base, key, weight)
    merged = {key: parameter.detach() for key, parameter in layer.merged().named_parameters()}
    layer.base.to("meta")  # frees the weights
    return merged


def dense(weight: Weight) -> Tensor:
    """Return a weight as a tensor, dequantized if it is packed."""
    return weight.weight if isinstance(weight, NF4Linear) else weight


@torch.no_grad()
def measure_rows(
    merged: Weight, base: Weight, layer: LowRankWrapper, quantize: QuantizeConfig, most: int, generator: torch.Generator
) -> Squares:
    """Measure at most so many drawn rows of a weight, whose base was trained on as `quantize` makes it.

    Of drawn rows that are quantized, the scales' own scales are those of these rows alone. Computed in float64 on the
    CPU (some devices lack it), or for W′ in 16 bits, whose rounding is coarse, in float32.
    """
    now, before = (as_matrix(layer.base, dense(weight).detach()) for weight in (merged, base))
    out = len(now)
    rows = torch.randperm(out, generator=generator)[:most].sort().values if out > most else slice(None)
    now, before = (weight[rows].cpu() for weight in (now, before))
    if quantize.quantize != "none":
        before = NF4Linear.quantize(before, None, quantize.double_quant).weight
    wide = torch.float64 if now.dtype.itemsize > 2 else torch.float32
    adapters = [_rows_of(layer.adapters[name], rows).to(wide) for name in layer.active]
    start = before.to(wide)
    exact = merge_weight(start, adapters)
    errors, effects = ((one - exact).square_().sum(1).double() for one in (now.to(wide), start))
    return Squares(errors, effects, out)


def _rows_of(adapter: LoraAdapter, rows: Tensor | slice) -> LoraAdapter:
    """Return a copy of an adapter on the CPU with some rows of the weight."""
    tensors = {"lora_B": adapter.lora_B, "magnitude": adapter.magnitude}
    parts = {name: tensor.detach().cpu()[rows] for name, tensor in tensors.items() if tensor is not None}
    return LoraAdapter({"lora_A": adapter.lora_A.detach().cpu(), **parts}, adapter.scale)
