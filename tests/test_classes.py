"""Rows with classes: which token has which class, which labels there are, and what is refused, with field and line."""

import re

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

import minilora as ml
from minilora.data import IGNORE_INDEX
from minilora.runs.encoders import encode_classes, find_labels
from minilora.runs.formats import Row
from tests.text import BOS, EOS, some_text, texts, tokenizer_options

LABELS = ("no", "yes")
words = st.lists(texts.filter(str.strip), min_size=1, max_size=5)


def encode(tokenizer, fields, unit, labels=LABELS, **options):
    """The one example of a row."""
    return encode_classes([Row(fields, "here:7")], tokenizer, ml.DataConfig(**options), unit, labels)[0]


def holders(tokenizer, tokens):
    """The token of every byte of a text, by counting: a byte-level token has a character for each."""
    added = {tokenizer.token_id(BOS), tokenizer.token_id(EOS)}
    return [i for i, token in enumerate(tokens) if token not in added for _ in tokenizer._backend.id_to_token(token)]


@given(tokenizer_options, some_text, st.integers(0, 1))
def test_the_class_of_a_sequence_is_at_its_last_token(tokenizer, options, text, wanted):
    chosen = tokenizer(**options)
    found = encode(chosen, {"text": text, "label": LABELS[wanted]}, "sequence")
    expected = chosen.encode(text)
    while expected[-1] == chosen.eos_id:  # the pad token, too: transformers takes the class from the token before
        expected.pop()
    assert found.tokens == expected
    assert found.labels == [IGNORE_INDEX] * (len(expected) - 1) + [wanted]
    assert found.labelled == 1


@given(some_text, st.integers(1, 4))
def test_the_class_of_a_sequence_that_is_cut_is_at_the_last_token_left_and_words_cut_off_are_counted(
    tokenizer, text, limit
):
    tokens = tokenizer().encode(text)
    rows = encode_classes([Row({"text": text, "label": "yes"})], tokenizer(), ml.DataConfig(limit), "sequence", LABELS)
    assert (rows[0].tokens, rows[0].labels[-1]) == (tokens[:limit], 1)
    assert (rows.truncated, rows.lost, rows.unlabelled) == (len(tokens) > limit, 0, 0)
    fields = {"tokens": ["the", "cat", "sat", "the"], "labels": ["yes", "no", "no", "yes"]}
    whole = encode(tokenizer(), fields, "token")
    kept = next(i for i, label in enumerate(whole.labels) if label == 0) + 1  # up to the second word's first token
    rows = [Row(fields), Row({"tokens": ["the"], "labels": ["yes"]})]
    found = encode_classes(rows, tokenizer(), ml.DataConfig(max_length=kept), "token", LABELS)
    assert [label for label in found[0].labels if label != IGNORE_INDEX] == [1, 0]
    assert (len(found), found.truncated, found.lost, found.unlabelled) == (2, 1, 2, 0)


@given(tokenizer_options, words, st.randoms(use_true_random=False))
@example({"post": "bos and eos", "use_regex": True}, ["naïve", "漢字", "e\u0301"], None)
@example({"post": "bos", "use_regex": False}, ["the", "cat", "sat"], None)
def test_the_class_of_a_word_is_at_the_token_that_holds_its_first_byte(tokenizer, options, words, random):
    chosen = tokenizer(**options)
    wanted = [random.randint(0, 1) if random else i % 2 for i in range(len(words))]
    tokens = chosen.encode(" ".join(words))
    holding = holders(chosen, tokens)
    first = [holding[len(" ".join([*words[:i], ""]).encode())] for i in range(len(words))]
    fields = {"tokens": words, "labels": [LABELS[i] for i in wanted]}
    if len(set(first)) < len(words):
        with pytest.raises(ml.DataError, match=r"here:7: tokens\[\d\]: the tokenizer has no token of its own"):
            encode(chosen, fields, "token")
        return
    found = encode(chosen, fields, "token")
    assert found.tokens == tokens
    assert found.labels == [dict(zip(first, wanted, strict=True)).get(i, IGNORE_INDEX) for i in range(len(tokens))]
    assert found.labelled == len(words)


@pytest.mark.parametrize(("allow_special", "count"), [(False, 0), (True, 1)])
@pytest.mark.parametrize("unit", ["sequence", "token"])
def test_control_tokens_in_a_text_are_plain_text_unless_they_are_allowed(tokenizer, unit, allow_special, count):
    chosen = tokenizer()
    fields = {"text": f"the {BOS} cat", "label": "yes", "tokens": ["the", BOS, "cat"], "labels": ["yes", "no", "yes"]}
    config = ml.DataConfig(allow_special=allow_special)
    found = encode_classes([Row(fields)], chosen, config, unit, LABELS)
    assert found[0].tokens.count(chosen.token_id(BOS)) == count
    assert found.quoted == 1 - count
    assert found[0].labelled == (1 if unit == "sequence" else 3)


