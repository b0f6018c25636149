"""Put two specialists into one adapter by their mean, by TIES and by DARE; drop nine tenths of an adapter's numbers.

python tutorials/experiments/11_specialists.py                writes 11_specialists.json, of the built-in model
python tutorials/experiments/11_specialists.py --small        one pair, only printed
python tutorials/experiments/11_specialists.py --model DIR    adds the model of scripts/pretrain.py --large to the file

The functions of chapter 11's cell, on all rows of each half of the categories, with a pair for each seed. The mean and
TIES are also tuned: the validation rows choose by which factor their whole change is multiplied.
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

import minilora as ml
from minilora.adapter import layers_of
from minilora.runs.evaluate import find_choices

HERE = Path(__file__).resolve().parent
SEEDS = (0, 1, 2)
FACTORS = tuple(k / 10 for k in range(5, 16))
DATA = Path(ml.__file__).parent / "assets" / "data"


def of_categories(rows: Sequence[Any], chosen: Sequence[tuple[int, ...]]) -> list[Any]:
    """Return the rows whose answer is one of these."""
    return [row for row in rows if tuple(label for label in row.labels if label >= 0) in chosen]


def measure(name: str, seed: int) -> dict[str, Any]:
    """Return the held-out loss of every way on both halves, and of an adapter of all categories on all rows."""
    merging = runpy.run_path(str(HERE / "11_merging.py"))
    log_probabilities, loss_of = merging["log_probabilities"], merging["loss_of"]
    combine = runpy.run_path(str(HERE.parents[1] / "recipes" / "ties_and_dare.py"))["combine"]
    tokenizer = ml.load_tokenizer(name)
    rows, valid, held_out = (
        ml.load_dataset(DATA / f"{split}.jsonl", tokenizer) for split in ("train", "valid", "test")
    )
    choices, model = find_choices(rows), ml.load_model(name)
    parts = {"first": choices[:4], "second": choices[4:], "whole": choices}
    for number, (part, chosen) in enumerate(parts.items()):
        expert = ml.load_model(name)
        ml.attach(expert, ml.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"), seed=3 * seed + number)
        settings = ml.TrainConfig(learning_rate=2e-3, batch_size=16, max_steps=24, seed=3 * seed + number)
        ml.train(expert, of_categories(rows, chosen), settings)
        with TemporaryDirectory() as directory:
            ml.save_adapter(expert, directory)
            ml.load_adapter(model, directory, name=part)
    halves = {"first": 0.5, "second": 0.5}
    ml.combine_adapters(model, halves, "mean")
    combine(model, {"first": 1.0, "second": 1.0}, "TIES", r=32, density=0.2)
    combine(model, halves, "DARE", r=32, density=0.2, elect=False, dare=True, seed=seed)
    for part in ("first", "whole"):
        combine(model, {part: 1.0}, f"{part}, dropped", r=32, density=0.1, elect=False, dare=True, seed=seed)
    losses: dict[str, Any] = {"seed": seed}

    def measure_losses(rows: Sequence[Any], tests: Sequence[str]) -> list[float]:
        return [loss_of(log_probabilities(model, of_categories(rows, parts[test]))) for test in tests]

    for way in ("first", "second", "mean", "TIES", "DARE", "first, dropped", "whole", "whole, dropped"):
        ml.set_adapter(model, way)
        losses[way] = measure_losses(held_out, ["whole"] if way.startswith("whole") else [*halves])
    for way in ("mean", "TIES"):
        ml.set_adapter(model, way)
        found = {}
        for factor in FACTORS:
            set_factor(model, way, factor)
            found[factor] = sum(measure_losses(valid, [*halves]))
        best = min(FACTORS, key=found.__getitem__)
        set_factor(model, way, best)
        losses |= {f"{way}, tuned": measure_losses(held_out, [*halves]), f"{way}, factor": best}
    return losses


def set_factor(model: nn.Module, name: str, factor: float) -> None:
    """Multiply the change of an adapter, whose scale is 1, by a factor."""
    for layer in layers_of(model, name).values():
        layer.adapters[name].scale = factor


def measure_all(name: str, seeds: Sequence[int] = SEEDS) -> list[dict[str, Any]]:
    """Measure a pair for each seed, and print each."""
    results = []
    for seed in seeds:
        results.append(measure(name, seed))
        print(json.dumps(results[-1]), flush=True)
    return results


def main() -> None:
    """Measure the built-in model or another of its kind."""
    from record import add_to_record, read_arguments, write_record  # beside this script

    arguments = read_arguments(__doc__)
    if arguments.small:
        measure_all("minilora/builtin", SEEDS[:1])
    elif arguments.model:
        add_to_record(__file__, measure_all(arguments.model))
    else:
        write_record(__file__, measure_all("minilora/builtin"), SEEDS)


if __name__ == "__main__":
    main()
