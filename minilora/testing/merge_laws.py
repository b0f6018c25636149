"""Laws of merging an adapter into a weight, and of sums of adapters."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from minilora.testing.cases import AdaptedLinear, tensor
from minilora.testing.compare import Array, Bounded
from minilora.testing.laws import Comparison, Law
from minilora.testing.lora_laws import linear_cases


def merging(merge: Callable[..., Any], case: AdaptedLinear) -> Iterator[Comparison]:
    tensors = {name: tensor(case.arrays[name], case.dtype) for name in ("W", "A", "B", "magnitude")}
    last = [tensors.pop("magnitude")]
    actual = merge(*tensors.values(), case.scale, *(last if case.method == "dora" else []))
    yield Comparison("the merged weight", actual, case.merged)
    for name, given in tensors.items():
        yield Comparison(f"{name}, which is only read", given, case.arrays[name])


@dataclass(frozen=True)
class AdapterSum:
    """Several `adapters` (A, B, scale) of one linear layer, of different ranks, and their `weights` in the sum."""

    inner: int = 3
    outer: int = 4
    ranks: tuple[int, ...] = (1, 2)
    seed: int = 0

    @property
    def adapters(self) -> list[tuple[Array, Array, float]]:
        """The (A, B, s)."""
        cases = [
            AdaptedLinear("lora", (1,), self.inner, self.outer, r, (2.5, 0.375, 7.0)[i % 3], seed=self.seed + i)
            for i, r in enumerate(self.ranks)
        ]
        return [(case.A, case.B, case.scale) for case in cases]

    @property
    def weights(self) -> list[float]:
        return [(0.75, -1.5, 0.3)[i % 3] for i in range(len(self.ranks))]


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


RANKS = ((1,), (1, 1), (2, 2), (1, 2), (3, 1, 2))  # of one, two and three adapters, equal and different
SUMS = [AdapterSum(3, 4, ranks, seed) for seed, ranks in enumerate(RANKS)] + [
    AdapterSum(17, 9, (4, 8), 7),
    AdapterSum(136, 144, (32, 40), 8),
]
LORA = linear_cases("lora", "float64") + linear_cases("lora", "float32")
DORA = linear_cases("dora", "float64") + linear_cases("dora", "float32")
LAWS = (
    Law("merge", "weight", "W' = W + s·B A, and the inputs stay as they were", LORA, merging),
    Law("merge_dora", "weight", "W' = m·(W + s·B A)/‖W + s·B A‖ by row", DORA, merging),
    Law("adapter_sum", "delta", "ΔW = Σ wᵢ·sᵢ·Bᵢ Aᵢ", SUMS, adapter_sum),
)
