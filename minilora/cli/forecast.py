"""How much memory fine-tuning takes: what `finetune --dry-run` and `inspect --memory` print."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import get_args

import torch

from minilora.adapters.config import LoraConfig
from minilora.cli import Options
from minilora.llama import Checkpointing, LlamaConfig
from minilora.models.bitsandbytes import QuantizeConfig
from minilora.models.checkpoint import pick_device
from minilora.models.config import read_config
from minilora.models.hub import fetch
from minilora.runs.config import DataConfig, TrainConfig
from minilora.runs.memory import Forecast, Plan, Shard, amount, fits, forecast
from minilora.runs.system import free_memory_bytes

METHODS: tuple[tuple[str, Checkpointing], ...] = (
    ("full fine-tune", "none"),
    *(("LoRA", "none"), ("LoRA", "block")),
    *(("QLoRA", "none"), ("QLoRA", "block")),
)
SETTINGS = """\
{path}: memory at the peak of fine-tuning on {device}, of one of {world} ranks with --shard {shard}
A batch has {rows} rows of {tokens:,} tokens, all with a label. Adapters have rank {lora.r} on {lora.target_modules}.
The base is in bfloat16; for QLoRA in nf4 with double quantization; in a full fine-tune in float32, where weights,
gradients and two moments take 16 bytes a parameter. block: --gradient-checkpointing block; working: temporary tensors,
such as logits; overhead: of libraries. 1 GB is 10^9 bytes.
"""


def dry_run_lines(plan: Plan) -> str:
    """Return what `--dry-run` prints: the forecast with each kind of gradient checkpointing, and what fits."""
    found = {way: forecast(plan.checkpointed(way)) for way in get_args(Checkpointing)}
    head = f"memory, by --gradient-checkpointing; this run has {plan.training.gradient_checkpointing}"
    which = [way for way, each in found.items() if fits(plan, each)]
    free = free_memory_bytes(plan.device)
    room = "unknown" if free is None else f"{amount(free)} free"
    return "\n".join([head, *_table(found), f"  {room}: fits with {', '.join(which) or 'none of them'}"])


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add --memory and what refines it."""
    sized = "show how much memory fine-tuning takes, from a model's config.json alone"
    parser.add_argument("--memory", action="store_true", help=sized)
    add = parser.add_argument_group("--memory of one of several processes").add_argument
    add("--world", type=int, default=1, metavar="N", help="number of ranks; show what one of them holds")
    add("--shard", choices=get_args(Shard), default="none", help="base: shard the frozen blocks (default: none)")


def memory_page(options: Options) -> str:
    """Return what `--memory` prints: the forecast of each of the `METHODS` for a model."""
    path, device = fetch(options["path"], "model"), pick_device("auto")
    config = read_config(path)
    rows: dict[str, Forecast] = {}
    for method, way in METHODS:
        plan = default_plan(config, method, device, options["world"], options["shard"])
        rows[method if way == "none" else f"{method}, {way}"] = forecast(plan.checkpointed(way))
    batch = {"rows": TrainConfig().batch_size, "tokens": DataConfig().max_length, "lora": LoraConfig()}
    return "\n".join([SETTINGS.format(**{**options, "path": path}, device=device, **batch), *_table(rows)])


def default_plan(config: LlamaConfig, method: str, device: torch.device, world: int = 1, shard: Shard = "none") -> Plan:
    """Return the plan of a step with a batch of the default size on each rank; all its tokens are labelled."""
    training = TrainConfig(gradient_accumulation_steps=world)
    rows = [(DataConfig().max_length,) * 2] * training.batch_size
    if method == "full fine-tune":  # which has no frozen base
        return Plan(config, None, training, QuantizeConfig(), torch.float32, device, rows, world)
    quantization = QuantizeConfig("nf4" if method == "QLoRA" else "none")
    return Plan(config, LoraConfig(), training, quantization, torch.bfloat16, device, rows, world, shard)


def _table(rows: Mapping[str, Forecast]) -> list[str]:
    """Return the lines of a table: a forecast a row, a term a column."""
    table = {"": [*Forecast.__dataclass_fields__, "peak"]}
    for name, found in rows.items():
        table[name] = [amount(size) for size in (*vars(found).values(), found.peak)]
    return [f"  {name:<14}" + "".join(f"{cell:>13}" for cell in cells) for name, cells in table.items()]
