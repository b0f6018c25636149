"""Equalities of chapters 10 and 12 at eight new seeds, none of which has chosen a rate.

    python tutorials/experiments/12_seeds.py     writes 12_seeds.json, after each method

A file that is not complete is continued.

The runs are those of 12_methods.py, and the KL penalty on one general row a step is that of 10_replay.py. For each seed
the file has the loss of each test row, whether its answer is right, and the KL to the base of each row of the general
text that no run learns from. Claims and settings are those of plans.json.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import torch
from record import file_hashes, plan_hash, read_plan, write_record

from minilora.files import ASSETS
from minilora.llama import Llama
from minilora.runs.evaluate import choice_accuracy, held_out_loss, measure_forgetting

HERE, PLAN = Path(__file__).parent, read_plan(__file__)
METHODS, REPLAY = (runpy.run_path(str(HERE / name)) for name in ("12_methods.py", "10_replay.py"))
FILE = Path(__file__).with_suffix(".json")
FILES = file_hashes(
    *(__file__, HERE / "12_methods.py", HERE / "10_replay.py", HERE.parents[1] / "recipes" / "kl_penalty.py"),
    *(ASSETS / "data" / f"{name}.jsonl" for name in ("train", "test", "general")),
    ASSETS / "model" / "model.safetensors",
)
MADE_BY: dict[str, Any] = {"plan": plan_hash(PLAN), "files": FILES}


def fit(method: str, rate: float, seed: int) -> Llama:
    if method == "KL penalty":
        return REPLAY["fit"]("penalty", 1, 1.0, seed)
    return METHODS["train"](method, rate, seed)[0]


def score(model: Llama) -> dict[str, list[int]]:
    """What becomes of each row."""
    test, general, base = (REPLAY[name] for name in ("test", "held_out", "base"))
    return {
        "loss": [round(1e4 * held_out_loss(model, [row])) for row in test],
        "right": [int(choice_accuracy(model, [row], REPLAY["choices"])) for row in test],
        "kl": [round(1e4 * measure_forgetting(model, [row], base=base).kl) for row in general],
    }


def main() -> None:
    """Run the methods that a file of this plan, script and input does not have yet; write after each."""
    told = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    results: list[dict[str, Any]] = told["results"] if MADE_BY.items() <= told.items() else []
    for method, rate in PLAN["methods"][len(results) :]:
        outcomes = [score(fit(method, rate, seed)) for seed in PLAN["seeds"]]
        results.append({"method": method, "rate": rate, "outcomes": outcomes})
        write_record(__file__, results, PLAN["seeds"], **MADE_BY)
        print(method, rate, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
