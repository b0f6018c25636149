"""Commands in processes that can be killed, and that need not import everything anew."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path


class Server:
    """A process that has imported minilora, and forks for each command."""

    def __init__(self):
        command = [sys.executable, "-m", __name__]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[2], **pipes)

    def start(self, words, errors=os.devnull, file_bytes=None):
        """Begin a command, whose messages go into a file, and which may write files up to a size; its process id."""
        request = {"words": [str(word) for word in words], "errors": str(errors), "file_bytes": file_bytes}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self):
        """Wait for the end of the command; its status, negative if a signal killed it."""
        return int(self.process.stdout.readline())

    def run(self, words, **options):
        self.start(words, **options)
        return self.wait()

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def command(request):
    from minilora import cli

    with open(request["errors"], "w") as errors, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(errors.fileno(), 2)
    if request["file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"],) * 2)
    try:
        status = cli.main(request["words"])
    except SystemExit as error:
        status = error.code
    except BaseException:  # as the interpreter would
        import traceback

        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)


def serve():
    import minilora.cli.finetune
    import minilora.cli.merge
    import minilora.public  # noqa: F401

    before = None
    for line in sys.stdin:
        if before is not None:
            os.waitpid(before, 0)
        if not (child := os.fork()):
            command(json.loads(line))
        print(child, flush=True)
        ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # its id stays its own until the next command
        print(ended.si_status * (1 if ended.si_code == os.CLD_EXITED else -1), flush=True)
        before = child


if __name__ == "__main__":
    serve()
