"""The peers' 4-bit weights, as the callables that `minilora.testing` checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.peer_callables import filled

# --- bitsandbytes ---


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


def bitsandbytes_double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a weight that has these largest values, one for each block of 64."""
    from bitsandbytes.functional import quantize_4bit

    weight = absmax.float().reshape(-1, 1).expand(-1, 64).contiguous()
    state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)[1]
    return state.absmax, state.state2.absmax, state.offset


def bitsandbytes_double_dequantize(codes: Tensor, scales: Tensor, offset: Any) -> Tensor:
    """Dequantize a weight whose codes are all that of 1."""
    from bitsandbytes.functional import QuantState, create_dynamic_map, dequantize_4bit, get_4bit_type

    nested = QuantState(absmax=scales, code=create_dynamic_map(), blocksize=256, dtype=torch.float32)
    shape, code = torch.Size((len(codes), 64)), get_4bit_type("nf4", device=codes.device)
    state = QuantState(codes, shape, code, 64, "nf4", torch.float32, torch.as_tensor(offset), nested)
    return dequantize_4bit(codes.new_full((len(codes) * 32, 1), 0xFF), state)[:, 0]


def bitsandbytes_linear(W: Tensor, b: Tensor | None, *, double_quant: bool = False) -> Any:
    from bitsandbytes.nn import Linear4bit

    options = {"compute_dtype": W.dtype, "compress_statistics": double_quant, "quant_type": "nf4"}
    layer = Linear4bit(W.shape[1], W.shape[0], bias=b is not None, **options).to(W.dtype)
    return filled(layer, weight=W, bias=b).to("cpu")  # quantizes


# --- torchao ---


def torchao_linear(W: Tensor, b: Tensor | None) -> Any:
    nf4_tensor = _torchao()
    weight = nf4_tensor.NF4Tensor.from_tensor(W, 64, math.gcd(W.numel() // 64, 256))
    return lambda x: nf4_tensor.linear_nf4(x, weight) + (0 if b is None else b)


def torchao_quantize(W: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return the codes, and absmax as torchao has it: always double-quantized, to int8."""
    weight = _torchao().NF4Tensor.from_tensor(W, block_size, math.gcd(W.numel() // block_size, 256))
    scales = weight.quantized_scalers, weight.quantization_factor, weight.scaler_block_size
    return weight.quantized_data, weight.dequantize_scalers(*scales)


def torchao_dequantize(packed: Tensor, absmax: Tensor, shape: Sequence[int], block_size: int) -> Tensor:
    """Dequantize a tensor of torchao's with these largest values: as the mean of what is quantized further, 0."""
    nf4_tensor = _torchao()
    like = torch.empty(tuple(shape))
    meta = nf4_tensor.SubclassTensorArgs(like.shape, like.stride(), 0, like.dtype, like.device, False)
    table = nf4_tensor.NF4Tensor.from_tensor(torch.ones(64), 64, 1).nf4
    zeros, n = torch.zeros_like(absmax, dtype=torch.int8), len(absmax)
    weight = nf4_tensor.NF4Tensor(meta, block_size, n, n, zeros, torch.ones(1), absmax, packed, table)
    return weight.get_original_weight()


def _torchao() -> Any:
    from torchao.quantization.quantize_.workflows.nf4 import nf4_tensor

    return nf4_tensor
