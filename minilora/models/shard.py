"""A base model whose blocks are divided among processes, for one that does not fit into the memory of a device.

Each rank holds N/R rows of every parameter of a block, dense or in four bits, by PyTorch's `fully_shard`. A block is
gathered when it is about to compute, the next one meanwhile, and freed afterwards; the backward pass gathers it again.
The embedding, the last norm and the head stay whole on every rank: they may be trained or tied to each other, and the
head is called outside the decoder. Adapters are attached afterwards, so they are whole too, as are their gradients.

    N, K  shape of a weight    R  ranks

    [FSDP]  Zhao et al. 2023, PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from minilora.errors import FormatError, TrainingError
from minilora.files import TensorFile, tensor_files
from minilora.llama import Llama
from minilora.models.bitsandbytes import Quantize, QuantizeConfig, map_packed, packed_weights
from minilora.models.checkpoint import load_model, read_config, resolve_dtype, usable_device
from minilora.models.hub import locate
from minilora.nf4 import BLOCK_SIZE, NF4Linear, Packed, dequantize_weight, quantize, quantize_absmax, quantize_weight

RowSlice = Callable[[int], slice]  # of a tensor's number of rows, those to read


def load_sharded(
    name_or_path: str | Path,
    dtype: torch.dtype | str,
    device: torch.device | str,
    quantization: QuantizeConfig | Quantize | None,
) -> Llama:
    """Load what `load_model` loads, with the decoder's blocks divided among all ranks, and frozen.

    Every rank must call it. A rank reads its own rows of the files and quantizes them to the bytes that one process
    would have. Peak memory is what the rank holds, and its rows of one tensor.

    Raises:
        FormatError, ConfigError: as for `load_model`.
    """
    location, device = locate(name_or_path, "model"), usable_device(device)
    target = resolve_dtype(dtype, read_config(location.path).source, device)
    model = load_model(location.name, target, "meta", quantization)
    shard_blocks(model, device)
    decoder, files = model.model, tensor_files(location.path)
    replicated = [decoder.embed_tokens, decoder.norm, *([] if model.config.tie_word_embeddings else [model.lm_head])]
    for module in (*decoder.layers, *replicated):
        module.to_empty(device=device)
    paths = {module: path for path, module in model.named_modules()}
    for module in (*decoder.layers.modules(), *replicated):
        rows = slice if module in replicated else own_rows
        for name, tensor in _stored(module, paths[module], files, rows).items():
            local(module.get_parameter(name)).data.copy_(tensor)
    model.tie_weights()
    return model


def shard_blocks(model: Llama, device: torch.device) -> None:
    """Freeze a model without adapters, and divide the parameters of its decoder's blocks among all ranks.

    The decoder itself becomes the root, which has no parameters of its own to divide.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    decoder = model.requires_grad_(False).model
    for block in decoder.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(decoder, mesh=mesh, ignored_params={*decoder.embed_tokens.parameters(), *decoder.norm.parameters()})


def own_rows(count: int) -> slice:
    """Return this rank's part of so many rows, as `fully_shard` divides them: ⌈N/R⌉, the last ranks fewer or none."""
    size = -(-count // distributed.get_world_size())
    return slice(distributed.get_rank() * size, (distributed.get_rank() + 1) * size)


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this rank holds only a part of a tensor's rows."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with the rows of all ranks, without a gradient; every rank must call it."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor.detach()  # type: ignore[attr-defined]


def whole_weight(module: nn.Module) -> Tensor:
    """Return the weight of a layer with the rows of all ranks, dequantized if packed; every rank must call it."""
    if isinstance(module, NF4Linear):
        parts: list[Any] = [None if part is None else whole(part) for part in module.parts]
        return dequantize_weight(Packed(*parts), module.layout, module.dtype)
    return whole(module.get_parameter("weight"))


def held_bytes(model: nn.Module) -> int:
    """Return the bytes of the parameters that this rank holds."""
    return sum(local(parameter).nbytes for parameter in model.parameters())


def _stored(module: nn.Module, path: str, files: Mapping[str, TensorFile], rows: RowSlice) -> dict[str, Tensor]:
    """Return these rows of a module's own parameters by name, as views of files where nothing is to be computed.

    A tied head is in no file.
    """
    parts = _packed_rows(module, f"{path}.weight", files, rows)._asdict() if isinstance(module, NF4Linear) else {}
    found = {name: part for name, part in parts.items() if part is not None}
    for name in (name for name in module._parameters if f"{path}.{name}" in files):
        tensor = files[f"{path}.{name}"].read(f"{path}.{name}")
        found[name] = tensor[rows(len(tensor))]
    return found


def _packed_rows(module: NF4Linear, weight: str, files: Mapping[str, TensorFile], rows: RowSlice) -> Packed:
    """Return these rows of a packed weight, which is stored so, or dense."""

    def cut(part: Any, like: Any) -> Any:
        return None if part is None else part.view(like.shape)[rows(like.shape[0])]

    if names := packed_weights(files).get(weight):
        return Packed(*map(cut, map_packed(files, names)[0], module.parts))
    dense, device, is_double = files[weight].read(weight), module.packed.device, module.scales is not None
    try:
        if module.packed.dim() == 1:  # rows end within blocks
            return Packed(*map(cut, quantize_weight(dense.to(device), is_double), module.parts))
        packed, absmax = quantize_rows(dense, rows(len(dense)), device)
        rest = quantize_absmax(absmax.view(-1)) if is_double else (absmax, None, None)
    except TrainingError as error:
        raise FormatError(f"{files[weight].path}: {weight}: {error}") from error
    return Packed(packed, *map(cut, rest, module.parts[1:]))


def quantize_rows(weight: Tensor, rows: slice, device: torch.device) -> tuple[Tensor, Tensor]:
    """Quantize these rows of a weight, whole blocks each; the absmaxes are those of all rows, from all ranks.

    Double quantization takes 256 absmaxes at a time, less the mean of all. They are gathered as a sum, in which each
    rank has zeros for the rows of others.

    Shapes: weight (N, K), n rows -> packed (n, K/2) uint8, absmax (N, K/64) float32
    Raises:
        TrainingError: the weight is not finite, on every rank.
    """
    N, K = weight.shape
    own, absmax = weight[rows].to(device), torch.zeros(N, K // BLOCK_SIZE, device=device)
    packed = torch.empty(len(own), K // 2, dtype=torch.uint8, device=device)
    try:
        if len(own):
            codes, largest = quantize(own)
            packed, absmax[rows] = codes.view(packed.shape), largest.view(len(own), -1)
    except TrainingError:
        absmax.fill_(math.nan)
    distributed.all_reduce(absmax)
    if absmax.isnan().any():
        raise TrainingError("a weight that is not finite cannot be quantized")
    return packed, absmax
