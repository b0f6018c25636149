"""Two specialists whose answers do not exclude each other: dates with the month as a word, and with digits only.

    python tutorials/experiments/11_formats.py     writes 11_formats.json

The task is that of scripts/make_dates.py, cut in two by the format of the date. Each specialist learns the rows of its
half among the first 1,000 training rows, `whole` learns all of them, for the same number of steps. The mean and TIES
[recipes/ties_and_dare.py] are multiplied by the factor that has the lowest loss on the validation rows. Outcomes are of
single test rows, as in sizes.py; claims and settings are those of plans.json.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from record import plan_hash, read_plan, write_record

import minilora as ml
from minilora.adapter import layers_of
from minilora.llama import Llama
from minilora.runs.evaluate import answer_of, held_out_loss, prompt_of, write_answers

HERE = Path(__file__).resolve().parent
PLAN = read_plan(__file__)
HALVES = ("words", "digits")
dates = runpy.run_path(str(HERE.parents[1] / "scripts" / "make_dates.py"))
combine = runpy.run_path(str(HERE.parents[1] / "recipes" / "ties_and_dare.py"))["combine"]
tokenizer = ml.load_tokenizer("minilora/builtin")
with TemporaryDirectory() as directory:
    dates["write_rows"](directory)
    examples = {split: [*ml.load_dataset(f"{directory}/{split}.jsonl", tokenizer)] for split in dates["SPLITS"]}
ANSWERS = [row["completion"] for row in dates["make_rows"]("test")]


def half(split: str, part: str) -> list[ml.Example]:
    """Return the rows whose month is a word, or those with digits only; `whole` is all of them."""
    rows = dates["make_rows"](split)[: PLAN["rows"]]
    has_word = [any(month in row["prompt"] for month in dates["MONTHS"]) for row in rows]
    return [
        row
        for row, word in zip(examples[split], has_word, strict=False)
        if part == "whole" or word == (part == "words")
    ]


def fit(part: str, seed: int) -> Llama:
    model = ml.load_model("minilora/builtin")
    ml.attach(model, ml.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"), seed=seed)
    settings = ml.TrainConfig(batch_size=16, max_steps=PLAN["steps"], epochs=99, learning_rate=PLAN["rate"], seed=seed)
    ml.train(model, half("train", part), settings)
    return model


def set_factor(model: Llama, name: str, factor: float) -> None:
    """Multiply the change of an adapter, whose scale is 1, by a factor."""
    for layer in layers_of(model, name).values():
        layer.adapters[name].scale = factor


def score(model: Llama) -> dict[str, list[int]]:
    """What becomes of each test row."""
    test = examples["test"]
    written = write_answers(model, tokenizer, [prompt_of(row) for row in test], [len(answer_of(row)) for row in test])
    return {
        "loss": [round(1e4 * held_out_loss(model, [row])) for row in test],
        "exact": [int(tokenizer.decode(tokens) == answer) for tokens, answer in zip(written, ANSWERS, strict=True)],
    }


def measure(seed: int) -> dict[str, Any]:
    """Train both specialists and `whole`, and combine the two."""
    model, found = ml.load_model("minilora/builtin"), {}
    for number, part in enumerate((*HALVES, "whole")):
        with TemporaryDirectory() as directory:
            ml.save_adapter(fit(part, 3 * seed + number), directory)
            ml.load_adapter(model, directory, name=part)
        found[part] = {"outcomes": score(model)}
    ml.combine_adapters(model, dict.fromkeys(HALVES, 0.5), "mean")
    combine(model, dict.fromkeys(HALVES, 1.0), "TIES", r=32, density=PLAN["density"])
    for way in ("mean", "TIES"):
        ml.set_adapter(model, way)
        losses = {}
        for factor in PLAN["factors"]:
            set_factor(model, way, factor)
            losses[factor] = held_out_loss(model, examples["valid"])
        best = min(losses, key=losses.__getitem__)
        set_factor(model, way, best)
        found[way] = {"factor": best, "outcomes": score(model)}
    return found


def main() -> None:
    runs = [measure(seed) for seed in PLAN["seeds"]]
    results = [
        {
            "way": way,
            "factors": [run[way].get("factor", 1.0) for run in runs],
            "outcomes": [run[way]["outcomes"] for run in runs],
        }
        for way in runs[0]
    ]
    write_record(__file__, results, PLAN["seeds"], plan=plan_hash(PLAN))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
