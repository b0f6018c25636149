"""Every format of a conversation gives the same tokens and labels, and a prompt style writes what it promises."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import minilora as ml
from minilora.runs.encoders import with_prompt_style
from minilora.runs.formats import PromptCompletion, Row, parse_prompt, parse_row, thoughts_of
from tests.text import (
    BOS,
    CHATML,
    CLOSE,
    EOS,
    OPEN,
    assert_learned,
    conversation,
    encoded,
    questions,
    some_text,
    write_tokenizer,
)

PARTS = CHATML.replace(
    "{{ m.content }}",
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content or () %}{{ p.text }}{% endfor %}"
    "{% endif %}{% for c in m.tool_calls or () %}<call>{{ c.function | tojson }}{% endfor %}",
)
WITH_TOOLS = "{{ tools | tojson if tools }}" + PARTS
extras = st.just("") | some_text
systems = st.sampled_from([None, "Be brief."])
turns = st.lists(st.tuples(questions, some_text), min_size=1, max_size=3)
train_on = st.sampled_from(["completion", "assistant", "all"])


HUMAN = {"user": "human", "assistant": "gpt"}


def formats(messages):
    """The same conversation in every format that can hold it, with nothing for tools in every way to say so."""
    own = messages[0]["content"] if messages[0]["role"] == "system" else None
    rest = messages[1:] if own else messages
    yield {"messages": messages}
    yield {"messages": rest, "system": own, "tools": []}
    yield {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages], "tools": None}
    yield {"conversations": messages, "tools": ""}
    turns = [{"from": HUMAN.get(m["role"], m["role"]), "value": m["content"]} for m in messages]
    yield {"conversations": turns, "tools": "[]"}
    turns = [{"from": m["role"], "value": m["content"]} for m in rest]
    yield {"conversations": turns, "system": own or "", "tools": "null"}
    yield {"prompt": messages[:-1], "completion": messages[-1:]}
    if len(rest) == 2:
        question, answer = (m["content"] for m in rest)
        yield {"instruction": question, "output": answer, "system": own}
        yield {"instruction": question, "input": "", "output": answer, "system": own, "history": []}


@given(turns, systems, train_on)
def test_every_format_of_a_conversation_gives_the_same_tokens_and_labels(tokenizer, turns, system, train_on):
    chosen = tokenizer(template=PARTS, eos=CLOSE)
    expected, *others = (encoded(row, chosen, train_on) for row in formats(conversation(turns, system)))
    assert chosen.decode(expected.tokens, skip_special_tokens=False) == chosen.render(conversation(turns, system))
    assert others == [expected] * len(others)
    assert {parse_row(row).tools for row in formats(conversation(turns, system))} == {None}


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"where": {"type": "string"}}}}
CALL = {"name": "look", "arguments": {"where": "sea"}}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])], ids=["list", "text"])
@pytest.mark.parametrize("train_on", ["completion", "assistant", "all"])
def test_tools_and_calls_are_read_and_what_tools_answer_is_learned_with_all_alone(tokenizer, tools, train_on):
    chosen = tokenizer(template=WITH_TOOLS, eos=CLOSE)
    messages = [
        {"role": "user", "content": "where?"},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "tool", "content": "the sea"},
        {"role": "tool", "content": "the town"},
        {"role": "assistant", "content": "by the sea"},
    ]
    found = encoded({"messages": messages, "tools": tools}, chosen, train_on)
    assert encoded({"conversations": messages, "tools": tools}, chosen, train_on) == found
    is_all, is_turn = train_on == "all", train_on != "completion"
    pieces = [
        (f"{json.dumps([TOOL])}{OPEN}user\nwhere?{CLOSE}\n{OPEN}assistant\n", is_all),
        (f"<call>{json.dumps(CALL)}{CLOSE}\n", is_turn),
        (f"{OPEN}tool\nthe sea{CLOSE}\n{OPEN}tool\nthe town{CLOSE}\n{OPEN}assistant\n", is_all),
        (f"by the sea{CLOSE}\n", True),
    ]
    assert_learned(found, chosen, pieces)


@given(some_text, train_on)
def test_text_is_learned_whole(tokenizer, text, train_on):
    chosen = tokenizer(post="bos")
    assert_learned(encoded({"text": text, "id": 1}, chosen, train_on), chosen, [(BOS, False), (text + EOS, True)])


@pytest.mark.parametrize("role", ["system", "developer"])
def test_the_system_prompt_of_a_row_goes_before_that_of_the_configuration(role):
    asked = conversation([("a", "b")])
    system = "from outside"
    own = parse_row({"messages": [{"role": role, "content": "own"}, *asked]}, system)
    assert (own.messages, own.system) == ([{"role": "system", "content": "own"}, *asked], "own")
    for absent in ({}, {"system": None}, {"system": ""}):
        assert parse_row({"messages": asked, **absent}, system).messages[0]["content"] == "from outside"
    found = parse_row({"messages": asked, "system": "own"}, system).messages
    assert found == [{"role": "system", "content": "own"}, *asked]
    assert parse_row({"messages": asked}).messages == asked
    parts = [{"type": "text", "text": "o"}, {"type": "text", "text": "wn"}]
    assert parse_row({"messages": [{"role": role, "content": parts}, *asked]}, system).system == "own"


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize("content", ["", [], [{"type": "text", "text": ""}]])
@pytest.mark.parametrize("outside", [None, "from outside"])
def test_an_empty_system_prompt_is_none(role, content, outside):
    asked = conversation([("a", "b")])
    empty = [{"role": role, "content": content}, *asked]
    assert parse_row({"messages": empty}, outside) == parse_row({"messages": asked}, outside)
    assert parse_prompt({"messages": empty}, outside) == parse_prompt({"messages": asked}, outside)
    with pytest.raises(ml.DataError, match="no message has role 'assistant'"):
        parse_row({"messages": empty[:1]}, outside)


@pytest.mark.parametrize("row", [{"text": "a"}, {"prompt": "a", "completion": "b"}])
def test_plain_text_has_no_place_for_a_system_prompt(row):
    assert isinstance(parse_row(row), PromptCompletion)
    assert isinstance(parse_row(row, ""), PromptCompletion)
    said = "system: found 'c', but plain text has no place for a system prompt"
    where = "if you gave none, it is the one that the model or the adapter was trained with; an empty system"
    with pytest.raises(ml.DataError, match=f"{said}; {where}"):
        parse_row(row, "c")
    with pytest.raises(ml.DataError, match=said):
        parse_row({**row, "system": "c"})


@pytest.mark.parametrize(
    ("keys", "columns"),
    [
        (["answer", "question"], "instruction=question,output=answer, or columns prompt=question,com"),
        (["Question", "Answer"], "instruction=Question,output=Answer, or columns prompt=Question,com"),
        (["input", "output"], "instruction=input,output=output, or columns prompt=input,completion="),
        (["instruction", "response", "context"], "instruction=instruction,input=context,output=response, or columns"),
        (["a", "b"], "instruction=a,output=b, or columns prompt=a,completion=b for plain text; the first"),
        (["a"], "instruction=QUESTION,output=ANSWER, or columns prompt=QUESTION,completion=ANSWER"),
    ],
)
def test_names_of_other_formats_are_refused_with_the_columns_to_give(keys, columns):
    with pytest.raises(ml.DataError, match=r"^found the fields \[.*'length', 'number'.*\], need ") as error:
        parse_row({"number": "7", "length": 3, **dict.fromkeys(keys, "a")})
    assert f"; give columns {columns}" in str(error.value)


PREAMBLE = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
)
CONTEXT = ", paired with an input that provides further context"


def written(turns, system=None, is_alpaca=True):
    """The text of a conversation in Alpaca's form, piece by piece, and which are answers; turns have an input."""
    head = PREAMBLE.format(CONTEXT if any(extra for _, extra, _ in turns) else "") if is_alpaca else ""
    pieces = [(f"{system}\n\n" if system else head, False)]
    for i, (question, extra, answer) in enumerate(turns):
        given = f"### Input:\n{extra}\n\n" if extra else ""
        pieces.append(("\n\n" * (i > 0) + f"### Instruction:\n{question}\n\n{given}### Response:\n", False))
        pieces.append((answer + EOS, True))
    return pieces


