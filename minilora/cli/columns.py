"""Arrange text in columns, whose width is measured in the cells of a terminal."""

from __future__ import annotations

import re
import unicodedata
from itertools import zip_longest

from minilora.runs.meter import visible

GAP = " │ "


def columns(left: str, right: str, titles: tuple[str, str], width: int) -> str:
    """Return both texts side by side under their titles, in lines of at most `width` cells."""
    room = max(2, (width - len(GAP)) // 2)  # a character may need two
    head = [fit(title, room) for title in titles]
    rows = zip_longest(wrap(left.strip(), room), wrap(right.strip(), room), fillvalue="")
    lines = [f"{padded(a, room)}{GAP}{b}".rstrip() for a, b in [head, *rows]]
    return "\n".join([lines[0], "─" * (room + 1) + "┼" + "─" * (room + 1), *lines[1:]])


def wrap(text: str, width: int) -> list[str]:
    """Break a text into lines of at most `width` cells, at white space, and in words that are wider than a line."""
    lines = []
    for part in text.expandtabs(4).splitlines():
        lines.append("")
        for piece in re.findall(r"\s+|\S+", visible(part).rstrip()):
            if cells(lines[-1] + piece) <= width:
                lines[-1] += piece
                continue
            if lines[-1].strip() or piece.isspace():
                lines.append("")
            for character in piece.lstrip():
                if cells(lines[-1] + character) > width:
                    lines.append("")
                lines[-1] += character
    return [line.rstrip() for line in lines]


def fit(text: str, width: int) -> str:
    """Shorten a text to `width` cells at its beginning; of a path, the end says the most."""
    text = visible(text)
    while cells(text) > width:
        text = "…" + text[2:]
    return text


def cells(text: str) -> int:
    """Return the width of a text in a terminal: 2 for East Asian characters and emoji, 0 for combining accents."""
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me") else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def padded(text: str, width: int) -> str:
    """Add spaces to a text up to `width` cells."""
    return text + " " * (width - cells(text))
