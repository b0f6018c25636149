"""Classifiers on the command line: trained by finetune, measured by eval, and refused by what writes text."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file

import minilora as ml
from minilora.adapters.layout import classes_of
from minilora.cli.evaluate import confusion_table
from minilora.cli.load import MERGED
from minilora.models.classifier import load_classifier
from minilora.nf4 import NF4Linear
from minilora.runs.encoders import encode_classes, find_labels
from minilora.runs.evaluate import class_scores, evaluate_classes
from minilora.runs.formats import Row
from minilora.runs.inputs import stream_rows
from minilora.storage import ASSETS, BUILTIN, read_json
from minilora.tools.inspect import adapter_facts, model_facts
from tests.files import edit, same_state, save_file
from tests.models import long, perturb_, tiny_model
from tests.runs import contents
from tests.test_classifier import tiny_classifier
from tests.text import write_tokenizer

LABELS = ("no", "so so", "yes")
TASKS = {"SEQ_CLS": "sequence", "TOKEN_CLS": "token"}
SIZES = {"dtype": torch.float32, "vocab_size": 400, "num_hidden_layers": 1}
FINETUNE = "finetune --out out --data SEQ_CLS.jsonl"
tasks = pytest.mark.parametrize("task", TASKS)


def write_classes(path, task, count, labels=LABELS):
    """Rows of random words with random labels."""
    draw, rows = random.Random(count), []
    for _ in range(count):
        words = draw.choices(["the", "cat", "sea", "town"], k=draw.randint(1, 4))
        if task == "SEQ_CLS":
            rows.append({"text": " ".join(words), "label": draw.choice(labels)})
        else:
            rows.append({"tokens": words, "labels": draw.choices(labels, k=len(words))})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A language model, a classifier, and for each task rows and an adapter of the model."""
    directory = tmp_path_factory.mktemp("classes")
    tokenizer = write_tokenizer(directory / "model")
    ml.save_model(tiny_model(**SIZES), directory / "model", tokenizer)
    classifier = tiny_classifier("sequence", labels=LABELS, **SIZES)
    ml.save_model(classifier, directory / "classifier", tokenizer)
    for task, unit in TASKS.items():
        model = load_classifier(directory / "model", unit, LABELS)
        ml.attach(model, ml.LoraConfig(r=3, lora_alpha=6, task_type=task))
        perturb_(model)
        ml.save_adapter(model, directory / task)
        write_classes(directory / f"{task}.jsonl", task, 16)
    return directory


def measured(directory, model, data):
    """What is found in Python of a classifier."""
    rows = list(stream_rows(directory / data))
    tokenizer = ml.load_tokenizer(directory / "model")
    return evaluate_classes(model, encode_classes(rows, tokenizer, ml.DataConfig(), model.unit, model.labels))


def with_adapter(directory, task):
    """The model as eval should find it: the head of another seed is the adapter's own again."""
    model = load_classifier(directory / "model", TASKS[task], LABELS, seed=7)
    ml.load_adapter(model, directory / task)
    return model


# --- eval ---


@tasks
def test_eval_finds_task_and_labels_in_the_adapter_and_tells_all_scores(directory, run, task):
    out, err = run("eval", f"--adapter={task}", f"--data={task}.jsonl")
    expected = measured(directory, with_adapter(directory, task), f"{task}.jsonl")
    counts = {"rows": 16, "truncated": 0, "unlabelled": 0}
    assert json.loads(out) == {"metric": "accuracy", "value": expected.accuracy, **expected.record(), **counts}
    assert err == confusion_table(expected.class_scores, 80) + "\n"
    assert tuple(expected.class_scores["classes"]) == LABELS


