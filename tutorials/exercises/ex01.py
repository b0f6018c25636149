"""Exercise 1: a LoRA layer in five small parts. For the verdict: python tutorials/exercises/check.py 01"""

from pathlib import Path

from torch import Tensor


def alpha_for(s: float, r: int, use_rslora: bool) -> float:
    """The `lora_alpha` that gives an adapter of rank r the scale s."""
    raise NotImplementedError


def count(linears: dict[str, tuple[int, int]], r: int) -> tuple[int, float]:
    """How many numbers an adapter of rank r trains, and which share of all numbers, of the linears and of the adapter.

    `linears` has the sizes (in, out) of each linear of a model, without bias. All get an adapter but `lm_head`.
    """
    raise NotImplementedError


def forward(x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: Tensor) -> Tensor:
    """y = W x + s·B A x for each row of x, with the row's own s, without the matrix B A.

    Shapes: x (N, in), W (out, in), A (r, in), B (out, r), s (N) -> (N, out)
    """
    raise NotImplementedError


def merge(W: Tensor, adapters: list[tuple[Tensor, Tensor, float]]) -> Tensor:
    """W + Σ s·B A over all (A, B, s) of `adapters`. The W that was given stays as it was.

    Shapes: W (out, in), A (r, in), B (out, r), with another r for each adapter -> (out, in)
    """
    raise NotImplementedError


def read_update(directory: Path, path: str) -> Tensor:
    """The update s·B A of the linear at `path`, such as `model.layers.0.mlp.up_proj`, from the two files of an adapter.

    All linears have the alpha of the configuration; its `rank_pattern` gives some of them a rank other than `r`.

    Shapes: -> (out, in)
    """
    raise NotImplementedError
