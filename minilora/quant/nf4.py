"""NF4: a weight in four bits and a scale for each block of 64; and the scales in eight bits, with one for 256 of them.

A block of weights is divided by its largest absolute value, its *absmax*, and each quotient is replaced by the number
of the nearest of 16 levels. The levels are quantiles of a normal distribution, because weights are distributed nearly
so: then each level is used about equally often, which is the most that four bits can say  [QLoRA §3, eq. 4]:

    level = Φ⁻¹(p) / Φ⁻¹(δ),  p in 8 even steps from 1 - δ to 1/2, and in 9 from 1/2 to δ = 1 - (1/30 + 1/32) / 2

Both halves end in 0, which is one level, and exact; so there are seven below it and eight above.

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
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.errors import ConfigError, TrainingError

# As published. Computed again, the last bits differ from machine to machine.
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
BLOCK_SIZE, NESTED_BLOCK_SIZE = 64, 256  # weights that share an absmax; absmaxes that share a scale
TILE = 2**17  # weights that are worked on at a time, in memory that stays in the processor's cache
SMALLEST = 1e-38  # what is divided by at least: an absmax of 0 has only zeros to divide
CELLS = 64  # of [-1, 1]; midpoints are at least 0.08 apart, cells 0.03 wide
Rounding = Literal["cpu", "cuda"]


def quantize(weight: Tensor, block_size: int = BLOCK_SIZE) -> tuple[Tensor, Tensor]:
    """absmax_b = max over block b of |w|;  code = how many midpoints of neighbouring levels are below w · (1/absmax_b).

    The last block may be a part of one; there bitsandbytes divides on the CPU instead of multiplying. Where the last
    weight has none to share its byte with, that half says 0.

    Shapes: weight (N, K) -> packed (⌈n/2⌉) uint8, absmax (b) float32
    Raises:
        ConfigError: the block size is not a power of two from 32 to 4096.
        TrainingError: a weight is not finite.
    """
    if block_size not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        raise ConfigError(f"block_size is {block_size}, need a power of two from 32 to 4096")
    flat = weight.detach().reshape(-1)
    n = flat.numel()
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-n // block_size), device=flat.device)
    tables = _cell_tables(flat.device)
    for begin in range(0, n, TILE):
        x = flat[begin : begin + TILE].to(torch.float32, copy=True)
        whole = x.numel() // block_size * block_size
        blocks, rest = x[:whole].view(-1, block_size), x[whole:]
        scales = absmax[begin // block_size :][: -(-x.numel() // block_size)]
        torch.amax(blocks.abs(), dim=1, out=scales[: len(blocks)])
        blocks *= scales[: len(blocks)].clamp(min=SMALLEST).reciprocal_().unsqueeze(1)
        if rest.numel():
            scales[-1] = rest.abs().amax().clamp(min=SMALLEST)
            rest /= scales[-1].clone()
        if not scales.isfinite().all():
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
    levels = torch.tensor(LEVELS, device=device)
    midpoints = (levels[1:] + levels[:-1]) / 2
    cells = _cell(midpoints)
    below = torch.bucketize(torch.arange(CELLS + 1, device=device), cells).to(torch.uint8)
    return below, torch.full((CELLS + 1,), 2.0, device=device).index_put((cells,), midpoints)


def _cell(x: Tensor) -> Tensor:
    return ((x + 1) * (CELLS / 2)).to(torch.int32)


def dequantize(
    packed: Tensor, absmax: Tensor, shape: Sequence[int], dtype: torch.dtype, block_size: int = BLOCK_SIZE
) -> Tensor:
    """w = level[code] · absmax_b: one product in float32, rounded once to `dtype`.

    A table gives both levels of a byte at a time.

    Shapes: packed (⌈n/2⌉), absmax (b) -> shape
    Dtype: dtype
    """
    n = math.prod(shape)
    weight = torch.empty(n, dtype=dtype, device=packed.device)
    table = _pairs(packed.device)
    packed = packed.reshape(-1)
    for begin in range(0, n, TILE):
        w = table.index_select(0, packed[begin // 2 : (begin + TILE) // 2].int()).view(torch.float32)[: n - begin]
        whole = w.numel() // block_size * block_size
        scales = absmax[begin // block_size :]
        w[:whole].view(-1, block_size).mul_(scales[: whole // block_size].unsqueeze(1))
        if whole < w.numel():
            w[whole:] *= scales[whole // block_size]
        weight[begin : begin + w.numel()] = w
    return weight.view(*shape)


def _pairs(device: torch.device) -> Tensor:
    """For each byte the two levels of its halves, float32, as one int64."""
    byte = torch.arange(256, device=device)
    levels = torch.tensor(LEVELS, device=device)
    return torch.stack((levels[byte >> 4], levels[byte & 15]), dim=1).view(torch.int64).squeeze(1)


def dynamic_map(device: torch.device | None = None) -> Tensor:
    """The 256 levels of the second quantization, rising: 0, 1, and ±10^(i-6)·m for i = 0 … 6  [8-bit].

    m are the midpoints of 2^i equal parts of [0.1, 1].

    Shapes: -> (256)
    """
    levels = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        levels += [means, -means]
    return torch.cat(levels).sort().values.to(device)


def quantize_absmax(absmax: Tensor, rounding: Rounding = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """offset = mean of absmax; then scale_c = max over 256 of |absmax - offset|, and a code for each quotient.

    bitsandbytes rounds quotients in two ways, and so do we: on CUDA to the nearest level, on the CPU by a table of
    65,536 places, which differs by one level for about two in a thousand.

    Shapes: absmax (b) -> codes (b) uint8, scales (⌈b/256⌉) float32, offset () float32
    """
    offset = absmax.mean()
    rest = absmax - offset
    blocks = F.pad(rest, (0, -rest.numel() % NESTED_BLOCK_SIZE)).view(-1, NESTED_BLOCK_SIZE)
    scales = blocks.abs().amax(1)
    x = (blocks * scales.reciprocal().unsqueeze(1)).view(-1)[: rest.numel()].clamp(-1, 1)
    levels = dynamic_map(absmax.device)
    midpoints = (levels[1:] + levels[:-1]) / 2
    if rounding == "cpu":  # the place of x among 65,536; its value stands for x. A block of zeros has place 0
        place = ((x.nan_to_num(-1) + 1) * 0.5 * 65535 + 0.5).to(torch.int32)
        x = place.float() * (2 / 65535) - 1
    return torch.bucketize(x.nan_to_num(0), midpoints).to(torch.uint8), scales, offset


def dequantize_absmax(codes: Tensor, scales: Tensor, offset: Tensor) -> Tensor:
    """absmax = level[code] · scale + offset, a product and a sum, each rounded.

    Shapes: codes (b), scales (⌈b/256⌉), offset () -> (b)
    """
    levels = dynamic_map(codes.device).index_select(0, codes.int())
    return levels * scales.repeat_interleave(NESTED_BLOCK_SIZE)[: len(codes)] + offset
