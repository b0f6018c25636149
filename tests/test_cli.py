import dataclasses
import difflib
import json
import shutil
import subprocess
import sys
import time
import typing

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file

import minilora as ml
from minilora import cli
from minilora.cli.flags import ELSEWHERE, RENAMED, from_flags, names_of, read_config, use_config
from minilora.cli.meter import Meter
from minilora.lora.config import INITS
from minilora.settings import RunConfig
from minilora.storage import ASSETS
from minilora.train.data import encode_rows
from minilora.train.evaluate import choice_accuracy, exact_match, find_choices, held_out_loss
from minilora.train.rows import read_rows
from tests.models import randomize_adapters_, tiny_model
from tests.runs import CLASSES, contents, write_rows
from tests.text import CHATML, CLOSE, write_tokenizer
from tests.tolerance import assert_parity


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Two models, one with a chat template, two adapters of the first, and rows."""
    directory = tmp_path_factory.mktemp("things")
    for name, options in (("model", {}), ("chat", {"template": CHATML, "eos": CLOSE, "post": "bos"})):
        tokenizer = write_tokenizer(directory / name, **options)
        model = tiny_model(dtype=torch.float32, vocab_size=400)
        ml.save_model(model, directory / name, tokenizer)
    for seed, config in ((1, {"r": 3, "lora_alpha": 6}), (2, {"r": 2, "target_modules": ("q_proj", "down_proj")})):
        model = ml.load_model(directory / "model")
        ml.attach(model, ml.LoraConfig(**config), seed=seed)
        randomize_adapters_(model, seed)
        ml.save_adapter(model, directory / f"adapter{seed}")
    (directory / "data").mkdir()
    for name, count in (("train", 9), ("test", 16)):
        write_rows(directory / "data" / f"{name}.jsonl", count)
    return directory


@pytest.fixture
def command(directory, capsys, monkeypatch):
    """Run a command among the things; what it prints on stdout. It must succeed and be quiet on stderr."""
    monkeypatch.chdir(directory)

    def run(*words):
        assert cli.main([str(word) for word in words]) == 0
        out, err = capsys.readouterr()
        assert err == "" or words[0] == "finetune"
        return out

    return run


# --- flags ---


def finetune_parser():
    return cli._parser()[1]["finetune"]


def fields():
    return [(cls, field) for cls in CLASSES for field in dataclasses.fields(cls)]


def flag(field):
    return RENAMED.get(field.name, field.name)


def value_of(cls, words=()):
    return from_flags(cls, vars(finetune_parser().parse_args([cli._dashed(word) for word in words])))


def as_text(value):
    """A value as one writes it on the command line."""
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def as_words(config, spell=lambda name: "--" + name.replace("_", "-")):
    """Every field of a configuration as a flag; one that is None or empty is left out."""
    words = []
    for field in dataclasses.fields(config):
        name, value = spell(flag(field)), getattr(config, field.name)
        if isinstance(value, bool) and typing.get_type_hints(type(config))[field.name] is bool:
            words.append(name if value else name.replace("--", "--no-", 1))
        elif field.name == "data":
            words += [name, *value]
        elif value not in (None, (), {}):
            words += [f"{name}={as_text(value)}"]
    return words


names = st.sampled_from(["q_proj", "k_proj", "mlp.up_proj", "model.layers.1.self_attn.v_proj"])
several = st.lists(names, min_size=1, max_size=3, unique=True).map(tuple)
patterns = st.sampled_from([r".*\.(q|v)_proj", r"model\.layers\.\d+\.mlp\..*", "q_proj|v_proj"])
positive = st.floats(1e-6, 1e6)


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


@st.composite
def train_configs(draw):
    values = {}
    for name, hint in typing.get_type_hints(ml.TrainConfig).items():
        kinds = typing.get_args(hint) or (hint,)
        if typing.get_origin(hint) is typing.Literal:
            values[name] = draw(st.sampled_from(kinds))
        elif hint is bool:
            values[name] = draw(st.booleans())
        elif float in kinds:
            values[name] = draw(st.floats(1e-6, 1e3))
        else:
            values[name] = draw((st.none() if type(None) in kinds else st.nothing()) | st.integers(1, 10**6))
    if values["keep"] == "best" or values["early_stopping"]:
        values["eval_steps"] = values["eval_steps"] or 1
    return ml.TrainConfig(**values)


data_configs = st.builds(
    ml.DataConfig,
    max_length=st.integers(1, 9999),
    train_on=st.sampled_from(["completion", "assistant", "all"]),
    prompt_style=st.sampled_from(["auto", "alpaca", "own.jinja"]),
    system=st.none() | st.just("Be brief."),
    text_field=st.none() | st.just("body"),
    allow_special=st.booleans(),
    skip_bad_rows=st.booleans(),
    eval_split=st.floats(0, 0.99),
)
quantize_configs = st.builds(
    ml.QuantizeConfig,
    quantize=st.sampled_from(["none", "nf4"]),
    double_quant=st.booleans(),
    quantize_skip=st.lists(st.sampled_from(["down_proj", "layers.0"]), max_size=2).map(tuple),
)
run_configs = st.builds(
    RunConfig,
    **dict.fromkeys(("model", "general_data", "out", "device"), st.text("ab /.-", min_size=1)),
    data=st.lists(st.text("ab /.", min_size=1), min_size=1, max_size=3).map(tuple),
    report=st.sampled_from(["none", "tensorboard"]),
    samples=st.integers(0, 9),
    dtype=st.sampled_from(["auto", "float32", "bfloat16"]),
    resume=st.sampled_from(["auto", "never"]),
)


@given(run_configs | lora_configs() | data_configs | train_configs(), st.booleans())
def test_every_field_is_a_flag_in_two_spellings_and_survives_the_command_line(config, has_dashes):
    words = as_words(config, (lambda name: "--" + name.replace("_", "-")) if has_dashes else (lambda name: f"--{name}"))
    assert value_of(type(config), words) == config


@pytest.mark.parametrize("cls", CLASSES)
def test_without_flags_the_defaults_are_those_of_the_class(cls):
    assert value_of(cls) == cls()


@pytest.mark.parametrize(("cls", "field"), fields(), ids=lambda value: getattr(value, "name", None))
def test_the_help_of_a_flag_is_that_of_its_field_with_the_default(cls, field):
    action = next(action for action in finetune_parser()._actions if action.dest == flag(field))
    default = getattr(cls(), field.name)
    assert action.help.startswith(field.metadata["help"])
    text = " ".join(default) if isinstance(default, tuple) else default
    assert (f"(default: {text})" in action.help) == (default not in (None, (), {}))
    assert f"--{flag(field).replace('_', '-')}" in finetune_parser().format_help()


def test_r_is_spelled_lora_r():
    assert value_of(ml.LoraConfig, ["--lora-r", "5"]) == value_of(ml.LoraConfig, ["--lora_r=5"]) == ml.LoraConfig(r=5)
    assert "--r" not in {spelling for action in finetune_parser()._actions for spelling in action.option_strings}


@pytest.mark.parametrize(("text", "value"), [("true", True), ("True", True), ("gaussian", "gaussian")])
def test_a_start_is_true_or_a_name(text, value):
    assert value_of(ml.LoraConfig, ["--init-lora-weights", text]) == ml.LoraConfig(init_lora_weights=value)


@pytest.mark.parametrize(
    "words",
    [
        *(["--epoch", "1"], ["--batch-size", "2.5"], ["--lr-scheduler", "step"], ["--dtype", "float16"]),
        *(["--rank-pattern", "[1]"], ["--rank-pattern", "{"], ["--use-rslora=yes"]),
    ],
)
def test_a_flag_or_value_that_is_none_is_refused_with_the_usage(capsys, words):
    with pytest.raises(SystemExit) as error:
        cli.main(["finetune", *words])
    assert error.value.code == 2
    assert words[0].split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "meant"),
    [("--epoch=2", "--epochs"), ("--lr", "--learning-rate"), ("--lora_rank", "--lora-r"), ("--output-dir", "--out")],
)
def test_an_unknown_flag_is_refused_and_the_right_one_named_also_for_users_of_other_tools(capsys, word, meant):
    with pytest.raises(SystemExit) as error:
        cli.main(["finetune", word, "1"])
    assert error.value.code == 2
    assert capsys.readouterr().err.endswith(f"is unknown; did you mean {meant}?\n")


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (["finetune", "--data", "a", "--data", "b"], "--data is given twice; give all its values at once"),
        (["finetune", "--seed=1", "--seed", "1"], "--seed is given twice"),
        (["finetune", "--target-modules", "q_proj", "v_proj"], "'v_proj' is one word too many; several values"),
        (["finetune", "--bf16", "true"], "--bf16 is unknown; --dtype bfloat16 is what there is"),
        (["finetune", "--base_model", "a", "--data", "b"], "--base-model is unknown; did you mean --model?"),
        (["inspect"], "usage: minilora inspect PATH [flags]"),
        (["eval"], "usage: minilora eval --data DATA [flags]"),
    ],
)
def test_a_command_line_that_cannot_be_meant_is_refused_with_what_to_do(capsys, words, phrase):
    with pytest.raises(SystemExit) as error:
        cli.main(words)
    assert error.value.code == 2
    assert phrase in capsys.readouterr().err


def test_minilora_alone_is_its_help_page(capsys):
    for words in ([], ["--help"]):
        with pytest.raises(SystemExit) as error:
            cli.main(words)
        assert error.value.code == 0
        assert "finetune" in capsys.readouterr().out


def test_the_flags_of_other_tools_are_no_flags_here_and_what_they_mean_is_one():
    own = set().union(*(names_of(parser) for parser in cli._parser()[1].values()))
    assert not own & set(ELSEWHERE)
    assert set(ELSEWHERE.values()) <= own


# --- configuration files ---


def resolved(path, *words):
    """The configurations that --config and further flags give."""
    options = cli.parse(["finetune", f"--config={path}", *words])
    return tuple(from_flags(cls, options) for cls in CLASSES)


def flat(*configs):
    return {flag(f): getattr(config, f.name) for config in configs for f in dataclasses.fields(config)}


def as_toml(values):
    def text(value):
        if isinstance(value, dict):
            return "{" + ", ".join(f"{json.dumps(key)} = {text(inner)}" for key, inner in value.items()) + "}"
        return json.dumps(value)

    return "".join(f"{name} = {text(value)}\n" for name, value in values.items() if value is not None)


@given(
    st.tuples(run_configs, quantize_configs, lora_configs(), data_configs, train_configs()),
    st.sampled_from([".toml", ".json", "run.json"]),
    st.booleans(),
)
def test_a_configuration_file_survives(tmp_path_factory, configs, kind, has_dashes):
    values = {name.replace("_", "-" if has_dashes else "_"): value for name, value in flat(*configs).items()}
    path = tmp_path_factory.mktemp("config") / ("run.json" if kind == "run.json" else f"config{kind}")
    written = {"config": values, "versions": {}, "starts": []} if kind == "run.json" else values
    path.write_text(as_toml(values) if kind == ".toml" else json.dumps(written))
    assert resolved(path) == configs


@given(train_configs(), st.integers(1, 99), st.sampled_from([1e-5, 0.5]))
def test_flags_go_on_top_of_the_configuration_file(tmp_path_factory, training, batch_size, rate):
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(flat(training)))
    found = resolved(path, "--batch-size", str(batch_size), f"--learning_rate={rate}")
    assert found[-1] == dataclasses.replace(training, batch_size=batch_size, learning_rate=rate)


def test_text_in_a_configuration_file_is_read_as_on_the_command_line(tmp_path):
    path = tmp_path / "config.toml"
    files = 'model = "model"\ndata = "data"\n'
    path.write_text(files + 'target-modules = "q_proj,v_proj"\nlearning_rate = "1e-3"\ninit_lora_weights = "true"\n')
    run, _, lora, _, training = resolved(path)
    assert run.data == ("data",)
    assert lora == ml.LoraConfig(target_modules=("q_proj", "v_proj"))
    assert training == ml.TrainConfig(learning_rate=1e-3)


@given(st.sampled_from(sorted(flat(*(cls() for cls in CLASSES)))), st.integers(0, 20), st.sampled_from("xz"))
@example("learning_rate", 8, "x")
def test_an_unknown_key_is_refused_and_the_nearest_flag_named(name, position, letter):
    known = sorted(flat(*(cls() for cls in CLASSES)))
    key = name[: position % len(name)] + letter + name[position % len(name) :]
    nearest = difflib.get_close_matches(key, known, n=1)
    with pytest.raises(ml.ConfigError) as error:
        use_config(finetune_parser(), {"seed": 1, key: 1}, "my.toml")
    assert f"my.toml: key {key!r} is unknown" in str(error.value)
    if key not in ELSEWHERE:
        assert (f"did you mean {nearest[0]!r}?" if nearest else "is unknown") in str(error.value)


def test_the_nearest_key_of_a_slip_is_the_one_that_was_meant():
    with pytest.raises(ml.ConfigError, match="'lerning-rate' is unknown; did you mean 'learning_rate'"):
        use_config(finetune_parser(), {"lerning-rate": 1}, "")


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("batch_size = 2.5", "batch_size is 2.5, need int"),
        ("lora_r = 2.5\nuse_rslora = 1", "lora_r is 2.5, need int; use_rslora is 1, need bool"),
        ('use_rslora = "no"', "use_rslora is 'no', need bool"),
        ("learning_rate = true", "learning_rate is True, need float"),
        ("seed = true", "seed is True, need int"),
        ("model = 5\ndata = 'x'", "model is 5, need str"),
        ('resume = "maybe"', "resume is 'maybe'"),
        ('lr_scheduler = "step"', "lr_scheduler is 'step'"),
        ("target_modules = [1]", "target_modules is [1]"),
        ("rank_pattern = [1]", "rank_pattern is [1]"),
        ("config = 1", "key 'config' is unknown"),
        ("[training]\nseed = 1", "key 'training' is unknown"),
        ("seed = ", "not TOML"),
    ],
)
def test_a_value_of_the_wrong_type_in_a_configuration_file_is_named(tmp_path, capsys, text, phrase):
    (tmp_path / "config.toml").write_text(text)
    assert cli.main(["finetune", "--config", str(tmp_path / "config.toml"), "--out", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("minilora: ")
    assert phrase in message
    assert not (tmp_path / "out").exists()


def test_a_json_configuration_is_an_object(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ml.FormatError, match=r"config.json: found a JSON list, need an object"):
        read_config(tmp_path / "config.json")


RUN = ("finetune", "--model=model", "--data=data", "--max-steps=2", "--lora-r=2", "--seed=5", "--lora-dropout=0.1")


def test_the_run_json_of_a_run_is_a_configuration_that_makes_the_same_adapter(directory, command, tmp_path):
    command(*RUN, f"--out={tmp_path / 'one'}")
    command("finetune", f"--config={tmp_path / 'one' / 'run.json'}", f"--out={tmp_path / 'two'}")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


# --- finetune ---


def test_finetune_alone_learns_on_the_builtin_model_and_data_with_settings_of_their_own(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["finetune", "--max-steps", "3"]) == 0
    out = tmp_path / "minilora-run"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["after"]["loss"] < summary["before"]["loss"]
    assert all(0 < summary[when]["accuracy"] < 1 for when in ("before", "after"))
    settings = json.loads((out / "run.json").read_text())["config"]
    builtin = json.loads((ASSETS / "finetune.json").read_text())
    assert {name: settings[name] for name in builtin} == builtin != {n: flat(ml.TrainConfig())[n] for n in builtin}
    table = capsys.readouterr().out
    for name, when in (("base", "before"), ("adapter", "after")):
        line = next(line for line in table.splitlines() if line.startswith(name))
        assert line.split() == [name, f"{summary[when]['loss']:.4f}", f"{summary[when]['accuracy']:.4f}"]


def test_the_settings_of_the_builtin_example_are_for_it_alone():
    assert from_flags(ml.TrainConfig, cli.parse(["finetune", "--data=data", "--model", "m"])) == ml.TrainConfig()
    assert from_flags(ml.TrainConfig, cli.parse(["finetune"])) != ml.TrainConfig()


@pytest.mark.parametrize("words", [["--data=data"], ["--model=model"], ["--model", "model", "--out", "data"]])
def test_a_model_without_data_or_data_without_a_model_is_refused(words):
    with pytest.raises(ml.ConfigError, match="go together"):
        cli.parse(["finetune", *words])


def test_rows_that_were_cut_are_counted_on_stderr(directory, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(directory)
    rows = read_rows(directory / "data" / "train.jsonl")
    tokenizer = ml.load_tokenizer(directory / "model")
    lengths = sorted(len(encode_rows([row], tokenizer, ml.DataConfig(max_length=99))[0].tokens) for row in rows)
    cut = sum(length > lengths[4] for length in lengths)
    assert cli.main([*RUN, f"--max-length={lengths[4]}", f"--out={tmp_path}"]) == 0
    assert f"{cut} training rows were cut to --max-length" in capsys.readouterr().err


# --- merge ---


def updates(directory, *adapters):
    """Σ s·B A of each module, from the files, in float64."""
    total = {}
    for adapter in adapters:
        config = json.loads((directory / adapter / "adapter_config.json").read_text())
        tensors = load_file(directory / adapter / "adapter_model.safetensors")
        for name, lora_A in tensors.items():
            if ".lora_A." in name:
                lora_B = tensors[name.replace("lora_A", "lora_B")]
                module = name.removeprefix("base_model.model.").replace("lora_A.", "")
                delta = config["lora_alpha"] / config["r"] * (lora_B.double() @ lora_A.double())
                total[module] = total.get(module, 0) + delta
    return total


@pytest.mark.parametrize("adapters", [["adapter1"], ["adapter2"], ["adapter1", "adapter2"]])
def test_a_merged_model_has_the_sum_of_the_adapters_in_its_weights(directory, command, tmp_path, adapters):
    command("merge", *(f"--adapter={name}" for name in adapters), f"--out={tmp_path}")
    base, merged = (load_file(where / "model.safetensors") for where in (directory / "model", tmp_path))
    changed = updates(directory, *adapters)
    assert base.keys() == merged.keys() > changed.keys()
    for name, weight in base.items():
        if name in changed:
            assert_parity(merged[name], weight.double() + changed[name])
        else:
            assert torch.equal(merged[name], weight)


def test_a_merged_model_is_complete_and_writes_what_model_and_adapter_write(directory, command, tmp_path):
    command("merge", "--adapter=adapter1", f"--out={tmp_path}")
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (directory / "model").iterdir()}
    ours = command("generate", f"--model={tmp_path}", "--prompt=the cat")
    assert ours == command("generate", "--adapter=adapter1", "--prompt=the cat")


def test_adapters_that_name_different_bases_are_merged_only_into_a_named_one(directory, command, tmp_path, capsys):
    shutil.copytree(directory / "adapter1", tmp_path / "other")
    path = tmp_path / "other" / "adapter_config.json"
    path.write_text(path.read_text().replace('"base_model_name_or_path": "', '"base_model_name_or_path": "another-'))
    both = ["--adapter=adapter1", f"--adapter={tmp_path / 'other'}", f"--out={tmp_path / 'merged'}"]
    assert cli.main(["merge", *both]) == 1
    assert "name different base models" in capsys.readouterr().err
    command("merge", "--model=model", *both)


def test_a_merged_model_keeps_the_dtype_of_the_checkpoint_also_where_it_is_slow(directory, command, tmp_path):
    model = ml.load_model(directory / "model", dtype="float16")
    ml.save_model(model, tmp_path / "half", ml.load_tokenizer(directory / "model"))
    command("merge", f"--model={tmp_path / 'half'}", "--adapter=adapter1", f"--out={tmp_path / 'merged'}")
    assert {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.float16}


# --- eval ---


@pytest.mark.parametrize("adapter", [None, "adapter1"])
def test_eval_prints_one_json_object_with_what_the_library_measures(directory, command, adapter):
    model, tokenizer = ml.load_model(directory / "model"), ml.load_tokenizer(directory / "model")
    if adapter:
        ml.load_adapter(model, directory / adapter)
    examples = encode_rows(read_rows(directory / "data" / "test.jsonl"), tokenizer, ml.DataConfig())
    expected = {
        "nll": held_out_loss(model, examples),
        "choice": choice_accuracy(model, examples, find_choices(examples)),
        "exact-match": exact_match(model, examples, tokenizer),
    }
    words = [f"--adapter={adapter}"] if adapter else ["--model=model"]
    for metric, value in expected.items():
        printed = command("eval", *words, "--data=data", "--metric", metric)
        assert json.loads(printed) == {"metric": metric, "value": value, "rows": 16, "truncated": 0, "unlabelled": 0}
        assert printed.count("\n") == 1
    assert json.loads(command("eval", *words, "--data=data"))["metric"] == "nll"


def test_eval_reads_a_file_as_it_is_and_of_a_directory_the_test_rows_before_others(directory, command, tmp_path):
    file = command("eval", "--model=model", f"--data={directory / 'data' / 'train.jsonl'}")
    shutil.copy(directory / "data" / "train.jsonl", tmp_path / "valid.jsonl")
    write_rows(tmp_path / "train.jsonl", 3)
    assert json.loads(file)["rows"] == 9
    assert command("eval", "--model=model", f"--data={tmp_path}") == file


# --- errors ---


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        ("finetune --model=nowhere --data=data", "nowhere: no such directory"),
        ("finetune --model=model --data=nowhere", "nowhere: no such file or directory"),
        (
            "finetune --model=model --data=data --target-modules=q_prj",
            "no module that can be adapted matches target_modules 'q_prj'",
        ),
        ("finetune --model=model --data=data --lora-r=0", "r is 0"),
        (
            "finetune --model=model --data=data --epochs=inf --batch-size=0",
            "number of at least 1; epochs is inf",
        ),
        ("finetune --model=model --data=data --device=abacus", "device 'abacus' cannot be used"),
        ("generate --model=model --prompt=Hi --device=meta", "device 'meta' cannot be used here; need auto, cpu,"),
        ("finetune --model=model --data=data --max-length=1", "has a label within its first 1 tokens"),
        ("finetune --config=nowhere.toml", "nowhere.toml: cannot be read"),
        ("generate --model=model --prompt=a --compare-base", "--compare-base needs --adapter"),
        ("generate --adapter=nowhere --prompt=a", "nowhere: no such directory"),
        ("generate --model=model --prompt=a --top-p=2", "top_p 2.0"),
        ("merge --adapter=adapter1 --out=model", "model: holds files; give another --out"),
        ("merge --adapter=adapter1 --out=data/train.jsonl", "train.jsonl: is a file"),
        ("eval --model=model --data=data/train.jsonl --metric=choice", "needs rows with few distinct answers"),
        ("eval --model=model --data=data --max-length=1", "has a label within its first 1 tokens"),
    ],
)
def test_an_error_is_one_line_on_stderr_and_the_exit_status_1(directory, tmp_path, capsys, monkeypatch, words, phrase):
    for name in ("model", "data", "adapter1"):
        shutil.copytree(directory / name, tmp_path / name)
    write_rows(tmp_path / "data" / "train.jsonl", 9, choices=[f"{i} sat" for i in range(9)])
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert cli.main(words.split()) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("minilora: ")
    assert phrase in err
    assert err.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_adapter_that_names_no_base_needs_model(directory, tmp_path, capsys):
    shutil.copytree(directory / "adapter1", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    assert cli.main(["generate", f"--adapter={tmp_path / 'adapter'}", "--prompt=a"]) == 1
    assert "names no base model; give --model" in capsys.readouterr().err


def test_who_stops_reading_is_no_error():
    command = f"{sys.executable} -m minilora finetune --help | head -1; echo ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert found.stderr == ""
    assert found.stdout.splitlines()[-1] in ("0", "141")


def test_python_m_minilora_is_the_command(tmp_path):
    words = [sys.executable, "-m", "minilora", "eval", "--model", str(tmp_path / "nowhere"), "--data", "x"]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.startswith(f"minilora: {tmp_path / 'nowhere'}: no such directory")
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [("eval", "--data=data", "--adapter="), ("generate", "--model=", "--prompt=a")])
def test_an_empty_name_is_not_a_name_left_out(directory, capsys, monkeypatch, words):
    monkeypatch.chdir(directory)
    assert cli.main(list(words)) == 1
    assert "is empty; leave it out, or name something" in capsys.readouterr().err


def test_eval_reads_rows_as_the_adapter_was_trained_on_them_unless_a_flag_says_otherwise(directory, command, tmp_path):
    model = ml.load_model(directory / "model")
    ml.attach(model, ml.LoraConfig(r=2))
    ml.save_adapter(model, tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"config": {"train_on": "all", "max_length": 7, "seed": 3}}))
    rows, tokenizer = read_rows(directory / "data" / "test.jsonl"), ml.load_tokenizer(directory / "model")
    for flags, reading in (((), {"train_on": "all", "max_length": 7}), (("--train-on=completion",), {"max_length": 7})):
        expected = held_out_loss(model, encode_rows(rows, tokenizer, ml.DataConfig(**reading)))
        found = json.loads(command("eval", "--model=model", f"--adapter={tmp_path}", "--data=data", *flags))
        assert found["value"] == expected


# --- progress ---


def record(step, total=100):
    return {"step": step, "total_steps": total, "loss": 0.5, "tokens_per_second": 9.0, "peak_memory_bytes": 2**30}


def shown(capsys, monkeypatch, is_terminal, records, seconds=1.0):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    meter = Meter()
    for each in records:
        assert not meter(each)
        clock[0] += seconds
    meter.close()
    return capsys.readouterr().err


def test_on_a_terminal_progress_rewrites_one_line(capsys, monkeypatch):
    text = shown(capsys, monkeypatch, True, [record(step) for step in range(1, 101)])
    assert text.count("\r\x1b[K") == 101  # and one that clears the line
    assert text.count("\n") == 1
    assert "step 51/100  loss 0.5000  9 tokens/s  49 s left  1.1 GB" in text


def test_elsewhere_progress_is_a_line_every_five_seconds_and_one_at_the_end(capsys, monkeypatch):
    text = shown(capsys, monkeypatch, False, [record(step) for step in range(1, 101)])
    assert [line.split()[1] for line in text.splitlines()] == [f"{step}/100" for step in [*range(1, 101, 5), 100]]
    assert "\r" not in text


@pytest.mark.parametrize("is_terminal", [True, False])
def test_an_evaluation_is_always_shown_and_stays(capsys, monkeypatch, is_terminal):
    records = [record(1), {"step": 1, "eval_loss": 0.25, "best_step": 1}, record(2)]
    assert "step 1  held-out loss 0.2500, the lowest so far\n" in shown(capsys, monkeypatch, is_terminal, records)
