"""Start values made from data: from the inputs of the layers, or from the gradients of their weights.

The data are given as losses of the model, each computed when it is asked for, while hooks watch the layers:

    (loss(model, batch) for batch in batches)

EVA takes the directions in which a layer's inputs x are largest, where a step of B changes most. CorDA decomposes W
weighted by these inputs, and moves its first parts into the factors. LoRA-GA decomposes the gradient G of W, so that
the first step of A and B is the best that rank 2r can do for a step of W. All rows that a layer gets count, also rows
of padding.

    N  rows of x    out, in  shape of W    r  rank    s  scale of the adapter

    [EVA]      Paischer et al. 2024, Parameter Efficient Fine-tuning via Explained Variance Adaptation
    [CorDA]    Yang et al. 2024, CorDA: Context-Oriented Decomposition Adaptation of Large Language Models
    [LoRA-GA]  Wang et al. 2024, LoRA-GA: Low-Rank Adaptation with Gradient Approximation
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from minilora.adapters.config import LoraConfig
from minilora.adapters.initialize import balanced, check_rank, randomized_svd, wide
from minilora.errors import ConfigError, TrainingError
from minilora.lora import AdapterLinear
from minilora.models.shard import whole_weight

FROM_DATA = ("eva", "corda", "lora_ga")
DAMPING = 0.01  # times the mean second moment, added to each: C is invertible also where inputs never go
GAMMA = 16  # γ of LoRA-GA's stable scale
ITERATIONS = 4  # power iterations for the gradient, as published
RHO = 2  # how many times its own rank a layer may get from EVA


def data_factors(
    kind: str,
    model: nn.Module,
    layers: Mapping[str, AdapterLinear],
    config: LoraConfig,
    losses: Iterable[Tensor],
    generator: torch.Generator,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B for each layer, by its path: a wrapper of a linear, which need not be in the model.

    "eva":     A has the first directions of the inputs, B = 0; ranks are redistributed (`redistribute`),
               and layers whose rank becomes 0 are left out  [EVA §3]
    "corda":   `corda_factors`, a part of W that has to be subtracted from it
    "lora_ga": `gradient_factors`, which have to be subtracted from W, too

    The model is left as it was: parameters, gradients, `requires_grad`, and train or eval mode, which the caller
    chooses. The value of the loss matters to LoRA-GA only, which calls its `backward`. The generator is for the
    randomized decomposition of gradients.

    Raises:
        ConfigError: a rank that a weight cannot have; a loss without a gradient.
        TrainingError: no input reached a layer, or inputs or gradients are not finite.
    """
    for path, layer in layers.items() if kind != "eva" else ():
        (r, inner), (out, _) = layer.shapes(layer.base, config.rank(path))
        check_rank(f"{path}: {kind}", (out, inner), r, 2 if kind == "lora_ga" else 1)
    modules = {path: model.get_submodule(path) for path in layers}
    sums = _gradients(model, modules, losses) if kind == "lora_ga" else _second_moments(modules, losses)
    if lacking := [path for path in layers if path not in sums or not sums[path].any()]:
        raise TrainingError(
            f"{lacking[:5]} saw nothing but zeros. Start values from data need losses= that are computed when they "
            "are asked for, (loss(model, batch) for batch in batches), and batches that reach every layer"
        )
    if bad := [path for path in layers if not sums[path].isfinite().all()]:
        raise TrainingError(f"{bad[:5]}: their inputs or gradients are not finite")
    if kind == "lora_ga":
        return {path: gradient_factors(sums[path], config.rank(path), generator) for path in layers}
    if kind == "corda":
        factors = {}
        for path, layer in layers.items():
            weight = wide(layer.as_matrix(whole_weight(layer.base)))
            factors[path] = corda_factors(weight, sums[path], config.rank(path), config.scale(path))
        return factors
    return _eva_factors(layers, config, sums)


