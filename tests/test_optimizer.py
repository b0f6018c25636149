"""What weight decay pulls on, and optimizers of one's own."""

import pytest
import torch
from torch.optim import SGD, Muon, Optimizer

import minilora as ml
from minilora.runs.loop import build_optimizer
from minilora.training import learning_rate
from tests.models import tiny_model
from tests.training import adapted, contents, copy_checkpoint, random_rows, stop_after, weights

ROWS = random_rows(0, 4)


def test_weight_decay_pulls_on_matrices_alone():
    model = tiny_model("llama-bias-tied-wide-heads")
    groups = build_optimizer(model, ml.TrainConfig(weight_decay=0.3)).param_groups
    expected = {p: 0.3 if p.dim() == 2 else 0.0 for p in model.parameters()}
    assert {p: group["weight_decay"] for group in groups for p in group["params"]} == expected
    assert {group["weight_decay"] for group in build_optimizer(model, ml.TrainConfig()).param_groups} == {0.0}


class Counting(Optimizer):
    """Steps along the mean of all gradients, with a noise; keeps a tensor of another dtype and numbers."""

    def __init__(self, parameters, **defaults):
        super().__init__(parameters, {"lr": 0.02, **defaults})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.change(p, group)

    def change(self, p, group):
        state = self.state[p]
        state["sum"] = state.get("sum", torch.zeros((), dtype=torch.float64)) + p.grad.to(torch.float64)
        state["count"] = state.get("count", 0) + 1
        state["factor"] = state.get("factor", 1.1) * 0.3
        noise = state["factor"] * torch.randn(p.shape)
        p -= group["lr"] * (state["sum"] / state["count"] + noise).to(p.dtype)


class Listing(Counting):
    def change(self, p, group):
        self.state[p]["past"] = [*self.state[p].get("past", []), p.grad.clone()]


class Counted(Counting):
    """Counts where no checkpoint looks."""

    steps = 0

    def change(self, p, group):
        self.steps += 1


class Grouped(Counting):
    def change(self, p, group):
        group["steps"] = group.get("steps", 0) + 1


class Common(Counting):
    def change(self, p, group):
        self.state["common"] = torch.ones(1)


OWN = {
    "momentum": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9),
    "Muon": lambda parameters: Muon(parameters, lr=0.03, momentum=0.8),
    "one's own": Counting,
}


def run(optimizer, directory=None, on_step=None, model=None, **config):
    model = model or adapted(layers=1, dtype=torch.float32)
    config = {"batch_size": 2, "epochs": 3, "save_steps": 1, "save_total_limit": 9, **config}
    result = ml.train(model, ROWS, ml.TrainConfig(**config), on_step, checkpoint_dir=directory, optimizer=optimizer)
    return weights(model), result


@pytest.mark.parametrize("name", OWN)
def test_a_run_of_another_optimizer_that_was_stopped_ends_in_the_same_bytes(name, tmp_path):
    expected, _ = run(OWN[name])
    assert not torch.equal(expected, run(None)[0])
    assert torch.equal(run(OWN[name], tmp_path / "whole")[0], expected)  # trying it changes nothing
    copy_checkpoint(tmp_path / "whole", 2, tmp_path / "half")
    found, result = run(OWN[name], tmp_path / "half")
    assert torch.equal(found, expected)
    assert result.steps == 6
    assert contents(tmp_path / "half") == contents(tmp_path / "whole")


def test_a_run_is_not_resumed_with_another_optimizer(tmp_path):
    run(OWN["momentum"], tmp_path, stop_after(2))
    for other in (OWN["one's own"], lambda parameters: SGD(parameters, lr=0.05, momentum=0.8), None):
        with pytest.raises(ml.TrainingError, match="other data or settings"):
            run(other, tmp_path)


def test_each_group_has_its_own_peak_of_the_schedule():
    made, rates = [], []

    def build(parameters):
        halves = parameters[::2], parameters[1::2]
        made.append(SGD([{"params": half, "lr": lr} for half, lr in zip(halves, (0.1, 0.3), strict=True)]))
        return made[0]

    run(build, on_step=lambda record: rates.append((record["learning_rate"], made[0].param_groups[1]["lr"])))
    expected = [[learning_rate(step, 6, peak, warmup=1) for peak in (0.1, 0.3)] for step in range(6)]
    assert rates == [tuple(pair) for pair in expected]


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        (Listing, r"model.*\.lora_A.*/past"),
        (Counted, "the attribute 'steps'"),
        (Grouped, "the attribute 'param_groups'"),
        (Common, r"state\['common'\]"),
    ],
)
def test_an_optimizer_that_keeps_what_no_checkpoint_has_is_refused_before_the_first_step(kind, kept, tmp_path):
    model = adapted(layers=1, dtype=torch.float32)
    before = weights(model)
    with pytest.raises(ml.TrainingError, match=f"{kind.__name__} keeps {kept}, which checkpoints do not store"):
        run(kind, tmp_path, model=model)
    assert torch.equal(weights(model), before)
    assert run(kind)[1].finished  # there are no checkpoints


def test_an_optimizer_of_other_parameters_or_beside_settings_of_adamw_is_refused():
    with pytest.raises(ml.TrainingError, match=r"differing: \['model\.layers\.0.*lora_A"):
        run(lambda parameters: SGD(parameters[1:]))
    with pytest.raises(ml.TrainingError, match="what is not trainable"):
        run(lambda parameters: SGD([*parameters, torch.nn.Parameter(torch.ones(1))]))
    for name in ("learning_rate", "weight_decay"):
        with pytest.raises(ml.TrainingError, match=f"{name} is AdamW's"):
            run(OWN["momentum"], **{name: 0.01})
    assert run(OWN["momentum"], learning_rate=0.05)[1].finished
