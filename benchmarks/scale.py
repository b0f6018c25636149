"""`python -m benchmarks.scale`: a step of many processes, by the formulas of `minilora/runs/scale.py`.

    python -m benchmarks.scale paper     the table of 1 to 1,024 ranks
    python -m benchmarks.scale check     runs of 1, 2 and 4 processes on this machine, beside the formulas

Both write a table into docs/scale.md, between their marks. The check starts `finetune` with torchrun, a thread a
process. The rate of matrix products is that of the run of one process, so what is checked there is its memory alone;
N processes on C cores have min(1, C/N) of it each. The bandwidth is that of an all-reduce of `BUFFER` bytes.
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
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed

import minilora as ml
from benchmarks import results
from benchmarks.make import random_model
from benchmarks.work import LLAMA_1B
from minilora import cli
from minilora.cli.forecast import KEYS, SHAPES, default_plan
from minilora.models.config import LlamaConfig
from minilora.runs.machine import peak_memory_bytes
from minilora.runs.memory import Plan, Shard, amount, forecast
from minilora.runs.scale import forecast_step

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
GEMM_RATE, BANDWIDTH = 4e14, 5e10  # assumed on paper: FLOP/s that a GPU reaches, and bytes/s of its network
RANKS = (1, 2, 8, 64, 256, 1024)
PAPER = (("7B", "LoRA, block", "none"), ("70B", "QLoRA, block", "base"), ("405B", "QLoRA, block", "base"))

MODEL = {**LLAMA_1B, "vocab_size": 2048}  # with the vocabulary of the built-in tokenizer
TOKENS, MICRO_BATCHES, STEPS = 256, 4, 4
BUFFER = 2**26


@dataclass(frozen=True)
class Case:
    """A run of the check."""

    name: str
    dtype: str
    quantize: str
    shard: Shard

    def flags(self) -> list[str]:
        given = {"dtype": self.dtype, "quantize": self.quantize, "recompute": "block", "general-data": "none"}
        given |= {"text-field": "text", "max-length": TOKENS, "batch-size": 1, "eval-split": 0, "save-steps": 0}
        given |= {"gradient-accumulation-steps": MICRO_BATCHES, "max-steps": STEPS}
        given |= {"shard": self.shard} if self.shard != "none" else {}
        return [word for name, value in given.items() for word in (f"--{name}", f"{value}")]

    def plan(self, world: int) -> Plan:
        training = ml.TrainConfig(
            batch_size=1, recompute="block", gradient_accumulation_steps=MICRO_BATCHES, max_steps=STEPS
        )
        rows = [(TOKENS, TOKENS - 1)] * MICRO_BATCHES
        dtype, quantization = getattr(torch, self.dtype), ml.QuantizeConfig(self.quantize)
        cpu, config = torch.device("cpu"), LlamaConfig.from_dict(MODEL)
        return Plan(config, ml.LoraConfig(), training, quantization, dtype, cpu, rows, world=world, shard=self.shard)


CASES = (
    Case("LoRA, float32", "float32", "none", "none"),
    Case("LoRA, bfloat16", "bfloat16", "none", "none"),
    Case("LoRA, bfloat16", "bfloat16", "none", "base"),
    Case("QLoRA, bfloat16", "bfloat16", "nf4", "base"),
)


def paper() -> Iterator[list[str]]:
    """Yield the rows of the table on paper: a micro-batch a rank, and its tokens a second beside one rank's."""
    for size, way, shard in PAPER:
        config = LlamaConfig.from_dict({"model_type": "llama", **dict(zip(KEYS, SHAPES[size], strict=True))})
        alone = 0.0
        for N in RANKS:
            plan = default_plan(config, way, torch.device("meta"), N, shard)  # of any GPU
            step, found = forecast_step(plan), forecast(plan)
            seconds = step.seconds(GEMM_RATE, BANDWIDTH)
            rate = N * sum(plan.batch()[0]) / seconds
            alone = alone or rate
            sent = (amount(step.reduced), amount(step.gathered))
            times = (f"{seconds:.3f}", f"{rate:,.0f}", f"{rate / alone / N:.0%}")
            yield [f"{size}, {way}", shard, f"{N:,}", amount(found.peak), *sent, *times]


