"""Laws of LoRA, rsLoRA and DoRA layers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minilora.testing.bounds import Array, Bounded
from minilora.testing.cases import LEADS, AdaptedLinear, Method, linear_cases
from minilora.testing.compare import as_array
from minilora.testing.laws import Comparison, Law, NotApplicable, accepted
from minilora.testing.linear_mistakes import merged_mistakes, wrong_gradients, wrong_linears

MASKS = 8192  # of a dropout law: enough for ignored dropout to be ten bounds away
Make = Callable[..., Any]


class Built(NamedTuple):
    """A layer that was made for a case, and the tensors that it was given."""

    layer: Any
    given: dict[str, Tensor]  # W, b, A, B, magnitude

    def tensor(self, name: str) -> Tensor | None:
        """Return the tensor that the layer trains as A, B or magnitude, or its transpose; None if it has none."""
        given = self.given[name]
        if given.grad is not None:
            return given
        parameters = self.layer.parameters() if hasattr(self.layer, "parameters") else ()
        for parameter in parameters:
            for own in (parameter, parameter.T) if parameter.ndim == 2 else (parameter,):
                flat = own.detach().to(given)
                if flat.numel() == given.numel() and torch.equal(flat.reshape(given.shape), given.detach()):
                    return parameter if own is parameter else parameter.T
        return None

    def gradient(self, name: str) -> Any:
        """Return the gradient of A, B or magnitude after a backward pass: zeros if there is none."""
        tensor = self.tensor(name)
        if tensor is None:
            return AssertionError(f"no parameter of the layer holds {name}")
        leaf = tensor if tensor.is_leaf else tensor._base
        if leaf is None or leaf.grad is None:
            return torch.zeros_like(self.given[name])
        gradient = leaf.grad if leaf is tensor else leaf.grad.T
        return gradient.reshape(self.given[name].shape)


def build(make: Make, case: AdaptedLinear, **options: Any) -> tuple[Built, AdaptedLinear]:
    """Make a layer in evaluation mode; the case is returned with W's norm as magnitude where the maker takes none."""
    if case.method == "dora":
        options |= {"use_dora": True} | ({"magnitude": None} if case.has_magnitude else {})
    extra = accepted(make, **options, **({"use_rslora": True} if case.use_rslora else {}))
    if case.method == "dora" and "magnitude" not in extra:
        case = replace(case, has_magnitude=False)
    given = {name: tensor(case, name) for name in ("W", "A", "B", "magnitude")}
    for name in ("A", "B", "magnitude"):
        given[name].requires_grad_()
    if "magnitude" in extra:
        extra["magnitude"] = given["magnitude"]
    b = None if case.b is None else tensor(case, "b")
    layer = make(given["W"], b, given["A"], given["B"], case.alpha, **extra)
    set_mode(layer, training=False)
    return Built(layer, given if b is None else given | {"b": b}), case


def tensor(case: AdaptedLinear, name: str) -> Tensor:
    """Return an array of the case as a tensor in its dtype, copied: the implementation may change it."""
    return torch.from_numpy(case.arrays[name]).to(getattr(torch, case.dtype), copy=True)


def set_mode(layer: Any, training: bool) -> None:
    if hasattr(layer, "train"):
        layer.train(training)


def forward(make: Make, case: AdaptedLinear) -> Iterator[Comparison]:
    built, case = build(make, case)
    yield Comparison("y", built.layer(tensor(case, "x")), case.y, outputs(case, case.x))


def identity(make: Make, case: AdaptedLinear) -> Iterator[Comparison]:
    built, start = build(make, replace(case, has_magnitude=False).changed(B=np.zeros_like(case.B)))
    yield Comparison("y", built.layer(tensor(start, "x")), start.y, outputs(start, start.x))


def shapes(make: Make, case: AdaptedLinear) -> Iterator[Comparison]:
    for lead in LEADS:
        each = replace(case, lead=lead)
        built, each = build(make, each)
        y = built.layer(tensor(each, "x"))
        yield Comparison(f"y of x {(*lead, case.inner)}", y, each.y, outputs(each, each.x))


def start_of_magnitude(make: Make, case: AdaptedLinear) -> Iterator[Comparison]:
    yield from forward(make, replace(case, has_magnitude=False))


def with_rslora(make: Make, case: AdaptedLinear) -> Iterator[Comparison]:
    if not accepted(make, use_rslora=True):
        raise NotApplicable("the layer takes no `use_rslora`")
    yield from forward(make, replace(case, use_rslora=True))


