"""A tolerance that no mistake exceeds proves nothing: each known mistake must use ten times what is allowed."""

from contextlib import suppress

import pytest
import torch

from minilora import llama
from minilora.llama import causal_attention
from minilora.testing import NotApplicable, laws
from minilora.testing.catalogue import CATALOGUE
from minilora.testing.compare import maths
from minilora.testing.lora_laws import linear_cases
from tests import reference_model
from tests.models import matrix, randn


def most_used(mistake, kind, dtype):
    """How much of a bound the outputs and gradients of a layer use, in the worst case."""
    compared = [laws(kind)[name].compare for name in ("forward", "gradients")]
    cases = linear_cases("dora" if kind == "dora" else "lora", dtype, kind == "rslora")
    return max(each.verdict[0] for compare in compared for case in cases for each in compare(mistake, case))


@matrix(3, dtype=("float64", "float32", "float16", "bfloat16"), kind=("lora", "rslora", "dora"))
def test_a_mistake_of_a_layer_exceeds_the_bound_in_some_case(kind, dtype):
    """Tenfold, but of the norm of DoRA in bfloat16, whose bounds are as wide as its many roundings."""
    least = 4 if (kind, dtype) == ("dora", "bfloat16") else 10
    for name, mistake in CATALOGUE[kind].items():
        if most_used(mistake, kind, "float64") > 1:
            assert most_used(mistake, kind, dtype) > least, name


def exceeds_tenfold(law, mistake, case):
    with suppress(NotApplicable):
        return any(each.verdict[0] > 10 for each in law.comparisons(mistake, case))


@pytest.mark.parametrize("kind", [kind for kind in CATALOGUE if kind not in ("lora", "rslora", "dora")])
def test_a_mistake_exceeds_the_bound_of_a_law_tenfold(kind):
    for name, mistake in CATALOGUE[kind].items():
        tried = ((law, case) for law in laws(kind).values() for case in law.cases)
        assert any(exceeds_tenfold(law, mistake, case) for law, case in tried), name


WHERE = [3, 4], [3, 4]
Q, KEYS, VALUES = randn(1, 7, 4, 4), randn(2, 7, 2, 4), randn(3, 7, 2, 4)
X, WEIGHT, EPS, GATE, UP = randn(4, 5, 5), randn(5, 5), 1e-3, randn(6, 5, 5), randn(7, 5, 5)
HEADS, ANGLES = randn(8, 5, 2, 6), randn(9, 5, 3)
COS, SIN = ANGLES.cos(), ANGLES.sin()
RIGHT = {
    "attention": reference_model.causal_attention(Q.numpy(), KEYS.numpy(), VALUES.numpy(), *WHERE, 2),
    "rms_norm": reference_model.rms_norm(X.numpy(), WEIGHT.numpy(), EPS),
    "swiglu": reference_model.swiglu(GATE.numpy(), UP.numpy()),
    "rotate": reference_model.rotate(HEADS.numpy(), COS.numpy(), SIN.numpy()),
}
WRONG = {
    "attention: mask shifted": causal_attention(Q, KEYS, VALUES, *WHERE, window=1),
    "attention: window too wide": causal_attention(Q, KEYS, VALUES, *WHERE, window=3),
    "attention: no window": causal_attention(Q, KEYS, VALUES, *WHERE),
    "attention: one document": causal_attention(Q, KEYS, VALUES, [7], [7], window=2),
    "attention: not divided by the root of E": causal_attention(2 * Q, KEYS, VALUES, *WHERE, window=2),
    "attention: heads in the wrong order": causal_attention(Q, KEYS.flip(1), VALUES.flip(1), *WHERE, window=2),
    "rms_norm: columns": WEIGHT * X * torch.rsqrt(X.square().mean(0) + EPS),
    "rms_norm: no eps": llama.rms_norm(X, WEIGHT, 0.0),
    "rms_norm: the mean is subtracted": llama.rms_norm(X - X.mean(-1, keepdim=True), WEIGHT, EPS),
    "swiglu: gate and up exchanged": llama.swiglu(UP, GATE),
    "rotate: backwards": llama.rotate(HEADS, COS, -SIN),
    "rotate: neighbouring pairs": llama.rotate(HEADS[..., [0, 2, 4, 1, 3, 5]], COS, SIN)[..., [0, 3, 1, 4, 2, 5]],
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_of_the_decoder_exceeds_what_two_float64_computations_may_differ_by(mistake):
    assert maths(WRONG[mistake], RIGHT[mistake.partition(":")[0]]) > 10
