import json
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import minilora as ml
from minilora.model.ops import IGNORE_INDEX
from minilora.model.tokenizer import Tokenizer
from minilora.train.data import encode_row, encode_rows
from minilora.train.rows import Row
from tests.text import (
    BOS,
    CHATML,
    CLOSE,
    DEFAULT_SYSTEM,
    EOS,
    MARKED,
    OPEN,
    POST_PROCESSORS,
    STRIPPING,
    TEMPLATES,
    conversation,
    some_text,
    texts,
    tokenizer_options,
    write_tokenizer,
)


def touching(tokenizer: Tokenizer, tokens, pieces, added=()) -> list[bool]:
    """Which tokens share a byte with a learned piece of the text, by counting bytes.

    A byte-level token has a character for each byte; a token that is not from the text has none.
    """
    begins = [0]
    for text, _ in pieces:
        begins.append(begins[-1] + len(text.encode()))
    widths = [0 if token in added else len(tokenizer._backend.id_to_token(token)) for token in tokens]
    assert sum(widths) == begins[-1]
    result, end = [], 0
    for width in widths:
        begin, end = end, end + width
        spans = [span for span, (_, learned) in zip(pairwise(begins), pieces, strict=True) if learned]
        result.append(width > 0 and any(begin < last and end > first for first, last in spans))
    return result


def reading(train_on="completion", **options) -> ml.DataConfig:
    return ml.DataConfig(train_on=train_on, **options)


def learned(example) -> list[bool]:
    assert all(label in (token, IGNORE_INDEX) for token, label in zip(example.tokens, example.labels, strict=True))
    return [label != IGNORE_INDEX for label in example.labels]


# --- prompt and completion ---


@given(tokenizer_options, st.booleans(), texts, some_text)
@example({"post": "none", "use_regex": False}, False, "the ca", "t sat")  # a token spans the seam
@example({"post": "bos and eos", "use_regex": True}, False, "the cat ", " sat")  # spaces on both sides of the seam
@example({"post": "trimming", "use_regex": False}, False, "e", " t")  # a token whose space is the completion's
@example({"post": "bos", "use_regex": True}, True, "", "🙂")
def test_exactly_the_tokens_that_touch_the_completion_and_the_closing_one_are_labels(
    tokenizer, options, learns_all, prompt, completion
):
    chosen = tokenizer(**options)
    row = Row({"prompt": prompt, "completion": completion}, "")
    found = encode_row(row, chosen, reading("all" if learns_all else "completion"))
    pieces = [(prompt, learns_all), (completion, True)]
    expected = touching(chosen, found.tokens, pieces, added=[chosen.token_id(BOS), chosen.token_id(EOS)])
    expected[-1] = True
    assert learned(found) == expected


def test_a_token_that_spans_the_seam_is_learned_whole(tokenizer):
    chosen = tokenizer(use_regex=False)
    whole = encode_row(Row({"prompt": "the ca", "completion": "t sat"}, ""), chosen, reading("completion"))
    alone = chosen.encode("the ca")
    assert whole.tokens[: len(alone)] != alone  # so counting the prompt's own tokens would be wrong
    first = next(i for i, is_learned in enumerate(learned(whole)) if is_learned)
    assert chosen.decode(whole.tokens[:first]) != "the ca"
    assert "the ca".startswith(chosen.decode(whole.tokens[:first]))


@given(tokenizer_options, st.sampled_from(["completion", "assistant", "all"]), texts, some_text)
def test_the_closing_token_stands_once_at_the_end_and_is_a_label_also_where_pad_is_eos(
    tokenizer, options, train_on, prompt, completion
):
    chosen = tokenizer(**options)
    assert chosen.special_tokens["pad_token"] == chosen.special_tokens["eos_token"]
    found = encode_row(Row({"prompt": prompt, "completion": completion}, ""), chosen, reading(train_on))
    assert found.tokens[-1] == found.labels[-1] == chosen.eos_id
    assert found.tokens.count(chosen.eos_id) == 1


