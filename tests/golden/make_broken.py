"""Write `broken/`: data files that cannot be used, one mistake each. Run it from anywhere.

`broken/errors.txt` has the message of each, which `tests/test_broken.py` compares word for word.
"""

import gzip
import json
from pathlib import Path

BROKEN = Path(__file__).parent / "broken"
GOOD = '{"prompt": "a", "completion": "b"}'
USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
FILES = {
    "empty.jsonl": b"",
    "bad-utf-8.jsonl": f"{GOOD}\n".encode() + b'{"prompt": "caf\xe9", "completion": "b"}\n',
    "utf-16.jsonl": GOOD.encode("utf-16"),
    "truncated.jsonl.gz": gzip.compress(f"{GOOD}\n".encode() * 9, mtime=0)[:40],
    "cut-off.jsonl": f'{GOOD}\n{{"prompt": "a", "compl'.encode(),
    "missing-comma.json": f"[{GOOD}\n {GOOD}]\n".encode(),
    "bad-element.json": f'[{GOOD},\n {{"prompt": "a",\n  "completion": b}}]\n'.encode(),
    "arrays.json": b"[[1]]\n",
    "deep.jsonl.gz": gzip.compress(f'{GOOD}\n{{"prompt": {"[" * 100_000}'.encode(), mtime=0),
    "surrogate.jsonl": b'{"prompt": "a\\ud800", "completion": "b"}\n',
}
ROWS = {  # each the second of its file, after a good one
    "unknown-keys": {"question": "a", "answer": "b"},
    "completion-empty": {"prompt": "a", "completion": ""},
    "unknown-role": {"messages": [{"role": "human", "content": "a"}, ANSWER]},
    "two-questions": {"messages": [USER, USER, ANSWER]},
    "system-beside-system": {"messages": [{"role": "system", "content": "c"}, USER, ANSWER], "system": "e"},
    "tools-not-json": {"messages": [USER, ANSWER], "tools": "look"},
}


def main():
    BROKEN.mkdir(exist_ok=True)
    for name, content in FILES.items():
        (BROKEN / name).write_bytes(content)
    for name, row in ROWS.items():
        (BROKEN / f"{name}.jsonl").write_bytes(f"{GOOD}\n{json.dumps(row)}\n".encode())


if __name__ == "__main__":
    main()
