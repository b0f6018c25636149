"""Start values made from data: from the second moments Σ x xᵀ of the inputs x of each adapted linear.

    EVA    A = V_rᵀ of Σ x xᵀ = V diag(λ) Vᵀ, B = 0: where inputs are largest, a step of B changes most    [EVA §3]
    CorDA  s·B A = U_r S_r V_rᵀ C⁻¹ of W C = U S Vᵀ, C = Σ x xᵀ: the parts of W that such inputs use most  [CorDA §3]

`ml.attach` subtracts s·B A from W. The losses are of the model without an adapter, each computed when it is asked for:

    losses = (token_loss(model, collate(rows, torch.device("cpu")))[0] for rows in batches)
    ml.attach(model, config, start=corda(model, config, losses))
    config, start = eva(model, config, losses)  # EVA redistributes the ranks as well

    [EVA]    Paischer et al. 2024, Parameter Efficient Fine-tuning via Explained Variance Adaptation
    [CorDA]  Yang et al. 2024, CorDA: Context-Oriented Decomposition Adaptation of Large Language Models
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

import minilora as ml
from minilora.adapter import layers_of

DAMPING = 0.01  # times the mean second moment, added to each: C is invertible also where inputs never go
RHO = 2  # how many times its own rank a layer may get from EVA
Start = dict[str, tuple[Tensor, Tensor]]


def eva(model: nn.Module, config: ml.LoraConfig, losses: Iterable[Tensor]) -> tuple[ml.LoraConfig, Start]:
    """Return A and B, and the config with their ranks, which go where λ / Σ λ of a layer is largest."""
    linears, directions, shares = targets(model, config), {}, []
    for path, moment in second_moments(linears, losses).items():
        values, vectors = torch.linalg.eigh(moment)  # the largest last
        directions[path] = vectors.flip(1).T
        largest = (values / values.sum()).flip(0)[: RHO * config.rank(path)]
        shares += [(share, path) for share in largest.tolist()]
    shares.sort(key=lambda each: each[0], reverse=True)
    budget = sum(config.rank(path) for path in linears)
    ranks = Counter(path for _, path in shares[:budget])
    start = {path: (directions[path][:r], torch.zeros(linears[path].out_features, r)) for path, r in ranks.items()}
    return with_ranks(config, ranks), start


def with_ranks(config: ml.LoraConfig, ranks: Mapping[str, int]) -> ml.LoraConfig:
    """Return a config with these paths and ranks; α / r is kept."""
    alphas = {path: config.alpha(path) * r / config.rank(path) for path, r in ranks.items()}
    return replace(
        config,
        target_modules=tuple(ranks),
        exclude_modules=(),
        layers_to_transform=None,
        layers_pattern=(),
        rank_pattern={f"^{path}": r for path, r in ranks.items()},
        alpha_pattern={f"^{path}": alpha for path, alpha in alphas.items()},
    )


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


def targets(model: nn.Module, config: ml.LoraConfig) -> dict[str, nn.Linear]:
    """Return the linears that `config` adapts, by path; the model is frozen, and no adapter is active."""
    ml.attach(model, config, "targets")
    linears = {path: layer.base for path, layer in layers_of(model, "targets").items()}
    ml.set_adapter(model, [])  # an adapter that the model has would act otherwise
    ml.delete_adapter(model, "targets")
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
