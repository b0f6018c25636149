"""Adapters that PEFT wrote, frozen in files, give the logits that PEFT computed with them."""

import pytest
from safetensors.torch import load_file

import minilora as ml
from minilora.testing.compare import PARITY, assert_parity, relative
from tests.adapters import Conv1D
from tests.golden.make_adapters import CASES, FOLDER, IDS, base_of


@pytest.mark.parametrize("case", CASES)
def test_adapters_that_peft_wrote_have_the_logits_that_peft_computed(case, tmp_path):
    model, expected = base_of(case, Conv1D), load_file(FOLDER / case / "logits.safetensors")["logits"]
    assert relative(model(IDS), expected, PARITY) > 1000  # the adapter matters
    ml.load_adapter(model, FOLDER / case)
    again = base_of(case, Conv1D)
    ml.save_adapter(model, tmp_path)
    ml.load_adapter(again, tmp_path)
    for each in (model, again):  # in float64, so that all rounding is PEFT's
        assert_parity(each.double()(IDS), expected)
    ml.merge(model)
    assert_parity(model(IDS), expected)
