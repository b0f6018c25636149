"""The public checks refuse every planted mistake of the catalogue, and pass what it is planted in."""

import copy
import json
from contextlib import suppress

import numpy as np
import pytest
from safetensors.numpy import save_file

from minilora.testing import CheckFailure, NotApplicable, implementations, laws
from minilora.testing.mutants import MUTANTS

CORRECT = {
    "lora": implementations.LoRALayer,
    "dora": implementations.DoRALayer,
    "merge": implementations.merge,
    "adapter_sum": implementations.add_adapters,
    "nf4": (implementations.nf4_quantize, implementations.nf4_dequantize),
    "double_quant": (implementations.double_quantize, implementations.double_dequantize),
    "linear4bit": implementations.Linear4bit,
    "loss_masking": implementations.masked_loss,
    "accumulation": implementations.accumulated_gradient,
    "chat_mask": implementations.render_chat,
    "adapter_directory": implementations.adapter_files(),
}
LAWS = {kind: laws(kind).values() for kind in CORRECT}  # of each kind, those that its mistakes may break
LAWS["lora"] = laws("lora", "rslora").values()
LAWS["merge"] = laws("merge", "merge_dora").values()
TRIED = [
    pytest.param(mutant, id=f"{mutant.kind}: {mutant.name}", marks=() if i % 16 == 0 else pytest.mark.long)
    for i, mutant in enumerate(MUTANTS)
]


@pytest.mark.parametrize("kind", CORRECT)
def test_the_correct_implementation_keeps_every_law(kind, tmp_path):
    for law in LAWS[kind]:
        with suppress(NotApplicable):
            assert law.check(checked(kind, CORRECT[kind], tmp_path)).ratio <= 1


def checked(kind, implementation, folder):
    """What a law is given: of an adapter's directory its path."""
    if kind == "adapter_directory":
        (folder / "adapter_config.json").write_text(json.dumps(implementation["config"]), encoding="utf-8")
        tensors = {name: np.ascontiguousarray(array) for name, array in implementation["tensors"].items()}
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder
    return implementation


def is_refused(planted, law):
    try:
        law.check(planted)
    except CheckFailure:
        return True
    except NotApplicable:
        return False
    return False


@pytest.mark.parametrize("mutant", TRIED)
def test_a_law_refuses_a_planted_mistake(mutant, tmp_path):
    planted = checked(mutant.kind, mutant.plant(copy.deepcopy(CORRECT[mutant.kind])), tmp_path)
    assert any(is_refused(planted, law) for law in LAWS[mutant.kind])


def test_the_catalogue_has_forty_mistakes_with_names_of_their_own():
    names = [(mutant.kind, mutant.name) for mutant in MUTANTS]
    assert len(names) == len({*names}) >= 40
