"""A base whose blocks are divided among processes computes, learns and holds what a whole one does."""

import traceback
from contextlib import contextmanager, nullcontext
from itertools import product

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

import minilora as ml
from minilora.adapter import adapter_layers
from minilora.data import IGNORE_INDEX, collate
from minilora.models.bitsandbytes import QuantizeConfig
from minilora.models.fsdp import load_sharded, local, own_rows, whole
from minilora.nf4 import NF4Linear
from minilora.runs.evaluate import choice_accuracy, held_out_loss, measure_forgetting
from minilora.testing.compare import assert_maths, assert_parity
from minilora.training import token_loss
from tests.files import save_file, write_base
from tests.models import CONFIGS, WHOLE, allocated, long, perturb_, set_dropout_step, small_tiles, token_ids
from tests.ranks import on_ranks
from tests.training import gradients, number, random_rows, trained

CPU = torch.device("cpu")
SIZES = {"hidden_size": 64, "intermediate_size": 136, "num_hidden_layers": 2}  # down_proj's rows end within blocks
FEW_ROWS = {"num_key_value_heads": 1, "head_dim": 2}  # fewer rows of k_proj than processes
LARGE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "vocab_size": 64}
DENSE_ONLY = ("norms in full",)  # which change weights that are packed otherwise
SINGLE = QuantizeConfig("nf4", double_quant=False)
HELD = {"dense": None, "nf4": "nf4", "nf4 without double quantization": SINGLE}
STEPS = 5


def adapted(model, **config):
    """The model with an adapter that has learned something."""
    ml.attach(model, ml.LoraConfig(**{"r": 2, "lora_alpha": 6, **config}), dtype=torch.float64)
    perturb_(model)
    return model


def gradient(model, rows, checkpointing):
    """Of the sum over some rows, one after the other; a row is the dropout step of its index."""
    model.train()
    for parameter in trained(model).values():
        parameter.grad = torch.zeros_like(parameter)
    for index, row in rows:
        set_dropout_step(model, 0, index)
        token_loss(model, collate([row], CPU), checkpointing)[0].backward()
    set_dropout_step(model, None)
    model.eval()
    return gradients(model)


def losses_of(model):
    """The losses of some steps of a run."""
    found = []
    config = ml.TrainConfig(max_steps=STEPS, batch_size=2, gradient_accumulation_steps=2, gradient_checkpointing="mlp")
    ml.train(model, random_rows(5, 12), config, lambda record: found.append(record["loss"]))
    return number(found)


# --- what the processes do ---


class Cases:
    """The bases, and a text for each case that is found wrong."""

    def __init__(self, folder, rank, size, is_long):
        self.folder, self.rank, self.size, self.is_long = folder, rank, size, is_long
        self.failures, self.loaded = [], {}

    @contextmanager
    def of(self, *words):
        try:
            yield
        except Exception:
            self.failures.append(f"rank {self.rank}, {' '.join(map(str, words))}: {traceback.format_exc(limit=-3)}")

    def bases(self, family, held):
        """A whole base and a divided one, loaded once."""
        if (family, held) not in self.loaded:
            directory = self.folder / family
            one = ml.load_model(directory, "float64", quantize=HELD[held])
            divided = load_sharded(directory, "float64", "cpu", HELD[held])
            self.loaded[family, held] = one, divided
        return self.loaded[family, held]

    @contextmanager
    def adapted(self, family, held, **config):
        """Both with the same adapter, for as long as the block lasts."""
        pair = self.bases(family, held)
        try:
            yield [adapted(model, **config) for model in pair]
        finally:
            for model in pair:
                if adapter_layers(model):
                    ml.detach(model)


def check_loading(cases):
    """Every parameter has the bytes of one process, and each process its own rows of them."""
    asked = [(WHOLE, "dense"), (WHOLE, "nf4"), ("few rows", "nf4 without double quantization"), ("stored nf4", "dense")]
    if cases.is_long:
        asked = [*product((WHOLE, "few rows"), HELD), ("stored nf4", "dense"), ("stored single", "dense")]
    for family, held in [*asked, ("olmo2", "nf4")]:
        with cases.of("loading", family, held):
            one, divided = cases.bases(family, held)
            assert divided.name_or_path == one.name_or_path
            assert not divided.training
            there = dict(divided.named_parameters())
            assert there.keys() == dict(one.named_parameters()).keys()
            for name, parameter in one.named_parameters():
                assert torch.equal(whole(there[name]), parameter), name
                own = own_rows(len(parameter)) if ".layers." in name else slice(None)
                assert torch.equal(local(there[name]), parameter[own]), name


def check_bad_weight(cases):
    """A number that is not finite is found by all processes; none waits for another."""
    for path in ("mlp.up_proj", "mlp.down_proj"):
        with cases.of("not finite", path), pytest.raises(ml.FormatError, match=f"{path}.weight: .* not finite"):
            load_sharded(cases.folder / f"bad {path}", "float64", "cpu", "nf4")


