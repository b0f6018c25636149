"""Run tests against a copy of minilora that has a mistake planted in it.

One process imports PyTorch and nothing of minilora; each mistake is tried in a fork of it.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
SERVER = """
import contextlib, gc, json, os, resource, signal, sys
import hypothesis.strategies, pytest, safetensors.torch, tokenizers, torch._dynamo, torch.utils.checkpoint
torch.set_num_threads(1)
gc.freeze()  # or each fork would copy the pages of what is imported
for line in sys.stdin:
    seconds, arguments = json.loads(line)
    if (child := os.fork()) == 0:
        os.setpgid(0, 0)
        signal.alarm(seconds)
        resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))  # some mistakes make lists without an end
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (0, 1, 2):
            os.dup2(output, stream)
        try:
            os._exit(pytest.main(arguments))
        finally:
            os._exit(pytest.ExitCode.INTERNAL_ERROR)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # processes that its tests have started and left
    print(status, flush=True)
"""


class Copy:
    """A copy of the project in a folder, where one mistake at a time is planted."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        unneeded = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "minilora-run")
        shutil.copytree(ROOT, folder, ignore=unneeded, dirs_exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": ""}
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.server = subprocess.Popen([sys.executable, "-c", SERVER], cwd=folder, env=environment, **streams)

    def run(self, file: str, source: str, tests: Sequence[str], seconds: int = 300) -> int:
        """Run pytest until the first failure with this source in place of a file; return its exit status.

        It is negative where the tests took more than `seconds`.
        """
        path = self.folder / "minilora" / file
        original = path.read_text(encoding="utf-8")
        self._write(path, source)
        options = ["-x", "-q", "-pno:cacheprovider", "--tb=line", "--hypothesis-profile=find"]
        options += ["-Wignore:Module already"]  # imported, and so its asserts are not rewritten
        print(
            json.dumps([seconds, [*options, *(test if test.startswith("-") else f"tests/{test}" for test in tests)]]),
            file=self.server.stdin,
            flush=True,
        )
        status = int(self.server.stdout.readline())
        self._write(path, original)
        return status

    @property
    def output(self) -> str:
        return (self.folder / "output.txt").read_text(encoding="utf-8")

    def close(self) -> None:
        self.server.communicate()

    def _write(self, path: Path, source: str) -> None:
        path.write_text(source, encoding="utf-8")
        self.count += 1
        os.utime(path, (self.count, self.count))  # compiled code is taken for current if the time is the same
