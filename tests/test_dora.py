"""DoRA: eq. 5 by loops, the norm a constant, the identity at the start, the bias not stretched, nothing dense kept."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minilora import LoraConfig
from minilora.adapters.functional import dora_norm
from minilora.adapters.layers import AdapterLinear
from minilora.quant.linear import NF4Linear, dense_weight
from minilora.testing import reference
from tests.adapters import LAYERS, add, applied_by_loops, merged_by_loops, place
from tests.models import fill_, randn, scales, seeds, sizes, small_tiles
from tests.tolerance import assert_maths, assert_precision, precision

each_layer = pytest.mark.parametrize("kind", LAYERS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
DORA = LoraConfig(r=4, lora_alpha=28, use_dora=True)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Some ten rows are several tiles."""
    small_tiles(monkeypatch, 400)


def numbers(layer):
    """W, A, B, s and m as the loops take them."""
    adapter = layer.adapters["new"]
    tensors = dense_weight(layer.base), adapter.lora_A, adapter.lora_B
    weight, lora_A, lora_B = (tensor.detach().double().numpy() for tensor in tensors)
    return weight, lora_A, lora_B, adapter.scale, adapter.magnitude.detach().double().numpy()


def fresh(base, size_B=0.0, dtype=torch.float32):
    """A new DoRA on a linear: its magnitude is not given."""
    layer = AdapterLinear(base, "layer")
    lora_A, lora_B = randn(1, 4, base.in_features, dtype=dtype), size_B * randn(2, base.out_features, 4, dtype=dtype)
    layer.add("new", DORA, {"lora_A": lora_A, "lora_B": lora_B})
    layer.active = ("new",)
    return layer


def linear(seed, K, N, dtype, bits=None):
    base = nn.Linear(K, N).to(dtype).requires_grad_(False)
    fill_(base, seed)
    return NF4Linear.quantize(base.weight, base.bias, bits == "double") if bits else base


bits = st.sampled_from([None, "single", "double"])


@given(seeds, sizes, sizes, sizes, scales)
def test_the_norm_is_that_of_the_rows_and_has_no_gradient(seed, inner, outer, r, scale):
    W, A, B = randn(seed, outer, inner), randn(seed + 1, r, inner), randn(seed + 2, outer, r)
    norm = dora_norm(W, A.requires_grad_(), B.requires_grad_(), scale)
    merged = reference.lora_merged_weight(W.numpy(), A.detach().numpy(), B.detach().numpy(), scale)
    assert_maths(norm, (merged**2).sum(1) ** 0.5)
    assert not norm.requires_grad


@given(seeds, sizes, sizes, sizes, scales, st.booleans())
def test_gradients_equal_the_loops_with_the_norm_held_fixed(seed, inner, outer, r, scale, bias):
    layer = place("linear", seed, inner, outer, bias).layer
    add(layer, "new", seed, r, scale, use_dora=True)
    x, dy = randn(seed + 50, 5, inner).requires_grad_(), randn(seed + 51, 5, outer)
    layer(x).backward(dy)
    equation_5 = reference.dora_merged_weight(*numbers(layer))
    assert_maths(layer.merged_weight(), equation_5)
    assert_maths(x.grad, dy.numpy() @ equation_5)
    adapter, expected = layer.adapters["new"], reference.dora_gradients(x.detach().numpy(), dy.numpy(), *numbers(layer))
    for parameter, gradient in zip((adapter.lora_A, adapter.lora_B, adapter.magnitude), expected, strict=True):
        assert_maths(parameter.grad, gradient)


@each_dtype
@given(seeds, scales, bits)
def test_low_precision_gradients_are_as_good_as_plain_pytorch_s(dtype, seed, scale, bits):
    layer = AdapterLinear(linear(seed, 40, 24, dtype, bits), "layer")
    add(layer, "new", seed, 8, scale, use_dora=True, dtype=torch.float32)
    adapter, x, dy = layer.adapters["new"], randn(seed + 50, 33, 40, dtype=dtype), randn(seed + 51, 33, 24, dtype=dtype)
    leaves = [adapter.lora_A, adapter.lora_B, adapter.magnitude]
    A, B, m = (leaf.to(dtype) for leaf in leaves)
    weight = dense_weight(layer.base)
    y = F.linear(x, weight) + scale * F.linear(F.linear(x, A), B)
    plain = (m / dora_norm(weight, A, B, scale).to(dtype)) * y + layer.base.bias
    exact = reference.dora_gradients(x.double().numpy(), dy.double().numpy(), *numbers(layer))
    results = (torch.autograd.grad(each, leaves, dy) for each in (layer(x), plain))
    for our, their, oracle in zip(*results, exact, strict=True):
        assert our.dtype == torch.float32
        assert_precision(our.to(dtype), their.to(dtype), oracle)


