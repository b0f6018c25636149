"""The script that measures how large the project is to its readers."""

import sys
from functools import cache

import pytest

from scripts import structure
from scripts.structure import Trace, closure, figures, lines, modules_of, repeated_names

FILES = {
    "errors.py": "class Error(Exception): ...\n",
    "lora.py": "from toy import errors\n\ndef run():\n    import toy.rooms.inner\n\n    return toy.rooms.inner.run()\n",
    "rooms/__init__.py": "",
    "rooms/inner.py": (
        "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from toy.rooms import other\n\n"
        "def run():\n    return [called() for _ in range(2)]\n\ndef called():\n    return 1\n"
    ),
    "rooms/other.py": "from toy.lora import run\n",
}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / "toy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "toy" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "toy"
    for name in [name for name in sys.modules if name.partition(".")[0] == "toy"]:
        del sys.modules[name]


def test_lines_closure_and_names_of_a_small_package(toy):
    modules = modules_of(toy)
    assert set(modules) == {"errors", "lora", "rooms.inner", "rooms.other"}
    assert lines(modules.values()) == 18
    assert closure(["errors", "missing"], modules) == {"errors"}
    assert closure(["lora"], modules) == {"lora", "errors", "rooms.inner"}
    assert closure(["rooms.other"], modules) == set(modules)
    assert repeated_names(modules) == ["run"]


def test_a_trace_holds_functions_and_moves_of_the_package_alone(toy):
    from toy import lora
    from toy.rooms import inner

    trace = Trace(toy)
    trace.start()
    found = lora.run()
    trace.stop()
    run, *others = (function.__code__ for function in (lora.run, inner.run, inner.called))
    assert found == [1, 1]
    assert trace.functions == {run, *others}
    assert trace.moves == {(run, others[0]), tuple(others)}
    assert str(trace) == "3 functions, 2 moves (1 between files), 2 files"


def test_the_figures_of_this_package_are_those_of_a_step_and_a_run(monkeypatch):
    monkeypatch.setattr(structure, "trace_run", lambda: "")  # the run takes a minute
    statements = structure.import_statements
    monkeypatch.setattr(structure, "import_statements", cache(lambda path: [*statements(path)]))
    modules = modules_of(structure.PACKAGE)
    assert closure(["errors"], modules) == {"errors"}
    shown = dict(figures(modules))
    assert int(shown["a step of training"].split()[0]) > 10
    assert int(shown["the same without kernels"].split()[-2]) <= 8  # files
    assert f"{len(modules)} modules" in shown["the package"]
    assert int(shown["lines of it that are imports"].replace(",", "")) > 5 * len(modules)
