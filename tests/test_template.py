"""Chat templates: what they may use, where they say the assistant speaks, and what their authors may not do."""

from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import DataError, FormatError
from minilora.models import template as module
from minilora.models.template import BEGIN, END, TEMPLATE_LIMIT, ChatTemplate

USER = [{"role": "user", "content": "hi"}]
texts = st.text(max_size=8)
conversations = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), texts), min_size=1, max_size=5)


def render(source, messages=USER, special_tokens=(), **options):
    return ChatTemplate(source, dict(special_tokens)).render(messages, **options)


def messages_of(turns):
    return [{"role": role, "content": content} for role, content in turns]


def test_a_template_sees_messages_tools_special_tokens_and_the_prompt_flag():
    source = "{{ bos_token }}{{ messages[0].role }}|{{ messages[0]['content'] }}|{{ tools | length }}|{{ documents }}"
    assert render(source, special_tokens={"bos_token": "<s>"}, tools=[{}, {}]) == "<s>user|hi|2|None"
    assert render("{{ tools }}") == "None"
    source = "{% if add_generation_prompt %}go{% endif %}"
    assert (render(source, add_generation_prompt=True), render(source)) == ("go", "")


def test_tojson_writes_plain_json():
    for call, expected in (
        ("tojson", '{"b": "<&\'>é", "a": [1, null]}'),  # not escaped for HTML, order kept
        ("tojson(ensure_ascii=True)", '{"b": "<&\'>\\u00e9", "a": [1, null]}'),
        ("tojson(separators=(',', ':'))", '{"b":"<&\'>é","a":[1,null]}'),
        ("tojson(sort_keys=True)", '{"a": [1, null], "b": "<&\'>é"}'),
        ("tojson(indent=1)", '{\n "b": "<&\'>é",\n "a": [\n  1,\n  null\n ]\n}'),
    ):
        assert (
            render(f"{{{{ messages[0].content | {call} }}}}", [{"content": {"b": "<&'>é", "a": [1, None]}}]) == expected
        )


def test_strftime_now_is_the_clock(monkeypatch):
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2024, 2, 29, 7, 5)

    monkeypatch.setattr(module, "datetime", Clock)
    assert render("{{ strftime_now('%d %b %Y %H:%M') }}") == "29 Feb 2024 07:05"


def test_keys_without_a_value_are_dropped_before_the_template_sees_them():
    messages = [{"role": "assistant", "content": None, "tool_calls": None, "empty": "", "no": False}]
    assert render("{{ messages[0].keys() | list }}", messages) == "['role', 'empty', 'no']"
    assert messages[0]["content"] is None  # the caller's message is not changed


def test_reasoning_goes_by_all_its_names_of_which_the_first_wins():
    for name in ["reasoning_content", "thinking", "reasoning"]:
        source = "{{ messages[0].reasoning_content }} {{ messages[0].thinking }}"
        assert render(source, [{"role": "assistant", name: "because", "content": "yes"}]) == "because because"
        assert render(source, [{"reasoning": "c", "thinking": "b", "reasoning_content": "a"}]) == "a b"
        assert render(source, [{"thinking": "b", "reasoning": "c"}]) == "b b"


def test_a_wrong_conversation_is_refused_and_a_template_changes_none():
    for messages, message in (
        (["hi"], "found str"),
        ([None], "found None"),
        ([["user", "hi"]], "found list"),
    ):
        with pytest.raises(DataError, match=message):
            render("", messages)
    with pytest.raises(DataError, match="chat template: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")
    messages = [{"role": "user", "content": "hi", "parts": [1]}]
    with pytest.raises(DataError):
        render("{{ messages[0].parts.append(2) }}", messages)
    assert messages == [{"role": "user", "content": "hi", "parts": [1]}]


MARKED = """{% for m in messages %}<{{ m.role }}>
{% if m.role == 'assistant' %}
{% generation %}{{ m.content }}<end>{% endgeneration %}

{% else %}
{{ m.content }}
{% endif %}
{% endfor %}"""


@given(conversations)
def test_spans_are_what_stands_in_generation_blocks_which_add_nothing_to_the_text(turns):
    bare = MARKED.replace("{% generation %}", "{% if true %}").replace("{% endgeneration %}", "{% endif %}")
    text, spans = ChatTemplate(MARKED, {}).render_spans(messages_of(turns))
    assert [text[begin:end] for begin, end in spans] == [f"{c}<end>" for role, c in turns if role == "assistant"]
    assert spans == sorted(spans)
    assert text == render(MARKED, messages_of(turns)) == render(bare, messages_of(turns))
    assert not {BEGIN, END} & set(text)


SAID = "{% generation %} a {% endgeneration %}"
HIDDEN = [
    "{% generation %}<{% generation %}a{% endgeneration %}>{% endgeneration %}",  # nested
    "{% set x %}" + SAID + "{% endset %}<{{ x | trim }}>",
    "{% set x | trim %}" + SAID + "{% endset %}<{{ x }}>",
    "<{% filter trim %}" + SAID + "{% endfilter %}>",
    "{% macro f() %}" + SAID + "{% endmacro %}<{{ f() | trim }}>",
    "{% macro f() %}<{{ caller() | trim }}>{% endmacro %}{% call f() %}" + SAID + "{% endcall %}",
    "{% if false %}{% block b %}" + SAID + "{% endblock %}{% endif %}<{{ self.b() | trim }}>",
    "{% for x in [[0]] recursive %}{{ '<' ~ loop(x) | trim ~ '>' if x }}{% if not x %}"
    + SAID
    + "{% endif %}{% endfor %}",
]


SPANS = {
    "no tag, no span": ("a", ("a", [])),
    "an empty block": ("a{% generation %}{% endgeneration %}", ("a", [(1, 1)])),
    "trimming as other tags do": ("a \n{%- generation -%} b {%- endgeneration -%} \n c", ("abc", [(1, 2)])),
}


@pytest.mark.parametrize(("source", "expected"), SPANS.values(), ids=SPANS)
def test_a_span_is_where_the_text_of_its_block_is(source, expected):
    assert ChatTemplate(source, {}).render_spans(USER) == expected


@pytest.mark.parametrize("source", HIDDEN)
def test_a_template_that_changes_the_text_of_a_block_has_no_spans(source):
    chosen = ChatTemplate(source, {})
    assert chosen.render(USER) == "<a>"
    with pytest.raises(DataError, match="changes the text of one before"):
        chosen.render_spans(USER)


@pytest.mark.parametrize("mark", [BEGIN, END])
def test_text_cannot_forge_the_marks_of_a_span(mark):
    for role in ("user", "assistant"):
        with pytest.raises(DataError, match="changes the text of one before"):
            ChatTemplate(MARKED, {}).render_spans([{"role": role, "content": f"a{mark}"}])


def test_what_is_no_template_is_refused_at_once():
    for source in (
        "{% if %}",
        "{% unknown %}",
        "{% generation %}",
        "{{ a | unknown }}",
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
        "{% for i in [] %}" * 30 + "{% endfor %}" * 30,
    ):
        with pytest.raises(FormatError, match=r"^chat template: ."):
            ChatTemplate(source, {})


def test_a_template_may_have_64_000_characters():
    assert render("a" * TEMPLATE_LIMIT) == "a" * TEMPLATE_LIMIT
    with pytest.raises(FormatError, match=f"{TEMPLATE_LIMIT + 1} characters; at most {TEMPLATE_LIMIT}"):
        ChatTemplate("a" * (TEMPLATE_LIMIT + 1), {})
