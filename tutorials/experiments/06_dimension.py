"""Chapter 6: how many numbers does the task need? Train d numbers, which move all linear weights together.

    python tutorials/experiments/06_dimension.py           writes 06_dimension.json
    python tutorials/experiments/06_dimension.py --small   one of the runs, d = 1,000

Each weight of the linears belongs to one of d numbers, drawn at random, and moves by ± that number: a random subspace
of d dimensions. The built-in model takes 100 steps of 8 rows with Adam. Seed 0 tries four rates at each d and keeps the
one with the best accuracy on 200 validation rows; accuracy is that on the 800 test rows, as in 06_rank.py.
"""

from __future__ import annotations

import functools
import json

import torch
from record import asks_for_small, write_record
from torch import Tensor, nn
from torch.nn.utils import parametrize

import minilora as ml
from minilora.data import collate
from minilora.files import ASSETS
from minilora.llama import Llama
from minilora.runs.evaluate import choice_accuracy, find_choices
from minilora.training import learning_rate, train_step

SEEDS = (0, 1, 2)
DIMENSIONS = (10, 100, 1_000, 10_000)
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
SMALL = (1_000, 3e-3)  # d, rate


class InSubspace(nn.Module):
    """W + ± the one of d numbers that each weight has drawn."""

    def __init__(self, numbers: nn.Parameter, like: Tensor, generator: torch.Generator):
        super().__init__()
        self.numbers = numbers
        self.register_buffer("which", torch.randint(len(numbers), like.shape, generator=generator))
        self.register_buffer("sign", 2.0 * torch.randint(2, like.shape, generator=generator) - 1)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.sign * self.numbers[self.which]


@functools.cache
def rows(split: str) -> ml.Dataset:
    """The rows of one split."""
    return ml.load_dataset(ASSETS / "data" / f"{split}.jsonl", ml.load_tokenizer("minilora/builtin"))


def trained(d: int, rate: float, seed: int) -> Llama:
    """The model after training the d numbers."""
    model = ml.load_model("minilora/builtin", "float32").requires_grad_(False)
    numbers, generator = nn.Parameter(torch.zeros(d)), torch.Generator().manual_seed(seed)
    for linear in [each for each in model.model.modules() if isinstance(each, nn.Linear)]:
        parametrize.register_parametrization(linear, "weight", InSubspace(numbers, linear.weight, generator))
    adam = torch.optim.Adam([numbers], lr=0.0)
    steps = torch.randperm(len(rows("train")), generator=torch.Generator().manual_seed(seed)).split(8)[:100]
    for i, chosen in enumerate(steps):
        adam.param_groups[0]["lr"] = learning_rate(i, len(steps), rate, warmup=10)
        with parametrize.cached():
            train_step(model, adam, [collate([rows("train")[row] for row in chosen], torch.device("cpu"))])
    for linear in [each for each in model.model.modules() if isinstance(each, nn.Linear)]:
        parametrize.remove_parametrizations(linear, "weight")
    return model


def accuracy(model: Llama, split: str, count: int) -> float:
    """The share of the first rows that are right."""
    return round(choice_accuracy(model, rows(split)[:count], find_choices(rows("train")) or []), 5)


def main() -> None:
    """Choose the rates, run all seeds, and keep each result as it comes."""
    if asks_for_small(__doc__):
        print(f"d = {SMALL[0]:,}: accuracy {accuracy(trained(*SMALL, 0), 'test', 200):.2f} on 200 rows")
        return
    results = []
    for d in DIMENSIONS:
        models = {rate: trained(d, rate, 0) for rate in RATES}
        tried = {rate: accuracy(model, "valid", 200) for rate, model in models.items()}
        best = max(tried, key=tried.__getitem__)
        for seed in SEEDS:
            model = trained(d, best, seed) if seed else models[best]
            results.append({"d": d, "rate": best, "seed": seed, "accuracy": accuracy(model, "test", 800)})
            results[-1] |= {"tried": {f"{rate:g}": found for rate, found in tried.items()}} if not seed else {}
            print(json.dumps(results[-1]), flush=True)
            write_record(__file__, results, SEEDS)


if __name__ == "__main__":
    main()