def test_eval_measures_a_classifier_by_itself_and_counts_and_says_the_rows_that_it_skips(directory, run, tmp_path):
    rows = (directory / "SEQ_CLS.jsonl").read_text() + '{"text": "the cat", "label": "maybe"}\n'
    (tmp_path / "rows.jsonl").write_text(rows)
    words = ["eval", "--model=classifier", f"--data={tmp_path / 'rows.jsonl'}", "--metric=nll"]
    assert "rows.jsonl:17: label: found 'maybe'" in run(*words, status=1).err
    out, err = run(*words, "--skip-bad-rows")
    found, expected = json.loads(out), measured(directory, load_classifier(directory / "classifier"), "SEQ_CLS.jsonl")
    assert (found["value"], found["accuracy"]) == (expected.loss, expected.accuracy)
    assert (found["metric"], found["rows"], found["bad"]) == ("nll", 16, 1)
    assert "1 rows cannot be used" in err


def test_what_does_not_go_with_a_classifier_is_refused(run):
    for words, message in (
        ("eval --adapter SEQ_CLS --data SEQ_CLS.jsonl --metric choice", "metrics are accuracy, nll"),
        ("eval --model model --data SEQ_CLS.jsonl --metric accuracy", "nll, choice, exact-match"),
        ("eval --model model --adapter SEQ_CLS --data TOKEN_CLS.jsonl", "text: found None"),
        ("generate --adapter SEQ_CLS --prompt a", "SEQ_CLS: is a classifier, which `minilora eval`"),
        ("generate --model classifier --prompt a", "classifier: is a classifier, which `minilora eval`"),
        ("chat --adapter TOKEN_CLS", "TOKEN_CLS: is a classifier, which `minilora eval`"),
        ("merge --adapter SEQ_CLS --adapter TOKEN_CLS --out out", "are for different tasks"),
        (f"{FINETUNE} --model model --task SEQ_2_SEQ_LM", "SEQ_2_SEQ_LM: accepted are CAUSAL_LM, SEQ_CLS, TOKEN_CLS"),
        (f"{FINETUNE} --task CAUSAL_LM --model classifier", "classifier: is a classifier; give --task SEQ_CLS"),
        (f"{FINETUNE} --task TOKEN_CLS --model classifier", "classifier: is a classifier; give --task SEQ_CLS"),
        (f"{FINETUNE} --model model --task SEQ_CLS --general-data SEQ_CLS.jsonl", "--general-data: without effect on"),
        (f"{FINETUNE} --model model --task SEQ_CLS --train-on all", "train_on: without effect where rows have classes"),
        (f"{FINETUNE} --model model --task TOKEN_CLS", "SEQ_CLS.jsonl:1: tokens: found None, need a list"),
    ):
        assert message in run(*words.split(), status=1).err


# --- what the adapter says of itself ---


def test_an_adapter_names_its_task_and_labels_or_has_as_many_as_its_head(directory, tmp_path):
    assert [classes_of(directory / task) for task in TASKS] == [(unit, LABELS) for unit in TASKS.values()]
    model = with_adapter(directory, "SEQ_CLS")
    model.labels = ()
    ml.save_adapter(model, tmp_path)
    assert classes_of(tmp_path) == ("sequence", ("LABEL_0", "LABEL_1", "LABEL_2"))


