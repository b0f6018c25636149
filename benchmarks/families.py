"""A row of a table for each family of models: does it compute what transformers and PEFT do, and what does a step cost?

Its model has random weights and the shape of a published model with fewer layers. Logits, relative to the largest, and
tokens are compared in float32. Speed and peak memory are ours over PEFT's, in a turn of each at the work bf16-real.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks import make, results, turns, work
from benchmarks.process import called, in_fresh_process

HEAD = ("family", "shape", "logits differ by", "with an adapter", "tokens alike", "speed", "memory")


def sizes(hidden: int, width: int, layers: int, heads: int, key_heads: int, vocabulary: int) -> dict[str, Any]:
    """Keys of a config.json."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    found = dict(zip(names, (hidden, width, layers, heads, key_heads), strict=True))
    return {**found, "vocab_size": vocabulary, "max_position_embeddings": 8192, "pad_token_id": None}


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LINEAR = {"linear_num_key_heads": 16, "linear_num_value_heads": 16}
TIED = {"tie_word_embeddings": True}
# model_type -> a published model, and its config.json; layers are as few as show each kind of them
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama 3.2 1B", {**sizes(2048, 8192, 2, 32, 8, 128_256), **TIED, "rope_parameters": LLAMA3}),
    "mistral": ("Mistral 7B", {**sizes(4096, 14_336, 2, 32, 8, 32_000), "sliding_window": 4096}),
    "ministral3": ("Ministral 3 3B", {**sizes(3072, 9216, 2, 32, 8, 131_072), **TIED, "head_dim": 128}),
    "qwen2": ("Qwen2.5 0.5B", {**sizes(896, 4864, 2, 14, 2, 151_936), **TIED}),
    "qwen3": ("Qwen3 0.6B", {**sizes(1024, 3072, 2, 16, 8, 151_936), **TIED, "head_dim": 128}),
    "qwen3_5_text": ("Qwen3.5 0.8B", {**sizes(1024, 3584, 4, 8, 2, 248_320), **TIED, **LINEAR, "head_dim": 256}),
    "smollm3": ("SmolLM3 3B", {**sizes(2048, 11_008, 4, 16, 4, 128_256), **TIED}),
    "olmo2": ("OLMo 2 1B", sizes(2048, 8192, 2, 16, 16, 100_352)),
    "olmo3": ("OLMo 3 7B", sizes(4096, 11_008, 4, 32, 32, 100_278)),
    "gemma3_text": ("Gemma 3 270M", {**sizes(640, 2048, 6, 4, 1, 262_144), "head_dim": 256, "sliding_window": 512}),
}
SMALL = {**sizes(64, 128, 2, 4, 2, 512), "head_dim": 16, "num_hidden_layers": 6}


def task_of(name: str, folder: Path, changes: dict[str, Any]) -> work.Task:
    """The work, with a model of the family that is made in the folder."""
    make.random_model({"model_type": name, **FAMILIES[name][1], **changes}, folder / "model")
    return turns.Workshop(folder, folder / "model", "cpu").task(work.Training(name, "bfloat16", "real"))


def compared(task: work.Task) -> tuple[float, float, int]:
    """How far logits differ without the adapter and with it, and how many tokens are alike."""
    exact = replace(task, work=replace(task.work, dtype="float32"))
    ours, theirs = (in_fresh_process(called, f"benchmarks.{side}", "answers", exact) for side in ("ours", "peers"))
    alike = sum(one == other for one, other in zip(ours[2], theirs[2], strict=True))
    return difference(ours[0], theirs[0]), difference(ours[1], theirs[1]), alike


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def row(name: str, task: work.Task) -> list[str]:
    """The cells of a family.

    Raises:
        RefusedError: a side failed, or they did not do the same training.
    """
    plain, adapted, alike = compared(task)
    ours, peft = turns.taken(task, [work.OURS, "peft"], 0).values()
    shape = f"{FAMILIES[name][0]}, {work.config_of(task.model)['num_hidden_layers']} layers"
    facts = [f"`{name}`", shape, f"{plain:.0e}", f"{adapted:.0e}", f"{alike} of {work.ANSWERED}"]
    return [*facts, f"{ours.rate / peft.rate:.2f}", f"{ours.peak_bytes / peft.peak_bytes:.2f}"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a family was refused."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="FAMILY", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    args = parser.parse_args(arguments)
    rows = []
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            try:
                rows.append(row(name, task_of(name, Path(folder), SMALL if args.quick else {})))
            except turns.RefusedError as error:
                print(f"{name}: refused, {error}", file=sys.stderr)
    print(results.table(HEAD, rows))
    return int(len(rows) < len(args.only))


if __name__ == "__main__":
    sys.exit(main())
