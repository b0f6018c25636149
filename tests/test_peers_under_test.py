"""The page of the checks of other libraries: what is registered, and what is written of what was found."""

import pytest

from benchmarks.peer_table import KINDS, MODULES, PEERS, Entry
from benchmarks.peers_under_test import check_entry, page


def run(states, results=()):
    return {"states": {peer: states.get(peer, "(No module)") for peer in MODULES}, "results": list(results)} | {
        "kinds": list(KINDS),
        "python": "Python 3",
    }


def result(law, verdict, **more):
    return {"peer": "peft", "kind": "lora", "what": "lora.Linear", "law": law, "verdict": verdict} | more


def test_every_entry_is_of_a_known_peer_and_kind_and_no_two_are_called_alike():
    assert {entry.peer for entry in PEERS} == set(MODULES)
    assert {entry.kind for entry in PEERS} == set(KINDS)
    assert len({(entry.peer, entry.kind, entry.what) for entry in PEERS}) == len(PEERS)


def test_a_law_that_does_not_apply_is_not_counted():
    own = [result("forward", "passes", ratio=0.25), result("dropout", "does not apply", message="no dropout")]
    assert "| peft | 1.0 | lora.Linear: 1 of 1 (0.25) |" in page([run({"peft": "1.0"}, own)])


def test_a_failure_is_in_the_table_by_its_cause_and_below_in_full():
    text = page([run({"peft": "1.0"}, [result("forward", "fails", message="y is wrong | 3", causes=["no scale"])])])
    assert "lora.Linear: **0 of 1**" in text
    assert "| peft | lora.Linear | lora-forward | no scale |" in text
    assert "### peft, lora.Linear: lora-forward\n\n```text\ny is wrong | 3\n```" in text


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
