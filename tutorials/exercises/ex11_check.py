"""What a solution of exercise 11 must do."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from minilora.nf4 import BLOCK_SIZE, dequantize, quantize
from minilora.testing.reference import lora_merged_weight

Layer = tuple[Tensor, Tensor, Tensor, float]
Store = Callable[[Tensor], Tensor]


def bfloat16(W: Tensor) -> Tensor:
    """The weight after a round trip through bfloat16."""
    return W.to(torch.bfloat16)


def four_bits(W: Tensor) -> Tensor:
    """The weight after a round trip through NF4."""
    return dequantize(*quantize(W, BLOCK_SIZE), W.shape, torch.float32)


def check(answer: ModuleType) -> None:
    """`merge_error` equals the error by the loops of `minilora.testing.reference`, for one layer and for several."""
    layers = _layers()
    before = [tensor.clone() for W, A, B, _ in layers for tensor in (W, A, B)]
    for store in (bfloat16, four_bits):
        for chosen in (layers[:1], layers):
            case = f"{store.__name__}, layers: {len(chosen)}"
            found = answer.merge_error(list(chosen), store)
            assert isinstance(found, float), f"{case}: merge_error returns {type(found).__name__}, need a Python float"
            expected = _ratio(chosen, store)
            same = all(map(torch.equal, before, (tensor for W, A, B, _ in layers for tensor in (W, A, B))))
            assert same, f"{case}: merge_error changes a W, A or B that it was given; it is to tell the error before"
            assert math.isclose(found, expected, rel_tol=1e-9), (
                f"{case}: the error is {expected:.6f}, found {found:.6f}{_reason(chosen, store, found)}"
            )


def _layers() -> list[Layer]:
    """Three layers of different sizes, whose updates differ in size, too."""
    generator = torch.Generator().manual_seed(0)
    layers = []
    for out, inputs, r, s in ((8, 64, 2, 0.5), (16, 128, 4, 2.0), (4, 64, 1, 7.0)):
        W, A, B = (torch.randn(shape, generator=generator) for shape in ((out, inputs), (r, inputs), (out, r)))
        layers.append((W.bfloat16(), A, 0.02 * B, s))
    return layers


def _parts(layers: list[Layer], store: Store, twice: bool = False) -> list[tuple[float, float, float]]:
    """‖error‖², ‖ΔW‖² and ‖W‖² of each layer; `twice` rounds ΔW, too."""
    found = []
    for W, A, B, s in layers:
        exact = torch.from_numpy(np.asarray(lora_merged_weight(W.double().numpy(), A.numpy(), B.numpy(), s)))
        delta = exact - W.double()
        error = store(W.double() + store(delta).double() if twice else exact).double() - exact
        found.append((square(error), square(delta), square(W.double())))
    return found


def square(values: Tensor) -> float:
    """The sum of squares."""
    return values.square().sum().item()


def _ratio(layers: list[Layer], store: Store, twice: bool = False) -> float:
    error, effect, _ = map(sum, zip(*_parts(layers, store, twice), strict=True))
    return math.sqrt(error / effect)


def _reason(layers: list[Layer], store: Store, found: float) -> str:
    """What was probably done instead, if that is known."""
    parts = _parts(layers, store)
    error, effect, scale = map(sum, zip(*parts, strict=True))
    without = [(W, A, B, 1.0) for W, A, B, _ in layers]
    wrong = {
        "the error is measured against ‖W‖. What it spoils is ΔW, which is much smaller": math.sqrt(error / scale),
        "the root is missing: a ratio of norms, not of their squares": error / effect,
        "the scale s is missing": _ratio(without, store),
        "ΔW is rounded before it is added, so that the sum is rounded a second time": _ratio(layers, store, True),
        "the error vanishes, as the exact sum was rounded before it was compared": 0.0,
    }
    if len(parts) > 1:  # of one layer it is the right answer
        mean = sum(math.sqrt(e / d) for e, d, _ in parts) / len(parts)
        wrong["the layers' ratios are averaged. Add squares over all layers, then take the root once"] = mean
    if math.isclose(found, math.sqrt(error / effect), rel_tol=1e-6):
        return ", which differs in the last digits: everything but what `store` returns is to be computed in float64"
    for reason, value in wrong.items():
        if math.isclose(found, value, rel_tol=1e-4, abs_tol=1e-9):
            return f". It seems that {reason}"
    return ". Is B A formed in float64, is ΔW added before anything is rounded, and is the result compared with W + ΔW?"
