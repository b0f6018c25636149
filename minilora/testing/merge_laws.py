"""Laws of merging an adapter into a weight, once or in many cycles, and of sums of adapters."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from minilora.testing.cases import AdaptedLinear, Method, scaled, tensor
from minilora.testing.compare import UNITS, Array, Bounded
from minilora.testing.laws import Comparison, Law, NotApplicable, accepted, claim, unpacked
from minilora.testing.layers import changed, leaves, make_layer, set_mode
from minilora.testing.lora_laws import linear_cases, with_dtype
from minilora.testing.nf4_cases import NF4Weight

Call = Callable[..., Any]
CYCLES = 100  # of merging
HALF_GAP = 0.151904  # of the two levels of NF4 that are farthest apart


def merging(merge: Call, case: AdaptedLinear) -> Iterator[Comparison]:
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


def adapter_sum(add: Call, case: AdapterSum) -> Iterator[Comparison]:
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


# --- merged and unmerged ---


def cycles_of_floats(case: AdaptedLinear, make: Call, merge: Call, unmerge: Call) -> Iterator[Comparison]:
    """Errors must not add up in 16 bits: those of many cycles would be as large as the weight."""
    W, A, B = (Bounded.exact(abs(array), case.dtype) for array in (case.W, case.A, case.B))
    rounding = 2 * (W + scaled(B, A, case.scale)).error  # of W + s·B A, and of what is left when s·B A is subtracted
    yield from cycles(case, make, merge, unmerge, rounding, adds_up=case.dtype in ("float32", "float64"))


def cycles_of_nf4(case: AdaptedLinear, make: Call, merge: Call, unmerge: Call) -> Iterator[Comparison]:
    """The base is in NF4, and may be quantized again: by half a gap g of a block's absmax, and by g·(1 + g) of it."""
    if not accepted(make, quantize="nf4"):
        raise NotApplicable("the layer takes no `quantize`")
    W = NF4Weight(case.outer, case.inner, seed=case.seed).values.value
    case = case.changed(W=W.astype(np.float32))  # which NF4 has without an error
    size = abs(case.W) + abs(case.scale * case.B @ case.A)
    absmax = size.reshape(-1, 64).max(1).repeat(64).reshape(size.shape)
    yield from cycles(case, make, merge, unmerge, HALF_GAP * (2 + HALF_GAP) * absmax, adds_up=False, quantize="nf4")


def cycles(
    case: AdaptedLinear, make: Call, merge: Call, unmerge: Call, allowed: Array, adds_up: bool, **options: Any
) -> Iterator[Comparison]:
    """Compare the weight that a layer applies, merged and unmerged, in the first and the last cycles.

    B is another one in each cycle. What a merge and unmerging it may change of the weight is `allowed`.
    """
    built, probe = make_layer(make, replace(case, lead=(case.inner,)).changed(x=np.eye(case.inner)), **options)
    layer, x = built.layer, tensor(probe.x, probe.dtype)
    parts = [] if hasattr(layer, "is_numpy") else built.parts("B", layer(x))
    trained = [(part, part.detach().to(torch.float64, copy=True)) for part, _ in parts]

    def applied(when: str, merges: int) -> Comparison:
        y = probe.changed(B=factor * probe.B).y
        error = y.error + allowed.T * (merges if adds_up else min(merges, 1))
        return Comparison(f"layer(1), the weight that is applied, {when}", layer(x), replace(y, error=error))

    factor, before = 1.0, len(leaves(layer(x))) if parts else 0
    for i in range(CYCLES + 1):
        if trained and i > 1:  # the first merge has to keep B as it was
            factor = (-1) ** i * (1 - i / (3 * CYCLES))
            for part, B in trained:
                part.data.copy_(factor * B)
        if i in (0, 1, CYCLES):
            yield applied(f"after {i} cycles", merges=i)
        set_mode(layer, training=i % 3 > 0)
        layer = changed(layer, merge(layer))
        if i in (0, CYCLES):
            yield applied(f"merged after {i} cycles", merges=i + 1)
        layer = changed(layer, unmerge(layer))
        set_mode(layer, training=True)
    after = len(leaves(layer(x))) if parts else 0
    yield claim("what is trained", "" if after == before else f"found {after} tensors, and {before} at first")


# --- the tables ---

RANKS = ((1,), (1, 1), (2, 2), (1, 2), (3, 1, 2), (2, 1, 1, 3), (1, 2, 2, 1, 4, 1, 1, 2, 1))  # equal and different
SUMS = [AdapterSum(3, 4, ranks, seed) for seed, ranks in enumerate(RANKS)]
SUMS += [AdapterSum(17, 9, (4, 8), 7), AdapterSum(136, 144, (32, 40), 8)]


def _merge_laws(kind: str, method: Method, equation: str) -> list[Law]:
    plain = linear_cases(method, "float64") + linear_cases(method, "float32")
    low = linear_cases(method, "bfloat16") + linear_cases(method, "float16")
    hard = [AdaptedLinear(method, (1,), 9, 7, 3, scale, seed=i) for i, scale in enumerate((2 / 3, -1 / 3, 1e-3, 40.0))]
    for dtype in ("float64", "bfloat16"):
        hard += [AdaptedLinear(method, (1,), 9, 7, 3, weight=kind, dtype=dtype) for kind in ("outlier", "huge_ratio")]
    hard += [hard[-1].changed(B=0 * hard[-1].B), AdaptedLinear(method, (1,), 530, 520, 70, 16 / 24)]
    hard += [hard[0].changed(magnitude=-hard[0].magnitude)] if method == "dora" else []
    return [
        Law(kind, "weight", f"{equation}, also of views, and the inputs stay as they were", plain + hard, merging),
        Law(kind, "16-bit", f"{equation}, in the dtype of W: bfloat16 and float16", low, merging),
    ]


_CYCLE = f"merged the layer applies W + s·B A, and unmerged W again, in {CYCLES} cycles"
_64, _32, _F16, _B16 = (linear_cases("lora", dtype)[12:22:3] for dtype in UNITS)
_4 = [AdaptedLinear(inner=64, r=4, dtype="float32"), AdaptedLinear(inner=128, outer=24, r=8, dtype="float32")]
LAWS = (
    *_merge_laws("merge", "lora", "W' = W + s·B A"),
    *_merge_laws("merge_dora", "dora", "W' = m·(W + s·B A)/‖W + s·B A‖ by row"),
    Law("adapter_sum", "delta", "ΔW = Σ wᵢ·sᵢ·Bᵢ Aᵢ", SUMS, adapter_sum),
    Law("merge_cycle", "32-bit", f"{_CYCLE} of float64 and float32", _64 + _32, unpacked(cycles_of_floats)),
    Law("merge_cycle", "16-bit", f"{_CYCLE} of 16 bits, without drift", _B16 + _F16, unpacked(cycles_of_floats)),
    Law("merge_cycle", "4-bit", f"{_CYCLE} of NF4, or that quantized again", _4, unpacked(cycles_of_nf4)),
)
