"""Initial values of an adapter other than the default, `lora.initial_factors`: drawn, or made from the weight.

PiSSA moves the main part of W into the factors; the rest stays frozen:

    W = W_res + s·B₀ A₀,   y = W_res x + s·B A x

So nothing changes at the start. W_res is never formed: the layer computes W x + s·(B A - B₀ A₀) x.

    out, in   shape of W    r  rank    s  scale of the adapter

    [LoRA]   Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models
    [PiSSA]  Meng et al. 2024, PiSSA: Principal Singular Values and Singular Vectors Adaptation of LLMs
    [OLoRA]  Büyükakyüz 2024, OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minilora.errors import ConfigError, TrainingError


def gaussian_factors(
    shape_A: Sequence[int], shape_B: Sequence[int], generator: torch.Generator, is_embedding: bool = False
) -> tuple[Tensor, Tensor]:
    """Draw A and B of a new adapter, float32 on the CPU, so that every device starts from the same numbers.

    linear:     A ~ N(0, 1/r²), B = 0, "gaussian"  [LoRA §4.1]
    embedding:  A = 0, B ~ N(0, 1), as in PEFT, also for `init_lora_weights=True`

    Shapes: shape_A (r, in), shape_B (out, r) -> shape_A, shape_B
    """
    # With a dtype, whatever torch.set_default_dtype says.
    lora_A, lora_B = (torch.zeros(*shape, dtype=torch.float32) for shape in (shape_A, shape_B))
    if is_embedding:
        lora_B.normal_(generator=generator)
    else:
        lora_A.normal_(0, 1 / shape_A[0], generator=generator)
    return lora_A, lora_B


def factors_from_weight(kind: str, weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return A₀ and B₀, the part s·B₀ A₀ of W that will be trained.

    "pissa": s·B A = U_r S_r V_rᵀ, the best of rank r: A = √(S_r/s) V_rᵀ, B = U_r √(S_r/s)  [PiSSA eq. 2-4]
    "olora": B A = Q_r R_r of W = Q R, columns of B orthonormal  [OLoRA alg. 1], for files that PEFT wrote

    OLoRA's B A is not divided by s, so s times Q_r R_r is subtracted from W, as in PEFT.

    Shapes: weight (out, in) -> (r, in), (out, r)
    Dtype: float32, or the weight's if it is wider
    """
    out, inner = weight.shape
    if r > min(out, inner):
        most = f"{kind} can give a weight of {out} x {inner} at most rank {min(out, inner)}"
        raise ConfigError(f"{most}; found r = {r}: set rank_pattern, or exclude the module")
    device = "cpu" if weight.device.type == "mps" else weight.device  # see `_linalg_svd` in docs/internals/devices.md
    W = weight.detach().to(device, torch.promote_types(weight.dtype, torch.float32))
    if not W.is_meta and not W.isfinite().all():
        raise TrainingError(f"{kind}: a weight of {tuple(W.shape)} holds numbers that are not finite")
    if kind == "olora":
        Q, R = torch.linalg.qr(W)
        return _own(R[:r]), _own(Q[:, :r])
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = (S[:r] / scale).sqrt()
    return _own(root.unsqueeze(1) * Vh[:r]), _own(U[:, :r] * root)


def _own(factor: Tensor) -> Tensor:
    """Return a contiguous copy, so that the decomposition it is a part of can be freed."""
    return factor.clone(memory_format=torch.contiguous_format)
