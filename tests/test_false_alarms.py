"""The public checks raise no false alarm: drawn cases of right implementations, with `--examples 10000` very many."""

from contextlib import suppress
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minilora.cli.selftest import implementations as ours
from minilora.testing import (
    AbsmaxVector,
    AdaptedModel,
    AdapterSum,
    Chat,
    Lengths,
    MaskedLogits,
    MicroBatches,
    NF4Weight,
    NotApplicable,
    QuantizedLinear,
    laws,
)
from minilora.testing.cases import MODES
from minilora.testing.nf4_cases import DrawnKind
from minilora.testing.strategies import WEIGHT_KINDS, adapted_linears, seeds
from tests import by_hand, right_layers
from tests.test_catalogue import CORRECT
from tests.test_lifecycle_laws import TAKEN
from tests.test_sequence_laws import PACKED, decoder

DTYPES = ("float64", "float32", "bfloat16")
OWN_CASES = (
    "views",
    "16-bit",
    "4-bit",
    "rslora",
    "shapes",
    "dropout",
    "no_labels",
    "roles",
)  # laws that hold for theirs


def layers(kind):
    method = "dora" if "dora" in kind else "lora"
    drawn = adapted_linears(methods=(method,), dtypes=DTYPES, weights=WEIGHT_KINDS)
    drawn = drawn.filter(lambda case: (case.method, case.weight) != ("dora", "tiny"))  # norms ≥ 1e-38 here
    return drawn.map(
        lambda case: replace(case, use_rslora=kind == "rslora", has_magnitude=case.seed % 2 == 0 or kind != "dora")
    )


@st.composite
def rows(draw, length, count):
    width = draw(st.integers(*length))
    return tuple(draw(st.lists(st.text("x.", min_size=width, max_size=width), min_size=1, max_size=count)))


texts = st.text(max_size=20) | st.sampled_from(("<|", "|>", "assistant", "user:", "</s>"))  # words of templates


@st.composite
def chats(draw):
    """Perhaps a system message, then turns of user and assistant, and perhaps a second reply."""
    roles = ["user", "assistant"] * draw(st.integers(1, 4))
    if draw(st.booleans()):
        roles = ["system", *roles]
    if draw(st.booleans()):
        roles.append("assistant")
    return Chat(tuple((role, draw(texts)) for role in roles))


sizes = st.integers(1, 9)
adapters = st.fixed_dictionaries(
    {
        "r": sizes,
        "lora_alpha": st.floats(0.5, 40),
        "target_modules": st.lists(st.sampled_from(("q_proj", "up_proj", "down_proj", "lm_head")), min_size=1),
        "use_rslora": st.booleans(),
        "modules_to_save": st.sampled_from(([], ["norm"])),
        "rank_pattern": st.dictionaries(st.sampled_from(("q_proj", "layers.1.up_proj")), sizes),
    }
)


def models(*names):
    return st.builds(AdaptedModel, st.fixed_dictionaries(dict.fromkeys(names, adapters)), seeds)


kinds = st.sampled_from([kind for literal in get_args(DrawnKind) for kind in get_args(literal)])
groups = st.lists(rows((2, 8), 2), min_size=1, max_size=4).map(lambda groups: (("xx",), *groups))
batches = st.builds(MicroBatches, groups, st.integers(1, 5), st.integers(2, 9), seeds, st.sampled_from(DTYPES[:2]))
CASES = {
    **{kind: layers(kind) for kind in ("lora", "rslora", "dora", "merge", "merge_dora")},
    "adapter_sum": st.builds(AdapterSum, sizes, sizes, st.lists(sizes, min_size=1, max_size=4).map(tuple), seeds),
    "nf4": st.builds(NF4Weight, sizes, st.integers(1, 200), kind=kinds, seed=seeds),
    "loss_masking": st.builds(
        MaskedLogits,
        rows((2, 12), 4),
        st.integers(2, 17),
        st.sampled_from((0.1, 3.0, 1e4)),
        seeds,
        st.sampled_from(DTYPES),
    ),
    **dict.fromkeys(("accumulation", "ranks"), batches),
    "linear4bit": st.builds(
        QuantizedLinear,
        st.lists(st.integers(0, 3), max_size=3).map(tuple),
        st.integers(1, 150),
        sizes,
        st.booleans(),
        seeds,
        st.sampled_from(("float32", "bfloat16")),  # float16 overflows
        st.booleans(),
        kinds,
        st.sampled_from(list(MODES)),
    ),
    "double_quant": st.builds(
        AbsmaxVector,
        st.integers(1, 600),
        st.sampled_from(("normal", "constant", "outlier", "huge_ratio")),
        seeds,
        power=st.integers(-30, 20),
    ),
    **dict.fromkeys(
        ("packing", "generation"),
        st.builds(
            Lengths,
            st.lists(st.integers(1, 12), min_size=2, max_size=6).map(tuple),
            seeds,
            st.integers(1, 9),
            st.booleans(),
        ),
    ),
    "chat_mask": chats(),
    "roundtrip": models("default"),
    "adapters": models("a", "ab", "b"),
    "merge_cycle": layers("lora"),
}
HAND = {kind: take(by_hand) for kind, take in TAKEN.items()}
RIGHT = [
    (kind, each[kind])
    for each in (ours(torch.device("cpu")), CORRECT, {"packing": PACKED, "generation": decoder("")}, HAND)
    for kind in each
    if kind in CASES
]
RIGHT += [
    pytest.param(kind, make, marks=pytest.mark.long) for kind in right_layers.RIGHT for make in right_layers.RIGHT[kind]
]


@pytest.mark.parametrize(
    ("kind", "implementation"), RIGHT, ids=lambda each: each if isinstance(each, str) else getattr(each, "__name__", "")
)
@given(data=st.data())
def test_of_right_implementations(kind, implementation, data):
    """Each way of comparing once."""
    case, left_out = data.draw(CASES[kind]), OWN_CASES
    if kind == "nf4" and case.kind == "tiny":  # of denormal blocks any code is right
        left_out += ("ties",)
    found = {name: law for name, law in laws(kind).items() if name not in left_out}
    if kind == "loss_masking" and not case.is_predicted.any():
        found = {"no_labels": laws("loss_masking")["no_labels"]}
    for law in {law.compare: law for law in found.values() if type(law.cases[0]) is type(case)}.values():
        with suppress(NotApplicable):
            law.check(implementation, case)
