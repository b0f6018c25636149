import csv
import io
import json
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

import minilora as ml
from minilora.runs.formats import Row
from minilora.runs.inputs import find_files, find_splits
from minilora.runs.rows import stream_rows
from tests.text import conversation, texts


def as_lines(rows, draw):
    """One object a line, with blank lines between; the text, and where each object is."""
    text, places = "", []
    for row in rows:
        text += draw(st.sampled_from(["", "\n", "  \n\n", "\r\n"]))
        places.append(f":{text.count(chr(10)) + 1}")
        text += json.dumps(row, ensure_ascii=draw(st.booleans())) + draw(st.sampled_from(["\n", "\r\n"]))
    return text.removesuffix(draw(st.sampled_from(["", "\n", "\r\n"]))), places


def as_array(rows, draw):
    """A JSON array on several lines; the text, and where each object is."""
    text = json.dumps(rows, indent=draw(st.sampled_from([None, 1])))
    return draw(st.sampled_from(["", "\n "])) + text, [f"[{i}]" for i in range(len(rows))]


objects = st.dictionaries(st.sampled_from("abc"), texts | st.integers() | st.lists(st.text(max_size=3), max_size=2))


@given(
    st.lists(objects, min_size=1, max_size=5),
    st.sampled_from([as_lines, as_array]),
    st.sampled_from([".json", ".jsonl"]),
    st.sampled_from([b"", b"\xef\xbb\xbf"]),
    st.data(),
)
def test_arrays_and_json_lines_are_told_apart_and_each_row_knows_its_place(
    tmp_path_factory, rows, layout, ending, mark, data
):
    path = tmp_path_factory.mktemp("rows") / f"rows{ending}"
    text, places = layout(rows, data.draw)
    path.write_bytes(mark + text.encode())
    assert list(stream_rows(path)) == [Row(row, f"{path}{place}") for row, place in zip(rows, places, strict=True)]


