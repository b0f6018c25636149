"""Laws of LoRA, rsLoRA and DoRA layers."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minilora.testing.cases import SCALES, AdaptedLinear, Method, interned, tensor
from minilora.testing.compare import Array, Bounded, as_array
from minilora.testing.laws import Comparison, Law, NotApplicable, accepted, claim

SHAPES = (  # lead, in, out, r: from small to large; square ones, in which exchanged factors still multiply
    ((1,), 1, 1, 1),
    ((1,), 2, 1, 1),
    ((1,), 1, 2, 1),
    ((2,), 2, 2, 1),
    ((2,), 2, 2, 2),
    ((1,), 3, 2, 3),
    ((3,), 4, 4, 2),
    ((2, 3), 5, 4, 3),
    ((4,), 7, 9, 4),
    ((9,), 33, 17, 5),
    ((2, 3), 40, 24, 8),
    ((5,), 136, 144, 40),
)
LEADS = ((), (0,), (2, 0, 3), (2, 1, 3))  # sizes in front of the features: none, zeros, several
MASKS = 8192  # of a dropout law: enough for ignored dropout to be ten bounds away
Make = Callable[..., Any]


class Built(NamedTuple):
    """A layer that was made for a case, and the tensors that it was given."""

    layer: Any
    given: dict[str, Tensor]  # W, b, A, B, magnitude

    def tensor(self, name: str, y: Any = None) -> Tensor | None:
        """Return the tensor that is W, A, B, … in the layer, or its transpose; None if there is none.

        It is a tensor that was given, one that y was computed from, or a parameter.
        """
        given, reached = self.given[name], leaves(y) if isinstance(y, Tensor) else []
        if any(leaf is given for leaf in reached):
            return given
        for parameter in [*reached, *(self.layer.parameters() if hasattr(self.layer, "parameters") else ())]:
            both = (parameter, parameter.T) if parameter.ndim == 2 else (parameter,)
            for own in sorted(both, key=lambda each: each.shape != given.shape):
                flat = own.detach().to(given)
                if flat.numel() == given.numel() and torch.equal(flat.reshape(given.shape), given.detach()):
                    return own
        return None

    def gradient(self, name: str, y: Tensor) -> Any:
        """Return the gradient of A, B or magnitude after a backward pass from y: zeros if there is none."""
        tensor = self.tensor(name, y)
        if tensor is None:
            return AssertionError(f"no parameter of the layer is {name}")
        leaf = tensor if tensor.is_leaf else tensor._base
        if leaf is None or leaf.grad is None:
            return torch.zeros_like(self.given[name])
        gradient = leaf.grad if leaf is tensor else leaf.grad.T
        return gradient.reshape(self.given[name].shape)


def leaves(y: Tensor) -> list[Tensor]:
    """Return the tensors that a backward pass from y gives a gradient."""
    found, seen, nodes = list[Tensor](), set[Any](), [y.grad_fn]
    while nodes:
        node: Any = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found += [node.variable] if hasattr(node, "variable") else []
            nodes += [following for following, _ in node.next_functions]
    return found


def make_layer(make: Make, case: AdaptedLinear, **options: Any) -> tuple[Built, AdaptedLinear]:
    """Make a layer in evaluation mode; the case is returned with W's norm as magnitude where the maker takes none."""
    if case.method == "dora":
        options |= {"use_dora": True} | ({"magnitude": None} if case.has_magnitude else {})
    extra = accepted(make, **options, **({"use_rslora": True} if case.use_rslora else {}))
    if case.method == "dora" and "magnitude" not in extra:
        case = replace(case, has_magnitude=False)
    given = {name: tensor(case.arrays[name], case.dtype) for name in ("W", "A", "B", "magnitude")}
    for name in ("A", "B", "magnitude"):
        given[name].requires_grad_()
    if "magnitude" in extra:
        extra["magnitude"] = given["magnitude"]
    b = None if case.b is None else tensor(case.b, case.dtype)
    layer = make(given["W"], b, given["A"], given["B"], case.alpha, **extra)
    set_mode(layer, training=False)
    return Built(layer, given if b is None else given | {"b": b}), interned(case)


def set_mode(layer: Any, training: bool) -> None:
    if hasattr(layer, "train"):
        layer.train(training)


def with_dtype(name: str, y: Any, right: Bounded) -> Iterator[Comparison]:
    """Compare the output of a layer and, if it is a tensor, its dtype, which is that of x."""
    yield Comparison(name, y, right)
    found = str(y.dtype).removeprefix("torch.") if isinstance(y, Tensor) else right.dtype
    yield claim(f"the dtype of {name}", "" if found == right.dtype else f"found {found}, expected {right.dtype}")


def output(layer: Any, case: AdaptedLinear, name: str = "y") -> Comparison:
    """Compare what a layer makes of the case's x."""
    return Comparison(name, layer(tensor(case.x, case.dtype)), interned(case).y)


