"""On a device other than the CPU, a simulated one: results are the CPU's, and laws of what is copied, waited for, kept.

Each work is a function of a device, a dtype and a folder, and returns all that it computes.
"""

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import minilora as ml
from minilora import cli, definition
from minilora.adapters.layout import WEIGHTS_FILE
from minilora.cli import selftest
from minilora.files import read_json
from minilora.kernels import llama as heads
from minilora.kernels import llama as tiles
from minilora.models.bitsandbytes import FP4_LEVELS
from minilora.nf4 import NF4Linear
from minilora.runs.evaluate import choice_accuracy, example_loss, held_out_loss, measure_forgetting
from minilora.runs.memory import Plan, forecast
from minilora.testing import kernel_laws
from minilora.testing.compare import assert_maths, assert_parity
from recipes import classify_texts, distill, dpo, grpo, loraplus, tinylora, vera
from scripts import operations
from tests.adapters import many_kinds
from tests.models import (
    CONFIGS,
    FAMILIES,
    MOST_DIFFERENT,
    WHOLE,
    four_bit,
    long,
    matrix,
    of_kernels,
    randomize_adapters_,
    tiny_model,
    token_ids,
)
from tests.runs import finetune, write_inputs
from tests.test_selftest import some_cases
from tests.training import adapted, number, random_rows, trained

try:
    from tests.simulated import MEMORY, RANDOM, Generator, traffic, without_float64
except ImportError as error:
    pytest.skip(f"PyTorch {torch.__version__} has no backends in Python: {error}", allow_module_level=True)

STEPS = 2
IDS = token_ids(1, 2, 9)
ROWS = random_rows(0, 8)
PROMPTS = [[1, 2, 9], [5, 3]]
TIMES = {"tokens_per_second", "peak_memory_bytes"}


@pytest.fixture(autouse=True)
def _generators(monkeypatch):
    monkeypatch.setattr(torch, "Generator", Generator)


def on(device, model):
    """Move a model to a device, where `Module.to` would make two weights of a shared one if they are of a subclass."""
    model.to(device).tie_weights()
    return model


def fp4(model):
    """The model in the other format of bitsandbytes."""
    for linear in (each for each in four_bit(model, double_quant=False).modules() if isinstance(each, NF4Linear)):
        linear.layout = replace(linear.layout, levels=FP4_LEVELS)
    return model


METHODS = {  # the base of a dense model, whether to use DoRA, and the family
    "LoRA": (lambda model: model, False, "smollm3-window"),
    "QLoRA": (four_bit, False, "smollm3-window"),
    "DoRA": (lambda model: model, True, "smollm3-window"),
    "DoRA on 4 bits": (four_bit, True, "smollm3-window"),
    "LoRA on FP4": (fp4, False, "llama"),
    "QLoRA beside delta rules": (four_bit, False, "qwen3.5"),
}


def adapted_on(device, method, dtype=torch.float64):
    """A tiny model with an adapter, quantized on the device."""
    base, use_dora, family = METHODS[method]
    config = {"layers": 2, "lora_dropout": 0.3, "use_dora": use_dora}
    return adapted(family, dtype, base=lambda model: base(on(device, model)), **config)


def train(model, checkpointing="none", batches=1, on_step=None, folder=None, loss=None):
    """Train for `STEPS` steps of so many micro-batches."""
    config = ml.TrainConfig(batch_size=2, gradient_accumulation_steps=batches, gradient_checkpointing=checkpointing)
    ml.train(model, random_rows(0, 2 * batches * STEPS), config, on_step, checkpoint_dir=folder, loss=loss)


# --- results ---


def resumed(device, dtype, folder, method, checkpointing):
    """Train a model, each step in a run that is stopped after it and resumed; generate, write, read and merge."""
    losses, ids = [], IDS.to(device)
    for _ in range(STEPS):
        model = adapted_on(device, method, dtype)
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
    return found


