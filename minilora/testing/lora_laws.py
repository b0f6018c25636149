"""Laws of LoRA, rsLoRA and DoRA layers."""

import functools
import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minilora.testing.cases import MODES, SCALES, TWICE, AdaptedLinear, LayerKind, Method, interned, tensor
from minilora.testing.compare import Array, Bounded, as_array
from minilora.testing.laws import Comparison, Law, NotApplicable, accepted, claim, mode
from minilora.testing.layers import Built, Make, backward, called, input_of, leaves, make_layer, recording, set_mode

SHAPES = (  # lead, in, out, r: from small to large; square ones, in which exchanged factors still multiply
    ((1,), 1, 1, 1),
    ((1,), 2, 1, 1),
    ((3, 1), 1, 2, 1),
    ((2,), 2, 2, 1),
    ((2,), 2, 2, 2),
    ((1,), 3, 2, 3),
    ((3,), 4, 4, 2),
    ((2, 3), 5, 4, 3),
    ((4, 1), 7, 9, 4),
    ((9,), 33, 17, 5),
    ((2, 1, 3), 40, 24, 8),
    ((5,), 136, 144, 40),
    ((3, 100), 9, 530, 24),
    ((2,), 600, 24, 6),
)
WEIGHTS: dict[int, LayerKind] = {5: "small", 6: "tiny_update", 8: "outlier", 13: "outlier"}  # of SHAPES; else normal
LEADS = ((), (0,), (3, 1), (1, 4), (2, 0, 3), (2, 1, 3))  # sizes in front of the features: none, zeros, several, one
FACTORS = {"lora": ("A", "B"), "dora": ("A", "B", "magnitude")}
MASKS = 8192  # of a dropout law: enough for ignored dropout to be ten bounds away; fewer of very wide layers
LAST = 100  # more of them: what is left over where rows are taken in blocks


def with_dtype(name: str, y: Any, right: Bounded) -> Iterator[Comparison]:
    """Compare the output of a layer and, if it is a tensor, its dtype, which is that of x."""
    yield Comparison(name, y, right)
    found = str(y.dtype).removeprefix("torch.") if isinstance(y, Tensor) else right.dtype
    yield claim(f"the dtype of {name}", "" if found == right.dtype else f"found {found}, expected {right.dtype}")


def output(layer: Any, case: AdaptedLinear, name: str = "y") -> Comparison:
    """Compare what a layer makes of the case's x."""
    return Comparison(name, called(layer, case)[1], interned(case).y)


def forward(make: Make, case: AdaptedLinear, name: str = "y") -> Iterator[Comparison]:
    built, case = make_layer(make, case)
    x, y = called(built.layer, case)
    yield from with_dtype(name, y, case.y)
    yield Comparison("x, which is only read", x, case.x)


def identity(make: Make, case: AdaptedLinear) -> Iterator[Comparison]:
    case = case.changed(B=np.zeros_like(case.B))
    yield from forward(make, replace(case, has_magnitude=False))


def shapes(make: Make, case: AdaptedLinear) -> Iterator[Comparison]:
    built, view = make_layer(make, replace(case, lead=(2, 3), mode="train"))
    x = tensor(np.asfortranarray(view.x), case.dtype)  # its strides are those of a transposed view
    yield Comparison(f"y of a view of x {tuple(x.shape)}", built.layer(x), view.y)
    for lead in LEADS:
        yield from forward(make, replace(case, lead=lead), f"y of x {(*lead, case.inner)}")
        with suppress(NotApplicable):
            yield from gradients(make, replace(case, lead=lead))


def merge_of_layer(make: Make, case: AdaptedLinear) -> Iterator[Comparison]:
    built, probe = make_layer(make, replace(case, lead=(case.inner,)).changed(x=np.eye(case.inner)))
    yield output(built.layer, probe, "layer(1), the weight that is applied")
    weight = getattr(built.layer, "merged_weight", None)
    if weight is not None:
        merged = weight() if callable(weight) else weight
        yield Comparison("merged_weight", merged, probe.merged)


def gradients(make: Make, case: AdaptedLinear) -> Iterator[Comparison]:
    built, case = make_layer(make, case)
    other, _ = make_layer(make, replace(case, seed=case.seed + 1))
    yield from gradients_of(built, case, *backward(built.layer, case, case.seed % 3 < 2, others=[other.layer]))


def trains(make: Make, case: AdaptedLinear) -> Iterator[Comparison]:
    """Compare the gradients, and see that B has one where it is 0, as at the start."""
    yield from gradients(make, case)
    if mode(case) in ("eval", "inference"):  # where a layer may have merged
        return
    built, case = make_layer(make, case.changed(B=np.zeros_like(case.B)))
    x, y = backward(built.layer, case)
    others = (x, *(m for m, _ in built.parts("magnitude", y))) if case.method == "dora" else (x,)
    found = [leaf.grad for leaf in leaves(y) if all(leaf is not other for other in others)]
    learns = any(dw is not None and dw.any() for dw in found) or not case.gradients["B"].value.any()
    yield claim("the gradient of B where B = 0", "" if learns else "found zeros: it never learns")


