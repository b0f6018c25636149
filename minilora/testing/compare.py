"""Comparisons that say how much of the allowed error was used: 1 is the limit.

There are four kinds, and a test uses no other: equal bits; two float64 computations of one number (`assert_maths`); a
low-precision result against the oracle and PyTorch's own error (`assert_precision`); a peer's (`assert_parity`).
Where `expected` is a `Bounded`, its derived bound is what is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from minilora.testing.bounds import Bounded

__tracebackhide__ = True  # pytest shows the line that calls this module
MATHS = 1e-11  # float64, two ways to the same number
PARITY = 1e-5  # float32, ours and a peer's
GRADIENT_PARITY = 1e-4  # float32 gradients through 30 layers


@dataclass(frozen=True)
class Worst:
    """The number that used most of its allowed error."""

    ratio: float  # error / bound
    index: tuple[int, ...]
    actual: float
    expected: float
    bound: float
    where: str = ""  # about the input there

    def __str__(self) -> str:
        place = f"at {list(self.index)}: " if self.index else ""
        allowed = f", allowed error {self.bound:.3g}, error/bound {self.ratio:.3g}" * (self.bound > 0)
        return f"{place}{self.where}found {self.actual:.17g}, expected {self.expected:.17g}{allowed}"


def as_array(value: Any) -> NDArray[Any]:
    """Return a tensor or array of any library as numpy's float64."""
    if isinstance(value, torch.Tensor):
        value = value.detach().to("cpu", torch.float64).numpy()
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise AssertionError(f"found {type(value).__name__}, expected an array") from error
    assert value is not None, "found NoneType, expected an array"
    return array


def worst(actual: Any, expected: Any, bound: Any = None) -> Worst:
    """Compare two arrays and return the number that is worst in relation to its bound.

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
        return Worst(0.0, (), 0.0, 0.0, 0.0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        error = np.where(actual == expected, 0.0, abs(actual - expected))
        ratios = np.where((error == 0) | np.isposinf(allowed), 0.0, error / allowed)
    ratios = np.nan_to_num(ratios, nan=np.inf, posinf=np.inf)
    index = tuple(int(i) for i in np.unravel_index(ratios.argmax(), ratios.shape))
    numbers = (float(array[index]) for array in (ratios, actual, expected, allowed))
    ratio, found, needed, most = numbers
    return Worst(ratio, index, found, needed, most)


def relative(actual: Any, expected: Any, allowed: float) -> float:
    """Return max |actual - expected| / (allowed · max |expected|); what is 0 must be 0."""
    expected = as_array(expected)
    return worst(actual, expected, allowed * abs(expected).max(initial=0.0)).ratio


def maths(actual: Any, expected: Any) -> float:
    """Return how much of the allowed error two float64 computations of one number use."""
    return worst(actual, expected).ratio if isinstance(expected, Bounded) else relative(actual, expected, MATHS)


def precision(actual: torch.Tensor, plain: torch.Tensor, oracle: Any) -> float:
    """Return how much of the allowed error a low-precision result uses.

    Allowed is twice the error of plain PyTorch at that dtype, plus one unit in the last place, both to the oracle.
    """
    exact = as_array(oracle)
    ulp = torch.finfo(actual.dtype).eps * abs(exact).max()
    return worst(actual, exact, 2 * abs(as_array(plain) - exact).max() + ulp).ratio


def assert_maths(actual: Any, expected: Any) -> None:
    """Check two computations of one number: within the bound of a `Bounded`, or 1e-11 of the largest in float64."""
    bound = expected.error if isinstance(expected, Bounded) else MATHS * abs(as_array(expected)).max(initial=0.0)
    found = worst(actual, expected, bound)
    assert found.ratio <= 1, str(found)


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
