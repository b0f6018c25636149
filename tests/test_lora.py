"""LoRA and DoRA: the equations against loops, and the laws of an adapted linear that `test_layers` has not."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minilora import LoraConfig
from minilora.adapters.build import factor_shapes
from minilora.lora import dora_norm, lora_delta, lora_linear, lora_scale, lora_update
from minilora.runs.sampler import SeededDropout, hash_seed
from minilora.testing import reference
from minilora.testing.compare import assert_maths, assert_precision, precision
from tests.adapters import LAYERS, add, add_built, applied_by_loops, merged_by_loops, place
from tests.models import either, of_kernels, randn, scales, seeds, sizes, small_tiles

keys = st.text("01/qé", max_size=8)
kinds = st.sampled_from(["linear", "nf4", "nf4 double"])
lows = st.sampled_from([torch.float32, torch.bfloat16])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
each_layer = pytest.mark.parametrize("kind", LAYERS)
DORA = LoraConfig(r=4, lora_alpha=28, use_dora=True)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Some ten rows are several tiles."""
    small_tiles(monkeypatch, 400)


def make_layer(seed, inner, outer, ranks, scale, dtype=torch.float64, adapter_dtype=torch.float64, kind="linear"):
    """A layer with a LoRA for each rank, all of them active."""
    layer = place(kind, seed, inner, outer, dtype=dtype).layer
    for i, r in enumerate(ranks):
        add(layer, f"adapter{i}", seed + 2 * i, r, scale, dtype=adapter_dtype)
    return layer


def with_dora(layer, size_B=0.0, dtype=torch.float32):
    """The layer with a new DoRA, whose magnitude is not given."""
    base = layer.base
    lora_A, lora_B = randn(1, 4, base.in_features, dtype=dtype), size_B * randn(2, base.out_features, 4, dtype=dtype)
    add_built(layer, "new", DORA, {"lora_A": lora_A, "lora_B": lora_B})
    layer.active = ("new",)
    return layer


def numbers(layer):
    """W, A, B, s and m as the loops take them."""
    adapter = layer.adapters["new"]
    tensors = layer.base.weight, adapter.lora_A, adapter.lora_B
    weight, lora_A, lora_B = (tensor.detach().double().numpy() for tensor in tensors)
    return weight, lora_A, lora_B, adapter.scale, adapter.magnitude.detach().double().numpy()


@given(sizes, scales)
def test_scale_is_alpha_over_r_and_over_its_root_for_rslora(r, alpha):
    plain, stable = lora_scale(r, alpha), lora_scale(r, alpha, use_rslora=True)
    assert_maths(torch.tensor([plain * r, stable * stable * r], dtype=torch.float64), torch.tensor([alpha, alpha**2]))


@given(seeds, sizes, sizes, sizes, sizes, scales)
def test_update_delta_and_linear_equal_the_loops_and_have_their_gradients(seed, n, inner, outer, r, scale):
    x, A, B, dy = (randn(seed + i, *shape) for i, shape in enumerate([(n, inner), (r, inner), (outer, r), (n, outer)]))
    base, zero = place("linear", seed + 4, inner, outer).layer.base, torch.zeros(outer, inner).double().numpy()
    arrays, weight, bias = [tensor.numpy() for tensor in (x, A, B)], base.weight.numpy(), base.bias.numpy()
    assert_maths(lora_delta(A, B, scale), reference.lora_merged_weight(zero, *arrays[1:], scale))
    leaves = [tensor.clone().requires_grad_() for tensor in (x, A, B)]
    update = lora_update(*leaves, scale)
    assert_maths(update, reference.lora_forward(arrays[0], zero, None, *arrays[1:], scale))
    y = lora_linear.function(leaves[0], base, base.bias, *leaves[1:], scale)
    assert_maths(y, reference.lora_forward(arrays[0], weight, bias, *arrays[1:], scale))
    dx, dA, dB = torch.autograd.grad(y, leaves, dy)
    assert_maths(dx, dy.numpy() @ reference.lora_merged_weight(weight, *arrays[1:], scale))
    for our, expected in zip(
        (dA, dB), reference.lora_gradients(arrays[0], dy.numpy(), *arrays[1:], scale), strict=True
    ):
        assert_maths(our, expected)


