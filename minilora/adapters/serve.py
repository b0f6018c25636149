"""Many adapters in one model at work: one for each row of a batch, merged while much is written, swapped by numbers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.adapters.adapted import MixedBatch, has_hooks, innermost
from minilora.adapters.attach import merged
from minilora.adapters.find import adapter_layers, base_modules, known_adapters, places_of
from minilora.adapters.layers import LowRank
from minilora.adapters.parameters import Stacked
from minilora.adapters.stored import read_adapter, stored_parts
from minilora.errors import ShapeError, TargetError
from minilora.models.hub import fetch
from minilora.quant.linear import NF4Linear

MERGE_TOKENS = 40  # below, a merge may take longer than it saves
MERGE_BYTES = 2**30  # the most that the merged weights may take beside the others


@contextmanager
def mixed_batch(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Each row of a batch with its own adapter, or with none, for as long as the block lasts.

    The first dimension of what a layer is given are the rows. Models that lay rows end to end, as ours do, say how many
    tokens each has by an argument `lengths` of their forward.

    Args:
        model: with the adapters.
        names: of the adapter of each row; None is the base.

    Raises:
        TargetError: the model has no adapter of a name; in a call, an adapter has `target_parameters`.
        ShapeError: in a call, the batch has another number of rows.
    """
    layers, batch = adapter_layers(model).values(), MixedBatch(names)
    known_adapters(layers, [name for name in names if name is not None])

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not any(layer.mixed is batch for layer in layers):
            return  # an inner block has the say
        lengths = inspect.signature(module.forward).bind(*args, **kwargs).arguments["lengths"]
        if len(lengths) != len(names):
            raise ShapeError(f"the batch has {len(lengths)} rows, and {len(names)} adapters were named for it")
        batch.begin(lengths)

    packed = [module for module in model.modules() if _is_packed(module)]
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in packed]
    before, is_fast = [layer.mixed for layer in layers], torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # it reads weights of PyTorch's encoders, one for all rows
        for layer in layers:
            layer.mixed = batch
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(is_fast)
        for layer, mixed in zip(layers, before, strict=True):
            layer.mixed = mixed
        for hook in hooks:
            hook.remove()


@contextmanager
def merged_if_faster(model: nn.Module, tokens: int) -> Iterator[None]:
    """`merged`, if that many new tokens of each row are written sooner with it, for as long as the block lasts.

    An applied adapter costs a step of generation some small products a linear, a merge some passes over the weights,
    once. With r 16 on all linears of SmolLM2, on a CPU, milliseconds:

                               bfloat16    NF4    float32
        a token, applied             31     82         52
        a token, merged              23     24         44
        the merge                   310    470        157

    The weights in the middle of a larger model outweigh that, and so does the memory of a second copy of them.
    Against float32 logits were off by 0.14 to 0.19 in bfloat16 merged, by 0.13 to 0.17 applied. Rows that have each
    their own adapter cannot be merged, nor places that have hooks.
    """
    layers = adapter_layers(model).values()
    is_bound = any(layer.mixed is not None or has_hooks(layer) for layer in layers)
    size = sum(_dense_bytes(innermost(layer)) for layer in layers if layer.active)
    is_faster = tokens >= MERGE_TOKENS and 0 < size <= MERGE_BYTES and not is_bound
    with merged(model) if is_faster else nullcontext():
        yield


def _dense_bytes(base: nn.Module) -> int:
    """Of the weights of a module, in the dtype of the computation."""
    if isinstance(base, NF4Linear):
        return base.out_features * base.in_features * base.dtype.itemsize
    return sum(parameter.nbytes for parameter in base.parameters())


def _is_packed(module: nn.Module) -> bool:
    """Does it need to be told how long its rows are?"""
    lengths = inspect.signature(module.forward).parameters.get("lengths")
    return lengths is not None and lengths.default is inspect.Parameter.empty


def hotswap_adapter(model: nn.Module, path: str | Path, name: str = "default") -> None:
    """Put the numbers of a stored adapter in the place of those that an adapter of the model has.

    Nothing else changes, so that a compiled model is not compiled again. The adapter keeps its scales s: where the
    stored one has another, s′, its B becomes B·s′/s, and so does the bias of B.

    Raises:
        FormatError, TargetError: as of `load_adapter`.
        TargetError: the model has no adapter of that name, or one of other modules or shapes; nothing was changed.
    """
    config, parts = stored_parts(read_adapter(fetch(path, "adapter")), base_modules(model))
    layers = places_of(model, name)
    ours, theirs = {w: type(layer) for w, layer in layers.items()}, {w: part.kind for w, part in parts.items()}
    if different := sorted(where for where in ours | theirs if ours.get(where) != theirs.get(where)):
        raise TargetError(f"{path}: adapter {name!r} of the model is another one: they differ in {different[:5]}")
    pairs: list[tuple[Tensor, Tensor]] = []
    for where, part in parts.items():
        if part.tensors:
            fresh = type(layers[where])(layers[where].base, where)
            fresh.add(name, config, part.tensors)
            pairs += _pairs(where, layers[where].adapters[name], fresh.adapters[name])
    with torch.no_grad():
        for old, new in pairs:
            old.copy_(new)


def _pairs(where: str, old: nn.Module, new: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """What is to be overwritten, and with what."""
    ours, theirs = dict(old.named_parameters()), dict(new.named_parameters())
    shapes = [{key: tuple(p.shape) for key, p in each.items()} for each in (ours, theirs)]
    fixed = [{key: tensor.tolist() for key, tensor in each.named_buffers()} for each in (old, new)]
    if shapes[0] != shapes[1] or fixed[0] != fixed[1]:
        raise TargetError(
            f"{where}: the adapter of the model has {shapes[0]}, the stored one {shapes[1]}, or other rows"
        )
    stretched = {key: p.detach() for key, p in theirs.items()}
    for (at, mine), (_, other) in zip(old.named_modules(), new.named_modules(), strict=True):
        if isinstance(mine, LowRank | Stacked) and mine.scale != other.scale:
            for key in (f"{at}.{name}".removeprefix(".") for name in ("lora_B", "lora_bias")):
                if key in stretched:
                    stretched[key] *= other.scale / mine.scale
    return [(ours[key], stretched[key]) for key in ours]
