"""NF4 besides its laws (`test_nf4_laws.py`): constants, bitsandbytes' codes at the edges, default dtypes, the layer."""

import math
import runpy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import minilora as ml
from minilora import nf4
from minilora.nf4 import (
    DYNAMIC_MAP,
    LEVELS,
    NF4Linear,
    quantize,
    quantize_weight,
)
from minilora.testing import reference
from tests.golden.make_quantized import FILE, SMALL
from tests.models import default_dtype, either, randn


def test_the_levels_are_quantiles_of_the_normal_distribution():
    derived = torch.from_numpy(reference.nf4_levels())
    published = torch.tensor(LEVELS, dtype=torch.float64)
    assert (derived - published).abs().max() < 2**-22  # in the published ones quantiles have float32's last bits
    assert LEVELS == reference.NF4_LEVELS
    assert LEVELS[7] == 0


defaults = pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16, "meta"], ids=str)


def context(default):
    return torch.device(default) if default == "meta" else default_dtype(default)


def assert_same(found, expected):
    for tensor, other in zip(found, expected, strict=True):
        assert tensor is other or (tensor.dtype == other.dtype and torch.equal(tensor, other))


@either
@defaults
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("size", [(3, 65), (8, 64)])
def test_a_default_dtype_or_device_changes_nothing(size, double_quant, default):
    weight, layout = randn(0, *size, dtype=torch.float32), nf4.Layout(size, torch.float32)
    parts = quantize_weight(weight, double_quant)
    with context(default):
        found = quantize_weight(weight, double_quant)
        dense = nf4.dequantize_weight(parts, layout, torch.float32)
    assert_same([*found, dense], [*parts, nf4.dequantize_weight(parts, layout, torch.float32)])


@defaults
def test_a_default_dtype_or_device_at_the_import_changes_no_table(default):
    with context(default):
        tables = runpy.run_path(nf4.__file__)
    assert_same([tables["DYNAMIC_MAP"]], [DYNAMIC_MAP])
    assert_same([tables["NF4"]], [nf4.NF4])


@either
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_weight_on_meta_is_packed_and_unpacked_on_meta(double_quant):
    size = (3, 65)
    parts = quantize_weight(torch.empty(size, device="meta"), double_quant)
    numbers = quantize_weight(torch.ones(size), double_quant)
    for part, like in zip(parts, numbers, strict=True):
        assert part is like or (part.is_meta and (part.shape, part.dtype) == (like.shape, like.dtype))
    dense = nf4.dequantize_weight(parts, nf4.Layout(size, torch.float32), torch.bfloat16)
    assert (dense.is_meta, dense.shape, dense.dtype) == (True, size, torch.bfloat16)


@either
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_ends_of_blocks_midpoints_zeros_and_constants_are_those_of_bitsandbytes(name, double_quant):
    frozen = {key.removeprefix(f"{name}."): part for key, part in load_file(FILE).items() if key.startswith(name)}
    names = ("packed", "absmax", "scales", "offset") if double_quant else ("packed", "plain")
    found = quantize_weight(frozen["dense"], double_quant)
    assert_same([part for part in found if part is not None], [frozen[part].view(-1) for part in names])


def test_the_second_levels_are_256_with_zero_in_the_middle():
    assert (DYNAMIC_MAP - torch.from_numpy(reference.absmax_levels())).abs().max() < 2**-24
    assert len(DYNAMIC_MAP.unique()) == 256
    assert (DYNAMIC_MAP[127], DYNAMIC_MAP[-1]) == (0, 1)
    assert torch.equal(-DYNAMIC_MAP[:127].flip(0), DYNAMIC_MAP[128:-1])


@either
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 70])
def test_a_weight_that_is_not_finite_is_refused(bad, place):
    weight = torch.ones(100)
    weight[place] = bad
    with pytest.raises(ml.TrainingError, match="not finite"):
        quantize(weight)


def make_linear(size, seed, dtype=torch.float64, **options):
    return NF4Linear.quantize(randn(seed, *size), randn(seed + 1, size[0]), **options).to(dtype)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_one_weight_acts_both_ways_whatever_the_dtype_that_it_was_stored_in(stored, dtype):
    layer = NF4Linear.quantize(randn(0, 7, 96, dtype=stored)).to(dtype)
    x, dy = randn(1, 5, 96, dtype=dtype).requires_grad_(), randn(2, 5, 7, dtype=dtype)
    y = layer(x)
    y.backward(dy)
    assert torch.equal(y, F.linear(x, layer.weight))
    assert torch.equal(x.grad, dy @ layer.weight)


def test_no_gradient_is_made_of_an_x_that_needs_none(monkeypatch):
    layer = make_linear((4, 64), 9)
    layer.bias.requires_grad_()
    y = layer(torch.ones(2, 64, dtype=torch.float64))
    monkeypatch.setattr(nf4, "dequantize_weight", None)  # W is not needed again
    y.sum().backward()
    assert torch.equal(layer.bias.grad, torch.full_like(layer.bias, 2))


def test_nothing_is_trained_and_nothing_dense_is_stored():
    layer = make_linear((256, 64), 1)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert not list(layer.buffers())
    bits = 8 * sum(p.nbytes for name, p in layer.named_parameters() if name not in ("bias", "offset"))
    assert bits / (256 * 64) == 4 + 8 / 64 + 32 / (64 * 256)
    assert layer.packed.shape == (256 * 32,)
    assert layer.absmax.shape == (256,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("double_quant", [True, False])
def test_another_dtype_of_the_computation_rounds_nothing_that_is_stored(dtype, double_quant):
    layer = make_linear((4, 64), 6, double_quant=double_quant, dtype=torch.float32)
    before = [None if part is None else part.clone() for part in layer.parts]
    layer.to(dtype)
    assert all(new is old or torch.equal(new, old) for new, old in zip(layer.parts, before, strict=True))
    y = layer(x := torch.ones(1, 64, requires_grad=True))
    assert layer.bias.dtype == layer.weight.dtype == y.dtype == dtype
    y.sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # torch.compile warns of its own use of Function, and that it calls no caches
def test_a_compiled_layer_computes_the_same():
    layer, x = make_linear((4, 64), 7), randn(8, 2, 64)
    assert torch.equal(torch.compile(layer, backend="eager")(x), layer(x))
