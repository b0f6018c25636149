"""The law of a kernel: the same function as its definition, and as exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minilora.testing.compare import GRADIENT_PARITY, maths, precision, relative
from minilora.testing.laws import CheckFailure, Report


def check_kernel(
    kernel: Callable[..., Any], definition: Callable[..., Any], tensors: Sequence[Tensor], name: str = "kernel"
) -> Report:
    """Check a faster function against its definition: the result, and the gradients of tensors that require one.

    In float64 both agree to 1e-11; in other dtypes the kernel's error to the definition in float64 is at most twice the
    definition's own error, plus one unit in the last place.

    Args:
        kernel: (*tensors) -> a tensor.
        definition: the plain function of the same arguments.
        tensors: the inputs, in the dtype under test; some may be wider.
        name: of the kernel, in the report.

    Raises:
        CheckFailure: the kernel is less exact, or its result has another dtype.
    """
    __tracebackhide__ = True
    dtype = min((tensor.dtype for tensor in tensors if tensor.is_floating_point()), key=lambda each: each.itemsize)
    wide = [_double(tensor) for tensor in tensors]
    ours, plain = (results(function, tensors, dtype) for function in (kernel, definition))
    exact = plain if dtype == torch.float64 else results(definition, wide, dtype)
    ratios = []
    for i, (our, their, right) in enumerate(zip(ours, plain, exact, strict=True)):
        what = "the result" if not i else f"gradient {i}"
        if our.dtype != their.dtype:
            raise CheckFailure(f"{name}: {what} is {our.dtype}, the definition's {their.dtype}", name, None)
        computed = dtype if i else our.dtype  # the gradient of a wider tensor is computed in that dtype, too
        if dtype == torch.float64:
            used = maths(our, their)
        elif our.dim():
            used = precision(our.to(computed), their.to(computed), right)
        else:  # the definition's error of a single number may be small by chance
            used = relative(our, their, GRADIENT_PARITY)
        if used > 1:
            raise CheckFailure(f"{name}: {what} has {used:.3g} times the allowed error at {computed}", name, None)
        ratios.append(used)
    return Report(name, "the kernel is its definition, and as exact", max(ratios), len(ratios))


def results(function: Callable[..., Any], tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the result of a function, and the gradients of the tensors that require one.

    The gradient that comes in is drawn, and rounded to a dtype.
    """
    y = function(*tensors)
    trained = [tensor for tensor in tensors if tensor.requires_grad]
    if not y.requires_grad:
        return [y]
    generator = torch.Generator().manual_seed(99)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype)
    return [y, *torch.autograd.grad(y, trained, dy.to(y))]


def _double(tensor: Tensor) -> nn.Parameter:
    """Return a tensor in float64, on the CPU: some devices have no float64."""
    wide = tensor.detach().cpu()
    return nn.Parameter(wide.double() if wide.is_floating_point() else wide, tensor.requires_grad)
