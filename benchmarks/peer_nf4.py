"""The peers' 4-bit weights, as the callables that `minilora.testing` checks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.peer_callables import filled


def bitsandbytes_quantize(W: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(W, blocksize=block_size, quant_type="nf4", compress_statistics=False)
    return packed.reshape(-1), state.absmax


def bitsandbytes_dequantize(packed: Tensor, absmax: Tensor, shape: Sequence[int], block_size: int) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

    code = get_4bit_type("nf4", device=packed.device)
    state = QuantState(absmax, torch.Size(shape), code, block_size, "nf4", torch.float32)
    return dequantize_4bit(packed.reshape(-1, 1), state)


def bitsandbytes_dequantize_flat(packed: Tensor, absmax: Tensor, shape: Sequence[int], block_size: int) -> Tensor:
    """Dequantize as one row, in which every block but the last is whole."""
    count = torch.Size(shape).numel()
    return bitsandbytes_dequantize(packed, absmax, (1, count), block_size).reshape(tuple(shape))


def bitsandbytes_linear(W: Tensor, b: Tensor | None, *, double_quant: bool = False) -> Any:
    from bitsandbytes.nn import Linear4bit

    options = {"compute_dtype": W.dtype, "compress_statistics": double_quant, "quant_type": "nf4"}
    layer = Linear4bit(W.shape[1], W.shape[0], bias=b is not None, **options).to(W.dtype)
    return filled(layer, weight=W, bias=b).to("cpu")  # quantizes
