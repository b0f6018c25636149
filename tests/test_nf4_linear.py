"""The 4-bit linear: it computes and learns as the dequantized weight does, and keeps nothing dense."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import minilora as ml
from minilora.adapters.find import shared_scratch
from minilora.quant.linear import NF4Linear, dense_weight
from minilora.quant.nf4 import dequantize, dequantize_absmax, quantize, quantize_absmax
from tests.models import compile_with, long, randn, randomize_adapters_, seeds
from tests.tolerance import assert_maths, assert_parity, assert_precision

sizes = st.tuples(st.integers(1, 9), st.sampled_from([1, 7, 32, 64, 96, 128]))
leading = st.lists(st.integers(1, 3), max_size=2)


def make(size, seed, has_bias=True, **options):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(size, generator=generator, dtype=torch.float64)
    bias = torch.randn(size[0], generator=generator, dtype=torch.float64) if has_bias else None
    return NF4Linear.quantize(weight, bias, **options), weight, bias, generator


def unpacked(weight, double_quant, dtype):
    packed, absmax = quantize(weight)
    absmax = dequantize_absmax(*quantize_absmax(absmax)) if double_quant else absmax
    return dequantize(packed, absmax, weight.shape, dtype)


@given(sizes, leading, seeds, st.booleans(), st.booleans())
def test_forward_and_gradient_are_those_of_the_dequantized_weight(size, leading, seed, has_bias, double_quant):
    layer, weight, bias, generator = make(size, seed, has_bias, double_quant=double_quant)
    x = torch.randn(*leading, size[1], generator=generator, dtype=torch.float64, requires_grad=True)
    expected = unpacked(weight, double_quant, torch.float64)
    assert torch.equal(dense_weight(layer), expected)
    ours, theirs = layer(x), F.linear(x, expected, bias)
    dy = torch.randn(theirs.shape, generator=generator, dtype=torch.float64)
    assert_maths(ours, theirs)
    (ours_dx,) = torch.autograd.grad(ours, x, dy)
    (theirs_dx,) = torch.autograd.grad(theirs, x, dy)
    assert_maths(ours_dx, theirs_dx)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_one_weight_acts_both_ways_whatever_the_dtype_that_it_was_stored_in(stored, dtype):
    layer = NF4Linear.quantize(randn(0, 7, 96, dtype=stored), dtype=dtype)
    x, dy = randn(1, 5, 96, dtype=dtype).requires_grad_(), randn(2, 5, 7, dtype=dtype)
    y = layer(x)
    y.backward(dy)
    assert torch.equal(y, F.linear(x, dense_weight(layer)))
    assert torch.equal(x.grad, dy @ dense_weight(layer))


@given(sizes, leading, seeds, st.booleans())
def test_a_bias_may_be_trained_with_x_and_without(size, leading, seed, is_frozen):
    layer, _, bias, generator = make(size, seed)
    layer.bias.requires_grad_()
    x = torch.randn(*leading, size[1], generator=generator, dtype=torch.float64, requires_grad=not is_frozen)
    y, expected = layer(x), F.linear(x, dense_weight(layer), bias.requires_grad_())
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    y.backward(dy)
    assert_maths(layer.bias.grad, torch.autograd.grad(expected, bias, dy)[0])
    assert (x.grad is None) == is_frozen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_a_bias_in_another_dtype_is_as_good_as_plain_pytorch_s(dtype):
    layer, *_ = make((5, 64), 8, dtype=dtype)
    layer.bias = torch.nn.Parameter(layer.bias.float())
    dy = randn(3, 40, 5, dtype=dtype)
    layer(randn(2, 40, 64, dtype=dtype)).backward(dy)
    assert layer.bias.grad.dtype == torch.float32
    assert_precision(layer.bias.grad.to(dtype), dy.sum(0), dy.double().sum(0))


def test_no_gradient_is_made_of_an_x_that_needs_none(monkeypatch):
    layer, *_ = make((4, 64), 9)
    layer.bias.requires_grad_()
    y = layer(torch.ones(2, 64, dtype=torch.float64))
    monkeypatch.setattr("minilora.quant.linear.unpack", None)  # W is not needed again
    y.sum().backward()


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_gradient_is_that_of_small_differences(double_quant):
    layer, _, _, generator = make((3, 64), 0, double_quant=double_quant)
    x = torch.randn(2, 64, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_nothing_is_trained_and_nothing_dense_is_stored():
    layer, *_ = make((256, 64), 1)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert not list(layer.buffers())
    assert all(parameter.dim() for parameter in layer.parameters())  # FSDP refuses scalars
    bits = 8 * sum(p.nbytes for name, p in layer.named_parameters() if name not in ("bias", "offset"))
    assert bits / (256 * 64) == 4 + 8 / 64 + 32 / (64 * 256)
    assert layer.packed.shape == (256, 32)
    assert layer.absmax.shape == (256, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_autograd_keeps_x_and_r_numbers_a_token_of_an_adapted_layer_and_nothing_else(dtype, double_quant):
    layer, *_ = make((512, 512), 2, dtype=dtype, double_quant=double_quant)
    model = torch.nn.Sequential(layer)
    ml.attach(model, ml.LoraConfig(r=16, lora_alpha=24, target_modules=["0"]))
    x = torch.ones(2048, 512, dtype=dtype, requires_grad=True)
    known = {tensor.untyped_storage().data_ptr() for tensor in [x, *model.parameters()]}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.setdefault(tensor.untyped_storage().data_ptr(), tensor), lambda tensor: tensor
    ):
        model(x)
    assert known & set(kept)
    beyond = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in known)
    assert beyond == 2048 * 16 * dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_computation_has_a_dtype_of_its_own_and_the_gradient_that_of_x(dtype):
    layer, *_ = make((4, 64), 3, dtype=dtype)
    x = torch.ones(2, 64, requires_grad=True)
    y = layer(x)
    assert (y.dtype, dense_weight(layer).dtype) == (dtype, dtype)
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_a_shared_scratch_changes_no_bit_and_is_one_for_all_linears():
    """Of different sizes, in two dtypes, with an adapter of each kind on them, and computed again in backward."""
    sizes_ = [(96, 64), (64, 128), (128, 96)]
    layers = [NF4Linear.quantize(randn(i, n, k, dtype=torch.bfloat16)) for i, (n, k) in enumerate(sizes_)]
    model = torch.nn.Sequential(*reversed(layers), NF4Linear.quantize(randn(9, 32, 96), dtype=torch.float32))
    for i, use_dora in enumerate((True, False)):
        ml.attach(model, ml.LoraConfig(r=2, lora_alpha=6, target_modules=[str(i)], use_dora=use_dora), name=f"a{i}")
    ml.set_adapter(model, ["a0", "a1"])
    randomize_adapters_(model)
    leaves, x = [p for p in model.parameters() if p.requires_grad], randn(5, 7, 96, dtype=torch.bfloat16)
    known = [layer for layer in model.modules() if isinstance(layer, NF4Linear)]

    def results():
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
        return [y, *torch.autograd.grad(y.square().sum(), leaves), model[0].merged_weight(), dense_weight(known[-1])]

    plain = results()
    with shared_scratch(model):
        assert len({id(layer.scratch) for layer in known}) == 1
        shared = results()
        before = known[0].scratch.memory.data_ptr()
        again = results()
        assert known[0].scratch.memory.data_ptr() == before
        assert known[0].scratch.memory.numel() == 128 * 96 * 2
        assert before not in {tensor.untyped_storage().data_ptr() for tensor in again}
    assert all(layer.scratch is None for layer in known)
    for own, first, second in zip(plain, shared, again, strict=True):
        assert torch.equal(own, first)
        assert torch.equal(own, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("double_quant", [True, False])
def test_another_dtype_is_that_of_the_computation_and_rounds_nothing_that_is_stored(dtype, double_quant):
    layer, *_ = make((4, 64), 6, double_quant=double_quant, dtype=torch.float32)
    before = [None if part is None else part.clone() for part in layer.parts]
    layer.to(dtype)
    assert all(new is old or torch.equal(new, old) for new, old in zip(layer.parts, before, strict=True))
    assert layer.bias.dtype == dense_weight(layer).dtype == layer(torch.ones(1, 64)).dtype == dtype


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler itself
@pytest.mark.parametrize("backend", ["aot_eager", *long("inductor")])
def test_compiling_changes_nothing_and_breaks_no_graph(backend, monkeypatch):
    compile_with(monkeypatch, backend)
    layer, *_ = make((48, 96), 7, dtype=torch.float32)
    model = torch.nn.Sequential(layer)
    ml.attach(model, ml.LoraConfig(r=4, lora_alpha=6, target_modules=["0"]))
    randomize_adapters_(model)
    x = torch.linspace(-1, 1, 5 * 96).view(5, 96).requires_grad_()
    results = []
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    with shared_scratch(model):
        for run in (model, torch.compile(model, backend=backend, fullgraph=True)):
            y = run(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert_parity(compiled, eager)


def test_computing_again_changes_nothing():
    layer, *_ = make((4, 64), 5)
    x = torch.linspace(-1, 1, 128, dtype=torch.float64).view(2, 64).requires_grad_()
    plain, again = layer(x), torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    assert torch.equal(plain, again)
    (expected,) = torch.autograd.grad(plain.sum(), x)
    (found,) = torch.autograd.grad(again.sum(), x)
    assert torch.equal(found, expected)
