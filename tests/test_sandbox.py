"""The sandbox of chat templates: what they cannot reach, and what they cannot write."""

import pytest

from minilora import MiniloraError
from minilora.models import template as module
from minilora.models.template import ChatTemplate

USER = [{"role": "user", "content": "hi"}]


def render(source, messages=USER):
    return ChatTemplate(source, {}).render(messages)


ESCAPES = [  # one of each kind: jinja2's own tests have more
    "{{ ''.__class__.__mro__ }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ (''|attr('__class__')).x }}",
    "{{ (messages|map(attribute='__class__')|first).x }}",
    "{% for x in [1] %}{{ loop._iterator.gi_frame.f_globals.x }}{% endfor %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].setdefault('a', 1) }}",
    "{% include 'config.json' %}",
    "{% import 'os' as os %}",
    "{% extends '/etc/passwd' %}",
    "{{ range(10**6) }}",
    "{{ messages[9].role.x }}",
    "{{ 1 // 0 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
]
HARMLESS = [  # jinja2's sandbox writes nothing where Python's internals would be
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns.__class__ }}",
    "{{ ''|attr('__class__') }}",
    "{{ strftime_now.__globals__ }}",
    "{{ messages | map('attr', '__class__') | first | attr('__mro__') | first }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_an_escape_is_refused(source):
    with pytest.raises(MiniloraError, match=r"^chat template: (?!chat template)."):
        render(source)


@pytest.mark.parametrize("source", HARMLESS)
def test_python_internals_are_never_written(source):
    assert render(source) == ""


TOO_MUCH = [
    "{{ 'a' * 10**10 }}",
    "{% set x = 'a' * 100000000 %}",
    "{{ 100000000 * 'a' }}",
    "{{ [[0] * 500] * 10000 }}",
    "{{ 2 ** 3 }}",
    "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{% set x = 'a' * 9999999 %}{{ x }}{{ x }}",
    "{% macro f() %}{% for i in range(10100) %}{{ 'a' * 1000 }}{% endfor %}{% endmacro %}{% set x = f() %}",
    "{% set x %}{% for i in range(10100) %}{{ 'a' * 1000 }}{% endfor %}{% endset %}",
]


@pytest.mark.parametrize("source", TOO_MUCH)
def test_products_powers_and_what_is_written_have_limits(source):
    with pytest.raises(MiniloraError, match=r"not allowed in a template|writes more than"):
        render(source)


def test_a_template_writes_up_to_its_limit(monkeypatch):
    monkeypatch.setattr(module, "TEXT_LIMIT", 6)
    assert render("{{ 'a' * 3 }}{{ messages[0].content }}b") == "aaahib"
    with pytest.raises(MiniloraError, match="writes more than 6 characters"):
        render("{{ 'a' * 3 }}{{ messages[0].content }}bc")


def test_a_template_can_indent_by_repeating_a_text_and_compute_with_small_numbers():
    source = "{% set width = 2 %}<{{ ' ' * width }}{{ ' ' * -1 }}>{{ 7 % 4 }}{{ 7 // 2 }}{{ 2 * 3 }}{{ 2 * 0.5 }}"
    assert render(source) == "<  >3361.0"
