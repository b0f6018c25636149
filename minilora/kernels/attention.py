"""Kernels of causal attention over documents laid end to end: matrix products in blocks, and PyTorch's own kernel.

A block of queries is multiplied only with the keys that one of them can see: none after the block, none before its
window.

    N  queries laid end to end     H  query heads       E  width of a head
    S  keys laid end to end        K  key/value heads   G  H/K, query heads that share keys and values

    [Flash] Dao et al. 2022, FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora import llama
from minilora.definition import kernel

MAX_BATCH = 16  # matrices in one batched product; with only 3, one of two threads would be idle part of the time
# If the longest document has this many tokens, blocks are faster than torch's kernel in float32 on a CPU.
BLOCK_MIN_TOKENS, BLOCK_MAX_TOKENS = 512, 2048
AttentionFunction = Callable[[Tensor, Tensor, Tensor, Sequence[int], Sequence[int], int | None], Tensor]


@kernel(of=llama.causal_attention)
def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], key_lengths: Sequence[int], window: int | None = None
) -> Tensor:
    """See `llama.causal_attention`."""
    return select_kernel(q, lengths, key_lengths, window)(q, k, v, lengths, key_lengths, window)


def select_kernel(
    q: Tensor, lengths: Sequence[int], key_lengths: Sequence[int], window: int | None
) -> AttentionFunction:
    """Return the faster of the two kernels below for a device, a dtype and lengths; docs/results.md has the times.

    With a window, or the last of a document's queries, the fused kernel would compute all scores under a dense mask,
    which the backward pass needs again; blocks skip them.
    """
    longest = max(key_lengths)
    is_windowed = window is not None and window < longest
    needs_mask = is_windowed or any(1 < n < m for n, m in zip(lengths, key_lengths, strict=True))
    if q.device.type == "cpu":
        use_blocks = q.dtype == torch.bfloat16 or BLOCK_MIN_TOKENS <= longest <= BLOCK_MAX_TOKENS
        return block_attention if use_blocks or needs_mask else fused_attention
    # In 16 bits on MPS, queries of the fused kernel may see later keys; see docs/internals/devices.md.
    return block_attention if needs_mask or q.device.type == "mps" else fused_attention


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], key_lengths: Sequence[int], window: int | None
) -> Tensor:
    """Compute `causal_attention` by matrix products, for a block of queries at a time.

    Neighbouring documents of equal length are computed as a batch. Only the scores of one block exist at a time, so
    memory grows with the length of a document, not with its square.
    """
    heads = q.size(1)
    key_heads = k.size(1)
    outputs = []
    groups = _equal_neighbours(lengths, key_lengths, max(1, MAX_BATCH // key_heads))
    queries = q.split([count * n for n, _, count in groups])
    keys, values = (x.split([count * m for _, m, count in groups]) for x in (k, v))
    for *qkv, (_, _, count) in zip(queries, keys, values, groups, strict=True):
        matrices = (_as_matrices(x, count, key_heads) for x in qkv)
        o = _BlockAttention.apply(*matrices, heads // key_heads, window)
        outputs.append(_as_rows(o, count, heads))
    return torch.cat(outputs)


class _BlockAttention(torch.autograd.Function):
    """P = softmax(q kᵀ/√E), o = P v;  dv = Pᵀ do,  dP = do vᵀ,  dS = P ∘ (dP - rowsum(P ∘ dP)),
    dq = dS k/√E,  dk = dSᵀ q/√E.

    There is a matrix for each document and each of its key heads, with G rows for each of the n queries. All documents
    have n queries and m keys. Saved are q, k and v; P, which grows with n·m, is recomputed block by block [Flash §3.1].
    dk and dv are summed over the blocks in float32.

    Shapes: q (·, n·G, E), k (·, m, E), v (·, m, E) -> (·, n·G, E)
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: int, window: int | None) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.group = group
        ctx.window = window
        o = torch.empty_like(q)
        for rows, seen in _blocks(q, k, group, window):
            o[:, rows] = _probabilities(q[:, rows], k[:, seen], group, window) @ v[:, seen]
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        scale = q.size(-1) ** -0.5
        wide = torch.promote_types(q.dtype, torch.float32)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(x, dtype=wide) for x in (k, v))
        for rows, seen in _blocks(q, k, ctx.group, ctx.window):
            P = _probabilities(q[:, rows], k[:, seen], ctx.group, ctx.window)
            dv[:, seen] += P.mT @ do[:, rows]
            dP = do[:, rows] @ v[:, seen].mT
            dS = torch.ops.aten._softmax_backward_data(dP, P, -1, P.dtype)
            dq[:, rows] = _scaled_product(dS, k[:, seen], scale)
            dk[:, seen] += _scaled_product(dS.mT, q[:, rows], scale)
        return dq, dk.to(q.dtype), dv.to(q.dtype), None, None


