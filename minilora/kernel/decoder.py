"""Kernels of the decoder's operations: what they keep for the backward pass, and how often they pass over it.

A decoder's layers are matrix products, and all else should cost little beside them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora import llama
from minilora.definition import kernel


@kernel(of=llama.rms_norm)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `llama.rms_norm`."""
    return _RMSNorm.apply(x, weight, eps)[0]


class _RMSNorm(torch.autograd.Function):
    """n = x/ρ, ρ = √(mean(x²) + eps), y = weight · n;  dn = weight · dy,  dx = (dn - n · mean(n · dn))/ρ.

    Saved are x and 1/ρ, one number a row; n is made again.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse = (wide * wide).mean(-1, keepdim=True).add_(eps).rsqrt_()  # not square(): four times as slow on a CPU
        return weight * (wide * inverse).to(x.dtype), inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        n = x.to(inverse.dtype) * inverse
        dweight = (dy * n).reshape(-1, n.size(-1)).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        dn = (dy * weight).to(inverse.dtype)
        dx = dn.sub_(n.mul_((dn * n).mean(-1, keepdim=True))).mul_(inverse)
        return dx.to(x.dtype), dweight, None


@kernel(of=llama.swiglu)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `llama.swiglu`."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    """y = silu(gate) ∘ up;  dgate = silu'(gate) ∘ up ∘ dy,  dup = silu(gate) ∘ dy.

    Saved are gate and up. Autograd alone would also keep silu(gate), which is quickly made again.
    """

    @staticmethod
    def forward(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate).mul_(up)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)
