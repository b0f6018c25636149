"""Uploads to the hub, against a server of this machine that takes a commit as the hub does."""

import base64
import json
import os
import re
import subprocess
import sys

import pytest

import minilora as ml
from minilora.adapters.layout import CONFIG_FILE, WEIGHTS_FILE
from minilora.cli import main
from minilora.files import BUILTIN, MANIFEST
from minilora.runs.cards import model_card
from tests.files import edit
from tests.hub import COMMIT, serving
from tests.models import tiny_model
from tests.runs import NO_ADAPTER, finetune, write_chat_models, write_rows
from tests.text import CHATML, conversation

SYSTEM = 'Be kind,\n"dear".'


@pytest.fixture
def hub(tmp_path_factory, monkeypatch):
    with serving(monkeypatch, tmp_path_factory.mktemp("hub")) as server:
        monkeypatch.setenv("HF_TOKEN", "hf_none")
        yield server


@pytest.fixture
def run(tmp_path):
    model = tiny_model()
    ml.attach(model, ml.LoraConfig(r=3))
    ml.save_adapter(model, tmp_path)
    edit(tmp_path, base_model_name_or_path="org/base", revision=COMMIT)
    scores = {"before": {"loss": 2.5, "accuracy": None}, "after": {"loss": 1.254049, "accuracy": 0.75}}
    general = {"before": 3.25, "after": 3.5, "kl": 0.125}
    (tmp_path / "summary.json").write_text(json.dumps({**scores, "general": general, "steps": 7, "tokens": 1234}))
    (tmp_path / "trainer_state.json").write_text('{"best_model_checkpoint": "/a/path"}')  # of another program
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "state.json").write_text("{}")
    return tmp_path


def visibility(created):
    """As newer versions of the client say it, or older ones."""
    return created.get("visibility", created.get("private"))


def committed(hub):
    lines = [json.loads(line) for line in hub.posted[-1][1].splitlines()]
    return {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
    }


def test_a_run_is_pushed_in_one_commit_with_its_card_and_nothing_else_and_is_public_if_asked(hub, run, capsys):
    assert main(["push", str(run), "me/mine"]) == 0
    assert capsys.readouterr().out == f"{hub.address}/me/mine/commit/{COMMIT}\n"
    created = json.loads(hub.posted[0][1])
    assert (hub.posted[0][0], created["name"]) == ("/api/repos/create", "mine")
    assert visibility(created) in ("private", True)
    files = committed(hub)
    assert files.pop("README.md").decode() == model_card(run, "me/mine", f"org/base@{COMMIT}")
    assert files.keys() == {CONFIG_FILE, WEIGHTS_FILE, "summary.json"}
    assert all((run / name).read_bytes() == content for name, content in files.items())
    hub.posted.clear()
    assert main(["push", str(run), "me/mine", "--public"]) == 0
    assert visibility(json.loads(hub.posted[0][1])) in ("public", False)


def test_the_card_has_base_results_and_how_to_load_it_and_a_dry_run_shows_it(hub, run, capsys):
    assert main(["push", str(run), "me/mine", "--dry-run"]) == 0
    card = capsys.readouterr().out
    assert card.startswith("---\nlibrary_name: peft\ntags: [lora, minilora]\nbase_model: org/base\n---\n")
    assert "- before: held-out loss 2.5000, loss on general text 3.2500\n" in card
    assert "- after: held-out loss 1.2540, accuracy 0.7500, loss on general text 3.5000\n" in card
    assert "- KL to the base on general text: 0.1250\n" in card
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/mine")' in card
    assert not hub.posted
    nothing = {"loss": None, "accuracy": None}  # no rows were held out
    (run / "summary.json").write_text(json.dumps({"before": nothing, "after": nothing, "general": None}))
    assert "None" not in model_card(run, "me/mine", "org/base")
    for file in ("adapter_config.json", "summary.json"):
        (run / file).unlink()
    (run / "config.json").write_text("{}")
    card = model_card(run, "me/mine", "")
    assert 'AutoModelForCausalLM.from_pretrained("me/mine")' in card
    assert "base_model" not in card
    assert "\ntags: [minilora]\n" in card


SCORES = {"loss": 1, "accuracy": None}


@pytest.mark.parametrize(
    "summary",
    [{}, {"before": 1}, {"before": {}}, *({"before": SCORES, "after": SCORES, "general": x} for x in (5, {"kl": "x"}))],
)
def test_a_summary_that_is_no_run_s_is_named(run, summary):
    (run / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ml.FormatError, match=r"summary\.json: is not a summary of a run"):
        model_card(run, "me/mine", "org/base")


def test_what_cannot_be_pushed_is_told_in_one_line(hub, run, capsys):
    hub.status = 403
    for path, name, said in (
        (run / "checkpoints", "me/mine", "has no adapter_config.json and no config.json; need an adapter or a model"),
        *((run, name, "is not the name of a repository") for name in ("me/mine@main", '"/x', "../x", "mine")),
        (run, "me/mine", "me/mine: not uploaded: "),
    ):
        assert main(["push", str(path), name]) == 1
        message = capsys.readouterr().err
        assert said in message
        assert len(message.splitlines()) == 1


