"""What one process of `python -m benchmarks.scale_peers` does: run a script, and tell its losses, seconds and peak.

    torchrun … -m benchmarks.scale_side FOLDER SCRIPT WORD...

The script runs in the folder, as it is, and keeps its losses by that name. A step ends with its optimizer's. It writes
FOLDER/RANK.json. The peak is all that the process has held, its imports included.
"""

from __future__ import annotations

import itertools
import json
import os
import runpy
import sys
import time
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.process import high_water_bytes


def main() -> None:
    """Run it, and write what was measured."""
    folder, script, *words = sys.argv[1:]
    os.chdir(folder)
    sys.argv = [script, *words]
    ends: list[float] = []
    register_optimizer_step_post_hook(lambda *_: ends.append(time.perf_counter()))
    losses = runpy.run_path(script, run_name="__main__")["losses"]
    seconds = [end - begin for begin, end in itertools.pairwise(ends)]
    found = {"losses": losses, "seconds": seconds, "peak": high_water_bytes()}
    Path(f"{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