def test_a_completion_that_brings_its_closing_token_gets_no_second_one(tokenizer):
    bare, closed = (
        encode_row(Row({"prompt": "the", "completion": text}, ""), tokenizer(), reading("completion"))
        for text in (" cat", " cat" + EOS)
    )
    assert (bare.tokens, bare.labels) == (closed.tokens, closed.labels)


@given(some_text, st.sampled_from(["completion", "all"]))
def test_a_bos_of_the_post_processor_is_read_but_never_a_label(tokenizer, completion, train_on):
    chosen = tokenizer(post="bos")
    found = encode_row(Row({"prompt": "", "completion": completion}, ""), chosen, reading(train_on))
    assert found.tokens[0] == chosen.token_id(BOS)
    assert learned(found) == [False] + [True] * (len(found.tokens) - 1)


def test_without_an_end_token_nothing_is_appended(tmp_path):
    chosen = write_tokenizer(tmp_path, eos=None)
    found = encode_row(Row({"prompt": "the", "completion": " cat"}, ""), chosen, reading("completion"))
    assert found.tokens == chosen.encode("the cat")


def test_the_prompt_and_the_answer_of_an_example_are_its_tokens_cut_at_the_first_label(tokenizer):
    found = encode_row(Row({"prompt": "what?", "completion": " the end"}, ""), tokenizer(), reading("completion"))
    assert tokenizer().decode(found.prompt) == "what?"
    assert tokenizer().decode(found.answer) == " the end"
    assert [*found.prompt, *found.answer] == found.tokens
    assert found.labelled == len(found.answer)


# --- conversations ---

turns = st.lists(st.tuples(some_text, some_text), min_size=1, max_size=3)
questions = st.sampled_from([None, "Be brief."])


def chatml_pieces(messages, train_on):
    """The text of a conversation in ChatML, piece by piece, and which ones are learned."""
    pieces = []
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    for i, message in enumerate(messages):
        is_turn = message["role"] == "assistant" and (train_on == "assistant" or i == last)
        pieces.append((f"{OPEN}{message['role']}\n", train_on == "all"))
        pieces.append((f"{message['content']}{CLOSE}\n", train_on == "all" or is_turn))
    return pieces


@given(
    st.sampled_from(sorted(TEMPLATES)),
    st.sampled_from(["completion", "assistant", "all"]),
    turns,
    questions,
    st.booleans(),
    st.sampled_from(sorted(POST_PROCESSORS)),
)
@example("default system", "assistant", [("a", "b"), ("c", "d")], None, False, "none")
def test_of_a_conversation_the_last_answer_every_answer_or_everything_is_learned(
    tokenizer, template, train_on, turns, system, ends_with_a_question, post
):
    chosen = tokenizer(template=TEMPLATES[template], eos=CLOSE, use_regex=False, post=post)
    messages = conversation(turns, system) + [{"role": "user", "content": "?"}] * ends_with_a_question
    found = encode_row(Row({"messages": messages}, ""), chosen, reading(train_on))
    pieces = chatml_pieces(messages, train_on)
    if template == "default system" and system is None:
        pieces = [(f"{OPEN}system\nBe kind.{CLOSE}\n", train_on == "all"), *pieces]
    assert learned(found) == touching(chosen, found.tokens, pieces)


@given(turns, st.sampled_from(["completion", "assistant"]))
def test_an_answer_and_its_closing_token_may_be_marked_apart(tokenizer, turns, train_on):
    apart = MARKED.replace(
        "{{ m.content }}<|im_end|>", "{{ m.content }}{% endgeneration %}{% generation %}<|im_end|>", 1
    )
    together, parted = (tokenizer(template=template, eos=CLOSE) for template in (MARKED, apart))
    row = Row({"messages": conversation(turns)}, "")
    assert encode_row(row, parted, reading(train_on)) == encode_row(row, together, reading(train_on))


@given(st.sampled_from(sorted(TEMPLATES)), some_text, turns)
def test_an_assistant_that_speaks_first_is_learned_without_its_header(tokenizer, template, greeting, turns):
    chosen = tokenizer(template=TEMPLATES[template], eos=CLOSE, use_regex=False)
    messages = [{"role": "assistant", "content": greeting}, *conversation(turns)]
    found = encode_row(Row({"messages": messages}, ""), chosen, reading("assistant"))
    pieces = chatml_pieces(messages, "assistant")
    if template == "default system":
        pieces = [(f"{OPEN}system\nBe kind.{CLOSE}\n", False), *pieces]
    assert learned(found) == touching(chosen, found.tokens, pieces)


