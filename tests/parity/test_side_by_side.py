"""The snippets of docs/side_by_side.md, theirs and ours, run as they stand; the page's own assertions compare them."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

import minilora as ml
from tests.models import tiny_model
from tests.runs import write_rows
from tests.test_readme import BLOCK, PAGES, SIDE_BY_SIDE
from tests.text import write_tokenizer

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGES[SIDE_BY_SIDE], flags=re.DOTALL | re.MULTILINE))
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_key_value_heads": 4}
BERT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}  # each side would draw masks of its own


@pytest.fixture
def _inputs(tmp_path, monkeypatch):
    """A tiny Llama, a tiny BERT and eight rows of each kind, under the names that the page gives them."""
    monkeypatch.chdir(tmp_path)
    model, bert = Path("path", "to", "model"), Path("path", "to", "bert")
    ml.save_model(tiny_model(dtype=torch.float32, vocab_size=400, **SIZES), model, write_tokenizer(model))
    write_tokenizer(bert, tokenizer_class="PreTrainedTokenizerFast")
    config = transformers.BertConfig(vocab_size=400, **BERT, **NO_DROPOUT)
    transformers.BertForSequenceClassification(config).save_pretrained(bert)
    write_rows(tmp_path / "rows.jsonl", 8)
    words = ["cat", "dog", "town", "sea", "food", "land", "mat", "capital"]
    rows = [{"instruction": f"what is the {word}?", "output": f"the {word} by the sea"} for word in words]
    (tmp_path / "alpaca.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.usefixtures("_inputs")
@pytest.mark.parametrize("title", SECTIONS)
def test_the_snippets_of_a_section_run_one_after_the_other_and_agree(title):
    names = {}
    for snippet in re.findall(BLOCK.format("python"), SECTIONS[title], flags=re.DOTALL):
        exec(compile(snippet, title, "exec"), names)


def test_the_page_names_every_field_of_theirs():
    named = re.findall(r"`(\w+)`", SECTIONS["Every option of the config"])
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= {*named}


def test_their_defaults_are_those_that_the_docs_state():
    config, trainer = peft.LoraConfig(), transformers.TrainingArguments()
    four_bits = transformers.BitsAndBytesConfig(load_in_4bit=True)
    assert (config.r, config.lora_alpha, config.use_rslora, config.use_dora) == (8, 8, False, False)
    assert (four_bits.bnb_4bit_quant_type, four_bits.bnb_4bit_use_double_quant) == ("fp4", False)
    assert (trainer.per_device_train_batch_size, trainer.num_train_epochs, trainer.lr_scheduler_type) == (
        8,
        3,
        "linear",
    )
    assert (trainer.learning_rate, trl.SFTConfig(bf16=False).learning_rate) == (5e-5, 2e-5)
    assert not trainer.gradient_checkpointing
    assert trl.SFTConfig(bf16=False).gradient_checkpointing
