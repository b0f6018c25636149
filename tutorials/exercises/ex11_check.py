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


def check_swallowed(answer: ModuleType) -> None:
    """The share is that of the weights, counted one by one."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(16, 32, generator=generator).bfloat16()
    for size in (0.001, 0.01, 0.1):
        delta = size * torch.randn(16, 32, generator=generator)
        found, case = answer.swallowed(W, delta), f"a change of {size:.1%}"
        assert isinstance(found, float), f"{case}: found {type(found).__name__}, need a Python float"
        pairs = list(zip(W.flatten().tolist(), delta.flatten().tolist(), strict=True))
        same = sum(torch.tensor(w + d, dtype=torch.float32).bfloat16().item() == w for w, d in pairs)
        why = ". Do you count those that changed?" if math.isclose(found, 1 - same / len(pairs)) else ""
        assert math.isclose(found, same / len(pairs), abs_tol=1e-6), (
            f"{case}: you say {found:.4f}, and {same} of {len(pairs)} weights are what they were{why}"
        )


def check_ties(answer: ModuleType) -> None:
    """Each place is what the three steps give for its two numbers."""
    generator = torch.Generator().manual_seed(0)
    table = torch.tensor([[0.9, -0.1, 0.6, -0.4]]), torch.tensor([[0.5, 0.2, -0.7, 0.05]])
    drawn = torch.randn(2, 6, 5, generator=generator).unbind()
    for name, (one, two), density in (
        ("the chapter's table", table, 0.5),
        ("30 numbers", drawn, 0.4),
        ("all", drawn, 1),
        ("10 numbers", tuple(each.flatten()[:10] for each in drawn), 0.01),
    ):
        found = answer.ties(one.clone(), two.clone(), density)
        assert isinstance(found, Tensor), f"{name}: found {type(found).__name__}, need a tensor"
        assert found.shape == one.shape, f"{name}: the shape is {tuple(found.shape)}, need {tuple(one.shape)}"
        count = max(1, round(density * one.numel()))
        bounds = [sorted(each.abs().flatten().tolist())[-count] for each in (one, two)]
        for pair in zip(one.flatten().tolist(), two.flatten().tolist(), found.flatten().tolist(), strict=True):
            kept = [value if abs(value) >= bound else 0 for value, bound in zip(pair, bounds, strict=False)]
            agree = [value for value in kept if value * sum(kept) > 0]
            need = sum(agree) / len(agree) if agree else 0.0
            assert math.isclose(pair[2], need, abs_tol=1e-6), (
                f"{name}, density {density}: {pair[0]:.2f} and {pair[1]:.2f} become {pair[2]:.3f}, need {need:.3f}. "
                "Which of the two were kept, and which sign was elected?"
            )


def check_merge_error(answer: ModuleType) -> None:
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
        "What does the error spoil, W or ΔW?": math.sqrt(error / scale),
        "Is that a ratio of norms?": error / effect,
        "Is there an s in it?": _ratio(without, store),
        "How often is something rounded in a merge?": _ratio(layers, store, True),
        "With what do you compare the stored weight?": 0.0,
    }
    if len(parts) > 1:  # of one layer it is the right answer
        mean = sum(math.sqrt(e / d) for e, d, _ in parts) / len(parts)
        wrong["How large is the norm of two layers together?"] = mean
    if math.isclose(found, math.sqrt(error / effect), rel_tol=1e-6):
        return ", which differs in the last digits: everything but what `store` returns is to be computed in float64"
    for reason, value in wrong.items():
        if math.isclose(found, value, rel_tol=1e-4, abs_tol=1e-9):
            return f". {reason}"
    return ". What is rounded, when, and what is it compared with?"
