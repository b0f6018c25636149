"""Names that differ in numbers alone, shown once: `model.layers.{0-29}.mlp.up_proj.weight`."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping

NUMBER = re.compile(r"(?<![^./])([0-9]{1,9})(?![^./])")  # a whole part of a name


def fold(kinds: Mapping[str, Hashable]) -> list[tuple[str, list[str]]]:
    """(label, names) for names of one kind that differ in numbers alone.

    A label has the least and the greatest number of each place. It holds names that are not there if some between them
    are of another kind, or missing: the count of the names tells.

    >>> fold({"a.0.w": "x", "a.1.w": "x", "a.2.w": "y", "b": "x"})
    [('a.{0-1}.w', ['a.0.w', 'a.1.w']), ('a.2.w', ['a.2.w']), ('b', ['b'])]
    """
    groups: dict[Hashable, list[str]] = {}
    for name in sorted(kinds):
        texts = tuple(NUMBER.split(name)[::2])
        groups.setdefault((texts, kinds[name]), []).append(name)
    return [(_label(names), names) for names in groups.values()]


def _label(names: list[str]) -> str:
    places = [set(place) for place in zip(*map(NUMBER.split, names), strict=True)]
    ends = [sorted(place, key=int) if len(place) > 1 else [*place] for place in places]
    return "".join(f"{{{end[0]}-{end[-1]}}}" if len(end) > 1 else end[0] for end in ends)
