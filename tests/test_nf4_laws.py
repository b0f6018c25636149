"""The laws of 4-bit weights: correct implementations pass, and planted mistakes fail by name."""

import functools

import numpy as np
import pytest
import torch

from minilora import nf4
from minilora.cli.selftest import implementations
from minilora.nf4 import quantize
from minilora.testing import (
    AbsmaxVector,
    Chat,
    CheckFailure,
    NF4Weight,
    QuantizedLinear,
    check_linear4bit,
    check_nf4,
    laws,
    on_numpy,
    parametrize_laws,
    reference,
)
from minilora.testing.implementations import Linear4bit, nf4_quantize
from minilora.testing.nf4_laws import as_codes
from tests.models import either, matrix


def dequantize(packed, absmax, shape, block_size):
    return nf4.dequantize(packed, absmax, shape, torch.float32, block_size)


@either
@parametrize_laws("nf4", "double_quant", "linear4bit")
def test_ours_keeps_the_laws_of_nf4(law):
    law.check(implementations(torch.device("cpu"))[law.kind])


def test_numpy_passes():
    def with_numpy(W, block_size):
        codes, absmax = reference.nf4_quantize(W, block_size)
        packed = np.frombuffer(reference.nf4_pack(codes.tolist()), dtype="uint8")
        return packed, absmax.astype("float32")

    def back(packed, absmax, shape, block_size):
        codes = as_codes(packed, shape[0] * shape[1])
        values = np.array(reference.NF4_LEVELS)[codes] * absmax.repeat(block_size)[: len(codes)]
        return values.reshape(shape).astype("float32")

    assert [report.law for report in check_nf4(on_numpy(with_numpy), on_numpy(back)) if not report.checked] == [
        "nf4-16-bit"  # numpy has no bfloat16
    ]


# --- mistakes ---


@matrix(7, to=(-1.0, 1.0), midpoint=range(15))
def test_a_midpoint_that_is_two_units_off_fails(midpoint, to):
    bounds = nf4.midpoints(torch.tensor(nf4.LEVELS))
    for _ in range(2):
        bounds[midpoint] = torch.nextafter(bounds[midpoint], torch.tensor(to))
    wrong = functools.partial(nf4_quantize, code=lambda x, levels: torch.bucketize(x, bounds))
    with pytest.raises(CheckFailure):
        laws("nf4")["ties"].check((wrong, dequantize))


UNNAMED = {
    "an epsilon": (lambda W, bs: (quantize(W, bs)[0], quantize(W, bs)[1] + 1e-8), "absmax: wrong"),
    "a column": (lambda W, bs: (quantize(W, bs)[0].view(-1, 1), quantize(W, bs)[1]), "dtype and shape"),
    "int32": (lambda W, bs: (quantize(W, bs)[0].int(), quantize(W, bs)[1]), "dtype and shape"),
    "a float64 absmax": (lambda W, bs: (quantize(W, bs)[0], quantize(W, bs)[1].double()), "dtype and shape"),
}


@pytest.mark.parametrize("mistake", UNNAMED)
def test_a_mistake_without_a_name_fails_with_what_is_wrong(mistake):
    wrong, said = UNNAMED[mistake]
    with pytest.raises(CheckFailure, match=said):
        check_nf4(wrong, dequantize)


def with_trained_absmax(W, b):
    layer = Linear4bit(W, b)
    layer.absmax = torch.nn.Parameter(layer.absmax)
    return layer


def test_a_trained_absmax_fails():
    with pytest.raises(CheckFailure, match="the gradient of absmax: wrong"):
        check_linear4bit(with_trained_absmax)


# --- what the laws stand on ---


def test_a_case_is_made_again_by_its_repr():
    weights = NF4Weight(3, 70, kind="ties", seed=4), AbsmaxVector(5, "outlier", 2), QuantizedLinear((), 7, 2)
    for case in (*weights, Chat((("user", "a"), ("assistant", "'b'")))):
        assert eval(repr(case), {type(case).__name__: type(case)}) == case


def test_only_numbers_within_the_rounding_of_a_midpoint_have_two_levels():
    case = NF4Weight(9, 96)
    assert case.rounding.admissible.sum() == 9 * 96
    assert NF4Weight(1, 64, kind="ties").rounding.admissible.sum(1).max() == 2
    assert NF4Weight(1, 64, kind="tiny").rounding.admissible.all()
