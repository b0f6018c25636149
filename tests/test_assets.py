"""The built-in model and data: what a benchmark on them may rely on."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from minilora.files import ASSETS, TensorFile, read_json

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"train": 1600, "valid": 400, "test": 800}


def load_script(path):
    """A file that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where data classes look for their module
    spec.loader.exec_module(module)
    return module


make_data = load_script(ROOT / "scripts" / "make_data.py")


@pytest.fixture(scope="module")
def splits():
    return {split: make_data.read_rows(ASSETS / "data" / f"{split}.jsonl") for split in SIZES}


@pytest.fixture(scope="module")
def definitions(splits):
    return {split: [make_data.row_definition(row) for row in rows] for split, rows in splits.items()}


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


def test_a_row_is_a_definition_and_its_category_and_a_split_has_as_many_of_each(splits, definitions):
    for split, rows in splits.items():
        counts = Counter(row["completion"] for row in rows)
        assert counts == {f" {category}": SIZES[split] // 8 for category in make_data.CATEGORIES.values()}
        for row, text in zip(rows, definitions[split], strict=True):
            assert row == {"prompt": f"Definition: {text}\nCategory:", "completion": row["completion"]}
            assert 20 <= len(text) <= 160
            assert not set(text) & {'"', "\n"}


def test_no_definition_occurs_twice_and_no_row_has_a_near_twin_in_a_later_split(definitions):
    texts = {split: [make_data.normalise(text) for text in found] for split, found in definitions.items()}
    sets = {split: [set(text.split()) for text in found] for split, found in texts.items()}
    assert len({text for found in texts.values() for text in found}) == sum(SIZES.values())
    vocabulary = sorted({word for found in sets.values() for words in found for word in words})
    places = {word: i for i, word in enumerate(vocabulary)}
    has = {split: torch.zeros(len(found), len(places)) for split, found in sets.items()}
    for split, found in sets.items():
        for row, words in zip(has[split], found, strict=True):
            row[[places[word] for word in words]] = 1
    for earlier, later in (("train", "test"), ("train", "valid"), ("valid", "test")):
        shorter = torch.minimum(has[earlier].sum(1, keepdim=True), has[later].sum(1))
        shared = has[earlier] @ has[later].T  # seven in ten of the shorter's words at least, of near-twins
        near = (shared >= 0.7 * shorter - 1e-3).nonzero().tolist()
        assert near
        assert not [(a, b) for i, j in near if make_data.is_near_twin(a := texts[earlier][i], b := texts[later][j])]


def test_a_label_is_one_token_after_the_prompt(tokenizer):
    prompt = "Definition: a thing\nCategory:"
    for category in make_data.CATEGORIES.values():
        label = tokenizer.encode(f" {category}").ids
        assert len(label) == 1
        assert tokenizer.encode(f"{prompt} {category}").ids == tokenizer.encode(prompt).ids + label


def test_the_tokenizer_writes_back_what_it_read(tokenizer, splits):
    texts = [row["prompt"] + row["completion"] for rows in splits.values() for row in rows]
    texts += ["", "naïve — 漢字 🙂\n\t  x ", bytes(range(32)).decode("latin-1")]
    assert [tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) for text in texts] == texts


def test_the_tokenizer_adds_nothing_and_closes_with_one_token(tokenizer):
    config = read_json(ASSETS / "model" / "tokenizer_config.json")
    assert tokenizer.encode("a").tokens == ["a"]
    assert tokenizer.encode(config["eos_token"]).ids == [0]
    assert tokenizer.get_vocab_size() == 2048
