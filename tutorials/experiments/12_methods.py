"""Full fine-tuning, LoRA, DoRA and PiSSA on the built-in model: accuracy, forgetting, magnitude against direction.

    python tutorials/experiments/12_methods.py            writes 12_methods.json, after each run anew
    python tutorials/experiments/12_methods.py --small    two runs; prints whether the signs are those of the chapter

One pass over the built-in training rows: 100 steps of 16. Each method is trained with each of its learning rates and
each seed. Measured are the accuracy on the validation and the test rows, the KL divergence to the base on general text,
and at four checkpoints how far the weights have moved. With w a row of a weight and w₀ the same row of the base:

    ΔM = mean over the rows of | ‖w‖ - ‖w₀‖ |,   ΔD = mean over the rows of 1 - cos(w, w₀)    [DoRA §3.2]
"""

from __future__ import annotations

import functools
import statistics
from typing import Any

from record import asks_for_small, record_runs
from torch import Tensor, nn

import minilora as ml
from minilora.files import ASSETS
from minilora.llama import Llama
from minilora.runs.evaluate import choice_accuracy, find_choices, measure_forgetting
from minilora.runs.loop import Record

SEEDS = (0, 1, 2)
STEPS, CHECKPOINTS = 100, (25, 50, 75, 100)
METHODS: dict[str, tuple[dict[str, Any] | None, tuple[float, ...]]] = {  # fields of LoraConfig; learning rates
    "full": (None, (2e-4, 4e-4, 8e-4)),
    "LoRA": ({}, (1e-3, 2e-3, 4e-3)),
    "DoRA": ({"use_dora": True}, (1e-3, 2e-3, 4e-3)),
    "PiSSA": ({"init_lora_weights": "pissa"}, (2.5e-4, 5e-4, 1e-3)),
}
Point = tuple[int, str, float, float]  # step, layer, ΔM, ΔD


@functools.cache
def rows(split: str) -> ml.Dataset:
    return ml.load_dataset(ASSETS / "data" / f"{split}.jsonl", ml.load_tokenizer("minilora/builtin"))


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The weight of each query and value projection, with its adapter if it has one."""
    linears = {name: module for name, module in model.named_modules() if name.endswith(("q_proj", "v_proj"))}
    return {name: module.weight.detach().clone() for name, module in linears.items()}


def changes(W: Tensor, W0: Tensor) -> tuple[float, float]:
    """ΔM and ΔD."""
    m, m0 = W.norm(dim=1), W0.norm(dim=1)
    cosine = (W * W0).sum(dim=1) / (m * m0)
    return (m - m0).abs().mean().item(), (1 - cosine).mean().item()


def train(method: str, rate: float, seed: int) -> tuple[Llama, list[Point]]:
    """The model after a run, and how far it had moved at the checkpoints."""
    lora, points = METHODS[method][0], []
    model = ml.load_model("minilora/builtin")
    before = weights(model)
    if lora is not None:
        ml.attach(model, ml.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", **lora), seed=seed)

    def note(record: Record) -> None:
        if "loss" in record and record["step"] in CHECKPOINTS:
            after = weights(model)
            points.extend((record["step"], name, *changes(after[name], W0)) for name, W0 in before.items())

    settings = ml.TrainConfig(batch_size=16, max_steps=STEPS, learning_rate=rate, seed=seed)
    ml.train(model, rows("train"), settings, on_step=note)
    return model, points


def correlation(points: list[Point], kind: str, *steps: int) -> float:
    """Of ΔM and ΔD over all layers of a kind at these checkpoints."""
    chosen = [point for point in points if point[1].endswith(kind) and point[0] in steps]
    return statistics.correlation([point[2] for point in chosen], [point[3] for point in chosen])


def measure(method: str, rate: float, seed: int) -> dict[str, Any]:
    model, points = train(method, rate, seed)
    choices = find_choices(rows("train")) or []
    return {
        "method": method,
        "rate": rate,
        "seed": seed,
        "valid": choice_accuracy(model, rows("valid"), choices),
        "test": choice_accuracy(model, rows("test"), choices),
        "kl": measure_forgetting(model, rows("general"), base=ml.load_model("minilora/builtin")).kl,
        "all checkpoints": {kind: correlation(points, kind, *CHECKPOINTS) for kind in ("q_proj", "v_proj")},
        "last checkpoint": {kind: correlation(points, kind, STEPS) for kind in ("q_proj", "v_proj")},
        "points": [(step, float(f"{M:.4g}"), float(f"{D:.4g}")) for step, name, M, D in points if "q_proj" in name],
    }


def small() -> None:
    for method, rate in (("full", 4e-4), ("LoRA", 4e-3)):
        _, points = train(method, rate, seed=0)
        sign = "negative" if correlation(points, "q_proj", STEPS) < 0 else "positive"
        print(f"{method}: the correlation over the layers is {sign}")


def main() -> None:
    """Run all, or the small version."""
    if asks_for_small(__doc__):
        small()
        return
    runs = [functools.partial(measure, method, rate) for method, (_, rates) in METHODS.items() for rate in rates]
    record_runs(__file__, runs, SEEDS)


if __name__ == "__main__":
    main()
