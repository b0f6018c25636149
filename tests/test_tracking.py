import sys
from types import ModuleType, SimpleNamespace

import pytest

import minilora as ml
from minilora.cli.finetune import check_settings, find_inputs
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
        assert project == "minilora"
        run = SimpleNamespace(name=name, config=config, lines=[], is_finished=False)
        run.log = lambda line, step: run.lines.append({**line, "step": step})
        run.finish = lambda: setattr(run, "is_finished", True)
        sent.append(run)
        return run

    library.init, library.__spec__ = init, True
    monkeypatch.setitem(sys.modules, request.param, library)

    def read(directory):
        (run,) = sent
        assert run.name == directory.name
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


def test_a_resumed_run_shows_each_step_once_as_it_was_done_last(tmp_path):
    pytest.importorskip("tensorboard")
    for first, end, factor in ((1, 6, 1), (4, 7, 10)):
        tracker = ml.Tracker("tensorboard", tmp_path, step=first - 1)
        for step in range(first, end):
            tracker(record(step, loss=factor * step))
            assert read_board(tmp_path / "tensorboard")["loss"][-1] == (step, factor * step)  # on the disk at once
        tracker.close()
    found = read_board(tmp_path / "tensorboard")
    assert found["loss"] == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60)]


@pytest.mark.parametrize("library", LIBRARIES)
def test_without_its_library_the_error_says_before_a_run_what_to_install(library, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    settings = Settings(RunConfig(report=library))
    with pytest.raises(ml.ConfigError, match=f"--report {library} needs the package {library}: pip install {library}"):
        check_settings(*find_inputs(settings))
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ModuleNotFoundError, match=library):
        ml.Tracker(library, tmp_path)