@given(st.lists(some_text, min_size=2, unique=True) | st.lists(st.integers(-20, 200), min_size=2, unique=True))
def test_labels_are_in_the_order_of_the_alphabet_or_of_their_numbers_written_as_text_or_not(labels):
    names = list(map(str, labels))
    assume(isinstance(labels[0], int) or not all(re.fullmatch(r"-?[0-9]+", name) for name in names))
    for written in (labels, names):
        rows = [Row({"tokens": ["a"] * len(written), "labels": written})] * 2
        assert find_labels(rows, "token", ml.DataConfig()) == tuple(map(str, sorted(labels)))


def test_a_number_is_a_name_and_only_where_no_label_is_one_a_place(tokenizer):
    for labels, label, place in [
        (("3", "5"), 5, 1),
        (("3", "5"), "3", 0),
        (("no", "yes"), 1, 1),
        (("no", "1"), 1, 1),
        (("no", "yes"), "0", 0),
    ]:
        assert encode(tokenizer(), {"text": "the", "label": label}, "sequence", labels).labels[-1] == place
        with pytest.raises(ml.DataError, match="label: found '0', which is not among"):
            encode(tokenizer(), {"text": "the", "label": 0}, "sequence", ("3", "5"))


def test_files_are_read_and_their_labels_found_unless_they_are_known(tokenizer, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "the", "label": "b"}\n{"text": "cat", "label": "a"}\n')
    (tmp_path / "test.jsonl").write_text('{"text": "dog", "label": "c"}\n')
    for path in (tmp_path, tmp_path / "train.jsonl"):
        for known, found, classes in (((), ("a", "b"), [1, 0]), (["b", "c", "a"], ("b", "c", "a"), [0, 2])):
            rows, labels = ml.load_classes(path, tokenizer(), "sequence", labels=known)
            assert (labels, [row.labels[-1] for row in rows]) == (found, classes)
    swapped = ml.DataConfig(text_field="label")
    rows, _ = ml.load_classes(tmp_path, tokenizer(), "sequence", swapped)
    assert [row.tokens for row in rows] == [tokenizer().encode(text) for text in ("b", "a")]


GOOD = {"text": "the", "label": "yes", "tokens": ["the", "cat"], "labels": ["yes", "no"]}
REFUSED = [
    ("sequence", {"text": None}, "text: found None, need text"),
    ("sequence", {"text": ""}, "text: it is empty"),
    ("sequence", {"label": None}, "label: found None, need text or a whole number"),
    ("sequence", {"label": True}, "label: found True, need text or a whole number"),
    ("sequence", {"label": 0.5}, "label: found 0.5, need text or a whole number"),
    ("sequence", {"label": ""}, "label: found '', need text or a whole number"),
    ("sequence", {"label": "\ud800"}, "label: found U+D800"),
    ("sequence", {"label": "maybe"}, "label: found 'maybe', which is not among ['no', 'yes'"),
    ("token", {"tokens": "the cat"}, "tokens: found 'the cat', need a list"),
    ("token", {"labels": None}, "labels: found None, need a list"),
    ("token", {"tokens": [], "labels": []}, "tokens: it is empty"),
    ("token", {"tokens": ["the"]}, "labels: found 2 for 1 tokens, need one for each"),
    ("token", {"tokens": ["the", " "]}, "tokens[1]: found ' ', need a word"),
    ("token", {"tokens": ["the", 3]}, "tokens[1]: found 3, need text"),
    ("token", {"labels": ["yes", ["no"]]}, "labels[1]: found ['no'], need text or a whole number"),
    ("token", {"labels": ["yes", "nay"]}, "labels[1]: found 'nay', which is not among"),
]


@pytest.mark.parametrize(("unit", "changes", "message"), REFUSED)
def test_what_cannot_be_read_is_refused_with_place_and_field_or_skipped_and_counted(tokenizer, unit, changes, message):
    fields = {**GOOD, **changes}
    with pytest.raises(ml.DataError, match=re.escape(f"here:7: {message}")):
        encode(tokenizer(), fields, unit)
    rows, config = [Row(fields, "here:7"), Row(GOOD)], ml.DataConfig(skip_bad_rows=True)
    found = encode_classes(rows, tokenizer(), config, unit, LABELS)
    assert len(found) == len(found.bad) == 1
    assert message in found.bad[0]


def test_rows_whose_labels_cannot_be_collected_are_refused_or_skipped_and_settings_without_effect_refused(tokenizer):
    rows = [Row({"text": "a", "label": label}, f"here:{label}") for label in ("yes", None, "no")]
    bad = [(rows, "here:None: label"), (rows[:1], "here:yes: all 1 rows have the labels ['yes']; need at least two")]
    for some, message in [*bad, ([Row(source="here", problem="no JSON")], "here: no JSON")]:
        with pytest.raises(ml.DataError, match=re.escape(message)):
            find_labels(some, "sequence", ml.DataConfig())
    assert find_labels(rows, "sequence", ml.DataConfig(skip_bad_rows=True)) == ("no", "yes")
    options = {"train_on": "all", "prompt_style": "alpaca", "system": "Be brief."}
    with pytest.raises(ml.ConfigError, match="train_on, prompt_style, system: without effect"):
        encode(tokenizer(), GOOD, "sequence", **options)
