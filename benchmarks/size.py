"""`python -m benchmarks.size --shape 7B --scratch FOLDER`: a model of billions of parameters, as a person would use it.

Makes a checkpoint of random weights, and runs the commands one after the other: quantize, a dry run, three steps of
QLoRA that a signal interrupts, the same again, 16 tokens, a merge; then PEFT with bitsandbytes on the same 4-bit files.
It prints a table in Markdown. A peak is that of the process, less what imports take: of minilora, and of the part of
torch that the forecast loads; PEFT's is measured after its imports, which load that part too. Read and written is what
reached the disk.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

import minilora.public as ml
from benchmarks import results, scale
from benchmarks.process import called, gemm_peak, in_fresh_process
from benchmarks.scale import KEYS, step_seconds
from benchmarks.work import SMOLLM2, Row, Task, Training, training_flops
from minilora.models.checkpoint import build_on_meta
from minilora.models.config import parse_config
from minilora.runs.memory import amount

PARTS = ("quantize", "dry-run", "finetune", "resume", "generate", "merge", "peft")
HEAD = ("what", "seconds", "of a step", "share of matrix products", "forecast", "peak", "read", "written")
SHAPES = {**scale.SHAPES, "tiny": (2048, 64, 128, 2, 4, 2)}
DISK = 1.5  # times the checkpoint: itself, in four bits, and adapters
MERGED = 1.2  # what a merge adds


def make(config: dict[str, object], folder: Path) -> None:
    """Write a checkpoint in bfloat16, a file a block. Tensors of one shape are alike; no figure depends on that."""
    folder.mkdir()
    ml.load_tokenizer("minilora/builtin").save(folder)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes = {name: each.shape for name, each in build_on_meta(parse_config(config)).state_dict().items()}
    drawn = {shape: torch.ones(shape, dtype=torch.bfloat16) for shape in set(shapes.values())}
    for shape, tensor in drawn.items():
        if len(shape) > 1:
            tensor.normal_(std=0.02)
    files = {name: f"{'.'.join(name.split('.')[:3])}.safetensors" for name in shapes}
    for file in set(files.values()):
        save_file({name: drawn[shapes[name]].clone() for name in shapes if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}), encoding="utf-8")


def measure(words: Sequence[str], until: Path | None = None) -> tuple[str, int, list[str]]:
    """Run Python, interrupted once a file has a line; return its output, its peak, and what it read and wrote."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([sys.executable, *words], stdout=output)
        while until and process.poll() is None and not (until.is_file() and until.stat().st_size):
            time.sleep(0.1)
        if until:
            process.send_signal(signal.SIGTERM)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in (0, -signal.SIGTERM, 128 + signal.SIGTERM):
            raise SystemExit(f"failed: {' '.join(words)}")
        output.seek(0)
        return output.read(), 1024 * used.ru_maxrss, [amount(512 * n) for n in (used.ru_inblock, used.ru_oublock)]


def rows(folder: Path, config: dict[str, object], batch: list[Row], parts: Sequence[str]) -> Iterator[list[str]]:
    """Yield a row of the table for each part."""
    model, packed, run, data, merged = (f"{folder / name}" for name in ("model", "nf4", "run", "rows.jsonl", "merged"))
    tokens, forecast = len(batch[0][0]), ""
    Path(data).write_text(f"{json.dumps({'prompt': 'word', 'completion': ' word' * 8 * tokens})}\n" * 3 * len(batch))
    train = ["finetune", "--model", packed, "--data", data, "--out", run, "--device", "cpu", "--force"]
    train += ["--batch-size", f"{len(batch)}", "--max-length", f"{tokens}", "--train-on", "all", "--dtype", "bfloat16"]
    train += ["--gradient-checkpointing", "block", "--eval-split", "0", "--general-data", "none"]
    commands = {
        "quantize": ["quantize", "--model", model, "--out", packed],
        "dry-run": [*train, "--dry-run"],
        "finetune": train,
        "resume": train,
        "generate": ["generate", "--model", packed, "--adapter", run, "--prompt", "word", "--max-new-tokens", "16"],
        "merge": ["merge", "--model", model, "--adapter", run, "--out", merged],
    }
    flop, best = training_flops(config, batch), in_fresh_process(gemm_peak, "bfloat16", torch.device("cpu"))
    imported = measure(["-c", "import minilora.public, torch._dynamo"])[1]
    for part in parts:
        began, step, share, disk = time.perf_counter(), "", "", ["", ""]
        if part == "peft":
            work = Training("peft", "bfloat16", "fixed", "qlora", recompute=True)
            task = Task(work, Path(packed), Path(run), "cpu", batches=[batch] * 2, warm_up=1)
            found = in_fresh_process(called, "benchmarks.peers", "train_peft", task)
            seconds, peak = found.seconds[0], found.peak_bytes
        else:
            until = Path(run, "metrics.jsonl") if part == "finetune" else None
            output, peak, disk = measure(["-m", "minilora", *commands[part]], until)
            peak -= imported
        if part == "dry-run":
            forecast = re.findall(r"^  block .*  (\S+ \S+)$", output, re.MULTILINE)[0]
        if part == "resume":
            seconds = step_seconds(Path(run))
        if part in ("resume", "peft"):
            step, share = f"{seconds:.1f}", f"{flop / seconds / best:.2f}"
        took = f"{time.perf_counter() - began:.0f}"
        yield [part, took, step, share, forecast if part == "resume" else "", amount(peak), *disk]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7B")
    parser.add_argument("--scratch", type=Path, help="where a folder is made, and removed at the end")
    parser.add_argument("--rows", type=int, default=4, help="of a batch")
    parser.add_argument("--tokens", type=int, default=128, help="of a row")
    parser.add_argument("--without", nargs="+", choices=PARTS, default=(), help="what others need cannot be left out")
    args = parser.parse_args(arguments)
    config = {**SMOLLM2, **dict(zip(KEYS, SHAPES[args.shape], strict=True))}
    config |= {"tie_word_embeddings": False, "dtype": "bfloat16"}
    batch: list[Row] = [([1] * args.tokens, [1] * args.tokens)] * args.rows
    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        times = DISK + (0 if "merge" in args.without else MERGED)
        needed = int(times * 2 * sum(p.numel() for p in build_on_meta(parse_config(config)).parameters()))
        if shutil.disk_usage(name).free < needed:
            raise SystemExit(f"{name}: {amount(needed)} of disk are needed")
        in_fresh_process(make, config, Path(name, "model"))
        found = []
        for row in rows(Path(name), config, batch, [part for part in PARTS if part not in args.without]):
            print(" | ".join(row), file=sys.stderr, flush=True)
            found.append(row)
    here = results.surroundings(torch.device("cpu"))
    print(
        f"{args.shape}, {here['machine']}; {here['versions']}; code {results.code_hash()}:",
        results.table(HEAD, found),
        sep="\n\n",
    )


if __name__ == "__main__":
    main()
