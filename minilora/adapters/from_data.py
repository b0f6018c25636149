"""Start values made from data: from what layers see, or from the gradients of their weights.

The data come as losses of the model, each computed when it is asked for, so that the layers can be watched meanwhile:

    (loss(model, batch) for batch in batches)

EVA looks along which directions a layer's inputs x are largest: there a step of B does most. CorDA decomposes W as
these inputs weigh it, and moves its first parts into the factors. LoRA-GA decomposes the gradient G of W, so that the
first step of A and B is the best that rank 2r can do for a step of W.

What a layer is given is what is counted: rows of padding, too, if the model has them.

    N  rows of x    out, in  shape of W    r  rank    s  scale of the adapter

    [EVA]      Paischer et al. 2024, Parameter Efficient Fine-tuning via Explained Variance Adaptation
    [CorDA]    Yang et al. 2024, CorDA: Context-Oriented Decomposition Adaptation of Large Language Models
    [LoRA-GA]  Wang et al. 2024, LoRA-GA: Low-Rank Adaptation with Gradient Approximation
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minilora.adapters.config import LoraConfig
from minilora.adapters.initialize import balanced, check_rank, randomized_svd, wide
from minilora.errors import ConfigError, TrainingError

FROM_DATA = ("eva", "corda", "lora_ga")
DAMPING = 0.01  # of the mean second moment, added to each: C has an inverse also where inputs never go
GAMMA = 16  # γ of LoRA-GA's stable scale
ITERATIONS = 4  # power iterations for the gradient, as published
RHO = 2  # how many times its own rank a layer may get from EVA


class Target(NamedTuple):
    """A linear map of a model, to be adapted.

    Attributes:
        module: what the model calls with x, (..., in) -> (..., out).
        shape: of W, (out, in).
        weight: gives W; it is asked when W is needed, which is for CorDA only, one layer at a time.
        r: rank of the adapter.
        scale: s.
    """

    module: nn.Module
    shape: tuple[int, int]
    weight: Callable[[], Tensor]
    r: int
    scale: float


def data_factors(
    kind: str,
    model: nn.Module,
    targets: Mapping[str, Target],
    losses: Iterable[Tensor],
    generator: torch.Generator,
) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B for each target, by its path.

    "eva":     A are the first directions of the inputs, B = 0; ranks are redistributed (`redistribute`),
               so that A says which rank a layer has, and those that got none are left out  [EVA §3]
    "corda":   `corda_factors`. They begin with a part of W, which is to be subtracted
    "lora_ga": `gradient_factors`. These, too

    The model is as it was when this ends: parameters, gradients, what is trained, and its mode, train or eval, which is
    the caller's choice. The loss itself matters to LoRA-GA only.

    Args:
        kind: which of the three.
        model: what the losses come from.
        targets: what is to be adapted.
        losses: each computed when it is asked for; LoRA-GA calls `backward` on it.
        generator: of the randomized decomposition of gradients.

    Raises:
        ConfigError: another kind; a weight has not such a rank; a loss comes without a gradient.
        TrainingError: no input reached a layer, or what did is not finite.
    """
    if kind not in FROM_DATA:
        raise ConfigError(f"init_lora_weights is {kind!r}, accepted are {list(FROM_DATA)}")
    for path, target in targets.items() if kind != "eva" else ():
        check_rank(f"{path}: {kind}", target.shape, target.r, 2 if kind == "lora_ga" else 1)
    if kind == "lora_ga":
        gradients = _seen(targets, _gradients(model, targets, losses))
        return {path: gradient_factors(gradients[path], target.r, generator) for path, target in targets.items()}
    moments = _seen(targets, _second_moments(targets, losses))
    if kind == "eva":
        return _eva_factors(targets, moments)
    return {path: corda_factors(wide(t.weight()), moments[path], t.r, t.scale) for path, t in targets.items()}


# --- what becomes of what was seen ---


def principal_directions(moment: Tensor) -> tuple[Tensor, Tensor]:
    """V and λ of Σ x xᵀ = V diag(λ) Vᵀ, falling: the right-singular vectors of all inputs X and its squared values.

    EVA's A = V_rᵀ makes the expected gradient of B largest  [EVA thm. 3.1, 3.2]. That gradient is dy (A x)ᵀ, whose size
    counts x as it is, so nothing is centred; PEFT's incremental PCA takes the mean off.

    Shapes: moment (in, in) -> (in, in), (in)
    """
    values, vectors = torch.linalg.eigh(moment)
    return vectors.flip(1), values.flip(0).clamp(min=0)


def redistribute(shares: Mapping[str, Tensor], ranks: Mapping[str, int]) -> dict[str, int]:
    """The ranks of all layers together, spent where a direction has the largest share of its layer's λ  [EVA §3].

    No layer gets more than `RHO` times what it had. Of equal shares, as of layers with the same inputs, the first one
    counts.

    >>> redistribute({"q": torch.tensor([0.5, 0.3, 0.2]), "v": torch.tensor([0.9, 0.1])}, {"q": 1, "v": 1})
    {'q': 1, 'v': 1}
    """
    found = [(share, path) for path, all_of_it in shares.items() for share in all_of_it[: RHO * ranks[path]].tolist()]
    best = sorted(found, key=lambda pair: -pair[0])[: sum(ranks.values())]
    counts = Counter(path for _, path in best)
    return {path: counts[path] for path in ranks}