def merge_of_layer(make: Make, case: AdaptedLinear) -> Iterator[Comparison]:
    built, probe = build(make, replace(case, lead=(case.inner,)).changed(x=np.eye(case.inner)))
    y = built.layer(tensor(probe, "x"))
    yield Comparison("layer(1), the weight that is applied", y, probe.y, outputs(probe, probe.x))
    weight = getattr(built.layer, "merged_weight", None)
    if weight is not None:
        merged = weight() if callable(weight) else weight
        yield Comparison("merged_weight", merged, probe.merged, merged_mistakes(probe))


def gradients(make: Make, case: AdaptedLinear) -> Iterator[Comparison]:
    built, case = build(make, case)
    x = tensor(case, "x").requires_grad_()
    backward(built, x, tensor(case, "dy"))
    mistakes = wrong_gradients(case)
    for name, expected in case.gradients.items():
        if name == "magnitude" and not case.has_magnitude:
            continue
        actual = x.grad if name == "x" else built.gradient(name)
        actual = torch.zeros_like(x) if actual is None else actual
        yield Comparison(f"the gradient of {name}", actual, expected, functools.partial(dict, mistakes[name]))


def backward(built: Built, x: Tensor, dy: Tensor) -> None:
    """Run a forward and a backward pass of Σ dy·y."""
    if hasattr(built.layer, "is_numpy"):
        raise NotApplicable("the layer computes in numpy: it has no gradients")
    y = built.layer(x)
    if not y.requires_grad:
        raise AssertionError("the layer's output has no gradient")
    y.backward(dy.to(y.dtype))


def scaling(make: Make, case: AdaptedLinear) -> Iterator[Comparison]:
    doubled = replace(case, scale=2 * case.scale)
    for each in (case, doubled):
        built, each = build(make, each)
        yield Comparison(f"y with alpha {each.alpha:g}", built.layer(tensor(each, "x")), each.y, outputs(each, each.x))


def ranks_add(make: Make, case: AdaptedLinear) -> Iterator[Comparison]:
    other = replace(case, seed=case.seed + 1000)
    A, B = np.concatenate([case.A, other.A]), np.concatenate([case.B, other.B], axis=1)
    built, both = build(make, replace(case, r=2 * case.r).changed(A=A, B=B))
    yield Comparison("y of [A₁; A₂], [B₁ B₂]", built.layer(tensor(both, "x")), both.y, outputs(both, both.x))


def frozen(make: Make, case: AdaptedLinear) -> Iterator[Comparison]:
    built, case = build(make, case)
    set_mode(built.layer, training=True)
    x = tensor(case, "x").requires_grad_()
    base = {name: built.tensor(name) for name in ("W", "b") if name in built.given}
    backward(built, x, tensor(case, "dy"))
    parameters = list(built.layer.parameters()) if hasattr(built.layer, "parameters") else []
    for parameter in {id(p): p for p in (*parameters, *built.given.values())}.values():
        if parameter.grad is not None:
            parameter.data -= 0.1 * parameter.grad
    for name, own in base.items():
        yield Comparison(f"{name} after a step", built.given[name], case.arrays[name])
        if own is not None:
            yield Comparison(f"the layer's {name} after a step", own, case.arrays[name])
    yield Comparison("x, which is only read", x, case.x)


def follows(make: Make, case: AdaptedLinear) -> Iterator[Comparison]:
    built, case = build(make, case)
    if hasattr(built.layer, "is_numpy"):
        raise NotApplicable("the layer computes in numpy: its tensors cannot be changed in place")
    x = tensor(case, "x")
    built.layer(x)
    B = built.tensor("B")
    if B is None and not hasattr(built.layer, "parameters"):
        B = built.given["B"]
    if B is None:
        raise AssertionError("no parameter of the layer holds B")
    B.data.mul_(2)
    changed = case.changed(B=2 * case.B)
    yield Comparison("y after B was doubled in place", built.layer(x), changed.y, outputs(changed, changed.x))


