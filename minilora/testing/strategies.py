"""Hypothesis strategies: adapted layers, weights to be quantized and conversations.

They need the extra `testing`; nothing else of `minilora.testing` does.
"""

from __future__ import annotations

from typing import get_args

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from minilora.testing.cases import SCALES, AdaptedLinear, Method, WeightKind
from minilora.testing.nf4_cases import DrawnKind, NF4Weight

WEIGHT_KINDS: tuple[WeightKind, ...] = get_args(WeightKind)
METHODS: tuple[Method, ...] = get_args(Method)
seeds = st.integers(0, 2**32 - 1)
MASK_TOKENS = ("<|", "|>", "assistant", "user:", "</s>")  # words of templates, which a message may contain, too


@st.composite
def adapted_linears(
    draw: DrawFn,
    max_rank: int = 8,
    methods: tuple[Method, ...] = ("lora",),
    dtypes: tuple[str, ...] = ("float64",),
    weights: tuple[WeightKind, ...] = ("normal",),
) -> AdaptedLinear:
    """Draw a linear layer with an adapter: sizes from 1, with and without a bias, a scale that is never 1."""
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
    )


def nf4_weights() -> SearchStrategy[NF4Weight]:
    """Draw a weight of up to 9 rows in float32, to be quantized in blocks of 64."""
    kinds = [kind for literal in get_args(DrawnKind) for kind in get_args(literal)]
    return st.builds(NF4Weight, st.integers(1, 9), st.integers(1, 200), kind=st.sampled_from(kinds), seed=seeds)


@st.composite
def conversations(draw: DrawFn) -> list[dict[str, str]]:
    """Draw messages: perhaps a system message, then turns of user and assistant, of any text."""
    text = st.text(max_size=20) | st.sampled_from(MASK_TOKENS)
    has_system: bool = draw(st.booleans())
    messages = [{"role": "system", "content": draw(text)}] if has_system else []
    for _ in range(draw(st.integers(1, 4))):
        messages += [{"role": "user", "content": draw(text)}, {"role": "assistant", "content": draw(text)}]
    return messages
