"""A tolerance that no mistake exceeds proves nothing: each known mistake must use ten times what is allowed."""

from dataclasses import replace

import pytest

from minilora.testing import laws
from minilora.testing.catalogue import CATALOGUE
from minilora.testing.lora_laws import linear_cases
from tests.models import matrix
from tests.test_catalogue import most_used


def used_by(mistake, kind, dtype):
    """How much of a bound the outputs and gradients of a layer use, in the worst case."""
    cases = linear_cases("dora" if kind == "dora" else "lora", dtype, kind == "rslora")
    return max(most_used(replace(laws(kind)[name], cases=cases), mistake) for name in ("forward", "gradients"))


@matrix(3, dtype=("float64", "float32", "float16", "bfloat16"), kind=("lora", "rslora", "dora"))
def test_a_mistake_of_a_layer_exceeds_the_bound_in_some_case(kind, dtype):
    """Tenfold, but of the norm of DoRA in bfloat16, whose bounds are as wide as its many roundings."""
    least = 4 if (kind, dtype) == ("dora", "bfloat16") else 10
    for name, mistake in CATALOGUE[kind].items():
        if used_by(mistake, kind, "float64") > 1 and "bfloat16" not in name:
            assert used_by(mistake, kind, dtype) > least, name


@pytest.mark.parametrize("kind", [kind for kind in CATALOGUE if kind not in ("lora", "rslora", "dora")])
def test_a_mistake_exceeds_the_bound_of_a_law_tenfold(kind):
    for name, mistake in CATALOGUE[kind].items():
        assert any(most_used(law, mistake) > 10 for law in laws(kind).values()), name
