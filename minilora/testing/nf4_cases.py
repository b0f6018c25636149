"""Cases of the laws of 4-bit weights, and the right results with their bounds.

n  weights, laid end to end    b  blocks, each with an absmax
"""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
import torch

from minilora.testing.cases import Mode, WeightKind, hard_weight, rounded
from minilora.testing.compare import Array, Bounded
from minilora.testing.reference import NF4_LEVELS, absmax_levels, absmax_quantize, nf4_pack, nf4_quantize

LEVELS = np.array(NF4_LEVELS)
MIDPOINTS = (LEVELS[1:] + LEVELS[:-1]) / 2
TIES = MIDPOINTS[MIDPOINTS.astype(np.float32) == MIDPOINTS]  # those that float32 represents
EXACT = Bounded.exact(absmax_levels(), "float32")
# rounded six times: the width of a part of [0.1, 1], its multiple, an end, a midpoint, a power of ten and a product
ABSMAX_LEVELS = replace(EXACT, error=EXACT.gamma(6) * abs(EXACT.value))
NESTED = 256  # absmaxes that share a scale
NORMAL = 2.0**-126  # below it, float32's 1/absmax can overflow, and numbers may be flushed to 0
DrawnKind = WeightKind | Literal["zeros", "zero_block", "ties"]
HARD_KINDS: tuple[DrawnKind, ...] = ("outlier", "constant", "tiny", "huge_ratio", "rank_deficient", "zeros")


@dataclass(frozen=True)
class Rounding:
    """Numbers in units of scales, rounded to the nearest level of a table: what is right, and what rounding may change.

    n  numbers    k  levels
    """

    quotients: Bounded  # number / scale, (n)
    scales: Bounded  # of each number, (n)
    levels: Bounded  # rising, (k)
    codes: Array  # those that are right, (n)

    @cached_property
    def admissible(self) -> Array:
        """Return whether rounding may choose a code, the nearest or one nearly as near: (n, k)."""
        distance = self.quotients.reshape(-1, 1) - self.levels
        d = abs(distance.value)
        with np.errstate(invalid="ignore"):  # where an implementation gave infinity
            return d - distance.error <= (d + distance.error).min(1, keepdims=True)

    def certain(self, codes: Array) -> Array:
        """Return codes, with the right one where rounding may have chosen another."""
        if codes.shape != self.codes.shape:
            return codes
        inside = (codes >= 0) & (codes < len(self.levels.value))
        may = self.admissible[np.arange(len(codes)), np.where(inside, codes, 0).astype(np.int64)] & inside
        return np.where(may, self.codes, codes)

    @property
    def values(self) -> Bounded:
        """Return level · scale for the right codes."""
        return self.levels[self.codes] * self.scales

    @property
    def admissible_values(self) -> Bounded:
        """Return level · scale, with a bound that holds for every admissible code."""
        values, levels = self.values, self.levels.value
        gaps = abs(np.where(self.admissible, levels - levels[self.codes][:, None], 0)).max(1)
        return replace(values, error=values.error + gaps * (abs(self.scales.value) + self.scales.error))


