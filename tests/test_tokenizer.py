"""Tokenizers: ids and back, which characters each token stands for, and what the files beside `tokenizer.json` say."""

import json
import tracemalloc

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

import minilora as ml
from minilora import DataError, FormatError
from minilora.adapters.layout import tokenizer_of
from minilora.runs.encoders import with_prompt_style
from tests.chat_templates import GEMMA
from tests.files import write_adapter
from tests.models import tiny_model
from tests.text import BOS, CHATML, CLOSE, EOS, SPECIAL, write_tokenizer


def write(directory, **files):
    for name, content in files.items():
        is_text = isinstance(content, str)
        path = directory / (f"{name}.jinja" if is_text else f"{name}.json")
        path.write_text(content if is_text else json.dumps(content), encoding="utf-8")
    return directory


@pytest.fixture(scope="module", params=["bos", "trimming"])
def chosen(request, tokenizer):
    """A byte-level tokenizer that puts a token before every text, and one that trims the spaces off its offsets."""
    return tokenizer(post=request.param)


@pytest.fixture
def directory(tmp_path):
    write_tokenizer(tmp_path / "model")
    return tmp_path / "model"


@given(text=st.text(max_size=40))
def test_text_comes_back_from_its_tokens(chosen, text):
    assert chosen.decode(chosen.encode(text)) == text


@given(text=st.text(max_size=40))
def test_the_tokens_around_every_text_are_added_when_asked_for(tokenizer, text):
    begin, end = SPECIAL.index(BOS), SPECIAL.index(EOS)
    bare = tokenizer(post="bos and eos").encode(text, add_special_tokens=False)
    assert tokenizer(post="bos and eos").encode(text) == [begin, *bare, end]
    assert not {begin, end} & set(bare)


def test_a_special_token_in_the_text_is_one_token(chosen):
    ids = chosen.encode(f"a{CLOSE}b", add_special_tokens=False)
    assert ids == [chosen.token_id("a"), SPECIAL.index(CLOSE), chosen.token_id("b")]
    assert chosen.decode(ids) == "ab"
    assert chosen.decode(ids, skip_special_tokens=False) == f"a{CLOSE}b"


@pytest.mark.parametrize("method", ["encode", "encode_spans", "quote"])
def test_half_of_a_surrogate_pair_is_refused(tokenizer, method):
    for code in (0xD800, 0xDFFF):
        with pytest.raises(DataError, match=rf"^the text has U\+{code:X}, .*which is not a character$"):
            getattr(tokenizer(), method)(f"a{chr(code)}b")
    assert getattr(tokenizer(), method)("\ud7ff\ue000😀")


def test_nothing_is_cut_or_padded_whatever_the_file_says(directory):
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.enable_truncation(5)
    backend.enable_padding(length=9)
    backend.save(str(directory / "tokenizer.json"))
    assert len(backend.encode("x").ids) == 9
    tokenizer = ml.load_tokenizer(directory)
    assert len(tokenizer.encode("x" * 50)) > 9
    assert len(tokenizer.encode("x")) == 1


def test_the_length_is_the_number_of_tokens(chosen, tmp_path):
    chosen.save(tmp_path)
    assert len(chosen) == len(json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))["model"]["vocab"])
    assert chosen.token_id("no such token") is chosen.token_id(None) is None


spaced = st.text(st.sampled_from("ab  \n\té漢🙂́"), max_size=20)  # an accent that combines too


@example(text=" ", add_special_tokens=True)
@given(text=st.text(max_size=30) | spaced, add_special_tokens=st.booleans())
def test_spans_cover_every_character_in_order(chosen, text, add_special_tokens):
    ids, spans = chosen.encode_spans(text, add_special_tokens)
    assert ids == chosen.encode(text, add_special_tokens)
    assert len(spans) == len(ids)
    reached = 0
    for begin, end in spans:
        assert begin <= reached <= end  # no gap; only a character of several tokens is in several spans
        reached = end
    assert reached == len(text)