def test_labels_that_cannot_be_are_refused_and_an_adapter_without_a_head_unless_it_is_of_another_task(
    directory, tmp_path
):
    shutil.copytree(directory / "SEQ_CLS", tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    for labels in ("3", '["a"]', '["a", 1]', "no"):
        save_file(tensors, weights, {"labels": labels})
        with pytest.raises(ml.FormatError, match="metadata labels: found"):
            classes_of(tmp_path)
    save_file({name: tensor for name, tensor in tensors.items() if "score" not in name}, weights)
    with pytest.raises(ml.FormatError, match=r"there is no base_model\.model\.score\.weight"):
        classes_of(tmp_path)
    edit(tmp_path, task_type="CAUSAL_LM")
    assert classes_of(tmp_path) == (None, ())


# --- finetune ---


@pytest.fixture
def finetune(run, tmp_path):
    """Train a classifier of the task on a base and rows; what is printed."""

    def finetune(task="SEQ_CLS", status=0, **flags):
        flags = {"learning_rate": 0.01, "batch_size": 4, "epochs": 1, "eval_split": 0.25, "task": task} | flags
        flags = {"out": tmp_path / "run", "model": "model", "data": f"{task}.jsonl"} | flags
        return run("finetune", "--force", *(f"--{name}={value}" for name, value in flags.items()), status=status)

    return finetune


@tasks
def test_finetune_trains_adapter_and_head_and_eval_agrees_with_its_summary(directory, run, finetune, tmp_path, task):
    (tmp_path / "data").mkdir()
    write_classes(tmp_path / "data" / "test.jsonl", task, 9)
    shutil.copy(directory / f"{task}.jsonl", tmp_path / "data" / "train.jsonl")
    table = finetune(task, data=tmp_path / "data").out.splitlines()
    assert table[0].split() == ["held-out", "loss", "accuracy", "macro", "F1"]
    config, summary = (read_json(tmp_path / "run" / name) for name in ("adapter_config.json", "summary.json"))
    assert (config["task_type"], config["modules_to_save"], summary["general"]) == (task, ["score"], None)
    assert [line.split() for line in table[1:3]] == [
        [name, *(f"{summary[when][key]:.4f}" for key in ("loss", "accuracy", "macro_f1"))]
        for name, when in (("base", "before"), ("adapter", "after"))
    ]
    fresh = load_classifier(directory / "model", TASKS[task], LABELS)
    assert summary["before"] == measured(directory, fresh, tmp_path / "data" / "test.jsonl").record()
    found = json.loads(run("eval", f"--adapter={tmp_path / 'run'}", f"--data={tmp_path / 'data'}").out)
    assert {key: found[key] for key in summary["after"]} == summary["after"] != summary["before"]
    ml.load_adapter(fresh, tmp_path / "run")
    assert not torch.equal(fresh.score.current().weight, fresh.score.base.weight)


def test_a_classifier_is_trained_further_with_its_own_labels_and_in_full_if_asked(directory, finetune, tmp_path):
    shown = tiny_classifier("sequence", labels=("yes", "no", "maybe", "so so"), **SIZES)
    ml.save_model(shown, tmp_path / "model", ml.load_tokenizer(directory / "model"))
    finetune(out=tmp_path / "adapter", model=tmp_path / "model")
    assert classes_of(tmp_path / "adapter") == ("sequence", shown.labels)
    finetune(out=tmp_path / "full", model=tmp_path / "model", method="full")
    full = load_classifier(tmp_path / "full")
    assert full.labels == shown.labels
    assert not any(torch.equal(p, full.get_parameter(name)) for name, p in shown.named_parameters() if p.dim() > 1)


def test_a_dry_run_shows_the_class_of_each_word(run, finetune, tmp_path):
    rows = [{"tokens": ["the", "cat"], "labels": ["yes", "no"]}] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    finetune("TOKEN_CLS", data=tmp_path / "rows.jsonl", max_steps=1)
    shown = run("finetune", f"--config={tmp_path / 'run' / 'run.json'}", "--dry-run").out
    assert "⟦the = yes⟧⟦ cat = no⟧" in shown


def test_a_classifier_that_is_stopped_goes_on_to_the_same_bytes(directory, tmp_path):
    rows = list(stream_rows(directory / "SEQ_CLS.jsonl"))
    tokenizer, config = ml.load_tokenizer(directory / "model"), ml.TrainConfig(learning_rate=0.01, save_steps=1)
    examples = encode_classes(rows, tokenizer, ml.DataConfig(), "sequence", LABELS)
    for out, stop in (("whole", None), ("parts", 2), ("parts", None)):
        model = load_classifier(directory / "model", "sequence", LABELS)
        ml.attach(model, ml.LoraConfig(r=2, lora_dropout=0.2, task_type="SEQ_CLS"))
        ml.train(model, examples, config, lambda record, stop=stop: record["step"] == stop, (), tmp_path / out)
        ml.save_adapter(model, tmp_path / out)
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")


@pytest.mark.long
def test_the_categories_of_the_built_in_data_are_learned_as_classes():
    def rows(split):
        found = list(stream_rows(ASSETS / "data" / f"{split}.jsonl"))
        return [Row({"text": row.fields["prompt"], "label": row.fields["completion"]}) for row in found]

    train, tokenizer, config = rows("train"), ml.load_tokenizer(BUILTIN), ml.DataConfig()
    labels = find_labels(train, "sequence", config)
    learned, held = (encode_classes(some, tokenizer, config, "sequence", labels) for some in (train, rows("valid")))
    model = load_classifier(BUILTIN, "sequence", labels)
    ml.attach(model, ml.LoraConfig(r=8, target_modules=("q_proj", "v_proj", "down_proj"), task_type="SEQ_CLS"))
    ml.train(model, learned, ml.TrainConfig(learning_rate=2e-3, batch_size=16, max_steps=40))
    found = evaluate_classes(model, held[:200])
    assert len(labels) == 8
    assert min(found.accuracy, found.class_scores["macro_f1"]) > 0.6  # chance is 0.125


# --- quantize, inspect ---


def test_a_classifier_is_quantized_all_but_its_head_and_inspect_finds_nothing_wrong_with_it_or_its_adapters(
    directory, run, tmp_path
):
    run("quantize", "--model=classifier", f"--out={tmp_path}")
    model = load_classifier(tmp_path)
    same_state(model, load_classifier(directory / "classifier", quantize="nf4"))
    assert [type(linear) for linear in (model.score, model.model.layers[0].mlp.up_proj)] == [torch.nn.Linear, NF4Linear]
    facts = model_facts(tmp_path)
    assert facts["problems"] == []
    assert facts["config"]["quantization_config"]["llm_int8_skip_modules"] == ["score"]
    assert not [task for task in TASKS if adapter_facts(directory / task, directory / "model")["problems"]]


# --- merge ---


@pytest.mark.parametrize(
    ("task", "base"),
    [
        ("SEQ_CLS", "qwen2"),
        ("TOKEN_CLS", "llama"),
        ("SEQ_CLS", "classifier"),
        *long(("SEQ_CLS", "llama"), ("TOKEN_CLS", "qwen2")),
    ],
)  # a language model with a head of its own, with a tied one; and a classifier
def test_a_merged_classifier_is_written_as_merging_in_memory_writes_it(directory, run, task, base, tmp_path):
    path = directory / base
    if base != "classifier":
        path = tmp_path / "base"
        ml.save_model(tiny_model(base, **SIZES), path, write_tokenizer(path))
    model = load_classifier(path, TASKS[task], LABELS)
    ml.attach(model, ml.LoraConfig(r=3, lora_alpha=6, task_type=task))
    perturb_(model)
    ml.save_adapter(model, tmp_path / "adapter")
    assert "merged model written" in run("merge", f"--adapter={tmp_path / 'adapter'}", f"--out={tmp_path / 'out'}").out
    ml.merge(model)
    ml.save_model(model, tmp_path / "expected")
    written, expected = (read_json(tmp_path / name / "config.json") for name in ("out", "expected"))
    assert [entry["name"] for entry in written.pop(MERGED)] == ["adapter"]
    assert written == expected
    names = ("model.safetensors",)
    assert contents(tmp_path / "out", names) == contents(tmp_path / "expected", names)


# --- the table ---


TABLE = """\
true/predicted  0   1  precision  recall     F1  count
0 no            9   1      1.000   0.900  0.947     10
1 漢字          0  12      0.923   1.000  0.960     12"""
SCORES = """\
class   precision  recall     F1  count
0 no        1.000   0.900  0.947     10
1 漢字      0.923   1.000  0.960     12
0 no predicted as 1 漢字: 1"""


@pytest.mark.parametrize(("width", "expected"), [(54, TABLE), (53, SCORES)])
def test_the_table_shows_what_was_taken_for_what_where_there_is_room(width, expected):
    assert confusion_table(class_scores(((9, 1), (0, 12)), ("no", "漢字")), width) == expected
