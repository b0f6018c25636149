"""What a solution of exercise 1 must do."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch

from minilora.testing.reference import lora_merged_weight


def check(answer: ModuleType) -> None:
    """`merge` equals the loops of `minilora.testing.reference`, for one, two and no adapters."""
    generator = torch.Generator().manual_seed(0)
    W, A1, B1, A2, B2 = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((5, 7), (2, 7), (5, 2), (3, 7), (5, 3))
    )
    before = [tensor.clone() for tensor in (W, A1, B1, A2, B2)]
    for adapters in ([(A1, B1, 0.5)], [(A1, B1, 0.5), (A2, B2, 7.0)], []):
        expected = W.numpy()
        for A, B, s in adapters:
            expected = lora_merged_weight(expected, A.numpy(), B.numpy(), s)
        case = f"with {len(adapters)} adapters of scale {[s for *_, s in adapters]}"
        try:
            merged = answer.merge(W, adapters)
        except NotImplementedError:
            raise
        except RuntimeError as error:  # of shapes that do not go together
            raise AssertionError(f"{case}, A {tuple(A1.shape)}, B {tuple(B1.shape)}: {error}") from error
        assert isinstance(merged, torch.Tensor), f"{case}: merge returns {type(merged).__name__}, need a tensor"
        assert merged.shape == W.shape, f"{case}: the shape is {tuple(merged.shape)}, need {tuple(W.shape)}"
        error = np.abs(merged.numpy() - expected).max()
        assert merged.dtype == W.dtype, f"{case}: the weight is {merged.dtype}, need that of W, {W.dtype}"
        assert error < 1e-12, f"{case}: the weight is off by up to {error:.2g}: is each B A there, times its own s?"
        same = all(map(torch.equal, before, (W, A1, B1, A2, B2)))
        assert same, f"{case}: merge changes the W, A or B that it was given"
