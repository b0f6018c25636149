"""Each mistake of the catalogue is refused and named, each law refuses one, and what they are made of passes."""

from contextlib import suppress

import pytest

from minilora.testing import CheckFailure, NotApplicable, implementations, laws
from minilora.testing.catalogue import CATALOGUE
from tests.planted_layers import PLANTED
from tests.test_rare_mistakes import RARE

CORRECT = {
    **dict.fromkeys(("lora", "rslora", "dora"), implementations.LoRALayer),
    **dict.fromkeys(("merge", "merge_dora"), implementations.merge),
    "adapter_sum": implementations.add_adapters,
    "nf4": (implementations.nf4_quantize, implementations.nf4_dequantize),
    "double_quant": (implementations.double_quantize, implementations.double_dequantize),
    "linear4bit": implementations.Linear4bit,
    "loss_masking": implementations.masked_loss,
    "accumulation": implementations.accumulated_gradient,
    "chat_mask": implementations.render_chat,
}
MISTAKES = [
    pytest.param(kind, name, id=f"{kind}: {name}", marks=() if i % 8 == 0 else pytest.mark.long)
    for kind in CATALOGUE
    for i, name in enumerate(CATALOGUE[kind])
]


@pytest.mark.parametrize("kind", CORRECT)
def test_the_right_implementation_keeps_every_law(kind):
    for law in laws(kind).values():
        with suppress(NotApplicable):
            assert law.check(CORRECT[kind]).ratio <= 1


@pytest.mark.parametrize(("kind", "name"), MISTAKES)
def test_a_mistake_is_refused_and_named(kind, name):
    for law in laws(kind).values():
        try:
            law.check(CATALOGUE[kind][name])
        except NotApplicable:
            continue
        except CheckFailure as failure:
            if name in failure.causes:
                return
    pytest.fail("no law refuses it by name")


def most_used(law, mistake):
    """How much of a bound a mistake uses in a law's worst case."""
    used = [0.0]
    for case in law.cases:
        with suppress(NotApplicable):
            used += [result.verdict[0] for result in law.comparisons(mistake, case)]
    return max(used)


@pytest.mark.parametrize("law", laws(*CATALOGUE).values(), ids=lambda law: law.id)
def test_a_law_refuses_a_mistake(law):
    mistakes = [mistake for table in (CATALOGUE, PLANTED, RARE) for mistake in table.get(law.kind, {}).values()]
    assert any(most_used(law, mistake) > 1 for mistake in mistakes)
