"""A base model whose blocks are divided among processes, for one that does not fit into the memory of a device.

Each rank holds N/R rows of every parameter of a block, dense or packed, by PyTorch's `fully_shard`. A block is
gathered when it is about to compute, the next one meanwhile, and freed afterwards; the backward pass gathers it again.
The embedding, the last norm and the head stay whole on every rank: they may be trained or tied to each other, and the
head is called outside the decoder. Adapters are attached afterwards, so they are whole too, as are their gradients.

    N, K  shape of a weight    R  ranks

    [FSDP]  Zhao et al. 2023, PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from minilora.llama import Llama
from minilora.models.bitsandbytes import Quantize, QuantizeConfig
from minilora.models.checkpoint import build_on_meta, load_model, resolve_dtype, stored_weights, usable_device
from minilora.models.config import read_config
from minilora.models.hub import locate
from minilora.nf4 import NF4Linear, Packed, dequantize_weight


def load_sharded(
    name_or_path: str | Path,
    dtype: torch.dtype | str,
    device: torch.device | str,
    quantization: QuantizeConfig | Quantize | None,
) -> Llama:
    """Load what `load_model` loads, with the decoder's blocks divided among all ranks, and frozen.

    Every rank must call it. A rank reads one weight after the other, quantizes it if asked, and keeps its own rows.
    Peak memory is the rank's share and two weights.
    """
    location, device = locate(name_or_path, "model"), usable_device(device)
    config = read_config(location.path)
    target = resolve_dtype(dtype, config.source, device)
    model = load_model(location.name, target, "meta", quantization)
    shard_blocks(model, device)
    for module in (model.model.layers, model.model.embed_tokens, model.model.norm, model.lm_head):
        module.to_empty(device=device)
    model.tie_weights()
    for name, weight in stored_weights(location.path, build_on_meta(config), target, device, quantization):
        path, _, leaf = name.rpartition(".")
        tensors = dict(weight.named_parameters()) if isinstance(weight, NF4Linear) else {leaf: weight}
        for part, tensor in tensors.items():
            parameter = model.get_submodule(path).get_parameter(part)
            rows = own_rows(len(tensor)) if is_sharded(parameter) else slice(None)
            local(parameter).data.copy_(tensor[rows])
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
    """Return whether this rank has only a part of a tensor's rows."""
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
