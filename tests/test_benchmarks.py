"""The benchmarks give everyone the same work, and refuse to compare different work; how long it takes is no test."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest

import minilora as ml
from benchmarks import families, ours, peers, turns, work
from benchmarks.make import random_model

SIZES = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SMALL = {**work.SMOLLM2, **SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}
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
    assert not theirs & {*imported(FOLDER / "ours.py")}
    assert "minilora" not in {*imported(FOLDER / "peers.py"), *imported(FOLDER / "process.py")}
    assert not {*theirs, "minilora"} & {*imported(FOLDER / "work.py")}


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


WORKS_OF_PEFT = ("bf16-real", "fp32-real", "qlora-fixed-recompute", "dora-fixed", "bf16-long-recompute")


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("side", "name"),
    [*(("peft", name) for name in WORKS_OF_PEFT), *((side, "bf16-real") for side in ("trl", "trl-best"))],
)
def test_peers_do_the_same_training(shop, side, name):
    pytest.importorskip(side.partition("-")[0])
    task = task_of(shop, name)
    theirs = getattr(peers, turns.TRAINING[side][1])(task)
    assert len(theirs.seconds) == len(theirs.amounts) == 2
    turns.check_same_work(ours.train(task).checks, theirs.checks, task.work.bounds, side)


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_family_computes_what_the_peers_compute(name, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr(families, "in_fresh_process", lambda function, *args: function(*args))
    plain, adapted, alike = families.compared(families.task_of(name, tmp_path, families.SMALL))
    assert max(plain, adapted) < 1e-5
    assert alike == work.ANSWERED
