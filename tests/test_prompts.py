"""How a model is asked is recorded with its files, and every command obeys it."""

import json
import shutil

import pytest

import minilora as ml
from minilora.cli.generate import encode_prompts
from minilora.cli.load import find_sources
from minilora.models.prompts import PROMPTS_FILE, Prompts, read_prompt_files
from minilora.runs.checkpoints import newest_checkpoint
from minilora.runs.formats import Row
from tests.models import tiny_model
from tests.runs import finetune, runner, write_chat_models, write_rows
from tests.text import CHATML, conversation

OWN = "Q: " + CHATML
OPTIONS = {
    "thinking": None,
    "model": None,
    "adapter": [],
    "quantize": None,
    "double_quant": None,
}
QUICK = {"max_steps": 2, "save_steps": 1, "eval_split": 0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs from the chat model: `chat`, by a template of its own and with a system prompt, and `plain`."""
    directory = write_chat_models(tmp_path_factory.mktemp("prompts"))
    (directory / "own.jinja").write_text(OWN)
    rows = [{"messages": conversation([(f"the sea {i}", "yes")])} for i in range(4)]
    (directory / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_rows(directory / "texts.jsonl", 4)
    style = {"prompt_style": directory / "own.jinja", "system": "Be kind."}
    for out, data, changes in (("chat", "talks", style), ("plain", "texts", {})):
        settings = {**QUICK, "model": directory / "chat", "data": directory / f"{data}.jsonl", **changes}
        assert finetune(directory, directory / "run" / out, **settings) == 0
    (directory / "own.jinja").write_text("another template")  # since then
    return directory


@pytest.fixture
def run(runs, capsys, monkeypatch):
    return runner(runs, capsys, monkeypatch)


def asked(**options):
    """The tokens of the prompt that `generate` gives to a model."""
    options = {**OPTIONS, "raw": None, "system": None, **options}
    return encode_prompts([Row({"prompt": "the sea"}, "x")], find_sources(options).tokenizer, options)


def expected(runs, kind):
    tokenizer, question = ml.load_tokenizer(runs / "chat"), conversation([("the sea", "")], "Be kind.")[:-1]
    if kind == "plain":
        return [tokenizer.encode("the sea")]
    return [tokenizer.with_files({"chat_template.jinja": OWN}).encode_chat(question, add_generation_prompt=True)]


@pytest.mark.parametrize("kind", ["chat", "plain"])
def test_what_is_made_of_an_adapter_is_asked_as_it_was(runs, run, tmp_path, kind):
    adapter = runs / "run" / kind
    checkpoint, _ = newest_checkpoint(adapter / "checkpoints")
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    run("export", "--adapter", adapter, "--for", "vllm", "--out", tmp_path / "combined")
    for name in ("checkpoint", "combined"):
        assert asked(adapter=[str(tmp_path / name)]) == asked(adapter=[str(adapter)]) == expected(runs, kind)
    said = run("merge", "--adapter", adapter, "--out", tmp_path / "merged").err
    run("quantize", "--model", tmp_path / "merged", "--out", tmp_path / "packed")
    run("merge", "--adapter", adapter, "--adapter", adapter, "--out", tmp_path / "sum")
    for name in ("merged", "packed", "sum"):
        assert asked(model=str(tmp_path / name)) == expected(runs, kind)
    assert "ask" not in said


def test_the_adapter_decides_and_the_flags_over_it(runs, run, tmp_path):
    run("merge", "--adapter", runs / "run" / "plain", "--out", tmp_path / "merged")
    both = {"model": str(tmp_path / "merged"), "adapter": [str(runs / "run" / "chat")]}
    assert asked(**both) == expected(runs, "chat")
    assert asked(**both, system="") != expected(runs, "chat")
    assert asked(**both, system="Be brief.") not in (expected(runs, "chat"), asked(**both, system=""))
    assert asked(**both, raw=True) == expected(runs, "plain")
    question = conversation([("the sea", "")], "Be kind.")[:-1]
    turn = ml.load_tokenizer(runs / "chat").encode_chat(question, add_generation_prompt=True)
    assert asked(model=both["model"], system="Be kind.", raw=False) == [turn]


def test_a_run_from_an_adapter_goes_on_with_its_prompts(runs, run, tmp_path):
    words = ("finetune", "--adapter", runs / "run" / "chat", "--data", runs / "talks.jsonl", "--max-steps=1")
    run(*words, "--general-data=none", "--force", "--out", tmp_path / "next")
    assert asked(adapter=[str(tmp_path / "next")]) == expected(runs, "chat")
    run(*words, "--general-data=none", "--force", "--system=Be brief.", "--out", tmp_path / "other")
    assert ml.load_tokenizer(tmp_path / "other").prompts == Prompts(system="Be brief.")


def test_a_run_from_a_merged_model_goes_on_with_its_system_prompt(runs, run, tmp_path):
    run("merge", "--adapter", runs / "run" / "chat", "--out", tmp_path / "merged")
    words = ["finetune", "--model", tmp_path / "merged", "--data", runs / "talks.jsonl", "--max-steps=1"]
    words += ["--general-data=none", "--eval-split=0", "--force"]
    assert "Be kind." in run(*words, "--dry-run").out
    run(*words, "--out", tmp_path / "next")
    assert asked(adapter=[str(tmp_path / "next")]) == expected(runs, "chat")
    assert '{"role": "system", "content": "Be kind."}' in (tmp_path / "next" / "README.md").read_text()
    assert "Be kind." not in run(*words, "--dry-run", "--system=").out
    run(*words, "--out", tmp_path / "next")  # resumes


@pytest.mark.parametrize(("systems", "recorded"), [(["Be brief."] * 2, "Be brief."), (["Be brief.", "Be kind."], None)])
def test_the_system_prompt_that_all_rows_have_is_recorded(runs, tmp_path, systems, recorded):
    rows = [{"messages": conversation([("the sea", "yes")], system)} for system in systems]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {**QUICK, "max_steps": 1, "model": runs / "chat", "data": tmp_path / "rows.jsonl"}
    assert finetune(runs, tmp_path / "out", **settings) == 0
    assert ml.load_tokenizer(tmp_path / "out").prompts == Prompts(system=recorded)


def test_eval_measures_with_the_template_and_the_system_prompt_beside_the_adapter(runs, run, tmp_path):
    words = ("eval", "--data", runs / "talks.jsonl")
    found = json.loads(run(*words, "--adapter", runs / "run" / "chat").out)["value"]
    (tmp_path / "own.jinja").write_text(OWN)
    flags = (f"--prompt-style={tmp_path / 'own.jinja'}", "--system=Be kind.")
    adapter = shutil.copytree(runs / "run" / "chat", tmp_path / "bare")
    for name in (PROMPTS_FILE, "chat_template.jinja"):
        (adapter / name).unlink()
    assert json.loads(run(*words, "--adapter", adapter, *flags).out)["value"] == found
    assert json.loads(run(*words, "--adapter", adapter).out)["value"] != found


@pytest.mark.parametrize("words", [["merge"], ["export", "--for=peft"], ["push", "--dry-run"]])
def test_who_hands_a_model_over_learns_of_its_system_prompt(runs, run, tmp_path, words):
    for kind in ("chat", "plain"):
        adapter = runs / "run" / kind
        flags = ("--adapter", adapter, "--out", tmp_path / kind)
        found = run(*words, *((adapter, "me/mine", "--base-name=org/base") if words[0] == "push" else flags))
        said = found.out if words[0] == "push" else found.err
        assert ('{"role": "system", "content": "Be kind."}' in said) == (kind == "chat")


def test_chat_says_that_a_model_was_not_trained_on_conversations(runs, run, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: "/exit")
    assert "trained on plain prompts" in run("chat", "--adapter", runs / "run" / "plain").err
    assert "plain" not in run("chat", "--adapter", runs / "run" / "chat").err


@pytest.mark.parametrize("values", [{"form": "other"}, {"system": 5}, {"form": "plain", "more": 1}, {"form": None}])
def test_a_record_that_is_malformed_is_named(runs, tmp_path, values):
    adapter = shutil.copytree(runs / "chat-adapter", tmp_path / "adapter")
    (adapter / PROMPTS_FILE).write_text(json.dumps(values))
    with pytest.raises(ml.FormatError, match=f"{adapter / PROMPTS_FILE}: found .*, need `form`, one of"):
        asked(adapter=[str(adapter)])


def test_checkpoints_in_python_take_no_prompts_from_the_directory_around(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("of another program")
    model = tiny_model()
    ml.attach(model, ml.LoraConfig(r=1))
    ml.train(model, [ml.Example([1, 2], [1, 2])], ml.TrainConfig(epochs=1), checkpoint_dir=tmp_path / "steps")
    assert not read_prompt_files(tmp_path / "steps" / "step-000001")
