import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

import minilora as ml
from minilora.data import IGNORE_INDEX
from minilora.runs.encoders import encode_rows
from minilora.runs.evaluate import answer_of, prompt_of
from minilora.runs.formats import Row
from tests.models import examples
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
    assert_learned,
    conversation,
    encoded,
    learned,
    questions,
    some_text,
    tokenizer_options,
    touching,
    write_tokenizer,
)

train_ons = st.sampled_from(["completion", "assistant", "all"])


@examples(3)
@given(tokenizer_options, train_ons, questions, some_text)
@example({"post": "none", "use_regex": False}, "completion", "the ca", "t sat")  # a token spans the seam
@example({"post": "bos and eos", "use_regex": True}, "completion", "the cat ", " sat")  # spaces on both sides of it
@example({"post": "trimming", "use_regex": False}, "completion", "e", " t")  # a token whose space is the completion's
@example({"post": "bos", "use_regex": True}, "assistant", "é", "🙂")
def test_exactly_the_tokens_that_touch_the_completion_and_the_closing_one_are_labels(
    tokenizer, options, train_on, prompt, completion
):
    chosen = tokenizer(**options)
    assert chosen.special_tokens["pad_token"] == chosen.special_tokens["eos_token"]  # and yet it is learned
    found = encoded({"prompt": prompt, "completion": completion}, chosen, train_on)
    text = chosen.encode(prompt + completion)
    assert found.tokens == text + [chosen.eos_id] * (text[-1] != chosen.eos_id)
    pieces = [(prompt, train_on == "all"), (completion, True)]
    expected = touching(chosen, found.tokens, pieces, added=[chosen.token_id(BOS), chosen.token_id(EOS)])
    assert learned(found) == [*expected[:-1], True]


def test_a_completion_that_brings_its_closing_token_gets_no_second_one(tokenizer):
    bare, closed = (encoded({"prompt": "the", "completion": text}, tokenizer()) for text in (" cat", " cat" + EOS))
    assert bare == closed
    assert bare == encoded({"prompt": "the", "completion": " cat" + 2 * EOS}, tokenizer(), allow_special=True)


def test_the_end_token_replaces_another_that_the_tokenizer_appends(tmp_path):
    chosen = write_tokenizer(tmp_path, post="bos and eos", eos=CLOSE)
    assert chosen.encode("the")[-1] == chosen.token_id(EOS)
    found = encoded({"prompt": "the", "completion": " cat"}, chosen)
    assert found.tokens == [*chosen.encode("the cat")[:-1], chosen.token_id(CLOSE)]
    assert answer_of(found)[-1] == chosen.token_id(CLOSE)


def test_without_an_end_token_nothing_is_appended(tmp_path):
    chosen = write_tokenizer(tmp_path, eos=None)
    assert encoded({"prompt": "the", "completion": " cat"}, chosen).tokens == chosen.encode("the cat")


def test_the_prompt_ends_before_the_first_label_and_the_answer_where_learning_does(tokenizer):
    found = encoded({"prompt": "what?", "completion": " the end"}, tokenizer())
    assert tokenizer().decode(prompt_of(found)) == "what?"
    assert tokenizer().decode(answer_of(found)) == " the end"
    assert [*prompt_of(found), *answer_of(found)] == found.tokens
    assert found.labelled == len(answer_of(found))
    example = ml.Example([1, 2, 3, 4], [IGNORE_INDEX, 2, 3, IGNORE_INDEX])
    assert (prompt_of(example), answer_of(example)) == ([1], (2, 3))


turns = st.lists(st.tuples(questions, some_text), min_size=1, max_size=3)
NUMBERED = CHATML.replace("{{ m.role }}", "{{ m.role }} {{ loop.index }}").replace(
    "assistant\n{% endif", "assistant {{ messages | length + 1 }}\n{% endif"
)
KIND = "{% if messages[0].role != 'system' %}Be kind.{% endif %}"
WRITTEN = {  # template -> how it writes the beginning, and the header and the content of message i
    "chatml": (CHATML, "", "{role}", str),
    "marked": (MARKED, "", "{role}", str),
    "default system": (DEFAULT_SYSTEM, f"{OPEN}system\nBe kind.{CLOSE}\n", "{role}", str),
    "trimming": (CHATML.replace("m.content", "m.content | trim"), "", "{role}", str.strip),
    "numbered": (NUMBERED, "", "{role} {i}", str),
    "default system, numbered": (KIND + NUMBERED, "Be kind.", "{role} {i}", str),
}


