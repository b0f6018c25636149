"""Convolutions in float64 numpy loops, and what groups leave out of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def ungrouped(weight: Array, groups: int) -> Array:
    """The weight of the same convolution without groups: an output sees the channels of its own group, times 0 others.

    Shapes: weight (out, in/G, ...) -> (out, in, ...)
    """
    weight = np.asarray(weight, dtype=np.float64)
    out, inner = weight.shape[:2]
    whole = np.zeros((out, inner * groups, *weight.shape[2:]))
    for o in range(out):
        for i in range(inner):
            whole[o, o * groups // out * inner + i] = weight[o, i]
    return whole


def convolution(
    x: Array,
    weight: Array,
    bias: Array | None,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    padding_mode: str = "zeros",
) -> Array:
    """y[n, o, p] = Σ over c, k of W[o, c, k]·x[n, c, p·stride + k·dilation] + b[o], x with its padding.

    `padding` is how many numbers before and after, for each side, and `padding_mode` PyTorch's word for what they are.

    Shapes: x (N, in, ...), weight (out, in, ...), bias (out) -> (N, out, ...)
    """
    x, weight = (np.asarray(array, dtype=np.float64) for array in (x, weight))
    mode: Any = {"zeros": "constant", "replicate": "edge", "circular": "wrap"}.get(padding_mode, padding_mode)
    x = np.pad(x, [(0, 0), (0, 0), *padding], mode)
    kernel, sides = weight.shape[2:], range(len(weight.shape) - 2)
    size = [(x.shape[2 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in sides]
    y = np.zeros((len(x), len(weight), *size))
    for place in np.ndindex(*size):
        for k in np.ndindex(*kernel):
            seen = x[(..., *(place[i] * stride[i] + k[i] * dilation[i] for i in sides))]
            y[(..., *place)] += np.einsum("nc,oc->no", seen, weight[(..., *k)])
    return y if bias is None else y + np.asarray(bias, dtype=np.float64).reshape(-1, *(1 for _ in sides))