def _equal_neighbours(lengths: Sequence[int], key_lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Group neighbouring documents of equal length, at most `limit`: return queries and keys of each, and their number.

    >>> _equal_neighbours([5, 5, 5, 3], [7, 7, 7, 3], 2)
    [[5, 7, 2], [5, 7, 1], [3, 3, 1]]
    """
    groups: list[list[int]] = []
    for n, m in zip(lengths, key_lengths, strict=True):
        if groups and groups[-1][:2] == [n, m] and groups[-1][2] < limit:
            groups[-1][2] += 1
        else:
            groups.append([n, m, 1])
    return groups


def query_block_size(dtype: torch.dtype) -> int:
    """Return the queries of a block: the fastest of 64, 96, 128, 192 and 256 on two threads of a CPU."""
    return 128 if dtype == torch.bfloat16 else 64


def _blocks(q: Tensor, k: Tensor, group: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Yield the rows of about `query_block_size` queries, in blocks of nearly equal size, and the keys that one sees.

    The last query is at the position of the last key.

    >>> q, k = torch.empty(1, 2 * 200, 8), torch.empty(1, 210, 8)
    >>> [(rows.stop, seen.start, seen.stop) for rows, seen in _blocks(q, k, 2, 100)]
    [(134, 0, 77), (268, 0, 144), (400, 45, 210)]
    """
    n, m = q.size(1) // group, k.size(1)
    past = m - n
    size = -(-n // max(1, round(n / query_block_size(q.dtype))))
    for first in range(0, n, size):
        last = min(first + size, n)
        begin = 0 if window is None else max(0, past + first - window + 1)
        yield slice(first * group, last * group), slice(begin, past + last)


def _as_matrices(x: Tensor, count: int, key_heads: int) -> Tensor:
    """Return a matrix for each of `count` documents and each key head: (count·n, K·G, E) -> (count·K, n·G, E).

    It is always a copy: a view that is saved for the backward pass would keep its whole base alive.
    """
    E = x.size(-1)
    heads = x.view(count, -1, key_heads, x.size(1) // key_heads, E).transpose(1, 2)
    return heads.clone(memory_format=torch.contiguous_format).view(count * key_heads, -1, E)


def _as_rows(x: Tensor, count: int, heads: int) -> Tensor:
    """Undo `_as_matrices`: (count·K, n·G, E) -> (count·n, K·G, E)."""
    key_heads, E = x.size(0) // count, x.size(-1)
    return x.view(count, key_heads, -1, heads // key_heads, E).transpose(1, 2).reshape(-1, heads, E)


def _probabilities(queries: Tensor, keys: Tensor, group: int, window: int | None) -> Tensor:
    """Return softmax(q kᵀ/√E) of n queries at the last n of m positions: (·, n·G, E), (·, m, E) -> (·, n·G, m).

    If the window covers all keys, only the last n columns need a mask.
    """
    n, m = queries.size(1) // group, keys.size(1)
    scores = _scaled_product(queries, keys.mT, keys.size(-1) ** -0.5)
    masked = n if window is None or m <= window else m
    scores[..., m - masked :].unflatten(1, (n, -1)).add_(_mask(scores, n, masked, window).unsqueeze(1))
    return scores.softmax(-1)


def _scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return scale · a b, rounded once."""
    return torch.baddbmm(a.new_zeros(()), a, b, beta=0, alpha=scale)


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], key_lengths: Sequence[int], window: int | None
) -> Tensor:
    """Compute `causal_attention` by `F.scaled_dot_product_attention`, one document at a time, without a mask.

    A document has as many queries as keys, or one, which sees all keys; and no window hides any of them.
    """
    if q.device.type != "cpu":
        k, v = _repeated(k, v, q.size(1))
    outputs = []
    for document in zip(q.split(list(lengths)), k.split(list(key_lengths)), v.split(list(key_lengths)), strict=True):
        queries, keys, values = (x.transpose(0, 1).unsqueeze(0) for x in document)  # (1, H or K, length, E)
        is_causal = queries.size(2) == keys.size(2)
        has_groups = queries.size(1) != keys.size(1)
        o = F.scaled_dot_product_attention(queries, keys, values, is_causal=is_causal, enable_gqa=has_groups)
        outputs.append(o.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


def _repeated(k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return keys and values for each query head: kernels of GPUs are slow with grouped heads, or do not have them."""
    group = heads // k.size(1)
    return (k, v) if group == 1 else (k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1))


def _mask(like: Tensor, n: int, m: int, window: int | None) -> Tensor:
    """Return -inf where a query does not see a key, else 0: (n, m), the queries at the last n of m positions."""
    hidden = like.new_full((n, m), -torch.inf)
    mask = hidden.triu(m - n + 1)
    return mask if window is None else mask.add_(hidden.tril(m - n - window))


class MetaAttention:
    """Attention of documents on "meta" that keeps for the backward pass what it would keep on another device.

    The decoder takes it in place of `llama.Documents`. PyTorch's own attention on "meta" would keep all scores.
    """

    def __init__(self, device: torch.device, lengths: Sequence[int]):
        self.device = device
        self.lengths = lengths
        self.spans = [range(length) for length in lengths]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Return a tensor of the shape of `causal_attention`'s."""
        like = torch.empty(0, q.size(-1), dtype=q.dtype, device=self.device)
        chosen = select_kernel(like, self.lengths, self.lengths, window)
        if chosen is block_attention:
            return cast(Tensor, _Outline.apply(q.clone(), k.clone(), v.clone(), False))
        if self.device.type != "cpu":
            k, v = _repeated(k, v, q.size(1))
        return cast(Tensor, _Outline.apply(q, k, v, True)).clone()  # the outputs of documents are concatenated


class _Outline(torch.autograd.Function):
    """The tensors that a kernel keeps, without its result: q, k, v; fused also o, and log Σ exp of the scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, fused: bool) -> Tensor:
        o = torch.empty_like(q)
        kept = (o, q.new_empty(q.shape[:-1], dtype=torch.float32)) if fused else ()
        ctx.save_for_backward(q, k, v, *kept)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        return *(torch.empty_like(x) for x in ctx.saved_tensors[:3]), None
