"""Start values made from the weight, by decomposing it.

A part of W, the one that matters most, moves into the factors and is trained; what is left stays frozen:

    W = W_res + s·B₀ A₀,   y = W_res x + s·B A x

so that nothing has changed at the start. W_res is never formed: the layer computes W x + s·(B A - B₀ A₀) x, from the
factors as they are, rounded or not.

    out, in   shape of W    r  rank    s  scale of the adapter

    [PiSSA]  Meng et al. 2024, PiSSA: Principal Singular Values and Singular Vectors Adaptation of LLMs
    [OLoRA]  Büyükakyüz 2024, OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models
    [LoftQ]  Li et al. 2023, LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models
    [Halko]  Halko et al. 2011, Finding Structure with Randomness
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from minilora.errors import ConfigError, TrainingError
from minilora.nf4 import Layout, NF4Linear, pack

OVERSAMPLING = 10  # columns more than asked for  [Halko §4.2]


def moved_factors(kind: str, weight: Tensor, r: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A₀ and B₀, the part s·B₀ A₀ of W that is to be trained.

    "pissa":         s·B A = U_r S_r V_rᵀ, the best of rank r, shared evenly (`balanced`)  [PiSSA eq. 2-4]
    "pissa_niter_N": the same by a randomized SVD with N power iterations (`randomized_svd`)
    "olora":         B A = Q_r R_r of W = Q R, columns of B orthonormal  [OLoRA alg. 1]

    OLoRA's B A is not divided by s, so what is taken off W is s times Q_r R_r, as PEFT does.

    Shapes: weight (out, in) -> (r, in), (out, r)
    Dtype: float32, or the weight's if it is wider
    Raises:
        ConfigError: another kind, or W has no rank of r.
        TrainingError: W is not finite.
    """
    check_rank(kind, weight.shape, r)
    W = wide(weight)
    if not W.is_meta and not W.isfinite().all():
        raise TrainingError(f"{kind}: a weight of {tuple(W.shape)} holds numbers that are not finite")
    if kind == "olora":
        Q, R = torch.linalg.qr(W)
        return _own(R[:r]), _own(Q[:, :r])
    if kind == "pissa":
        return balanced(*torch.linalg.svd(W, full_matrices=False), r=r, scale=scale)
    if found := re.fullmatch(r"pissa_niter_(\d+)", kind):
        return balanced(*randomized_svd(W, r, int(found[1]), generator), r=r, scale=scale)
    raise ConfigError(f"init_lora_weights is {kind!r}, accepted are 'pissa', 'pissa_niter_N' and 'olora'")


def loftq_factors(
    weight: Tensor,
    r: int,
    scale: float,
    bias: Tensor | None = None,
    double_quant: bool = True,
) -> tuple[Tensor, Tensor, NF4Linear]:
    """A, B and the base Q in four bits, such that Q + s·B A is near W  [LoftQ alg. 1].

    Q = nf4(W), then s·B A = the best approximation of rank r to W - Q, where Q is what the layer computes with. The
    paper may repeat both steps; like PEFT, this takes them once.

    Shapes: weight (out, in), bias (out) -> (r, in), (out, r)
    Dtype: float32, or the weight's if it is wider; the base computes in that of the weight
    Raises:
        ConfigError: W has no rank of r.
        TrainingError: a weight is not finite.
    """
    check_rank("loftq", weight.shape, r)
    W = wide(weight)
    base = NF4Linear(pack(W, double_quant), Layout((W.size(0), W.size(1)), weight.dtype), bias, weight.dtype)
    lora_A, lora_B = balanced(*torch.linalg.svd(W - base.weight, full_matrices=False), r=r, scale=scale)
    return lora_A, lora_B, base


def balanced(U: Tensor, S: Tensor, Vh: Tensor, *, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """A = √(S_r/s) V_rᵀ, B = U_r √(S_r/s): s·B A = U_r S_r V_rᵀ, of which both get the same part  [PiSSA eq. 2, 3].

    Shapes: U (out, k), S (k), Vh (k, in), k ≥ r -> (r, in), (out, r)
    """
    root = (S[:r] / scale).sqrt()
    return _own(root.unsqueeze(1) * Vh[:r]), _own(U[:, :r] * root)


def randomized_svd(M: Tensor, r: int, iterations: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and Vᵀ of the r largest singular values of M, and of a few more, nearly.

    Q, an orthonormal basis of (M Mᵀ)^N M Ω for a random Ω with a few columns more than r, has nearly all that M does
    along its first singular vectors, the more so the larger N  [Halko alg. 4.4]. Then M ≈ Q (Qᵀ M), and Qᵀ M is small
    enough for an SVD  [Halko alg. 5.1].

    Shapes: M (out, in) -> (out, k), (k), (k, in), k = r + 10 or as many as there are
    """
    columns = min(r + OVERSAMPLING, *M.shape)
    omega = torch.randn(M.size(1), columns, generator=generator, dtype=M.dtype).to(M.device)
    Q = torch.linalg.qr(M @ omega).Q
    for _ in range(iterations):  # orthonormal after every product, or rounding leaves only the first vector
        Q = torch.linalg.qr(M.T @ Q).Q
        Q = torch.linalg.qr(M @ Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ M, full_matrices=False)
    return Q @ U, S, Vh


def check_rank(what: str, shape: Sequence[int], r: int, times: int = 1) -> None:
    """A decomposition has no more parts than W has rows or columns.

    Raises:
        ConfigError: `times` · r are more.
    """
    if times * r > min(shape):
        raise ConfigError(
            f"{what} can give a weight of {shape[0]} x {shape[1]} at most rank {min(shape) // times}; found r = {r}: "
            "set rank_pattern, or exclude the module"
        )


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least, without a gradient."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _own(factor: Tensor) -> Tensor:
    """Row by row in memory of its own: the decomposition that it is a part of can go."""
    return factor.clone(memory_format=torch.contiguous_format)
