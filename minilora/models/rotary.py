"""How models rotate contexts longer than those they were trained on: the kinds of `rope_scaling` in a `config.json`.

    default   f_i = θ^(-2i/R)                               Su et al. 2021, RoFormer, eq. 15
    linear    f_i / factor                                  Chen et al. 2023, Position Interpolation, eq. 4
    llama3    low frequencies / factor, high ones kept      Llama 3.1's reference code
    yarn      the same with another ramp; q and k longer    Peng et al. 2023, YaRN, eq. 18, 20 and 22

Pair i of a head turns by position · f_i.

    N  tokens of all spans    R  rotated width of a head
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minilora.errors import ConfigError
from minilora.llama import CosSin, Rope, llama_frequencies, rope_frequencies
from minilora.options import is_positive

Scaling = Mapping[str, Any]
NUMBERS: dict[str, tuple[str, ...]] = {  # that each kind needs
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
ORIGINAL = "original_max_position_embeddings"
OPTIONAL = (ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "llama_4_scaling_beta")


@dataclass(frozen=True)
class YarnRope(Rope):
    """A rotation that also makes q and k longer, in place of a `llama.Rope`."""

    amplitude: float  # of cos and sin

    def rotation(self, spans: Sequence[range], device: torch.device) -> CosSin:
        cos, sin = super().rotation(spans, device)
        return self.amplitude * cos, self.amplitude * sin


def build_rope(values: Mapping[str, Any], width: int) -> Rope:
    """Build the rotation of R = `width` coordinates of a head, by a config.json whose missing keys have values."""
    if width + width % 2 > values["head_dim"]:
        raise ConfigError(f"head_dim {values['head_dim']} is odd, but its coordinates turn in pairs")
    if width == values["head_dim"] and values["partial_rotary_factor"] != 1:
        raise ConfigError(f"partial_rotary_factor is {values['partial_rotary_factor']}, which the family does not have")
    scaling, theta = values["rope_scaling"], float(values["rope_theta"])
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    trained_length = original_length(values)
    _check_scaling(kind, theta, scaling)
    if kind == "yarn":
        frequencies = yarn_frequencies(width, theta, scaling, trained_length)
        return YarnRope(tuple(frequencies.tolist()), yarn_amplitude(scaling))
    if kind == "linear":
        return Rope(tuple((rope_frequencies(width, theta) / scaling["factor"]).tolist()))
    known = {**values, "rope_scaling": {**scaling, ORIGINAL: trained_length}}
    return Rope(tuple(llama_frequencies(known, width).tolist()))


def original_length(values: Mapping[str, Any]) -> int:
    """Return the length of the documents that the frequencies were trained on."""
    length: int = values.get(ORIGINAL) or values["rope_scaling"].get(ORIGINAL) or values["max_position_embeddings"]
    return length


@dataclass(frozen=True)
class RopeByWindow:
    """Two rotations in place of a `llama.Rope`: of layers with a window, and of the others."""

    ropes: tuple[Rope, Rope]

    def rotation(self, spans: Sequence[range], device: torch.device) -> CosSin:
        """Compute cos and sin of both rotations, (2, N, R/2) each."""
        (cos, sin), (other_cos, other_sin) = (rope.rotation(spans, device) for rope in self.ropes)
        return torch.stack((cos, other_cos)), torch.stack((sin, other_sin))


def build_rope_by_window(values: Mapping[str, Any], width: int) -> RopeByWindow:
    """Build the rotations of the two kinds of layers that `rope_parameters` names.

    Older configs have `rope_local_base_freq` for one, `rope_theta` and `rope_scaling` for the other.
    """
    if values.get("sliding_window") is None:
        raise ConfigError("sliding_window: found None, need a whole number: some layers have a window")
    thetas = {"sliding_attention": "rope_local_base_freq", "full_attention": "rope_theta"}
    scaling = values["rope_scaling"]
    by_kind = scaling if thetas.keys() & scaling.keys() else {"full_attention": scaling}
    if by_kind is not scaling and values.get("rope_parameters"):
        raise ConfigError(f"rope_parameters: found {scaling!r:.80}, need an object for each of {list(thetas)}")
    ropes = []
    for kind, key in thetas.items():
        given = by_kind.get(kind) or {}
        theta = given.get("rope_theta") or values.get(key) or 10_000.0 if isinstance(given, Mapping) else None
        if not is_positive(theta):
            raise ConfigError(f"{kind}: found {given!r:.80}, need a JSON object whose rope_theta is above 0")
        if given.get("partial_rotary_factor") not in (None, 1):
            raise ConfigError(f"{kind}: found {given!r:.80}, need no partial_rotary_factor")
        ropes.append(build_rope({**values, "rope_scaling": given, "rope_theta": theta}, width))
    return RopeByWindow((ropes[0], ropes[1]))


def yarn_frequencies(width: int, theta: float, scaling: Scaling, trained_length: int) -> Tensor:
    """Slow down the pairs that turn rarely in the trained length L, and keep those that turn often.

    f_i ← (1 - γ_i) f_i / factor + γ_i f_i,  γ_i falls from 1 at i = ⌊p(β_fast)⌋ to 0 at i = ⌈p(β_slow)⌉  [YaRN eq. 20]

    Pair p(n) = R ln(L/2πn) / (2 ln θ) turns n times in L. Between the two γ is linear in i, as in the authors' code and
    transformers; in the paper it is linear in n  [YaRN eq. 18].
    """

    def pair(turns: float) -> float:
        p = width * (math.log(trained_length) - math.log(2 * math.pi * turns)) / (2 * math.log(theta))
        return min(max(p, 0), width - 1)

    first, last = math.floor(pair(scaling.get("beta_fast") or 32)), math.ceil(pair(scaling.get("beta_slow") or 1))
    f = rope_frequencies(width, theta)
    gamma = 1 - ((torch.arange(len(f), device="cpu") - first) / max(last - first, 0.001)).clamp(0, 1)
    return (1 - gamma) * f / scaling["factor"] + gamma * f


def yarn_amplitude(scaling: Scaling) -> float:
    """Compute the factor of cos and sin, 1 + 0.1 ln s, where the context grew s times  [YaRN eq. 22].

    DeepSeek's `mscale` and `mscale_all_dim` make it (1 + 0.1 mscale ln s) / (1 + 0.1 mscale_all_dim ln s).
    """
    if (given := scaling.get("attention_factor")) is not None:
        return float(given)
    growth = 0.1 * math.log(max(scaling["factor"], 1))
    above, below = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return (1 + above * growth) / (1 + below * growth) if above and below else 1 + growth


def _check_scaling(kind: str, theta: float, scaling: Scaling) -> None:
    if not isinstance(kind, str) or kind not in NUMBERS:
        raise ConfigError(f"rope type {kind!r:.80} is not supported; supported are {sorted(NUMBERS)}")
    bad = []
    for key in dict.fromkeys((*NUMBERS[kind], *OPTIONAL)):
        value = scaling.get(key)
        if not is_positive(value) and (value is not None or key in NUMBERS[kind]):
            bad.append(f"{key}: found {value!r:.80}, need a number above 0")
    if kind == "llama3" and not bad and not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        bad.append(f"low_freq_factor: found {low!r}, need less than high_freq_factor, {high!r}")
    if kind == "yarn":
        if theta <= 1:  # its logarithm divides
            bad.append(f"rope_theta: found {theta!r}, need more than 1")
        if scaling.get("truncate", True) is not True:
            bad.append(f"truncate: found {scaling['truncate']!r:.80}, supported is true")
        fast, slow = scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1
        if not bad and fast < slow:
            bad.append(f"beta_fast: found {fast!r}, need at least beta_slow, {slow!r}")
    if bad:
        raise ConfigError(f"rope type {kind!r:.80}: " + "; ".join(bad))
