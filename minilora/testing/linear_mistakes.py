"""Known mistakes of LoRA and DoRA layers, as what they compute: with them a wrong result is explained."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from minilora.testing.bounds import Array
from minilora.testing.cases import AdaptedLinear


def wrong_scales(case: AdaptedLinear) -> dict[str, float]:
    """Return what is computed instead of the scale."""
    r, alpha, root = case.r, case.alpha, math.sqrt(case.r)
    right = "α/√r" if case.use_rslora else "α/r"
    found = {
        f"the scale is α·r instead of {right}": alpha * r,
        f"the scale is α instead of {right}": alpha,
        f"the scale is 1/r instead of {right}: alpha is ignored": 1 / r,
        f"the scale is r/α instead of {right}": r / alpha,
        "the scale is missing": 1.0,
        "the scale is applied twice": case.scale**2,
        "the update is subtracted": -case.scale,
        "the update is added twice": 2 * case.scale,
    }
    if case.use_rslora:
        found["the scale is α/r, LoRA's, instead of rsLoRA's α/√r"] = alpha / r
    else:
        found["the scale is α/√r, rsLoRA's, instead of α/r"] = alpha / root
    return found


def wrong_linears(case: AdaptedLinear) -> dict[str, tuple[Array, Array]]:
    """Return, for each mistake, the weight and the bias that are applied in place of the right ones."""
    W, A, B, s = case.W, case.A, case.B, case.scale
    b = np.zeros(case.outer) if case.b is None else case.b
    V, merged = W + s * B @ A, case.merged.value
    found = {cause: (_with_magnitude(case, W + t * B @ A), b) for cause, t in wrong_scales(case).items()}
    found |= {
        "the update is missing": (_with_magnitude(case, W), b),
        "the base is missing": (s * B @ A, b),
        "the adapter is ignored": (W, b),
        "a rank is lost": (_with_magnitude(case, W + s * B[:, :-1] @ A[:-1]), b),
        "the bias is missing": (merged, 0 * b),
        "the bias is added twice": (merged, 2 * b),
        "the bias is scaled by s": (merged, s * b),
    }
    if case.inner == case.outer:
        found["W is transposed"] = (_with_magnitude(case, W.T + s * B @ A), b)
        found["A and B are exchanged"] = (_with_magnitude(case, W + s * A.T @ B.T), b)
    if case.method == "dora":
        found |= _wrong_magnitudes(case, V, b)
    return found


def _with_magnitude(case: AdaptedLinear, V: Array) -> Array:
    return (case.magnitude / _norm(V))[:, None] * V if case.method == "dora" else V


def _wrong_magnitudes(case: AdaptedLinear, V: Array, b: Array) -> dict[str, tuple[Array, Array]]:
    W, A, B, s, m = case.W, case.A, case.B, case.scale, case.magnitude
    norm = _norm(V)
    c = (m / norm)[:, None]
    found = {
        "DoRA is LoRA here: no magnitude, no norm": (V, b),
        "the magnitude is ignored: it stays ‖W‖": ((_norm(W) / norm)[:, None] * V, b),
        "the bias is scaled by m/‖W + ΔW‖": (c * V, c[:, 0] * b),
        "the bias is scaled by m/‖W‖": (c * V, m / _norm(W) * b),
        "the norm is that of W, without the update": ((m / _norm(W))[:, None] * V, b),
        "the norm is that of W + B A, without the scale": ((m / _norm(W + B @ A))[:, None] * V, b),
        "the norm is that of the update alone": ((m / _norm(s * B @ A))[:, None] * V, b),
        "the norm is squared": ((m / norm**2)[:, None] * V, b),
        "m/‖W + ΔW‖ is applied twice": (c * c * V, c[:, 0] * b),
        "m/‖W + ΔW‖ is applied twice, without the bias": (c * c * V, b),
        "the result is not divided by the norm": (m[:, None] * V, b),
        "one norm is used for the whole matrix": (m[:, None] / math.sqrt((V * V).sum()) * V, b),
        "the norm is a sum of absolute values": ((m / abs(V).sum(1))[:, None] * V, b),
        "only the update is multiplied by m/‖W + ΔW‖": (W + c * (s * B @ A), b),
        "only the base is multiplied by m/‖W + ΔW‖": (c * W + s * B @ A, b),
        "the base is added once more": (c * V + W, b),
    }
    columns = np.sqrt((V * V).sum(0))
    found["each column is divided by its norm (dim=0) instead of each row"] = (m[:, None] * V / columns, b)
    if case.inner == case.outer:
        found["the norm is taken over the columns (dim=0)"] = ((m / columns)[:, None] * V, b)
        found["columns are scaled instead of rows"] = (V * (m / columns), b)
    return found


def wrong_starts(case: AdaptedLinear) -> dict[str, tuple[Array, Array]]:
    """Return the same for a DoRA layer that was given no magnitude: not what equals a wrong start of the magnitude."""
    V, b = case.W + case.scale * case.B @ case.A, np.zeros(case.outer) if case.b is None else case.b
    starts = {
        "the magnitude starts at 1 (or, if dora-forward fails, the norm is squared)": V / _norm(V)[:, None],
        "the magnitude starts at ‖W + s·B A‖ (or, if dora-forward fails, does nothing)": V,
    }
    others = {
        cause: (weight, bias)
        for cause, (weight, bias) in wrong_linears(case).items()
        if not any(np.allclose(weight, start) for start in starts.values())
    }
    return others | {cause: (start, b) for cause, start in starts.items()}


def merged_mistakes(case: AdaptedLinear) -> Callable[[], dict[str, Array]]:
    """Return a function that computes known wrong merged weights by their mistake."""

    def wrong() -> dict[str, Array]:
        found = {cause: weight for cause, (weight, _) in wrong_linears(case).items() if "bias" not in cause}
        if case.inner == case.outer:
            found["the update is transposed"] = case.W + case.scale * (case.B @ case.A).T
        return found

    return wrong


def wrong_gradients(case: AdaptedLinear) -> dict[str, dict[str, Array]]:
    """Return, for each gradient, the wrong values by mistake."""
    s, A, B, N = case.scale, case.A, case.B, max(1, len(case.rows))
    right = {name: bounded.value for name, bounded in case.gradients.items()}
    names = {"A": "A", "B": "B", "magnitude": "the magnitude", "x": "x"}
    found = {
        name: {
            f"no gradient reaches {names[name]}": 0 * value,
            "the gradient has the wrong sign": -value,
            "the gradient is a mean over the rows instead of a sum": value / N,
            "the gradient is added twice": 2 * value,
        }
        for name, value in right.items()
    }
    V, dy = case.W + s * B @ A, case.dy_rows
    norm = _norm(V)
    K = case.magnitude / norm if case.method == "dora" else np.ones(case.outer)
    dW = dy.T @ case.rows
    KdW = K[:, None] * dW
    scales = {"the gradient lacks the scale": 1.0, "the scale is applied twice to the gradient": s * s}
    scales |= {f"in the gradient, {cause}": t for cause, t in wrong_scales(case).items() if "scale is α" in cause}
    for cause, t in scales.items():
        found["A"][cause], found["B"][cause] = t * B.T @ KdW, t * KdW @ A.T
    found["x"]["the gradient of x lacks the update's path"] = ((dy * K) @ case.W).reshape(case.x.shape)
    found["x"]["the gradient of x lacks the base's path"] = ((dy * K) @ (s * B @ A)).reshape(case.x.shape)
    if case.method == "dora":
        unit = V / norm[:, None]
        through = K[:, None] * (dW - (dW * unit).sum(1, keepdims=True) * unit)
        cause = "the norm is not held constant: the gradient goes through it"
        found["A"][cause], found["B"][cause] = s * B.T @ through, s * through @ A.T
        found["x"]["the gradient lacks m/‖W + ΔW‖"] = (dy @ V).reshape(case.x.shape)
        found["A"]["the gradient lacks m/‖W + ΔW‖"] = s * B.T @ dW
        found["B"]["the gradient lacks m/‖W + ΔW‖"] = s * dW @ A.T
        found["magnitude"]["the gradient is not divided by the norm"] = (dW * V).sum(1)
    return found


def _norm(V: Array) -> Array:
    return np.sqrt((V * V).sum(1))
