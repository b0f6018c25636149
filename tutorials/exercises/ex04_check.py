"""What a solution of exercise 4 must do."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np

from minilora.lora import lora_scale
from minilora.testing.reference import lora_gradients

RANKS = [1, 2, 4, 8, 16, 32]


def check(answer: ModuleType) -> None:
    """`stable_scale` undoes exact powers, and makes rsLoRA's scale of gradients that are measured."""
    alpha = 8.0
    for power in (0.5, 1.0, 0.3):
        sizes = [3.0 * r**power for r in RANKS]
        case = f"sizes 3·r^{power:g} without noise"
        for r in (1, 8, 64):
            s = answer.stable_scale(RANKS, sizes, alpha, r)
            kind = type(s).__name__
            assert isinstance(s, float), f"{case}: the scale is a {kind}, need a Python float"
            assert r > 1 or math.isclose(s, alpha, rel_tol=1e-9), (
                f"{case}: s = {s:.4g} at rank 1, need alpha, {alpha:g}, whatever the sizes are"
            )
            ratio = s * 3.0 * r**power / (alpha * 3.0)
            assert math.isclose(ratio, 1, rel_tol=1e-9), (
                f"{case}: with s = {s:.4g} at rank {r}, s times the size is {ratio:.4g} times that of rank 1, need 1. "
                "p is the slope of log size over log rank, and s must fall as fast as the size grows"
            )
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((32, 48)), rng.standard_normal((32, 24))
    sizes = []
    for r in RANKS:
        A = rng.uniform(-1, 1, (r, 48)) / math.sqrt(48)
        sizes.append(float(np.linalg.norm(lora_gradients(x, dy, A, np.zeros((24, r)), 1.0)[1])))
    s, rslora = answer.stable_scale(RANKS, sizes, alpha, 16), lora_scale(16, alpha, use_rslora=True)
    assert 0.9 < s / rslora < 1.1, (
        f"measured ‖∂L/∂B‖: s is {s:.4f} at rank 16, and α/√r is {rslora:.4f}. They should be near each other"
    )
    logs = np.log(RANKS) - np.log(RANKS).mean()
    expected = alpha / 16 ** float(logs @ np.log(sizes) / (logs @ logs))
    assert math.isclose(s, expected, rel_tol=1e-9), (
        f"measured ‖∂L/∂B‖: s is {s:.4f} at rank 16, need {expected:.4f}. Does the line go through all points, "
        "or only through some?"
    )
