"""Runs that are killed at any moment, or stopped by signals, a full disk or a lack of memory, and resumed."""

import contextlib
import os
import random
import re
import resource
import shutil
import signal
import sys
import time

import pytest
import torch

from minilora import cli
from minilora.runs.reports import ProgressBar
from tests.models import long
from tests.ranks import start_process
from tests.runs import ADAPTER, finetune, starts, steps, words
from tests.training import newest_step

pytestmark = [pytest.mark.reliability, pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")]
STEPS, INTERVAL = 16, 2
KINDS = {
    "lora": {},
    "nf4": {"quantize": "nf4"},
    "dora": {"use_dora": True},
    "accumulated": {"gradient_accumulation_steps": 3},
    "best": {"eval_steps": 3, "keep": "best"},
    "bfloat16": {"dtype": "bfloat16"},
}
SHORT = {**dict.fromkeys(KINDS, 1), "lora": 3}  # kills of each kind


def command(directory, out, **changes):
    return words(directory, out, **{"max_steps": STEPS, "save_steps": INTERVAL, **changes})


def start(words, errors=os.devnull, file_bytes=None):
    """Begin a command, whose messages go into a file, and which may write files up to a size; its process."""
    return start_process(execute, [str(word) for word in words], errors, file_bytes)


def execute(words, errors, file_bytes):
    with open(errors, "w") as told, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(told.fileno(), 2)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes,) * 2)
    os._exit(cli.main(words))  # at once: a signal from here on would meet no command


def wait(process):
    """Wait for the end of a command; its status, negative if a signal killed it."""
    process.join()
    return process.exitcode


def kill(process, number=signal.SIGKILL):
    with contextlib.suppress(ProcessLookupError):  # it may have ended
        os.kill(process.pid, number)


def result(out):
    names = [name for name in (*ADAPTER, "config.json", "model.safetensors") if (out / name).is_file()]
    assert names
    return {name: (out / name).read_bytes() for name in names}


def steps_made(out):
    """How many steps a run that may be at work has written down."""
    try:
        return (out / "metrics.jsonl").read_text().count('"loss"')
    except FileNotFoundError:
        return 0


def leftovers(out):
    """Files; a save that was interrupted may leave its directory, empty."""
    return [path for path in out.rglob(".*") if path.name != ".lock" and (path.is_file() or any(path.iterdir()))]


@pytest.fixture(scope="module")
def whole(directory, tmp_path_factory):
    """A function: the result of a run of a kind that was never killed, and the seconds that it took."""
    found = {}

    def make(kind):
        if kind not in found:
            out, began = tmp_path_factory.mktemp("whole") / "out", time.monotonic()
            assert wait(start(command(directory, out, **KINDS[kind]))) == 0
            found[kind] = result(out), time.monotonic() - began
        return found[kind]

    return make


@pytest.mark.parametrize(("kind", "count"), [*SHORT.items(), *long(*((kind, 40) for kind in KINDS))])
def test_a_run_killed_at_any_moment_ends_in_the_bytes_of_one_that_never_was(directory, whole, tmp_path, kind, count):
    expected, seconds = whole(kind)
    draw, moments = random.Random(f"{kind}{count}"), []
    for i in range(count):
        out, status = tmp_path / f"{i}", 0
        while status != -signal.SIGKILL:  # on busy cores the run may be over before it is killed
            shutil.rmtree(out, ignore_errors=True)
            process, step = start(command(directory, out / "run", **KINDS[kind])), draw.randrange(STEPS + 1)
            while steps_made(out / "run") < step and process.is_alive():
                time.sleep(0.001)
            time.sleep(draw.random() * seconds * (INTERVAL / STEPS if step else 0.5))  # steps are written down in pairs
            kill(process)
            status = wait(process)
        done = steps_made(out / "run")
        status = wait(start(command(directory, out / "run", **KINDS[kind])))
        assert status == 0  # also if it was finished when it was killed
        assert result(out / "run") == expected
        assert steps(out / "run") == list(range(1, STEPS + 1))
        assert not leftovers(out)
        assert cli.main(["inspect", str(out / "run")]) == 0
        if len(starts(out / "run")) > 1:
            assert done - starts(out / "run")[-1] <= INTERVAL
            moments.append(done)
    print(f"{kind}: {count} kills, after steps {sorted(moments)}")