@given(turns, st.sampled_from(["completion", "assistant"]))
def test_what_a_template_marks_is_what_is_learned_also_where_that_is_less_than_the_turn(tokenizer, turns, train_on):
    marked = "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}"
    chosen = tokenizer(template=CHATML.replace("{{ m.content }}", marked + "{% endif %}"), eos=CLOSE)
    found = encode_row(Row({"messages": conversation(turns)}, ""), chosen, reading(train_on))
    pieces = []
    for i, (question, answer) in enumerate(turns):
        is_learned = train_on == "assistant" or i == len(turns) - 1
        pieces += [
            (f"{OPEN}user\n{question}{CLOSE}\n{OPEN}assistant\n", False),
            (answer, is_learned),
            (f"{CLOSE}\n", False),
        ]
    assert learned(found) == touching(chosen, found.tokens, pieces)


def test_turns_that_a_template_rewrites_are_refused_for_assistant_but_the_last_answer_can_be_learned(tokenizer):
    chosen = tokenizer(template=STRIPPING, eos=CLOSE)
    messages = conversation([("a", "<think>b</think>c"), ("d", "<think>e</think>f")])
    with pytest.raises(ml.DataError, match=r"here:7: .*message 1, .*differently.*--train-on completion"):
        encode_row(Row({"messages": messages}, "here:7"), chosen, reading("assistant"))
    found = encode_row(Row({"messages": messages}, ""), chosen, reading("completion"))
    messages[1]["content"] = "c"
    assert learned(found) == touching(chosen, found.tokens, chatml_pieces(messages, "completion"))


NUMBERED = CHATML.replace("{{ m.role }}", "{{ m.role }} {{ loop.index }}").replace(
    "assistant\n{% endif", "assistant {{ messages | length + 1 }}\n{% endif"
)
OF_ALL = NUMBERED.replace("{{ loop.index }}", "{{ loop.index }} of {{ messages | length }}").replace(
    "{{ messages | length + 1 }}", "{{ messages | length + 1 }} of {{ messages | length + 1 }}"
)
STRIPS = CHATML.replace("m.content", "m.content | trim")
WRITTEN = {  # template -> how it writes the beginning, and the header and the content of message i of n
    "chatml": (CHATML, "", "{role}", str),
    "default system": (DEFAULT_SYSTEM, f"{OPEN}system\nBe kind.{CLOSE}\n", "{role}", str),
    "stripping": (STRIPS, "", "{role}", str.strip),
    "numbered": (NUMBERED, "", "{role} {i}", str),
    "numbered of all": (OF_ALL, "", "{role} {i} of {n}", str),
    "numbered of all, stripping": (OF_ALL.replace("m.content", "m.content | trim"), "", "{role} {i} of {n}", str.strip),
    "default system, of all": (
        *("{% if messages[0].role != 'system' %}Be kind.{% endif %}" + OF_ALL, "Be kind.", "{role} {i} of {n}", str),
    ),
}


def pieces_written(name, messages, train_on):
    """The text of a conversation by one of the templates above, piece by piece, and which ones are learned."""
    _, begin, header, content = WRITTEN[name]
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    pieces = [(begin if messages[0]["role"] != "system" else "", False)]
    for i, message in enumerate(messages):
        is_learned = message["role"] == "assistant" and (train_on == "assistant" or i == last)
        written = header.format(role=message["role"], i=i + 1, n=len(messages))
        pieces += [(f"{OPEN}{written}\n", False), (f"{content(message['content'])}{CLOSE}\n", is_learned)]
    return pieces


visible = some_text.filter(lambda text: text.strip())
with_tools = st.lists(
    st.tuples(some_text, visible, st.lists(st.tuples(some_text, visible), max_size=2)), min_size=1, max_size=3
)


