"""Chapter 5's rule at other numbers of steps: by which factor does the best rate fall from α = 4 to α = 64?

    python tutorials/experiments/05_rule.py                  writes 05_rule.json
    python tutorials/experiments/05_rule.py 05_rule_start    the same with another start of A: its plan and its file
    python tutorials/experiments/05_rule.py 05_rule_10m DIR  the same of another model

The rule is that the best rate goes as 1/√α where training moves A further than it starts, and as 1/α where it does not.
As in 05_rates.py, rank 8 learns in steps of 8 rows, rates are in factors of two until the best one has a worse one on
both sides, and the lowest point of a parabola through these three, over log₂ of the rate, is the best. Claims and
settings are those of plans.json.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch
from record import plan_hash, read_plan, write_record

import minilora as ml
from minilora.adapter import adapter_layers
from minilora.runs.evaluate import held_out_loss

NAME = sys.argv[1] if sys.argv[1:] else "05_rule"
MODEL = sys.argv[2] if sys.argv[2:] else "minilora/builtin"
FILE = str(Path(__file__).with_name(f"{NAME}.json"))
PLAN = read_plan(FILE)
COMMAND = " ".join(["python tutorials/experiments/05_rule.py", *sys.argv[1:2]]) + (" DIR" if sys.argv[2:] else "")
rows = runpy.run_path(str(Path(__file__).with_name("05_rates.py")))["rows"]


def measure(alpha: int, steps: int, exponent: int, seed: int) -> tuple[float, float]:
    """Return the loss after training at the rate 2^exponent / 1000, and ‖A - A₀‖ / ‖A₀‖ over all layers."""
    model = ml.load_model(MODEL, "float32")
    ml.attach(model, ml.LoraConfig(r=8, lora_alpha=alpha), seed=seed)
    layers = adapter_layers(model).values()
    for layer in layers:
        layer.adapters["default"].lora_A.data *= PLAN.get("start", 1.0)
    before = torch.cat([layer.adapters["default"].lora_A.detach().flatten() for layer in layers])
    settings = ml.TrainConfig(
        batch_size=8,
        max_steps=steps,
        epochs=steps,
        learning_rate=2**exponent / 1000,
        warmup_steps=steps // 10,
        seed=seed,
    )
    try:
        ml.train(model, rows("train"), settings)
    except ml.TrainingError:  # a number is not finite any more
        return float("inf"), float("nan")
    after = torch.cat([layer.adapters["default"].lora_A.detach().flatten() for layer in layers])
    return held_out_loss(model, rows("valid")), ((after - before).norm() / before.norm()).item()


def best_rate(alpha: int, steps: int, seed: int, start: int) -> dict[str, float]:
    """Return log₂ of a thousand times the best rate, and how far A moves at the best one that was tried."""
    tried: dict[int, tuple[float, float]] = {}
    best = start
    while untried := [k for k in (best, best + 1, best - 1) if k not in tried]:
        tried[untried[0]] = measure(alpha, steps, untried[0], seed)
        best = min(tried, key=tried.__getitem__)
    left, middle, right = (tried[k][0] for k in (best - 1, best, best + 1))
    return {"log2": best + (left - right) / (2 * (left - 2 * middle + right)), "moved": tried[best][1]}


def main() -> None:
    """Run all, and write what is known after each number of steps."""
    results = []
    for steps in PLAN["steps"]:
        for alpha in PLAN["alphas"]:
            runs = [best_rate(alpha, steps, seed, PLAN["first_exponent"]) for seed in PLAN["seeds"]]
            results.append({"steps": steps, "alpha": alpha, "runs": runs})
            print(results[-1], flush=True)
            write_record(FILE, results, PLAN["seeds"], command=COMMAND, plan=plan_hash(PLAN))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
