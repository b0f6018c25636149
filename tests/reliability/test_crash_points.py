"""Every writer, stopped before and after each of its operations, and by a loss of power after each of them."""

import contextlib
import shutil

import pytest
import torch

import minilora as ml
from minilora import cli
from minilora.adapters.layout import read_adapter
from minilora.files import finish_commit
from minilora.models.hub import locate
from minilora.runs.checkpoints import checkpoints, newest_checkpoint, step_of
from tests.models import long, randomize_adapters_
from tests.reliability.disk import crashes, put, recorded
from tests.runs import contents, finetune, steps
from tests.training import adapted, random_rows

pytestmark = pytest.mark.reliability
BOTH = pytest.mark.parametrize("is_power_lost", [False, True], ids=["killed", "power lost"])


@pytest.fixture(scope="module")
def finished(directory):
    assert finetune(directory, directory / "run", save_total_limit=99, samples=0) == 0
    return directory


def log_of(directory, write):
    """What `write` does below a directory, and a copy of the directory as it was before."""
    directory.mkdir(exist_ok=True)
    before = shutil.copytree(directory, directory.with_name(f"{directory.name}-before"))
    with recorded(directory) as log:
        write()
    return before, log


def model(seed, alpha):
    built = adapted(dtype=torch.float32, layers=1, lora_alpha=alpha)
    return randomize_adapters_(built, seed) or built


# --- an adapter ---


def numbers(directory):
    """What an adapter computes with: scales and tensors; None if it is refused."""
    try:
        stored = read_adapter(locate(directory, "adapter").path)
    except ml.FormatError:
        return None
    config = stored.config()
    return {
        path: (config.scale(path), held["lora_A"].tolist(), held["lora_B"].tolist())
        for path, held in stored.tensors.items()
    }


@BOTH
@pytest.mark.parametrize("is_over", [False, True], ids=["new", "over another"])
def test_a_saved_adapter_is_the_old_one_or_the_new_one(tmp_path, is_over, is_power_lost):
    directory, old, new = tmp_path / "adapter", model(1, 6), model(2, 24)
    if is_over:
        ml.save_adapter(old, directory)
    accepted = [numbers(directory) if is_over else None]
    before, log = log_of(directory, lambda: ml.save_adapter(new, directory))
    accepted.append(numbers(directory))
    assert accepted[0] != accepted[1]
    found = set()
    for label, state in crashes(before, log, is_power_lost):
        now = numbers(put(state, tmp_path / "state"))
        assert now in accepted, label
        found.add(accepted.index(now))
        ml.save_adapter(new, tmp_path / "state")
        assert numbers(tmp_path / "state") == accepted[1], label
    assert found == {0, 1}
    print(f"{len(log)} operations")


# --- checkpoints ---

CONFIG = {"batch_size": 2, "learning_rate": 0.01, "max_steps": 5, "save_steps": 1}


def train(folder, **config):
    built = adapted(dtype=torch.float32, is_fresh=True, layers=1, lora_dropout=0.3)
    ml.train(built, random_rows(1, 9), ml.TrainConfig(**{**CONFIG, **config}), None, (), folder)


def weights(checkpoint):
    return (checkpoint / "trained.safetensors").read_bytes(), (checkpoint / "optimizer.safetensors").read_bytes()


@BOTH
def test_of_checkpoints_the_newest_whole_one_is_that_of_its_step_and_a_saved_one_stays(tmp_path, is_power_lost):
    train(tmp_path / "whole", save_total_limit=99)
    expected = {step_of(path): weights(path) for path in checkpoints(tmp_path / "whole")}
    before, log = log_of(tmp_path / "run", lambda: train(tmp_path / "run" / "checkpoints", save_total_limit=1))
    reached, count = 0, 0
    for label, state in crashes(before, log, is_power_lost):
        folder, count = put(state, tmp_path / "state") / "checkpoints", count + 1
        newest, _ = newest_checkpoint(folder)
        assert newest is None or weights(newest) == expected[step_of(newest)], label
        assert step_of(newest) >= reached - is_power_lost, label  # the last rename may not be on the disk yet
        reached = max(reached, step_of(newest))
        if count % 40 == 0:
            train(folder, save_total_limit=1)
            assert weights(folder / "step-000005") == expected[5], label
            assert [path.name for path in folder.iterdir() if not path.name.endswith(".tmp")] == ["step-000005"], label
    assert reached == 5
    print(f"{len(log)} operations, {count} states")


# --- a run ---


@pytest.mark.parametrize(("is_power_lost", "every"), [(False, 9), (True, 25), *long((False, 1), (True, 1))])
def test_a_run_ends_in_the_same_bytes_whatever_the_crash_left(tmp_path, directory, every, is_power_lost):
    options = {"max_steps": 4, "save_total_limit": 1, "samples": 0}
    assert finetune(directory, tmp_path / "whole", **options) == 0
    before, log = log_of(tmp_path / "run", lambda: finetune(directory, tmp_path / "run", **options))
    count = 0
    for i, (label, state) in enumerate(crashes(before, log, is_power_lost)):
        if i % every:
            continue
        out, count = put(state, tmp_path / "state"), count + 1
        assert finetune(directory, out, **options) == 0, label
        assert contents(out) == contents(tmp_path / "whole"), label
        assert steps(out) == [1, 2, 3, 4], label
        assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}, label
        assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000004"], label
        assert cli.main(["inspect", str(out)]) == 0, label
    print(f"{len(log)} operations, {count} states resumed")


# --- commands ---


def commands(directory):
    named = [f"--model={directory / 'model'}"]
    return {
        "merge": ["merge", *named, f"--adapter={directory / 'run'}"],
        "merge as adapter": ["merge", "--as-adapter", f"--adapter={directory / 'run'}"],
        "export": ["export", f"--adapter={directory / 'run'}"],
        "quantize": ["quantize", *named],
    }


def loads(directory):
    """Whether a directory can be used as a model or an adapter."""
    finish_commit(directory)
    with contextlib.suppress(ml.FormatError):
        kind = "adapter" if (directory / "adapter_config.json").is_file() else "model"
        path = locate(directory, kind).path
        return bool(read_adapter(path) if kind == "adapter" else ml.load_model(path))
    return False


@pytest.mark.parametrize(("is_power_lost", "every"), [(False, 1), (True, 4), *long((True, 1))])
@pytest.mark.parametrize("command", ["merge", "merge as adapter", "export", "quantize"])
def test_a_command_leaves_all_or_nothing_and_can_be_repeated(tmp_path, finished, command, every, is_power_lost):
    words = commands(finished)[command]

    def write(out):
        return cli.main([*words, f"--out={out / 'out'}"])

    before, log = log_of(tmp_path / "place", lambda: write(tmp_path / "place"))
    whole = {path.name: path.read_bytes() for path in (tmp_path / "place" / "out").iterdir()}
    assert loads(tmp_path / "place" / "out")
    results = {False: 0, True: 0}
    for i, (label, state) in enumerate(crashes(before, log, is_power_lost)):
        if i % every:
            continue
        place = put(state, tmp_path / "state")
        is_whole = (place / "out").is_dir() and loads(place / "out")
        status = write(place)
        results[is_whole] += 1
        assert status == is_whole, label  # 1: it holds files
        assert {path.name: path.read_bytes() for path in (place / "out").iterdir()} == whole, label
        assert [path.name for path in place.iterdir()] == ["out"], label
    assert all(results.values()), results
    print(f"{len(log)} operations, {results} states")
