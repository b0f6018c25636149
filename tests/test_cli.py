"""The commands: flags and configuration files, finetune and eval, errors, and progress."""

import dataclasses
import json
import math
import os
import re
import runpy
import shlex
import shutil
import sys
import threading
import time
import types
import typing
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tqdm import tqdm

import minilora as ml
from minilora import cli
from minilora.adapters.config import INITS
from minilora.cli import evaluate, finetune
from minilora.cli.flags import FLAG_NAMES, from_flags
from minilora.files import ASSETS, BUILTIN, read_json
from minilora.runs import inputs
from minilora.runs.encoders import encode_rows
from minilora.runs.evaluate import choice_accuracy, exact_match, find_choices, held_out_loss
from minilora.runs.reports import ProgressBar
from minilora.runs.rows import stream_rows
from minilora.runs.settings import RunConfig
from tests.files import edit, write_adapter
from tests.models import long, tiny_model
from tests.runs import CLASSES, QUICK, contents, everything, flags_of, runner, write_rows
from tests.text import write_tokenizer
from tests.training import adapted, random_rows

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model, an adapter of it, and rows."""
    directory = tmp_path_factory.mktemp("things")
    model = tiny_model(dtype=torch.float32, vocab_size=400, num_hidden_layers=2)
    ml.save_model(model, directory / "model", write_tokenizer(directory / "model"))
    write_adapter(ml.load_model(directory / "model"), directory / "adapter", r=3, lora_alpha=6)
    (directory / "data").mkdir()
    for name, count in (("train", 9), ("test", 16)):
        write_rows(directory / "data" / f"{name}.jsonl", count)
    write_rows(directory / "many.jsonl", 9, choices=[f"{i} sat" for i in range(9)])
    return directory


# --- flags ---


def finetune_parser():
    return cli.command_parser("finetune")


def flag_name(field):
    return FLAG_NAMES.get(field.name, field.name)


def value_of(cls, words=()):
    return from_flags(cls, vars(finetune_parser().parse_args([cli._dashed(word) for word in words])))


def as_text(value):
    """A value as one writes it on the command line."""
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def as_words(config, spell=lambda name: "--" + name.replace("_", "-")):
    """Every field of a configuration as a flag; one that is None or empty is left out."""
    words = []
    for field in dataclasses.fields(config):
        name, value = spell(flag_name(field)), getattr(config, field.name)
        if isinstance(value, bool) and typing.get_type_hints(type(config))[field.name] is bool:
            words.append(name if value else name.replace("--", "--no-", 1))
        elif field.name == "data":
            words += [name, *value]
        elif value not in (None, (), {}):
            words.append(f"{name}={as_text(value)}")
    return words


names = st.sampled_from(["q_proj", "k_proj", "mlp.up_proj", "model.layers.1.self_attn.v_proj"])
several = st.lists(names, min_size=1, max_size=3, unique=True).map(tuple)
patterns = st.sampled_from([r".*\.(q|v)_proj", r"model\.layers\.\d+\.mlp\..*", "q_proj|v_proj"])
positive = st.floats(1e-6, 1e6)
VALUES = {
    bool: st.booleans(),
    int: st.integers(1, 10**6),
    float: positive,
    str: st.text("ab /.", min_size=1),
    tuple[str, ...]: several,
    Mapping[str, str]: st.dictionaries(names, st.text("ab, /.=", min_size=1), min_size=1),
    type(None): st.none(),
}


def configs(cls, **own):
    """A configuration with values of its fields' types, some of them from strategies of their own."""

    def values(hint):
        kinds = typing.get_args(hint)
        if typing.get_origin(hint) is typing.Literal:
            return st.sampled_from(kinds)
        return st.one_of(*map(VALUES.get, kinds)) if typing.get_origin(hint) is types.UnionType else VALUES[hint]

    return st.builds(cls, **({name: values(hint) for name, hint in typing.get_type_hints(cls).items()} | own))


