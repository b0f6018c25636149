"""Training by a loss that is given: any module, any rows."""

import copy
import random
from collections import UserDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import minilora as ml
from minilora.runs.checkpoints import fingerprint
from minilora.testing.compare import assert_maths, assert_parity
from tests import training
from tests.models import examples, fill_, long, randn, seeds
from tests.training import assert_same_gradient, contents, gradients, number, stop_after, weights


class Network(nn.Module):
    """A classifier with what is not a function of its parameters: dropout, and averages that training moves."""

    def __init__(self, p=0.3):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.dropout = nn.Dropout(p)
        fill_(self, 0)

    def forward(self, x):
        return self.last(self.dropout(F.gelu(self.norm(self.first(x)))))


def plain():
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).double()
    fill_(model, 0)
    return model


def points(seed, count, dtype=torch.float32):
    """(x, class, weight): what a row counts is its weight."""
    draw = random.Random(seed)
    return [(randn(seed + i, 6, dtype=dtype), draw.randrange(3), draw.choice([1, 2, 9])) for i in range(count)]


def loss(model, rows):
    x, classes, counts = zip(*rows, strict=True)
    losses = F.cross_entropy(model(torch.stack(x)), torch.tensor(classes), reduction="none")
    counts = torch.tensor(counts)
    return (losses * counts).sum(), counts.sum()


def run(directory=None, model=None, rows=None, on_step=None, held_out=(), given=loss, **config):
    model = model or Network()
    rows = points(1, 10) if rows is None else rows
    config = {"batch_size": 2, "gradient_accumulation_steps": 2, "epochs": 2, "learning_rate": 0.01, **config}
    config = ml.TrainConfig(**{"save_steps": 1, "save_total_limit": 9, **config})
    return model, ml.train(model, rows, config, on_step, held_out, directory, loss=given)


# --- law 8 ---


@examples(0.3)
@given(seeds, st.sampled_from([(8, 1), (1, 8), (2, 4), (3, 3)]))
def test_any_cutting_of_a_step_gives_the_gradient_of_all_sums_over_all_counts(seed, cut):
    rows, model, records, found = points(seed, 8, torch.float64), plain(), [], []

    def see(record):
        records.append(record)
        found.append(gradients(model))

    config = {"batch_size": cut[0], "gradient_accumulation_steps": cut[1], "max_grad_norm": 0, "seed": seed}
    run(model=model, rows=rows, on_step=see, epochs=1, **config)
    expected = plain()
    total, count = loss(expected, rows)
    (total / count).backward()
    assert_same_gradient(found[0], gradients(expected))
    assert_maths(number(records[0]["loss"]), total / count)
    assert records[0]["tokens"] == count  # these rows have no tokens


def test_a_hook_may_put_another_gradient_in_the_place_of_one_and_a_loss_clear_all_for_a_use_of_its_own():
    rows, model = points(1, 6, torch.float64), plain()
    model[0].weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", torch.zeros_like(p)))
    run(model=model, rows=rows)
    before = plain()[0]
    assert torch.equal(model[0].weight, before.weight)
    assert not torch.equal(model[0].bias, before.bias)

    def adversarial(model, rows):
        loss(model, rows)[0].backward()
        model.zero_grad()
        return loss(model, rows)

    cleared, usual = (
        run(model=plain(), rows=rows, given=given, gradient_accumulation_steps=1)[0] for given in (adversarial, loss)
    )
    assert torch.equal(weights(cleared), weights(usual))


def test_only_rows_that_are_learned_are_read():
    class Rows(list):
        read = 0

        def __getitem__(self, index):
            self.read += 1
            return super().__getitem__(index)

    rows = Rows(points(1, 50))
    run(rows=rows, max_steps=2)
    assert rows.read == 8


def test_held_out_rows_are_measured_by_the_same_loss_without_dropout():
    held_out, records = points(5, 7), []
    model, _ = run(on_step=records.append, held_out=held_out, eval_steps=2)
    losses = [record["eval_loss"] for record in records if "eval_loss" in record]
    assert len(losses) == 3
    with torch.no_grad():
        total, count = loss(model.eval(), held_out)
    assert_parity(number(losses[-1]), number((total / count).item()))


# --- what else a loss measures ---


def measuring(model, rows):
    """The mean of all x, of what only heavy rows have, and of nothing."""
    heavy = [x[0] for x, _, weight in rows if weight == 9]
    more = {"x": (sum(x.sum() for x, _, _ in rows), 6 * len(rows)), "nothing": (torch.tensor(0.0), 0)}
    return *loss(model, rows), more | ({"heavy": (sum(heavy), torch.tensor(len(heavy)))} if heavy else {})


def all_metrics(rows):
    _, _, metrics = measuring(plain(), rows)
    return {name: number(float(total) / float(count)) for name, (total, count) in metrics.items() if count}


@examples(0.3)
@given(seeds, st.sampled_from([(8, 1), (1, 8), (2, 4), (3, 3)]))
def test_any_cutting_of_rows_gives_the_metrics_of_all_sums_over_all_counts(seed, cut):
    rows, held_out, records = points(seed, 8, torch.float64), points(seed + 8, 7, torch.float64), []
    config = {"batch_size": cut[0], "gradient_accumulation_steps": cut[1], "epochs": 1, "eval_steps": 1}
    run(None, plain(), rows, records.append, held_out, measuring, **config)
    for record, begin, expected in zip(records, ("", "eval_"), map(all_metrics, (rows, held_out)), strict=True):
        found = {name: number(record[begin + name]) for name in ("x", "heavy", "nothing") if begin + name in record}
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_maths(found[name], value)


