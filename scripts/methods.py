"""The table of methods in docs/results.md: SmolLM2 learns to sort definitions, by LoRA, its kin, and full fine-tuning.

    python scripts/methods.py DIR [--methods LoRA DoRA ...] [--log FILE]
    python scripts/methods.py DIR --cost

DIR is SmolLM2-135M-Instruct (`scripts/pretrained.py`). Each method's learning rate is the best of at least three on the
400 validation rows, with seed 0; with that one it is measured on the 800 test rows, with three seeds. One line of JSON
is logged for each training, so that a second call goes on where the first one was stopped. `--cost` tells time and
memory instead, of 12 steps of each method in a fresh process: nothing else may run then.
"""

import argparse
import json
import multiprocessing
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import minilora as ml
from minilora.files import ASSETS
from minilora.llama import Llama
from minilora.runs.evaluate import choice_accuracy, find_choices
from minilora.runs.loop import Record
from minilora.runs.memory import amount

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Method:
    """How weights are changed, and the learning rates to choose from."""

    rates: tuple[float, ...]
    lora: ml.LoraConfig | None  # None: all parameters are trained


METHODS = {
    "LoRA": Method((5e-4, 1e-3, 2e-3), ml.LoraConfig()),
    "rsLoRA": Method((1.25e-4, 2.5e-4, 5e-4, 1e-3), ml.LoraConfig(use_rslora=True)),
    "DoRA": Method((5e-4, 1e-3, 2e-3), ml.LoraConfig(use_dora=True)),
    "PiSSA": Method((1.25e-4, 2.5e-4, 5e-4, 1e-3), ml.LoraConfig(init_lora_weights="pissa")),
    "full": Method((2e-5, 5e-5, 1e-4, 2e-4), None),
}


class Bench:
    """The model, the rows, and a log of what was measured."""

    def __init__(self, directory: Path, log: Path):
        self.directory, self.log = directory, log
        tokenizer = ml.load_tokenizer(directory)
        rows = [ml.load_dataset(ASSETS / "data" / f"{split}.jsonl", tokenizer) for split in ("train", "valid", "test")]
        self.train, self.valid, self.test = rows
        lines = log.read_text().splitlines() if log.is_file() else []
        self.models: dict[tuple[str, float, int], Llama] = {}
        self.known = {(r["method"], r["rate"], r["seed"], r["split"]): r["accuracy"] for r in map(json.loads, lines)}

    def accuracy(self, name: str, rate: float, seed: int, split: str) -> float:
        """Of one training, on one split; what was measured before is looked up."""
        key = (name, rate, seed, split)
        if key not in self.known:
            model = self.trained(name, rate, seed)
            self.known[key] = choice_accuracy(model, getattr(self, split), find_choices(self.train) or [])
            line = {"method": name, "rate": rate, "seed": seed, "split": split, "accuracy": self.known[key]}
            with self.log.open("a") as file:
                file.write(json.dumps(line) + "\n")
        return self.known[key]

    def trained(self, name: str, rate: float, seed: int) -> Llama:
        """The model after one training; those of one method are kept, as one of them is measured again."""
        if (name, rate, seed) in self.models:
            return self.models[name, rate, seed]
        self.models = {key: model for key, model in self.models.items() if key[0] == name}
        method = METHODS[name]
        model = ml.load_model(self.directory, "float32" if method.lora is None else "bfloat16")
        if method.lora is not None:
            ml.attach(model, method.lora, seed=seed)
        ml.train(model, self.train, ml.TrainConfig(learning_rate=rate, batch_size=16, warmup_steps=10, seed=seed))
        self.models[name, rate, seed] = model
        return model


def cost(directory: Path, name: str) -> tuple[float, int]:
    """Median seconds of a step, and the peak of the process's memory over what it had after import."""
    method, seconds, peak = METHODS[name], [], 0
    model = ml.load_model(directory, "float32" if method.lora is None else "bfloat16")
    if method.lora is not None:
        ml.attach(model, method.lora)
    rows = ml.load_dataset(ASSETS / "data" / "train.jsonl", ml.load_tokenizer(directory))

    def note(record: Record) -> None:
        nonlocal peak
        seconds.append(record["tokens"] / record["tokens_per_second"])
        peak = record["peak_memory_bytes"]

    ml.train(model, rows, ml.TrainConfig(batch_size=16, max_steps=12), on_step=note)
    return statistics.median(seconds[2:]), peak


def print_costs(directory: Path, names: Sequence[str]) -> None:
    """A row for each method, which has a process to itself."""
    print("| method | seconds a step | peak memory |\n|---|---|---|")
    for name in names:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            seconds, peak = pool.submit(cost, directory, name).result()
        print(f"| {name} | {seconds:.2f} | {amount(peak)} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--cost", action="store_true", help="time and memory instead of accuracy")
    parser.add_argument("--log", type=Path, default=Path("methods.jsonl"))
    options = parser.parse_args()
    if options.cost:
        print_costs(options.directory, options.methods)
        return
    bench = Bench(options.directory, options.log)
    print("| method | learning rates, validation accuracy | test accuracy, three seeds | mean |\n|---|---|---|---|")
    for name in options.methods:
        tried = {rate: bench.accuracy(name, rate, 0, "valid") for rate in METHODS[name].rates}
        best = max(tried, key=tried.__getitem__)
        found = [bench.accuracy(name, best, seed, "test") for seed in SEEDS]
        rates = ", ".join(
            f"{'**' * (rate == best)}{rate:g}{'**' * (rate == best)}: {a:.3f}" for rate, a in tried.items()
        )
        accuracies = " ".join(f"{accuracy:.3f}" for accuracy in found)
        print(f"| {name} | {rates} | {accuracies} | {statistics.mean(found):.3f} |", flush=True)


if __name__ == "__main__":
    main()
