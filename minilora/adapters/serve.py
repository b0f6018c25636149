"""Several adapters at work in one model: one for each row of a batch, merged for long generations, hot-swapped."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.adapter import adapter_layers, layers_of, require_layers
from minilora.adapters.attach import merged
from minilora.adapters.files import stored_specs
from minilora.adapters.layers import Stacked, get_base_layer
from minilora.adapters.parts import build_adapter, has_hooks
from minilora.errors import ShapeError, TargetError, check_types
from minilora.lora import AdapterLinear, LoraAdapter
from minilora.nf4 import NF4Linear

Group = tuple[tuple[str, ...], Tensor]  # adapters, and the indices of the rows that they act on
MERGE_TOKENS = 40  # below, a merge may take longer than it saves
MERGE_BYTES = 2**30  # the most that the merged weights may take beside the others


class MixedBatch:
    """The adapter of each row of a batch; None is none.

    A layer gets the rows themselves, or their tokens laid end to end, as many of each as `lengths` says.
    """

    def __init__(self, names: Sequence[str | None]):
        self.names = tuple(names)
        self.begin(())

    def begin(self, lengths: Sequence[int]) -> None:
        """Set the lengths of the rows of the next call."""
        self.lengths = lengths
        self._groups: dict[tuple[int, torch.device], list[Group]] = {}  # the same for all layers of a model

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
        """Return adapters, and the indices of the rows of x that they act on; every row is in one group."""
        key = x.size(0), x.device
        if key not in self._groups:
            lengths = self.lengths or [1] * len(self.names)
            lasts = [min(length, 1) for length in lengths]  # a head may get the last token of each row that has any
            if x.size(0) not in (sum(lengths), sum(lasts)):
                raise ShapeError(f"a layer got {x.size(0)} rows in a batch of {len(self.names)}, so whose is not known")
            counts = torch.tensor(lengths if x.size(0) == sum(lengths) else lasts)
            kinds = list(dict.fromkeys(self.names))
            owners = torch.tensor([kinds.index(name) for name in self.names]).repeat_interleave(counts)
            rows = [(owners == i).nonzero().flatten().to(x.device) for i in range(len(kinds))]
            named = zip(kinds, rows, strict=True)
            self._groups[key] = [((name,) if name else (), index) for name, index in named if len(index)]
        return self._groups[key]


@contextmanager
def mixed_batch(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Apply its own adapter, or none, to each row of a batch inside the block.

    The rows are the first dimension of a layer's input. Models that lay rows end to end, as ours do, have an argument
    `lengths` of their forward with the number of tokens of each row.

    Args:
        model: the model with the adapters.
        names: the adapter of each row; None is the base.

    Raises:
        TargetError: the model has no adapter, or none of a name; in a call, an adapter has `target_parameters`.
        ShapeError: in a call, the batch has another number of rows.
    """
    check_types(mixed_batch, locals())
    layers, batch = require_layers(model, *(name for name in names if name is not None)), MixedBatch(names)

    def read_lengths(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not any(layer.mixed is batch for layer in layers):
            return  # an inner block is active
        lengths = inspect.signature(module.forward).bind(*args, **kwargs).arguments["lengths"]
        if len(lengths) != len(names):
            raise ShapeError(f"the batch has {len(lengths)} rows, and {len(names)} adapters were named for it")
        batch.begin(lengths)

    packed = [module for module in model.modules() if _requires_lengths(module)]
    hooks = [module.register_forward_pre_hook(read_lengths, with_kwargs=True) for module in packed]
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


def _requires_lengths(module: nn.Module) -> bool:
    lengths = inspect.signature(module.forward).parameters.get("lengths")
    return lengths is not None and lengths.default is inspect.Parameter.empty


@contextmanager
def merged_if_faster(model: nn.Module, tokens: int) -> Iterator[None]:
    """Merge the active adapters inside the block, if that makes generating so many tokens faster.

    An adapter that is applied costs a few small products per linear and step of generation, a merge a few passes over
    the weights, once. With r 16 on all linears of SmolLM2, on a CPU, milliseconds:

                               bfloat16    NF4    float32
        a token, applied             31     82         52
        a token, merged              23     24         44
        the merge                   310    470        157

    In a larger model the weights outweigh that, and so does the memory of a second copy of them.
    Against float32 logits were off by 0.14 to 0.19 in bfloat16 merged, by 0.13 to 0.17 applied. Inside `mixed_batch`,
    and where a wrapper has hooks, nothing is merged.
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


def hotswap_adapter(model: nn.Module, path: str | Path, name: str = "default") -> None:
    """Overwrite the tensors of a model's adapter with those of a stored one.

    Nothing else changes, so a compiled model is not compiled again. The adapter keeps its scales s: where the stored
    one has another scale s′, B becomes B·s′/s, and so does the bias of B.

    Raises:
        FormatError, TargetError: as of `load_adapter`.
        TargetError: the model has no adapter of that name, or one of other modules or shapes; nothing was changed.
    """
    check_types(hotswap_adapter, locals())
    layers = layers_of(model, name)
    config, specs = stored_specs(model, path)
    ours, theirs = {w: type(layer) for w, layer in layers.items()}, {w: spec.kind for w, spec in specs.items()}
    if different := sorted(where for where in ours | theirs if ours.get(where) != theirs.get(where)):
        raise TargetError(f"{path}: adapter {name!r} of the model is another one: they differ in {different[:5]}")
    pairs: list[tuple[Tensor, Tensor]] = []
    for where, spec in specs.items():
        if spec.tensors:
            fresh = build_adapter(layers[where], config, spec.tensors).to(next(layers[where].base.parameters()).device)
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
    values = {key: p.detach() for key, p in theirs.items()}
    for (at, mine), (_, other) in zip(old.named_modules(), new.named_modules(), strict=True):
        if isinstance(mine, LoraAdapter | Stacked) and mine.scale != other.scale:
            for key in (f"{at}.{name}".removeprefix(".") for name in ("lora_B", "lora_bias")):
                if key in values:
                    values[key] *= other.scale / mine.scale
    return [(ours[key], values[key]) for key in ours]
