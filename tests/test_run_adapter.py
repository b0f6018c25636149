"""Runs of `finetune --adapter`, which start from the numbers of an adapter."""

import json

import pytest
import torch
from safetensors.torch import load_file

import minilora as ml
from minilora.cli import INTERRUPTED, main
from minilora.runs.evaluate import held_out_loss
from minilora.testing.compare import assert_parity
from tests.runs import NO_ADAPTER, SETTINGS, contents, finetune, inputs, interrupt, summary, write_inputs, write_rows
from tests.training import number


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = write_inputs(tmp_path_factory.mktemp("things"))
    write_rows(directory / "more.jsonl", 13)
    assert finetune(directory, directory / "first", target_modules="q_proj,v_proj", use_rslora=True, max_steps=3) == 0
    return directory


def go_on(directory, out, adapter="first", **changes):
    """A run from an adapter, which brings the model and the flags of adapters, on new rows."""
    flags = {
        **NO_ADAPTER,
        "model": None,
        "adapter": directory / adapter,
        "data": directory / "more.jsonl",
        "eval_split": 0,
    }
    return finetune(directory, out, **{**flags, **changes})


def config(out):
    return json.loads((out / "run.json").read_text())["config"]


def test_a_run_begins_with_the_numbers_of_the_adapter_and_has_its_settings(directory, tmp_path):
    assert go_on(directory, tmp_path / "run", max_steps=3) == 0
    model, tokenizer = ml.load_model(directory / "model"), ml.load_tokenizer(directory / "model")
    ml.load_adapter(model, directory / "first", trainable=True)
    names = ("learning_rate", "batch_size", "gradient_accumulation_steps")
    settings = ml.TrainConfig(max_steps=3, **{name: SETTINGS[name] for name in names})
    ml.train(model, ml.load_dataset(directory / "more.jsonl", tokenizer), settings)
    ml.save_adapter(model, tmp_path / "expected")
    assert contents(tmp_path / "run") == contents(tmp_path / "expected")
    hashed = json.loads((tmp_path / "run" / "run.json").read_text())["inputs_sha256"]
    assert {"model/model.safetensors", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= {*hashed}
    found = config(tmp_path / "run")
    assert (found["model"], found["adapter"]) == (str(directory / "model"), str(directory / "first"))
    assert [found[name] for name in ("lora_r", "lora_alpha", "lora_dropout", "use_rslora")] == [3, 6, 0.2, True]


def test_a_run_from_an_adapter_that_is_stopped_goes_on_to_the_same_bytes(directory, tmp_path, monkeypatch, capsys):
    assert go_on(directory, tmp_path / "whole", eval_split=0.3) == 0
    with monkeypatch.context() as patch:
        interrupt(patch, step=2)
        assert go_on(directory, tmp_path / "halves", eval_split=0.3) == INTERRUPTED
    assert go_on(directory, tmp_path / "halves", eval_split=0.3) == 0
    assert contents(tmp_path / "halves") == contents(tmp_path / "whole")
    held_out = inputs(directory, "more.jsonl", eval_split=0.3).test
    started = ml.load_model(directory / "model")
    ml.load_adapter(started, directory / "first")
    losses = [held_out_loss(model, held_out) for model in (ml.load_model(directory / "model"), started)]
    for out in ("whole", "halves"):  # the base is measured without the adapter that the run begins with
        found = summary(tmp_path / out)
        assert_parity(number([found[name]["loss"] for name in ("before", "start")]), number(losses))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:4]] == ["base", "start", "adapter"]


def test_rows_and_questions_are_read_by_the_columns_of_the_adapter_s_run(directory, tmp_path, capsys):
    rows, asked = tmp_path / "rows.csv", tmp_path / "asked.csv"
    rows.write_text("Q,A\n" + "the cat?, yes\n" * 8)
    asked.write_text("Q\nthe sea?\n")
    columns = {"columns": "prompt=Q,completion=A", "data": rows}
    assert finetune(directory, tmp_path / "first", **columns, max_steps=1) == 0
    assert go_on(directory, tmp_path / "second", tmp_path / "first", data=rows, max_steps=1) == 0
    assert config(tmp_path / "second")["columns"] == {"prompt": "Q", "completion": "A"}
    capsys.readouterr()
    for file in (rows, asked):
        words = ["generate", f"--adapter={tmp_path / 'first'}", "--max-new-tokens=1", f"--prompts={file}"]
        assert main(words) == 0
    prompts = [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()]
    assert prompts == ["the cat?"] * 8 + ["the sea?"]


def test_flags_of_the_adapter_may_be_given_if_they_do_not_differ(directory, tmp_path, capsys):
    assert go_on(directory, tmp_path / "a", lora_r=3, lora_alpha=6, max_steps=1) == 0
    assert go_on(directory, tmp_path / "b", lora_r=16, use_dora=True) == 1
    assert "leave out what the adapter determines: --lora-r 16 (it has 3), --use-dora True (it has False)" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "b").exists()


def test_a_dry_run_shows_what_a_run_from_the_adapter_would_train(directory, tmp_path, capsys):
    assert go_on(directory, tmp_path / "out", dry_run=True) == 0
    model = ml.load_model(directory / "model")
    ml.load_adapter(model, directory / "first", trainable=True)
    assert f"parameters: {ml.count_parameters(model).trainable:,} of" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_tokens_and_template_of_the_adapter_are_kept(directory, tmp_path):
    row = {"instruction": "<new>", "output": "It."}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 4)
    rows = {"data": tmp_path / "rows.jsonl", "max_steps": 1, "allow_special": True}
    trained = {"trainable_token_indices": "5", "prompt_style": "instruction"}
    assert finetune(directory, tmp_path / "a", **trained, **rows) == 0
    path = tmp_path / "a" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"][-1] |= {"content": "<new>"}
    path.write_text(json.dumps(tokenizer))
    assert go_on(tmp_path, tmp_path / "b", adapter="a", **rows) == 0
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_base_is_quantized_as_it_was_unless_told_otherwise(directory, tmp_path, capsys):
    assert finetune(directory, tmp_path / "a", quantize="nf4", max_steps=1) == 0
    assert go_on(tmp_path, tmp_path / "b", adapter="a", data=directory / "more.jsonl", max_steps=1) == 0
    assert config(tmp_path / "b")["quantize"] == "nf4"
    assert "was trained on a base" not in capsys.readouterr().err
    changes = {"quantize": "none", "data": directory / "more.jsonl", "max_steps": 1}
    assert go_on(tmp_path, tmp_path / "c", adapter="a", **changes) == 0
    assert "was trained on a base that is" in capsys.readouterr().err


def test_an_adapter_that_began_as_a_part_of_the_weights_goes_on_with_twice_the_rank(directory, tmp_path):
    assert finetune(directory, tmp_path / "a", init_lora_weights="pissa", max_steps=2) == 0
    assert (
        go_on(tmp_path, tmp_path / "b", adapter="a", data=directory / "more.jsonl", learning_rate=1e-30, max_steps=1)
        == 0
    )
    assert config(tmp_path / "b")["lora_r"] == 6
    before, after = (load_file(tmp_path / run / "adapter_model.safetensors") for run in "ab")
    assert all(torch.equal(before[name], after[name]) for name in before | after)
