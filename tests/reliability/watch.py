"""Run calls one after the other in a process of their own, with little memory to spare, and report what each did."""

import faulthandler
import gc
import importlib
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SECONDS, MEGABYTES = 2.0, 100  # of processor time and of memory, that a file from outside may take
SPARE = 2**32  # bytes of address space that the process may take beyond what it has: threads reserve some of it
PATIENCE = 60  # seconds after which a call counts as hanging, on a machine that does other work too

Call = tuple[str, Callable[[], object]]


@dataclass(frozen=True)
class Outcome:
    """What a call did: "read", "refused", or the kind of another error; its message, and what it took."""

    name: str
    outcome: str
    message: str
    seconds: float
    megabytes: float

    @property
    def problem(self) -> str:
        """Return what is wrong, or an empty text."""
        if self.outcome not in ("read", "refused"):
            return f"{self.name}: {self.outcome}: {self.message}"
        if self.seconds > SECONDS or self.megabytes > MEGABYTES:
            return f"{self.name}: {self.outcome} after {self.seconds:.1f} s with {self.megabytes:.0f} MB"
        return ""


def watched(target: str, *arguments: str) -> list[Outcome]:
    """Run the calls that a function "module:name" of some arguments gives; the last line of a dead process is named."""
    command = [sys.executable, "-m", "tests.reliability.watch", target, *arguments]
    environment = {**os.environ, "RUST_BACKTRACE": "0", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, errors="replace", check=False)
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"')]
    found = [Outcome(**line) for line in lines if "outcome" in line]
    if run.returncode:
        last = next((line["begin"] for line in reversed(lines) if "begin" in line), "the start")
        found.append(Outcome(last, f"died with {run.returncode}", run.stderr[-2000:], 0.0, 0.0))
    return found


def figures(found: Iterable[Outcome]) -> str:
    """Return in one line what was tried, and how much the slowest and the largest took."""
    found = list(found)
    refused = sum(each.outcome == "refused" for each in found)
    most = max(each.megabytes for each in found)
    return f"{len(found)} tried, {refused} refused; at most {max(e.seconds for e in found):.2f} s and {most:.0f} MB"


def _status(field: str) -> float:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) / 1000 if found else 0.0


def _report(calls: Iterable[Call]) -> Iterator[dict[str, object]]:
    from minilora import MiniloraError

    for name, call in calls:
        print(json.dumps({"begin": name}), flush=True)
        gc.collect()  # or what was left of an earlier call would hide what this one takes
        gc.freeze()  # what is still there is not looked at again
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        before, began, outcome, message = _status("VmRSS"), time.process_time(), "read", ""
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        try:
            call()
        except MiniloraError as error:
            outcome, message = "refused", str(error)
        except BaseException as error:
            outcome, message = type(error).__name__, str(error)
        faulthandler.cancel_dump_traceback_later()
        taken = {"seconds": time.process_time() - began, "megabytes": _status("VmHWM") - before}
        yield {"name": name, "outcome": outcome, "message": message[:500], **taken}


def main(target: str, *arguments: str) -> None:
    module, _, name = target.partition(":")
    calls = getattr(importlib.import_module(module), name)(*arguments)
    most = int(_status("VmSize") * 1000) + SPARE
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for line in _report(calls):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
