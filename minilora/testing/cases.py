"""Cases of the laws of adapted linear layers: drawn inputs, right results with their bounds, and known wrong ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch

from minilora.testing.compare import Array, Bounded
from minilora.testing.reference import (
    dora_gradients,
    dora_merged_weight,
    lora_forward,
    lora_gradients,
    lora_merged_weight,
)

WeightKind = Literal["normal", "outlier", "constant", "tiny", "rank_deficient", "huge_ratio"]
Method = Literal["lora", "dora"]
SCALES = (2.5, 0.375, 7.0, 0.625)  # never 1, which hides a lost scale


def hard_weight(kind: WeightKind, rng: np.random.Generator, rows: int, columns: int) -> Array:
    """Draw a weight (rows, columns): normal numbers, or numbers that are hard to compute with.

    outlier: one is a thousand times larger; constant: all are equal; tiny: of magnitude 1e-40, denormal in float32;
    rank_deficient: of rank 1; huge_ratio: the rows differ by factors from 1e-6 to 1e6.
    """
    weight = rng.standard_normal((rows, columns))
    if kind == "outlier":
        weight[rng.integers(rows), rng.integers(columns)] *= 1000
    if kind == "constant":
        weight[:] = weight[0, 0]
    if kind == "tiny":
        weight *= 1e-40
    if kind == "rank_deficient":
        weight = np.outer(weight[:, 0], weight[0])
    if kind == "huge_ratio":
        weight *= 10.0 ** rng.integers(-6, 7, size=(rows, 1))
    return weight


def tensor(array: Array, dtype: str = "float64") -> torch.Tensor:
    """Return an array as a tensor of its own: the implementation may change it."""
    return torch.from_numpy(np.asarray(array, dtype=np.float64)).to(getattr(torch, dtype), copy=True)


def rounded(array: Array, dtype: str) -> Array:
    """Round numbers to a dtype of PyTorch, so that both sides of a comparison start from the same."""
    return tensor(array, dtype).double().numpy()


@dataclass(frozen=True)
class AdaptedLinear:
    """A linear layer with an adapter: its tensors, an input, and what is right for them.

    The scale s is α/r, or α/√r with `use_rslora`; `alpha` follows from it. The arrays are float64, rounded to `dtype`:
    W (out, in), b (out) or None, A (r, in), B (out, r), magnitude (out), x (..., in), dy (..., out).
    """

    method: Method = "lora"
    lead: tuple[int, ...] = (2,)  # sizes of x before its features
    inner: int = 3
    outer: int = 4
    r: int = 2
    scale: float = 2.5
    has_bias: bool = True
    seed: int = 0
    dtype: str = "float64"
    weight: WeightKind = "normal"
    use_rslora: bool = False
    has_magnitude: bool = True  # of DoRA: drawn, or else the norm of W's rows
    changes: Mapping[str, Array] = field(default_factory=dict, repr=False, compare=False)  # of drawn arrays
    arrays: dict[str, Array] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        drawn = {
            "W": hard_weight(self.weight, rng, self.outer, self.inner),
            "b": 2 * rng.standard_normal(self.outer),
            "A": rng.standard_normal((self.r, self.inner)),
            "B": rng.standard_normal((self.outer, self.r)),
            "x": rng.standard_normal((*self.lead, self.inner)),
            "dy": rng.standard_normal((*self.lead, self.outer)),
            "magnitude": rng.uniform(0.5, 3, self.outer),
        }
        self.arrays.update({name: rounded(array, self.dtype) for name, array in {**drawn, **self.changes}.items()})
        if not self.has_magnitude:
            self.arrays["magnitude"] = np.sqrt((self.W**2).sum(1))

    def __str__(self) -> str:
        bias = "with" if self.has_bias else "no"
        return (
            f"x {(*self.lead, self.inner)}, W {(self.outer, self.inner)}, A {(self.r, self.inner)}, "
            f"B {(self.outer, self.r)}, alpha {self.alpha:g}, {bias} bias, {self.dtype}"
        )

    @property
    def alpha(self) -> float:
        return self.scale * (math.sqrt(self.r) if self.use_rslora else self.r)

    W = property(lambda self: self.arrays["W"])
    b = property(lambda self: self.arrays["b"] if self.has_bias else None)
    A = property(lambda self: self.arrays["A"])
    B = property(lambda self: self.arrays["B"])
    x = property(lambda self: self.arrays["x"])
    dy = property(lambda self: self.arrays["dy"])
    magnitude = property(lambda self: self.arrays["magnitude"])
    rows = property(lambda self: self.x.reshape(-1, self.inner))  # (N, in)
    dy_rows = property(lambda self: self.dy.reshape(-1, self.outer))

    @cached_property
    def merged(self) -> Bounded:
        """W + s·B A, or m·(W + s·B A)/‖W + s·B A‖."""
        merged = self._own
        if self.method == "dora":
            exact = dora_merged_weight(self.W, self.A, self.B, self.scale, self.magnitude)
            merged = merged * self._ratio.reshape(-1, 1)
        else:
            exact = lora_merged_weight(self.W, self.A, self.B, self.scale)
        return Bounded(exact, merged.error, self.dtype)

    @cached_property
    def y(self) -> Bounded:
        """x W'ᵀ + b, whether W' or the two products of LoRA are formed, and wherever b is added."""
        x, B, A = (self._exact(each) for each in (self.rows, self.B, self.A))
        b = np.zeros(self.outer) if self.b is None else self.b
        with_bias = self._exact(np.c_[self.rows, np.ones(len(self.rows))]) @ self._exact(np.c_[self.W, b]).T
        base, update = with_bias - b, scaled(x @ A.T, B.T, self.scale).widened(x @ (A * self.scale).T @ B.T)
        y = (base + update + b).widened(with_bias + update)
        if self.method == "dora":
            c = self._ratio
            y = ((base + update) * c + b).widened(base + b + (base * (c - 1) + update * c))
        y = y.widened(x @ self.merged.T + b)
        if self.method == "dora":
            exact = np.einsum("ni,oi->no", self.rows, self.merged.value) + b
        else:
            exact = lora_forward(self.rows, self.W, self.b, self.A, self.B, self.scale)
        return Bounded(exact, y.error, self.dtype).reshape(*self.lead, self.outer)

    @cached_property
    def gradients(self) -> dict[str, Bounded]:
        """The gradients of Σ dy·y: x, A, B and, of DoRA, magnitude; the norm is a constant."""
        x, W, A, B, dy = (self._exact(each) for each in (self.rows, self.W, self.A, self.B, self.dy_rows))
        if self.method == "dora":
            dy = (dy * self._ratio).widened(dy * (self._ratio - 1) + dy)
        s, dW = self.scale, dy.T @ x
        bounds = {
            "x": (dy @ W + scaled(dy @ B, A, s)).widened(dy @ W + dy @ (B * s) @ A, dy @ self._own),
            "A": scaled((dy @ B).T, x, s).widened((dy @ (B * s)).T @ x, scaled(B.T, dW, s)),
            "B": scaled(dy.T, x @ A.T, s).widened(dy.T @ (x @ (A * s).T), scaled(dW, A.T, s)),
        }
        if self.method == "dora":
            bounds["magnitude"] = self._magnitude_gradient()
        found = {
            name: Bounded(exact, bounds[name].error, self.dtype) for name, exact in self._exact_gradients().items()
        }
        return found | {"x": found["x"].reshape(*self.x.shape)}

    def _magnitude_gradient(self) -> Bounded:
        """Σ dy·x Vᵀ / ‖V‖ over the rows, V = W + s·B A, whatever is summed first."""
        x, W, A, B, dy = (self._exact(each) for each in (self.rows, self.W, self.A, self.B, self.dy_rows))
        over_rows, over_inputs = (self._exact(np.ones(n)) for n in self.rows.shape)
        base, update = dy * (x @ W.T), dy * scaled(x @ A.T, B.T, self.scale)
        dm = (over_rows @ (base + update)).widened(
            over_rows @ base + over_rows @ update, (dy.T @ x * self._own) @ over_inputs
        )
        return dm / self._own.row_norms()

    def _exact_gradients(self) -> dict[str, Array]:
        dx = np.einsum("no,oi->ni", self.dy_rows, self.merged.value)
        if self.method == "dora":
            tensors = (self.W, self.A, self.B, self.scale, self.magnitude)
            dA, dB, dm = dora_gradients(self.rows, self.dy_rows, *tensors)
            return {"x": dx, "A": dA, "B": dB, "magnitude": dm}
        dA, dB = lora_gradients(self.rows, self.dy_rows, self.A, self.B, self.scale)
        return {"x": dx, "A": dA, "B": dB}

    @property
    def _own(self) -> Bounded:
        """W + s·B A."""
        return self._exact(self.W) + scaled(self._exact(self.B), self._exact(self.A), self.scale)

    @property
    def _ratio(self) -> Bounded:
        """m / ‖W + s·B A‖, (out)."""
        magnitude = self._exact(self.magnitude) if self.has_magnitude else self._exact(self.W).row_norms()
        return magnitude / self._own.row_norms()

    def changed(self, **arrays: Array) -> AdaptedLinear:
        """Return the case with other arrays."""
        return replace(self, changes={**self.changes, **arrays})

    def _exact(self, array: Array) -> Bounded:
        return Bounded.exact(array, self.dtype)


def scaled(a: Bounded, b: Bounded, scale: float) -> Bounded:
    """Return scale·a b, wherever the scale is multiplied: by one number, or by α and then by 1/r."""
    return (a @ b * scale * 1).widened((a * scale * 1) @ b, a @ (b * scale * 1))


# --- known mistakes ---


def wrong_scales(case: AdaptedLinear) -> dict[str, float]:
    """Return what is computed instead of the scale."""
    r, alpha = case.r, case.alpha
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
        found["the scale is α/√r, rsLoRA's, instead of α/r"] = alpha / math.sqrt(r)
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


def wrong_merges(case: AdaptedLinear) -> dict[str, Array]:
    """Return the merged weights by mistake."""
    found = {cause: weight for cause, (weight, _) in wrong_linears(case).items() if "bias" not in cause}
    if case.inner == case.outer:
        found["the update is transposed"] = case.W + case.scale * (case.B @ case.A).T
    return found


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