def forward(make: Make, case: AdaptedLinear, name: str = "y") -> Iterator[Comparison]:
    built, case = make_layer(make, case)
    yield from with_dtype(name, built.layer(tensor(case.x, case.dtype)), case.y)


def identity(make: Make, case: AdaptedLinear) -> Iterator[Comparison]:
    yield from start_of_magnitude(make, case.changed(B=np.zeros_like(case.B)))


def shapes(make: Make, case: AdaptedLinear) -> Iterator[Comparison]:
    for lead in LEADS:
        yield from forward(make, replace(case, lead=lead), f"y of x {(*lead, case.inner)}")
    built, case = make_layer(make, replace(case, lead=(2, 3)))
    turned = tensor(np.asfortranarray(case.x), case.dtype)  # its strides are those of a transposed view
    yield Comparison(f"y of a view of x {tuple(turned.shape)}", built.layer(turned), case.y)


def start_of_magnitude(make: Make, case: AdaptedLinear) -> Iterator[Comparison]:
    built, case = make_layer(make, replace(case, has_magnitude=False))
    yield output(built.layer, case)


def with_rslora(make: Make, case: AdaptedLinear) -> Iterator[Comparison]:
    if not accepted(make, use_rslora=True):
        raise NotApplicable("the layer takes no `use_rslora`")
    yield from forward(make, replace(case, use_rslora=True))


def merge_of_layer(make: Make, case: AdaptedLinear) -> Iterator[Comparison]:
    built, probe = make_layer(make, replace(case, lead=(case.inner,)).changed(x=np.eye(case.inner)))
    yield output(built.layer, probe, "layer(1), the weight that is applied")
    weight = getattr(built.layer, "merged_weight", None)
    if weight is not None:
        merged = weight() if callable(weight) else weight
        yield Comparison("merged_weight", merged, probe.merged)


def gradients(make: Make, case: AdaptedLinear) -> Iterator[Comparison]:
    built, case = make_layer(make, case)
    x, y = backward(built.layer, case)
    for name, expected in case.gradients.items():
        if name == "magnitude" and not case.has_magnitude:
            continue
        actual = x.grad if name == "x" else built.gradient(name, y)
        yield Comparison(f"the gradient of {name}, in evaluation mode", actual, expected)


def backward(layer: Any, case: Any) -> tuple[Tensor, Tensor]:
    """Run a forward and a backward pass of Σ dy·y; return x, whose gradient is 0 where there is none, and y."""
    if hasattr(layer, "is_numpy"):
        raise NotApplicable("the layer computes in numpy: it has no gradients")
    x = tensor(case.x, case.dtype).requires_grad_()
    y = layer(x)
    if not y.requires_grad:
        raise AssertionError("the layer's output has no gradient")
    y.backward(tensor(case.dy, case.dtype).to(y.dtype))
    x.grad = torch.zeros_like(x) if x.grad is None else x.grad
    return x, y


def scaling(make: Make, case: AdaptedLinear) -> Iterator[Comparison]:
    for scaled in (case, replace(case, scale=2 * case.scale)):
        yield from forward(make, scaled, f"y with alpha {scaled.alpha:g}")


def ranks_add(make: Make, case: AdaptedLinear) -> Iterator[Comparison]:
    other = replace(case, seed=case.seed + 1000)
    A, B = np.concatenate([case.A, other.A]), np.concatenate([case.B, other.B], axis=1)
    yield from forward(make, replace(case, r=2 * case.r).changed(A=A, B=B), "y of [A₁; A₂], [B₁ B₂]")


def frozen(make: Make, case: AdaptedLinear) -> Iterator[Comparison]:
    built, case = make_layer(make, case)
    set_mode(built.layer, training=True)
    base = {name: built.tensor(name) for name in ("W", "b") if name in built.given}
    x, _ = backward(built.layer, case)
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
    built, case = make_layer(make, case)
    if hasattr(built.layer, "is_numpy"):
        raise NotApplicable("the layer computes in numpy: its tensors cannot be changed in place")
    B = built.tensor("B", built.layer(tensor(case.x, case.dtype)))
    if B is None:
        raise AssertionError("no parameter of the layer is B")
    B.data.mul_(2)
    yield output(built.layer, case.changed(B=2 * case.B), "y after B was doubled in place")
    if case.method == "lora":  # DoRA's start of m depends on W
        given, layer = built.given["W"], built.layer
        tensors = [*layer.parameters(), *layer.buffers()] if isinstance(layer, torch.nn.Module) else []
        matrices = [matrix for matrix in tensors if matrix.ndim == 2]
        own = [matrix for matrix in matrices if any(torch.equal(W.to(given), given) for W in (matrix, matrix.T))]
        for W in {matrix.data_ptr(): matrix for matrix in (given, *own)}.values():
            W.data.mul_(2)
        yield output(built.layer, case.changed(W=2 * case.W, B=2 * case.B), "y after W was doubled in place as well")


