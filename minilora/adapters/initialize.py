"""Start values of an adapter that are drawn, whatever the weight is; those made from it are in `decompose`.

B A = 0 makes a new adapter the identity. B = 0 does; A must then be nonzero, or no gradient would reach B.

    [LoRA]     Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models
    [He]       He et al. 2015, Delving Deep into Rectifiers
    [Rethink]  datta0.github.io/posts/rethink-lora-init
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from minilora.errors import ConfigError


def initial_factors(
    kind: bool | str, shape_A: Sequence[int], shape_B: Sequence[int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A and B of a new adapter, float32 on the CPU, so that every device starts from the same numbers.

    True:         A ~ U(-1/√fan, 1/√fan), which is PyTorch's own start of a layer ([He] with slope √5); B = 0
    "gaussian":   A ~ N(0, 1/r²), the variance being PEFT's; B = 0  [LoRA §4.1]
    "orthogonal": B A = 0 with neither of them 0 (`_orthogonal_factors`)
    False:        A and B both as PyTorch starts them: not the identity, for tests

    fan is the number of inputs that an output has: of a convolution, those under its kernel.

    Shapes: shape_A (r, in, ...), shape_B (out, r, ...) -> shape_A, shape_B
    Raises:
        ConfigError: another kind, or orthogonal factors that there are not.
    """
    if kind == "orthogonal":
        lora_A, lora_B = _orthogonal_factors(shape_A[0], math.prod(shape_A[1:]), math.prod(shape_B), generator)
        if shape_B[0] != lora_B.size(0):
            raise ConfigError("init_lora_weights is 'orthogonal', which there is not for a convolution in groups")
        return lora_A.view(*shape_A), lora_B.view(*shape_B)
    if kind == "gaussian":
        return torch.empty(*shape_A).normal_(0, 1 / shape_A[0], generator=generator), torch.zeros(*shape_B)
    if not isinstance(kind, bool):
        raise ConfigError(f"init_lora_weights is {kind!r}, accepted are True, False, 'gaussian' and 'orthogonal'")
    lora_A = _uniform(shape_A, generator)
    return lora_A, torch.zeros(*shape_B) if kind else _uniform(shape_B, generator)


def embedding_factors(
    kind: bool | str, num: int, dim: int, r: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A and B of a new adapter of an embedding, float32 on the CPU: here it is A that is 0.

    True:  A = 0, B ~ N(0, 1), which is PyTorch's own start of an embedding
    False: both ~ N(0, 1): not the identity, for tests

    Shapes: -> (r, num), (dim, r)

    Raises:
        ConfigError: another kind, which PEFT 0.21 takes for True.
    """
    if not isinstance(kind, bool):
        raise ConfigError(f"init_lora_weights is {kind!r}, for an embedding accepted are True and False")
    lora_A = torch.zeros(r, num) if kind else torch.randn(r, num, generator=generator)
    return lora_A, torch.randn(dim, r, generator=generator)


def _uniform(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    bound = math.prod(shape[1:]) ** -0.5
    return torch.empty(*shape).uniform_(-bound, bound, generator=generator)


def _orthogonal_factors(r: int, fan: int, size_B: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A = Q₁ᵀ X / 10, B = Y Q₂ / 10: B A = Y (Q₂ Q₁ᵀ) X / 100 = 0, as Q₁ and Q₂ are rows of one orthogonal matrix.

    X, Y ~ N(0, 1); Q₁ are the even rows of Q and Q₂ the odd ones  [Rethink]. All in float64, rounded once.

    Shapes: -> (r, fan), (size_B / r, r)
    """
    if r % 2:
        raise ConfigError(f"init_lora_weights is 'orthogonal', which needs an even rank; found {r}")

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    Q = torch.linalg.qr(draw(r, r)).Q
    lora_A, lora_B = Q[0::2].T @ draw(r // 2, fan) / 10, draw(size_B // r, r // 2) @ Q[1::2] / 10
    return lora_A.float(), lora_B.float()
