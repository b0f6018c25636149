import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import minilora as ml
from minilora.cli.finetune import check_settings, find_inputs
from minilora.runs.reports import read_records
from minilora.runs.settings import RunConfig, Settings
from tests import runs

LIBRARIES = ("tensorboard", "trackio", "wandb")


def record(step, loss=1.0):
    return {"step": step, "loss": loss, "learning_rate": 1e-3 / step, "grad_norm": 2.0 + step, "tokens": 5}


def numbers(records):
    """Every number that a library gets: {name: [(step, value), …]}."""
    names = {key for each in records for key in each} - {"step", "best_step"}
    return {name: [(r["step"], r[name]) for r in records if name in r] for name in names}


@pytest.fixture(params=LIBRARIES)
def tracked(request, monkeypatch):
    """A library, and a function that returns what it was sent for a directory: real TensorBoard, and two stand-ins."""
    if request.param == "tensorboard":
        pytest.importorskip("tensorboard")
        return request.param, lambda directory: read_board(directory / "tensorboard")
    library, sent = ModuleType(request.param), []

    def init(project, name, config):
        run = SimpleNamespace(project=project, name=name, config=config, lines=[], is_finished=False)
        run.log = lambda line, step: run.lines.append({**line, "step": step})
        run.finish = lambda: setattr(run, "is_finished", True)
        sent.append(run)
        return run

    library.init, library.__spec__ = init, True
    monkeypatch.setitem(sys.modules, request.param, library)

    def read(directory):
        (run,) = sent
        assert (run.project, run.name) == ("minilora", directory.name)
        assert run.is_finished
        return numbers(run.lines)

    return request.param, read


def read_board(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def approximately(found):
    return {name: [(step, pytest.approx(value)) for step, value in points] for name, points in found.items()}


def test_a_run_reports_what_it_writes_to_its_metrics(tracked, tmp_path):
    library, read = tracked
    directory = runs.write_inputs(tmp_path)
    assert runs.finetune(directory, tmp_path / "run", report=library, max_steps=2, eval_steps=1) == 0
    written = runs.metrics(tmp_path / "run")
    assert {name: points for name, points in read(tmp_path / "run").items() if name != "best_step"} == approximately(
        numbers(written)
    )


def read_metrics(directory):
    return numbers(read_records(directory / "metrics.jsonl"))


def reader_of(library):
    if library == "jsonl":
        return read_metrics
    pytest.importorskip("tensorboard")
    return lambda directory: read_board(directory / "tensorboard")


def test_a_run_is_in_the_project_and_has_the_name_that_are_given(monkeypatch, tmp_path):
    library, given = ModuleType("wandb"), []
    library.init = lambda **settings: given.append(settings)
    monkeypatch.setitem(sys.modules, "wandb", library)
    ml.Tracker("wandb", tmp_path, {"r": 3}, project="rewards", name="third")
    assert given == [{"project": "rewards", "name": "third", "config": {"r": 3}}]


@pytest.mark.parametrize("library", ["jsonl", "tensorboard"])
def test_a_resumed_run_shows_each_step_once_as_it_was_done_last(library, tmp_path):
    read = reader_of(library)
    for first, end, factor in ((1, 6, 1), (4, 7, 10)):
        tracker = ml.Tracker(library, tmp_path)
        for step in range(first, end):
            tracker(record(step, loss=factor * step))
            assert read(tmp_path)["loss"][-1] == (step, factor * step)  # on the disk at once
        tracker.close()
    assert read(tmp_path)["loss"] == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60)]


@pytest.mark.parametrize("library", ["jsonl", "tensorboard"])
def test_what_a_loss_measures_is_tracked_by_its_name(library, tmp_path):
    def loss(model, rows):
        x = torch.stack(rows)
        return model(x).square().sum(), len(rows), {"reward": (x.sum(), len(rows))}

    read, rows, tracker = reader_of(library), list(torch.arange(8.0).view(8, 1)), ml.Tracker(library, tmp_path)
    config = ml.TrainConfig(batch_size=2, eval_steps=2)
    ml.train(torch.nn.Linear(1, 1), rows, config, tracker, rows[:2], loss=loss)
    tracker.close()
    found = read(tmp_path)
    assert [step for step, _ in found["reward"]] == [1, 2, 3, 4]
    assert sum(value for _, value in found["reward"]) == 14.0
    assert found["eval_reward"] == [(2, 0.5), (4, 0.5)]


@pytest.mark.parametrize("library", LIBRARIES)
def test_without_its_library_the_error_says_before_a_run_what_to_install(library, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    settings = Settings(RunConfig(report=library))
    with pytest.raises(ml.ConfigError, match=f"--report {library} needs the package {library}: pip install {library}"):
        check_settings(*find_inputs(settings))
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ModuleNotFoundError, match=library):
        ml.Tracker(library, tmp_path)
