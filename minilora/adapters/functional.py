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
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.tiles import tile_rows, tiles

Remake = Callable[..., Tensor]  # (dtype, *parts) -> W
Stored = tuple[Remake, tuple[Tensor | None, ...]]  # how W is made, and of what


def lora_scale(r: int, lora_alpha: float, use_rslora: bool = False) -> float:
    """s = α/r  [LoRA §4.1], or s = α/√r  [rsLoRA, abstract], which keeps the size of the update as r grows.

    >>> lora_scale(16, 32), lora_scale(16, 32, use_rslora=True)
    (2.0, 8.0)
    """
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    cast: tuple[Tensor, Tensor] | None = None,
    stored: Stored | None = None,
) -> Tensor:
    """y = x Wᵀ + b + s·(x Aᵀ) Bᵀ  [LoRA eq. 3], in the dtype of x, whatever that of A and B; without W `lora_branch`.

    With a backward pass of its own, so that neither the branch is another (N, out) nor its gradient another (N, in).
    Its saved u is a constant, so there is no second derivative.

    `cast` are A and B in the dtype of x, if they are at hand; the gradient is that of A and B themselves. `stored` says
    what W is made of, if it is to be made again in the backward pass and not kept.

    Shapes: x (..., in), weight (out, in), bias (out), lora_A (r, in), lora_B (out, r) -> (..., out)
    """
    if _casts_x(x, lora_A):
        branch = _wide_branch(x, lora_A, lora_B, scale)
        return branch.to(x.dtype) if weight is None else F.linear(x, weight, bias).add_(branch)
    rows, (cast_A, cast_B), (remake, parts) = _rows(x), cast or (None, None), stored or (None, ())
    place, u = _Gradients.apply(rows, weight, bias, lora_A, lora_B, scale, cast_A, cast_B, remake, *parts)
    y = _Sum.apply(place, rows, weight, bias, u, lora_B if cast_B is None else cast_B)
    return y.view(*x.shape[:-1], lora_B.size(0))


