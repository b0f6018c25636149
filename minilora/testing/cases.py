"""Cases of the laws of adapted linear layers: drawn inputs, and right results with their bounds."""

import math
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
import torch

from minilora.testing.compare import Array, Bounded

WeightKind = Literal["normal", "outlier", "constant", "tiny", "rank_deficient", "huge_ratio"]
LayerKind = WeightKind | Literal["tiny_update", "small"]
Method = Literal["lora", "dora"]
Mode = Literal["train", "eval", "no_grad", "inference", "again", "back", "strided"]
MODES: dict[Mode, str] = {  # how a layer is called
    "train": "in training mode, without dropout",
    "eval": "in evaluation mode",
    "no_grad": "in training mode under no_grad",
    "inference": "in evaluation mode under inference_mode",
    "again": "in a third call, after calls with other inputs and of another layer, or in a second backward pass",
    "back": "after eval(), a call under inference_mode, and train()",
    "strided": "with tensors that are not contiguous",
}
TWICE: tuple[Mode, ...] = ("again", "eval")  # with two forward and two backward passes
SCALES = (2.5, 0.375, 16 / 24, 7.0, 1 / 3, 0.625)  # never 1, which hides a lost scale; not only binary fractions


def hard_weight(kind: str, rng: np.random.Generator, rows: int, columns: int) -> Array:
    """Draw a weight (rows, columns): normal numbers or, of these kinds, numbers that are hard to compute with.

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


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the same numbers, which are not next to each other, nor the first, in memory."""
    wide = tensor.new_zeros([2 * size + 1 for size in tensor.shape])
    return wide[(slice(1, None, 2),) * tensor.ndim].copy_(tensor)


def rounded(array: Array, dtype: str) -> Array:
    """Round numbers to a dtype of PyTorch, so that both sides of a comparison start from the same."""
    return tensor(array, dtype).double().numpy()


