"""The bytes of bitsandbytes, on the CPU."""

import pytest
import torch

from minilora.nf4 import DYNAMIC_MAP, dequantize, dequantize_absmax, quantize, quantize_absmax

pytestmark = pytest.mark.parity
functional = pytest.importorskip("bitsandbytes.functional")

SIZES = [(64, 64), (8, 96), (5, 7), (1, 1), (129, 65), (300, 576)]  # rows that end within a block, odd ends


def weights(size, kind, dtype):
    weight = 0.02 * torch.randn(size, generator=torch.Generator().manual_seed(0))
    flat = weight.view(-1)
    if kind == "zero block":
        flat[:128] = 0
    elif kind == "outliers":
        flat[::100] *= 1000
    return weight.to(dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["normal", "zero block", "outliers"])
def test_packed_weights_and_absmaxes_are_theirs(size, dtype, kind):
    weight = weights(size, kind, dtype)
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    packed, absmax = quantize(weight)
    assert torch.equal(packed, theirs.view(-1))
    assert torch.equal(absmax, state.absmax)
    if size[1] % 64 == 0:  # their kernel takes the wrong absmax for rows that end within a block
        assert torch.equal(dequantize(packed, absmax, size, dtype), functional.dequantize_4bit(theirs, state))


@pytest.mark.parametrize("kind", ["normal", "outliers"])
def test_absmaxes_that_are_quantized_too_are_theirs(kind):
    weight = weights((300, 576), kind, torch.bfloat16)
    _, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    codes, scales, offset = quantize_absmax(quantize(weight)[1])
    assert torch.equal(codes, state.absmax)
    assert torch.equal(scales, state.state2.absmax)
    assert torch.equal(offset, state.offset.view(1))
    assert torch.equal(DYNAMIC_MAP, state.state2.code)
    theirs = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(dequantize_absmax(codes, scales, offset), theirs)
