"""What a solution of exercise 9 must do."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from minilora.testing.reference import NF4_LEVELS

ALLOWED = {4096: 0.95, 64: 1.01}  # block size -> mean absolute error, as a share of NF4's


def check_bits_per_weight(answer: ModuleType) -> None:
    """The bits are those of a large matrix, counted."""
    for block_size, group_size in ((64, None), (64, 256), (32, 128), (4096, None)):
        weights = block_size * (group_size or 1) * 8
        blocks = weights // block_size
        scales = 32 * blocks if group_size is None else 8 * blocks + 32 * blocks // group_size
        found, need = answer.bits_per_weight(block_size, group_size), (4 * weights + scales) / weights
        case = f"blocks of {block_size}, " + (f"groups of {group_size}" if group_size else "no groups")
        assert abs(found - need) < 1e-9, f"{case}: you say {found:.4f}; {weights:,} weights take {need:.4f} bits each"


def check_unpack(answer: ModuleType) -> None:
    """The codes of some bytes are those that were packed."""
    for bits, packed, need in ((4, [146, 7], [9, 2, 0, 7]), (2, [146, 7], [2, 1, 0, 2, 0, 0, 1, 3])):
        found = answer.unpack(torch.tensor(packed, dtype=torch.uint8), bits)
        assert isinstance(found, Tensor), f"unpack returns {type(found).__name__}, need a tensor"
        assert found.tolist() == need, f"bytes {packed}, {bits} bits a code: you find {found.tolist()}, need {need}"


def check_fit(answer: ModuleType) -> None:
    """`fit` returns a code that represents -1, 0 and 1, and its error on normal numbers is small enough."""
    normal = torch.randn(2**20, generator=torch.Generator().manual_seed(7))
    fitted = {size: answer.fit(size) for size in ALLOWED}
    for size, levels in fitted.items():
        _check_levels(levels, f"block {size}")
    for size, levels in fitted.items():
        error, of_nf4 = (mean_error(normal, each, size) for each in (levels, torch.tensor(NF4_LEVELS)))
        needed, other = ALLOWED[size] * of_nf4, next(each for each in fitted if each != size)
        if torch.equal(levels, fitted[other]):
            why = f"The code is the same as for block {other}. What does the size of a block change?"
        else:
            why = "Where does a level serve its numbers best, and do they stay its numbers?"
        assert error <= needed, f"block {size}: the mean absolute error is {error:.4f}, need {needed:.4f}. {why}"


def _check_levels(levels: Tensor, case: str) -> None:
    assert isinstance(levels, Tensor), f"{case}: fit returns {type(levels).__name__}, need a tensor"
    assert levels.shape == (16,), f"{case}: the shape is {tuple(levels.shape)}, need (16,): four bits name 16 levels"
    assert not levels.isnan().any(), f"{case}: a level is not a number: the mean or median of no numbers at all?"
    ends = [levels.min().item(), levels.max().item()]
    assert max(map(abs, ends)) <= 1, (
        f"{case}: the levels go from {ends[0]:.3f} to {ends[1]:.3f}, but what is rounded lies in [-1, 1]: "
        "what is rounded, a weight or its share of the absmax?"
    )
    assert (levels.diff() > 0).all(), f"{case}: the levels must rise, for their midpoints say what is nearest"
    assert ends == [-1, 1], (
        f"{case}: the levels go from {ends[0]:.3f} to {ends[1]:.3f}. Keep -1 and 1: each block has one number that is "
        "exactly one of them, its largest, and a model's largest weights matter most"
    )
    assert (levels == 0).any(), (
        f"{case}: the level nearest to 0 is {levels[levels.abs().argmin()]:.4f}. Keep an exact 0: zeros, such as "
        "padding and pruned weights, must stay zeros"
    )


def mean_error(normal: Tensor, levels: Tensor, block_size: int) -> float:
    """Return the mean absolute error of normal numbers, rounded in blocks."""
    blocks = normal.view(-1, block_size)
    absmax = blocks.abs().amax(1, keepdim=True)
    codes = torch.bucketize(blocks / absmax, (levels[1:] + levels[:-1]) / 2)
    return (levels[codes] * absmax - blocks).abs().mean().item()
