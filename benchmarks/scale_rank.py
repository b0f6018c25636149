"""What one process of `python -m benchmarks.scale check` does: fine-tune, and tell its peak.

    torchrun … -m benchmarks.scale_rank OUT finetune …       what `minilora` does with these words

It writes OUT/RANK.json. Apart from minilora it imports nothing that the command would not, as memory is counted from
the import.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from minilora import cli
from minilora.runs.system import peak_memory_bytes


def main() -> int:
    """Do it, and write what was measured."""
    out, *words = sys.argv[1:]
    status = cli.main(words)
    found = {"peak": peak_memory_bytes(torch.device("cpu"))}
    Path(out, f"{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
