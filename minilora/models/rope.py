"""Rotary position embedding: which angle each pair of coordinates turns by at each position, and how it is stretched.

A pair i of a head turns by `position · frequency[i]`. The longer contexts of later models come from changing the
frequencies, each by its own rule:

    default   θ^(-2i/R)                                      Su et al. 2021, RoFormer, eq. 15
    linear    θ^(-2i/R) / factor                             Chen et al. 2023, Position Interpolation
    dynamic   θ grows with documents beyond trained length   "NTK-aware" scaling, 2023
    llama3    long waves / factor, short ones kept, a ramp   Llama 3.1's reference code
    longrope  a factor a pair, for short or long documents   Ding et al. 2024, LongRoPE

`dynamic` and `longrope` depend on the length of the whole document: what was computed for a shorter one does not hold
for a longer one (`changes`).

    N  tokens of all spans    R  rotated width of a head
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minilora.errors import ConfigError
from minilora.llama import Rope

ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
TRAINED = "original_max_position_embeddings"


@dataclass(frozen=True)
class ScaledRope(Rope):
    """The rotation of one model, with frequencies that may be scaled.

    Args:
        width, theta: as of `llama.Rope`.
        kind: a key of `ROPE_KEYS`.
        scaling: the numbers that the kind needs.
        trained_length: the length that scaling starts from.
        max_length: `max_position_embeddings` of the config.

    Raises:
        ConfigError: an unknown kind, or a number that the kind needs is missing.
    """

    kind: str
    scaling: Mapping[str, Any]
    trained_length: int
    max_length: int

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in ROPE_KEYS:
            raise ConfigError(f"rope type {self.kind!r} is not supported; supported are {sorted(ROPE_KEYS)}")
        if missing := [key for key in ROPE_KEYS[self.kind] if self.scaling.get(key) is None]:
            raise ConfigError(f"rope type {self.kind!r} needs {missing}; the config has {sorted(self.scaling)}")
        bad = [f"{key}: {problem}" for key in self._numbers() if (problem := self._problem(key))]
        if self.kind == "dynamic" and self.width <= 2:
            bad.append(f"only {self.width} coordinates of a head turn, and it needs more than 2")
        if bad:
            raise ConfigError(f"rope type {self.kind!r}: " + "; ".join(bad))

    def _numbers(self) -> list[str]:
        """The keys of `scaling` that the kind reads and that are there."""
        optional = {"llama3": [TRAINED], "longrope": [TRAINED, "factor", "attention_factor"]}.get(self.kind, [])
        return [*ROPE_KEYS[self.kind], *(key for key in optional if self.scaling.get(key) is not None)]

    def _problem(self, key: str) -> str | None:
        value, pairs = self.scaling[key], (self.width + 1) // 2
        if key not in ("short_factor", "long_factor"):
            return None if is_positive(value) else f"found {value!r}, need a number above 0"
        is_list = isinstance(value, list | tuple) and all(map(is_positive, value))
        return (
            None if is_list and len(value) == pairs else f"found {value!r}, need a list of {pairs} numbers, one a pair"
        )

    def rotation(self, spans: Sequence[range], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cos and sin of position · frequency, (N, R/2) each in float32, times the amplitude."""
        cos, sin = super().rotation(spans, device)
        return cos * self.amplitude, sin * self.amplitude

    def frequencies(self, length: int) -> Tensor:
        pairs = torch.arange(0, self.width, 2).float() / self.width
        if self.kind == "dynamic":
            return 1.0 / self._dynamic_theta(length) ** pairs
        if self.kind == "longrope":
            stretch = "long_factor" if length > self.trained_length else "short_factor"
            return 1.0 / (torch.tensor(self.scaling[stretch], dtype=torch.float32) * self.theta**pairs)
        plain = 1.0 / self.theta**pairs
        if self.kind == "linear":
            return plain / self.scaling["factor"]
        return self._llama3(plain) if self.kind == "llama3" else plain

    def changes(self, before: int, after: int) -> bool:
        """Whether a document's tokens turn by other angles once it has grown from one length to another."""
        if self.kind == "dynamic":
            return after > max(before, self.max_length)
        return self.kind == "longrope" and before <= self.trained_length < after

    @property
    def amplitude(self) -> float:
        """A factor of cos and sin: 1, but for longrope √(1 + ln s / ln L), as in Phi-3's own code, trained on L."""
        if self.kind != "longrope":
            return 1.0
        if (given := self.scaling.get("attention_factor")) is not None:
            return float(given)
        stretch = self.scaling.get("factor") or self.max_length / self.trained_length
        return 1.0 if stretch <= 1.0 else math.sqrt(1 + math.log(stretch) / math.log(self.trained_length))

    def _dynamic_theta(self, length: int) -> float:
        factor, trained = self.scaling["factor"], self.max_length
        growth = factor * max(length, trained) / trained - (factor - 1)
        return self.theta * growth ** (self.width / (self.width - 2))

    def _llama3(self, plain: Tensor) -> Tensor:
        low, high = self.scaling["low_freq_factor"], self.scaling["high_freq_factor"]
        turns = self.trained_length * plain / (2 * math.pi)  # full turns within the trained length
        ramp = ((turns - low) / (high - low)).clamp(0, 1)  # 0: divide by the factor, 1: keep
        return (1 - ramp) * plain / self.scaling["factor"] + ramp * plain


def is_positive(value: Any) -> bool:
    """A finite number above 0; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
