"""A frozen linear with adapters.

`AdapterLinear` holds the base layer and the adapters' tensors; what they do to the weight is the one thing that its
kinds differ in. Forward is always the merged weight applied, `F.linear(x, merged_weight(), bias)`, without ever
forming it.

    N  rows of x    in, out  features of the base    r  rank of an adapter
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from minilora.errors import ConfigError, TargetError
from minilora.lora.config import LoraConfig
from minilora.lora.functional import keyed_dropout, lora_branch, lora_delta, lora_scale
from minilora.quant.linear import Linear, apply_weight, dense_weight


class AdapterLinear(nn.Module, ABC):
    """A base linear and its adapters, by name (abstract).

    Adapters are kept in their own dtype, float32 unless asked otherwise, and are cast to the dtype of x where they are
    used (`lora_branch`): the forward pass has no other cast.

    Args:
        base: the linear to adapt; it is held, not copied.
        path: its path in the model, which is part of the dropout's key.
    """

    def __init__(self, base: Linear, path: str):
        super().__init__()
        self.base = base
        self.path = path
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.configs: dict[str, LoraConfig] = {}
        self.scales: dict[str, float] = {}
        self.active: tuple[str, ...] = ()
        self.dropout_key: str | None = None
        self.train(base.training)

    def add(self, name: str, config: LoraConfig, lora_A: Tensor, lora_B: Tensor) -> None:
        """Hold one more adapter, on the base's device; it acts once its name is in `active`.

        A base on the device "meta" has no numbers; its adapters keep theirs where they are.

        Raises:
            TargetError: there is one of that name already.
        """
        if name in self.configs:
            raise TargetError(f"{self.path} has an adapter {name!r} already; it has {sorted(self.configs)}")
        weight = next(self.base.parameters())
        for held, factor in ((self.lora_A, lora_A), (self.lora_B, lora_B)):
            held[name] = nn.Parameter(factor if weight.is_meta else factor.to(weight.device))
        self.configs[name] = config
        self.scales[name] = lora_scale(lora_A.size(0), config.alpha(self.path), config.use_rslora)

    def dropped(self, x: Tensor, name: str) -> Tensor:
        """What the adapter's branch sees of x: all of it, but for dropout in training.

        Raises:
            ConfigError: there is dropout, but no `set_dropout_step` said which mask to draw.
        """
        p = self.configs[name].lora_dropout
        if p == 0 or not self.training:
            return x
        if self.dropout_key is None:
            raise ConfigError(
                "lora_dropout needs minilora.set_dropout_step(model, seed, step) before each forward pass"
            )
        return keyed_dropout(x, p, f"{self.dropout_key}/{self.path}/{name}")

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """y = merged_weight() x + b, (..., in) -> (..., out)."""

    @abstractmethod
    def merged_weight(self, weight: Tensor | None = None) -> Tensor:
        """What the active adapters make of the base's weight, or of the one that is given: (out, in), in its dtype."""


class LoRALinear(AdapterLinear):
    """x ↦ W x + b + Σ s·B A x over the active adapters (final).

    >>> layer = LoRALinear(nn.Linear(8, 4), path="q_proj")
    >>> layer.add("default", LoraConfig(r=2, lora_alpha=6), torch.ones(2, 8), torch.ones(4, 2))
    >>> layer.active = ("default",)
    >>> (layer.merged_weight() - layer.base.weight)[0, :3].round()  # s·B A = 6/2 · (1·1 + 1·1)
    tensor([6., 6., 6.], grad_fn=<RoundBackward0>)
    """

    def forward(self, x: Tensor) -> Tensor:
        y = apply_weight(self.base, x, self.base.bias)
        x = x.to(y.dtype)
        for name in self.active:  # in place, or each adapter would make another (N, out) tensor
            y += lora_branch(self.dropped(x, name), self.lora_A[name], self.lora_B[name], self.scales[name])
        return y

    def merged_weight(self, weight: Tensor | None = None) -> Tensor:
        """W + Σ s·B A, summed in the wider of the two dtypes and rounded once."""
        weight = dense_weight(self.base) if weight is None else weight
        merged = weight
        for name in self.active:
            lora_A, lora_B = self.lora_A[name], self.lora_B[name]
            wide = torch.promote_types(merged.dtype, lora_A.dtype)
            merged = merged + lora_delta(lora_A.to(wide), lora_B.to(wide), self.scales[name])
        return merged.to(weight.dtype)
