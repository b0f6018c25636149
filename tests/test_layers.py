"""Laws of an adapted linear: 2 (new is nothing), 4 (sums), 5 (gradients); law 1 is in `test_bases`."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minilora import ConfigError, LoraConfig, TargetError
from minilora.lora.initialize import initial_factors
from minilora.lora.layers import AdapterLinear
from minilora.quant.linear import NF4Linear, dense_weight
from minilora.testing import reference
from tests.adapters import add
from tests.models import fill_, randn, scales, seeds, sizes
from tests.tolerance import assert_maths, assert_precision


def make_layer(
    seed, inner, outer, ranks, scale, bias=True, dtype=torch.float64, adapter_dtype=torch.float64, bits=None
):
    """A layer with an adapter for each rank, all of them active; on a base of four bits, doubly quantized or not."""
    base = nn.Linear(inner, outer, bias=bias).to(dtype).requires_grad_(False)
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


def arrays(layer, name="adapter0"):
    tensors = dense_weight(layer.base), layer.base.bias, layer.adapters[name].lora_A, layer.adapters[name].lora_B
    return [None if tensor is None else tensor.detach().double().numpy() for tensor in tensors] + [
        layer.adapters[name].scale
    ]


kinds = st.sampled_from([None, "single", "double"])


@given(seeds, sizes, sizes, sizes, scales)
def test_gradients_follow_from_that_of_the_weight_and_the_base_gets_none(seed, inner, outer, r, scale):
    layer = make_layer(seed, inner, outer, [r], scale)
    x, dy = randn(seed + 50, 5, inner), randn(seed + 51, 5, outer)
    layer(x).backward(dy)
    _, _, lora_A, lora_B, _ = arrays(layer)
    dA, dB = reference.lora_gradients(x.numpy(), dy.numpy(), lora_A, lora_B, scale)
    assert_maths(layer.adapters["adapter0"].lora_A.grad, dA)
    assert_maths(layer.adapters["adapter0"].lora_B.grad, dB)
    assert layer.base.weight.grad is None
    assert layer.base.bias.grad is None


@given(
    seeds, sizes, sizes, sizes, st.sampled_from([True, "gaussian"]), st.sampled_from([torch.float32, torch.bfloat16])
)
def test_a_new_adapter_changes_nothing(seed, inner, outer, r, init, dtype):
    layer = make_layer(seed, inner, outer, [], 2.0, dtype=dtype)
    lora_A, lora_B = initial_factors(init, (r, inner), (outer, r), torch.Generator().manual_seed(seed))
    layer.add("new", LoraConfig(r=r), {"lora_A": lora_A, "lora_B": lora_B})
    layer.active = ("new",)
    x = randn(seed + 50, 5, inner, dtype=dtype)
    assert torch.equal(layer(x), layer.base(x))
    assert torch.equal(layer.merged_weight(), layer.base.weight)
    assert lora_A.abs().min() > 0  # else no gradient would reach B


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("computed", "given_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str
)
def test_a_new_adapter_changes_nothing_of_a_base_that_computes_in_another_dtype(computed, given_dtype, adapter_dtype):
    base = NF4Linear.quantize(randn(0, 5, 64, dtype=torch.float32), randn(1, 5, dtype=torch.float32), dtype=computed)
    layer = AdapterLinear(base, "proj")
    lora_A, lora_B = randn(2, 3, 64, dtype=adapter_dtype), torch.zeros(5, 3, dtype=adapter_dtype)
    layer.add("new", LoraConfig(r=3), {"lora_A": lora_A, "lora_B": lora_B})
    layer.active = ("new",)
    x = randn(3, 7, 64, dtype=given_dtype)
    assert layer(x).dtype == base(x).dtype == computed
    assert torch.equal(layer(x), base(x))
    x.requires_grad_()
    ours, alone = (torch.autograd.grad(y.sum(), x)[0] for y in (layer(x), base(x)))
    assert ours.dtype == given_dtype
    assert torch.equal(ours, alone)


@given(seeds, sizes, sizes, sizes, scales, st.sampled_from([torch.bfloat16, torch.float32]))
def test_what_a_base_computes_in_another_dtype_its_adapters_do_too(seed, inner, outer, r, scale, computed):
    layer = make_layer(seed, inner, outer, [r], scale, dtype=computed, adapter_dtype=torch.float32, bits="double")
    given_dtype = torch.float32 if computed == torch.bfloat16 else torch.bfloat16
    x = randn(seed + 50, 5, inner, dtype=given_dtype)
    assert torch.equal(layer(x), layer(x.to(computed)))


@given(seeds, sizes, sizes, sizes, sizes, scales, scales)
def test_adapters_add_by_concatenating_ranks(seed, inner, outer, r1, r2, s1, s2):
    layer = make_layer(seed, inner, outer, [r1], s1)
    lora_A, lora_B = randn(seed + 7, r2, inner), randn(seed + 8, outer, r2)
    layer.add("second", LoraConfig(r=r2, lora_alpha=s2 * r2), {"lora_A": lora_A, "lora_B": lora_B})
    both = make_layer(seed, inner, outer, [], 2.0)
    lora_A = torch.cat([layer.adapters["adapter0"].lora_A, layer.adapters["second"].lora_A])
    lora_B = torch.cat([s1 * layer.adapters["adapter0"].lora_B, s2 * layer.adapters["second"].lora_B], dim=1)
    both.add("sum", LoraConfig(r=r1 + r2, lora_alpha=r1 + r2), {"lora_A": lora_A.detach(), "lora_B": lora_B.detach()})
    layer.active, both.active = ("adapter0", "second"), ("sum",)
    x = randn(seed + 50, 5, inner)
    assert_maths(layer(x), both(x))
    assert_maths(layer.merged_weight(), both.merged_weight())


@given(seeds, sizes, sizes, sizes, scales, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_low_precision_forward_is_as_good_as_plain_pytorch(seed, inner, outer, r, scale, dtype):
    layer = make_layer(seed, inner, outer, [r], scale, dtype=dtype, adapter_dtype=torch.float32)
    x = randn(seed + 50, 5, inner, dtype=dtype)
    A, B = layer.adapters["adapter0"].lora_A.to(dtype), layer.adapters["adapter0"].lora_B.to(dtype)
    plain = F.linear(x, layer.base.weight, layer.base.bias) + scale * F.linear(F.linear(x, A), B)
    assert layer(x).dtype == dtype
    assert_precision(layer(x), plain, reference.lora_forward(x.double().numpy(), *arrays(layer)))


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
    exact = plain(
        *(wide := [leaf.detach().double().requires_grad_() for leaf in leaves]), weight.double(), bias.double()
    )
    assert ours.dtype == theirs.dtype
    assert_precision(ours, theirs, exact.detach())
    results = [
        torch.autograd.grad(y, to, dy.to(y.dtype)) for y, to in ((ours, leaves), (theirs, leaves), (exact, wide))
    ]
    for our, their, oracle, leaf in zip(*results, leaves, strict=True):
        assert our.dtype == leaf.dtype
        assert_precision(our.bfloat16(), their.bfloat16(), oracle)


@given(seeds, sizes, sizes, sizes, scales)
def test_merged_weight_of_a_bfloat16_base_is_rounded_once(seed, inner, outer, r, scale):
    layer = make_layer(seed, inner, outer, [r], scale, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    weight, _, lora_A, lora_B, _ = arrays(layer)
    exact = torch.from_numpy(reference.lora_merged_weight(weight, lora_A, lora_B, scale))
    assert layer.merged_weight().dtype == torch.bfloat16
    assert_precision(layer.merged_weight(), exact.to(torch.bfloat16), exact)


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


def test_dropout_without_a_step_is_refused():
    layer = make_layer(0, 4, 4, [], 2.0)
    layer.add("new", LoraConfig(r=2, lora_dropout=0.5), {"lora_A": randn(1, 2, 4), "lora_B": randn(2, 4, 2)})
    layer.active = ("new",)
    layer.train()
    with pytest.raises(ConfigError, match="set_dropout_step"):
        layer(randn(3, 5, 4))
    layer.seed_dropout("0/0")
    assert not torch.equal(layer(randn(3, 5, 4)), layer.eval()(randn(3, 5, 4)))


def test_a_second_adapter_of_the_same_name_is_refused():
    layer = make_layer(0, 4, 4, [2], 2.0)
    with pytest.raises(TargetError, match="proj has an adapter 'adapter0'"):
        layer.add("adapter0", LoraConfig(r=2), {"lora_A": randn(1, 2, 4), "lora_B": randn(2, 4, 2)})


@given(seeds, sizes, sizes, st.lists(sizes, min_size=1, max_size=3), scales)
def test_what_is_merged_into_another_weight_is_what_is_merged_into_the_base_s_own(seed, inner, outer, ranks, scale):
    layer = make_layer(seed, inner, outer, ranks, scale)
    other = randn(seed + 70, outer, inner)
    expected = layer.merged_weight(other)
    layer.base.weight.copy_(other)
    assert torch.equal(layer.merged_weight(), expected)


def test_adapters_of_a_base_without_numbers_keep_theirs():
    layer = make_layer(0, 5, 4, [2], 7.0)
    empty = AdapterLinear(nn.Linear(5, 4, device="meta"), "proj")
    empty.add("adapter0", layer.configs["adapter0"], dict(layer.adapters["adapter0"].named_parameters()))
    empty.active = ("adapter0",)
    assert torch.equal(empty.merged_weight(layer.base.weight), layer.merged_weight())
