"""A model directory in and out: `config.json` and safetensors, single or sharded, one tensor at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import ConfigError, FormatError
from minilora.hub import locate
from minilora.model.config import LlamaConfig
from minilora.model.llama import Llama
from minilora.model.tokenizer import Tokenizer
from minilora.storage import TensorFile, read_json, remove, shard_names, write_json, write_tensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"


def load_model(
    name_or_path: str | Path, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu"
) -> Llama:
    """Build the model that a directory describes and read its weights straight into `dtype` on `device`.

    Peak memory is the model and one tensor: the model is built without storage, and each tensor is mapped, copied and
    let go.

    Args:
        name_or_path: a directory as transformers writes it, "minilora/builtin", or a repository of the hub, "org/name"
            or "org/name@revision"; the model's `name_or_path` names its commit.
        dtype: a dtype or its name; "auto" is the checkpoint's own, but float32 where the device computes it slowly.
        device: where the model is to live.

    Raises:
        FormatError: no such directory, repository or file; missing, unexpected and mis-shaped tensors, all in one
            message.
        ConfigError: a model that is not supported (see `LlamaConfig.from_dict`), an unknown dtype.
    """
    location, device = locate(name_or_path, "model"), torch.device(device)
    directory = location.path
    source = read_json(directory / "config.json")
    config = LlamaConfig.from_dict(source)
    target = resolve_dtype(dtype, source, device)
    model = _skeleton(config)
    files = tensor_files(directory)
    _check_names(directory, model, files)
    for name in _stored_names(model):
        tensor = files[name].read(name)
        if tensor.dtype not in DTYPES.values():
            raise FormatError(f"{files[name].path}: {name} is {tensor.dtype}; supported are {sorted(DTYPES)}")
        _assign(model, name, tensor.to(device, target, copy=True))
    model.tie_weights()
    model.name_or_path = location.name
    return model.eval()


def save_model(
    model: Llama, path: str | Path, tokenizer: Tokenizer | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a directory that transformers and `load_model` read: safetensors of at most `shard_bytes`, index, config.

    A tied head is written once, as the embedding; one that is tied no longer, because an adapter was merged into it, is
    written and named in `config.json`. The files appear one by one, each whole; weights of an earlier save that would
    be read beside them go before `config.json`, which comes last.

    Raises:
        ConfigError: adapters are attached: merge or detach them first, or save them with `save_adapter`.
    """
    path, names = Path(path), _stored_names(model)
    parameters = dict(model.named_parameters())
    if unknown := sorted(set(parameters) - set(_skeleton(model.config).state_dict())):
        raise ConfigError(f"the model holds {unknown[:3]}: merge or detach adapters before saving the model")
    shards = _shards(names, parameters, shard_bytes)
    files = [_shard_file(i, len(shards)) for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        write_tensors(path / file, {name: parameters[name] for name in shard})
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(parameters[name].nbytes for name in names)
        write_json(path / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        files.append(INDEX)
    for old in [path / INDEX, path / "model.safetensors", *path.glob("model-*-of-*.safetensors")]:
        if old.name not in files:
            remove(old)
    if tokenizer is not None:
        tokenizer.save(path)
    dtype = str(parameters[names[0]].dtype).removeprefix("torch.")
    source = {key: value for key, value in model.config.source.items() if key not in ("dtype", "torch_dtype")}
    now = {"tie_word_embeddings": model.lm_head.weight is model.model.embed_tokens.weight, "dtype": dtype}
    write_json(path / "config.json", {"architectures": [_architecture(model.config)], **source, **now})


def resolve_dtype(dtype: torch.dtype | str, source: dict[str, Any], device: torch.device) -> torch.dtype:
    """The dtype to compute in.

    "auto" is the checkpoint's own, with two exceptions. float16 becomes bfloat16: its range is too small to train in
    without scaling the loss. And on a processor without instructions for bfloat16, where it is tens of times slower,
    float32 takes its place.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    automatic = dtype == "auto"
    name = (source.get("dtype") or source.get("torch_dtype") or "float32") if automatic else dtype
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is not supported; supported are {['auto', *sorted(DTYPES)]}")
    if automatic and name in ("float16", "bfloat16"):
        return torch.bfloat16 if _has_fast_bfloat16(device) else torch.float32
    return DTYPES[name]


def _has_fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or bool(torch.cpu._is_avx512_bf16_supported())


def tensor_files(directory: Path) -> dict[str, TensorFile]:
    """Tensor name -> the file that holds it."""
    index = directory / INDEX
    if not index.is_file():
        file = TensorFile(directory / "model.safetensors")
        return dict.fromkeys(file.shapes, file)
    weight_map = shard_names(index)
    shards = {name: TensorFile(directory / name) for name in sorted(set(weight_map.values()))}
    if lacking := sorted(name for name, shard in weight_map.items() if name not in shards[shard].shapes):
        raise FormatError(f"{index}: names tensors that their shards do not hold: {lacking[:5]}")
    return {name: shards[shard] for name, shard in weight_map.items()}


def _check_names(directory: Path, model: Llama, files: dict[str, TensorFile]) -> None:
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    needed = _stored_names(model)
    problems = [f"missing: {name} {expected[name]}" for name in needed if name not in files]
    for name, file in files.items():
        found = file.shapes[name]
        if name not in expected:
            if not name.endswith("rotary_emb.inv_freq"):  # old Llama files store a table that follows from the config
                problems.append(f"unexpected: {name} {found}")
        elif found != expected[name]:
            problems.append(f"shape: {name} is {found}, the config asks for {expected[name]}")
    if problems:
        raise FormatError(f"{directory}: the tensors do not fit config.json:\n  " + "\n  ".join(problems))


def _stored_names(model: nn.Module) -> list[str]:
    """The parameters' names, a tied head left out: it is stored as the embedding."""
    return [name for name, _ in model.named_parameters()]


def _skeleton(config: LlamaConfig) -> Llama:
    """The model without storage: names and shapes only."""
    with torch.device("meta"):
        return Llama(config)


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))


def _shards(names: list[str], parameters: dict[str, nn.Parameter], limit: int) -> list[list[str]]:
    """Fill shards in order; a tensor larger than the limit gets one of its own."""
    shards: list[list[str]] = [[]]
    room = limit
    for name in names:
        size = parameters[name].nbytes
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def _shard_file(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _architecture(config: LlamaConfig) -> str:
    names = {"llama": "Llama", "mistral": "Mistral", "smollm3": "SmolLM3", "phi3": "Phi3"}
    return names.get(config.model_type, config.model_type.capitalize()) + "ForCausalLM"
