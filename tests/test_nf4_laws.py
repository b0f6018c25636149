"""The laws of 4-bit weights: correct implementations pass, and planted mistakes fail by name."""

import functools

import pytest
import torch
import torch.nn.functional as F

from minilora import nf4
from minilora.nf4 import NF4Linear, dequantize_absmax, quantize, quantize_absmax
from minilora.testing import (
    AbsmaxVector,
    CheckFailure,
    NF4Weight,
    QuantizedLinear,
    check_double_quant,
    check_linear4bit,
    check_nf4,
    laws,
    mutants_nf4,
    nf4_mistakes,
    on_numpy,
    parametrize_laws,
    reference,
)
from minilora.testing.implementations import Linear4bit, nf4_quantize, pack, unpack
from minilora.testing.mutants_nf4 import halves_exchanged
from tests.models import either, matrix

LEVELS, FP4 = torch.tensor(nf4.LEVELS), torch.tensor(nf4.FP4_LEVELS)
UNIFORM = torch.arange(-8, 8) / 7


def dequantize(packed, absmax, shape, block_size):
    return nf4.dequantize(packed, absmax, shape, torch.float32, block_size)


def make_linear(W, b, double_quant=False):
    return NF4Linear.quantize(W, b, double_quant)


@either
@parametrize_laws("nf4")
def test_ours_keeps_the_laws_of_nf4(law):
    law.check((quantize, dequantize))


@parametrize_laws("double_quant")
def test_ours_keeps_the_laws_of_double_quantization(law):
    law.check((quantize_absmax, dequantize_absmax))


@either
@parametrize_laws("linear4bit")
def test_ours_keeps_the_laws_of_4_bit_linears(law):
    law.check(make_linear)


def test_numpy_passes():
    def with_numpy(W, block_size):
        codes, absmax = reference.nf4_quantize(W, block_size)
        packed = reference.np.frombuffer(reference.nf4_pack(codes.tolist()), dtype="uint8")
        return packed, absmax.astype("float32")

    def back(packed, absmax, shape, block_size):
        values = reference.nf4_dequantize(packed.tolist(), absmax, shape[0] * shape[1], block_size)
        return values.reshape(shape).astype("float32")

    assert [report.law for report in check_nf4(on_numpy(with_numpy), on_numpy(back)) if not report.checked] == [
        "nf4-16-bit"  # numpy has no bfloat16
    ]


# --- planted mistakes ---


def nearest(levels):
    return lambda x: (x[..., None] - levels).abs().argmin(-1)


def quantize_with(**changes):
    """Return a correct `quantize` with another absmax or code."""
    return functools.partial(mutants_nf4.nf4(**changes), None)


def dequantize_with(levels):
    """Return a correct `dequantize` with other levels."""

    def read(packed, absmax, shape, block_size):
        values = levels[unpack(packed)[: shape[0] * shape[1]]]
        return (values * absmax.repeat_interleave(block_size)[: len(values)]).view(shape)

    return read


def by(axis):
    def scaled(W, block_size):
        absmax = W.abs().amax(axis, keepdim=True)
        x = (W / absmax.clamp(min=1e-38)).reshape(-1)
        return pack(nearest(LEVELS)(x)), absmax.reshape(-1)

    return scaled


def restart(W, block_size):
    packed, absmax = zip(*(nf4_quantize(row, block_size) for row in W), strict=True)
    return pack(torch.cat([unpack(row)[: W.shape[1]] for row in packed])), torch.cat(absmax)


