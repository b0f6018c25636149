"""Memory told in advance against memory that was taken: of PyTorch's allocator, of autograd, of the process."""

import copy
import math
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import minilora as ml
from minilora.adapters.find import adapter_layers
from minilora.adapters.layers import AdapterLinear
from minilora.models import ops
from minilora.runs import diagnose, memory
from minilora.runs.diagnose import free_memory_bytes, peak_memory_bytes
from minilora.runs.evaluate import held_out_loss, measure_drift
from minilora.runs.flat import Flat
from minilora.runs.memory import fitting, forecast, largest
from minilora.runs.optimizer import learning
from tests.models import FAMILIES, allocated, four_bit, long, tiny_model, token_ids
from tests.training import random_rows, trained

CPU = torch.device("cpu")
LENGTHS, LABELLED = [7, 5, 9], 11
WAYS = ("none", "mlp", "block")
LONG = pytest.mark.long
MODES = [(kind, dtype) for kind in ("lora", "qlora") for dtype in (torch.float32, torch.bfloat16)]
MODES += [("full", torch.float32), ("some", torch.float32)]
modes = pytest.mark.parametrize(
    ("kind", "dtype"), [pytest.param(*mode, marks=[] if mode == ("qlora", torch.bfloat16) else LONG) for mode in MODES]
)
ways = pytest.mark.parametrize("recompute", ["block", *long("none", "mlp")])


def adapted(family="llama", kind="lora", dtype=torch.float32, vocab_size=61, layers=2, **config):
    model = tiny_model(family, dtype=dtype, vocab_size=vocab_size, num_hidden_layers=layers)
    if kind == "qlora":
        four_bit(model)
    if kind == "full":
        return model
    if kind == "some":
        config = {"use_dora": True, "bias": "all", "modules_to_save": ("norm",), **config}
        config |= {"trainable_token_indices": (3, 5), "init_lora_weights": "pissa"}
    ml.attach(model, ml.LoraConfig(**{"r": 3, **config}))
    return model


def told(model, lengths=LENGTHS, labelled=LABELLED, evaluated=(), **config):
    return forecast(model, lengths, labelled, ml.TrainConfig(**config), CPU, evaluated)


def step(model, recompute):
    """One micro-batch with `LENGTHS` and `LABELLED`, forward, loss and backward."""
    tokens, targets = token_ids(0, sum(LENGTHS)), token_ids(1, sum(LENGTHS))
    targets[LABELLED:] = ops.IGNORE_INDEX

    def work():
        hidden = model.model(tokens, LENGTHS, recompute=recompute)
        loss = ops.cross_entropy(hidden, targets, model.lm_head)
        del hidden
        loss.backward()

    return work


# --- a step ---


@modes
@ways
@pytest.mark.parametrize("family", ["mistral", *long("phi3")])
def test_activations_are_to_the_byte_what_lives_after_the_trunk_s_forward_pass(family, recompute, kind, dtype):
    model = adapted(family, kind, dtype).train()
    tokens = token_ids(0, sum(LENGTHS))
    live, *_ = allocated(lambda: model.model(tokens, LENGTHS, recompute=recompute))
    assert told(model, recompute=recompute).activations == live


