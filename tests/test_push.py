"""Uploads to the hub, against a server of this machine that takes a commit as the hub does."""

import base64
import json

import pytest

import minilora as ml
from minilora.cli import main
from minilora.cli.push import model_card
from tests.hub import COMMIT, serving
from tests.models import tiny_model


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
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "org/base", "revision": COMMIT}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    scores = {"before": {"loss": 2.5, "accuracy": None}, "after": {"loss": 1.254049, "accuracy": 0.75}}
    (tmp_path / "summary.json").write_text(json.dumps({**scores, "steps": 7, "tokens": 1234}))
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


def test_a_run_is_pushed_in_one_commit_with_its_card_and_without_its_checkpoints_and_is_public_if_asked(
    hub, run, capsys
):
    assert main(["push", str(run), "me/mine"]) == 0
    assert capsys.readouterr().out == f"{hub.address}/me/mine/commit/{COMMIT}\n"
    created = json.loads(hub.posted[0][1])
    assert (hub.posted[0][0], created["name"]) == ("/api/repos/create", "mine")
    assert visibility(created) in ("private", True)
    files = committed(hub)
    assert files.pop("README.md").decode() == model_card(run, "me/mine")
    assert files == {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    hub.posted.clear()
    assert main(["push", str(run), "me/mine", "--public"]) == 0
    assert visibility(json.loads(hub.posted[0][1])) in ("public", False)


def test_the_card_has_base_results_and_how_to_load_it_and_a_dry_run_shows_it(hub, run, capsys):
    assert main(["push", str(run), "me/mine", "--dry-run"]) == 0
    card = capsys.readouterr().out
    assert card == model_card(run, "me/mine")
    assert card.startswith("---\nlibrary_name: peft\ntags: [lora, minilora]\nbase_model: org/base\n---\n")
    assert "- before: held-out loss 2.5000\n- after: held-out loss 1.2540, accuracy 0.7500\n" in card
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/mine")' in card
    assert not hub.posted
    nothing = {"loss": None, "accuracy": None}  # no rows were held out
    (run / "summary.json").write_text(json.dumps({"before": nothing, "after": nothing}))
    assert "None" not in model_card(run, "me/mine")
    for file in ("adapter_config.json", "summary.json"):
        (run / file).unlink()
    (run / "config.json").write_text("{}")
    card = model_card(run, "me/mine")
    assert 'AutoModelForCausalLM.from_pretrained("me/mine")' in card
    assert "base_model" not in card
    assert "\ntags: [minilora]\n" in card


def test_what_cannot_be_pushed_is_told_in_one_line(hub, run, capsys):
    hub.status = 403
    for path, name, said in (
        (run / "checkpoints", "me/mine", "holds no adapter_config.json and no config.json; need an adapter or a model"),
        (run, "me/mine@main", "not uploaded: "),
        (run, "me/mine", "me/mine: not uploaded: "),
    ):
        assert main(["push", str(path), name]) == 1
        message = capsys.readouterr().err
        assert said in message
        assert len(message.splitlines()) == 1