@each_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_magnitude_begins_as_the_norm_of_the_rows_in_float32(kind, dtype):
    layer = place(kind, 3, dtype=dtype).layer
    shape_A, shape_B = layer.shapes(layer.base, 2)
    layer.add("new", DORA, {"lora_A": randn(1, *shape_A).float(), "lora_B": torch.zeros(shape_B)})
    magnitude, (matrix, _) = layer.adapters["new"].magnitude, merged_by_loops(layer)
    assert magnitude.dtype == torch.float32
    exact = torch.from_numpy((matrix**2).sum(1) ** 0.5)
    assert_precision(magnitude.flatten(), exact.float(), exact)
    assert magnitude.shape == ((shape_B[0],) if len(shape_B) == 2 else (1, shape_B[0], *shape_B[2:]))


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_is_taken_in_float32_whatever_the_dtypes_are(adapter_dtype):
    """Where a sum of 4096 squares in bfloat16 would stop to grow."""
    layer = fresh(linear(0, 4096, 3, torch.bfloat16), dtype=adapter_dtype)
    norm = layer.adapters["new"].magnitude.float() / layer.adapters["new"].stretch(layer, layer.base.weight)
    exact = layer.base.weight.double().square().sum(1).sqrt()
    assert norm.dtype == torch.float32
    assert_precision(norm, layer.base.weight.float().norm(dim=1), exact)


@given(seeds, scales)
def test_under_autocast_the_norm_is_what_it_is_without_and_without_numbers_it_has_its_shape(seed, scale):
    W, A, B = (randn(seed + i, *shape).float() for i, shape in enumerate([(24, 40), (4, 40), (24, 4)]))
    with torch.autocast("cpu", torch.bfloat16):
        found = dora_norm(W, A, B, scale)
    assert torch.equal(found, dora_norm(W, A, B, scale))
    assert dora_norm(W.to("meta"), A.to("meta"), B.to("meta"), scale).shape == (24,)


@each_dtype
@given(seeds, bits)
def test_a_new_adapter_stretches_nothing(dtype, seed, bits):
    """k = m / ‖W‖ is 1 to the bit, as both are computed alike, so that only the bias is rounded apart."""
    layer = fresh(linear(seed, 40, 24, dtype, bits))
    x = randn(seed + 50, 33, 40, dtype=dtype)
    adapter, weight = layer.adapters["new"], dense_weight(layer.base)
    assert torch.equal(adapter.stretch(layer, weight), torch.ones(24))
    assert torch.equal(layer(x), F.linear(x, weight) + layer.base.bias)
    assert torch.equal(layer.merged_weight(), weight)
    assert_precision(layer(x), layer.base(x), F.linear(x.double(), weight.double(), layer.base.bias.double()))


@each_dtype
@given(seeds)
def test_a_large_bias_is_not_stretched_nor_rounded_twice(dtype, seed):
    """PEFT 0.21 subtracts it from what the base returned, where it has swallowed the digits of W x."""
    base = linear(seed, 40, 24, dtype)
    base.weight.mul_(0.01)
    base.bias.fill_(200)
    layer = fresh(base, 1e-4)
    layer.adapters["new"].magnitude.data.mul_(1000)
    x = randn(seed + 50, 33, 40, dtype=dtype)
    exact = applied_by_loops(layer, x)
    assert_precision(layer(x), torch.from_numpy(exact).to(dtype), exact)
    k, branch = 1000, layer.branch(x, layer.adapters["new"], lambda x: x)
    swallowed = base(x) + (k - 1) * (base(x) - base.bias) + k * branch
    assert precision(swallowed, torch.from_numpy(exact).to(dtype), exact) > 10


@given(seeds, scales, bits, st.sampled_from([torch.float32, torch.bfloat16]))
def test_no_weight_is_kept_for_the_backward_pass(seed, scale, bits, dtype):
    layer = AdapterLinear(linear(seed, 40, 24, dtype, bits), "layer")
    add(layer, "new", seed, 3, scale, use_dora=True, has_start=True, dtype=torch.float32)
    held = {tensor.data_ptr() for tensor in layer.state_dict().values()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(randn(seed + 50, 5, 40, dtype=dtype).requires_grad_())
    assert kept
    assert all(tensor.numel() < 24 * 40 for tensor in kept if tensor.data_ptr() not in held)
