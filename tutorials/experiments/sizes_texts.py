"""Forgetting on two more kinds of text, of LoRA and full fine-tuning at the rates that sizes.py has chosen.

    python tutorials/experiments/sizes_texts.py     writes sizes_texts.json, after each method and size

For each row the file has the KL divergence to the base at its tokens, in units of 0.0001 nats: of `definitions`, the
held-out definitions of the built-in task, without its question or answer, and of `foreign` text, the definitions of The
Devil's Dictionary. Task, settings and seeds are those of sizes.py; claims are those of plans.json.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import torch
from record import plan_hash, read_plan, write_record

from minilora.data import IGNORE_INDEX, Example
from minilora.files import ASSETS
from minilora.llama import Llama
from minilora.runs.evaluate import measure_forgetting

HERE, PLAN = Path(__file__).parent, read_plan(__file__)
SIZES = runpy.run_path(str(HERE / "sizes.py"))
TASK = ASSETS / "data" / "test.jsonl"


tokenizer = SIZES["tokenizer"]
rows = [json.loads(line)["prompt"] for line in TASK.read_text(encoding="utf-8").splitlines()[:400]]
texts = [tokenizer.encode(row.removeprefix("Definition: ").removesuffix("\nCategory:")) for row in rows]
TEXTS = {
    "definitions": [Example(tokens, [IGNORE_INDEX, *tokens[1:]]) for tokens in texts],
    "foreign": runpy.run_path(str(HERE / "10_replay.py"))["foreign"],
}


def score(model: Llama) -> dict[str, list[int]]:
    """What becomes of each row of each text."""
    return {
        kind: [round(1e4 * measure_forgetting(model, [row], base=SIZES["base"]).kl) for row in rows]
        for kind, rows in TEXTS.items()
    }


def main() -> None:
    """Run all, and write what is known after each method and size."""
    chosen = json.loads((HERE / "sizes.json").read_text(encoding="utf-8"))["results"]
    rates = {(run["method"], run["rows"]): run["rate"] for run in chosen}
    results = []
    for rows in PLAN["rows"]:
        for method in PLAN["methods"]:
            rate = rates[method, rows]
            models = [SIZES["fit"](method, rows, rate, seed) for seed in PLAN["seeds"]]
            results.append({"method": method, "rows": rows, "rate": rate, "outcomes": list(map(score, models))})
            write_record(__file__, results, PLAN["seeds"], plan=plan_hash(PLAN))
            print(method, rows, rate, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
