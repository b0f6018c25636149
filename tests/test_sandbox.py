"""The sandbox of chat templates: what they cannot reach, what they cannot use up, and that nothing else changes."""

import threading
import time
import tracemalloc

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from minilora import MiniloraError
from minilora.models import template as module
from minilora.models.template import ChatTemplate, Sandbox, _metered

USER = [{"role": "user", "content": "hi"}]


def render(source, messages=USER, **options):
    return ChatTemplate(source, {}).render(messages, **options)


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ (1).__class__.__base__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'] }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ strftime_now.__code__.co_code }}",
    "{{ self._TemplateReference__context.vars }}",
    "{{ dict.__class__.__base__ }}",
    "{{ dict.fromkeys.__func__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ (''|attr('__class__')).x }}",
    "{{ ''['__class__'].x }}",
    "{{ (messages|map(attribute='__class__')|first).x }}",
    "{{ messages.append(1) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update({}) }}",
    "{{ messages[0].pop('role') }}",
    "{{ messages[0].setdefault('a', 1) }}",
    "{{ dict.update(messages[0], {'role': 'x'}) }}",
    "{% include 'config.json' %}",
    "{% import 'os' as os %}",
    "{% from 'os' import path %}",
    "{% extends '/etc/passwd' %}",
    "{{ range(10**6) }}",
    "{{ messages[9].role.x }}",
    "{{ 1 // 0 }}",
    "{{ 'a' + 1 }}",
    "{{ nothing() }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ dict(a=1).__class__.__mro__ }}",
    "{{ messages.copy.__self__.__class__.__base__ }}",
    "{{ ''.format.__globals__['os'] }}",
    "{{ '{0.__class__.__mro__}'.format(1).x.y }}",
    "{{ (messages | groupby('role') | first).__class__.__mro__ }}",
    "{{ loop.__init__.__globals__ }}",
    "{% for x in [1] %}{{ loop._iterator.gi_frame.f_globals.x }}{% endfor %}",
    "{% macro f() %}{% endmacro %}{{ f._func.__globals__.x }}",
    "{{ (messages | map('upper')).gi_frame.f_globals.x }}",
    "{{ lipsum() }}",
    "{{ [1, 2] | random }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "{{ '%s' % messages }}",
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


LARGE = "{% set large = 'a' * 7000000 %}"
MANY = "{% set many = range(99999) | list %}"
IFS = "{% if messages.x %}{% endif %}" * 5000


def repeated(change, start="'a'", turns=99):
    """Doing the same again and again to `n.x`."""
    return (
        f"{{% set n = namespace(x={start}) %}}{{% for i in range({turns}) %}}{{% set n.x = {change} %}}{{% endfor %}}"
    )


def forever(body, source=""):
    return f"{source}{{% for i in range(99999) %}}{{% for j in range(99999) %}}{body}{{% endfor %}}{{% endfor %}}"


