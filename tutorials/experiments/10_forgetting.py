"""Accuracy against forgetting, when the change of the weights or its intruder dimensions are made smaller.

    python tutorials/experiments/10_forgetting.py            writes 10_forgetting.json, after each run anew
    python tutorials/experiments/10_forgetting.py --small    two runs; prints whether the directions are the chapter's

The built-in model is trained on its own rows in batches of 16. W is a weight after training, with its adapter merged,
W₀ the base's. Accuracy is on the 800 test rows, KL is the divergence to the base on general text, after

    scaled:   W₀ + c·(W - W₀)                     for the LoRA runs this is the adapter's scale times c
    shrunk:   W + (λ - 1)·Σ u σ vᵀ                 over the intruder dimensions (u, σ, v) of W

An intruder dimension is one of the first ten of W whose u has a cosine below 0.5 with every left singular vector of W₀
[Shuttleworth alg. 1].
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from record import asks_for_small, record_runs
from torch import Tensor, nn

import minilora as ml
from minilora.files import ASSETS
from minilora.llama import Llama
from minilora.runs.evaluate import choice_accuracy, find_choices, measure_forgetting

SEEDS = (0, 1, 2)
SCALED, SHRUNK = (0.25, 0.5, 0.75, 1.0), (0.0, 0.5, 0.75)  # c and λ; with λ = 1 nothing is shrunk
RUNS: dict[str, tuple[int | None, float, int]] = {  # rank, or None for full fine-tuning; learning rate; steps
    "full, 8e-4": (None, 8e-4, 100),
    "full, 1.6e-3": (None, 1.6e-3, 100),
    "full, 3.2e-3": (None, 3.2e-3, 100),
    "LoRA r 16, 2e-3": (16, 2e-3, 100),
    "LoRA r 16, 8e-3": (16, 8e-3, 100),
    "LoRA r 1, 8e-3": (1, 8e-3, 100),
}
FIRST, BELOW = 10, 0.5
Weights = dict[str, Tensor]


@functools.cache
def rows(split: str) -> ml.Dataset:
    return ml.load_dataset(ASSETS / "data" / f"{split}.jsonl", ml.load_tokenizer("minilora/builtin"))


@functools.cache
def base() -> Llama:
    return ml.load_model("minilora/builtin")


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the decoder, without the head, which no run adapts."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: linear for name, linear in found.items() if name != "lm_head"}


def train(rank: int | None, rate: float, steps: int, seed: int) -> Llama:
    """The model after a run, its adapter merged."""
    model = ml.load_model("minilora/builtin")
    if rank is not None:
        ml.attach(model, ml.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"), seed=seed)
    settings = ml.TrainConfig(batch_size=16, max_steps=steps, epochs=4, learning_rate=rate, seed=seed)
    ml.train(model, rows("train"), settings)
    if rank is not None:
        ml.merge(model)
    return model


def intruders(W: Tensor, W0: Tensor) -> tuple[int, Tensor]:
    """How many of the first dimensions of W intrude, and the sum of their u σ vᵀ."""
    U0 = torch.linalg.svd(W0, full_matrices=False).U
    U, S, Vh = (part[:FIRST] for part in _svd(W))
    is_new = (U @ U0).abs().max(dim=1).values < BELOW
    return int(is_new.sum()), (U[is_new].T * S[is_new]) @ Vh[is_new]


def _svd(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD with the vectors of both sides as rows."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U.T, S, Vh


def scores(model: Llama, weights: Mapping[str, Tensor]) -> list[float]:
    """Accuracy and KL with these weights of the linears."""
    for name, linear in linears(model).items():
        linear.weight.data.copy_(weights[name])
    return [choice_accuracy(model, rows("test"), find_choices(rows("train")) or []), divergence(model)]


def divergence(model: Llama) -> float:
    return measure_forgetting(model, rows("general"), base=base()).kl


def measure(name: str, seed: int) -> dict[str, Any]:
    model = train(*RUNS[name], seed)
    after: Weights = {key: linear.weight.detach().clone() for key, linear in linears(model).items()}
    before: Weights = {key: linear.weight.detach() for key, linear in linears(base()).items()}
    found = {key: intruders(after[key], before[key]) for key in after}
    count = sum(number for number, _ in found.values())
    scaled = {c: {key: before[key] + c * (W - before[key]) for key, W in after.items()} for c in SCALED}
    shrunk = {c: {key: W + (c - 1) * found[key][1] for key, W in after.items()} for c in SHRUNK if count}
    return {
        "run": name,
        "seed": seed,
        "intruders": count,
        "of": FIRST * len(after),
        "scaled": {c: scores(model, weights) for c, weights in scaled.items()},
        "shrunk": {c: scores(model, weights) for c, weights in shrunk.items()},
    }


def small() -> None:
    """Print the directions of two short runs."""
    for name, run in (("full", (None, 8e-4, 40)), ("LoRA", (16, 8e-3, 40))):
        model, count = train(*run, seed=0), 0
        whole = divergence(model)
        for after, before in zip(linears(model).values(), linears(base()).values(), strict=True):
            count += intruders(after.weight.detach(), before.weight.detach())[0]
            after.weight.data.lerp_(before.weight, 0.5)
        print(f"{name}: {'some' if count else 'no'} intruder dimensions;", end=" ")
        print(f"half the change has {'less' if divergence(model) < whole / 2 else 'more'} than half the KL")


def main() -> None:
    """Run all, or the small version."""
    if asks_for_small(__doc__):
        small()
        return
    record_runs(__file__, [functools.partial(measure, name) for name in RUNS], SEEDS)


if __name__ == "__main__":
    main()
