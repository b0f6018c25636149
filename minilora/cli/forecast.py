"""How much memory fine-tuning takes: what `finetune --dry-run` and `inspect --memory` print."""

import torch

from minilora.adapters.config import LoraConfig
from minilora.llama import Checkpointing, LlamaConfig
from minilora.models.bitsandbytes import QuantizeConfig
from minilora.models.checkpoint import usable_device
from minilora.models.config import read_config
from minilora.models.hub import fetch
from minilora.runs.forecast import Forecast, Forecasts, Plan, forecast
from minilora.runs.memory import amount
from minilora.runs.settings import DataConfig, TrainConfig

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


def dry_run_lines(plan: Plan, found: Forecasts) -> str:
    """Return what `--dry-run` prints: the forecast with each kind of gradient checkpointing, and what fits."""
    head = f"memory, by --gradient-checkpointing; this run has {plan.training.gradient_checkpointing}"
    which = [way for way, each in found.items() if plan.has_room(each.peak)]
    room = "unknown" if plan.free is None else f"{amount(plan.free)} free"
    return "\n".join([head, *_table(found), f"  {room}: fits with {', '.join(which) or 'none of them'}"])


def memory_page(name_or_path: str) -> str:
    """Return what `--memory` prints: the forecast of each of the `METHODS` for a model."""
    path, device = fetch(name_or_path, "model"), usable_device("auto")
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
