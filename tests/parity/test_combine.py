"""What we combine is what PEFT's `add_weighted_adapter` makes of the same adapters, but for what is wrong there."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from minilora.adapters.combine import CombineConfig, Factors, combine
from minilora.lora import lora_delta
from minilora.testing.compare import assert_parity, relative
from tests.models import randn

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft")

WIDTHS = {"first": (12, 9), "second": (7, 12), "third": (8, 7)}  # module -> (out, in)
TYPES = ("cat", "linear", "svd")


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
FIRST = config(lora_alpha=2, target_modules=("first",))
SECOND = config(lora_alpha=2, target_modules=("second", "first"))
OF_OTHER_RANKS = {"A": config(r=2, rank_pattern={"first": 4}), "B": SECOND}
OF_OTHER_MODULES = {"A": config(target_modules=("first", "third")), "B": FIRST}
CASES = {  # adapters, their weights, types and options
    "two": (TWO, [0.7, 0.3], TYPES, {}),
    "a negative weight": (TWO, [2.0, -0.5], TYPES, {}),
    "other ranks": (OF_OTHER_RANKS, [0.7, 0.3], ["cat"], {}),
    "other ranks, cut": (OF_OTHER_RANKS, [0.7, 0.3], ["svd"], {"svd_rank": 4}),
    "other modules": (OF_OTHER_MODULES, [0.7, 0.3], ["linear"], {}),
}


@pytest.mark.parametrize(("case", "kind"), [(case, kind) for case, (_, _, kinds, _) in CASES.items() for kind in kinds])
def test_every_type_makes_what_peft_makes(case, kind):
    configs, weights, _, options = CASES[case]
    model = theirs_model(configs)
    model.add_weighted_adapter(list(configs), weights, "sum", kind, **options)
    ours = combine([factors(model, name) for name in configs], weights, CombineConfig(kind, **options))
    theirs = {path: layer.get_delta_weight("sum") for path, layer in layers(model).items() if "sum" in layer.lora_A}
    assert ours.keys() == theirs.keys()
    for path, expected in theirs.items():
        assert_parity(lora_delta(*ours[path].factors), expected)


def test_adapters_of_rslora_are_not_scaled_twice_and_one_adapter_alone_is_cut_as_asked():
    """PEFT keeps `use_rslora` for the sum, whose scale then is √r; and for one adapter it takes another type."""
    for kind, rank in (("cat", None), ("svd", 6)):
        model = theirs_model({name: config(use_rslora=True) for name in "AB"})
        ours = combine([factors(model, name) for name in "AB"], [0.7, 0.3], CombineConfig(kind, svd_rank=rank))
        model.add_weighted_adapter(["A", "B"], [0.7, 0.3], "sum", kind, svd_rank=rank)
        for path, layer in layers(model).items():
            expected = 0.7 * layer.get_delta_weight("A") + 0.3 * layer.get_delta_weight("B")
            assert_parity(lora_delta(*ours[path].factors), expected)
            assert relative(layer.get_delta_weight("sum"), expected, 0.1) > 10
    model = theirs_model({"A": config()})
    ours = combine([factors(model, "A")], [0.7], CombineConfig("svd", svd_rank=1))
    model.add_weighted_adapter(["A"], [0.7], "cut", "svd", svd_rank=1)
    for path, layer in layers(model).items():
        U, sigma, Vt = torch.linalg.svd(0.7 * layer.get_delta_weight("A"))
        assert_parity(lora_delta(*ours[path].factors), sigma[0] * U[:, :1] @ Vt[:1])
        assert torch.linalg.matrix_rank(layer.get_delta_weight("cut")) == 3
