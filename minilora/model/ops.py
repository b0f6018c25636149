"""The operations of a Llama-style decoder, as functions of tensors.

Documents are laid end to end: a batch of sequences of lengths L₁ … L_b is one tensor of N = ΣLᵢ rows, and `lengths`
says where each ends. There is no padding, so nothing has to be masked away.

    N  tokens laid end to end      H  query heads       E  width of a head     D  hidden width
    M  keys laid end to end        K  key/value heads   R  rotated width of a head (R ≤ E)      V  vocabulary

    [RMS]   Zhang & Sennrich 2019, Root Mean Square Layer Normalization
    [RoPE]  Su et al. 2021, RoFormer: Enhanced Transformer with Rotary Position Embedding
    [GLU]   Shazeer 2020, GLU Variants Improve Transformer
    [GQA]   Ainslie et al. 2023, GQA: Training Generalized Multi-Query Transformer Models
    [SWA]   Beltagy et al. 2020, Longformer: The Long-Document Transformer
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE_INDEX = -100  # the label of a token that is read but not learned
HEAD_CHUNK = 256  # rows of logits alive at a time: 256 x 128,256 float32 values are 131 MB


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = weight · x / √(mean(x²) + eps)  [RMS eq. 4].

    The mean is taken in float32 (float64 for a float64 x), and x is rounded back before it meets the weight:
    the order of the checkpoints' own code, which matters in bfloat16.

    Shapes: x (..., D), weight (D) -> (..., D)
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """y = silu(gate) ∘ up,  silu(a) = a · σ(a)  [GLU §2].

    Shapes: gate (..., F), up (..., F) -> (..., F)
    """
    return F.silu(gate) * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(a, b) ↦ (a cos θ - b sin θ, b cos θ + a sin θ) for each pair of coordinates  [RoPE eq. 34].

    Pairs are (i, i + R/2), as in the Hugging Face checkpoints, and not (2i, 2i + 1) as in the paper: their q and k
    projections are permuted accordingly. Coordinates beyond R pass unchanged (partial rotary factor).

    Shapes: x (N, H, E), cos (N, R/2), sin (N, R/2) -> (N, H, E)
    """
    half = cos.size(-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    key_lengths: Sequence[int],
    window: int | None = None,
) -> Tensor:
    """o = softmax(q kᵀ/√E + mask) v within each document; query head h reads key head ⌊h·K/H⌋  [GQA §2].

    A document of `length` queries and `key_length` keys asks about its last `length` positions (with a cache there
    are more keys than queries). Position i sees the positions j with i - window < j ≤ i  [SWA §3.1].

    Shapes: q (N, H, E), k (M, K, E), v (M, K, E), lengths sum N, key_lengths sum M -> (N, H, E)
    """
    group = q.size(1) // k.size(1)
    if group > 1 and q.device.type != "cpu":  # torch's own grouping is slow or missing in some kernels of GPUs
        k, v, group = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1), 1
    outputs = []
    documents = zip(q.split(list(lengths)), k.split(list(key_lengths)), v.split(list(key_lengths)), strict=True)
    for queries, keys, values in documents:
        length, total = queries.size(0), keys.size(0)
        sees_all = window is None or total <= window
        needs_mask = not sees_all or 1 < length < total  # a single last token sees everything before it
        heads = F.scaled_dot_product_attention(
            queries.transpose(0, 1).unsqueeze(0),  # (1, H, length, E)
            keys.transpose(0, 1).unsqueeze(0),
            values.transpose(0, 1).unsqueeze(0),
            attn_mask=_visible(length, total, window, q.device) if needs_mask else None,
            is_causal=not needs_mask and length == total,
            enable_gqa=group > 1,
        )
        outputs.append(heads.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


def _visible(length: int, total: int, window: int | None, device: torch.device) -> Tensor:
    """True where a query may look: (length, total), the queries being the last `length` of `total` positions."""
    query = torch.arange(total - length, total, device=device).unsqueeze(1)
    key = torch.arange(total, device=device).unsqueeze(0)
    visible = key <= query
    return visible if window is None else visible & (key > query - window)


def cross_entropy(hidden: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    """Σ over labelled rows of -log softmax(head(h))[label]: a sum, so that batches add up.

    The head sees labelled rows only: which they are is found here, the rest is `labelled_cross_entropy`.

    Shapes: hidden (N, D), labels (N) -> ()
    Dtype: float32 (float64 for a float64 hidden)
    """
    labelled = labels != IGNORE_INDEX
    return labelled_cross_entropy(hidden[labelled], labels[labelled], head)


def labelled_cross_entropy(hidden: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    """Σ -log softmax(head(h))[label] over rows that all have a label.

    The head sees `HEAD_CHUNK` rows at a time, and each chunk's gradient is made while its logits are still alive, so
    full logits never exist. The head is called as a module: adapted, tied or trained ones work alike.

    Shapes: hidden (N, D), labels (N) -> ()
    Dtype: float32 (float64 for a float64 hidden)
    """
    trained = [p for p in head.parameters() if p.requires_grad]
    if torch.is_grad_enabled() and (hidden.requires_grad or trained):
        return _ChunkedCrossEntropy.apply(hidden, labels, head, *trained)[0]
    losses = [_chunk_loss(*chunk, head) for chunk in _chunks(hidden, labels)]
    return torch.stack(losses).sum()


def _chunks(hidden: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(hidden.split(HEAD_CHUNK), labels.split(HEAD_CHUNK), strict=True)


def _chunk_loss(hidden: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return F.cross_entropy(head(hidden).to(wide), labels, reduction="sum")


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of the chunks' losses with its gradients made in the forward pass.

    Saved for backward: d(sum)/d(hidden), as large as `hidden`, and one gradient for each trained parameter of the head.
    Otherwise the logits, V numbers a row, would have to be kept, or computed a second time.
    """

    @staticmethod
    def forward(hidden: Tensor, labels: Tensor, head: nn.Module, *trained: Tensor) -> tuple[Tensor, ...]:
        loss_sum = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        hidden_grads = torch.empty_like(hidden)  # made first: what is kept would lie between the chunks' own logits
        trained_grads = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in trained]
        for (rows, row_labels), row_grads in zip(_chunks(hidden, labels), hidden_grads.split(HEAD_CHUNK), strict=True):
            with torch.enable_grad():
                leaf = rows.detach().requires_grad_()
                loss = _chunk_loss(leaf, row_labels, head)
            hidden_grad, *grads = torch.autograd.grad(
                loss, [leaf, *trained], allow_unused=True, materialize_grads=True
            )  # an adapter that is not active is trained, but not used
            loss_sum += loss.detach()
            row_grads.copy_(hidden_grad)
            for total, grad in zip(trained_grads, grads, strict=True):
                total += grad
        return loss_sum, hidden_grads, *trained_grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.dtypes = [inputs[0].dtype, *(parameter.dtype for parameter in inputs[3:])]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        # Multiplied in the wider dtype: a rounded 1/n would scale the whole gradient by one wrong factor.
        scaled = (upstream * grad.to(upstream.dtype) for grad in ctx.saved_tensors)
        hidden_grad, *trained_grads = (grad.to(dtype) for grad, dtype in zip(scaled, ctx.dtypes, strict=True))
        return hidden_grad, None, None, *trained_grads
