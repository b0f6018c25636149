"""Starting: the public names come when they are used, and whoever only asks for help does not wait for PyTorch."""

import copy
import importlib
import json
import pickle
import subprocess
import sys

import pytest

import minilora as ml
from minilora import public
from minilora.cli.commands import COMMANDS

HEAVY = ("torch", "numpy", "tokenizers", "jinja2", "huggingface_hub", "matplotlib")
LIGHT = ("errors", "settings", "storage", "hub", "lora.combine_config", "train.rows", "cli.picture")
HELP = [["--help"], [], ["--version"], *([command.name, "--help"] for command in COMMANDS)]
WRONG = [["finetune", "--lora-q", "3"], ["eval"], ["generate", "--seed", "x"], ["what"]]
# Prints a JSON line for each module and each command line; the last entry is the heavy packages imported by then.
BEFORE_PYTORCH = f"""
import contextlib, importlib, io, json, sys
def tell(*found):
    print(json.dumps([*found, [name for name in {HEAVY} if name in sys.modules]]))
import minilora
minilora.__version__, minilora.__doc__, minilora.__path__
tell("minilora")
modules, lines = json.loads(sys.argv[1])
for name in modules:
    importlib.import_module("minilora." + name)
    tell(name)
from minilora.cli import main
for words in lines:
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()):
        try:
            status = main(words)
        except SystemExit as end:
            status = end.code
    tell(words, status, printed.getvalue())
"""
TRAIN = "import minilora\n{}\nfrom minilora import train\nprint(minilora.train is train, train)"
NAME = "import minilora\nprint(minilora.{})"
AGAIN = "import importlib, sys, minilora\nminilora.train\n{}\nprint(minilora.train)"
IMPORTS = [  # of each kind some: Python, and how what it prints begins
    [("from minilora import *\nprint([name for name in dir() if name[:2] != '__'])", str(public.__all__))],
    [
        (TRAIN.format(first), "True <function train")
        for first in (
            *("import minilora.runs.loop", "from minilora.runs import config"),
            *("import minilora.cli", "minilora.DataConfig"),
        )
    ],
    [
        (NAME.format(name), f"<class 'minilora.{name}'>")
        for name in ("models.llama.Llama", "errors.ConfigError", "adapters.layers.AdapterLinear")
    ],
    [
        (AGAIN.format(again), "<function train")
        for again in ("importlib.reload(minilora)", "del sys.modules['minilora']\nimport minilora")
    ],
]
ONE_AFTER_THE_OTHER = """
import json, sys
for code in json.loads(sys.argv[1]):
    for name in [name for name in sys.modules if name.partition(".")[0] == "minilora"]:
        del sys.modules[name]
    exec(code, {})
"""


def python(code, *words):
    """The lines that a fresh interpreter prints."""
    run = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


# --- what does not need PyTorch ---


def test_help_a_wrong_command_line_and_what_only_names_things_import_no_torch():
    told = [json.loads(line) for line in python(BEFORE_PYTORCH, json.dumps([LIGHT, [*HELP, *WRONG]]))]
    assert [what for what, *_, heavy in told if heavy] == []
    printed = told[1 + len(LIGHT) :]
    assert [(words, status) for words, status, _, _ in printed] == [
        *((words, 0) for words in HELP),
        *((words, 2) for words in WRONG),
    ]
    assert all("minilora" in text for _, _, text, _ in printed[: len(HELP)])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_has_a_module_that_carries_it_out(command):
    assert callable(importlib.import_module(f"minilora.cli.{command.module or command.name}").run)


# --- the public names ---


def test_every_public_name_is_what_its_module_has():
    assert set(public.__all__) <= set(dir(ml))
    for name in public.__all__:
        assert getattr(ml, name) is getattr(public, name)


def test_public_names_and_modules_are_found_whatever_was_imported_before():
    firsts = [cases[0] for cases in IMPORTS]
    printed = python(ONE_AFTER_THE_OTHER, json.dumps([code for code, _ in firsts]))
    for (code, beginning), line in zip(firsts, printed, strict=True):
        assert line.startswith(beginning), code


@pytest.mark.long
@pytest.mark.parametrize(("code", "beginning"), [case for cases in IMPORTS for case in cases])
def test_the_same_holds_in_an_interpreter_that_has_imported_nothing(code, beginning):
    assert python(code)[-1].startswith(beginning)


@pytest.mark.parametrize("name", ["load_modle", "__wrapped__", "Mapping", "storag"])
def test_another_name_is_an_attribute_error(name):
    with pytest.raises(AttributeError, match=f"module 'minilora' has no attribute '{name}'"):
        getattr(ml, name)


def test_what_they_make_can_be_copied_and_pickled():
    config = ml.LoraConfig(r=3)
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))
    assert pickle.loads(pickle.dumps(ml.train)) is ml.train