def learned(model, rows=ROWS, loss=None, folder=None, optimizer=None, is_stopped=False):
    """Two steps of two micro-batches and an evaluation: what is logged, and what was trained."""
    records, config = [], ml.TrainConfig(batch_size=2, gradient_accumulation_steps=2, max_steps=2, eval_steps=2)
    stop = lambda record: records.append(record) or is_stopped  # noqa: E731
    ml.train(model, rows, config, stop, rows[:2], folder, loss, optimizer)
    logged = {f"{key} {i}": number(r[key]) for i, r in enumerate(records) for key in r.keys() - TIMES}
    return logged | trained(model)


def used(model, device):
    """What comes of a model with adapters: of training, of samples of a batch, of scores, and of merging."""
    found = learned(model) | {"held out": number(held_out_loss(model, ROWS))}
    samples = ml.generate(model, PROMPTS, 3, temperature=0.9, top_p=0.9, seed=1, n=2, log_probs=True)
    found |= {"samples": torch.tensor(samples), "log p": number([sample.log_probs for sample in samples])}
    found["accuracy"] = number(choice_accuracy(model, ROWS, [(1,), (2, 3)]))
    found["forgetting"] = number([*vars(measure_forgetting(model, ROWS)).values()])
    ml.merge(model)
    return found | {"merged": model(IDS.to(device))}


def of_family(device, dtype, folder, family):
    return used(adapted(family, dtype, base=partial(on, device), lora_dropout=0.2), device)


def of_kind(device, dtype, folder, kind):
    return used(adapted(WHOLE, dtype, base=partial(on, device), **CONFIGS[kind]), device)


def of_file(device, dtype, folder, make=four_bit, quantize=None):
    """A model that is loaded from a file, and may be quantized meanwhile."""
    ml.save_model(make(tiny_model(dtype=dtype)), folder / "model")
    model = ml.load_model(folder / "model", dtype, device, quantize)
    ml.attach(model, ml.LoraConfig(r=3, lora_alpha=6, use_dora=True), dtype=dtype)
    randomize_adapters_(model)
    return used(model, device)


def several(device, dtype, folder):
    """Two adapters that act together, and then their weighted sum."""
    model = adapted(WHOLE, dtype, base=partial(on, device), name="a")
    ml.attach(model, ml.LoraConfig(r=2, lora_alpha=6), "b", seed=1, dtype=dtype)
    randomize_adapters_(model)
    ml.set_adapter(model, ["a", "b"])
    found = learned(model)
    ml.combine_adapters(model, {"a": 0.5, "b": -2.0}, "sum")
    return found | {"sum": model(IDS.to(device))}


def merged_file(device, dtype, folder, target):
    ml.save_model(four_bit(tiny_model(dtype=dtype)), folder / "model")
    ml.save_adapter(adapted(dtype=dtype), folder / "adapter")
    flags = {name: f"{folder}/{name}" for name in ("model", "adapter")} | {"target": target, "device": device}
    assert cli.main(["merge", f"--out={folder}/merged", *(f"--{key}={value}" for key, value in flags.items())]) == 0
    return load_file(folder / "merged" / "model.safetensors")


def of_another_library(device, dtype, folder):
    """A module that draws from the device's random state, in a run that is stopped after each step."""

    def loss(model, rows):
        y = model(torch.tensor(rows, device=next(model.parameters()).device)).square()
        return y.sum(), len(rows), {"largest": (y.amax(), 1), "all": (y.sum(), y.new_tensor(len(rows)))}

    found = {}
    for _ in range(STEPS):
        model = nn.Sequential(many_kinds(dtype), nn.Dropout(0.4)).to(device)
        ml.attach(model, ml.LoraConfig(r=2, target_modules="all-linear"), dtype=dtype)
        found |= learned(model, [[i, 2 * i] for i in range(4)], loss, folder / "checkpoints", is_stopped=True)
    return found


def by_command(device, dtype, folder):
    """Fine-tune, generate, measure and quantize by the command."""
    assert finetune(write_inputs(folder, dtype), folder / "run", device=device, eval_steps=2, samples=2) == 0
    model, adapter = (f"{folder}/{name}" for name in ("model", "run"))
    for words in (["generate", "--prompt=the cat"], ["eval", f"--data={folder}/rows.jsonl"]):
        assert cli.main([*words, f"--adapter={adapter}", f"--device={device}"]) == 0
    assert cli.main(["quantize", f"--model={model}", f"--out={folder}/packed", f"--device={device}"]) == 0
    scores = read_json(folder / "run" / "summary.json")
    losses = number([scores[when]["loss"] for when in ("before", "after")])
    return {
        "losses": losses,
        **load_file(folder / "run" / WEIGHTS_FILE),
        **load_file(folder / "packed/model.safetensors"),
    }