def gradients_of(built: Built, case: AdaptedLinear, x: Tensor, y: Tensor) -> Iterator[Comparison]:
    """Compare the gradients of x, A, B and magnitude after a backward pass from y."""
    is_merged = case.mode in ("eval", "inference") and not [leaf for leaf in leaves(y) if leaf is not x]
    for name, expected in case.gradients.items():
        if name == "x" and x.requires_grad:
            yield Comparison(f"the gradient of x {tuple(x.shape)}", x.grad, expected)
        if name == "x" or (name == "magnitude" and not case.has_magnitude) or is_merged:
            continue
        total = expected + expected if case.mode in TWICE else expected
        yield Comparison(f"the gradient of {name}, of x {tuple(x.shape)}", built.gradient(name, y), total)


def autocast(make: Make, case: AdaptedLinear) -> Iterator[Comparison]:
    low = replace(case, dtype="bfloat16")
    built, case = make_layer(make, replace(case, dtype="float32").changed(**low.arrays))
    right = interned(replace(low, has_magnitude=case.has_magnitude))
    cast = torch.autocast("cpu", torch.bfloat16)
    x = input_of(built.layer, case)
    with recording(case), cast:
        y = built.layer(x)
    yield Comparison("y under autocast", y, right.y)
    if not hasattr(built.layer, "is_numpy"):
        yield from gradients_of(built, right, *backward(built.layer, case, context=cast))


def not_a_number(make: Make, case: AdaptedLinear) -> Iterator[Comparison]:
    right = interned(replace(case, lead=(2,)))
    x = right.x.copy()
    x[0, -1] = np.nan
    built, case = make_layer(make, right.changed(x=x))
    y = as_array(called(built.layer, case)[1])
    yield Comparison("where y is NaN", np.isnan(y), np.repeat([[1.0], [0.0]], case.outer, 1))
    yield Comparison("y of the row without a NaN", y[1:], case.y[1:])


def frozen(make: Make, case: AdaptedLinear) -> Iterator[Comparison]:
    case = replace(case, mode="train") if case.mode in ("eval", "inference", "back") else case  # which may merge
    built, case = make_layer(make, case)
    is_norm = case.method == "dora" and case.inner == 1  # where m = ‖W‖ may be W, and is trained
    base = {name: [] if is_norm else built.parts(name) for name in ("W", "b") if name in built.given}
    x, y = backward(built.layer, case)
    trained = [leaf for leaf in leaves(y) if leaf is not x]
    more = sum(leaf.numel() for leaf in trained) - sum(built.given[name].numel() for name in FACTORS[case.method])
    yield claim("what is trained", f"{more} numbers more than the adapter has" if more > 0 else "")
    parameters = [*built.given.values(), *(built.layer.parameters() if hasattr(built.layer, "parameters") else ())]
    lost = [tuple(leaf.shape) for leaf in trained if all(leaf is not own for own in parameters)]
    found = f"found trained tensors {lost} that are not in it: an optimizer would not train them"
    yield claim("layer.parameters()", found if lost and isinstance(built.layer, nn.Module) else "")
    for parameter in {id(p): p for p in parameters}.values():
        if parameter.grad is not None:
            parameter.data -= 0.1 * parameter.grad
    for name, parts in base.items():
        yield Comparison(f"{name} after a step", built.given[name], case.arrays[name])
        if parts:
            own = torch.cat([(part.T if is_turned else part).flatten() for part, is_turned in parts])
            yield Comparison(f"the layer's {name} after a step", own, case.arrays[name].flatten())
    yield Comparison("x, which is only read", x, case.x)


