import itertools
import json
import re
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

import minilora as ml
from minilora.adapter import adapter_layers, attach_lora
from minilora.lora import LoraAdapter
from minilora.runs import loop
from minilora.runs.checkpoints import checkpoints, describe, trained_adapters
from minilora.runs.evaluate import example_loss
from tests.models import default_dtype, long, randn, tiny_model
from tests.training import adapted, as_written, contents, copy_checkpoint, newest_step, random_rows, stop_after, weights

# 9 rows make 5 micro-batches, the last one of a single row; 3 steps an epoch, the last one of a single micro-batch.
ROWS = random_rows(1, 9)
CONFIG = {"batch_size": 2, "gradient_accumulation_steps": 2, "epochs": 2, "learning_rate": 0.01, "save_steps": 1}
STEPS = 6


def plain(family="llama", dtype=torch.float32):
    return tiny_model(family, dtype=dtype, num_hidden_layers=1)


def fresh(**config):
    return adapted(dtype=torch.float32, is_fresh=True, layers=1, **{"lora_dropout": 0.3, **config})


def run(directory, model=None, rows=ROWS, on_step=None, held_out=(), loss=None, **config):
    model = model or fresh()
    config = ml.TrainConfig(**{**CONFIG, "save_total_limit": 99, **config})
    return model, ml.train(model, rows, config, on_step, held_out, directory, loss)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    run(directory)
    return directory


@pytest.mark.parametrize("stops", [(1, 2, STEPS), (4, STEPS), *long(((2, 3, 5, STEPS),))])
def test_a_run_stopped_after_some_steps_ends_in_the_same_bytes(whole, tmp_path, stops):
    seen, newest = [], 0

    def stop(record):
        seen.append(record["step"])
        return record["step"] in stops

    for step in stops:
        _, result = run(tmp_path, on_step=stop, save_steps=9)
        assert newest_step(tmp_path) == step
        assert result.finished == (step == STEPS)
        assert result.resumed_from == newest
        newest = step
    assert seen == list(range(1, STEPS + 1))
    assert contents(tmp_path) == contents(whole)
    assert result.tokens == 2 * sum(len(row.tokens) for row in ROWS)


def saved(directory):
    return [int(path.name.removeprefix("step-")) for path in checkpoints(directory)]


def test_by_default_a_run_saves_ten_times_or_every_ten_minutes(tmp_path, monkeypatch):
    single = {"batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 11, "save_steps": None}
    run(tmp_path / "long", **single)
    assert saved(tmp_path / "long") == [2, 4, 6, 8, 10, 11]
    run(tmp_path / "never", save_steps=0)
    assert saved(tmp_path / "never") == [STEPS]
    seconds = itertools.count(step=200)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(seconds))  # read about three times a step
    run(tmp_path / "slow", **single)
    assert len(saved(tmp_path / "slow")) > 6
    assert contents(tmp_path / "slow", 11) == contents(tmp_path / "long", 11)


def test_settings_and_a_default_dtype_that_decide_nothing_may_change(whole, tmp_path):
    copy_checkpoint(whole, 2, tmp_path)
    with default_dtype(torch.float64):
        run(tmp_path, save_steps=4, save_total_limit=1, logging_steps=7, gradient_checkpointing="block")
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000006"]
    assert contents(tmp_path) == contents(whole)


def test_a_checkpoint_is_the_trained_adapter_alone_and_can_be_loaded(tmp_path):
    model = fresh(name="first")
    ml.attach(model, ml.LoraConfig(r=2), name="second")
    run(tmp_path, model, max_steps=1)
    loaded = plain()
    ml.load_adapter(loaded, tmp_path / "step-000001")
    for path, layer in adapter_layers(model).items():
        ours, theirs = layer.adapters["second"], adapter_layers(loaded)[path].adapters["default"]
        assert torch.equal(ours.lora_A, theirs.lora_A)
        assert torch.equal(ours.lora_B, theirs.lora_B)
        assert ours.scale == theirs.scale


@pytest.mark.parametrize("keep", [2, *long(1, 3)])
def test_only_the_newest_checkpoints_are_kept(tmp_path, keep):
    run(tmp_path, save_total_limit=keep, batch_size=9, gradient_accumulation_steps=1, max_steps=6)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{6 - i:06d}" for i in reversed(range(keep))]


