"""Chapter 10: two remedies against forgetting, replay of general rows in training and a smaller scale after it.

    python tutorials/experiments/10_replay.py     writes 10_replay.json, after each run anew

The built-in model takes 100 steps with an adapter of rank 16. Every batch has 16 rows of the task and 0, 1 or 4 rows of
general text, whose tokens are all learned. General text is cut in two: the first half is replayed, the KL to the base
is measured on the second. Without replay the trained scale is also made smaller.
"""

from __future__ import annotations

import json
from typing import Any

from record import write_record

import minilora as ml
from minilora.adapter import adapter_layers
from minilora.files import ASSETS
from minilora.runs.evaluate import choice_accuracy, find_choices, held_out_loss, measure_forgetting

SEEDS = (0, 1, 2)
REPLAYED = (0, 1, 4)  # general rows for 16 of the task
FACTORS = (1.0, 0.75, 0.5)  # of the scale

tokenizer = ml.load_tokenizer("minilora/builtin")
train, test, general = (
    [*ml.load_dataset(ASSETS / "data" / f"{name}.jsonl", tokenizer)] for name in ("train", "test", "general")
)
choices = find_choices(train) or []
replayed, held_out = general[: len(general) // 2], general[len(general) // 2 :]


def measure(replay: int, seed: int) -> list[dict[str, Any]]:
    """Train an adapter, and measure what it has learned and changed."""
    model = ml.load_model("minilora/builtin")
    ml.attach(model, ml.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"), seed=seed)
    more = [replayed[i % len(replayed)] for i in range(100 * replay)]
    settings = ml.TrainConfig(batch_size=16 + replay, max_steps=100, learning_rate=2e-3, seed=seed)
    ml.train(model, train + more, settings)  # in random order, so a batch has `replay` of them on average
    adapters = [layer.adapters["default"] for layer in adapter_layers(model).values()]
    scale, found = adapters[0].scale, []
    for factor in FACTORS if replay == 0 else (1.0,):
        for adapter in adapters:
            adapter.scale = factor * scale
        forgetting = measure_forgetting(model, held_out)
        result = {"replay": replay, "factor": factor, "seed": seed, "kl": forgetting.kl}
        result |= {"before": forgetting.before, "after": forgetting.after}
        found.append(result | {"accuracy": choice_accuracy(model, test, choices), "loss": held_out_loss(model, test)})
    return found


def main() -> None:
    """Run all, and write what is known after each run."""
    results: list[dict[str, Any]] = []
    for seed in SEEDS:
        for replay in REPLAYED:
            results += measure(replay, seed)
            print(json.dumps(results[-1]), flush=True)
            write_record(__file__, results, SEEDS[: seed + 1])


if __name__ == "__main__":
    main()
