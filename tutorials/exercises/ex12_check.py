"""What a solution of exercise 11 must do."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from minilora.testing.compare import MATHS, relative
from minilora.testing.reference import dora_gradients


def check(answer: ModuleType) -> None:
    """`magnitude_gradient` equals the loops of `minilora.testing.reference`."""
    generator = torch.Generator().manual_seed(0)
    x, dy, W, A, B = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((4, 5), (4, 5), (5, 5), (2, 5), (5, 2))
    )
    for s in (0.5, 7.0):
        arrays = [tensor.numpy() for tensor in (x, dy, W, A, B)]
        *_, expected = dora_gradients(*arrays, s, torch.ones(5, dtype=torch.float64).numpy())
        found = answer.magnitude_gradient(x, dy, W, A, B, s)
        assert isinstance(found, Tensor), f"found {type(found).__name__}, need a tensor"
        shape = tuple(found.shape)
        assert shape == (5,), f"the shape is {shape}, need (5,): one number for each output, summed over the rows of x"
        assert found.dtype == x.dtype, f"the dtype is {found.dtype}, need that of x, {x.dtype}"
        why = next(
            (why for why, wrong in mistakes(x, dy, W, A, B, s).items() if relative(found, wrong, MATHS) <= 1), ""
        )
        assert relative(found, expected, MATHS) <= 1, (
            f"with s = {s}, found {rounded(found)}, need {rounded(expected)}{why}"
        )


def rounded(values: object) -> str:
    return " ".join(f"{value:.3f}" for value in torch.as_tensor(values).tolist())


def mistakes(x: Tensor, dy: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float) -> dict[str, Tensor]:
    """What wrong answers give that are easily made, by what is wrong with them."""
    V, unscaled = W + s * B @ A, W + B @ A

    def gradient(direction: Tensor) -> Tensor:
        return (dy * (x @ direction.T)).sum(dim=0)

    return {
        ". The norm is missing: m multiplies a row of length 1": gradient(V),
        ". That is the norm of each column (dim=0); m belongs to the rows, the outputs": gradient(V / V.norm(dim=0)),
        ". That is the norm of each column (dim=0) beside the rows; need that of each row (dim=1)": gradient(
            V / V.norm(dim=0)[:, None]
        ),
        ". The norms of the rows are spread over the columns; keepdim=True keeps them beside their rows": gradient(
            V / V.norm(dim=1)
        ),
        ". That divides by the norm of W; the forward divides by that of W + s·B A": gradient(
            V / W.norm(dim=1, keepdim=True)
        ),
        ". The direction is that of W + s·B A; here it is that of W, as if nothing were trained": gradient(
            W / W.norm(dim=1, keepdim=True)
        ),
        ". That divides by the norm of the whole matrix; need that of each row (dim=1)": gradient(V / V.norm()),
        ". The output is that of W alone, divided by the norm of W + s·B A; need that of W + s·B A": gradient(
            W / V.norm(dim=1, keepdim=True)
        ),
        ". The scale s is missing": gradient(unscaled / unscaled.norm(dim=1, keepdim=True)),
        ". The rows of x are averaged; a gradient sums over them": gradient(V / V.norm(dim=1, keepdim=True)) / len(x),
    }