def test_checkpoints_are_in_the_order_of_their_steps_however_many_digits(tmp_path):
    for step in (999_999, 1_000_000, 2, 10_000_000):
        (tmp_path / f"step-{step:06d}").mkdir()
    assert [int(path.name[5:]) for path in checkpoints(tmp_path)] == [2, 999_999, 1_000_000, 10_000_000]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"learning_rate": 0.02}, "config.learning_rate was 0.01 and is 0.02"),
        ({"seed": 1}, "config.seed was 0 and is 1"),
        (
            {"batch_size": 3, "weight_decay": 0.1},
            "config.batch_size was 2 and is 3, config.weight_decay was 0.0 and is 0.1, steps was 6 and is 4",
        ),
        ({"rows": ROWS[:-1]}, "dataset, steps was 6 and is 4"),
        ({"rows": [*ROWS[1:], ROWS[0]]}, "dataset"),
        ({"rows": [ml.Example(ROWS[0].tokens, ROWS[0].tokens), *ROWS[1:]]}, "dataset"),  # the same tokens, other labels
        ({"held_out": ROWS[:2]}, "held_out"),
        (
            {"loss": partial(example_loss, checkpointing="none")},
            "loss was 'None' and is \"example_loss(checkpointing='none')\"",
        ),
        ({"lora_alpha": 7}, "adapters.default.lora_alpha was 6 and is 7"),
        ({"lora_dropout": 0.0}, "adapters.default.lora_dropout was 0.3 and is 0.0"),
        ({"r": 2}, "adapters.default.r was 3 and is 2"),
    ],
)
def test_a_run_with_other_data_or_settings_is_refused_by_what_differs_and_changes_no_model(whole, other, named):
    lora = {key: other[key] for key in other if key in ("lora_alpha", "lora_dropout", "r")}
    model = fresh(**lora)
    before = weights(model)
    with pytest.raises(ml.TrainingError) as error:
        run(whole, model, **{key: other[key] for key in other if key not in lora})
    assert str(error.value).endswith(f"step-000006: written by a run with other data or settings ({named})")
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize(
    ("part", "named"), [("up_proj.base", r"settings \(model\)"), ("lora_A", "other values of the trained")]
)
def test_a_run_from_another_base_or_start_is_refused(whole, part, named):
    model = fresh()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if part in name).mul_(1.01)
    before = weights(model)
    with pytest.raises(ml.TrainingError, match=named):
        run(whole, model)
    assert torch.equal(weights(model), before)


def test_a_model_that_a_run_has_trained_can_continue_it(whole, tmp_path):
    model = fresh()
    run(tmp_path, model, on_step=stop_after(3))
    for _ in range(2):  # at the second time the run is finished
        _, result = run(tmp_path, model)
        assert contents(tmp_path) == contents(whole)
    assert result.resumed_from == result.steps == STEPS


def test_a_loss_is_known_by_its_name_and_the_plain_arguments_of_a_partial():
    loss = partial(partial(run, 1, beta=0.5), 2.0, (None, "a", ROWS), rows=ROWS, model=fresh)
    assert describe(loss) == "run(1, 2.0, (None, 'a', list), beta=0.5, model=fresh, rows=list)"
    assert describe(Core) == "Core"


def test_a_run_of_another_length_is_refused(whole):
    with pytest.raises(ml.TrainingError, match=r"step-000006: written by a run with .* \(steps was 6 and is 9\)"):
        run(whole, epochs=3)


@pytest.mark.parametrize(("file", "part"), [("trained", "down_proj"), ("optimizer", "/exp_avg")])
def test_a_checkpoint_of_other_tensors_is_refused_by_name_and_the_model_is_unchanged(whole, tmp_path, file, part):
    path = copy_checkpoint(whole, 6, tmp_path) / f"{file}.safetensors"
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if part in name)
    model = fresh()
    before = weights(model)
    lacking = {key: value for key, value in tensors.items() if key != name}
    for spoiled in (
        lacking,
        *(lacking | {name: tensor} for tensor in (tensors[name][:1].clone(), tensors[name].double())),
    ):
        save_file(spoiled, path)
        as_written(path.parent)
        with pytest.raises(ml.FormatError, match=re.escape(name)):
            run(tmp_path, model)
        assert torch.equal(weights(model), before)


