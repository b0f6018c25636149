"""What is learned of a conversation with each chat template that trl brings: all of an answer, and nothing else."""

import json
import shutil
from pathlib import Path

import pytest

import minilora as ml
from minilora.model.ops import IGNORE_INDEX
from minilora.storage import ASSETS
from minilora.train.data import encode_row
from minilora.train.rows import Row

pytestmark = pytest.mark.parity
trl = pytest.importorskip("trl")
TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
TURNS = 3
# Whose answers are rendered otherwise once others follow, so that only the last one can be learned.
LAST_ONLY = {"gptoss.jinja"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer") / "model"
    shutil.copytree(ASSETS / "model", directory)
    tokens = dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>")
    (directory / "tokenizer_config.json").write_text(json.dumps(tokens))
    return ml.load_tokenizer(directory)


def conversation(as_parts):
    def content(text):
        return [{"type": "text", "text": text}] if as_parts else text

    return [
        {"role": role, "content": content(f"{word}{i}.")}
        for i in range(TURNS)
        for role, word in (("user", "question"), ("assistant", "answer"))
    ]


def learned_text(tokenizer, as_parts, train_on):
    """What the labels say; None if the conversation is refused."""
    row = Row({"messages": conversation(as_parts)}, "row")
    try:
        example = encode_row(row, tokenizer, ml.DataConfig(train_on=train_on))
    except ml.DataError:
        return None
    return tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX], skip_special_tokens=False)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_every_answer_is_learned_and_no_question(tokenizer, path):
    with_template = tokenizer.with_template(path.read_text(encoding="utf-8"))
    for train_on, first in (("completion", TURNS - 1), ("assistant", 0)):
        learned = [learned_text(with_template, as_parts, train_on) for as_parts in (False, True)]
        assert any(learned) or (train_on == "assistant" and path.name in LAST_ONLY)
        for text in filter(None, learned):
            assert [i for i in range(TURNS) if f"answer{i}." in text] == list(range(first, TURNS))
            assert "question" not in text