def check_gradients(cases):
    """Each process takes its share of the rows; the sum is the gradient of all of them."""
    rows = list(enumerate(random_rows(0, cases.size)))
    ways = list(product(("none", "mlp", "block"), (nullcontext, ml.plain)))
    asked = [(WHOLE, name, "dense") for name in ("LoRA", "rows of tokens", "norms in full")]
    asked += [(WHOLE, name, "nf4") for name in ("LoRA", "DoRA", "the head in full")]
    asked += [("few rows", "DoRA", "nf4"), ("olmo2", "DoRA", "dense")]
    if cases.is_long:
        asked += [(WHOLE, name, held) for name, held in product(CONFIGS, ("dense", "nf4"))]
        asked = [each for each in asked if not (each[2] == "nf4" and each[1] in DENSE_ONLY)]
        asked += [("few rows", "DoRA", "dense"), ("qwen3", "DoRA", "dense")]
    for index, (family, name, held) in enumerate(asked):
        checkpointing, how = ways[index % len(ways)]
        described, pair = cases.of(family, name, held, checkpointing, how.__name__), (family, held)
        with described, how(), cases.adapted(*pair, **CONFIGS[name]) as (one, divided):
            found = gradient(divided, rows[cases.rank :: cases.size], checkpointing)
            distributed.all_reduce(found)
            assert_parity(found, gradient(one, rows, checkpointing), 1e-10)


def check_training(cases, expected):
    for (name, held), losses in expected.items():
        with cases.of("losses", name, held), cases.adapted(WHOLE, held, **CONFIGS[name]) as (_, divided):
            assert_parity(losses_of(divided), losses, 1e-9)


def check_memory(cases):
    """A process holds its share of the blocks, and at most two weights more while it loads them."""
    file = cases.folder / "large" / "model.safetensors"
    largest = max(tensor.nbytes for tensor in load_file(file).values())
    for held in HELD:
        with cases.of("bytes", held):
            one = ml.load_model(file.parent, "float32", quantize=HELD[held])
            blocks = held_bytes(one.model.layers)

            def load(held=held):
                return load_sharded(file.parent, "float32", "cpu", HELD[held])

            load()  # the first imports and prepares
            with pytest.MonkeyPatch.context() as patch:
                small_tiles(patch, 2**12)
                _, most, divided = allocated(load, mapped=file.stat().st_size)
            offsets = 4 * sum(isinstance(module, NF4Linear) for module in one.modules())  # one number, in one process
            assert abs(held_bytes(divided) - held_bytes(one) + blocks - blocks / cases.size) <= offsets
            assert most <= held_bytes(divided) + 2.01 * largest


def held_bytes(model):
    """The bytes of the parameters that this rank holds."""
    return sum(local(parameter).nbytes for parameter in model.parameters())


def check_evaluation(cases):
    rows, prompts, choices = random_rows(1, 5), [[1, 2, 3], [4], [7, 8]], [(5, 6), (7, 8, 9)]
    chosen = [ml.Example([3, 4, *choice], [IGNORE_INDEX] * 2 + list(choice)) for choice in choices]
    measures = {
        "loss": lambda model: held_out_loss(model, rows),
        "accuracy": lambda model: choice_accuracy(model, chosen, choices),
        "forgetting": lambda model: measure_forgetting(model, rows).kl,
    }
    for held in ("dense", "nf4") if cases.is_long else ("nf4",):
        with cases.adapted(WHOLE, held, use_dora=True) as (one, divided):
            for name, measure in measures.items():
                with cases.of(name, held):
                    assert_maths(number(measure(divided)), number(measure(one)))
            for settings in ({}, {"temperature": 0.7, "seed": 3}):
                with cases.of("generate", held, settings):
                    written = [ml.generate(model, prompts, max_new_tokens=4, **settings) for model in (divided, one)]
                    assert written[0] == written[1]


def check_files(cases):
    """An adapter is saved as with a whole base, and loaded again; a merge needs the base."""
    ids, names = token_ids(0, 2, 5), ("DoRA", "all biases", "rows of tokens", "PiSSA")
    for name, held in [*product(names, ("dense", "nf4")), ("norms in full", "dense")]:
        with cases.of("files", name, held):
            places = [cases.folder / f"{cases.rank} {name} {held} {i}" for i in range(2)]
            with cases.adapted(WHOLE, held, **CONFIGS[name]) as pair:
                for model, place in zip(pair, places, strict=True):
                    ml.save_adapter(model, place)
                expected = pair[0](ids)
                with pytest.raises(ml.ConfigError, match="divided among ranks"):
                    ml.merge(pair[1])
            for file in ("adapter_config.json", "adapter_model.safetensors"):
                assert (places[0] / file).read_bytes() == (places[1] / file).read_bytes(), file
            divided = cases.bases(WHOLE, held)[1]
            ml.load_adapter(divided, places[1], trainable=True)
            assert_maths(divided(ids), expected)
            ml.detach(divided)


def work(folder, is_long, expected):
    """In one of the processes: all cases; what is found wrong."""
    rank, size = distributed.get_rank(), distributed.get_world_size()
    cases = Cases(folder, rank, size, is_long)
    check_loading(cases)
    check_bad_weight(cases)
    check_gradients(cases)
    check_training(cases, expected)
    check_evaluation(cases)
    if is_long:
        check_memory(cases)
        check_files(cases)
    return cases.failures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The bases that are loaded."""
    folder = tmp_path_factory.mktemp("bases")
    for family in (WHOLE, "qwen3", "olmo2"):
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
@pytest.mark.parametrize(("size", "is_long"), [(2, False), *long((4, False), (2, True), (4, True))])
def test_a_divided_base_gives_what_a_whole_one_gives_in_so_many_processes(size, is_long, folder):
    expected = {}
    for name, held in [("DoRA", "nf4"), *([("LoRA", "dense")] if is_long else [])]:
        model = ml.load_model(folder / WHOLE, "float64", quantize=HELD[held])
        expected[name, held] = losses_of(adapted(model, **CONFIGS[name]))
    failures = [each for found in on_ranks(size, work, folder, is_long, expected) for each in found]
    assert not failures, f"{len(failures)} cases:\n" + "\n".join(failures[:5])
