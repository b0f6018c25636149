"""`python -m benchmarks.scale`: the measured memory of one of several processes, compared with the forecast.

It starts `finetune` with torchrun in 1, 2 and 4 processes of one thread each, and prints a table.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import minilora as ml
from benchmarks.make import random_model
from benchmarks.work import SMOLLM2
from minilora.llama import LlamaConfig
from minilora.models.config import parse_config
from minilora.runs.memory import Plan, Shard, amount, forecast

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
                launch(N, case.words(folder, run))
                peak = json.loads((run / "summary.json").read_text(encoding="utf-8"))["peak_memory_bytes"]
                memory = forecast(case.plan(N))["block"].peak
                of_memory = (amount(peak), amount(memory), f"{memory / peak:.2f}")
                yield [case.name, case.shard, f"{N}", *of_memory, f"{step_seconds(run):.2f}"]


def launch(N: int, words: Sequence[str]) -> None:
    """Start N processes of `minilora` by torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", f"{N}"]
    command = [*torchrun, "-m", "minilora", *words]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, check=True)


def step_seconds(run: Path) -> float:
    """Return the seconds of a step of a run, the median of all but the first."""
    records = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    seconds = [each["tokens"] / each["tokens_per_second"] for each in records if "tokens_per_second" in each]
    return statistics.median(seconds[1:])


def main() -> None:
    print("run | --shard | ranks | peak | forecast | ratio | seconds")
    for row in check():
        print(" | ".join(row), flush=True)


if __name__ == "__main__":
    main()
