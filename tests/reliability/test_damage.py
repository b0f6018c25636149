"""Bits that flip and files that are cut: every one is noticed."""

import random
import shutil

import pytest
import torch
from safetensors.torch import load_file

import minilora as ml
from minilora.files import MANIFEST
from minilora.runs.checkpoints import newest_checkpoint, step_of
from tests.files import save_file
from tests.models import long
from tests.training import adapted, contents, random_rows, stop_after

pytestmark = pytest.mark.reliability
CONFIG = ml.TrainConfig(batch_size=2, learning_rate=0.01, max_steps=6, save_steps=1)


def fresh():
    return adapted(dtype=torch.float32, is_fresh=True, layers=1, lora_dropout=0.3)


def train(folder, on_step=None):
    return ml.train(fresh(), random_rows(1, 9), CONFIG, on_step, (), folder)


def spoil(directory, draw, is_cut):
    """Flip a bit of a file, or of one in a directory, or cut it; what was done."""
    path = directory if directory.is_file() else draw.choice(sorted(directory.iterdir()))
    content, place = bytearray(path.read_bytes()), draw.randrange(path.stat().st_size)
    content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(content[:place] if is_cut else content)
    return f"{path.name} at {place}"


CASES = pytest.mark.parametrize(
    ("is_cut", "count"), [(False, 40), (True, 16), *long((False, 150), (True, 32))], ids=lambda value: str(value)
)


@CASES
def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(tmp_path, is_cut, count):
    train(tmp_path / "whole")
    train(tmp_path / "stopped", stop_after(4))
    draw = random.Random(count)
    for i in range(count):
        run = shutil.copytree(tmp_path / "stopped", tmp_path / "run", dirs_exist_ok=True)
        done = spoil(run / "step-000004", draw, is_cut)
        newest, damaged = newest_checkpoint(run)
        assert step_of(newest) == 3, done
        assert len(damaged) == 1, done
        assert "step-000004" in damaged[0], done
        if i % 8 == 0:
            result = train(run)
            assert result.damaged == damaged
            assert contents(run) == contents(tmp_path / "whole"), done
            assert [path.name for path in sorted(run.iterdir())] == ["step-000005", "step-000006"]
        shutil.rmtree(run)


def test_a_run_whose_checkpoints_are_all_damaged_begins_again(tmp_path):
    train(tmp_path / "whole")
    train(tmp_path / "run", stop_after(4))
    for path in (tmp_path / "run").iterdir():
        (path / "state.json").unlink()
    result = train(tmp_path / "run")
    assert len(result.damaged) == 2
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_damaged_checkpoint_is_not_one_of_those_that_are_kept(tmp_path):
    """Or the only whole one would be removed for it."""
    config = vars(CONFIG) | {"save_steps": 2, "save_total_limit": 3}
    ml.train(fresh(), random_rows(1, 9), ml.TrainConfig(**config), None, (), tmp_path)
    (tmp_path / "step-000006" / "state.json").unlink()
    seen = []

    def look(record):
        seen.append(sorted(step_of(path) for path in tmp_path.iterdir()))

    config |= {"save_steps": 1, "save_total_limit": 1}
    ml.train(fresh(), random_rows(1, 9), ml.TrainConfig(**config), look, (), tmp_path)
    assert seen == [[4, 6], [5]]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000006"]


@CASES
def test_an_adapter_whose_weights_are_damaged_is_refused_unless_another_tool_wrote_them(tmp_path, is_cut, count):
    ml.save_adapter(fresh(), tmp_path / "whole")
    weights, draw = tmp_path / "whole" / "adapter_model.safetensors", random.Random(count)
    content = weights.read_bytes()
    for _ in range(count):
        done = spoil(weights, draw, is_cut)
        with pytest.raises(ml.FormatError, match=f"^{tmp_path / 'whole'}.*changed since minilora wrote it") as error:
            ml.load_adapter(adapted(dtype=torch.float32, layers=1), tmp_path / "whole", "other")
        assert weights.name in str(error.value), done
        weights.write_bytes(content)
    tensors = load_file(weights)
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, weights)  # removes the manifest
    ml.load_adapter(adapted(dtype=torch.float32, layers=1), tmp_path / "whole", "other")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 2_000_000, "not JSON"),
        (" " * 17_000_000, "at most 16,777,216 are accepted"),
        ('{"files": ["adapter_config.json"]}', "is not a manifest"),
        ('{"files": {"../adapter_config.json": null}}', "is not a manifest"),
    ],
    ids=["nested", "large", "names", "outside"],
)
def test_a_manifest_from_outside_is_bounded_and_refused_by_name(tmp_path, text, problem):
    ml.save_adapter(fresh(), tmp_path)
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ml.FormatError, match=f"{MANIFEST}: .*{problem}"):
        ml.load_adapter(adapted(dtype=torch.float32, layers=1), tmp_path, "other")