@st.composite
def lora_configs(draw):
    targets = draw(several | patterns | st.just("all-linear"))
    layers = draw(st.none() | st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple))
    layers = None if isinstance(targets, str) else layers
    return ml.LoraConfig(
        r=draw(st.integers(1, 512)),
        lora_alpha=draw(positive),
        lora_dropout=draw(st.floats(0, 0.99)),
        target_modules=targets,
        exclude_modules=draw(st.just(()) | several | patterns),
        layers_to_transform=layers,
        layers_pattern=draw(st.sampled_from([(), ("layers",), ("layers", "blocks")])) if layers else (),
        rank_pattern=draw(st.dictionaries(names | patterns, st.integers(1, 64), max_size=2)),
        alpha_pattern=draw(st.dictionaries(names | patterns, positive, max_size=2)),
        use_rslora=draw(st.booleans()),
        init_lora_weights=draw(st.sampled_from(INITS)),
    )


run_configs = configs(RunConfig, adapter=st.none(), eval_split=st.floats(0, 0.99))
quantize_configs, data_configs = configs(ml.QuantizeConfig), configs(ml.DataConfig)
shares_or_counts = st.floats(0, 0.99) | st.integers(1, 99).map(float)
train_configs = configs(ml.TrainConfig, warmup_steps=shares_or_counts, eval_steps=st.integers(1, 99))


@given(run_configs | quantize_configs | lora_configs() | data_configs | train_configs, st.booleans())
@example(ml.LoraConfig(target_modules=("q", "v"), layers_to_transform=(1, 3), layers_pattern=("h", "layers")), True)
@example(ml.LoraConfig(use_dora=True, use_rslora=True, modules_to_save=("a", "b"), trainable_token_indices=(5,)), True)
@example(ml.LoraConfig(lora_bias=True, bias="all", trainable_token_indices={"a": (3,)}), True)
@example(ml.LoraConfig(exclude_modules=r".*\.0\..*"), True)
def test_every_field_is_a_flag_in_two_spellings_and_survives_the_command_line(config, has_dashes):
    words = as_words(config, (lambda name: "--" + name.replace("_", "-")) if has_dashes else (lambda name: f"--{name}"))
    assert value_of(type(config), words) == config


def test_every_flag_has_the_help_and_the_default_of_its_field():
    page = " ".join(finetune_parser().format_help().split())
    for cls in CLASSES:
        assert value_of(cls) == cls()
        for field in (field for field in dataclasses.fields(cls) if field.name != "task_type"):
            default = getattr(cls(), field.name)
            text = " ".join(default) if isinstance(default, tuple) else default
            shown = f" (default: {text})" if default not in (None, (), {}) else ""
            about = field.metadata["help"]
            for other in ("target_modules", "eval_steps"):  # fields in the docstring, flags on the page
                about = about.replace(other, f"--{other.replace('_', '-')}")
            # a page breaks lines at hyphens as well
            assert f"{about}{shown}".replace(" ", "") in page.replace(" ", "")
            assert f"--{flag_name(field).replace('_', '-')}" in page


def test_names_and_starts_are_spelled_the_same_in_a_file_and_on_the_command_line(tmp_path):
    assert value_of(ml.LoraConfig, ["--lora-r", "5"]) == value_of(ml.LoraConfig, ["--lora_r=5"]) == ml.LoraConfig(r=5)
    assert "r" not in flags_of("finetune")
    columns = {"prompt": "a question", "completion": "answer"}
    assert value_of(ml.DataConfig, ["--columns=prompt=a question, completion=answer"]) == ml.DataConfig(columns=columns)
    for text, value in (("true", True), ("True", True), ("gaussian", "gaussian")):
        assert value_of(ml.LoraConfig, ["--init-lora-weights", text]) == ml.LoraConfig(init_lora_weights=value)
    path = tmp_path / "config.toml"
    path.write_text('model = "model"\ndata = "my data"\ntarget-modules = "q_proj,v_proj"\nmodules-to-save = "a, b"\n')
    run, _, lora, _, _ = resolved(path)
    assert run.data == ("my data",)
    assert lora == ml.LoraConfig(target_modules=("q_proj", "v_proj"), modules_to_save=("a", "b"))


