"""Backward passes that have no derivative of their own, and say so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minilora.errors import TrainingError

Gradients = tuple[Tensor | None, ...]


def once_differentiable(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """The backward pass of an autograd function, without a graph; a derivative of it is refused when it is asked for.

    PyTorch's decorator of this name does so only where what comes in requires a gradient. Behind a sum it does not, and
    a penalty on the gradient would learn nothing, without a word: here what was saved counts, too.
    """

    @functools.wraps(backward)
    def refusing(ctx: Any, *upstream: Tensor | None) -> Gradients:
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # what is compiled refuses by itself
            return gradients
        return _Final.apply(len(gradients), *gradients, *upstream, *ctx.saved_tensors)

    return refusing


class _Final(torch.autograd.Function):
    """The first so many tensors as they are; there is no way back, neither to them nor to the others."""

    generate_vmap_rule = True

    @staticmethod
    def forward(count: int, *tensors: Tensor | None) -> Gradients:
        return tuple(None if tensor is None else tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Gradients:
        raise TrainingError("the functions of minilora have no second derivative")
