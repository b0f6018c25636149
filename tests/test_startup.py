"""Starting: the public names come when they are used, and whoever only asks for help does not wait for PyTorch."""

import copy
import importlib
import pickle
import subprocess
import sys

import pytest

import minilora as ml
from minilora import public
from minilora.cli.commands import COMMANDS

HEAVY = ("torch", "numpy", "tokenizers", "jinja2", "huggingface_hub")


def python(code, *words):
    """What a fresh interpreter prints."""
    run = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


def imported(code, *words):
    """Which of the heavy packages a fresh interpreter has imported at the end of some code, and what that printed."""
    told = f"print([name for name in {HEAVY} if name in sys.modules])"
    *printed, last = python(f"import sys\n{code}\n{told}", *words).splitlines()
    return last, "\n".join(printed)


def ended(*words):
    """The same of a command line, and its exit status."""
    code = "from minilora.cli import main\ntry:\n    main()\nexcept SystemExit as end:\n    print('ended', end.code)"
    heavy, printed = imported(code, *words)
    text, _, status = printed.rpartition("ended ")
    return heavy, text, int(status)


# --- what does not need PyTorch ---


def test_importing_minilora_imports_nothing_else():
    assert imported("import minilora; minilora.__version__, minilora.__doc__, minilora.__path__")[0] == "[]"


@pytest.mark.parametrize("words", [["--help"], [], ["--version"], *([command.name, "--help"] for command in COMMANDS)])
def test_help_needs_no_torch(words):
    heavy, text, status = ended(*words)
    assert (heavy, status) == ("[]", 0)
    assert "minilora" in text


@pytest.mark.parametrize("words", [["finetune", "--lora-q", "3"], ["eval"], ["generate", "--seed", "x"], ["what"]])
def test_a_command_line_that_is_wrong_is_told_without_torch(words):
    assert ended(*words)[::2] == ("[]", 2)


@pytest.mark.parametrize("name", ["errors", "settings", "storage", "hub", "lora.combine_config", "train.rows"])
def test_what_is_only_told_or_asked_imports_no_torch(name):
    assert imported(f"import minilora.{name}")[0] == "[]"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_has_a_module_that_carries_it_out(command):
    assert callable(importlib.import_module(f"minilora.cli.{command.module or command.name}").run)


# --- the public names ---


def test_every_public_name_is_what_its_module_has():
    for name in public.__all__:
        assert getattr(ml, name) is getattr(public, name)


def test_dir_and_star_name_them_all():
    assert set(public.__all__) <= set(dir(ml))
    found = python("from minilora import *\nprint(*dir())").split()
    assert [name for name in found if not name.startswith("__")] == public.__all__


@pytest.mark.parametrize("name", ["load_modle", "__wrapped__", "Mapping", "storag"])
def test_another_name_is_an_attribute_error(name):
    with pytest.raises(AttributeError, match=f"module 'minilora' has no attribute '{name}'"):
        getattr(ml, name)


@pytest.mark.parametrize(
    "first",
    ["import minilora.train.loop", "from minilora.train import config", "import minilora.train", "minilora.DataConfig"],
)
def test_train_is_the_function_whatever_was_imported_before(first):
    code = f"import minilora\n{first}\nfrom minilora import train\nprint(minilora.train is train, train)"
    assert python(code).startswith("True <function train")


@pytest.mark.parametrize("name", ["errors.ConfigError", "model.llama.Llama", "lora.layers.AdapterLinear"])
def test_the_modules_that_come_along_are_found_by_their_names(name):
    assert name.rpartition(".")[2] in python(f"import minilora\nprint(minilora.{name})")


@pytest.mark.parametrize("again", ["importlib.reload(minilora)", "del sys.modules['minilora']\nimport minilora"])
def test_minilora_can_be_imported_again(again):
    code = f"import importlib, sys, minilora\nminilora.train\n{again}\nprint(minilora.train)"
    assert python(code).startswith("<function train")


def test_what_they_make_can_be_copied_and_pickled():
    config = ml.LoraConfig(r=3)
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))
    assert pickle.loads(pickle.dumps(ml.train)) is ml.train
