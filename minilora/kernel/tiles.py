"""Some rows of a tensor at a time, so that what is made of them on the way stays small."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TILE = 2**17  # numbers that a thread of the CPU works on at a time: half a MB in float32


def tile_rows(x: Tensor) -> int:
    """How many rows to work on at a time.

    On the CPU so many as stay in its cache. Elsewhere few launches count more, and what is compiled is one expression.
    """
    if torch.compiler.is_compiling():
        return max(1, x.size(0))
    return max(1, tile_size(x.device) // max(1, math.prod(x.shape[1:])))


def tile_size(device: torch.device) -> int:
    """How many numbers to work on at a time."""
    return TILE * (torch.get_num_threads() if device.type == "cpu" else 128)
