import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import minilora as ml
from minilora.runs.checkpoints import State
from tests.models import long
from tests.training import adapted, as_written, copy_checkpoint, random_rows, stop_after, weights

ROWS, HELD_OUT = random_rows(1, 9), random_rows(9, 4)
# A learning rate at which the held-out loss falls and then rises; an evaluation after each of the 10 steps.
CONFIG = {"batch_size": 3, "epochs": 4, "max_steps": 10, "learning_rate": 0.05, "lr_scheduler": "constant"}
CONFIG |= {"eval_steps": 1, "keep": "best"}


def run(directory=None, model=None, on_step=None, held_out=HELD_OUT, **config):
    model = model or adapted(dtype=torch.float32, is_fresh=True, layers=2)
    config = ml.TrainConfig(**{**CONFIG, **config})
    return model, ml.train(model, ROWS, config, on_step, held_out, directory)


@pytest.fixture(scope="module")
def watched():
    """After each step, the loss and the weights of a run that keeps the last adapter."""
    model, losses, snapshots = adapted(dtype=torch.float32, is_fresh=True, layers=2), [], []

    def watch(record):
        if "eval_loss" in record:
            losses.append(record["eval_loss"])
            snapshots.append(weights(model))

    run(model=model, on_step=watch, keep="last")
    assert 0 < losses.index(min(losses)) < len(losses) - 4  # or these tests would show nothing
    return losses, snapshots


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that keeps the best adapter: its checkpoints, its model and its result."""
    directory = tmp_path_factory.mktemp("whole")
    return directory, *run(directory, save_steps=1, save_total_limit=99)


def test_of_evaluations_now_and_then_the_best_of_those_is_kept(watched):
    losses, snapshots = watched
    evaluated = [3, 7, 9]  # after steps 4 and 8, and at the end
    model, result = run(eval_steps=4)
    best = min(evaluated, key=losses.__getitem__)
    assert result.kept == best + 1
    assert torch.equal(weights(model), snapshots[best])


@pytest.mark.parametrize("step", [2, 5, *long(1, 3, 4, 6)])
def test_a_run_resumed_after_any_step_keeps_the_same_adapter(whole, tmp_path, step):
    directory, expected, once = whole
    copy_checkpoint(directory, step, tmp_path)
    found, again = run(tmp_path)
    assert torch.equal(weights(found), weights(expected))
    assert (again.steps, again.kept, again.finished) == (once.steps, once.kept, True)


def test_a_stopped_run_keeps_what_it_has_and_finds_the_best_when_it_goes_on(whole, tmp_path):
    _, expected, once = whole
    model, stopped = run(tmp_path, on_step=stop_after(5))
    assert (stopped.finished, stopped.kept) == (False, 5)
    assert not torch.equal(weights(model), weights(expected))
    found, again = run(tmp_path)
    assert torch.equal(weights(found), weights(expected))
    assert again.kept == once.kept


def test_a_best_adapter_of_other_tensors_is_refused(whole, tmp_path):
    newest = copy_checkpoint(whole[0], 6, tmp_path)
    shutil.copy(newest / "optimizer.safetensors", newest / "best.safetensors")
    as_written(newest)
    with pytest.raises(ml.FormatError, match=r"best\.safetensors: holds other tensors"):
        run(tmp_path)


def test_a_checkpoint_that_lacks_what_is_known_of_the_best_adapter_is_refused(whole, tmp_path):
    newest = copy_checkpoint(whole[0], 6, tmp_path)
    state = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps({key: state[key] for key in state if key != "best_loss"}))
    as_written(newest)
    with pytest.raises(ml.FormatError, match=r"state\.json: best_loss is not there"):
        run(tmp_path)


@pytest.mark.parametrize("change", [{"eval_steps": 2}, {"keep": "last"}, {"held_out": HELD_OUT[:2]}])
def test_what_chooses_the_result_cannot_change_when_the_run_goes_on(whole, change):
    with pytest.raises(ml.TrainingError, match="other data or settings"):
        run(whole[0], **change)


def test_without_held_out_examples_there_is_nothing_to_choose_by():
    with pytest.raises(ml.DataError, match="needs held-out examples"):
        run(held_out=())


def test_choosing_needs_evaluations():
    with pytest.raises(ml.ConfigError, match="needs eval_steps"):
        ml.TrainConfig(keep="best")


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, 2.5, float("inf"), float("nan")]), min_size=1, max_size=8))
def test_the_first_of_the_lowest_finite_losses_is_the_best(losses):
    state = State()
    for state.step, loss in enumerate(losses, start=1):
        assert state.record_evaluation(loss) == (state.best_step == state.step)
    finite = [loss for loss in losses if loss < float("inf")]
    assert state.best_loss == (min(finite) if finite else None)
    assert state.best_step == (losses.index(min(finite)) + 1 if finite else 0)
