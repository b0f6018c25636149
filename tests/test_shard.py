"""A base whose blocks are divided among processes computes, learns and holds what a whole one does."""

import json
import multiprocessing as processes
import os
import traceback
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from itertools import product

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, multiprocessing

import minilora as ml
from minilora.data import collate
from minilora.models.bitsandbytes import QuantizeConfig
from minilora.models.classifier import grow_vocabulary, load_classifier
from minilora.models.shard import held_bytes, load_sharded, local, own_rows, whole
from minilora.nf4 import NF4Linear
from minilora.runs.evaluate import choice_accuracy, held_out_loss, measure_drift
from minilora.runs.seeded import set_dropout_step
from minilora.testing.compare import assert_maths, assert_parity
from minilora.training import token_loss
from tests.files import save_file, write_base
from tests.models import CONFIGS, WHOLE, allocated, long, perturb_, small_tiles, token_ids
from tests.training import gradients, number, random_rows, trained

CPU, SECONDS = torch.device("cpu"), 120
SIZES = {"hidden_size": 64, "intermediate_size": 136, "num_hidden_layers": 2}  # down_proj's rows end within blocks
FEW_ROWS = {"num_key_value_heads": 1, "head_dim": 2}  # fewer rows of k_proj than processes
LARGE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "vocab_size": 64}
DENSE_ONLY = ("norms in full", "a parameter", "only parameters")  # which change weights that are packed otherwise
SINGLE = QuantizeConfig("nf4", double_quant=False)
HELD = {"dense": None, "nf4": "nf4", "nf4 without double quantization": SINGLE}
STEPS = 20


def adapted(model, **config):
    """The model with an adapter that has learned something."""
    ml.attach(model, ml.LoraConfig(**{"r": 2, "lora_alpha": 6, **config}), dtype=torch.float64)
    perturb_(model)
    return model


def gradient(model, rows, recompute):
    """Of the sum over some rows, one after the other; a row is the dropout step of its index."""
    model.train().zero_grad()
    for parameter in trained(model).values():
        parameter.grad = torch.zeros_like(parameter)
    for index, row in rows:
        set_dropout_step(model, 0, index)
        token_loss(model, collate([row], CPU), recompute)[0].backward()
    return gradients(model)


# --- what the processes do; a name for each case that is found wrong ---


class Cases:
    def __init__(self, folder, rank, size, is_long):
        self.folder, self.rank, self.size, self.is_long, self.failures = folder, rank, size, is_long, []

    @contextmanager
    def of(self, *words):
        try:
            yield
        except Exception:
            self.failures.append(f"rank {self.rank}, {' '.join(map(str, words))}: {traceback.format_exc(limit=-3)}")


def check_gradients(cases):
    """Each process takes its share of the rows; the sum is the gradient of all of them."""
    rows = list(enumerate(random_rows(0, 4)))
    ways = list(product(("none", "mlp", "block"), (nullcontext, ml.plain)))
    names = CONFIGS if cases.is_long else ("LoRA", "DoRA", "all biases", "rows of tokens", "the head in full", "PiSSA")
    asked = [(WHOLE, name, held) for name, held in product(names, ("dense", "nf4"))]
    asked = [each for each in asked if not (each[2] == "nf4" and each[1] in DENSE_ONLY)]
    asked += [(WHOLE, "norms in full", "dense"), (WHOLE, "a parameter", "dense"), ("few rows", "DoRA", "nf4")]
    asked += [(family, "DoRA", "dense") for family in ("few rows", "qwen3", "phi3")]
    for index, (family, name, held) in enumerate(asked):
        (recompute, how), directory = ways[index % len(ways)], cases.folder / family
        with cases.of(family, name, held, recompute, how.__name__), how():
            one = adapted(ml.load_model(directory, "float64", quantize=HELD[held]), **CONFIGS[name])
            expected = gradient(one, rows, recompute)
            divided = load_sharded(None, (), directory, "float64", "cpu", HELD[held])
            found = gradient(adapted(divided, **CONFIGS[name]), rows[cases.rank :: cases.size], recompute)
            distributed.all_reduce(found)
            assert_parity(found, expected, 1e-10)


def check_loading(cases):
    """Every parameter has the bytes of one process, and each process its own rows of them."""
    asked = [*product((WHOLE, "few rows", "phi3"), HELD), ("stored nf4", "dense"), ("stored single", "dense")]
    for family, held in asked:
        with cases.of("loading", family, held):
            one = ml.load_model(cases.folder / family, "float64", quantize=HELD[held])
            divided = load_sharded(None, (), cases.folder / family, "float64", "cpu", HELD[held])
            assert divided.name_or_path == one.name_or_path
            assert not divided.training
            there = dict(divided.named_parameters())
            assert there.keys() == dict(one.named_parameters()).keys()
            for name, parameter in one.named_parameters():
                assert torch.equal(whole(there[name]), parameter), name
                own = own_rows(len(parameter)) if ".layers." in name else slice(None)
                assert torch.equal(local(there[name]), parameter[own]), name


