"""The built-in model and data: what a benchmark on them may rely on."""

import json

import pytest
from tokenizers import Tokenizer

from minilora.files import ASSETS, TensorFile, read_json


@pytest.fixture(scope="module")
def rows():
    files = (ASSETS / "data" / f"{split}.jsonl" for split in ("train", "valid", "test"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(ASSETS / "model" / "tokenizer.json"))


def test_the_shipped_files_are_there_and_take_at_most_4_megabytes():
    sizes = {path.relative_to(ASSETS).as_posix(): path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()}
    model = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    data = {"train.jsonl", "valid.jsonl", "test.jsonl", "LICENSE-WordNet.txt"}
    assert {f"model/{name}" for name in model} | {f"data/{name}" for name in data} <= set(sizes)
    assert sum(sizes.values()) <= 4_000_000


def test_the_licence_of_wordnet_comes_with_the_data():
    licence = (ASSETS / "data" / "LICENSE-WordNet.txt").read_text("utf-8")
    assert "Permission to use, copy, modify and distribute" in licence
    assert "WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved." in licence
    assert 'THIS SOFTWARE AND DATABASE IS PROVIDED "AS IS"' in licence


def test_the_model_is_small_to_store_and_exact_to_compute_in():
    config = read_json(ASSETS / "model" / "config.json")
    entries = TensorFile(ASSETS / "model" / "model.safetensors").entries
    assert (config["model_type"], config["dtype"]) == ("llama", "float32")
    assert {entry.dtype for entry in entries.values()} == {"BF16"}
    assert config["tie_word_embeddings"]
    assert "lm_head.weight" not in entries


def test_a_label_is_one_token_after_the_prompt(tokenizer, rows):
    prompt, labels = "Definition: a thing\nCategory:", {row["completion"] for row in rows}
    assert len(labels) == 8
    for label in labels:
        ids = tokenizer.encode(label).ids
        assert len(ids) == 1
        assert tokenizer.encode(prompt + label).ids == tokenizer.encode(prompt).ids + ids


def test_the_tokenizer_writes_back_what_it_read(tokenizer, rows):
    texts = [row["prompt"] + row["completion"] for row in rows]
    texts += ["", "naïve — 漢字 🙂\n\t  x ", bytes(range(32)).decode("latin-1")]
    assert [tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) for text in texts] == texts


def test_the_tokenizer_adds_nothing_and_closes_with_one_token(tokenizer):
    config = read_json(ASSETS / "model" / "tokenizer_config.json")
    assert tokenizer.encode("a").tokens == ["a"]
    assert tokenizer.encode(config["eos_token"]).ids == [0]
    assert tokenizer.get_vocab_size() == 2048
