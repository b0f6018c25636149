"""Kernels of the decoder's operations: they save less for the backward pass, and pass over it less often.

The loss sends labelled rows through the head in chunks, so that the logits never exist as a whole. All kernels take the
size of their tiles from here.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minilora import llama
from minilora.definition import kernel
from minilora.errors import TrainingError

TILE = 2**17  # elements that a thread of the CPU works on at a time: half a MB in float32


def tile_rows(x: Tensor) -> int:
    """Return the rows to work on at a time.

    On a CPU they fit its cache. On other devices, few kernel launches matter more.
    """
    return max(1, tile_size(x.device) // max(1, math.prod(x.shape[1:])))


def tile_size(device: torch.device) -> int:
    """Return the elements to work on at a time; on "meta", where memory is counted, a few of a CPU's tiles."""
    return TILE * {"cpu": torch.get_num_threads(), "meta": 32}.get(device.type, 128)


@kernel(of=llama.rms_norm)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `llama.rms_norm`."""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """n = x/ρ, ρ = √(mean(x²) + eps), y = weight · n;  dn = weight · dy,  dx = (dn - n · mean(n · dn))/ρ.

    Saved are x and 1/ρ, one number a row; n is recomputed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse = (wide * wide).mean(-1, keepdim=True).add_(eps).rsqrt_()  # square() is four times as slow on a CPU
        ctx.save_for_backward(x, weight, inverse)
        return weight * (wide * inverse).to(torch.promote_types(x.dtype, weight.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
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

    Saved are gate and up. Autograd alone would also keep silu(gate), which is cheap to recompute.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)


HEAD_LOGITS = 3 * 2**23  # alive at a time: 50 MB in bfloat16; see `head_chunks`


@kernel(of=llama.cross_entropy)
def cross_entropy(hidden: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    """See `llama.cross_entropy`.

    The head sees a chunk of rows at a time, and the gradient of a chunk is computed while its logits exist. The head
    is called as a module, so it may be adapted, tied or trained. One with dropout sees all rows at once: its mask is a
    function of the seed and the shape, so chunks would share one.
    """
    if any(isinstance(module, nn.Dropout) and module.training and module.p for module in head.modules()):
        return llama.cross_entropy.function(hidden, labels, head)
    trained = [p for p in head.parameters() if p.requires_grad]
    if torch.is_grad_enabled() and (hidden.requires_grad or trained):
        return _ChunkedCrossEntropy.apply(hidden, labels, head, *trained)
    losses = [_loss(head(rows.clone()), row_labels) for rows, row_labels in head_chunks(head, hidden, labels)]
    return torch.stack(losses).sum()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of the chunks' losses, with gradients computed in the forward pass: dlogits = softmax(logits) - onehot.

    Saved are d(sum)/d(hidden), as large as `hidden`, and one gradient for each trained parameter of the head. Otherwise
    the logits, V numbers a row, would have to be saved or computed a second time.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, head: nn.Module, *trained: Tensor) -> Tensor:
        loss_sum = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        hidden_grads = torch.empty_like(hidden)  # allocated before the logits, or it would fragment their memory
        trained_grads = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in trained]
        for rows, row_labels, row_grads in head_chunks(head, hidden, labels, hidden_grads):
            with torch.enable_grad():
                leaf = rows.detach().requires_grad_()
                logits = head(leaf.clone())  # the head may change its input in place
            if strays := {*_leaves(logits)} - {leaf, *trained}:
                shape = tuple(strays.pop().shape)
                raise TrainingError(f"the head uses a trained tensor {shape} that is not one of its parameters")
            # In place of the logits, unless the backward pass of another kind of head or of a hook could need them.
            is_plain = type(head) is nn.Linear and not head._forward_hooks
            dlogits = logits.detach() if is_plain else torch.empty_like(logits)
            loss_sum += _loss(logits.detach(), row_labels, dlogits)
            hidden_grad, *grads = torch.autograd.grad(
                logits, [leaf, *trained], dlogits, allow_unused=True, materialize_grads=True
            )  # the parameters of an inactive adapter are unused
            row_grads.copy_(hidden_grad)
            trained_grads = [total.add_(grad) for total, grad in zip(trained_grads, grads, strict=True)]
            del logits, dlogits, hidden_grad, grads  # or they would exist together with those of the next chunk
        ctx.save_for_backward(hidden_grads, *trained_grads)
        ctx.dtypes = [hidden.dtype, *(parameter.dtype for parameter in trained)]
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # In the wider dtype: a rounded upstream 1/n would scale the whole gradient by a wrong factor.
        scaled = (upstream * grad.to(upstream.dtype) for grad in ctx.saved_tensors)
        hidden_grad, *trained_grads = (grad.to(dtype) for grad, dtype in zip(scaled, ctx.dtypes, strict=True))
        return hidden_grad, None, None, *trained_grads


def _leaves(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the leaves of a tensor's autograd graph."""
    nodes: list[Any] = [tensor.grad_fn]
    seen = set[Any]()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [function for function, _ in node.next_functions]
            if node.name() == "torch::autograd::AccumulateGrad":
                yield node.variable


def head_chunks(head: nn.Module, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield rows whose logits exist at a time: 512 of 49,152, a tenth faster in float32 than 256."""
    rows = max(1, HEAD_LOGITS // getattr(head, "out_features", 2**16))  # a head that is not a linear may lack it
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _loss(logits: Tensor, labels: Tensor, dlogits: Tensor | None = None) -> Tensor:
    """Return Σ -log p[label], p = softmax(logits), in float32 at least; write its gradient p - onehot to `dlogits`.

    With the largest logit z_m, -log p[label] = (z_m - z[label]) - log p_m: p_m ≥ 1/V, while p[label] may be 0. It works
    on a few rows at a time, so that p, which is wider than the logits, stays in the cache.
    """
    loss_sum = torch.zeros((), dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    tile = tile_rows(logits)
    for rows in (slice(first, first + tile) for first in range(0, logits.size(0), tile)):
        z, target = logits[rows], labels[rows].unsqueeze(-1)
        p = torch.softmax(z, dim=-1, dtype=loss_sum.dtype)
        margin = z.amax(-1, keepdim=True).to(p.dtype) - z.gather(-1, target).to(p.dtype)
        loss_sum += (margin - p.amax(-1, keepdim=True).log()).sum()
        if dlogits is not None:
            dlogits[rows] = p.scatter_(-1, target, p.gather(-1, target) - 1)
    return loss_sum
