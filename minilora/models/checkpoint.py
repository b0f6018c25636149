"""Model directories: load and save `config.json` and safetensors, single or sharded, one weight at a time."""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from minilora import llama
from minilora.adapter import linear_layers
from minilora.errors import ConfigError, FormatError, TrainingError, listed
from minilora.files import INDEX, TensorFile, publishing, stream_tensors, write_json
from minilora.llama import Llama, load_weights
from minilora.lora import Linear
from minilora.models import bitsandbytes
from minilora.models.bitsandbytes import Quantize, QuantizeConfig, Weight, dtype_name, is_four_bit
from minilora.models.config import FAMILIES, read_config, text_files
from minilora.models.hub import locate
from minilora.models.tokenizer import Tokenizer
from minilora.nf4 import NF4Linear

T = TypeVar("T")
SHARD_BYTES = 5_000_000_000
PREFETCHED = 2  # weights that a thread makes ahead
MODEL_FILES = ("config.json", INDEX, "model.safetensors", "model-*-of-*.safetensors")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
CODE_KEYS = {"auto_map", "custom_pipelines", "_attn_implementation_internal"}  # names of code to download and run
NOT_COPIED = {"dtype", "torch_dtype", "quantization_config", *CODE_KEYS}  # of a config.json


def load_model(
    name_or_path: str | Path,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | int = "cpu",
    quantize: QuantizeConfig | Quantize | None = None,
) -> Llama:
    """Load a model. Peak memory is the model and one tensor.

    On the CPU, except on Windows, weights in the dtype of the file are views of the mapped file. Writing to them leaves
    the file as it is, and replacing the file leaves them as they are. Never overwrite it in place: that changes them,
    and a shorter file ends the process.

    Args:
        name_or_path: a directory as transformers writes it, "minilora/builtin", or a repository of the hub, "org/name"
            or "org/name@revision"; the model's `name_or_path` names its commit. A 4-bit model of bitsandbytes is loaded
            as it is.
        dtype: a dtype or its name; "auto" is that of config.json, bfloat16 for float16, and float32 where the device
            computes bfloat16 slowly. 4-bit weights are dequantized to it, all other weights are stored in it.
        device: the device of the model; "auto" is CUDA, else MPS, else the CPU.
        quantize: "nf4" or a `QuantizeConfig`: quantize the linears to 4 bits. A model that is nf4 already is loaded as
            it is, and other options than the defaults are refused.

    Raises:
        FormatError: no such directory, repository or file; missing, unexpected and mis-shaped tensors, all in one
            message.
        ConfigError: a model of no supported family, an unknown dtype, or a device that cannot be used; the model is
            quantized already, and `quantize` asks for something else.
    """
    location = locate(name_or_path, "model")
    config = read_config(location.path)
    model = build_on_meta(config)
    may_be_views = os.name != "nt"  # Windows replaces no mapped file
    load_weights(model, stored_weights(location.path, model, dtype, usable_device(device), quantize, may_be_views))
    model.name_or_path = location.name
    return model.eval()


