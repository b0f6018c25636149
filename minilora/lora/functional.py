"""The equations of LoRA, as pure functions of tensors.

A frozen linear y = W x + b is changed by a product of two thin matrices, scaled by a number s:

    y = (W + s·B A) x + b,    A (r, in),  B (out, r),  r ≪ in, out

    N  rows of x

    [LoRA]    Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models
    [rsLoRA]  Kalajdzievski 2023, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA
    [Dropout] Srivastava et al. 2014, Dropout: A Simple Way to Prevent Neural Networks from Overfitting
"""

from __future__ import annotations

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_scale(r: int, lora_alpha: float, use_rslora: bool = False) -> float:
    """s = α/r  [LoRA §4.1], or s = α/√r  [rsLoRA, abstract], which keeps the size of the update as r grows.

    >>> lora_scale(16, 32), lora_scale(16, 32, use_rslora=True)
    (2.0, 8.0)
    """
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def lora_branch(x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """Δy = s·(x Aᵀ) Bᵀ  [LoRA eq. 3].

    Scaled in the middle, where a row has r numbers and not `out`.

    Shapes: x (N, in), lora_A (r, in), lora_B (out, r) -> (N, out)
    """
    return F.linear(scale * F.linear(x, lora_A), lora_B)


def lora_delta(lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """ΔW = s·B A  [LoRA eq. 3].

    Shapes: lora_A (r, in), lora_B (out, r) -> (out, in)
    """
    return scale * (lora_B @ lora_A)


def keyed_dropout(x: Tensor, p: float, key: str) -> Tensor:
    """x ∘ mask/(1-p),  mask ~ Bernoulli(1-p)  [Dropout §4].

    The mask is a function of the key, the shape and the kind of device. No global random state is read or moved:
    recomputing a layer, resuming a run or another order of layers draws the same mask.

    Shapes: x (N, in) -> (N, in)
    """
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "little")
    generator = torch.Generator(x.device).manual_seed(seed)
    keep = torch.empty_like(x).bernoulli_(1 - p, generator=generator)
    return x * keep / (1 - p)