@given(text=st.text(st.sampled_from("ab ,.\n\t019"), max_size=30))
def test_a_token_is_the_text_of_its_span(chosen, text):
    for token, (begin, end) in zip(*chosen.encode_spans(text, add_special_tokens=False), strict=True):
        assert chosen.decode([token]) == text[begin:end]


def test_spans_of_characters_of_several_tokens_of_added_tokens_and_of_white_space(chosen, tokenizer, tmp_path):
    ids, spans = chosen.encode_spans("a𝄞b", add_special_tokens=False)
    assert len(ids) == 6  # four bytes, none of which were merged in training
    assert spans == [(0, 1), *[(1, 2)] * 4, (2, 3)]
    ids, spans = tokenizer(post="bos").encode_spans("a<|im_end|>b")  # a token that is not from the text has none
    assert (ids[0], ids[2]) == (SPECIAL.index(BOS), SPECIAL.index(CLOSE))
    assert spans == [(0, 0), (0, 1), (1, 11), (11, 12)]
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # which is no token, and belongs to the one after it
    backend.save(str(tmp_path / "tokenizer.json"))
    assert ml.load_tokenizer(tmp_path).encode_spans(" a  b") == ([0, 1], [(0, 2), (2, 5)])


def test_special_tokens_are_text_or_objects_and_the_newer_file_overrides(directory):
    added = {"content": EOS, "lstrip": False, "special": True}
    config = {"bos_token": BOS, "eos_token": added, "pad_token": None, "added_tokens_decoder": {}}
    tokenizer = ml.load_tokenizer(write(directory, tokenizer_config=config))
    assert tokenizer.special_tokens == {"bos_token": BOS, "eos_token": EOS}
    assert tokenizer.eos_id == 1
    older = {"eos_token": BOS, "pad_token": {"content": CLOSE}}
    write(directory, special_tokens_map=older, tokenizer_config={"eos_token": EOS})
    assert ml.load_tokenizer(directory).special_tokens == {"eos_token": EOS, "pad_token": CLOSE}


@pytest.mark.parametrize(
    ("generation", "model", "eos", "stops", "closes"),
    [
        (None, None, None, set(), None),
        (None, None, EOS, {1}, 1),
        (None, {"eos_token_id": 2}, EOS, {1, 2}, 1),
        ({"eos_token_id": [2, 3]}, {"eos_token_id": 0}, EOS, {0, 1, 2, 3}, 1),
        ({"eos_token_id": [3, 2]}, {"eos_token_id": 0}, None, {0, 2, 3}, 3),
        (None, {"eos_token_id": 2}, None, {2}, 2),
        ({"eos_token_id": []}, {}, "no such token", set(), None),
    ],
)
def test_every_token_that_any_file_names_stops_and_one_closes(directory, generation, model, eos, stops, closes):
    files = {"generation_config": generation, "config": model, "tokenizer_config": {"eos_token": eos}}
    tokenizer = ml.load_tokenizer(write(directory, **{name: file for name, file in files.items() if file is not None}))
    assert tokenizer.stop_ids == stops
    assert tokenizer.eos_id == closes


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (CHATML, [EOS, CLOSE]),
        ("{% for m in messages %}{{ m.content[0].text }}\n<|im_end|>{% endfor %}", [EOS, CLOSE]),
        (GEMMA, [EOS]),  # which ends an answer with what is no token here
        ("{{ raise_exception('no') }}", [EOS]),
    ],
)
def test_what_a_template_ends_an_answer_with_stops_also_if_no_file_names_it(tokenizer, template, ends):
    assert tokenizer(template=template).stop_ids == {*map(SPECIAL.index, ends)}


HI = [{"role": "user", "content": "hi"}]