def usable_device(device: torch.device | str | int) -> torch.device:
    """Return the device that `load_model` is asked for; raise a `ConfigError` if it cannot be used here."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: a build of PyTorch without CUDA
        message = f"device {str(device)!r} cannot be used here; need cpu, cuda, cuda:N or mps; see docs/devices.md"
        raise ConfigError(message) from error


def stored_weights(
    directory: Path,
    model: Llama,
    dtype: torch.dtype | str,
    device: torch.device,
    quantize: QuantizeConfig | Quantize | None,
    may_be_views: bool = False,
    is_wanted: Callable[[str], object] | None = None,
) -> Iterator[tuple[str, Weight]]:
    """Yield the wanted names of the parameters of a model on "meta", and their weights in a directory.

    A tied head is not among them. With `may_be_views`, weights that are stored as they are computed with are views of
    the mapped files. Other arguments and errors are those of `load_model`.
    """
    target, config = resolve_dtype(dtype, model.config.source, device), QuantizeConfig.of(quantize)
    is_as_stored = device.type == "cpu" and dtype_name(target) == stored_dtype(model.config.source)
    is_view = may_be_views and is_as_stored and config.quantize == "none"
    files = text_files(directory, is_mapped_once=is_view)
    packed = bitsandbytes.packed_weights(files)
    linears = linear_layers(model)
    _check_names(directory, model, files, packed, linears)
    _check_packed(directory, model.config.source, packed, config)
    chosen = set() if packed else config.chosen(linears)

    def read(name: str) -> Tensor:
        tensor = files[name].read(name)
        if tensor.dtype not in DTYPES.values():
            raise FormatError(f"{files[name].path}: {name} is {tensor.dtype}; supported are {sorted(DTYPES)}")
        return tensor

    for name in filter(is_wanted, dict(model.named_parameters())):
        if name in packed:
            yield name, NF4Linear(*bitsandbytes.read_packed(files, packed[name], device, not is_view), None).to(target)
        elif name.removesuffix(".weight") in chosen:
            try:
                linear = NF4Linear.quantize(read(name).to(device), None, config.double_quant)
            except TrainingError as error:
                raise FormatError(f"{files[name].path}: {name}: {error}; is the file damaged?") from error
            yield name, linear.to(target)
        else:
            yield name, read(name).to(device, target, copy=not is_view)


def save_model(
    model: Llama, path: str | Path, tokenizer: Tokenizer | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a directory that transformers and `load_model` read.

    4-bit linears are written in bitsandbytes' layout. A tied head is not written, unless an adapter was merged into it,
    so that it is tied no longer. A model that is there is replaced as a whole.

    Args:
        model: the model.
        path: the directory.
        tokenizer: its files are written to the same directory.
        shard_bytes: the maximum size of a file.

    Raises:
        ConfigError: the model has adapters: merge or detach them first.
        TrainingError: a number is not finite; then no file is written.
    """
    with publishing(Path(path), MODEL_FILES) as directory:
        save_model_files(model, directory, tokenizer, shard_bytes)


def save_model_files(
    model: Llama,
    directory: Path,
    tokenizer: Tokenizer | None = None,
    shard_bytes: int = SHARD_BYTES,
    weights: Iterable[tuple[str, Weight]] | None = None,
) -> None:
    """Write the files of `save_model` into a new directory.

    `weights` are those of a model on the device "meta", as `stored_weights` gives them. A thread makes the
    next ones while others are written; peak memory is a few weights.
    """
    own = _weights(model)
    bare = build_on_meta(model.config)
    if unknown := sorted(set(own) - set(bare.state_dict())):
        raise ConfigError(
            f"the model has {unknown[:3]}, which its config.json has no place for: merge or detach adapters before "
            "saving the model; one with lora_bias adds biases, so save only the adapter"
        )
    embedding = model.model.embed_tokens.weight
    source = model.config.source
    name = f"{FAMILIES[source['model_type']].name}ForCausalLM"
    source = {**source, "architectures": source.get("architectures") or [name]}
    source = {key: value for key, value in source.items() if key not in NOT_COPIED}
    source["tie_word_embeddings"] = model.lm_head._parameters.get("weight") is embedding
    source["dtype"] = dtype_name(embedding.dtype)
    if quantization := bitsandbytes.quantization_config(model, embedding.dtype):
        source["quantization_config"] = quantization
    directory.mkdir(parents=True, exist_ok=True)
    groups = itertools.starmap(bitsandbytes.stored_tensors, own.items() if weights is None else prefetch(weights))
    header_bytes = sum(itertools.starmap(bitsandbytes.most_entry_bytes, own.items()))
    write_shards(directory, groups, shard_bytes, header_bytes)
    if tokenizer is not None:
        tokenizer.save(directory)
    write_json(directory / "config.json", source)


