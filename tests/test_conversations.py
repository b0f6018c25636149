"""A model is asked with the text that its answers were learned after, whatever the chat template is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import minilora as ml
from minilora.data import IGNORE_INDEX
from minilora.runs.encoders import encode_prompt
from minilora.runs.evaluate import answer_of, prompt_of
from minilora.runs.formats import Row, thoughts_of
from tests.chat_templates import (
    FAMILIES,
    GEMMA,
    GLM4,
    LLAMA3,
    MISTRAL,
    NEMOTRON,
    PHI3,
    QWEN3,
    QWEN3_TRAINING,
    QWEN35,
    R1,
)
from tests.models import examples
from tests.text import CHATML, CLOSE, EOS, conversation, encoded

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = {"type": "function", "id": "call00000", "function": {"name": "look", "arguments": {"where": "sea"}}}
QUESTION = {"role": "user", "content": "what?"}


def as_parts(messages):
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


def texts_of(messages, tokenizer, train_on="completion", **fields):
    """The text before the first label, and that of the labels after it."""
    found = encoded({"messages": messages, **fields}, tokenizer, train_on)
    return [tokenizer.decode(part, skip_special_tokens=False) for part in (prompt_of(found), answer_of(found))]


def answer(text, **fields):
    return {"role": "assistant", "content": text, **fields}


words = st.sampled_from(["the cat", "by the sea", " two\nlines\n", "naïve 漢字", "<b>", "a"])
thoughts = st.none() | st.sampled_from(["", "hm", "the sea?\nno"])


@st.composite
def rows(draw):
    """Rows of messages, some with a system prompt, tools that are called, thoughts in both places, and parts."""
    has_tools = draw(st.booleans())
    messages = [{"role": "system", "content": "Be brief."}] if draw(st.booleans()) else []
    for i in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": f"question{i} {draw(words)}"})
        if has_tools and draw(st.booleans()):
            messages.append({"role": "assistant", "content": None, "tool_calls": [CALL]})
            messages.append({"role": "tool", "content": f'found{i} "{draw(words)}"', "tool_call_id": "call00000"})
        thought, place = draw(thoughts), draw(st.booleans())
        said = f"answer{i} {draw(words)}"
        messages.append(
            answer(said)
            if thought is None
            else answer(said, reasoning_content=thought)
            if place
            else answer(f"<think>\n{thought}\n</think>\n\n{said}")
        )
    if draw(st.booleans()):
        messages = [m if m.get("content") is None else as_parts([m])[0] for m in messages]
    return {"messages": messages, "tools": [TOOL] if has_tools else None}


def check(row, tokenizer):
    """Each answer that is learned follows the tokens that ask for it; how many are learned. Or an error says why."""
    learned = 0
    for train_on in ("completion", "assistant"):
        try:
            found = encoded(row, tokenizer, train_on)
        except ml.DataError:
            continue
        turns = [i for i, message in enumerate(row["messages"]) if message["role"] == "assistant"]
        for i in turns if train_on == "assistant" else turns[-1:]:
            question, thinking = {**row, "messages": row["messages"][:i]}, bool(thoughts_of(row["messages"][i]))
            asked = encode_prompt(Row(question), tokenizer, None, "template", thinking)
            assert found.tokens[: len(asked)] == asked
            assert found.labels[len(asked)] != IGNORE_INDEX == found.labels[len(asked) - 1]
            learned += 1
    return learned


@pytest.mark.parametrize("family", FAMILIES)
@examples(5)
@given(rows())
def test_what_is_asked_is_what_every_answer_was_learned_after_or_an_error_says_why(tokenizer, family, row):
    check(row, tokenizer(template=FAMILIES[family]))


def test_no_token_spans_the_question_and_the_answer_of_a_conversation(tokenizer):
    chosen = tokenizer(template="{% for m in messages %}{{ m.content }}{% endfor %}", use_regex=False)
    assert len(chosen.encode("the cat")) == 1
    assert check({"messages": conversation([("the ", "cat")])}, chosen) == 2
    found = encoded({"messages": conversation([("the ", "cat")])}, chosen)
    assert found.tokens == chosen.encode("the ") + chosen.encode("cat")


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_learns_only_the_answer_of_a_plain_conversation(tokenizer, family):
    chosen = tokenizer(template=FAMILIES[family])
    assert check({"messages": conversation([("what?", "the cat"), ("where?", "sat")])}, chosen) >= 1
    asked, learned = texts_of(conversation([("what?", "the cat")]), chosen)
    assert ("what?" in asked, "the cat" in learned, "what?" in learned) == (True, True, False)


# --- content in parts ---


@pytest.mark.parametrize("template", [LLAMA3, CHATML, PHI3, GLM4], ids=["trim", "print", "+", "both"])
@pytest.mark.parametrize("train_on", ["completion", "all"])
def test_parts_are_joined_to_text(tokenizer, template, train_on):
    chosen, messages = tokenizer(template=template), conversation([("what?", "good day")], "Be brief.")
    halves = [*as_parts(messages[:2]), answer([{"type": "text", "text": text} for text in ("good", " day")])]
    assert encoded({"messages": halves}, chosen, train_on) == encoded({"messages": messages}, chosen, train_on)


DEMANDING = "{{ raise_exception('begin with a system message') if messages[0].role != 'system' }}"


# --- what a template leaves out, or puts elsewhere where it asks ---


def test_a_system_prompt_is_learned_where_asking_puts_it(tokenizer):
    chosen = tokenizer(template=MISTRAL, eos=EOS)
    asked, learned = texts_of(conversation([("a", "b"), ("what?", "the cat")], "Be brief."), chosen)
    assert asked.endswith("[INST] a[/INST] b<|end|>[INST] Be brief.\n\nwhat?[/INST]")
    assert learned == f" the cat{EOS}"


NO_SYSTEM = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
FIRST_CALL = CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls[0].function.name if m.tool_calls }}")
LOOK, FOUND = answer("", tool_calls=[CALL]), {"role": "tool", "content": "rain"}
LEFT_OUT = {  # what the messages are that ask, the answer, and a template leaves out
    "tools": (CHATML, [QUESTION], answer("it rains"), "the tools"),
    "what tools return": (
        R1,
        [QUESTION, LOOK, FOUND],
        answer("it rains"),
        "(the content of message 2|the tool calls of message 1)",
    ),
    "system prompt": (
        NO_SYSTEM,
        [{"role": "system", "content": "c"}, QUESTION],
        answer("b"),
        "the content of message 0",
    ),
    "calls": (CHATML, [QUESTION], answer(None, tool_calls=[CALL]), "the tool calls of message 1"),
    "a second call": (FIRST_CALL, [QUESTION], answer("a", tool_calls=[CALL] * 2), "the tool calls of message 1"),
    **{
        f"{field} {i}": (
            template,
            [QUESTION],
            answer("b", **{field: "hm"}),
            "the content of message 1, or its thoughts",
        )
        for field in ("reasoning", "thinking", "reasoning_content")
        for i, template in enumerate((CHATML, GEMMA))
    },
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_a_template_leaves_out_is_an_error_in_training_and_in_asking(tokenizer, case):
    template, asked, said, left_out = LEFT_OUT[case]
    fields = {"tools": [TOOL]} if case == "tools" else {}
    chosen = tokenizer(template=template)
    for train_on in ("completion", "assistant", "all"):
        with pytest.raises(ml.DataError, match=f"leaves out {left_out}.*prompt_style"):
            encoded({"messages": [*asked, said], **fields}, chosen, train_on)
    if len(said) == 2:  # all of it is asked
        with pytest.raises(ml.DataError, match=f"leaves out {left_out}"):
            encode_prompt(Row({"messages": asked, **fields}), chosen, None, "template")


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_tool_calls_of_an_earlier_answer_that_are_left_out_are_an_error(tokenizer, train_on):
    messages = [QUESTION, {**LOOK, "content": "let me look"}, FOUND, answer("d")]
    with pytest.raises(ml.DataError, match="leaves out the tool calls of message 1"):
        encoded({"messages": messages}, tokenizer(template=CHATML), train_on)


def test_what_is_written_as_json_is_not_left_out(tokenizer):
    messages = [QUESTION, answer("", tool_calls=[CALL]), {"role": "tool", "content": 'the "sea"\n'}, answer("There.")]
    asked, learned = texts_of(messages, tokenizer(template=MISTRAL, eos=EOS), tools=[TOOL])
    assert r"the \"sea\"\n" in asked
    assert learned == f" There.{EOS}"


# --- thoughts that asking begins ---


@pytest.mark.parametrize(
    ("message", "learned"),
    [
        (answer("the cat"), "</think>\n\nthe cat"),
        (answer("the cat", reasoning_content="hm"), "hm\n</think>\n\nthe cat"),
        (answer("<think>\nhm\n</think>\n\nthe cat"), "hm\n</think>\n\nthe cat"),
    ],
)
def test_thoughts_that_asking_begins_are_learned_and_ended(tokenizer, message, learned):
    chosen = tokenizer(template=R1, eos=EOS)
    assert texts_of([QUESTION, message], chosen) == ["<|begin|><｜User｜>what?<｜Assistant｜><think>\n", learned + EOS]


def test_a_template_that_writes_the_end_of_thoughts_itself_is_followed(tokenizer):
    asked, learned = texts_of([QUESTION, answer("the cat")], tokenizer(template=NEMOTRON, eos=CLOSE))
    assert (asked[-8:], learned) == ("<think>\n", f"</think>the cat{CLOSE}\n")


# --- thoughts that are asked for, or not ---

EMPTY = "<think>\n\n</think>\n\n"
SWITCHING = {"qwen3": QWEN3, "qwen35": QWEN35, "qwen3_training": QWEN3_TRAINING}  # they ask in two ways


@pytest.mark.parametrize(("template", "begun"), [(QWEN3, ""), (QWEN3_TRAINING, ""), (QWEN35, "<think>\n")])
def test_an_answer_with_thoughts_is_asked_for_with_them_and_another_one_without(tokenizer, template, begun):
    chosen = tokenizer(template=template, eos=CLOSE)
    asked, learned = texts_of([QUESTION, answer("the cat")], chosen)
    assert (asked.partition("assistant\n")[2], learned) == (EMPTY, f"the cat{CLOSE}\n")
    for message in (answer("the cat", reasoning_content="hm"), answer("<think>\nhm\n</think>\n\nthe cat")):
        asked, learned = texts_of([QUESTION, message], chosen)
        assert asked.endswith(f"assistant\n{begun}")
        assert begun + learned == f"<think>\nhm\n</think>\n\nthe cat{CLOSE}\n"


@pytest.mark.parametrize("family", SWITCHING)
@pytest.mark.parametrize("train_on", ["completion", "assistant", "all"])
@examples(20)
@given(row=rows())
def test_the_end_of_thoughts_is_learned_where_there_are_thoughts_and_nowhere_else(tokenizer, family, train_on, row):
    chosen = tokenizer(template=SWITCHING[family])
    try:
        found = encoded(row, chosen, train_on)
    except ml.DataError:  # earlier answers are written in another way than they are asked for
        assert (train_on, family) in [("assistant", "qwen3"), ("assistant", "qwen35")]
        return
    answers = [message for message in row["messages"] if message["role"] == "assistant"]
    text = chosen.decode(found.tokens)
    learned = chosen.decode([label for label in found.labels if label != IGNORE_INDEX])
    if train_on == "all":
        assert learned == text.replace(EMPTY, "")
    written = [thoughts_of(message) for message in (answers if train_on == "assistant" else answers[-1:])]
    assert train_on == "all" or learned.count("</think>") == sum(map(bool, written))


# --- where an answer ends ---


@pytest.mark.parametrize("train_on", ["completion", "assistant", "all"])
@pytest.mark.parametrize("begin", ["", DEMANDING])
def test_a_template_that_asks_for_the_next_answer_after_each_is_refused(tokenizer, begin, train_on):
    always = begin + LLAMA3.replace("{% if add_generation_prompt %}", "{% if true %}")  # as that of Command A
    with pytest.raises(ml.DataError, match="ignores add_generation_prompt"):
        encoded({"messages": conversation([("a", "b")], "c")}, tokenizer(template=always), train_on)


# --- marks of the template ---

APART = CHATML.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %} -- "
    "{% generation %}{{ m.thinking }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}",
)
FIRST_ONLY = APART.replace("m.role == 'assistant'", "loop.index == 2")


def test_a_template_that_asks_with_another_header_than_it_writes_is_refused(tokenizer):
    said = "{{ '\\n\\nBOT: ' if m.role == 'assistant' else '\\nUSER: ' }}{{ m.content }}"
    other = f"{{% for m in messages %}}{said}{{% endfor %}}{{{{ '\\nBOT:' if add_generation_prompt }}}}"
    with pytest.raises(ml.DataError, match="begins the last answer with other text than it asks with"):
        texts_of([QUESTION, answer("a")], tokenizer(template=other))


@pytest.mark.parametrize("train_on", ["completion", "assistant"])
def test_all_blocks_that_a_template_marks_of_an_answer_are_learned(tokenizer, train_on):
    messages = [QUESTION, answer("the cat", thinking="hm")]
    found = encoded({"messages": messages}, tokenizer(template=APART, eos=CLOSE), train_on)
    labels = [label for label in found.labels if label != IGNORE_INDEX]
    assert tokenizer(template=APART, eos=CLOSE).decode(labels) == "the cathm"


def test_empty_blocks_mark_no_end_of_an_answer(tokenizer):
    empty = CHATML.replace("{{ m.content }}", "{% generation %}{% endgeneration %}{{ m.content }}")
    found = encoded({"messages": conversation([("a", "b"), ("c", "d")])}, tokenizer(template=empty), "assistant")
    labels = [label for label in found.labels if label != IGNORE_INDEX]
    assert tokenizer(template=empty).decode(labels) == "b\nd\n"


def test_the_last_answer_is_learned_where_a_template_marks_an_earlier_one_alone(tokenizer):
    messages = [*conversation([("a", "b")]), QUESTION, answer("the cat")]
    chosen = tokenizer(template=FIRST_ONLY.replace("m.thinking", "''"), eos=CLOSE)
    assert texts_of(messages, chosen)[1] == f"the cat{CLOSE}\n"