def dropout(make: Make, case: AdaptedLinear) -> Iterator[Comparison]:
    if "dropout" not in accepted(make, dropout=0.0):
        raise NotApplicable("the layer takes no `dropout`")
    if not case.x.size:
        return
    p, row = 0.25, case.rows[:1]
    built, single = make_layer(make, replace(case, lead=(1,)).changed(x=row), dropout=p)
    x = tensor(single.x, single.dtype).repeat(MASKS, 1)
    yield Comparison("a second y in evaluation mode", built.layer(x[:1]), as_array(built.layer(x[:1])))
    yield output(built.layer, single, "y in evaluation mode")
    set_mode(built.layer, training=True)
    torch.manual_seed(case.seed)
    y = as_array(built.layer(x)).copy()
    yield Comparison("x, which is only read", x[0], single.x[0])
    yield from statistics(single, p, y)


def statistics(case: AdaptedLinear, p: float, y: Array) -> Iterator[Comparison]:
    """Compare the variance and the mean of outputs (MASKS, out) of one row by different dropout masks.

    Each term of Δy[o] = s Σᵢ (B A)[o, i] x[i] becomes 0 or 1/(1 - p) times as large. For 0.211 < p < 0.789 the fourth
    moment of such a sum is at most that of a normal variable, 3σ⁴: a measured variance varies by 2σ⁴ / MASKS at most.
    """
    update = case.scale * case.B @ case.A
    ratio = case.merged.value / (case.W + update) if case.method == "dora" else 1.0
    terms = ratio * update * case.rows
    rounding, variance, measured = case.y.error[0], p / (1 - p) * (terms**2).sum(1), y.var(0)
    spread = Bounded(variance, 6 * variance * math.sqrt(2 / MASKS) + rounding)
    yield Comparison("the variance of y over dropout masks", measured, spread)
    mean = Bounded(case.y.value[0], 6 * np.sqrt(np.maximum(variance, measured) / MASKS) + rounding)
    yield Comparison("the mean of y over dropout masks", y.mean(0), mean)


@functools.cache
def linear_cases(method: Method, dtype: str, use_rslora: bool = False) -> list[AdaptedLinear]:
    """Return cases from small to large, each with and without a bias; the laws share them, and their right results."""
    scales = [SCALES[i % len(SCALES)] for i in range(len(SHAPES) + 1)]
    return [
        AdaptedLinear(
            method, lead, inner, outer, r, scales[seed + has_bias], has_bias, seed, dtype, use_rslora=use_rslora
        )
        for seed, (lead, inner, outer, r) in enumerate(SHAPES)
        for has_bias in (True, False)
    ]


def _layer_laws(kind: str, method: Method, use_rslora: bool = False) -> list[Law]:
    scale = "α/√r" if use_rslora else "α/r"
    equation = f"y = x Wᵀ + b + s·(x Aᵀ) Bᵀ with s = {scale}"
    gradient = "dA = s·Bᵀ dW, dB = s·dW Aᵀ, dx = dy W' where dW = dyᵀ x"
    wide, narrow = (linear_cases(method, dtype, use_rslora) for dtype in ("float64", "float32"))
    low = linear_cases(method, "bfloat16", use_rslora) + linear_cases(method, "float16", use_rslora)
    extra = []
    if method == "dora":
        equation = "y = m ⊙ x (W + s·B A)ᵀ / ‖W + s·B A‖ + b, the norm being that of each row"
        gradient = "as LoRA's of dy·m/‖W + s·B A‖, with the norm held constant; dm = Σ dW·(W + s·B A)/‖W + s·B A‖"
        extra = [
            Law(kind, "start", "without a given magnitude m = ‖W‖, of each row", wide, start_of_magnitude),
            Law(kind, "rslora", "with use_rslora s = α/√r", wide, with_rslora),
        ]
    sums = "adapters add by concatenating ranks: [B₁ B₂][A₁; A₂] = B₁ A₁ + B₂ A₂"
    dropped = "dropout acts on x in front of A, only in training, and keeps the mean"
    return [
        Law(kind, "forward", equation, wide + narrow, forward),
        Law(kind, "shapes", "x (..., in) may have any sizes in front of its features", wide, shapes),
        Law(kind, "identity", "with B = 0 the layer is its base: y = x Wᵀ + b", wide + narrow, identity),
        Law(kind, "merge", "the layer applies its merged weight", wide, merge_of_layer),
        Law(kind, "gradients", gradient, wide + narrow, gradients),
        Law(kind, "scale", "twice the alpha is twice the scale", wide, scaling),
        Law(kind, "sums", sums, wide, ranks_add),
        Law(kind, "frozen", "W, b and x keep their bits when A and B are trained", wide, frozen),
        Law(kind, "updates", "a change of B in place shows in the next output", wide, follows),
        Law(kind, "dropout", dropped, wide, dropout),
        Law(kind, "16-bit", f"{equation}, in bfloat16 and float16", low, forward),
        *extra,
    ]


LAWS = (*_layer_laws("lora", "lora"), *_layer_laws("rslora", "lora", use_rslora=True), *_layer_laws("dora", "dora"))
