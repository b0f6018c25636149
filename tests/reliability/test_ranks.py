"""Runs of several processes: one is killed or told to stop, and a run goes on with another number of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from minilora import cli
from minilora.files import TensorFile, write_tensors
from minilora.testing.compare import assert_parity
from tests.models import long
from tests.ranks import on_launched
from tests.runs import ADAPTER, metrics, starts, steps, unfinished, words, write_inputs
from tests.training import newest_step

pytestmark = [
    pytest.mark.reliability,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc"),
]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
CHANGES = {"max_steps": 60, "save_steps": 5, "samples": 0, "lr_scheduler": "constant", "warmup_steps": 0}


def launch(directory, out, *options):
    command = [*LAUNCH, *options, "-m", "minilora", *map(str, words(directory, out, **CHANGES))]
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
def whole(directory, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    assert launch(directory, out).wait() == 0
    return {name: (out / name).read_bytes() for name in ADAPTER}


def test_a_killed_rank_ends_the_run_which_torchrun_starts_again(directory, whole, tmp_path):
    out = tmp_path / "out"
    launcher = launch(directory, out, "--max-restarts=1")
    after(10, out, launcher)
    os.kill(worker(launcher, 1), signal.SIGKILL)
    assert launcher.wait(timeout=600) == 0, said(out).read_text()  # a rank waits for a lost one for an hour
    assert {name: (out / name).read_bytes() for name in ADAPTER} == whole
    assert len(starts(out)) == 2
    assert starts(out)[1] >= 10
    assert steps(out) == list(range(1, 61))


@pytest.mark.parametrize("rank", [1, *long(0)])
def test_a_signal_to_one_rank_stops_all_after_a_checkpoint(rank, directory, whole, tmp_path):
    out = tmp_path / "out"
    launcher = launch(directory, out)
    after(10, out, launcher)
    os.kill(worker(launcher, rank), signal.SIGTERM)
    assert launcher.wait() == 1
    stopped = steps(out)[-1]
    assert newest_step(out / "checkpoints") == stopped < 60
    assert not (out / "summary.json").exists()
    assert f"stopped after step {stopped} of 60" in said(out).read_text()
    assert launch(directory, out).wait() == 0
    assert {name: (out / name).read_bytes() for name in ADAPTER} == whole


def commands(*lines):
    """Run commands in turn; their statuses."""
    return [cli.main([str(word) for word in line]) for line in lines]


def losses(out):
    return torch.tensor([record.get("loss", record.get("eval_loss")) for record in metrics(out)], dtype=torch.float64)


def test_a_run_of_several_ranks_writes_one_adapter_and_resumes_with_any_number(directory, tmp_path):
    one, two, again, four, back = (tmp_path / name for name in ("one", "two", "again", "four", "back"))
    changes = {"save_total_limit": 9, "save_steps": 2, "eval_steps": 4, "samples": 1, "lr_scheduler": "cosine"}

    def command(out, **more):
        return words(directory, out, **changes, **more)

    assert commands(command(one)) == [0]
    assert on_launched(2, commands, command(two)) == [[0], [0]]
    assert_parity(losses(two), losses(one), 1e-4)
    for out in (again, four):
        unfinished(two, out, 4)
    assert on_launched(2, commands, command(again)) == [[0], [0]]
    assert [(again / name).read_bytes() for name in ADAPTER] == [(two / name).read_bytes() for name in ADAPTER]
    assert on_launched(4, commands, command(four, shard="base")) == [[0]] * 4
    assert commands(command(unfinished(four, back, 8))) == [0]
    assert starts(back) == [0, 4, 8]
    assert_parity(losses(back), losses(one), 1e-4)
    files = [TensorFile(out / "adapter_model.safetensors") for out in (back, one)]
    for name in files[0].shapes:
        assert_parity(*(file.read(name) for file in files), 1e-3)
    record = json.loads((back / "run.json").read_text())
    assert [(start["ranks"], start["shard"]) for start in record["starts"]] == [(2, "none"), (4, "base"), (1, "none")]


def with_another_model(directory, other, out):
    model = other if os.environ["RANK"] == "1" else directory / "model"
    return commands(words(directory, out, model=model))


def test_a_rank_with_another_base_stops_all(directory, tmp_path):
    write_inputs(tmp_path)
    weights = TensorFile(tmp_path / "model" / "model.safetensors")
    write_tensors(weights.path, {name: 2 * weights.read(name).clone() for name in weights.shapes})
    assert on_launched(2, with_another_model, directory, tmp_path / "model", tmp_path / "out") == [[1], [1]]
    assert not (tmp_path / "out").exists()
