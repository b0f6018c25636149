"""Runs of several processes under torchrun, of which one is killed or told to stop."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import ADAPTER, starts, steps, words
from tests.training import newest_step

pytestmark = [
    pytest.mark.reliability,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc"),
]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
CHANGES = {"max_steps": 60, "save_steps": 5, "samples": 0, "lr_scheduler": "constant", "warmup_steps": 0}


def launch(inputs, out, *options):
    command = [*LAUNCH, *options, "-m", "minilora", *map(str, words(inputs, out, **CHANGES))]
    # a store that is not shared, or a second start would meet the addresses of the first (PyTorch issue 135712)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open(said(out), "w") as errors:
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)


def said(out):
    return out.with_suffix(".txt")


def worker(launcher, rank):
    """The process of a rank, once it is there."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            found, parent = path.read_bytes().split(b"\0"), (path.parent / "stat").read_text().rsplit(")")[1].split()[1]
        except OSError:
            continue
        if int(parent) == launcher.pid and f"RANK={rank}".encode() in found:
            return int(path.parent.name)
    raise AssertionError(f"no process of rank {rank}")


def after(step, out, launcher):
    """Wait until the run has written a checkpoint of this step, or of a later one."""
    while newest_step(out / "checkpoints") < step:
        assert launcher.poll() is None, said(out).read_text()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    assert launch(inputs, out).wait() == 0
    return {name: (out / name).read_bytes() for name in ADAPTER}


def test_a_killed_rank_ends_the_run_which_torchrun_starts_again(inputs, whole, tmp_path):
    out = tmp_path / "out"
    launcher = launch(inputs, out, "--max-restarts=1")
    after(10, out, launcher)
    os.kill(worker(launcher, 1), signal.SIGKILL)
    began = time.monotonic()
    assert launcher.wait() == 0, said(out).read_text()
    assert time.monotonic() - began < 60
    assert {name: (out / name).read_bytes() for name in ADAPTER} == whole
    assert len(starts(out)) == 2
    assert starts(out)[1] >= 10
    assert steps(out) == list(range(1, 61))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all_after_a_checkpoint(rank, inputs, whole, tmp_path):
    out = tmp_path / "out"
    launcher = launch(inputs, out)
    after(10, out, launcher)
    os.kill(worker(launcher, rank), signal.SIGTERM)
    assert launcher.wait() == 1
    stopped = steps(out)[-1]
    assert newest_step(out / "checkpoints") == stopped < 60
    assert not (out / "summary.json").exists()
    assert f"stopped after step {stopped} of 60" in said(out).read_text()
    assert launch(inputs, out).wait() == 0
    assert {name: (out / name).read_bytes() for name in ADAPTER} == whole
