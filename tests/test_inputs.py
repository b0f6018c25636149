import hashlib
import json

import pytest

import minilora as ml
from minilora.files import ASSETS, BUILTIN
from minilora.runs.inputs import load_general
from tests.runs import inputs, write_chat_models, write_rows
from tests.text import CHATML


def load(path, directory, training=None, **reading):
    return inputs(directory, *(path if isinstance(path, list) else [path]), training=training, **reading)


def sizes(data):
    return len(data.train), len(data.valid), len(data.test)


def sources(rows):
    return [row.source for row in rows]


@pytest.mark.parametrize(("share", "held"), [(0.01, 1), (0.2, 4), (0.5, 11), (0.99, 22)])
def test_a_share_of_the_rows_is_held_out_by_the_seed_and_never_learned(directory, share, held):
    rows = directory / "rows.jsonl"
    first, again, other = (load(rows, directory, ml.TrainConfig(seed=seed), eval_split=share) for seed in (1, 1, 2))
    assert len(first.test) == held
    assert sorted(sources(first.train) + sources(first.test)) == sorted(f"{rows}:{i}" for i in range(1, 24))
    assert sources(first.test) == sources(again.test) != sources(other.test)
    assert first.valid == first.test


def test_choices_are_answers_of_held_out_rows_alone(directory, tmp_path):
    for name, choices in (("train", ["yes", "no", "perhaps"]), ("test", ["yes", "no"])):
        write_rows(tmp_path / f"{name}.jsonl", 23, choices)
    assert len(load(tmp_path / "train.jsonl", directory, eval_split=0.9).choices) == 3
    assert len(load(tmp_path, directory).choices) == 2


def test_files_of_their_own_are_held_out_instead_of_a_share(directory, tmp_path):
    for name, count in (("train", 9), ("valid", 5), ("test", 4)):
        write_rows(tmp_path / f"{name}.jsonl", count)
    data = load(tmp_path, directory, eval_split=0.5)
    assert sizes(data) == (9, 5, 4)
    assert set(data.files) == {"train.jsonl", "valid.jsonl", "test.jsonl"}
    (tmp_path / "test.jsonl").unlink()
    assert sizes(load(tmp_path, directory, eval_split=0.5)) == (9, 5, 5)
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(ml.DataError, match=r"there are no training rows; found \['valid'\]"):
        load(tmp_path, directory)


def test_a_run_that_chooses_by_evaluations_does_not_choose_by_the_rows_it_is_judged_by(directory, tmp_path):
    training = ml.TrainConfig(eval_steps=1, keep="best")
    data = load(directory / "rows.jsonl", directory, training, eval_split=0.2)
    assert sizes(data) == (16, 3, 4)
    assert len({*sources(data.test), *sources(data.valid), *sources(data.train)}) == 23
    for name, count in (("train", 10), ("test", 4)):
        write_rows(tmp_path / f"{name}.jsonl", count)
    assert sizes(load(tmp_path, directory, training, eval_split=0.2)) == (8, 2, 4)
    (tmp_path / "test.jsonl").rename(tmp_path / "valid.jsonl")
    assert sizes(load(tmp_path, directory, training, eval_split=0.2)) == (8, 4, 2)
    assert sizes(load(directory / "rows.jsonl", directory, training, eval_split=0.9)) == (1, 2, 20)
    few = write_rows(tmp_path / "few.jsonl", 3)
    assert sizes(load(few, directory, training, eval_split=0.9)) == (1, 1, 1)  # a row stays to train on
    with pytest.raises(ml.DataError, match="no held-out rows to choose the best weights by"):
        load(directory / "rows.jsonl", directory, training, eval_split=0)


def test_several_files_are_joined_and_each_is_named_with_its_digest(directory, tmp_path):
    first, second = write_rows(tmp_path / "a.jsonl", 3), write_rows(tmp_path / "b.jsonl", 4)
    data = load([first, second], directory, eval_split=0)
    assert len(data.train) == 7
    assert data.files == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (first, second)}
    (tmp_path / "other").mkdir()
    same = write_rows(tmp_path / "other" / "a.jsonl", 2)
    assert set(load([first, same], directory, eval_split=0).files) == {str(first), str(same)}


def test_of_general_text_every_token_is_predicted_whatever_is_learned_of_the_rows(directory):
    tokenizer = ml.load_tokenizer(directory / "model")
    reading = ml.DataConfig(train_on="completion", system="Be brief.", columns={"text": "body"})
    rows = [json.loads(line)["text"] for line in (ASSETS / "data" / "general.jsonl").read_text().splitlines()]
    found = load_general(BUILTIN, tokenizer, reading)
    assert [example.tokens for example in found] == [[*tokenizer.encode(row), tokenizer.eos_id] for row in rows]
    assert all(example.labels == example.tokens for example in found)
    assert not load_general("none", tokenizer, reading)


def test_the_tokenizer_comes_with_the_prompt_style_that_the_rows_are_written_in(directory, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Say it.", "output": "It."}\n' * 3)
    tokenizer = load(tmp_path / "rows.jsonl", directory).tokenizer
    assert "### Instruction:\nSay it." in tokenizer.render([{"role": "user", "content": "Say it."}])
    assert load(directory / "rows.jsonl", directory).tokenizer.template is None
    write_chat_models(tmp_path)
    assert inputs(tmp_path, model="chat").tokenizer.template.source == CHATML
