"""What the benchmarks do and count, and what they refuse; how long anything takes is no test."""

import ast
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import minilora as ml
from benchmarks import __main__ as command
from benchmarks import ablation, our_operations, ours, peer_operations, peers, process, results, turns, work
from benchmarks.make import random_model
from benchmarks.process import Measurement, Round
from tests.models import long

SIZES = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SMALL = {**work.SMOLLM2, **SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}
OPERATIONS = work.operations()
FOLDER = Path(work.__file__).parent


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    random_model(SMALL, folder / "model")
    return turns.Workshop(folder, folder / "model", "cpu")


@pytest.fixture(scope="module")
def trained(shop):
    return ours.train(task_of(shop, "fp32-real"))


def named(name):
    return next(each for each in work.works() if each.name == name)


def task_of(shop, name):
    return shop.task(named(name), warm_up=0, steps=2)


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)


def test_neither_side_imports_the_other():
    theirs = {"transformers", "peft", "trl", "datasets", "litgpt", "lightning", "bitsandbytes"}
    assert not theirs & {*imported(FOLDER / "ours.py"), *imported(FOLDER / "our_operations.py")}
    assert not {"minilora"} & {
        name for part in ("peers", "peer_operations", "process") for name in imported(FOLDER / f"{part}.py")
    }
    assert not {*theirs, "minilora"} & {*imported(FOLDER / "work.py")}


def test_rows_are_the_same_at_every_call_and_half_of_a_real_one_is_learned():
    for kind, low, high in [("fixed", 512, 512), ("real", 20, 512), ("long", 4096, 4096)]:
        rows = work.rows(kind, 24, 4096)
        assert rows == work.rows(kind, 24, 4096)
        lengths = [len(tokens) for tokens, _ in rows]
        assert min(lengths) >= low
        assert max(lengths) <= high
        for tokens, labels in rows:
            asked = len(tokens) // 2 if kind == "real" else 0
            assert labels == [work.IGNORE_INDEX] * asked + tokens[asked:]
    lengths = torch.tensor([float(len(tokens)) for tokens, _ in work.rows("real", 4000, 16)]).log()
    assert abs(lengths.median().exp() - 110) < 110 * 6 * 1.2533 * 0.6 / 4000**0.5
    assert 0.5 < lengths.std() < 0.6  # 512 cuts it


def test_flop_of_the_linears_are_those_that_a_plain_backward_pass_counts():
    T, r = 7, 5
    config = {**SMALL, "num_hidden_layers": 1}
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]
    with FlopCounterMode(display=False) as counter:
        for n, m in shapes:
            x, W = torch.ones(T, m, requires_grad=True), torch.ones(n, m)
            A, B = torch.ones(r, m, requires_grad=True), torch.ones(n, r, requires_grad=True)
            (x @ W.T + x @ A.T @ B.T).sum().backward()
    tokens = [1] * T
    without_head = (tokens, [work.IGNORE_INDEX] * T)
    attention = 7 * 64 * T * T
    assert work.training_flops(config, [without_head], r) - attention == counter.get_total_flops()
    head = work.training_flops(config, [(tokens, tokens)], r) - work.training_flops(config, [without_head], r)
    assert head == 4 * SMALL["vocab_size"] * 64 * (T - 1)


def test_peers_are_given_the_rows_of_each_step_of_our_loop(shop, trained):
    task = task_of(shop, "fp32-real")
    assert trained.amounts == [sum(len(tokens) for tokens, _ in batch) for batch in task.batches]
    alone = ours.train(replace(task, rows=task.batches[0], batches=task.batches[:1]))
    first = {name: task.work.bounds[name] for name in ("loss", "gradient norm")}
    turns.check_same_work(trained.checks, alone.checks, first, "the first batch alone")