QUANTIZE = {
    "the two nibbles of a byte are swapped": lambda W, bs: (halves_exchanged(quantize(W, bs)[0]), quantize(W, bs)[1]),
    "the levels are those of FP4": quantize_with(code=nearest(FP4)),
    "the codes are those of a uniform Int4, -8 … 7": quantize_with(code=nearest(UNIFORM)),
    "the levels are 16 even steps from -1 to 1": quantize_with(code=nearest(torch.linspace(-1, 1, 16))),
    "the absmax is that of a row instead of a block": by(1),
    "the absmax is that of a column instead of a block": by(0),
    "the absmax is that of the whole weight instead of a block": by((0, 1)),
    "blocks begin anew at each row": restart,
    "blocks have 128 weights instead of 64": lambda W, bs: nf4_quantize(W, 2 * bs),
    "blocks have 64 weights, whatever block_size is": lambda W, bs: quantize(W, 64),
    "the sign is lost": lambda W, bs: quantize(W.abs(), bs),
    "the sign is changed": lambda W, bs: quantize(-W, bs),
    "the codebook is off by one: codes are one too low": quantize_with(code=lambda x: (nearest(LEVELS)(x) - 1) % 16),
    "codes are rounded down instead of to the nearest level": quantize_with(
        code=lambda x: torch.bucketize(x, LEVELS, right=True) - 1
    ),
    "a tie gets the upper level": quantize_with(code=lambda x: torch.bucketize(x, nf4.midpoints(LEVELS), right=True)),
    "the absmax is the largest w instead of the largest |w|": quantize_with(absmax=lambda blocks: blocks.amax(1)),
    "codes are in the order of the columns: the weight is transposed": lambda W, bs: quantize(W.T.contiguous(), bs),
    "1/absmax is stored": lambda W, bs: (quantize(W, bs)[0], 1 / quantize(W, bs)[1]),
}


