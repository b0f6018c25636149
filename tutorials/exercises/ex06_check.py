"""What a solution of exercise 6 must do."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from minilora.testing.reference import lora_merged_weight


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
        "enough. Is there a product as large as B A?"
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


def check_best_for(answer: ModuleType) -> None:
    """The outputs miss what the eigenvalues of their products say, which is less than the best cut of ΔW misses."""
    generator = torch.Generator().manual_seed(3)
    for (out, width), rows, r in (((6, 9), 30, 2), ((8, 5), 20, 1), ((7, 7), 4, 3)):
        delta = torch.randn(out, width, generator=generator, dtype=torch.float64)
        x = torch.randn(rows, width, generator=generator, dtype=torch.float64) * 2 ** torch.arange(width)
        case = f"ΔW {(out, width)}, {rows} rows of x, rank {r}"
        A, B = answer.best_for(delta.clone(), x.clone(), r)
        for name, factor, need in (("A", A, (r, width)), ("B", B, (out, r))):
            assert factor.shape == need, f"{case}: {name} is {tuple(factor.shape)}, need {need}"
        outputs = x @ delta.T
        squares = np.linalg.eigvalsh((outputs.T @ outputs).numpy())[::-1]  # of the singular values of the outputs
        least, total = math.fsum(squares[r:]), math.fsum(squares)
        missed = (outputs - x @ (B @ A).T).square().sum().item()
        U, sigma, Vh = torch.linalg.svd(delta, full_matrices=False)
        plain = (outputs - x @ ((U[:, :r] * sigma[:r]) @ Vh[:r]).T).square().sum().item()
        if math.isclose(missed, plain, rel_tol=1e-6):
            why = (
                "That is what the best cut of ΔW misses. But some inputs are larger than others. Where does x come in?"
            )
        else:
            why = "Which matrix should be cut? And which of its directions belong to outputs?"
        assert missed < least + 1e-9 * total, (
            f"{case}: your outputs miss {missed / total:.2%} of the energy, and the best {least / total:.2%}. {why}"
        )
