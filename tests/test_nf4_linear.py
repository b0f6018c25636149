import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from minilora.quant.linear import NF4Linear
from minilora.quant.nf4 import dequantize, dequantize_absmax, quantize, quantize_absmax
from tests.models import seeds
from tests.tolerance import assert_maths

sizes = st.tuples(st.integers(1, 9), st.sampled_from([1, 7, 32, 64, 96, 128]))
leading = st.lists(st.integers(1, 3), max_size=2)


def make(size, seed, has_bias=True, **options):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(size, generator=generator, dtype=torch.float64)
    bias = torch.randn(size[0], generator=generator, dtype=torch.float64) if has_bias else None
    return NF4Linear(weight, bias, **options), weight, bias, generator


def dense(weight, is_double, dtype):
    packed, absmax = quantize(weight)
    absmax = dequantize_absmax(*quantize_absmax(absmax)) if is_double else absmax
    return dequantize(packed, absmax, weight.shape, dtype)


@given(sizes, leading, seeds, st.booleans(), st.booleans())
def test_forward_and_gradient_are_those_of_the_dequantized_weight(size, leading, seed, has_bias, is_double):
    layer, weight, bias, generator = make(size, seed, has_bias, is_double=is_double)
    x = torch.randn(*leading, size[1], generator=generator, dtype=torch.float64, requires_grad=True)
    dense_weight = dense(weight, is_double, torch.float64)
    assert torch.equal(layer.dense_weight(), dense_weight)
    ours, theirs = layer(x), F.linear(x, dense_weight, bias)
    dy = torch.randn(theirs.shape, generator=generator, dtype=torch.float64)
    assert_maths(ours, theirs)
    (ours_dx,) = torch.autograd.grad(ours, x, dy)
    (theirs_dx,) = torch.autograd.grad(theirs, x, dy)
    assert_maths(ours_dx, theirs_dx)


@pytest.mark.parametrize("is_double", [True, False])
def test_the_gradient_is_that_of_small_differences(is_double):
    layer, _, _, generator = make((3, 64), 0, is_double=is_double)
    x = torch.randn(2, 64, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_nothing_is_trained_and_nothing_dense_is_stored():
    layer, *_ = make((256, 64), 1)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert not list(layer.buffers())
    bits = 8 * sum(p.nbytes for name, p in layer.named_parameters() if name not in ("bias", "offset"))
    assert bits / (256 * 64) == 4 + 8 / 64 + 32 / (64 * 256)
    assert layer.packed.shape == (256, 32)
    assert layer.absmax.shape == (256, 1)


def test_what_autograd_keeps_is_what_is_stored():
    layer, *_ = make((128, 64), 2, dtype=torch.float32)
    stored = {parameter.data_ptr() for parameter in layer.parameters()}
    x = torch.ones(5, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    assert kept
    assert {tensor.data_ptr() for tensor in kept} <= stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_computation_has_a_dtype_of_its_own_and_the_gradient_that_of_x(dtype):
    layer, *_ = make((4, 64), 3, dtype=dtype)
    x = torch.ones(2, 64, requires_grad=True)
    y = layer(x)
    assert (y.dtype, layer.dense_weight().dtype) == (dtype, dtype)
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_a_second_derivative_is_refused():
    layer, *_ = make((2, 64), 4)
    x = torch.ones(1, 64, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_computing_again_changes_nothing():
    layer, *_ = make((4, 64), 5)
    x = torch.linspace(-1, 1, 128, dtype=torch.float64).view(2, 64).requires_grad_()
    plain, again = layer(x), torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    assert torch.equal(plain, again)
    (expected,) = torch.autograd.grad(plain.sum(), x)
    (found,) = torch.autograd.grad(again.sum(), x)
    assert torch.equal(found, expected)