def check_memory(cases):
    """A process holds its share of the blocks, and not much more while it loads them."""
    file = cases.folder / "large" / "model.safetensors"
    largest = max(tensor.nbytes for tensor in load_file(file).values())
    for held in HELD:
        with cases.of("bytes", held):
            one = ml.load_model(file.parent, "float32", quantize=HELD[held])
            bytes_of_blocks = held_bytes(one.model.layers)

            def load(held=held):
                return load_sharded(None, (), file.parent, "float32", "cpu", HELD[held])

            load()  # the first imports and prepares
            with pytest.MonkeyPatch.context() as patch:
                small_tiles(patch, 2**12)
                _, most, divided = allocated(load, mapped=file.stat().st_size)
            offsets = 4 * sum(isinstance(module, NF4Linear) for module in one.modules())  # single numbers, which one has
            expected = held_bytes(one) - bytes_of_blocks + bytes_of_blocks / cases.size
            assert abs(held_bytes(divided) - expected) <= offsets
            assert most <= held_bytes(divided) + largest / cases.size, f"{most} {held_bytes(divided)} {largest}"


def check_bad_weight(cases):
    """A number that is not finite in one process's rows is found by all, which do not wait for each other."""
    for path in ("mlp.up_proj", "mlp.down_proj"):
        with cases.of("not finite", path), pytest.raises(ml.FormatError, match=f"{path}.weight: .* not finite"):
            load_sharded(None, (), cases.folder / f"bad {path}", "float64", "cpu", "nf4")


def check_evaluation(cases):
    rows, prompts = random_rows(1, 5), [[1, 2, 3], [4], [7, 8]]
    for held in ("dense", "nf4"):
        directory = cases.folder / WHOLE
        one = adapted(ml.load_model(directory, "float64", quantize=HELD[held]), use_dora=True)
        divided = load_sharded(None, (), directory, "float64", "cpu", HELD[held])
        adapted(divided, use_dora=True)
        choices = [(5, 6), (7, 8, 9)]
        told = [ml.Example([3, 4, *choice], [-100, -100, *choice]) for choice in choices]
        for work in (
            lambda model: held_out_loss(model, rows),
            lambda model: choice_accuracy(model, told, choices),
            lambda model: measure_drift(model, rows).kl,
        ):
            with cases.of("evaluation", held):
                assert_maths(number(work(divided)), number(work(one)))
        for settings in ({}, {"temperature": 0.7, "seed": 3}):
            with cases.of("generate", held, settings):
                written = [ml.generate(model, prompts, max_new_tokens=9, **settings) for model in (divided, one)]
                assert written[0] == written[1]


def check_start_values(cases):
    rows = random_rows(2, 6)
    for init, held in product(("eva", "corda", "lora_ga"), ("dense", "nf4")):
        with cases.of(init, held):
            one = ml.load_model(cases.folder / WHOLE, "float64", quantize=HELD[held])
            divided = load_sharded(None, (), cases.folder / WHOLE, "float64", "cpu", HELD[held])
            for model in (one, divided):
                losses = (token_loss(model, collate([row], CPU))[0] for row in rows)
                config = ml.LoraConfig(r=2, lora_alpha=6, init_lora_weights=init)
                ml.attach(model, config, dtype=torch.float64, losses=losses)
            there = trained(divided)
            for name, parameter in trained(one).items():
                assert_maths(there[name], parameter)
    with cases.of("loftq"), pytest.raises(ml.ConfigError, match="divided among ranks"):
        divided = load_sharded(None, (), cases.folder / WHOLE, "float64", "cpu", None)
        ml.attach(divided, ml.LoraConfig(init_lora_weights="loftq", r=2))


def check_files(cases):
    """An adapter is saved as with a whole base, and loaded again; a merge needs the base."""
    ids = token_ids(0, 2, 5)
    names = ("DoRA", "all biases", "rows of tokens", "PiSSA")
    for name, held in [*product(names, ("dense", "nf4")), ("norms in full", "dense"), ("OLoRA", "dense")]:
        with cases.of("files", name, held):
            one = adapted(ml.load_model(cases.folder / WHOLE, "float64", quantize=HELD[held]), **CONFIGS[name])
            divided = load_sharded(None, (), cases.folder / WHOLE, "float64", "cpu", HELD[held])
            adapted(divided, **CONFIGS[name])
            places = [cases.folder / f"{cases.rank} {name} {held} {i}" for i in range(2)]
            for model, place in zip((one, divided), places, strict=True):
                ml.save_adapter(model, place)
            for file in ("adapter_config.json", "adapter_model.safetensors"):
                assert (places[0] / file).read_bytes() == (places[1] / file).read_bytes(), file
            again = load_sharded(None, (), cases.folder / WHOLE, "float64", "cpu", HELD[held])
            ml.load_adapter(again, places[1], trainable=True)
            assert_maths(again(ids), one(ids))
            with pytest.raises(ml.ConfigError, match="divided among ranks"):
                ml.merge(again)


