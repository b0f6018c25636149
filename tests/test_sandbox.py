"""The sandbox of chat templates: what they cannot reach, what they cannot use up, and that nothing else changes."""

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from minilora import MiniloraError
from minilora.models import template as module
from minilora.models.sandbox import Sandbox
from minilora.models.template import ChatTemplate

USER = [{"role": "user", "content": "hi"}]


def render(source, messages=USER, **options):
    return ChatTemplate(source, {}).render(messages, **options)


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ strftime_now.__code__.co_code }}",
    "{{ self._TemplateReference__context.vars }}",
    "{{ dict.fromkeys.__func__.__globals__ }}",
    "{{ (''|attr('__class__')).x }}",
    "{{ ''['__class__'].x }}",
    "{{ (messages|map(attribute='__class__')|first).x }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({}) }}",
    "{{ messages[0].setdefault('a', 1) }}",
    "{{ dict.update(messages[0], {'role': 'x'}) }}",
    "{% include 'config.json' %}",
    "{% import 'os' as os %}",
    "{% extends '/etc/passwd' %}",
    "{{ range(10**6) }}",
    "{{ messages[9].role.x }}",
    "{{ 1 // 0 }}",
    "{{ 'a' + 1 }}",
    "{{ nothing() }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ messages.copy.__self__.__class__.__base__ }}",
    "{{ loop.__init__.__globals__ }}",
    "{% for x in [1] %}{{ loop._iterator.gi_frame.f_globals.x }}{% endfor %}",
]
HARMLESS = [  # jinja2's sandbox writes nothing where Python's internals would be
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns.__class__ }}",
    "{{ ''.__class__ }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ self._TemplateReference__context }}",
    "{{ cycler.__init__ }}",
    "{{ strftime_now.__globals__ }}",
    "{{ ''.join.__self__ }}",
    "{{ messages | map('attr', '__class__') | first | attr('__mro__') | first }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_an_escape_is_refused(source):
    with pytest.raises(MiniloraError, match=r"^chat template: (?!chat template)."):
        render(source)


@pytest.mark.parametrize("source", HARMLESS)
def test_python_internals_are_never_written(source):
    assert render(source) == ""


def test_each_rendering_has_its_own_limit_and_a_long_conversation_a_larger_one(monkeypatch):
    monkeypatch.setattr(module, "LIMIT", 1000)
    source = "{% for m in messages %}{% for n in messages %}{{ n.content == m.content }}{% endfor %}{% endfor %}"
    chosen = ChatTemplate(source, {})
    assert len(chosen.render(USER * 50)) == 4 * 50**2
    assert chosen.render(USER) == "True"
    monkeypatch.setattr(module, "LIMIT_PER_CHARACTER", 0)
    with pytest.raises(MiniloraError, match="more work or memory"):
        chosen.render(USER * 50)


def test_a_template_may_look_at_every_message_for_each_of_hundreds():
    source = "{% for m in messages %}{% for n in messages %}{{ 'a' if n.role == 'tool' }}{% endfor %}{% endfor %}"
    assert render(source, USER * 200) == ""


def test_a_template_can_indent_by_repeating_a_text_and_compute_with_small_numbers():
    source = "{% set width = 2 %}<{{ ' ' * width }}>{{ 7 % 4 }}{{ 7 // 2 }}{{ 2 * 3 }}{{ 1 / 2 }}"
    assert render(source) == "<  >3360.5"


def test_a_template_can_indent_what_it_writes_as_command_r_does_with_calls_of_tools():
    source = "{{ '{'|indent(4, first=True) }}|{{ messages[0].content|indent(2) }}|{{ messages[0].content|indent('>') }}"
    assert render(source, [{"content": "a\nb"}]) == "    {|a\n  b|a\n>b"


def test_a_filter_that_is_not_allowed_is_refused_by_name_where_it_is_reached():
    assert render("{% if false %}{{ 1 | round }}{% endif %}a") == "a"
    for use in ("1 | round", "[1] | map('round') | list"):
        with pytest.raises(MiniloraError, match="the filter round is not allowed"):
            render(f"{{{{ {use} }}}}")


def test_nothing_is_computed_where_a_template_is_compiled():
    seen = []
    sandbox = Sandbox()
    sandbox.filters["seen"] = seen.append
    sandbox.compile("{{ 1 | seen }}{% if 1 | seen %}{% endif %}{% autoescape 1 | seen %}{% endautoescape %}")
    assert seen == []