def pieces_written(name, messages, train_on):
    """The text of a conversation by one of the templates above, piece by piece, and which ones are learned.

    Nothing follows the last answer, and nothing asks for one before the first question.
    """
    _, begin, header, content = WRITTEN[name]
    first = next(i for i, message in enumerate(messages) if message["role"] == "user")
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    is_all = train_on == "all"
    pieces = [(begin if messages[0]["role"] != "system" else "", is_all)]
    for i, message in enumerate(messages if is_all else messages[: last + 1]):
        is_turn = message["role"] == "assistant" and (train_on == "assistant" or i == last) and i > first
        written = header.format(role=message["role"], i=i + 1)
        pieces += [(f"{OPEN}{written}\n", is_all), (f"{content(message['content'])}{CLOSE}\n", is_all or is_turn)]
    return pieces


with_tools = st.lists(
    st.tuples(questions, some_text, st.lists(st.tuples(some_text, some_text), max_size=2)), min_size=1, max_size=3
)


@examples(5)
@given(
    st.sampled_from(sorted(WRITTEN)),
    train_ons,
    st.none() | some_text,
    with_tools,
    st.sampled_from([None, "Be brief."]),
    st.booleans(),
    st.sampled_from(sorted(POST_PROCESSORS)),
)
@example("numbered", "assistant", None, [("a", "a", [("a", "a")]), ("a", "a a", [])], None, True, "none")
@example("default system", "assistant", None, [("a", "b", []), ("c", "d", [])], None, False, "none")
@example("default system", "assistant", "e", [("a", "b", [])], None, False, "none")
@example("marked", "completion", None, [("a", "b", []), ("c", "d", [("e", "f")])], "Be brief.", True, "bos")
def test_every_answer_is_found_however_a_template_writes_the_turns(
    tokenizer, template, train_on, greeting, turns, system, ends_with_a_question, post
):
    chosen = tokenizer(template=WRITTEN[template][0], eos=CLOSE, use_regex=False, post=post)
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "assistant", "content": greeting}] if greeting else []
    for question, answer, more in turns:
        messages += conversation([(question, answer)])
        for found, then in more:
            messages += [{"role": "tool", "content": found}, {"role": "assistant", "content": then}]
    messages += [{"role": "user", "content": "?"}] * ends_with_a_question
    assume("trimming" not in template or all(m["content"].strip() for m in messages if m["role"] == "assistant"))
    pieces = pieces_written(template, messages, train_on)
    assert_learned(encoded({"messages": messages}, chosen, train_on), chosen, pieces)


@given(turns, st.sampled_from(["completion", "assistant"]))
def test_what_a_template_marks_is_what_is_learned(tokenizer, turns, train_on):
    marked = "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}"
    chosen = tokenizer(template=CHATML.replace("{{ m.content }}", marked + "{% endif %}"), eos=CLOSE)
    pieces = []
    for i, (question, answer) in enumerate(turns):
        pieces += [
            (f"{OPEN}user\n{question}{CLOSE}\n{OPEN}assistant\n", False),
            (answer, train_on == "assistant" or i == len(turns) - 1),
            (f"{CLOSE}\n", False),
        ]
    assert_learned(encoded({"messages": conversation(turns)}, chosen, train_on), chosen, pieces)


def test_what_a_template_adds_to_the_last_answer_alone_is_learned_with_it(tokenizer):
    last = "{{ '…' if m.role == 'assistant' and loop.last }}{{ m.content }}"
    chosen = tokenizer(template=CHATML.replace("{{ m.content }}", last), eos=CLOSE)
    pieces = pieces_written("chatml", conversation([("a", "b"), ("c", "…d")]), "completion")
    assert_learned(encoded({"messages": conversation([("a", "b"), ("c", "d")])}, chosen), chosen, pieces)