def check_heads(cases):
    """New tokens, and classifiers with a new head."""
    ids = token_ids(0, 2, 5)
    with cases.of("new tokens"):
        one = ml.load_model(cases.folder / WHOLE, "float64")
        divided = load_sharded(None, (), cases.folder / WHOLE, "float64", "cpu", None)
        for model in (one, divided):
            grow_vocabulary(model, 64)
            adapted(model, trainable_token_indices=(61, 63))
        rows = list(enumerate(random_rows(3, 2, vocabulary=64)))
        assert_maths(gradient(divided, rows, "none"), gradient(one, rows, "none"))
    for unit, held in product(("sequence", "token"), ("dense", "nf4")):
        with cases.of("classifier", unit, held):
            labels = ("a", "b", "c")
            one = load_classifier(cases.folder / WHOLE, unit, labels, "float64", "cpu", HELD[held], seed=3)
            divided = load_sharded(unit, labels, cases.folder / WHOLE, "float64", "cpu", HELD[held], seed=3)
            for model in (one, divided):
                ml.attach(model, ml.LoraConfig(r=2, modules_to_save=("score",)), dtype=torch.float64)
            assert_maths(divided(ids), one(ids))


def losses_of(model):
    """The losses of some steps of a run on all rows."""
    found = []
    config = ml.TrainConfig(max_steps=STEPS, batch_size=2, gradient_accumulation_steps=2, recompute="mlp")
    ml.train(model, random_rows(5, 12), config, lambda record: found.append(record["loss"]))
    return number(found)


def check_training(cases, expected):
    for (name, held), losses in expected.items():
        with cases.of("losses", name, held):
            divided = load_sharded(None, (), cases.folder / WHOLE, "float64", "cpu", HELD[held])
            assert_parity(losses_of(adapted(divided, **CONFIGS[name])), losses, 1e-9)


def work(rank, size, folder, is_long):
    """In one of the processes: all cases, and what is found wrong as a file."""
    asked = [("LoRA", "dense"), ("DoRA", "nf4")]
    models = (ml.load_model(folder / WHOLE, "float64", quantize=HELD[held]) for _, held in asked)
    expected = {each: losses_of(adapted(m, **CONFIGS[each[0]])) for each, m in zip(asked, models, strict=True)}
    place = f"file://{folder / f'meet {size} {is_long}'}"
    distributed.init_process_group(
        "gloo", init_method=place, rank=rank, world_size=size, timeout=timedelta(seconds=SECONDS)
    )
    cases = Cases(folder, rank, size, is_long)
    checks = [check_loading, check_bad_weight, check_gradients]
    if size == 2 or is_long:
        checks += [check_memory, check_evaluation, check_start_values, check_files, check_heads]
    for check in checks:
        check(cases)
    check_training(cases, expected)
    (folder / f"{size} {rank}.json").write_text(json.dumps(cases.failures))
    distributed.barrier()
    distributed.destroy_process_group()
    os._exit(0)  # at a usual end threads of PyTorch may be found running, which ends the process in an abort


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The bases that are loaded."""
    folder = tmp_path_factory.mktemp("bases")
    for family in (WHOLE, "qwen3", "phi3"):
        write_base(folder / family, family, torch.float64, **SIZES)
    write_base(folder / "few rows", dtype=torch.float64, **SIZES, **FEW_ROWS)
    write_base(folder / "large", **LARGE)
    write_base(folder / "stored nf4", WHOLE, torch.float32, "nf4", **SIZES)
    write_base(folder / "stored single", WHOLE, torch.float32, SINGLE, **SIZES)
    for path in ("mlp.up_proj", "mlp.down_proj"):
        file = write_base(folder / f"bad {path}", dtype=torch.float64, **SIZES) / "model.safetensors"
        tensors = load_file(file)
        tensors[f"model.layers.1.{path}.weight"][3, 5] = torch.inf
        save_file(tensors, file)
    return folder


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize(("size", "is_long"), [(2, False), (4, False), *long((2, True), (4, True))])
def test_a_divided_base_gives_what_a_whole_one_gives_in_so_many_processes(size, is_long, folder):
    processes.set_forkserver_preload([__name__])  # one import of PyTorch for all
    multiprocessing.start_processes(work, (size, folder, is_long), nprocs=size, start_method="forkserver")
    failures = [each for rank in range(size) for each in json.loads((folder / f"{size} {rank}.json").read_text())]
    assert not failures, f"{len(failures)} cases:\n" + "\n".join(failures[:5])
