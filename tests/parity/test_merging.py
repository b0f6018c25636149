"""Directories that we merge open in transformers, and compute what the adapted model does."""

import pytest
import torch

import minilora as ml
from minilora.testing.compare import assert_parity
from minilora.tools.merging import Merge, merge_directory
from tests.files import write_adapter, write_base
from tests.models import token_ids
from tests.parity.theirs import theirs_loaded

pytestmark = pytest.mark.parity
IDS = token_ids(3, 2, 7)
TARGETS = ("o_proj", "down_proj", "lm_head")


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("target", ["original", "dequantized"])
def test_transformers_opens_a_merged_directory_to_the_logits_of_the_adapted_model(tmp_path, family, target):
    base = write_base(tmp_path / "base", family, hidden_size=64, intermediate_size=128)
    model = ml.load_model(base, quantize="nf4" if target == "dequantized" else None)
    adapter = write_adapter(model, tmp_path / "adapter", r=3, lora_alpha=21, target_modules=TARGETS)
    merge_directory(Merge(base, [adapter], target, ml.QuantizeConfig("nf4")), tmp_path / "merged")
    theirs = theirs_loaded(tmp_path / "merged", torch.float32)
    assert_parity(model(IDS), theirs(IDS).logits)
    assert torch.equal(theirs.lm_head.weight, ml.load_model(tmp_path / "merged").lm_head.weight)