def dropout(make: Make, case: AdaptedLinear) -> Iterator[Comparison]:
    if "dropout" not in accepted(make, dropout=0.0):
        raise NotApplicable("the layer takes no `dropout`")
    if not case.x.size:
        return
    p, row = 0.25, case.rows[:1]
    built, one = build(make, replace(case, lead=(1,)).changed(x=row), dropout=p)
    x = tensor(one, "x").repeat(MASKS, 1)
    first, second = built.layer(x[:1]), as_array(built.layer(x[:1]))
    active = {"dropout is active in evaluation mode": second}
    yield Comparison("a second y in evaluation mode", second, as_array(first), lambda: active)
    yield Comparison("y in evaluation mode", first, one.y, outputs(one, one.x))
    set_mode(built.layer, training=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        y = as_array(built.layer(x))
    yield Comparison("x, which is only read", x[0], one.x[0])
    # Each term of Δy[o] = s Σᵢ (B A)[o, i] x[i] becomes 0 or 1/(1 - p) times as large. For 0.211 < p < 0.789 the fourth
    # moment of such a sum is at most that of a normal variable, 3σ⁴: a measured variance varies by 2σ⁴ / MASKS at most.
    ratio = one.merged.value / (one.W + one.scale * one.B @ one.A) if case.method == "dora" else np.ones_like(one.W)
    base, terms = ratio * one.W * row, ratio * one.scale * (one.B @ one.A) * row
    right, rounding, variance = one.y.value[0], one.y.error[0], p / (1 - p) * (terms**2).sum(1)
    wrong = {
        "dropout lacks the factor 1/(1 - p)": right - p * terms.sum(1),
        "dropout acts on the base, too, and lacks the factor 1/(1 - p)": right - p * (base + terms).sum(1),
        **({} if y.var(0).any() else {"one dropout mask is used for all rows": y[0]}),
    }
    mean = Bounded(right, 6 * np.sqrt(variance / MASKS) + rounding)
    yield Comparison("the mean of y over dropout masks", y.mean(0), mean, lambda: wrong)
    wrong_variance = {
        "dropout is ignored in training": 0 * variance,
        "dropout acts on the base, too": p / (1 - p) * ((base + terms) ** 2).sum(1),
        "p is taken for the probability to keep": (1 - p) / p * (terms**2).sum(1),
    }
    spread = Bounded(variance, 6 * variance * math.sqrt(2 / MASKS) + rounding)
    yield Comparison("the variance of y over dropout masks", y.var(0), spread, lambda: wrong_variance)


def outputs(case: AdaptedLinear, x: Array) -> Callable[[], dict[str, Array]]:
    """Return a function that computes known wrong outputs by their mistake."""
    return lambda: {cause: x @ weight.T + bias for cause, (weight, bias) in wrong_linears(case).items()}


def _layer_laws(kind: str, method: Method, use_rslora: bool = False) -> list[Law]:
    scale = "α/√r" if use_rslora else "α/r"
    equation = f"y = x Wᵀ + b + s·(x Aᵀ) Bᵀ with s = {scale}"
    gradient = "dA = s·Bᵀ dW, dB = s·dW Aᵀ, dx = dy W' where dW = dyᵀ x"
    extra = []
    if method == "dora":
        equation = "y = m ⊙ x (W + s·B A)ᵀ / ‖W + s·B A‖ + b, the norm being that of each row"
        gradient = "as LoRA's of dy·m/‖W + s·B A‖, with the norm held constant; dm = Σ dW·(W + s·B A)/‖W + s·B A‖"
        extra = [
            ("start", "without a given magnitude m = ‖W‖, of each row", start_of_magnitude, ("float64",)),
            ("rslora", "with use_rslora s = α/√r", with_rslora, ("float64",)),
        ]
    table = [
        ("forward", equation, forward, ("float64", "float32")),
        ("shapes", "x (..., in) may have any sizes in front of its features", shapes, ("float64",)),
        ("identity", "with B = 0 the layer is its base: y = x Wᵀ + b", identity, ("float64", "float32")),
        ("merge", "the layer applies its merged weight", merge_of_layer, ("float64",)),
        ("gradients", gradient, gradients, ("float64", "float32")),
        ("scale", "twice the alpha is twice the scale", scaling, ("float64",)),
        ("sums", "adapters add by concatenating ranks: [B₁ B₂][A₁; A₂] = B₁ A₁ + B₂ A₂", ranks_add, ("float64",)),
        ("frozen", "W, b and x keep their bits when A and B are trained", frozen, ("float64",)),
        ("updates", "a change of B in place shows in the next output", follows, ("float64",)),
        ("dropout", "dropout acts on x in front of A, only in training, and keeps the mean", dropout, ("float64",)),
        ("16-bit", f"{equation}, in bfloat16 and float16", forward, ("bfloat16", "float16")),
        *extra,
    ]
    return [
        Law(kind, name, statement, functools.partial(linear_cases, method, *dtypes, use_rslora=use_rslora), compare)
        for name, statement, compare, dtypes in table
    ]


LAWS = (
    *_layer_laws("lora", "lora"),
    *_layer_laws("rslora", "lora", use_rslora=True),
    *_layer_laws("dora", "dora"),
)
