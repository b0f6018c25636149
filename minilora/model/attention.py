"""Causal attention over documents laid end to end.

A batch of documents of lengths L₁ … L_b is one tensor of N = ΣLᵢ rows, and `lengths` says where each ends: no row of
padding is computed, and no mask keeps documents apart. A score is never asked for where nobody looks: keys after a
block of queries, or before its window, do not enter its product.

    N  queries laid end to end     H  query heads       E  width of a head
    M  keys laid end to end        K  key/value heads   G  H/K, query heads that share keys and values

    [GQA]   Ainslie et al. 2023, GQA: Training Generalized Multi-Query Transformer Models
    [SWA]   Beltagy et al. 2020, Longformer: The Long-Document Transformer
    [Flash] Dao et al. 2022, FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.once import once_differentiable

TOGETHER = 4  # documents of one length in a product: with three key heads, one of two threads would wait for the other
Kernel = Callable[[Tensor, Tensor, Tensor, Sequence[int], Sequence[int], int | None], Tensor]


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
    return kernel_for(q, key_lengths, window)(q, k, v, lengths, key_lengths, window)


def kernel_for(q: Tensor, key_lengths: Sequence[int], window: int | None) -> Kernel:
    """Which of the three below is used, by device, dtype and size.

    On a CPU, forward and backward in milliseconds, 9 query and 3 key heads of 64, the best of ten on 2 threads, freed
    memory kept (`train/allocator.py`):

                                   bfloat16            float32
                                   blocks   fused      blocks   fused
        4 documents of 512         27       69         45       76
        8 documents of 62..260     13       21         16       16
        1 document of 1,024        24       42         46       52
        1 document of 2,048        86       139        177      171
        2 documents of 2,048       177      283        305      349
        1 document of 4,096        332      525        724      619

    A window makes the fused kernel compute all scores under a dense mask, and blocks leave them out. In 16 bits a GPU
    has a kernel for documents that are laid end to end; that it is chosen rests on its design, nothing was measured.
    """
    if q.device.type == "cpu":
        longest = max(key_lengths)
        is_short = longest <= 2048 or (window is not None and window < longest)
        return block_attention if q.dtype == torch.bfloat16 or is_short else fused_attention
    has_varlen = q.device.type == "cuda" and torch.__version__ >= "2.13"  # since then with windows and grouped heads
    is_able = has_varlen and torch.cuda.get_device_capability(q.device) >= (8, 0)
    fits = q.dtype in (torch.bfloat16, torch.float16) and q.size(-1) % 8 == 0 and q.size(-1) <= 256
    return varlen_attention if is_able and fits else fused_attention


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], key_lengths: Sequence[int], window: int | None
) -> Tensor:
    """`causal_attention` by plain matrix products, a block of queries of a document, or of some alike, at a time.

    No more than a block of scores lives at once, so memory grows with the length of a document, not with its square.
    """
    return _BlockAttention.apply(q, k, v, lengths, key_lengths, window)


class _BlockAttention(torch.autograd.Function):
    """S = q kᵀ/√E, P = softmax(S), o = P v;  dv = Pᵀ do,  dP = do vᵀ,  dS = P ∘ (dP - rowsum(P ∘ dP)),
    dq = dS k/√E,  dk = dSᵀ q/√E.

    Saved are q, k and v, which grow with N; P, which grows with N², is made again block by block [Flash §3.1]. The sums
    of dk and dv over blocks are taken in float32.
    """

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], key_lengths: Sequence[int], window: int | None
    ) -> Tensor:
        o = torch.empty_like(q)
        for rows, keys, count in _alike(lengths, key_lengths):
            queries, outputs = (_by_key_head(x[rows], k.size(1), count) for x in (q, o))
            their_k, their_v = (_matrices(_by_key_head(x[keys], k.size(1), count)) for x in (k, v))
            for block, seen in _blocks(queries.size(2), their_k.size(1), window, _block_size(q.dtype)):
                P = _probabilities(_matrices(queries[:, :, block]), their_k[:, seen], queries.size(3), window)
                outputs[:, :, block] = (P @ their_v[:, seen]).view_as(outputs[:, :, block])
        return o

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        q, k, v, *ctx.where = inputs
        ctx.save_for_backward(q, k, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        lengths, key_lengths, window = ctx.where
        scale, wide = q.size(-1) ** -0.5, torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        for rows, keys, count in _alike(lengths, key_lengths):
            queries, gradients, outputs = (_by_key_head(x[rows], k.size(1), count) for x in (q, do, dq))
            their_k, their_v = (_matrices(_by_key_head(x[keys], k.size(1), count)) for x in (k, v))
            their_dk, their_dv = (torch.zeros_like(x, dtype=wide) for x in (their_k, their_v))
            for block, seen in _blocks(queries.size(2), their_k.size(1), window, _block_size(q.dtype)):
                asked, dy = (_matrices(x[:, :, block]) for x in (queries, gradients))
                P = _probabilities(asked, their_k[:, seen], queries.size(3), window)
                their_dv[:, seen] += P.mT @ dy
                dP = dy @ their_v[:, seen].mT
                dS = torch.ops.aten._softmax_backward_data(dP, P, -1, P.dtype)
                outputs[:, :, block] = _scaled(dS, their_k[:, seen], scale).view_as(outputs[:, :, block])
                their_dk[:, seen] += _scaled(dS.mT, asked, scale)
            for x, total in ((dk, their_dk), (dv, their_dv)):
                _by_key_head(x[keys], k.size(1), count).squeeze(3).copy_(total.unflatten(0, (count, -1)))
        return dq, dk, dv, None, None, None


def _alike(lengths: Sequence[int], key_lengths: Sequence[int]) -> Iterator[tuple[slice, slice, int]]:
    """Neighbouring documents of one length, at most `TOGETHER` of them: their queries, their keys, their number.

    >>> [(rows.stop, keys.stop, count) for rows, keys, count in _alike([5] * 6 + [3], [7] * 6 + [3])]
    [(20, 28, 4), (30, 42, 2), (33, 45, 1)]
    """
    row = key = 0
    for (length, total), documents in groupby(zip(lengths, key_lengths, strict=True)):
        left = len(list(documents))
        while left:
            count = min(left, TOGETHER)
            rows, keys = slice(row, row + count * length), slice(key, key + count * total)
            yield rows, keys, count
            row, key, left = rows.stop, keys.stop, left - count


def _block_size(dtype: torch.dtype) -> int:
    """Queries of a block: the fastest of 64, 96, 128, 192 and 256 in the cases of `kernel_for`."""
    return 128 if dtype == torch.bfloat16 else 64


def _blocks(length: int, total: int, window: int | None, size: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of about `size` queries of a document, as even as can be, and the keys that some of them see: the last
    key is that of the last query.

    >>> [(block.stop, seen.start, seen.stop) for block, seen in _blocks(5, 6, 2, 2)]
    [(3, 0, 4), (5, 3, 6)]
    """
    even = -(-length // max(1, round(length / size)))
    for first in range(0, length, even):
        last, past = min(first + even, length), total - length
        begin = 0 if window is None else max(0, past + first - window + 1)
        yield slice(first, last), slice(begin, past + last)


def _by_key_head(x: Tensor, key_heads: int, count: int) -> Tensor:
    """A view of documents of n tokens by the key head that each head reads: (count·n, H, E) -> (count, K, n, G, E)."""
    return x.unflatten(1, (key_heads, -1)).unflatten(0, (count, -1)).transpose(1, 2)


def _matrices(x: Tensor) -> Tensor:
    """A matrix for each document and key head: (count, K, n, G, E) -> (count·K, n·G, E)."""
    return x.flatten(2, 3).flatten(0, 1).contiguous()


def _probabilities(queries: Tensor, keys: Tensor, group: int, window: int | None) -> Tensor:
    """softmax(q kᵀ/√E) of n queries that are the last ones of the keys: (·, n·G, E), (·, m, E) -> (·, n·G, m).

    Where no query's window begins within the keys, only the square at their end has anything to hide.
    """
    n, m = queries.size(1) // group, keys.size(1)
    S = _scaled(queries, keys.mT, keys.size(-1) ** -0.5)
    reach = n if window is None or m <= window else m
    S[..., m - reach :].unflatten(1, (n, -1)).add_(_bias(S, n, reach, window).unsqueeze(1))
    return S.softmax(-1)


def _scaled(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale · a b, rounded once."""
    return torch.baddbmm(a.new_zeros(()), a, b, beta=0, alpha=scale)


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], key_lengths: Sequence[int], window: int | None
) -> Tensor:
    """`causal_attention` by torch's own kernel, a document at a time."""
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
            attn_mask=_bias(queries, length, total, window) if needs_mask else None,
            is_causal=not needs_mask and length == total,
            enable_gqa=group > 1,
        )
        outputs.append(heads.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


def _bias(like: Tensor, n: int, m: int, window: int | None) -> Tensor:
    """-inf where a query may not look, else 0: (n, m), the queries being the last n of m positions."""
    hidden = like.new_full((n, m), -torch.inf)
    bias = hidden.triu(m - n + 1)
    return bias if window is None else bias.add_(hidden.tril(m - n - window))


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], key_lengths: Sequence[int], window: int | None
) -> Tensor:
    """`causal_attention` by torch's kernel of GPUs for documents laid end to end: all of them in one call."""
    from torch.nn.attention.varlen import varlen_attn  # a second to import, and not there in older versions

    def ends(sizes: Sequence[int]) -> Tensor:
        counted = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
        return counted.to(q.device, non_blocking=True)  # not pinned: a forecast's stand-ins cannot be

    longest = max(key_lengths)
    reach = -1 if window is None or window > longest else window - 1, 0  # keys before and after a query; -1: all
    where: Any = (ends(lengths), ends(key_lengths), max(lengths), longest)
    return cast(Tensor, varlen_attn(q, k, v, *where, window_size=reach, enable_gqa=q.size(1) != k.size(1)))
