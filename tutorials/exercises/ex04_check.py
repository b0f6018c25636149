"""What a solution of exercise 4 must do."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from minilora.testing.reference import lora_gradients

# tokens, in, out, r, s
CASES = [((6,), 7, 5, 3, 2.0), ((2, 4), 5, 8, 2, 0.5), ((1,), 4, 4, 1, 7.0), ((2, 3, 4), 3, 6, 2, 1.5)]


def check_change_of_delta(answer: ModuleType) -> None:
    """The change is that of a step that PyTorch takes, small or large."""
    generator = torch.Generator().manual_seed(1)
    for _, width, out, r, s in CASES:
        G, A, B = (torch.randn(shape, generator=generator).double() for shape in ((out, width), (r, width), (out, r)))
        first = -(s**2) * (G @ A.T @ A + 3 * B @ B.T @ G)  # what a step of a small rate does, over that rate
        for rate, size in ((0.5, "large"), (1e-6, "small")):
            factors = [A.clone().requires_grad_(), B.clone().requires_grad_()]
            sgd = torch.optim.SGD([{"params": factors[:1], "lr": 3 * rate}, {"params": factors[1:], "lr": rate}])
            (G * (s * factors[1] @ factors[0])).sum().backward()
            sgd.step()
            right = (s * factors[1] @ factors[0] - s * B @ A).detach()
            found = answer.change_of_delta(G, A, B, s, 3 * rate, rate)
            assert isinstance(found, Tensor), f"the change is {type(found).__name__}, need a tensor"
            assert found.shape == G.shape, f"the change has shape {tuple(found.shape)}, need {tuple(G.shape)}"
            error = (found - right).abs().max().item() / right.abs().max().item()
            slope = answer.change_of_delta(G, A, B, s, 3e-6, 1e-6) / 1e-6
            if (slope - first).abs().max() < 1e-3 * first.abs().max():
                why = "A small step is right, to first order. What does a large one do besides?"
            else:
                why = "A small step is wrong too. Which gradients have A and B, with s, and which way does a step go?"
            case = f"at the rates {3 * rate:g} of A and {rate:g} of B, s = {s:g}, a {size} step"
            assert error < 1e-6, f"{case}, the largest error is {error:.1e} of the largest number. {why}"


def check_lora_backward(answer: ModuleType) -> None:
    """The gradients equal those of plain loops, and cost no more operations than they need."""
    generator = torch.Generator().manual_seed(0)
    for tokens, width, out, r, s in CASES:
        shapes = ((*tokens, out), (*tokens, width), (out, width), (r, width), (out, r))
        dy, x, W, A, B = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        case = f"x {(*tokens, width)}, W {(out, width)}, rank {r}, scale {s}"
        with torch.no_grad():
            found = answer.lora_backward(dy, x, W, A, B, s)
        rows, slopes = x.reshape(-1, width).numpy(), dy.reshape(-1, out).numpy()
        dA, dB = lora_gradients(rows, slopes, A.numpy(), B.numpy(), s)
        through_W = slopes @ W.numpy()
        dx = through_W + s * slopes @ B.numpy() @ A.numpy()
        for name, ours, right, like in zip(("dx", "dA", "dB"), found, (dx, dA, dB), (x, A, B), strict=True):
            assert isinstance(ours, Tensor), f"{case}: {name} is {type(ours).__name__}, need a tensor"
            assert ours.shape == like.shape, f"{case}: {name} is {tuple(ours.shape)}, need {tuple(like.shape)}"
            error = np.abs(ours.numpy().reshape(right.shape) - right).max()
            why = hint(name, ours.numpy().reshape(right.shape), right, through_W, s)
            assert error < 1e-9 * np.abs(right).max(), f"{case}: {name} is wrong. {why}"
    tokens, width, out, r = 4, 48, 40, 2
    shapes = ((tokens, out), (tokens, width), (out, width), (r, width), (out, r))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        answer.lora_backward(*(torch.ones(shape) for shape in shapes), 1.0)
    allowed = 2 * tokens * width * out + 8 * tokens * r * (width + out)  # dy W, and the thin products twice
    assert counter.get_total_flops() <= allowed, (
        f"the gradients are right, and take {counter.get_total_flops():,} operations of products; {allowed:,} are more "
        "than enough. Is there a product of dy with x, or of B with A? Go through the r numbers of each token"
    )


def check_share_seen(answer: ModuleType) -> None:
    """The share is planted: G has one part that A or B sees, and one at right angles to both."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for out, width, r, share in ((6, 9, 3, 0.25), (4, 7, 1, 0.9), (5, 8, 2, 0.0)):
        left, right = (torch.linalg.qr(normal(n, n))[0] for n in (out, width))
        parts = normal(out, width)  # of G, over these directions; A and B see the first r of each
        unseen = torch.zeros(out, width, dtype=torch.bool)
        unseen[r:, r:] = True
        parts[unseen] *= (1 - share) ** 0.5 / parts[unseen].norm()
        parts[~unseen] *= share**0.5 / parts[~unseen].norm()
        A, B = normal(r, r) @ right[:, :r].T, left[:, :r] @ normal(r, r)
        found = answer.share_seen(3 * left @ parts @ right.T, A, B)
        assert isinstance(found, float), f"the share is {type(found).__name__}, need a Python float"
        if abs(1 - (1 - found) ** 2 - share) < 1e-9:
            why = "Energy is the sum of the squares: this is the share of a norm"
        else:
            why = "Does it change if A is multiplied by 10? Does what both see count once, and what only one sees too?"
        case = f"{share:.0%} of the energy of G was put where the {r} rows of A or columns of B see it"
        assert abs(found - share) < 1e-9, f"{case}, and you find {found:.4f}. {why}"


def hint(name: str, ours: np.ndarray, right: np.ndarray, through_W: np.ndarray, s: float) -> str:
    """What the mistake may be."""
    for factor in (s, s * s, 1 / s):
        if np.allclose(ours * factor, right):
            return f"It lacks a factor of {factor:g}: s is {s:g}"
        if name == "dx" and np.allclose((ours - through_W) * factor, right - through_W):
            return f"What comes back through A lacks a factor of {factor:g}: s is {s:g}"
    if name == "dx":
        return "How many ways lead from x to y?"
    return "Each token adds its own product of a number on one side of the factor with a number on the other"
