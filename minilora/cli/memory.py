"""Memory as a page, and as a few lines of a dry run."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from minilora.models.hub import fetch
from minilora.runs.memory import Forecast, amount
from minilora.runs.run import pick_device
from minilora.tools.inspect_memory import MemoryFacts, memory_facts

NAMES = [field.name for field in fields(Forecast)]


def memory_page(name_or_path: str) -> str:
    """What `inspect --memory` prints."""
    path = Path(name_or_path)
    facts = memory_facts(path if path.exists() else fetch(name_or_path, "model"), pick_device("auto"))
    return "\n".join([*_head(facts), *(line for name in facts.models for line in _table(name, facts.models[name]))])


def memory_lines(found: Forecast, held: int, free: int | None) -> str:
    """What `--dry-run` says of memory: of the micro-batch with the most tokens, and of the process itself."""
    parts = [f"{name.replace('_', ' ')} {amount(getattr(found, name))}" for name in NAMES]
    free_text = "unknown" if free is None else amount(free)
    besides = f", besides {amount(held)} that the process holds already" if held else ""
    return f"memory: {', '.join(parts[:-1])}\n  at most {amount(found.peak)} at once{besides}; {free_text} free"


def _head(facts: MemoryFacts) -> list[str]:
    lora, batch = facts.lora, f"{facts.rows} rows of {facts.tokens:,} tokens, all learned"
    return [
        f"memory to fine-tune in bfloat16 on {facts.device}; a batch: {batch};",
        f"adapters of rank {lora.r} on {lora.target_modules}; QLoRA in nf4 with double quantization. A full fine-tune",
        "takes 16 bytes a parameter: 4 weights, 4 gradients, 8 AdamW, all in float32; block is --recompute block.",
        "GB are 10^9 bytes.",
    ]


def _table(name: str, ways: dict[str, Forecast]) -> list[str]:
    head = "".join(f"{column.replace('_', ' '):>13}" for column in NAMES)
    rows = [
        f"  {way:<16}" + "".join(f"{amount(getattr(found, column)):>13}" for column in NAMES)
        for way, found in ways.items()
    ]
    return ["", name, f"  {'':<16}{head}", *rows]