def test_different_work_is_refused(shop, trained, tmp_path):
    task, found = task_of(shop, "fp32-real"), trained.checks
    turns.check_same_work(found, found, task.work.bounds, "peer")
    model = ml.load_model(task.model)
    ml.load_adapter(model, task.adapter)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 2
    ml.save_adapter(model, tmp_path)
    for other in (
        replace(task, adapter=tmp_path),
        replace(task, rows=task.rows[::-1]),
        replace(task, rows=[(tokens, tokens) for tokens, _ in task.rows]),
        replace(task, work=replace(task.work, method="qlora")),
    ):
        with pytest.raises(turns.RefusedError, match=r"of peft .* may differ by"):
            turns.check_same_work(found, ours.train(other).checks, task.work.bounds, "peft")
    with pytest.raises(turns.RefusedError, match="nan"):
        turns.check_same_work({"loss": 1.0}, {"loss": float("nan")}, {"loss": 0.1}, "peft")


def test_gradients_of_the_right_length_and_another_direction_are_refused(shop, monkeypatch):
    """After some steps on the same rows the loss tells them apart."""
    monkeypatch.setattr(ours, "LEARNING_RATE", 0.01)
    task, step = shop.task(named("fp32-real"), warm_up=0, steps=4), torch.optim.AdamW.step
    task = replace(task, rows=task.rows[:1] * len(task.rows))

    def astray(optimizer):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad.neg_()
        step(optimizer)

    found = ours.train(task).checks
    monkeypatch.setattr(torch.optim.AdamW, "step", astray)
    with pytest.raises(turns.RefusedError, match=r"^last loss"):
        turns.check_same_work(found, ours.train(task).checks, task.work.bounds, "peft")


@pytest.mark.parametrize("name", ["fp32-real", *long("bf16-real", "qlora-fixed-recompute")])
def test_without_a_trick_the_same_is_computed(shop, name):
    task = task_of(shop, name)
    found, sides = ours.train(task).checks, ablation.tricks(task.work)
    assert ("nf4_linear" in sides) == (task.work.method == "qlora")
    for side in [*sides, ablation.PLAIN]:
        checks = ablation.train(replace(task, side=side)).checks
        turns.check_same_work(found, checks, task.work.bounds, side)
        assert bool(checks) == (side != ablation.HEAD_ROWS)


START_PYTHON = {"load", "import_"}  # several times


def seen(count):
    """The process, its threads, and its peak once so many bytes are taken."""
    peak = process.Peak("cpu")
    torch.ones(count, dtype=torch.uint8)
    return os.getpid(), torch.get_num_threads(), peak.read()


@pytest.mark.long
def test_a_fresh_process_is_another_one_with_as_many_threads_and_a_peak_of_its_own():
    torch.set_num_threads(3)
    number, threads, peak = process.in_fresh_process(seen, 10**8)
    assert (number != os.getpid(), threads) == (True, 3)
    assert 10**8 <= peak < 1.1 * 10**8


def measurement(seconds, **checks):
    return Measurement([seconds], [1], 10**9, checks)


def test_a_ratio_is_the_rounds_own():
    rounds = [
        Round("fp32-real", {"minilora": measurement(a), "peft": measurement(b)}) for a, b in ((1, 1), (2, 8), (3, 9))
    ]
    ratios = results.ratio(rounds, lambda measured: measured.rate, "peft")
    assert results.spread(ratios) == "3.00 (1.00 to 4.00)"  # the medians' ratio would be 4


def test_lines_of_other_machines_and_of_older_states_are_left_out(tmp_path):
    here, there = results.surroundings(torch.device("cpu")), {"machine": "m", "device": "cpu", "versions": "v"}
    for where, state, note in ((here, "old", 1), (here, "new", 2), (there, "new", 3), (here, "new", 4)):
        results.keep(tmp_path / "lines.jsonl", where, state, {"work": "load", "note": note})
    kept = results.kept(tmp_path / "lines.jsonl", here)
    assert [line["note"] for line in kept["load"]] == [2, 4]


