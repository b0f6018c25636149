"""Ours and transformers' rendering of real chat templates: the same text, and the same tokens said by the assistant.

Transformers gets parts of text joined to one text.
"""

import copy
from datetime import datetime
from importlib.resources import files

import pytest

import minilora as ml
from minilora import DataError
from minilora.files import ASSETS
from minilora.models import template as ours_module
from minilora.models.template import ChatTemplate

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")
theirs_module = transformers.utils.chat_template_utils

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
SOURCES = {
    path.name.removesuffix(".jinja"): path.read_text(encoding="utf-8")
    for path in sorted((files("trl") / "chat_templates").iterdir(), key=lambda path: path.name)
    if path.name.endswith(".jinja") and not path.name.startswith(("idefics3", "llava", "smolvlm"))  # take no text
}
MARKED = [name for name, source in SOURCES.items() if "endgeneration" in source]


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


def calls(*arguments):
    """An assistant's calls of `weather`, one with each of the arguments."""
    made = [
        {"type": "function", "id": f"call0000{i}", "function": {"name": "weather", "arguments": given}}
        for i, given in enumerate(arguments)
    ]
    return {"role": "assistant", "tool_calls": made}


def result(content, i=0):
    return {"role": "tool", "name": "weather", "tool_call_id": f"call0000{i}", "content": content}


def text(*parts):
    return [{"type": "text", "text": part} for part in parts]


ASK, CITY = user("Is it raining in Zürich?"), {"city": "Zürich", "days": 2, "hourly": False, "unit": None}
RAIN, YES = result("rain"), assistant("Yes.")
CONVERSATIONS = {
    "question": [user("What is 2 + 2?")],
    "turns": [user("a"), assistant("b"), user("c"), assistant("d"), user("e"), assistant("f")],
    "system": [system("Be short."), user("Hi."), assistant("Hello.")],
    "system, later too": [system("a"), user("b"), system("c"), user("d"), assistant("e")],
    "developer": [{"role": "developer", "content": "Be short."}, user("Hi."), assistant("Hello.")],
    "unicode": [system("漢字"), user("Grüße — 🙂 e\u0301 \u200b\u2028"), assistant("שלום 👩‍👩‍👧 \x00 \U0010fffe")],
    "markup": [user("<b>&amp;</b> 'q' \"q\" \\n"), assistant("{{ x }} {% if %} {# #}"), user("<|im_end|></s><eos>")],
    "white space": [system("a\n"), user(" \n b\t\n\n"), assistant(" c\n\n"), user("\n"), assistant("  d  ")],
    "empty": [system(""), user(""), assistant("")],
    "assistant first": [assistant("a"), user("b"), assistant("c")],
    "unknown role": [{"role": "critic", "content": "a"}, user("b"), assistant("c")],
    "no role": [{"content": "a"}],
    "content of none": [user(None), assistant(None, tool_calls=None, name=None)],
    "parts": [system(text("x")), user(text("a", " b ")), assistant(text("c")), user(text("d")), assistant(text("e"))],
    "parts with an image": [user([{"type": "image"}, *text("What is it?")]), assistant(text("A cat."))],
    "reasoning": [user("a"), assistant("b", reasoning="c"), user("d"), assistant("e", thinking="f")],
    "reasoning content": [user("a"), assistant("b", reasoning_content=" c\n"), user("d"), assistant("e")],
    "reasoning in the text": [user("a"), assistant("<think>\nb\n</think>\n\nc"), user("d"), assistant("<think>e")],
    "call with content": [system("a"), ASK, {**calls(CITY), "content": "Let me see."}, RAIN, YES],
    "two calls": [ASK, calls(CITY, {"city": "Oslo"}), RAIN, result("sun", 1), YES, user("Ok.")],
    "calls in two turns": [ASK, calls(CITY), RAIN, calls({}), RAIN, assistant("c"), user("d"), calls(CITY)],
    "nested arguments": [ASK, calls({"at": [{"x": 1.5, "y": [None, True, "<&'\">"]}], "": {}}), result(text("a", "b"))],
    "call outside `function`": [ASK, {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": CITY}]}],
    "nothing": [],
}  # fmt: skip
CONVERSATIONS |= {
    f"{key}, as parts": [
        {**message, "content": text(message["content"])} if isinstance(message.get("content"), str) else message
        for message in messages
    ]
    for key, messages in CONVERSATIONS.items()
    if "parts" not in key and "nothing" not in key
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The <weather> & 'wind' of a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Its name.\nIn full.", "enum": ["Zürich", "Oslo"]},
                    "days": {"type": "integer", "default": 1, "minimum": 0},
                    "at": {
                        "type": "array",
                        "items": {"type": "object", "properties": {"x": {"type": ["number", "null"]}}},
                    },
                    "unit": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                },
                "required": ["city"],
            },
            "return": {"type": "string", "description": "Rain or sun."},
        },
    },
    {"type": "function", "function": {"name": "now", "description": "The time.", "parameters": {"type": "object"}}},
]
OPTIONS = [{"add_generation_prompt": prompt, "tools": tools} for prompt in (False, True) for tools in (None, TOOLS)]