def check(ranks: Sequence[int]) -> Iterator[list[str]]:
    """Yield the rows of the check: of each case, runs of so many processes, beside the formulas."""
    with tempfile.TemporaryDirectory() as folder:
        random_model(MODEL, Path(folder, "model"))
        text = json.dumps({"text": "word " * 8 * TOKENS})
        Path(folder, "rows.jsonl").write_text(f"{text}\n" * MICRO_BATCHES * STEPS, encoding="utf-8")
        bandwidth = {N: launch(N, "buffer", folder)[0]["bandwidth"] if N > 1 else 1.0 for N in ranks}
        for case in CASES:
            gemm_rate = 0.0
            for N in ranks:
                found, plan = launch(N, str(CASES.index(case)), folder), case.plan(N)
                step, memory = forecast_step(plan), forecast(plan).peak
                gemm_rate = gemm_rate or step.flop / found[0]["seconds"]
                share = gemm_rate * min(1, (os.cpu_count() or 1) / N)
                seconds, peak = step.seconds(share, bandwidth[N]), max(each["peak"] for each in found)
                of_memory = (amount(peak), amount(memory), f"{memory / peak:.2f}")
                of_time = (f"{found[0]['seconds']:.2f}", f"{seconds:.2f}", f"{seconds / found[0]['seconds']:.2f}")
                yield [case.name, case.shard, f"{N}", *of_memory, *of_time]


def launch(N: int, work: str, folder: str) -> list[dict[str, float]]:
    """Start a rank's work on N processes of one thread, and return what each has measured."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", f"{N}"]
    with tempfile.TemporaryDirectory(dir=folder) as out:
        subprocess.run(
            [*command, "-m", "benchmarks.scale", work, "--folder", folder, "--out", out],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        return [json.loads(Path(out, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(N)]


def run_rank(work: str, folder: Path, out: Path) -> None:
    """Do what one of the processes does: time an all-reduce, or fine-tune; write what it measured."""
    found = {"bandwidth": time_all_reduce()} if work == "buffer" else fine_tune(CASES[int(work)], folder, out)
    (out / f"{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")


def fine_tune(case: Case, folder: Path, out: Path) -> dict[str, float]:
    """Return the seconds of a step, the median of all but the first, and the process's peak of memory."""
    where = ["--model", folder / "model", "--data", folder / "rows.jsonl", "--out", out / "run", "--device", "cpu"]
    if cli.main(["finetune", *map(str, where), *case.flags()]):
        raise SystemExit(f"{case}: the run failed")
    lines = (out / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [record for record in map(json.loads, lines) if "tokens_per_second" in record]
    seconds = [record["tokens"] / record["tokens_per_second"] for record in steps]
    return {"seconds": statistics.median(seconds[1:]), "peak": peak_memory_bytes(torch.device("cpu"))}


def time_all_reduce() -> float:
    """Return the bytes a second that a rank sends while all of them add a buffer; the first time does not count."""
    distributed.init_process_group("gloo")
    N, buffer, seconds = distributed.get_world_size(), torch.ones(BUFFER // 4), []
    for _ in range(6):
        distributed.barrier()
        began = time.perf_counter()
        distributed.all_reduce(buffer)
        seconds.append(time.perf_counter() - began)
    distributed.destroy_process_group()
    return 2 * (N - 1) / N * BUFFER / statistics.median(seconds[1:])


def write(mark: str, table: str) -> None:
    """Put a table between its marks in the page."""
    text = PAGE.read_text(encoding="utf-8")
    pattern = re.compile(f"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    PAGE.write_text(pattern.sub(lambda found: f"{found[1]}{table}\n{found[2]}", text), encoding="utf-8")


HEADS = {
    "paper": (
        "model",
        "--shard",
        "ranks",
        "a rank holds",
        "all-reduce",
        "all-gather",
        "seconds",
        "tokens/s",
        "per rank",
    ),
    "check": ("run", "--shard", "ranks", "peak", "forecast", "ratio", "seconds", "forecast", "ratio"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", help="paper, check; or that of one rank of the check")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes of the check")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.folder:
        return run_rank(args.work, args.folder, args.out)
    rows = []
    for row in paper() if args.work == "paper" else check(args.ranks):
        print(" | ".join(row), flush=True)
        rows.append(row)
    write(args.work, results.table(HEADS[args.work], rows))
    return None


if __name__ == "__main__":
    main()
