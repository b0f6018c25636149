"""What the benchmarks count and compare; how long anything takes is no test."""

import importlib
import math
import os
import sys
from pathlib import Path

import pytest
import torch

import minilora as ml
from tests.models import tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # where its files find each other, as scripts do
adapters, measure, quantize = (importlib.import_module(name) for name in ("adapters", "measure", "quantize"))


@pytest.fixture
def directory(tmp_path):
    model = tiny_model(hidden_size=64, intermediate_size=128, num_hidden_layers=2, dtype=torch.bfloat16)
    ml.save_model(model, tmp_path / "model")
    return tmp_path / "model"


def test_works_take_turns_and_the_first_round_does_not_count():
    done = []
    times = measure.alternate(2, torch.device("cpu"), lambda: done.append("a"), lambda: done.append("b"))
    assert done == ["a", "b"] * 3
    assert [len(seconds) for seconds in times] == [2, 2]


def test_a_ratio_is_the_median_of_the_rounds_own_ratios():
    row = measure.ratio_row("work", [1.0, 8.0, 9.0], [1.0, 2.0, 3.0], measure.Bound("at most", 3))
    assert row == ["work", "8.000 s", "2.000 s", "3.00", "1.00 to 4.00", "at most 3", "yes"]  # 8 / 2 would be 4


@pytest.mark.parametrize(
    ("word", "value", "met"), [("at least", 3.9, "NO"), ("at least", 4, "yes"), ("at most", 5, "NO")]
)
def test_a_bound_says_whether_it_is_met(word, value, met):
    assert measure.verdict(value, measure.Bound(word, 4)) == (f"{word} 4", met)


@pytest.fixture
def _three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_three_threads")
def test_a_fresh_process_is_another_one_with_as_many_threads():
    assert measure.in_fresh_process(os.getpid) != os.getpid()
    assert measure.in_fresh_process(torch.get_num_threads) == 3


def test_bits_are_those_of_the_tensors_and_of_the_files(directory, tmp_path):
    tensors, files = quantize.bits_a_weight(directory, tmp_path / "packed")
    model = ml.load_model(directory)
    shapes = [(linear.out_features, linear.in_features) for linear in quantize.packable(model)]
    n = sum(math.prod(shape) for shape in shapes)
    blocks = [math.prod(shape) // 64 for shape in shapes]
    nested = sum(8 * b + 32 * math.ceil(b / 256) + 32 for b in blocks)  # codes, scales, offset
    assert tensors[1:] == [f"{4 + nested / n:.4f}", "4.5000"]
    plain = sum(file.stat().st_size for file in (tmp_path / "packed").glob("*.safetensors"))
    assert files[2] == f"{8 * plain / ml.count_parameters(model).total:.4f}"


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
def test_the_benchmark_prints_its_tables(directory, capsys):
    pytest.importorskip("bitsandbytes")
    quantize.main(["--model", str(directory), "--runs", "1"])
    printed = capsys.readouterr().out
    for head in (measure.RATIOS, quantize.MEMORY, quantize.SIZE):
        assert f"| {' | '.join(head)} |\n" in printed
    assert "14 linears" in printed


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
def test_the_benchmark_of_adapters_prints_its_table(capsys):
    pytest.importorskip("peft")
    adapters.main(["--layers", "1", "--runs", "1"])
    printed = capsys.readouterr().out
    assert "7 linears, 8 adapters" in printed
    for what in ("attach", "switch", "disable and enable", "load"):
        assert f"| {what}, PEFT's time over ours |" in printed
