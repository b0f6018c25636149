"""The laws of 4-bit weights, kept by bitsandbytes on the CPU."""

import pytest
import torch

from minilora.testing import parametrize_laws

pytestmark = pytest.mark.parity
bitsandbytes = pytest.importorskip("bitsandbytes")
functional = bitsandbytes.functional

RAGGED = "blocks begin anew at each row"  # its kernel for rows that end within a block takes the wrong absmax


def quantize(W, block_size):
    packed, state = functional.quantize_4bit(W, blocksize=block_size, quant_type="nf4")
    return packed.view(-1), state.absmax


def dequantize(packed, absmax, shape, block_size):
    code = functional.get_4bit_type("nf4", device="cpu")
    state = functional.QuantState(absmax, torch.Size(shape), code, block_size, "nf4", torch.float32)
    return functional.dequantize_4bit(packed.view(-1, 1), state)


def dequantize_flat(packed, absmax, shape, block_size):
    return dequantize(packed, absmax, (1, torch.Size(shape).numel()), block_size).reshape(shape)


@parametrize_laws("nf4")
def test_theirs_keeps_the_laws_of_nf4_for_flat_weights(law):
    law.check((quantize, dequantize_flat))


@parametrize_laws("nf4", known=dict.fromkeys(["nf4-values"], RAGGED))
def test_theirs_keeps_the_laws_of_nf4_but_where_rows_end_within_a_block(law):
    law.check((quantize, dequantize))


def quantize_absmax(absmax):
    offset = absmax.mean()
    codes, state = functional.quantize_blockwise(absmax - offset, blocksize=256)
    return codes, state.absmax, offset


def dequantize_absmax(codes, scales, offset):
    code = functional.create_dynamic_map()
    state = functional.QuantState(scales, code=code, blocksize=256, dtype=torch.float32)
    return functional.dequantize_blockwise(codes, state) + offset


@parametrize_laws("double_quant")
def test_theirs_keeps_the_laws_of_double_quantization(law):
    law.check((quantize_absmax, dequantize_absmax))


def make_linear(W, b, double_quant=False):
    layer = bitsandbytes.nn.Linear4bit(
        W.shape[1], W.shape[0], b is not None, W.dtype, compress_statistics=double_quant, quant_type="nf4"
    )
    layer.load_state_dict({"weight": W} if b is None else {"weight": W, "bias": b})
    return layer.to(W.dtype).to("cpu")


@parametrize_laws("linear4bit", known={"linear4bit-ragged": RAGGED})
def test_theirs_keeps_the_laws_of_4_bit_linears(law):
    law.check(make_linear)