@pytest.mark.parametrize(
    "each", ["'b' | indent(300000)", "('\n' * 3000) | indent(100)", "'b' | indent(-300000)", "x[1:]", "x[:-1] + 'b'"]
)
def test_what_a_loop_computes_counts(each):
    with pytest.raises(MiniloraError, match="more work or memory"):
        render("{% set x = 'a' * 300000 %}{% for i in range(40) %}{% set y = " + each + " %}{% endfor %}")


def test_a_long_answer_can_be_taken_apart_in_a_loop():
    source = "{% for m in messages %}{% set x = m.content.split('</think>')[-1].strip() %}{{ x }}{% endfor %}"
    assert render(source, [{"role": "assistant", "content": "a</think> " + "b" * 300_000}]) == "b" * 300_000


def test_a_macro_may_be_given_two_long_texts():
    source = "{% macro f(x, y) %}{{ x ~ y }}{% endmacro %}{{ f(messages[0].content, messages[1].content) }}"
    assert render(source, [{"role": role, "content": "a" * 30_000} for role in ("user", "assistant")]) == "a" * 60_000


texts = st.sampled_from(["'a'", "' b '", "'%s'", "messages[0].content", "m.role", "nothing", "'A b'"])
values = st.sampled_from(
    ["3", "0", "-2", "2.5", "true", "none", "[1, 'a']", "(2, 3)", "{'a': [1]}", "messages", "m", "[]"]
)
BINARY = "+ - * / // % ** ~ == != < <= in and or".split()  # noqa: SIM905
FILTERS = "upper trim length list first last string tojson join reverse sort items default title int abs".split()  # noqa: SIM905
TESTS = "string none mapping defined sequence iterable".split()  # noqa: SIM905
CALLS = ["split()", "strip('a')", "get('role')", "items()", "replace('a', 'bb')", "center(7)", "keys()", "format(1)"]


def grown(inner):
    return st.one_of(
        st.tuples(inner, st.sampled_from(BINARY), inner).map(lambda it: f"({it[0]} {it[1]} {it[2]})"),
        st.tuples(inner, st.sampled_from(FILTERS)).map(lambda it: f"({it[0]} | {it[1]})"),
        st.tuples(inner, st.sampled_from(TESTS)).map(lambda it: f"({it[0]} is {it[1]})"),
        st.tuples(inner, st.sampled_from(CALLS)).map(lambda it: f"{it[0]}.{it[1]}"),
        st.tuples(inner, inner).map(lambda it: f"{it[0]}[{it[1]}]"),
        st.tuples(texts, st.integers(-2, 2)).map(lambda it: f"{it[0]}[{it[1]}:]"),
        st.tuples(inner, inner).map(lambda it: f"[{it[0]}, {it[1]}]"),
        st.tuples(inner, inner, inner).map(lambda it: f"({it[0]} if {it[1]} else {it[2]})"),
    )


expressions = st.recursive(texts | values, grown, max_leaves=6)
FORMS = [
    "{{ A }}",
    "a {% if A %} b {% elif B %} c {% endif %} d",
    "{% for x in A %}{{ loop.index }}{{ loop.last }}{{ x }}{{ B }}{% else %}none{% endfor %}",
    "{% for x in A if B %}{{ x }}{{ loop.length }}{% endfor %}",
    "{% for x in [A, [B]] recursive %}<{{ loop(x) if x is iterable and x is not string else x }}>{% endfor %}",
    "{% macro f(x, y=2) %}{{ x }}{{ y }}{{ caller() if caller }}{% endmacro %}{{ f(A) }}{% call f(B) %}c{% endcall %}",
    "{% set x %}{{ A }}-{{ B }}{% endset %}{{ x | length }}{{ x }}{% filter trim %} {{ B }} {% endfilter %}",
    "{% set n = namespace(x=A) %}{% for i in range(3) %}{% set n.x = B %}{% endfor %}{{ n.x }}",
]


def outcome(template, **variables):
    try:
        return template.render(messages=USER, m=USER[0], **variables)
    except Exception as error:
        return type(error)


@given(st.sampled_from(FORMS), expressions, expressions)
def test_what_is_written_is_what_jinja2_writes(form, first, second):
    source = form.replace("A", first).replace("B", second)
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    ours = Sandbox(trim_blocks=True, lstrip_blocks=True)
    try:
        expected = plain.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        with pytest.raises(type(error)):
            ours.from_string(source)
        return
    ours.left = module.LIMIT
    found = outcome(ours.from_string(source))
    assert found == outcome(expected) or found is SecurityError
