"""`python -m benchmarks.scale`: the memory of one of several processes, forecast and measured.

    python -m benchmarks.scale fits      the memory of a rank, of known sizes on GPUs of so many GB
    python -m benchmarks.scale check     runs of 1, 2 and 4 processes on this machine, beside the forecast

Each writes a table into docs/scale.md, between its marks. The check starts `finetune` with torchrun, a thread a
process.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch

import minilora as ml
from benchmarks import results
from benchmarks.make import random_model
from benchmarks.work import SMOLLM2
from minilora.cli.forecast import default_plan
from minilora.llama import LlamaConfig
from minilora.models.config import parse_config
from minilora.runs.forecast import forecast
from minilora.runs.memory import amount
from minilora.runs.plan import Plan, Shard

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
)
SHAPES = {  # of Llama 2, of Llama 3.2, and of the largest Llama 3.1
    "1B": (128256, 2048, 8192, 16, 32, 8),
    "7B": (32000, 4096, 11008, 32, 32, 32),
    "13B": (32000, 5120, 13824, 40, 40, 40),
    "70B": (32000, 8192, 28672, 80, 64, 8),
    "405B": (128256, 16384, 53248, 126, 128, 8),
}
FITS = (("7B", 2, 24), ("70B", 8, 24), ("405B", 16, 80))  # ranks, and GB of each

VOCABULARY = 2048  # of the built-in tokenizer
MODEL = {**SMOLLM2, **dict(zip(KEYS, (VOCABULARY, 1024, 4096, 16, 16, 4), strict=True))}
TOKENS, MICRO_BATCHES, STEPS = 256, 4, 4
PROCESSES = (1, 2, 4)


@dataclass(frozen=True)
class Case:
    """A run of the check."""

    name: str
    dtype: str
    quantize: str
    shard: Shard

    def words(self, folder: Path, out: Path) -> list[str]:
        """Return the command."""
        given = {"model": folder / "model", "data": folder / "rows.jsonl", "out": out, "device": "cpu"}
        given |= {"dtype": self.dtype, "quantize": self.quantize, "general-data": "none"}
        given |= {"train-on": "all", "max-length": TOKENS, "batch-size": 1, "eval-split": 0, "save-steps": 0}
        given |= {"gradient-checkpointing": "block", "gradient-accumulation-steps": MICRO_BATCHES, "max-steps": STEPS}
        given |= {"shard": self.shard} if self.shard != "none" else {}
        return ["finetune", *(word for name, value in given.items() for word in (f"--{name}", f"{value}"))]

    def plan(self, ranks: int) -> Plan:
        training = ml.TrainConfig(
            batch_size=1, gradient_checkpointing="block", gradient_accumulation_steps=MICRO_BATCHES, max_steps=STEPS
        )
        rows = [(TOKENS, TOKENS - 1)] * MICRO_BATCHES
        dtype, quantization = getattr(torch, self.dtype), ml.QuantizeConfig(self.quantize)
        cpu, config = torch.device("cpu"), parse_config(MODEL)
        return Plan(config, ml.LoraConfig(), training, quantization, dtype, cpu, rows, ranks=ranks, shard=self.shard)


CASES = (
    Case("LoRA, float32", "float32", "none", "none"),
    Case("LoRA, bfloat16", "bfloat16", "none", "none"),
    Case("LoRA, bfloat16", "bfloat16", "none", "base"),
    Case("QLoRA, bfloat16", "bfloat16", "nf4", "base"),
)


def known_config(size: str) -> LlamaConfig:
    """Return the config of one of the `SHAPES`."""
    return parse_config({"model_type": "llama", **dict(zip(KEYS, SHAPES[size], strict=True))})


def fits() -> Iterator[list[str]]:
    """Yield the rows of the table of memory: the terms of a rank, with blocks recomputed, and whether they fit."""
    for size, N, room in FITS:
        config = known_config(size)
        for method in ("LoRA", "QLoRA"):
            for shard in get_args(Shard):
                plan = default_plan(config, method, torch.device("meta"))  # any GPU
                found = forecast(replace(plan, ranks=N, shard=shard))["block"]
                trained = found.adapters + found.gradients + found.moments
                terms = (found.weights, trained, found.activations, found.working + found.overhead, found.peak)
                yield [
                    f"{size} on {N} × {room} GB",
                    f"{method}, block",
                    shard,
                    *map(amount, terms),
                    "yes" if found.peak <= room * 10**9 else "no",
                ]


def check() -> Iterator[list[str]]:
    """Yield the rows of the check: of each case, runs of so many processes, beside the forecast."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_model(MODEL, folder / "model")
        text = json.dumps({"prompt": "word", "completion": " word" * 8 * TOKENS})
        (folder / "rows.jsonl").write_text(f"{text}\n" * MICRO_BATCHES * STEPS, encoding="utf-8")
        for case in CASES:
            for N in PROCESSES:
                run = folder / f"{case.name} {case.shard} {N}"
                launch(N, ["-m", "minilora", *case.words(folder, run)])
                peak = json.loads((run / "summary.json").read_text(encoding="utf-8"))["peak_memory_bytes"]
                memory = forecast(case.plan(N))["block"].peak
                of_memory = (amount(peak), amount(memory), f"{memory / peak:.2f}")
                yield [case.name, case.shard, f"{N}", *of_memory, f"{step_seconds(run):.2f}"]


def launch(N: int, words: Sequence[str], threads: int = 1) -> None:
    """Start N processes of a module or script by torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", f"{N}", *words]
    subprocess.run(torchrun, env={**os.environ, "OMP_NUM_THREADS": f"{threads}"}, stdout=subprocess.DEVNULL, check=True)


def step_seconds(run: Path) -> float:
    """Return the seconds of a step of a run, the median of all but the first."""
    records = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    seconds = [each["tokens"] / each["tokens_per_second"] for each in records if "tokens_per_second" in each]
    return statistics.median(seconds[1:])


def write(mark: str, table: str) -> None:
    """Put a table between its marks in the page."""
    text = PAGE.read_text(encoding="utf-8")
    pattern = re.compile(f"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    PAGE.write_text(pattern.sub(lambda found: f"{found[1]}{table}\n{found[2]}", text), encoding="utf-8")


WORKS = {  # what makes the rows of a table, and its head
    "fits": (fits, "model | way | --shard | weights | trained | activations | working, overhead | peak | fits"),
    "check": (check, "run | --shard | ranks | peak | forecast | ratio | seconds"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=WORKS)
    name = parser.parse_args(arguments).table
    rows, (work, head) = [], WORKS[name]
    for row in work():
        print(" | ".join(row), flush=True)
        rows.append(row)
    write(name, results.table(head.split(" | "), rows))


if __name__ == "__main__":
    main()
