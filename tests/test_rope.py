"""Rotary position embedding: frequencies and tables against the published formulas, and what a config must give."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minilora import ConfigError, llama
from minilora.models.rotary import NUMBERS, LengthRope, build_rope
from minilora.testing.compare import assert_parity, assert_precision
from tests import reference_model

CPU = torch.device("cpu")
document_lengths = st.integers(2, 100)


@st.composite
def ropes(draw, kinds=tuple(NUMBERS)):
    """A rotation of any kind; documents of `document_lengths` are shorter and longer than what it was trained on."""
    kind, width, trained = draw(st.sampled_from(kinds)), draw(st.integers(3, 32)), draw(st.integers(4, 64))
    if kind == "yarn":
        trained = draw(st.sampled_from([4, 64, 8192]))  # pairs turn less and more often than its limits
    factors = st.lists(st.floats(1, 40), min_size=(width + 1) // 2, max_size=(width + 1) // 2)
    low = draw(st.sampled_from([0.5, 1.0]))
    numbers = {
        "factor": draw(st.sampled_from([1.5, 4.0, 8.0])),
        "low_freq_factor": low,
        "high_freq_factor": low * draw(st.sampled_from([2.0, 8.0])),
        "short_factor": draw(factors),
        "long_factor": draw(factors),
    }
    scaling = {key: numbers[key] for key in NUMBERS[kind]}
    if kind == "yarn" and draw(st.booleans()):
        scaling["beta_slow"] = draw(st.sampled_from([0.01, 0.1, 0.5]))
        scaling["beta_fast"] = scaling["beta_slow"] * draw(st.sampled_from([1.0, 5.0, 40.0]))
    return SimpleNamespace(
        width=width,
        theta=draw(st.sampled_from([10.0, 500.0, 10_000.0, 1e6])),
        kind=kind,
        scaling=scaling,
        trained_length=trained,
        max_length=trained * draw(st.sampled_from([1, 2, 8])),
    )


def built(rope, **changes):
    return build(**{**vars(rope), **changes})


def build(kind, width, theta, scaling, trained_length, max_length):
    values = {
        "head_dim": width + 1,
        "partial_rotary_factor": width / (width + 1),
        "rope_theta": theta,
        "rope_scaling": {"rope_type": kind, **scaling},
        "original_max_position_embeddings": trained_length,
        "max_position_embeddings": max_length,
    }
    return build_rope(values, width)


def frequencies(rope, length):
    """How far each pair turns a position in a document of a length."""
    return rope.frequencies(length) if isinstance(rope, LengthRope) else torch.tensor(rope.frequencies)


@pytest.mark.parametrize("kind", NUMBERS)
@given(st.data(), document_lengths)
def test_frequencies_are_the_published_ones_to_a_few_bits_of_float32(kind, data, length):
    rope = data.draw(ropes(kinds=[kind]))
    exact = torch.from_numpy(reference_model.rope_frequencies(rope, length))
    ours = frequencies(built(rope), length)
    assert ours.dtype == torch.float32
    assert_parity(ours / exact, torch.ones_like(exact), 8 * torch.finfo(ours.dtype).eps)  # slow pairs count too


@given(ropes(), st.integers(2, 5000))
def test_tables_are_cosine_and_sine_of_position_times_frequency(rope, length):
    ours = built(rope)
    plain = torch.arange(length).float().unsqueeze(1) * frequencies(ours, length)
    angles = torch.arange(length).double().unsqueeze(1) * frequencies(ours, length).double()
    amplitude = getattr(ours, "amplitude", 1.0)
    for table, turn in zip(ours.rotation([range(length)], CPU), (torch.cos, torch.sin), strict=True):
        assert table.dtype == torch.float32
        assert_precision(table, amplitude * turn(plain), amplitude * turn(angles))


@pytest.mark.parametrize("factor", [None, 0.5, 1.0, 1.5, 6.0])
@given(ropes(kinds=["longrope"]), st.sampled_from([None, 1.0, 2.5]))
def test_longrope_stretches_its_tables_by_the_root_of_the_growth_in_logarithms(factor, rope, attention_factor):
    rope.scaling |= {"attention_factor": attention_factor, "factor": factor}
    growth = max(1.0, factor or rope.max_length / rope.trained_length)
    expected = attention_factor or math.sqrt(1 + math.log(growth) / math.log(rope.trained_length))  # [Long §3.3]
    assert math.isclose(built(rope).amplitude, expected, rel_tol=1e-12)


@given(ropes(kinds=["yarn"]), st.sampled_from([0.5, 1, 6.0]), st.sampled_from([None, 0.7, 1.0]), st.booleans())
def test_yarn_makes_q_and_k_longer_by_a_tenth_of_the_logarithm_of_the_growth(rope, factor, mscale, is_given):
    rope.scaling |= {"factor": factor, "mscale": mscale, "mscale_all_dim": 0.3}
    expected = 1 + 0.1 * math.log(max(1.0, factor))  # [YaRN eq. 22]
    if mscale:
        expected = (1 + mscale * (expected - 1)) / (1 + 0.3 * (expected - 1))
    if is_given:
        rope.scaling["attention_factor"] = expected = 2.5
    assert math.isclose(built(rope).amplitude, expected, rel_tol=1e-12)


@given(ropes(kinds=["default"]), document_lengths)
def test_the_default_kind_is_the_rotation_of_a_plain_llama(rope, length):
    plain = llama.Rope(tuple(llama.rope_frequencies(rope.width, rope.theta).tolist()))
    assert all(map(torch.equal, plain.rotation([range(length)], CPU), built(rope).rotation([range(length)], CPU)))


@given(ropes(kinds=["longrope"]), document_lengths, document_lengths)
def test_a_rotation_changes_where_its_table_does(rope, before, longer):
    ours, after = built(rope), before + longer
    (cos, sin), (cos_after, sin_after) = (ours.rotation([range(n)], CPU) for n in (before, after))
    is_equal = torch.equal(cos, cos_after[:before]) and torch.equal(sin, sin_after[:before])
    assert ours.changes(before, after) != is_equal


@given(ropes(kinds=["longrope"]))
def test_longrope_takes_its_long_factors_beyond_the_trained_length(rope):
    plain = rope.theta ** (torch.arange(0, rope.width, 2).double() / -rope.width)
    for length, stretch in ((rope.trained_length, "short_factor"), (rope.trained_length + 1, "long_factor")):
        factors = torch.tensor(rope.scaling[stretch]).double()
        assert_parity(frequencies(built(rope), length) * factors / plain, torch.ones_like(plain))


@pytest.mark.parametrize("kind", [kind for kind, keys in NUMBERS.items() if keys])
def test_every_number_that_a_kind_lacks_or_that_cannot_work_is_named(kind):
    for value in (None, "2", 0, -1.0, True, float("inf"), [], {}):
        with pytest.raises(ConfigError) as error:
            build(kind, 8, 1e4, dict.fromkeys(NUMBERS[kind], value), 16, 16)
        for key in NUMBERS[kind]:
            assert f"{key}: found {value!r}" in str(error.value)


def test_what_a_kind_cannot_do_is_refused():
    for wrong in ("short_factor", "long_factor"):
        scaling = {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4, wrong: [1.0] * 5}
        with pytest.raises(ConfigError, match=rf"{wrong}: found .* need a list of 4 numbers"):
            build("longrope", 8, 1e4, scaling, 16, 16)
    for theta, changes, message in (
        (1.0, {}, "rope_theta: found 1.0, need more than 1"),
        (1e4, {"truncate": False}, "truncate: found False, supported is true"),
        (1e4, {"beta_slow": 33}, "beta_fast: found 32, need at least beta_slow, 33"),
        (1e4, {"mscale": "one"}, "mscale: found 'one', need a number above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            build("yarn", 8, theta, {"factor": 2.0, **changes}, 16, 16)
    with pytest.raises(ConfigError, match=r"'dynamic' is not supported.*default.*linear.*llama3.*longrope.*yarn"):
        build("dynamic", 8, 1e4, {"factor": 2.0}, 16, 16)