@given(seeds, sizes, sizes, sizes, scales)
def test_the_norm_is_that_of_the_rows_and_has_no_gradient(seed, inner, outer, r, scale):
    W, A, B = randn(seed, outer, inner), randn(seed + 1, r, inner), randn(seed + 2, outer, r)
    norm = dora_norm.function(W, A.requires_grad_(), B.requires_grad_(), scale)
    merged = reference.lora_merged_weight(W.numpy(), A.detach().numpy(), B.detach().numpy(), scale)
    assert_maths(norm, (merged**2).sum(1) ** 0.5)
    assert not norm.requires_grad


@given(seeds, scales, st.integers(-2, 6))
def test_the_norm_of_a_row_that_nearly_vanishes_is_as_good_as_plain_pytorch_s(seed, scale, cancelled):
    """W + s·B A is 10^cancelled times smaller than s·B A; expanded, the square of the norm loses twice the digits."""
    A, B = randn(seed, 8, 64).float(), randn(seed + 1, 96, 8).float()
    delta = scale * B.double() @ A.double()
    rest = randn(seed + 2, 96, 64) * delta.norm() / delta.numel() ** 0.5
    W = (rest * 10.0**-cancelled - delta).float()
    exact = (W.double() + delta).norm(dim=1)
    plain = (W + scale * (B @ A)).norm(dim=1)
    norm, one = dora_norm(W, A, B, scale), torch.ones(96)
    assert_precision((norm / exact).float(), (plain / exact).float(), one)
    if cancelled >= 2:
        square = W.square().sum(1) + ((2 * scale * W @ A.T + scale**2 * B @ (A @ A.T)) * B).sum(1)
        expanded = square.clamp(min=0).sqrt() / exact
        assert precision(expanded.float(), (plain / exact).float(), one) > 10


@given(seeds, scales)
def test_under_autocast_the_norm_is_what_it_is_without_and_without_numbers_it_has_its_shape(seed, scale):
    W, A, B = (randn(seed + i, *shape).float() for i, shape in enumerate([(24, 40), (4, 40), (24, 4)]))
    with torch.autocast("cpu", torch.bfloat16):
        found = dora_norm(W, A, B, scale)
    assert torch.equal(found, dora_norm(W, A, B, scale))
    assert dora_norm(W.to("meta"), A.to("meta"), B.to("meta"), scale).shape == (24,)


def keyed(p, key):
    dropout = SeededDropout(p)
    dropout.seed = hash_seed(key)
    return dropout


@given(keys, st.sampled_from([0.1, 0.3, 0.5]))
def test_dropout_keeps_a_share_of_1_minus_p_scaled_up_by_as_much(key, p):
    n = 20_000
    x = keyed(p, key)(torch.ones(n, dtype=torch.float64))
    assert_maths(x.unique(), [0.0, 1 / (1 - p)])
    sigma = (p * (1 - p) / n) ** 0.5
    assert abs((x == 0).double().mean().item() - p) < 6 * sigma


def test_dropout_draws_from_the_random_state_of_pytorch_only_without_a_step():
    layer, x = make_layer(0, 4, 4, [2], 2.0).train(), randn(3, 5, 4)
    layer.adapters["adapter0"].dropout = nn.Dropout(0.5)
    torch.manual_seed(5)
    first, second = layer(x), layer(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), first)
    assert not torch.equal(second, first)
    layer.adapters["adapter0"].dropout = keyed(0.5, "0/0")
    state = torch.get_rng_state()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(layer(x), layer.eval()(x))


