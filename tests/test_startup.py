"""Starting: help pages, and the public names, which are imported when they are used."""

import json
import pickle
import re
import subprocess
import sys

import pytest

import minilora as ml
from minilora import public
from minilora.cli import COMMANDS, command_parser, main

NO_PYTORCH = """
import contextlib, json, sys
from minilora.cli import main
for words in json.loads(sys.argv[1]):
    with contextlib.suppress(SystemExit):
        main(words)
print("needless:", [name for name in ("torch", "numpy", "tokenizers", "jinja2") if name in sys.modules])
"""
TRAINING = """
import sys, minilora, minilora.testing
minilora.train
needless = ("jinja2", "tokenizers", "hypothesis", "minilora.cli")
print("needless:", [name for name in needless if name in sys.modules])
"""
TRAIN = "import minilora\n{}\nfrom minilora import train\nprint(minilora.train is train, train)"
NAME = "import minilora\nprint(minilora.{})"
IMPORTS = [  # Python, and how what it prints begins
    (TRAINING, "needless: []"),
    ("from minilora import *\nprint([name for name in dir() if name[:2] != '__'])", str(ml.__all__)),
    (TRAIN.format("import minilora.runs.loop"), "True <function train"),
    (TRAIN.format("from minilora.runs import settings"), "True <function train"),
    (TRAIN.format("import minilora.cli"), "True <function train"),
    (TRAIN.format("minilora.DataConfig"), "True <function train"),
    (NAME.format("llama.Llama"), "<class 'minilora.llama.Llama'>"),
    (NAME.format("errors.ConfigError"), "<class 'minilora.errors.ConfigError'>"),
]
ONE_AFTER_THE_OTHER = """
import json, sys
for code in json.loads(sys.argv[1]):
    for name in [name for name in sys.modules if name.partition(".")[0] == "minilora"]:
        del sys.modules[name]
    exec(code, {})
"""


def python(code, *words):
    run = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


# --- what does not need PyTorch ---


def test_help_the_version_and_a_wrong_command_import_no_torch():
    assert python(NO_PYTORCH, json.dumps([["--help"], [], ["--version"], ["what"]]))[-1] == "needless: []"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_page_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    printed = capsys.readouterr().out
    assert end.value.code == 0
    assert printed.startswith(f"usage: minilora {name}")
    assert f"\n\nExample:\n  minilora {name}" in printed
    assert max(map(len, command_parser(name).description.splitlines())) < 80


# --- the public names ---


def test_every_public_name_is_what_its_module_has():
    assert set(ml.__all__) <= set(dir(ml))
    for name in ml.__all__:
        assert getattr(ml, name) is getattr(public, name)


def test_training_imports_little_and_public_names_are_always_found():
    """No template engine, no tokenizer and no command line; all in one process, since it imports PyTorch."""
    printed = python(ONE_AFTER_THE_OTHER, json.dumps([code for code, _ in IMPORTS]))
    for (code, beginning), line in zip(IMPORTS, printed, strict=True):
        assert line.startswith(beginning), code


def test_a_name_of_another_library_is_an_error_that_names_ours():
    for name in ("load_modle", "__wrapped__", "Mapping", "storag"):
        with pytest.raises(AttributeError, match=f"^module 'minilora' has no attribute '{name}'$"):
            getattr(ml, name)
    for name, advice in ml._FOREIGN_NAMES.items():
        with pytest.raises(AttributeError, match=f"no attribute '{name}'; {re.escape(advice)}$"):
            getattr(ml, name)
        for ours, command in re.findall(r"use (?:ml\.(\w+)|`minilora (\w+)`)", advice):
            assert ours in ml.__all__ or command in COMMANDS


def test_what_they_make_can_be_pickled():
    assert pickle.loads(pickle.dumps(ml.LoraConfig(r=3))) == ml.LoraConfig(r=3)
