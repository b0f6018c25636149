"""Kernels of causal attention over documents laid end to end: by plain products in blocks, and PyTorch's own.

A score is never computed where nothing is visible: keys after a block of queries, or before its window, do not enter
its product.

    N  queries laid end to end     H  query heads       E  width of a head
    M  keys laid end to end        K  key/value heads   G  H/K, query heads that share keys and values

    [Flash] Dao et al. 2022, FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora import llama
from minilora.definition import kernel

TOGETHER = 16  # matrices in a product, at most, of documents of one length: with three, one of two threads would wait
SHORT, LONG = 512, 2048  # tokens of documents between which blocks are faster in float32 on a CPU
Kernel = Callable[[Tensor, Tensor, Tensor, Sequence[int], Sequence[int], int | None], Tensor]


@kernel(of=llama.causal_attention)
def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    key_lengths: Sequence[int],
    window: int | None = None,
) -> Tensor:
    """See `llama.causal_attention`."""
    return kernel_for(q, key_lengths, window)(q, k, v, lengths, key_lengths, window)


def kernel_for(q: Tensor, key_lengths: Sequence[int], window: int | None) -> Kernel:
    """Which of the three below is used, by device, dtype and size.

    On a CPU, forward and backward in milliseconds, 9 query and 3 key heads of 64, the best of ten on 2 threads, freed
    memory kept (`runs/machine.py`):

                                   bfloat16            float32
                                   blocks   fused      blocks   fused
        4 documents of 512         27       69         45       76
        8 documents of 62..260     13       21         16       16
        1 document of 1,024        24       42         46       52
        1 document of 2,048        86       139        177      171
        2 documents of 2,048       177      283        305      349
        1 document of 4,096        332      525        724      619

    and on another processor, the median of seven:

        8 documents of 60..300     16       24         20       16
        8 documents of 40..70       8        8          7        4

    A window makes the fused kernel compute all scores under a dense mask, which the backward pass needs again; blocks
    leave them out. In 16 bits a GPU has a kernel for documents that are laid end to end; that it is chosen there, and
    the fused one elsewhere, rests on their design: nothing was measured.
    """
    longest = max(key_lengths)
    is_windowed = window is not None and window < longest
    if q.device.type == "cpu":
        is_middle = SHORT <= longest <= LONG
        return block_attention if q.dtype == torch.bfloat16 or is_middle or is_windowed else fused_attention
    has_varlen = q.device.type == "cuda" and torch.__version__ >= "2.13"  # since then with windows and grouped heads
    is_able = has_varlen and torch.cuda.get_device_capability(q.device) >= (8, 0)
    if is_able and q.dtype in (torch.bfloat16, torch.float16) and q.size(-1) % 8 == 0 and q.size(-1) <= 256:
        return varlen_attention
    return block_attention if is_windowed else fused_attention


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], key_lengths: Sequence[int], window: int | None
) -> Tensor:
    """`causal_attention` by plain matrix products, a block of queries of a document, or of some alike, at a time.

    No more than a block of scores lives at once, so memory grows with the length of a document, not with its square.
    """
    heads, key_heads, outputs = q.size(1), k.size(1), []
    alike = list(_alike(lengths, key_lengths, max(1, TOGETHER // key_heads)))
    queries = q.split([count * n for n, _, count in alike])
    keys, values = (x.split([count * m for _, m, count in alike]) for x in (k, v))
    for *qkv, (_, _, count) in zip(queries, keys, values, alike, strict=True):
        matrices = (_matrices(x, count, key_heads) for x in qkv)
        o = _BlockAttention.apply(*matrices, heads // key_heads, window)
        outputs.append(_rows(o, count, heads))
    return torch.cat(outputs)


class _BlockAttention(torch.autograd.Function):
    """S = q kᵀ/√E, P = softmax(S), o = P v;  dv = Pᵀ do,  dP = do vᵀ,  dS = P ∘ (dP - rowsum(P ∘ dP)),
    dq = dS k/√E,  dk = dSᵀ q/√E.

    Of documents of one length, n queries and m keys: a matrix for each and each key head, with a row for each query
    that reads it. Saved are q, k and v, which grow with n; P, which grows with n·m, is made again block by block
    [Flash §3.1]. The sums of dk and dv over blocks are taken in float32.

    Shapes: q (·, n·G, E), k (·, m, E), v (·, m, E) -> (·, n·G, E)
    """

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, group: int, window: int | None) -> Tensor:
        o = torch.empty_like(q)
        for rows, seen in _blocks(q, k, group, window):
            o[:, rows] = _probabilities(q[:, rows], k[:, seen], group, window) @ v[:, seen]
        return o

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *qkv, ctx.group, ctx.window = inputs
        ctx.save_for_backward(*qkv)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        scale, wide = q.size(-1) ** -0.5, torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for rows, seen in _blocks(q, k, ctx.group, ctx.window):
            P = _probabilities(q[:, rows], k[:, seen], ctx.group, ctx.window)
            dv[:, seen] += P.mT @ do[:, rows]
            dP = do[:, rows] @ v[:, seen].mT
            dS = torch.ops.aten._softmax_backward_data(dP, P, -1, P.dtype)
            dq[:, rows] = _scaled(dS, k[:, seen], scale)
            dk[:, seen] += _scaled(dS.mT, q[:, rows], scale)
        return dq, dk.to(q.dtype), dv.to(q.dtype), None, None


def _alike(lengths: Sequence[int], key_lengths: Sequence[int], most: int) -> Iterator[tuple[int, int, int]]:
    """Neighbouring documents of one length, at most so many: queries and keys of each, and their number.

    >>> list(_alike([5, 5, 5, 3], [7, 7, 7, 3], 2))
    [(5, 7, 2), (5, 7, 1), (3, 3, 1)]
    """
    documents, first = list(zip(lengths, key_lengths, strict=True)), 0
    while first < len(documents):  # not by groupby, which torch.compile takes with numbers that it knows alone
        last = first + 1
        while last < min(first + most, len(documents)) and documents[last] == documents[first]:
            last += 1
        yield *documents[first], last - first
        first = last


def block_size(dtype: torch.dtype) -> int:
    """Queries of a block: the fastest of 64, 96, 128, 192 and 256 in the two dtypes and the cases of `kernel_for`."""
    return 128 if dtype == torch.bfloat16 else 64


def _blocks(q: Tensor, k: Tensor, group: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Rows of about `block_size` queries, as even as can be, and the keys that some of them see: the last key is that
    of the last query.

    >>> q, k = torch.empty(1, 2 * 200, 8), torch.empty(1, 210, 8)
    >>> [(rows.stop, seen.start, seen.stop) for rows, seen in _blocks(q, k, 2, 100)]
    [(134, 0, 77), (268, 0, 144), (400, 45, 210)]
    """
    n, m = q.size(1) // group, k.size(1)
    even = -(-n // max(1, round(n / block_size(q.dtype))))
    for first in range(0, n, even):
        last, past = min(first + even, n), m - n
        begin = 0 if window is None else max(0, past + first - window + 1)
        yield slice(first * group, last * group), slice(begin, past + last)


def _matrices(x: Tensor, count: int, key_heads: int) -> Tensor:
    """A matrix for each of `count` documents and each key head: (count·n, K·G, E) -> (count·K, n·G, E).

    A copy even of a single token: a view, once saved, would keep what it is a view of.
    """
    E = x.size(-1)
    heads = x.view(count, -1, key_heads, x.size(1) // key_heads, E).transpose(1, 2)
    return heads.clone(memory_format=torch.contiguous_format).view(count * key_heads, -1, E)


def _rows(x: Tensor, count: int, heads: int) -> Tensor:
    """The way back: (count·K, n·G, E) -> (count·n, K·G, E)."""
    key_heads, E = x.size(0) // count, x.size(-1)
    return x.view(count, key_heads, -1, heads // key_heads, E).transpose(1, 2).reshape(-1, heads, E)


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
        return counted.to(q.device, non_blocking=True)

    longest = max(key_lengths)
    before = -1 if window is None or window > longest else window - 1  # keys that a query sees; -1: all
    where: Any = (ends(lengths), ends(key_lengths), max(lengths), longest)
    return cast(Tensor, varlen_attn(q, k, v, *where, window_size=(before, 0), enable_gqa=q.size(1) != k.size(1)))
