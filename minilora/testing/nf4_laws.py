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
from minilora.testing.nf4_cases import HARD_KINDS, NESTED, AbsmaxVector, NF4Weight, weights

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


def stored(case: NF4Weight) -> tuple[Tensor, Tensor]:
    """Return the right packed bytes and absmaxes."""
    return tensor(case.packed, "uint8"), tensor(case.absmax, "float32")


def nearest_codes(pair: Pair, case: NF4Weight, is_exact: bool = False) -> Iterator[Comparison]:
    packed, _ = quantized(pair, case)
    yield form("packed", packed, (-(-case.W.size // 2),), "uint8")
    codes = as_codes(packed, case.W.size)
    yield Comparison("codes", codes if is_exact else case.rounding.certain(codes), case.codes)


def largest_absmax(pair: Pair, case: NF4Weight) -> Iterator[Comparison]:
    yield Comparison("absmax", quantized(pair, case)[1], case.stored_absmax)


def layout(pair: Pair, case: NF4Weight) -> Iterator[Comparison]:
    _, absmax = quantized(pair, case)
    yield from nearest_codes(pair, case, is_exact=True)
    yield form("absmax", absmax, (-(-case.W.size // case.block_size),), "float32")
    weight = dequantized(pair, case, *stored(case))
    yield form("the dequantized weight", weight, (case.rows, case.columns), "float32")


def views(pair: Pair, case: NF4Weight) -> Iterator[Comparison]:
    packed, _ = pair[0](tensor(case.W.T.copy(), case.dtype).requires_grad_().T, case.block_size)
    yield Comparison("codes of a transposed view", as_codes(packed, case.W.size), case.codes)


def dequantized_values(pair: Pair, case: NF4Weight) -> Iterator[Comparison]:
    weight = dequantized(pair, case, *stored(case))
    yield Comparison("dequantize", weight, case.values)


def error(pair: Pair, case: NF4Weight) -> Iterator[Comparison]:
    weight = dequantized(pair, case, *quantized(pair, case))
    yield Comparison("dequantize(quantize(W))", weight, case.approximated)


def kept_exactly(pair: Pair, case: NF4Weight) -> Iterator[Comparison]:
    weight = as_array(dequantized(pair, case, *quantized(pair, case)))
    absmax = case.absmax[case.block].reshape(case.W.shape)
    for name, chosen in (("zeros", case.W == 0), ("the largest numbers of the blocks", abs(case.W) == absmax)):
        yield Comparison(name, np.where(chosen, weight, 0.0), np.where(chosen, case.W, 0.0))


def idempotence(pair: Pair, case: NF4Weight) -> Iterator[Comparison]:
    packed, absmax = quantized(pair, case)
    again, largest = pair[0](dequantized(pair, case, packed, absmax), case.block_size)
    first, second = (as_codes(data, case.W.size) for data in (packed, again))
    yield Comparison("codes of a dequantized weight", second, first)
    yield Comparison("absmax of a dequantized weight", largest, as_array(absmax))


def powers(pair: Pair, case: NF4Weight) -> Iterator[Comparison]:
    packed, _ = quantized(pair, case)
    for k in (-30, 40):
        scaled = replace(case, power=k)
        other, larger = quantized(pair, scaled)
        first, second = (as_codes(data, case.W.size) for data in (packed, other))
        yield Comparison(f"codes of 2^{k}·W", second, first)
        yield Comparison(f"absmax of 2^{k}·W", larger, scaled.stored_absmax)


def all_of(pair: Pair, case: NF4Weight) -> Iterator[Comparison]:
    yield from nearest_codes(pair, case)
    yield from largest_absmax(pair, case)
    yield from dequantized_values(pair, case)
    yield from error(pair, case)


def unchanged(pair: Pair, case: NF4Weight) -> Iterator[Comparison]:
    W = tensor(case.W, case.dtype)
    pair[0](W, case.block_size)
    yield Comparison("W, which is only read", W, case.W)
    packed, absmax = stored(case)
    dequantized(pair, case, packed, absmax)
    yield Comparison("packed, which is only read", packed, case.packed)
    yield Comparison("absmax, which is only read", absmax, case.absmax)


# --- laws of double quantization ---


def nested(pair: Pair, case: AbsmaxVector) -> tuple[Any, Any, Any, AbsmaxVector]:
    """Return codes, scales and offset of an implementation, and the case with its offset, from which others follow."""
    codes, scales, offset = pair[0](tensor(case.absmax, "float32"))
    return codes, scales, offset, replace(case, given=float(as_array(offset).reshape(())))


def offset(pair: Pair, case: AbsmaxVector) -> Iterator[Comparison]:
    found = nested(pair, case)[3].offset.value
    yield Comparison("offset", found, case.offset)


def scales(pair: Pair, case: AbsmaxVector) -> Iterator[Comparison]:
    _, found, _, case = nested(pair, case)
    yield Comparison("scales", found, case.scales)


def nested_codes(pair: Pair, case: AbsmaxVector) -> Iterator[Comparison]:
    codes, _, _, case = nested(pair, case)
    yield Comparison("codes", case.rounding.certain(as_array(codes)), case.codes)


def nested_layout(pair: Pair, case: AbsmaxVector) -> Iterator[Comparison]:
    codes, scales, offset, _ = nested(pair, case)
    yield form("codes", codes, (case.count,), "uint8")
    yield form("scales", scales, (-(-case.count // NESTED),), "float32")
    yield form("the absmaxes", pair[1](codes, scales, offset), (case.count,), "float32")


def nested_stored(case: AbsmaxVector) -> tuple[Tensor, Tensor, Tensor, AbsmaxVector]:
    """Return the right codes, scales and offset, rounded to float32, and the case with this offset."""
    case = replace(case, given=float(np.float32(case.offset.value)))
    offset = tensor(case.offset.value, "float32")
    return tensor(case.codes, "uint8"), tensor(case.scales.value, "float32"), offset, case


def nested_values(pair: Pair, case: AbsmaxVector) -> Iterator[Comparison]:
    *given, case = nested_stored(case)
    yield Comparison("dequantize", pair[1](*given), case.values)


def nested_error(pair: Pair, case: AbsmaxVector) -> Iterator[Comparison]:
    *found, case = nested(pair, case)
    yield Comparison("dequantize(quantize(absmax))", pair[1](*found), case.approximated)


def nested_unchanged(pair: Pair, case: AbsmaxVector) -> Iterator[Comparison]:
    absmax = tensor(case.absmax, "float32")
    pair[0](absmax)
    yield Comparison("absmax, which is only read", absmax, case.absmax)
    given = nested_stored(case)[:3]
    before = [tensor.clone() for tensor in given]
    pair[1](*given)
    for name, now, then in zip(("codes", "scales", "offset"), given, before, strict=True):
        yield Comparison(f"{name}, which are only read", now, as_array(then))


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
HARD = [*weights(*HARD_KINDS), NF4Weight(130, 513)]  # more than 65,536 weights, in more than 1,024 blocks
SURE = weights("levels")
LOW = weights("normal", "outlier", dtype="bfloat16") + weights("normal", "outlier", dtype="float16")
_CODE = "each code is that of the level nearest to w / absmax"
_NF4 = (
    ("nearest", f"{_CODE}, the largest |w| of a block of the rows laid end to end", PLAIN, nearest_codes),
    (
        "ties",
        "a number midway between two levels gets the lower one, its neighbours the nearest",
        weights("ties"),
        functools.partial(nearest_codes, is_exact=True),
    ),
    (
        "absmax",
        "absmax = max |w| of each block, bit for bit; below the smallest normal number, within it",
        PLAIN,
        largest_absmax,
    ),
    ("layout", "packed: uint8 (⌈n/2⌉), the first of two codes in the high half; absmax: float32 (b)", SURE, layout),
    ("values", "dequantize gives level · absmax, rounded once to float32", PLAIN, dequantized_values),
    ("error", "|w - dequantize(quantize(W))| ≤ 0.151904·absmax", PLAIN, error),
    ("kept", "zeros and the largest number of each block are kept exactly", PLAIN, kept_exactly),
    ("idempotence", "a dequantized weight has the same codes and absmaxes", PLAIN, idempotence),
    ("powers", "2^k·W has the codes of W and 2^k times its absmaxes", PLAIN, powers),
    ("hard", f"{_CODE}, for outliers, constants, small and many numbers; of denormals and zeros, any", HARD, all_of),
    ("block_size", f"{_CODE}, in blocks of 128, 512 and 4,096", LARGER, all_of),
    ("16-bit", f"{_CODE}, of a bfloat16 or float16 weight", LOW, all_of),
    ("views", "a weight that is a transposed view of a parameter has the codes of its copy", SURE, views),
    ("inputs", "the inputs stay as they were", PLAIN, unchanged),
)
_DOUBLE_QUANT = (
    ("offset", "offset = mean of the absmaxes", offset),
    ("scales", "scale = max |absmax - offset| of each 256", scales),
    ("codes", "each code is that of the nearest of 256 levels, within half a place of 65,536", nested_codes),
    ("layout", "codes: uint8 (b); scales: float32 (⌈b/256⌉); the dequantized absmaxes: float32 (b)", nested_layout),
    ("values", "dequantize gives level · scale + offset", nested_values),
    ("error", "|absmax - dequantize(quantize(absmax))| ≤ scale · half the widest gap of the levels", nested_error),
    ("inputs", "the inputs stay as they were", nested_unchanged),
)
LAWS = (
    *(Law("nf4", *row) for row in _NF4),
    *(Law("double_quant", name, statement, ABSMAXES, compare) for name, statement, compare in _DOUBLE_QUANT),
)
