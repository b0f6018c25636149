"""Exercise 1: a LoRA layer in five small parts. For the verdict: python tutorials/exercises/check.py 01"""

from pathlib import Path

from torch import Tensor


def alpha_for(s: float, r: int, use_rslora: bool) -> float:
    """The `lora_alpha` that gives an adapter of rank r the scale s."""
    raise NotImplementedError


def count(linears: list[tuple[int, int]], r: int) -> int:
    """How many numbers an adapter of rank r on linears of these sizes, (in, out), trains."""
    raise NotImplementedError


def forward(x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """y = W x + s·B A x for each row of x, without the matrix B A.

    Shapes: x (N, in), W (out, in), A (r, in), B (out, r) -> (N, out)
    """
    raise NotImplementedError


def merge(W: Tensor, adapters: list[tuple[Tensor, Tensor, float]]) -> Tensor:
    """W + Σ s·B A over all (A, B, s) of `adapters`. The W that was given stays as it was.

    Shapes: W (out, in), A (r, in), B (out, r), with another r for each adapter -> (out, in)
    """
    raise NotImplementedError


def read_update(directory: Path, path: str) -> Tensor:
    """The update s·B A of the linear at `path`, such as `model.layers.0.mlp.up_proj`, from the two files of an adapter.

    All linears have the rank and alpha of the configuration (no patterns).

    Shapes: -> (out, in)
    """
    raise NotImplementedError