def redistributed(config: LoraConfig, ranks: Mapping[str, int]) -> LoraConfig:
    """The config that means these layers with these ranks, as PEFT writes it: with α · (new rank) / (old rank)."""
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
    """s·B A = U_r S_r V_rᵀ C⁻¹ of W C = U S Vᵀ, the parts of W that such inputs use most  [CorDA §3].

    C are the second moments of the inputs, here with a mean of 1 on the diagonal. That cancels in B A and only says how
    the two share it: with inputs alike in all directions these are PiSSA's. Of the published modes this is the one that
    trains the first parts ("instruction-previewed").

    Shapes: weight (out, in), moment (in, in) -> (r, in), (out, r)
    """
    C = moment / moment.diagonal().mean()
    C.diagonal().add_(DAMPING)
    C /= 1 + DAMPING
    lora_A, lora_B = balanced(*torch.linalg.svd(weight.to(C.dtype) @ C, full_matrices=False), r=r, scale=scale)
    return torch.cholesky_solve(lora_A.T, torch.linalg.cholesky(C)).T.contiguous(), lora_B


def gradient_factors(gradient: Tensor, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A = ζ V_1…rᵀ, B = ζ U_r+1…2r of G = U S Vᵀ, ζ = out^¼ / √γ  [LoRA-GA thm. 3.1, alg. 1].

    A first step of A and B goes along s²(G Aᵀ A + B Bᵀ G) = (s ζ)² U_2r S_2r V_2rᵀ, the best of rank 2r for G. ζ keeps
    the adapter's output the same size whatever the shape  [LoRA-GA thm. 3.2]. PEFT leaves ζ out of A and multiplies B
    by the singular values: that is another step, and one that depends on the scale of the loss.

    Shapes: gradient (out, in) -> (r, in), (out, r)
    """
    zeta = gradient.size(0) ** 0.25 / GAMMA**0.5
    U, _, Vh = randomized_svd(gradient, 2 * r, ITERATIONS, generator)
    return zeta * Vh[:r].contiguous(), zeta * U[:, r : 2 * r].contiguous()


def _eva_factors(targets: Mapping[str, Target], moments: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    directions, shares = {}, {}
    for path, moment in moments.items():
        vectors, values = principal_directions(moment)
        directions[path] = vectors[:, : RHO * targets[path].r].T.contiguous()
        shares[path] = values / values.sum()
    ranks = redistribute(shares, {path: target.r for path, target in targets.items()})
    return {
        path: (directions[path][:r].clone(), directions[path].new_zeros(targets[path].shape[0], r))
        for path, r in ranks.items()
        if r
    }


# --- how it is seen ---


def _second_moments(targets: Mapping[str, Target], losses: Iterable[Tensor]) -> dict[str, Tensor]:
    """Σ x xᵀ over all rows that each target is given, (in, in)."""
    moments: dict[str, Tensor] = {}

    def see(path: str, x: Tensor, y: Tensor) -> None:
        x = _rows(wide(x))
        _add_product(moments, path, x, x)

    with _watched(targets, see), torch.no_grad():
        for _ in losses:
            pass
    return moments


def _gradients(model: nn.Module, targets: Mapping[str, Target], losses: Iterable[Tensor]) -> dict[str, Tensor]:
    """Σ dyᵀ x, the gradient of each target's weight, (out, in), whatever holds that weight.

    It is taken where x and dy pass, so a packed weight has one, too, and no parameter needs a gradient.
    """
    gradients: dict[str, Tensor] = {}
    anchor = torch.zeros((), requires_grad=True)  # what has no way back depends on it

    def add(path: str, x: Tensor, dy: Tensor) -> None:
        dy = _rows(wide(dy))
        _add_product(gradients, path, dy, _rows(x).to(dy.dtype))

    def see(path: str, x: Tensor, y: Tensor) -> Any:
        return _Tap.apply(y, x, None if y.requires_grad else anchor, functools.partial(add, path))

    with _watched(targets, see), _frozen(model), torch.enable_grad():
        for loss in losses:
            if not loss.requires_grad:
                raise ConfigError("lora_ga: a loss has no gradient; it must be computed when it is asked for")
            loss.backward()
    return gradients


class _Tap(torch.autograd.Function):
    """y as it is; in the backward pass, x and dy are shown to `add`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, anchor: Tensor | None, add: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.add = add
        ctx.save_for_backward(x)
        return y.clone()  # a view of y could not be changed in place by the model

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ctx.add(ctx.saved_tensors[0], dy)
        return dy, None, None, None


@contextmanager
def _watched(targets: Mapping[str, Target], see: Callable[[str, Tensor, Tensor], Tensor | None]) -> Iterator[None]:
    """Whenever a target makes y of x, `see` is told its path, x and y, and may put another tensor in the place of y."""

    def hook(path: str) -> Callable[..., Tensor | None]:
        return lambda module, inputs, named, y: see(path, inputs[0] if inputs else next(iter(named.values())), y)

    handles = [target.module.register_forward_hook(hook(path), with_kwargs=True) for path, target in targets.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter gets a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _seen(targets: Mapping[str, Target], sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums of all targets, if there is something in each.

    Raises:
        TrainingError: there is not.
    """
    if lacking := [path for path in targets if path not in sums or not sums[path].any()]:
        raise TrainingError(
            f"{lacking[:5]} saw nothing but zeros. Start values from data need losses= that are computed when they "
            "are asked for, (loss(model, batch) for batch in batches), and batches that reach every target"
        )
    if bad := [path for path in targets if not sums[path].isfinite().all()]:
        raise TrainingError(f"{bad[:5]}: what they saw, or its gradient, is not finite")
    return sums


def _add_product(sums: dict[str, Tensor], path: str, left: Tensor, right: Tensor) -> None:
    """Σ leftᵀ right, over rows; (N, P), (N, Q) -> (P, Q)."""
    if path in sums:
        sums[path].addmm_(left.T, right)
    else:
        sums[path] = left.T @ right


def _rows(x: Tensor) -> Tensor:
    """(..., D) -> (N, D)."""
    return x.reshape(-1, x.size(-1))
