"""Hypothesis strategies: shapes, adapted layers, hard weights, 4-bit blocks, conversations, configs, and files.

They need the extra `testing`; nothing else of `minilora.testing` does.
"""

from __future__ import annotations

import json
from typing import Any, get_args

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from minilora.testing.cases import SCALES, AdaptedLinear, Method, WeightKind, hard_weight
from minilora.testing.compare import Array

WEIGHT_KINDS: tuple[WeightKind, ...] = get_args(WeightKind)
METHODS: tuple[Method, ...] = get_args(Method)
seeds = st.integers(0, 2**32 - 1)
MASK_TOKENS = ("<|", "|>", "assistant", "user:", "</s>")  # words of templates, which a message may contain, too


@st.composite
def adapted_linears(
    draw: DrawFn,
    max_size: int = 9,
    max_rank: int = 8,
    methods: tuple[Method, ...] = ("lora",),
    dtypes: tuple[str, ...] = ("float64",),
    weights: tuple[WeightKind, ...] = ("normal",),
    use_rslora: SearchStrategy[bool] = st.just(False),  # noqa: B008  # strategies are immutable
) -> AdaptedLinear:
    """Draw a linear layer with an adapter: sizes from 1, with and without a bias, a scale that is never 1."""
    return AdaptedLinear(
        method=draw(st.sampled_from(methods)),
        lead=tuple(draw(st.lists(st.integers(0, 3), max_size=2))),
        inner=draw(st.integers(1, max_size)),
        outer=draw(st.integers(1, max_size)),
        r=draw(st.integers(1, max_rank)),
        scale=draw(st.sampled_from(SCALES)),
        has_bias=draw(st.booleans()),
        seed=draw(seeds),
        dtype=draw(st.sampled_from(dtypes)),
        weight=draw(st.sampled_from(weights)),
        use_rslora=draw(use_rslora),
    )


@st.composite
def weights(draw: DrawFn, max_size: int = 200, kinds: tuple[WeightKind, ...] = WEIGHT_KINDS) -> Array:
    """Draw a weight (rows, columns) in float32 of one of the hard kinds."""
    rng = np.random.default_rng(draw(seeds))
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, max_size))
    return hard_weight(draw(st.sampled_from(kinds)), rng, rows, columns).astype(np.float32)


@st.composite
def nf4_blocks(draw: DrawFn, block_size: int = 64) -> Array:
    """Draw one to three blocks of weights in float32, the last of them often incomplete, some with zeros alone."""
    n, rng = draw(st.integers(1, 3 * block_size)), np.random.default_rng(draw(seeds))
    block = hard_weight(draw(st.sampled_from(WEIGHT_KINDS)), rng, 1, n).astype(np.float32)[0]
    return block * draw(st.sampled_from((0, 1)))


@st.composite
def conversations(draw: DrawFn, max_turns: int = 4) -> list[dict[str, str]]:
    """Draw messages: perhaps a system message, then turns of user and assistant, of any text."""
    text = st.text(max_size=20) | st.sampled_from(MASK_TOKENS)
    has_system: bool = draw(st.booleans())
    messages = [{"role": "system", "content": draw(text)}] if has_system else []
    for _ in range(draw(st.integers(1, max_turns))):
        messages += [{"role": "user", "content": draw(text)}, {"role": "assistant", "content": draw(text)}]
    return messages


@st.composite
def adapter_configs(draw: DrawFn) -> dict[str, Any]:
    """Draw the content of an `adapter_config.json` of LoRA, as PEFT writes it."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    targets = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    patterned = st.dictionaries(st.sampled_from(targets), st.integers(1, 64), max_size=2)
    return {
        "peft_type": "LORA",
        "task_type": draw(st.sampled_from(("CAUSAL_LM", None))),
        "r": draw(st.integers(1, 64)),
        "lora_alpha": draw(st.integers(1, 128)),
        "lora_dropout": draw(st.sampled_from((0.0, 0.05, 0.5))),
        "target_modules": targets,
        "rank_pattern": draw(patterned),
        "alpha_pattern": draw(patterned),
        "use_rslora": draw(st.booleans()),
        "use_dora": draw(st.booleans()),
        "bias": draw(st.sampled_from(("none", "all", "lora_only"))),
        "modules_to_save": None,
    }


@st.composite
def safetensors_files(draw: DrawFn, mutated: bool = False) -> bytes:
    """Draw the bytes of a safetensors file: eight bytes with the header's length, the header in JSON, and the numbers.

    A mutated one has a byte changed, is cut short, or says something wrong in its header.
    """
    shapes = draw(st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=4))
    header: dict[str, Any] = {}
    end = 0
    for number, shape in enumerate(shapes):
        begin, end = end, end + 4 * int(np.prod(shape))
        header[f"layer.{number}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    is_header_wrong: bool = draw(st.booleans())
    if mutated and header and is_header_wrong:
        entry = header[draw(st.sampled_from(sorted(header)))]
        key = draw(st.sampled_from(sorted(entry)))
        wrong = [-1, 2**62, [end, 0], [2**40], "F33", None, {}, [[1]], 1.5]
        entry[key] = draw(st.sampled_from(wrong))
    encoded = json.dumps(header).encode()
    content = np.random.default_rng(draw(seeds)).standard_normal(end // 4).astype("<f4").tobytes()
    whole = bytearray(len(encoded).to_bytes(8, "little") + encoded + content)
    if mutated:
        where = draw(st.integers(0, len(whole) - 1))
        if draw(st.booleans()):
            return bytes(whole[:where])
        whole[where] ^= draw(st.integers(1, 255))
    return bytes(whole)


def lora_shapes(max_size: int = 9, max_rank: int = 8) -> SearchStrategy[tuple[int, int, int]]:
    """Draw (in, out, r)."""
    return st.tuples(st.integers(1, max_size), st.integers(1, max_size), st.integers(1, max_rank))
