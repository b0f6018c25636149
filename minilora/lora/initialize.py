"""Start values of an adapter.

B = 0 makes a new adapter the identity; A must then be nonzero, or no gradient would reach B.

    [LoRA]  Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models
    [He]    He et al. 2015, Delving Deep into Rectifiers
"""

from __future__ import annotations

import torch
from torch import Tensor

from minilora.errors import ConfigError


def initial_factors(
    kind: bool | str, r: int, in_features: int, out_features: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A and B of a new adapter, float32 on the CPU, so that every device starts from the same numbers.

    True:       A ~ U(-1/√in, 1/√in), which is PyTorch's own start of a linear ([He] with slope √5); B = 0
    "gaussian": A ~ N(0, 1/r²), the variance being PEFT's; B = 0  [LoRA §4.1]

    Shapes: -> (r, in), (out, r)

    Raises:
        ConfigError: another kind.
    """
    lora_A = torch.empty(r, in_features)
    if kind is True:
        bound = in_features**-0.5
        lora_A.uniform_(-bound, bound, generator=generator)
    elif kind == "gaussian":
        lora_A.normal_(0, 1 / r, generator=generator)
    else:
        raise ConfigError(f"init_lora_weights is {kind!r}, accepted are True and 'gaussian'")
    return lora_A, torch.zeros(out_features, r)
