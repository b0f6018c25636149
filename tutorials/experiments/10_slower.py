"""Chapter 10: is it LoRA or its rate? 10_equal.py again, with lower rates and with a smaller rank.

    python tutorials/experiments/10_slower.py     writes 10_slower.json, after each adapter

Task, settings and scores are those of 10_equal.py. At each seed full fine-tuning has a rate with the adapter's loss on
the test rows, within the tolerance there. Claims and settings are those of plans.json.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import torch
from record import file_hashes, plan_hash, read_plan, write_record

import minilora as ml

HERE, PLAN = Path(__file__).parent, read_plan(__file__)
EQUAL = runpy.run_path(str(HERE / "10_equal.py"))
SIZES, ROWS = EQUAL["SIZES"], PLAN["rows"]
FILES = EQUAL["FILES"] | file_hashes(__file__, HERE / "10_equal.json")


def adapt(rank: int, rate: float, seed: int) -> dict[str, list[int]]:
    """What becomes of each row and linear after training an adapter, merged."""
    model = ml.load_model("minilora/builtin", "float32")
    ml.attach(model, ml.LoraConfig(r=rank, lora_alpha=PLAN["lora_alpha"], target_modules="all-linear"), seed=seed)
    steps = SIZES["PLAN"]["steps"][str(ROWS)]
    settings = ml.TrainConfig(
        batch_size=SIZES["PLAN"]["batch_size"], max_steps=steps, epochs=steps, learning_rate=rate, seed=seed
    )
    ml.train(model, SIZES["train"][:ROWS], settings)
    ml.merge(model)
    return EQUAL["score"](model)


def main() -> None:
    """Run all, and write what is known after each adapter."""
    results: list[dict[str, Any]] = []
    earlier = json.loads((HERE / "10_equal.json").read_text(encoding="utf-8"))["results"]
    known: list[dict[float, Any]] = [{} for _ in PLAN["seeds"]]  # of each seed: full fine-tuning's outcomes by rate
    for run in earlier:
        if run["rows"] == ROWS and run["method"] != "LoRA":
            for of_seed, at, outcomes in zip(known, run["rates"], run["outcomes"], strict=True):
                of_seed[at] = outcomes
    for of_seed, seed in zip(known, PLAN["seeds"], strict=True):
        of_seed[PLAN["lowest_rate"]] = EQUAL["measure"]("full", ROWS, PLAN["lowest_rate"], seed)
    for adapter, (rank, rate) in PLAN["adapters"].items():
        lora = [adapt(rank, rate, seed) for seed in PLAN["seeds"]]
        triples = zip(lora, known, PLAN["seeds"], strict=True)
        matched = [EQUAL["match"]("loss", of_lora, of_full, ROWS, seed) for of_lora, of_full, seed in triples]
        full = [of_seed[at] for of_seed, at in zip(known, matched, strict=True)]
        results.append({"method": "LoRA", "adapter": adapter, "rates": [rate] * len(lora), "outcomes": lora})
        results.append({"method": "full, equal loss", "adapter": adapter, "rates": matched, "outcomes": full})
        write_record(__file__, results, PLAN["seeds"], plan=plan_hash(PLAN), files=FILES)
        means = [[round(sum(of[key]) / 1e4 / len(of[key]), 3) for of in lora + full] for key in ("loss", "kl")]
        print(adapter, matched, *means, [sum(of["intruders"]) for of in lora + full], flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
