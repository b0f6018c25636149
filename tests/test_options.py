"""Fields of the wrong type: a `ConfigError` names each one, what was found and what is accepted."""

import dataclasses
import inspect
import typing
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

import minilora as ml
from minilora.options import fits
from minilora.runs.settings import RunConfig

CONFIGS = (ml.LoraConfig, ml.QuantizeConfig, ml.DataConfig, ml.TrainConfig, RunConfig)
UNLIKE = object()  # of no type that is accepted anywhere


def test_a_field_of_the_wrong_type_is_named():
    for cls, name in ((c, field.name) for c in CONFIGS for field in dataclasses.fields(c)):
        with pytest.raises(ml.ConfigError, match=f"{cls.__name__}: {name} is <object object.*, need "):
            cls(**{name: UNLIKE})


def test_the_message_says_what_was_found_and_what_is_accepted():
    for call, message in (
        (
            lambda: ml.LoraConfig(r="8", use_dora=1),
            "LoraConfig: r is '8', need a whole number; use_dora is 1, need true or false",
        ),
        (lambda: ml.TrainConfig(keep="all"), r"TrainConfig: keep is 'all', need one of \['last', 'best'\]"),
    ):
        with pytest.raises(ml.ConfigError, match=message):
            call()


def test_the_docstring_of_a_configuration_has_the_help_of_every_field():
    for cls in [ml.LoraConfig, ml.QuantizeConfig, ml.DataConfig, ml.TrainConfig]:
        text = " ".join(inspect.getdoc(cls).partition("Attributes:")[2].split())
        assert text == " ".join(f"{field.name}: {field.metadata['help']}" for field in dataclasses.fields(cls))


@given(st.integers(), st.floats(), st.text(), st.booleans())
def test_numbers_and_text_fit_their_own_types_and_whole_numbers_fit_float(number, real, text, truth):
    found = {hint: [fits(value, hint) for value in (number, real, text, truth)] for hint in (int, float, str, bool)}
    assert found == {
        int: [True, False, False, False],
        float: [True, True, False, False],
        str: [False, False, True, False],
        bool: [False, False, False, True],
    }
    assert fits([number, number], tuple[int, ...])
    assert not fits([number, text], tuple[int, ...])
    assert fits({text: number}, Mapping[str, float])
    assert not fits({text: text}, Mapping[str, float])
    assert fits(None, int | None)
    assert not fits(True, typing.Literal[1])


def test_an_argument_of_another_library_is_answered_with_ours_and_one_that_nobody_has_as_python_does():
    for call, said in (
        (lambda: ml.LoraConfig(rank=8, alpha=16), "^LoraConfig has no 'alpha': use lora_alpha; no 'rank': use r"),
        (lambda: ml.TrainConfig(lr=1e-3), "^TrainConfig has no 'lr': use learning_rate"),
        (lambda: ml.LoraConfig(rnak=8), "unexpected keyword argument 'rnak'"),
    ):
        with pytest.raises(TypeError, match=said):
            call()
