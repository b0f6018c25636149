"""Make the rows of the second tutorial from The Devil's Dictionary (Ambrose Bierce, 1911; in the public domain).

    apt-get download dict-devil && dpkg-deb -x dict-devil_*.deb DIR
    python scripts/devil.py DIR

A row asks for the definition of a word; the answer is Bierce's prose, without its verse, etymology and commentary. Some
entries of the book are insults to peoples, faiths and women. `keep.txt` lists the words whose rows were read one by one
and found fit to print: a row is made for each of them, and for no other.
"""

import argparse
import gzip
import hashlib
import json
import re
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent.parent / "tutorials" / "data" / "devil"
SIZES = {"test": 100, "valid": 40}  # at least; all others are for training
MAX_WORDS = 36  # at most 54 tokens of SmolLM2
ENTRY = re.compile(r"([A-Z][A-Z' -]+), ?(?:[a-z]+\.)+\s+(.*)", re.DOTALL)  # "ABATIS, n.  Rubbish in front …"
SENTENCE_END = re.compile(
    r"(?<=[.?!])(?:  |\n)|(?<=[.?!][\"'])(?:  |\n)"
)  # the text has two spaces after each sentence


def definitions(text: str) -> dict[str, str]:
    """Headword in capitals -> the first of its definitions that is not too long."""
    found: dict[str, str] = {}
    for paragraph in re.split(r"\n[ \t]*\n", text):
        entry = ENTRY.fullmatch(paragraph.strip("\n"))
        if entry and (definition := shorten(entry[2])):
            found.setdefault(entry[1], definition)
    return found


def shorten(paragraph: str) -> str:
    """The leading sentences of a paragraph of the book that are at most MAX_WORDS together; "" if there are none."""
    prose = re.split(r"\n(?=\s)", paragraph)[0]  # verse is indented
    prose = re.sub(r"\[[^\]]*\]", "", prose).replace("_", "")  # etymology in brackets; _italics_
    prose = re.sub(r"(?<=[a-z])-\n", "-", prose)  # the text breaks lines at the hyphens of compounds only
    kept = ""
    for sentence in SENTENCE_END.split(prose):
        longer = f"{kept} {' '.join(sentence.split())}".strip().replace(" -- ", " — ")
        if len(longer.split()) > MAX_WORDS:
            break
        kept = longer
    return kept


def family(word: str) -> str:
    """What words of one stem have in common, so that they go to one split: optimism and optimist."""
    return word.lower()[:6]


def split(words: Iterable[str]) -> dict[str, list[str]]:
    """The words of each split, whole families by the order of their hashes: one word more moves few others."""
    families = [list(group) for _, group in groupby(sorted(words, key=str.lower), family)]
    families.sort(key=lambda group: hashlib.sha256(family(group[0]).encode()).digest())
    splits: dict[str, list[str]] = {"test": [], "valid": [], "train": []}
    for group in families:
        name = next((name for name, size in SIZES.items() if len(splits[name]) < size), "train")
        splits[name] += group
    return {name: sorted(chosen, key=str.lower) for name, chosen in splits.items()}


def row(word: str, definition: str) -> dict[str, Any]:
    """A conversation of one question and its answer.

    There is no system turn: the model's template then puts its own, 16 tokens of it, and so do `generate` and `chat`.
    """
    question = {"role": "user", "content": f"Define '{word}'."}
    return {"messages": [question, {"role": "assistant", "content": definition}]}


def keep_list() -> list[str]:
    """The words of keep.txt, spelled as they are asked for."""
    return (DATA / "keep.txt").read_text("utf-8").split("\n")[:-1]


def main() -> None:
    """Write the three splits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path, metavar="DIR", help="where the package was unpacked")
    path = parser.parse_args().dir / "usr" / "share" / "dictd" / "devil.dict.dz"
    found = definitions(gzip.decompress(path.read_bytes()).decode("latin-1"))
    for name, words in split(keep_list()).items():
        rows = [json.dumps(row(word, found[word.upper()]), ensure_ascii=False) for word in words]
        (DATA / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in rows), "utf-8", newline="\n")
        print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
