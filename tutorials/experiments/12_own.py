"""The own claims of PiSSA and of LoRA+: they learn faster than LoRA, and come further.

    python tutorials/experiments/12_own.py      writes 12_own.json, after each method and number of steps

The task is that of sizes.py, with 1,000 rows, in a short run and in its usual one. Each method has its own rate in
each, tuned as there. For each test row the file has the mean loss of the answer's tokens, in units of 0.0001 nats.
Settings and claims are those of plans.json, whose hash the file holds.
"""

from __future__ import annotations

import runpy
from functools import partial
from pathlib import Path

import torch
from record import file_hashes, plan_hash, read_plan, write_record

import minilora as ml
from minilora.llama import Llama
from minilora.runs.evaluate import held_out_loss
from minilora.training import adamw

HERE, PLAN = Path(__file__).parent, read_plan(__file__)
RECIPE = HERE.parents[1] / "recipes" / "loraplus.py"
SIZES, PLUS = runpy.run_path(str(HERE / "sizes.py")), runpy.run_path(str(RECIPE))


def fit(method: str, steps: int, rate: float, seed: int) -> Llama:
    """Train an adapter; the rate of LoRA+ is that of A."""
    model = ml.load_model("minilora/builtin", "float32")
    start = "pissa" if method == "PiSSA" else True
    config = ml.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=start)
    ml.attach(model, config, seed=seed)
    settings = ml.TrainConfig(
        batch_size=PLAN["batch_size"], max_steps=steps, epochs=steps, learning_rate=rate, seed=seed
    )
    build = partial(optimizer, model, rate) if method == "LoRA+" else None
    ml.train(model, SIZES["train"][: PLAN["rows"]], settings, optimizer=build)
    return model


def optimizer(model: Llama, rate: float, _: object) -> torch.optim.Optimizer:
    return adamw(PLUS["groups"](model, rate, PLAN["ratio"]))


def tune(method: str, steps: int) -> dict[float, float]:
    """Return the validation losses of rates, until the best one has a worse one on both sides."""
    losses: dict[float, float] = {}
    best, factor = PLAN["first_rate"][method], PLAN["factor"]
    while untried := [rate for rate in (best, best * factor, best / factor) if rate not in losses]:
        losses[untried[0]] = held_out_loss(fit(method, steps, untried[0], PLAN["seeds"][0]), SIZES["valid"])
        best = min(losses, key=losses.__getitem__)
    return losses


def main() -> None:
    """Run all, and write what is known after each method and number of steps."""
    files, results = file_hashes(__file__, HERE / "sizes.py", RECIPE), []
    for steps in PLAN["steps"]:
        for method in PLAN["first_rate"]:
            losses = tune(method, steps)
            rate = min(losses, key=losses.__getitem__)
            models = [fit(method, steps, rate, seed) for seed in PLAN["seeds"][1:]]  # without the one that chose it
            rows = [[round(1e4 * held_out_loss(model, [row])) for row in SIZES["test"]] for model in models]
            run = {"method": method, "steps": steps, "rate": rate, "valid": losses}
            results.append(run | {"outcomes": [{"loss": each} for each in rows]})
            write_record(__file__, results, PLAN["seeds"], plan=plan_hash(PLAN), files=files)
            print(method, steps, rate, losses, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
