"""Numbers that go bad are caught in their step, with the step, its rows and what is bad, and are not saved."""

import math

import pytest
import torch

import minilora as ml
from minilora.data import collate
from minilora.runs.sampler import plan_steps
from minilora.training import token_loss
from tests.models import tiny_model
from tests.training import random_rows

pytestmark = pytest.mark.reliability
ROWS = random_rows(3, 6)
STEP = 3  # in which something goes bad
ADAPTED = {"r": 2, "lora_alpha": 5, "target_modules": ("q_proj", "down_proj")}


def run(path=None, loss=None, on_step=None):
    """Train a small model for six steps of one row; return its adapter's numbers after each step."""
    model, states = tiny_model(dtype=torch.float32), []
    ml.attach(model, ml.LoraConfig(**ADAPTED))

    def note(record):
        trained = [p.detach().flatten() for p in model.parameters() if p.requires_grad]
        states.append(torch.cat(trained))
        return on_step(model, record) if on_step else None

    config = ml.TrainConfig(batch_size=1, learning_rate=1e-2, save_steps=1)
    ml.train(model, ROWS, config, note, checkpoint_dir=path, loss=loss)
    return states


def source_of_step(step):
    """Where the row of a step is from."""
    ((row,),) = plan_steps([len(row.tokens) for row in ROWS], ml.TrainConfig(batch_size=1))[step - 1]
    return ROWS[row].source


class BadLoss:
    """A loss whose gradient is not finite for the row of one step, for the first time."""

    is_bad = True

    def __call__(self, model, rows):
        total, count = token_loss(model, collate(rows, torch.device("cpu")))
        if self.is_bad and total.requires_grad and rows[0].source == source_of_step(STEP):
            total.register_hook(lambda gradient: gradient * math.inf)
        return total, count


def test_such_a_step_changes_nothing_and_the_run_goes_on_from_before_it(tmp_path):
    loss = BadLoss()
    with pytest.raises(ml.TrainingError, match=f"step {STEP}: .*rows: {source_of_step(STEP)}\\."):
        run(tmp_path, loss)
    assert sorted(path.name for path in tmp_path.iterdir())[-1] == f"step-{STEP - 1:06d}"
    loss.is_bad = False
    assert torch.equal(run(tmp_path, loss)[-1], run(None, loss)[-1])


def test_a_weight_that_is_not_finite_is_in_no_checkpoint(tmp_path):
    def spoil(model, record):
        if record["step"] == STEP - 1:
            with torch.no_grad():
                next(p for name, p in model.named_parameters() if name.endswith("lora_A"))[0, 0] = math.nan

    with pytest.raises(ml.TrainingError, match=r"not written, because .*q_proj\.lora_A\.weight has numbers"):
        run(tmp_path, on_step=spoil)
    assert [path.name for path in tmp_path.iterdir()] == [f"step-{STEP - 2:06d}"]
