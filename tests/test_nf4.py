import math

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

import minilora as ml
from minilora.quant import nf4
from minilora.quant.nf4 import (
    DYNAMIC_MAP,
    LEVELS,
    dequantize,
    dequantize_absmax,
    quantize,
    quantize_absmax,
)
from minilora.testing import reference_nf4 as reference
from tests.models import seeds

BOUND = 0.151904  # of the absmax: half the widest gap between levels, that between -1 and the next
sizes = st.tuples(st.integers(1, 9), st.integers(1, 150))
block_sizes = st.sampled_from([32, 64, 128])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
kinds = st.sampled_from(["normal", "zero block", "constant", "outlier", "denormal", "midpoints"])


def make(size, seed, kind="normal", dtype=torch.float32):
    weight = 0.02 * torch.randn(size, generator=torch.Generator().manual_seed(seed))
    flat = weight.view(-1)
    if kind == "zero block":
        flat[:64] = 0
    elif kind == "constant":
        flat.fill_(-0.3)
    elif kind == "outlier":
        flat[flat.numel() // 2] = 1000
    elif kind == "denormal":
        flat *= 1e-40
    elif kind == "midpoints":
        levels = torch.tensor(LEVELS)
        flat.copy_(((levels[1:] + levels[:-1]) / 2).repeat(flat.numel() // 15 + 1)[: flat.numel()])
        flat[::16] = 1
    return weight.to(dtype)


def codes_of(packed, count):
    return torch.stack((packed >> 4, packed & 15), dim=1).view(-1)[:count].tolist()


def spread(absmax, count, block_size):
    return absmax.repeat_interleave(block_size)[:count]


def test_the_levels_are_quantiles_of_the_normal_distribution():
    derived = torch.from_numpy(reference.nf4_levels())
    published = torch.tensor(LEVELS, dtype=torch.float64)
    assert (derived - published).abs().max() < 2**-22  # in the published ones quantiles have float32's last bits
    assert LEVELS == reference.NF4_LEVELS
    assert LEVELS[7] == 0


@given(sizes, seeds, kinds, dtypes, block_sizes)
@example((1, 1), 0, "normal", torch.float32, 64)
@example((9, 150), 0, "midpoints", torch.float32, 64)
def test_each_weight_gets_the_nearest_level_of_its_block(size, seed, kind, dtype, block_size):
    weight = make(size, seed, kind, dtype)
    packed, absmax = quantize(weight, block_size)
    codes, scales = reference.nf4_quantize(weight.double().numpy(), block_size)
    whole = weight.numel() // block_size  # the absmax of a part of a block is never 0, as in bitsandbytes
    largest = [scale if i < whole else max(scale, nf4.SMALLEST) for i, scale in enumerate(scales)]
    assert torch.equal(absmax, torch.tensor(largest, dtype=torch.float32))
    for w, code, nearest, scale in zip(
        weight.double().view(-1).tolist(),
        codes_of(packed, weight.numel()),
        codes.tolist(),
        spread(absmax, weight.numel(), block_size).tolist(),
        strict=True,
    ):
        x = max(-1.0, min(1.0, w / max(scale, nf4.SMALLEST)))
        assert abs(x - LEVELS[code]) <= abs(x - LEVELS[nearest]) + 2**-23


def test_a_quotient_between_two_levels_gets_the_lower_one():
    levels = torch.tensor(LEVELS)
    midpoints = (levels[1:] + levels[:-1]) / 2
    weight = torch.cat([torch.ones(1), midpoints, torch.zeros(48)])  # divided by 1, exactly
    packed, _ = quantize(weight)
    assert codes_of(packed, 16) == [15, *range(15)]
    above = torch.nextafter(midpoints, torch.ones(15))
    assert codes_of(quantize(torch.cat([torch.ones(1), above, torch.zeros(48)]))[0], 16) == [15, *range(1, 16)]


def test_the_first_of_two_weights_is_in_the_high_half_of_a_byte_and_a_last_one_alone_has_a_zero_beside_it():
    assert quantize(torch.tensor([1.0, -1.0, -1.0]))[0].tolist() == [0xF0, 0x07]


@given(sizes, seeds, kinds, block_sizes)
def test_an_error_is_at_most_half_the_widest_gap(size, seed, kind, block_size):
    weight = make(size, seed, kind)
    packed, absmax = quantize(weight, block_size)
    error = (dequantize(packed, absmax, size, torch.float32, block_size) - weight).abs().view(-1)
    assert (error <= BOUND * spread(absmax, weight.numel(), block_size) + nf4.SMALLEST).all()


@given(sizes, seeds, dtypes, st.booleans())
def test_codes_are_those_of_what_they_stand_for(size, seed, dtype, is_double):
    packed, absmax = quantize(make(size, seed, dtype=dtype))
    scales = dequantize_absmax(*quantize_absmax(absmax)) if is_double else absmax
    assume((scales > 0).all())
    weight = dequantize(packed, scales, size, dtype)
    assert torch.equal(quantize(weight)[0], packed)


@given(sizes, seeds, dtypes)
def test_a_weight_is_a_level_times_the_absmax_of_its_block_in_float32_and_rounded_then(size, seed, dtype):
    packed, absmax = quantize(make(size, seed))
    found = dequantize(packed, absmax, size, dtype)
    count = math.prod(size)
    expected = reference.nf4_dequantize(bytes(packed.tolist()), absmax.numpy(), count, 64)
    assert torch.equal(found.view(-1), torch.from_numpy(expected).to(torch.float32).to(dtype))


@given(st.lists(st.integers(0, 15), min_size=1, max_size=9))
def test_codes_lie_in_bytes_as_the_oracle_packs_them(codes):
    weight = torch.tensor([*(LEVELS[code] for code in codes)]) if {0, 15} & set(codes) else None
    if weight is not None:  # the absmax is 1, so that each level is its own quotient
        assert bytes(quantize(weight)[0].tolist()) == reference.nf4_pack(codes)


@given(sizes, seeds, st.integers(-20, 20))
def test_scaling_by_a_power_of_two_scales_the_absmax_and_nothing_else(size, seed, power):
    weight = make(size, seed)
    (packed, absmax), (scaled, larger) = quantize(weight), quantize(weight * 2.0**power)
    assert torch.equal(packed, scaled)
    assert torch.equal(larger, absmax * 2.0**power)


@given(st.permutations(range(5)), seeds)
def test_blocks_do_not_see_each_other(order, seed):
    blocks = make((5, 64), seed)
    packed, absmax = quantize(blocks)
    permuted, scales = quantize(blocks[list(order)])
    assert torch.equal(permuted.view(5, 32), packed.view(5, 32)[list(order)])
    assert torch.equal(scales, absmax[list(order)])


@given(sizes, seeds, st.sampled_from([128, 256, 384]))
def test_tiles_change_nothing(size, seed, tile):
    whole = quantize(make(size, seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nf4, "TILE", tile)
        tiled = quantize(make(size, seed))
        assert all(map(torch.equal, tiled, whole))
        weight = dequantize(*tiled, size, torch.float32)
    assert torch.equal(weight, dequantize(*whole, size, torch.float32))


@given(sizes, seeds, dtypes)
def test_the_weight_that_is_quantized_stays_as_it_is(size, seed, dtype):
    weight = make(size, seed, dtype=dtype)
    quantize(weight)
    assert torch.equal(weight, make(size, seed, dtype=dtype))


# --- the second quantization ---


def some_absmaxes(count, seed, size=1.0):
    return size * torch.rand(count, generator=torch.Generator().manual_seed(seed))


def test_the_second_levels_are_256_from_below_minus_one_to_one_with_zero_in_the_middle():
    assert (DYNAMIC_MAP - torch.from_numpy(reference.absmax_levels())).abs().max() < 2**-24
    assert len(DYNAMIC_MAP.unique()) == 256
    assert (DYNAMIC_MAP[127], DYNAMIC_MAP[-1]) == (0, 1)
    assert torch.equal(-DYNAMIC_MAP[:127].flip(0), DYNAMIC_MAP[128:-1])


@given(st.integers(1, 600), seeds, st.floats(1e-6, 1e6))
def test_the_nearest_second_level_is_taken_or_on_the_cpu_one_beside_it(count, seed, size):
    absmax = some_absmaxes(count, seed, size)
    codes, scales, offset = quantize_absmax(absmax, "cuda")
    expected, their_scales, their_offset = reference.absmax_quantize(absmax.numpy())
    assert abs(offset.item() - their_offset) <= 2**-22 * size
    assert (scales - torch.from_numpy(their_scales)).abs().max() <= 2**-21 * size
    levels = DYNAMIC_MAP.double()
    for i, (code, nearest) in enumerate(zip(codes.tolist(), expected.tolist(), strict=True)):
        if code != nearest:  # then both are as near as float32 can tell
            x = (absmax[i].double() - offset) / scales[i // 256] if scales[i // 256] else 0.0
            assert (levels[code] - x).abs() <= (levels[nearest] - x).abs() + 2**-20 or scales[i // 256] == 0
    beside, *same = quantize_absmax(absmax, "cpu")
    assert all(map(torch.equal, same, (scales, offset)))
    if scales.min() > 0:
        assert (beside.int() - codes.int()).abs().max() <= 1


@given(st.integers(1, 600), seeds, st.floats(1e-6, 1e6))
def test_an_absmax_is_a_second_level_times_its_scale_and_the_offset(count, seed, size):
    codes, scales, offset = quantize_absmax(some_absmaxes(count, seed, size))
    expected = torch.from_numpy(reference.absmax_dequantize(codes.tolist(), scales.numpy(), offset.item()))
    assert (dequantize_absmax(codes, scales, offset) - expected).abs().max() <= 2**-22 * size


@given(sizes, seeds, st.sampled_from(["cpu", "cuda"]))
def test_an_error_with_double_quantization_is_at_most_that_without_and_that_of_the_absmax(size, seed, rounding):
    weight = make(size, seed)
    packed, absmax = quantize(weight)
    codes, scales, offset = quantize_absmax(absmax, rounding)
    coarse = dequantize_absmax(codes, scales, offset)
    step = max(DYNAMIC_MAP.diff().max().item(), 2 * (1 + DYNAMIC_MAP[0].item()))  # there is no -1
    step += 2**-15 if rounding == "cpu" else 0  # a place of the table
    assert ((coarse - absmax).abs() <= step / 2 * scales.repeat_interleave(256)[: len(absmax)] + 2**-20).all()
    error = (dequantize(packed, coarse, size, torch.float32) - weight).abs().view(-1)
    allowed = BOUND * absmax + (coarse - absmax).abs() + 2**-24
    assert (error <= spread(allowed, weight.numel(), 64)).all()


def test_the_mean_squared_error_of_even_weights_is_the_integral_over_the_levels():
    """E e² = ½ Σ g³/12 and E e⁴ = ½ Σ g⁵/80 over the 15 gaps g, for quotients spread evenly over [-1, 1]."""
    blocks = 2 * torch.rand(4000, 64, generator=torch.Generator().manual_seed(0)) - 1
    blocks[:, 0] = 1  # the absmax; it has no error
    packed, absmax = quantize(blocks)
    squares = (dequantize(packed, absmax, blocks.shape, torch.float32) - blocks)[:, 1:].double().square()
    gaps = torch.tensor(LEVELS, dtype=torch.float64).diff()
    mean, fourth = (gaps**3).sum() / 24, (gaps**5).sum() / 160
    deviation = ((fourth - mean**2) / squares.numel()).sqrt()
    assert (squares.mean() - mean).abs() <= 6 * deviation


# --- what cannot be quantized ---


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_weight_that_is_not_finite_is_refused(bad):
    for place in (0, 70):
        weight = torch.ones(100)
        weight[place] = bad
        with pytest.raises(ml.TrainingError, match="not finite"):
            quantize(weight)


@pytest.mark.parametrize("block_size", [0, 16, 48, 8192])
def test_a_block_size_that_bitsandbytes_has_not_is_refused(block_size):
    with pytest.raises(ml.ConfigError, match=f"block_size is {block_size}"):
        quantize(torch.ones(64), block_size)