@given(
    st.sampled_from(["alpaca", "instruction"]), turns, extras, systems, st.sampled_from(["none", "bos", "bos and eos"])
)
def test_a_prompt_style_writes_alpacas_text_and_learns_the_answers_and_their_ends(
    tokenizer, style, turns, extra, system, post
):
    chosen = with_prompt_style(tokenizer(post=post, use_regex=False), style)
    question, answer = turns[-1]
    row = {"instruction": question, "input": extra, "output": answer, "system": system}
    if len(turns) > 1:
        row, extra = {"messages": conversation(turns, system)}, ""
    pieces = written([*((q, "", a) for q, a in turns[:-1]), (question, extra, answer)], system, style == "alpaca")
    pieces = [(BOS if post != "none" else "", False), *pieces]
    assert_learned(encoded(row, chosen, "assistant"), chosen, pieces)
    assert_learned(encoded(row, chosen), chosen, [*((text, False) for text, _ in pieces[:-1]), pieces[-1]])


def test_auto_is_the_models_own_template_and_none_where_no_row_asks_for_one(tokenizer):
    rows = [Row({"instruction": "a", "output": "b"}), Row({"text": "a"})]
    assert with_prompt_style(tokenizer(template=CHATML), "auto", rows) is tokenizer(template=CHATML)
    assert with_prompt_style(tokenizer(), "auto", rows[1:]) is tokenizer()
    assert with_prompt_style(tokenizer(), "auto", rows).template is not None