@pytest.mark.parametrize("seed", [*range(2), *long(*range(2, 40))])
def test_a_signal_ends_a_run_with_its_number_and_nothing_is_lost(directory, whole, tmp_path, seed):
    expected, seconds = whole("lora")
    draw, out = random.Random(seed), tmp_path / "run"
    number = draw.choice([signal.SIGINT, signal.SIGTERM])
    status = 0
    while status == 0:  # the run was faster than the signal
        shutil.rmtree(out, ignore_errors=True)
        process = start(command(directory, out))
        time.sleep(draw.random() * seconds)
        kill(process, number)
        if twice := draw.random() < 0.3:
            kill(process, number)
        status = wait(process)
    assert status == 128 + number or twice  # the second may end what ends the command
    assert not leftovers(tmp_path)
    assert wait(start(command(directory, out))) == 0  # also if the signal came when it was finished
    assert result(out) == expected


@pytest.mark.parametrize("size", [300, 2000, 9000, *long(1000, 4000, 6000, 12000, 20000)])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(directory, tmp_path, size):
    out, errors = tmp_path / "run", tmp_path / "errors"
    status = wait(start(command(directory, out), errors, size))
    if status == 0:
        return  # no file was as large
    last = errors.read_text().splitlines()[-1]
    assert re.match("minilora: .*(No space left|File too large)", last)
    assert not leftovers(tmp_path)
    assert newest_step(out / "checkpoints") % INTERVAL == 0
    assert wait(start(command(directory, out))) == 0


def test_a_lack_of_memory_is_one_line_and_the_last_checkpoint_stays(directory, tmp_path, monkeypatch, capsys):
    report = ProgressBar.__call__

    def exhaust(bar, record):
        if record["step"] == 5:
            torch.empty(2**55)
        return report(bar, record)

    with monkeypatch.context() as patch:
        patch.setattr(ProgressBar, "__call__", exhaust)
        assert cli.main(command(directory, tmp_path / "run")) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("minilora: out of memory: ")
    assert "a smaller --batch-size" in last
    assert newest_step(tmp_path / "run" / "checkpoints") == 4
    assert not leftovers(tmp_path)
    assert cli.main(command(directory, tmp_path / "run")) == 0


# --- two at once ---


@pytest.mark.parametrize("seed", [0, *long(*range(1, 20))])
@pytest.mark.parametrize("what", ["new run", "stopped run", "merge", "quantize"])
def test_of_two_commands_that_start_at_once_in_one_directory_one_is_refused(directory, tmp_path, what, seed):
    out, errors = tmp_path / "out", [tmp_path / "a", tmp_path / "b"]
    if what == "merge":
        assert finetune(directory, tmp_path / "adapter", max_steps=1) == 0
        words = ["merge", f"--model={directory / 'model'}", f"--adapter={tmp_path / 'adapter'}", f"--out={out}"]
    elif what == "quantize":
        words = ["quantize", f"--model={directory / 'model'}", f"--out={out}"]
    else:
        words = command(directory, out)
        if what == "stopped run":
            stopped = start(words)
            while not newest_step(out / "checkpoints"):
                time.sleep(0.01)
            kill(stopped, signal.SIGTERM)
            wait(stopped)
    processes = []
    for i, path in enumerate(errors):
        time.sleep(i * seed * 0.003)
        processes.append(start(words, path))
    statuses = [wait(process) for process in processes]
    said = [path.read_text() for path in errors]
    if any("nothing is left to do" in each for each in said):  # on busy cores one may begin when the other has ended
        assert statuses == [0, 0]
    else:
        assert sorted(statuses) == [0, 1]
        refused = said[statuses.index(1)]
        assert any(words in refused for words in ("is at work there", "holds"))
    assert not leftovers(tmp_path)
