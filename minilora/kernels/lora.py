"""Kernels of LoRA and DoRA."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora import lora
from minilora.definition import kernel, no_autocast
from minilora.kernels.llama import tile_rows
from minilora.kernels.nf4 import packed_linear, packed_product
from minilora.nf4 import NF4Linear, Packed


@kernel(of=lora.lora_linear)
def lora_linear(
    x: Tensor, base: lora.Linear, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scale: float
) -> Tensor:
    """See `lora.lora_linear`. The update is added to x Wᵀ in place, and its gradient to dy W."""
    if not torch.is_grad_enabled() and x.numel() < lora_A.numel():
        # In a step of generation x is smaller than A and B, and it is cast in their place.
        wide = torch.promote_types(x.dtype, lora_A.dtype)
        update = F.linear(F.linear(x.to(wide), lora_A.to(wide)).mul_(scale), lora_B.to(wide))
        return lora.base_linear(x, base, bias).add_(update)
    weight, *packed = (None, base.layout, *base.parts) if isinstance(base, NF4Linear) else (base.weight, None)
    y = _LoraLinear.apply(x.reshape(-1, x.size(-1)), weight, bias, lora_A, lora_B, scale, *packed)
    return y.view(*x.shape[:-1], y.size(-1))


class _LoraLinear(torch.autograd.Function):
    """u = s·x Aᵀ,  y = x Wᵀ + b + u Bᵀ;
    h = s·dy B,  dx = dy W + h A,  dA = hᵀ x,  dB = dyᵀ u,  dW = dyᵀ x,  db = Σ dy.

    Saved are x, u, and A, B and W as they are stored. Autograd alone would also save A and B in the dtype of x, and
    the dense form of a 4-bit W, for every layer. u is treated as a constant, so there is no second derivative.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scale: float,
        layout: Any,
        *parts: Any,
    ) -> Tensor:
        u = F.linear(x, lora_A.to(x.dtype)).mul_(scale)
        _, needs_dW, _, needs_dA, needs_dB, *_ = ctx.needs_input_grad
        kept = x if needs_dW or needs_dA else None, u if needs_dB else None
        ctx.save_for_backward(*kept, lora_A, lora_B, *(parts if layout else (weight,)))
        ctx.scale = scale
        ctx.layout = layout
        y = F.linear(x, weight, bias) if weight is not None else packed_linear(x, Packed(*parts), layout, bias)
        return y.addmm_(u, lora_B.to(u.dtype).T)  # under autocast, u has another dtype than x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, u, lora_A, lora_B, *parts = ctx.saved_tensors
        needs_dx, needs_dW, needs_db, needs_dA, needs_dB, *_ = ctx.needs_input_grad
        h = (dy @ lora_B.to(dy.dtype)).mul_(ctx.scale)
        dx = None
        if needs_dx:
            dx = packed_product(dy, Packed(*parts), ctx.layout) if ctx.layout else dy @ parts[0].to(dy.dtype)
            dx.addmm_(h, lora_A.to(dy.dtype))
        x = x.to(dy.dtype) if needs_dW or needs_dA else x
        dW = dy.T @ x if needs_dW else None
        db = dy.sum(0) if needs_db else None
        dA = (h.T @ x).to(lora_A.dtype) if needs_dA else None
        dB = (dy.T @ u).to(lora_B.dtype) if needs_dB else None
        return dx, dW, db, dA, dB, *(None,) * (len(ctx.needs_input_grad) - 5)


@kernel(of=lora.dora_norm)
def dora_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """See `lora.dora_norm`. A tile of rows at a time, so that neither s·B A nor a wide W exists as a whole.

    The expanded square ‖w‖² + 2s·b·(A w) + s²·b·(A Aᵀ) b, for a row w of W and b of B, takes the same products, and
    cancels where the norm is small.
    """
    wide = lora.widest(weight, lora_A)
    lora_A = lora_A.to(wide)
    size = tile_rows(weight)
    with torch.no_grad(), no_autocast(weight.device.type):
        pairs = zip(weight.split(size), lora_B.to(wide).split(size), strict=True)
        sums = (torch.addmm(w.to(wide), b, lora_A, alpha=scale) for w, b in pairs)
        norm = torch.cat([torch.linalg.vector_norm(rows, dim=1) for rows in sums])
    return norm.clamp_(min=torch.finfo(torch.float32).tiny)


@kernel(of=lora.merge_weight)
def merge_weight(weight: Tensor, adapters: Sequence[lora.LoraAdapter]) -> Tensor:
    """See `lora.merge_weight`. Without a gradient or DoRA, a tile of rows at a time: nothing wide leaves the cache."""
    if not adapters or torch.is_grad_enabled() or any(adapter.magnitude is not None for adapter in adapters):
        return lora.merge_weight.function(weight, adapters)
    wide = lora.widest(weight, *(adapter.lora_A for adapter in adapters))
    factors = [(adapter.lora_A.to(wide), adapter.lora_B.to(wide), adapter.scale) for adapter in adapters]
    merged = torch.empty_like(weight)
    size = tile_rows(weight)
    with no_autocast(weight.device.type):
        for begin in range(0, len(weight), size):
            rows = slice(begin, begin + size)
            tile = weight[rows].to(wide)
            for lora_A, lora_B, scale in factors:
                tile = tile + lora.lora_delta(lora_A, lora_B[rows], scale)
            merged[rows] = tile
    return merged
