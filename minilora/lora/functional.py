"""The equations of LoRA, as pure functions of tensors.

A frozen linear y = W x + b is changed by a product of two thin matrices, scaled by a number s:

    y = (W + s·B A) x + b,    A (r, in),  B (out, r),  r ≪ in, out

DoRA also learns the length of each row of the sum, m (out):

    y = m ⊙ (W + s·B A) x / ‖W + s·B A‖ + b,    ‖·‖ the length of each row

    N  rows of x

    [LoRA]    Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models
    [rsLoRA]  Kalajdzievski 2023, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA
    [DoRA]    Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation
    [Dropout] Srivastava et al. 2014, Dropout: A Simple Way to Prevent Neural Networks from Overfitting
"""

from __future__ import annotations

import hashlib
import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def lora_scale(r: int, lora_alpha: float, use_rslora: bool = False) -> float:
    """s = α/r  [LoRA §4.1], or s = α/√r  [rsLoRA, abstract], which keeps the size of the update as r grows.

    >>> lora_scale(16, 32), lora_scale(16, 32, use_rslora=True)
    (2.0, 8.0)
    """
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def lora_branch(x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """Δy = s·(x Aᵀ) Bᵀ  [LoRA eq. 3], computed in the dtype of x, whatever that of A and B.

    Scaled in the middle, where a row has r numbers and not `out`. It has no second derivative: h, which is kept for the
    first, knows nothing of where it came from.

    Shapes: x (N, in), lora_A (r, in), lora_B (out, r) -> (N, out)
    """
    return _Branch.apply(x, lora_A, lora_B, scale)[0]


class _Branch(torch.autograd.Function):
    """h = s·x Aᵀ, Δy = h Bᵀ;  dB = dyᵀ h,  dh = s·dy B,  dA = dhᵀ x,  dx = dh A.

    Saved are x, h and the adapter itself. Autograd alone would also keep A and B in the dtype of x, for every layer.
    """

    @staticmethod
    def forward(x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        h = scale * F.linear(x, lora_A.to(x.dtype))
        return F.linear(h, lora_B.to(x.dtype)), h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, lora_A, lora_B, ctx.scale = inputs
        ctx.save_for_backward(x, lora_A, lora_B, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # or zeros would be made for the gradient of h, which there is none of

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, h = ctx.saved_tensors
        needs_dx, needs_dA, needs_dB, _ = ctx.needs_input_grad
        dh = ctx.scale * (dy @ lora_B.to(dy.dtype))
        dx = dh @ lora_A.to(dh.dtype) if needs_dx else None
        dA = (_rows(dh).T @ _rows(x.to(dh.dtype))).to(lora_A.dtype) if needs_dA else None  # autocast: x is wider
        dB = (_rows(dy).T @ _rows(h.to(dy.dtype))).to(lora_B.dtype) if needs_dB else None
        return dx, dA, dB, None


def _rows(x: Tensor) -> Tensor:
    """(..., D) -> (N, D)."""
    return x.reshape(-1, x.size(-1))


def lora_delta(lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """ΔW = s·B A  [LoRA eq. 3].

    Shapes: lora_A (r, in), lora_B (out, r) -> (out, in)
    """
    return scale * (lora_B @ lora_A)


def dora_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """‖W + s·B A‖, the length of each row  [DoRA eq. 5], a constant for the gradient [§4.3], in float32 at least.

    The paper's W is (in, out) and its norm that of columns; a row here is a column there.

    Shapes: weight (out, in), lora_A (r, in), lora_B (out, r) -> (out)
    """
    wide = torch.promote_types(torch.promote_types(weight.dtype, lora_A.dtype), torch.float32)
    kind = weight.device.type
    as_is = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
    with torch.no_grad(), as_is:  # autocast would take the product in 16 bits
        norm = torch.linalg.vector_norm(weight.to(wide) + lora_delta(lora_A.to(wide), lora_B.to(wide), scale), dim=1)
    return norm.clamp_(min=torch.finfo(torch.float32).tiny)  # a row of zeros has no direction: 0 / 0 is no number


def keyed_dropout(x: Tensor, p: float, key: str) -> Tensor:
    """x ∘ mask/(1-p),  mask ~ Bernoulli(1-p)  [Dropout §4].

    The mask is a function of the key, the shape and the kind of device. No global random state is read or moved:
    recomputing a layer, resuming a run or another order of layers draws the same mask.

    Shapes: x (N, in) -> (N, in)
    """
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "little")
    generator = torch.Generator(x.device).manual_seed(seed)
    keep = torch.empty_like(x).bernoulli_(1 - p, generator=generator)
    return x * keep / (1 - p)