def test_a_template_comes_from_its_own_file_or_from_the_config(directory):
    for template in (None, [{"name": "rag", "template": "a"}], [], 3, ["default"]):
        tokenizer = ml.load_tokenizer(write(directory, tokenizer_config={"chat_template": template}))
        assert tokenizer.template is None
        with pytest.raises(DataError, match="no chat template"):
            tokenizer.render(HI)
    for config, file, expected in (
        ("old {{ eos_token }}", None, f"old {EOS}"),
        ([{"name": "rag", "template": "a"}, {"name": "default", "template": "b"}], None, "b"),
        ("old", "new", "new"),
    ):
        write(directory, tokenizer_config={"chat_template": config, "eos_token": EOS})
        write(directory, **({"chat_template": file} if file else {}))
        assert ml.load_tokenizer(directory).render(HI) == expected


def test_saving_writes_the_files_it_was_read_from(directory, tmp_path):
    write(directory, special_tokens_map={}, generation_config={"eos_token_id": 2}, config={"eos_token_id": 3})
    write(directory, chat_template="ü {{ messages[0].content }}")
    tokenizer = ml.load_tokenizer(directory)
    tokenizer.save(tmp_path / "copy")
    written = {file.name: file.read_bytes() for file in (tmp_path / "copy").iterdir()}
    names = {file.name for file in directory.iterdir()} - {"config.json"}  # which belongs to the model
    assert written == {name: (directory / name).read_bytes() for name in names}
    assert len(names) == 5
    copy = ml.load_tokenizer(tmp_path / "copy")
    assert copy.render(HI) == tokenizer.render(HI) == "ü hi"
    assert copy.encode("hi") == tokenizer.encode("hi")


def test_other_files_do_not_replace_the_tokens(tokenizer):
    with pytest.raises(ml.ConfigError, match=r"keeps tokenizer\.json"):
        tokenizer().with_files({"tokenizer.json": "{}"})


def test_a_file_is_in_memory_once_as_its_bytes_also_with_other_templates(tmp_path):
    """As text, the one character beyond 16 bits would make four bytes of each."""
    vocabulary = {f"one of many tokens {i}": i for i in range(50_000)} | {"🙂": 50_000}
    tokenizers.Tokenizer(models.WordLevel(vocabulary)).save(str(tmp_path / "tokenizer.json"), pretty=False)
    size = (tmp_path / "tokenizer.json").stat().st_size
    ml.load_tokenizer(tmp_path).with_files({"chat_template.jinja": "{{ messages }}"})  # imports what it needs
    tracemalloc.start()
    tokenizer = ml.load_tokenizer(tmp_path).with_files({"chat_template.jinja": "{{ messages }}"})
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(tokenizer) == len(vocabulary)
    assert kept < 1.1 * size
    assert most < 2.1 * size


def test_what_is_no_tokenizer_is_refused_with_its_name(directory, tmp_path):
    with pytest.raises(FormatError, match=r"there is no tokenizer\.json"):
        ml.load_tokenizer(tmp_path)
    with pytest.raises(FormatError, match="no such directory"):
        ml.load_tokenizer(tmp_path / "none")
    for content in ("", "[]", "{}", '{"model": {"type": "BPE"}}', "\0"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(FormatError, match=r"tokenizer\.json: "):
            ml.load_tokenizer(tmp_path)
    for name in ("config", "generation_config", "special_tokens_map", "tokenizer_config"):
        with pytest.raises(FormatError, match=f"{name}.json: found a JSON list"):
            ml.load_tokenizer(write(directory, **{name: []}))
        (directory / f"{name}.json").unlink()


def test_a_chat_template_with_a_mistake_is_named_by_its_file(directory, tmp_path):
    mistake, whole = "{% if %}", ml.load_tokenizer(directory)
    adapter = write(write_adapter(tiny_model(), tmp_path / "adapter"), chat_template=mistake)
    style = write(tmp_path, own=mistake) / "own.jinja"

    def named(where):
        return pytest.raises(FormatError, match=f"^{where}: chat template: Expected an expression")

    with named(adapter):
        tokenizer_of(str(directory), [adapter])
    with named(style):
        with_prompt_style(whole, str(style))
    with named(directory / "tokenizer_config.json"):
        ml.load_tokenizer(write(directory, tokenizer_config={"chat_template": mistake}))
    with named(directory / "chat_template.jinja"):
        ml.load_tokenizer(write(directory, chat_template=mistake))
