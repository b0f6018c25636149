"""minilora merge and export: what is written and what is said."""

import re
import shutil
from pathlib import Path

import pytest
import torch

import minilora as ml
from minilora import cli
from minilora.adapter import adapter_layers
from minilora.adapters.layout import base_model_of
from minilora.cli.load import MERGED
from minilora.cli.messages import _is_named
from minilora.files import MANIFEST, read_json
from minilora.models.hub import Location
from tests.files import edit, same_state, write_adapter
from tests.models import perturb_, randn, tiny_model
from tests.runs import runner
from tests.text import CHATML, CLOSE, write_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model, two plain adapters of it, one of DoRA, a model that was tuned as a whole, and one with `a` merged."""
    directory = tmp_path_factory.mktemp("things")
    tokenizer = write_tokenizer(directory / "model", template=CHATML, eos=CLOSE, post="bos")
    model = tiny_model(dtype=torch.float32, vocab_size=400, num_hidden_layers=2)
    ml.save_model(model, directory / "model", tokenizer)
    targets = ("q_proj", "down_proj")
    for seed, (name, config) in enumerate(
        {"a": {"r": 3}, "b": {"r": 2, "target_modules": targets}, "dora": {}}.items()
    ):
        config |= {"lora_alpha": 6, "use_dora": name == "dora"}
        write_adapter(ml.load_model(directory / "model"), directory / name, seed, **config)
    (directory / "a" / "chat_template.jinja").write_text("{{ messages[0]['content'] }} ?")
    model = ml.load_model(directory / "model")
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if "up_proj" in name or name.endswith("norm.weight"):
                parameter += 0.1 * randn(i, *parameter.shape).float()
    ml.save_model(model, directory / "tuned", tokenizer)
    (directory / "rows.jsonl").write_text('{"text": "the cat"}\n' * 4)
    assert cli.main(["merge", f"--adapter={directory / 'a'}", f"--out={directory / 'merged'}"]) == 0
    return directory


@pytest.fixture
def run(directory, capsys, monkeypatch):
    """Run a command among the things; the lines that it prints, or with another status what it says."""
    command = runner(directory, capsys, monkeypatch)

    def run(*words, status=0):
        out, err = command(*words, status=status)
        return err if status else out.splitlines()

    return run


@pytest.fixture
def elsewhere(directory, tmp_path):
    """The adapter b, which names another base model."""
    copy = shutil.copytree(directory / "b", tmp_path / "elsewhere")
    edit(copy, base_model_name_or_path="another/model")
    return copy


@pytest.mark.parametrize("command", ["generate --prompt=cat --max-new-tokens=1", "merge", "export --for=vllm"])
def test_a_changed_config_is_said_and_obeyed_and_changed_weights_are_refused(
    directory, tmp_path, capsys, monkeypatch, command
):
    run, copy = runner(directory, capsys, monkeypatch), shutil.copytree(directory / "b", tmp_path / "b")
    words = [*command.split(), f"--adapter={copy}", *([] if "generate" in command else [f"--out={tmp_path / 'out'}"])]
    config, weights = copy / "adapter_config.json", copy / "adapter_model.safetensors"
    config.write_text(config.read_text().replace('"lora_alpha": 6', '"lora_alpha": 12'))
    said = run(*words).err
    assert said.count(f"{copy}: changed since it was written: adapter_config.json\n") == 1
    model = ml.load_model("model")
    ml.load_adapter(model, copy)
    assert {layer.adapters["default"].scale for layer in adapter_layers(model).values()} == {6.0}
    shown = run("inspect", copy, status=1).out
    assert re.search(r"config\.lora_alpha +12\n", shown)
    assert f"{config}: changed since minilora wrote it\n" in shown
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert f"{copy}: changed since minilora wrote it: adapter_model.safetensors; " in run(*words, status=1).err


def test_a_changed_file_of_the_model_is_said(directory, tmp_path, capsys):
    copy = shutil.copytree(directory / "model", tmp_path / "model")
    (copy / "chat_template.jinja").unlink()
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert cli.main(["generate", f"--model={copy}", "--prompt=cat", "--max-new-tokens=1"]) == 0
    assert capsys.readouterr().err.splitlines()[0] == f"{copy}: changed since it was written: config.json"


# --- what is written ---


def test_adapters_of_any_kind_are_merged_as_in_memory(directory, run, tmp_path):
    run("merge", "--adapter=dora", "--adapter=b", f"--out={tmp_path}")
    model = ml.load_model(directory / "model")
    for name in ("dora", "b"):
        ml.load_adapter(model, directory / name, name)
    ml.set_adapter(model, ["dora", "b"])
    ml.merge(model)
    same_state(ml.load_model(tmp_path), model)


def test_an_exported_adapter_does_what_the_merged_model_does(directory, run, tmp_path):
    printed = run("export", "--adapter=a", "--for=vllm", f"--out={tmp_path / 'adapter'}")
    assert printed == [f"adapter for vllm written to {tmp_path / 'adapter'}"]
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", MANIFEST)
    }
    run("merge", "--adapter=a", f"--out={tmp_path / 'merged'}")
    assert base_model_of(tmp_path / "adapter") == str(directory / "model")
    asked = ["--prompt=the cat", "--max-new-tokens=5"]
    assert run("generate", f"--adapter={tmp_path / 'adapter'}", *asked) == (
        run("generate", f"--model={tmp_path / 'merged'}", *asked)
    )


# --- what is refused ---


def test_adapters_that_name_different_bases_are_merged_only_into_a_named_one(run, elsewhere, tmp_path):
    both = ["--adapter=a", f"--adapter={elsewhere}", f"--out={tmp_path / 'out'}"]
    assert "name different base models" in run("merge", *both, status=1)
    run("merge", "--model=model", *both)


def test_adapters_that_were_asked_differently_are_merged_as_the_first_was(directory, tmp_path, capsys, monkeypatch):
    said = runner(directory, capsys, monkeypatch)
    shutil.copytree("b", tmp_path / "b")
    both = ["--adapter=a", f"--adapter={tmp_path / 'b'}"]
    (tmp_path / "b" / "chat_template.jinja").write_text("{{ messages[0]['content'] }} !")
    for i, order in enumerate((both, both[::-1])):
        said("merge", *order, f"--out={tmp_path / str(i)}")
        assert (tmp_path / str(i) / "chat_template.jinja").read_text()[-1] == "?!"[i]


def test_an_adapter_is_not_applied_to_the_model_that_it_is_merged_into(directory, run, tmp_path):
    run("merge", "--model=merged", "--adapter=b", f"--out={tmp_path / 'both'}")
    for model, adapters in (("merged", ["a"]), (tmp_path / "both", ["a", "b"])):
        assert [entry["name"] for entry in read_json(directory / model / "config.json")[MERGED]] == adapters
        for adapter in adapters:
            for command in (["generate", "--prompt=a"], ["eval", "--data=rows.jsonl"], ["merge", "--out=new"]):
                refused = run(*command, f"--model={model}", f"--adapter={adapter}", status=1)
                assert f"{adapter}: is merged into {model} already" in refused
    words = ["--model=merged", "--adapter=a", "--data=rows.jsonl", "--out=new"]  # nor is it trained further there
    assert "a: is merged into merged already" in run("finetune", *words, status=1)
    assert not (directory / "new").exists()


def test_a_model_that_is_not_the_one_an_adapter_records_is_spoken_of(directory, tmp_path, capsys, monkeypatch):
    said, asked = runner(directory, capsys, monkeypatch), ["generate", "--adapter=a", "--prompt=a", "--json"]
    note = f"a: was trained on the model {str(directory / 'model')!r}; this one is 'tuned'\n"
    assert said(*asked, "--model=tuned").err == note
    assert note in said("merge", "--adapter=a", "--model=tuned", f"--out={tmp_path / 'out'}").err
    exported = ["export", "--adapter=a", "--for=peft"]
    assert note in said(*exported, "--model=tuned", f"--out={tmp_path / 'tuned'}").err
    assert note not in said(*exported, "--model=model", f"--out={tmp_path / 'same'}").err
    for model in ("model", directory / "model", directory / "a" / ".." / "model"):
        assert said(*asked, f"--model={model}").err == ""
    edit(shutil.copytree("a", tmp_path / "silent"), base_model_name_or_path=None)
    assert said("generate", f"--adapter={tmp_path / 'silent'}", "--prompt=a", "--json", "--model=tuned").err == ""


def test_a_model_of_the_hub_is_known_by_its_commit_where_one_is_recorded():
    location = Location(Path("/cache/tiny"), f"org/tiny@{'0a' * 20}")
    for recorded in ("org/tiny", "org/tiny@main", f"org/tiny@{'0a' * 20}", "/cache/tiny"):
        assert _is_named(location, recorded), recorded
    for recorded in (f"org/tiny@{'0b' * 20}", "org/other", "/cache/other"):
        assert not _is_named(location, recorded), recorded


def test_what_needs_no_tokenizer_works_without_one(run, tmp_path):
    model = tiny_model(dtype=torch.float32, num_hidden_layers=1)
    ml.save_model(model, tmp_path / "model")
    ml.attach(model, ml.LoraConfig(r=2))
    perturb_(model)
    ml.save_adapter(model, tmp_path / "adapter")
    chosen, out = [f"--model={tmp_path / 'model'}", f"--adapter={tmp_path / 'adapter'}"], tmp_path / "out"
    run("merge", *chosen, f"--out={out / 'merged'}")
    run("quantize", chosen[0], f"--out={out / 'packed'}")
    run("export", *chosen, "--for=vllm", f"--out={out / 'plain'}")
    assert sorted(path.name for path in out.iterdir()) == ["merged", "packed", "plain"]
    assert not list(out.glob("*/tokenizer.json"))
    assert "model: there is no tokenizer.json" in run("generate", *chosen, "--prompt=a", status=1)
