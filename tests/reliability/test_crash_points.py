"""Every writer, killed before and after each change that it makes to a directory."""

import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

import minilora as ml
from minilora import cli
from minilora.files import MANIFEST
from minilora.runs.checkpoints import checkpoints, newest_checkpoint, step_of
from tests.models import long, randomize_adapters_, tiny_model
from tests.runs import contents, finetune, steps
from tests.training import adapted, random_rows

pytestmark = pytest.mark.reliability
IDS = torch.tensor([[3, 1, 4, 1, 5]])


@contextmanager
def killed(root, tmp_path):
    """Copies of a directory, before each of its files that the block creates, renames or removes, and at the end."""
    found, copies = [], tmp_path / "copies"
    copies.mkdir()
    root.mkdir(exist_ok=True)

    def copying(operation):
        def call(path, *more, **options):
            if copies not in Path(path).parents:
                copy()
            return operation(path, *more, **options)

        return call

    def copy():
        found.append(shutil.copytree(root, copies / f"{len(found):04}"))

    with pytest.MonkeyPatch.context() as patch:
        for name in ("mkdir", "rmdir", "unlink", "replace"):
            patch.setattr(os, name, copying(getattr(os, name)))
        yield found
    copy()


def adapter(seed, alpha):
    model = adapted(dtype=torch.float32, lora_alpha=alpha)
    randomize_adapters_(model, seed)
    return lambda directory: ml.save_adapter(model, directory)


def model(seed, theta, shard_bytes):
    written = tiny_model(dtype=torch.float32, seed=seed, num_hidden_layers=1, rope_theta=theta)
    return lambda directory: ml.save_model(written, directory, shard_bytes=shard_bytes)


def outputs(directory):
    """What the adapter or the model of a directory computes; None if it is refused."""
    with suppress(ml.FormatError):
        if not any(directory.glob("adapter*")):
            return ml.load_model(directory)(IDS).tolist()
        base = tiny_model(dtype=torch.float32, num_hidden_layers=4)
        ml.load_adapter(base, directory)
        return base(IDS).tolist()
    return None


WRITERS = {
    "adapter": (adapter(1, 6), adapter(2, 24)),
    "model": (model(1, 1e4, 10**9), model(2, 5e5, 10**9)),
    "model in place of shards": (model(1, 1e4, 10**4), model(2, 5e5, 10**9)),
    "shards in place of a model": (model(1, 1e4, 10**9), model(2, 5e5, 10**4)),
    "fewer shards": (model(1, 1e4, 10**4), model(2, 5e5, 2 * 10**4)),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("is_over", [False, True], ids=["new", "over another"])
def test_a_saved_adapter_or_model_is_the_old_one_or_the_new_one_or_refused(tmp_path, kind, is_over):
    directory, (write_old, write_new) = tmp_path / "written", WRITERS[kind]
    write_new(tmp_path / "new")
    new = outputs(tmp_path / "new")
    if is_over:
        write_old(directory)
    old = outputs(directory) if is_over else None
    assert (old is not None) == is_over
    with killed(directory, tmp_path) as copies:
        write_new(directory)
    found = [outputs(copy) for copy in copies]
    assert new not in (old, None)
    changed, done = len(found) - found[::-1].index(old), found.index(new)
    assert found == [*[old] * changed, *[None] * (done - changed), *[new] * (len(found) - done)]
    for copy in copies:
        write_new(copy)
        assert outputs(copy) == new


# --- checkpoints ---

CONFIG = {"batch_size": 2, "learning_rate": 0.01, "max_steps": 5, "save_steps": 1}


def train(folder, **config):
    built = adapted(dtype=torch.float32, is_fresh=True, layers=1, lora_dropout=0.3)
    ml.train(built, random_rows(1, 9), ml.TrainConfig(**{**CONFIG, **config}), None, (), folder)


def weights(checkpoint):
    return (checkpoint / "trained.safetensors").read_bytes(), (checkpoint / "optimizer.safetensors").read_bytes()


def test_of_checkpoints_the_newest_whole_one_is_that_of_its_step_and_a_saved_one_stays(tmp_path):
    train(tmp_path / "whole", save_total_limit=99)
    expected = {step_of(path): weights(path) for path in checkpoints(tmp_path / "whole")}
    with killed(tmp_path / "run", tmp_path) as copies:
        train(tmp_path / "run" / "checkpoints", save_total_limit=1)
    reached = 0
    for i, copy in enumerate(copies):
        folder = copy / "checkpoints"
        newest, _ = newest_checkpoint(folder)
        assert newest is None or weights(newest) == expected[step_of(newest)]
        assert step_of(newest) >= reached
        reached = step_of(newest)
        if i % 20 == 0:
            train(folder, save_total_limit=1)
            assert weights(folder / "step-000005") == expected[5]
            assert [path.name for path in folder.iterdir() if not path.name.endswith(".tmp")] == ["step-000005"]
    assert reached == 5


# --- runs and commands ---


@pytest.mark.parametrize("every", [5, *long(1)])
def test_a_run_ends_in_the_same_bytes_whatever_a_kill_left(tmp_path, directory, every):
    options = {"max_steps": 4, "save_total_limit": 1, "samples": 0}
    with killed(tmp_path / "run", tmp_path) as copies:
        assert finetune(directory, tmp_path / "run", **options) == 0
    for copy in copies[::-every]:
        out = copy.rename(tmp_path / "state")
        assert finetune(directory, out, **options) == 0
        assert contents(out) == contents(tmp_path / "run")
        assert steps(out) == [1, 2, 3, 4]
        names = {path.name for path in (tmp_path / "run").iterdir()}
        assert {path.name for path in out.iterdir()} | {MANIFEST} == names  # which the kill may have prevented
        assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000004"]
        assert cli.main(["inspect", str(out)]) == 0
        shutil.rmtree(out)


@pytest.fixture(scope="module")
def finished(directory):
    assert finetune(directory, directory / "run", save_total_limit=99, samples=0) == 0
    return directory


@pytest.mark.parametrize("command", ["merge", "export --for=peft", "quantize"])
def test_a_command_leaves_all_or_what_is_refused_and_an_empty_directory_is_filled_again(tmp_path, finished, command):
    flags = [f"--model={finished / 'model'}"] if command in ("merge", "quantize") else []
    flags += [] if command == "quantize" else [f"--adapter={finished / 'run'}"]

    def write(out):
        return cli.main([*command.split(), *flags, f"--out={out}"])

    with killed(tmp_path / "place", tmp_path) as copies:
        assert write(tmp_path / "place" / "out") == 0
    whole = {path.name: path.read_bytes() for path in (tmp_path / "place" / "out").iterdir()}
    results = set()
    for copy in copies:
        out = copy / "out"
        written = {path.name for path in out.glob("[!.]*")}
        is_loaded = out.is_dir() and outputs(out) is not None
        assert not is_loaded or written >= whole.keys() - {MANIFEST}
        assert write(out) == bool(written)
        results.add((bool(written), is_loaded))
        if not written:
            assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    assert results == {(False, False), (True, False), (True, True)}
