"""LoRA and full fine-tuning of chapter 12, their rates chosen by the loss on the validation rows, over all seeds.

    python tutorials/experiments/12_chosen.py     writes 12_chosen.json

The runs are those of 12_methods.py, with one rate more of full fine-tuning. For the chosen rates the file has the loss
of each test row, and whether its answer is right. Claims and settings are those of plans.json.
"""

from __future__ import annotations

import runpy
import statistics
from pathlib import Path
from typing import Any

import torch
from record import file_hashes, plan_hash, read_plan, write_record

from minilora.files import ASSETS
from minilora.runs.evaluate import choice_accuracy, find_choices, held_out_loss

HERE, PLAN = Path(__file__).parent, read_plan(__file__)
METHODS = runpy.run_path(str(HERE / "12_methods.py"))
FILES = file_hashes(
    *(__file__, HERE / "12_methods.py", ASSETS / "model" / "model.safetensors"),
    *(ASSETS / "data" / f"{name}.jsonl" for name in ("train", "valid", "test")),
)


def main() -> None:
    """Train each method with each rate, and score the best rate of each."""
    valid, test, choices = (
        METHODS["rows"]("valid"),
        METHODS["rows"]("test"),
        find_choices(METHODS["rows"]("train")) or [],
    )
    results: list[dict[str, Any]] = []
    for method, rates in PLAN["rates"].items():
        models = {rate: [METHODS["train"](method, rate, seed)[0] for seed in PLAN["seeds"]] for rate in rates}
        losses = {rate: statistics.mean(held_out_loss(model, valid) for model in of) for rate, of in models.items()}
        rate = min(losses, key=losses.__getitem__)
        outcomes = [
            {
                "loss": [round(1e4 * held_out_loss(model, [row])) for row in test],
                "right": [int(choice_accuracy(model, [row], choices)) for row in test],
            }
            for model in models[rate]
        ]
        results.append({"method": method, "rate": rate, "valid": losses, "outcomes": outcomes})
        write_record(__file__, results, PLAN["seeds"], plan=plan_hash(PLAN), files=FILES)
        print(method, rate, losses, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
