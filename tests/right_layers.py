"""Right layers as other projects write them, which the laws must not refuse."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from minilora.testing.implementations import LoRALayer


def linear(W, b):
    base = nn.Linear(W.shape[1], W.shape[0], bias=b is not None, dtype=W.dtype).requires_grad_(False)
    base.load_state_dict({"weight": W} if b is None else {"weight": W, "bias": b})
    return base


class MergingInEvaluation(nn.Module):
    """As loralib: eval() adds the update to the weight, train() subtracts it."""

    def __init__(self, W, b, A, B, alpha, dropout=0.0):
        super().__init__()
        self.weight = nn.Parameter(W.clone(), requires_grad=False)
        self.b, self.scaling, self.is_merged = b, alpha / len(A), False
        self.lora_A, self.lora_B = nn.Parameter(A.detach().clone()), nn.Parameter(B.detach().clone())
        self.lora_dropout = nn.Dropout(dropout)

    def train(self, mode=True):
        if self.is_merged == mode:
            self.weight.data += (-1 if mode else 1) * self.lora_B.detach() @ self.lora_A.detach() * self.scaling
            self.is_merged = not mode
        return super().train(mode)

    def forward(self, x):
        y = F.linear(x, self.weight, self.b)
        return y if self.is_merged else y + self.lora_dropout(x) @ self.lora_A.T @ self.lora_B.T * self.scaling


class OfLinears(nn.Module):
    """As torchtune: A and B are linears without a bias."""

    def __init__(self, W, b, A, B, alpha, dropout=0.0, use_rslora=False):
        super().__init__()
        self.base, self.lora_a, self.lora_b = linear(W, b), linear(A.detach(), None), linear(B.detach(), None)
        self.lora_a.requires_grad_(), self.lora_b.requires_grad_()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.scaling = alpha / math.sqrt(len(A)) if use_rslora else alpha / len(A)

    def forward(self, x):
        return self.base(x) + self.scaling * self.lora_b(self.lora_a(self.dropout(x)))


class Fused(nn.Module):
    """As a fused projection of queries, keys and values, each of which has its rows of B."""

    def __init__(self, W, b, A, B, alpha, dropout=0.0):
        super().__init__()
        self.qkv, self.A, self.p = linear(W, b), nn.Parameter(A.detach().clone()), dropout
        self.B = nn.ParameterList(chunk.detach().clone() for chunk in B.tensor_split(3))
        self.alpha, self.r = alpha, len(A)

    def forward(self, x):
        h = F.linear(F.dropout(x, self.p, self.training), self.A)
        return self.qkv(x) + torch.cat([F.linear(h, chunk) for chunk in self.B], dim=-1) * self.alpha / self.r


class Transposed(nn.Module):
    """As MLX: x a b, of matrices (in, r) and (r, out); its mask is drawn by hand."""

    def __init__(self, W, b, A, B, alpha, dropout=0.0):
        super().__init__()
        self.base, self.p, self.scale = linear(W, b), dropout, alpha / len(A)
        self.a, self.b = nn.Parameter(A.detach().T.contiguous()), nn.Parameter(B.detach().T.contiguous())

    def forward(self, x):
        mask = (torch.rand_like(x) >= self.p).to(x) / (1 - self.p) if self.training and self.p else 1
        return self.base(x) + (self.scale * ((x * mask) @ self.a) @ self.b).to(x.dtype)


class Update(nn.Module):
    def __init__(self, A, B, scale):
        super().__init__()
        self.A, self.B, self.scale = nn.Parameter(A.detach().clone()), nn.Parameter(B.detach().clone()), scale

    def forward(self, W):
        return W + self.scale * self.B @ self.A


def parametrized(W, b, A, B, alpha):
    """As minLoRA: the weight of a linear is W + s·B A."""
    layer = linear(W, b)
    parametrize.register_parametrization(layer, "weight", Update(A, B, alpha / len(A)))
    return layer


def closure(W, b, A, B, alpha, use_dora=False):
    """A function that keeps copies."""
    W, A, B = W.clone(), *(each.detach().clone().requires_grad_() for each in (A, B))
    s = alpha / len(A)
    if not use_dora:
        return lambda x: x @ W.T + (x @ (A.T * s)) @ B.T + (0 if b is None else b)
    m = W.norm(dim=1).requires_grad_()

    def dora(x):
        adapted = W + s * B @ A
        return F.linear(x, (m / adapted.detach().norm(dim=1))[:, None] * adapted, b)

    return dora


class Backward(torch.autograd.Function):
    """As Unsloth: gradients by hand, of rows."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x, W, b, A, B, s):
        ctx.save_for_backward(x, W, A, B)
        ctx.s = s
        return F.linear(x, W, b) + s * (x @ A.T @ B.T)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, dy):
        x, W, A, B = ctx.saved_tensors
        rows, dys, s = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]), ctx.s
        dh = s * (dys @ B)
        return (dys @ W + dh @ A).reshape(x.shape), None, None, dh.T @ rows, s * (dys.T @ (rows @ A.T)), None


class ByHand(LoRALayer):
    def forward(self, x):
        if self.p and self.training:
            return super().forward(x)
        return Backward.apply(x, self.W, self.b, self.A, self.B, self.scale)


class Wide(LoRALayer):
    """Factors and their product in float32 at least, as PEFT keeps them."""

    def __init__(self, W, b, A, B, *rest, **options):
        wide = torch.promote_types(A.dtype, torch.float32)
        super().__init__(W, b, A.to(wide), B.to(wide), *rest, **options)

    def forward(self, x):
        dropped = F.dropout(x.to(self.A.dtype), self.p, self.training)
        update = self.scale * F.linear(F.linear(dropped, self.A), self.B)
        return F.linear(x, self.W, self.b) + update.to(x.dtype)


class Recomputing(LoRALayer):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False) if torch.is_grad_enabled() else super().forward(x)


class Caching(LoRALayer):
    """Keep the merged weight in evaluation mode until a tensor changes."""

    def forward(self, x):
        if self.training:
            return super().forward(x)
        versions = [(id(each), each._version) for each in (self.W, self.A, self.B)]
        if vars(self).get("versions") != versions:
            vars(self).update(versions=versions, merged=(self.W + self.scale * self.B @ self.A).detach())
        return F.linear(x, vars(self)["merged"], self.b)


class InOneProduct(LoRALayer):
    def forward(self, x):
        h = self.scale * F.linear(F.dropout(x, self.p, self.training), self.A)
        return F.linear(torch.cat([x, h], dim=-1), torch.cat([self.W, self.B], dim=1), self.b)


class DoraOfDifferences(LoRALayer):
    """As PEFT without its dropout: what is added to the base."""

    def forward(self, x):
        y = F.linear(x, self.W, self.b)
        c = self.m / (self.W + self.scale * self.B @ self.A).detach().norm(dim=1)
        update = self.scale * F.linear(F.linear(F.dropout(x, self.p, self.training), self.A), self.B)
        return y + (c - 1) * (y - (0 if self.b is None else self.b)) + c * update


RIGHT = {
    "lora": (
        *(MergingInEvaluation, OfLinears, Fused, Transposed, parametrized, closure),
        *(ByHand, Wide, Recomputing, Caching, InOneProduct),
    ),
    "rslora": (OfLinears,),
    "dora": (closure, DoraOfDifferences, Recomputing),
}
