"""Export an adapter in a plain form that more tools can read.

Scales are folded into B, all modules get the same rank, and alpha = r. The
result computes the same, also in tools that ignore rsLoRA and rank patterns.

Example:
  minilora export --adapter run --out plain
"""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F

from minilora.adapter import WEIGHTS_FILE
from minilora.adapters import layout
from minilora.cli import Options, Parser, say
from minilora.cli.flags import add_out, new_directory
from minilora.cli.messages import changed_notes, say_system_prompt
from minilora.errors import ConfigError, listed
from minilora.files import TensorFile
from minilora.models.hub import fetch
from minilora.models.prompts import copy_prompt_files


def add_flags(parser: Parser) -> None:
    parser.add_argument("--adapter", required=True, help="directory or hub id of the adapter")
    add_out(parser)


def run(options: Options) -> int:
    with new_directory(options["out"]) as out:
        for note in changed_notes([fetch(options["adapter"], "adapter")]):
            say(note)
        rank = export_adapter(options["adapter"], out)
    print(f"plain adapter of rank {rank} written to {options['out']}")
    say_system_prompt(options["out"])
    return 0


def export_adapter(path: str | Path, out: Path) -> int:
    """Write B ← s·B, A and B padded with zeros to the largest rank, which is returned, and α = r: α/r·B A = s·B A.

    A is not rounded, and B once, to float32:  |ΔW′ - ΔW| ≤ 2⁻²⁴·|s|·|B| |A|, element by element.
    """
    stored = layout.read_adapter(fetch(path, "adapter"))
    file = TensorFile(stored.path / WEIGHTS_FILE)
    names = {name: layout.parse_tensor_name(name) for name in file.shapes}
    others = [name for name, (_, key) in names.items() if key not in ("lora_A", "lora_B", "weight")]
    if (init := stored.values.get("init_lora_weights")) in layout.DETERMINISTIC_INITS:
        others.append(f"init_lora_weights {init!r}, so its numbers hold a part of the base's weights")
    if others:
        raise ConfigError(f"{stored.path} has no plain form; use `minilora merge`. It has{listed(others)}")
    config = stored.config()
    rank = max(map(config.rank, stored.tensors))
    for where, held in stored.tensors.items():
        scaled = config.scale(where) * held["lora_B"].double()  # in float64, or s would be rounded too
        held["lora_A"] = F.pad(held["lora_A"], (0, 0, 0, rank - len(held["lora_A"])))
        held["lora_B"] = F.pad(scaled.to(held["lora_B"].dtype), (0, rank - scaled.size(1)))
    tensors = {name: stored.tensors[where][key] for name, (where, key) in names.items()}
    plain = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    layout.write_adapter(out, stored.values | plain | {"init_lora_weights": True}, tensors, file.metadata)
    copy_prompt_files([stored.path], out)
    return rank
