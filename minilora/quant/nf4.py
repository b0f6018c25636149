"""NF4: a weight in four bits and a scale for each block of 64; and the scales in eight bits, with one for 256 of them.

A block of weights is divided by its largest absolute value, its *absmax*, and each quotient is replaced by the number
of the nearest of 16 levels. Weights are distributed nearly normally, so the levels are quantiles of a normal
distribution, which lie closest where weights are densest  [QLoRA §3, values in app. E]:

    level = Φ⁻¹(p) / Φ⁻¹(δ),  p in 8 even steps from 1 - δ to 1/2, and in 9 from 1/2 to δ = 1 - (1/30 + 1/32) / 2

(as the published code makes them; the paper's eq. 4 is another rule). Both halves end in 0, which is one level, and
exact; so there are seven below it and eight above. δ keeps Φ⁻¹ finite: it is half a step from 1, on the mean of what
15 and 16 levels would have. If every block's absmax were Φ⁻¹(δ) = 1.85 σ, all levels would be used about equally often,
which is the most that four bits can say; of 64 weights it is larger, and the outer levels are used less.

An absmax in float32 is half a bit for each of its 64 weights. *Double quantization* takes their mean off the absmaxes
and stores what is left in eight bits, with a float32 scale for 256 of them: 8/64 + 32/(64·256) = 0.127 bits a weight.
Those 256 levels are finer the nearer they are to 0, over seven decades  [8-bit].

The bytes are those of bitsandbytes 0.50: of two weights the first is in the high half of a byte, blocks run over the
rows laid end to end, and a quotient that is midway between two levels gets the lower one.

    N rows, K columns, n = N·K weights, B block size, b = ⌈n/B⌉ blocks
    [QLoRA]  Dettmers et al. 2023, QLoRA: Efficient Finetuning of Quantized LLMs
    [8-bit]  Dettmers et al. 2021, 8-bit Optimizers via Block-wise Quantization
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.errors import ConfigError, TrainingError
from minilora.tiles import tile_rows

# As published. Computed again, the last bits differ from machine to machine.
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# Of bitsandbytes' other format, which is read only: a sign and three bits.
FP4_LEVELS = tuple(sign * level / 12 for sign in (1, -1) for level in (0, 0.0625, 8, 12, 4, 6, 2, 3))
BLOCK_SIZE, NESTED_BLOCK_SIZE = 64, 256  # weights that share an absmax; absmaxes that share a scale
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # that bitsandbytes has
SMALLEST = 1e-38  # what is divided by at least: an absmax of 0 has only zeros to divide
CELLS = 64  # of [-1, 1]; midpoints are at least 0.08 apart, cells 0.03 wide
Rounding = Literal["cpu", "cuda"]
QuantType = Literal["nf4", "fp4"]


class Packed(NamedTuple):
    """A weight in four bits: two of them a byte, and with each block's absmax.

    With double quantization `absmax` holds codes, and `scales` and `offset` are theirs; without, it is float32.

    Shapes: packed (⌈n/2⌉), absmax (b), scales (⌈b/256⌉), offset ()
    """

    packed: Tensor
    absmax: Tensor
    scales: Tensor | None
    offset: Tensor | None


@dataclass(frozen=True)
class Layout:
    """What the numbers do not tell of a packed weight; `dtype` is the one that it had."""

    shape: tuple[int, int]
    dtype: torch.dtype
    block_size: int = BLOCK_SIZE
    quant_type: QuantType = "nf4"


def pack(weight: Tensor, double_quant: bool = True, block_size: int = BLOCK_SIZE) -> Packed:
    """A weight (N, K) in 4.127 bits a number, or without double quantization in 4.5.

    Raises:
        TrainingError: a weight is not finite.
    """
    packed, absmax = quantize(weight, block_size)
    return Packed(packed, *(quantize_absmax(absmax) if double_quant else (absmax, None, None)))


def unpack(parts: Packed, layout: Layout, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The weight (N, K) that is meant, in `dtype`; in the memory of `out` (n), if that is given."""
    packed, absmax, scales, offset = parts
    absmax = absmax.reshape(-1)
    if scales is not None and offset is not None:
        absmax = dequantize_absmax(absmax, scales, offset)
    return dequantize(packed, absmax, layout.shape, dtype, layout.block_size, layout.quant_type, out)


