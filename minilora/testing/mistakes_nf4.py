"""Mistakes in NF4, in double quantization and in the 4-bit linear: see `catalogue`.

Those of NF4 and of double quantization are pairs (quantize, dequantize). The threads and libraries in comments are
those where a mistake was seen.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.testing.implementations import (
    Linear4bit,
    double_dequantize,
    double_quantize,
    nf4_dequantize,
    nf4_quantize,
    unpack,
)
from minilora.testing.mistakes_layers import with_formula, with_trained_weight

Pair = tuple[Callable[..., Any], Callable[..., Any]]

# --- NF4 ---

FP4_LEVELS = torch.tensor([s * level / 12 for s in (1, -1) for level in (0, 0.0625, 8, 12, 4, 6, 2, 3)])


def exchanged(packed: Tensor) -> Tensor:
    return packed << 4 | packed >> 4


def quantize_low_half_first(W: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    packed, absmax = nf4_quantize(W, block_size)
    return exchanged(packed), absmax


def dequantize_low_half_first(packed: Tensor, *rest: Any) -> Tensor:
    return nf4_dequantize(exchanged(packed), *rest)


def dequantize_fp4(packed: Tensor, absmax: Tensor, shape: Sequence[int], block_size: int) -> Tensor:
    scale = nf4_dequantize(torch.full_like(packed, 255), absmax, shape, block_size)
    return FP4_LEVELS[unpack(packed)[: scale.numel()]].view(*shape) * scale


def dequantize_whole_blocks(packed: Tensor, absmax: Tensor, shape: Sequence[int], block_size: int) -> Tensor:
    levels = nf4_dequantize(packed, torch.ones(1), shape, 2 * len(packed))
    row, column = torch.arange(shape[0])[:, None], torch.arange(shape[1])
    block = row * (shape[1] // block_size) + column // block_size
    return levels * absmax[block.clamp(max=len(absmax) - 1)]


def in_place(quantize: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that changes the numbers that it quantizes."""

    def wrong(numbers: Tensor, *rest: Any) -> Any:
        result = quantize(numbers, *rest)
        numbers.detach().sub_(numbers.mean())
        return result

    return wrong


def pair(
    quantize: Callable[..., Any] = nf4_quantize, dequantize: Callable[..., Any] = nf4_dequantize, **changes: Any
) -> Pair:
    """Return a pair of which one function is another, or which has another `scale` of a block or `code` of a number."""
    return partial(quantize, **changes), dequantize


NF4: Mapping[str, Pair] = {
    "the two codes of a byte are exchanged": pair(quantize_low_half_first, dequantize_low_half_first),
    "dequantize takes the low half of a byte first": pair(dequantize=dequantize_low_half_first),
    "the levels are those of FP4": pair(
        code=lambda scaled, levels: (scaled[..., None] - FP4_LEVELS).abs().argmin(-1), dequantize=dequantize_fp4
    ),
    "codes are rounded down instead of to the nearest level": pair(
        code=lambda scaled, levels: torch.bucketize(scaled, levels, right=True) - 1
    ),
    "a tie gets the upper level": pair(
        code=lambda scaled, levels: torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2, right=True)
    ),
    "the absmax is the largest w instead of the largest |w|": pair(scale=lambda blocks: blocks.amax(1)),
    "the absmaxes are rounded to bfloat16": pair(scale=lambda blocks: blocks.abs().amax(1).bfloat16().float()),
    "each row is taken for ⌊in/block_size⌋ whole blocks": pair(  # bitsandbytes 0.50.2 on AVX512
        dequantize=dequantize_whole_blocks
    ),
    "blocks have 64 weights, whatever block_size is": pair(lambda W, block_size: nf4_quantize(W, 64)),
    "the weight that was given is changed": pair(in_place(nf4_quantize)),
}

# --- double quantization ---


DOUBLE_QUANT: Mapping[str, Pair] = {
    "the offset is 0 instead of the mean": pair(
        double_quantize, double_dequantize, center=lambda absmax: absmax.new_zeros(())
    ),
    "the offset is not added": pair(
        double_quantize, lambda codes, scales, offset: double_dequantize(codes, scales, 0 * offset)
    ),
    "the scale is the largest absmax - offset, without its absolute value": pair(
        double_quantize, double_dequantize, scale=lambda blocks: blocks.amax(1)
    ),
    "one scale is used for all absmaxes": pair(
        double_quantize,
        lambda codes, scales, offset: double_dequantize(codes, scales[:1].expand(-(-len(codes) // 256)), offset),
        scale=lambda blocks: blocks.abs().max()[None],
    ),
    "the absmaxes that were given are changed": pair(  # bitsandbytes-foundation/bitsandbytes#1863
        in_place(double_quantize), double_dequantize
    ),
}

# --- the 4-bit linear ---


def with_whole_blocks(self: Linear4bit, x: Tensor) -> Tensor:
    W = dequantize_whole_blocks(self.packed, self.absmax, self.shape, 64)
    return F.linear(x, W.to(x.dtype), self.b)


def rounded_in_evaluation(self: Linear4bit, x: Tensor) -> Tensor:
    self.absmax = self.absmax if self.training else self.absmax.bfloat16().float()
    return self(x)


LINEAR4BIT: Mapping[str, Callable[..., Any]] = {
    "the bias is missing": lambda W, b, double_quant=False: Linear4bit(W, None, double_quant),
    "the weight is not quantized": lambda W, b: lambda x: F.linear(x, W, b),
    "each row is taken for ⌊in/block_size⌋ whole blocks": with_formula(  # bitsandbytes 0.50.2 on AVX512
        Linear4bit, with_whole_blocks
    ),
    "double quantization is ignored": lambda W, b, double_quant=False: Linear4bit(W, b),
    "the input gets no gradient": with_formula(  # bitsandbytes 0.50.2 on AVX512
        Linear4bit, lambda self, x: self(x.detach())
    ),
    "a dense copy of the weight is trained": with_trained_weight(Linear4bit),
    "an evaluation rounds the absmaxes to bfloat16": with_formula(  # bitsandbytes 0.50.2 on AVX512
        Linear4bit, rounded_in_evaluation
    ),
}
