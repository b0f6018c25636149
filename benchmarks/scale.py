"""`python -m benchmarks.scale`: a step of many processes, by the formulas of `minilora/runs/sizes.py`.

    python -m benchmarks.scale fits      the memory of a rank, of known sizes on GPUs of so many GB
    python -m benchmarks.scale paper     a step on 1 to 1,024 ranks
    python -m benchmarks.scale check     runs of 1, 2 and 4 processes on this machine, beside the formulas

Each writes a table into docs/scale.md, between its marks. The check starts `finetune` with torchrun, a thread a
process. The rate of matrix products is that of the run of one process, so what is checked there is its memory alone;
N processes on C cores have min(1, C/N) of it each. The bandwidth is that of an all-reduce.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

import minilora as ml
from benchmarks import results
from benchmarks.make import random_model
from benchmarks.work import LLAMA_1B
from minilora.cli.forecast import KEYS, SHAPES, default_plan
from minilora.models.config import parse_config
from minilora.runs.memory import amount, forecast
from minilora.runs.sizes import Plan, Shard, forecast_step

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
GEMM_RATE, BANDWIDTH = 4e14, 5e10  # assumed on paper: FLOP/s that a GPU reaches, and bytes/s of its network
FITS = (("7B", 2, 24), ("70B", 8, 24), ("405B", 16, 80))  # ranks, and GB of each
RANKS = (1, 2, 8, 64, 256, 1024)
PAPER = (("7B", "LoRA, block", "none"), ("70B", "QLoRA, block", "base"), ("405B", "QLoRA, block", "base"))

HEADS = {"num_attention_heads": 16, "num_key_value_heads": 4}
WIDTHS = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16}
MODEL = {**LLAMA_1B, **HEADS, **WIDTHS, "vocab_size": 2048}  # that of the built-in tokenizer
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
        given |= {"gradient-checkpointing": "block"}
        given |= {"text-field": "text", "max-length": TOKENS, "batch-size": 1, "eval-split": 0, "save-steps": 0}
        given |= {"gradient-accumulation-steps": MICRO_BATCHES, "max-steps": STEPS}
        given |= {"shard": self.shard} if self.shard != "none" else {}
        return ["finetune", *(word for name, value in given.items() for word in (f"--{name}", f"{value}"))]

    def plan(self, world: int) -> Plan:
        training = ml.TrainConfig(
            batch_size=1, gradient_checkpointing="block", gradient_accumulation_steps=MICRO_BATCHES, max_steps=STEPS
        )
        rows = [(TOKENS, TOKENS - 1)] * MICRO_BATCHES
        dtype, quantization = getattr(torch, self.dtype), ml.QuantizeConfig(self.quantize)
        cpu, config = torch.device("cpu"), parse_config(MODEL)
        return Plan(config, ml.LoraConfig(), training, quantization, dtype, cpu, rows, world=world, shard=self.shard)


CASES = (
    Case("LoRA, float32", "float32", "none", "none"),
    Case("LoRA, bfloat16", "bfloat16", "none", "none"),
    Case("LoRA, bfloat16", "bfloat16", "none", "base"),
    Case("QLoRA, bfloat16", "bfloat16", "nf4", "base"),
)


def plan_on_paper(size: str, way: str, world: int, shard: Shard) -> Plan:
    """Return the plan of a known size, on any GPU."""
    config = parse_config({"model_type": "llama", **dict(zip(KEYS, SHAPES[size], strict=True))})
    return default_plan(config, way, torch.device("meta"), world, shard)


def fits() -> Iterator[list[str]]:
    """Yield the rows of the table of memory: the terms of a rank, and whether they fit."""
    for size, N, room in FITS:
        for way in ("LoRA, block", "QLoRA, block"):
            for shard in get_args(Shard):
                found = forecast(plan_on_paper(size, way, N, shard))
                trained = found.adapters + found.gradients + found.moments
                terms = (found.weights, trained, found.activations, found.working + found.overhead, found.peak)
                yield [
                    f"{size} on {N} × {room} GB",
                    way,
                    shard,
                    *map(amount, terms),
                    "yes" if found.peak <= room * 10**9 else "no",
                ]


def paper() -> Iterator[list[str]]:
    """Yield the rows of the table on paper: a micro-batch a rank, and its tokens a second beside one rank's."""
    for size, way, shard in PAPER:
        alone = 0.0
        for N in RANKS:
            plan = plan_on_paper(size, way, N, shard)
            step, found = forecast_step(plan), forecast(plan)
            seconds = step.seconds(GEMM_RATE, BANDWIDTH)
            rate = N * sum(plan.batch()[0]) / seconds
            alone = alone or rate
            sent = (amount(step.reduced), amount(step.gathered))
            times = (f"{seconds:.3f}", f"{rate:,.0f}", f"{rate / alone / N:.0%}")
            yield [f"{size}, {way}", shard, f"{N:,}", amount(found.peak), *sent, *times]


def check() -> Iterator[list[str]]:
    """Yield the rows of the check: of each case, runs of so many processes, beside the formulas."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_model(MODEL, folder / "model")
        text = json.dumps({"text": "word " * 8 * TOKENS})
        (folder / "rows.jsonl").write_text(f"{text}\n" * MICRO_BATCHES * STEPS, encoding="utf-8")
        bandwidth = {N: launch(N, folder)[0]["bandwidth"] if N > 1 else 1.0 for N in PROCESSES}
        for case in CASES:
            gemm_rate = 0.0
            for N in PROCESSES:
                run = folder / f"{case.name} {case.shard} {N}"
                peak = max(found["peak"] for found in launch(N, folder, case.words(folder, run)))
                seconds, step, memory = step_seconds(run), forecast_step(case.plan(N)), forecast(case.plan(N)).peak
                gemm_rate = gemm_rate or step.flop / seconds
                expected = step.seconds(gemm_rate * min(1, (os.cpu_count() or 1) / N), bandwidth[N])
                of_memory = (amount(peak), amount(memory), f"{memory / peak:.2f}")
                of_time = (f"{seconds:.2f}", f"{expected:.2f}", f"{expected / seconds:.2f}")
                yield [case.name, case.shard, f"{N}", *of_memory, *of_time]


def launch(
    N: int, folder: Path, words: Sequence[str] = (), module: str = "benchmarks.scale_rank", threads: int = 1
) -> list[dict[str, Any]]:
    """Start N processes, and return what each has measured."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", f"{N}"]
    command = [*torchrun, "-m", module, str(folder), *words]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": f"{threads}"}, stdout=subprocess.DEVNULL, check=True)
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(N)]


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
    "paper": (
        paper,
        "model | --shard | ranks | a rank holds | all-reduce | all-gather | seconds | tokens/s | per rank",
    ),
    "check": (check, "run | --shard | ranks | peak | forecast | ratio | seconds | forecast | ratio"),
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
