"""A frozen linear whose weight is four bits a number, and its gradient.

QLoRA is this linear with LoRA on it  [QLoRA eq. 5]:

    y = x Wᵀ + s·(x Aᵀ) Bᵀ + b,   W = unpack(packed, absmax, …),   dx = dy W + (what passes through A and B)

W is stored in four bits and computed with in 16: a model of 7 billion weights takes 3.9 GB instead of 13.5. It is
frozen, so the rounding is no trouble of the optimizer's: A and B learn around it.

W is made where it is used and let go. Autograd would keep it: to compute dx it saves the W of every layer until the
backward pass, and the model is in memory as if it had never been quantized. So the product has a function of its own,
which saves the packed weight and makes W again. x is not saved at all: W is frozen, so nothing needs it.

Adapters read and apply the base's weight through `dense_weight` and `apply_weight`, dense or 4-bit.

    N rows (out), K columns (in)
    [QLoRA]  Dettmers et al. 2023, QLoRA: Efficient Finetuning of Quantized LLMs
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minilora.quant.nf4 import Layout, Packed, pack, unpack


class NF4Linear(nn.Module):
    """x ↦ W x + b with a packed W, frozen (final). Of files it may also hold fp4.

    What is stored are frozen parameters, rows first where a row is whole blocks, so that they can be sharded by rows.

    Args:
        parts: the packed weight.
        layout: its shape and what else belongs to it.
        bias: (N) or None; it is held, not copied.
        dtype: of the dense weight, that is of the computation.
    """

    def __init__(self, parts: Packed, layout: Layout, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.scratch: Scratch | None = None
        self.layout, self.dtype = layout, dtype
        self.out_features, self.in_features = layout.shape
        rows = (self.out_features, -1) if self.in_features % layout.block_size == 0 else (-1,)
        self.packed = _frozen(parts.packed.view(rows))
        self.absmax = _frozen(parts.absmax.view(rows))
        self.scales = None if parts.scales is None else _frozen(parts.scales)
        self.offset = None if parts.offset is None else _frozen(parts.offset.view(1))  # scalars cannot be sharded
        self.bias: nn.Parameter | None = None if bias is None else _frozen(bias.detach())

    @classmethod
    def quantize(
        cls, weight: Tensor, bias: Tensor | None = None, double_quant: bool = True, dtype: torch.dtype | None = None
    ) -> NF4Linear:
        """The linear of a dense weight (N, K); it computes in the weight's dtype if no other is named.

        Raises:
            TrainingError: a weight is not finite.
        """
        N, K = weight.shape
        return cls(pack(weight, double_quant), Layout((N, K), weight.dtype), bias, dtype or weight.dtype)

    @property
    def parts(self) -> Packed:
        """The packed weight, as it lies."""
        return Packed(self.packed, self.absmax, self.scales, self.offset)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), in the dtype of the computation."""
        return apply_weight(self, x, self.bias)

    def extra_repr(self) -> str:
        """What stands in the parentheses when a model is printed."""
        double = "" if self.scales is None else ", double_quant"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.layout.quant_type}{double}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        """`.to(dtype)` and its like mean the computation; what says which numbers W has is moved, never rounded."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype or tensor is self.bias else tensor.to(moved.device)

        return super()._apply(move, recurse)


Linear = nn.Linear | NF4Linear
Remake = Callable[..., Tensor]


class Scratch:
    """A buffer for one dense weight, which is valid until the next one is made (final).

    On the CPU the system may have to lend what each one takes, and first fills it with zeros, page by page: that takes
    as long as dequantizing does. Elsewhere PyTorch itself keeps what was let go.
    """

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)

    def place(self, layout: Layout, dtype: torch.dtype) -> Tensor:
        """Where the weight may be written: its n numbers, whatever they are now."""
        size = math.prod(layout.shape) * dtype.itemsize
        if self.memory.numel() < size:
            self.memory = torch.empty(size, dtype=torch.uint8)
        return self.memory[:size].view(dtype)


def dense_weight(base: Any) -> Tensor:
    """W of a linear, (N, K), in the dtype of the computation; of another layer with a weight, that weight."""
    if isinstance(base, NF4Linear):
        return unpack(base.parts, base.layout, base.dtype)
    weight: Tensor = base.weight  # of a replica of DataParallel that is no parameter
    return weight


def passing_weight(base: Any) -> Tensor:
    """Return `dense_weight`, valid until the next call: it may lie in a shared `Scratch`."""
    return _remake(base)(base.dtype, *base.parts) if isinstance(base, NF4Linear) else dense_weight(base)


def dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen plain linear of these numbers."""
    linear = nn.Linear(weight.size(1), weight.size(0), bias=False, device="meta")
    linear.weight = _frozen(weight.detach())
    if bias is not None:
        linear.bias = _frozen(bias.detach())
    return linear


def apply_weight(base: Linear, x: Tensor, bias: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """x Wᵀ, with a bias if one is given: (..., K) -> (..., N). Who has `dense_weight(base)` already gives it along."""
    weight = passing_weight(base) if weight is None else weight
    if isinstance(base, NF4Linear):
        rows = x.to(base.dtype).reshape(-1, base.in_features)
        return _Product.apply(rows, weight, bias, _remake(base), *base.parts).view(*x.shape[:-1], base.out_features)
    return F.linear(x, weight, bias)


def stored(base: Any) -> tuple[Remake, Packed] | None:
    """How W is made again, and of what, where it is not stored as it is: remake(dtype, *parts) = W in the dtype."""
    return (_remake(base), base.parts) if isinstance(base, NF4Linear) else None


def _remake(base: NF4Linear) -> Remake:
    return functools.partial(_remade, base.layout, base.scratch)


def _remade(layout: Layout, scratch: Scratch | None, dtype: torch.dtype, *parts: Any) -> Tensor:
    if scratch is None or parts[0].device.type != "cpu" or torch.compiler.is_compiling():
        return unpack(Packed(*parts), layout, dtype)
    return unpack(Packed(*parts), layout, dtype, scratch.place(layout, dtype))


class _Product(torch.autograd.Function):
    """y = x Wᵀ + b, and dx = dy W with W made again: what is saved is what is stored."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, remake: Remake, *parts: Tensor | None) -> Tensor:
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, _, ctx.remake, *parts = inputs
        ctx.save_for_backward(*parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs_dx, _, needs_db, *_ = ctx.needs_input_grad
        dx = dy @ ctx.remake(dy.dtype, *ctx.saved_tensors) if needs_dx else None
        db = dy.reshape(-1, dy.size(-1)).sum(0) if needs_db else None
        return dx, None, db, *(None,) * 5


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