def prefetch(items: Iterable[T]) -> Iterator[T]:
    """Yield the items in order. A thread makes them, `PREFETCHED` ahead."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        pending = deque(thread.submit(next, iterator, end) for _ in range(PREFETCHED))
        while (item := pending.popleft().result()) is not end:
            pending.append(thread.submit(next, iterator, end))
            yield item  # type: ignore[misc]


def write_shards(directory: Path, groups: Iterable[Mapping[str, Tensor]], limit: int, header_bytes: int) -> None:
    """Write groups of tensors, as they come, into files of at most `limit` bytes; a group is never divided."""
    size = file = 0

    def file_of(group: Mapping[str, Tensor]) -> int:
        nonlocal size, file
        more = sum(tensor.nbytes for tensor in group.values())
        if 0 < size > limit - more:
            file += 1
            size = 0
        size += more
        return file

    shards: list[dict[str, Any]] = []  # the entries of each file
    for number, part in itertools.groupby(groups, file_of):
        tensors = itertools.chain.from_iterable(group.items() for group in part)
        shards.append(stream_tensors(directory / f"{number}", tensors, header_bytes, {}))
    n = len(shards)
    names = [f"model-{i:05d}-of-{n:05d}.safetensors" if n > 1 else "model.safetensors" for i in range(1, n + 1)]
    for i, name in enumerate(names):
        os.replace(directory / f"{i}", directory / name)
    if n > 1:
        weight_map = {tensor: name for entries, name in zip(shards, names, strict=True) for tensor in entries}
        total = sum(max(entry["data_offsets"][1] for entry in entries.values()) for entries in shards)
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def resolve_dtype(dtype: torch.dtype | str, source: Mapping[str, Any], device: torch.device) -> torch.dtype:
    """Return the dtype to compute in.

    "auto" is that of config.json, with two exceptions. float16 becomes bfloat16, because training in float16 needs a
    scaled loss. On a device without instructions for bfloat16, both become float32.
    """
    name = stored_dtype(source) if dtype == "auto" else str(dtype).removeprefix("torch.")
    if not isinstance(name, str) or name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is not supported; supported are {['auto', *sorted(DTYPES)]}")
    if dtype == "auto" and name in ("float16", "bfloat16"):
        return torch.bfloat16 if _has_fast_bfloat16(device) else torch.float32
    return DTYPES[name]


def stored_dtype(source: Mapping[str, Any]) -> str:
    """Return the name of the dtype in a config.json."""
    return source.get("dtype") or source.get("torch_dtype") or "float32"


def _has_fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or bool(torch.cpu._is_avx512_bf16_supported())


def _check_names(
    directory: Path,
    model: Llama,
    files: Mapping[str, TensorFile],
    packed: Mapping[str, Sequence[str]],
    linears: Mapping[str, Linear],
) -> None:
    stored = bitsandbytes.weight_shapes(files)
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    problems = [f"missing: {name} {expected[name]}" for name, _ in model.named_parameters() if name not in stored]
    for name, shape in stored.items():
        if name not in expected:
            if not name.endswith("rotary_emb.inv_freq"):  # a table in old Llama files
                problems.append(f"unexpected: {name} {shape}")
        elif shape != expected[name]:
            problems.append(f"shape: {name} is {shape}, the config asks for {expected[name]}")
        elif name in packed and name.removesuffix(".weight") not in linears:
            problems.append(f"packed: {name}, which is no linear's")
    if problems:
        raise FormatError(f"{directory}: the tensors do not fit config.json:{listed(problems)}")
    if model.config.tie_word_embeddings and HEAD in files:
        head, embedding = (files[name].read(name) for name in (HEAD, EMBEDDING))
        if head.dtype != embedding.dtype or not torch.equal(head, embedding):
            raise FormatError(
                f"{directory}: {HEAD} is not the embedding, and config.json says that they are tied; for a model with "
                "this head, as transformers reads it, set tie_word_embeddings to false there, or remove the tensor"
            )


def _check_packed(
    directory: Path, source: Mapping[str, Any], packed: Mapping[str, Sequence[str]], config: QuantizeConfig
) -> None:
    """Check that packed weights agree with config.json and with the requested quantization."""
    if is_four_bit(source) != bool(packed):
        raise FormatError(
            f"{directory}: config.json and the tensors disagree: quantization_config is "
            f"{source.get('quantization_config')!r:.80}, and {len(packed)} weights are packed"
        )
    kinds = sorted({parts[0].rpartition("__")[2] for parts in packed.values()})
    if packed and config.quantize != "none" and (config != QuantizeConfig("nf4") or kinds != ["nf4"]):
        raise ConfigError(
            f"{directory}: is quantized already, as {'/'.join(kinds)}; leave out quantize to load it as it is"
        )


def _weights(model: nn.Module) -> dict[str, Weight]:
    """Return the parameters by name; for a packed weight, its linear."""
    weights: dict[str, Weight] = {}
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        weights |= {f"{path}.weight": owner} if isinstance(owner, NF4Linear) and leaf != "bias" else {name: parameter}
    return weights


def build_model(config: llama.LlamaConfig) -> Llama:
    """Build a model of any of the families, whose weights are loaded or drawn later."""
    family = FAMILIES[config.source["model_type"]]
    model = Llama(config, family.build_block)
    family.adjust_(model)
    return model


def build_on_meta(config: llama.LlamaConfig) -> Llama:
    """Build a model without storage."""
    with torch.device("meta"):
        return build_model(config)
