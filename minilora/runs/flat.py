"""One flat buffer for what is trained, another for its gradients, and a third for its copy in the computation's dtype.

AdamW, a norm, a clip and a cast are then one kernel each, and not one for each of hundreds of small tensors. While a
run lasts its parameters are views of the first buffer and their `.grad` views of the second; nobody else notices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minilora.adapters.find import adapter_layers
from minilora.adapters.layers import AdapterLayer, LowRank
from minilora.errors import TrainingError

ALIGNMENT = 32  # numbers, 64 bytes in bfloat16: every view begins a cache line, and no kernel has a ragged end
CHUNK = 65536  # numbers under one square root: one float32 sum of the squares of 134 million is off by 3 %


class Learning(NamedTuple):
    """How a parameter learns: its rate as a multiple of the run's, and its weight decay."""

    factor: float
    weight_decay: float


class Segment:
    """Parameters that learn alike, end to end: `values` (n) with its gradient (n) (final).

    Args:
        parameters: by name.
        learning: how they learn.
        dtype: of the computation, if they are cast to it.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], learning: Learning, dtype: torch.dtype | None):
        self.parameters, self.learning = parameters, learning
        sizes = [padded(p.numel()) for p in parameters.values()]
        self.starts = list(accumulate(sizes, initial=0))
        first = next(iter(parameters.values()))
        values = torch.empty(sum(sizes), dtype=first.dtype, device=first.device)
        for p, (start, end) in zip(parameters.values(), pairwise(self.starts), strict=True):
            values[start:end][: p.numel()] = p.detach().flatten()
            values[start:end][p.numel() :] = 0
            p.data = values[start:end][: p.numel()].view(p.shape)  # its own memory is free before the next is copied
        self.gradient = torch.zeros_like(values)
        self.values = nn.Parameter(values)
        self.values.grad = self.gradient
        self.places, self.gradients = self.split(values), self.split(self.gradient)
        self.low = None if dtype is None else torch.empty_like(values, dtype=dtype)

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Name -> the part of a tensor like `values` that is the parameter's, in its shape."""
        places = zip(self.parameters.items(), self.starts, strict=False)
        return {name: flat[start : start + p.numel()].view(p.shape) for (name, p), start in places}


class Flat:
    """What of a model is trained, in as few segments as its ways to learn, dtypes and devices allow (final).

    A parameter that has no part in a step's loss has the gradient 0.

    Args:
        model: its parameters become views.
        learning: name of a trained parameter -> how it learns.
    """

    def __init__(self, model: nn.Module, learning: Mapping[str, Learning]):
        factors = list(_factors(model))
        dtypes = {factor: dtype for adapter, dtype in factors for factor in (adapter.lora_A, adapter.lora_B)}
        groups: dict[tuple[object, ...], dict[str, nn.Parameter]] = {}
        for name, how in learning.items():
            p = model.get_parameter(name)
            groups.setdefault((how, p.dtype, p.device, dtypes.get(p)), {})[name] = p
        self.segments = []
        for group in groups.values():
            name, p = next(iter(group.items()))
            self.segments.append(Segment(group, learning[name], dtypes.get(p)))
        copies: dict[nn.Parameter, Tensor] = {}
        for segment in self.segments:
            if segment.low is not None:
                copies |= zip(segment.parameters.values(), segment.split(segment.low).values(), strict=True)
        self.casts = [(each, (copies[each.lora_A], copies[each.lora_B])) for each, _ in factors]

    def zero_grad(self) -> None:
        """Make every gradient 0; and all views of the buffers again, should somebody have put others in their places.

        Other numbers of a parameter are taken in: `model.to`, say, gives it memory of its own, there and back.
        """
        for segment in self.segments:
            segment.gradient.zero_()
            for name, parameter in segment.parameters.items():
                place = segment.places[name]
                if _lies_elsewhere(parameter, place):
                    place.copy_(parameter.detach())
                    parameter.data = place
                parameter.grad = segment.gradients[name].detach()  # a tensor of its own, as `model.to` changes that one

    def check(self, model: nn.Module) -> None:
        """Is what the model trains still what it was?

        Raises:
            TrainingError: a parameter was frozen, thawed, or replaced by another one.
        """
        held = {id(p): name for segment in self.segments for name, p in segment.parameters.items()}
        now = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        if changed := sorted({name for key, name in (held | now).items() if key not in held or key not in now}):
            raise TrainingError(
                f"{changed[:3]}: what is trained has changed since the run began; change it between two runs"
            )

    def collect(self) -> None:
        """Take in gradients that lie elsewhere: a loss or a hook may have put others in their places, or none."""
        for segment in self.segments:
            for name, parameter in segment.parameters.items():
                place = segment.gradients[name]
                if parameter.grad is None:
                    place.zero_()
                elif _lies_elsewhere(parameter.grad, place):
                    place.copy_(parameter.grad)

    @contextmanager
    def cast(self) -> Iterator[None]:
        """Within it, adapters have their factors in the computation's dtype, cast once and not at each use."""
        for segment in self.segments:
            if segment.low is not None:
                segment.low.copy_(segment.values.detach())
        for adapter, copies in self.casts:
            adapter.cast = copies
        try:
            yield
        finally:
            for adapter, _ in self.casts:
                adapter.cast = None

    def release(self) -> None:
        """Give every parameter memory of its own again; no gradient is left."""
        for segment in self.segments:
            for each in (segment.values, *segment.parameters.values()):
                each.grad = None
            del segment.gradient, segment.gradients  # before the parameters are copied: there may be no room for more
        for segment in self.segments:
            for parameter in segment.parameters.values():
                parameter.data = parameter.data.clone()


def padded(size: int) -> int:
    """The place that so many numbers take in a segment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _lies_elsewhere(tensor: Tensor, place: Tensor) -> bool:
    return tensor.untyped_storage()._cdata != place.untyped_storage()._cdata  # stand-ins have no data_ptr


def flat_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The length of flat tensors taken together: that of the lengths of their chunks, in the tensors' dtype."""
    return torch.nn.utils.get_total_norm([chunk for tensor in tensors for chunk in tensor.detach().split(CHUNK)])


def _factors(model: nn.Module) -> Iterator[tuple[LowRank, torch.dtype]]:
    """Adapters that act and whose A and B are both trained, in another dtype than their layer computes in; and that."""
    for layer in adapter_layers(model).values():
        for adapter in (layer.adapters[name] for name in layer.active) if isinstance(layer, AdapterLayer) else ():
            pair = adapter.lora_A, adapter.lora_B
            if all(p.requires_grad and p.dtype != layer.dtype for p in pair):
                yield adapter, layer.dtype
