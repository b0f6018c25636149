"""Ours and transformers' rendering of real chat templates: the same text, and the same tokens said by the assistant."""

import copy
from importlib.resources import files

import pytest

import minilora as ml
from minilora import DataError, FormatError
from minilora.model.template import ChatTemplate
from minilora.storage import ASSETS

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
PLAIN = [
    "cohere2",
    "deepseekv3",
    "gemma3",
    "glm4moe",
    "gptoss",
    "lfm2",
    "llama3",
    "llama3_1",
    "phi3",
    "qwen2_5",
    "qwen3",
]
PLAIN += ["qwen3_5_think", "smolvlm"]
TRAINING = ["deepseekv3_training", "gemma_training", "glm4moe_training", "gptoss_training", "llama3_training"]
TRAINING += ["phi3_training", "qwen2_5_training", "qwen3_training"]

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The <weather> & 'wind' of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"type": "function", "id": "call00001", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
CONVERSATIONS = {
    "question": [{"role": "user", "content": "What is 2 + 2?"}],
    "answer": [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}],
    "system": [
        {"role": "system", "content": "Be short.\n"},
        {"role": "user", "content": " Grüße — 漢字 🙂 <b>&amp;</b> \n"},
        {"role": "assistant", "content": " Hello.\n\n"},
    ],
    "turns": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "tool_calls": None},
        {"role": "user", "content": "c", "name": None},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"},
    ],
    "reasoning": [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4", "reasoning": "Two and two."},
        {"role": "user", "content": "And 3 + 3?"},
        {"role": "assistant", "content": "6", "thinking": "Three and three."},
    ],
    "tools": [
        {"role": "user", "content": "Is it raining in Zürich?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": '{"rain": true}'},
        {"role": "assistant", "content": "Yes."},
    ],
    "odd roles": [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    "nothing": [],
}


@pytest.fixture(scope="module")
def theirs():
    """The built-in model's tokenizer, with special tokens added to it."""
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(ASSETS / "model" / "tokenizer.json"), **SPECIAL)


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    """The same, from the files that theirs writes."""
    theirs.save_pretrained(directory := tmp_path_factory.mktemp("tokenizer"))
    return ml.load_tokenizer(directory)


def source_of(name):
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def outcome(render, *args, **kwargs):
    """The text, or None where the conversation is refused."""
    try:
        return render(*args, **kwargs)
    except Exception:  # theirs lets through whatever the template's code raises
        return None


@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["", "tools"])
@pytest.mark.parametrize("add_generation_prompt", [False, True], ids=["", "prompt"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", [*PLAIN, *TRAINING])
def test_text_is_equal(theirs, name, conversation, add_generation_prompt, tools):
    messages, source = CONVERSATIONS[conversation], source_of(name)
    options = {"add_generation_prompt": add_generation_prompt, "tools": tools}
    their_text = outcome(theirs.apply_chat_template, messages, chat_template=source, tokenize=False, **options)
    try:
        our_text = ChatTemplate(source, SPECIAL).render(messages, **options)
    except (DataError, FormatError):
        our_text = None
    assert our_text == their_text


@pytest.mark.parametrize("name", [*PLAIN, *TRAINING])
def test_each_template_renders_most_conversations(name):
    texts = [outcome(ChatTemplate(source_of(name), SPECIAL).render, messages) for messages in CONVERSATIONS.values()]
    assert sum(text is not None for text in texts) >= 4


@pytest.mark.parametrize("conversation", [name for name in CONVERSATIONS if name not in ("question", "nothing")])
@pytest.mark.parametrize("name", TRAINING)
def test_the_tokens_that_the_assistant_says_are_equal(ours, theirs, name, conversation):
    messages, source = CONVERSATIONS[conversation], source_of(name)
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    encoded = outcome(theirs.apply_chat_template, messages, chat_template=source, **options)
    if encoded is None:
        with pytest.raises(DataError):
            ChatTemplate(source, SPECIAL).render(messages)
        return
    text, said = ChatTemplate(source, SPECIAL).render_spans(messages)
    ids, spans = ours.encode_spans(text, add_special_tokens=False)
    mask = [int(any(begin < last and end > first for first, last in said)) for begin, end in spans]
    assert ids == encoded["input_ids"]
    assert mask == encoded["assistant_masks"]
    assert 1 in mask or not any(message["role"] == "assistant" for message in messages)


def test_ours_reads_the_tokens_and_the_template_that_theirs_saves(theirs, tmp_path):
    theirs = copy.deepcopy(theirs)
    theirs.chat_template = source_of("qwen2_5")
    theirs.save_pretrained(tmp_path)
    ours, messages = ml.load_tokenizer(tmp_path), CONVERSATIONS["system"]
    text = ours.render(messages)
    assert text == theirs.apply_chat_template(messages, tokenize=False)
    assert ours.encode(text) == theirs.encode(text)
    assert ours.special_tokens == theirs.special_tokens_map == SPECIAL
    assert ours.eos_id == theirs.eos_token_id
    assert len(ours) == len(theirs)
