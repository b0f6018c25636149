"""Ours and PEFT's start values: the same factors but for signs, or the same product where it says how they share."""

import pytest
import torch
from torch import nn

from minilora.adapters.initialize import factors_from_weight, gaussian_factors
from minilora.lora import initial_factors, lora_scale
from minilora.testing.compare import assert_parity
from tests.models import fill_
from tests.parity.theirs import ALLOWED, assert_same_but_for_signs, theirs_factors

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

R, ALPHA = 4, 12


class Parallel(nn.Module):
    """Layers side by side."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow, self.other = nn.Linear(12, 20), nn.Linear(12, 8), nn.Linear(12, 15, bias=False)
        self.lookup = nn.Embedding(10, 6)
        fill_(self, 0)


LINEARS = ("wide", "narrow", "other")


def theirs_config(init, targets=LINEARS, **more):
    return peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=list(targets), init_lora_weights=init, **more)


def theirs_model(init, targets=LINEARS, **more):
    return peft.get_peft_model(Parallel(), theirs_config(init, targets, **more))


def test_the_same_numbers_are_drawn():
    for kind in (True, "gaussian"):
        layer = theirs_model(True, ["wide"]).base_model.model.wide
        torch.manual_seed(7)
        layer.reset_lora_parameters("default", kind)
        generator = torch.Generator().manual_seed(7)
        if kind is True:
            lora_A, lora_B = initial_factors(R, 12, 20, generator).values()
        else:
            lora_A, lora_B = gaussian_factors((R, 12), (20, R), generator)
        assert_parity(lora_A, layer.lora_A["default"].weight)
        assert torch.equal(lora_B, layer.lora_B["default"].weight)
    layer = theirs_model(True, ["lookup"]).base_model.model.lookup
    torch.manual_seed(7)
    layer.reset_lora_parameters("default", True)
    lora_A, lora_B = gaussian_factors((R, 10), (6, R), torch.Generator().manual_seed(7), is_embedding=True)
    assert torch.equal(lora_A, layer.lora_embedding_A["default"])
    assert torch.equal(lora_B, layer.lora_embedding_B["default"])


@pytest.mark.parametrize("path", LINEARS)
@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_what_moves_out_of_the_weight_is_the_same(kind, path):
    torch.manual_seed(0)
    theirs = theirs_model(kind)
    weight = Parallel().get_submodule(path).weight.detach()
    scale = lora_scale(R, ALPHA)
    ours = factors_from_weight(kind, weight, R, scale)
    assert_same_but_for_signs(ours, theirs_factors(theirs, path))
    residual = theirs.base_model.model.get_submodule(path).base_layer.weight
    assert_parity(weight - scale * ours[1] @ ours[0], residual, ALLOWED)