@given(
    st.sampled_from(sorted(WRITTEN)),
    st.sampled_from(["completion", "assistant"]),
    with_tools,
    questions,
    st.booleans(),
)
@example("numbered of all", "assistant", [("a", "a", [("a", "a")]), ("a", "a a", [])], None, True)
def test_every_answer_is_found_however_a_template_writes_the_turns_and_what_tools_answer_between(
    tokenizer, template, train_on, turns, system, ends_with_a_question
):
    chosen = tokenizer(template=WRITTEN[template][0], eos=CLOSE, use_regex=False)
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer, more in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for found, then in more:
            messages += [{"role": "tool", "content": found}, {"role": "assistant", "content": then}]
    messages += [{"role": "user", "content": "?"}] * ends_with_a_question
    found = encode_row(Row({"messages": messages}, ""), chosen, reading(train_on))
    pieces = pieces_written(template, messages, train_on)
    assert chosen.decode(found.tokens, skip_special_tokens=False) == "".join(text for text, _ in pieces)
    assert learned(found) == touching(chosen, found.tokens, pieces)


THINKING = CHATML.replace(  # as qwen3: the last answer is written with its thoughts, or with none
    "{{ m.content }}", "{{ '<think></think>' if m.role == 'assistant' and loop.last }}{{ m.content }}"
)


def test_what_a_template_adds_to_the_last_answer_alone_is_learned_with_it(tokenizer):
    chosen = tokenizer(template=THINKING, eos=CLOSE)
    for train_on in ("completion", "assistant"):
        found = encode_row(Row({"messages": conversation([("a", "b"), ("c", "d")])}, ""), chosen, reading(train_on))
        pieces = [
            (f"{OPEN}user\na{CLOSE}\n{OPEN}assistant\n", False),
            (f"b{CLOSE}\n", train_on == "assistant"),
            (f"{OPEN}user\nc{CLOSE}\n{OPEN}assistant\n", False),
            (f"<think></think>d{CLOSE}\n", True),
        ]
        assert learned(found) == touching(chosen, found.tokens, pieces)


REWRITING = {
    "cut": ("{{ m.content if loop.last else m.content[:1] }}", {"content": "bcd"}),
    "left out": ("{{ m.content if loop.last or m.role == 'user' }}", {"content": "bcd"}),
    "twice": ("{{ m.content }}{{ m.content if m.role == 'assistant' and not loop.last }}", {"content": "bcd"}),
    "thoughts": (
        "{% if m.thinking and loop.last %}{{ m.thinking }}{% endif %}{{ m.content }}",
        {"content": "bcd", "thinking": "e"},
    ),
    "closed differently": ("{{ m.content }}{{ '!' if loop.last and m.role == 'assistant' }}", {"content": "bcd"}),
}


@pytest.mark.parametrize("name", REWRITING)
def test_an_earlier_answer_that_a_template_rewrites_is_never_learned_by_halves(tokenizer, name):
    written, answer = REWRITING[name]
    chosen = tokenizer(template=CHATML.replace("{{ m.content }}", written), eos=CLOSE)
    messages = conversation([("a", "b"), ("f", "ghi")])
    messages[1] = {"role": "assistant", **answer}
    with pytest.raises(ml.DataError, match=r"here:7: .*message 1, .*differently.*--train-on completion"):
        encode_row(Row({"messages": messages}, "here:7"), chosen, reading("assistant"))
    found = encode_row(Row({"messages": messages}, ""), chosen, reading("completion"))
    assert chosen.decode(found.answer, skip_special_tokens=False).startswith(
        f"ghi{'!' * (name == 'closed differently')}{CLOSE}"
    )


REFUSING = "{{ raise_exception('no question') if messages[-1].role == 'system' }}" + CHATML


def test_a_template_may_refuse_conversations_that_break_off(tokenizer):
    chosen = tokenizer(template=REFUSING, eos=CLOSE)
    messages = [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}, *conversation([("b", "c")])]
    found = encode_row(Row({"messages": messages}, ""), chosen, reading("assistant"))
    pieces = [
        (f"{OPEN}system\ns{CLOSE}\n{OPEN}assistant\n", False),
        (f"a{CLOSE}\n", True),
        (f"{OPEN}user\nb{CLOSE}\n{OPEN}assistant\n", False),
        (f"c{CLOSE}\n", True),
    ]
    assert learned(found) == touching(chosen, found.tokens, pieces)