def follows(make: Make, case: AdaptedLinear) -> Iterator[Comparison]:
    built, case = make_layer(make, case)
    layer, given = built.layer, built.given["W"]
    if hasattr(layer, "is_numpy"):
        raise NotApplicable("the layer computes in numpy: its tensors cannot be changed in place")
    modules = list(layer.modules()) if isinstance(layer, nn.Module) else []
    tensors = [*layer.parameters(), *layer.buffers()] if modules else []
    weights = [m for m in tensors if m.ndim == 2 and any(torch.equal(W.to(given), given) for W in (m, m.T))]
    x, _ = called(layer, case)
    set_mode(layer, training=True)  # a layer may merge in evaluation mode, and keep the merged weight until it trains
    y = layer(x)
    for name in ("A", "B"):
        if not (parts := [part for part, _ in built.parts(name, y)]):
            raise AssertionError(f"no parameter of the layer is {name}")
        owners = [(m, key, part) for m in modules for part in parts for key, p in m._parameters.items() if p is part]
        set_mode(layer, training=True)
        for part in parts:
            part.detach().mul_(2)  # which raises the version of the tensor, unlike `data`
        case = case.changed(**{name: 2 * case.arrays[name]})
        yield output(layer, case, f"y after {name} was doubled in place")
        set_mode(layer, training=True)
        for owner, key, part in owners:
            setattr(owner, key, nn.Parameter(2 * part.detach()))
        if owners:
            case = case.changed(**{name: 2 * case.arrays[name]})
            yield output(layer, case, f"y after {name} was replaced by a parameter twice as large")
    if case.method == "lora" and weights:  # DoRA's start of m depends on W; what else keeps W cannot be seen
        set_mode(layer, training=True)
        for matrix in {matrix.data_ptr(): matrix for matrix in (given, *weights)}.values():
            matrix.detach().mul_(2)
        yield output(layer, case.changed(W=2 * case.W), "y after W was doubled in place as well")


