"""Classifiers: the head reads what it should, padding and neighbours change nothing, and labels survive the file."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import minilora as ml
from minilora.adapters.copies import TrainedCopy
from minilora.adapters.find import linear_layers
from minilora.models.classifier import Classifier, classifier_config, load_classifier, with_new_head
from minilora.quant.linear import NF4Linear
from minilora.storage import read_json, write_json
from minilora.testing import reference
from tests.files import same_state
from tests.models import document_lengths, examples, families, fill_, layouts, seeds, tiny_config, tiny_model, token_ids
from tests.tolerance import assert_maths

LABELS = ["bad", "good", "so so"]
CPU = torch.device("cpu")
units = pytest.mark.parametrize("unit", ["sequence", "token"])
few = examples(0.2)


def tiny_classifier(unit, family="llama", seed=0, dtype=torch.float64, labels=LABELS, **changes):
    """A random classifier, as `tiny_model`."""
    model = Classifier(classifier_config(tiny_config(family, **changes), unit, labels)).to(dtype).eval()
    fill_(model, seed)
    return model


def padded(tokens, lengths, extra=0):
    """Rows of one width; padding is any token."""
    rows = token_ids(9, len(lengths), max(lengths) + extra)
    for row, part in zip(rows, tokens.split(lengths), strict=True):
        row[: len(part)] = part
    return rows


def expected_scores(model, document):
    """Those of every token, by the oracle, to which the head is a vocabulary."""
    tensors = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    rotation = [table.numpy() for table in model.config.rope.rotation([range(len(document))], CPU)]
    tensors["lm_head.weight"] = tensors["score.weight"]
    scores = reference.decoder_logits(tensors, model.config, document.tolist(), rotation)
    return torch.from_numpy(scores + tensors.get("score.bias", 0))


@families
@few
@given(seeds, document_lengths, st.integers(0, 5))
def test_scores_are_the_oracle_s_whatever_pads_a_sequence(family, seed, lengths, extra):
    """Those of its last token, or of every token; padding has none."""
    tokens = token_ids(seed, sum(lengths))
    documents, rows = tokens.split(lengths), padded(tokens, lengths, extra)
    model = tiny_classifier("sequence", family, seed)
    assert_maths(model(rows, lengths), torch.stack([expected_scores(model, part)[-1] for part in documents]))
    model = tiny_classifier("token", family, seed)
    scores = model(rows, lengths)
    assert scores.shape == (len(lengths), max(lengths) + extra, len(LABELS))
    for row, part in zip(scores, documents, strict=True):
        assert_maths(row[: len(part)], expected_scores(model, part))
        assert not row[len(part) :].any()


@units
def test_input_that_does_not_fit_is_refused(unit):
    model = tiny_classifier(unit)
    for ids, lengths in ((token_ids(0, 3), None), (token_ids(0, 2, 3), [3]), (token_ids(0, 2, 3), [3, 4])):
        with pytest.raises(ml.ShapeError):
            model(ids, lengths)


@units
def test_all_linear_trains_the_head_in_full(unit):
    model = tiny_classifier(unit)
    ml.attach(model, ml.LoraConfig(r=2))
    assert "score" in linear_layers(model)
    assert isinstance(model.score, TrainedCopy)  # without being told that it is a classifier


@units
@layouts
def test_what_was_saved_loads_bit_for_bit_with_its_labels(unit, family, tmp_path):
    model = tiny_classifier(unit, family, dtype=torch.float32)
    ml.save_model(model, tmp_path, shard_bytes=9_000)
    loaded = load_classifier(tmp_path)
    same_state(loaded, model)
    assert (loaded.unit, loaded.labels) == (unit, tuple(LABELS))
    assert loaded.name_or_path == str(tmp_path)
    assert not loaded.training


@pytest.mark.parametrize(
    ("unit", "ending", "more"),
    [
        ("sequence", "ForSequenceClassification", {"problem_type": "single_label_classification"}),
        ("token", "ForTokenClassification", {}),
    ],
)
def test_config_json_says_what_transformers_would(unit, ending, more, tmp_path):
    model = tiny_classifier(unit, "smollm3", architectures=["SmolLM3ForCausalLM"])
    ml.save_model(model, tmp_path)
    expected = {**model.config.source, **more, "architectures": [f"SmolLM3{ending}"], "dtype": "float64"}
    expected |= {"id2label": {"0": "bad", "1": "good", "2": "so so"}, "label2id": {"bad": 0, "good": 1, "so so": 2}}
    assert read_json(tmp_path / "config.json") == expected
    assert not any(name.startswith("lm_head") for name in load_file(tmp_path / "model.safetensors"))


@units
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # with a head of its own, with a tied one
def test_a_language_model_gives_its_trunk_and_the_seed_the_head(unit, family, tmp_path):
    base = tiny_model(family, dtype=torch.float32)
    ml.save_model(base, tmp_path)
    model, same, other = (load_classifier(tmp_path, unit, LABELS, seed=seed) for seed in (3, 3, 4))
    same_state(model.model, base.model)
    same_state(model, same)
    assert not torch.equal(model.score.weight, other.score.weight)
    assert (model.score.bias is None) == (unit == "sequence")
    assert model.score.bias is None or not model.score.bias.any()
    assert (model.labels, model.name_or_path, model.training) == (tuple(LABELS), str(tmp_path), False)


def test_a_new_head_is_drawn_with_a_standard_deviation_of_2_percent():
    labels = [str(i) for i in range(1000)]
    weight = with_new_head(tiny_model(dtype=torch.float32), "sequence", labels).score.weight
    n = weight.numel()
    assert abs(weight.mean().item()) < 6 * 0.02 / n**0.5
    assert abs(weight.std().item() / 0.02 - 1) < 6 / (2 * n) ** 0.5


def test_the_head_stays_dense_in_four_bits(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    ml.save_model(tiny_classifier("sequence", dtype=torch.float32, **sizes), tmp_path / "dense")
    model = load_classifier(tmp_path / "dense", quantize="nf4")
    assert type(model.score) is torch.nn.Linear
    assert isinstance(model.model.layers[0].mlp.up_proj, NF4Linear)
    ml.save_model(model, tmp_path / "packed")
    same_state(load_classifier(tmp_path / "packed"), model)


def test_labels_keep_the_order_of_the_head_and_may_be_some_of_its(tmp_path):
    ml.save_model(tiny_classifier("sequence"), tmp_path)
    assert load_classifier(tmp_path, "sequence", ["so so", "bad"]).labels == tuple(LABELS)


def test_a_file_that_names_no_labels_has_the_two_that_transformers_does_not_write(tmp_path):
    ml.save_model(tiny_classifier("sequence", labels=["LABEL_0", "LABEL_1"]), tmp_path)
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", {key: config[key] for key in config if key not in ("id2label", "label2id")})
    assert load_classifier(tmp_path).labels == ("LABEL_0", "LABEL_1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": "token"}, r"gives each sequence one of .*; asked for is one that gives each token"),
        ({"labels": ["bad", "awful"]}, r"gives each sequence one of \['bad', 'good', 'so so'\].* \['bad', 'awful'\]"),
    ],
)
def test_another_classifier_than_there_is_is_refused(options, message, tmp_path):
    ml.save_model(tiny_classifier("sequence"), tmp_path)
    with pytest.raises(ml.ConfigError, match=message):
        load_classifier(tmp_path, **options)


def test_a_new_head_needs_unit_and_labels(tmp_path):
    ml.save_model(tiny_model(), tmp_path)
    for options in ({}, {"unit": "token"}, {"labels": LABELS}):
        with pytest.raises(ml.ConfigError, match="is no classifier; name unit and labels"):
            load_classifier(tmp_path, **options)


@pytest.mark.parametrize("labels", [["one"], ["a", "b", "a"]])
def test_labels_are_at_least_two_different_ones(labels):
    with pytest.raises(ml.ConfigError, match="at least two different"):
        with_new_head(tiny_model(), "sequence", labels)


def test_a_classifier_is_no_language_model_and_is_told_from_one(tmp_path):
    ml.save_model(tiny_classifier("sequence"), tmp_path)
    with pytest.raises(ml.ConfigError, match="is a classifier, which load_classifier reads"):
        ml.load_model(tmp_path)
    with pytest.raises(ml.ConfigError, match="architectures: found None"):
        Classifier(tiny_config())


def test_labels_in_a_file_that_cannot_be_are_refused(tmp_path):
    ml.save_model(tiny_classifier("sequence"), tmp_path)
    config = read_json(tmp_path / "config.json")
    for named in (["a", "b"], {"0": "a", "2": "b"}, {"0": "a"}, {"0": "a", "1": "a"}, {"0": 1, "1": 2}):
        write_json(tmp_path / "config.json", {**config, "id2label": named})
        with pytest.raises(ml.ConfigError, match="id2label: found"):
            load_classifier(tmp_path)
    write_json(tmp_path / "config.json", {**config, "id2label": {"0": "bad", "1": "good"}})
    with pytest.raises(ml.FormatError, match=r"score\.weight is \(3, 24\), the config asks for \(2, 24\)"):
        load_classifier(tmp_path)