def columns(page):
    """The numbers of columns of the rows of each table."""
    tables = re.findall(r"(?:^\|.*\|\n)+", page, flags=re.MULTILINE)
    return [{row.count("|") for row in found.splitlines()} for found in tables]


@pytest.mark.long
@pytest.mark.filterwarnings("default")
def test_the_command_measures_and_writes_a_page(shop, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(turns.Workshop.task, "__defaults__", (0, 2))  # steps
    monkeypatch.setattr(work, "ablations", lambda: [work.Ablation("ablation-fp32-real", "fp32-real")])
    out = tmp_path / "results" / "RESULTS.md"
    arguments = ["--model", str(shop.model("smollm2")), "--out", str(out), "--rounds", "1", "--peers"]
    assert command.main([*arguments, "--only", "fp32-real", "load-again"]) == 0
    assert command.main([*arguments, "--only", "ablation"]) == 0
    assert "fp32-real | " in capsys.readouterr().out
    page = out.read_text(encoding="utf-8")
    assert len(out.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()) == 3
    assert re.search(r"^\| kept memory \| \d+\.\d\d \| \d+\.\d\d \|$", page, flags=re.MULTILINE)
    assert re.search(r"^\| fp32-real \| [\d,]+ \| [\d,]+ \| \d+\.\d\d \|", page, flags=re.MULTILINE)
    assert f"{torch.get_num_threads()} of {os.cpu_count()} threads" in page


def test_a_page_shows_ratios_and_what_was_refused():
    sides = {side: vars(measurement(seconds, loss=2.0)) for side, seconds in (("minilora", 1.0), ("peft", 1.5))}
    lines = {
        "dora-fixed": [vars(Round("dora-fixed", {}, 1e9, 4e9, 10**9)) | {"sides": sides}],
        "merge": [vars(Round("merge", {})) | {"sides": sides}],
        "bf16-real": [{"work": "bf16-real", "refused": "loss 1, of peft 2"}],
    }
    for (found,) in lines.values():
        found |= {"date": "2000-01-01", "machine": "m", "versions": "v", "source": "s"}
    page = results.page(lines, work.works())
    assert all(len(found) == 1 for found in columns(page))
    assert "| dora-fixed | peft | 1.0 | 0.7 | 1.50 | 1.00 | 1.00 | 1.00 |" in page
    assert "| merge | an adapter on 210 linears folded into them | peft | 1.000 s | 1.500 s | 1.50 |" in page
    assert "| bf16-real | loss 1, of peft 2 |" in page
    assert "| dora-fixed | loss | minilora 2, peft 2 | 0.002 |" in page


WORKS_OF_PEFT = ("bf16-real", "fp32-real", "qlora-fixed-recompute", "dora-fixed", "bf16-long-recompute")


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("side", "name"),
    [*(("peft", name) for name in WORKS_OF_PEFT), *((side, "bf16-real") for side in ("trl", "trl-best", "litgpt"))],
)
def test_peers_do_the_same_training(shop, side, name):
    pytest.importorskip(side.partition("-")[0])
    task = task_of(shop, name)
    theirs = getattr(peers, turns.TRAINING[side][1])(task)
    assert len(theirs.seconds) == len(theirs.amounts) == 2
    turns.check_same_work(ours.train(task).checks, theirs.checks, task.work.bounds, side)


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "each",
    [pytest.param(each, marks=[pytest.mark.long] * (each.does in START_PYTHON), id=each.name) for each in OPERATIONS],
)
def test_peers_do_the_same_operations(shop, each, monkeypatch):
    monkeypatch.setattr(process, "REPEATS", 1)
    for module in (our_operations, peer_operations):
        monkeypatch.setattr(module, "NEW_TOKENS", 3)
    task = shop.task(each)
    mine = getattr(our_operations, each.does)(task)
    for side in each.peers:
        theirs = getattr(peer_operations, each.does)(replace(task, side=side))
        turns.check_same_work(mine.checks, theirs.checks, each.bounds, side)
        assert each.bounds.keys() <= theirs.checks.keys()