def test_a_command_line_that_cannot_be_meant_is_refused_with_what_to_do(capsys):
    for words, phrase in (
        # a value that the flag does not take
        (["finetune", "--columns", "question"], "found 'question', need name=column, joined with commas"),
        (["finetune", "--rank-pattern", "{"], "found '{', need numbers joined with commas, or a JSON object"),
        # a command that there is not
        (["fintune", "--model=a"], "fintune is not a command; did you mean finetune?\n"),
        (["frobnicate"], "frobnicate is not a command; the commands are finetune, generate, chat, "),
        # a flag that there is not
        (["finetune", "--epoch=2"], "--epoch is unknown; did you mean --epochs?\n"),
        (["finetune", "--zebra", "1"], "--zebra is unknown; see `minilora finetune --help`\n"),
        (["finetune", "--lr", "1"], "--lr is unknown; use --learning-rate\n"),
        (["finetune", "--per_device_train_batch_size=1"], "size is unknown; use --batch-size\n"),
        (["finetune", "--max_seq_length=9"], "--max-seq-length is unknown; use --max-length\n"),
        (["finetune", "--train.micro_batch_size=9"], "size is unknown; use --batch-size\n"),
        (
            ["finetune", "--zebra", "1", "--lr=2"],
            "see `minilora finetune --help`\n--lr is unknown; use --learning-rate\n",
        ),
        (["merge", "--out=a", "--combination-type=svd"], "it is a recipe: see recipes/ties_and_dare.py"),
        (["finetune", "--task_type=seq-cls"], "--task-type is unknown; it is a recipe: see recipes/classify_texts.py"),
        # too much or too little
        (["finetune", "--target-modules", "q_proj", "v_proj"], "'v_proj'; a list is joined with commas"),
        (["finetune", __file__], f"unexpected argument '{__file__}'; did you mean --data {__file__}?\n"),
        (["generate", f"{ROOT}"], f"did you mean --adapter {ROOT}?\n"),
        (["finetune", "--use-dora", "True"], "a switch (--x or --no-x) has no value"),
        (["generate", "--prompt=a", "--prompts=b"], "not allowed with"),
        (["inspect"], "minilora inspect: the following arguments are required: PATH"),
    ):
        with pytest.raises(SystemExit, match=r"^2$"):
            cli.main(words)
        assert phrase in capsys.readouterr().err


def test_flags_of_other_programs_are_not_ours_and_are_answered_with_flags_that_are():
    ours = {f"--{flag.replace('_', '-')}" for command in cli.COMMANDS for flag in flags_of(command)}
    for theirs, advice in cli.FOREIGN_FLAGS.items():
        assert theirs not in ours
        assert set(re.findall(r"--[a-z][a-z-]+", advice)) <= ours, advice
        assert "--" in advice or advice.startswith(("leave it out", "it is a recipe"))


def test_the_help_of_finetune_shows_the_main_flags_and_names_the_page_with_all_of_them(capsys):
    def page(word):
        with pytest.raises(SystemExit, match=r"^0$"):
            cli.main(["finetune", word])
        return capsys.readouterr().out

    def flags(text):
        return set(re.findall(r"^  (?:-h, )?--([a-z-]+)", text, flags=re.MULTILINE))

    short = page("--help")
    assert page("-h") == short
    main = {"model", "data", "out", "lora-r", "dry-run", "help-all", "columns", "system", "skip-bad-rows"}
    assert main <= flags(short) < flags(page("--help-all"))
    assert "`minilora finetune --help-all`" in short.splitlines()[-1]
    example = json.loads((ASSETS / "finetune.json").read_text())  # what the run without flags uses
    for name, value in example.items():
        assert f"--{name.replace('_', '-')} {value}" in short


def test_minilora_alone_is_its_help_page(capsys):
    for words in ([], ["--help"]):
        with pytest.raises(SystemExit, match=r"^0$"):
            cli.main(words)
        assert "finetune" in capsys.readouterr().out


# --- configuration files ---


def resolved(path, *words):
    """The configurations that --config and further flags give."""
    settings = finetune.read_settings(cli.parse(["finetune", f"--config={path}", *words]))
    return settings.run, settings.quantization, settings.lora, settings.data, settings.training


def flat(*configs):
    found = {flag_name(f): getattr(config, f.name) for config in configs for f in dataclasses.fields(config)}
    return {name: value for name, value in found.items() if name != "task_type"}  # which is no flag


def as_toml(values):
    def text(value):
        if isinstance(value, dict):
            return "{" + ", ".join(f"{json.dumps(key)} = {text(inner)}" for key, inner in value.items()) + "}"
        return json.dumps(value)

    return "".join(f"{name} = {text(value)}\n" for name, value in values.items() if value is not None)