def lora_branch(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float, cast: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Δy = s·(x Aᵀ) Bᵀ: what A and B add, for an x of their own or a y that is there already. See `lora_linear`.

    Shapes: x (..., in), lora_A (r, in), lora_B (out, r) -> (..., out)
    """
    return lora_linear(x, None, None, lora_A, lora_B, scale, cast)


def _casts_x(x: Tensor, lora_A: Tensor) -> bool:
    """Is x cast, and not A and B? Where it has fewer rows than A, as in a step of generation, it is the smaller one."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and x.numel() < lora_A.numel()


def _wide_branch(x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """s·(x Aᵀ) Bᵀ without a gradient, in the wider dtype of x and of A and B."""
    wide = torch.promote_types(x.dtype, lora_A.dtype)
    return F.linear(F.linear(x.to(wide), lora_A.to(wide)).mul_(scale), lora_B.to(wide))


class _Gradients(torch.autograd.Function):
    """u = s·x Aᵀ, and of y = x Wᵀ + b + u Bᵀ the whole backward pass:

    h = s·dy B,  dx = dy W + h A,  dA = hᵀ x,  dB = dyᵀ u,  dW = dyᵀ x,  db = Σ dy.

    Scaled in the middle, where a row has r numbers and not `out`. Saved are x, u, and A, B and W as they are stored.
    Autograd alone would also keep A and B in the dtype of x, and a W in four bits as a dense one, for every layer.

    y itself is made behind it by `_Sum`, in a place of one number that hands dy back. When a block is computed again,
    PyTorch stops as soon as it has all that was saved: before the y of a block's last linear is made.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scale: float,
        cast_A: Tensor | None,
        cast_B: Tensor | None,
        remake: Remake | None,
        *parts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        u = F.linear(x, (lora_A if cast_A is None else cast_A).to(x.dtype)).mul_(scale)
        return u.new_empty_strided((x.size(0), lora_B.size(0)), (0, 0)), u

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, lora_A, lora_B, ctx.scale, cast_A, cast_B, ctx.remake, *parts = inputs
        _, needs_dW, _, needs_dA, needs_dB, *_ = ctx.needs_input_grad
        ctx.dtypes = lora_A.dtype, lora_B.dtype
        factors = (lora_A, lora_B) if cast_A is None else (cast_A, cast_B)
        rows = x if needs_dW or needs_dA else None, output[1] if needs_dB else None
        ctx.save_for_backward(*rows, *factors, *(parts if ctx.remake else (weight,)))
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # or zeros would be made for the gradient of u, which there is none of

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        x, u, lora_A, lora_B, *parts = ctx.saved_tensors
        needs_dx, needs_dW, needs_db, needs_dA, needs_dB, *_ = ctx.needs_input_grad
        h = (dy @ lora_B.to(dy.dtype)).mul_(ctx.scale)
        dx = _gradient_of_x(ctx, dy, h, lora_A.to(dy.dtype), parts) if needs_dx else None
        x = x.to(dy.dtype) if needs_dW or needs_dA else x
        dW = dy.T @ x if needs_dW else None
        db = dy.sum(0) if needs_db else None
        dA = (h.T @ x).to(ctx.dtypes[0]) if needs_dA else None
        dB = (dy.T @ u).to(ctx.dtypes[1]) if needs_dB else None
        return dx, dW, db, dA, dB, *(None,) * (len(ctx.needs_input_grad) - 5)


class _Sum(torch.autograd.Function):
    """y = x Wᵀ + b + u Bᵀ. Nothing is saved: dy goes back to the place, and all gradients come out of `_Gradients`."""

    @staticmethod
    def forward(
        place: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, u: Tensor, lora_B: Tensor
    ) -> Tensor:
        lora_B = lora_B.to(u.dtype)  # under autocast that of x is wider
        return F.linear(u, lora_B) if weight is None else F.linear(x, weight, bias).addmm_(u, lora_B.T)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)  # or zeros would be made for a y that nothing depends on

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        return dy, None, None, None, None, None


def _gradient_of_x(ctx: Any, dy: Tensor, h: Tensor, lora_A: Tensor, parts: Sequence[Tensor | None]) -> Tensor:
    """dx = dy W + h A; a W that was not kept is made again here, and let go."""
    weight = ctx.remake(dy.dtype, *parts) if ctx.remake else parts[0]
    return h @ lora_A if weight is None else (dy @ weight.to(dy.dtype)).addmm_(h, lora_A)


def lora_delta(lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """ΔW = s·B A  [LoRA eq. 3].

    Shapes: lora_A (r, in), lora_B (out, r) -> (out, in)
    """
    return scale * (lora_B @ lora_A)


def dora_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """‖W + s·B A‖, the length of each row  [DoRA eq. 5], a constant for the gradient [§4.3], in float32 at least.

    Of a tile of rows at a time, so that neither s·B A nor a wide W is ever there as a whole. Expanded, its square is
    ‖w‖² + 2s·b·(A w) + s²·b·(A Aᵀ) b for a row w of W and b of B. That takes the same products, but where a row nearly
    vanishes, of large terms a small number is left: in float32, one hundredth of ‖w‖ is wrong in the third digit. Here
    no digit is lost; and where B = 0 what is left is the sum of squares of W itself.

    The paper's W is (in, out) and its norm that of columns; a row here is a column there.

    Shapes: weight (out, in), lora_A (r, in), lora_B (out, r) -> (out)
    """
    wide = torch.promote_types(torch.promote_types(weight.dtype, lora_A.dtype), torch.float32)
    kind = weight.device.type
    as_is = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
    with torch.no_grad(), as_is:  # autocast would take the product in 16 bits
        lora_A, pairs = lora_A.to(wide), zip(tiles(weight), lora_B.to(wide).split(tile_rows(weight)), strict=True)
        sums = (torch.addmm(w.to(wide), b, lora_A, alpha=scale) for w, b in pairs)
        norm = torch.cat([torch.linalg.vector_norm(each, dim=1) for each in sums])
    return norm.clamp_(min=torch.finfo(torch.float32).tiny)  # a row of zeros has no direction: 0 / 0 is no number


def dora_stretch(y: Tensor, k: Tensor) -> Tensor:
    """k ⊙ y, a number for each of the outputs, computed in the wider dtype and rounded once to that of y  [DoRA eq. 5].

    Shapes: y (N, out), k (out) -> (N, out)
    """
    rows = y.reshape(-1, *y.shape[y.dim() - k.dim() :])
    return _Stretch.apply(rows, k).view(y.shape)


class _Stretch(torch.autograd.Function):
    """z = k ⊙ y;  dy = k ⊙ dz,  dk = Σ over rows of dz ∘ y.

    k is float32 where y is bfloat16, or steps smaller than bfloat16's would teach it nothing. In tiles: the product of
    two dtypes is made in the wider one, and that of all rows at once would be larger than y itself. Saved is y. It
    could be z, from which y follows, and which what comes next often keeps; but that may as well change z in place.
    """

    @staticmethod
    def forward(y: Tensor, k: Tensor) -> Tensor:
        z = torch.empty_like(y)
        for part, out in zip(tiles(y), tiles(z), strict=True):
            torch.mul(part, k, out=out)
        return z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, Tensor | None]:
        y, k = ctx.saved_tensors
        needs_dy, needs_dk = ctx.needs_input_grad
        dy, sums = torch.empty_like(dz), []
        for part, own, out in zip(tiles(dz), tiles(y), tiles(dy), strict=True):
            sums.append((part.to(k.dtype) * own).sum_to_size(k.shape))
            torch.mul(part, k, out=out)
        return dy if needs_dy else None, torch.stack(sums).sum(0) if needs_dk else None


def dropout_seed(key: str) -> int:
    """A number of 56 bits that follows from the key."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "little")


def seeded_dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """x ∘ mask/(1-p),  mask ~ Bernoulli(1-p)  [Dropout §4].

    The mask is a function of the seed, the shape and the kind of device. No global random state is read or moved:
    recomputing a layer, resuming a run or another order of layers draws the same mask.

    Shapes: x (N, in), seed () -> (N, in)
    """
    return x * _mask(x.detach(), p, seed) / (1 - p)


@torch.library.custom_op("minilora::mask", mutates_args=(), schema="(Tensor x, float p, Tensor seed) -> Tensor")
def _mask(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Where x stays: bool, in its shape.

    An operator of its own: a compiler cannot look into a generator, and would compile anew for each seed that is not in
    a tensor.
    """
    generator = torch.Generator(x.device).manual_seed(int(seed))
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p, generator=generator)


@_mask.register_fake
def _(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.bool)


def _rows(x: Tensor) -> Tensor:
    """(..., D) -> (N, D)."""
    return x.reshape(-1, x.size(-1))
