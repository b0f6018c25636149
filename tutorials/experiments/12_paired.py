"""What the methods of chapter 12 make of each test row, so that any two can be compared on the same rows.

    python tutorials/experiments/12_paired.py     writes 12_paired.json, after each method anew

The runs are those of 12_methods.py. For each seed and row the file has the loss, in units of 0.0001 nats, and whether
the answer is right.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import torch
from record import write_record

from minilora.runs.evaluate import choice_accuracy, find_choices, held_out_loss

SEEDS = (0, 1, 2)
RUNS = (
    *(("LoRA", 2e-3), ("full", 2e-4), ("full", 4e-4), ("DoRA", 2e-3)),
    *(("PiSSA", 5e-4), ("PiSSA", 1e-3), ("PiSSA", 2e-3)),
)
METHODS = runpy.run_path(str(Path(__file__).with_name("12_methods.py")))


def score(method: str, rate: float, seed: int) -> dict[str, list[int]]:
    """What becomes of each row."""
    test, choices = METHODS["rows"]("test"), find_choices(METHODS["rows"]("train")) or []
    model = METHODS["train"](method, rate, seed)[0]
    return {
        "loss": [round(1e4 * held_out_loss(model, [row])) for row in test],
        "right": [int(choice_accuracy(model, [row], choices)) for row in test],
    }


def main() -> None:
    """Run all, and write what is known after each."""
    results: list[dict[str, Any]] = []
    for method, rate in RUNS:
        outcomes = [score(method, rate, seed) for seed in SEEDS]
        results.append({"method": method, "rate": rate, "outcomes": outcomes})
        print(method, rate, flush=True)
        write_record(__file__, results, SEEDS)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
