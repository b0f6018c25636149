"""Values with bounds on their rounding errors: how far from exact arithmetic a computation can end in a given dtype.

An operation rounds its result by at most u times its magnitude, and a sum of k products, in any order, is off by at
most γ_k = k·u/(1 - k·u) times the sum of their magnitudes  [Higham §3.1]. A `Bounded` carries these bounds along,
operation by operation: a running error analysis  [Higham §3.3]. u is 2⁻⁵³ in float64, 2⁻²⁴ in float32, 2⁻¹¹ in float16
and 2⁻⁸ in bfloat16; products of 16-bit numbers are summed in float32 and rounded once. A number below the smallest
normal one may be replaced by 0, whether it goes in or comes out, as by GPUs, MLX and `torch.set_flush_denormal`.

    [Higham]  Higham 2002, Accuracy and Stability of Numerical Algorithms, 2nd edition
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
UNITS = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SMALLEST = {"float64": 2.0**-1022, "float32": 2.0**-126, "float16": 2.0**-24, "bfloat16": 2.0**-126}
# the smallest normal number, and of float16, whose denormal numbers are never replaced, the smallest number
OWN_UNIT = UNITS["float64"]  # of the value here, which is itself computed


@dataclass(frozen=True, eq=False)
class Bounded:
    """An array in float64 and, for each number, the largest error of the same computation in `dtype`.

    Attributes:
        value: the result, exact but for rounding in float64, which the bound includes.
        error: the bound, of the same shape; infinite where nothing is known, as behind a divisor that may be 0.
        dtype: the name of the dtype under test: float64, float32, float16 or bfloat16.
    """

    value: Array
    error: Array
    dtype: str = "float64"

    @classmethod
    def exact(cls, value: Any, dtype: str = "float64") -> Bounded:
        """Return an input: a value that `dtype` represents without an error, or takes for 0."""
        wide = np.asarray(value, dtype=np.float64)
        return cls(wide, np.where(abs(wide) < SMALLEST[dtype], abs(wide), 0.0), dtype)

    def __add__(self, other: Any) -> Bounded:
        other = self._bounded(other)
        return self._rounded(self.value + other.value, self.error + other.error)

    def __sub__(self, other: Any) -> Bounded:
        return self + self._bounded(other) * -1

    def __mul__(self, other: Any) -> Bounded:
        a, b = self, self._bounded(other)
        with np.errstate(invalid="ignore"):  # 0 times an infinite bound
            return self._rounded(a.value * b.value, abs(a.value) * b.error + a.error * (abs(b.value) + b.error))

    def __truediv__(self, other: Any) -> Bounded:
        a, b = self, self._bounded(other)
        with np.errstate(all="ignore"):
            least = np.maximum(abs(b.value) - b.error, 0.0)
            return self._rounded(a.value / b.value, (a.error + abs(a.value / b.value) * b.error) / least)

    def __matmul__(self, other: Bounded) -> Bounded:
        """Multiply matrices: sums of k products, in any order. Each product may underflow."""
        a, b, k = self, other, self.value.shape[-1]
        with np.errstate(invalid="ignore"):
            magnitude = (abs(a.value) + a.error) @ (abs(b.value) + b.error)
            propagated = abs(a.value) @ b.error + a.error @ (abs(b.value) + b.error) + k * SMALLEST[self._sum_dtype]
            return self._rounded(a.value @ b.value, propagated + self.gamma(k) * magnitude)

    def sqrt(self) -> Bounded:
        """Return √v; its error is at most e/√v."""
        root = np.sqrt(self.value)
        return self._rounded(root, self.error / np.maximum(root, np.finfo(np.float64).tiny))

    def exp(self) -> Bounded:
        """Compute eᵛ, right to four units, or as 2ʷ with w = v·log₂e, which is rounded."""
        value = np.exp(self.value)
        units = 4 * self._unit + 2 * UNITS[self._sum_dtype] * abs(self.value)
        return self._rounded(value, value * (np.expm1(self.error) + units))

    def total(self) -> Bounded:
        """Return the sum of all numbers, in any order, where each partial sum is rounded to `dtype`."""
        ku = max(1, self.value.size) * self._unit
        magnitude, propagated = (abs(self.value) + self.error).sum(), self.error.sum()
        return self._rounded(self.value.sum(), propagated + ku / (1 - ku) * magnitude)

    def row_norms(self) -> Bounded:
        """Return the Euclidean norm of each row."""
        squares = self * self
        ones = Bounded.exact(np.ones(squares.value.shape[-1]), self.dtype)
        return (squares @ ones).sqrt()

    def log_sum_exp(self) -> Bounded:
        """Return log Σ exp(v) of each row, where exp is as above and log right to four units."""
        most = self.value.max(-1, keepdims=True)
        distance = abs(self.value - most)
        terms = np.exp(-distance)
        total = terms.sum(-1)
        units = 4 * self._unit + self.gamma(self.value.shape[-1])
        slopes = self._unit + 2 * UNITS[self._sum_dtype]  # of the subtraction, and of exp
        error = (terms * (self.error + units + slopes * distance)).sum(-1) / total
        return self._rounded(np.log(total) + most[..., 0], error + 4 * self._unit * abs(np.log(total)))

    def __getitem__(self, index: Any) -> Bounded:
        return replace(self, value=self.value[index], error=self.error[index])

    @property
    def T(self) -> Bounded:
        return replace(self, value=self.value.T, error=self.error.T)

    def reshape(self, *shape: int) -> Bounded:
        return replace(self, value=self.value.reshape(shape), error=self.error.reshape(shape))

    def widened(self, *others: Bounded) -> Bounded:
        """Return the value with a bound that holds for whichever order of its computation is used: the largest."""
        return replace(self, error=np.maximum.reduce([self.error, *(other.error for other in others)]))

    def gamma(self, k: int) -> float:
        """Return γ_k of a sum of k products, with this dtype's accumulation and float64's of the value here."""
        ku = k * (UNITS[self._sum_dtype] + OWN_UNIT)
        return ku / (1 - ku)

    @property
    def _sum_dtype(self) -> str:
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def _unit(self) -> float:
        return UNITS[self.dtype] + OWN_UNIT

    def _bounded(self, other: Any) -> Bounded:
        return other if isinstance(other, Bounded) else Bounded.exact(other, self.dtype)

    def _rounded(self, value: Array, propagated: Array) -> Bounded:
        """Return a result that is rounded once more."""
        propagated = np.where(np.isnan(propagated), np.inf, propagated)
        return Bounded(value, propagated + self._unit * (abs(value) + propagated) + SMALLEST[self.dtype], self.dtype)