# --- the base's name and other names of this machine ---


def base_in(card):
    """The base that a card names, in its head and in its text."""
    head, text = (re.search(pattern, card)[1] for pattern in ("base_model: (.*)", "LoRA adapter of `(.*)`"))
    assert head == text.partition("@")[0]
    return text


@pytest.mark.parametrize("name", ["org/other", "org/other@v1", "first", BUILTIN, None])
def test_a_local_base_has_the_given_name_or_is_refused(hub, run, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/base").mkdir(parents=True)
    is_right = name is not None and name.startswith("org/")
    for base in ("models/base", str(tmp_path / "models/base")):
        edit(run, base_model_name_or_path=base, revision=None)
        assert main(["push", str(run), "me/mine", *([f"--base-name={name}"] if name else [])]) == (not is_right)
        if is_right:
            files = committed(hub)
            values = json.loads(files[CONFIG_FILE])
            assert base_in(files["README.md"].decode()) == name
            assert (values["base_model_name_or_path"], values["revision"] or "") == name.partition("@")[::2]
        else:
            assert "--base-name" in capsys.readouterr().err
            assert not hub.posted


@pytest.mark.parametrize("base", [BUILTIN, "models/moved", None])
def test_a_run_whose_base_has_no_commit_was_trained_on_no_repository(hub, run, capsys, base):
    edit(run, base_model_name_or_path=base, revision=None)
    (run / "run.json").write_text("{}")
    assert main(["push", str(run), "me/mine", "--dry-run"]) == 1
    assert "--base-name" in capsys.readouterr().err


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Local runs: `chat`, with a system prompt, `plain`, and `next`, from the first; and what is made of `chat`."""
    directory = write_chat_models(tmp_path_factory.mktemp("secret-place"))
    places = {"name_or_path": str(directory / "chat"), "tokenizer_file": rf"C:\{directory.name}\tokenizer.json"}
    for file, more in (("tokenizer_config.json", places), ("config.json", {"_name_or_path": str(directory / "old")})):
        path = directory / "chat" / file
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    (directory / "chat" / MANIFEST).unlink()
    (directory / "own.jinja").write_text("Q: " + CHATML)
    rows = [{"messages": conversation([(f"the sea {i}", "yes")])} for i in range(4)]
    for folder in (directory, directory / "eval"):  # two files of one name
        folder.mkdir(exist_ok=True)
        (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_rows(directory / "texts.jsonl", 4)
    own = {"system": SYSTEM, "prompt_style": directory / "own.jinja", "eval_data": directory / "eval" / "talks.jsonl"}
    again = {"model": None, "adapter": directory / "chat-run", **NO_ADAPTER}
    for name, rows, changes in (("chat", "talks", own), ("plain", "texts", {}), ("next", "talks", again)):
        settings = {"model": directory / "chat", "data": directory / f"{rows}.jsonl", "max_steps": 1, **changes}
        assert finetune(directory, directory / f"{name}-run", **settings) == 0
    for name, words in (("merge", ["merge"]), ("plain", ["export", "--for=peft"])):
        assert main([*words, f"--adapter={directory / 'chat-run'}", f"--out={directory / name}"]) == 0
    return directory


@pytest.mark.parametrize("name", ["chat-run", "plain-run", "next-run", "merge", "plain", "chat"])
def test_nothing_that_is_uploaded_has_a_path_of_this_machine(hub, local, name):
    place = local.name.encode()
    assert any(place in path.read_bytes() for path in (local / name).iterdir() if path.is_file())
    assert main(["push", str(local / name), "me/mine", "--base-name=org/base"]) == 0
    files = committed(hub)
    assert not [path for path, content in files.items() if place in content]
    message = json.dumps({"role": "system", "content": SYSTEM}).encode()
    assert (message in files["README.md"]) == (name in ("chat-run", "next-run", "merge", "plain"))


def asked(tokenizer, question):
    """The tokens by which a model is asked, as it was trained."""
    if tokenizer.prompts.form == "plain":
        return tokenizer.encode(question)
    return tokenizer.encode_chat(conversation([(question, "")], tokenizer.prompts.system)[:-1], True)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["chat-run", "plain-run", "merge", "plain"])
def test_the_code_of_a_card_writes_what_minilora_writes(hub, local, tmp_path, name):
    pytest.importorskip("peft")
    assert main(["push", str(local / name), "me/mine", "--base-name=org/base"]) == 0
    hub.add("me/mine", files := committed(hub))
    hub.add("org/base", {path.name: path.read_bytes() for path in (local / "chat").iterdir()})
    code = re.search(r"```python\n(.*?)```", files["README.md"].decode(), re.DOTALL)[1]
    settings = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path)}
    written = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, check=True)
    model = ml.load_model(local / ("merge" if name == "merge" else "chat"))
    if name != "merge":
        ml.load_adapter(model, local / name)
    tokenizer = ml.load_tokenizer(local / ("chat-run" if name == "plain" else name))
    ours = ml.generate(model, [asked(tokenizer, "Hello")], max_new_tokens=100)[0]
    assert written.stdout.decode() == tokenizer.decode(ours) + "\n"
