"""Data files with a mistake each: what they are told, word for word, and that skipping leaves the good rows."""

import shutil
from pathlib import Path

import pytest

import minilora as ml
from tests.text import CHATML, CLOSE

CHAT = {"template": CHATML, "eos": CLOSE}
BROKEN = Path(__file__).parent / "golden" / "broken"
ERRORS = dict(line.split(": ", 1) for line in (BROKEN / "errors.txt").read_text("utf-8").splitlines())


def test_each_broken_file_has_its_error_and_there_are_at_least_forty():
    names = {path.name for path in BROKEN.iterdir()} - {"errors.txt"}
    assert names == set(ERRORS)
    assert len(names) >= 40


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_a_broken_file_is_told_in_one_line_what_is_wrong_where_and_not_in_words_of_python(name, tokenizer):
    with pytest.raises((ml.DataError, ml.FormatError)) as error:
        ml.load_dataset(BROKEN / name, tokenizer(**CHAT))
    found = str(error.value).replace(f"{BROKEN}/", "")
    assert found == ERRORS[name]
    assert found.startswith(f"{name}:")
    assert not {"codec", "NoneType", "Traceback", "recursion", "dict"} & set(found.split())


def test_bad_rows_are_skipped_and_told_where_that_is_asked_for(tmp_path, tokenizer):
    whole = [name for name in sorted(ERRORS) if ERRORS[name].startswith(f"{name}:2: ") and name.endswith(".jsonl")]
    lines = [line for name in whole for line in (BROKEN / name).read_bytes().split(b"\n") if line.strip()]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ml.DataError, match=r"rows\.jsonl:2: "):
        ml.load_dataset(path, tokenizer(**CHAT))
    found = ml.load_dataset(path, tokenizer(**CHAT), ml.DataConfig(skip_bad_rows=True))
    assert len(lines) == 2 * len(whole) >= 80
    assert [example.source for example in found] == [f"{path}:{line}" for line in range(1, len(lines), 2)]
    expected = [f"{path}:{2 * i + 2}: {ERRORS[name].removeprefix(f'{name}:2: ')}" for i, name in enumerate(whole)]
    assert list(found.bad) == expected


def test_where_no_row_is_left_the_first_bad_one_is_told(tmp_path, tokenizer):
    shutil.copy(BROKEN / "text-lines.jsonl", path := tmp_path / "rows.jsonl")
    with pytest.raises(ml.DataError, match=r"2 were skipped, the first: .*rows\.jsonl:1: found 'a'"):
        ml.load_dataset(path, tokenizer(**CHAT), ml.DataConfig(skip_bad_rows=True))
