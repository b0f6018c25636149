"""The verdict on an exercise.

python tutorials/exercises/check.py NN [FILE]     FILE: your solution, if it is not in exNN.py
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent


def verdict(number: str, solution: Path) -> str | None:
    """What is wrong with a solution; None if it is right."""
    try:
        load(HERE / f"ex{number}_check.py").check(load(solution))
    except NotImplementedError:
        return "nothing is written yet"
    except AssertionError as error:
        return str(error)
    except Exception as error:  # whatever the reader's code raises is part of the verdict
        return f"{type(error).__name__}: {error}"
    return None


def load(path: Path) -> ModuleType:
    """A Python file as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Print the verdict; the exit status is 0 if the solution is right."""
    numbers = sorted(path.name[2:4] for path in HERE.glob("ex[01A][0-9].py"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", metavar="NN", choices=numbers, help=f"one of {', '.join(numbers)}")
    parser.add_argument("file", metavar="FILE", type=Path, nargs="?")
    arguments = parser.parse_args()
    wrong = verdict(arguments.number, arguments.file or HERE / f"ex{arguments.number}.py")
    sys.exit(f"not yet: {wrong}" if wrong else print("right"))


if __name__ == "__main__":
    main()