def test_leftovers_and_half_removed_directories_are_no_checkpoints(whole, tmp_path):
    copy_checkpoint(whole, 4, tmp_path)
    (tmp_path / "step-000002").mkdir()
    left = [tmp_path / name / "state.json" for name in (".step-000005.123.tmp", "step-000005.old", "notes.txt")]
    for path in left:
        path.parent.mkdir()
        path.write_text('{"step": 5')
    assert newest_step(tmp_path) == 4
    run(tmp_path, save_total_limit=1)
    assert {path.name for path in tmp_path.iterdir()} == {"step-000006", *(path.parent.name for path in left)}
    assert contents(tmp_path) == contents(whole)
    assert all(path.is_file() for path in left)


def test_the_trained_adapters_are_those_of_which_something_learns():
    model = fresh(name="first")
    ml.attach(model, ml.LoraConfig(r=2), name="second")
    assert {name: made[0].r for name, made in trained_adapters(model).items()} == {"second": 2}
    ml.set_adapter(model, ["first", "second"])
    assert {name: made[0].r for name, made in trained_adapters(model).items()} == {"second": 2, "first": 3}
    ml.set_adapter(model, "first")
    assert {name: made[0].r for name, made in trained_adapters(model).items()} == {"first": 3}
    require(model, "second")
    with pytest.raises(ml.TrainingError, match="'second' is trainable but not active"):
        trained_adapters(model)


def test_a_model_of_which_nothing_is_trainable_is_refused():
    with pytest.raises(ml.TrainingError, match="nothing of the model is trainable"):
        run(None, plain().requires_grad_(False))


# --- whatever is trained ---


def require(model, *parts):
    """Let the parameters whose names have one of these parts learn too; the model."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or not {*parts}.isdisjoint(name.split(".")))
    return model


def two_adapters():
    model = fresh(name="first")
    ml.attach(model, ml.LoraConfig(r=2), name="second")
    ml.set_adapter(model, ["first", "second"])
    return model


def family(**config):
    """What one adapter may have besides A and B."""
    options = {"is_fresh": True, "layers": 1, "lora_dropout": 0.3}
    return lambda: adapted("llama-bias-tied-wide-heads", torch.float32, **options, **config)


class Core(LoraAdapter):
    """LoRA-XS: s·B R A, of which only R is trained."""

    def __init__(self, tensors, scale):
        super().__init__({}, scale)
        self.A, self.B = (torch.nn.Parameter(tensors[name], requires_grad=False) for name in ("lora_A", "lora_B"))
        self.R = torch.nn.Parameter(torch.zeros(len(self.A), len(self.A)))

    lora_A = property(lambda self: self.R @ self.A)
    lora_B = property(lambda self: self.B)


def from_the_page(**config):
    """An adapter without a LoraConfig."""
    model = plain()
    attach_lora(model, ["q_proj", "down_proj"], **{"r": 3, "lora_alpha": 6, "lora_dropout": 0.3, **config})
    return model


def with_own_class():
    """An adapter of the user's own class in one of the layers that `ml.attach` has adapted."""
    model = fresh()
    layer = adapter_layers(model)["model.layers.0.mlp.down_proj"]
    shapes = {"lora_A": (3, layer.in_features), "lora_B": (layer.out_features, 3)}
    layer.adapters["default"] = Core({key: randn(1, *shape).float() for key, shape in shapes.items()}, 2.0)
    return model


