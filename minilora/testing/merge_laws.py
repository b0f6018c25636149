"""Laws of merging an adapter into a weight, and of sums of adapters."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from minilora.testing.cases import AdaptedLinear, Method, tensor
from minilora.testing.compare import Array, Bounded
from minilora.testing.laws import Comparison, Law
from minilora.testing.lora_laws import linear_cases, with_dtype


def merging(merge: Callable[..., Any], case: AdaptedLinear) -> Iterator[Comparison]:
    names = ("W", "A", "B", *(["magnitude"] if case.method == "dora" else []))
    right = case.merged
    if case.method == "lora":  # the sum over the ranks may begin with W
        right = replace(right, error=right.error + right.gamma(case.r + 1) * abs(case.W))
    orders: dict[Any, str] = {"C": "", "F": " of transposed views that require a gradient"}
    for order, views in orders.items():
        given = {name: tensor(np.asarray(case.arrays[name], order=order), case.dtype) for name in names}
        for name in names[1:]:
            given[name].requires_grad_(order == "F")
        W, A, B, *magnitude = given.values()
        merged = merge(W, A, B, case.scale, *magnitude)
        yield from with_dtype(f"the merged weight{views}", merged, right)
        for what in ("which is only read", "after the merged weight was changed"):
            for name in names:
                yield Comparison(f"{name}{views}, {what}", given[name], case.arrays[name])
            if isinstance(merged, torch.Tensor):
                with torch.inference_mode():
                    merged += 1


@dataclass(frozen=True)
class AdapterSum:
    """Several `adapters` (A, B, scale) of one linear layer, of different ranks, and their `weights` in the sum."""

    inner: int = 3
    outer: int = 4
    ranks: tuple[int, ...] = (1, 2)
    seed: int = 0

    @property
    def adapters(self) -> list[tuple[Array, Array, float]]:
        cases = [
            AdaptedLinear("lora", (1,), self.inner, self.outer, r, (2.5, 0.375, 7.0)[i % 3], seed=self.seed + i)
            for i, r in enumerate(self.ranks)
        ]
        return [(case.A, case.B, case.scale) for case in cases]

    @property
    def weights(self) -> list[float]:
        return [(0.75, -1.5, 0.3, 2.5, 0.0)[i % 5] for i in range(len(self.ranks))]


def adapter_sum(add: Callable[..., Any], case: AdapterSum) -> Iterator[Comparison]:
    adapters = [(tensor(A), tensor(B), s) for A, B, s in case.adapters]
    result = add(list(adapters), case.weights)
    expected = slack = Bounded.exact(0.0)
    for weight, (A, B, scale), given in zip(case.weights, case.adapters, adapters, strict=True):
        yield Comparison("A, which is only read", given[0], A)
        yield Comparison("B, which is only read", given[1], B)
        product = Bounded.exact(B) @ Bounded.exact(A)
        expected += product * (weight * scale)
        slack += product * (4 * abs(weight * scale))  # √w in both factors
    if isinstance(result, tuple):
        A, B, scale = result
        result = scale * (B @ A)
    yield Comparison("ΔW", result, expected.widened(slack))


RANKS = ((1,), (1, 1), (2, 2), (1, 2), (3, 1, 2), (2, 1, 1, 3), (1, 2, 2, 1, 4, 1, 1, 2, 1))  # equal and different
SUMS = [AdapterSum(3, 4, ranks, seed) for seed, ranks in enumerate(RANKS)] + [
    AdapterSum(17, 9, (4, 8), 7),
    AdapterSum(136, 144, (32, 40), 8),
]


def _merge_laws(kind: str, method: Method, equation: str) -> list[Law]:
    plain = linear_cases(method, "float64") + linear_cases(method, "float32")
    low = linear_cases(method, "bfloat16") + linear_cases(method, "float16")
    hard = [AdaptedLinear(method, (1,), 9, 7, 3, scale, seed=i) for i, scale in enumerate((2 / 3, -1 / 3, 1e-3, 40.0))]
    for dtype in ("float64", "bfloat16"):
        hard += [AdaptedLinear(method, (1,), 9, 7, 3, weight=kind, dtype=dtype) for kind in ("outlier", "huge_ratio")]
    hard += [hard[-1].changed(B=0 * hard[-1].B)]
    hard += [AdaptedLinear(method, (1,), 530, 520, 70, 16 / 24)]
    hard += [hard[0].changed(magnitude=-hard[0].magnitude)] if method == "dora" else []
    return [
        Law(kind, "weight", f"{equation}, also of views, and the inputs stay as they were", plain + hard, merging),
        Law(kind, "16-bit", f"{equation}, in the dtype of W: bfloat16 and float16", low, merging),
    ]


LAWS = (
    *_merge_laws("merge", "lora", "W' = W + s·B A"),
    *_merge_laws("merge_dora", "dora", "W' = m·(W + s·B A)/‖W + s·B A‖ by row"),
    Law("adapter_sum", "delta", "ΔW = Σ wᵢ·sᵢ·Bᵢ Aᵢ", SUMS, adapter_sum),
)
