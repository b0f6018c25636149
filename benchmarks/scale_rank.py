"""What one process of `python -m benchmarks.scale check` does: time an all-reduce, or fine-tune, and tell its peak.

    torchrun … -m benchmarks.scale_rank OUT                  time an all-reduce
    torchrun … -m benchmarks.scale_rank OUT finetune …       what `minilora` does with these words

It writes OUT/RANK.json. Apart from minilora it imports nothing that the command would not, as memory is counted from
the import.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import distributed

from minilora import cli
from minilora.runs.machine import peak_memory_bytes

BUFFER = 2**26  # bytes
TIMES = 6  # of which the first does not count


def main() -> int:
    """Do it, and write what was measured."""
    out, *words = sys.argv[1:]
    status, found = 0, {}
    if words:
        status = cli.main(words)
        found = {"peak": peak_memory_bytes(torch.device("cpu"))}
    else:
        found = {"bandwidth": time_all_reduce()}
    Path(out, f"{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")
    return status


def time_all_reduce() -> float:
    """Return the bytes a second that a rank sends while all of them add a buffer."""
    distributed.init_process_group("gloo")
    N, buffer, seconds = distributed.get_world_size(), torch.ones(BUFFER // 4), []
    for _ in range(TIMES):
        distributed.barrier()
        began = time.perf_counter()
        distributed.all_reduce(buffer)
        seconds.append(time.perf_counter() - began)
    distributed.destroy_process_group()
    return 2 * (N - 1) / N * BUFFER / statistics.median(seconds[1:])


if __name__ == "__main__":
    sys.exit(main())