def _eva_factors(
    layers: Mapping[str, AdapterLinear], config: LoraConfig, moments: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    directions, shares = {}, {}
    for path in layers:
        vectors, values = principal_directions(moments[path])
        directions[path] = vectors[:, : RHO * config.rank(path)].T.contiguous()
        shares[path] = values / values.sum()
    ranks = redistribute(shares, {path: config.rank(path) for path in layers})
    factors = {}
    for path, r in ranks.items():
        if r > 0:
            _, (out, _) = layers[path].shapes(layers[path].base, r)
            factors[path] = directions[path][:r].clone(), directions[path].new_zeros(out, r)
    return factors


def principal_directions(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return V and λ of Σ x xᵀ = V diag(λ) Vᵀ, λ falling: right-singular vectors and squared values of all inputs.

    EVA's A = V_rᵀ makes the expected gradient of B largest  [EVA thm. 3.1, 3.2]. That gradient is dy (A x)ᵀ, whose size
    depends on x itself, so nothing is centred; PEFT's incremental PCA subtracts the mean.

    Shapes: moment (in, in) -> (in, in), (in)
    """
    values, vectors = torch.linalg.eigh(moment)
    return vectors.flip(1), values.flip(0).clamp(min=0)


def redistribute(shares: Mapping[str, Tensor], ranks: Mapping[str, int]) -> dict[str, int]:
    """Spend the sum of all ranks where a direction has the largest share of its layer's λ  [EVA §3].

    No layer gets more than `RHO` times its rank. Among equal shares, as of layers with the same inputs, the first wins.

    >>> redistribute({"q": torch.tensor([0.5, 0.3, 0.2]), "v": torch.tensor([0.9, 0.1])}, {"q": 1, "v": 1})
    {'q': 1, 'v': 1}
    """
    found = [(share, path) for path, each in shares.items() for share in each[: RHO * ranks[path]].tolist()]
    best = sorted(found, key=lambda pair: -pair[0])[: sum(ranks.values())]
    counts = Counter(path for _, path in best)
    return {path: counts[path] for path in ranks}


def redistributed(config: LoraConfig, ranks: Mapping[str, int]) -> LoraConfig:
    """Return the config for these layers with these ranks, as PEFT writes it: with α · (new rank) / (old rank)."""
    alphas = {path: config.alpha(path) * r / config.rank(path) for path, r in ranks.items()}
    return replace(
        config,
        target_modules=tuple(ranks),
        exclude_modules=(),
        layers_to_transform=None,
        layers_pattern=(),
        rank_pattern={f"^{path}": r for path, r in ranks.items() if r != config.r},
        alpha_pattern={f"^{path}": alpha for path, alpha in alphas.items() if alpha != config.lora_alpha},
    )


def corda_factors(weight: Tensor, moment: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return s·B A = U_r S_r V_rᵀ C⁻¹ of W C = U S Vᵀ, the parts of W that such inputs use most  [CorDA §3].

    C are the second moments of the inputs, here with a mean of 1 on the diagonal. The mean cancels in B A and only
    divides it between the two: with inputs alike in all directions the factors are PiSSA's. Of the published modes this
    is the one that trains the first parts ("instruction-previewed").

    Shapes: weight (out, in), moment (in, in) -> (r, in), (out, r)
    """
    C = moment / moment.diagonal().mean()
    C.diagonal().add_(DAMPING)
    C /= 1 + DAMPING
    lora_A, lora_B = balanced(*torch.linalg.svd(weight.to(C.dtype) @ C, full_matrices=False), r=r, scale=scale)
    return torch.cholesky_solve(lora_A.T, torch.linalg.cholesky(C)).T.contiguous(), lora_B


def gradient_factors(gradient: Tensor, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return A = ζ V_1…rᵀ, B = ζ U_r+1…2r of G = U S Vᵀ, ζ = out^¼ / √γ  [LoRA-GA thm. 3.1, alg. 1].

    A first step of A and B changes W by s²(G Aᵀ A + B Bᵀ G) = (s ζ)² U_2r S_2r V_2rᵀ, the best of rank 2r for G. ζ
    keeps the size of the adapter's output independent of the shape  [LoRA-GA thm. 3.2]. PEFT leaves ζ out of A and
    multiplies B by the singular values: that is another step, which depends on the scale of the loss.

    Shapes: gradient (out, in) -> (r, in), (out, r)
    """
    zeta = gradient.size(0) ** 0.25 / GAMMA**0.5
    U, _, Vh = randomized_svd(gradient, 2 * r, ITERATIONS, generator)
    return zeta * Vh[:r].contiguous(), zeta * U[:, r : 2 * r].contiguous()


def _second_moments(modules: Mapping[str, nn.Module], losses: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return Σ x xᵀ over all rows that each module gets, (in, in)."""
    moments: dict[str, Tensor] = {}

    def add(path: str, x: Tensor, y: Tensor) -> None:
        _add_product(moments, path, x, x)

    with _watched(modules, add), torch.no_grad():
        for _ in losses:
            pass
    return moments


def _gradients(model: nn.Module, modules: Mapping[str, nn.Module], losses: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return Σ dyᵀ x, the gradient of each module's weight, (out, in).

    It is computed from x and dy, so a packed weight has one, too, and no parameter needs a gradient.
    """
    gradients: dict[str, Tensor] = {}
    anchor = torch.zeros((), requires_grad=True)  # makes an output need a gradient that would need none
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def tap(path: str, x: Tensor, y: Tensor) -> Any:
        add = functools.partial(_add_product, gradients, path)
        return _Tap.apply(y, x, None if y.requires_grad else anchor, add)

    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with _watched(modules, tap), torch.enable_grad():
            for loss in losses:
                if not loss.requires_grad:
                    raise ConfigError("lora_ga: a loss has no gradient; it must be computed when it is asked for")
                loss.backward()
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return gradients


class _Tap(torch.autograd.Function):
    """Return y unchanged; in the backward pass, call `add` with dy and x."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, anchor: Tensor | None, add: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.add = add
        ctx.save_for_backward(x)
        return y.clone()  # the model could not change a view of y in place

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ctx.add(dy, ctx.saved_tensors[0])
        return dy, None, None, None


@contextmanager
def _watched(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor, Tensor], Tensor | None]) -> Iterator[None]:
    """Call `see` with path, x and y after each call of a module; the tensor that it returns, if any, replaces y."""

    def hook(path: str) -> Callable[..., Tensor | None]:
        return lambda module, inputs, named, y: see(path, inputs[0] if inputs else next(iter(named.values())), y)

    with ExitStack() as hooks:
        for path, module in modules.items():
            hooks.enter_context(module.register_forward_hook(hook(path), with_kwargs=True))
        yield


def _add_product(sums: dict[str, Tensor], path: str, left: Tensor, right: Tensor) -> None:
    """Add Σ leftᵀ right over all rows to sums[path]: (..., P), (..., Q) -> (P, Q)."""
    left = wide(left).reshape(-1, left.size(-1))
    right = right.detach().reshape(-1, right.size(-1)).to(left.dtype)
    if path in sums:
        sums[path].addmm_(left.T, right)
    else:
        sums[path] = left.T @ right
