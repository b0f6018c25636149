"""What we combine is what PEFT's `add_weighted_adapter` makes of the same adapters, but for what is wrong there."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from minilora.adapters.weighted import Factors, concatenate
from minilora.lora import lora_delta
from minilora.testing.compare import assert_parity, relative
from tests.models import randn

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft")

WIDTHS = {"first": (12, 9), "second": (7, 12), "third": (8, 7)}  # module -> (out, in)


def theirs_model(configs, base=None):
    """Plain linears, or another base, with adapters of random numbers."""
    if base is None:
        base = nn.Sequential(OrderedDict((name, nn.Linear(*sizes[::-1])) for name, sizes in WIDTHS.items()))
    names = list(configs)
    configs = copy.deepcopy(configs)  # PEFT writes into them
    model = peft.get_peft_model(base, configs[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, configs[name])
    randomize_(model, 0)
    return model


def randomize_(model, seed, only="lora_"):
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters(), seed):
            if only in name:
                parameter.copy_(randn(i, *parameter.shape))


def layers(model):
    found = model.base_model.model.named_children()
    return {name: layer for name, layer in found if isinstance(layer, peft.tuners.lora.LoraLayer)}


def factors(model, adapter):
    """Their adapter as ours take it."""
    return {
        path: Factors(layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter])
        for path, layer in layers(model).items()
        if adapter in layer.lora_A
    }


def config(r=3, lora_alpha=7, target_modules=tuple(WIDTHS), **options):
    return peft.LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=list(target_modules), **options)


TWO = {"A": config(), "B": config(lora_alpha=2)}
SECOND = config(lora_alpha=2, target_modules=("second", "first"))
CASES = {  # adapters and their weights
    "two": (TWO, [0.7, 0.3]),
    "a negative weight": (TWO, [2.0, -0.5]),
    "other ranks": ({"A": config(r=2, rank_pattern={"first": 4}), "B": SECOND}, [0.7, 0.3]),
}


def ours_sum(model, names, weights, path):
    """Our sum of their adapters at one module."""
    parts = [factors(model, name).get(path) for name in names]
    return lora_delta(
        *concatenate([part._replace(scale=w * part.scale) for part, w in zip(parts, weights, strict=True) if part])
    )


@pytest.mark.parametrize("case", CASES)
def test_a_sum_is_what_peft_makes(case):
    configs, weights = CASES[case]
    model = theirs_model(configs)
    model.add_weighted_adapter(list(configs), weights, "sum", "cat")
    for path, layer in layers(model).items():
        assert_parity(ours_sum(model, configs, weights, path), layer.get_delta_weight("sum"))


def test_adapters_of_rslora_are_not_scaled_twice():
    """PEFT keeps `use_rslora` for the sum, whose scale then is √r."""
    model = theirs_model({name: config(use_rslora=True) for name in "AB"})
    model.add_weighted_adapter(["A", "B"], [0.7, 0.3], "sum", "cat")
    for path, layer in layers(model).items():
        expected = 0.7 * layer.get_delta_weight("A") + 0.3 * layer.get_delta_weight("B")
        assert_parity(ours_sum(model, "AB", [0.7, 0.3], path), expected)
        assert relative(layer.get_delta_weight("sum"), expected, 0.1) > 10
