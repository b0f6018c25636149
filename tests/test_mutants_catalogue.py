"""The public checks refuse every planted mistake of the catalogue, and pass what it is planted in."""

import pytest

from minilora.testing import CheckFailure, check_adapter_directory, implementations, laws
from minilora.testing.mutants import MUTANTS

CORRECT = {
    "lora": implementations.LoRALayer,
    "dora": implementations.DoRALayer,
    "merge": implementations.merge,
    "adapter_sum": implementations.add_adapters,
    "loss_masking": implementations.masked_loss,
    "accumulation": implementations.accumulated_gradient,
    "chat_mask": implementations.render_chat,
}
LAWS = {kind: laws(kind).values() for kind in CORRECT}  # of each kind, those that its mistakes may break
LAWS["lora"] = laws("lora", "rslora").values()
LAWS["merge"] = laws("merge", "merge_dora").values()
TRIED = [
    pytest.param(mutant, id=f"{mutant.kind}: {mutant.name}", marks=() if i % 12 == 0 else pytest.mark.long)
    for i, mutant in enumerate(mutant for mutant in MUTANTS if mutant.kind in CORRECT)
]


@pytest.mark.parametrize("kind", CORRECT)
def test_the_correct_implementation_keeps_every_law(kind):
    for law in LAWS[kind]:
        assert law.check(CORRECT[kind]).ratio <= 1


def is_refused(planted, law):
    try:
        law.check(planted)
    except CheckFailure:
        return True
    return False


@pytest.mark.parametrize("mutant", TRIED)
def test_a_law_refuses_a_planted_mistake(mutant):
    planted = mutant.plant(CORRECT[mutant.kind])
    assert any(is_refused(planted, law) for law in LAWS[mutant.kind])


def written(directory, files):
    implementations.write_adapter_directory(directory, files)
    return directory


def test_the_correct_files_of_an_adapter_keep_every_law(tmp_path):
    assert len(check_adapter_directory(written(tmp_path, implementations.adapter_files()))) == len(
        laws("adapter_directory")
    )


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.kind == "adapter_directory"], ids=lambda m: m.name)
def test_a_law_refuses_a_mistake_in_an_adapter_s_files(mutant, tmp_path):
    with pytest.raises(CheckFailure):
        check_adapter_directory(written(tmp_path, mutant.plant(implementations.adapter_files())))


def test_the_catalogue_has_forty_mistakes_with_names_of_their_own():
    names = [(mutant.kind, mutant.name) for mutant in MUTANTS]
    assert len(names) == len({*names}) >= 40