@given(
    st.tuples(run_configs, quantize_configs, lora_configs(), data_configs, train_configs),
    st.sampled_from([".toml", ".json", "run.json"]),
    st.booleans(),
)
def test_a_configuration_file_survives(tmp_path_factory, configs, kind, has_dashes):
    values = {name.replace("_", "-" if has_dashes else "_"): value for name, value in flat(*configs).items()}
    path = tmp_path_factory.mktemp("config") / ("run.json" if kind == "run.json" else f"config{kind}")
    written = {"config": values, "versions": {}, "starts": []} if kind == "run.json" else values
    path.write_text(as_toml(values) if kind == ".toml" else json.dumps(written))
    assert resolved(path) == configs


@given(train_configs, st.integers(1, 99), st.sampled_from([1e-5, 0.5]))
def test_flags_go_on_top_of_the_configuration_file(tmp_path_factory, training, batch_size, rate):
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(flat(training)))
    found = resolved(path, "--batch-size", str(batch_size), f"--learning_rate={rate}")
    assert found[-1] == dataclasses.replace(training, batch_size=batch_size, learning_rate=rate)


def test_a_wrong_key_or_a_value_of_the_wrong_type_in_a_configuration_file_is_named(tmp_path, capsys):
    for text, phrase in (
        (
            "lora_r = 2.5\nuse_rslora = 1",
            "minilora: --lora-r is 2.5, need a whole number; --use-rslora is 1, need true or false",
        ),
        ("learning_rate = true", "--learning-rate is True, need a number"),
        ('resume = "maybe"', "--resume is 'maybe'"),
        ("target_modules = [1]", "--target-modules is (1,)"),
        ("lerning_rate = 1", "key 'lerning_rate' is unknown; did you mean learning_rate?"),
        ("config = 1", "key 'config' is unknown; the keys are the flags of `minilora finetune --help-all`"),
        ("seed = ", "not TOML"),
        ("[1]", "config.json: found a JSON list, need an object"),
    ):
        path = tmp_path / ("config.json" if "config.json" in phrase else "config.toml")
        path.write_text(text)
        assert cli.main(["finetune", "--config", str(path), "--out", str(tmp_path / "out")]) == 1
        assert phrase in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


RUN = ("finetune", *QUICK, "--model=model", "--data=data", "--max-steps=2", "--lora-r=2", "--lora-dropout=0.1")


def test_the_run_json_of_a_run_makes_the_same_adapter(directory, run, tmp_path):
    rows, tokenizer = list(stream_rows(directory / "data" / "train.jsonl")), ml.load_tokenizer(directory / "model")
    lengths = sorted(len(encode_rows([row], tokenizer, ml.DataConfig(max_length=99))[0].tokens) for row in rows)
    cut = sum(length > lengths[4] for length in lengths)
    said = run(*RUN, "--seed=5", f"--max-length={lengths[4]}", f"--out={tmp_path / 'one'}").err
    assert f"{cut} training rows were cut to --max-length" in said
    run("finetune", "--force", f"--config={tmp_path / 'one' / 'run.json'}", f"--out={tmp_path / 'two'}")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


# --- finetune ---


def test_finetune_without_flags_learns_the_builtin_data(tmp_path, capsys, monkeypatch):
    read = inputs.stream_rows  # the first rows of each file will do
    monkeypatch.setattr(inputs, "stream_rows", lambda *paths, **options: islice(read(*paths, **options), 48))
    run = runner(tmp_path, capsys, monkeypatch)
    table = run("finetune", "--force", "--max-steps", "3").out.splitlines()
    out = tmp_path / "minilora-run"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["after"]["loss"] < summary["before"]["loss"]
    assert all(0 < summary[when]["accuracy"] < 1 for when in ("before", "after"))
    settings = json.loads((out / "run.json").read_text())["config"]
    builtin = json.loads((ASSETS / "finetune.json").read_text())
    assert {name: settings[name] for name in builtin} == builtin != {n: flat(ml.TrainConfig())[n] for n in builtin}
    assert [line.split() for line in table[1:3]] == [
        [name, f"{summary[when]['loss']:.4f}", f"{summary[when]['accuracy']:.4f}"]
        for name, when in (("base", "before"), ("adapter", "after"))
    ]
    assert table[3].startswith("general text: loss ")


