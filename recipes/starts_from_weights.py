"""Start values made from the weights: OLoRA from a QR decomposition of W, LoftQ from what four bits lose of it.

    OLoRA    W = W_res + s·B₀ A₀,  B₀ A₀ = Q_r R_r of W = Q R; the columns of B₀ are orthonormal   [OLoRA alg. 1]
    LoftQ    W ≈ Q + s·B A,  Q = nf4(W),  s·B A = U_r S_r V_rᵀ of W - Q = U S Vᵀ                    [LoftQ alg. 1]

OLoRA's B₀ A₀ is not divided by s, so s times it is subtracted from W, as in PEFT; the new adapter changes nothing.
LoftQ replaces the linears by 4-bit ones and makes good a part of the rounding. The paper may repeat its two steps;
like PEFT, this takes them once. Its A and B are divided by √s each, which PEFT omits:

    ml.attach(model, config, start=olora(model, config))
    attach_loftq(model, config)  # of a dense model; save it with ml.save_adapter, and load it on quantize="nf4"

    [OLoRA]  Büyükakyüz 2024, OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models
    [LoftQ]  Li et al. 2023, LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models
"""

import torch
from torch import Tensor, nn

import minilora as ml
from minilora.adapter import layers_of, replace_modules
from minilora.nf4 import NF4Linear


def olora(model: nn.Module, config: ml.LoraConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A₀ and B₀ of each linear that `config` adapts, by path, for `ml.attach(…, start=…)`."""
    start = {}
    for path, linear in targets(model, config).items():
        Q, R = torch.linalg.qr(linear.weight.float())
        r = config.rank(path)
        start[path] = R[:r], Q[:, :r]
    return start


def attach_loftq(model: nn.Module, config: ml.LoraConfig, name: str = "default") -> None:
    """Replace each linear that `config` adapts by nf4(W), and attach an adapter that is nearest to what is lost."""
    linears = targets(model, config)
    packed = {path: NF4Linear.quantize(linear.weight, linear.bias) for path, linear in linears.items()}
    replace_modules(model, [(linear, packed[path]) for path, linear in linears.items()])
    ml.attach(model, config, name)
    for path, layer in layers_of(model, name).items():
        adapter, lost = layer.adapters[name], linears[path].weight.float() - packed[path].weight.float()
        lora_A, lora_B = best_factors(lost / adapter.scale, config.rank(path))
        adapter.lora_A.data.copy_(lora_A)
        adapter.lora_B.data.copy_(lora_B)


def best_factors(M: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return A = √S_r V_rᵀ and B = U_r √S_r, whose product is the best approximation of rank r to M = U S Vᵀ.

    Shapes: M (out, in) -> (r, in), (out, r)
    """
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    root = S[:r].sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


def targets(model: nn.Module, config: ml.LoraConfig) -> dict[str, nn.Linear]:
    """Return the linears that `config` adapts, by path; the model is frozen, and no adapter is active."""
    ml.attach(model, config, "targets")
    linears = {path: layer.base for path, layer in layers_of(model, "targets").items()}
    ml.set_adapter(model, [])  # an adapter that the model has would act otherwise
    ml.delete_adapter(model, "targets")
    return linears
