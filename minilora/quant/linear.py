"""A frozen linear whose weight is four bits a number, and its gradient.

    y = x Wᵀ + b,  dx = dy W,   W = dequantize(packed, absmax)

W is made where it is used and let go. Autograd would keep it: to compute dx it saves the W of every layer until the
backward pass, and the model is in memory as if it had never been quantized. So the product has a function of its own,
which saves the packed weight and makes W again. x is not saved at all: W is frozen, so nothing needs it.

    N rows (out), K columns (in), B block size, M tokens
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minilora.quant.nf4 import BLOCK_SIZE, dequantize, dequantize_absmax, quantize, quantize_absmax


class NF4Linear(nn.Module):
    """x ↦ dequantize(packed, absmax) x + b, frozen (final).

    What is stored are frozen parameters, rows first where a row is whole blocks, so that they can be sharded by rows.

    Args:
        weight: (N, K), of any float dtype.
        bias: (N) or None; it is held, not copied.
        is_double: quantize the absmaxes, too: 4.127 bits a weight instead of 4.5.
        dtype: of the dequantized weight, that is of the computation.

    Raises:
        TrainingError: the weight is not finite.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, is_double: bool = True, dtype: torch.dtype | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype or weight.dtype
        packed, absmax = quantize(weight)
        by_rows = self.in_features % BLOCK_SIZE == 0
        self.packed = _frozen(packed.view(self.out_features, -1) if by_rows else packed)
        self.scales: nn.Parameter | None = None
        self.offset: nn.Parameter | None = None
        if is_double:
            absmax, scales, offset = quantize_absmax(absmax)
            self.scales, self.offset = _frozen(scales), _frozen(offset)
        self.absmax = _frozen(absmax.view(self.out_features, -1) if by_rows else absmax)
        self.bias = None if bias is None else _frozen(bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), in the dtype of the computation."""
        shape = self.out_features, self.in_features
        return _Product.apply(x.to(self.dtype), self.packed, self.absmax, self.scales, self.offset, self.bias, shape)

    def dense_weight(self) -> Tensor:
        """W, (N, K), in the dtype of the computation."""
        shape = self.out_features, self.in_features
        return _dense(self.packed, self.absmax, self.scales, self.offset, shape, self.dtype)


class _Product(torch.autograd.Function):
    """y = x Wᵀ + b, and dx = dy W with W made again: what is saved is what is stored. x needs not be."""

    @staticmethod
    def forward(
        x: Tensor,
        packed: Tensor,
        absmax: Tensor,
        scales: Tensor | None,
        offset: Tensor | None,
        bias: Tensor | None,
        shape: tuple[int, int],
    ) -> Tensor:
        return F.linear(x, _dense(packed, absmax, scales, offset, shape, x.dtype), None if bias is None else bias.to(x))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, packed, absmax, scales, offset, _, ctx.shape = inputs
        ctx.save_for_backward(packed, absmax, scales, offset)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        packed, absmax, scales, offset = ctx.saved_tensors
        return dy @ _dense(packed, absmax, scales, offset, ctx.shape, dy.dtype), None, None, None, None, None, None


def _dense(
    packed: Tensor,
    absmax: Tensor,
    scales: Tensor | None,
    offset: Tensor | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    absmax = absmax.reshape(-1)
    if scales is not None and offset is not None:
        absmax = dequantize_absmax(absmax, scales, offset)
    return dequantize(packed, absmax, shape, dtype)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