REWRITING = {  # how the content is written, the fields of the first answer, how the last one is written
    "cut": ("{{ m.content if loop.last or m.role == 'user' else m.content[:1] }}", {"content": "bcd"}, "ghi"),
    "left out": ("{{ m.content if loop.last or m.role == 'user' }}", {"content": "bcd"}, "ghi"),
    "twice": ("{{ m.content }}{{ m.content if m.role == 'assistant' and not loop.last }}", {"content": "bcd"}, "ghi"),
    "thoughts": (
        "{% if m.thinking and loop.last %}{{ m.thinking }}{% endif %}{{ m.content }}",
        {"content": "bcd", "thinking": "xyz"},
        "ghi",
    ),
    "calls": (
        "{{ m.tool_calls | tojson if m.tool_calls and (loop.last or messages | length == 2) }}{{ m.content or '' }}",
        {"content": None, "tool_calls": [{"function": {"name": "look"}}]},
        "ghi",
    ),
    "closed": ("{{ m.content }}{{ '!' if loop.last and m.role == 'assistant' }}", {"content": "bcd"}, "ghi!"),
    "stripped": (STRIPPING, {"content": "<think>b</think>c"}, "ghi"),
}


@pytest.mark.parametrize(("written", "answer", "last"), REWRITING.values(), ids=REWRITING)
def test_an_answer_that_a_template_rewrites_later_is_refused_for_assistant(tokenizer, written, answer, last):
    template = written if written == STRIPPING else CHATML.replace("{{ m.content }}", written)
    chosen = tokenizer(template=template, eos=CLOSE)
    question, _, *rest = conversation([("a", "b"), ("f", "ghi")])
    row = {"messages": [question, {"role": "assistant", **answer}, *rest]}
    with pytest.raises(ml.DataError, match=r"here:7: .*message 1 .*differently.*train_on completion"):
        encoded(row, chosen, "assistant", "here:7")
    found = encoded(row, chosen)
    assert chosen.decode(answer_of(found), skip_special_tokens=False) == f"{last}{CLOSE}\n"
    assert sum(learned(found)) == len(answer_of(found))


def test_a_template_may_refuse_conversations_that_break_off(tokenizer):
    refusing = "{{ raise_exception('no question') if messages[-1].role == 'system' }}" + CHATML
    chosen = tokenizer(template=refusing, eos=CLOSE)
    messages = [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}, *conversation([("b", "c")])]
    found = encoded({"messages": messages}, chosen, "assistant")
    assert_learned(found, chosen, pieces_written("chatml", messages, "assistant"))


def test_an_end_token_that_closes_the_whole_text_is_learned_only_there(tokenizer):
    chosen = tokenizer(template=CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}", eos=EOS)
    messages = conversation([("a", "b"), ("c", "d")])
    found = encoded({"messages": messages}, chosen, "assistant")
    assert_learned(found, chosen, [*pieces_written("chatml", messages, "assistant"), (EOS, True)])


def test_a_conversation_is_refused_where_there_is_no_template(tokenizer):
    with pytest.raises(ml.DataError, match="needs a chat template"):
        encoded({"messages": conversation([("a", "b")])}, tokenizer())


@given(tokenizer_options, some_text, st.integers(2, 12))
def test_each_token_of_a_document_but_the_first_is_predicted_once(tokenizer, options, text, size):
    chosen, row = tokenizer(**options), Row({"text": text}, "a.txt")
    whole = encoded(row.fields, chosen, max_length=10**6)
    found = encode_rows([row], chosen, ml.DataConfig(size))
    assert all(1 < len(piece.tokens) <= size and piece.source == "a.txt" for piece in found)
    assert [whole.tokens[0], *(token for piece in found for token in piece.tokens[1:])] == whole.tokens
    assert [whole.labels[0], *(label for piece in found for label in piece.labels[1:])] == whole.labels
    assert (found.truncated, found.unlabelled, found.cut) == (0, 0, set())
