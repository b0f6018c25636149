"""What fine-tuning would do and take: the pages of `finetune --dry-run` and of `inspect --memory`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import get_args

import numpy as np
import torch

from minilora.adapters.attach import ParameterCount
from minilora.adapters.config import LoraConfig
from minilora.cli import Options
from minilora.data import IGNORE_INDEX, Example
from minilora.errors import ConfigError, FormatError
from minilora.llama import Checkpointing, LlamaConfig
from minilora.models.bitsandbytes import QuantizeConfig
from minilora.models.checkpoint import pick_device
from minilora.models.config import parse_config, read_config_file
from minilora.models.hub import fetch
from minilora.models.tokenizer import Tokenizer
from minilora.runs.config import DataConfig, TrainConfig
from minilora.runs.dataset import Dataset
from minilora.runs.inputs import Data
from minilora.runs.memory import Forecast, amount, forecast
from minilora.runs.reports import visible
from minilora.runs.seeded import plan_steps
from minilora.runs.sizes import Plan, Shard, forecast_step

ROWS = 3
MARKS = {True: ("\x1b[32m", "\x1b[0m"), False: ("⟦", "⟧")}  # around what is learned: on a terminal, elsewhere
SIZES = "of a model, from its config.json alone, and of 7B, 13B, 70B and 405B"
KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
)
SHAPES = {  # of Llama 2, and of the largest Llama 3.1
    "7B": (32000, 4096, 11008, 32, 32, 32),
    "13B": (32000, 5120, 13824, 40, 40, 40),
    "70B": (32000, 8192, 28672, 80, 64, 8),
    "405B": (128256, 16384, 53248, 126, 128, 8),
}
WAYS = ("full fine-tune", "LoRA 16-bit", "LoRA, block", "QLoRA", "QLoRA, block")
SETTINGS = """\
Memory at the peak of fine-tuning on {device} in bfloat16. A batch has {rows} rows of {tokens:,} tokens, all with
a label; adapters have rank {lora.r} on {lora.target_modules}; QLoRA is nf4 with double quantization, block is
--gradient-checkpointing block. A full fine-tune is in float32 and takes 16 bytes a parameter: weights, gradients and
two moments. working: temporary tensors, such as logits; overhead: of the C library and kernels. 1 GB is 10^9 bytes."""
RANKS = """\
One rank of {world} holds {held}, and the adapters with gradients and moments.
In a step of {world} micro-batches it computes one: FLOP of matrix products and attention, and the bytes that it
sends, all-reduce for gradients and all-gather for weights."""


# --- the rows and the steps of a run ---


def preview(data: Data, config: TrainConfig, count: ParameterCount) -> str:
    """Return what `--dry-run` prints about the rows and the steps."""
    is_terminal = sys.stdout.isatty()
    begin, end = MARKS[is_terminal]
    shown = data.train[:ROWS]
    rows = [f"the first {len(shown)} of {len(data.train):,} training rows; {begin}so marked{end} is learned"]
    for example in shown:
        rows.append(f"\n--- {example.source}\n{marked(example, data.tokenizer, begin, end)}")
    steps = plan_steps(data.train.lengths, config)
    rows_seen, tokens, labels = len(steps.rows), steps.tokens.sum(), data.train.labelled[steps.rows].sum()
    at_most = "at most " if config.early_stopping else ""
    truncated, unlabelled = data.train.truncated, data.train.unlabelled
    totals = [
        f"cut to --max-length: {truncated:,} rows of the training files, which lost {data.train.lost:,} labels",
        f"not used: {unlabelled:,} rows of the training files that had no label left",
        f"the run: {at_most}{len(steps):,} steps, {rows_seen:,} rows, {tokens:,} tokens, {labels:,} of them learned",
        f"parameters: {count.trainable:,} of {count.total:,} are trained ({count.trainable / count.total:.2%})",
    ]
    table = [f"{'tokens of a row':<18}{'rows':>8}{'shortest':>10}{'median':>8}{'95 %':>8}{'longest':>9}{'labels':>10}"]
    table += [_lengths(name, examples) for name, examples in data.splits.items()]
    return "\n".join([*rows, "", *table, "", *totals])


def marked(example: Example, tokenizer: Tokenizer, begin: str, end: str) -> str:
    """Return the text of an example, control tokens included, with marks around learned tokens.

    A stretch is what it adds to the decoded text: decoded alone, it could lose the space that it begins with.
    """
    text, done, count = "", "", 0
    for is_learned, labels in groupby(example.labels, lambda label: label != IGNORE_INDEX):
        count += len(list(labels))
        so_far = tokenizer.decode(example.tokens[:count], skip_special_tokens=False)
        stretch = visible(so_far[len(done) :])
        text += f"{begin}{stretch}{end}" if is_learned else stretch
        done = so_far
    return text


def _lengths(name: str, examples: Dataset) -> str:
    lengths = np.sort(examples.lengths)
    most = lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))]
    return (
        f"{name:<18}{len(lengths):>8,}{lengths[0]:>10,}{np.median(lengths):>8,.0f}{most:>8,}{lengths[-1]:>9,}"
        f"{examples.labelled.sum():>10,}"
    )


def memory_lines(found: Forecast, held: int, free: int | None) -> str:
    """Return what `--dry-run` prints about memory: each term of the forecast, and what is free."""
    parts = ", ".join(f"{term} {amount(size)}" for term, size in vars(found).items())
    free_text = "unknown" if free is None else amount(free)
    besides = f", besides {amount(held)} that the process holds already" if held else ""
    return f"memory: {parts}\n  at most {amount(found.peak)} at once{besides}; {free_text} free"


# --- memory ---


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add --memory and what refines it."""
    parser.add_argument("--memory", action="store_true", help=f"show how much memory fine-tuning takes: {SIZES}")
    add = parser.add_argument_group("--memory of one of several processes").add_argument
    add("--world", type=int, metavar="N", help="number of ranks; show also what one computes and sends in a step")
    add("--shard", choices=get_args(Shard), default="none", help="base: shard the frozen blocks (default: none)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="cuda also where no GPU is (default: auto)")
    add("--gemm-rate", type=float, metavar="X", help="FLOP/s of a rank; with --bandwidth, show the seconds of a step")
    add("--bandwidth", type=float, metavar="X", help="bytes/s that a rank sends to the others")


def memory_page(options: Options) -> str:
    """Return what `--memory` prints: the forecast of each of the `WAYS`, for a model and the `SHAPES`.

    With `--world` it is that of one rank, with what the rank computes and sends in a step.

    Raises:
        FormatError: there is no config.json.
        ConfigError: the model is not supported, a flag's value is not above 0, or a flag has no effect.
    """
    world, shard, gemm_rate, bandwidth = (options[name] for name in ("world", "shard", "gemm_rate", "bandwidth"))
    if any(value is not None and not value > 0 for value in (world, gemm_rate, bandwidth)):
        raise ConfigError("--world, --gemm-rate and --bandwidth must be above 0")
    if world is None and (shard, gemm_rate, bandwidth) != ("none", None, None):
        raise ConfigError("--shard, --gemm-rate and --bandwidth are those of ranks; give --world, too")
    if (gemm_rate is None) != (bandwidth is None):
        raise ConfigError("--gemm-rate and --bandwidth give the seconds of a step together; give both, or none")
    # A GPU that is not here is of an unknown kind; "meta" is no CPU either.
    is_absent = options["device"] == "cuda" and not torch.cuda.is_available()
    device = torch.device("meta") if is_absent else pick_device(options["device"])
    batch = {"rows": TrainConfig().batch_size, "tokens": DataConfig().max_length, "lora": LoraConfig()}
    lines = [SETTINGS.format(device="cuda" if is_absent else device, **batch)]
    if world is not None:
        held = f"1/{world} of the blocks' weights, two gathered ones" if shard == "base" else "all weights"
        lines.append(RANKS.format(world=world, held=held))
    ways = WAYS if shard == "none" else WAYS[1:]  # a full fine-tune has no frozen base
    for name, config in _configs(options["path"]).items():
        plans = {way: default_plan(config, way, device, world or 1, shard) for way in ways}
        lines += ["", name, *_memory_table(plans)]
        if world is not None:
            lines += _step_table(plans, gemm_rate, bandwidth)
    return "\n".join(lines)


def default_plan(config: LlamaConfig, way: str, device: torch.device, world: int = 1, shard: Shard = "none") -> Plan:
    """Return the plan of a step with a batch of the default size on each rank, all of whose tokens are labelled."""
    is_full = way == "full fine-tune"
    checkpointing: Checkpointing = "block" if way.endswith("block") else "none"
    training = TrainConfig(gradient_checkpointing=checkpointing, gradient_accumulation_steps=world)
    rows = [(DataConfig().max_length,) * 2] * training.batch_size
    quantization = QuantizeConfig("nf4" if way.startswith("QLoRA") else "none")
    dtype = torch.float32 if is_full else torch.bfloat16
    return Plan(
        config,
        None if is_full else LoraConfig(),
        training,
        quantization,
        dtype,
        device,
        rows,
        world=world,
        shard=shard,
    )


def _configs(name_or_path: str) -> dict[str, LlamaConfig]:
    """Return the config of a model, and those of the `SHAPES`."""
    path = fetch(name_or_path, "model")
    if not (path / "config.json").is_file():
        raise FormatError(f"{path}: holds no config.json; need the directory of a model")
    sources = {name: dict(zip(KEYS, sizes, strict=True)) for name, sizes in SHAPES.items()}
    known = {name: parse_config({"model_type": "llama", **source}) for name, source in sources.items()}
    return {str(path): read_config_file(path / "config.json"), **known}


def _memory_table(plans: Mapping[str, Plan]) -> Iterator[str]:
    yield _row("", (*Forecast.__dataclass_fields__, "peak"))
    for way, plan in plans.items():
        found = forecast(plan)
        yield _row(way, map(amount, (*vars(found).values(), found.peak)))


def _step_table(plans: Mapping[str, Plan], gemm_rate: float | None, bandwidth: float | None) -> Iterator[str]:
    yield _row("", ["FLOP", "all-reduce", "all-gather", *["seconds"] * (gemm_rate is not None)])
    for way, plan in plans.items():
        step = forecast_step(plan)
        cells = [f"{step.flop:.3g}", amount(step.reduced), amount(step.gathered)]
        if gemm_rate is not None and bandwidth is not None:
            cells.append(f"{step.seconds(gemm_rate, bandwidth):.3g}")
        yield _row(way, cells)


def _row(name: str, cells: Iterable[str]) -> str:
    return f"  {name:<15}" + "".join(f"{cell:>12}" for cell in cells)