@pytest.mark.parametrize("eos", [None, "no such token"])
def test_a_style_closes_answers_by_the_end_token_of_the_generation_config(tmp_path, eos):
    end = write_tokenizer(tmp_path).token_id(EOS)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    chosen = with_prompt_style(write_tokenizer(tmp_path, eos=eos), "instruction")
    found = encoded({"instruction": "a", "output": "b"}, chosen)
    assert found.tokens[-2:] == found.labels[-2:] == [chosen.token_id("b"), end]


def test_a_style_of_ones_own_is_a_file(tokenizer, tmp_path):
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.role[0] }}={{ m.content }};{% endfor %}é", "utf-8")
    chosen = with_prompt_style(tokenizer(template=CHATML), str(tmp_path / "own.jinja"))
    assert chosen.render(conversation([("a", "b")])) == "u=a;a=b;é"
    with pytest.raises(ml.FormatError, match=r"none\.jinja: cannot be read"):
        with_prompt_style(tokenizer(), str(tmp_path / "none.jinja"))
    with pytest.raises(ml.ConfigError, match="prompt_style is 'vicuna'; accepted are auto, alpaca, instruction"):
        with_prompt_style(tokenizer(), "vicuna")


@pytest.mark.parametrize(
    ("changes", "message"), [({"tools": [TOOL]}, "no place for tools"), ({"tool_calls": [CALL]}, "for tool calls")]
)
def test_what_a_style_has_no_place_for_is_refused(tokenizer, changes, message):
    question, answer = conversation([("a", "b")])
    with pytest.raises(ml.DataError, match=message):
        encoded({"messages": [question, answer | changes], **changes}, with_prompt_style(tokenizer(), "alpaca"))


@pytest.mark.parametrize(
    ("message", "thoughts"),
    [
        ({"content": "a"}, ""),
        ({"content": "<think>\n a\n</think>\n\nb"}, "a"),
        ({"content": "a</think>b"}, "a"),
        ({"content": "<think>a"}, ""),
        ({"content": [{"type": "text", "text": "<think>a</think>"}, {"type": "text", "text": "b"}]}, "a"),
        ({"content": None, "reasoning": " a\n"}, "a"),
        ({"content": "<think>a</think>b", "reasoning_content": "c"}, "c"),
        ({"content": "<think>a</think>b", "reasoning_content": ""}, ""),  # as the templates of Qwen take it
        ({"content": "a", "thinking": ["b"], "reasoning_content": None}, ""),
    ],
)
def test_thoughts_are_in_a_field_or_else_in_the_content(message, thoughts):
    assert thoughts_of(message) == thoughts
