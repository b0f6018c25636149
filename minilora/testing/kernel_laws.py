"""The law of a kernel: it computes what its definition does, as exactly: see `check_kernel`.

A definition's own error may be small by chance, so its operations are moved by a unit in the last place. A softmax is
moved by as many units as a rounded exponent changes it, because e^(z - log Σ e^z) is right as well.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minilora.testing.cases import strided
from minilora.testing.compare import MATHS, Bounded, as_array, has_one_backward, worst
from minilora.testing.laws import Comparison, Law, Report, claim

__tracebackhide__ = True  # pytest shows the line that calls this module
DRAWS = 4  # of moved operations: of 16,800 right kernels of softmax(x W) none is refused
RESULT = "the result"
LARGE = " for 64 times the numbers"
WAYS: dict[str, tuple[float, dict[str, Any]]] = {  # factor of the numbers, and how the function is called
    "": (1.0, {}),
    " for 1/64 of the numbers": (2.0**-6, {}),  # where an ε counts
    " for 1/4096 of the numbers": (2.0**-12, {}),
    LARGE: (64.0, {}),
    " for zeros": (0.0, {}),
    " for views": (1.0, {"is_view": True}),
    " under no_grad": (1.0, {"context": torch.no_grad}),
    " under inference_mode": (1.0, {"context": torch.inference_mode}),
}
Results = dict[str, Tensor]  # the result and the gradients, by name
aten = torch.ops.aten
CHOICES = (aten.amax, aten.amin, aten.max, aten.min)  # operations that only choose a number


def check_kernel(
    kernel: Callable[..., Any], definition: Callable[..., Any], tensors: Sequence[Tensor], name: str = "definition"
) -> Report:
    """Check a faster function against its definition: the result, and the gradients of tensors that require one.

    It is called with the tensors, with their numbers times 1/64, 1/4096, 64 and 0, with zeros in one tensor at a time,
    where the definition is finite, with views that are not contiguous, without gradients, and with gradients of one
    tensor at a time. Another call leaves result and gradients as they were, and a retained graph has a second backward
    pass, unless `torch.compile` made it with one only. Integers stay as they are.

    In float64 both agree to 1e-11. In other dtypes the kernel's error to the definition in float64 is at most twice the
    definition's own, plus its own when each of its operations is off by a unit in the last place, plus such a unit. In
    bfloat16 this may be a third of a gradient: check a kernel in float32 as well.

    Args:
        kernel: (*tensors) -> a tensor.
        definition: the plain function of the same arguments.
        tensors: the inputs, in the dtype under test; some may be wider.
        name: of the kernel, in the report.

    Raises:
        CheckFailure: the kernel is less exact, its result has another dtype, a gradient is missing, an input is
            changed, or an error is raised.
    """
    calls = {way: Call(definition, times(factor, tensors), **options) for way, (factor, options) in WAYS.items()}
    trained = [i for i, tensor in enumerate(tensors) if tensor.requires_grad]
    if len(tensors) > 1:
        for i in range(len(tensors)):
            zero = [*tensors[:i], *times(0.0, tensors[i : i + 1]), *tensors[i + 1 :]]
            calls[f" for zeros in tensor {i}"] = Call(definition, zero)
    for i in trained if len(trained) > 1 else []:
        only = [tensor if j == i else tensor.detach() for j, tensor in enumerate(tensors)]
        calls[f", where only tensor {i} requires a gradient"] = Call(definition, only)

    def compare(kernel: Callable[..., Any], _: None) -> Iterator[Comparison]:
        for way, call in calls.items():
            yield from call.compare(kernel, way)

    return Law("kernel", name, "the kernel is its definition, and as exact", [None], compare).check(kernel)


def times(factor: float, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors with a multiple of their numbers; integers stay."""
    wide = [(tensor.detach() * factor).requires_grad_() if tensor.is_floating_point() else tensor for tensor in tensors]
    return [own if given.requires_grad else own.detach() for own, given in zip(wide, tensors, strict=True)]


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a definition: what is right, and how far off a kernel may be."""

    definition: Callable[..., Any]
    tensors: Sequence[Tensor]
    is_view: bool = False  # which numbers that a kernel gets are
    context: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def dtype(self) -> torch.dtype:
        dtypes = (tensor.dtype for tensor in self.tensors if tensor.is_floating_point())
        return min(dtypes, key=lambda dtype: dtype.itemsize)

    @cached_property
    def plain(self) -> Results:
        return self.results(self.definition, self.copies())

    @cached_property
    def exact(self) -> Results:
        return replace(self, is_view=False).results(self.definition, self.copies(torch.float64))

    @cached_property
    def moved(self) -> list[Results]:
        with MovedOperations():
            return [self.results(self.definition, self.copies()) for _ in range(DRAWS)]

    def copies(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Return the tensors, or those of another dtype on the CPU: some devices have no float64."""
        copies = [tensor.detach().clone() for tensor in self.tensors]
        if dtype:
            copies = [tensor.cpu().to(dtype) if tensor.is_floating_point() else tensor.cpu() for tensor in copies]
        if self.is_view:
            copies = [strided(copy) if copy.is_floating_point() else copy for copy in copies]
        return [nn.Parameter(copy, tensor.requires_grad) for copy, tensor in zip(copies, self.tensors, strict=True)]

    def results(self, function: Callable[..., Any], tensors: Sequence[Tensor], other: Any = nullcontext) -> Results:
        """Return a result and the gradients that there are; after an `other` call, those of a second backward pass."""
        with self.context():
            y = function(*tensors)
        other()
        trained = {f"the gradient of tensor {i}": tensor for i, tensor in enumerate(tensors) if tensor.requires_grad}
        if not y.requires_grad:
            return {RESULT: y}
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64).to(self.dtype)
        dy = strided(dy.to(y)) if self.is_view else dy.to(y, copy=True)
        again = other is not nullcontext
        for _ in range(1 + again):
            grads = torch.autograd.grad(y, [*trained.values()], dy, retain_graph=again, allow_unused=True)
        found = {name: grad for name, grad in zip(trained, grads, strict=True) if grad is not None}
        return {RESULT: y, **found, "the gradient from above, which is only read,": dy}

    def compare(self, kernel: Callable[..., Any], way: str) -> Iterator[Comparison]:
        if way and not all(result.isfinite().all() for result in self.plain.values()):
            return
        given, others = self.copies(), replace(self, tensors=times(0.5, self.tensors)).copies()
        ours = self.results(kernel, given)
        for i, (own, tensor) in enumerate(zip(given, self.tensors, strict=True)):
            yield Comparison(f"tensor {i}{way}, which is only read", own, as_array(tensor))
        yield from self.compare_results(ours, way)
        before = {name: as_array(own).copy() for name, own in ours.items()}
        self.results(kernel, others)
        for name, own in ours.items():
            yield Comparison(f"{name}{way} after another call", own, before[name])
        try:
            later = self.results(kernel, given, lambda: self.results(kernel, others))
        except RuntimeError as error:
            if has_one_backward(error):
                return
            raise
        yield from self.compare_results(later, f"{way} of a second backward pass, after those of another call")

    def compare_results(self, ours: Results, way: str) -> Iterator[Comparison]:
        for name, their in self.plain.items():
            if name not in ours:
                yield claim(f"{name}{way}", "found no gradient")
                continue
            our = ours[name]
            problem = "" if our.dtype == their.dtype else f"found {our.dtype}, expected {their.dtype}"
            yield claim(f"the dtype of {name}{way}", problem)
            if way.startswith(LARGE) and name != RESULT:  # of one probability of 1 in a softmax: a rounding error
                yield claim(f"{name}{way}", "" if our.isfinite().all() else "found infinity or NaN")
                continue
            our = our if name == RESULT else our.to(self.dtype)  # that of a wider tensor is computed in this dtype, too
            yield Comparison(f"{name}{way}", our, self.expected(name, our))

    def expected(self, name: str, our: Tensor) -> Bounded:
        """Return what a result should be; operations are moved only where it matters."""
        right = as_array((self.plain if self.dtype == torch.float64 else self.exact)[name])
        most = abs(right).max(initial=0.0)

        def error(run: Results) -> float:
            return float(abs(as_array(run[name].to(our.dtype)) - right).max(initial=0.0))

        allowed = MATHS * most
        if self.dtype != torch.float64:
            info = torch.finfo(our.dtype)
            allowed = 2 * error(self.plain) + info.eps * max(most, info.tiny)
            if worst(our, right, allowed)[0] > 1:
                allowed += max(0.0, *map(error, self.moved))  # where NaN does not count
        return Bounded(right, np.full(right.shape, allowed))


class MovedOperations(TorchDispatchMode):
    """Every operation's result is moved by a unit in the last place, up or down at random."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        is_exact = operation.is_view or operation.overloadpacket in CHOICES
        for tensor in [] if is_exact else tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                units: Any = torch.randint(2, tensor.shape).to(tensor) * 2 - 1
                if operation.overloadpacket == aten._softmax:
                    exponents = torch.where(tensor > 0, args[0].abs(), 0)  # others are masked, by -inf or the like
                    units *= 1 + exponents.amax(args[1], keepdim=True) / 2
                tensor.mul_(1 + units * torch.finfo(tensor.dtype).eps)
        return result
