"""Parameters with adapters: W + s·B A of each expert, by einsum, in the layout that PEFT has for the two factors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import minilora as ml
from minilora.adapter import adapter_layers
from minilora.adapters.attach import merged
from minilora.adapters.layers import AdapterParameters
from minilora.lora import AdapterWrapper
from minilora.testing.compare import assert_maths, assert_precision
from tests.models import randn, scales, seeds, sizes


class Experts(nn.Module):
    """x W₁ᵀ W₂ᵀ of each expert, weighted: fused experts, as modules of transformers have them."""

    def __init__(self, seed, experts, inner, middle, is_transposed):
        super().__init__()
        self.is_transposed = is_transposed
        first, second = randn(seed, experts, middle, inner), randn(seed + 1, experts, inner, middle)
        self.up_proj = nn.Parameter(first.mT.contiguous() if is_transposed else first)
        self.down_proj = nn.Parameter(second.mT.contiguous() if is_transposed else second)
        self.scores = nn.Parameter(randn(seed + 2, experts, inner))

    def forward(self, x):
        up, down = (w.mT if self.is_transposed else w for w in (self.up_proj, self.down_proj))
        return torch.einsum("ne,emi,eom,ni->no", x @ self.scores.T, up, down, x)


def changed(weight, lora_A, lora_B, scale, is_transposed):
    """W[e, o, i] + s·Σₖ B[o, k, e] A[e, k, i], where A is (E·r, in) and B is (out, r·E)."""
    experts = len(weight)
    A, B = lora_A.view(experts, -1, lora_A.size(1)), lora_B.view(lora_B.size(0), -1, experts)
    return weight + scale * torch.einsum("oke,eki->eio" if is_transposed else "oke,eki->eoi", B, A)


def attached(model, seed=7, names=("up_proj", "down_proj"), **config):
    ml.attach(model, ml.LoraConfig(target_modules=(), target_parameters=names, **config), dtype=torch.float64)
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_" in name:
            parameter.data.copy_(randn(seed + i, *parameter.shape))
    return model


cases = given(seeds, sizes, sizes, sizes, st.integers(1, 4), scales, st.booleans())


@cases
def test_forward_is_that_of_the_changed_parameters(seed, experts, inner, middle, r, scale, is_transposed):
    plain, own = (Experts(seed, experts, inner, middle, is_transposed) for _ in range(2))
    model = attached(nn.ModuleDict({"experts": own}), r=r, lora_alpha=scale * r)
    x, dy = randn(seed + 50, 5, inner).requires_grad_(), randn(seed + 51, 5, inner)
    adapters = model["experts"].adapters["default"]
    factors = {name: (adapters[name].lora_A, adapters[name].lora_B) for name in ("up_proj", "down_proj")}
    weights = {name: changed(getattr(plain, name), *pair, scale, is_transposed) for name, pair in factors.items()}
    y, expected = model["experts"](x), torch.func.functional_call(plain, weights, x)
    assert_maths(y, expected)
    inputs = [x, *(factor for pair in factors.values() for factor in pair)]
    for our, their in zip(*(torch.autograd.grad(each, inputs, dy) for each in (y, expected)), strict=True):
        assert_maths(our, their)
    merged_parameters = dict(model["experts"].merged().named_parameters())
    for name, weight in weights.items():
        assert_maths(merged_parameters[name], weight)


@given(seeds, sizes, sizes, st.integers(1, 4), scales)
def test_a_parameter_that_is_a_matrix_has_one_pair(seed, inner, outer, r, scale):
    model = nn.ModuleDict({"proj": nn.Linear(inner, outer).double()})
    weight = model["proj"].weight.detach().clone()
    attached(model, names=("proj.weight",), r=r, lora_alpha=scale * r)
    x, adapter = randn(seed, 5, inner), model["proj"].adapters["default"]["weight"]
    expected = weight + scale * adapter.lora_B @ adapter.lora_A
    assert_maths(model["proj"](x), nn.functional.linear(x, expected, model["proj"].base.bias))


def test_a_matrix_of_a_module_with_transposed_experts_is_not_transposed():
    model = attached(nn.ModuleDict({"experts": Experts(0, 3, 4, 5, True)}), names=("scores",), r=2, lora_alpha=14)
    place = model["experts"]
    adapter = place.adapters["default"]["scores"]
    assert_maths(place.changed_parameters()["scores"], place.base.scores + 7 * adapter.lora_B @ adapter.lora_A)


@cases
def test_several_adapters_add(seed, experts, inner, middle, r, scale, is_transposed):
    model = nn.ModuleDict({"experts": Experts(seed, experts, inner, middle, is_transposed)})
    attached(model, r=r, lora_alpha=scale * r)
    config = ml.LoraConfig(r=2, lora_alpha=10, target_modules=(), target_parameters=("up_proj",))
    ml.attach(model, config, name="second", dtype=torch.float64)
    ml.set_adapter(model, ["default", "second"])
    place = model["experts"]
    first, second = (place.adapters[name]["up_proj"] for name in ("default", "second"))
    second.lora_B.data.copy_(randn(seed, *second.lora_B.shape))
    expected = changed(place.base.up_proj, first.lora_A, first.lora_B, scale, is_transposed)
    expected = changed(expected, second.lora_A, second.lora_B, 5, is_transposed)
    assert_maths(place.changed_parameters()["up_proj"], expected)


def test_the_parameter_itself_never_changes_and_gets_no_gradient():
    model = nn.ModuleDict({"experts": Experts(0, 3, 4, 5, False)})
    before = {name: p.clone() for name, p in model.named_parameters()}
    x = randn(1, 5, 4)
    y = model["experts"](x)
    attached(model)
    model["experts"](x).sum().backward()
    base = dict(model["experts"].base.named_parameters())
    assert all(torch.equal(p, before[f"experts.{name}"]) and p.grad is None for name, p in base.items())
    with ml.disable_adapter(model):
        assert torch.equal(model["experts"](x), y)
    with merged(model):
        assert not isinstance(model["experts"], AdapterWrapper)
    ml.detach(model)
    assert torch.equal(model["experts"](x), y)
    assert {name: torch.equal(p, before[name]) for name, p in model.named_parameters()} == dict.fromkeys(before, True)


def test_a_new_adapter_changes_nothing_and_patterns_mean_parameters():
    model = nn.ModuleDict({"experts": Experts(0, 3, 6, 5, True), "head": nn.Linear(6, 6).double()})
    x = randn(1, 5, 6)
    y = model["experts"](x)
    names = {"target_modules": (), "target_parameters": ("up_proj", "head.weight")}
    ml.attach(model, ml.LoraConfig(r=4, rank_pattern={"up_proj": 2}, **names))
    assert torch.equal(model["experts"](x), y)
    assert [type(place) for place in adapter_layers(model).values()] == [AdapterParameters] * 2
    stacked = model["experts"].adapters["default"]["up_proj"]
    assert (stacked.lora_A.shape, stacked.lora_B.shape, stacked.scale) == ((3 * 2, 6), (5, 2 * 3), 32 / 2)
    assert ml.count_parameters(model).trainable == 3 * 2 * (6 + 5) + 4 * (6 + 6)


def test_the_parameter_that_the_module_has_first_is_innermost_in_peft_s_names():
    model = attached(nn.ModuleDict({"experts": Experts(0, 3, 4, 5, False)}), names=("down_proj", "up_proj"))
    adapters = model["experts"].adapters["default"]
    found = model["experts"].peft_tensors("default")
    assert found["base_layer.lora_A.weight"] is adapters["up_proj"].lora_A
    assert found["lora_B.weight"] is adapters["down_proj"].lora_B
    assert len(found) == 4


@given(seeds)
def test_a_bfloat16_parameter_is_changed_in_float32_and_rounded_once(seed):
    model = nn.ModuleDict({"proj": nn.Linear(40, 24, bias=False).bfloat16()})
    ml.attach(model, ml.LoraConfig(r=4, lora_alpha=28, target_modules=(), target_parameters=("proj.weight",)))
    adapter = model["proj"].adapters["default"]["weight"]
    adapter.lora_B.data.copy_(randn(seed, 24, 4))
    exact = model["proj"].base.weight.double() + 7 * adapter.lora_B.double() @ adapter.lora_A.double()
    assert_precision(model["proj"].changed_parameters()["weight"], exact.bfloat16(), exact.detach())
    assert model["proj"](randn(1, 3, 40, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (("gate_proj",), r"no parameter matches target_parameters \['gate_proj'\]"),
        (("head.bias",), r"head\.bias: is \(6,\), target_parameters need \(out, in\) or \(experts, out, in\)"),
    ],
)
def test_what_is_no_matrix_or_not_there_is_refused(names, why):
    model = nn.ModuleDict({"experts": Experts(0, 3, 6, 5, True), "head": nn.Linear(6, 6).double()})
    with pytest.raises(ml.TargetError, match=why):
        attached(model, names=names)
    assert not adapter_layers(model)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("other", [{"target_modules": ("proj",)}, {"target_modules": (), "modules_to_save": ("proj",)}])
def test_target_parameters_and_another_adapter_of_one_module_are_refused_in_both_orders(other, order):
    model = nn.ModuleDict({"proj": nn.Linear(3, 4).double(), "head": nn.Linear(4, 5).double()})
    configs = [{"target_modules": (), "target_parameters": ("proj.weight",)}, other][::order]
    ml.attach(model, ml.LoraConfig(**configs[0]))
    places = adapter_layers(model)
    with pytest.raises(ml.TargetError, match="proj: target_parameters go with no other adapter of the same module"):
        ml.attach(model, ml.LoraConfig(**configs[1]), name="second")
    assert adapter_layers(model) == places
    assert all(list(place.configs) == ["default"] for place in places.values())
    ml.attach(model, ml.LoraConfig(target_modules=("head",)), name="second")
