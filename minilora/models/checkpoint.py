"""A model directory in and out: `config.json` and safetensors, single or sharded, one weight at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from minilora.errors import ConfigError, FormatError, TrainingError, check_types
from minilora.llama import Llama
from minilora.models.bitsandbytes import (
    Quantize,
    QuantizeConfig,
    dtype_name,
    is_four_bit,
    packed_tensors,
    packed_weights,
    quantization_config,
    read_layout,
    read_packed,
    shortest_names,
)
from minilora.models.config import LlamaConfig, class_name
from minilora.models.hub import Location, locate
from minilora.models.tokenizer import Tokenizer
from minilora.nf4 import NF4Linear
from minilora.storage import SHARD_BYTES, TensorFile, read_json, tensor_files, write_json, write_shards

if TYPE_CHECKING:
    from minilora.models.classifier import Classifier

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
HEAD, EMBEDDING = f"{Llama.head}.weight", "model.embed_tokens.weight"
REWRITTEN = ("dtype", "torch_dtype", "quantization_config")  # in config.json
Weight = Tensor | NF4Linear  # dense, or packed in a linear that has no bias yet
M = TypeVar("M", "Llama", "Classifier")


def load_model(
    name_or_path: str | Path,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | int = "cpu",
    quantize: QuantizeConfig | Quantize | None = None,
) -> Llama:
    """Build the model that a directory describes and read its weights straight into `dtype` on `device`.

    Peak memory is the model and one tensor: the model is built without storage, and each tensor is mapped, copied or
    quantized, and let go.

    Args:
        name_or_path: a directory as transformers writes it, "minilora/builtin", or a repository of the hub, "org/name"
            or "org/name@revision"; the model's `name_or_path` names its commit. One that is quantized already, by
            bitsandbytes in four bits, is loaded as it is.
        dtype: a dtype or its name; "auto" is the checkpoint's own, but float32 where the device computes it slowly.
            4-bit weights are made dense in it; the head and what else is dense is held in it.
        device: where the model is to live.
        quantize: "nf4" or a `QuantizeConfig`: hold the linears in four bits. A model that is quantized already must be
            held like that, but what a config says by default is not asked for: it may skip modules, and do without
            double quantization.

    Raises:
        FormatError: no such directory, repository or file; missing, unexpected and mis-shaped tensors, all in one
            message.
        ConfigError: a model that is not supported (see `LlamaConfig.from_dict`), an unknown dtype, a device that cannot
            be used; it is quantized already, and otherwise than is asked for.
    """
    check_types(load_model, locals())
    location = locate(name_or_path, "model")
    config = read_config(location.path)
    if config.unit is not None:
        raise ConfigError(f"{location.path}: is a classifier, which load_classifier reads, and no language model")
    model = filled(skeleton(config), location, dtype, usable_device(device), quantize)
    model.tie_weights()
    return model


def usable_device(device: torch.device | str | int) -> torch.device:
    """Return the device of that name.

    Raises:
        ConfigError: it cannot be used here.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: a build of PyTorch without CUDA
        found = f"device {str(device)!r} cannot be used here"
        raise ConfigError(f"{found}; need cpu, cuda, cuda:N or mps, if it is there") from error


def filled(
    model: M,
    location: Location,
    dtype: torch.dtype | str,
    device: torch.device,
    quantize: QuantizeConfig | Quantize | None,
) -> M:
    """A skeleton with the weights of its directory; errors are those of `load_model`."""
    for name, weight in stored_weights(location.path, model, dtype, device, quantize):
        assign(model, name, weight)
    model.name_or_path = location.name
    return model.eval()


def stored_weights(
    directory: Path,
    model: Llama | Classifier,
    dtype: torch.dtype | str,
    device: torch.device,
    quantize: QuantizeConfig | Quantize | None,
) -> Iterator[tuple[str, Weight]]:
    """The weights in a directory, by the parameters' names, one after the other; `model` is its skeleton.

    Arguments and errors are those of `load_model`; a tied head is not among them.
    """
    files = tensor_files(directory)
    target = resolve_dtype(dtype, model.config.source, device)
    packed = packed_weights(files)
    _check_names(directory, model, files, packed)
    config = QuantizeConfig.of(quantize)
    chosen = _chosen(directory, model, packed, config)
    for name in _stored_names(model):
        if name in packed:
            yield name, NF4Linear(*read_packed(files, packed[name], device), None, target)
            continue
        file, dtype = files[name], files[name].dtype(name)
        if dtype not in DTYPES.values():
            raise FormatError(f"{file.path}: {name} is {dtype}; supported are {sorted(DTYPES)}")
        if name in chosen:
            try:
                yield name, NF4Linear.quantize(file.read(name).to(device), None, config.double_quant, target)
            except TrainingError as error:
                raise FormatError(f"{file.path}: {name}: {error}") from error
        else:
            yield name, file.read(name).to(device, target, copy=True)


