import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from minilora.adapters.functional import (
    dora_norm,
    dora_stretch,
    dropout_seed,
    lora_branch,
    lora_delta,
    lora_linear,
    lora_scale,
    seeded_dropout,
)
from minilora.testing import reference
from tests.models import examples, randn, scales, seeds, sizes, small_tiles
from tests.tolerance import assert_maths, assert_precision, precision

keys = st.text("01/qé", max_size=8)
lows = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
leading = st.lists(sizes, max_size=2)
RELUS = torch.relu, torch.relu_


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """A few rows are several tiles."""
    small_tiles(monkeypatch, 100)


@given(sizes, scales)
def test_scale_is_alpha_over_r_and_over_its_root_for_rslora(r, alpha):
    plain, stable = lora_scale(r, alpha), lora_scale(r, alpha, use_rslora=True)
    assert_maths(torch.tensor([plain * r, stable * stable * r], dtype=torch.float64), torch.tensor([alpha, alpha**2]))


@given(seeds, sizes, sizes, sizes, sizes, scales, st.sets(st.sampled_from(["x", "A", "B"]), min_size=1))
def test_branch_and_delta_equal_the_loops_and_what_is_trained_gets_their_gradient(
    seed, n, inner, outer, r, scale, trained
):
    x, A, B, dy = (randn(seed + i, *shape) for i, shape in enumerate([(n, inner), (r, inner), (outer, r), (n, outer)]))
    arrays, zero = [tensor.numpy() for tensor in (x, A, B)], torch.zeros(outer, inner).double().numpy()
    assert_maths(lora_delta(A, B, scale), reference.lora_merged_weight(zero, *arrays[1:], scale))
    tensors = {"x": x.clone(), "A": A.clone(), "B": B.clone()}
    for name in trained:
        tensors[name].requires_grad_()
    y = lora_branch(*tensors.values(), scale)
    assert_maths(y, reference.lora_forward(arrays[0], zero, None, *arrays[1:], scale))
    y.backward(dy)
    dA, dB = reference.lora_gradients(arrays[0], dy.numpy(), *arrays[1:], scale)
    for name, expected in {"x": scale * dy @ B @ A, "A": dA, "B": dB}.items():
        assert (tensors[name].grad is not None) == (name in trained)
        if name in trained:
            assert_maths(tensors[name].grad, expected)


def linear_arguments(seed, leading, inner, outer, r, dtype=torch.float64):
    """x, W, b, A and B, as `lora_linear` takes them; the adapter is in float32 at least."""
    x, weight, bias = randn(seed, *leading, inner), randn(seed + 1, outer, inner), randn(seed + 2, outer)
    wide = torch.promote_types(dtype, torch.float32)
    factors = randn(seed + 3, r, inner), randn(seed + 4, outer, r)
    return [tensor.to(dtype) for tensor in (x, weight, bias)] + [factor.to(wide) for factor in factors]


def obvious_linear(x, weight, bias, A, B, scale):
    branch = scale * F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))
    return branch if weight is None else F.linear(x, weight, bias) + branch


@given(seeds, leading, sizes, sizes, sizes, scales, st.sets(st.integers(0, 4), min_size=1), st.booleans())
def test_a_linear_with_its_branch_is_the_sum_of_both_whatever_is_trained(
    seed, leading, inner, outer, r, scale, trained, has_bias
):
    tensors = linear_arguments(seed, leading, inner, outer, r)
    if not has_bias:
        tensors[2], trained = None, trained - {2} or {0}
    leaves = [tensors[i].requires_grad_() for i in trained]
    ours, plain = lora_linear(*tensors, scale), obvious_linear(*tensors, scale)
    assert_maths(ours, plain)
    dy = randn(seed + 5, *plain.shape)
    for our, their in zip(*(torch.autograd.grad(y, leaves, dy) for y in (ours, plain)), strict=True):
        assert_maths(our, their)


