"""A sum of adapters is what PEFT's `add_weighted_adapter` makes of them, except for what is wrong there."""

from collections import OrderedDict

import pytest
from torch import nn

import minilora as ml
from minilora.adapter import adapter_layers
from minilora.lora import lora_delta
from minilora.testing.compare import assert_parity, relative
from tests.models import fill_, perturb_

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft")

WIDTHS = {"first": (12, 9), "second": (7, 12), "third": (8, 7)}  # module -> (out, in)


def linears():
    model = nn.Sequential(OrderedDict((name, nn.Linear(*sizes[::-1])) for name, sizes in WIDTHS.items()))
    fill_(model, 0)
    return model


@pytest.mark.parametrize(
    ("fields", "weights"),
    [
        ({}, [0.7, 0.3]),
        ({"rank_pattern": {"first": 4}}, [2.0, -0.5]),
        ({"use_rslora": True}, [0.7, 0.3]),
    ],
)
def test_a_sum_is_what_peft_makes_unless_it_is_scaled_twice_there(tmp_path, fields, weights):
    """PEFT keeps `use_rslora` for the sum, whose scale then is √r."""
    configs = [{"target_modules": list(WIDTHS)}, {"target_modules": ["first", "second"], "lora_alpha": 2}]
    first, second = (peft.LoraConfig(**{"r": 3, "lora_alpha": 7, **fields, **config}) for config in configs)
    theirs = peft.get_peft_model(linears(), first, "A")
    theirs.add_adapter("B", second)
    theirs.base_model.set_adapter(["A", "B"])
    perturb_(theirs)
    theirs.save_pretrained(tmp_path)
    ours = linears()
    for name in "AB":
        ml.load_adapter(ours, tmp_path / name, name)
    ml.combine_adapters(ours, dict(zip("AB", weights, strict=True)), "sum")
    theirs.add_weighted_adapter(["A", "B"], weights, "sum", "cat")
    for path, layer in adapter_layers(ours).items():
        found, their = layer.adapters["sum"], theirs.base_model.model.get_submodule(path)
        names = [name for name in "AB" if name in their.lora_A]
        expected = sum(weights["AB".index(name)] * their.get_delta_weight(name) for name in names)
        assert_parity(lora_delta(found.lora_A, found.lora_B, found.scale), expected)
        if "use_rslora" in fields:
            assert relative(their.get_delta_weight("sum"), expected, 0.1) > 10
        else:
            assert_parity(their.get_delta_weight("sum"), expected)