def test_what_a_template_leaves_out_is_not_learned_as_nothing(tokenizer):
    parts_only = CHATML.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}")
    said = conversation([("what?", "the cat")])
    in_parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in said]
    called = [said[0], {"role": "assistant", "tool_calls": [{"function": {"name": "look"}}]}]
    chosen = tokenizer(template=parts_only, eos=CLOSE)
    assert encode_row(Row({"messages": in_parts}, ""), chosen, reading()).labelled
    with pytest.raises(ml.DataError, match="leaves out what message 0 says"):
        encode_row(Row({"messages": said}, ""), chosen, reading())
    quiet = CHATML.replace("{{ m.content }}", "{{ m.content or '' }}")
    with pytest.raises(ml.DataError, match="leaves out the tool calls of message 1"):
        encode_row(Row({"messages": called}, ""), tokenizer(template=quiet, eos=CLOSE), reading())
    loud = quiet.replace("{{ m.content", "{{ m.tool_calls | tojson if m.tool_calls }}{{ m.content")
    assert encode_row(Row({"messages": called}, ""), tokenizer(template=loud, eos=CLOSE), reading()).labelled


def test_an_end_token_that_closes_the_whole_text_is_learned_there_and_not_in_every_turn(tokenizer):
    chosen = tokenizer(template=CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}", eos=EOS)
    found = encode_row(Row({"messages": conversation([("a", "b"), ("c", "d")])}, ""), chosen, reading("assistant"))
    pieces = [*chatml_pieces(conversation([("a", "b"), ("c", "d")]), "assistant"), (EOS, True)]
    assert learned(found) == touching(chosen, found.tokens, pieces)


def test_the_tools_of_a_conversation_reach_the_template(tokenizer):
    chosen = tokenizer(template="{{ tools | tojson }}" + CHATML)
    tools = [{"name": "look"}]
    found = encode_row(Row({"messages": conversation([("a", "b")]), "tools": tools}, ""), chosen, reading("all"))
    assert chosen.decode(found.tokens).startswith('[{"name": "look"}]')


@given(some_text, texts, some_text, st.sampled_from(["completion", "all"]))
def test_an_alpaca_row_is_a_conversation_where_there_is_a_template(tokenizer, instruction, extra, output, train_on):
    chosen = tokenizer(template=CHATML, eos=CLOSE)
    question = f"{instruction}\n\n{extra}" if extra else instruction
    row = {"instruction": instruction, "input": extra, "output": output}
    expected = {"messages": conversation([(question, output)])}
    assert encode_row(Row(row, ""), chosen, reading(train_on)) == encode_row(
        Row(expected, ""), chosen, reading(train_on)
    )


# --- rows that cannot be used ---