BOMBS = {
    "repetition": ["{{ 'a' * 10**8 }}", "{{ 'a' * 6000 * 6000 }}", "{{ [0] * 10**8 }}", "{{ [[0] * 500] * 10000 }}"],
    "integers": [
        "{% set x = ('f' * 1000000) | int(base=16) %}{{ x // 3 }}",
        "{% set x = ('f' * 1000000) | int(base=16) %}" + forever("{% if x is even %}{% endif %}"),
        "{% set x = ('f' * 1000000) | int(base=16) %}" + forever("{% set y = -x %}"),
        "{% set x = 0x" + "f" * 200000 + " %}" + forever("{% if x is divisibleby(x) %}{% endif %}"),
        "{{ 9 ** 99 }}",
        "{{ 1 | round(10**7, 'floor') }}",
    ],
    "powers": ["{{ 9 ** 99999999 }}", "{{ 1 | round(10**9, 'ceil') }}", "{{ (1).to_bytes(10**9, 'big') }}"],
    "widths": [
        "{{ 'a'.ljust(10**15) }}",
        "{{ 'a' | center(1000000000) }}",
        "{{ 'a\\n' | indent(10**9, true) }}",
        "{{ ('\\t' * 10000).expandtabs(10**6) }}",
        "{{ [1] | batch(10**9, 'x') | list }}",
        "{{ [1, 2] | tojson(indent=10**9) }}",
        "{{ [1] | tojson(indent='a' * 7000000) }}",
    ],
    "formats": [
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (10**9, 1) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=10**9) }}",
        "{{ '{a[}]:{w}}'.format(a={'}': 1}, w=10**9) }}",
        "{{ '{x:1000000000}'.format_map({'x': 1}) }}",
        "{{ '{:١٠٠٠٠٠٠٠٠٠}'.format(1) }}",
        "{{ ('%1$s' | safe * 9000000) % messages }}",
        "{{ ['%1000000000d'] | format(1) }}",
    ],
    "substitutions": [
        "{{ ('a' * 10000).replace('', 'b' * 10000) }}",
        "{{ ('a' * 10000) | replace(new='b' * 10000, old='') }}",
        "{{ ('b' * 10000).join('a' * 10000) }}",
        "{{ ('a' * 10000).translate({97: 'b' * 5000}) }}",
        "{{ dict.fromkeys(range(9999), 'a' * 99999) | tojson }}",
    ],
    "doubling": [
        repeated("n.x ~ n.x"),
        repeated("'%s%s' % (n.x, n.x)"),
        repeated("'{0}{0}'.format(n.x)"),
        repeated("n.x * n.x", "3"),
        repeated("n.x * 2 ** 1000", "1", 9999),
    ],
    "loops": [
        forever(""),
        forever("a"),
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) | map('string') | map('center', 99999) %}{% endfor %}",
        LARGE + "{% for c in large %}{% for d in large %}{% endfor %}{% endfor %}",
        LARGE + "{% for c in large recursive %}{% if loop.first %}{{ loop(large) }}{% endif %}{% endfor %}",
    ],
    "recursion": [
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
        "{% block a %}{{ self.a() }}{% endblock %}",
        "{% macro f() %}{% call f() %}{% endcall %}{{ caller() }}{% endmacro %}{% call f() %}{% endcall %}",
    ],
    "reading": [
        LARGE + forever("{% if large == large ~ 'c' %}{% endif %}"),
        LARGE + forever("{% set x = large.count('x') %}"),
        LARGE + "{{ [large] | map('title') | list }}",
        "{{ ('ab ' * 2000000) | urlencode }}",
        "{{ ('<a>' * 2000000 | safe).striptags() }}",
        "{{ strftime_now('%c' * 2000000) }}",
    ],
    "writing": [
        LARGE + "{% set x %}{% for i in range(99999) %}{{ large }}{% endfor %}{% endset %}",
        LARGE + "{{ [large, large, large, large, large, large] }}",
    ],
    "paying with nothing": [
        "{% for i in range(99999) %}{{ none | _turn(0 - 99999) }}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    ],
}

SLOW_BOMBS = {  # which take up to a second until they are refused
    "formats": ["{{ ('{:9999}' * 100000).format(*range(99999)) }}"],
    "doubling": [repeated("n.x + [i]", "[]", 99999)],
    "loops": [
        forever(IFS),
        forever("{% set x = f() %}", "{% macro f() %}" + IFS + "{% endmacro %}"),
        "{% macro f() %}" + forever("{% set x = caller() %}") + "{% endmacro %}{% call f() %}" + IFS + "{% endcall %}",
    ],
    "recursion": [
        "{% macro f(n) %}{% if n %}{% set x = f(n - 1) ~ f(n - 1) %}{% endif %}{% endmacro %}{% set x = f(90) %}",
        "{% for i in [0, 0] recursive %}{{ loop([0, 0]) if loop.depth < 50 }}{% endfor %}",
    ],
    "reading": [MANY + "{% for x in many %}{{ many.index(99998) }}{% endfor %}"],
    "writing": [
        "{% for i in range(99999) %}{{ 'a' * 100 }}{% endfor %}",
        "{% set x %}{% for i in range(99999) %}" + "a" * 200000 + "{% endfor %}{% endset %}",
    ],
    "paying with nothing": [forever("{{ [1] | map('_turn', 0) | list }}")],
}


def bombs(kinds, name="", **options):
    return [pytest.param(bomb, id=f"{name}{k} {i}", **options) for k in kinds for i, bomb in enumerate(kinds[k])]


@pytest.mark.reliability
@pytest.mark.parametrize("source", [*bombs(BOMBS), *bombs(SLOW_BOMBS, "slow ", marks=pytest.mark.long)])
def test_a_bomb_is_refused_in_bounded_time_and_100_megabytes(source):
    begin = time.thread_time()
    with pytest.raises(MiniloraError, match=r"^chat template: (?!chat template)."):
        render(source)
    assert time.thread_time() - begin < 10  # alone it takes less than 1 s; without a bound it takes hours
    if "{% macro" not in source and source.count("{% for") < 2:  # what runs long is slow to trace, and holds nothing
        tracemalloc.start()
        with pytest.raises(MiniloraError):
            render(source)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100e6


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


def test_threads_do_not_pay_for_each_other():
    chosen, lengths = Sandbox({}, {}), []
    chosen.start(USER)
    other = threading.Thread(target=lambda: lengths.append(len(vars(chosen._rendering))))
    other.start()
    other.join()
    assert lengths == [0]


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
    ours = Sandbox({}, {}, trim_blocks=True, lstrip_blocks=True)
    try:
        expected = plain.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        with pytest.raises(type(error)):
            ours.parse(source)
        return
    ours.start(USER)
    found = outcome(ours.from_string(_metered(ours.parse(source))))
    assert found == outcome(expected) or found is SecurityError
