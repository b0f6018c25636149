"""Values with bounds on their rounding errors, and comparisons that say how much of a bound was used: 1 is the limit.

An operation rounds its result by at most u times its magnitude, and a sum of k products, in any order, is off by at
most γ_k = k·u/(1 - k·u) times the sum of their magnitudes  [Higham §3.1]. A `Bounded` carries these bounds along,
operation by operation: a running error analysis  [Higham §3.3]. u is 2⁻⁵³ in float64, 2⁻²⁴ in float32, 2⁻¹¹ in float16
and 2⁻⁸ in bfloat16; products of 16-bit numbers are summed in float32 and rounded once. A number below the smallest
normal one may be replaced by 0, whether it goes in or comes out, as by GPUs, MLX and `torch.set_flush_denormal`.

There are four kinds of comparisons, and a test uses no other: equal bits; two float64 computations of one number
(`assert_maths`); a low-precision result against the oracle and PyTorch's own error (`assert_precision`); a peer's
(`assert_parity`). Where `expected` is a `Bounded`, its derived bound is what is allowed.

    [Higham]  Higham 2002, Accuracy and Stability of Numerical Algorithms, 2nd edition
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]
UNITS = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SMALLEST = {"float64": 2.0**-1022, "float32": 2.0**-126, "float16": 2.0**-24, "bfloat16": 2.0**-126}
# the smallest normal number, and of float16, whose denormal numbers are never replaced, the smallest number
OWN_UNIT = UNITS["float64"]  # of the value here, which is itself computed
__tracebackhide__ = True  # pytest shows the line that calls this module
MATHS = 1e-11  # float64, two ways to the same number
PARITY = 1e-5  # float32, ours and a peer's
GRADIENT_PARITY = 1e-4  # float32 gradients through 30 layers


@dataclass(frozen=True, eq=False)
class Bounded:
    """An array in float64 and, for each number, the largest error of the same computation in `dtype`.

    Attributes:
        value: the result, exact except for rounding in float64, which the bound includes.
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
        size, gamma = abs(b.value) + b.error, self.gamma(k)
        with np.errstate(invalid="ignore"):
            propagated = abs(a.value) @ (b.error + gamma * size) + k * SMALLEST[self._sum_dtype]
            if a.error.any():
                propagated += a.error @ ((1 + gamma) * size)
            return self._rounded(a.value @ b.value, propagated)

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
        most = 48 if self.dtype in ("float16", "bfloat16") else math.inf  # sums in turn, as in PyTorch's blocks of 16³
        ku = min(max(1, self.value.size), most) * self._unit
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

    def beside(self, other: Bounded, axis: int) -> Bounded:
        """Return both arrays as one."""
        value, error = (np.concatenate(pair, axis) for pair in ((self.value, other.value), (self.error, other.error)))
        return replace(self, value=value, error=error)

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


# --- comparisons ---


def as_array(value: Any) -> Array:
    """Return a tensor or array of any library as numpy's float64."""
    if isinstance(value, torch.Tensor):
        value = value.detach().to("cpu", torch.float64).numpy()
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise AssertionError(f"found {type(value).__name__}, expected an array") from error
    assert value is not None, "found NoneType, expected an array"
    return array


def has_one_backward(error: RuntimeError) -> bool:
    """Return whether a backward pass failed because `torch.compile` made its graph free what it saved."""
    return "donated buffers" in str(error)


def worst(actual: Any, expected: Any, bound: Any = None) -> tuple[float, str]:
    """Compare two arrays; return the largest ratio of an error to its bound, and what was found there.

    Args:
        actual: an array or tensor of any library.
        expected: an array, or a `Bounded`, which has its own bound.
        bound: the allowed error, a number or an array; 0 if not given. Where it is infinite, nothing is compared.

    Raises:
        AssertionError: the shapes differ.
    """
    if isinstance(expected, Bounded):
        expected, bound = expected.value, expected.error if bound is None else bound
    actual, expected = as_array(actual), as_array(expected)
    assert actual.shape == expected.shape, f"the shape is {actual.shape}, expected {expected.shape}"
    allowed = np.broadcast_to(np.asarray(0.0 if bound is None else bound, dtype=np.float64), expected.shape)
    if not actual.size:
        return 0.0, "nothing to compare"
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        error = np.where(actual == expected, 0.0, abs(actual - expected))
        ratios = np.where((error == 0) | np.isposinf(allowed), 0.0, error / allowed)
    ratios = np.nan_to_num(ratios, nan=np.inf, posinf=np.inf)
    index = tuple(int(i) for i in np.unravel_index(ratios.argmax(), ratios.shape))
    place = f"at {list(index)}: " if index else ""
    found = f"{place}found {actual[index]:.17g}, expected {expected[index]:.17g}"
    if allowed[index] > 0:
        found += f", allowed error {allowed[index]:.3g}, error/bound {ratios[index]:.3g}"
    return float(ratios[index]), found


def relative(actual: Any, expected: Any, allowed: float) -> float:
    """Return max |actual - expected| / (allowed · max |expected|); what is 0 must be 0."""
    expected = as_array(expected)
    return worst(actual, expected, allowed * abs(expected).max(initial=0.0))[0]


def precision(actual: torch.Tensor, plain: torch.Tensor, oracle: Any) -> float:
    """Return how much of the allowed error a low-precision result uses: see `assert_precision`."""
    exact = as_array(oracle)
    ulp = torch.finfo(actual.dtype).eps * abs(exact).max()
    return worst(actual, exact, 2 * abs(as_array(plain) - exact).max() + ulp)[0]


def assert_maths(actual: Any, expected: Any) -> None:
    """Check two computations of one number: within the bound of a `Bounded`, or 1e-11 of the largest in float64."""
    bound = expected.error if isinstance(expected, Bounded) else MATHS * abs(as_array(expected)).max(initial=0.0)
    used, found = worst(actual, expected, bound)
    assert used <= 1, found


def assert_precision(actual: torch.Tensor, plain: torch.Tensor, oracle: Any) -> None:
    """Check a low-precision result against an oracle in float64.

    Allowed is twice the error of plain PyTorch at that dtype, plus one unit in the last place of the largest number.
    """
    used = precision(actual, plain, oracle)
    assert used <= 1, f"{used:.3g} times the allowed error at {actual.dtype}"


def assert_parity(ours: Any, theirs: Any, allowed: float = PARITY) -> None:
    """Check our result against a peer's, relative to the largest number."""
    used = relative(ours, theirs, allowed)
    assert used <= 1, f"{used:.3g} times the allowed {allowed} from theirs"