def dropout(make: Make, case: AdaptedLinear) -> Iterator[Comparison]:
    if "dropout" not in accepted(make, dropout=0.0):
        raise NotApplicable("the layer takes no `dropout`")
    if not case.x.size:
        return
    p = 0.05 if case.seed % 4 == 0 else 0.7 if case.has_bias else 0.25
    built, single = make_layer(make, replace(case, lead=(1,)).changed(x=case.rows[:1]), dropout=p)
    masks = LAST + max(256, min(MASKS, 2**30 // case.W.size))
    layer, lead = built.layer, ((masks,), (masks, 1), (1, masks))[case.seed % 3]
    row = tensor(single.x, single.dtype)
    x, few = row.repeat(masks, 1).reshape(*lead, -1), row.repeat(256 + LAST, 1)
    set_mode(layer, training=False)
    torch.manual_seed(case.seed)
    with recording(case):
        yield Comparison("a second y in evaluation mode", layer(row), as_array(layer(row)))
        yield Comparison("y in evaluation mode", layer(row), single.y)
    set_mode(layer, training=True)
    with recording(case):
        y = as_array(layer(x)).reshape(masks, -1)
        first, second = (as_array(layer(few)) for _ in range(2))
    yield Comparison("x, which is only read", x.flatten()[: case.inner], single.x[0])
    is_same = np.array_equal(first, second) and bool((first != first[0]).any())
    yield claim("the mask of a second call", "it is that of the first call" if is_same else "")
    update, last = abs(single.scale * single.B @ single.A * single.rows), y[-LAST:]
    may_be_one = (1 - p) ** (LAST * case.inner) > 1e-9 or update.max() <= 100 * single.y.error.max()
    is_one = not may_be_one and bool((abs(last - last[0]) <= 2 * single.y.error).all())
    yield claim(f"the masks of the last {LAST} of {masks} rows", "all are equal" if is_one else "")
    yield from statistics(single, p, y)
    if not hasattr(layer, "is_numpy"):
        yield from gradients_of_masks(built, single, p, few.requires_grad_())


def gradients_of_masks(built: Built, case: AdaptedLinear, p: float, x: Tensor) -> Iterator[Comparison]:
    """Compare the masks of y with those of the gradients, of rows x of one case.

    y - b is a linear function of x, and its part s·B A x of A and of B: such a function is its derivative times what
    it is applied to. So dx·x = dy·(y - b), and ⟨dA, A⟩ = ⟨dB, B⟩ = Σ dy·(y - b - W x).
    """
    y = built.layer(x)
    dys = np.random.default_rng(case.seed).standard_normal(y.shape)
    y.backward(torch.from_numpy(dys).to(y))
    dx = torch.zeros_like(x) if x.grad is None else x.grad
    ratio = case.merged.value / (case.W + case.scale * case.B @ case.A) if case.method == "dora" else np.ones((1, 1))
    linear = as_array(y) - (0 if case.b is None else case.b)
    update = (dys * (linear - as_array(x) @ case.W.T * ratio[:, 0])).sum()
    terms = abs(dys) * case.y.error * 4 * (case.inner + case.outer + case.r) / (1 - p)
    per_row = Bounded((dys * linear).sum(1), terms.sum(1))
    yield Comparison("dx·x, with dropout", (as_array(dx) * as_array(x)).sum(1), per_row)
    for name in ("A", "B"):
        gradient = built.gradient(name, y)
        product = gradient if isinstance(gradient, Exception) else (as_array(gradient) * case.arrays[name]).sum()
        yield Comparison(f"⟨d{name}, {name}⟩, with dropout", product, Bounded(update, terms.sum()))


def statistics(case: AdaptedLinear, p: float, y: Array) -> Iterator[Comparison]:
    """Compare the variance and the mean of outputs (masks, out) of one row by different dropout masks.

    Each term of Δy[o] = s Σᵢ (B A)[o, i] x[i] becomes 0 or 1/(1 - p) times as large. The fourth moment κσ⁴ of such
    a sum is at most a term's or a normal variable's, 3σ⁴: a measured variance varies by (κ - 1)σ⁴ / masks at most.
    """
    update = case.scale * case.B @ case.A
    ratio = case.merged.value / (case.W + update) if case.method == "dora" else 1.0
    terms = ratio * update * case.rows
    rounding, variance, measured = case.y.error[0], p / (1 - p) * (terms**2).sum(1), y.var(0)
    kurtosis = max(3, 1 / (p * (1 - p)) - 3)
    spread = Bounded(variance, 6 * variance * math.sqrt((kurtosis - 1) / len(y)) + rounding)
    yield Comparison("the variance of y over dropout masks", measured, spread)
    mean = Bounded(case.y.value[0], 6 * np.sqrt(np.maximum(variance, measured) / len(y)) + rounding)
    yield Comparison("the mean of y over dropout masks", y.mean(0), mean)


@functools.cache
def linear_cases(method: Method, dtype: str, use_rslora: bool = False) -> list[AdaptedLinear]:
    """Return cases from small to large, each with and without a bias; the laws share them, and their right results."""
    kinds = {**WEIGHTS, 5: "normal"} if dtype == "float16" else WEIGHTS  # it has no row of W as small as that
    return [
        AdaptedLinear(method, *shape, scale, has_bias, seed, dtype, kinds.get(seed, "normal"), use_rslora)
        for seed, shape in enumerate(SHAPES)
        for has_bias, scale in ((True, SCALES[(seed + 1) % len(SCALES)]), (False, SCALES[seed % len(SCALES)]))
    ]


def in_modes(cases: Iterable[Any], first: int = 0) -> list[Any]:
    """Return cases in the modes in turn; each mode meets small and large ones."""
    modes = list(MODES)
    return [replace(case, mode=modes[(first + i) % len(modes)]) for i, case in enumerate(cases)]


def _layer_laws(kind: str, method: Method, use_rslora: bool = False) -> list[Law]:
    scale = "α/√r" if use_rslora else "α/r"
    equation = f"y = x Wᵀ + b + s·(x Aᵀ) Bᵀ with s = {scale}"
    gradient = "dA = s·Bᵀ dW, dB = s·dW Aᵀ, dx = dy W' where dW = dyᵀ x"
    dtypes = ("float64", "float32", "bfloat16", "float16")
    wide, narrow, *low = (in_modes(linear_cases(method, dtype, use_rslora), i) for i, dtype in enumerate(dtypes))
    larger = in_modes((replace(case, scale=2 * case.scale, r=2 * case.r) for case in wide), 3)
    extra = []
    if method == "dora":
        start = [replace(case, has_magnitude=False) for case in wide]
        rooted = [replace(case, use_rslora=True) for case in wide]
        equation = "y = m ⊙ x (W + s·B A)ᵀ / ‖W + s·B A‖ + b, the norm being that of each row"
        gradient = "as LoRA's of dy·m/‖W + s·B A‖, with the norm held constant; dm = Σ dW·(W + s·B A)/‖W + s·B A‖"
        extra = [
            Law(kind, "start", "without a given magnitude m = ‖W‖, of each row", start, forward),
            Law(kind, "rslora", "with use_rslora s = α/√r", rooted, forward),
        ]
    dropped = "dropout acts on x in front of A, only in training, keeps the mean, and masks gradients alike"
    return [
        Law(kind, "forward", equation, wide + narrow + larger, forward),
        Law(kind, "identity", "with B = 0 the layer is its base: y = x Wᵀ + b", wide + narrow, identity),
        Law(kind, "merge", "the layer applies its merged weight", wide, merge_of_layer),
        Law(kind, "gradients", gradient, wide + narrow + low[0] + low[1], trains),
        Law(kind, "shapes", "x (..., in) and its gradient may have any sizes in front of the features", wide, shapes),
        Law(kind, "frozen", "W, b and x keep their bits when A and B are trained", wide, frozen),
        Law(kind, "updates", "a change of A, B or W, where it is one tensor, shows in the next output", wide, follows),
        Law(kind, "nan", "a NaN in a row of x makes this row of y NaN, and no other", wide, not_a_number),
        Law(kind, "dropout", dropped, wide[:-4], dropout),
        Law(kind, "16-bit", f"{equation}, in bfloat16 and float16", low[0] + low[1], forward),
        Law(kind, "autocast", f"{equation}, under autocast to bfloat16", narrow, autocast),
        *extra,
    ]


LAWS = (*_layer_laws("lora", "lora"), *_layer_laws("rslora", "lora", use_rslora=True), *_layer_laws("dora", "dora"))
