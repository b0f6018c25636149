import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from minilora.lora.functional import keyed_dropout, lora_branch, lora_delta, lora_scale
from minilora.testing import reference
from tests.models import randn, scales, seeds, sizes
from tests.tolerance import assert_maths, assert_precision

keys = st.text(max_size=8)
lows = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def exact_gradients(x, A, B, scale, dy):
    dA, dB = reference.lora_gradients(x.numpy(), dy.numpy(), A.numpy(), B.numpy(), scale)
    return {"x": scale * dy @ B @ A, "A": dA, "B": dB}


@given(sizes, scales)
def test_scale_is_alpha_over_r_and_over_its_root_for_rslora(r, alpha):
    plain, stable = lora_scale(r, alpha), lora_scale(r, alpha, use_rslora=True)
    assert_maths(torch.tensor([plain * r, stable * stable * r], dtype=torch.float64), torch.tensor([alpha, alpha**2]))


@given(seeds, sizes, sizes, sizes, sizes, scales)
def test_branch_and_delta_equal_the_loops(seed, n, inner, outer, r, scale):
    x, A, B = randn(seed, n, inner), randn(seed + 1, r, inner), randn(seed + 2, outer, r)
    zero = torch.zeros(outer, inner).double().numpy()
    assert_maths(
        lora_branch(x, A, B, scale), reference.lora_forward(x.numpy(), zero, None, A.numpy(), B.numpy(), scale)
    )
    assert_maths(lora_delta(A, B, scale), reference.lora_merged_weight(zero, A.numpy(), B.numpy(), scale))


@given(seeds, sizes, sizes, sizes, sizes, scales, st.sets(st.sampled_from(["x", "A", "B"]), min_size=1))
def test_what_is_trained_gets_the_gradient_of_the_loops_whatever_else_is_frozen(
    seed, n, inner, outer, r, scale, trained
):
    tensors = {"x": randn(seed, n, inner), "A": randn(seed + 1, r, inner), "B": randn(seed + 2, outer, r)}
    dy, expected = randn(seed + 3, n, outer), exact_gradients(*tensors.values(), scale, randn(seed + 3, n, outer))
    for name in trained:
        tensors[name].requires_grad_()
    lora_branch(*tensors.values(), scale).backward(dy)
    for name, tensor in tensors.items():
        assert (tensor.grad is not None) == (name in trained)
        if name in trained:
            assert_maths(tensor.grad, expected[name])


def leaves_and_dy(seed, x_dtype, dy_dtype):
    """x, A, B, and the gradient of Δy; of a size at which the largest errors are alike."""
    x, A, B, dy = randn(seed, 33, 40), randn(seed + 1, 8, 40), randn(seed + 2, 24, 8), randn(seed + 3, 33, 24)
    return [tensor.requires_grad_() for tensor in (x.to(x_dtype), A.float(), B.float())], dy.to(dy_dtype)


@given(seeds, scales, lows)
def test_low_precision_gradients_are_as_good_as_plain_pytorch_s(seed, scale, dtype):
    leaves, dy = leaves_and_dy(seed, dtype, dtype)
    x, A, B = leaves
    ours = torch.autograd.grad(lora_branch(x, A, B, scale), leaves, dy)
    plain = torch.autograd.grad(scale * F.linear(F.linear(x, A.to(dtype)), B.to(dtype)), leaves, dy)
    exact = exact_gradients(*(tensor.detach().double() for tensor in leaves), scale, dy.double())
    for our, their, oracle, leaf in zip(ours, plain, exact.values(), leaves, strict=True):
        assert our.dtype == leaf.dtype
        assert_precision(our.to(dtype), their.to(dtype), oracle)


@given(seeds, scales)
def test_under_autocast_gradients_are_as_good_as_plain_pytorch_s(seed, scale):
    leaves, dy = leaves_and_dy(seed, torch.float32, torch.bfloat16)
    x, A, B = leaves
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = lora_branch(x, A, B, scale), scale * F.linear(F.linear(x, A), B)
    exact = exact_gradients(*(tensor.detach().double() for tensor in leaves), scale, dy.double())
    assert ours.dtype == plain.dtype
    ours, plain = (torch.autograd.grad(y, leaves, dy) for y in (ours, plain))
    for our, their, oracle in zip(ours, plain, exact.values(), strict=True):
        assert our.dtype == torch.float32
        assert_precision(our.bfloat16(), their.bfloat16(), oracle)


@given(seeds, keys, keys, st.sampled_from([0.1, 0.5]))
def test_dropout_is_a_function_of_its_key(seed, key, other, p):
    x = randn(seed, 9, 40)
    state = torch.random.get_rng_state()
    first, again = keyed_dropout(x, p, key), keyed_dropout(x, p, key)
    assert torch.equal(first, again)
    assert torch.equal(state, torch.random.get_rng_state())
    assert key == other or not torch.equal(first, keyed_dropout(x, p, other))


@given(keys, st.sampled_from([0.1, 0.3, 0.5]))
def test_dropout_keeps_a_share_of_1_minus_p_scaled_up_by_as_much(key, p):
    n = 20_000
    dropped = keyed_dropout(torch.ones(n, dtype=torch.float64), p, key)
    assert_maths(dropped.unique(), [0.0, 1 / (1 - p)])
    sigma = (p * (1 - p) / n) ** 0.5
    assert abs((dropped == 0).double().mean().item() - p) < 6 * sigma
