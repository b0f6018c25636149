"""Numbers that go bad are caught in their step, with the step, its rows and what is bad; or the step is skipped."""

import json
import math

import pytest
import torch

import minilora as ml
from minilora.data import collate
from minilora.runs.reports import ProgressBar, append_line, read_records
from minilora.runs.sampler import plan_steps
from minilora.training import token_loss
from tests.models import tiny_model
from tests.training import random_rows

pytestmark = pytest.mark.reliability
ROWS = random_rows(3, 6)
BAD = (math.nan, math.inf, -math.inf)
STEP = 3  # in which something goes bad
ADAPTED = {"r": 2, "lora_alpha": 5, "target_modules": ("q_proj", "down_proj")}


def run(path=None, loss=None, on_step=None, **changes):
    """Train a small model for six steps of one row; return it with the records."""
    model, records = tiny_model(dtype=torch.float32), []
    ml.attach(model, ml.LoraConfig(**ADAPTED))

    def note(record):
        records.append(record)
        return on_step(model, record) if on_step else None

    config = ml.TrainConfig(**{"batch_size": 1, "learning_rate": 1e-2, "save_steps": 1, **changes})
    ml.train(model, ROWS, config, note, checkpoint_dir=path, loss=loss)
    return model, records


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class BadLoss:
    """A loss that is multiplied by something in one step; the gradient only where `is_hidden`."""

    def __init__(self, value, is_hidden=False):
        self.value, self.is_hidden, self.calls, self.source = value, is_hidden, 0, source_of_step(STEP)

    def __call__(self, model, rows):
        self.calls += 1
        total, count = token_loss(model, collate(rows, torch.device("cpu")))
        if self.calls >= STEP and rows[0].source == self.source:
            total = total + (total * 0 + 1) * 0 if self.is_hidden else total * self.value
            if self.is_hidden and total.requires_grad:
                total.register_hook(lambda gradient: gradient * self.value)
        return total, count


def source_of_step(step):
    """Where the row of a step is from."""
    ((row,),) = plan_steps([len(row.tokens) for row in ROWS], ml.TrainConfig(batch_size=1))[step - 1]
    return ROWS[row].source


@pytest.mark.parametrize("is_hidden", [False, True], ids=["loss", "gradient"])
def test_such_a_step_can_be_skipped_and_changes_nothing(is_hidden, tmp_path):
    loss, states = BadLoss(math.nan, is_hidden), {}
    _, records = run(
        tmp_path, loss, lambda model, record: states.update({record["step"]: state(model)}), on_nonfinite="skip"
    )
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records if "skipped" in record] == [STEP]
    assert records[STEP - 1]["loss"] is None
    assert f"rows: {loss.source}" in records[STEP - 1]["skipped"]
    changed = [any(not torch.equal(states[i][name], states[i - 1][name]) for name in states[1]) for i in range(2, 7)]
    assert changed == [True, False, True, True, True]


def test_a_run_that_stopped_goes_on_with_skip_as_if_it_had_skipped(tmp_path):
    with pytest.raises(ml.TrainingError, match=f"step {STEP}"):
        run(tmp_path / "a", BadLoss(math.inf))
    again = BadLoss(math.inf)
    again.calls = STEP - 1
    model, _ = run(tmp_path / "a", again, on_nonfinite="skip")
    other, _ = run(tmp_path / "b", BadLoss(math.inf), on_nonfinite="skip")
    assert all(torch.equal(a, b) for a, b in zip(state(model).values(), state(other).values(), strict=True))


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_weight_that_is_not_finite_is_found_in_the_next_step(value, policy, tmp_path):
    def spoil(model, record):
        if record["step"] == STEP - 1:
            with torch.no_grad():
                next(p for name, p in model.named_parameters() if name.endswith("lora_A"))[0, 0] = value

    with pytest.raises(ml.TrainingError, match=rf"step {STEP}: loss .*; first bad: output of .*q_proj.*; rows: "):
        run(on_step=spoil, on_nonfinite=policy)  # to skip steps would not help
    with pytest.raises(ml.TrainingError, match=r"not written, because .*q_proj\.lora_A\.weight has numbers"):
        run(tmp_path, on_step=spoil, on_nonfinite=policy)
    assert [path.name for path in tmp_path.iterdir()] == [f"step-{STEP - 2:06d}"]


def test_a_skipped_step_is_said_and_recorded_as_json(tmp_path, capsys):
    record = {"step": 2, "loss": None, "grad_norm": None, "learning_rate": 0.1, "skipped": "loss nan", "tokens": 3}
    assert ProgressBar()({**record, "total_steps": 3, "tokens_per_second": 1.0}) is False
    assert "skipped loss nan" in capsys.readouterr().err
    append_line(tmp_path / "metrics.jsonl", {"step": 1, "loss": 1.5, "learning_rate": 0.1, "grad_norm": 1.0})
    append_line(tmp_path / "metrics.jsonl", record)
    assert [each["loss"] for each in read_records(tmp_path / "metrics.jsonl")] == [1.5, None]
    json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1], parse_constant=pytest.fail)
