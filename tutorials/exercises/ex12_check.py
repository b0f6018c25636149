"""What a solution of exercise 12 must do."""

from __future__ import annotations

import statistics
from types import ModuleType

import torch
from torch import Tensor

from minilora.testing.compare import MATHS, relative
from minilora.testing.reference import dora_gradients

SCALES = (0.5, 7.0)
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 8: 2.365}
EVIDENCE = (  # differences, margin
    ([0.031, 0.042, 0.035], 0.02),
    ([-0.035, -0.031, -0.042], 0.02),
    ([0.004, -0.003, 0.001, 0.002, -0.002], 0.02),
    ([0.040, 0.001, 0.052], 0.02),
    ([0.009, 0.010, 0.011, 0.010], 0.02),
    ([-0.009, -0.010, -0.011, -0.010], 0.005),
    ([0.028, -0.024, 0.002], 0.02),
    ([0.011, 0.013], 0.02),
    ([0.002, 0.012, 0.020, 0.026, 0.018], 0.02),
    ([0.006, -0.018, 0.021, -0.005, 0.014, -0.020, 0.017, -0.009], 0.02),
    ([0.021, 0.060, 0.031], 0.02),
)


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Tensors of normal numbers in float64, always the same."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def tensor_of(found: object, like: Tensor, shape: tuple[int, ...], what: str) -> Tensor:
    assert isinstance(found, Tensor), f"{what}: found {type(found).__name__}, need a tensor"
    assert tuple(found.shape) == shape, f"{what}: the shape is {tuple(found.shape)}, need {shape}"
    assert found.dtype == like.dtype, f"{what}: the dtype is {found.dtype}, need {like.dtype}"
    return found


def reason(found: Tensor, wrong: dict[str, Tensor]) -> str:
    """A question about what was probably done instead, if that is known."""
    return next((why for why, value in wrong.items() if relative(found, value, MATHS) <= 1), "")


def check_magnitude_gradient(answer: ModuleType) -> None:
    """`magnitude_gradient` equals the loops of `minilora.testing.reference`."""
    x, dy, W, A, B = draw((4, 5), (4, 5), (5, 5), (2, 5), (5, 2))
    for s in SCALES:
        arrays = [tensor.numpy() for tensor in (x, dy, W, A, B)]
        *_, expected = dora_gradients(*arrays, s, torch.ones(5, dtype=torch.float64).numpy())
        found = tensor_of(answer.magnitude_gradient(x, dy, W, A, B, s), x, (5,), f"s = {s}")
        assert relative(found, expected, MATHS) <= 1, (
            f"with s = {s}, found {rounded(found)}, loops say {rounded(expected)}"
            f"{reason(found, mistakes(x, dy, W, A, B, s))}"
        )


def rounded(values: object) -> str:
    return " ".join(f"{value:.3f}" for value in torch.as_tensor(values).tolist())


def mistakes(x: Tensor, dy: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float) -> dict[str, Tensor]:
    """What wrong answers give that are easily made, by a question about what is wrong with them."""
    V, unscaled = W + s * (B @ A), W + B @ A

    def gradient(direction: Tensor) -> Tensor:
        return (dy * (x @ direction.T)).sum(dim=0)

    rows = V.norm(dim=1, keepdim=True)
    return {
        ". How long is the row that m multiplies?": gradient(V),
        ". Does m belong to the inputs or to the outputs?": gradient(V / V.norm(dim=0)),
        ". Over which dimension is your norm, and to which is it attached?": gradient(V / V.norm(dim=0)[:, None]),
        ". Which number divides which entry? Look at the shapes": gradient(V / V.norm(dim=1)),
        ". Which weight's length does the forward divide by?": gradient(V / W.norm(dim=1, keepdim=True)),
        ". What has the adapter done to the direction?": gradient(W / W.norm(dim=1, keepdim=True)),
        ". How many lengths has a matrix of five rows?": gradient(V / V.norm()),
        ". Which weight does x meet in the forward?": gradient(W / rows),
        ". Is there an s in it?": gradient(unscaled / unscaled.norm(dim=1, keepdim=True)),
        ". What does a gradient do with several rows of x?": gradient(V / rows) / len(x),
    }


def check_smallest_start(answer: ModuleType) -> None:
    """The parts add up to W, s·B A has its smallest singular values, and A and B share them equally."""
    for shape in ((6, 8), (8, 6)):
        (W,) = draw(shape)
        sigma = torch.linalg.svdvals(W)
        for r, s in ((2, 0.5), (3, 7.0)):
            case = f"W {shape}, r = {r}, s = {s}"
            parts = answer.smallest_start(W, r, s)
            assert isinstance(parts, tuple), f"{case}: found {type(parts).__name__}, need a tuple of three"
            assert len(parts) == 3, f"{case}: found {len(parts)} parts, need three"
            shapes = ((r, shape[1]), (shape[0], r), shape)
            A, B, rest = (
                tensor_of(part, W, need, f"{case}, {name}")
                for part, need, name in zip(parts, shapes, ("A", "B", "the frozen part"), strict=True)
            )
            assert relative(rest + s * (B @ A), W, MATHS) <= 1, f"{case}: the new layer is not the old one"
            found, need = torch.linalg.svdvals(s * (B @ A))[:r], sigma[-r:]
            assert torch.allclose(found, need), (
                f"{case}: s·B A has the singular values {rounded(found)}, need {rounded(need)}, of {rounded(sigma)}"
            )
            assert torch.allclose(A.norm(dim=1), B.norm(dim=0)), (
                f"{case}: A's rows have the lengths {rounded(A.norm(dim=1))}, B's columns {rounded(B.norm(dim=0))}"
            )


def check_verdict(answer: ModuleType) -> None:
    """The verdicts are those of the interval, also where the mean of the seeds suggests another one."""
    for differences, margin in EVIDENCE:
        middle, error = statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
        need = by_interval(middle, STUDENT[len(differences)] * error, margin)
        found = answer.verdict(list(differences), margin)
        case = f"differences {' '.join(f'{each:+.3f}' for each in differences)}, margin {margin}"
        assert found in ("equal", "different", "undecided"), f"{case}: you say {found!r}, which is none of the three"
        assert found == need, f"{case}: you say {found}{why(found, need, differences, margin)}"


def by_interval(middle: float, half: float, margin: float) -> str:
    low, high = middle - half, middle + half
    if max(abs(low), abs(high)) <= margin:
        return "equal"
    return "undecided" if low <= 0 <= high else "different"


def why(found: str, need: str, differences: list[float], margin: float) -> str:
    """A question about what was probably done instead, if that is known."""
    n, middle, spread = len(differences), statistics.mean(differences), statistics.stdev(differences)
    if need == "equal" and found == "different":
        return ". The difference is certain; is it one that matters?"
    if need == "different" and found == "undecided" and middle < 0:
        return ". On which side of 0 may a difference lie?"
    if found == by_interval(middle, STUDENT[n] * spread, margin):
        return ". Of what is this the spread: of one seed, or of the mean of several?"
    if found == by_interval(middle, 1.96 * spread / n**0.5, margin):
        return f". How well do {n} seeds know their own spread?"
    if need == "equal" and found == "undecided":
        return ". How much do you know, if even the ends of the interval are small?"
    if need == "undecided" and found == "equal":
        return ". You found no difference; have you shown that there is none?"
    return ". Where are the two ends of the interval?"