DEQUANTIZE = {
    "the two nibbles of a byte are swapped": lambda p, a, s, bs: dequantize(halves_exchanged(p), a, s, bs),
    "the levels are those of FP4": dequantize_with(FP4),
    "the codes are those of a uniform Int4, -8 … 7": dequantize_with(UNIFORM),
    "the levels are in falling order": dequantize_with(LEVELS.flip(0)),
    "the codebook is off by one: levels are one too high": dequantize_with(LEVELS.roll(-1)),
    "the sign is lost": lambda *given: dequantize(*given).abs(),
    "the absmax is not multiplied": lambda p, a, s, bs: dequantize(p, torch.ones_like(a), s, bs),
    "one absmax is used for all": lambda p, a, s, bs: dequantize(p, a[:1].expand(len(a)), s, bs),
    "blocks have 128 weights instead of 64": lambda p, a, s, bs: dequantize(p, a[torch.arange(len(a)) // 2], s, bs),
    "the absmax is that of a row instead of a block": lambda p, a, s, bs: dequantize(
        p, a[torch.arange(s[0]).clamp(max=len(a) - 1)].repeat_interleave(s[1]), s, 1
    ),
    "the weight is transposed": lambda p, a, s, bs: dequantize(p, a, (s[1], s[0]), bs).T,
}


@matrix(7, to=(-1.0, 1.0), midpoint=range(15))
def test_a_midpoint_that_is_two_units_off_fails(midpoint, to):
    bounds = nf4.midpoints(LEVELS)
    for _ in range(2):
        bounds[midpoint] = torch.nextafter(bounds[midpoint], torch.tensor(to))
    with pytest.raises(CheckFailure):
        laws("nf4")["ties"].check((quantize_with(code=lambda x: torch.bucketize(x, bounds)), dequantize))


def test_the_order_of_storage_instead_of_that_of_the_rows_fails():
    with pytest.raises(CheckFailure, match="transposed view") as failure:
        check_nf4(functools.partial(mutants_nf4.in_order_of_memory, quantize), dequantize)
    assert "codes are in the order of the columns: the weight is transposed" in failure.value.causes


UNNAMED = {
    "an epsilon": (lambda W, bs: (quantize(W, bs)[0], quantize(W, bs)[1] + 1e-8), "absmax: wrong"),
    "a weight that is changed in place": (
        functools.partial(mutants_nf4.normalized_in_place, quantize),
        "W, which is only read",
    ),
    "a column": (lambda W, bs: (quantize(W, bs)[0].view(-1, 1), quantize(W, bs)[1]), "dtype and shape"),
    "int32": (lambda W, bs: (quantize(W, bs)[0].int(), quantize(W, bs)[1]), "dtype and shape"),
    "a float64 absmax": (lambda W, bs: (quantize(W, bs)[0], quantize(W, bs)[1].double()), "dtype and shape"),
}


@pytest.mark.parametrize("mistake", UNNAMED)
def test_a_mistake_without_a_name_fails_with_what_is_wrong(mistake):
    wrong, said = UNNAMED[mistake]
    with pytest.raises(CheckFailure, match=said):
        check_nf4(wrong, dequantize)


def absmaxes_with(**changes):
    """Return a correct `quantize` of absmaxes with another offset, scale or code."""
    return functools.partial(mutants_nf4.double_quant(**changes), None)


DOUBLE = {
    "the offset is omitted instead of the mean": absmaxes_with(offset=lambda a: a.new_zeros(())),
    "the offset is the smallest instead of the mean": absmaxes_with(offset=torch.min),
    "the offset is the median instead of the mean": absmaxes_with(offset=lambda a: a.quantile(0.5)),
    "the scale is the largest absmax: the offset is not subtracted": lambda a: (
        *absmaxes_with(offset=lambda a: a.new_zeros(()))(a)[:2],
        a.mean(),
    ),
    "the scales are dropped": absmaxes_with(scale=lambda blocks: torch.ones(len(blocks))),
    "one scale is used for all absmaxes": absmaxes_with(scale=lambda blocks: blocks.abs().max().expand(len(blocks))),
    "the levels are even steps from -1 to 1": absmaxes_with(code=nearest(torch.linspace(-1, 1, 256))),
    "the codebook is off by one": lambda a: (quantize_absmax(a)[0] + 1, *quantize_absmax(a)[1:]),
    "the sign is lost": absmaxes_with(code=lambda x: nearest(nf4.DYNAMIC_MAP)(x.abs())),
}
DOUBLE_BACK = {
    "the offset is omitted": lambda c, s, o: dequantize_absmax(c, s, 0 * o),
    "the offset is subtracted": lambda c, s, o: dequantize_absmax(c, s, -o),
    "the scales are dropped": lambda c, s, o: dequantize_absmax(c, torch.ones_like(s), o),
    "one scale is used for all absmaxes": lambda c, s, o: dequantize_absmax(c, s[:1].expand(len(s)), o),
    "the levels are even steps from -1 to 1": lambda c, s, o: (
        torch.linspace(-1, 1, 256)[c.int()] * s.repeat_interleave(256)[: len(c)] + o
    ),
}


def without_offset(W, b, double_quant):
    layer = make_linear(W, b, double_quant)
    if double_quant:
        layer.offset.zero_()
    return layer


def linear_with(weight):
    """Return a linear that computes with `weight(W)`."""
    return lambda W, b: functools.partial(F.linear, weight=weight(W).to(W.dtype), bias=b)


LINEAR = {
    "the dense weight is used instead of the quantized one": linear_with(lambda W: W),
    "the absmax is not multiplied": linear_with(
        lambda W: dequantize(quantize(W)[0], torch.ones(-(-W.numel() // 64)), W.shape, 64)
    ),
    "the two nibbles of a byte are swapped": linear_with(
        lambda W: dequantize(halves_exchanged(quantize(W)[0]), quantize(W)[1], W.shape, 64)
    ),
    "blocks have 128 weights instead of 64": lambda W, b: Linear4bit(W, b, 128),
    "the weight is transposed": linear_with(lambda W: dequantize(*quantize(W), W.T.shape, 64).T),
    "the bias is missing": lambda W, b: Linear4bit(W, None),
    "the bias is added twice": lambda W, b: Linear4bit(W, None if b is None else 2 * b),
    "double quantization is ignored": lambda W, b, double_quant: make_linear(W, b),
    "the offset is omitted": without_offset,
    "blocks begin anew at each row": linear_with(
        lambda W: torch.stack([dequantize(*quantize(row, 64), row.shape, 64) for row in W])
    ),
}


PLANTED = {
    **{f"quantize: {cause}": (check_nf4, wrong, dequantize) for cause, wrong in QUANTIZE.items()},
    **{f"dequantize: {cause}": (check_nf4, quantize, wrong) for cause, wrong in DEQUANTIZE.items()},
    **{f"absmaxes: {cause}": (check_double_quant, wrong, dequantize_absmax) for cause, wrong in DOUBLE.items()},
    **{f"back: {cause}": (check_double_quant, quantize_absmax, wrong) for cause, wrong in DOUBLE_BACK.items()},
    **{f"linear: {cause}": (check_linear4bit, wrong) for cause, wrong in LINEAR.items()},
}


@matrix(3, name=PLANTED)
def test_a_planted_mistake_fails_by_name(name):
    check, *implementation = PLANTED[name]
    with pytest.raises(CheckFailure, match="likely cause") as failure:
        check(*implementation)
    assert name.partition(": ")[2] in failure.value.causes


def test_the_gradient_of_the_dense_weight_fails_by_name():
    with pytest.raises(CheckFailure, match="dx: wrong") as failure:
        check_linear4bit(functools.partial(mutants_nf4.gradient_of_the_dense_weight, Linear4bit))
    assert failure.value.causes == ("the dense weight is used instead of the quantized one",)


class Trained(torch.nn.Module):
    """A 4-bit linear whose absmaxes are trained."""

    def __init__(self, W, b):
        super().__init__()
        packed, absmax = quantize(W)
        self.register_buffer("packed", packed)
        self.absmax, self.b, self.shape, self.dtype = torch.nn.Parameter(absmax), b, W.shape, W.dtype

    def forward(self, x):
        level = dequantize(self.packed, torch.ones_like(self.absmax), self.shape, 64).reshape(-1)
        W = level * self.absmax.repeat_interleave(64)[: len(level)]
        return F.linear(x, W.view(self.shape).to(self.dtype), self.b)


def test_a_trained_absmax_fails():
    with pytest.raises(CheckFailure, match="the gradient of absmax: wrong"):
        check_linear4bit(Trained)


def test_each_law_about_gradients_is_left_out_for_numpy():
    def make(W, b):
        layer = Linear4bit(torch.from_numpy(W), None if b is None else torch.from_numpy(b))
        return lambda x: layer(torch.from_numpy(x)).numpy()

    names = {report.law for report in check_linear4bit(on_numpy(make)) if report.comparisons}
    assert "linear4bit-weight" in names
    assert not names & {"linear4bit-gradients", "linear4bit-ragged_dx", "linear4bit-frozen", "linear4bit-16-bit"}


# --- what the laws stand on ---


def test_a_case_is_made_again_by_its_repr():
    for case in (NF4Weight(3, 70, kind="ties", seed=4), AbsmaxVector(5, "outlier", 2), QuantizedLinear((), 7, 2)):
        assert eval(repr(case), {type(case).__name__: type(case)}) == case


def test_a_number_within_the_rounding_of_a_midpoint_may_get_either_level_and_others_only_one():
    case = NF4Weight(9, 96)
    assert case.admissible.sum() == 9 * 96
    assert NF4Weight(1, 64, kind="ties").admissible.sum(1).max() == 2
    assert NF4Weight(1, 64, kind="tiny").admissible.all()


def test_a_mistake_that_is_named_is_a_mistake():
    """For some case, each known mistake differs from the right result by more than its bound."""
    weights = [*laws("nf4")["nearest"].cases(), *laws("nf4")["ties"].cases(), *laws("nf4")["block_size"].cases()]
    seen = set()
    for case in weights:
        wrong = nf4_mistakes.wrong_quantizations(case)
        seen |= {cause for cause, each in wrong.items() if (each.codes != case.codes).any()}
    assert seen == {cause for case in weights for cause in nf4_mistakes.wrong_quantizations(case)}


def test_a_pair_in_the_wrong_order_has_a_wrong_form_and_no_other_cause():
    with pytest.raises(CheckFailure, match="dtype and shape of packed") as failure:
        check_nf4(lambda W, bs: quantize(W, bs)[::-1], dequantize)
    assert failure.value.causes == ()
    with pytest.raises(CheckFailure) as failure:
        laws("nf4")["nearest"].check((lambda W, bs: quantize(W, bs)[::-1], dequantize))
    assert failure.value.causes == ()


def test_a_wrong_code_is_told_with_what_was_rounded():
    def with_midpoints(right):
        bounds = nf4.midpoints(LEVELS) + (0 if right else 3e-8)
        return quantize_with(code=lambda x: torch.bucketize(x, bounds, right=right)), dequantize

    for right, place in ((True, "the midpoint"), (False, "just above the midpoint")):
        with pytest.raises(
            CheckFailure, match=rf"w/absmax is [-0-9.]+, {place} of levels \d+ and \d+: found"
        ) as failure:
            laws("nf4")["ties"].check(with_midpoints(right))
        assert "error/bound" not in str(failure.value)
    with pytest.raises(CheckFailure, match=r"at \[\d+\]: w/absmax is [-0-9.]+: found \d+, expected \d+\n"):
        laws("nf4")["nearest"].check((QUANTIZE["the sign is changed"], dequantize))
    with pytest.raises(CheckFailure, match=r"\(absmax - offset\)/scale is [-0-9.]+: found"):
        laws("double_quant")["codes"].check((DOUBLE["the sign is lost"], dequantize_absmax))
