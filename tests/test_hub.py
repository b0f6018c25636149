"""Names that mean repositories of the hub, against a server of this machine that speaks what is needed of its API."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import minilora as ml
from minilora.adapters.layout import CONFIG_FILE, base_model_of
from minilora.cli.finetune import find_inputs
from minilora.files import ASSETS, BUILTIN, MANIFEST
from minilora.models.hub import Location, locate, unpinned
from minilora.runs.settings import RunConfig, Settings
from tests.files import write_adapter
from tests.hub import commit_of, serving
from tests.models import tiny_model, token_ids

IDS = token_ids(3, 2, 7)
TOKENIZER = {name: (ASSETS / "model" / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
UNWANTED = [
    *("pytorch_model.bin", "training_args.bin", "modeling_tiny.py", "flax_model.msgpack", "tokenizer.model", "run.sh"),
    *("consolidated.safetensors", "original/params.json", "onnx/model.safetensors", ".gitattributes", "README.md"),
]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with serving(monkeypatch, tmp_path) as server:
        yield server


def files_of(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def with_unwanted(files):
    return {**files, **dict.fromkeys(UNWANTED, b"unwanted")}


@pytest.fixture
def models(hub, tmp_path):
    """Two commits of "org/tiny", the second is main; the models and their commits."""
    result = {}
    for revision, seed in (("v1.0", 1), ("main", 2)):
        result[revision] = tiny_model(seed=seed, dtype=torch.float32)
        ml.save_model(result[revision], tmp_path / revision)
        hub.add("org/tiny", with_unwanted({**files_of(tmp_path / revision), **TOKENIZER}), revision)
    return result


@pytest.fixture
def adapter(hub, tmp_path, models):
    """The repository "org/adapter" of an adapter for `models["main"]`; the model with it."""
    model = models["main"]
    model.name_or_path = f"org/tiny@{commit_of('org/tinymain')}"
    write_adapter(model, tmp_path / "adapter", r=3, lora_alpha=21)
    beside = {"chat_template.jinja": b"{{ messages }}", "run.json": b"{}", **TOKENIZER}  # how it wants to be asked
    hub.add("org/adapter", with_unwanted({**files_of(tmp_path / "adapter"), **beside}))
    return model


def refuses(name, kind="model"):
    """The message, of one line, with which a name is refused; it has the name in it."""
    with pytest.raises(ml.FormatError) as error:
        locate(name, kind)
    assert str(name) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_model_from_the_hub_has_its_commit_in_its_name(models):
    for name, revision in (("org/tiny", "main"), ("org/tiny@v1.0", "v1.0")):
        model = ml.load_model(name)
        assert torch.equal(model(IDS), models[revision](IDS))
        assert model.name_or_path == f"org/tiny@{commit_of('org/tiny' + revision)}"
        assert locate(model.name_or_path, "model") == locate(name, "model")
    assert not torch.equal(models["main"](IDS), models["v1.0"](IDS))


def test_the_name_of_a_location_means_the_same_files_when_the_branch_has_moved(hub, models):
    first = locate("org/tiny", "model")
    hub.add("org/tiny", {"model.safetensors": b"another"}, "moved")
    hub.repositories["org/tiny"]["main"] = hub.repositories["org/tiny"]["moved"]
    assert locate(first.name, "model") == first
    moved = commit_of("org/tinymoved")
    assert locate("org/tiny", "model") == Location(first.path.with_name(moved), f"org/tiny@{moved}")


def test_nothing_that_is_code_or_pickled_or_in_a_folder_is_asked_for(hub, models, tmp_path, capfd):
    text = "A dog is an animal."
    assert ml.load_tokenizer("org/tiny").encode(text) == ml.load_tokenizer(BUILTIN).encode(text)
    assert set(hub.requested) == {"config.json", MANIFEST, *TOKENIZER}  # a tokenizer comes without the weights
    assert {path.name for path in locate("org/tiny", "model").path.iterdir()} == set(hub.requested)
    assert set(hub.requested) == {"config.json", "model.safetensors", MANIFEST, *TOKENIZER}
    model = tiny_model(dtype=torch.float32)
    ml.save_model(model, tmp_path / "sharded", shard_bytes=20_000)
    hub.add("org/sharded", {**files_of(tmp_path / "sharded"), "chat_template.jinja": b"{{ messages }}"})
    assert torch.equal(ml.load_model("org/sharded")(IDS), model(IDS))
    assert (locate("org/sharded", "model").path / "chat_template.jinja").is_file()
    assert capfd.readouterr().out == ""


def test_an_adapter_from_the_hub_is_the_adapter(hub, adapter):
    model = ml.load_model(base_model_of(locate("org/adapter", "adapter").path))
    hub.requested.clear()
    ml.load_adapter(model, "org/adapter")
    assert torch.equal(model(IDS), adapter(IDS))
    wanted = {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "run.json", *TOKENIZER}
    assert set(hub.requested) <= wanted
    assert wanted <= {path.name for path in locate("org/adapter", "adapter").path.iterdir()}


def test_model_and_adapter_in_the_settings_of_a_run_have_their_commits(hub, models, adapter):
    run = find_inputs(Settings(RunConfig(model="org/tiny", adapter="org/adapter")))[0].run
    assert "@" in run.model
    assert "@" in run.adapter


def test_the_base_and_its_commit_are_written_with_the_adapter_and_found_again(hub, models, tmp_path):
    model = ml.load_model("org/tiny@v1.0")
    write_adapter(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / CONFIG_FILE).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/tiny", commit_of("org/tinyv1.0"))
    assert base_model_of(tmp_path / "out") == model.name_or_path


def test_the_base_of_an_adapter_is_named_as_load_model_takes_it(tmp_path):
    for base, revision, name in (
        ("org/tiny", None, "org/tiny"),
        ("org/tiny", "v1.0", "org/tiny@v1.0"),
        ("/models/tiny", "v1.0", "/models/tiny"),
        (BUILTIN, None, BUILTIN),
        ("", "v1.0", None),
        (None, None, None),
    ):
        (tmp_path / CONFIG_FILE).write_text(json.dumps({"base_model_name_or_path": base, "revision": revision}))
        assert base_model_of(tmp_path) == name


def test_only_a_commit_is_taken_out_of_a_name():
    for name in ("org/tiny@main", "runs/a@b", "org/tiny", "/x/y@" + "0" * 40, BUILTIN):
        assert unpinned(name) == (name, None)
    assert unpinned(f"org/tiny@{'0a' * 20}") == ("org/tiny", "0a" * 20)


def test_a_string_that_is_no_name_of_the_hub_is_a_path(hub):
    hub.add("org/tiny", {"model.safetensors": b""})
    for name in (
        *("nowhere", "./org/tiny", "/org/tiny", "~/tiny", "org/tiny/", "a/b/c", "../org/tiny", "org/..", "org\\tiny"),
        *("org/tiny@", "org/tiny@../x", "org/tiny@/x", "org/tiny@x\\y", "org/tiny@a@b", "org--tiny/x", "org/tiny\n"),
        *("org/tiny@a/../../x", " org/tiny", "C:/tiny", "https://org/tiny", "örg/tiny"),
    ):
        with pytest.raises(ml.FormatError, match="no such directory, and not 'org/name'") as error:
            locate(name, "model")
        assert str(error.value).startswith(f"model {Path(name)}: ")
    assert "no such directory" in refuses(Path("org/tiny"))  # a path object is never such a name
    assert hub.requested == []


def test_a_directory_is_itself_before_it_is_a_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("org/tiny", "org/tiny@v1.0"):
        Path(name).mkdir(parents=True)
        Path(name, "config.json").touch()
        for kind in ("model", "tokenizer", "adapter"):
            assert locate(name, kind) == Location(Path(name), name)


def test_what_is_built_in_has_a_name_that_never_means_the_hub(hub):
    hub.add(BUILTIN, {"adapter_model.safetensors": b""})
    assert locate(BUILTIN, "model").path == locate(BUILTIN, "tokenizer").path == ASSETS / "model"
    assert "no such directory" in refuses(BUILTIN, "adapter")


def test_what_the_hub_says_is_said(hub, models, monkeypatch):
    assert "Repository Not Found" in refuses("org/none")
    assert "Revision Not Found" in refuses("org/tiny@v9")
    hub.add("org/gated", {"model.safetensors": b""})
    hub.gated.add("org/gated")
    assert "Cannot access gated repo" in refuses("org/gated")
    assert "end by '.git'" in refuses("org/tiny.git")  # the hub's own rules
    hub.shutdown()
    hub.server_close()
    assert "is not a directory, and the Hub cannot be reached" in refuses("org/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "is not a directory, and the Hub cannot be reached" in refuses("org/tiny")


def test_a_repository_without_a_format_that_is_read_is_told_of(hub):
    for kind, files, needed in (
        ("model", ["config.json", "pytorch_model.bin"], r"*.safetensors"),
        ("model", ["config.json", "consolidated.safetensors"], r"*.safetensors"),
        ("adapter", ["adapter_config.json", "adapter_model.bin"], r"adapter_model.safetensors"),
        ("tokenizer", ["config.json", "tokenizer.model"], r"tokenizer.json"),
    ):
        hub.add("org/x", dict.fromkeys(files, b"{}"))
        assert f"the repository has no {needed}" in refuses("org/x", kind)


HOSTILE = ["../../../../a.json", "/b/a.json", "a/../../a.json", "./a.json", "..\\..\\a.json", "C:a.json", "C:\\a.json"]


def test_names_that_lead_elsewhere_are_not_fetched(hub, tmp_path):
    good = {"model.safetensors": b"", "b.json": b""}
    files = {**good, **dict.fromkeys(HOSTILE, b"hostile")}
    hub.add("org/bad", files)
    locate("org/bad", "model")
    assert set(hub.requested) <= set(good)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == b"hostile"]


def test_what_was_fetched_once_is_there_without_a_network(hub, models, monkeypatch):
    ml.load_tokenizer("org/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refuses("org/tiny")  # the tokenizer's files are not the model
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    online = locate("org/tiny", "model")
    hub.shutdown()
    hub.server_close()
    assert locate("org/tiny", "model") == locate(online.name, "model") == online  # no connection
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate("org/tiny", "model") == locate(online.name, "model") == online
    ml.load_model("org/tiny")
    ml.load_tokenizer("org/tiny")
