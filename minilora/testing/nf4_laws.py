"""Laws of NF4 and of double quantization.

A pair is (quantize, dequantize): see `checks.check_nf4` and `checks.check_double_quant`.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from minilora.testing.cases import tensor
from minilora.testing.compare import Array, as_array
from minilora.testing.laws import Comparison, Law, claim
from minilora.testing.nf4_cases import HARD_KINDS, AbsmaxVector, NF4Weight, weights

Pair = tuple[Callable[..., Any], Callable[..., Any]]  # quantize, dequantize


def as_codes(packed: Any, count: int) -> Array:
    """Return the codes of packed bytes, the first of two in the high half: (⌈n/2⌉) -> (n)."""
    flat = as_array(packed).reshape(-1).astype(np.int64)
    return np.stack([flat >> 4 & 15, flat & 15], axis=1).reshape(-1)[:count]


def form(name: str, array: Any, shape: tuple[int, ...], dtype: str) -> Comparison:
    """Compare the shape and the dtype of a result."""
    found, expected = (str(array.dtype).removeprefix("torch."), tuple(array.shape)), (dtype, shape)
    return claim(f"dtype and shape of {name}", "" if found == expected else f"found {found}, expected {expected}")


# --- laws of NF4 ---


def quantized(pair: Pair, case: NF4Weight) -> tuple[Any, Any]:
    packed, absmax = pair[0](tensor(case.W, case.dtype), case.block_size)
    return packed, absmax


def dequantized(pair: Pair, case: NF4Weight, packed: Any, absmax: Any) -> Any:
    return pair[1](packed, absmax, (case.rows, case.columns), case.block_size)


def quantizing(pair: Pair, case: NF4Weight, is_exact: bool = False) -> Iterator[Comparison]:
    W = tensor(case.W, case.dtype)
    packed, absmax = pair[0](W, case.block_size)
    yield Comparison("W, which is only read", W, case.W)
    yield form("packed", packed, (-(-case.W.size // 2),), "uint8")
    yield form("absmax", absmax, case.absmax.shape, "float32")
    codes = as_codes(packed, case.W.size)
    yield Comparison("codes", codes if is_exact else case.rounding.certain(codes), case.codes)
    yield Comparison("absmax", absmax, case.stored_absmax)


def views(pair: Pair, case: NF4Weight) -> Iterator[Comparison]:
    packed, _ = pair[0](tensor(case.W.T.copy(), case.dtype).requires_grad_().T, case.block_size)
    codes = as_codes(packed, case.W.size)
    yield Comparison("codes of a transposed view", case.rounding.certain(codes), case.codes)


def dequantized_values(pair: Pair, case: NF4Weight) -> Iterator[Comparison]:
    packed, absmax = tensor(case.packed, "uint8"), tensor(case.absmax, "float32")
    weight = dequantized(pair, case, packed, absmax)
    yield Comparison("packed, which is only read", packed, case.packed)
    yield Comparison("absmax, which is only read", absmax, case.absmax)
    yield form("the dequantized weight", weight, case.W.shape, "float32")
    yield Comparison("dequantize", weight, case.values)


def error(pair: Pair, case: NF4Weight) -> Iterator[Comparison]:
    weight = dequantized(pair, case, *quantized(pair, case))
    yield Comparison("dequantize(quantize(W))", weight, case.round_trip(case.stored_absmax))


def idempotence(pair: Pair, case: NF4Weight) -> Iterator[Comparison]:
    packed, absmax = quantized(pair, case)
    again, largest = pair[0](dequantized(pair, case, packed, absmax), case.block_size)
    first, second = (as_codes(data, case.W.size) for data in (packed, again))
    yield Comparison("codes of a dequantized weight", second, first)
    yield Comparison("absmax of a dequantized weight", largest, as_array(absmax))


def all_of(pair: Pair, case: NF4Weight) -> Iterator[Comparison]:
    yield from quantizing(pair, case)
    yield from dequantized_values(pair, case)
    yield from error(pair, case)


# --- laws of double quantization ---


def nested(pair: Pair, case: AbsmaxVector, absmax: Tensor) -> tuple[Any, Any, Any, AbsmaxVector]:
    """Return codes, scales and offset of an implementation, and the case with its offset, from which others follow."""
    codes, scales, offset = pair[0](absmax)
    return codes, scales, offset, replace(case, given=float(as_array(offset).reshape(())))


def nested_quantizing(pair: Pair, case: AbsmaxVector) -> Iterator[Comparison]:
    absmax = tensor(case.absmax, "float32")
    codes, scales, offset, given = nested(pair, case, absmax)
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


def nested_error(pair: Pair, case: AbsmaxVector) -> Iterator[Comparison]:
    *found, case = nested(pair, case, tensor(case.absmax, "float32"))
    yield Comparison("dequantize(quantize(absmax))", pair[1](*found), case.dequantized)


# --- the table ---


COUNTS = (1, 2, 5, 64, 255, 256, 257, 600, 1300)  # with whole and with incomplete blocks of 256
ABSMAXES = [AbsmaxVector(count, "normal", seed) for seed, count in enumerate(COUNTS)]
ABSMAXES += [AbsmaxVector(count, kind, count) for kind in ("constant", "outlier", "huge_ratio") for count in (3, 300)]
ABSMAXES += [AbsmaxVector(count, "normal", count, power=power) for power in (-30, 20) for count in (4, 270)]
LARGER = [
    NF4Weight(rows, columns, block_size, seed=rows)
    for block_size in (128, 512, 4096)
    for rows, columns in ((1, 5), (7, 65), (9, 512))
]
PLAIN = weights("normal", "zero_block")
POWERS = [NF4Weight(9, 65, seed=7, power=power) for power in (-30, 40)]
HARD = [*weights(*HARD_KINDS), *POWERS, NF4Weight(130, 513)]  # more than 65,536 weights, in more than 1,024 blocks
LOW = weights("normal", "outlier", dtype="bfloat16") + weights("normal", "outlier", dtype="float16")
_CODE = "each code is that of the level nearest to w / absmax"
_LARGEST = "the largest |w| of a block of the rows laid end to end"
_TIES = "a number midway between two levels gets the lower one, its neighbours the nearest"
_HARD = f"{_CODE}, for outliers, constants, small, large and many numbers; of denormals and zeros, any"
_NF4 = (
    (
        "nearest",
        f"{_CODE}, {_LARGEST}; the first of two is in the high half of a byte; W stays as it was",
        PLAIN,
        quantizing,
    ),
    ("ties", _TIES, weights("ties"), functools.partial(quantizing, is_exact=True)),
    ("values", "dequantize gives level · absmax, rounded once to float32", PLAIN, dequantized_values),
    ("error", "|w - dequantize(quantize(W))| ≤ 0.151904·absmax, and is that of the nearest level", PLAIN, error),
    ("idempotence", "a dequantized weight has the same codes and absmaxes", PLAIN, idempotence),
    ("hard", _HARD, HARD, all_of),
    ("block_size", f"{_CODE}, in blocks of 128, 512 and 4,096", LARGER, all_of),
    ("16-bit", f"{_CODE}, of a bfloat16 or float16 weight", LOW, all_of),
    ("views", "a weight that is a transposed view of a parameter has the codes of its copy", PLAIN, views),
)
_QUANTIZE = "offset = mean; scale = max |absmax - offset| of each 256; each code is that of the nearest of 256 levels"
_DOUBLE_QUANT = (
    ("codes", f"{_QUANTIZE}, within half a place of 65,536", nested_quantizing),
    ("values", "dequantize gives level · scale + offset, in float32", nested_values),
    ("error", "dequantize(quantize(absmax)) is off by half a gap of the levels at most, times scale", nested_error),
)
LAWS = (
    *(Law("nf4", *row) for row in _NF4),
    *(Law("double_quant", name, statement, ABSMAXES, compare) for name, statement, compare in _DOUBLE_QUANT),
)
