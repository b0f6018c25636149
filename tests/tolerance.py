"""The tolerances of all tests, one for each kind of check. No test has a bare `atol=`.

Each kind is a function that says how many times the allowed error was used; 1 is the limit, and `tests/test_mutants.py`
shows that known mistakes use at least ten times as much.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

MATHS = 1e-11  # float64, two ways to the same number
PARITY = 1e-5  # float32, ours and a peer's
GRADIENT_PARITY = 1e-4  # float32 gradients through 30 layers


def relative(actual: Tensor, expected: Tensor | npt.ArrayLike, allowed: float) -> float:
    """max |actual - expected| / (allowed · max |expected|); what is 0 must be 0."""
    expected = _tensor(expected)
    assert actual.shape == expected.shape, f"shapes {tuple(actual.shape)} and {tuple(expected.shape)} differ"
    error = (actual.detach().double() - expected.detach().double()).abs().max().item() if actual.numel() else 0.0
    size = expected.detach().double().abs().max().item() if actual.numel() else 0.0
    if not np.isfinite(error):
        return float("inf")
    return error / (allowed * size) if size else (0.0 if error == 0 else float("inf"))


def maths(actual: Tensor, expected: Tensor | npt.ArrayLike) -> float:
    """Two float64 computations of one number."""
    return relative(actual, expected, MATHS)


def precision(actual: Tensor, plain: Tensor, oracle: Tensor | npt.ArrayLike) -> float:
    """A low-precision result against the float64 oracle: at most twice plain PyTorch's own error, plus one ulp."""
    oracle = _tensor(oracle).double()
    ulp = torch.finfo(actual.dtype).eps * oracle.abs().max().item()
    allowed = 2 * (plain.detach().double() - oracle).abs().max().item() + ulp
    return (actual.detach().double() - oracle).abs().max().item() / allowed


def assert_maths(actual: Tensor, expected: Tensor | npt.ArrayLike) -> None:
    assert (used := maths(actual, expected)) <= 1, f"{used:.3g} times the allowed float64 error"


def assert_precision(actual: Tensor, plain: Tensor, oracle: Tensor | npt.ArrayLike) -> None:
    assert (used := precision(actual, plain, oracle)) <= 1, f"{used:.3g} times the allowed error at {actual.dtype}"


def assert_parity(ours: Tensor, theirs: Tensor, allowed: float = PARITY) -> None:
    assert (used := relative(ours, theirs, allowed)) <= 1, f"{used:.3g} times the allowed {allowed} from theirs"


def _tensor(value: Tensor | npt.ArrayLike) -> Tensor:
    """Python's numbers as float64: torch alone would round them to float32."""
    return value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