def test_a_run_ends_with_commands_for_what_to_do_next(run):
    said = run("finetune", *QUICK, "--model=model", "--data=data", "--max-steps=1", "--out=a b/").err
    commands = said.partition("next:\n")[2].splitlines()
    assert len(commands) == 2
    for command in commands:
        program, *words = shlex.split(command)
        assert program == "minilora"
        assert cli.parse(words)["adapter"] == ["a b"]


def test_settings_of_the_builtin_example_apply_only_to_it(capsys):
    def settings(*words):
        return finetune.read_settings(cli.parse(["finetune", *words]))

    example = settings()
    assert example.training != ml.TrainConfig()
    for words in (["--data", BUILTIN], ["--model", BUILTIN], ["--model", BUILTIN, "--data", BUILTIN]):
        assert settings(*words) == example
    told = "no --data given: training on the built-in rows"
    assert told not in capsys.readouterr().err
    for words in (["--data=data", "--model", "m"], ["--data", BUILTIN, "--model=m"]):
        assert settings(*words).training == ml.TrainConfig()
    assert told not in capsys.readouterr().err
    assert settings("--model=m") == settings("--data", BUILTIN, "--model=m")
    assert told in capsys.readouterr().err
    with pytest.raises(ml.ConfigError, match="--data needs --model"):
        settings("--data=data")


# --- eval ---


@pytest.mark.parametrize("words", [*long(["--model=model"]), ["--adapter=adapter"]])
def test_eval_prints_one_json_object_with_what_the_library_measures(directory, run, words):
    model, tokenizer = ml.load_model(directory / "model"), ml.load_tokenizer(directory / "model")
    if words == ["--adapter=adapter"]:
        ml.load_adapter(model, directory / "adapter")
    examples = encode_rows(list(stream_rows(directory / "data" / "test.jsonl")), tokenizer, ml.DataConfig())
    expected = {
        "nll": held_out_loss(model, examples),
        "choice": choice_accuracy(model, examples, find_choices(examples)),
        "exact-match": exact_match(model, examples, tokenizer),
    }
    for metric, value in expected.items():
        printed, said = run("eval", *words, "--data=data", "--metric", metric)
        assert json.loads(printed) == {"metric": metric, "value": value, "rows": 16, "truncated": 0, "unlabelled": 0}
        assert (printed.count("\n"), said) == (1, "")
    assert json.loads(run("eval", *words, "--data=data").out)["metric"] == "nll"


def test_a_value_that_is_not_finite_is_null(run, monkeypatch):
    monkeypatch.setattr(evaluate, "held_out_loss", lambda *_: math.nan)
    assert json.loads(run("eval", "--model=model", "--data=data").out)["value"] is None


def test_eval_reads_a_file_as_it_is_and_of_a_directory_the_test_rows_before_others(directory, run, tmp_path):
    file = run("eval", "--model=model", "--data=data/train.jsonl").out
    shutil.copy(directory / "data" / "train.jsonl", tmp_path / "valid.jsonl")
    write_rows(tmp_path / "train.jsonl", 3)
    assert json.loads(file)["rows"] == 9
    assert run("eval", "--model=model", f"--data={tmp_path}").out == file


def test_eval_reads_rows_with_the_settings_of_the_run_or_of_flags(directory, run, tmp_path):
    model = ml.load_model(directory / "model")
    write_adapter(model, tmp_path, r=2)
    (tmp_path / "run.json").write_text(json.dumps({"config": {"train_on": "all", "max_length": 7, "seed": 3}}))
    rows, tokenizer = list(stream_rows(directory / "data" / "test.jsonl")), ml.load_tokenizer(directory / "model")
    for flags, reading in (((), {"train_on": "all", "max_length": 7}), (("--train-on=completion",), {"max_length": 7})):
        expected = held_out_loss(model, encode_rows(rows, tokenizer, ml.DataConfig(**reading)))
        found = json.loads(run("eval", "--model=model", f"--adapter={tmp_path}", "--data=data", *flags).out)
        assert found["value"] == expected


# --- errors ---