def test_a_loss_with_a_parameter_for_it_gets_the_step_of_its_record_also_when_resumed(tmp_path):
    def resumed(directory):
        seen, records = [], []

        def counting(model, rows, step):
            seen.append(step)
            return loss(model, rows)

        run(directory, on_step=records.append, held_out=points(5, 2), eval_steps=2, given=counting, batch_size=5)
        assert list(dict.fromkeys(seen)) == list(dict.fromkeys(record["step"] for record in records))
        return seen

    # two micro-batches in each step, and the held-out rows after the second
    assert resumed(tmp_path / "whole") == [1, 1, 2, 2, 2]
    training.copy_checkpoint(tmp_path / "whole", 1, tmp_path / "half")
    assert resumed(tmp_path / "half") == [2, 2, 2]


@pytest.mark.parametrize(
    "change",
    [
        lambda total: total,
        lambda total: (total, -2),
        lambda total: (total, float("nan")),
        lambda total: (total.expand(2), 1),
        lambda total: (1.0, 1),
    ],
)
def test_a_loss_that_is_no_sum_and_count_is_refused(change):
    with pytest.raises(ml.TrainingError, match="must return"):
        run(given=lambda model, rows: change(loss(model, rows)[0]))


@pytest.mark.parametrize(
    ("metrics", "problem"),
    [
        *((wrong, "loss must return") for wrong in (3, {"x": 1}, {"x": (1, 2, 3)}, {"x": (torch.ones(2), 1)})),
        *(({name: (1, 1)}, f"cannot be called '{name}'") for name in ("loss", "tokens", "eval_loss")),
    ],
)
def test_metrics_that_are_no_sums_and_counts_or_have_a_name_of_a_record_are_refused(metrics, problem):
    with pytest.raises(ml.TrainingError, match=problem):
        run(given=lambda model, rows: (*loss(model, rows), metrics))


# --- law 11 ---


@pytest.mark.parametrize("step", [2, *long(1, 4)])
@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_resumed_run_ends_in_the_same_bytes_also_of_what_is_no_parameter(tmp_path, step, keep):
    config = {"held_out": points(5, 3), "eval_steps": 1, "keep": keep}
    expected, _ = run(tmp_path / "whole", **config)
    assert not torch.equal(expected.norm.running_mean, torch.zeros(8))
    training.copy_checkpoint(tmp_path / "whole", step, tmp_path / "half")
    found, result = run(tmp_path / "half", **config)
    assert result.steps == 6
    assert contents(tmp_path / "half") == contents(tmp_path / "whole")
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in found.state_dict().items())


def test_what_a_model_draws_follows_from_the_seed_and_moves_no_global_state():
    first, second = Network(), Network()
    for model, seed in ((first, 1), (second, 2)):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        run(model=model)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(weights(first), weights(second))
    assert not torch.equal(weights(first), weights(run(model=Network(p=0))[0]))
    masks = []
    model = Network()
    model.dropout.register_forward_hook(lambda module, inputs, output: masks.append((output == 0).sum().item()))
    run(model=model, epochs=4)
    assert len(set(masks)) > 3


def test_rows_are_told_apart_by_what_is_in_them_and_not_by_where_they_lie(tmp_path):
    run(tmp_path, on_step=stop_after(2))
    other = points(1, 10)
    other[3] = (other[3][0] + 1, *other[3][1:])
    with pytest.raises(ml.TrainingError, match="other data or settings"):
        run(tmp_path, rows=other)
    config = ml.TrainConfig()
    kinds = [
        *({"x": 1, "y": "a"}, {"x": 1, "y": "b"}, [1.0, None, True], np.float32(1.5), np.arange(3), np.arange(3) + 1),
        *(torch.arange(4), torch.arange(4).reshape(2, 2), torch.tensor(1.5), torch.tensor(1.5, dtype=torch.bfloat16)),
        *(UserDict(x=torch.arange(2)), UserDict(x=torch.arange(2) + 1)),  # as transformers' BatchEncoding
    ]
    model = Network()
    prints = [
        [fingerprint(model, [same], (), config, None, "")["dataset"] for same in (row, copy.deepcopy(row))]
        for row in kinds
    ]
    assert all(first == second for first, second in prints)
    assert len({first for first, _ in prints}) == len(kinds)


# --- refusing ---


def test_rows_that_a_resumed_run_could_not_tell_apart_are_refused_where_checkpoints_are_written(tmp_path):
    rows = [(x, SimpleNamespace(label=label), weight) for x, label, weight in points(1, 10)]
    given = lambda model, rows: loss(model, [(x, kind.label, weight) for x, kind, weight in rows])  # noqa: E731
    assert run(rows=rows, given=given)[1].finished
    with pytest.raises(ml.DataError, match="a row holds a SimpleNamespace"):
        run(tmp_path, rows=rows, given=given)


def test_a_loss_that_counts_nothing_or_is_not_finite_is_refused():
    for count, where in ((lambda model: 0, "a step"), (lambda model: model.training, "the held-out rows")):
        given = lambda model, rows, count=count: (loss(model, rows)[0], int(count(model)))  # noqa: E731
        with pytest.raises(ml.DataError, match=rf"no token of {where} has a label \(the loss returned the count 0\)"):
            run(given=given, held_out=points(5, 3), eval_steps=1)
    rows = points(1, 10)  # they have no source: their numbers are named
    rows[4] = (rows[4][0] * float("nan"), *rows[4][1:])
    with pytest.raises(ml.TrainingError, match=r"rows: .*\b4\b"):
        run(rows=rows)
