"""Write what an experiment has measured: how it was made, and a line for each result."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def write_record(script: str, results: Sequence[Any], seeds: Sequence[int], **more: Any) -> None:
    """Write the results of a script, given as its `__file__`, beside it."""
    path = Path(script)
    told = {
        "command": f"python tutorials/experiments/{path.name}",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "seeds": list(seeds),
        **more,
    }
    lines = ",\n".join(map(json.dumps, results))
    text = f'{json.dumps(told)[:-1]}, "results": [\n{lines}\n]}}\n'
    path.with_suffix(".json").write_text(text, encoding="utf-8")