def test_an_error_is_one_line_on_stderr_and_the_exit_status_1(directory, run):
    (directory / "lora_r.csv").write_text("Nr,Frage,Antwort\n1,the cat?,sat\n")
    (directory / "rows.xlsx").write_bytes(b"PK\3\4")
    before = everything(directory)
    for words, phrase in (
        ("finetune --model=nowhere --data=data", "minilora: model nowhere: no such directory"),
        ("generate --adapter=nowhere --prompt=a", "minilora: adapter nowhere: no such directory"),
        ("finetune --data=data", "such as HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("finetune --model=model --data=nowhere", "nowhere: no such file or directory"),
        ("finetune --model=model --data=data --target-modules=q_prj", "matches --target-modules 'q_prj'"),
        ("finetune --lora-r=0 --lora-dropout=2", "minilora: --lora-r is 0, need a whole number"),
        ("finetune --lora-r=0 --lora-dropout=2", "; --lora-dropout is 2.0, need"),
        ("finetune --keep=best", "needs --eval-steps"),
        ("finetune --epochs=0 --seed=-1", "; --seed is -1, need a whole number"),
        ("finetune --model=model --data=data --eval-data=many.jsonl", "has a test split already"),
        ("finetune --model=model --data=data --eval-data=many.jsonl", "leave --eval-data out"),
        ("finetune --model=model --data=lora_r.csv", "lora_r.csv:2: found the fields"),
        ("finetune --model=model --data=lora_r.csv", "; give --columns instruction=Frage,output=Antwort,"),
        ("finetune --model=model --data=lora_r.csv", "; --skip-bad-rows skips such rows"),
        ("finetune --model=model --data=lora_r.csv --init-lora-weights=false", "accepted are true, gaussian, pissa"),
        ("finetune --model=model --data=lora_r.csv --columns=text=Frge", ": --columns text=Frge: there is no column"),
        ("finetune --model=model --data=lora_r.csv --columns=text=Frge", "did you mean 'Frage'?; see "),
        ("finetune --model=model --data=rows.xlsx", "not text; save a table as CSV"),
        ("generate --model=data --prompt=a", "data: is not a model: has no config.json; an adapter goes to --adapter"),
        ("finetune --model=model --data=data --device=abacus", "device 'abacus' cannot be used"),
        (
            "finetune --model=model --data=data --max-length=1",
            "an answer within its first 1 tokens; raise --max-length",
        ),
        ("finetune --config=nowhere.toml", "nowhere.toml: cannot be read"),
        ("eval --model=model --data=", "no such file or directory"),
        (
            "merge --adapter=adapter --out=model",
            "model: holds files; give another --out; see docs/deploy.md#as-a-model",
        ),
        ("eval --model=model --data=many.jsonl --metric=choice", "needs 2 to 64 distinct answers"),
    ):
        out, err = run(*words.split(), status=1)
        assert out == ""
        assert err.startswith("minilora: ")
        assert phrase in err, words
        assert err.count("\n") == 1
        assert (ROOT / re.search(r"; see (docs/\w+\.md)(#[\w-]+)?$", err)[1]).is_file(), err
    assert everything(directory) == before


def test_quantized_files_that_cannot_be_read_are_refused_with_what_to_do(directory, run, tmp_path):
    (tmp_path / "a-GGUF").mkdir()
    (tmp_path / "a-GGUF" / "a.gguf").touch()
    for path in (tmp_path / "a-GGUF", tmp_path / "a-GGUF" / "a.gguf"):
        for words in (["generate", f"--model={path}", "--prompt=a"], ["inspect", str(path)]):
            said = run(*words, status=1).err
            assert f"{path}: " in said
            assert " a GGUF file has to become a directory first; it " in said
    config = shutil.copytree(directory / "model", tmp_path / "model") / "config.json"
    for method in ("gptq", "awq"):
        config.write_text(json.dumps(read_json(config) | {"quantization_config": {"quant_method": method}}))
        said = run("finetune", f"--model={config.parent}", "--data=data", status=1).err
        assert f"quantization_config: found '{method}', and only bitsandbytes' 4-bit weights can be read; " in said


def test_classifiers_are_refused_with_the_recipe(directory, run, tmp_path):
    model = ml.load_model(directory / "model")
    write_adapter(model, tmp_path / "adapter", r=3, task_type="SEQ_CLS")
    shutil.copytree(directory / "model", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["LlamaForTokenClassification"]}))
    adapter, classifier = f"--adapter={tmp_path / 'adapter'}", f"--model={path.parent}"
    for words in (
        ["generate", adapter, "--prompt=a"],
        ["merge", adapter, f"--out={tmp_path / 'out'}"],
        ["finetune", adapter, "--data=data", f"--out={tmp_path / 'out'}"],
        ["generate", classifier, "--prompt=a"],
        ["quantize", classifier, f"--out={tmp_path / 'out'}"],
    ):
        said = run(*words, status=1).err
        assert said.endswith("it is a recipe: see recipes/classify_texts.py in minilora's repository\n"), words
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_names_no_base_needs_model(directory, run, tmp_path):
    edit(shutil.copytree(directory / "adapter", tmp_path / "adapter"), base_model_name_or_path=None)
    said = run("generate", f"--adapter={tmp_path / 'adapter'}", "--prompt=a", status=1).err
    assert "names no base model; give --model" in said


