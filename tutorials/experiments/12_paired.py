"""How much better the methods of chapter 12 are than LoRA, on the same test rows.

    python tutorials/experiments/12_paired.py     writes 12_paired.json

The runs are those of 12_methods.py. Both methods of a pair answer the same 800 rows, so their difference is known
better than either of them. `seeds` has the differences of the seeds. `interval` is half of the 95 % interval over the
rows, of differences that are means over the seeds.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import torch
from record import write_record
from torch import Tensor

from minilora.runs.evaluate import choice_accuracy, find_choices, held_out_loss

SEEDS = (0, 1, 2)
LORA = ("LoRA", 2e-3)
OTHERS = (("full", 2e-4), ("full", 4e-4), ("DoRA", 2e-3), ("PiSSA", 5e-4), ("PiSSA", 1e-3), ("PiSSA", 2e-3))
METHODS = runpy.run_path(str(Path(__file__).with_name("12_methods.py")))


def score(method: str, rate: float) -> dict[str, Tensor]:
    """Whether each answer is right, and the loss of each test row: (seeds, rows)."""
    test, choices = METHODS["rows"]("test"), find_choices(METHODS["rows"]("train")) or []
    models = [METHODS["train"](method, rate, seed)[0] for seed in SEEDS]
    found = {
        "accuracy": [[choice_accuracy(model, [row], choices) for row in test] for model in models],
        "loss": [[held_out_loss(model, [row]) for row in test] for model in models],
    }
    return {key: torch.tensor(values, dtype=torch.float64) for key, values in found.items()}


def main() -> None:
    """Compare all, and write what is known after each."""
    of_lora, results = score(*LORA), []
    for method, rate in OTHERS:
        result: dict[str, Any] = {"method": method, "rate": rate}
        for key, values in score(method, rate).items():
            more = values - of_lora[key]
            interval = 1.96 * more.mean(0).std().item() / more.shape[1] ** 0.5
            result[key] = {"seeds": more.mean(1).tolist(), "interval": interval}
        results.append(result)
        print(json.dumps(result), flush=True)
        write_record(__file__, results, SEEDS)


if __name__ == "__main__":
    main()