@LONG
@pytest.mark.parametrize("kind", ["some", "lora"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_activations_are_what_autograd_saves_beyond_parameters_and_the_result(family, kind):
    model = adapted(family, kind, layers=4).train()
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        return kept.setdefault(storage.data_ptr(), storage) and tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pack(model.model(token_ids(0, sum(LENGTHS)), LENGTHS))
    assert told(model).activations == sum(storage.nbytes() for at, storage in kept.items() if at not in known)


@pytest.mark.parametrize("kind", ["full", *long("lora", "qlora")])
@ways
@pytest.mark.parametrize("family", ["llama", *long("phi3")])
def test_the_peak_is_that_of_the_allocator_but_for_the_indices_of_rows(family, recompute, kind):
    """In float32; in bfloat16 some kernels have float32 copies of their own, in the forecast they have none."""
    model = adapted(family, kind).train()
    found = told(model, recompute=recompute)
    flat = Flat(model, learning(model, ml.TrainConfig()))
    flat.zero_grad()
    _, most, _ = allocated(step(model, recompute))
    gaps = sum(segment.values.nbytes for segment in flat.segments) - sum(p.nbytes for p in trained(model).values())
    batch = 8 * (sum(LENGTHS) + 2 * LABELLED)  # the stand-in for it is made within a step
    besides = found.weights + found.adapters + found.gradients + found.optimizer + gaps
    assert 0 <= found.peak - besides - most <= batch


@pytest.mark.parametrize(("V", "rows"), [(49_152, 512), (128_256, 196), (10**9, 1)])
def test_the_larger_the_vocabulary_the_fewer_rows_have_their_logits_at_once(V, rows):
    head = torch.nn.Linear(1, V, bias=False, device="meta")
    assert ops.head_chunk(head) == ops.head_chunk(AdapterLinear(head, "lm_head")) == rows


def test_not_all_of_a_long_loss_is_traced(monkeypatch):
    """And nothing else is told for that."""
    model, chunks = adapted(layers=1), []

    def traced(hidden, labels, head):
        chunks.append(-(-len(hidden) // ops.head_chunk(head)))
        return cross_entropy(hidden, labels, head)

    cross_entropy = ops.labelled_cross_entropy
    monkeypatch.setattr(ops, "labelled_cross_entropy", traced)
    monkeypatch.setattr(ops, "head_chunk", lambda head: 2)
    some = told(model)
    monkeypatch.setattr(memory, "HEAD_CHUNKS", LABELLED)
    assert told(model) == some
    assert chunks[0] == 2 < chunks[-1]


def test_a_model_that_looks_at_its_numbers_cannot_be_told_of():
    model = adapted()
    model.model.norm.register_forward_hook(lambda module, inputs, output: print(float(output.sum())))
    with pytest.raises(ml.TrainingError, match="recompute 'auto' cannot tell"):
        ml.train(model, random_rows(0, 2), ml.TrainConfig(max_steps=1, recompute="auto"))


@modes
@pytest.mark.parametrize("family", ["llama-bias-tied-wide-heads", *long("phi3")])
def test_parameters_gradients_and_optimizer_are_those_of_a_run(family, kind, dtype):
    model = adapted(family, kind, dtype)
    found = told(model)
    factors = {p for layer in adapter_layers(model).values() for p in layer.adapters.parameters()}
    assert found.weights == sum(p.nbytes for p in model.parameters()) - sum(p.nbytes for p in factors)
    optimizers, buffers = [], {}

    def see(record):
        for p in trained(model).values():
            storage = p.grad.untyped_storage()
            buffers[storage.data_ptr()] = storage.nbytes()

    hook = register_optimizer_step_post_hook(lambda optimizer, *_: optimizers.append(optimizer))
    try:
        ml.train(model, random_rows(0, 4), ml.TrainConfig(max_steps=1), see)
    finally:
        hook.remove()
    assert found.gradients == sum(buffers.values())
    moments = [state[key] for state in optimizers[0].state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert found.optimizer == sum(moment.nbytes for moment in moments)
    casts = found.gradients // 2 if dtype == torch.bfloat16 else 0
    assert found.adapters == sum(p.nbytes for p in factors) + casts


@ways
@pytest.mark.parametrize("family", ["llama", *long("mistral")])
def test_many_documents_take_what_as_many_tokens_in_fewer_do(family, recompute, monkeypatch):
    lengths = [3, 1, 4, 1, 5, 9, 2, 6]
    alone = told(adapted(family), lengths, 10, lengths, recompute=recompute)
    monkeypatch.setattr(memory, "DOCUMENTS", 3)
    assert told(adapted(family), lengths, 10, lengths, recompute=recompute) == alone


@pytest.mark.parametrize("kind", ["lora", *long("full")])
def test_the_best_of_what_is_trained_is_held_besides(kind):
    model = adapted(kind=kind)
    kept = told(model, keep="best", eval_steps=1)
    assert kept.peak - told(model).peak == (kept.weights if kind == "full" else kept.adapters)


@pytest.mark.parametrize("kind", ["qlora", *long("lora")])
def test_no_number_of_the_model_is_read_and_the_model_stays_as_it_is(kind):
    model = adapted(kind=kind, lora_dropout=0.5)
    expected = told(model)
    before = copy.deepcopy(model.state_dict())
    assert told(adapted(kind=kind, lora_dropout=0.5).to("meta")) == expected
    assert not model.training
    assert not any(layer.dropout_seeds for layer in adapter_layers(model).values())
    ml.set_dropout_step(model, 0, 0)
    assert told(model) == expected
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- many layers ---


def traced_depths(monkeypatch):
    """A list to which comes how many layers are traced."""
    traced, depths = memory._traced, []
    monkeypatch.setattr(memory, "_traced", lambda *args: depths.append(args[1]) or traced(*args))
    return depths


@LONG
@pytest.mark.parametrize(("kind", "dtype"), MODES)
@pytest.mark.parametrize("recompute", WAYS)
def test_two_and_three_layers_tell_of_seven_alike(kind, dtype, recompute, monkeypatch):
    depths = traced_depths(monkeypatch)
    model = adapted("llama", kind, dtype, layers=7)
    lengths = [5, 3]
    found = told(model, evaluated=lengths, recompute=recompute)
    assert depths == [2, 3]
    monkeypatch.setattr(memory, "_alike", lambda model: False)
    assert told(model, evaluated=lengths, recompute=recompute) == found
    assert depths == [2, 3, 7]


@LONG
def test_layers_that_are_not_alike_are_all_traced(monkeypatch):
    depths = traced_depths(monkeypatch)
    told(adapted(layers=4, rank_pattern={"layers.2.mlp.up_proj": 5}))
    told(adapted("smollm3-window", layers=4))
    told(adapted(layers=3))
    assert depths == [4, 4, 3]


# --- what fits ---


@pytest.mark.parametrize("way", WAYS)
def test_auto_is_the_fastest_way_whose_forecast_fits_with_room_for_what_none_sees(way):
    peaks = {"none": 300, "mlp": 200, "block": 100}
    told_of = []

    def told(way):
        told_of.append(way)
        return SimpleNamespace(peak=peaks[way])

    free = math.ceil(peaks[way] / memory.ROOM)
    assert fitting(told, free)[0] == way
    assert tuple(told_of) == WAYS[: WAYS.index(way) + 1]
    assert fitting(told, free - 1)[0] == WAYS[min(2, WAYS.index(way) + 1)]
    assert fitting(told, None)[0] == "none"


@pytest.mark.parametrize("way", ["mlp", *long("none", "block")])
def test_a_run_computes_again_as_auto_finds_it_fits_beside_the_model(way, monkeypatch):
    rows, seen, model = random_rows(0, 9), [], adapted()
    config = ml.TrainConfig(batch_size=2, max_steps=1, recompute="auto")
    lengths, labelled = [len(row.tokens) for row in rows], [row.labelled for row in rows]
    peak = told(model, *largest(lengths, labelled, config), recompute=way).peak
    room = peak - sum(p.nbytes for p in model.parameters())
    monkeypatch.setattr(memory, "free_memory_bytes", lambda device: math.ceil(room / memory.ROOM))
    model.model.register_forward_pre_hook(lambda *call: seen.append(call[2]["recompute"]), with_kwargs=True)
    ml.train(model, rows, config)
    assert seen[-1] == way


# --- evaluations ---


@LONG
def test_an_evaluation_takes_what_was_told_or_less_even_where_it_is_more_than_a_step():
    model = adapted(vocab_size=3000)
    rows = [ml.Example(row.tokens, row.tokens, row.source) for row in random_rows(3, 9)]  # general text
    lengths = [len(row.tokens) for row in rows]
    found = told(model, [2], 1, evaluated=lengths)
    held = found.weights + found.adapters + found.gradients + found.optimizer
    assert found.peak > told(model, [2], 1).peak
    drift = allocated(lambda: measure_drift(model, rows))[1]
    assert allocated(lambda: held_out_loss(model, rows))[1] <= drift
    assert 0.8 * (found.peak - held) <= drift <= found.peak - held


# --- the process ---


needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")


def in_a_process(code):
    """The numbers that it prints."""
    run = [sys.executable, "-c", code]
    return [int(each) for each in subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()]


@LONG
def test_the_peak_is_what_the_process_took_at_most_since_the_import():
    """The process that starts this one may have held much more."""
    code = """if True:
        import minilora, torch
        from minilora.runs.diagnose import peak_memory_bytes
        numbers = torch.ones(2**26)
        del numbers
        print(peak_memory_bytes(torch.device("cpu")))"""
    ballast = torch.ones(2**28)
    (peak,) = in_a_process(code)
    del ballast
    assert 2**28 <= peak < 2**28 + 2**26


@needs_glibc
def test_while_a_run_lasts_memory_is_taken_from_the_system_once():
    """100 MB, taken a second time: the percentage of the first time's pages that are cleared for it."""
    code = """if True:
        import torch
        from contextlib import nullcontext
        from resource import RUSAGE_SELF, getrusage
        from minilora.runs.allocator import kept_memory
        def faults():
            before = getrusage(RUSAGE_SELF).ru_minflt
            torch.ones(25_000_000)
            return getrusage(RUSAGE_SELF).ru_minflt - before
        for keeping in (nullcontext, kept_memory):
            with keeping():
                first, second = faults(), faults()
            print(100 * second // first)"""
    before, kept = in_a_process(code)
    assert kept < 5
    assert before > 50


@needs_glibc
def test_after_a_run_its_memory_is_given_back():
    """Gradients and moments of 25 million numbers, and a block that is taken and given back afterwards."""
    code = """if True:
        import minilora as ml, torch
        from minilora.runs.allocator import release_memory
        from minilora.runs.diagnose import held_memory_bytes
        def loss(model, rows):
            return sum((p * p).sum() for p in model.parameters()), 1
        model = torch.nn.Sequential(*(torch.nn.Linear(1000, 1000) for _ in range(25)))
        ml.train(model, [0], ml.TrainConfig(max_steps=1), loss=loss)
        torch.ones(100_000_000)
        held = held_memory_bytes(torch.device("cpu"))
        release_memory()
        print(held - held_memory_bytes(torch.device("cpu")))"""
    assert in_a_process(code)[0] < 50_000_000


def test_what_the_import_took_is_no_part_of_the_peak(monkeypatch):
    monkeypatch.setattr(diagnose, "AT_IMPORT", 0)
    whole = peak_memory_bytes(CPU)
    monkeypatch.setattr(diagnose, "AT_IMPORT", 1000)
    assert peak_memory_bytes(CPU) - whole + 1000 in range(2**20)
    assert whole > 2**27 or sys.platform not in ("linux", "darwin")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A Linux machine with 900 kB to give, by its files."""

    def write(files):
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)

    monkeypatch.setattr(diagnose, "LINUX", tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")
    write({"proc/meminfo": "MemTotal:   2000 kB\nMemAvailable:    900 kB\n"})
    return write


def v2(group, limit, used, cached=0):
    """The files of a control group."""
    folder = f"sys/fs/cgroup/{group}"
    stat = f"anon 7\ninactive_file {cached}\n"
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": stat,
    }


def v1(group, limit, used, cached):
    folder = f"sys/fs/cgroup/memory/{group}"
    stat = f"inactive_file 1\ntotal_inactive_file {cached}\n"
    files = {"memory.limit_in_bytes": f"{limit}\n", "memory.usage_in_bytes": f"{used}\n", "memory.stat": stat}
    return {f"{folder}/{name}": text for name, text in files.items()}


CASES = {  # the groups of the process, their files, and what is free
    "no groups": (None, {}, 900 * 1024),
    "a limit of v2": ("0::/a/b\n", v2("a/b", 5000, 3000, 400), 2400),
    "a limit of a group around": ("0::/a/b\n", v2("a/b", "max", 3000) | v2("a", 9000, 8000), 1000),
    "a container, whose group is the top": ("0::/docker/x\n", v2("", 100, 300), 0),
    "a limit of v1": ("4:cpu:/z\n3:memory:/a\n0::/\n", v1("a", 5000, 4000, 10), 1010),
    "no limit in v1": ("3:memory:/\n", v1("", 2**63 - 4096, 4000, 10), 900 * 1024),
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_what_is_free_is_the_least_that_machine_and_groups_allow(machine, case):
    groups, files, expected = CASES[case]
    machine(files if groups is None else {"proc/self/cgroup": groups, **files})
    assert free_memory_bytes(CPU) == expected


def test_of_a_mac_the_memory_is_told_and_of_the_unknown_nothing(machine, monkeypatch, tmp_path):
    (tmp_path / "proc/meminfo").unlink()
    assert free_memory_bytes(CPU) is None
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": 3, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert free_memory_bytes(CPU) == 3 * 4096
