"""How much memory does fine-tuning take? The forecast, term by term, beside the measured peak.

    python tutorials/experiments/08_memory.py     SmolLM2 in `smollm2`; writes 08_memory.json beside it

Each way trains three steps of 4 rows of 512 tokens, all of them labelled, in a process of its own. The peak is what the
process used at most since minilora was imported. The chapter counts the tensors of the built-in model instead.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from record import write_record

import minilora as ml
from minilora.runs.memory import Plan, forecast

OUT = Path(__file__).with_suffix(".json")
WAYS = {  # dtype, quantize, checkpointing
    "full": ("float32", "none", "none"),
    "LoRA": ("bfloat16", "none", "none"),
    "QLoRA": ("bfloat16", "nf4", "none"),
    "QLoRA, block": ("bfloat16", "nf4", "block"),
}
ROWS, TOKENS, STEPS = 4, 512, 3


def measure(way: str) -> dict[str, Any]:
    """Train some steps, and return the forecast's terms and the measured peak, in bytes."""
    dtype, quantize, checkpointing = WAYS[way]
    model = ml.load_model("smollm2", dtype, quantize=None if quantize == "none" else quantize)
    lora = None if way == "full" else ml.LoraConfig(r=16)
    if lora is not None:
        ml.attach(model, lora)
    rows = [ml.Example([1] * TOKENS, [1] * TOKENS)] * ROWS
    training = ml.TrainConfig(batch_size=ROWS, epochs=STEPS, gradient_checkpointing=checkpointing)
    plan = Plan(
        model.config,
        lora,
        training,
        ml.QuantizeConfig(quantize),
        getattr(torch, dtype),
        torch.device("cpu"),
        [(TOKENS, TOKENS - 1)] * ROWS,
    )
    records: list[dict[str, Any]] = []
    ml.train(model, rows, training, on_step=records.append)
    found = forecast(plan)[checkpointing]
    return {"way": way, **vars(found), "forecast": found.peak, "measured": records[-1]["peak_memory_bytes"]}


def main() -> None:
    """Measure every way in a fresh process."""
    results = []
    for way in WAYS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            results.append(pool.submit(measure, way).result())
        print(results[-1], flush=True)
    write_record(__file__, results, [0])


if __name__ == "__main__":
    main()
