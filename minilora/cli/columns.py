"""Two texts side by side, wrapped at words and measured in the cells of a terminal."""

from __future__ import annotations

import re
import unicodedata
from itertools import zip_longest

GAP = " │ "


def columns(left: str, right: str, titles: tuple[str, str], width: int) -> str:
    """Both texts under their titles, in lines of at most `width` cells."""
    room = max(2, (width - len(GAP)) // 2)  # a character may need two
    head = [fit(title, room) for title in titles]
    rows = zip_longest(wrap(left.strip(), room), wrap(right.strip(), room), fillvalue="")
    lines = [f"{_padded(a, room)}{GAP}{b}".rstrip() for a, b in [head, *rows]]
    return "\n".join([lines[0], "─" * (room + 1) + "┼" + "─" * (room + 1), *lines[1:]])


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` cells, broken at white space, and within a word only where it is wider than a line."""
    return [
        line.rstrip() for part in text.expandtabs(4).splitlines() for line in _broken(visible(part).rstrip(), width)
    ]


def visible(text: str) -> str:
    """Without characters that control a terminal, or that are not seen; lines stay lines."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf"))


def fit(text: str, width: int) -> str:
    """The end of a text that is too wide, which of a path says the most."""
    text = visible(text)
    while cells(text) > width:
        text = "…" + text[2:]
    return text


def cells(text: str) -> int:
    """How wide a terminal shows it: two cells for East Asian characters and emoji, none for accents by themselves."""
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me") else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def _broken(text: str, width: int) -> list[str]:
    lines = [""]
    for piece in re.findall(r"\s+|\S+", text):
        if cells(lines[-1] + piece) <= width:
            lines[-1] += piece
            continue
        if lines[-1].strip() or piece.isspace():
            lines.append("")
        for character in piece.lstrip():
            if cells(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines


def _padded(text: str, width: int) -> str:
    return text + " " * (width - cells(text))