@dataclass(frozen=True)
class NF4Weight:
    """A weight `W` to be quantized in blocks, with the right `packed`, `absmax` and dequantized `values`.

    Kinds: those of `hard_weight`; zeros; zero_block: the first block is 0; ties: powers of two times levels,
    midpoints of levels that float32 represents, and float32's next numbers below and above each midpoint.
    """

    rows: int = 1
    columns: int = 64
    block_size: int = 64
    kind: DrawnKind = "normal"
    seed: int = 0
    dtype: str = "float32"
    power: int = 0  # of two, by which all are multiplied

    @cached_property
    def W(self) -> Array:
        rng = np.random.default_rng(self.seed)
        drawn = self._ties(rng) if self.kind == "ties" else hard_weight(self.kind, rng, self.rows, self.columns)
        if self.kind in ("zeros", "zero_block"):
            drawn.reshape(-1)[: drawn.size if self.kind == "zeros" else self.block_size] = 0
        most = torch.finfo(getattr(torch, self.dtype)).max
        return rounded(np.clip(drawn * 2.0**self.power, -most, most), self.dtype)

    def _ties(self, rng: np.random.Generator) -> Array:
        """Draw levels, midpoints and their neighbours, times a power of two in each block, which is also its absmax."""
        count, bs = self.rows * self.columns, self.block_size
        below, above = (np.nextafter(MIDPOINTS.astype(np.float32), np.float32(end)) for end in (-2, 2))
        flat = rng.choice(np.concatenate([LEVELS, TIES, below, above]), count)
        flat[::bs] = rng.choice([-1.0, 1.0], -(-count // bs))
        powers = 2.0 ** rng.integers(-4, 5, -(-count // bs))
        return (flat * powers[self.block]).reshape(self.rows, self.columns)

    @cached_property
    def _quantized(self) -> tuple[Array, Array]:
        return nf4_quantize(self.W, self.block_size)

    codes = property(lambda self: self._quantized[0])  # (n)
    absmax = property(lambda self: self._quantized[1])  # (b)
    block = property(lambda self: np.arange(self.rows * self.columns) // self.block_size)  # of each weight, (n)

    @property
    def packed(self) -> Array:
        return np.frombuffer(nf4_pack(self.codes.tolist()), dtype=np.uint8)

    @cached_property
    def stored_absmax(self) -> Bounded:
        """Return max |w|: exactly, but that one below the smallest normal number may be replaced by another such."""
        return Bounded(self.absmax, np.where(self.absmax < NORMAL, NORMAL, 0.0), "float32")

    @cached_property
    def rounding(self) -> Rounding:
        """Return w · (1/absmax), rounded once more, as midpoints of levels are rounded too, and its levels.

        In a block of zeros or denormals any code is admissible.
        """
        absmax = Bounded.exact(self.absmax[self.block], "float32")
        is_normal = absmax.value >= NORMAL
        divisor = np.where(is_normal, absmax.value, 1.0)
        x = Bounded.exact(self.W.reshape(-1), "float32") * (Bounded.exact(1.0, "float32") / divisor) * 1
        x = replace(x, error=np.where(is_normal, x.error, 2.0))
        return Rounding(x, absmax, Bounded.exact(LEVELS, "float32"), self.codes)

    @property
    def values(self) -> Bounded:
        """Return level · absmax for the codes that are right: (rows, columns)."""
        return self.rounding.values.reshape(self.rows, self.columns)

    def round_trip(self, absmax: Bounded) -> Bounded:
        """Return level · absmax for given absmaxes, with a bound that holds for every admissible code."""
        rounding = replace(self.rounding, scales=absmax[self.block])
        return rounding.admissible_values.reshape(self.rows, self.columns)


@dataclass(frozen=True)
class AbsmaxVector:
    """`absmax` (b) to be quantized to 8 bits, with the right `codes`, `scales`, `offset` and dequantized `values`."""

    count: int = 5
    kind: Literal["normal", "constant", "outlier", "huge_ratio"] = "normal"
    seed: int = 0
    of: NF4Weight | None = None  # whose absmaxes are taken
    given: float | None = None  # an offset that was found, from which the rest follows, in place of the mean
    power: int = 0  # of two, by which all are multiplied

    @cached_property
    def absmax(self) -> Array:
        if self.of is not None:
            return self.of.absmax
        return abs(NF4Weight(self.count, 64, kind=self.kind, seed=self.seed, power=self.power).W).max(1)

    @property
    @lru_cache(maxsize=64)  # noqa: B019  # of equal cases, which several laws have
    def _quantized(self) -> tuple[Array, Array, float]:
        return absmax_quantize(self.absmax, self.given)

    @cached_property
    def offset(self) -> Bounded:
        """Return the mean, or the offset that is given."""
        if self.given is not None:
            return Bounded.exact(self.given, "float32")
        mean = Bounded.exact(self.absmax, "float32").total() / self.count
        return replace(mean, value=np.asarray(self._quantized[2]))

    codes = property(lambda self: self._quantized[0])  # (b)
    rest = property(lambda self: Bounded.exact(self.absmax, "float32") - self.offset)

    @property
    def scales(self) -> Bounded:
        """Return the largest |absmax - offset| of each 256."""
        rounding = np.maximum.reduceat(self.rest.error, np.arange(0, self.count, NESTED))
        return Bounded(self._quantized[1], rounding, "float32")

    @cached_property
    def rounding(self) -> Rounding:
        """Return (absmax - offset) / scale, rounded to one of 65,536 places as by bitsandbytes on the CPU, or not."""
        scales = self.scales[np.arange(self.count) // NESTED]
        is_known = scales.value > 2 * scales.error  # or it is a rounding error
        x = self.rest / replace(scales, value=np.where(is_known, scales.value, 1.0))
        place = (x + 1) * 0.5 * 65535
        x = Bounded(place.value, place.error + 0.5, "float32") * (2 / 65535) - 1
        x = replace(x, error=np.where(is_known, x.error, 2.0))  # any place in [-1, 1]
        return Rounding(x * 1, scales, ABSMAX_LEVELS, self.codes)

    @property
    def values(self) -> Bounded:
        """Return level · scale + offset for the codes that are right: (b)."""
        return self.rounding.values + self.offset

    @property
    def dequantized(self) -> Bounded:
        """Return the absmaxes after both ways, with a bound that holds for every admissible code."""
        return self.rounding.admissible_values + self.offset


@dataclass(frozen=True)
class QuantizedLinear:
    """A linear layer with a 4-bit `weight`, `b` or None, `x` and `dy`, with right results for them."""

    lead: tuple[int, ...] = (2,)
    inner: int = 64
    outer: int = 3
    has_bias: bool = True
    seed: int = 0
    dtype: str = "float32"
    double_quant: bool = False
    kind: DrawnKind = "normal"  # of the weight
    mode: Mode = "train"

    @cached_property
    def weight(self) -> NF4Weight:
        return NF4Weight(self.outer, self.inner, kind=self.kind, seed=self.seed, dtype=self.dtype)

    @cached_property
    def _drawn(self) -> tuple[Array, Array, Array]:
        rng = np.random.default_rng(self.seed + 1)
        shapes = ((self.outer,), (*self.lead, self.inner), (*self.lead, self.outer))
        largest = 1000.0 if self.kind == "outlier" else 1.0
        b, x, dy = (rounded(largest * rng.standard_normal(shape), self.dtype) for shape in shapes)
        return b, x, dy

    b = property(lambda self: self._drawn[0] if self.has_bias else None)
    x = property(lambda self: self._drawn[1])
    dy = property(lambda self: self._drawn[2])

    @cached_property
    def dense(self) -> Bounded:
        """Return dequantize(quantize(W)), rounded to float32 and then to the layer's dtype."""
        absmax = Bounded.exact(self.weight.absmax, "float32")
        if self.double_quant:
            absmax = AbsmaxVector(len(absmax.value), of=self.weight).dequantized
        values = self.weight.round_trip(absmax)
        return values if self.dtype == "float32" else replace(values, dtype=self.dtype) * 1

    def output(self, x: Array) -> Bounded:
        """Return x dequantize(quantize(W))ᵀ + b."""
        rows, W = Bounded.exact(x.reshape(-1, self.inner), self.dtype), self.dense
        y = rows @ W.T
        if self.b is not None:  # added to the sum, or its first term
            b, ones = (Bounded.exact(column[:, None], self.dtype) for column in (self.b, np.ones(len(rows.value))))
            y = (y + self.b).widened(rows.beside(ones, 1) @ W.beside(b, 1).T)
        return self._unless_it_overflows(y).reshape(*x.shape[:-1], self.outer)

    def input_gradient(self, dy: Array) -> Bounded:
        dx = Bounded.exact(dy.reshape(-1, self.outer), self.dtype) @ self.dense
        return self._unless_it_overflows(dx).reshape(*self.x.shape)

    def _unless_it_overflows(self, result: Bounded) -> Bounded:
        """Return a result of which any number is right where it may be infinite in the layer's dtype."""
        most = torch.finfo(getattr(torch, self.dtype)).max
        return replace(result, error=np.where(abs(result.value) > most / 2, np.inf, result.error))


SHAPES = (  # rows, columns: odd counts, rows that end within a block, as many blocks as rows or as columns
    *((1, 1), (1, 2), (1, 3), (1, 64), (2, 64), (1, 65), (5, 7), (3, 60), (60, 3), (4, 96), (3, 70), (130, 1)),
    *((16, 16), (3, 128), (7, 65), (9, 96), (132, 136)),
)


def weights(*kinds: DrawnKind, dtype: str = "float32") -> list[NF4Weight]:
    """Return cases of weights from small to large, with these kinds in turn; the laws share them."""
    return [NF4Weight(*shape, 64, kinds[seed % len(kinds)], seed, dtype) for seed, shape in enumerate(SHAPES)]
