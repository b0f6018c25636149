"""Planted mistakes in NF4, in double quantization and in the 4-bit linear."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.testing.implementations import DYNAMIC_MAP, LEVELS, SMALLEST, Linear4bit, pack, unpack
from minilora.testing.mutants_lora import Around, Plant, Table, around, wrapped


def pair(quantize: Callable[..., Any] | None = None, dequantize: Callable[..., Any] | None = None) -> Plant:
    """Plant a change of a pair's first callable, of its second, or of both."""

    def plant(correct: tuple[Any, Any]) -> tuple[Any, Any]:
        changes = zip((quantize, dequantize), correct, strict=True)
        first, second = (function if change is None else wrapped(change)(function) for change, function in changes)
        return first, second

    return plant


# --- NF4 ---

BOUNDS = (LEVELS[1:] + LEVELS[:-1]) / 2


def nf4(
    absmax: Callable[[Tensor], Tensor] = lambda blocks: blocks.abs().amax(1),
    code: Callable[[Tensor], Tensor] = lambda scaled: torch.bucketize(scaled, BOUNDS),
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return a whole `quantize` with another absmax or another choice of codes."""

    def quantize(_: Any, W: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        flat = W.detach().float().flatten()
        blocks = F.pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)
        scales = absmax(blocks)
        codes = code(blocks / scales.clamp(min=SMALLEST)[:, None])
        return pack(codes.flatten()[: len(flat)].clamp(0, 15)), scales

    return quantize


def even_levels(_: Any, packed: Tensor, absmax: Tensor, shape: Sequence[int], block_size: int) -> Tensor:
    levels = unpack(packed)[: math.prod(shape)] / 7.5 - 1
    return (levels * absmax.repeat_interleave(block_size)[: len(levels)]).view(*shape)


def with_absmax(quantize: Any, W: Tensor, block_size: int, change: Callable[[Tensor], Tensor]) -> Any:
    packed, absmax = quantize(W, block_size)
    return packed, change(absmax)


def halves_exchanged(packed: Tensor) -> Tensor:
    return packed << 4 | packed >> 4


def quantize_low_half_first(quantize: Any, W: Tensor, block_size: int) -> Any:
    packed, absmax = quantize(W, block_size)
    return halves_exchanged(packed), absmax


def dequantize_low_half_first(dequantize: Any, packed: Tensor, *args: Any) -> Tensor:
    return dequantize(halves_exchanged(packed), *args)


def quantize_in_two_halves(quantize: Any, W: Tensor, block_size: int) -> Any:
    packed, absmax = quantize(W, block_size)
    codes = unpack(packed)
    return (codes[: len(packed)] << 4 | codes[len(packed) :]).to(torch.uint8), absmax


def dequantize_in_two_halves(dequantize: Any, packed: Tensor, *args: Any) -> Tensor:
    return dequantize(pack(torch.cat([packed >> 4, packed & 15])), *args)


def last_odd_code_in_the_low_half(quantize: Any, W: Tensor, block_size: int) -> Any:
    packed, absmax = quantize(W, block_size)
    if W.numel() % 2:
        packed[-1] = halves_exchanged(packed[-1])
    return packed, absmax


def partial_block_has_the_scale_before(quantize: Any, W: Tensor, block_size: int) -> Any:
    packed, absmax = quantize(W, block_size)
    if W.numel() % block_size and len(absmax) > 1:
        absmax[-1] = absmax[-2]
    return packed, absmax


def large_blocks_mix_bytes(quantize: Any, W: Tensor, block_size: int) -> Any:
    packed, absmax = quantize(W, block_size)
    if block_size > 512:
        packed[1:] |= packed[:-1].clone()
    return packed, absmax


def rows_one_by_one(quantize: Any, W: Tensor, block_size: int) -> Any:
    parts = [quantize(row, block_size) for row in W]
    return torch.cat([packed for packed, _ in parts]), torch.cat([absmax for _, absmax in parts])


def rows_put_together(dequantize: Any, packed: Tensor, absmax: Tensor, shape: Sequence[int], block_size: int) -> Tensor:
    parts = zip(packed.view(shape[0], -1), absmax.view(shape[0], -1), strict=True)
    return torch.stack([dequantize(*part, shape[1:], block_size) for part in parts])


def absmax_by_row_and_column(
    dequantize: Any, packed: Tensor, absmax: Tensor, shape: Sequence[int], block_size: int
) -> Tensor:
    row, column = torch.arange(shape[0])[:, None], torch.arange(shape[1])
    block = (row * (shape[1] // block_size) + column // block_size).clamp(max=len(absmax) - 1)
    return dequantize(packed, torch.ones_like(absmax), shape, block_size) * absmax[block]


def bfloat16_levels(dequantize: Any, packed: Tensor, absmax: Tensor, shape: Sequence[int], block_size: int) -> Tensor:
    levels = dequantize(packed, torch.ones_like(absmax), shape, block_size).bfloat16().float()
    return levels * absmax.repeat_interleave(block_size)[: levels.numel()].view(*shape)


def down_the_columns(dequantize: Any, packed: Tensor, absmax: Tensor, shape: Sequence[int], block_size: int) -> Tensor:
    return dequantize(packed, absmax, tuple(reversed(shape)), block_size).T


def normalized_in_place(quantize: Any, W: Tensor, block_size: int) -> Any:
    result = quantize(W, block_size)
    W.detach().div_(W.abs().max())
    return result


def in_order_of_memory(quantize: Any, W: Tensor, block_size: int) -> Any:
    return quantize(W if W.is_contiguous() else W.T.reshape(W.shape), block_size)


NF4: Table = [
    # the layout
    ("low half first", "", pair(quantize_low_half_first, dequantize_low_half_first)),
    ("dequantize reads the low half first", "", pair(dequantize=dequantize_low_half_first)),
    (
        "first half of the codes in the high halves",
        "kekzl/imp#567",
        pair(quantize_in_two_halves, dequantize_in_two_halves),
    ),
    ("blocks begin anew in each row", "", pair(rows_one_by_one, rows_put_together)),
    (
        "blocks run down the columns",
        "",
        pair(lambda quantize, W, block_size: quantize(W.T, block_size), down_the_columns),
    ),
    ("a transposed weight is read in the order of memory", "", pair(in_order_of_memory)),
    (
        "blocks have always 64 weights",
        "",
        pair(lambda quantize, W, _: quantize(W, 64), lambda dequantize, *args: dequantize(*args[:3], 64)),
    ),
    # the levels
    ("a tie gets the upper level", "", pair(nf4(code=lambda scaled: torch.bucketize(scaled, BOUNDS, right=True)))),
    (
        "rounded down to the level below",
        "",
        pair(nf4(code=lambda scaled: torch.bucketize(scaled, LEVELS, right=True) - 1)),
    ),
    ("16 even levels", "", pair(nf4(code=lambda scaled: ((scaled + 1) * 7.5).round().int()), even_levels)),
    ("the levels are rounded to bfloat16", "", pair(dequantize=bfloat16_levels)),
    # absmax
    ("the largest weight instead of the largest |weight|", "", pair(nf4(absmax=lambda blocks: blocks.amax(1)))),
    ("absmax is at least 1e-4", "", pair(nf4(absmax=lambda blocks: blocks.abs().amax(1).clamp(min=1e-4)))),
    (
        "absmax is stored in float16",
        "",
        pair(lambda q, W, n: with_absmax(q, W, n, lambda absmax: absmax.half().float())),
    ),
    (
        "absmax of a block of zeros is 1",
        "",
        pair(lambda q, W, n: with_absmax(q, W, n, lambda absmax: absmax + (absmax == 0))),
    ),
    # only some sizes
    (
        "absmax is looked up by row and column",
        "bitsandbytes 0.50.2 on AVX512",
        pair(dequantize=absmax_by_row_and_column),
    ),
    ("an incomplete block gets the absmax before it", "", pair(partial_block_has_the_scale_before)),
    ("the last of an odd number of codes is in the low half", "", pair(last_odd_code_in_the_low_half)),
    (
        "blocks above 512 mix neighbouring bytes",
        "bitsandbytes-foundation/bitsandbytes#1721",
        pair(large_blocks_mix_bytes),
    ),
    ("the caller's weight is normalized in place", "", pair(normalized_in_place)),
]


# --- double quantization ---

MAP_BOUNDS = (DYNAMIC_MAP[1:] + DYNAMIC_MAP[:-1]) / 2


def double_quant(
    offset: Callable[[Tensor], Tensor] = torch.mean,
    scale: Callable[[Tensor], Tensor] = lambda blocks: blocks.abs().amax(1),
    code: Callable[[Tensor], Tensor] = lambda scaled: torch.bucketize(scaled, MAP_BOUNDS),
    block_size: int = 256,
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Return a whole `quantize` with another offset, scale or choice of codes."""

    def quantize(_: Any, absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        middle = offset(absmax)
        blocks = F.pad(absmax - middle, (0, -len(absmax) % block_size)).view(-1, block_size)
        scales = scale(blocks)
        codes = code(blocks / scales.clamp(min=SMALLEST)[:, None])
        return codes.flatten()[: len(absmax)].clamp(0, 255).to(torch.uint8), scales, middle

    return quantize


def offset_taken_off_in_place(quantize: Any, absmax: Tensor) -> Any:
    result = quantize(absmax)
    absmax.sub_(absmax.mean())
    return result


def float16_scales(quantize: Any, absmax: Tensor) -> Any:
    codes, scales, offset = quantize(absmax)
    return codes, scales.half().float(), offset


def one_scale(dequantize: Any, codes: Tensor, scales: Tensor, offset: Tensor) -> Tensor:
    return dequantize(codes, scales.expand(-(-len(codes) // 256)), offset)


def even_map(_: Any, codes: Tensor, scales: Tensor, offset: Tensor) -> Tensor:
    return (codes.float() / 127.5 - 1) * scales.repeat_interleave(256)[: len(codes)] + offset


DOUBLE_QUANT: Table = [
    (
        "the offset is not added back",
        "",
        pair(dequantize=lambda dequantize, codes, scales, offset: dequantize(codes, scales, 0 * offset)),
    ),
    ("the offset is 0", "", pair(double_quant(offset=lambda absmax: absmax.new_zeros(())))),
    ("the offset is the median", "", pair(double_quant(offset=torch.median))),
    (
        "the offset is a mean over padded blocks",
        "",
        pair(double_quant(offset=lambda absmax: F.pad(absmax, (0, -len(absmax) % 256)).mean())),
    ),
    (
        "the largest difference instead of the largest |difference|",
        "",
        pair(double_quant(scale=lambda blocks: blocks.amax(1))),
    ),
    ("one scale for all blocks", "", pair(double_quant(block_size=2**20), one_scale)),
    ("256 even levels", "", pair(double_quant(code=lambda scaled: ((scaled + 1) * 127.5).round().int()), even_map)),
    (
        "rounded down to the level below, of 8 bits",
        "",
        pair(double_quant(code=lambda scaled: torch.bucketize(scaled, DYNAMIC_MAP, right=True) - 1)),
    ),
    (
        "the level 1 is missing",
        "",
        pair(double_quant(code=lambda scaled: torch.bucketize(scaled, MAP_BOUNDS).clamp(max=254))),
    ),
    (
        "what is below the mean is lost",
        "",
        pair(double_quant(code=lambda scaled: torch.bucketize(scaled.clamp(min=0), MAP_BOUNDS))),
    ),
    ("scales are stored in float16", "", pair(float16_scales)),
    ("the caller's absmax is changed", "bitsandbytes-foundation/bitsandbytes#1863", pair(offset_taken_off_in_place)),
]


# --- the 4-bit linear ---


def gradient_of_the_dense_weight(make: Any, W: Tensor, b: Any) -> Around:
    return Around(make(W, b), lambda self, x: self(x).detach() + F.linear(x, W.detach()) - F.linear(x, W).detach())


def gradient_in_bfloat16(self: Any, x: Tensor) -> Tensor:
    copy = x * 1
    if copy.requires_grad:
        copy.register_hook(lambda gradient: gradient.bfloat16().to(gradient.dtype))
    return self(copy)


def dense_copy_is_trained(make: Any, W: Tensor, b: Any) -> Around:
    weight = nn.Parameter(W.detach().clone())
    layer = Around(make(W, b), lambda self, x: self(x) + F.linear(x, weight - weight.detach()))
    layer.register_parameter("weight", weight)
    return layer


def one_row_loses_the_bias(make: Any, W: Tensor, b: Any) -> Around:
    plain = make(W, None)
    return Around(make(W, b), lambda self, x: plain(x) if x[..., 0].numel() == 1 else self(x))


def bfloat16_scales_after_evaluation(self: Any, x: Tensor) -> Tensor:
    self.absmax = self.absmax if self.training else self.absmax.bfloat16().float()
    return self(x)


LINEAR4BIT: Table = [
    ("the 4-bit layer loses the bias", "", wrapped(lambda make, W, b: make(W, None))),
    ("a single row loses the bias", "", wrapped(one_row_loses_the_bias)),
    ("the 4-bit layer fails without a bias", "", wrapped(lambda make, W, b: make(W, b.clone()))),
    ("the weight is not quantized", "", wrapped(lambda make, W, b: Around(make(W, b), lambda _, x: F.linear(x, W, b)))),
    ("one absmax for the whole weight", "", lambda _: lambda W, b: Linear4bit(W, b, block_size=W.numel())),
    (
        "the weight is rounded to bfloat16 before it is quantized",
        "",
        wrapped(lambda make, W, b: make(W.bfloat16().to(W.dtype), b)),
    ),
    (
        "a square 4-bit weight is transposed",
        "",
        wrapped(lambda make, W, b: make(W.T if W.shape[0] == W.shape[1] else W, b)),
    ),
    ("the input gets no gradient", "bitsandbytes 0.50.2 on AVX512", around(lambda self, x: self(x.detach()))),
    ("the gradient uses the weight before quantization", "", wrapped(gradient_of_the_dense_weight)),
    ("the gradient is rounded to bfloat16", "", around(gradient_in_bfloat16)),
    ("a dense copy of the weight is trained", "", wrapped(dense_copy_is_trained)),
    (
        "absmax is rounded to bfloat16 by an evaluation",
        "bitsandbytes 0.50.2 on AVX512",
        lambda _: around(bfloat16_scales_after_evaluation)(Linear4bit),
    ),
]