def quantize(weight: Tensor, block_size: int = BLOCK_SIZE) -> tuple[Tensor, Tensor]:
    """absmax_b = max over block b of |w|;  code = how many midpoints of neighbouring levels are below w · (1/absmax_b).

    The last block may be a part of one; there bitsandbytes divides on the CPU instead of multiplying. Where the last
    weight has none to share its byte with, that half says 0.

    Shapes: weight (N, K) -> packed (⌈n/2⌉) uint8, absmax (b) float32
    Raises:
        ConfigError: the block size is not a power of two from 32 to 4096.
        TrainingError: a weight is not finite.
    """
    if block_size not in BLOCK_SIZES:
        raise ConfigError(f"block_size is {block_size}, need a power of two from 32 to 4096")
    flat = weight.detach().reshape(-1)
    n = flat.numel()
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=flat.device)
    tables, tile = _cell_tables(flat.device), _tile(flat, block_size)
    for begin in range(0, 0 if flat.is_meta else n, tile):
        x = flat[begin : begin + tile].to(torch.float32, copy=True)
        whole = x.numel() // block_size * block_size
        blocks, rest = x[:whole].view(-1, block_size), x[whole:]
        largest = absmax[begin // block_size :][: -(-x.numel() // block_size)]
        torch.amax(blocks.abs(), dim=1, out=largest[: len(blocks)])
        blocks *= largest[: len(blocks)].clamp(min=SMALLEST).reciprocal_().unsqueeze(1)
        if rest.numel():
            largest[-1] = rest.abs().amax().clamp(min=SMALLEST)
            rest /= largest[-1].clone()
        if not largest.isfinite().all():  # before what is not finite is taken for an index
            raise TrainingError("a weight that is not finite cannot be quantized")
        codes = _codes(x.clamp_(-1, 1), *tables)
        if codes.numel() % 2:
            codes = torch.cat([codes, codes.new_full((1,), LEVELS.index(0.0))])
        torch.bitwise_or(codes[0::2] << 4, codes[1::2], out=packed[begin // 2 :][: codes.numel() // 2])
    return packed, absmax


def _codes(x: Tensor, below: Tensor, own: Tensor) -> Tensor:
    """How many of the 15 midpoints lie below each x in [-1, 1], as uint8.

    [-1, 1] is cut into cells so narrow that none holds two midpoints. Cells follow each other as their numbers do, so
    all midpoints of earlier cells are below x, all of later ones above: only that of x's own cell is to be compared.

    Shapes: x (n), below (CELLS + 1), own (CELLS + 1) -> (n)
    """
    cell = _cell(x)
    return below.index_select(0, cell) + (x > own.index_select(0, cell))


def _cell_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each cell, how many midpoints lie in earlier ones, and its own midpoint, or 2, which no x is above."""
    levels = CODEBOOKS["nf4"].to(device, non_blocking=True)
    midpoints = (levels[1:] + levels[:-1]) / 2
    cells = _cell(midpoints)
    below = torch.bucketize(torch.arange(CELLS + 1, device=device), cells).to(torch.uint8)
    return below, torch.full_like(below, 2, dtype=torch.float32).index_put((cells,), midpoints)


def _cell(x: Tensor) -> Tensor:
    return ((x + 1) * (CELLS / 2)).to(torch.int32)


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    block_size: int = BLOCK_SIZE,
    quant_type: QuantType = "nf4",
    out: Tensor | None = None,
) -> Tensor:
    """w = level[code] · absmax_b: one product in float32, rounded once to `dtype`; written into `out` (n), if given.

    A table gives both levels of a byte at a time. Nothing but w itself is larger than a tile.

    Shapes: packed (⌈n/2⌉), absmax (b) -> shape
    Dtype: dtype
    """
    n = math.prod(shape)
    weight = torch.empty(n, dtype=dtype, device=packed.device) if out is None else out
    tile = _tile(weight, block_size)
    table = PAIRS[quant_type].to(packed.device, non_blocking=True)
    half = (min(tile, n) + 1) // 2
    byte, pair = (torch.empty(half, dtype=kind, device=packed.device) for kind in (torch.int32, torch.int64))
    packed = packed.reshape(-1)
    for begin in range(0, n, tile):
        part, place = packed[begin // 2 : (begin + tile) // 2], weight[begin : begin + tile]
        largest = absmax[begin // block_size : (begin + tile) // block_size]
        if len(part) < len(byte):  # the last
            byte, pair = byte[: len(part)], pair[: len(part)]
        torch.index_select(table, 0, byte.copy_(part), out=pair)
        w = pair.view(torch.float32)[: len(place)]
        if len(w) % block_size:  # the last block is a part of one
            w *= largest.repeat_interleave(block_size)[: len(w)]
        else:
            w.view(-1, block_size).mul_(largest.unsqueeze(1))
        place.copy_(w)
        if type(weight) is not Tensor:  # a stand-in without numbers: one tile shows what all of them take
            break
    return weight.view(*shape)


def _pairs(levels: Tensor) -> Tensor:
    """For each byte the levels of its two halves, float32, as one int64."""
    byte = torch.arange(256)
    return torch.stack((levels[byte >> 4], levels[byte & 15]), dim=1).view(torch.int64).squeeze(1)


def _tile(flat: Tensor, block_size: int) -> int:
    """How many weights to work on at a time: whole blocks."""
    return -(-tile_rows(flat) // block_size) * block_size


def _dynamic_map() -> Tensor:
    """The 256 levels of the second quantization, rising: 0, 1, and ±10^(i-6)·m for i = 0 … 6  [8-bit].

    m are the midpoints of 2^i equal parts of [0.1, 1].

    Shapes: -> (256)
    """
    levels = [torch.tensor([0, 1], dtype=torch.float32)]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        levels += [means, -means]
    return torch.cat(levels).sort().values


def quantize_absmax(absmax: Tensor, rounding: Rounding = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """offset = mean of absmax; then scale_c = max over 256 of |absmax - offset|, and a code for each quotient.

    bitsandbytes rounds quotients in two ways, and so do we: on CUDA to the nearest level, on the CPU by a table of
    65,536 places, which differs by one level for about two in a thousand. The last bit of a mean depends on the device
    and on the number of threads, there as here; it is stored, so that it matters to nobody who reads.

    Shapes: absmax (b) -> codes (b) uint8, scales (⌈b/256⌉) float32, offset () float32
    Raises:
        ConfigError: there is no such rounding.
        TrainingError: the mean of the absmaxes is not finite.
    """
    if rounding not in get_args(Rounding):
        raise ConfigError(f"rounding is {rounding!r}, accepted are {list(get_args(Rounding))}")
    offset = absmax.mean()
    if not (offset.is_meta or offset.isfinite()):
        raise TrainingError(
            "the mean of a weight's absmaxes overflows; without double quantization it can be quantized"
        )
    rest = absmax - offset
    blocks = F.pad(rest, (0, -rest.numel() % NESTED_BLOCK_SIZE)).view(-1, NESTED_BLOCK_SIZE)
    scales = blocks.abs().amax(1)
    x = (blocks * scales.reciprocal().unsqueeze(1)).view(-1)[: rest.numel()].clamp(-1, 1)
    levels = DYNAMIC_MAP.to(absmax.device, non_blocking=True)
    midpoints = (levels[1:] + levels[:-1]) / 2
    if rounding == "cpu":  # the place of x among 65,536; its value stands for x. A block of zeros has place 0
        place = ((x.nan_to_num(-1) + 1) * 0.5 * 65535 + 0.5).to(torch.int32)
        x = place.float() * (2 / 65535) - 1
    return torch.bucketize(x.nan_to_num(0), midpoints).to(torch.uint8), scales, offset


def dequantize_absmax(codes: Tensor, scales: Tensor, offset: Tensor) -> Tensor:
    """absmax = level[code] · scale + offset, a product and a sum, each rounded.

    Shapes: codes (b), scales (⌈b/256⌉), offset () -> (b)
    """
    levels = DYNAMIC_MAP.to(codes.device, non_blocking=True).index_select(0, codes.int())
    return levels * scales.repeat_interleave(NESTED_BLOCK_SIZE)[: len(codes)] + offset


# Made on the CPU whatever the default device is, and copied to a weight's where they are used.
with torch.device("cpu"):
    CODEBOOKS = {
        "nf4": torch.tensor(LEVELS, dtype=torch.float32),
        "fp4": torch.tensor(FP4_LEVELS, dtype=torch.float32),
    }
    PAIRS = {name: _pairs(levels) for name, levels in CODEBOOKS.items()}
    DYNAMIC_MAP = _dynamic_map()