@examples(0.4)
@given(seeds, scales)
def test_gradients_are_those_of_small_differences(seed, scale):
    tensors = [tensor.requires_grad_() for tensor in linear_arguments(seed, [3], 4, 5, 2)]
    y, k = randn(seed + 5, 22, 5).requires_grad_(), randn(seed + 6, 5).requires_grad_()
    linear, branch = (functools.partial(function, scale=scale) for function in (lora_linear, lora_branch))
    for function, inputs in ((linear, tensors), (branch, [tensors[0], *tensors[3:]]), (dora_stretch, [y, k])):
        assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("is_branch", [False, True], ids=["linear", "branch"])
@given(seeds, scales, lows | st.just("autocast"))
def test_in_low_precision_values_and_gradients_are_as_good_as_plain_pytorch_s(is_branch, seed, scale, dtype):
    """Of a size at which the largest errors are alike."""
    is_autocast = dtype == "autocast"
    computed, given_dtype = (torch.bfloat16, torch.float32) if is_autocast else (dtype, dtype)
    x, *base, A, B = linear_arguments(seed, [33], 40, 24, 8, given_dtype)
    base = [None, None] if is_branch else base
    leaves = [tensor.requires_grad_() for tensor in (x, *base, A, B) if tensor is not None]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    dy, results = randn(seed + 5, 33, 24, dtype=computed), []
    for function, own in ((lora_linear, leaves), (obvious_linear, leaves), (obvious_linear, wide)):
        first, *middle, lora_A, lora_B = own
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            y = function(first, *(middle or (None, None)), lora_A, lora_B, scale)
        results.append([y, *torch.autograd.grad(y, own, dy.to(y.dtype))])
    for our, their, exact, like in zip(*results, [dy, *leaves], strict=True):
        assert our.dtype == like.dtype
        assert_precision(our.to(computed), their.to(computed), exact.detach())


@given(seeds, scales, lows, st.integers(1, 9))
def test_a_few_tokens_without_gradients_are_as_good_as_plain_pytorch(seed, scale, dtype, n):
    """Fewer than r, where x is cast and not A and B, and more."""
    x, weight, bias, *factors = linear_arguments(seed, [n], 40, 24, 8, dtype)
    for base in ((weight, bias), (None, None)):
        with torch.no_grad():
            ours, plain = (function(x, *base, *factors, scale) for function in (lora_linear, obvious_linear))
            wide = [tensor if tensor is None else tensor.double() for tensor in (x, *base, *factors)]
            in_float64, exact = lora_linear(*wide[:3], *factors, scale), obvious_linear(*wide, scale)
        assert ours.dtype == dtype
        assert_precision(ours, plain, exact)
        assert_maths(in_float64, exact)


@given(seeds, scales, st.booleans())
def test_what_was_cast_before_acts_as_what_is_cast_here_and_its_master_gets_the_gradient(seed, scale, has_weight):
    x, weight, bias, *factors = linear_arguments(seed, [5], 6, 4, 3, torch.bfloat16)
    leaves, dy = [x.requires_grad_(), *(factor.requires_grad_() for factor in factors)], randn(1, 5, 4).bfloat16()
    results = []
    for cast in (None, tuple(factor.detach().bfloat16() for factor in factors)):
        base = (weight, bias) if has_weight else ()
        y = (lora_linear if has_weight else lora_branch)(x, *base, *factors, scale, cast)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    for own, given_ in zip(*results, strict=True):
        assert own.dtype == given_.dtype
        assert torch.equal(own, given_)


def kept_beyond(tensors, function):
    """Bytes that autograd keeps of a call, besides what is stored anyway."""
    known, kept = {tensor.untyped_storage().data_ptr() for tensor in tensors}, {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.setdefault(tensor.untyped_storage().data_ptr(), tensor), lambda tensor: tensor
    ):
        function()
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in known)