@given(
    st.lists(st.lists(texts.filter(bool), min_size=3, max_size=3), min_size=1, max_size=5),
    st.sampled_from([("a.csv", ","), ("a.CSV", ";"), ("a.tsv", "\t")]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.sampled_from(["utf-8", "utf-8-sig"]),
)
def test_csv_and_tsv_are_read_back_as_written_and_each_row_knows_its_first_line(
    tmp_path_factory, rows, layout, quoting, encoding
):
    (name, separator), names, buffer, lines = layout, ["a", "b, or c", ""], io.StringIO(newline=""), []
    names = names if separator == "," else ["a", "b", ""]
    writer = csv.writer(buffer, delimiter=separator, quoting=quoting)
    writer.writerow(names)
    for row in rows:
        buffer.write("\r\n")
        lines.append(buffer.getvalue().count("\n") + 1)
        writer.writerow(row)
    path = tmp_path_factory.mktemp("rows") / name
    path.write_bytes(buffer.getvalue().encode(encoding))
    expected = [Row(dict(zip(names, row, strict=True)), f"{path}:{n}") for row, n in zip(rows, lines, strict=True)]
    assert list(stream_rows(path)) == expected


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_columns_name_the_fields_of_any_format_and_leave_out_the_others(tmp_path, name):
    lines = {"a.csv": "q,a,id\nb,c,1\n", "a.jsonl": '{"q": "b", "a": "c", "id": 1}\n{"q": "b"}\n[1]\n'}
    (path := tmp_path / name).write_text(lines[name])
    first, *others = stream_rows(path, columns={"prompt": "q", "completion": "a"})
    assert first == Row({"prompt": "b", "completion": "c"}, first.source)
    missing = "columns completion=a: there is no column 'a'; found ['q']"
    problems = [missing, "this line: found a JSON list, need an object"]
    problems = problems if name == "a.jsonl" else []
    assert [row.problem[: len(problem)] for row, problem in zip(others, problems, strict=True)] == problems


def test_a_column_that_is_not_there_is_refused_also_where_another_has_the_field_s_name(tmp_path):
    (path := tmp_path / "rows.csv").write_text("instruction,output\na,b\n")
    (row,) = stream_rows(path, columns={"instruction": "instruction", "output": "foo"})
    assert row.problem == "columns output=foo: there is no column 'foo'; found ['instruction', 'output']"
    (path := tmp_path / "held_out.jsonl").write_text('{"prompt": "a", "output": "b", "wanted": "b"}')  # of a run
    assert [row.problem for row in stream_rows(path, columns={"output": "foo"})] == [""]


def test_parquet_is_refused_with_the_two_lines_that_convert_it(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    rows = [{"messages": conversation([(f"é {i}", "b")]), "id": i} for i in range(3)]
    pandas.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ml.DataError, match="is Parquet, which is not read; these lines of Python") as error:
        list(stream_rows(*find_files(tmp_path)["train"]))
    _, *lines = str(error.value).splitlines()
    assert len(lines) == 2
    exec(textwrap.dedent("\n".join(lines)))
    assert [row.fields for row in stream_rows(*find_files(tmp_path)["train"])] == rows


def touch(directory, *names):
    for name in names:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("{}")


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
@pytest.mark.parametrize("valid", ["valid", "validation", "val"])
def test_a_directory_has_a_file_for_each_split(tmp_path, ending, valid):
    names = {"train": "train.jsonl", "valid": f"{valid}{ending}", "test": "test.json"}
    touch(
        tmp_path,
        *names.values(),
        "dev.jsonl",
        "README.txt",
        "dataset.csv",
        "valid.jsonl.gz",
        ".train.jsonl",
        "training.json",
    )
    (tmp_path / "test.jsonl").mkdir()
    assert find_splits(tmp_path) == {split: [tmp_path / name] for split, name in names.items()}


def test_all_documents_of_a_directory_without_other_data_are_trained_on(tmp_path):
    touch(tmp_path, "b.txt", "a.txt", ".c.txt", "c.md")
    assert find_splits(tmp_path) == {"train": [tmp_path / "a.txt", tmp_path / "b.txt"]}
    touch(tmp_path, "train.txt", "test.txt")
    assert find_splits(tmp_path) == {"train": [tmp_path / "train.txt"], "test": [tmp_path / "test.txt"]}
    touch(tmp_path, "rows.csv")
    assert find_splits(tmp_path) == {"train": [tmp_path / "rows.csv"]}


def test_a_document_is_one_row_in_lines_that_end_as_python_has_them(tmp_path):
    (path := tmp_path / "a.txt").write_bytes("\ufeff1\r\n\r\n2 é\n".encode())
    assert list(stream_rows(path)) == [Row({"text": "1\n\n2 é\n"}, str(path))]


def test_a_lone_file_is_the_training_split_by_itself_or_in_a_directory(tmp_path):
    touch(tmp_path, "valid.json")
    assert find_splits(tmp_path / "valid.json") == {"train": [tmp_path / "valid.json"]}
    touch(tmp_path, "directory/some.jsonl", "directory/notes.txt", "directory/.some.jsonl")
    assert find_splits(tmp_path / "directory") == {"train": [tmp_path / "directory" / "some.jsonl"]}


def test_several_names_are_joined_split_by_split_in_their_order(tmp_path):
    touch(tmp_path, "b/train.json", "b/valid.json", "a/train.json", "a/test.json", "c.jsonl")
    b, a, c = tmp_path / "b", tmp_path / "a", tmp_path / "c.jsonl"
    expected = {
        "train": [b / "train.json", c, a / "train.json"],
        "valid": [b / "valid.json"],
        "test": [a / "test.json"],
    }
    assert find_splits([b, str(c), a]) == expected


@pytest.mark.parametrize(
    ("names", "phrase"),
    [
        ([], r"need one data file .* found \[\]"),
        (["a.jsonl", "b.jsonl"], r"need one data file .* found \['a.jsonl', 'b.jsonl'\]"),
        (["train.json", "train.jsonl"], "train.json and train.jsonl are both the train split"),
        (["val.json", "valid.jsonl"], "val.json and valid.jsonl are both the valid split"),
    ],
)
def test_a_directory_whose_files_leave_a_choice_is_refused(tmp_path, names, phrase):
    touch(tmp_path, *names)
    with pytest.raises(ml.DataError, match=phrase) as error:
        find_splits(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: ")
