"""`finetune --method full`: all weights, from the first step to a model that others load."""

import json

import pytest
import torch

import minilora as ml
from minilora import cli
from minilora.adapter import adapter_layers
from minilora.cli import INTERRUPTED
from minilora.files import MANIFEST
from minilora.runs.evaluate import held_out_loss, measure_forgetting
from minilora.runs.inputs import load_general
from minilora.testing.compare import assert_parity
from tests import runs
from tests.models import four_bit, long
from tests.runs import inputs, interrupt, metrics, starts, steps, summary, unfinished, write_inputs
from tests.training import number


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("things"), torch.bfloat16)


def finetune(directory, out, **changes):
    return runs.finetune(directory, out, **{**runs.FULL, **changes})


@pytest.fixture(scope="module")
def whole(directory):
    general = {"general_data": directory / "general.jsonl"}
    assert finetune(directory, directory / "whole", save_total_limit=99, **general) == 0
    return directory / "whole"


def test_the_result_is_a_model_and_no_adapter(directory, whole, capsys):
    names = {"metrics.jsonl", "summary.json", "run.json", "checkpoints", "tokenizer.json", "tokenizer_config.json"}
    names |= {"minilora-prompts.json", ".lock", MANIFEST}
    assert {path.name for path in whole.iterdir()} == names | {"config.json", "model.safetensors"}
    model, base = (ml.load_model(path, dtype="float32") for path in (whole, directory / "model"))
    assert not adapter_layers(model)
    for (name, ours), before in zip(model.named_parameters(), base.parameters(), strict=True):
        assert not torch.equal(ours, before), name
    assert json.loads((whole / "config.json").read_text())["dtype"] == "float32"
    assert metrics(whole)[0]["loss"] > metrics(whole)[-1]["loss"]
    assert cli.main(["generate", f"--model={whole}", "--prompt=the cat?", "--max-new-tokens=3"]) == 0
    capsys.readouterr()
    assert cli.main(["inspect", str(whole)]) == 0
    assert "method full" in " ".join(capsys.readouterr().out.split())


def test_the_summary_measures_the_base_and_the_model_on_the_disk(directory, whole):
    found = summary(whole)
    model, base = (ml.load_model(path, dtype="float32") for path in (whole, directory / "model"))
    held_out = inputs(directory, eval_split=0.2).test
    general = load_general(str(directory / "general.jsonl"), ml.load_tokenizer(directory / "model"), ml.DataConfig())
    forgetting = found["general"]
    for loss, measured, rows in (
        (found["before"]["loss"], base, held_out),
        (found["after"]["loss"], model, held_out),
        (forgetting["before"], base, general),
        (forgetting["after"], model, general),
    ):
        assert_parity(number(loss), number(held_out_loss(measured, rows)))
    assert found["after"]["loss"] < found["before"]["loss"]
    assert_parity(number(forgetting["kl"]), number(measure_forgetting(model, general, base=base).kl))
    assert forgetting["kl"] > 0


@pytest.mark.parametrize("stop", [3, *long(8)])
def test_a_run_stopped_by_ctrl_c_goes_on_to_the_same_bytes(directory, whole, tmp_path, monkeypatch, stop):
    with monkeypatch.context() as patch:
        interrupt(patch, stop)
        assert finetune(directory, tmp_path) == INTERRUPTED
    assert not (tmp_path / "model.safetensors").exists()
    assert finetune(directory, tmp_path) == 0
    assert (tmp_path / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert starts(tmp_path) == [0, stop]
    assert steps(tmp_path) == steps(whole)


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"quantize": "nf4"}, "four bits cannot be trained"),
        ({"model": "four bits"}, "four bits cannot be trained"),
    ],
)
def test_what_all_weights_cannot_be_trained_with_is_refused(directory, tmp_path, monkeypatch, capsys, changes, phrase):
    monkeypatch.chdir(tmp_path)
    if "model" in changes:
        packed = four_bit(ml.load_model(directory / "model"))
        ml.save_model(packed, changes["model"], ml.load_tokenizer(directory / "model"))
    assert finetune(directory, "out", **changes) == 1
    assert phrase in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_finished_run_names_its_model_as_what_to_start_from_and_no_run_changes_its_method(
    directory, whole, tmp_path, capsys
):
    assert finetune(directory, whole) == 0
    further = f"give another --out; to train its model further, give --model {whole}"
    assert f"nothing is left to do; {further}" in capsys.readouterr().err
    before = runs.everything(unfinished(whole, tmp_path, step=4))
    assert finetune(directory, tmp_path, method="lora") == 1
    assert "method was 'full' and is 'lora'" in capsys.readouterr().err
    assert runs.everything(tmp_path) == before


def test_a_run_that_does_not_fit_is_told_that_an_adapter_takes_less(directory, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("minilora.runs.memory.free_memory_bytes", lambda device: 1234)
    assert finetune(directory, tmp_path / "out", batch_size=1, force=None) == 1
    error = capsys.readouterr().err
    assert "--gradient-checkpointing block, --method lora, a smaller --max-length" in error
    assert "--quantize" not in error
