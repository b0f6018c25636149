"""LoRA, QLoRA, DoRA and full fine-tuning on 200, 1,000 and 5,000 rows of a task that a program judges.

    python tutorials/experiments/sizes.py                     writes sizes.json, after each method and size
    python tutorials/experiments/sizes.py sizes_smollm2 DIR   the same of another model: its plan and its file

A file that is not complete is continued.

The task is that of scripts/make_dates.py. Settings and claims are those of plans.json, whose hash the file holds. The
rate of a method at a size has the lowest loss on the validation rows at seed 0; rates are tried in factors of two until
neither the lowest nor the highest one is the best. For each row the file has the mean loss of the answer's tokens, and
the KL divergence to the base (on general text), in units of 0.0001 nats, and whether greedy generation is right.
"""

from __future__ import annotations

import json
import runpy
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import plan_hash, read_plan, write_record

import minilora as ml
from minilora.files import ASSETS
from minilora.llama import Llama
from minilora.runs.evaluate import answer_of, held_out_loss, measure_forgetting, prompt_of, write_answers

NAME, MODEL = sys.argv[1:] or ("sizes", "minilora/builtin")
FILE = Path(__file__).with_name(f"{NAME}.json")
PLAN = read_plan(str(FILE))
COMMAND = "python tutorials/experiments/sizes.py" + (f" {NAME} DIR" if sys.argv[1:] else "")
ADAPTERS: dict[str, dict[str, Any] | None] = {"LoRA": {}, "QLoRA": {}, "DoRA": {"use_dora": True}, "full": None}

dates = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "make_dates.py"))
make_rows, write_rows = dates["make_rows"], dates["write_rows"]
tokenizer = ml.load_tokenizer(MODEL)
with tempfile.TemporaryDirectory() as directory:
    write_rows(directory)
    train, valid, test = (
        list(ml.load_dataset(f"{directory}/{split}.jsonl", tokenizer)) for split in ("train", "valid", "test")
    )
test = test[: PLAN.get("test_rows")]
general = list(ml.load_dataset(ASSETS / "data" / "general.jsonl", tokenizer))[: PLAN.get("general_rows")]
base = ml.load_model(MODEL, "float32")
ANSWERS = [row["completion"] for row in make_rows("test")[: len(test)]]


def fit(method: str, size: int, rate: float, seed: int) -> Llama:
    model = ml.load_model(MODEL, "float32", quantize="nf4" if method == "QLoRA" else None)
    if (lora := ADAPTERS[method]) is not None:
        ml.attach(model, ml.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", **lora), seed=seed)
    steps = PLAN["steps"][str(size)]
    settings = ml.TrainConfig(
        batch_size=PLAN["batch_size"], max_steps=steps, epochs=steps, learning_rate=rate, seed=seed
    )
    ml.train(model, train[:size], settings)
    return model


def tune(method: str, size: int, start: float) -> tuple[dict[float, float], Llama]:
    """Try rates until the best one has a worse one on both sides; return their validation losses and the best model."""
    losses: dict[float, float] = {}
    models = {}
    best, factor = start, PLAN["factor"]
    while untried := [rate for rate in (best, best * factor, best / factor) if rate not in losses]:
        models[untried[0]] = fit(method, size, untried[0], PLAN["seeds"][0])
        losses[untried[0]] = held_out_loss(models[untried[0]], valid)
        best = min(losses, key=losses.__getitem__)
    return losses, models[best]


def score(model: Llama) -> dict[str, list[int]]:
    """What becomes of each row."""
    written = write_answers(model, tokenizer, [prompt_of(row) for row in test], [len(answer_of(row)) for row in test])
    return {
        "loss": [round(1e4 * held_out_loss(model, [row])) for row in test],
        "exact": [int(tokenizer.decode(tokens) == answer) for tokens, answer in zip(written, ANSWERS, strict=True)],
        "kl": [round(1e4 * measure_forgetting(model, [row], base=base).kl) for row in general],
    }


def main() -> None:
    """Run what the file does not have yet."""
    told = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {"plan": plan_hash(PLAN), "results": []}
    if told["plan"] != plan_hash(PLAN):
        raise SystemExit(f"{FILE.name} was made by another plan")
    results, starts = told["results"], dict(PLAN["first_rate"])
    for size in PLAN["rows"]:
        for method in starts:
            done = [run for run in results if (run["method"], run["rows"]) == (method, size)]
            if not done:
                began = time.monotonic()
                losses, first = tune(method, size, starts[method])
                rate = min(losses, key=losses.__getitem__)
                models = [first, *(fit(method, size, rate, seed) for seed in PLAN["seeds"][1:])]
                run = {"method": method, "rows": size, "rate": rate, "valid": losses}
                done = [run | {"seconds": round(time.monotonic() - began), "outcomes": list(map(score, models))}]
                results += done
                write_record(str(FILE), results, PLAN["seeds"], command=COMMAND, plan=plan_hash(PLAN))
                print(method, size, rate, losses, run.get("seconds"), flush=True)
            starts[method] = done[0]["rate"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
