import json
import re
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import minilora as ml
import minilora.storage as storage
from minilora.lora.attach import adapter_layers
from minilora.train.state import checkpoints, newest_step, save_checkpoint, trained_adapter
from tests.models import tiny_model
from tests.test_loop import adapted, random_rows, stop_after, weights

# 9 rows make 5 micro-batches, the last one of a single row; 3 steps an epoch, the last one of a single micro-batch.
ROWS = random_rows(1, 9)
CONFIG = {"batch_size": 2, "gradient_accumulation_steps": 2, "epochs": 2, "learning_rate": 0.01, "save_steps": 1}
STEPS = 6
FILES = ("adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors")


def fresh(**config):
    return adapted(dtype=torch.float32, is_fresh=True, **{"lora_dropout": 0.3, **config})


def run(directory, model=None, rows=ROWS, on_step=None, **config):
    model = model or fresh()
    config = ml.TrainConfig(**{**CONFIG, "save_total_limit": 99, **config})
    return model, ml.train(model, rows, config, on_step, checkpoint_dir=directory)


def contents(directory, step=STEPS):
    return {name: (directory / f"step-{step:06d}" / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The checkpoints of a run that never stopped."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("whole")
    run(directory)
    return directory


@pytest.mark.parametrize("step", range(1, STEPS))
def test_a_run_resumed_after_any_step_ends_in_the_same_bytes(whole, tmp_path, step):
    shutil.copytree(whole / f"step-{step:06d}", tmp_path / f"step-{step:06d}")
    seen = []
    _, result = run(tmp_path, on_step=lambda record: seen.append(record["step"]))
    assert seen == list(range(step + 1, STEPS + 1))
    assert contents(tmp_path) == contents(whole)
    assert result.finished
    assert result.tokens == 2 * sum(len(row.tokens) for row in ROWS)


@settings(max_examples=8)
@given(
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(["none", "block"]),
    st.booleans(),
    st.lists(st.integers(1, STEPS), max_size=4, unique=True).map(sorted),
)
def test_a_run_stopped_again_and_again_ends_in_the_same_bytes(tmp_path_factory, dtype, recompute, packs, stops):
    def model():
        built = tiny_model(dtype=dtype)
        ml.attach(built, ml.LoraConfig(r=3, lora_alpha=6, lora_dropout=0.3))
        return built

    one, pieces = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("pieces")
    config = {"recompute": recompute, "save_steps": None, "batch_tokens": 20 if packs else None, "max_steps": STEPS}
    expected, _ = run(one, model(), **config)
    for stop in stops:
        run(pieces, model(), on_step=stop_after(stop), **config)
        assert newest_step(pieces) == stop
    found, _ = run(pieces, model(), **config)
    assert torch.equal(weights(found), weights(expected))


def test_settings_that_decide_nothing_may_change_between_starts(whole, tmp_path):
    shutil.copytree(whole / "step-000002", tmp_path / "step-000002")
    other = {"save_steps": 4, "save_total_limit": 1, "eval_steps": 3, "logging_steps": 7}
    run(tmp_path, **other)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000006"]
    assert contents(tmp_path, 6) == contents(whole, 6)


def test_a_checkpoint_is_an_adapter_that_can_be_loaded(whole):
    after = []
    model, _ = run(None, on_step=stop_after(3))
    loaded = tiny_model(dtype=torch.float32)
    ml.load_adapter(loaded, whole / "step-000003")
    for path, layer in adapter_layers(model).items():
        for factor in ("lora_A", "lora_B"):
            after.append((getattr(layer, factor)["default"], getattr(adapter_layers(loaded)[path], factor)["default"]))
        assert adapter_layers(loaded)[path].scales == layer.scales
    assert all(torch.equal(ours, theirs) for ours, theirs in after)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_checkpoints_are_kept(tmp_path, keep):
    run(tmp_path, save_total_limit=keep)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{6 - i:06d}" for i in reversed(range(keep))]


def test_checkpoints_are_in_the_order_of_their_steps_however_many_digits(tmp_path):
    for step in (999_999, 1_000_000, 2, 10_000_000):
        (tmp_path / f"step-{step:06d}").mkdir()
    assert [int(path.name[5:]) for path in checkpoints(tmp_path)] == [2, 999_999, 1_000_000, 10_000_000]
    assert newest_step(tmp_path) == 10_000_000


@pytest.mark.parametrize(
    "other",
    [
        {"learning_rate": 0.02},
        {"seed": 1},
        {"epochs": 3},
        {"recompute": "mlp"},
        {"rows": ROWS[:-1]},
        {"rows": [*ROWS[1:], ROWS[0]]},
        {"rows": [ml.Example(ROWS[0].tokens, ROWS[0].tokens), *ROWS[1:]]},  # the same tokens, other labels
        {"lora_alpha": 7},
        {"lora_dropout": 0.0},
        {"r": 2},
    ],
)
def test_a_run_with_other_data_or_settings_is_refused_and_nothing_is_put_into_its_model(whole, other):
    lora = {key: other[key] for key in other if key in ("lora_alpha", "lora_dropout", "r")}
    model = fresh(**lora)
    before = weights(model)
    with pytest.raises(ml.TrainingError, match=r"step-000006: written by a run with other data or settings"):
        run(whole, model, **{key: other[key] for key in other if key not in lora})
    assert torch.equal(weights(model), before)


def test_a_checkpoint_of_other_modules_is_refused_by_their_names(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "step-000006"
    attached = tiny_model(dtype=torch.float32)
    ml.attach(attached, ml.LoraConfig(target_modules=("q_proj",)))
    ml.save_adapter(attached, newest)
    with pytest.raises(ml.FormatError, match=r"adapts other modules: .*down_proj"):
        run(tmp_path)


@pytest.mark.parametrize("name", [".step-000004.123.tmp", "step-000004.old", "notes.txt"])
def test_what_a_killed_writer_or_a_user_left_is_no_checkpoint(whole, tmp_path, name):
    shutil.copytree(whole / "step-000002", tmp_path / "step-000002")
    (tmp_path / name).mkdir()
    (tmp_path / name / "state.json").write_text('{"step": 4')
    assert newest_step(tmp_path) == 2
    run(tmp_path)
    assert contents(tmp_path) == contents(whole)
    assert (tmp_path / name / "state.json").is_file()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("written", ["adapter_model.safetensors", "optimizer.safetensors", "state.json", "step-000003"])
def test_a_checkpoint_whose_writer_dies_half_way_never_appears(tmp_path, monkeypatch, written):
    rename = storage.os.replace

    def die(source, target):
        if target.name == written and "step-000003" in str(target):
            raise Killed
        rename(source, target)

    monkeypatch.setattr(storage.os, "replace", die)
    with pytest.raises(Killed):
        run(tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000001", "step-000002"]


def test_a_checkpoint_has_the_moments_of_every_trained_tensor_by_name_and_says_where_the_run_was(whole):
    names = {name for name, p in fresh().named_parameters() if p.requires_grad}
    moments = load_file(whole / "step-000003" / "optimizer.safetensors")
    assert set(moments) == {f"{name}/{key}" for name in names for key in ("exp_avg", "exp_avg_sq", "step")}
    assert all(moments[f"{name}/step"] == 3 for name in names)
    state = json.loads((whole / "step-000003" / "state.json").read_text())
    assert state["step"] == 3
    assert state["tokens"] == sum(len(row.tokens) for row in ROWS)


def test_a_half_removed_old_checkpoint_is_in_nobody_s_way(whole, tmp_path):
    shutil.copytree(whole / "step-000004", tmp_path / "step-000004")
    (tmp_path / "step-000002").mkdir()
    run(tmp_path, save_total_limit=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000006"]
    assert contents(tmp_path) == contents(whole)


def test_without_a_directory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(None)
    assert list(tmp_path.iterdir()) == []


def test_the_trained_adapter_is_the_one_whose_factors_learn():
    model = fresh(name="first")
    ml.attach(model, ml.LoraConfig(), name="second")
    assert trained_adapter(model) == "second"
    for layer in adapter_layers(model).values():
        layer.lora_A["first"].requires_grad_(True)
    with pytest.raises(ml.TrainingError, match=r"found \['first', 'second'\]"):
        trained_adapter(model)


def test_an_adapter_that_is_trainable_but_does_not_act_cannot_be_trained():
    model = tiny_model()
    ml.attach(model, ml.LoraConfig(r=2), name="first")
    ml.attach(model, ml.LoraConfig(r=2), name="second")
    ml.set_adapter(model, "first")
    with pytest.raises(ml.TrainingError, match="'second' is trainable but not active"):
        trained_adapter(model)


def test_nothing_but_the_adapter_can_be_trained():
    model = adapted()
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ml.TrainingError, match=r"model\.norm\.weight"):
        trained_adapter(model)


@pytest.mark.parametrize("spoil", [lambda t: t.flatten()[:1], lambda t: t.int(), lambda t: t.t()])
def test_moments_that_do_not_fit_are_refused_by_name(whole, tmp_path, spoil):
    shutil.copytree(whole / "step-000002", tmp_path / "step-000002")
    path = tmp_path / "step-000002" / "optimizer.safetensors"
    moments = load_file(path)
    name = next(name for name in sorted(moments) if name.endswith("/exp_avg"))
    save_file({**moments, name: spoil(moments[name]).contiguous()}, path)
    with pytest.raises(ml.FormatError, match=re.escape(name)):
        run(tmp_path)


@pytest.mark.parametrize("step", [99, "2", None])
def test_a_state_of_another_step_is_refused(whole, tmp_path, step):
    shutil.copytree(whole / "step-000002", tmp_path / "step-000002")
    path = tmp_path / "step-000002" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": step}))
    with pytest.raises(ml.FormatError, match="step-000002"):
        run(tmp_path)


def test_a_checkpoint_holds_the_trained_adapter_alone(tmp_path):
    model = fresh(name="first")
    ml.attach(model, ml.LoraConfig(r=2), name="second")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    save_checkpoint(tmp_path, model, optimizer, {"step": 1}, {}, keep=1)
    loaded = tiny_model(dtype=torch.float32)
    ml.load_adapter(loaded, tmp_path / "step-000001")
    assert {factor.size(0) for layer in adapter_layers(loaded).values() for factor in layer.lora_A.values()} == {2}
