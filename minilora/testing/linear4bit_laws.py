"""Laws of linear layers with a frozen 4-bit weight: see `checks.check_linear4bit`."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minilora.testing.cases import tensor
from minilora.testing.compare import as_array
from minilora.testing.laws import Comparison, Law, NotApplicable, accepted, claim
from minilora.testing.lora_laws import backward, set_mode, with_dtype
from minilora.testing.nf4_cases import HARD_KINDS, QuantizedLinear

Make = Callable[..., Any]


def make_linear(make: Make, case: QuantizedLinear, order: Any = "C") -> tuple[Any, dict[str, Tensor]]:
    """Return a layer and the tensors that it was given, W in an order of numpy's."""
    options = accepted(make, double_quant=case.double_quant)
    if case.double_quant and not options:
        raise NotApplicable("the layer takes no `double_quant`")
    given = {"W": tensor(np.asarray(case.weight.W, order=order), case.dtype)}
    if case.b is not None:
        given["b"] = tensor(case.b, case.dtype)
    return make(given["W"], given.get("b"), **options), given


def product(make: Make, case: QuantizedLinear) -> Iterator[Comparison]:
    orders: dict[Any, str] = {"C": "", "F": ", of transposed views"}
    for order, views in orders.items():
        layer, _ = make_linear(make, case, order)
        for x, what in ((case.x, "y"), (np.eye(case.inner), "layer(1), the weight that is applied")):
            y = layer(tensor(np.asarray(x, order=order), case.dtype))
            yield from with_dtype(what + views, y, case.output(x))


def input_gradient(make: Make, case: QuantizedLinear) -> Iterator[Comparison]:
    layer, _ = make_linear(make, case)
    for mode, training in (("evaluation", False), ("training", True), ("training, once more", True)):
        set_mode(layer, training)
        x, _ = backward(layer, case)
        yield Comparison(f"dx in {mode}", x.grad, case.dx)
    x = tensor(case.x, case.dtype).requires_grad_()
    layer(x).sum().backward()  # dy is a view of a single number
    yield Comparison("the gradient of Σ y", x.grad, case.input_gradient(np.ones_like(case.dy)))


def both(make: Make, case: QuantizedLinear) -> Iterator[Comparison]:
    yield from product(make, case)
    with suppress(NotApplicable):  # a layer without gradients
        yield from input_gradient(make, case)


def packed_frozen(make: Make, case: QuantizedLinear) -> Iterator[Comparison]:
    layer, given = make_linear(make, case)
    layer(tensor(case.x, case.dtype))  # a layer may quantize when it is first called
    own = {**dict(layer.named_parameters()), **dict(layer.named_buffers())} if isinstance(layer, nn.Module) else {}
    b = None if case.b is None else given["b"]
    kept = {  # all but the bias, which may be trained
        name: value
        for name, value in {**own, "the given W": given["W"]}.items()
        if b is None or value.shape != b.shape or not torch.equal(value.detach().to(b), b)
    }
    before = {name: as_array(value.data).copy() for name, value in kept.items()}
    x, _ = backward(layer, case)
    for name, value in kept.items():
        yield Comparison(f"the gradient of {name}", 0.0 if value.grad is None else 1.0, np.asarray(0.0))
        if value.grad is not None:
            value.data -= 0.1 * value.grad
        yield Comparison(f"{name} after a step", value.data, before[name])
    yield Comparison("x, which is only read", x, case.x)


def modes(make: Make, case: QuantizedLinear) -> Iterator[Comparison]:
    layer, _ = make_linear(make, case)
    for mode, training, context in (
        ("training", True, nullcontext),
        ("training, once more", True, nullcontext),
        ("training under no_grad", True, torch.no_grad),
        ("evaluation", False, nullcontext),
        ("evaluation under no_grad", False, torch.no_grad),
        ("evaluation under inference_mode", False, torch.inference_mode),
        ("training after that", True, nullcontext),
    ):
        set_mode(layer, training)
        with context():
            y = layer(tensor(case.x, case.dtype))
        yield Comparison(f"y in {mode}", y, case.output(case.x))
    found = as_array(layer(torch.full_like(tensor(case.x, case.dtype), torch.nan)))
    yield claim("y of NaN", "" if np.isnan(found).all() else f"found {found.flat[0]:g}, expected NaN")


# --- the table ---


def linears(
    *sizes: tuple[tuple[int, ...], int, int], dtype: str = "float32", double_quant: bool = False
) -> list[QuantizedLinear]:
    """Return cases of these sizes (lead, in, out), each with and without a bias; the laws share them."""
    return [
        QuantizedLinear(lead, inner, outer, has_bias, seed, dtype, double_quant=double_quant)
        for seed, (lead, inner, outer) in enumerate(sizes)
        for has_bias in (True, False)
    ]


_SIZES = (((1,), 64, 1), ((2,), 64, 3), ((3,), 128, 5), ((2,), 64, 64), ((5,), 192, 136))
LINEARS = linears(*_SIZES)
LOW = linears(*_SIZES, dtype="bfloat16") + linears(*_SIZES, dtype="float16")
LEADS = linears(*((lead, 64, 3) for lead in ((), (0,), (2, 3), (2, 2, 3), (1, 1), (3, 1), (70,))))
WIDE = [QuantizedLinear((2,), 520, 130)]  # of more than 512 features, and of more than 65,536 weights
HARD = [QuantizedLinear((2,), 70, 5, seed=seed, kind=kind) for seed, kind in enumerate(HARD_KINDS)]
RAGGED = linears(((1,), 1, 1), ((2,), 7, 5), ((2,), 16, 16), ((3,), 60, 3), ((2,), 70, 3), ((2,), 96, 4))
NESTED = linears(((2,), 64, 1), ((2,), 64, 5), ((2,), 128, 7), ((2,), 64, 300), double_quant=True)  # at last two scales
_LINEAR = "y = x dequantize(quantize(W))ᵀ + b"
_DX = "dx = dy dequantize(quantize(W))"
_LAWS = (
    ("forward", f"{_LINEAR}, also for x = 1", LINEARS + HARD + WIDE, product),
    ("gradients", _DX, LINEARS + WIDE, input_gradient),
    ("shapes", f"{_LINEAR} and {_DX}, for x with no, with several and with empty leading sizes", LEADS, both),
    ("ragged", f"{_LINEAR} and {_DX}, where rows end within a block", RAGGED, both),
    ("frozen", "the packed weight keeps its bits and gets no gradient", LINEARS, packed_frozen),
    ("modes", f"{_LINEAR}, in training and evaluation, with and without gradients, in each call", LINEARS, modes),
    ("double_quant", f"{_LINEAR}, with 8-bit absmaxes", NESTED, product),
    ("16-bit", f"{_LINEAR} and {_DX}, in bfloat16 and float16", LOW, both),
)
LAWS = tuple(Law("linear4bit", *row) for row in _LAWS)