@given(seeds, lows, st.booleans())
def test_of_a_linear_r_numbers_a_row_are_kept_besides_x_and_of_a_stretch_nothing(seed, dtype, is_cast):
    N, r = 30, 3
    tensors = [tensor.requires_grad_() for tensor in linear_arguments(seed, [N], 20, 10, r, dtype)]
    cast = tuple(factor.detach().to(dtype) for factor in tensors[3:])
    known = [*tensors, *cast]
    assert kept_beyond(known, lambda: lora_linear(*tensors, 0.5, cast if is_cast else None)) == N * r * dtype.itemsize
    tensors[1].requires_grad_(False)
    tensors[3].requires_grad_(False)  # x is there for the gradients of W and A alone
    assert kept_beyond(known[1:], lambda: lora_linear(*tensors, 0.5)) == N * r * dtype.itemsize
    y, k = randn(seed, N, 10).to(dtype).requires_grad_(), randn(seed, 10).float().requires_grad_()
    assert kept_beyond([y, k], lambda: dora_stretch(y, k)) == 0


@given(seeds, lows, st.sampled_from([1, 1000]))
def test_a_stretch_is_rounded_once_and_its_gradients_are_as_good_as_plain_pytorch_s(seed, dtype, size):
    y, k, dz = randn(seed, 33, 24).to(dtype), randn(seed + 1, 24).float() / size, randn(seed + 2, 33, 24).to(dtype)
    leaves = [y.requires_grad_(), k.requires_grad_()]
    ours, plain, exact = dora_stretch(y, k), y * k.to(dtype), y.double() * k.double()
    assert torch.equal(ours, (y * k).to(dtype))
    results = (torch.autograd.grad(z, leaves, dz.to(z.dtype)) for z in (ours, plain, exact))
    for our, their, oracle in zip(*results, strict=True):
        assert_precision(our.to(dtype), their.to(dtype), oracle)


@given(seeds, sizes, sizes, sizes, sizes, scales)
def test_what_comes_next_may_change_a_result_in_place(seed, n, inner, outer, r, scale):
    leaves = [tensor.requires_grad_() for tensor in linear_arguments(seed, [n], inner, outer, r)]
    k = randn(seed + 6, outer).requires_grad_()
    for function in (lambda: lora_linear(*leaves, scale), lambda: dora_stretch(lora_linear(*leaves, scale), k)):
        results = (torch.autograd.grad(relu(function()).sum(), [*leaves, k], allow_unused=True) for relu in RELUS)
        assert all(torch.equal(own, other) for own, other in zip(*results, strict=True) if own is not None)


def test_where_no_gradient_comes_in_none_goes_out():
    """Zeros would be made for it, and an optimizer would take a step with them."""
    leaves = [tensor.requires_grad_() for tensor in linear_arguments(0, [5], 4, 3, 2)]
    gradients = torch.autograd.grad(Forgetful.apply(lora_linear(*leaves, 2.0)).sum(), leaves, allow_unused=True)
    assert gradients == (None,) * len(leaves)


class Forgetful(torch.autograd.Function):
    """A tensor that does not say what it came from."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


@given(seeds, scales, st.integers(-2, 6))
def test_the_length_of_a_row_that_nearly_vanishes_is_as_good_as_plain_pytorch_s(seed, scale, cancelled):
    """W + s·B A is 10^cancelled times smaller than s·B A; expanded, the square of the length loses twice the digits."""
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


def dropped(x, p, key):
    return seeded_dropout(x, p, torch.tensor(dropout_seed(key)))


@given(seeds, keys, keys, st.sampled_from([0.1, 0.5]))
def test_dropout_is_a_function_of_its_key(seed, key, other, p):
    x = randn(seed, 9, 40)
    state = torch.random.get_rng_state()
    first, again = (dropped(x, p, key) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(state, torch.random.get_rng_state())
    assert key == other or not torch.equal(first, dropped(x, p, other))


@given(keys, st.sampled_from([0.1, 0.3, 0.5]))
def test_dropout_keeps_a_share_of_1_minus_p_scaled_up_by_as_much(key, p):
    n = 20_000
    x = dropped(torch.ones(n, dtype=torch.float64), p, key)
    assert_maths(x.unique(), [0.0, 1 / (1 - p)])
    sigma = (p * (1 - p) / n) ** 0.5
    assert abs((x == 0).double().mean().item() - p) < 6 * sigma