def test_that_nobody_reads_on_is_no_error(run, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        run("generate", "--model=model", "--prompt=the cat", "--temperature=2", status=cli.BROKEN_PIPE)


def test_python_m_minilora_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["minilora", "generate", "--model", "nowhere", "--prompt", "x"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("minilora", run_name="__main__")
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("minilora: model nowhere: no such directory")


# --- progress ---


def record(step, total=100):
    return {"step": step, "total_steps": total, "loss": 0.5, "tokens_per_second": 9.0, "peak_memory_bytes": 2**30}


def shown(capsys, monkeypatch, is_terminal, records, seconds=1.0):
    clock = [100.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    bar = ProgressBar()
    for each in records:
        assert not bar(each)
        clock[0] += seconds
    bar.close()
    return capsys.readouterr().err


def test_on_a_terminal_progress_rewrites_one_line(capsys, monkeypatch):
    text = shown(capsys, monkeypatch, True, [record(step) for step in range(1, 101)])
    assert text.count("\rstep ") == 101  # the last one, as it ends, again
    assert text.count("\n") == 1
    assert re.search(r"\rstep 51/100 █{6}.? +00:50<00:49, loss 0\.5000, 9 tokens/s, peak 1\.1 GB\r", text)


def test_a_process_that_was_killed_while_it_drew_a_bar_stops_no_other():
    """The lock of tqdm itself is one for all forked processes."""
    with tqdm.get_lock():
        thread = threading.Thread(target=ProgressBar(), args=(record(1),), daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()


def test_training_from_python_prints_progress_only_if_it_is_told_to(capsys):
    for on_step in (None, ml.ProgressBar()):
        ml.train(adapted(), random_rows(1, 3), ml.TrainConfig(max_steps=2), on_step)
        found = capsys.readouterr()
        assert found.out == ""
        assert [line.split()[1] for line in found.err.splitlines()] == (["1/2", "2/2"] if on_step else [])


def test_elsewhere_progress_is_a_line_every_five_seconds_and_one_at_the_end(capsys, monkeypatch):
    text = shown(capsys, monkeypatch, False, [record(step) for step in range(1, 101)])
    assert [line.split()[1] for line in text.splitlines()] == [f"{step}/100" for step in [*range(1, 101, 5), 100]]
    assert "\r" not in text


@pytest.mark.parametrize("is_terminal", [True, False])
def test_an_evaluation_is_always_shown_and_stays(capsys, monkeypatch, is_terminal):
    records = [record(1), {"step": 1, "eval_loss": 0.25, "best_step": 1}, record(2)]
    assert "step 1  held-out loss 0.2500, the lowest so far\n" in shown(capsys, monkeypatch, is_terminal, records)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_is_shown_every_few_seconds_until_it_is_closed(capsys, monkeypatch, is_terminal):
    monkeypatch.setattr("minilora.runs.reports.SECONDS", 0.02)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    shown, deadline = "", time.monotonic() + 60
    with ProgressBar() as bar:
        bar.show("measuring", 0, 9)
        while shown.count("measuring 0/9 ") < 3 and time.monotonic() < deadline:
            shown += capsys.readouterr().err
    assert shown.count("measuring 0/9 ") >= 3
    capsys.readouterr()
    time.sleep(0.1)
    assert not capsys.readouterr().err
