import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import minilora as ml
from minilora.storage import ASSETS, BUILTIN
from minilora.train.rows import Row, find_splits, read_rows
from tests.test_data import texts


def as_lines(rows, draw):
    """One object a line, with blank lines between; the text, and the line of each object."""
    text, lines = "", []
    for row in rows:
        text += draw(st.sampled_from(["", "\n", "  \n\n"]))
        lines.append(text.count("\n") + 1)
        text += json.dumps(row, ensure_ascii=draw(st.booleans())) + "\n"
    return text.removesuffix(draw(st.sampled_from(["", "\n"]))), lines


def as_array(rows, draw):
    """A JSON array with line breaks wherever JSON allows them."""
    text, lines = draw(st.sampled_from(["[", "\n [\n"])), []
    for i, row in enumerate(rows):
        text += draw(st.sampled_from(["", "\n", " "])) + ("," if i else "") + draw(st.sampled_from(["", "\n", "\r\n"]))
        lines.append(text.count("\n") + 1)
        text += json.dumps(row, indent=draw(st.sampled_from([None, 1])))
    return text + draw(st.sampled_from(["]", "\n]\n\n"])), lines


objects = st.dictionaries(st.sampled_from("abc"), texts | st.integers() | st.lists(st.text(max_size=3), max_size=2))


@given(
    st.lists(objects, min_size=1, max_size=5),
    st.sampled_from([as_lines, as_array]),
    st.sampled_from([".json", ".jsonl"]),
    st.data(),
)
def test_an_array_and_one_object_a_line_are_told_apart_by_content_and_each_row_knows_its_line(
    tmp_path_factory, rows, layout, ending, data
):
    path = tmp_path_factory.mktemp("rows") / f"rows{ending}"
    text, lines = layout(rows, data.draw)
    path.write_bytes(text.encode())
    assert read_rows(path) == [Row(row, f"{path}:{line}") for row, line in zip(rows, lines, strict=True)]


@pytest.mark.parametrize(
    ("content", "line", "phrase"),
    [
        (b'{"a": 1}\n{"a": 1\n{"a": 1}', 2, "not JSON"),
        (b'{"a": 1}\n\n\n{"a": 1} {"a": 1}', 4, "not JSON"),
        (b'[{"a": 1},\n {"a": 1},\n {"a": },\n {"a": 1}]', 3, "not JSON"),
        (b'[{"a": 1},\n {"a": 1}\n {"a": 1}]', 3, "comma"),
        (b'[{"a": 1},\n\n, {"a": 1}]', 3, "comma"),
        (b'[,\n{"a": 1}]', 2, "comma"),
        (b'[{"a": 1},\n]', 2, "comma"),
        (b'[{"a": 1}\n', 2, "bracket"),
        (b'[{"a": 1}]\n\n[{"a": 1}]', 1, "bracket"),
        (b'[{"a": 1},\n 5]', 2, "found a JSON int, need an object"),
        (b'{"a": 1}\n"text"', 2, "found a JSON str, need an object"),
        (b"[[1]]", 1, "found a JSON list, need an object"),
        (b"\nnull", 2, "found a JSON NoneType, need an object"),
        (b'\n\n{"a": ' + b"[" * 100_000, 3, "not JSON"),
        (b'\xef\xbb\xbf{"a": 1}', 1, "not JSON"),
    ],
)
def test_an_error_in_a_file_is_named_with_its_line(tmp_path, content, line, phrase):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(ml.DataError) as error:
        read_rows(path)
    assert str(error.value).startswith(f"{path}:{line}: ")
    assert phrase in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"[]", b" [\n]\n"])
def test_a_file_without_rows_is_refused(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ml.DataError, match="there are no rows") as error:
        read_rows(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_not_utf_8_is_refused_with_the_byte(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(ml.FormatError, match="byte 7 is not UTF-8") as error:
        read_rows(path)
    assert str(path) in str(error.value)


def test_a_directory_has_a_file_for_each_split_and_lines_go_before_arrays(tmp_path):
    for name in ("train.json", "train.jsonl", "valid.json", "test.jsonl", "dev.jsonl", "train.txt"):
        (tmp_path / name).write_text("{}")
    expected = {"train": "train.jsonl", "valid": "valid.json", "test": "test.jsonl"}
    assert find_splits(tmp_path) == {split: tmp_path / name for split, name in expected.items()}


def test_a_file_is_the_training_split_and_the_builtin_data_have_all_three(tmp_path):
    (tmp_path / "some.json").write_text("{}")
    assert find_splits(tmp_path / "some.json") == {"train": tmp_path / "some.json"}
    assert find_splits(BUILTIN) == {s: ASSETS / "data" / f"{s}.jsonl" for s in ("train", "valid", "test")}


@pytest.mark.parametrize(("name", "phrase"), [("missing", "no such file"), ("empty", r"need a \.json or \.jsonl file")])
def test_data_that_are_not_there_are_refused_by_name(tmp_path, name, phrase):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ml.DataError, match=phrase) as error:
        find_splits(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
