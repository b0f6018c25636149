"""Their models as they are loaded and moved in several tests, and factors of adapters, ours and theirs."""

import pytest
import torch

from minilora.testing.compare import assert_parity

transformers = pytest.importorskip("transformers")
ALLOWED = 1e-4  # of factors: singular vectors amplify float32's rounding by the inverse of their values' gaps


def theirs_loaded(path, dtype=torch.float32):
    """transformers' causal model of a directory."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def theirs_factors(model, path):
    """A and B of a layer of PEFT's model."""
    layer = model.base_model.model.get_submodule(path)
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def assert_same_but_for_signs(ours, theirs):
    """A row of A and a column of B may both be turned round."""
    signs = (ours[0] * theirs[0]).sum(1).sign()
    assert_parity(signs.unsqueeze(1) * ours[0], theirs[0], ALLOWED)
    assert_parity(ours[1] * signs, theirs[1], ALLOWED)
