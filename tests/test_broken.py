"""Data that cannot be used: where the mistake is, some messages word for word, and that skipping leaves good rows."""

import json

import pytest

import minilora as ml
from minilora.runs.rows import TABLE as NEED
from tests.text import CHATML, CLOSE

CHAT = {"template": CHATML, "eos": CLOSE}
GOOD = '{"prompt": "a", "completion": "b"}'
USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "c"}
KNOWN = "messages or conversations or instruction+output or prompt+completion or text"
CODEC = "'utf-8' codec can't decode byte"
TABLE = f"; need {NEED}"
FILES = {  # content, and how the message goes on
    "empty.jsonl": ("", ": there are no rows"),
    "bad-utf-8.jsonl": (f"{GOOD}\n".encode() + b'{"prompt": "caf\xe9"}\n', f":2: this line: not JSON ({CODEC} 0xe9"),
    "utf-16.jsonl": (GOOD.encode("utf-16"), f":1: this line: not JSON ({CODEC} 0xff"),
    "cut-off.jsonl": (f'{GOOD}\n{{"prompt": "a", "compl', ":2: this line: not JSON (Unterminated string"),
    "no-object.jsonl": (
        f"{GOOD}\n[1]\n",
        ":2: this line: found a JSON list, need an object; a file has one JSON object a",
    ),
    "deep.jsonl": (f'{GOOD}\n{{"prompt": {"[" * 100_000}', ":2: this line: not JSON ("),
    "bad-element.json": (
        f'[{GOOD},\n {{"prompt": "a",\n  "completion": b}}]\n',
        ": not JSON (Expecting value: line 3 column 17",
    ),
    "unclosed.json": (f"[{GOOD},\n {GOOD}\n", ": not JSON ("),
    "numbers.json": ("[1, 2]\n", "[0]: found 1, need a JSON object"),
    "header-alone.csv": ("prompt,completion\n\n,\n", ": there are no rows"),
    "columns-of-one-name.csv": ("prompt,prompt\na,b\n", ":1: the first row has to name the columns, each once; found"),
    "too-many-cells.csv": (
        'prompt,completion\n\n"a\nb",c\nd,e,f\n',
        ":5: found 3 cells, need 2, as in the first row; put text with commas in quotes",
    ),
    "too-few-cells.tsv": ("prompt\tcompletion\na\tb\nc d\n", ":3: found 1 cells, need 2"),
    "unclosed-quote.csv": (f'prompt,completion\na,b\n"c,d\n{"e,f" * 99}', f":3: unexpected end of data{TABLE}"),
    "latin-1.CSV": (
        "prompt,completion\na,b\nc,caf\xe9\n".encode("latin-1"),
        f":3: {CODEC} 0xe9 in position 5: invalid continuation byte{TABLE}",
    ),
    "long-cell.csv": (f"prompt,completion\na,{'b' * 10**6}", ":2: field larger than field limit"),
    "cells-without-end.csv": ("prompt,completion\n" + '"\n",' * 2**22, ":2: the row has more than 2,097,152 bytes"),
    "empty.txt": ("", ": text: it is empty"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_refused_in_one_plain_line(name, tmp_path, tokenizer):
    content, said = FILES[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ml.DataError, ml.FormatError)) as error:
        ml.load_dataset(tmp_path / name, tokenizer(**CHAT))
    found = str(error.value)
    assert found.startswith(f"{tmp_path / name}{said}")
    assert "\n" not in found
    assert not {"NoneType", "Traceback", "dict"} & set(found.split())


def messages(*turns, **others):
    return {"messages": list(turns), **others}


def answer(**fields):
    return messages(USER, {"role": "assistant", **fields})


def question(content):
    return messages({"role": "user", "content": content}, ANSWER)


def sharegpt(*turns):
    return {"conversations": [{"from": who, "value": value} for who, value in turns]}


ROWS = [  # where the mistake is, or all of the message; and the row
    (
        f"found the fields ['answer', 'question'], need {KNOWN}",
        {"question": "a", "answer": "b"},
    ),
    (
        "text, label: found both; give columns prompt=text,completion=label to train on labels, or text=text; classes",
        {"text": "a", "label": "b"},
    ),
    ("completion: it is empty, so there is nothing to train on", {"prompt": "a", "completion": ""}),
    (
        "prompt: it is empty, so nothing is asked; text without a question goes in the field `text`",
        {"prompt": "", "completion": "b"},
    ),
    ("instruction: it is empty, so nothing is asked", {"instruction": " \n", "input": "a", "output": "b"}),
    ("messages[0].content: it is empty, so nothing is asked", question("\t")),
    ("messages[0].content: it is empty, so nothing is asked", question([{"type": "text", "text": " "}])),
    ("messages[2].content: it is empty, so nothing is asked", messages(USER, ANSWER, {**USER, "content": ""}, ANSWER)),
    ("prompt[0].content: it is empty", {"prompt": [{**USER, "content": ""}], "completion": [ANSWER]}),
    ("conversations[0].value: it is empty, so nothing is asked", sharegpt(("human", ""), ("gpt", "a"))),
    (
        "messages[0].role: found 'human', accepted are ['assistant', 'developer', 'system', 'tool', 'user']",
        messages({"role": "human", "content": "a"}, ANSWER),
    ),
    (
        "system: found 'e', but the first message is a system prompt as well; leave one out",
        messages(SYSTEM, USER, ANSWER, system="e"),
    ),
    ("tools: found 'look', need JSON", messages(USER, ANSWER, tools="look")),
    (
        "found the fields ['chosen', 'prompt', 'rejected']: pairs of answers are for DPO; it is a recipe: see",
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ),
    ("prompt", {"prompt": 5, "completion": "b"}),
    ("completion", {"prompt": [SYSTEM], "completion": [USER]}),
    ("prompt[0].role", {"prompt": [{"content": "a"}], "completion": [ANSWER]}),
    ("input", {"instruction": "a", "input": {"b": 1}, "output": "c"}),
    ("history", {"instruction": "a", "output": "b", "history": [["c", "d"]]}),
    ("messages", messages()),
    ("messages[1].content", answer(content=5)),
    ("messages[1].content: it is missing; found the keys ['contents', 'role']", answer(contents="x")),
    ("messages[1].content: it is empty", answer(content="")),
    ("messages[1].content: it is empty", answer(content=[{"type": "text", "text": ""}])),
    ("messages[0].content[0]", question([{"type": "image", "url": "a.png"}])),
    ("this line: not JSON", question([{"type": "text", "text": "\udc00"}])),
    ("messages[1].tool_calls", answer(tool_calls=[{"function": {"arguments": {}}}])),
    (
        "messages[1].tool_calls[0].arguments: found U+FDD0",
        answer(tool_calls=[{"name": "f", "arguments": {"\ufdd0": 1}}]),
    ),
    ("no message has role 'assistant', so there is no answer to train on", messages(SYSTEM, USER)),
    ("messages[1].weight", messages(USER, {**ANSWER, "weight": 0})),
    ("tools", messages(USER, ANSWER, tools={"name": "look"})),
    ("tools[0].parameters[0][0]", messages(USER, ANSWER, tools=[{"parameters": json.loads("[" * 50 + "]" * 50)}])),
    ("conversations[1].value: it is empty", sharegpt(("human", "a"), ("gpt", ""))),
    ("conversations[1].from", sharegpt(("human", "a"), ("function_call", "look()"), ("gpt", "c"))),
]


def test_bad_rows_are_refused_with_their_field_and_skipped_where_that_is_asked_for(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{GOOD}\n{json.dumps(row)}\n" for _, row in ROWS))
    with pytest.raises(ml.DataError, match=r"rows\.jsonl:2: found the fields \['answer'"):
        ml.load_dataset(path, tokenizer(**CHAT))
    found = ml.load_dataset(path, tokenizer(**CHAT), ml.DataConfig(skip_bad_rows=True))
    assert [example.source for example in found] == [f"{path}:{2 * i + 1}" for i in range(len(ROWS))]
    for i, ((where, _), error) in enumerate(zip(ROWS, found.bad, strict=True)):
        assert error.startswith(f"{path}:{2 * i + 2}: {where}")


def test_where_no_row_is_left_the_first_bad_one_is_told(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text('"a"\n"b"\n')
    with pytest.raises(ml.DataError, match=r"rows\.jsonl:1: this line: found a JSON str.*; no row of 2 can be used"):
        ml.load_dataset(path, tokenizer(**CHAT), ml.DataConfig(skip_bad_rows=True))
