"""What a solution of exercise 6 must do."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from minilora.testing.reference import lora_merged_weight

CASES = [((6, 9), 1, 0.5), ((6, 9), 3, 2.0), ((9, 4), 2, 7.0), ((9, 4), 4, 0.25)]  # (out, in), r, s


def check_best_adapter(answer: ModuleType) -> None:
    """`best_adapter` reaches the loss that the eigenvalues of ΔWᵀ ΔW allow, and says which that is."""
    generator = torch.Generator().manual_seed(0)
    for shape, r, s in CASES:
        delta = torch.randn(shape, generator=generator, dtype=torch.float64)
        given = delta.clone()
        case = f"ΔW {shape}, rank {r}, scale {s}"
        A, B, told = answer.best_adapter(delta, r, s)
        for name, factor, need in (("A", A, (r, shape[1])), ("B", B, (shape[0], r))):
            assert factor.shape == need, f"{case}: {name} is {tuple(factor.shape)}, need {need}"
        kind = type(told).__name__
        assert isinstance(told, float), f"{case}: the loss is a {kind}, need a Python float (`.item()`)"
        squares = np.linalg.eigvalsh(delta.numpy().T @ delta.numpy())[::-1]  # of the singular values
        least, total = max(0.0, math.fsum(squares[r:])), math.fsum(squares)
        left = delta.numpy() - lora_merged_weight(np.zeros(shape), A.numpy(), B.numpy(), s)
        loss = float(np.square(left).sum())
        hint = "which directions of ΔW are worth keeping?"
        others = [np.square(delta.numpy() - factor * (B @ A).numpy()).sum() for factor in (1, s * s)]
        if min(others) < least + 1e-9 * total:
            hint = "the directions are right, and their length is not. What does the layer do to B A?"
        assert loss < least + 1e-9 * total, (
            f"{case}: s·B A misses {loss:.4f} of {total:.4f}, and the best misses {least:.4f}. {hint}"
        )
        assert abs(told - least) < 1e-9 * total, (
            f"{case}: you say that the loss is {told:.4f}, and it is {least:.4f} of {total:.4f}. "
            "Which part of the energy is lost?"
        )
        assert torch.equal(delta, given), f"{case}: best_adapter changes the ΔW that it was given"


def check_rank_for(answer: ModuleType) -> None:
    """The rank keeps the share, one rank less does not, and the products are thin."""
    generator = torch.Generator().manual_seed(1)
    for (out, width), r, share in (((8, 9), 5, 0.5), ((9, 7), 4, 0.9), ((9, 9), 5, 0.99), ((7, 8), 3, 0.2)):
        A, B = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((r, width), (out, r)))
        squares = np.linalg.svd((B @ A).numpy(), compute_uv=False) ** 2
        found = answer.rank_for(A, B, share)
        case = f"B A {(out, width)}, {share:.0%} of the energy"
        assert isinstance(found, int), f"{case}: the rank is a {type(found).__name__}, need an int"
        kept, before = (math.fsum(squares[:r]) / math.fsum(squares) for r in (found, found - 1))
        assert kept >= share, f"{case}: rank {found} keeps {kept:.1%}. Is energy a length, or the square of one?"
        assert before < share, f"{case}: rank {found} is more than is needed; one less keeps {before:.1%}"
    with FlopCounterMode(display=False) as counter:
        answer.rank_for(torch.eye(2, 300), torch.eye(400, 2), 0.9)
    allowed = 2 * 2 * 300 * 400 // 2
    assert counter.get_total_flops() <= allowed, (
        f"the rank is right, and takes {counter.get_total_flops():,} operations of products; {allowed:,} are more than "
        "enough. Is there a product as large as B A? Which products of A with itself, and of B with itself, are small?"
    )


def check_stack(answer: ModuleType) -> None:
    """The product is the sum of all updates, on the rank that is the sum of theirs."""
    generator = torch.Generator().manual_seed(2)
    for ranks in ((1, 3), (2,), (4, 1, 2)):
        adapters = [
            (torch.randn(r, 6, generator=generator), torch.randn(5, r, generator=generator), 0.5 * r + 1) for r in ranks
        ]
        A, B = answer.stack(adapters)
        case = f"adapters of ranks {ranks}"
        assert A.shape == (sum(ranks), 6), f"{case}: A is {tuple(A.shape)}, need {(sum(ranks), 6)}"
        assert B.shape == (5, sum(ranks)), f"{case}: B is {tuple(B.shape)}, need {(5, sum(ranks))}"
        wanted = sum(lora_merged_weight(np.zeros((5, 6)), A.numpy(), B.numpy(), s) for A, B, s in adapters)
        off = float(np.abs((B @ A).double().numpy() - wanted).max())
        assert off < 1e-4, f"{case}: B A is off by {off:.3f} somewhere. Nothing multiplies B A by a scale any more"
