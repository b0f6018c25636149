"""LoRA-GA: start values made from the gradients G of the weights, summed over some data.

    A = ζ V_1…rᵀ,  B = ζ U_r+1…2r  of G = U S Vᵀ,  ζ = out^¼ / √γ        [LoRA-GA thm. 3.1, alg. 1]

The first step then changes W by (s ζ)² U_2r S_2r V_2rᵀ, the best of rank 2r for a step of W itself. `ml.attach`
subtracts s·B A from W, which must be dense. The losses are of the model without an adapter, each computed when it is
asked for, so that only one graph lives at a time:

    losses = (token_loss(model, collate(rows, torch.device("cpu")))[0] for rows in batches)
    ml.attach(model, config, start=lora_ga(model, config, losses))

    [LoRA-GA]  Wang et al. 2024, LoRA-GA: Low-Rank Adaptation with Gradient Approximation
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

import minilora as ml
from minilora.adapter import layers_of

GAMMA = 16  # γ of the stable scale


def lora_ga(model: nn.Module, config: ml.LoraConfig, losses: Iterable[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B of each linear that `config` adapts, by path; the model is frozen, and no adapter is active."""
    ml.attach(model, config, "lora_ga")
    linears = {path: layer.base for path, layer in layers_of(model, "lora_ga").items()}
    ml.set_adapter(model, [])  # an adapter that the model has would act otherwise
    ml.delete_adapter(model, "lora_ga")
    trained = nn.ModuleList(linears.values()).requires_grad_(True)
    for loss in losses:
        loss.backward()
    gradients = {path: linear.weight.grad for path, linear in linears.items()}
    trained.requires_grad_(False).zero_grad()
    start = {}
    for path, G in gradients.items():
        if G is None:
            raise ml.TrainingError(f"{path}: no loss depends on its weight")
        r = config.rank(path)
        zeta = len(G) ** 0.25 / GAMMA**0.5
        U, _, Vh = torch.linalg.svd(G.float(), full_matrices=False)
        start[path] = zeta * Vh[:r], zeta * U[:, r : 2 * r]
    return start
