"""Bits that flip and files that are cut: every one is noticed."""

import random
import shutil

import pytest
import torch

import minilora as ml
from minilora.files import MANIFEST
from minilora.runs.checkpoints import newest_checkpoint, step_of
from tests.models import long
from tests.training import adapted, contents, random_rows, stop_after

pytestmark = pytest.mark.reliability
CONFIG = ml.TrainConfig(batch_size=2, learning_rate=0.01, max_steps=6, save_steps=1)


def fresh():
    return adapted(dtype=torch.float32, is_fresh=True, layers=1, lora_dropout=0.3)


def train(folder, on_step=None):
    return ml.train(fresh(), random_rows(1, 9), CONFIG, on_step, (), folder)


def spoil(directory, draw, is_cut):
    """Flip a bit of a file of a directory, or cut the file; what was done."""
    path = draw.choice(sorted(directory.iterdir()))
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
def test_a_damaged_adapter_is_refused(tmp_path, is_cut, count):
    ml.save_adapter(fresh(), tmp_path / "whole")
    draw = random.Random(count)
    for _ in range(count):
        path = shutil.copytree(tmp_path / "whole", tmp_path / "adapter")
        done = spoil(path, draw, is_cut)
        model = adapted(dtype=torch.float32, layers=1)
        try:
            ml.load_adapter(model, path, "other")
        except ml.FormatError as error:
            assert str(path) in str(error)  # noqa: PT017 - the only end that is right
        else:
            pytest.fail(done)
        shutil.rmtree(path)


def test_an_adapter_without_a_manifest_is_one_of_another_tool_and_is_loaded(tmp_path):
    ml.save_adapter(fresh(), tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 6', '"lora_alpha": 12'))
    with pytest.raises(ml.FormatError, match=r"not as it was written: adapter_config\.json; .* remove"):
        ml.load_adapter(adapted(dtype=torch.float32, layers=1), tmp_path, "other")
    (tmp_path / MANIFEST).unlink()
    ml.load_adapter(adapted(dtype=torch.float32, layers=1), tmp_path, "other")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 2_000_000, "not JSON"),
        (" " * 17_000_000, "at most 16,777,216 are accepted"),
        ('{"files": ["adapter_config.json"]}', "is no manifest"),
        ('{"files": {"../adapter_config.json": null}}', "is no manifest"),
    ],
    ids=["nested", "large", "names", "outside"],
)
def test_a_manifest_from_outside_is_bounded_and_refused_by_name(tmp_path, text, problem):
    ml.save_adapter(fresh(), tmp_path)
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ml.FormatError, match=f"{MANIFEST}: .*{problem}"):
        ml.load_adapter(adapted(dtype=torch.float32, layers=1), tmp_path, "other")