@dataclass(frozen=True)
class AdaptedLinear:
    """A linear layer with an adapter: its tensors, an input, and the right `y`, `merged` and `gradients`.

    The scale s is α/r, or α/√r with `use_rslora`; `alpha` follows from it. The arrays are float64, rounded to `dtype`:
    W (out, in), b (out) or None, A (r, in), B (out, r), magnitude (out), x (..., in), dy (..., out).

    Weights are those of `hard_weight`; an outlier is in x as well; tiny_update: B is a hundred thousand times smaller,
    small: W and B are ten million times smaller.
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
    weight: LayerKind = "normal"
    use_rslora: bool = False
    has_magnitude: bool = True  # of DoRA: drawn, or else the norm of W's rows
    mode: Mode = "train"
    changes: tuple[tuple[str, bytes], ...] = field(default=(), repr=False)  # of drawn arrays

    @cached_property
    def arrays(self) -> dict[str, Array]:
        rng = np.random.default_rng(self.seed)
        drawn = {
            "W": hard_weight(self.weight, rng, self.outer, self.inner),
            "b": 2 * rng.standard_normal(self.outer),
            "A": rng.standard_normal((self.r, self.inner)),
            "B": rng.standard_normal((self.outer, self.r)),
            "x": rng.standard_normal((*self.lead, self.inner)),
            "dy": rng.standard_normal((*self.lead, self.outer)),
            "magnitude": rng.uniform(0.5, 3, self.outer) * rng.choice([1, 1, -1], self.outer),
        }
        if self.weight == "outlier":
            drawn["x"][..., rng.integers(self.inner)] *= 100
        factor = {"tiny_update": 1e-5, "small": 1e-7}.get(self.weight, 1.0)
        drawn["B"] *= factor
        if self.weight == "small":
            drawn["W"] *= factor
        changes = {name: np.frombuffer(numbers).copy().reshape(drawn[name].shape) for name, numbers in self.changes}
        arrays = {name: rounded(array, self.dtype) for name, array in {**drawn, **changes}.items()}
        if not self.has_magnitude:
            arrays["magnitude"] = np.sqrt((arrays["W"] ** 2).sum(1))
        return arrays

    def __str__(self) -> str:
        bias = "with" if self.has_bias else "no"
        return (
            f"x {(*self.lead, self.inner)}, W {(self.outer, self.inner)}, A {(self.r, self.inner)}, "
            f"B {(self.outer, self.r)}, alpha {self.alpha:g}, {bias} bias, {self.dtype}"
            + ("" if self.mode == "train" else f", {MODES[self.mode]}")
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
        return self._own * self._ratio.reshape(-1, 1) if self.method == "dora" else self._own

    @cached_property
    def y(self) -> Bounded:
        """x W'ᵀ + b, whether W' or the two products of LoRA are formed, and wherever b is added."""
        x, B, A = (self._exact(array) for array in (self.rows, self.B, self.A))
        b, base = np.zeros(self.outer) if self.b is None else self.b, self._base
        update = scaled(x @ A.T, B.T, self.scale).widened(x @ (A * self.scale).T @ B.T)
        y = (base + update + b).widened(x.beside(x @ A.T * self.scale, 1) @ self._weight.beside(B, 1).T + b)
        if self.method == "dora":
            c = self._ratio
            y = ((base + update) * c + b).widened(base + b + (base * (c - 1) + update * c))
        return y.widened(x @ self.merged.T + b).reshape(*self.lead, self.outer)

    @cached_property
    def gradients(self) -> dict[str, Bounded]:
        """The gradients of Σ dy·y: x, A, B and, of DoRA, magnitude; the norm is a constant."""
        x, A, B, dy = (self._exact(array) for array in (self.rows, self.A, self.B, self.dy_rows))
        W = self._weight
        if self.method == "dora":
            dy = (dy * self._ratio).widened(dy * (self._ratio - 1) + dy)
        s, dW = self.scale, dy.T @ x
        dx = (dy @ W + scaled(dy @ B, A, s)).widened(
            dy @ W + dy @ (B * s) @ A, dy @ self._own, dy.beside(dy @ B * s, 1) @ W.beside(A, 0)
        )
        gradients = {
            "x": dx.reshape(*self.x.shape),
            "A": scaled((dy @ B).T, x, s).widened((dy @ (B * s)).T @ x, scaled(B.T, dW, s)),
            "B": scaled(dy.T, x @ A.T, s).widened(dy.T @ (x @ (A * s).T), scaled(dW, A.T, s)),
        }
        if self.method == "dora":
            gradients["magnitude"] = self._magnitude_gradient()
        return gradients

    def _magnitude_gradient(self) -> Bounded:
        """Σ dy·x Vᵀ / ‖V‖ over the rows, V = W + s·B A, whatever is summed first."""
        x, A, B, dy = (self._exact(array) for array in (self.rows, self.A, self.B, self.dy_rows))
        over_rows, over_inputs = (self._exact(np.ones(n)) for n in self.rows.shape)
        base, update = dy * self._base, dy * scaled(x @ A.T, B.T, self.scale)
        dm = (over_rows @ (base + update)).widened(
            over_rows @ base + over_rows @ update, (dy.T @ x * self._own) @ over_inputs
        )
        return dm / self._own.row_norms()

    @property
    def _base(self) -> Bounded:
        """x Wᵀ, also as what a base with a bias gives, less the bias."""
        b = np.zeros(self.outer) if self.b is None else self.b
        with_bias = self._weight.beside(self._exact(b.reshape(-1, 1)), 1)
        return self._exact(np.c_[self.rows, np.ones(len(self.rows))]) @ with_bias.T - b

    @property
    def _weight(self) -> Bounded:
        """W; in the mode "back" also W + s·B A - s·B A, of a layer that merges in evaluation mode."""
        W = self._exact(self.W)
        if self.mode != "back":
            return W
        return W.widened(self._own - scaled(self._exact(self.B), self._exact(self.A), self.scale))

    @property
    def _own(self) -> Bounded:
        """W + s·B A."""
        return self._exact(self.W) + scaled(self._exact(self.B), self._exact(self.A), self.scale)

    @property
    def _ratio(self) -> Bounded:
        """m / ‖W + s·B A‖, (out)."""
        magnitude = self._exact(self.magnitude) if self.has_magnitude else self._exact(self.W).row_norms()
        return magnitude / self._own.row_norms()

    def changed(self, **arrays: Array) -> "AdaptedLinear":
        """Return the case with other arrays of the same shapes."""
        more = [(name, np.asarray(array, dtype=np.float64).tobytes()) for name, array in arrays.items()]
        return replace(self, changes=(*self.changes, *more))

    def _exact(self, array: Array) -> Bounded:
        return Bounded.exact(array, self.dtype)


@lru_cache(maxsize=2048)
def interned(case: AdaptedLinear) -> AdaptedLinear:
    """Return the first case that was equal, with the results that it has computed: laws make equal cases anew."""
    return case


def scaled(a: Bounded, b: Bounded, scale: float) -> Bounded:
    """Return scale·a b, wherever the scale is multiplied: by one number, or by α and then by 1/r."""
    return (a @ b * scale * 1).widened((a * scale * 1) @ b, a @ (b * scale * 1))