TOKENIZER = type("", (), {"stop_ids": (), "decode": staticmethod(str)})
PAIRS = list(zip(ROWS[::2], ROWS[1::2], strict=True))
ASKED = [{"prompt": prompt} for prompt in PROMPTS]


def of_recipe(device, dtype, folder, name):
    """What a recipe trains."""
    model = adapted(dtype=dtype, base=partial(on, device), layers=2)
    if name == "dpo":
        return learned(model, PAIRS, dpo.dpo_loss)
    if name == "grpo":
        reward = lambda row, text: len(text)  # noqa: E731
        return learned(model, ASKED, partial(grpo.grpo_loss, tokenizer=TOKENIZER, reward=reward, max_new_tokens=3))
    if name == "distill":
        teacher = on(device, tiny_model(dtype=dtype, seed=1))
        loss = partial(distill.distillation_loss, teacher=teacher, stop_ids=(), max_new_tokens=3)
        return learned(model, PROMPTS, loss)
    if name == "loraplus":
        return learned(
            model, optimizer=lambda parameters: torch.optim.AdamW(loraplus.groups(model, 1e-3, 16), fused=True)
        )
    ml.detach(model)
    if name == "classify_texts":
        model = classify_texts.Classifier(model, ["no", "yes"]).to(device)
        ml.attach(model, ml.LoraConfig(modules_to_save=("score",)), dtype=dtype)
        rows = [classify_texts.Row(row.tokens, i % 2) for i, row in enumerate(ROWS)]
        return learned(model, rows, classify_texts.class_loss)
    if name == "vera":
        vera.attach_vera(model, ["q_proj"], 3)
    else:
        tinylora.attach_tinylora(model, ["q_proj"], u=3)
    return learned(model)


RECIPES = ("dpo", "grpo", "distill", "loraplus", "classify_texts", "vera", "tinylora")
WORKS = {
    **{f"the family {name}": partial(of_family, family=name) for name in FAMILIES},
    **{f"{name}, an adapter": partial(of_kind, kind=name) for name in CONFIGS},
    "4 bits made while loading": partial(of_file, make=lambda model: model, quantize="nf4"),
    "a file of bitsandbytes": of_file,
    "a file without double quantization": partial(of_file, make=partial(four_bit, double_quant=False)),
    "a file of FP4": partial(of_file, make=fp4),
    "several adapters": several,
    **{f"a merge to {target}": partial(merged_file, target=target) for target in ("dequantized", "requantized")},
    "another library's module": of_another_library,
    **{f"the recipe {name}": partial(of_recipe, name=name) for name in RECIPES},
    "the command": by_command,
}
EVERY_THIRD = [*CONFIGS][::3]
QUICK = {name for name in WORKS if name.partition(", ")[0] in EVERY_THIRD or name.split()[-1] in MOST_DIFFERENT}
QUICK |= {name for name in WORKS if not name.startswith("the family") and not name.endswith(", an adapter")}
works = pytest.mark.parametrize("name", [name if name in QUICK else long(name)[0] for name in WORKS])


def assert_as_on_the_cpu(work, folder, definitions=nullcontext):
    """A work on the device gives what it gives on the CPU by the definitions alone."""
    with definitions():
        found = work("sim", torch.float64, folder / "sim")
    with ml.plain():
        expected = work("cpu", torch.float64, folder / "cpu")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        compare = assert_maths if tensor.dtype == torch.float64 else assert_parity
        compare(found[name].detach().cpu(), tensor.detach())


@matrix(3, method=METHODS, way=("none", "mlp", "block", "plain"))
def test_a_stopped_run_merging_and_files_are_those_of_the_definitions_on_the_cpu(method, way, tmp_path):
    work = partial(resumed, method=method, checkpointing="none" if way == "plain" else way)
    assert_as_on_the_cpu(work, tmp_path, ml.plain if way == "plain" else nullcontext)


