"""Kernels of 4-bit weights."""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora import nf4
from minilora.definition import cached_on_device, kernel
from minilora.errors import TrainingError
from minilora.kernels.llama import tile_rows

DENSE_TILE = 2**22  # elements of a 4-bit weight that are dense at a time: 8 MB in bfloat16
ROW_BLOCKS = 16  # blocks of a row of a tile; threads share its rows


@kernel(of=nf4.quantize)
def quantize(weight: Tensor, block_size: int = nf4.BLOCK_SIZE) -> tuple[Tensor, Tensor]:
    """See `nf4.quantize`. A tile at a time."""
    flat = weight.detach().reshape(-1)
    if flat.is_meta:  # it has no numbers
        return nf4.quantize.function(flat, block_size)
    whole, tile = _tiles(flat, math.lcm(2, block_size))
    parts = [_quantize_blocks(x.float().view(len(x) // block_size, block_size)) for x in flat[:whole].split(tile)]
    if whole < flat.numel():  # the last blocks, of which one may be incomplete
        parts.append(nf4.quantize.function(flat[whole:], block_size))
    packed, absmax = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return packed, absmax


def _quantize_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    absmax = blocks.abs().amax(1)
    if not absmax.isfinite().all():
        raise TrainingError("a weight that is not finite cannot be quantized")
    blocks = blocks * absmax.clamp(min=nf4.SMALLEST).reciprocal().unsqueeze(1)
    codes = _codes(blocks).view(-1)
    return codes[0::2] << 4 | codes[1::2], absmax


def _codes(x: Tensor) -> Tensor:
    """Return how many of the 15 midpoints are below each x (n, block_size) in [-1, 1], as uint8.

    The bin of x gives the count, except for a midpoint within the bin, which x is compared with.
    """
    below, within = (cached_on_device(table, x.device).expand(len(x), -1) for table in TABLES)
    bins = _bin_of(x).long()
    return below.gather(1, bins) + (x > within.gather(1, bins))


# The smallest number of equal bins of [-1, 1] with at most one midpoint in each; none of them is at an edge.
NUM_BINS = 22


def _bin_of(x: Tensor) -> Tensor:
    return (x * (NUM_BINS / 2)).add_(NUM_BINS / 2).nan_to_num_(0).int()  # NaN where denormals count as 0


def _tables() -> tuple[Tensor, Tensor]:
    """Return by bin, with one for 1: how many midpoints are in lower bins, and the midpoint in the bin, or infinity."""
    midpoints = nf4.midpoints(nf4.NF4)
    bins = _bin_of(midpoints).long()
    within = midpoints.new_full((NUM_BINS + 1,), math.inf).scatter(0, bins, midpoints)
    return torch.searchsorted(bins, torch.arange(NUM_BINS + 1, device="cpu")).to(torch.uint8), within


TABLES = _tables()


@functools.cache
def _level_pairs(levels: tuple[float, ...]) -> Tensor:
    """Return for each byte the float32 levels of its two halves, as one int64."""
    pairs = list(itertools.product(levels, repeat=2))
    return torch.tensor(pairs, dtype=torch.float32, device="cpu").view(torch.int64).squeeze(1)


@kernel(of=nf4.dequantize)
def dequantize(
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    block_size: int = nf4.BLOCK_SIZE,
    levels: tuple[float, ...] = nf4.LEVELS,
) -> Tensor:
    """See `nf4.dequantize`. A table gives both levels of a byte; nothing but the result is larger than a tile."""
    n = math.prod(shape)
    weight = torch.empty(n, dtype=dtype, device=packed.device)
    if weight.is_meta:  # it has no numbers
        return weight.view(*shape)
    width = ROW_BLOCKS * math.lcm(2, block_size) // 2
    whole, tile = _tiles(weight, 2 * width)
    table = cached_on_device(_level_pairs(levels), packed.device)
    rows = min(tile, whole) // 2 // width
    byte, pair = torch.empty(2, rows, width, dtype=torch.int64, device=packed.device)
    packed = packed.reshape(-1)
    for begin in range(0, whole, tile):
        end = min(begin + tile, whole)
        part = packed[begin // 2 : end // 2].view(-1, width)
        byte, pair = byte[: len(part)], pair[: len(part)]  # shorter for the last tile
        torch.gather(table.expand(rows, -1), 1, byte.copy_(part), out=pair)  # of one row it would use one thread
        w = pair.view(torch.float32).view(-1, block_size)
        w *= absmax[begin // block_size : end // block_size].unsqueeze(1)
        weight[begin:end] = w.view(-1)
    if whole < n:
        pairs = torch.index_select(table, 0, packed[whole // 2 :].int())
        scales = absmax[whole // block_size :].repeat_interleave(block_size)
        weight[whole:] = pairs.view(torch.float32)[: n - whole] * scales[: n - whole]
    return weight.view(*shape)


def _tiles(flat: Tensor, unit: int) -> tuple[int, int]:
    """Return how many weights are in whole units, and of these how many to work on at a time."""
    return flat.numel() // unit * unit, -(-tile_rows(flat) // unit) * unit


@kernel(of=nf4.nf4_linear)
def nf4_linear(x: Tensor, layer: nf4.NF4Linear, bias: Tensor | None) -> Tensor:
    """See `nf4.nf4_linear`. Only the packed weight is saved, and W is dequantized again in the backward pass."""
    y = _NF4Linear.apply(x.reshape(-1, x.size(-1)), bias, layer.layout, *layer.parts)
    return y.view(*x.shape[:-1], layer.out_features)


class _NF4Linear(torch.autograd.Function):
    """y = x Wᵀ + b,  dx = dy W,  db = Σ dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layout: nf4.Layout, *parts: Any) -> Tensor:
        ctx.save_for_backward(*parts)
        ctx.layout = layout
        return packed_linear(x, nf4.Packed(*parts), layout, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs_dx, needs_db, *_ = ctx.needs_input_grad
        dx = packed_product(dy, nf4.Packed(*ctx.saved_tensors), ctx.layout) if needs_dx else None
        return dx, dy.sum(0) if needs_db else None, *(None,) * 5


def packed_linear(x: Tensor, parts: nf4.Packed, layout: nf4.Layout, bias: Tensor | None) -> Tensor:
    """Compute x Wᵀ + b, a tile of W's rows at a time."""
    outputs, done = list[Tensor](), 0
    for weight in _dense_tiles(parts, layout, x.dtype, dim=0):
        outputs.append(F.linear(x, weight, None if bias is None else bias[done : done + len(weight)]))
        done += len(weight)
    return torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]


def packed_product(dy: Tensor, parts: nf4.Packed, layout: nf4.Layout) -> Tensor:
    """Compute dy W, a tile of W's columns at a time, so that no sum is divided."""
    products = [dy @ weight for weight in _dense_tiles(parts, layout, dy.dtype, dim=1)]
    return torch.cat(products, dim=-1) if len(products) > 1 else products[0]


def _dense_tiles(parts: nf4.Packed, layout: nf4.Layout, dtype: torch.dtype, dim: int) -> Iterator[Tensor]:
    """Yield W (out, in), dequantized, in tiles of its rows or columns.

    The system clears the memory of a large tensor each time that it is made, which takes as long as dequantizing does.
    """
    outer, inner = layout.shape
    block_size = layout.block_size
    unit = math.lcm(2, block_size)
    if not outer or not inner or inner % unit:  # a block or a byte may belong to two rows
        yield nf4.dequantize_weight(parts, layout, dtype)
        return
    packed, absmax, scales, offset = parts
    if scales is not None and offset is not None:
        absmax = nf4.dequantize_absmax(absmax, scales, offset)
    step, per_byte, per_scale = (1, 1, 1) if dim == 0 else (unit, 2, block_size)  # weights along `dim`
    length = max(1, DENSE_TILE // layout.shape[1 - dim] // step) * step
    codes = packed.view(outer, inner // 2).split(length // per_byte, dim)
    blocks = absmax.view(outer, inner // block_size).split(length // per_scale, dim)
    for part, scale in zip(codes, blocks, strict=True):
        shape = (part.size(0), 2 * part.size(1))
        yield nf4.dequantize(part.reshape(-1), scale.reshape(-1), shape, dtype, block_size, layout.levels)
