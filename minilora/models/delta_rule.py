"""The gated delta rule: a layer keeps a memory of fixed size in place of the keys and values of all tokens.

    q, k, v = silu(convolution(W_qkv x)),  q ← q/(‖q‖ √E),  k ← k/‖k‖
    g = -exp(A) softplus(W_a x + c),  α = exp(g),  β = σ(W_b x)                                    [GDN §3.4]
    S_t = α_t S_(t-1) (I - β_t k_t k_tᵀ) + β_t v_t k_tᵀ,  o_t = S_t q_t                            [GDN eq. 10]
    out = W_out (norm(o) ∘ silu(W_z x))

The memory S of a head starts at 0 in each document.

    N  tokens laid end to end    H  heads                                  E  width of queries and keys
    B  documents                 K  key heads; head h has key ⌊h·K/H⌋      F  width of values

    [GDN]  Yang et al. 2024, Gated Delta Networks: Improving Mamba2 with Delta Rule
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.definition import definition
from minilora.llama import Attends, LlamaConfig, RMSNorm, swiglu
from minilora.models.family import Values
from minilora.models.generate import KVCache

SIZES = {  # transformers' defaults
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}


@definition
def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, lengths: Sequence[int], states: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Move the value that each head's memory has for k towards v, and read the memory with q, token by token.

    S ← α S;  S ← S + β (v - S k) kᵀ;  o = S q,  α = exp(g)  [GDN eq. 10]

    It is computed in float32 at least. States are those before and after the tokens of each document, by default 0;
    they are constant for the gradient, because only generation continues a document.

    Shapes: q (N, K, E), k (N, K, E), v (N, H, F), g (N, H), beta (N, H), states (B, H, F, E)
        -> (N, H, F), (B, H, F, E)
    """
    wide, group = torch.promote_types(v.dtype, torch.float32), v.size(1) // k.size(1)
    if states is None:
        states = v.new_zeros(len(lengths), v.size(1), v.size(2), k.size(2))
    heads = q.repeat_interleave(group, dim=1), k.repeat_interleave(group, dim=1), v, g.to(wide).exp(), beta
    outputs, last = [], []
    for S, *document in zip(states.detach().to(wide), *(x.to(wide).split(list(lengths)) for x in heads), strict=True):
        for q_t, k_t, v_t, alpha, b in zip(*document, strict=True):
            S = alpha[:, None, None] * S
            change = b[:, None] * (v_t - (S * k_t[:, None]).sum(-1))
            S = S + change[:, :, None] * k_t[:, None]
            outputs.append((S * q_t[:, None]).sum(-1))
        last.append(S.detach())
    return torch.stack(outputs).to(v.dtype), torch.stack(last)


class GatedDeltaNet(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        K, H, self.key_width, self.value_width, L = linear_sizes(config.source)
        D, keys, values = config.hidden_size, K * self.key_width, H * self.value_width
        self.widths = [keys, keys, values]
        self.in_proj_qkv = nn.Linear(D, sum(self.widths), bias=False)
        self.in_proj_z = nn.Linear(D, values, bias=False)
        self.in_proj_b = nn.Linear(D, H, bias=False)
        self.in_proj_a = nn.Linear(D, H, bias=False)
        self.conv1d = nn.Conv1d(sum(self.widths), sum(self.widths), L, groups=sum(self.widths), bias=False)
        self.dt_bias = nn.Parameter(torch.ones(H))
        self.A_log = nn.Parameter(torch.ones(H))
        self.norm = RMSNorm(self.value_width, config.rms_norm_eps)
        self.out_proj = nn.Linear(values, D, bias=False)

    def forward(self, x: Tensor, rotation: Any, documents: Attends) -> Tensor:
        """Compute the branch of the block in place of attention, without a rotation: (N, D) -> (N, D)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        mixed = F.silu(convolve(self.conv1d, self.in_proj_qkv(x), documents))
        q, k, v = mixed.split(self.widths, dim=-1)
        q, k = (unit(part.to(wide).unflatten(-1, (-1, self.key_width))) for part in (q, k))
        v, z = (part.unflatten(-1, (-1, self.value_width)) for part in (v, self.in_proj_z(x)))
        g = -self.A_log.to(wide).exp() * F.softplus(self.in_proj_a(x).to(wide) + self.dt_bias)
        inputs = q / self.key_width**0.5, k, v, g, self.in_proj_b(x).to(wide).sigmoid()
        lengths = [len(span) for span in documents.spans]
        if isinstance(documents, KVCache):
            states = documents.state(self, g, v.size(1), self.value_width, self.key_width)
            o, last = gated_delta_rule(*inputs, lengths, states)
            states.copy_(last)
        else:
            o, _ = gated_delta_rule(*inputs, lengths)
        return self.out_proj(swiglu(z, self.norm(o)).flatten(1))


def convolve(conv: nn.Conv1d, x: Tensor, documents: Attends) -> Tensor:
    """Convolve each channel of a token with those of the tokens before it in its document: (N, D) -> (N, D).

    Before the first token of a document the channels are 0; in generation earlier tokens are in the cache.
    """
    before = conv.kernel_size[0] - 1
    if isinstance(documents, KVCache):
        parts = documents.extend(conv, x, before)
    else:
        parts = [F.pad(part, (0, 0, before, 0)) for part in x.split([len(span) for span in documents.spans])]
    return torch.cat([conv(part.T[None])[0].T for part in parts if len(part) > before])


def unit(x: Tensor) -> Tensor:
    """Divide by √(‖x‖² + 10⁻⁶) along the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def linear_sizes(values: Values) -> list[int]:
    """Return the sizes of the layers with a delta rule, in the order of `SIZES`."""
    return [values.get(name) or size for name, size in SIZES.items()]