@either
@given(seeds, sizes, sizes, sizes, scales, st.booleans())
def test_gradients_of_dora_equal_the_loops_with_the_norm_held_fixed(seed, inner, outer, r, scale, bias):
    layer = place("linear", seed, inner, outer, bias).layer
    add(layer, "new", seed, r, scale, use_dora=True)
    x, dy = randn(seed + 50, 5, inner).requires_grad_(), randn(seed + 51, 5, outer)
    layer(x).backward(dy)
    equation_5, _ = merged_by_loops(layer)
    assert_maths(layer.merged_weight(), equation_5)
    assert_maths(x.grad, dy.numpy() @ equation_5)
    adapter, expected = layer.adapters["new"], reference.dora_gradients(x.detach().numpy(), dy.numpy(), *numbers(layer))
    for parameter, gradient in zip((adapter.lora_A, adapter.lora_B, adapter.magnitude), expected, strict=True):
        assert_maths(parameter.grad, gradient)


@given(seeds, sizes, sizes, sizes, scales, lows, lows)
def test_what_a_base_computes_in_another_dtype_its_adapters_do_too(seed, inner, outer, r, scale, computed, own):
    """The gradient has the dtype of x; and a new adapter changes nothing."""
    layer = make_layer(seed, inner, outer, [r], scale, dtype=computed, adapter_dtype=own, kind="nf4 double")
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


@given(seeds, scales, kinds)
def test_under_autocast_values_and_gradients_are_as_good_as_plain_pytorch_s(seed, scale, kind):
    layer = make_layer(seed, 40, 24, [8], scale, dtype=torch.float32, adapter_dtype=torch.float32, kind=kind)
    x, dy = randn(seed + 50, 33, 40, dtype=torch.float32), randn(seed + 51, 33, 24, dtype=torch.bfloat16)
    A, B = layer.adapters["adapter0"].lora_A, layer.adapters["adapter0"].lora_B
    leaves = [x.requires_grad_(), A, B]
    weight, bias = layer.base.weight, layer.base.bias

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


@each_dtype
@given(seeds, scales, kinds)
def test_low_precision_gradients_of_dora_are_as_good_as_plain_pytorch_s(dtype, seed, scale, kind):
    layer = place(kind, seed, 40, 24, dtype=dtype).layer
    add(layer, "new", seed, 8, scale, use_dora=True, dtype=torch.float32)
    adapter, x, dy = layer.adapters["new"], randn(seed + 50, 33, 40, dtype=dtype), randn(seed + 51, 33, 24, dtype=dtype)
    leaves = [adapter.lora_A, adapter.lora_B, adapter.magnitude]
    A, B, m = (leaf.to(dtype) for leaf in leaves)
    weight = layer.base.weight
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
    shape_A, shape_B = factor_shapes(layer.base, 2)
    add_built(layer, "new", DORA, {"lora_A": randn(1, *shape_A).float(), "lora_B": torch.zeros(shape_B)})
    magnitude, (matrix, _) = layer.adapters["new"].magnitude, merged_by_loops(layer)
    assert magnitude.dtype == torch.float32
    exact = torch.from_numpy((matrix**2).sum(1) ** 0.5)
    assert_precision(magnitude, exact.float(), exact)


@either
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_is_taken_in_float32_whatever_the_dtypes_are(adapter_dtype):
    """Where a sum of 4096 squares in bfloat16 would stop to grow."""
    layer = with_dora(place("linear", 0, 4096, 3, dtype=torch.bfloat16).layer, dtype=adapter_dtype)
    adapter = layer.adapters["new"]
    norm = adapter.magnitude.float() / adapter.rescale(torch.ones(len(layer.base.weight)), layer.base.weight)
    exact = layer.base.weight.double().square().sum(1).sqrt()
    assert norm.dtype == torch.float32
    assert_precision(norm, layer.base.weight.float().norm(dim=1), exact)


