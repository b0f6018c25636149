"""Conversations with and without thoughts: our rows and TRL's, by the templates of Qwen 3, 3.5 and 3.6, are the same.

TRL is asked as minilora asks: with thoughts for a row whose last answer has some, and without for the others.
"""

import json
import random
import re
from importlib.resources import files

import pytest

import minilora as ml
from minilora.files import ASSETS
from minilora.runs.encoders import encode_prompt, label_row
from minilora.runs.formats import Row, parse_row, thoughts_of

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

NAMES = ("qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6")
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"where": "the sea"}}}
WORDS = ("the cat", " two\nlines\n", "naïve 漢字 🙂", "a")


def conversations(count=200):
    """Rows of one to three turns, some with system prompts, calls of tools, and thoughts in one place or in both."""
    draw = random.Random(0)

    def answer(said, **fields):
        thoughts = draw.choice([None, None, "", "\n", "hm", "the sea?\n\nno"])
        if thoughts is None:
            return {"role": "assistant", "content": said, **fields}
        in_content = {"role": "assistant", "content": f"<think>\n{thoughts}\n</think>\n\n{said}", **fields}
        in_a_field = {"role": "assistant", "content": said, "reasoning_content": thoughts, **fields}
        return draw.choice([in_content, in_a_field, {**in_content, "reasoning_content": ""}])

    for _ in range(count):
        messages = [{"role": "system", "content": "Be brief."}] if draw.random() < 0.5 else []
        has_tools = draw.random() < 0.5
        for i in range(draw.randint(1, 3)):
            messages.append({"role": "user", "content": f"question{i} {draw.choice(WORDS)}"})
            if has_tools and draw.random() < 0.5:
                messages.append(answer(draw.choice(["", "let me look"]), tool_calls=[CALL]))
                messages.append({"role": "tool", "content": "rain"})
            messages.append(answer(f"answer{i} {draw.choice(WORDS)}"))
        yield {"messages": messages, "tools": [TOOL] if has_tools else None}


ROWS = list(conversations())
THINKING = [parse_row(row).thinking for row in ROWS]


@pytest.fixture(scope="module")
def theirs():
    """The built-in model's tokenizer with the control tokens of Qwen."""
    tokens = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>"]}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(ASSETS / "model" / "tokenizer.json"), **tokens)
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    return tokenizer


@pytest.fixture(scope="module")
def bare(theirs, tmp_path_factory):
    theirs.save_pretrained(directory := tmp_path_factory.mktemp("tokenizer"))
    return ml.load_tokenizer(directory)


def use(name, theirs, bare):
    """Both tokenizers with a template of TRL."""
    theirs.chat_template = (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    return bare.with_files({"chat_template.jinja": theirs.chat_template})


def tokenized(theirs, tmp_path, is_split, **options):
    """TRL's tokens and labels of the rows."""
    rows = []
    for row, thinking in zip(ROWS, THINKING, strict=True):
        *prompt, last = row["messages"]
        fields = {"prompt": prompt, "completion": [last]} if is_split else {"messages": row["messages"]}
        given = {"tools": json.dumps(row["tools"]), "chat_template_kwargs": {"enable_thinking": thinking}}
        rows.append({**fields, **given})
    config = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(theirs), **config))
    settings = trl.SFTConfig(tmp_path, use_cpu=True, bf16=False, max_length=None, **options)
    trainer = trl.SFTTrainer(model, settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=theirs)
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


@pytest.mark.parametrize("name", NAMES)
def test_text_tokens_and_labels_of_the_last_answer_are_theirs(theirs, bare, tmp_path, name):
    ours, found = use(name, theirs, bare), tokenized(theirs, tmp_path, is_split=True)
    for row, thinking, (ids, labels) in zip(ROWS, THINKING, found, strict=True):
        example, _, _ = label_row(parse_row(row), ours, ml.DataConfig())
        assert (example.tokens, example.labels) == (ids, labels)
        options = {"tools": row["tools"], "enable_thinking": thinking}
        text = theirs.apply_chat_template(row["messages"], tokenize=False, **options)
        assert ours.render(row["messages"], **options) == text
        question, options = row["messages"][:-1], {"add_generation_prompt": True, **options}
        asked = theirs.apply_chat_template(question, return_dict=False, **options)
        assert encode_prompt(Row({**row, "messages": question}), ours, None, "template", thinking) == asked


@pytest.mark.parametrize("name", NAMES)
def test_labels_of_all_answers_are_theirs_without_what_asks_for_them(theirs, bare, tmp_path, name):
    use(name, theirs, bare)  # TRL puts its template for training in place of this one
    found = tokenized(theirs, tmp_path, is_split=False, assistant_only_loss=True)
    ours, begun = use(f"{name}_training", theirs, bare), "" if name == "qwen3" else "<think>\n"
    for row, (ids, labels) in zip(ROWS, found, strict=True):
        example, _, _ = label_row(parse_row(row), ours, ml.DataConfig(train_on="assistant"))
        assert example.tokens == ids
        differs = "".join(str(int(a != b)) for a, b in zip(example.labels, labels, strict=True))
        stretches = [ours.decode(ids[match.start() : match.end()]) for match in re.finditer("1+", differs)]
        answers = [message for message in row["messages"] if message["role"] == "assistant"]
        asks = [begun if thoughts_of(answer) else "<think>\n\n</think>\n\n" for answer in answers]
        assert stretches == [*filter(None, asks)]
