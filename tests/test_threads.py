"""The number of threads: measured once, obeyed where the user gives it, kept by a run that goes on."""

import itertools
import json

import pytest
import torch

import minilora as ml
from minilora.runs import system as threads
from minilora.runs.sampler import SeededDropout
from minilora.runs.system import MAX_PARAMETERS, choose_threads
from tests.runs import finetune, interrupt, starts, write_inputs
from tests.training import adapted, random_rows, trained


@pytest.fixture
def seconds(monkeypatch):
    """Two threads, in name only, and a clock on which a backward pass with n of them takes `seconds[n]`."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    now, number, seconds, backward = [0.0], [2], {1: 1.0, 2: 1.0}, torch.Tensor.backward

    def timed(*args, **kwargs):
        taken = seconds[number[0]]
        now[0] += next(taken) if isinstance(taken, itertools.cycle) else taken
        return backward(*args, **kwargs)

    monkeypatch.setattr(threads, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.Tensor, "backward", timed)
    monkeypatch.setattr(torch, "get_num_threads", lambda: number[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: number.__setitem__(0, n))
    return seconds


@pytest.mark.parametrize("faster", [1, 2])
def test_the_faster_number_of_threads_is_set_and_the_model_is_left_as_it_was(seconds, faster):
    seconds[faster] = 0.1
    model, state = adapted(lora_dropout=0.5), torch.get_rng_state()
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    assert choose_threads(model, random_rows(0, 4), ml.TrainConfig()) == torch.get_num_threads() == faster
    assert not model.training
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in trained(model).items())
    assert not any(isinstance(module, SeededDropout) for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_threads_that_are_many_times_slower_now_and_then_are_not_the_faster_ones(seconds):
    seconds[1], seconds[2] = 0.1, itertools.cycle([0.06, 0.06, 0.6])
    assert choose_threads(adapted(), random_rows(0, 4), ml.TrainConfig()) == 1


def test_rows_that_cannot_be_trained_are_refused_as_in_training(seconds):
    rows = random_rows(0, 4, vocabulary=99)
    with pytest.raises(ml.DataError, match="holds token"):
        choose_threads(adapted(), rows, ml.TrainConfig())


@pytest.mark.parametrize("reason", ["OMP_NUM_THREADS", "one thread", "a large model"])
def test_nothing_is_measured_where_there_is_nothing_to_choose(seconds, monkeypatch, reason):
    seconds[1] = 0.1
    if reason == "OMP_NUM_THREADS":
        monkeypatch.setenv(reason, "2")
    if reason == "one thread":
        torch.set_num_threads(1)
    monkeypatch.setattr(threads, "MAX_PARAMETERS", 9 if reason == "a large model" else MAX_PARAMETERS)
    given = torch.get_num_threads()
    assert choose_threads(adapted(), random_rows(0, 4), ml.TrainConfig()) is None
    assert torch.get_num_threads() == given


def test_a_run_says_and_records_its_threads_and_keeps_them_when_it_goes_on(seconds, tmp_path, monkeypatch, capsys):
    directory = write_inputs(tmp_path)
    seconds[1] = 0.1
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        finetune(directory, tmp_path / "out", epochs=1)
    assert "using 1 of 2 threads" in capsys.readouterr().err
    seconds[1] = 10.0  # it would not be chosen now
    torch.set_num_threads(2)
    assert finetune(directory, tmp_path / "out", epochs=1) == 0
    assert torch.get_num_threads() == 1
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [start["threads"] for start in record["starts"]] == [1, 1]
    assert starts(tmp_path / "out") == [0, 2]
