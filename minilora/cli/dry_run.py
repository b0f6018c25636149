"""What `finetune --dry-run` prints: the first rows with their labels, the steps and the memory; `inspect --memory`."""

from itertools import groupby
from statistics import median

import torch

from minilora.adapters.attach import ParameterCount
from minilora.adapters.config import LoraConfig
from minilora.cli.messages import counted
from minilora.data import IGNORE_INDEX, Example
from minilora.errors import printable
from minilora.llama import Checkpointing, LlamaConfig
from minilora.models.bitsandbytes import QuantizeConfig
from minilora.models.checkpoint import usable_device
from minilora.models.config import read_config
from minilora.models.hub import locate
from minilora.models.tokenizer import Tokenizer
from minilora.runs.encoders import Dataset
from minilora.runs.inputs import Data
from minilora.runs.memory import Forecast, Forecasts, Plan, amount, forecast
from minilora.runs.sampler import plan_steps
from minilora.runs.settings import DataConfig, TrainConfig

ROWS = 3
BEGIN, END = "⟦", "⟧"  # around what is learned
METHODS: dict[str, tuple[Checkpointing, ...]] = {
    "full fine-tune": ("none",),
    "LoRA": ("none", "block"),
    "QLoRA": ("none", "block"),
}
SETTINGS = """\
{path}: memory at the peak of fine-tuning on {device}
A batch has {rows} rows of {tokens:,} tokens, all with a label. Adapters have rank {lora.r} on {lora.target_modules}.
The base is in bfloat16; for QLoRA in nf4 with double quantization; in a full fine-tune in float32, where weights,
gradients and two moments take 16 bytes a parameter. block: --gradient-checkpointing block; working: temporary tensors,
such as logits; overhead: of libraries. 1 GB is 10^9 bytes.
"""


def preview(data: Data, config: TrainConfig, count: ParameterCount) -> str:
    """Return what `--dry-run` prints about the rows and the steps."""
    shown = data.train[:ROWS]
    rows = [f"{len(shown)} of the {len(data.train):,} training rows; text in {BEGIN} {END} is trained on"]
    for example in shown:
        rows.append(f"\n--- {example.source}\n{mark_learned(example, data.tokenizer)}")
    steps = plan_steps(len(data.train), config)
    seen = [data.train[row] for step in steps for batch in step for row in batch]
    tokens, labels = sum(len(example.tokens) for example in seen), sum(example.labelled for example in seen)
    size = f"{counted(len(steps), 'step')}, {counted(len(seen), 'row')}"
    totals = [
        f"the run: {size}, {tokens:,} tokens, {labels:,} of them learned",
        f"parameters: {count.trainable:,} of {count.total:,} are trained ({count.trainable / count.total:.2%})",
    ]
    table = [f"{'tokens of a row':<18}{'rows':>8}{'shortest':>10}{'median':>8}{'95 %':>8}{'longest':>9}{'labels':>10}"]
    table += [_lengths(name, examples) for name, examples in data.splits.items()]
    return "\n".join([*rows, "", *table, "", *totals])


def mark_learned(example: Example, tokenizer: Tokenizer) -> str:
    """Return the text of an example, control tokens included, with marks around learned tokens.

    A stretch is what it adds to the decoded text: decoded by itself, it could lose the space that it begins with.
    """
    text, done, count = "", "", 0
    for is_learned, labels in groupby(example.labels, lambda label: label != IGNORE_INDEX):
        count += len(list(labels))
        so_far = tokenizer.decode(example.tokens[:count], skip_special_tokens=False)
        stretch = printable(so_far[len(done) :])
        text += f"{BEGIN}{stretch}{END}" if is_learned else stretch
        done = so_far
    return text


def _lengths(name: str, examples: Dataset) -> str:
    lengths = sorted(len(example.tokens) for example in examples)
    most = lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))]
    return (
        f"{name:<18}{len(lengths):>8,}{lengths[0]:>10,}{median(lengths):>8,.0f}{most:>8,}{lengths[-1]:>9,}"
        f"{sum(example.labelled for example in examples):>10,}"
    )


def dry_run_lines(plan: Plan, found: Forecasts) -> str:
    """Return what `--dry-run` prints: the forecast with each kind of gradient checkpointing, and what fits."""
    head = f"memory by --gradient-checkpointing (this run: {plan.training.gradient_checkpointing})"
    which = [way for way, each in found.items() if plan.has_room(each.peak)]
    room = "free memory unknown" if plan.free is None else f"{amount(plan.free)} free"
    fits = f"these fit: {', '.join(which)}" if which else "nothing fits"
    return "\n".join([head, *_table(found), f"  {room}; {fits}"])


def memory_page(name_or_path: str) -> str:
    """Return what `--memory` prints: the forecast of each of the `METHODS` for a model."""
    path, device = locate(name_or_path, "model").path, usable_device("auto")
    config = read_config(path)
    rows: dict[str, Forecast] = {}
    for method, ways in METHODS.items():
        forecasts = forecast(default_plan(config, method, device))
        rows |= {method if way == "none" else f"{method}, {way}": forecasts[way] for way in ways}
    batch = {"rows": TrainConfig().batch_size, "tokens": DataConfig().max_length, "lora": LoraConfig()}
    return "\n".join([SETTINGS.format(path=path, device=device, **batch), *_table(rows)])


def default_plan(config: LlamaConfig, method: str, device: torch.device) -> Plan:
    """Return the plan of a step with a batch of the default size in which every token has a label."""
    lora = None if method == "full fine-tune" else LoraConfig()
    dtype = torch.float32 if lora is None else torch.bfloat16
    quantization = QuantizeConfig("nf4" if method == "QLoRA" else "none")
    rows = [(DataConfig().max_length,) * 2] * TrainConfig().batch_size
    return Plan(config, lora, TrainConfig(), quantization, dtype, device, rows)


def _table(rows: Forecasts) -> list[str]:
    """Return the lines of a table: a forecast a row, a term a column."""
    table = {"": [*Forecast.__dataclass_fields__, "peak"]}
    for name, found in rows.items():
        table[name] = [amount(size) for size in (*vars(found).values(), found.peak)]
    return [f"  {name:<14}" + "".join(f"{cell:>13}" for cell in cells) for name, cells in table.items()]
