"""Rotary position embedding: frequencies and tables against the published formulas, and what a config must give."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minilora import ConfigError, llama
from minilora.models.rotary import NUMBERS, build_rope
from minilora.testing.compare import assert_parity, assert_precision
from tests import reference_model

CPU = torch.device("cpu")


@st.composite
def ropes(draw, kinds=tuple(NUMBERS)):
    """A rotation of any kind."""
    kind, width, trained = draw(st.sampled_from(kinds)), draw(st.integers(3, 32)), draw(st.integers(4, 64))
    if kind == "yarn":
        trained = draw(st.sampled_from([4, 64, 8192]))  # pairs turn less and more often than its limits
    low = draw(st.sampled_from([0.5, 1.0]))
    numbers = {
        "factor": draw(st.sampled_from([1.5, 4.0, 8.0])),
        "low_freq_factor": low,
        "high_freq_factor": low * draw(st.sampled_from([2.0, 8.0])),
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
    )


def built(rope, **changes):
    return build(**{**vars(rope), **changes})


def build(kind, width, theta, scaling, trained_length):
    values = {
        "head_dim": width + 1,
        "partial_rotary_factor": width / (width + 1),
        "rope_theta": theta,
        "rope_scaling": {"rope_type": kind, **scaling},
        "original_max_position_embeddings": trained_length,
    }
    return build_rope(values, width)


@pytest.mark.parametrize("kind", NUMBERS)
@given(st.data())
def test_frequencies_are_the_published_ones_to_a_few_bits_of_float32(kind, data):
    rope = data.draw(ropes(kinds=[kind]))
    exact = torch.from_numpy(reference_model.rope_frequencies(rope))
    ours = torch.tensor(built(rope).frequencies)
    assert ours.dtype == torch.float32
    assert_parity(ours / exact, torch.ones_like(exact), 8 * torch.finfo(ours.dtype).eps)  # slow pairs count too


@given(ropes(), st.integers(2, 5000))
def test_tables_are_cosine_and_sine_of_position_times_frequency(rope, length):
    ours = built(rope)
    frequencies = torch.tensor(ours.frequencies)
    plain = torch.arange(length).float().unsqueeze(1) * frequencies
    angles = torch.arange(length).double().unsqueeze(1) * frequencies.double()
    amplitude = getattr(ours, "amplitude", 1.0)
    for table, turn in zip(ours.rotation([range(length)], CPU), (torch.cos, torch.sin), strict=True):
        assert table.dtype == torch.float32
        assert_precision(table, amplitude * turn(plain), amplitude * turn(angles))


@given(ropes(kinds=["yarn"]), st.sampled_from([0.5, 1, 6.0]), st.sampled_from([None, 0.7, 1.0]), st.booleans())
def test_yarn_makes_q_and_k_longer_by_a_tenth_of_the_logarithm_of_the_growth(rope, factor, mscale, is_given):
    rope.scaling |= {"factor": factor, "mscale": mscale, "mscale_all_dim": 0.3}
    expected = 1 + 0.1 * math.log(max(1.0, factor))  # [YaRN eq. 22]
    if mscale:
        expected = (1 + mscale * (expected - 1)) / (1 + 0.3 * (expected - 1))
    if is_given:
        rope.scaling["attention_factor"] = expected = 2.5
    assert math.isclose(built(rope).amplitude, expected, rel_tol=1e-12)


@given(ropes(kinds=["default"]), st.integers(2, 100))
def test_the_default_kind_is_the_rotation_of_a_plain_llama(rope, length):
    plain = llama.Rope(tuple(llama.rope_frequencies(rope.width, rope.theta).tolist()))
    assert all(map(torch.equal, plain.rotation([range(length)], CPU), built(rope).rotation([range(length)], CPU)))


@pytest.mark.parametrize("kind", [kind for kind, keys in NUMBERS.items() if keys])
def test_every_number_that_a_kind_lacks_or_that_cannot_work_is_named(kind):
    for value in (None, "2", 0, -1.0, True, float("inf"), [], {}):
        with pytest.raises(ConfigError) as error:
            build(kind, 8, 1e4, dict.fromkeys(NUMBERS[kind], value), 16)
        for key in NUMBERS[kind]:
            assert f"{key}: found {value!r}" in str(error.value)


def test_what_a_kind_cannot_do_is_refused():
    for theta, changes, message in (
        (1.0, {}, "rope_theta: found 1.0, need more than 1"),
        (1e4, {"truncate": False}, "truncate: found False, supported is true"),
        (1e4, {"beta_slow": 33}, "beta_fast: found 32, need at least beta_slow, 33"),
        (1e4, {"mscale": "one"}, "mscale: found 'one', need a number above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            build("yarn", 8, theta, {"factor": 2.0, **changes}, 16)
    with pytest.raises(ConfigError, match=r"'dynamic' is not supported.*default.*linear.*llama3.*yarn"):
        build("dynamic", 8, 1e4, {"factor": 2.0}, 16)