@works
def test_every_work_gives_what_it_gives_on_the_cpu(name, tmp_path):
    for device in ("sim", "cpu"):
        (tmp_path / device).mkdir()
    assert_as_on_the_cpu(WORKS[name], tmp_path)


@works
def test_no_work_in_float32_needs_float64_on_the_device(name, tmp_path):
    with without_float64():
        WORKS[name]("sim", torch.float32, tmp_path)


def test_every_law_of_the_self_test_holds(monkeypatch):
    monkeypatch.setattr(selftest, "laws", some_cases(7))
    off, no_grad = torch.inference_mode(False), torch.no_grad()  # in inference mode no subclass of Tensor can be split
    monkeypatch.setattr(torch, "inference_mode", lambda mode=True: no_grad if mode else off)
    monkeypatch.delitem(kernel_laws.WAYS, " under inference_mode")
    with without_float64():
        assert cli.main(["selftest", "--device", "sim"]) == 0


def test_a_run_leaves_the_random_state_of_the_device_as_it_was(tmp_path):
    before = RANDOM.get_state()
    of_another_library("sim", torch.float32, tmp_path)
    assert torch.equal(RANDOM.get_state(), before)


def test_tables_that_were_copied_in_inference_mode_serve_training():
    definition._copy.cache_clear()
    model = adapted_on("sim", "QLoRA")
    with torch.inference_mode():
        model(IDS.to("sim"))
    train(model)


# --- what is copied to the device, and what is waited for ---


def with_metrics(model, rows):
    """A loss whose metrics are tensors of the device."""
    total, count = example_loss(model, rows)
    return total, count, {"total": (total, count), "length": (total.new_full((), len(rows)), total.new_ones(()))}


BATCHES = 2
# Besides tokens, the places of labels, labels and rotations: more of them, and the chunks of delta rules.
MORE = {"QLoRA beside delta rules": 1, "gemma3": 1, "ministral3": 1}


@of_kernels
@pytest.mark.parametrize("method", [*METHODS, "gemma3", "ministral3"])
@pytest.mark.parametrize("has_metrics", [False, True])
def test_a_step_waits_once_and_once_for_metrics_and_copies_four_or_five_tensors_a_micro_batch(method, has_metrics):
    model = (
        adapted_on("sim", method) if method in METHODS else adapted(method, base=partial(on, "sim"), lora_dropout=0.3)
    )
    model(IDS.to("sim"))  # copies the tables of 4-bit weights, if nothing has before
    with traffic() as seen:
        train(model, "block", BATCHES, loss=with_metrics if has_metrics else None)  # computes most of it twice
    assert len(seen.waits) == STEPS * (1 + has_metrics), seen.waits
    assert sum(each.bytes for each in seen.waits) == STEPS * (16 + has_metrics * BATCHES * 3 * 8)  # what is logged
    assert len(seen.copies) <= STEPS * BATCHES * (4 + MORE.get(method, 0)), Counter(seen.copies)
    assert max(each.bytes for each in seen.copies) <= 8 * max(len(row.tokens) for row in ROWS) * 24  # hidden size


@of_kernels
@pytest.mark.parametrize("options", [{}, {"log_probs": True}, {"temperature": 1.0, "n": 2, "log_probs": True}])
@pytest.mark.parametrize("family", ["smollm3-window", "qwen3.5"])
def test_generation_waits_once_a_token(family, options):
    model = tiny_model(family).to("sim")
    with traffic() as seen:
        ml.generate(model, PROMPTS, 5, **options)
    assert len(seen.waits) == 5, Counter(seen.waits)
    assert len(seen.copies) <= 5 * 6, Counter(seen.copies)