BUILDS = {
    "all of a tied model": lambda: plain("llama-bias-tied-wide-heads"),
    "the head alone": lambda: require(plain().requires_grad_(False), "lm_head"),
    "norms beside an adapter": lambda: require(fresh(), "norm", "lm_head"),
    "two adapters": two_adapters,
    "magnitudes": family(use_dora=True),
    "biases": family(bias="all", lora_bias=True),
    "copies and token rows": family(modules_to_save=("norm",), trainable_token_indices=(3, 5)),
    "a start that is kept": family(init_lora_weights="pissa"),
    "the page's adapter": from_the_page,
    "a class of the user's own": with_own_class,
}
WITHOUT_PEFTS_FILES = [
    *(BUILDS[name] for name in ("all of a tied model", "the head alone", "two adapters")),
    *(from_the_page, with_own_class),
]


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_a_resumed_run_ends_in_the_same_bytes_whatever_is_trained(tmp_path, build):
    """Law 11, and no more is written than is trained."""
    config = {"weight_decay": 0.1, "eval_steps": 2, "keep": "best", "held_out": random_rows(2, 3)}
    expected, _ = run(tmp_path / "whole", build(), **config, save_steps=2)
    copy_checkpoint(tmp_path / "whole", 4, tmp_path / "half")
    model = build()
    for name, buffer in model.named_buffers():  # another machine's decomposition may differ in a bit
        if name.endswith("start_A"):
            buffer += 1e-6
    found, _ = run(tmp_path / "half", model, **config)
    assert contents(tmp_path / "half") == contents(tmp_path / "whole")
    assert torch.equal(weights(found), weights(expected))
    before = dict(build().named_parameters())
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    written = tmp_path / "whole" / "step-000006"
    trained = {name for name, parameter in expected.named_parameters() if parameter.requires_grad}
    starts = {name for name, _ in expected.named_buffers() if "start_" in name}
    assert set(load_file(written / "trained.safetensors")) == trained | starts
    assert (written / "adapter_config.json").is_file() == (build not in WITHOUT_PEFTS_FILES)


@pytest.mark.parametrize("other", [{"lora_alpha": 7}, {"lora_dropout": 0.0}])
def test_a_run_of_the_pages_adapter_is_not_resumed_with_another_scale_or_dropout(tmp_path, other):
    run(tmp_path, from_the_page(), max_steps=1)
    with pytest.raises(ml.TrainingError, match="other data or settings"):
        run(tmp_path, from_the_page(**other), max_steps=1)


# --- a loss that samples ---


def test_a_loss_samples_anew_at_each_step_and_a_resumed_run_as_the_unbroken_one(tmp_path):
    drawn = []

    def loss(model, rows):
        """-log p of what the model writes, as in reinforcement learning with a reward of 1."""
        (new,) = ml.generate(model, [[1, 2]], 9, temperature=2.0)
        drawn.append(new)
        return -model(torch.tensor([[1, 2, *new]])).log_softmax(-1).sum(), len(new)

    def resumed(directory, seed):
        drawn.clear()
        torch.manual_seed(seed)
        config = ml.TrainConfig(batch_size=1, max_steps=3, save_steps=1, eval_steps=1, save_total_limit=9)
        ml.train(fresh(), [1], config, held_out=[2, 3], checkpoint_dir=directory, loss=loss)
        return drawn.copy()

    whole = resumed(tmp_path / "whole", seed=1)
    steps, (one, other) = whole[::3], whole[1:3]  # after each step two held-out rows
    assert len({*map(tuple, steps)}) == 3
    assert one != other
    copy_checkpoint(tmp_path / "whole", 1, tmp_path / "half")
    assert resumed(tmp_path / "half", seed=2) == whole[3:]
    assert contents(tmp_path / "half", 3) == contents(tmp_path / "whole", 3)


# --- damaged checkpoints ---


def test_a_weight_that_is_not_finite_is_in_no_checkpoint(tmp_path):
    model = fresh()

    def spoil(record):
        if record["step"] == 2:
            next(p for name, p in model.named_parameters() if name.endswith("lora_A")).data[0, 0] = torch.nan

    with pytest.raises(ml.TrainingError, match=r"not written, because .*q_proj\.lora_A\.weight has numbers"):
        run(tmp_path, model, on_step=spoil)
    assert saved(tmp_path) == [1]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("step", value) for value in ("2", None, 99)),
        *(("tokens", None), ("seconds", "1"), ("best_loss", "x")),
    ],
)
def test_a_state_with_a_number_of_another_kind_or_step_is_refused_by_its_name(whole, tmp_path, key, value):
    path = copy_checkpoint(whole, 2, tmp_path) / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    as_written(path.parent)
    with pytest.raises(ml.FormatError, match=rf"step-000002.*state\.json.* {key} (is )?{value!r}"):
        run(tmp_path)
