"""Many adapters in one model at work: one for each row of a batch, merged while much is written, swapped by numbers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.adapter import adapter_layers, base_modules
from minilora.adapters.attach import merged
from minilora.adapters.find import get_base_layer, has_hooks, known_adapters, places_of
from minilora.adapters.parameters import Stacked
from minilora.adapters.parts import build_adapter
from minilora.adapters.stored import read_adapter, stored_specs
from minilora.errors import ShapeError, TargetError, check_types
from minilora.lora import AdapterLinear, LoraAdapter
from minilora.models.hub import fetch
from minilora.nf4 import NF4Linear

Group = tuple[tuple[str, ...], Tensor]  # adapters, and the numbers of the rows that they act on
MERGE_TOKENS = 40  # below, a merge may take longer than it saves
MERGE_BYTES = 2**30  # the most that the merged weights may take beside the others


class MixedBatch:
    """Which adapter each row of a batch has; None is none.

    A layer gets the rows themselves, or their tokens end to end, so many of each as `lengths` says.
    """

    def __init__(self, names: Sequence[str | None]):
        self.names = tuple(names)
        self.begin(())

    def begin(self, lengths: Sequence[int]) -> None:
        """So long are the rows of what comes now."""
        self.lengths = lengths
        self._known: dict[tuple[int, torch.device], list[Group]] = {}  # the same for all layers of a model

    def forward(self, layer: AdapterLinear, x: Tensor) -> Tensor:
        """Apply W to all rows at once, and the adapters of each group to its rows."""
        x = x.to(layer.dtype) if isinstance(layer.base, NF4Linear) else x
        y = layer.base_forward(x, None)
        for names, rows in self.groups(x):
            names = tuple(name for name in names if name in layer.configs)
            part, bias = y[rows], layer.merged_bias(names)
            for adapter in (layer.adapters[name] for name in names):
                part = layer.apply_magnitude(part + layer.lora_update(x[rows], adapter), adapter)
            y[rows] = part if bias is None else part + layer.broadcast_to_output(bias).to(y.dtype)
        return y

    def groups(self, x: Tensor) -> list[Group]:
        """The adapters that act, and the numbers of the rows of x that they act on; every row is in one group.

        Raises:
            ShapeError: x has another number of rows.
        """
        key = x.size(0), x.device
        if key not in self._known:
            self._known[key] = self._found(x)
        return self._known[key]

    def _found(self, x: Tensor) -> list[Group]:
        lengths = self.lengths or [1] * len(self.names)
        lasts = [min(length, 1) for length in lengths]  # a head may be given the last token of each row that has any
        if x.size(0) not in (sum(lengths), sum(lasts)):
            raise ShapeError(
                f"a layer was given {x.size(0)} rows in a batch of {len(self.names)}, so whose is not known"
            )
        counts = torch.tensor(lengths if x.size(0) == sum(lengths) else lasts)
        kinds = list(dict.fromkeys(self.names))
        owners = torch.tensor([kinds.index(name) for name in self.names]).repeat_interleave(counts)
        rows = [(owners == i).nonzero().flatten().to(x.device) for i in range(len(kinds))]
        return [((name,) if name else (), index) for name, index in zip(kinds, rows, strict=True) if len(index)]


@contextmanager
def mixed_batch(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Apply an adapter of its own, or none, to each row of a batch, for as long as the block lasts.

    The first dimension of a layer's input are the rows. Models that lay rows end to end, as ours do, have an argument
    `lengths` of their forward with the number of tokens of each row.

    Args:
        model: the model with the adapters.
        names: the adapter of each row; None is the base.

    Raises:
        TargetError: the model has no adapter of a name; in a call, an adapter has `target_parameters`.
        ShapeError: in a call, the batch has another number of rows.
    """
    check_types(mixed_batch, locals())
    layers, batch = adapter_layers(model).values(), MixedBatch(names)
    known_adapters(layers, [name for name in names if name is not None])

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not any(layer.mixed is batch for layer in layers):
            return  # an inner block is in force
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
    """Merge the active adapters for as long as the block lasts, if writing that many tokens is faster so.

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
    check_types(merged_if_faster, locals())
    layers = adapter_layers(model).values()
    is_bound = any(layer.mixed is not None or has_hooks(layer) for layer in layers)
    size = sum(_dense_bytes(get_base_layer(layer)) for layer in layers if layer.active)
    is_faster = tokens >= MERGE_TOKENS and 0 < size <= MERGE_BYTES and not is_bound
    with merged(model) if is_faster else nullcontext():
        yield


def _dense_bytes(base: nn.Module) -> int:
    """Return the size of a module's weights in the dtype of the computation."""
    if isinstance(base, NF4Linear):
        return base.out_features * base.in_features * base.dtype.itemsize
    return sum(parameter.nbytes for parameter in base.parameters())


def _is_packed(module: nn.Module) -> bool:
    """Return whether a module's forward requires the lengths of its rows."""
    lengths = inspect.signature(module.forward).parameters.get("lengths")
    return lengths is not None and lengths.default is inspect.Parameter.empty


def hotswap_adapter(model: nn.Module, path: str | Path, name: str = "default") -> None:
    """Overwrite the tensors of a model's adapter with those of a stored one.

    Nothing else changes, so a compiled model is not compiled again. The adapter keeps its scales s: where the stored
    one has another scale s′, B becomes B·s′/s, and so does the bias of B.

    Raises:
        FormatError, TargetError: as of `load_adapter`.
        TargetError: the model has no adapter of that name, or one of other modules or shapes; nothing was changed.
    """
    check_types(hotswap_adapter, locals())
    config, parts = stored_specs(read_adapter(fetch(path, "adapter")), base_modules(model))
    layers = places_of(model, name)
    ours, theirs = {w: type(layer) for w, layer in layers.items()}, {w: part.kind for w, part in parts.items()}
    if different := sorted(where for where in ours | theirs if ours.get(where) != theirs.get(where)):
        raise TargetError(f"{path}: adapter {name!r} of the model is another one: they differ in {different[:5]}")
    pairs: list[tuple[Tensor, Tensor]] = []
    for where, part in parts.items():
        if part.tensors:
            fresh = build_adapter(layers[where], config, part.tensors).to(next(layers[where].base.parameters()).device)
            pairs += _pairs(where, layers[where].adapters[name], fresh)
    with torch.no_grad():
        for old, new in pairs:
            old.copy_(new)


def _pairs(where: str, old: nn.Module, new: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of a tensor to overwrite and its new value."""
    ours, theirs = dict(old.named_parameters()), dict(new.named_parameters())
    shapes = [{key: tuple(p.shape) for key, p in each.items()} for each in (ours, theirs)]
    fixed = [{key: tensor.tolist() for key, tensor in each.named_buffers()} for each in (old, new)]
    if shapes[0] != shapes[1] or fixed[0] != fixed[1]:
        raise TargetError(
            f"{where}: the adapter of the model has {shapes[0]}, the stored one {shapes[1]}, or other rows"
        )
    stretched = {key: p.detach() for key, p in theirs.items()}
    for (at, mine), (_, other) in zip(old.named_modules(), new.named_modules(), strict=True):
        if isinstance(mine, LoraAdapter | Stacked) and mine.scale != other.scale:
            for key in (f"{at}.{name}".removeprefix(".") for name in ("lora_B", "lora_bias")):
                if key in stretched:
                    stretched[key] *= other.scale / mine.scale
    return [(ours[key], stretched[key]) for key in ours]
