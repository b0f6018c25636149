"""Their models as they are loaded and moved in several tests, and factors of adapters, ours and theirs."""

import pytest
import torch

from minilora.adapter import adapter_layers, adapter_tensors
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


def with_factors_of(ours, theirs):
    """Copy the adapter of our model into PEFT's; pairs of parameters, ours and theirs."""
    own = adapter_tensors(adapter_layers(ours), "default")
    pairs = []
    for name, parameter in theirs.named_parameters():
        if ".default." in name:
            pairs.append((own.pop(name.replace(".default", "")), parameter))
            parameter.data.copy_(pairs[-1][0])
    assert not own
    return pairs
