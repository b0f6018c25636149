"""How much memory fine-tuning takes: what `finetune --dry-run` and `inspect --memory` print."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import get_args

import torch

from minilora.adapters.config import LoraConfig
from minilora.cli import Options
from minilora.errors import ConfigError, FormatError, TrainingError
from minilora.llama import Checkpointing, LlamaConfig
from minilora.models.bitsandbytes import QuantizeConfig
from minilora.models.checkpoint import pick_device
from minilora.models.config import parse_config, read_config
from minilora.models.hub import fetch
from minilora.runs.config import DataConfig, TrainConfig
from minilora.runs.memory import Forecast, Plan, Shard, amount, fits, forecast
from minilora.runs.system import free_memory_bytes

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
METHODS: dict[str, tuple[Checkpointing, ...]] = {  # and the kinds of gradient checkpointing to show
    "full fine-tune": ("none",),
    "LoRA": ("none", "block"),
    "QLoRA": ("none", "block"),
}
SETTINGS = """\
Memory at the peak of fine-tuning on {device} in bfloat16. A batch has {rows} rows of {tokens:,} tokens, all with
a label; adapters have rank {lora.r} on {lora.target_modules}; QLoRA is nf4 with double quantization, block is
--gradient-checkpointing block. A full fine-tune is in float32 and takes 16 bytes a parameter: weights, gradients and
two moments. working: temporary tensors, such as logits; overhead: of libraries. 1 GB is 10^9 bytes."""
RANKS = "One rank of {world} holds {held}, and the adapters with gradients and moments."


def dry_run_lines(plan: Plan) -> str:
    """Return what `--dry-run` prints: the forecast with each kind of gradient checkpointing, and what fits."""
    found = {way: forecast(plan.checkpointed(way)) for way in get_args(Checkpointing)}
    lines = [f"memory, by --gradient-checkpointing; this run has {plan.training.gradient_checkpointing}"]
    lines += _table(found)
    which = [way for way, each in found.items() if fits(plan, each)]
    free = free_memory_bytes(plan.device)
    room = "unknown" if free is None else f"{amount(free)} free"
    return "\n".join([*lines, f"  {room}: fits with {', '.join(which) or 'none of them'}"])


def check_memory(plan: Plan, found: Forecast) -> None:
    """Raise a `TrainingError` if a run does not fit into memory."""
    if not fits(plan, found):
        smaller = "--method lora" if plan.lora is None else "--quantize nf4"
        if plan.world > 1 and plan.lora is not None:
            smaller += ", --shard base"
        raise TrainingError(
            f"the run needs {amount(found.peak)} of memory, and {amount(free_memory_bytes(plan.device) or 0)} are free "
            f"on {plan.device}; what helps is a smaller --batch-size with more --gradient-accumulation-steps (the "
            f"gradient is the same), --gradient-checkpointing block, {smaller} or a smaller --max-length; "
            "--dry-run shows what each takes, and --force runs all the same"
        )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add --memory and what refines it."""
    parser.add_argument("--memory", action="store_true", help=f"show how much memory fine-tuning takes: {SIZES}")
    add = parser.add_argument_group("--memory of one of several processes").add_argument
    add("--world", type=int, metavar="N", help="number of ranks; show what one of them holds")
    add("--shard", choices=get_args(Shard), default="none", help="base: shard the frozen blocks (default: none)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="cuda also where no GPU is (default: auto)")


def memory_page(options: Options) -> str:
    """Return what `--memory` prints: the forecast of each of the `METHODS`, for a model and the `SHAPES`.

    Raises:
        FormatError: there is no config.json.
        ConfigError: the model is not supported, --world is not above 0, or --shard has no effect.
    """
    world, shard = options["world"], options["shard"]
    if world is not None and world <= 0:
        raise ConfigError(f"--world must be above 0, found {world}")
    if world is None and shard != "none":
        raise ConfigError("--shard is that of ranks; give --world too")
    # A GPU that is not here is of an unknown kind; "meta" is no CPU either.
    is_absent = options["device"] == "cuda" and not torch.cuda.is_available()
    device = torch.device("meta") if is_absent else pick_device(options["device"])
    batch = {"rows": TrainConfig().batch_size, "tokens": DataConfig().max_length, "lora": LoraConfig()}
    lines = [SETTINGS.format(device="cuda" if is_absent else device, **batch)]
    if world is not None:
        held = f"1/{world} of the blocks' weights, two gathered ones" if shard == "base" else "all weights"
        lines.append(RANKS.format(world=world, held=held))
    for name, config in _configs(options["path"]).items():
        rows: dict[str, Forecast] = {}
        for method, ways in METHODS.items():
            if shard == "none" or method != "full fine-tune":  # which has no frozen base
                plan = default_plan(config, method, device, world or 1, shard)
                for way in ways:
                    rows[method if way == "none" else f"{method}, {way}"] = forecast(plan.checkpointed(way))
        lines += ["", name, *_table(rows)]
    return "\n".join(lines)


def default_plan(config: LlamaConfig, method: str, device: torch.device, world: int = 1, shard: Shard = "none") -> Plan:
    """Return the plan of a step with a batch of the default size on each rank; all its tokens are labelled."""
    is_full, training = method == "full fine-tune", TrainConfig(gradient_accumulation_steps=world)
    rows = [(DataConfig().max_length,) * 2] * training.batch_size
    quantization = QuantizeConfig("nf4" if method == "QLoRA" else "none")
    dtype, lora = (torch.float32, None) if is_full else (torch.bfloat16, LoraConfig())
    return Plan(config, lora, training, quantization, dtype, device, rows, world=world, shard=shard)


def _configs(name_or_path: str) -> dict[str, LlamaConfig]:
    """Return the config of a model, and those of the `SHAPES`."""
    path = fetch(name_or_path, "model")
    if not (path / "config.json").is_file():
        raise FormatError(f"{path}: holds no config.json; need the directory of a model")
    sources = {name: dict(zip(KEYS, sizes, strict=True)) for name, sizes in SHAPES.items()}
    known = {name: parse_config({"model_type": "llama", **source}) for name, source in sources.items()}
    return {str(path): read_config(path), **known}


def _table(rows: Mapping[str, Forecast]) -> Iterator[str]:
    """Yield the lines of a table: a forecast a row, a term a column."""

    def line(name: str, cells: tuple[str, ...]) -> str:
        return f"  {name:<14}" + "".join(f"{cell:>13}" for cell in cells)

    yield line("", (*Forecast.__dataclass_fields__, "peak"))
    for name, found in rows.items():
        yield line(name, tuple(map(amount, (*vars(found).values(), found.peak))))