def test_each_row_is_recognised_by_itself(tmp_path, tokenizer):
    chosen = tokenizer(template=CHATML, eos=CLOSE)
    rows = [
        {"prompt": "a", "completion": "b", "id": 1},
        {"instruction": "a", "output": "b"},
        {"messages": conversation([("a", "b")])},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = ml.load_dataset(tmp_path / "rows.jsonl", chosen)
    assert found[0].tokens == [*chosen.encode("ab"), chosen.eos_id]
    assert found[1].tokens == found[2].tokens == chosen.encode(chosen.render(rows[2]["messages"]))
    assert [example.source for example in found] == [f"{tmp_path / 'rows.jsonl'}:{line}" for line in (1, 2, 3)]


NOTHING = "it is empty, so there is nothing to learn"


@pytest.mark.parametrize(
    ("fields", "phrase"),
    [
        ({}, "keys [] are of no known shape"),
        ({"body": "a", "id": 1}, "keys ['body', 'id'] are of no known shape"),
        ({"prompt": "a"}, "no known shape"),
        ({"text": "a", "label": "b"}, "a class is learned with --task SEQ_CLS, the text alone with --text-field text"),
        ({"tokens": ["a"], "labels": ["b"]}, "classes are learned with --task TOKEN_CLS"),
        ({"prompt": "a", "completion": None}, "completion: found None, need text"),
        ({"prompt": ["a"], "completion": "b"}, "need two texts or two lists of messages"),
        ({"prompt": "a", "completion": 5}, "completion: found 5, need text"),
        ({"prompt": "a", "completion": ""}, f"completion: {NOTHING}"),
        ({"prompt": "a\ud800", "completion": "b"}, "prompt: found U+D800, which is not a character"),
        ({"instruction": "a", "output": ""}, f"output: {NOTHING}"),
        ({"instruction": 5, "output": "b"}, "instruction: found 5, need text"),
        ({"instruction": "a", "input": {}, "output": "b"}, "input: found {}, need text"),
        ({"messages": []}, "messages: found [], need a list of messages"),
        ({"messages": "a"}, "messages: found 'a', need a list of messages"),
        ({"messages": ["a"]}, "messages[0]: found 'a', need an object with role and content"),
        ({"messages": [{"role": "user", "content": "a"}, {"content": "b"}]}, "messages[1].role: found None"),
        ({"messages": conversation([("a", "")])}, f"messages[1].content: {NOTHING}"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no message has role 'assistant'"),
        (
            {"messages": [{"role": "user", "content": "a\udfff"}, {"role": "assistant", "content": "b"}]},
            "messages[0].content: found U+DFFF",
        ),
        (
            {"messages": [{"role": "user", "content": "\ufdd0"}, {"role": "assistant", "content": "b"}]},
            "messages[0].content: found U+FDD0",
        ),
    ],
)
@pytest.mark.parametrize("train_on", ["completion", "assistant", "all"])
def test_a_row_that_cannot_be_used_is_named_with_file_and_line(tmp_path, tokenizer, fields, phrase, train_on):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n\n' + json.dumps(fields))
    with pytest.raises(ml.DataError) as error:
        ml.load_dataset(path, tokenizer(template=CHATML), reading(train_on))
    assert str(error.value).startswith(f"{path}:3: ")
    assert phrase in str(error.value)


def test_a_conversation_is_refused_where_there_is_no_template(tokenizer):
    with pytest.raises(ml.DataError, match="needs a chat template"):
        encode_row(Row({"messages": conversation([("a", "b")])}, ""), tokenizer(), reading())


# --- cutting ---


@given(st.lists(st.tuples(texts, some_text), min_size=1, max_size=6), st.integers(1, 12))
def test_rows_are_cut_to_the_length_and_counted_and_go_if_no_label_is_left(tokenizer, pairs, max_length):
    rows = [Row({"prompt": prompt, "completion": answer}, f"f:{i}") for i, (prompt, answer) in enumerate(pairs)]
    whole = [encode_row(row, tokenizer(), reading("completion")) for row in rows]
    cut = [ml.Example(e.tokens[:max_length], e.labels[:max_length], e.source) for e in whole]
    kept = [e for e in cut if any(label != IGNORE_INDEX for label in e.labels[1:])]  # the first token has no past
    if not kept:
        with pytest.raises(ml.DataError, match=f"no row of {len(rows)} has a label within its first {max_length} tok"):
            encode_rows(rows, tokenizer(), reading(max_length=max_length))
        return
    found = encode_rows(rows, tokenizer(), reading(max_length=max_length))
    assert list(found) == kept
    assert found.truncated == sum(len(e.tokens) > max_length for e in whole)
    assert found.unlabelled == len(rows) - len(kept)


def test_an_answer_ends_where_learning_does():
    example = ml.Example([1, 2, 3, 4], [IGNORE_INDEX, 2, 3, IGNORE_INDEX])
    assert (example.prompt, example.answer) == ([1], (2, 3))


def test_a_slice_of_a_dataset_is_one(tokenizer):
    rows = [Row({"prompt": "a", "completion": text}, "") for text in "bcd"]
    found = encode_rows(rows, tokenizer(), reading(max_length=9))
    assert isinstance(found[1:], ml.Dataset)
    assert list(found[1:]) == [found[1], found[2]]
