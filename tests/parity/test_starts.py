"""Ours and PEFT's random start values; tests/parity/test_family.py has those that PEFT takes from the weight."""

import pytest
import torch
from torch import nn

from minilora.adapters.initialize import gaussian_factors
from minilora.lora import initial_factors
from minilora.testing.compare import assert_parity

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft")

R = 4


def test_the_same_numbers_are_drawn():
    base = nn.ModuleDict({"wide": nn.Linear(12, 20), "lookup": nn.Embedding(10, 6)})
    config = peft.LoraConfig(r=R, lora_alpha=12, target_modules=["wide", "lookup"])
    model = peft.get_peft_model(base, config).base_model.model
    for kind in (True, "gaussian"):
        layer = model.wide
        torch.manual_seed(7)
        layer.reset_lora_parameters("default", kind)
        generator = torch.Generator().manual_seed(7)
        if kind is True:
            lora_A, lora_B = initial_factors(R, 12, 20, generator).values()
        else:
            lora_A, lora_B = gaussian_factors((R, 12), (20, R), generator)
        assert_parity(lora_A, layer.lora_A["default"].weight)
        assert torch.equal(lora_B, layer.lora_B["default"].weight)
    layer = model.lookup
    torch.manual_seed(7)
    layer.reset_lora_parameters("default", True)
    lora_A, lora_B = gaussian_factors((R, 10), (6, R), torch.Generator().manual_seed(7), is_embedding=True)
    assert torch.equal(lora_A, layer.lora_embedding_A["default"])
    assert torch.equal(lora_B, layer.lora_embedding_B["default"])
