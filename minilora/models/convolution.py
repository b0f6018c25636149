"""A short causal convolution of each channel, gated before and after, for blocks that do not attend.

    b, c, x = W_in x;   u = b ∘ x;   y_t = Σ_j w_j ∘ u_(t-j), j < L;   out = W_out (c ∘ y)

It does not cross documents laid end to end: before the first token of a document u is 0, and before new tokens in
generation u comes from the cache.

    N  tokens laid end to end    D  channels    L  tokens that a channel sees
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.llama import Attends, LlamaConfig
from minilora.models.family import Values, layers_of_kind
from minilora.models.generate import KVCache


class ShortConvolution(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, bias = config.hidden_size, bool(config.source.get("conv_bias"))
        L = config.source.get("conv_L_cache") or 3
        self.in_proj = nn.Linear(D, 3 * D, bias)
        self.conv = nn.Conv1d(D, D, L, groups=D, bias=bias)
        self.out_proj = nn.Linear(D, D, bias)

    def forward(self, x: Tensor, rotation: Any, documents: Attends) -> Tensor:
        """Compute the branch of the block in place of attention, without a rotation: (N, D) -> (N, D)."""
        b, c, x = self.in_proj(x).chunk(3, dim=-1)
        return self.out_proj(c * convolve(self.conv, b * x, documents))


def convolve(conv: nn.Conv1d, x: Tensor, documents: Attends) -> Tensor:
    """Convolve each channel of a token with those of the tokens before it in its document: (N, D) -> (N, D)."""
    before = conv.kernel_size[0] - 1
    if isinstance(documents, KVCache):
        parts = documents.extend(conv, x, before)
    else:
        parts = [F.pad(part, (0, 0, before, 0)) for part in x.split([len(span) for span in documents.spans])]
    return torch.cat([conv(part.T[None])[0].T for part in parts if len(part) > before])


def convolves(values: Values) -> list[bool]:
    """Return which layers have a convolution in place of attention."""
    listed, layers = values.get("full_attn_idxs"), range(values["num_hidden_layers"])
    return layers_of_kind(values, "conv", [listed is not None and layer not in listed for layer in layers])
