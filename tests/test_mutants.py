"""A tolerance that no mistake exceeds proves nothing: each known mistake must use ten times what is allowed."""

from contextlib import suppress

import pytest

from minilora.testing import NotApplicable, laws
from minilora.testing.catalogue import CATALOGUE
from minilora.testing.lora_laws import linear_cases
from tests.models import matrix


def most_used(mistake, kind, dtype):
    """How much of a bound the outputs and gradients of a layer use, in the worst case."""
    compared = [laws(kind)[name].compare for name in ("forward", "gradients")]
    cases = linear_cases("dora" if kind == "dora" else "lora", dtype, kind == "rslora")
    return max(result.verdict[0] for compare in compared for case in cases for result in compare(mistake, case))


@matrix(3, dtype=("float64", "float32", "float16", "bfloat16"), kind=("lora", "rslora", "dora"))
def test_a_mistake_of_a_layer_exceeds_the_bound_in_some_case(kind, dtype):
    """Tenfold, but of the norm of DoRA in bfloat16, whose bounds are as wide as its many roundings."""
    least = 4 if (kind, dtype) == ("dora", "bfloat16") else 10
    for name, mistake in CATALOGUE[kind].items():
        if most_used(mistake, kind, "float64") > 1:
            assert most_used(mistake, kind, dtype) > least, name


def exceeds_tenfold(law, mistake, case):
    with suppress(NotApplicable):
        return any(result.verdict[0] > 10 for result in law.comparisons(mistake, case))


@pytest.mark.parametrize("kind", [kind for kind in CATALOGUE if kind not in ("lora", "rslora", "dora")])
def test_a_mistake_exceeds_the_bound_of_a_law_tenfold(kind):
    for name, mistake in CATALOGUE[kind].items():
        tried = ((law, case) for law in laws(kind).values() for case in law.cases)
        assert any(exceeds_tenfold(law, mistake, case) for law, case in tried), name