class Clock(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2024, 2, 29, 7, 5)


@pytest.fixture(autouse=True)
def _time_stands_still(monkeypatch):
    monkeypatch.setattr(ours_module, "datetime", Clock)
    monkeypatch.setattr(theirs_module, "datetime", Clock)


@pytest.fixture(scope="module")
def theirs():
    """The built-in model's tokenizer, with special tokens added to it."""
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(ASSETS / "model" / "tokenizer.json"), **SPECIAL)


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    """The same, from the files that theirs writes."""
    theirs.save_pretrained(directory := tmp_path_factory.mktemp("tokenizer"))
    return ml.load_tokenizer(directory)


def theirs_outcome(theirs, messages, **options):
    """What transformers makes of a conversation, or None where it or the template refuses it."""
    contents = [message.get("content") for message in messages]
    joined = [
        "".join(part["text"] for part in content)
        if isinstance(content, list) and all("text" in part for part in content)
        else content
        for content in contents
    ]
    messages = [
        {**message, "content": content} if "content" in message else message
        for message, content in zip(messages, joined, strict=True)
    ]
    try:
        return theirs.apply_chat_template(messages, **options)
    except Exception:  # it lets through whatever the template's code raises
        return None


def ours_outcome(render, *args, **options):
    try:
        return render(*args, **options)
    except DataError:
        return None


@pytest.mark.parametrize("name", SOURCES)
def test_text_is_equal_and_the_same_conversations_are_refused(theirs, name):
    template = ChatTemplate(SOURCES[name], SPECIAL)
    for options in OPTIONS:
        theirs_texts = {
            key: theirs_outcome(theirs, messages, chat_template=SOURCES[name], tokenize=False, **options)
            for key, messages in CONVERSATIONS.items()
        }
        ours_texts = {
            key: ours_outcome(template.render, messages, **options) for key, messages in CONVERSATIONS.items()
        }
        assert ours_texts == theirs_texts
        assert sum(text is not None for text in ours_texts.values()) >= 12


@pytest.mark.parametrize("name", MARKED)
def test_the_tokens_that_the_assistant_says_are_equal(ours, theirs, name):
    template, said = ChatTemplate(SOURCES[name], SPECIAL), 0
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    for key, messages in CONVERSATIONS.items():
        encoded = theirs_outcome(theirs, messages, chat_template=SOURCES[name], tools=TOOLS, **options)
        rendered = ours_outcome(template.render_spans, messages, tools=TOOLS)
        assert (rendered is None) == (encoded is None), key
        if rendered is not None:
            ids, spans = ours.encode_spans(rendered[0], add_special_tokens=False)
            mask = [int(any(begin < last and end > first for first, last in rendered[1])) for begin, end in spans]
            assert (key, ids, mask) == (key, encoded["input_ids"], encoded["assistant_masks"])
            said += 1 in mask
    assert said >= 12


def test_ours_reads_the_tokens_and_the_template_that_theirs_saves(theirs, tmp_path):
    theirs = copy.deepcopy(theirs)
    theirs.chat_template = SOURCES["qwen2_5"]
    theirs.save_pretrained(tmp_path)
    ours, messages = ml.load_tokenizer(tmp_path), CONVERSATIONS["white space"]
    text = ours.render(messages)
    assert text == theirs.apply_chat_template(messages, tokenize=False)
    assert ours.encode(text) == theirs.encode(text)
    assert ours.special_tokens == theirs.special_tokens_map == SPECIAL
    assert ours.eos_id == theirs.eos_token_id
    assert len(ours) == len(theirs)
