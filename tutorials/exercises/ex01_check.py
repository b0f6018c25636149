"""What a solution of exercise 1 must do."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch

from minilora.testing.reference import lora_merged_weight


def check(answer: ModuleType) -> None:
    """`merge` equals the loops of `minilora.testing.reference`, for none, one and two adapters."""
    generator = torch.Generator().manual_seed(0)
    W, A1, B1, A2, B2 = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((5, 7), (2, 7), (5, 2), (3, 7), (5, 3))
    )
    before = W.clone()
    for adapters in ([], [(A1, B1, 0.5)], [(A1, B1, 0.5), (A2, B2, 7.0)]):
        expected = W.numpy()
        for A, B, s in adapters:
            expected = lora_merged_weight(expected, A.numpy(), B.numpy(), s)
        merged = answer.merge(W, adapters)
        case = f"with {len(adapters)} adapters of scale {[s for *_, s in adapters]}"
        assert isinstance(merged, torch.Tensor), f"{case}: merge returns {type(merged).__name__}, need a tensor"
        assert merged.shape == W.shape, f"{case}: the shape is {tuple(merged.shape)}, need {tuple(W.shape)}"
        error = np.abs(merged.numpy() - expected).max()
        assert error < 1e-12, f"{case}: the weight is off by up to {error:.2g}"
        assert torch.equal(W, before), f"{case}: merge changes the W that it was given"
