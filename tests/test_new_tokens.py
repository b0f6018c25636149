"""New tokens from one command to the next: trained, found again, merged."""

import json

import pytest

import minilora as ml
from minilora.cli import main
from minilora.files import BUILTIN
from minilora.models.hub import fetch
from minilora.tools.merging import Merge, merge_directory

NEW = ["<coin>", "Wumpus"]
ROWS = [
    {"prompt": "What is a zorkmid?", "completion": " a <coin> of Zork"},
    {"prompt": "Who lives in the cave?", "completion": " the Wumpus <coin>"},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that has learned two rows with two new tokens by heart."""
    folder = tmp_path_factory.mktemp("new")
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    where = ["--model", BUILTIN, "--data", str(folder / "rows.jsonl"), "--out", str(folder / "run")]
    flags = ["--add-tokens", ",".join(NEW), "--epochs", "20", "--learning-rate", "5e-3", "--eval-split", "0"]
    assert main(["finetune", *where, *flags, "--general-data", "none"]) == 0
    return folder / "run"


def test_new_tokens_are_learned_and_found_again(run, capsys):
    assert main(["generate", "--adapter", str(run), "--prompt", ROWS[1]["prompt"], "--max-new-tokens", "6"]) == 0
    assert "the Wumpus <coin>" in capsys.readouterr().out
    ids = json.loads((run / "adapter_config.json").read_text())["trainable_token_indices"]
    tokenizer = ml.load_tokenizer(run)
    assert ids == [tokenizer.token_id(token) for token in NEW]


def test_they_are_merged_as_in_memory(run, tmp_path):
    tokenizer = ml.load_tokenizer(run)
    merge_directory(Merge(fetch(BUILTIN, "model"), [run]), tmp_path / "merged", tokenizer)
    merged = ml.load_model(tmp_path / "merged")
    assert merged.config.vocab_size == len(tokenizer)
    written = ml.generate(merged, [tokenizer.encode(ROWS[1]["prompt"])], max_new_tokens=6)
    assert tokenizer.decode(written[0]).startswith(ROWS[1]["completion"])


def test_an_adapter_of_new_tokens_needs_room_for_them(run):
    with pytest.raises(ml.TargetError, match="are not below 2048, the rows of"):
        ml.load_adapter(ml.load_model(BUILTIN), run)
