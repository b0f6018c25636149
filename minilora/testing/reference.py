"""Oracles: LoRA, DoRA, the loss and 4-bit weights once more, slowly, in float64, by loops and brute force.

Nothing here shares code or an algorithm with the rest of minilora, so that both being wrong alike is unlikely. Arrays
may have any float dtype; what is computed and returned is float64. The tests' `reference_model` has the decoder.

    N  rows of a linear's input    in, out  its features    r  rank of an adapter
    B  rows of tokens    T  positions    V  vocabulary    D  width
    n  weights, laid end to end    b  blocks, each with an absmax

    [LoRA]   Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models
    [DoRA]   Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation
    [QLoRA]  Dettmers et al. 2023, QLoRA: Efficient Finetuning of Quantized LLMs
    [8-bit]  Dettmers et al. 2021, 8-bit Optimizers via Block-wise Quantization
"""

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
IGNORED = -100  # the label of what is not learned
NF4_LEVELS = (  # as bitsandbytes has them  [QLoRA app. E]
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


# --- LoRA ---


def lora_merged_weight(weight: Array, lora_A: Array, lora_B: Array, scale: float) -> Array:
    """W' = W + s·Σₖ B[:, k] A[k, :], summed one rank after another  [LoRA eq. 3].

    Shapes: weight (out, in), lora_A (r, in), lora_B (out, r) -> (out, in)
    """
    weight, lora_A, lora_B = _wide(weight, lora_A, lora_B)
    update = np.zeros_like(weight)
    for column, row in zip(lora_B.T, lora_A, strict=True):
        update += np.outer(column, row)
    return weight + scale * update


def lora_forward(x: Array, weight: Array, bias: Array | None, lora_A: Array, lora_B: Array, scale: float) -> Array:
    """y[n, o] = W[o]·x[n] + b[o] + s·Σₖ B[o, k] (A[k]·x[n])  [LoRA eq. 3].

    Shapes: x (N, in), weight (out, in), bias (out), lora_A (r, in), lora_B (out, r) -> (N, out)
    """
    x, weight, lora_A, lora_B = _wide(x, weight, lora_A, lora_B)
    y = np.zeros((len(x), len(weight)))
    for n, row in enumerate(x):
        projected = [np.dot(factor, row) for factor in lora_A]
        for o, weights in enumerate(weight):
            update = sum(lora_B[o, k] * number for k, number in enumerate(projected))
            y[n, o] = np.dot(weights, row) + (0.0 if bias is None else float(bias[o])) + scale * update
    return y


def lora_gradients(x: Array, dy: Array, lora_A: Array, lora_B: Array, scale: float) -> tuple[Array, Array]:
    """dA = s·Bᵀ dW and dB = s·dW Aᵀ, where dW = Σₙ dy[n] x[n]ᵀ: the chain rule on W' = W + s·B A.

    Shapes: x (N, in), dy (N, out), lora_A (r, in), lora_B (out, r) -> (r, in), (out, r)
    """
    x, dy, lora_A, lora_B = _wide(x, dy, lora_A, lora_B)
    dA, dB = np.zeros_like(lora_A), np.zeros_like(lora_B)
    dW = sum((np.outer(dy[n], x[n]) for n in range(len(x))), np.zeros((dy.shape[1], x.shape[1])))
    for k in range(len(lora_A)):
        for o in range(len(lora_B)):
            dA[k] += scale * lora_B[o, k] * dW[o]
            dB[o, k] = scale * np.dot(dW[o], lora_A[k])
    return dA, dB


def dora_gradients(
    x: Array, dy: Array, weight: Array, lora_A: Array, lora_B: Array, scale: float, magnitude: Array
) -> tuple[Array, Array, Array]:
    """dA = s·Bᵀ K dW, dB = s·K dW Aᵀ and dm[o] = dW[o]·V[o]/‖V[o]‖, where V = W + s·B A, K = diag(m/‖V‖) is held
    fixed  [DoRA §4.3] and dW = Σₙ dy[n] x[n]ᵀ.

    Shapes: x (N, in), dy (N, out), weight (out, in), lora_A (r, in), lora_B (out, r), magnitude (out)
    -> (r, in), (out, r), (out)
    """
    x, dy, magnitude = _wide(x, dy, magnitude)
    own = lora_merged_weight(weight, lora_A, lora_B, scale)
    lengths = np.array([math.sqrt(math.fsum(row * row)) for row in own])
    dW = sum((np.outer(dy[n], x[n]) for n in range(len(x))), np.zeros(own.shape))
    dm = np.array([np.dot(dW[o], own[o]) / lengths[o] for o in range(len(own))])
    return *lora_gradients(x, dy * (magnitude / lengths), lora_A, lora_B, scale), dm


# --- the loss ---


def cross_entropy(logits: Array, labels: Array) -> float:
    """Σₙ log Σᵥ exp(logits[n, v]) - logits[n, labels[n]], over the rows whose label is not -100.

    Shapes: logits (N, V), labels (N) -> ()
    """
    losses = []
    for row, label in zip(_wide(logits)[0], labels.tolist(), strict=True):
        if label != IGNORED:
            most = row.max()
            losses.append(most + math.log(math.fsum(np.exp(row - most))) - row[label])
    return math.fsum(losses)


def masked_loss(logits: Array, labels: Array) -> float:
    """L = 1/N Σ -log p(label at t + 1 | logits at t), over the labels that are not -100; nan if there are none.

    Shapes: logits (B, T, V), labels (B, T) -> ()
    """
    labels = np.asarray(labels)
    count = (labels[:, 1:] != IGNORED).sum()
    return math.fsum(map(cross_entropy, logits[:, :-1], labels[:, 1:])) / count if count else math.nan


# --- 4-bit weights ---


def nf4_levels() -> Array:
    """Φ⁻¹(p) / Φ⁻¹(δ) for p in 8 even steps from 1 - δ to 1/2 and 9 from 1/2 to δ = 1 - (1/30 + 1/32)/2  [QLoRA eq. 4].

    Shapes: -> (16)
    """
    delta = 1 - (1 / 30 + 1 / 32) / 2
    below = [1 - delta + (delta - 0.5) * i / 7 for i in range(7)]
    above = [0.5 + (delta - 0.5) * i / 8 for i in range(9)]
    quantile = NormalDist().inv_cdf
    return np.array([quantile(p) / quantile(delta) for p in below + above])


def nf4_quantize(weight: Array, block_size: int) -> tuple[Array, Array]:
    """code = the level nearest to w / absmax of its block, of two as near the lower one; by trying all.

    Shapes: weight (N, K) -> codes (n), absmax (b)
    """
    return _nearest_levels(weight.reshape(-1).astype(np.float64), block_size, NF4_LEVELS)


def nf4_pack(codes: Sequence[int]) -> bytes:
    """Two codes per byte, the first in the high half; the code of 0 follows a last code without a second one.

    Shapes: codes (n) -> ⌈n/2⌉ bytes
    """
    pairs = [*codes, NF4_LEVELS.index(0.0)]
    return bytes(16 * pairs[i] + pairs[i + 1] for i in range(0, len(codes), 2))


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
    return *_nearest_levels([float(a) - offset for a in absmax], 256, absmax_levels().tolist()), offset


def _nearest_levels(numbers: Iterable[float], block_size: int, levels: Sequence[float]) -> tuple[Array, Array]:
    """Return the code of each number, and the scale, the largest |number|, of each block."""
    numbers, codes, scales = list(numbers), [], []
    for begin in range(0, len(numbers), block_size):
        block = numbers[begin : begin + block_size]
        scales.append(max(map(abs, block)))
        for number in block:
            x = number / scales[-1] if scales[-1] else 0.0
            distances = [abs(x - level) for level in levels]
            codes.append(distances.index(min(distances)))
    return np.array(codes), np.array(scales)


def _wide(*arrays: Array) -> list[Array]:
    return [np.asarray(array, dtype=np.float64) for array in arrays]
