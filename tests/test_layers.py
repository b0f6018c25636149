"""Laws of an adapted linear: 4 (sums) and 5 (gradients); 1 and 2, for every layer, are in `test_bases`."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minilora import LoraConfig, TargetError
from minilora.adapters.layers import AdapterLinear
from minilora.quant.linear import NF4Linear, dense_weight
from minilora.testing import reference
from tests.adapters import add
from tests.models import fill_, randn, scales, seeds, sizes
from tests.tolerance import assert_maths, assert_precision


def make_layer(seed, inner, outer, ranks, scale, dtype=torch.float64, adapter_dtype=torch.float64, bits=None):
    """A layer with an adapter for each rank, all of them active; on a base of four bits, doubly quantized or not."""
    base = nn.Linear(inner, outer).to(dtype).requires_grad_(False)
    fill_(base, seed)
    if bits:
        base = NF4Linear.quantize(base.weight, base.bias, double_quant=bits == "double")
    layer = AdapterLinear(base, "proj")
    for i, r in enumerate(ranks):
        config = LoraConfig(r=r, lora_alpha=scale * r)
        lora_A, lora_B = randn(seed + 2 * i, r, inner), randn(seed + 2 * i + 1, outer, r)
        layer.add(f"adapter{i}", config, {"lora_A": lora_A.to(adapter_dtype), "lora_B": lora_B.to(adapter_dtype)})
    layer.active = tuple(layer.configs)
    return layer


kinds = st.sampled_from([None, "single", "double"])


@given(seeds, sizes, sizes, sizes, scales)
def test_gradients_follow_from_that_of_the_weight_and_the_base_gets_none(seed, inner, outer, r, scale):
    layer = make_layer(seed, inner, outer, [r], scale)
    x, dy = randn(seed + 50, 5, inner), randn(seed + 51, 5, outer)
    layer(x).backward(dy)
    adapter = layer.adapters["adapter0"]
    arrays = (tensor.detach().numpy() for tensor in (x, dy, adapter.lora_A, adapter.lora_B))
    dA, dB = reference.lora_gradients(*arrays, scale)
    assert_maths(adapter.lora_A.grad, dA)
    assert_maths(adapter.lora_B.grad, dB)
    assert layer.base.weight.grad is None
    assert layer.base.bias.grad is None


lows = st.sampled_from([torch.float32, torch.bfloat16])


@given(seeds, sizes, sizes, sizes, scales, lows, lows)
def test_what_a_base_computes_in_another_dtype_its_adapters_do_too(seed, inner, outer, r, scale, computed, own):
    """The gradient has the dtype of x; and a new adapter changes nothing."""
    layer = make_layer(seed, inner, outer, [r], scale, dtype=computed, adapter_dtype=own, bits="double")
    given_dtype = torch.float32 if computed == torch.bfloat16 else torch.bfloat16
    x = randn(seed + 50, 5, inner, dtype=given_dtype).requires_grad_()
    assert torch.equal(layer(x), layer(x.to(computed)))
    layer.adapters["adapter0"].lora_B.data.zero_()
    y, alone = layer(x), layer.base(x)
    assert y.dtype == alone.dtype == computed
    assert torch.equal(y, alone)
    ours, base_s = (torch.autograd.grad(each.sum(), x)[0] for each in (y, alone))
    assert ours.dtype == given_dtype
    assert torch.equal(ours, base_s)


@given(seeds, sizes, sizes, sizes, sizes, scales, scales)
def test_adapters_add_by_concatenating_ranks(seed, inner, outer, r1, r2, s1, s2):
    layer, both = make_layer(seed, inner, outer, [r1], s1), make_layer(seed, inner, outer, [], 2.0)
    add(layer, "second", seed + 7, r2, s2)
    first, second = layer.adapters.values()
    lora_A = torch.cat([first.lora_A, second.lora_A]).detach()
    lora_B = torch.cat([s1 * first.lora_B, s2 * second.lora_B], dim=1).detach()
    both.add("sum", LoraConfig(r=r1 + r2, lora_alpha=r1 + r2), {"lora_A": lora_A, "lora_B": lora_B})
    both.active = ("sum",)
    x = randn(seed + 50, 5, inner)
    assert_maths(layer(x), both(x))
    assert_maths(layer.merged_weight(), both.merged_weight())


@given(seeds, scales, kinds)
def test_under_autocast_values_and_gradients_are_as_good_as_plain_pytorch_s(seed, scale, bits):
    layer = make_layer(seed, 40, 24, [8], scale, dtype=torch.float32, adapter_dtype=torch.float32, bits=bits)
    x, dy = randn(seed + 50, 33, 40, dtype=torch.float32), randn(seed + 51, 33, 24, dtype=torch.bfloat16)
    A, B = layer.adapters["adapter0"].lora_A, layer.adapters["adapter0"].lora_B
    leaves = [x.requires_grad_(), A, B]
    weight, bias = dense_weight(layer.base), layer.base.bias

    def plain(x, A, B, weight, bias):
        return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, A), B)

    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = layer(x), plain(*leaves, weight, bias)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = plain(*wide, weight.double(), bias.double())
    assert ours.dtype == theirs.dtype
    both = ((ours, leaves), (theirs, leaves), (exact, wide))
    results = [[y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))] for y, inputs in both]
    for our, their, oracle, like in zip(*results, [ours, *leaves], strict=True):
        assert our.dtype == like.dtype
        assert_precision(our.bfloat16(), their.bfloat16(), oracle)


@given(seeds, scales, kinds, st.booleans(), st.booleans(), st.integers(1, 2))
def test_what_was_cast_before_acts_as_what_is_cast_here(seed, scale, bits, use_dora, has_start, number):
    layer = make_layer(seed, 8, 6, [], scale, dtype=torch.bfloat16, bits=bits)
    for i in range(number):
        add(layer, f"adapter{i}", seed + i, 2, scale, use_dora, has_start, dtype=torch.float32)
    x, dy = randn(seed + 50, 5, 8).bfloat16().requires_grad_(), randn(seed + 51, 5, 6).bfloat16()
    leaves, results = [x, *(p for p in layer.parameters() if p.requires_grad)], []
    for is_cast in (False, True):
        for adapter in layer.adapters.values():
            adapter.cast = (adapter.lora_A.detach().bfloat16(), adapter.lora_B.detach().bfloat16()) if is_cast else None
        y = layer(x)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    for own, given_ in zip(*results, strict=True):
        assert torch.equal(own, given_)


def test_dropout_without_a_step_draws_from_the_random_state_of_pytorch():
    layer, x = make_layer(0, 4, 4, [2], 2.0).train(), randn(3, 5, 4)
    layer.configs["adapter0"] = LoraConfig(r=2, lora_dropout=0.5)
    torch.manual_seed(5)
    first, second = layer(x), layer(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), first)
    assert not torch.equal(second, first)
    layer.seed_dropout("0/0")
    assert torch.equal(layer(x), layer(x))
    assert not torch.equal(layer(x), layer.eval()(x))


def test_a_second_adapter_of_the_same_name_is_refused():
    layer = make_layer(0, 4, 4, [2], 2.0)
    with pytest.raises(TargetError, match="proj has an adapter 'adapter0'"):
        layer.add("adapter0", LoraConfig(r=2), {"lora_A": randn(1, 2, 4), "lora_B": randn(2, 4, 2)})


@given(seeds, sizes, sizes, st.lists(sizes, min_size=1, max_size=3), scales)
def test_what_is_merged_into_another_weight_is_what_is_merged_into_the_base_s_own(seed, inner, outer, ranks, scale):
    """Also where the base is without numbers."""
    layer, other = make_layer(seed, inner, outer, ranks, scale), randn(seed + 70, outer, inner)
    empty = AdapterLinear(nn.Linear(inner, outer, device="meta"), "proj")
    for name, adapter in layer.adapters.items():
        empty.add(name, layer.configs[name], dict(adapter.named_parameters()))
    empty.active = layer.active
    found = [each.merged_weight(other) for each in (layer, empty)]
    layer.base.weight.copy_(other)
    for each in found:
        assert_maths(each, layer.merged_weight())