MISTAKES = {  # what they are seen as
    "a tensor on the CPU": (lambda x: x + torch.zeros(x.size(-1)), "same device"),
    "float64": (lambda x: x.double().float(), "no torch.float64"),
    "indices on the CPU": (lambda x: x[torch.arange(len(x))], "copies"),
    "a copy": (lambda x: x + torch.zeros(x.size(-1)).to(x.device, non_blocking=True), "copies"),
    "a copy of Python's numbers": (lambda x: x + torch.tensor([0.0], device=x.device), "waits"),
    "item": (lambda x: x + 0 * x.sum().item(), "waits"),
    "item in the backward pass": (lambda x: x.register_hook(lambda grad: grad + 0 * grad.sum().item()) and x, "waits"),
    "a condition": (lambda x: x if x.isfinite().all() else 0 * x, "waits"),
    "a mask": (lambda x: x + 0 * x[x > 0].sum(), "waits"),
    "numbers on the CPU": (lambda x: x + 0 * x.cpu().sum(), "waits"),
}


@of_kernels
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_each_layer_is_seen_with_its_line(name):
    change, kind = MISTAKES[name]
    line = f"tests/test_device.py:{change.__code__.co_firstlineno}"
    model = adapted_on("sim", "LoRA", torch.float32)
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, x: change(x))
    is_refused = kind not in ("copies", "waits")
    refused = pytest.raises((RuntimeError, TypeError), match=f"{kind}.* at {line}") if is_refused else nullcontext()
    with traffic() as seen, without_float64(), refused:
        train(model)
    if not is_refused:
        assert Counter(each.line for each in getattr(seen, kind))[line] == STEPS * len(model.model.layers)


# --- what the device keeps ---


@pytest.mark.parametrize("quantize", [None, "nf4", "file"])
def test_a_model_is_never_twice_on_the_device_while_it_loads(quantize, tmp_path):
    model = tiny_model(dtype=torch.float32, num_hidden_layers=16)
    ml.save_model(four_bit(model) if quantize == "file" else model, tmp_path / "model")
    largest = max(p.nbytes for p in model.parameters())
    ml.load_model(tmp_path / "model", device="sim", quantize="nf4" if quantize else None)  # tables that stay
    start = MEMORY.start()
    model = ml.load_model(tmp_path / "model", device="sim", quantize="nf4" if quantize else None)
    own = sum(p.nbytes for p in model.parameters())
    assert MEMORY.live - start == own
    assert MEMORY.peak - start <= own + 3 * largest < 1.5 * own


@of_kernels
@pytest.mark.parametrize("checkpointing", [*long("mlp"), "none", "block"])
@pytest.mark.parametrize("method", ["LoRA", "DoRA", "QLoRA"])
def test_the_peak_of_a_run_is_within_10_percent_of_the_forecast_for_the_device(method, checkpointing, monkeypatch):
    """With tiles and chunks of rows as small beside the model as they are beside a real one.

    All attention is in windows, by minilora's own kernel: the device has none of PyTorch's that keep no scores.
    """
    monkeypatch.setattr(tiles, "tile_size", lambda device: 2**14)
    monkeypatch.setattr(heads, "HEAD_LOGITS", 2**18)
    sizes = {"hidden_size": 128, "intermediate_size": 448, "vocab_size": 3000, "sliding_window": 150}
    model = tiny_model("mistral", dtype=torch.float32, **sizes)
    lora = ml.LoraConfig(r=8, use_dora=method == "DoRA")
    quantization = ml.QuantizeConfig("nf4" if method == "QLoRA" else "none")
    rows = [ml.Example(ids, ids) for ids in token_ids(0, 4, 200, high=3000).tolist()]
    config = ml.TrainConfig(batch_size=2, gradient_checkpointing=checkpointing)
    lengths = [(len(row.tokens), row.labelled) for row in rows]
    device = torch.device("sim")
    planned = forecast(Plan(model.config, lora, config, quantization, torch.float32, device, lengths))[checkpointing]
    start = MEMORY.start()
    model = on(device, four_bit(model) if method == "QLoRA" else model)
    ml.attach(model, lora)
    ml.train(model, rows, config)
    taken = MEMORY.peak - start
    assert abs((planned.peak - planned.overhead) / taken - 1) < 0.1, (planned, taken)


def test_the_table_of_operations_with_limits_stands_in_the_documents():
    assert operations.table() in Path("docs/internals/devices.md").read_text()
