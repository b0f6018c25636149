"""The README's Python and its commands run as they stand, in a directory with a small chat model and some rows."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import minilora as ml
import minilora.runs.run
from minilora import cli
from minilora.cli.flags import names_of
from minilora.runs.data import Dataset
from minilora.storage import ASSETS
from tests.models import tiny_model
from tests.runs import type_in, write_rows
from tests.text import CHATML, CLOSE, write_tokenizer

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
COMMANDS = "\n".join(re.findall(r"(?<!-->\n)```sh\n(.*?)```", README, flags=re.DOTALL))  # those of CI are run by CI
MODEL = Path("path", "to", "model")


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A tiny chat model, whose projections are as wide as the README's ranks are high, and some rows."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model(dtype=torch.float32, vocab_size=400, num_hidden_layers=1, num_key_value_heads=4)
    ml.save_model(model, MODEL, write_tokenizer(MODEL, template=CHATML, eos=CLOSE))
    write_rows(tmp_path / "rows.jsonl", 9)
    return tmp_path


@pytest.mark.usefixtures("directory")
@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
def test_the_python_of_the_readme_runs(block):
    exec(compile(block, "README.md", "exec"), {})
    if '"merged"' in block:
        merged = ml.load_model("merged")
        assert ml.count_parameters(merged) == ml.count_parameters(ml.load_model(MODEL))
        ml.load_adapter(merged, "adapter")


def test_the_commands_of_the_readme_run_one_after_the_other(directory, monkeypatch, capsys):
    pytest.importorskip("matplotlib")  # for the picture
    monkeypatch.setattr(minilora.runs.run, "load_general", lambda *_: Dataset(()))
    lines = [line for line in COMMANDS.splitlines() if line]
    assert len(lines) >= 20
    for line in lines:
        echo, _, command = line.rpartition(" | ")
        type_in(monkeypatch, "\n".join(shlex.split(echo)[1:]))
        program, *words = shlex.split(command, comments=True)
        assert program == "minilora"
        assert cli.main(words) == 0, f"{line}\n{capsys.readouterr().err}"
    assert (directory / "merged" / "model.safetensors").is_file()
    assert (directory / "runs.svg").is_file()


@pytest.mark.long
def test_the_commands_of_the_readme_run_in_a_shell_with_the_builtin_model(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ASSETS / "model", MODEL)
    (MODEL / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    rows = (ASSETS / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:24]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    script = f'minilora() {{ {shlex.quote(sys.executable)} -m minilora "$@"; }}\n{COMMANDS}'
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = ["bash", "-euo", "pipefail", "-c", script]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_what_the_table_for_users_of_peft_names_is_there():
    table = README.split("### Coming from PEFT and TRL")[1].split("\n## ")[0]
    ours = [row.split(" | ")[1:] for row in table.splitlines() if row.startswith("| ")][1:]
    assert len(ours) >= 20
    for name in re.findall(r"\bml\.(\w+)", str(ours)):
        assert hasattr(ml, name), name
    commands = {name: cli.command_parser(name) for name in cli.COMMANDS}
    flags = set().union(*(names_of(parser) for parser in commands.values()))
    for name in re.findall(r"--([a-z-]+)", str([row[-1] for row in ours])):
        assert name.replace("-", "_") in flags, name
    for name in re.findall(r"`minilora (\w+)`", str(ours)):
        assert name in commands
