"""Record a command on a terminal as a moving picture: an SVG that plays once and ends with the last screen.

    python scripts/terminal.py docs/figures/finetune.svg minilora finetune

A viewer that does not animate shows the last screen. Needs a system with pseudo-terminals (Linux, macOS).
"""

import html
import os
import pty
import re
import shlex
import sys
import tempfile
import termios
import time
from itertools import zip_longest
from pathlib import Path

COLUMNS, ROWS = 96, 40
WIDTH, HEIGHT = 8.0, 19  # of a character in pixels
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours and movements, which are not drawn
FRAMES = 60  # states of a line that is written again and again


def record(command: list[str]) -> list[tuple[float, str]]:
    """Run a command in an empty directory on a terminal, and return what it wrote, with the seconds since its start."""
    started, written = time.monotonic(), list[tuple[float, str]]()

    def read(descriptor: int) -> bytes:
        termios.tcsetwinsize(descriptor, (ROWS, COLUMNS))
        data = os.read(descriptor, 65536)
        written.append((time.monotonic() - started, data.decode("utf-8", "replace")))
        return data

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        if status := pty.spawn(command, read):
            raise SystemExit(f"{shlex.join(command)} ended with status {os.waitstatus_to_exitcode(status)}")
    return written


def states(written: list[tuple[float, str]]) -> list[list[tuple[float, str]]]:
    """Return for each line of the screen what it shows, and from when on."""
    lines: list[list[tuple[float, str]]] = [[]]
    for when, text in written:
        for part in re.split(r"(\r?\n|\r)", CONTROL.sub("", text)):
            if part in ("\n", "\r\n"):
                lines.append([])
            elif part.strip("\r"):
                lines[-1].append((when, part.rstrip()[:COLUMNS]))
    return [thinned(line) for line in lines]


def thinned(line: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Keep at most FRAMES states of a line, the last one among them."""
    step = -(-len(line) // FRAMES) or 1
    return [state for i, state in enumerate(line) if (len(line) - 1 - i) % step == 0]


def draw(command: str, lines: list[list[tuple[float, str]]]) -> str:
    """Return the SVG."""
    while lines and not lines[-1]:
        lines.pop()
    width, height = COLUMNS * WIDTH + 32, (len(lines) + 1) * HEIGHT + 40
    drawn = [text_of(0, f"$ {command}", 'class="command"')]
    for row, line in enumerate(lines, 1):
        ends = [when for when, _ in line[1:]]
        for (begin, text), after in zip_longest(line, ends):
            hidden = f'<set attributeName="visibility" to="hidden" begin="0s" end="{begin:.2f}s"/>'
            shown = f'<set attributeName="visibility" to="visible" begin="{begin:.2f}s" end="{after or 0:.2f}s"/>'
            look, move = ('visibility="hidden"', shown) if after else ("", hidden)
            drawn.append(text_of(row, text, look, move))
    style = (
        "text{font:14px ui-monospace,Menlo,Consolas,monospace;fill:#e6edf3;white-space:pre}.command{fill:#7ee787}"
        "rect{fill:#0d1117}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" role="img">\n'
        f"<title>{html.escape(command)}</title>\n<style>{style}</style>\n"
        f'<rect width="100%" height="100%" rx="8"/>\n' + "\n".join(drawn) + "\n</svg>\n"
    )


def text_of(row: int, text: str, look: str = "", move: str = "") -> str:
    return f'<text x="16" y="{30 + row * HEIGHT}" xml:space="preserve" {look}>{html.escape(text)}{move}</text>'


if __name__ == "__main__":
    path, command = Path(sys.argv[1]).resolve(), sys.argv[2:]
    path.write_text(draw(shlex.join(command), states(record(command))), encoding="utf-8")
