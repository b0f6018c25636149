"""Write `broken/`: data files that cannot be used, a mistake each. Run it from anywhere; what each is told is in
`broken/errors.txt`, which `tests/test_broken.py` compares.
"""

import gzip
import json
from pathlib import Path

BROKEN = Path(__file__).parent / "broken"
GOOD = '{"prompt": "a", "completion": "b"}'
USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SYSTEM, TOOL = {"role": "system", "content": "c"}, {"role": "tool", "content": "d"}


def messages(*turns, **others):
    return {"messages": list(turns), **others}


def sharegpt(*turns, **others):
    return {"conversations": [{"from": who, "value": value} for who, value in turns], **others}


FILES = {  # bytes and text as they are
    "empty.jsonl": "",
    "blank-lines.jsonl": "\n  \n\r\n",
    "empty-array.json": "[\n]\n",
    "bad-utf-8.jsonl": f"{GOOD}\n".encode() + b'{"prompt": "caf\xe9", "completion": "b"}\n',
    "bad-utf-8-array.json": b'[{"prompt": "a", "completion": "b"},\n {"prompt": "caf\xe9", "completion": "b"}]\n',
    "mark-alone.jsonl": "\ufeff",
    "utf-16.jsonl": GOOD.encode("utf-16"),
    "utf-16-be.jsonl": b"\xfe\xff" + GOOD.encode("utf-16-be"),
    "mark-in-the-middle.jsonl": f"{GOOD}\n\ufeff{GOOD}\n",
    "cr-only.jsonl": f"{GOOD}\r{GOOD}\r".encode(),
    "truncated.jsonl.gz": gzip.compress(f"{GOOD}\n".encode() * 9, mtime=0)[:40],
    "not-gzip.jsonl.gz": f"{GOOD}\n",
    "cut-off.jsonl": f'{GOOD}\n{{"prompt": "a", "compl',
    "two-on-a-line.jsonl": f"{GOOD} {GOOD}\n",
    "single-quotes.jsonl": "{'prompt': 'a', 'completion': 'b'}\n",
    "over-several-lines.jsonl": '{\n "prompt": "a",\n "completion": "b"\n}\n',
    "table.csv": "prompt,completion\na,b\n",
    "first-comma.json": f"[,\n{GOOD}]\n",
    "extra-comma.json": f"[{GOOD},\n ,{GOOD}]\n",
    "last-comma.json": f"[{GOOD},\n {GOOD},\n]\n",
    "missing-comma.json": f"[{GOOD}\n {GOOD}]\n",
    "unclosed.json": f"[{GOOD},\n {GOOD}\n",
    "second-array.json": f"[{GOOD}]\n[{GOOD}]\n",
    "bad-element.json": f'[{GOOD},\n {{"prompt": "a",\n  "completion": b}}]\n',
    "arrays.json": "[[1]]\n",
    "numbers.json": "[1, 2]\n",
    "text-lines.jsonl": '"a"\n"b"\n',
    "huge-number.jsonl": f'{{"prompt": "a", "completion": "b", "id": {"9" * 5000}}}\n',
    "deep.jsonl.gz": gzip.compress(f'{GOOD}\n{{"prompt": {"[" * 100_000}'.encode(), mtime=0),
    "surrogate.jsonl": '{"prompt": "a\\ud800", "completion": "b"}\n',
    "noncharacter.jsonl": '{"prompt": "a\\ufdd0", "completion": "b"}\n',
}
ROWS = {  # JSON, after a row that is good
    "no-keys": {},
    "unknown-keys": {"question": "a", "answer": "b"},
    "no-completion": {"prompt": "a"},
    "no-output": {"instruction": "a", "input": "b"},
    "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "completion-null": {"prompt": "a", "completion": None},
    "completion-nan": {"prompt": "a", "completion": float("nan")},
    "completion-empty": {"prompt": "a", "completion": ""},
    "prompt-number": {"prompt": 5, "completion": "b"},
    "prompt-list-completion-text": {"prompt": [USER], "completion": "b"},
    "two-completions": {"prompt": [USER], "completion": [ANSWER, USER]},
    "completion-by-user": {"prompt": [SYSTEM], "completion": [USER]},
    "prompt-without-role": {"prompt": [{"content": "a"}], "completion": [ANSWER]},
    "text-null": {"text": None},
    "text-empty": {"text": ""},
    "text-list": {"text": ["a"]},
    "text-with-system": {"text": "a", "system": "c"},
    "output-empty": {"instruction": "a", "output": ""},
    "instruction-list": {"instruction": ["a"], "output": "b"},
    "input-object": {"instruction": "a", "input": {"b": 1}, "output": "c"},
    "history-text": {"instruction": "a", "output": "b", "history": "c"},
    "history-of-three": {"instruction": "a", "output": "b", "history": [["c", "d", "e"]]},
    "history-number": {"instruction": "a", "output": "b", "history": [["c", 5]]},
    "history-empty-answer": {"instruction": "a", "output": "b", "history": [["c", "d"], ["e", ""]]},
    "messages-text": {"messages": "a"},
    "messages-empty": {"messages": []},
    "messages-of-text": {"messages": ["a", "b"]},
    "no-role": messages({"content": "a"}, ANSWER),
    "unknown-role": messages({"role": "human", "content": "a"}, ANSWER),
    "role-list": messages({"role": ["user"], "content": "a"}, ANSWER),
    "no-content": messages({"role": "user"}, ANSWER),
    "content-number": messages(USER, {"role": "assistant", "content": 5}),
    "content-empty": messages(USER, {"role": "assistant", "content": ""}),
    "part-image": messages({"role": "user", "content": [{"type": "image", "url": "a.png"}]}, ANSWER),
    "part-text": messages({"role": "user", "content": ["a"]}, ANSWER),
    "part-without-text": messages({"role": "user", "content": [{"type": "text"}]}, ANSWER),
    "surrogate-in-part": messages({"role": "user", "content": [{"type": "text", "text": "\udc00"}]}, ANSWER),
    "calls-text": messages(USER, {"role": "assistant", "tool_calls": "look"}),
    "call-without-name": messages(USER, {"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}),
    "no-answer": messages(SYSTEM, USER),
    "two-questions": messages(USER, USER, ANSWER),
    "two-answers": messages(USER, ANSWER, ANSWER),
    "tool-first": messages(TOOL, ANSWER),
    "tool-after-question": messages(USER, TOOL, ANSWER),
    "system-late": messages(USER, ANSWER, SYSTEM, USER, ANSWER),
    "system-twice": messages(SYSTEM, SYSTEM, USER, ANSWER),
    "system-beside-system": messages(SYSTEM, USER, ANSWER, system="e"),
    "system-number": messages(USER, ANSWER, system=5),
    "weight": messages(USER, {**ANSWER, "weight": 0}),
    "tools-not-json": messages(USER, ANSWER, tools="look"),
    "tools-object": messages(USER, ANSWER, tools={"name": "look"}),
    "tools-of-text": messages(USER, ANSWER, tools=["look"]),
    "tools-deep": messages(USER, ANSWER, tools=[{"parameters": json.loads("[" * 50 + "]" * 50)}]),
    "unknown-from": sharegpt(("person", "a"), ("gpt", "b")),
    "value-null": sharegpt(("human", None), ("gpt", "b")),
    "value-empty": sharegpt(("human", "a"), ("gpt", "")),
    "human-twice": sharegpt(("human", "a"), ("human", "b"), ("gpt", "c")),
    "no-gpt": sharegpt(("system", "a"), ("human", "b")),
    "call-not-json": sharegpt(("human", "a"), ("function_call", "look()"), ("gpt", "c")),
    "call-number": sharegpt(("human", "a"), ("function_call", "5"), ("gpt", "c")),
    "from-missing": {"conversations": [{"value": "a"}]},
}


def main():
    BROKEN.mkdir(exist_ok=True)
    for name, content in FILES.items():
        (BROKEN / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for name, row in ROWS.items():
        (BROKEN / f"{name}.jsonl").write_bytes(f"{GOOD}\n{json.dumps(row)}\n".encode())


if __name__ == "__main__":
    main()
