"""The README's Python and its commands run as they stand, in a directory with a small chat model and some rows."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import minilora as ml
from minilora import cli
from minilora.cli.flags import names_of
from minilora.storage import ASSETS, BUILTIN
from tests.text import CHATML

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"(?<!-->\n)```sh\n(.*?)```", README, flags=re.DOTALL)  # those of CI are run by CI


@pytest.fixture
def directory(tmp_path, monkeypatch):
    shutil.copytree(ASSETS / "model", tmp_path / "path" / "to" / "model")
    (tmp_path / "path" / "to" / "model" / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    rows = (ASSETS / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:24]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
def test_the_python_of_the_readme_runs(block, directory):
    exec(compile(block, "README.md", "exec"), {})
    if '"merged"' not in block:
        return
    merged = ml.load_model(directory / "merged")
    assert ml.count_parameters(merged) == ml.count_parameters(ml.load_model(BUILTIN))
    ml.load_adapter(merged, directory / "adapter")


def test_the_commands_of_the_readme_run_one_after_the_other(directory):
    pytest.importorskip("matplotlib")  # for the picture
    assert sum(block.count("minilora ") for block in COMMANDS) >= 10
    script = f'minilora() {{ {shlex.quote(sys.executable)} -m minilora "$@"; }}\n' + "\n".join(COMMANDS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = ["bash", "-euo", "pipefail", "-c", script]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert (directory / "merged" / "model.safetensors").is_file()
    assert (directory / "runs.svg").is_file()


def test_what_the_table_for_users_of_peft_names_is_there():
    table = README.split("### Coming from PEFT and TRL")[1].split("\n## ")[0]
    ours = [row.split(" | ")[1:] for row in table.splitlines() if row.startswith("| ")][1:]
    assert len(ours) >= 20
    for name in re.findall(r"\bml\.(\w+)", str(ours)):
        assert hasattr(ml, name), name
    commands = cli._parser()[1]
    flags = set().union(*(names_of(parser) for parser in commands.values()))
    for name in re.findall(r"--([a-z-]+)", str([row[-1] for row in ours])):
        assert name.replace("-", "_") in flags, name
    for name in re.findall(r"`minilora (\w+)`", str(ours)):
        assert name in commands
