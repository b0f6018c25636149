"""Oracles of 4-bit weights: by brute force in float64, with numpy alone. See `reference.py`.

n  weights, laid end to end    b  blocks, each with an absmax

[QLoRA]  Dettmers et al. 2023, QLoRA: Efficient Finetuning of Quantized LLMs
[8-bit]  Dettmers et al. 2021, 8-bit Optimizers via Block-wise Quantization
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
NF4_LEVELS = (  # as bitsandbytes has them  [QLoRA app. E]
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def nf4_levels() -> Array:
    """Φ⁻¹(p) / Φ⁻¹(δ) for p in 8 even steps from 1 - δ to 1/2 and 9 from 1/2 to δ = 1 - (1/30 + 1/32)/2  [QLoRA eq. 4].

    Shapes: -> (16)
    """
    delta = 1 - (1 / 30 + 1 / 32) / 2
    below = [1 - delta + (delta - 0.5) * i / 7 for i in range(7)]
    above = [0.5 + (delta - 0.5) * i / 8 for i in range(9)]
    return np.array([_quantile(p) / _quantile(delta) for p in below + above])


def _quantile(p: float) -> float:
    """Φ⁻¹(p) of the normal distribution, by halving an interval."""
    low, high = -10.0, 10.0
    for _ in range(100):
        middle = (low + high) / 2
        if (1 + math.erf(middle / math.sqrt(2))) / 2 < p:
            low = middle
        else:
            high = middle
    return low


def nf4_quantize(weight: Array, block_size: int) -> tuple[Array, Array]:
    """code = the level nearest to w / absmax of its block, of two as near the lower one; by trying all.

    Shapes: weight (N, K) -> codes (n), absmax (b)
    """
    flat = weight.reshape(-1).astype(np.float64)
    codes, scales = [], []
    for begin in range(0, len(flat), block_size):
        block = flat[begin : begin + block_size]
        scale = max(abs(w) for w in block)
        scales.append(scale)
        codes += [_nearest(w / scale if scale else 0.0, NF4_LEVELS) for w in block]
    return np.array(codes), np.array(scales)


def nf4_pack(codes: Sequence[int]) -> bytes:
    """Two codes a byte, the first in the high half; beside a last one alone stands the code of 0.

    Shapes: codes (n) -> ⌈n/2⌉ bytes
    """
    pairs = [*codes, NF4_LEVELS.index(0.0)]
    return bytes(16 * pairs[i] + pairs[i + 1] for i in range(0, len(codes), 2))


def nf4_dequantize(packed: bytes, absmax: Array, count: int, block_size: int) -> Array:
    """w = level · absmax, one by one.

    Shapes: packed ⌈n/2⌉ bytes, absmax (b) -> (n)
    """
    weights = []
    for i in range(count):
        byte = packed[i // 2]
        code = byte % 16 if i % 2 else byte // 16
        weights.append(NF4_LEVELS[code] * float(absmax[i // block_size]))
    return np.array(weights)


def absmax_levels() -> Array:
    """0, 1, and ±10^(i-6) times the midpoints of 2^i equal parts of [0.1, 1], i = 0 … 6; rising  [8-bit].

    Shapes: -> (256)
    """
    levels = [0.0, 1.0]
    for i in range(7):
        for part in range(2**i):
            middle = 0.1 + 0.9 * (part + 0.5) / 2**i
            levels += [middle * 10.0 ** (i - 6), -middle * 10.0 ** (i - 6)]
    return np.array(sorted(levels))


def absmax_quantize(absmax: Array, offset: float | None = None) -> tuple[Array, Array, float]:
    """offset = mean if not given;  code = the level nearest to (absmax - offset) / scale;  scale: the largest of 256.

    Shapes: absmax (b) -> codes (b), scales (⌈b/256⌉), offset
    """
    offset = sum(float(a) for a in absmax) / len(absmax) if offset is None else offset
    rest = [float(a) - offset for a in absmax]
    levels = absmax_levels().tolist()
    codes, scales = [], []
    for begin in range(0, len(rest), 256):
        block = rest[begin : begin + 256]
        scale = max(abs(a) for a in block)
        scales.append(scale)
        codes += [_nearest(a / scale if scale else 0.0, levels) for a in block]
    return np.array(codes), np.array(scales), offset


def absmax_dequantize(codes: Sequence[int], scales: Array, offset: float) -> Array:
    """absmax = level · scale + offset, one by one.

    Shapes: codes (b), scales (⌈b/256⌉), offset -> (b)
    """
    levels = absmax_levels()
    return np.array([levels[code] * float(scales[i // 256]) + offset for i, code in enumerate(codes)])


def _nearest(x: float, levels: Sequence[float]) -> int:
    distances = [abs(x - level) for level in levels]
    return distances.index(min(distances))
