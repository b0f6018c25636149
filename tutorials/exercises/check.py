"""The verdict on an exercise, one line for each of its parts.

python tutorials/exercises/check.py NN [FILE]     FILE: your solution, if it is not in exNN.py
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent


def verdicts(number: str, solution: Path) -> dict[str, str | None]:
    """What is wrong with each part of a solution, by the name of its function; None if it is right.

    `check_scale` judges the function `scale`. An exercise of one part has `check`, and the part no name.
    """
    checks = vars(load(HERE / f"ex{number}_check.py"))
    parts = [name for name in checks if name.startswith("check")]
    found: dict[str, str | None] = {}
    for part in parts:
        name = part.removeprefix("check").removeprefix("_")
        try:
            checks[part](load(solution))
            found[name] = None
        except NotImplementedError:
            found[name] = "nothing is written yet"
        except AssertionError as error:
            found[name] = str(error)
        except Exception as error:  # whatever the reader's code raises is part of the verdict
            found[name] = f"{type(error).__name__}: {error}"
    return found


def load(path: Path) -> ModuleType:
    """A Python file as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Print the verdicts; the exit status is 0 if the whole solution is right."""
    numbers = sorted(path.name[2:4] for path in HERE.glob("ex[01A][0-9].py"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", metavar="NN", choices=numbers, help=f"one of {', '.join(numbers)}")
    parser.add_argument("file", metavar="FILE", type=Path, nargs="?")
    arguments = parser.parse_args()
    found = verdicts(arguments.number, arguments.file or HERE / f"ex{arguments.number}.py")
    for name, wrong in found.items():
        print(f"{name}: " if name else "", "right" if wrong is None else f"not yet: {wrong}", sep="")
    sys.exit(any(wrong is not None for wrong in found.values()))


if __name__ == "__main__":
    main()
