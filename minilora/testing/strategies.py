"""A Hypothesis strategy of adapted layers; it needs the extra `testing`, as nothing else of `minilora.testing` does."""

from typing import get_args

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from minilora.testing.cases import MODES, SCALES, AdaptedLinear, LayerKind, Method, WeightKind

WEIGHT_KINDS: tuple[LayerKind, ...] = (*get_args(WeightKind), "tiny_update", "small")
seeds = st.integers(0, 2**32 - 1)


@st.composite
def adapted_linears(
    draw: DrawFn,
    max_rank: int = 8,
    methods: tuple[Method, ...] = ("lora",),
    dtypes: tuple[str, ...] = ("float64",),
    weights: tuple[LayerKind, ...] = ("normal",),
) -> AdaptedLinear:
    """Draw a linear layer with an adapter: sizes from 1, with and without a bias, a scale that is never 1, any mode."""
    return AdaptedLinear(
        method=draw(st.sampled_from(methods)),
        lead=tuple(draw(st.lists(st.integers(0, 3), max_size=2))),
        inner=draw(st.integers(1, 9)),
        outer=draw(st.integers(1, 9)),
        r=draw(st.integers(1, max_rank)),
        scale=draw(st.sampled_from(SCALES)),
        has_bias=draw(st.booleans()),
        seed=draw(seeds),
        dtype=draw(st.sampled_from(dtypes)),
        weight=draw(st.sampled_from(weights)),
        mode=draw(st.sampled_from(list(MODES))),
    )
