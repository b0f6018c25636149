"""Chapter 10: remedies against forgetting, compared on two kinds of text that were not replayed.

    python tutorials/experiments/10_replay.py     writes 10_replay.json, after each run anew

The built-in model takes 100 steps of 16 rows of the task with an adapter of rank 16. Every step also takes `rows` rows
of general text, of which the first half is used here, and adds to the sum of its losses

    replay    the loss of their tokens
    penalty   β · KL(base ‖ model) over the whole vocabulary, at each of their tokens

Without a remedy, the trained scale is also made smaller. Outcomes are of single rows, in units of 0.0001 nats: the loss
of each task row and whether its answer is right, the KL of the second half of the general text, and loss and KL of
`foreign` text, the definitions of The Devil's Dictionary. Claims and settings are those of plans.json.
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from record import plan_hash, read_plan, write_record
from torch import Tensor

import minilora as ml
from minilora.adapter import adapter_layers
from minilora.data import IGNORE_INDEX, collate
from minilora.files import ASSETS
from minilora.llama import Llama
from minilora.runs.evaluate import choice_accuracy, find_choices, held_out_loss, measure_forgetting
from minilora.training import token_loss

PLAN, CPU = read_plan(__file__), torch.device("cpu")
tokenizer = ml.load_tokenizer("minilora/builtin")
base = ml.load_model("minilora/builtin")
train, test, general = (
    [*ml.load_dataset(ASSETS / "data" / f"{name}.jsonl", tokenizer)] for name in ("train", "test", "general")
)
choices = find_choices(train) or []
replayed, held_out = general[: len(general) // 2], general[len(general) // 2 :]
devil = (Path(__file__).parents[1] / "data" / "devil" / "test.jsonl").read_text(encoding="utf-8").splitlines()
foreign = []
for line in devil:
    tokens = tokenizer.encode(json.loads(line)["messages"][1]["content"])
    foreign.append(ml.Example(tokens, [IGNORE_INDEX, *tokens[1:]]))
kl_to_base = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "kl_penalty.py"))["kl_to_base"]
KEPT = {"general": held_out, "foreign": foreign}


def fit(remedy: str, rows: int, beta: float, seed: int) -> Llama:
    """Train an adapter with a remedy."""
    model = ml.load_model("minilora/builtin")
    ml.attach(model, ml.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"), seed=seed)

    def loss(model: Llama, examples: Sequence[ml.Example], step: int) -> tuple[Tensor, int]:
        first = step * rows
        more = [replayed[i % len(replayed)] for i in range(first, first + rows)]
        if remedy == "replay":
            return token_loss(model, collate([*examples, *more], CPU))
        total, labels = token_loss(model, collate(examples, CPU))
        if remedy == "penalty":
            total = total + beta * kl_to_base(model, more)[0]
        return total, labels

    settings = ml.TrainConfig(batch_size=16, max_steps=100, learning_rate=PLAN["rate"], seed=seed)
    ml.train(model, train, settings, loss=loss)
    return model


def score(model: Llama) -> dict[str, list[int]]:
    """What becomes of each row."""
    moved = {kind: [measure_forgetting(model, [row], base=base) for row in rows] for kind, rows in KEPT.items()}
    return {
        "loss": [round(1e4 * held_out_loss(model, [row])) for row in test],
        "right": [int(choice_accuracy(model, [row], choices)) for row in test],
        **{f"{kind} loss": [round(1e4 * of.after) for of in rows] for kind, rows in moved.items()},
        **{f"{kind} kl": [round(1e4 * of.kl) for of in rows] for kind, rows in moved.items()},
    }


def main() -> None:
    """Run all, and write what is known after each."""
    results: list[dict[str, Any]] = []
    before = {kind: measure_forgetting(base, rows, base=base).before for kind, rows in KEPT.items()}
    for remedy, rows, beta in PLAN["remedies"]:
        models = [fit(remedy, rows, beta, seed) for seed in PLAN["seeds"]]
        for factor in PLAN["factors"] if remedy == "none" else (1.0,):
            for model in models:
                for layer in adapter_layers(model).values():
                    layer.adapters["default"].scale = 2.0 * factor
            outcomes = list(map(score, models))
            results.append({"remedy": remedy, "rows": rows, "beta": beta, "factor": factor, "outcomes": outcomes})
            write_record(__file__, results, PLAN["seeds"], plan=plan_hash(PLAN), before=before)
            print(remedy, rows, beta, factor, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
