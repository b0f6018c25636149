"""Limits on what a file from outside may ask for, and how such a file is opened.

A file states sizes: of a tensor, a vocabulary, a list. Memory and time may grow with the bytes that are there, but not
with a number that they state, so a stated number is compared with what is there, or with a limit of this page, before
anything is allocated.
"""

from __future__ import annotations

import json
import re
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

from minilora.errors import FormatError

JSON_BYTES = 2**24  # of a JSON or text file; the index of 100,000 tensors has 10 MB
JSON_VALUES = 10**6  # in it: a value takes 80 bytes of memory, and as little as 3 in the file
TOKENIZER_BYTES, TOKENIZER_VALUES = 2**27, 10**7  # of a tokenizer.json; that of 262,144 tokens has 33 MB, 2.4 million
RECORDS_BYTES = 2**30  # of metrics.jsonl; a step has 200
LINE_BYTES = 2**23  # of one row of data; a long book has 2 MB
BAD_ROWS = 50_000  # that are skipped and kept with their reasons
UNPACKED, UNPACKED_TIMES = 2**20, 50  # bytes of a .gz file, and more for each compressed byte; text has 3 to 20
DIMENSIONS, ELEMENTS = 16, 2**48  # of a tensor, with a dimension of 0 counted as 1: PyTorch has 64 and 2**63
NAMES = 10_000  # of modules, in one key of an adapter's config: each is compared with each module
GROWTH = 1024  # rows of a vocabulary that the tokens of an adapter may add, beside as many as there are
SIZES = {  # the largest of each key in config.json, where the weights do not say
    **dict.fromkeys(("vocab_size", "intermediate_size"), 2**24),
    **dict.fromkeys(("hidden_size", "head_dim"), 2**18),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 2**12),
    "num_hidden_layers": 160,  # Llama 3.1 405B has 126
}
COUNT, FLOAT = 2**31 - 1, 1e30  # the largest other whole number, and the largest other number, in config.json
WEIGHT = 1e6  # of an adapter in a sum
KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}


def open_file(path: Path, most: int | None = None, is_named: bool = False) -> BufferedReader:
    """Open a file to read its bytes; `is_named` says that the user named it, and not a directory that it lies in.

    Raises:
        FormatError: there is no such file; it is a directory, a device, a FIFO or a socket, whose reading might never
            end; it is a link that `check_link` refuses; or it has more than `most` bytes.
    """
    try:
        if not is_named:
            check_link(path)
        found = path.stat()
        if stat.S_ISREG(found.st_mode):
            file = path.open("rb")
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(found.st_mode):
        raise FormatError(f"{path}: cannot be read (it is {KINDS.get(stat.S_IFMT(found.st_mode), 'a device')})")
    if most is not None and found.st_size > most:
        file.close()
        raise FormatError(f"{path}: has {found.st_size:,} bytes; at most {most:,} are accepted")
    return file


def check_link(path: Path) -> None:
    """Raise a `FormatError` if a file is a link out of its directory, unless to `blobs`, as in the cache of the hub."""
    if path.is_symlink():
        try:
            target, home = path.resolve(), path.parent.resolve()
        except (OSError, RuntimeError) as error:
            raise FormatError(f"{path}: is a link to itself") from error
        if not (target.is_relative_to(home) or target.is_relative_to(home.parent.parent / "blobs")):
            raise FormatError(f"{path}: is a link to {target}, outside its directory, which is not followed")


def parse_json(text: str | bytes, where: str, most: int = JSON_VALUES) -> Any:
    """Parse JSON of at most `most` values; `where` begins the message of an error.

    Raises:
        FormatError: it is not JSON, or has more values.
    """
    try:
        text = text if isinstance(text, str) else text.decode()
        if sum(map(text.count, (",", "[", "{"))) > most:
            raise ValueError(f"more than {most:,} values")
        value = json.loads(text)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # a half of a surrogate pair, perhaps, which no text may hold
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not JSON ({error})") from error
