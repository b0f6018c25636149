"""Laws of NF4, of double quantization and of linear layers with a frozen 4-bit weight."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minilora.testing.cases import tensor
from minilora.testing.compare import Array, as_array
from minilora.testing.laws import Comparison, Law, NotApplicable, accepted, both, claim
from minilora.testing.layers import Make, backward, called, placed, recording
from minilora.testing.lora_laws import in_modes, with_dtype
from minilora.testing.nf4_cases import HARD_KINDS, AbsmaxVector, NF4Weight, QuantizedLinear, weights

Pair = tuple[Make, Make]  # quantize, dequantize


def as_codes(packed: Any, count: int) -> Array:
    """Return the codes of packed bytes, the first of two in the high half: (⌈n/2⌉) -> (n)."""
    flat = as_array(packed).reshape(-1).astype(np.int64)
    return np.stack([flat >> 4 & 15, flat & 15], axis=1).reshape(-1)[:count]


def form(name: str, array: Any, shape: tuple[int, ...], dtype: str) -> Comparison:
    """Compare the shape and the dtype of a result."""
    found, expected = (str(array.dtype).removeprefix("torch."), tuple(array.shape)), (dtype, shape)
    return claim(f"dtype and shape of {name}", "" if found == expected else f"found {found}, expected {expected}")


# --- laws of NF4 ---


def quantizing(pair: Pair, case: NF4Weight, is_exact: bool = False) -> Iterator[Comparison]:
    view = tensor(case.W.T.copy(), case.dtype).requires_grad_().T
    for W, what in ((tensor(case.W, case.dtype), ""), (view, " of a transposed view")):
        packed, absmax = pair[0](W, case.block_size)
        yield Comparison(f"W{what}, which is only read", W, case.W)
        yield form(f"packed{what}", packed, (-(-case.W.size // 2),), "uint8")
        yield form(f"absmax{what}", absmax, case.absmax.shape, "float32")
        codes = as_codes(packed, case.W.size)
        yield Comparison(f"codes{what}", codes if is_exact else case.rounding.certain(codes), case.codes)
        yield Comparison(f"absmax{what}", absmax, case.stored_absmax)


def dequantized_values(pair: Pair, case: NF4Weight) -> Iterator[Comparison]:
    packed, absmax = tensor(case.packed, "uint8"), tensor(case.absmax, "float32")
    weight = pair[1](packed, absmax, (case.rows, case.columns), case.block_size)
    pair[1](packed, 2 * absmax, (case.rows, case.columns), case.block_size)  # which leaves the first weight as it was
    yield Comparison("packed, which is only read", packed, case.packed)
    yield Comparison("absmax, which is only read", absmax, case.absmax)
    yield form("the dequantized weight", weight, case.W.shape, "float32")
    yield Comparison("dequantize", weight, case.values)


# --- laws of double quantization ---


def nested_quantizing(pair: Pair, case: AbsmaxVector) -> Iterator[Comparison]:
    absmax = tensor(case.absmax, "float32")
    codes, scales, offset = pair[0](absmax)
    given = replace(case, given=float(as_array(offset).reshape(())))  # from which the others follow
    yield Comparison("absmax, which is only read", absmax, case.absmax)
    yield Comparison("offset", as_array(offset).reshape(()), case.offset)
    yield form("scales", scales, given.scales.value.shape, "float32")
    yield Comparison("scales", scales, given.scales)
    yield form("codes", codes, (case.count,), "uint8")
    yield Comparison("codes", given.rounding.certain(as_array(codes)), given.codes)


def nested_values(pair: Pair, case: AbsmaxVector) -> Iterator[Comparison]:
    case = replace(case, given=float(np.float32(case.offset.value)))
    given = [tensor(case.codes, "uint8"), *(tensor(own.value, "float32") for own in (case.scales, case.offset))]
    before = [as_array(own).copy() for own in given]
    absmax = pair[1](*given)
    for name, own, right in zip(("codes", "scales", "offset"), given, before, strict=True):
        yield Comparison(f"{name}, which are only read", own, right)
    yield form("the dequantized absmaxes", absmax, (case.count,), "float32")
    yield Comparison("dequantize", absmax, case.values)


# --- laws of 4-bit linear layers ---


def make_linear(make: Make, case: QuantizedLinear) -> tuple[Any, dict[str, Tensor]]:
    """Return a layer and the tensors that it was given."""
    options = accepted(make, double_quant=case.double_quant)
    if case.double_quant and not options:
        raise NotApplicable("the layer takes no `double_quant`")
    given = {"W": placed(case.weight.W, case)}
    if case.b is not None:
        given["b"] = placed(case.b, case)
    return make(given["W"], given.get("b"), **options), given


def product(make: Make, case: QuantizedLinear) -> Iterator[Comparison]:
    layer, _ = make_linear(make, case)
    x, y = called(layer, case)
    yield from with_dtype("y", y, case.output(case.x))
    yield Comparison("x, which is only read", x, case.x)
    ones = np.eye(case.inner)
    with recording(case):
        applied, of_nan = layer(placed(ones, case)), layer(x * torch.nan)
    yield Comparison("y after other calls", y, case.output(case.x))
    yield from with_dtype("layer(1), the weight that is applied", applied, case.output(ones))
    yield Comparison("where y of NaN is NaN", np.isnan(as_array(of_nan)), np.ones((*case.lead, case.outer)))


def input_gradient(make: Make, case: QuantizedLinear) -> Iterator[Comparison]:
    (layer, _), (other, _) = make_linear(make, case), make_linear(make, replace(case, seed=case.seed + 1))
    x, _ = backward(layer, case, others=[other])
    yield Comparison("dx", x.grad, case.input_gradient(case.dy))
    x = tensor(case.x, case.dtype).requires_grad_()
    layer(x).sum().backward()  # dy is a view of a single number
    yield Comparison("the gradient of Σ y", x.grad, case.input_gradient(np.ones_like(case.dy)))


def packed_frozen(make: Make, case: QuantizedLinear) -> Iterator[Comparison]:
    layer, given = make_linear(make, case)
    layer(tensor(case.x, case.dtype))  # a layer may quantize when it is first called
    own = {**dict(layer.named_parameters()), **dict(layer.named_buffers())} if isinstance(layer, nn.Module) else {}
    b = None if case.b is None else given["b"]
    kept = {  # all but the bias, which may be trained
        name: value
        for name, value in {**own, "the given W": given["W"]}.items()
        if b is None or value.shape != b.shape or not torch.equal(value.detach().to(b), b)
    }
    before = {name: as_array(value.data).copy() for name, value in kept.items()}
    x, _ = backward(layer, case)
    for name, value in kept.items():
        yield claim(f"the gradient of {name}", "" if value.grad is None else "found one, expected none")
        yield Comparison(f"{name} after a backward pass", value.data, before[name])
    yield Comparison("x, which is only read", x, case.x)


def linears(
    *sizes: tuple[tuple[int, ...], int, int], dtype: str = "float32", double_quant: bool = False
) -> list[QuantizedLinear]:
    """Return cases of these sizes (lead, in, out), each with and without a bias, in the modes in turn."""
    return in_modes(
        QuantizedLinear(lead, inner, outer, has_bias, seed, dtype, double_quant=double_quant)
        for seed, (lead, inner, outer) in enumerate(sizes)
        for has_bias in (True, False)
    )


# --- the tables ---

COUNTS = (1, 2, 5, 64, 255, 256, 257, 600, 1300)  # with whole and with incomplete blocks of 256
ABSMAXES = [AbsmaxVector(count, "normal", seed) for seed, count in enumerate(COUNTS)]
ABSMAXES += [AbsmaxVector(count, kind, count) for kind in ("constant", "outlier", "huge_ratio") for count in (3, 300)]
ABSMAXES += [AbsmaxVector(count, "normal", count, power=power) for power in (-30, 20) for count in (4, 270)]
LARGER = [NF4Weight(*shape, size, seed=shape[0]) for size in (32, 128, 4096) for shape in ((1, 5), (7, 65), (9, 512))]
PLAIN = weights("normal", "zero_block")
POWERS = [NF4Weight(9, 65, seed=7, power=power) for power in (-30, 40)]
HARD = [*weights(*HARD_KINDS), *POWERS, NF4Weight(130, 513)]  # more than 65,536 weights, in more than 1,024 blocks
LOW = weights("normal", "outlier", dtype="bfloat16") + weights("normal", "outlier", dtype="float16")
_CODE = "each code is that of the level nearest to w / absmax"
_LARGEST = "the largest |w| of a block of the rows laid end to end"
_TIES = "a level has its own code; a number midway between two gets the lower one, its neighbours the nearest"
_HARD = f"{_CODE}, for outliers, constants, small, large and many numbers; of denormals and zeros, any"
_BOTH_WAYS = both(quantizing, dequantized_values)
_QUANTIZE = "offset = mean; scale = max |absmax - offset| of each 256; each code is that of the nearest of 256 levels"
_SIZES = (((1,), 64, 1), ((2,), 64, 3), ((3,), 128, 5), ((2,), 64, 64), ((5,), 192, 136))
LINEARS = linears(*_SIZES)
LOW_LINEARS = linears(*_SIZES, dtype="bfloat16") + linears(*_SIZES, dtype="float16")
LED_LINEARS = linears(*((lead, 64, 3) for lead in ((), (0,), (2, 3), (2, 2, 3), (1, 1), (3, 1), (70,))))
WIDE = [QuantizedLinear((2,), 520, 130)]  # of more than 512 features, and of more than 65,536 weights
HARD_LINEARS = in_modes(QuantizedLinear((2,), 70, 5, seed=seed, kind=kind) for seed, kind in enumerate(HARD_KINDS))
RAGGED = linears(((1,), 1, 1), ((2,), 7, 5), ((2,), 16, 16), ((3,), 60, 3), ((2,), 70, 3), ((2,), 96, 4))
NESTED = linears(((2,), 64, 1), ((2,), 64, 5), ((2,), 128, 7), ((2,), 64, 300), double_quant=True)  # at last two scales
_LINEAR = "y = x dequantize(quantize(W))ᵀ + b"
_DX = "dx = dy dequantize(quantize(W))"
_PASSES = both(product, input_gradient)
LAWS = (
    Law("nf4", "nearest", f"{_CODE}, {_LARGEST}; the first of two is in the high half of a byte", PLAIN, quantizing),
    Law("nf4", "ties", _TIES, weights("ties"), functools.partial(quantizing, is_exact=True)),
    Law("nf4", "values", "dequantize gives level · absmax, rounded once to float32", PLAIN, dequantized_values),
    Law("nf4", "hard", _HARD, HARD, _BOTH_WAYS),
    Law("nf4", "block_size", f"{_CODE}, in blocks of 32, 128 and 4,096", LARGER, _BOTH_WAYS),
    Law("nf4", "16-bit", f"{_CODE}, of a bfloat16 or float16 weight", LOW, _BOTH_WAYS),
    Law("double_quant", "codes", f"{_QUANTIZE}, within half a place of 65,536", ABSMAXES, nested_quantizing),
    Law("double_quant", "values", "dequantize gives level · scale + offset, in float32", ABSMAXES, nested_values),
    Law("linear4bit", "forward", f"{_LINEAR}, also for x = 1", LINEARS + HARD_LINEARS + WIDE, product),
    Law("linear4bit", "gradients", _DX, LINEARS + WIDE, input_gradient),
    Law("linear4bit", "shapes", f"{_LINEAR} and {_DX}, for x with any leading sizes", LED_LINEARS, _PASSES),
    Law("linear4bit", "ragged", f"{_LINEAR} and {_DX}, where rows end within a block", RAGGED, _PASSES),
    Law("linear4bit", "frozen", "the packed weight keeps its bits and gets no gradient", LINEARS, packed_frozen),
    Law("linear4bit", "double_quant", f"{_LINEAR} and {_DX}, with 8-bit absmaxes", NESTED, _PASSES),
    Law("linear4bit", "16-bit", f"{_LINEAR} and {_DX}, in bfloat16 and float16", LOW_LINEARS, _PASSES),
)
