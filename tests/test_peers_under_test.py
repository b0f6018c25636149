"""How the checks of other libraries judge: a mistake by its cause, an entry by the cases that it is made for."""

import pytest

from benchmarks.peer_table import PEERS, Entry
from benchmarks.peers_under_test import check_entry


def test_a_layer_with_a_mistake_fails_with_its_cause():
    def with_lost_scale(W, b, A, B, alpha):
        return lambda x: x @ (W + B @ A).T + (0 if b is None else b)

    entry = Entry("peft", "lora", with_lost_scale, "mine", only=lambda case: case.seed % 3 == 2)
    found = {each.law: each for each in check_entry(entry)}
    assert found["forward"].verdict == "fails"
    assert found["forward"].cause == "the scale is missing"
    assert found["dropout"].verdict == "does not apply"


def test_an_entry_is_checked_with_the_cases_that_it_is_made_for_alone():
    def cannot_take_a_bias(W, b, A, B, alpha):
        assert b is None
        return lambda x: x @ (W + alpha / len(A) * B @ A).T

    def verdicts(**options):
        return {
            each.law: each.verdict for each in check_entry(Entry("peft", "lora", cannot_take_a_bias, "mine", **options))
        }

    assert verdicts(only=lambda case: case.seed < 2)["forward"] == "fails"
    assert verdicts(only=lambda case: case.seed < 2 and not case.has_bias)["forward"] == "passes"
    assert verdicts(only=lambda case: False)["forward"] == "does not apply"


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["lora", "rslora", "merge", "merge_dora"])
def test_peft_passes(kind):
    pytest.importorskip("peft")
    for entry in PEERS:
        if (entry.peer, entry.kind) == ("peft", kind):
            assert {each.verdict for each in check_entry(entry)} == {"passes"}