@either
@each_dtype
@given(seeds, kinds)
def test_a_new_dora_multiplies_by_1(dtype, seed, kind):
    """k = m / ‖W‖ is 1 to the bit, as both are computed alike, so that only the bias is rounded apart."""
    layer = with_dora(place(kind, seed, 40, 24, dtype=dtype).layer)
    x = randn(seed + 50, 33, 40, dtype=dtype)
    adapter, weight = layer.adapters["new"], layer.base.weight
    assert torch.equal(adapter.rescale(torch.ones(24), weight), torch.ones(24))
    assert torch.equal(layer(x), F.linear(x, weight) + layer.base.bias)
    assert torch.equal(layer.merged_weight(), weight)
    assert_precision(layer(x), layer.base(x), F.linear(x.double(), weight.double(), layer.base.bias.double()))


@either
@each_dtype
@given(seeds)
def test_a_large_bias_is_not_scaled_nor_rounded_twice(dtype, seed):
    """PEFT 0.21 subtracts it from what the base returned, where it has swallowed the digits of W x."""
    layer = place("linear", seed, 40, 24, dtype=dtype).layer
    base = layer.base
    base.weight.mul_(0.01)
    base.bias.fill_(200)
    with_dora(layer, 1e-4)
    layer.adapters["new"].magnitude.data.mul_(1000)
    x = randn(seed + 50, 33, 40, dtype=dtype)
    exact = applied_by_loops(layer, x)
    assert_precision(layer(x), torch.from_numpy(exact).to(dtype), exact)
    k, update = 1000, layer.adapters["new"].update(x)
    swallowed = base(x) + (k - 1) * (base(x) - base.bias) + k * update
    assert precision(swallowed, torch.from_numpy(exact).to(dtype), exact) > 10


@each_dtype
@given(seeds)
def test_an_output_is_scaled_in_float32_and_rounded_once(dtype, seed):
    layer = with_dora(place("linear", seed, 40, 24, dtype=dtype).layer)
    y = randn(seed + 50, 33, 24, dtype=dtype)
    adapter = layer.adapters["new"]
    adapter.magnitude.data.mul_(randn(seed + 51, 24))
    ratio = adapter.rescale(torch.ones(len(layer.base.weight)), layer.base.weight)
    assert ratio.dtype == torch.float32
    assert torch.equal(adapter.rescale(y, layer.base.weight), (ratio * y.float()).to(dtype))


@of_kernels
@given(seeds, scales, kinds, lows)
def test_dora_keeps_no_weight_for_the_backward_pass(seed, scale, kind, dtype):
    layer = place(kind, seed, 40, 24, dtype=dtype).layer
    add(layer, "new", seed, 3, scale, use_dora=True, has_start=True, dtype=torch.float32)
    held = {tensor.data_ptr() for tensor in layer.state_dict().values()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(randn(seed + 50, 5, 40, dtype=dtype).requires_grad_())
    assert kept
    assert all(tensor.numel() < 24 * 40 for tensor in kept if tensor.data_ptr() not in held)


def test_a_printed_layer_shows_its_adapters_by_name_with_rank_scale_and_dropout():
    layer = make_layer(0, 4, 5, (3, 2), 0.25)
    layer.adapters["adapter1"].dropout.p = 0.2
    shown = " ".join(str(layer).split())
    assert "(adapter0): LoraAdapter( r=3, scale=0.25 (dropout): Dropout(p=0.0" in shown
    assert "(adapter1): LoraAdapter( r=2, scale=0.25 (dropout): Dropout(p=0.2" in shown


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_an_error_of_a_merged_tensor_is_raised_and_the_base_s_is_not_returned(name):
    layer = make_layer(0, 4, 3, [2], 1.0)
    layer.active = ("adapter0",)
    layer.adapters["adapter0"] = nn.Identity()
    with pytest.raises(AttributeError, match=name):
        getattr(layer, name)
