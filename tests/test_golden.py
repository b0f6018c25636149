"""Adapters that PEFT wrote, frozen in files, give the logits that PEFT computed with them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import minilora as ml
from minilora.adapters.layout import CONFIG_FILE
from minilora.testing.compare import PARITY, assert_parity, relative
from tests.adapters import Conv1D
from tests.golden.make_adapters import CASES, FOLDER, IDS, base_of


def test_every_case_is_there():
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(CASES)


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


@pytest.mark.parametrize(
    ("case", "change", "said"),
    [
        ("plain", {"use_dora": True}, r"use_dora: found True, and model\.layers\.0\..* has no magnitude"),
        ("dora", {"use_dora": False}, "use_dora: found False, and .* has a magnitude"),
        ("plain", {"lora_bias": True}, r"lora_bias: found True, and .* has no lora_bias"),
        ("biases", {"lora_bias": False}, r"lora_bias: found False, and .* has a lora_bias"),
        ("dora", {"bias": "lora_only"}, r"bias: found 'lora_only', and model\.layers\.0\..*q_proj has no bias"),
        ("dora", {"bias": "all"}, r"bias: found 'all', and model\.layers\.0\.self_attn\.q_proj has no bias"),
        ("plain", {"modules_to_save": ["lm_head"]}, r"modules_to_save: means lm_head, of which there is no weight"),
        ("plain", {"trainable_token_indices": [1]}, "trainable_token_indices: found .* there are no rows"),
    ],
)
def test_a_config_that_does_not_go_with_its_tensors_is_refused_by_key(case, change, said, tmp_path):
    shutil.copytree(FOLDER / case, tmp_path / case)
    path = tmp_path / case / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    model = base_of(case, Conv1D)
    before = model(IDS)
    with pytest.raises(ml.FormatError, match=said) as error:
        ml.load_adapter(model, tmp_path / case)
    assert str(path) in str(error.value)
    assert torch.equal(model(IDS), before)
