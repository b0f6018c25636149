"""Weights in int8 with one scale a row, for decoding: half the bytes of bfloat16.

    q = round(W / σ),  σ_i = max_j |W_ij| / 127        [LLM.int8() §2.1, absmax of each row]
    y = (x qᵀ) ∘ σ + b

A token that is generated reads every weight once, and multiplies each once, so the time is that of the bytes. Rounding
moves a weight by at most half a step, therefore

    |Δy_i| = |Σ_j (σ_i q_ij - W_ij) x_j| ≤ σ_i / 2 · ‖x‖₁.

σ is rounded to the dtype of the weight first and q is taken of what it became, so the bound holds for it too; what the
products of y round comes on top. On the CPU PyTorch has a product that reads q as it is; elsewhere q is converted at
each call, which saves memory and no time. Adapters are merged first; head and embedding stay as they are:

    ml.merge(model)
    decode_in_int8(model.model)

From a directory:

    python recipes/int8_weights.py MODEL PROMPT

    [LLM.int8()]  Dettmers et al. 2022, LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minilora as ml

LARGEST = 127  # -128 stays unused: the codes are symmetric


def quantize_rows(W: Tensor) -> tuple[Tensor, Tensor]:
    """Return q (out, in) in int8 and σ (out) in W's dtype; a row of zeros has σ = 1."""
    scales = W.abs().amax(1) / LARGEST
    scales = torch.where(scales > 0, scales, 1)
    precise = torch.promote_types(W.dtype, torch.float32)
    q = (W.to(precise) / scales.to(precise)[:, None]).round().clamp(-LARGEST, LARGEST)
    return q.to(torch.int8), scales


def error_bound(x: Tensor, scales: Tensor) -> Tensor:
    """Return σ / 2 · ‖x‖₁, which no result differs by more from that of the dense weight: (..., in) -> (..., out)."""
    return x.abs().sum(-1, keepdim=True) * scales / 2


def int8_linear(x: Tensor, q: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Return (x qᵀ) ∘ σ + b: the definition."""
    y = F.linear(x, q.to(x.dtype)) * scales
    return y if bias is None else y + bias


def int8_linear_on_cpu(x: Tensor, q: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Return the same by PyTorch's product for int8.

    It reads 16 numbers at once. Where a row has no multiple of 16 it reads beyond it, in bfloat16 with wrong results.
    """
    y = torch.ops.aten._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), q, scales).view(*x.shape[:-1], len(q))
    return y if bias is None else y + bias


class Int8Linear(nn.Module):
    """A linear layer that holds q and σ of a weight."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        q, scales = quantize_rows(linear.weight.detach())
        self.register_buffer("q", q)
        self.register_buffer("scales", scales)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        is_fast = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float32) and x.shape[-1] % 16 == 0
        return (int8_linear_on_cpu if is_fast else int8_linear)(x, self.q, self.scales, self.bias)


def decode_in_int8(module: nn.Module) -> None:
    """Put each plain linear of a module into int8; the module cannot be trained or saved afterwards."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Int8Linear(child))


def main(path: str, prompt: str) -> None:
    model, tokenizer = ml.load_model(path), ml.load_tokenizer(path)
    decode_in_int8(model.model)
    tokens = ml.generate(model, [tokenizer.encode(prompt)], max_new_tokens=64, stop_ids=tokenizer.stop_ids)[0]
    print(tokenizer.decode(tokens))


if __name__ == "__main__":
    main(*sys.argv[1:])
