"""Every planted mistake changes something that can be seen, in both of two implementations of its kind.

What is seen of a callable with a mistake is compared with what is seen of the correct one. The second correct
implementation must look the same as the first: it is the mistake that is seen, not rounding or a random draw.
"""

import collections
import inspect
import json

import pytest
import safetensors.numpy

from minilora.testing.implementations import adapter_files, write_adapter_directory
from minilora.testing.mutants import MUTANTS
from tests.observing import KINDS, distance, observe_files

CLEAR = 10  # times the tolerance, at least, is what a mistake changes
RAISES = {"a base without a bias fails", "the 4-bit layer fails without a bias", "the input gets no gradient"}


@pytest.fixture(scope="module")
def expected():
    return {kind: observe(correct) for kind, (observe, correct, _) in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_both_implementations_of_a_kind_look_the_same(kind, expected):
    observe, _, second = KINDS[kind]
    assert distance(observe(second), expected[kind]) <= 1


@pytest.mark.parametrize("number", [0, 1], ids=["first", "second"])
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.kind}: {mutant.name}")
def test_a_mistake_can_be_seen_wherever_it_is_planted(mutant, number, expected):
    observe, *correct = KINDS[mutant.kind]
    wrong = mutant.plant(correct[number])
    if mutant.name in RAISES:
        with pytest.raises((AttributeError, RuntimeError)):
            observe(wrong)
    else:
        assert distance(observe(wrong), expected[mutant.kind]) >= CLEAR


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_layer_with_a_mistake_takes_the_options_of_the_correct_one(kind):
    options = set(inspect.signature(KINDS[kind][1]).parameters)
    for mutant in MUTANTS:
        if mutant.kind == kind:
            assert set(inspect.signature(mutant.plant(KINDS[kind][1])).parameters) == options, mutant.name


def test_names_are_unique_and_every_kind_has_mistakes():
    counts = collections.Counter(mutant.kind for mutant in MUTANTS)
    assert set(counts) == set(KINDS)
    assert min(counts.values()) >= 10
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_an_adapter_directory_is_written_as_it_is_given(tmp_path):
    files = adapter_files()
    write_adapter_directory(tmp_path, files)
    read = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert observe_files({"config": config, "tensors": read}) == observe_files(files)
