"""On a device other than the CPU, a simulated one: results are the CPU's, and a step waits for the device only once."""

from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file

import minilora as ml
from minilora import definition
from minilora.adapters.layout import WEIGHTS_FILE
from minilora.cli import selftest
from minilora.testing.compare import assert_maths
from tests.models import four_bit, matrix, of_kernels, token_ids
from tests.test_selftest import some_cases
from tests.training import adapted, number, random_rows

try:
    from tests.simulated import Generator, traffic
except ImportError as error:
    pytest.skip(f"PyTorch {torch.__version__} has no backends in Python: {error}", allow_module_level=True)

METHODS = {  # the base of a dense model, whether to use DoRA, and the family
    "LoRA": (lambda model: model, False, "smollm3-window"),
    "QLoRA": (four_bit, False, "smollm3-window"),
    "DoRA": (lambda model: model, True, "smollm3-window"),
    "DoRA on 4 bits": (four_bit, True, "smollm3-window"),
    "QLoRA beside delta rules": (four_bit, False, "qwen3.5"),
}
STEPS = 2
IDS = token_ids(1, 2, 9)


@pytest.fixture(autouse=True)
def _generators(monkeypatch):
    monkeypatch.setattr(torch, "Generator", Generator)


def adapted_on(device, method):
    """A tiny model with an adapter, quantized on the device."""
    base, use_dora, family = METHODS[method]
    config = {"layers": 2, "lora_dropout": 0.3, "use_dora": use_dora}
    return adapted(family, base=lambda model: base(model.to(device)), **config)


def train(model, checkpointing, batches=1, on_step=None, folder=None):
    """Train for `STEPS` steps of so many micro-batches."""
    config = ml.TrainConfig(batch_size=2, gradient_accumulation_steps=batches, gradient_checkpointing=checkpointing)
    ml.train(model, random_rows(0, 2 * batches * STEPS), config, on_step, checkpoint_dir=folder)


# --- results ---


def results(device, method, checkpointing, folder):
    """Train a model on a device, generate, write, read and merge; all that is computed on the way."""
    losses, ids = [], IDS.to(device)
    for _ in range(STEPS):  # each of them in a run that is stopped after it, and resumed
        model = adapted_on(device, method)
        train(model, checkpointing, 1, lambda record: losses.append(record["loss"]) or True, folder / "checkpoints")
    found = {"losses": number(losses), "logits": model(ids)}
    found["generated"] = torch.tensor(ml.generate(model, ids, 3))
    ml.save_adapter(model, folder / "adapter")
    found |= load_file(folder / "adapter" / WEIGHTS_FILE)
    ml.detach(model)
    ml.save_model(model, folder / "base")
    model = ml.load_model(folder / "base", device=device)
    ml.load_adapter(model, folder / "adapter")
    found["logits of what was saved"] = model(ids)
    ml.merge(model)
    ml.save_model(model, folder / "merged")
    found["logits when merged"] = ml.load_model(folder / "merged", device=device)(ids)
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


@matrix(3, method=METHODS, way=("none", "mlp", "block", "plain"))
def test_a_run_merging_and_files_are_those_of_the_definitions_on_the_cpu(method, way, tmp_path):
    is_plain = way == "plain"
    checkpointing = "none" if is_plain else way
    with ml.plain() if is_plain else nullcontext():
        found = results("sim", method, checkpointing, tmp_path / "sim")
    with ml.plain():
        expected = results("cpu", method, checkpointing, tmp_path / "cpu")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_maths(found[name], tensor)


def test_every_law_of_the_self_test_holds(monkeypatch):
    monkeypatch.setattr(selftest, "laws", some_cases(7))
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # in which no subclass of Tensor can be split
    for check in selftest.law_checks(torch.device("sim"), "float32").values():
        check()


def test_tables_that_were_copied_in_inference_mode_serve_training():
    definition._copy.cache_clear()
    model = adapted_on("sim", "QLoRA")
    with torch.inference_mode():
        model(IDS.to("sim"))
    train(model, "none")


# --- what a step copies to the device, and what it waits for ---


def assert_busy(model, checkpointing, copies=8):
    model(IDS.to("sim"))  # copies the tables of 4-bit weights, if nothing has before
    with traffic() as seen:
        train(model, checkpointing, batches=2)
    assert len(seen.waits) == STEPS, seen.waits  # for the loss and the norm of the gradient, together
    assert len(seen.copies) <= copies * STEPS, seen.copies  # tokens, positions, labels, rotations, of a micro-batch


@of_kernels
@pytest.mark.parametrize("method", METHODS)
def test_a_step_waits_once_and_copies_at_most_four_or_five_tensors_a_micro_batch(method):
    copies = 10 if "delta" in method else 8  # the chunks of a micro-batch besides
    assert_busy(adapted_on("sim", method), "block", copies)  # which computes everything, and most of it twice


MISTAKES = {
    "a tensor on the CPU": (lambda x: x + torch.zeros(x.size(-1)), RuntimeError),
    "indices on the CPU": (lambda x: x[torch.arange(len(x))], AssertionError),
    "a copy": (lambda x: x + torch.zeros(x.size(-1)).to(x.device), AssertionError),
    "a copy of Python's numbers": (lambda x: x + torch.tensor([0.0], device=x.device), AssertionError),
    "item": (lambda x: x + 0 * x.sum().item(), AssertionError),
    "a condition": (lambda x: x if x.isfinite().all() else 0 * x, AssertionError),
    "a mask": (lambda x: x + 0 * x[x > 0].sum(), AssertionError),
    "numbers on the CPU": (lambda x: x + 0 * x.cpu().sum(), AssertionError),
}


@of_kernels
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_each_layer_is_seen(name):
    change, error = MISTAKES[name]
    model = adapted_on("sim", "LoRA")
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, x: change(x))
    with pytest.raises(error):
        assert_busy(model, "none")
