"""Adapters combined: against brute force in float64 on the full matrices, which ours never forms where it need not."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from minilora import ConfigError, ShapeError
from minilora.adapters.combine import (
    IN_RECIPE,
    CombinationType,
    CombineConfig,
    Factors,
    best_factors,
    combine,
)
from minilora.errors import in_recipe
from minilora.testing import reference
from minilora.testing.compare import assert_maths, relative
from tests.models import best_of_rank, randn, scales, seeds, sizes

TYPES = get_args(CombinationType)
weights = st.sampled_from([-2.0, -1.0, -0.3, 0.3, 0.7, 3.0])
several = st.lists(st.tuples(sizes, scales, weights), min_size=1, max_size=4)


def draw_factors(seed, outer, inner, ranks, scale):
    drawn = enumerate(zip(ranks, scale, strict=True))
    return [Factors(randn(seed + 2 * i, r, inner), randn(seed + 2 * i + 1, outer, r), s) for i, (r, s) in drawn]


def delta(factors):
    """s·B A by the loops of the oracle."""
    A, B = factors.lora_A.numpy(), factors.lora_B.numpy()
    return torch.from_numpy(reference.lora_merged_weight(np.zeros((len(B), A.shape[1])), A, B, factors.scale))


def weighted_sum(parts, weights):
    return sum(weight * delta(part) for part, weight in zip(parts, weights, strict=True))


def one_module(parts, weights, kind="cat", **options):
    """The combination of adapters of a single module."""
    return combine([{"m": part} for part in parts], weights, CombineConfig(kind, **options))["m"]


def product(cut):
    assert cut.factors.scale == 1
    return delta(cut.factors)


def assert_told(cut, lost, total):
    assert_maths(torch.tensor([cut.lost, cut.total], dtype=torch.float64), [float(lost), float(total)])


@given(seeds, sizes, sizes, several)
def test_adapters_add_by_concatenating_ranks(seed, outer, inner, drawn):
    ranks, scale, w = zip(*drawn, strict=True)
    parts = draw_factors(seed, outer, inner, ranks, scale)
    found = one_module(parts, w)
    assert found.factors.lora_A.shape == (sum(ranks), inner)
    assert found.factors.lora_B.shape == (outer, sum(ranks))
    assert_maths(product(found), weighted_sum(parts, w))


@pytest.mark.parametrize("kind", TYPES)
@given(seed=seeds, outer=sizes, inner=sizes, r=sizes, scale=scales)
def test_a_weight_of_minus_one_takes_an_adapter_away(kind, seed, outer, inner, r, scale):
    (part,) = draw_factors(seed, outer, inner, [r], [scale])
    plus, minus = (one_module([part], [w], kind) for w in (1, -1))
    assert_maths(product(minus), -product(plus))


@pytest.mark.parametrize("kind", TYPES)
def test_a_module_that_some_adapters_have_is_that_of_those_alone(kind):
    first, second, third = draw_factors(5, 6, 7, [3, 3, 3], [2.0, 0.5, 7.0])
    found = combine([{"a": first, "b": second}, {"b": third, "c": first}], [0.7, -0.3], CombineConfig(kind))
    assert list(found) == ["a", "b", "c"]
    expected = {"a": ([first], [0.7]), "b": ([second, third], [0.7, -0.3]), "c": ([first], [-0.3])}
    for path, (parts, w) in expected.items():
        assert_maths(product(found[path]), product(one_module(parts, w, kind)))


@given(seeds, sizes, sizes, st.integers(1, 12))
def test_no_matrix_of_a_rank_is_nearer_than_the_best_and_the_error_is_what_is_told(seed, outer, inner, rank):
    """Both factors are of one size."""
    wanted = randn(seed, outer, inner)
    cut = best_factors(wanted, rank)
    (A, B, _), found, (expected, sigma) = cut.factors, product(cut), best_of_rank(wanted, rank)
    assert A.shape == (min(rank, len(sigma)), inner)
    assert_maths(A.norm(dim=1), B.norm(dim=0))
    assert_maths(found, expected)
    assert_told(cut, sum(sigma[rank:] ** 2), wanted.square().sum())
    error = (wanted - found).square().sum()
    assert abs(error - cut.lost) <= 1e-11 * cut.total
    for other in range(3):  # near it and far from it
        near = B + 10.0**-other * randn(seed + other, *B.shape)
        rival = near @ A if other else randn(seed + 3, outer, 1) @ randn(seed + 4, 1, inner)
        assert (wanted - rival).square().sum() >= error


@given(seeds, sizes, sizes, several, st.integers(1, 12))
def test_compressing_the_thin_factors_is_the_best_cut_of_their_sum(seed, outer, inner, drawn, rank):
    ranks, scale, w = zip(*drawn, strict=True)
    parts = draw_factors(seed, outer, inner, ranks, scale)
    expected, sigma = best_of_rank(weighted_sum(parts, w), rank)
    assume(rank >= len(sigma) or sigma[rank - 1] > 1.001 * sigma[rank] or sigma[rank] < 1e-9 * sigma[0])
    found = one_module(parts, w, "svd", svd_rank=rank)
    assert relative(product(found), expected, 1e-9) <= 1
    assert found.factors.lora_A.size(0) == min(rank, outer, inner, sum(ranks))
    assert abs(found.lost - sum(sigma[rank:] ** 2)) <= 1e-11 * found.total


def test_cutting_forms_no_matrix_of_the_weight_s_size():
    parts = [Factors(randn(i, 2, 100_000), randn(i, 200_000, 2), 0.5) for i in range(2)]  # 160 GB in full
    found = one_module(parts, [0.7, 0.3], "svd")
    assert found.factors.lora_A.shape == (2, 100_000)
    assert 0 < found.lost < found.total


def test_an_update_of_zeros_stays_one():
    zero = Factors(torch.zeros(3, 5), torch.ones(4, 3))
    found = one_module([zero, zero], [1, 1], "svd", svd_rank=2)
    assert (found.lost, found.total) == (0, 0)
    assert not product(found).any()


@given(seeds, sizes, sizes, sizes, several)
def test_linear_adds_the_as_and_the_bs(seed, outer, inner, r, drawn):
    _, scale, w = zip(*drawn, strict=True)
    parts = draw_factors(seed, outer, inner, [r] * len(w), scale)
    found = one_module(parts, w, "linear").factors
    shares = [weight * s for weight, s in zip(w, scale, strict=True)]
    pairs = list(zip(shares, parts, strict=True))
    assert_maths(found.lora_A, sum(np.sign(share) * abs(share) ** 0.5 * part.lora_A for share, part in pairs))
    assert_maths(found.lora_B, sum(abs(share) ** 0.5 * part.lora_B for share, part in pairs))


@pytest.mark.parametrize("kind", TYPES)
def test_low_precision_is_widened_before_anything_is_multiplied(kind):
    parts = [Factors(A.bfloat16(), B.bfloat16(), s) for A, B, s in draw_factors(3, 6, 7, [2, 2], [2.0, 0.5])]
    wide = [Factors(A.double(), B.double(), s) for A, B, s in parts]
    found, exact = (one_module(each, [0.7, -0.3], kind).factors for each in (parts, wide))
    assert found.lora_A.dtype == found.lora_B.dtype == torch.float32
    ours = found.lora_B.double() @ found.lora_A.double()
    assert relative(ours, exact.lora_B @ exact.lora_A, 1e-5) <= 1


def test_what_went_in_is_as_it_was():
    parts = draw_factors(3, 6, 7, [2, 2], [2.0, 0.5])
    before = [(A.clone(), B.clone()) for A, B, _ in parts]
    for kind in TYPES:
        one_module(parts, [0.7, -0.3], kind)
    assert all(torch.equal(A, C) and torch.equal(B, D) for (A, B, _), (C, D) in zip(parts, before, strict=True))


def test_linear_needs_one_rank_and_says_what_does_not():
    parts = draw_factors(3, 6, 7, [2, 3], [2.0, 0.5])
    with pytest.raises(ShapeError, match=r"m: 'linear' needs adapters of one rank, found \[2, 3\]; cat and"):
        one_module(parts, [1, 1], "linear")


@pytest.mark.parametrize("w", [[], [1.0], [1.0, 2.0, 3.0], [1.0, math.nan], [1.0, math.inf]])
def test_each_adapter_needs_a_weight_that_is_a_number(w):
    parts = [{"m": part} for part in draw_factors(3, 6, 7, [2, 2], [2.0, 0.5])]
    with pytest.raises(ConfigError, match="need a finite weight for each of the 2 adapters"):
        combine(parts, w)
    with pytest.raises(ConfigError):
        combine([], [])


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"combination_type": "sum"}, r"combination_type is 'sum', need one of \['cat'"),
        ({"svd_rank": 4}, "svd_rank: without effect; 'cat' cuts nothing"),
        ({"combination_type": "svd", "svd_rank": 0}, "svd_rank is 0"),
        *(({"combination_type": kind}, f"{kind}'; {in_recipe('ties_and_dare')}$") for kind in IN_RECIPE),
    ],
)
def test_options_that_cannot_work_or_do_nothing_are_refused(options, phrase):
    with pytest.raises(ConfigError, match=phrase):
        CombineConfig(**options)


def test_what_drops_numbers_is_a_recipe():
    with pytest.raises(TypeError, match=f"{in_recipe('ties_and_dare')}$"):
        CombineConfig("svd", density=0.5)
