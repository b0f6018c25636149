"""Classifiers: the head reads what it should, padding and neighbours change nothing, and labels survive the file."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import minilora as ml
from minilora.adapters.attach import linear_layers
from minilora.adapters.copies import TrainedCopy
from minilora.durable import write_json
from minilora.models.classifier import Classifier, classifier_config, load_classifier
from minilora.storage import read_json
from minilora.testing.compare import assert_maths
from tests import reference_model
from tests.files import same_state
from tests.models import (
    document_lengths,
    examples,
    families,
    fill_,
    layouts,
    long,
    seeds,
    tiny_config,
    tiny_model,
    token_ids,
)

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
    scores = reference_model.decoder_logits(tensors, model.config, document.tolist(), rotation)
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
@layouts
def test_what_was_saved_loads_bit_for_bit_with_its_labels(unit, family, tmp_path):
    model = tiny_classifier(unit, family, dtype=torch.float32)
    ml.save_model(model, tmp_path, shard_bytes=9_000)
    loaded = load_classifier(tmp_path)
    same_state(loaded, model)
    assert (loaded.unit, loaded.labels, loaded.name_or_path) == (unit, tuple(LABELS), str(tmp_path))
    assert not loaded.training
    ml.attach(loaded, ml.LoraConfig(r=2))  # all linears; the head in full, without being told that it is a classifier
    assert "score" in linear_layers(loaded)
    assert isinstance(loaded.score, TrainedCopy)


@units
def test_config_json_says_what_transformers_would(unit, tmp_path):
    more = {"problem_type": "single_label_classification"} if unit == "sequence" else {}
    model = tiny_classifier(unit, "smollm3", architectures=["SmolLM3ForCausalLM"])
    ml.save_model(model, tmp_path)
    expected = {
        **model.config.source,
        **more,
        "architectures": [f"SmolLM3For{unit.title()}Classification"],
        "dtype": "float64",
    }
    expected |= {"id2label": {"0": "bad", "1": "good", "2": "so so"}, "label2id": {"bad": 0, "good": 1, "so so": 2}}
    assert read_json(tmp_path / "config.json") == expected
    assert not any(name.startswith("lm_head") for name in load_file(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    ("unit", "family"),  # with a head of its own, with a tied one
    [("sequence", "llama"), ("token", "qwen2"), *long(("sequence", "qwen2"), ("token", "llama"))],
)
def test_a_language_model_gives_its_trunk_and_the_seed_the_head(unit, family, tmp_path):
    base, labels = tiny_model(family, dtype=torch.float32), [str(i) for i in range(1000)]
    ml.save_model(base, tmp_path)
    model, same, other = (load_classifier(tmp_path, unit, labels, seed=seed) for seed in (3, 3, 4))
    same_state(model.model, base.model)
    same_state(model, same)
    assert (model.labels, model.name_or_path, model.training) == (tuple(labels), str(tmp_path), False)
    weight, bias = model.score.weight, model.score.bias
    assert not torch.equal(weight, other.score.weight)
    assert abs(weight.mean().item()) < 6 * 0.02 / weight.numel() ** 0.5
    assert abs(weight.std().item() / 0.02 - 1) < 6 / (2 * weight.numel()) ** 0.5
    assert bias is None if unit == "sequence" else not bias.any()


NO_CLASSIFIER = "is not a classifier; give unit and labels"
ANOTHER = "gives each sequence one of ['bad', 'good', 'so so']; asked for is one that gives each"


def test_a_classifier_that_cannot_be_is_refused(tmp_path):
    ml.save_model(tiny_model(), tmp_path / "model")
    ml.save_model(tiny_classifier("sequence"), tmp_path / "classifier")
    for directory, unit, labels, message in (
        ("model", None, (), NO_CLASSIFIER),
        ("model", "token", (), NO_CLASSIFIER),
        ("model", None, LABELS, NO_CLASSIFIER),
        ("model", "token", ["one"], "labels: found ['one'], need at least two different"),
        ("model", "token", ["a", "b", "a"], "labels: found ['a', 'b', 'a'], need at least two different"),
        ("classifier", "token", (), f"{ANOTHER} token"),
        ("classifier", None, ["bad", "awful"], f"{ANOTHER} sequence one of ['bad', 'awful']"),
    ):
        with pytest.raises(ml.ConfigError, match=re.escape(message)):
            load_classifier(tmp_path / directory, unit, labels)


def test_a_classifier_keeps_the_order_of_its_labels_and_is_no_language_model(tmp_path):
    ml.save_model(tiny_classifier("sequence"), tmp_path)
    assert load_classifier(tmp_path, "sequence", ["so so", "bad"]).labels == tuple(LABELS)
    with pytest.raises(ml.ConfigError, match="is a classifier, which load_classifier reads"):
        ml.load_model(tmp_path)


def test_labels_in_a_file_that_cannot_be_are_refused_and_none_are_the_two_that_transformers_does_not_write(tmp_path):
    ml.save_model(tiny_classifier("sequence"), tmp_path)
    config = read_json(tmp_path / "config.json")
    for named in (["a", "b"], {"0": "a", "2": "b"}, {"0": "a"}, {"0": "a", "1": "a"}, {"0": 1, "1": 2}):
        write_json(tmp_path / "config.json", {**config, "id2label": named})
        with pytest.raises(ml.ConfigError, match="id2label: found"):
            load_classifier(tmp_path)
    write_json(tmp_path / "config.json", {**config, "id2label": {"0": "bad", "1": "good"}})
    with pytest.raises(ml.FormatError, match=r"score\.weight is \(3, 24\), the config asks for \(2, 24\)"):
        load_classifier(tmp_path)
    ml.save_model(tiny_classifier("sequence", labels=["LABEL_0", "LABEL_1"]), tmp_path)
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", {key: config[key] for key in config if key not in ("id2label", "label2id")})
    assert load_classifier(tmp_path).labels == ("LABEL_0", "LABEL_1")
