"""Start values made from data: from the inputs x of the adapted linears, or from the gradients G of their weights W.

    EVA      A = V_rᵀ of Σ x xᵀ = V diag(λ) Vᵀ, B = 0: where inputs are largest, a step of B changes most    [EVA §3]
    CorDA    s·B A = U_r S_r V_rᵀ C⁻¹ of W C = U S Vᵀ, C = Σ x xᵀ: the parts of W that such inputs use most  [CorDA §3]
    LoRA-GA  A = ζ V_1…rᵀ, B = ζ U_r+1…2r of G = U S Vᵀ, ζ = out^¼ / √γ: the best first step  [LoRA-GA thm. 3.1, alg. 1]

`ml.attach` subtracts s·B A from W. The losses are of the model without an adapter, each computed when it is asked for:

    losses = (token_loss(model, collate(rows, torch.device("cpu")))[0] for rows in batches)
    ml.attach(model, config, start=corda(model, config, losses))  # or lora_ga, which needs dense weights
    config, start = eva(model, config, losses)                    # EVA redistributes the ranks too

    [EVA]      Paischer et al. 2024, Parameter Efficient Fine-tuning via Explained Variance Adaptation
    [CorDA]    Yang et al. 2024, CorDA: Context-Oriented Decomposition Adaptation of Large Language Models
    [LoRA-GA]  Wang et al. 2024, LoRA-GA: Low-Rank Adaptation with Gradient Approximation
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

import minilora as ml
from minilora.adapter import layers_of

DAMPING = 0.01  # times the mean second moment, added to each: C is invertible also where inputs never go
GAMMA = 16  # γ of LoRA-GA's stable scale
RHO = 2  # how many times its own rank a layer may get from EVA
Start = dict[str, tuple[Tensor, Tensor]]


def eva(model: nn.Module, config: ml.LoraConfig, losses: Iterable[Tensor]) -> tuple[ml.LoraConfig, Start]:
    """Return A and B, and the config with their ranks, which go where λ / Σ λ of a layer is largest; α / r is kept."""
    linears, directions, shares = targets(model, config), {}, []
    for path, moment in second_moments(linears, losses).items():
        values, vectors = torch.linalg.eigh(moment)  # the largest last
        directions[path] = vectors.flip(1).T
        shares += [(share, path) for share in (values / values.sum()).flip(0)[: RHO * config.rank(path)].tolist()]
    ranks = Counter(path for _, path in sorted(shares, key=lambda each: -each[0])[: sum(map(config.rank, linears))])
    alphas = {f"^{path}": config.alpha(path) * r / config.rank(path) for path, r in ranks.items()}
    fields = {"rank_pattern": {f"^{path}": r for path, r in ranks.items()}, "alpha_pattern": alphas}
    fields |= {"target_modules": tuple(ranks), "exclude_modules": (), "layers_to_transform": None, "layers_pattern": ()}
    start = {path: (directions[path][:r], torch.zeros(linears[path].out_features, r)) for path, r in ranks.items()}
    return replace(config, **fields), start


def corda(model: nn.Module, config: ml.LoraConfig, losses: Iterable[Tensor]) -> Start:
    """Return the parts of W that the inputs use most; each factor gets √(S/s), as in PiSSA."""
    linears, start = targets(model, config), {}
    for path, moment in second_moments(linears, losses).items():
        r, C = config.rank(path), moment / moment.diagonal().mean()
        C.diagonal().add_(DAMPING)
        U, S, Vh = torch.linalg.svd(linears[path].weight.double() @ C, full_matrices=False)
        root = (S[:r] / config.scale(path)).sqrt()
        start[path] = torch.linalg.solve(C, root[:, None] * Vh[:r], left=False), U[:, :r] * root
    return start


def lora_ga(model: nn.Module, config: ml.LoraConfig, losses: Iterable[Tensor]) -> Start:
    """Return factors whose first step changes W by (s ζ)² U_2r S_2r V_2rᵀ, the best of rank 2r for the gradient."""
    linears, start = targets(model, config), {}
    trained = nn.ModuleList(linears.values()).requires_grad_(True)
    for loss in losses:
        loss.backward()
    for path, linear in linears.items():
        r, zeta = config.rank(path), linear.out_features**0.25 / GAMMA**0.5
        U, _, Vh = torch.linalg.svd(linear.weight.grad.float(), full_matrices=False)
        start[path] = zeta * Vh[:r], zeta * U[:, r : 2 * r]
    trained.requires_grad_(False).zero_grad()
    return start


def targets(model: nn.Module, config: ml.LoraConfig) -> dict[str, nn.Linear]:
    """Return the linears that `config` adapts, by path; the model is frozen."""
    ml.attach(model, config)
    linears = {path: layer.base for path, layer in layers_of(model, "default").items()}
    ml.detach(model)
    return linears


@torch.no_grad()
def second_moments(linears: dict[str, nn.Linear], losses: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return Σ x xᵀ over all rows that each linear gets, (in, in), in float64: squares halve the number of digits."""
    moments = {}

    def add(path: str, _: nn.Module, inputs: tuple[Tensor]) -> None:
        x = inputs[0].flatten(0, -2).double()
        moments[path] = moments.get(path, 0) + x.T @ x

    hooks = [linear.register_forward_pre_hook(partial(add, path)) for path, linear in linears.items()]
    for _ in losses:
        pass
    for hook in hooks:
        hook.remove()
    if missing := sorted(linears.keys() - moments.keys()):
        raise ml.TrainingError(f"no input reached {missing[:5]}; each loss must be computed when it is asked for")
    return moments
