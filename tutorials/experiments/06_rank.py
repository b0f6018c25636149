"""Chapter 6: the rank of what full fine-tuning changes, how much of it is needed, and LoRA at the same ranks.

    python tutorials/experiments/06_rank.py     writes 06_rank.json

Only the linear layers of the built-in model are trained, so that full fine-tuning and LoRA change the same weights. It
takes 100 steps of 8 rows; accuracy is that on the 800 test rows. Full fine-tuning has the best rate of chapter 5's
sweep (05_rates.json), which trains all weights. LoRA has α = 32 and one rate at every rank, the sweep's best by the
rule for another α. SGD has momentum 0.9, and a rate between 0.03 and 0.1, which did equally well in a
trial.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import record_runs
from torch import Tensor, nn

import minilora as ml
from minilora.data import collate
from minilora.files import ASSETS
from minilora.llama import Llama
from minilora.runs.evaluate import choice_accuracy, find_choices
from minilora.training import learning_rate, train_step

FILE = Path(__file__).with_suffix(".json")
SEEDS = (0, 1, 2)
CUTS = (1, 2, 4, 8, 16, 32, 64)
LORA_RANKS = (1, 2, 4, 8, 32)
FULL_RATE, LORA_RATE, SGD_RATE = 4e-4, 2e-3, 0.05
SETTINGS: dict[str, Any] = {"batch_size": 8, "max_steps": 100, "warmup_steps": 10}

tokenizer = ml.load_tokenizer("minilora/builtin")
train_rows, test_rows = (ml.load_dataset(ASSETS / "data" / f"{split}.jsonl", tokenizer) for split in ("train", "test"))
choices = find_choices(train_rows) or []


def linears(model: Llama) -> dict[str, nn.Linear]:
    """The linear layers of the blocks, by name."""
    return {name: each for name, each in model.model.named_modules() if isinstance(each, nn.Linear)}


def trainable_linears() -> Llama:
    """The built-in model with trainable linear layers; all else is frozen."""
    model = ml.load_model("minilora/builtin", "float32").requires_grad_(False)
    for linear in linears(model).values():
        linear.requires_grad_(True)
    return model


def train_sgd(model: Llama, seed: int, peak: float = SGD_RATE) -> None:
    """Take the same number of steps with SGD."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0, momentum=0.9, fused=True)
    steps = torch.randperm(len(train_rows), generator=torch.Generator().manual_seed(seed)).split(8)[:100]
    for i, rows in enumerate(steps):
        optimizer.param_groups[0]["lr"] = learning_rate(i, len(steps), peak, warmup=10)
        train_step(model, optimizer, [collate([train_rows[row] for row in rows], torch.device("cpu"))])


def rank_for(delta: Tensor, share: float) -> int:
    """The lowest rank whose best cut keeps this share of the energy ‖ΔW‖²."""
    energy = torch.linalg.svdvals(delta.double()).square().cumsum(0)
    return int((energy < share * energy[-1]).sum()) + 1


def full(optimizer: str, seed: int) -> dict[str, Any]:
    """Train all linears; the ranks of their changes, and the accuracy with only a part of them."""
    model, base = trainable_linears(), linears(trainable_linears())
    if optimizer == "SGD":
        train_sgd(model, seed)
    else:
        ml.train(model, train_rows, ml.TrainConfig(learning_rate=FULL_RATE, seed=seed, **SETTINGS))
    tuned = linears(model)
    factors = {name: torch.linalg.svd((tuned[name].weight - base[name].weight).detach()) for name in tuned}
    result: dict[str, Any] = {"method": f"full, {optimizer}", "seed": seed, "accuracy": accuracy(model), "cuts": {}}
    result["ranks"] = {name: rank_for(tuned[name].weight.detach() - base[name].weight.detach(), 0.9) for name in tuned}
    for r in CUTS:
        for name, (U, S, Vh) in factors.items():
            tuned[name].weight.data = base[name].weight.detach() + (U[:, :r] * S[:r]) @ Vh[:r]
        result["cuts"][r] = accuracy(model)
    return result


def lora(r: int, seed: int) -> dict[str, Any]:
    """Train an adapter on all linears."""
    model = ml.load_model("minilora/builtin", "float32")
    ml.attach(model, ml.LoraConfig(r=r, lora_alpha=32), seed=seed)
    ml.train(model, train_rows, ml.TrainConfig(learning_rate=LORA_RATE, seed=seed, **SETTINGS))
    return {"method": "LoRA", "r": r, "seed": seed, "accuracy": accuracy(model)}


def accuracy(model: Llama) -> float:
    """On the test rows."""
    return round(choice_accuracy(model, test_rows, choices), 5)


def main() -> None:
    """Run all."""
    runs = [partial(full, "AdamW"), partial(full, "SGD"), *(partial(lora, r) for r in LORA_RANKS)]
    record_runs(__file__, runs, SEEDS, base=accuracy(trainable_linears()))


if __name__ == "__main__":
    main()
