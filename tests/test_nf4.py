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
from minilora.testing import reference
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
    delta = torch.tensor((1 - 1 / 30 + 1 - 1 / 32) / 2, dtype=torch.float64)
    below = torch.special.ndtri(torch.linspace(0, 1, 8, dtype=torch.float64) * (delta - 0.5) + 1 - delta)
    above = torch.special.ndtri(torch.linspace(0, 1, 9, dtype=torch.float64) * (delta - 0.5) + 0.5)
    derived = torch.cat([below, above[1:]]) / above[-1]
    published = torch.tensor(LEVELS, dtype=torch.float64)
    assert (derived - published).abs().max() < 2**-22  # in the published ones quantiles have float32's last bits
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
    levels = torch.tensor(LEVELS)[torch.tensor(codes_of(packed, count))]
    expected = reference.nf4_dequantize(levels.double().numpy(), spread(absmax, count, 64).double().numpy())
    assert torch.equal(found.view(-1), torch.from_numpy(expected).to(torch.float32).to(dtype))


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


def test_the_second_levels_are_256_from_below_minus_one_to_one_with_zero_in_the_middle():
    levels = DYNAMIC_MAP
    assert len(levels.unique()) == 256
    assert (levels[127], levels[-1]) == (0, 1)
    assert levels[0] > -1
    assert torch.equal(-levels[:127].flip(0), levels[128:-1])


@given(st.integers(1, 600), seeds, st.floats(1e-6, 1e6))
def test_the_nearest_second_level_is_taken_or_on_the_cpu_one_beside_it(count, seed, size):
    absmax = size * torch.rand(count, generator=torch.Generator().manual_seed(seed))
    nearest, scales, offset = quantize_absmax(absmax, "cuda")
    for i, code in enumerate(nearest.tolist()):
        if scales[i // 256] == 0:
            continue  # any level times 0 will do
        rest = absmax[i].double() - offset.double()
        x = max(-1.0, min(1.0, (rest / max(scales[i // 256].double(), 1e-300)).item()))
        distances = (DYNAMIC_MAP.double() - x).abs()
        assert distances[code] <= distances.min() + 2**-21
    beside, *same = quantize_absmax(absmax, "cpu")
    assert all(map(torch.equal, same, (scales, offset)))
    if scales.min() > 0:
        assert (beside.int() - nearest.int()).abs().max() <= 1


@given(st.integers(1, 600), seeds)
def test_an_absmax_comes_back_within_half_a_step_of_the_second_levels(count, seed):
    absmax = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    codes, scales, offset = quantize_absmax(absmax, "cuda")
    step = max(DYNAMIC_MAP.diff().max().item(), 2 * (1 + DYNAMIC_MAP[0].item()))  # there is no -1
    error = (dequantize_absmax(codes, scales, offset) - absmax).abs()
    assert (error <= step / 2 * scales.repeat_interleave(256)[:count] + 2**-20).all()


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
