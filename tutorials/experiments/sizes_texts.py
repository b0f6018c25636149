"""Forgetting on two more kinds of text, by the methods and sizes of sizes.py, at the rates that it has chosen.

    python tutorials/experiments/sizes_texts.py                  writes sizes_texts.json, after each method and size
    python tutorials/experiments/sizes_texts.py sizes_10m DIR    the same of another model, whose rates sizes.py has

A file of the same plan is continued. For each row it has the KL divergence to the base at the row's tokens, in units of
0.0001 nats: of `definitions`, the held-out definitions of the built-in task, without their question or answer, and of
`foreign` text, the definitions of The Devil's Dictionary. Task, settings and seeds are those of sizes.py, which reads
the arguments; claims are those of plans.json.
"""

from __future__ import annotations

import json
import runpy
from itertools import product
from pathlib import Path

import torch
from record import plan_hash, read_plan, write_record

from minilora.data import IGNORE_INDEX, Example
from minilora.files import ASSETS
from minilora.llama import Llama
from minilora.runs.evaluate import measure_forgetting

HERE = Path(__file__).parent
SIZES = runpy.run_path(str(HERE / "sizes.py"))
FILE = HERE / f"{SIZES['NAME'].replace('sizes', 'sizes_texts')}.json"
PLAN = read_plan(str(FILE))
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
    """Run what the file does not have yet."""
    chosen = json.loads(SIZES["FILE"].read_text(encoding="utf-8"))["results"]
    rates = {(run["method"], run["rows"]): run["rate"] for run in chosen}
    told = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    results = told["results"] if told.get("plan") == plan_hash(PLAN) else []
    done = {(run["method"], run["rows"]) for run in results}
    command = SIZES["COMMAND"].replace("sizes.py", "sizes_texts.py")
    for rows, method in product(PLAN["rows"], PLAN["methods"]):
        if (method, rows) not in done:
            rate = rates[method, rows]
            models = [SIZES["fit"](method, rows, rate, seed) for seed in PLAN["seeds"]]
            results.append({"method": method, "rows": rows, "rate": rate, "outcomes": list(map(score, models))})
            write_record(str(FILE), results, PLAN["seeds"], command=command, plan=plan_hash(PLAN))
            print(method, rows, rate, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