def save_model(
    model: Any,
    path: str | Path,
    tokenizer: Tokenizer | None = None,
    shard_bytes: int = SHARD_BYTES,
    weights: Iterable[tuple[str, Weight]] | None = None,
) -> None:
    """Write a directory that transformers and `load_model` read: safetensors of at most `shard_bytes`, index, config.

    4-bit linears are written in bitsandbytes' layout. A tied head is written once, as the embedding; one that is tied
    no longer, because an adapter was merged into it, is written and named in `config.json`, which comes last.

    Args:
        model: a `Llama` or a `Classifier`.
        path: the directory.
        tokenizer: its files are written beside the model.
        shard_bytes: how large a file may be.
        weights: its weights, if the model itself, on the device "meta", has none: names and weights one after the
            other, as `stored_weights` gives them. Peak memory is one file's.

    Raises:
        ConfigError: another model; adapters are attached: merge or detach them first, or save them with `save_adapter`.
    """
    check_types(save_model, locals())
    if not isinstance(getattr(model, "config", None), LlamaConfig):
        raise ConfigError(f"save_model: model is a {type(model).__name__}, need a Llama or a Classifier")
    path, own = Path(path), _weights(model)
    with torch.device("meta"):
        bare = type(model)(model.config)
    if unknown := sorted(set(own) - set(bare.state_dict())):
        raise ConfigError(f"the model holds {unknown[:3]}: merge or detach adapters before saving the model")
    groups = (
        packed_tensors(name, weight) if isinstance(weight, NF4Linear) else {name: weight}
        for name, weight in (weights or own.items())
    )
    write_shards(path, groups, shard_bytes)
    if tokenizer is not None:
        tokenizer.save(path)
    embedding = model.model.embed_tokens.weight
    source = {key: value for key, value in model.config.source.items() if key not in REWRITTEN}
    now: dict[str, Any] = {}
    if isinstance(model, Llama):
        now["tie_word_embeddings"] = model.lm_head._parameters.get("weight") is embedding
    now["dtype"] = dtype_name(embedding.dtype)
    if quantization := quantization_config(_linears(model), model.head, embedding.dtype):
        now["quantization_config"] = quantization
    write_json(
        path / "config.json", {"architectures": [f"{class_name(model.config.model_type)}ForCausalLM"], **source, **now}
    )


def resolve_dtype(dtype: torch.dtype | str, source: Mapping[str, Any], device: torch.device) -> torch.dtype:
    """The dtype to compute in.

    "auto" is the checkpoint's own, with two exceptions. float16 becomes bfloat16: its range is too small to train in
    without scaling the loss. And on a processor without instructions for bfloat16, where it is tens of times slower,
    float32 takes its place.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    automatic = dtype == "auto"
    name = stored_dtype(source) if automatic else dtype
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is not supported; supported are {['auto', *sorted(DTYPES)]}")
    if automatic and name in ("float16", "bfloat16"):
        return torch.bfloat16 if _has_fast_bfloat16(device) else torch.float32
    return DTYPES[name]


def read_config(directory: Path) -> LlamaConfig:
    """What a config.json describes; where it names no dtype, its `source` has that of the embedding in the file."""
    config = LlamaConfig.from_dict(read_json(directory / "config.json"))
    if any(config.source.get(key) for key in ("dtype", "torch_dtype")):
        return config
    files = tensor_files(directory)
    if EMBEDDING not in files:
        return config  # and it is missed when the weights are read
    return replace(config, source={**config.source, "dtype": dtype_name(files[EMBEDDING].dtype(EMBEDDING))})


def stored_dtype(source: Mapping[str, Any]) -> str:
    """The checkpoint's own dtype, by the name in its config.json."""
    return source.get("dtype") or source.get("torch_dtype") or "float32"


def _has_fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or bool(torch.cpu._is_avx512_bf16_supported())


