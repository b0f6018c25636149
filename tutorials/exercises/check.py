"""The verdict on an exercise, one line for each of its parts.

python tutorials/exercises/check.py NN [FILE]     FILE: your solution, if it is not in exNN.py
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent


def verdicts(number: str, solution: Path) -> dict[str, str | None]:
    """What is wrong with each part of a solution, by the name of its function; None if it is right.

    `check_count` judges the function `count`. An exercise of one part has `check`, and the part no name.
    """
    checks, solution = vars(load(HERE / f"ex{number}_check.py")), solution.resolve()
    parts = [name for name in checks if name.startswith("check")]
    found: dict[str, str | None] = {}
    for part in parts:
        name = part.removeprefix("check").removeprefix("_")
        try:
            answer = load(solution)
            for function in returning(HERE / f"ex{number}.py") & vars(answer).keys():
                setattr(answer, function, no_none(getattr(answer, function)))
            checks[part](answer)
            found[name] = None
        except (Exception, SystemExit) as error:  # whatever the reader's code raises is part of the verdict
            places = [(Path(at.filename), at.lineno) for at in traceback.extract_tb(error.__traceback__)]
            lines = [line for path, line in places if path == solution]
            raised_by = places[-1][0]
            if raised_by == solution and isinstance(error, NotImplementedError) and not str(error):
                found[name] = "nothing is written yet"
            elif raised_by != solution and raised_by.parent == HERE and isinstance(error, AssertionError):
                found[name] = str(error)
            else:
                found[name] = f"{type(error).__name__}: {error}" + (f" (your line {lines[-1]})" if lines else "")
    return found


def returning(stub: Path) -> set[str]:
    """The functions of a stub that never return None."""
    definitions = [each for each in ast.parse(stub.read_text("utf-8")).body if isinstance(each, ast.FunctionDef)]
    return {each.name for each in definitions if each.returns and "None" not in ast.unparse(each.returns)}


def no_none(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function; None is an AssertionError."""

    @functools.wraps(function)
    def judged(*values: Any, **named: Any) -> Any:
        result = function(*values, **named)
        assert result is not None, f"{function.__name__} returns None: does every way through it end in a return?"
        return result

    return judged


def load(path: Path) -> ModuleType:
    """A Python file as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None, f"{path} is no Python file"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Print the verdicts; the exit status is 0 if the whole solution is right."""
    numbers = sorted(path.name[2:4] for path in HERE.glob("ex[01A][0-9].py"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "number", metavar="NN", type=lambda text: text.zfill(2), choices=numbers, help=f"one of {', '.join(numbers)}"
    )
    parser.add_argument("file", metavar="FILE", type=Path, nargs="?")
    arguments = parser.parse_args()
    found = verdicts(arguments.number, arguments.file or HERE / f"ex{arguments.number}.py")
    for name, wrong in found.items():
        print(f"{name}: " if name else "", "right" if wrong is None else f"not yet: {wrong}", sep="")
    sys.exit(any(wrong is not None for wrong in found.values()))


if __name__ == "__main__":
    main()
