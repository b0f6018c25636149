"""Ministral 3: a Mistral that reads further by YaRN, and whose queries grow with the position.

    q_i ← rotate(q_i) · (1 + β ln(1 + ⌊i/L⌋))                        [Llama 4's code; Mistral AI 2026, Ministral 3]

i is the position in the document, L the length that YaRN extends, and β is `llama_4_scaling_beta`, 0 if it is missing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minilora.definition import to_device
from minilora.llama import MLP, Attends, Attention, Block, CosSin, LlamaConfig, Rope, rotate
from minilora.models.family import Family, Values, equal_windows
from minilora.models.rotary import ORIGINAL, build_rope, original_length


@dataclass(frozen=True)
class GrowingRope:
    """A rotation and the factor of each query, in place of a `llama.Rope`."""

    rope: Rope
    beta: float
    length: int

    def rotation(self, spans: Sequence[range], device: torch.device) -> CosSin:
        """Compute cos with the factors as its last column, (N, R/2 + 1), and sin (N, R/2)."""
        cos, sin = self.rope.rotation(spans, device)
        positions = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        factors = 1 + self.beta * (1 + (positions / self.length).floor()).log()
        return torch.cat((cos, to_device(factors.unsqueeze(1), device)), dim=1), sin


class Ministral3Attention(Attention):
    def forward(self, x: Tensor, rotation: CosSin, documents: Attends) -> Tensor:
        cos, sin = rotation
        cos, factors = cos[:, :-1], cos[:, -1:]
        q, k, v = self.heads(x)
        q = (rotate(q, cos, sin) * factors.unsqueeze(1)).to(v.dtype)
        k = rotate(k, cos, sin).to(v.dtype)
        return self.o_proj(documents.attend(q, k, v, self.window).flatten(1))


def build_block(config: LlamaConfig, layer: int) -> nn.Module:
    return Block(config, Ministral3Attention(config, layer), MLP(config))


def fields(values: Values) -> dict[str, Any]:
    if not values["rope_scaling"]:
        values = {**values, "rope_scaling": YARN, "rope_theta": 1e6}
    beta = values["rope_scaling"].get("llama_4_scaling_beta") or 0.0
    rope = GrowingRope(build_rope(values, values["head_dim"]), beta, original_length(values))
    return {**equal_windows(values), "rope": rope}


YARN = {"rope_type": "yarn", "factor": 16.0, "attention_factor": 1.0, ORIGINAL: 16384, "llama_4_scaling_beta": 0.1}
DEFAULTS = {"max_position_embeddings": 262144, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5}
MINISTRAL3 = Family("Ministral3", DEFAULTS, fields, build_block)