def _check_names(
    directory: Path, model: Llama | Classifier, files: Mapping[str, TensorFile], packed: Mapping[str, Sequence[str]]
) -> None:
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    stored, linears = _stored_names(model), _linears(model)
    problems = [f"missing: {name} {expected[name]}" for name in stored if name not in files]
    parts = {part for parts in packed.values() for part in parts}
    for name, file in files.items():
        if name in parts and name not in packed:
            continue
        found = read_layout(files[packed[name][0]], packed[name][0])[0].shape if name in packed else file.shapes[name]
        if name not in expected:
            if not name.endswith("rotary_emb.inv_freq"):  # old Llama files store a table that follows from the config
                problems.append(f"unexpected: {name} {found}")
        elif found != expected[name]:
            problems.append(f"shape: {name} is {found}, the config asks for {expected[name]}")
        elif name in packed and name.removesuffix(".weight") not in linears:
            problems.append(f"packed: {name}, which is no linear's")
    if problems:
        raise FormatError(f"{directory}: the tensors do not fit config.json:\n  " + "\n  ".join(problems))


def _chosen(
    directory: Path, model: Llama | Classifier, packed: Mapping[str, Sequence[str]], config: QuantizeConfig
) -> set[str]:
    """The names of the weights to quantize: none, where they are packed already.

    Raises:
        ConfigError: they are packed otherwise than is asked for; or the config names no linear, or all of them.
        FormatError: the config says that they are packed, and none is; or the other way round.
    """
    if is_four_bit(model.config.source) != bool(packed):
        raise FormatError(
            f"{directory}: config.json and the tensors disagree: quantization_config is "
            f"{model.config.source.get('quantization_config')!r:.80}, and {len(packed)} weights are packed"
        )
    linears = list(_linears(model))
    if not packed:
        chosen = {f"{path}.weight" for path in config.chosen(linears)} - {f"{model.head}.weight"}
        if config.quantize != "none" and not chosen:
            raise ConfigError(f"quantize_skip {list(config.quantize_skip)} leaves nothing to quantize")
        return chosen
    if config.quantize != "none":
        _check_held(directory, linears, model.head, packed, config)
    return set()


def _check_held(
    directory: Path, linears: Sequence[str], head: str, packed: Mapping[str, Sequence[str]], config: QuantizeConfig
) -> None:
    """Do the weights lie there as is asked for? A default is not asked for, and a head may be packed or not."""
    kinds = {parts[0].rpartition("__")[2] for parts in packed.values()}
    is_double = any(part.endswith(".nested_absmax") for parts in packed.values() for part in parts)
    dense = {path for path in linears if f"{path}.weight" not in packed}
    skipped = set(linears) - set(config.chosen(linears))
    compared = {
        "quantize": ("/".join(sorted(kinds)), config.quantize, kinds == {config.quantize}),
        "double_quant": (is_double, config.double_quant, config.double_quant or not is_double),
        "quantize_skip": (
            shortest_names(list(dense - {head}), linears),
            list(config.quantize_skip),
            not config.quantize_skip or skipped <= dense <= skipped | {head},
        ),
    }
    different = [
        f"{key} {found!r}, asked for is {asked!r}" for key, (found, asked, fits) in compared.items() if not fits
    ]
    if different:
        raise ConfigError(
            f"{directory}: is quantized already, and otherwise: {'; '.join(different)}; "
            "quantize 'none' takes it as it is"
        )


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear | NF4Linear)}


def _weights(model: nn.Module) -> dict[str, Weight]:
    """The parameters by name; in place of what a packed weight consists of, its linear by the weight's name."""
    packed = {f"{path}.weight": linear for path, linear in _linears(model).items() if isinstance(linear, NF4Linear)}
    weights: dict[str, Weight] = {}
    for name, parameter in model.named_parameters():
        own = f"{name.rpartition('.')[0]}.weight"
        weights |= {own: packed[own]} if own in packed and not name.endswith(".bias") else {name: parameter}
    return weights


def _stored_names(model: nn.Module) -> list[str]:
    """The parameters' names, a tied head left out: it is stored as the embedding."""
    return [name for name, _ in model.named_parameters()]


def skeleton(config: LlamaConfig) -> Llama:
    """The model without storage: names and shapes only."""
    with torch.device("meta"):
        return Llama(config)


def init_weights(model: nn.Module, generator: torch.Generator) -> None:
    """Draw the weights of a new model from N(0, 0.02²); biases are 0, norms 1."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def assign(model: nn.Module, name: str, weight: Weight) -> None:
    """Put a weight where its name says; a packed one comes with its linear, which takes over the bias."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if isinstance(weight, NF4Linear):
        weight.bias = owner._parameters["bias"]
        model.set_submodule(path, weight)
    else:
        setattr(owner, leaf, nn.Parameter(weight, requires_grad=not isinstance(owner, NF4Linear)))
