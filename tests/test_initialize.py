"""Start values: what they are, that they change nothing, and that decompositions are the ones they are said to be."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minilora import ConfigError, TrainingError
from minilora.adapter import adapter_layers, adapter_tensors, attach_lora
from minilora.adapters.initialize import factors_from_weight, gaussian_factors
from minilora.lora import initial_factors
from minilora.testing.compare import assert_maths, relative
from tests.models import best_of_rank, default_dtype, generator, randn, scales, seeds, sizes, tiny_model

MOVED = ("pissa", "olora")


def drawn(kind, r, inner, outer, seed=0):
    """A and B of a new adapter."""
    if kind is True:
        return initial_factors(r, inner, outer, generator(seed)).values()
    return gaussian_factors((r, inner), (outer, r), generator(seed), kind == "embedding")


@pytest.mark.parametrize(
    ("kind", "variance", "kurtosis"), [(True, 1 / (3 * 400), 9 / 5), ("gaussian", 1 / 64**2, 3), ("embedding", 1, 3)]
)
def test_of_a_new_adapter_one_factor_is_zero_and_the_other_drawn_around_it(kind, variance, kurtosis):
    """The default uniformly, the others from a normal distribution; mean and variance are within 6 σ."""
    lora_A, lora_B = drawn(kind, 64, 400, 30)
    assert (lora_A.shape, lora_B.shape) == ((64, 400), (30, 64))
    assert lora_A.dtype == lora_B.dtype == torch.float32
    zero, values = (lora_A, lora_B) if kind == "embedding" else (lora_B, lora_A)
    assert not zero.any()
    assert values.all()
    n = values.numel()
    assert abs(values.mean()) < 6 * math.sqrt(variance / n)
    assert abs(values.square().mean() / variance - 1) < 6 * math.sqrt((kurtosis - 1) / n)
    if kind is True:
        assert 0.999 < 20 * values.abs().max() <= 1


@pytest.mark.parametrize("kind", [True, "gaussian", "embedding"])
def test_the_generator_alone_decides_what_is_drawn_and_no_default_dtype(kind):
    def draw(seed=3):
        model = tiny_model(num_hidden_layers=1)
        attach_lora(model, ["q_proj"], r=2)
        return [*drawn(kind, 4, 6, 5, seed), *adapter_tensors(adapter_layers(model), "default").values()]

    first, other = draw(), draw(4)
    with default_dtype(torch.float64):
        second = draw()
    assert [factor.dtype for factor in second] == [torch.float32] * len(first)
    assert all(map(torch.equal, first, second))
    assert not all(map(torch.equal, first[:2], other))


@st.composite
def weights(draw):
    """A weight and a rank that it has."""
    inner, outer = draw(sizes), draw(sizes)
    return randn(draw(seeds), outer, inner), draw(st.integers(1, min(inner, outer)))


@given(weights(), scales)
def test_pissa_is_the_best_approximation_of_its_rank(case, scale):
    weight, r = case
    lora_A, lora_B = factors_from_weight("pissa", weight, r, scale)
    assert_maths(scale * lora_B @ lora_A, best_of_rank(weight, r)[0])
    assert_maths(lora_A @ lora_A.T, lora_B.T @ lora_B)  # shared evenly
    assert_maths(lora_A.square().sum(1), best_of_rank(weight, r)[1][:r] / scale)


@given(weights(), scales)
def test_olora_s_b_is_orthonormal_and_b_a_are_the_first_columns_and_what_they_explain(case, scale):
    weight, r = case
    lora_A, lora_B = factors_from_weight("olora", weight, r, scale)
    assert_maths(lora_B.T @ lora_B, np.eye(r))
    assert_maths(lora_B @ lora_A[:, :r], weight[:, :r])
    first = weight[:, :r].numpy()
    assert_maths(lora_B @ lora_A, first @ np.linalg.pinv(first, rcond=1e-13) @ weight.numpy())


@pytest.mark.parametrize("kind", MOVED)
def test_factors_of_a_bfloat16_weight_are_as_good_as_in_float32_and_keep_nothing_else_alive(kind):
    weight = randn(0, 40, 30, dtype=torch.bfloat16)
    lora_A, lora_B = factors_from_weight(kind, weight, 30, 2.0)
    assert lora_A.dtype == lora_B.dtype == torch.float32
    product = lora_B @ lora_A if kind == "olora" else 2.0 * lora_B @ lora_A
    assert relative(product, weight, 2e-6) < 1
    for factor in factors_from_weight(kind, weight, 2, 2.0):
        assert factor.is_contiguous()
        assert factor.untyped_storage().nbytes() == factor.numel() * factor.element_size()


@pytest.mark.parametrize("kind", MOVED)
def test_a_rank_that_a_weight_has_not_is_refused_and_a_weight_that_is_not_finite(kind):
    with pytest.raises(ConfigError, match=f"{kind} can give a weight of 4 x 9 at most rank 4; found r = 5"):
        factors_from_weight(kind, randn(0, 4, 9), 5, 2.0)
    with pytest.raises(TrainingError, match="not finite"):
        factors_from_weight(kind, randn(0, 4, 9) * float("nan"), 2, 2.0)
