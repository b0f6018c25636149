"""The laws of an adapter's life: ours and one written by hand keep them, and each planted mistake is refused."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import minilora as ml
from minilora import training
from minilora.adapter import adapter_layers
from minilora.data import Example, collate
from minilora.lora import LoraAdapter, LoraLinear, dense_linear
from minilora.nf4 import NF4Linear
from minilora.testing import (
    CheckFailure,
    check,
    check_accumulation,
    check_adapters,
    check_merge_cycle,
    check_recompute,
    check_resume,
    check_roundtrip,
    laws,
    on_numpy,
)
from tests import by_hand
from tests.models import randomize_adapters_, set_dropout_step, tiny_model, token_ids

# --- written by hand, and mistakes in it ---

TAKEN = {
    "roundtrip": lambda own: (own.attach, own.save, own.load),
    "adapters": lambda own: (own.attach, own.switch, own.disabled, own.delete),
    "merge_cycle": lambda own: (own.Merged, own.Merged.merge, own.Merged.unmerge),
    "resume": lambda own: own.run,
    "recompute": lambda own: own.gradients,
    "ranks": lambda own: own.step,
}
CONFIG, STORED = 'config = model.configs["default"]', 'stored["tensors"][f"{where}.{key}"]'
COPY = f"tensor.copy_({STORED})"
TRAINS, ATTACHED = "requires_grad_(other == name)", "    switch(model, name)\n\n\ndef layer_of"
REMOVED = "if name in layer.own:\n            del layer.own[name]\n        layer.scales.pop(name, None)"
SWITCHED = "switch(model, next(iter(model.configs)))"
YIELD = "        yield"
ADD, RESTORE = "self.W += self.scale * self.B @ self.A", "self.W.copy_(self.kept)"
MERGE = "    @torch.no_grad()\n    def merge(self):\n"
EVAL = """    def train(self, mode=True):
        if not mode and {}:
            self.kept = self.W.clone() if self.kept is None else self.kept
            self.W.data += self.scale * self.B.data @ self.A.data
        elif mode and self.kept is not None:
            self.unmerge()
        return super().train(mode)

    @torch.no_grad()
    def merge(self):
        if self.kept is not None:
            return
"""
MERGED, UNMERGED = "(self.W + self.scale * self.B @ self.A)", "(self.W - self.scale * self.B @ self.A)"
NF4 = (
    "(implementations.nf4_dequantize(*implementations.nf4_quantize({0}, 64), self.W.shape, 64) if self.is_nf4 else {0})"
)
OPTIMIZER = 'optimizer.load_state_dict(state["optimizer"])'
RECOMPUTED, DRAWN = "checkpoint(block, h, use_reentrant=False)", "h = torch.randn(6, 5, generator=generator)"
REDUCED, LEAF = "all_reduce(leaf.grad) / all_reduce(count)", "leaf = W.clone()"
RANKS = {"all_reduce=lambda value: value)": "all_reduce=lambda value: value, rank=0, world_size=1)"}


def after(place, *more):
    """Put statements after one."""
    return {place: "; ".join([place, *more])}


MISTAKES = {  # what is wrong: what the source says, and what it says then
    "roundtrip": {
        "alpha is not saved": after(CONFIG, 'config = {**config, "lora_alpha": 8}'),
        "rsLoRA is not saved": after(CONFIG, 'config = {**config, "use_rslora": False}'),
        "alpha of patterns is not saved": after(CONFIG, 'config = {**config, "alpha_pattern": {}}'),
        "alpha is lost by what is loaded": after(
            'attach(model, **stored["config"])', CONFIG, 'config["lora_alpha"] = 1'
        ),
        "what is trained in full is not saved": {
            'if "default" in layer.own:': 'if "default" in layer.scales:',
            STORED: 'stored["tensors"].get(f"{where}.{key}", tensor)',
        },
        "a tied weight is written to": after(COPY, '"default" in layer.scales or layer.base.weight.data.copy_(tensor)'),
        "it is saved in 16 bits": {"] = tensor": "] = tensor.half()"},
        "saving changes what is trained": {"] = tensor": "] = tensor.clone(); tensor.mul_(0.5)"},
        "A and B of one layer are left out": {
            "layers(model).items():\n        for key": "[*layers(model).items()][1:]:\n        for key"
        },
    },
    "adapters": {
        "a switch changes only what acts": {TRAINS: "requires_grad_(other == next(iter(layer.own)))"},
        "of several adapters B alone is trained": {
            TRAINS: f"{TRAINS}\n            if len(model.configs) > 1 and layer.scales:\n"
            "                module[0].requires_grad_(False)"
        },
        "a deleted one is set to zero": {
            REMOVED: "if name in layer.own:\n            nn.init.zeros_(layer.own[name][1].weight)",
            "if acted:": "if False:",
        },
        "names are compared by their beginnings": {TRAINS: "requires_grad_(other.startswith(name))"},
        "modules trained in full are not switched": {
            "layer.active = name": "layer.active = name if layer.scales else next(iter(layer.own))"
        },
        "what is trained in full is trained in all": {TRAINS: "requires_grad_(other == name or not layer.scales)"},
        "all have the scale of the last one": {
            ATTACHED: "    for layer in layers(model).values():\n"
            "        layer.scales = dict.fromkeys(layer.scales, layer.scales.get(name, 1))\n" + ATTACHED
        },
        "the new one acts, and the first one is trained": {
            ATTACHED: ATTACHED.replace(
                "(model, name)",
                "(model, next(iter(model.configs)))\n"
                "    for layer in layers(model).values():\n        layer.active = name",
            )
        },
        "a new one changes the output": {"nn.init.zeros_(B.weight)": "pass"},
        "only the first layer is disabled": {"for layer in before:": "for layer in list(before)[:1]:"},
        "the first one acts after a disabled one": {
            "layer.active = active": "layer.active = next(iter(model.configs))"
        },
        "disabling unfreezes the base": after(YIELD, "model.requires_grad_(True)"),
        "an error leaves all disabled": {"    finally:": "    except ZeroDivisionError:\n        pass\n    else:"},
        "what is trained in full is not disabled": {
            "for layer in before:": "for layer in (own for own in before if own.scales):"
        },
        "what is deleted still acts": {
            "if name in layer.own:\n": "if name in layer.own and layer.active != name:\n",
            "layer.scales.pop(name, None)": "",
            "if acted:": "if False:",
        },
        "those that begin alike are deleted": {
            REMOVED: "for other in [other for other in layer.own if other.startswith(name)]:\n"
            "            del layer.own[other]\n            layer.scales.pop(other, None)"
        },
        "deleting one that does not act switches": {"if acted:": "if True:"},
        "another one acts after a deleted one, and is not trained": {
            "if acted:": "if acted and [setattr(own, 'active', next(iter(model.configs))) for own in model.modules()]:",
            SWITCHED: "pass",
        },
        "deleting one freezes the others for good": {
            REMOVED: "[setattr(layer, 'frozen', True) or own.requires_grad_(False) for own in layer.own.values()]\n"
            f"        {REMOVED}",
            TRAINS: "requires_grad_(other == name and not hasattr(layer, 'frozen'))",
        },
        "what a deleted one trained in full stays in force": {
            "if name in layer.own:\n": "if name in layer.scales:\n",
            SWITCHED: f"active = {{own: own.active for own in layers(model).values()}}\n        {SWITCHED}\n"
            "        for layer in active:\n            layer.active = layer.active if layer.scales else active[layer]",
        },
        "what a deleted one trained in full becomes the base's": {
            "if name in layer.own:\n": "if name in layer.own:\n"
            "            if name not in layer.scales:\n"
            "                layer.base.load_state_dict(layer.own[name].state_dict())\n"
        },
        "a deleted one comes back with its name": {
            "del layer.own[name]": 'layer.old = {**getattr(layer, "old", {}), name: [layer.own.pop(name)]}',
            "= nn.Sequential(A, B)": '= getattr(layer, "old", {}).get(name, [nn.Sequential(A, B)])[0]',
        },
    },
    "merge_cycle": {
        "merged, the adapter acts as well": {"return y if self.kept is not None else y": "return y"},
        "unmerged, the adapter no longer acts": {f"{RESTORE}\n        self.kept = None": RESTORE},
        "the update is rounded to 16 bits": {ADD: "self.W += (self.scale * self.B @ self.A).bfloat16().to(self.W)"},
        "unmerging rounds to 16 bits": {RESTORE: "self.W.copy_(self.kept.half())"},
        "errors of cycles add up in 16 bits": {RESTORE: f"self.W.copy_({UNMERGED})"},
        "the update is computed once": {
            ADD: 'self.update = getattr(self, "update", self.scale * self.B @ self.A); self.W += self.update'
        },
        "unmerging trains W": after(RESTORE, "self.W.requires_grad_(True)"),
        "in evaluation mode it stays merged": {
            RESTORE: f"if not self.training:\n            return\n        {RESTORE}"
        },
        "a merge adds the bias": {
            "return y if self": "y = y if self.kept is None or self.b is None else y + self.b; return y if self"
        },
        "a square update is transposed": {
            ADD: "self.W += self.scale * ((self.B @ self.A).T if len(self.W) == len(self.W.T) else self.B @ self.A)"
        },
        "errors of cycles add up in 4 bits": {
            ADD: f"self.W.copy_({NF4.format(MERGED)})",
            RESTORE: f"self.W.copy_({NF4.format(UNMERGED)})",
        },
        "each eval() merges": {MERGE: EVAL.format("True")},
        "the update is lost in 4 bits": {ADD: "self.W += 0 if self.is_nf4 else self.scale * self.B @ self.A"},
        "a merge in 4 bits has the old absmaxes": {
            ADD: f"self.W.copy_({MERGED}.clamp(-self.W.abs().max(), self.W.abs().max()) if self.is_nf4 else {MERGED})"
        },
    },
    "resume": {
        "moments are lost": {OPTIMIZER: "pass"},
        "the schedule starts again": {'schedule.load_state_dict(state["schedule"])': "pass"},
        "masks start again": {'torch.set_rng_state(state["rng"])': "pass"},
        "weights are saved in 16 bits": {'"model": model[2].state_dict()': '"model": model[2].bfloat16().state_dict()'},
        "the number of AdamW's steps is lost": after(
            OPTIMIZER, '[own["step"].zero_() for own in optimizer.state.values()]'
        ),
        "what is loaded is frozen": after(OPTIMIZER, "model.requires_grad_(False)"),
        "the latest checkpoint is chosen by its name": {
            '(path / "state.pt").exists()': '[*path.glob("*.pt")]',
            'torch.load(path / "state.pt")': 'torch.load(max(path.glob("*.pt")))',
            'path / "state.pt")\n    return': 'path / f"{stop}.pt")\n    return',
        },
        "the first checkpoint is kept": {
            "    torch.save({**state": '    (path / "state.pt").exists() or torch.save({**state'
        },
        "the bias is not saved": {
            'model[2].load_state_dict(state["model"])': 'model[2].weight.data.copy_(state["model"]["weight"])'
        },
    },
    "recompute": {
        "another mask is drawn": {"use_reentrant=False": "use_reentrant=False, preserve_rng_state=False"},
        "it is recomputed without dropout": {
            RECOMPUTED: "checkpoint(lambda x, block=block, calls=[]: "
            "(calls.append(1), block.train(len(calls) == 1), block(x))[2], h, use_reentrant=False)"
        },
        "nothing is recomputed": {f"{RECOMPUTED} if recompute else block(h)": "block(h)"},
        "some gradients are missing": {
            "for name, parameter in model": "for name, parameter in list(model",
            "named_parameters()}": "named_parameters())[recompute:]}",
        },
        "the input changes in between": {
            RECOMPUTED: "(checkpoint(block, h, use_reentrant=False), h.data.mul_(1.1))[0]"
        },
        "the graph is cut": {RECOMPUTED: "checkpoint(block, h.detach().requires_grad_(), use_reentrant=False)"},
    },
    "ranks": {
        "it is the mean of the ranks' means": {
            **RANKS,
            REDUCED: "all_reduce(leaf.grad / count.clamp(min=1)) / world_size",
        },
        "it is divided by the ranks": {**RANKS, REDUCED: f"{REDUCED} / world_size"},
        "labels are counted on each rank": {REDUCED: "all_reduce(leaf.grad) / count"},
        "gradients are added after each micro-batch": {
            'reduction="sum").backward()': 'reduction="sum").backward(); leaf.grad = all_reduce(leaf.grad)',
            REDUCED: "leaf.grad / all_reduce(count)",
        },
        "a rank without labels does not wait": {
            f"return {REDUCED}": f"return {REDUCED} if count else torch.zeros_like(W)"
        },
        "only the first rank has the result": {
            **RANKS,
            f"return {REDUCED}": f"dW = {REDUCED}\n    return dW if rank == 0 else leaf.grad / count",
        },
        "ranks count by their rows": {
            LEAF: "rows = torch.tensor(sum(len(x) for x, _ in micro_batches)); leaf = W.clone()",
            REDUCED: "all_reduce(leaf.grad / count.clamp(min=1) * rows) / all_reduce(rows)",
        },
        "the last rank's labels are not counted": {
            **RANKS,
            REDUCED: "all_reduce(leaf.grad) / all_reduce(count * (rank + 1 < world_size or rank == 0))",
        },
    },
}
RIGHT = {  # done in another way
    "roundtrip": {},
    "merge_cycle": {
        "merging makes a new tensor": {ADD: f"self.W = nn.Parameter({MERGED}, requires_grad=False)"},
        "a merge is quantized again": {ADD: f"self.W.copy_({NF4.format(MERGED)})"},
        "eval() merges": {MERGE: EVAL.format("self.kept is None")},
        "W is subtracted from": {
            RESTORE: f"self.W.copy_(self.kept if self.is_nf4 or self.W.itemsize == 2 else {UNMERGED})"
        },
    },
    "adapters": {
        "a new one does not act": {ATTACHED: ATTACHED.replace("(model, name)", "(model, next(iter(model.configs)))")},
        "the base acts after the one that acted is deleted": {"if acted:": "if acted and switch(model, None):"},
    },
    "recompute": {
        "by reentrant calls": {DRAWN: f"{DRAWN}.requires_grad_()", "use_reentrant=False": "use_reentrant=True"}
    },
    "ranks": {
        "gradients are averaged": {
            **RANKS,
            REDUCED: "all_reduce(leaf.grad / all_reduce(count) * world_size) / world_size",
        }
    },
}


def planted(changes):
    """Return `by_hand` with some of its source changed."""
    source = inspect.getsource(by_hand)
    for old, new in changes.items():
        assert old in source, old
        source = source.replace(old, new)
    module = SimpleNamespace(__name__="by_hand")
    exec(compile(source, "by_hand", "exec"), vars(module))
    return module


def named(table):
    return [
        pytest.param(kind, changes, id=f"{kind}: {name}") for kind in table for name, changes in table[kind].items()
    ]


@pytest.mark.parametrize("kind", TAKEN)
def test_what_is_written_by_hand_keeps_the_laws(kind):
    assert any(report.checked for report in check(TAKEN[kind](by_hand), kind))


@pytest.mark.parametrize(("kind", "changes"), named(RIGHT))
def test_other_ways_that_are_right_keep_them(kind, changes):
    check(TAKEN[kind](planted(changes)), kind)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize(("kind", "changes"), named(MISTAKES))
def test_a_mistake_is_refused(kind, changes):
    with pytest.raises(CheckFailure):
        check(TAKEN[kind](planted(changes)), kind)


# --- ours ---


def attach(model, name="default", **config):
    ml.attach(model, ml.LoraConfig(**config), name)


def load(model, path):
    ml.load_adapter(model, path)


def test_our_files_keep_the_laws():
    assert all(report.checked for report in check_roundtrip(attach, ml.save_adapter, load))


def test_our_adapters_keep_the_laws():
    assert all(
        report.checked for report in check_adapters(attach, ml.set_adapter, ml.disable_adapter, ml.delete_adapter)
    )


def save_merged(model, path):
    ml.merge(model) if adapter_layers(model) else None
    torch.save(model.state_dict(), path)


def load_merged(model, path, unties=True):
    stored = torch.load(path)
    if unties:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.load_state_dict(stored)


def test_merged_models_keep_the_laws_if_a_head_that_was_tied_is_no_longer():
    check_roundtrip(attach, save_merged, load_merged)
    with pytest.raises(CheckFailure, match=r"roundtrip-(tied|whole)_head"):
        check_roundtrip(attach, save_merged, lambda model, path: load_merged(model, path, unties=False))


def merging(W, b, A, B, alpha, quantize=None):
    base = NF4Linear.quantize(W, b, double_quant=False) if quantize else dense_linear(W, b)
    adapter = LoraAdapter({"lora_A": A.detach().clone(), "lora_B": B.detach().clone()}, alpha / len(A))
    layer = LoraLinear(base, "0", {"default": adapter})
    layer.active = ("default",)
    return nn.Sequential(layer)


def merge(model):
    vars(model)["block"] = ml.merged(model)
    model.block.__enter__()


def unmerge(model):
    model.block.__exit__(None, None, None)


def test_our_merged_block_keeps_the_laws():
    assert all(report.checked for report in check_merge_cycle(merging, merge, unmerge))


def test_a_merge_of_numpy_arrays_keeps_them():
    class Layer:
        def __init__(self, W, b, A, B, alpha):
            self.W, self.b, self.update, self.is_merged = W, b, alpha / len(A) * B @ A, False

        def __call__(self, x):
            W = self.W if self.is_merged else self.W + self.update
            return x @ W.T + (0 if self.b is None else self.b)

        def add(self, sign):
            self.W, self.is_merged = self.W + sign * self.update, sign > 0

    functions = [lambda layer, sign=sign: layer.__wrapped__.add(sign) for sign in (1, -1)]
    reports = check_merge_cycle(on_numpy(Layer), *functions)
    assert [report.checked for report in reports] == [True, False, False]


def test_our_runs_are_resumed():
    rows = [Example(row, row) for row in token_ids(0, 8, 6).tolist()]

    def run(path, stop, total):
        model = tiny_model(dtype=torch.float32)
        ml.attach(model, ml.LoraConfig(r=2, lora_dropout=0.3))
        config = ml.TrainConfig(batch_size=2, max_steps=total, learning_rate=0.01)
        ml.train(model, rows, config, lambda record: record["step"] == stop, checkpoint_dir=path)
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    check_resume(run)


@pytest.mark.parametrize("way", ["mlp", "block"])
def test_our_checkpointing_changes_no_gradient(way):
    model = tiny_model()
    ml.attach(model, ml.LoraConfig(r=2, lora_dropout=0.3))
    randomize_adapters_(model)
    model.train()
    batch = collate([Example(row, row) for row in token_ids(0, 3, 9).tolist()], torch.device("cpu"))

    def gradients(recompute, seed):
        set_dropout_step(model, seed)
        model.zero_grad()
        training.token_loss(model, batch, way if recompute else "none")[0].backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    assert all(report.checked for report in check_recompute(gradients))


def test_our_step_on_several_ranks():
    def step(W, micro_batches, all_reduce=lambda value: value):
        model = nn.Linear(*W.T.shape, bias=False, dtype=W.dtype)
        model.weight.data.copy_(W)
        optimizer = torch.optim.SGD(model.parameters(), 1.0)

        def loss(model, batch):
            x, labels = batch
            total = F.cross_entropy(model(x)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
            return total, int((labels[:, 1:] != -100).sum())

        total, count = training.accumulate(model, optimizer, micro_batches, loss)
        model.weight.grad = all_reduce(model.weight.grad)
        training.update(optimizer, all_reduce(total), int(all_reduce(count)), 0.0)
        return model.weight.grad

    assert all(report.checked for report in check_accumulation(step))


# --- what the checks say ---

OTHERS = "[own.data.mul_(0.9) for other in layer.own if other != name for own in layer.own[other].parameters()]"
OF_A = OTHERS.replace("!= name", "== 'a'")
FIRST_WRONG = {  # what changes other adapters: the mistake, and what is found
    "adding": (
        {ATTACHED: f"    for layer in layers(model).values():\n        {OTHERS}\n{ATTACHED}"},
        "adapters-switch: the logits after adding 'ab', switching to 'a': wrong",
    ),
    "switching to the first": (
        {"layer.active = name": f"layer.active = name\n        if name == 'a':\n            {OTHERS}"},
        "adapters-switch: the logits after adding 'b', switching to 'a', switching to 'ab': wrong",
    ),
    "switching from the second": (
        {"layer.active = name": f"if layer.active == 'ab':\n            {OTHERS}\n        layer.active = name"},
        "adapters-switch: the logits after adding 'b', switching to 'a': wrong",
    ),
    "deleting": (
        {REMOVED: f"{OTHERS}\n        {REMOVED}"},
        "adapters-delete: the logits after deleting 'b' while 'ab' acts: wrong",
    ),
    "deleting those that do not act": (
        {REMOVED: f"layer.active == 'ab' and {OF_A}\n        {REMOVED}"},
        "adapters-delete: the logits after deleting 'b' while 'ab' acts, switching to 'a': wrong",
    ),
    "an error": (
        {SWITCHED: "model.register_forward_pre_hook(lambda *_: 1 / 0)"},
        "adapters-delete: the logits after deleting 'ab' while 'ab' acts: wrong",
    ),
}


@pytest.mark.parametrize("what", FIRST_WRONG)
def test_the_operation_is_named_after_which_the_logits_are_wrong(what):
    changes, said = FIRST_WRONG[what]
    with pytest.raises(CheckFailure) as caught:
        check(TAKEN["adapters"](planted(changes)), "adapters")
    assert str(caught.value).startswith(said)


def test_all_laws_are_reported_where_some_are_broken():
    mistake = planted(MISTAKES["roundtrip"]["rsLoRA is not saved"])
    with pytest.raises(CheckFailure) as caught:
        check(TAKEN["roundtrip"](mistake), "roundtrip", all=True)
    lines = str(caught.value).splitlines()
    assert lines[0] == "1 of 10 laws are broken"
    table = {line.split()[0]: line.split()[1] for line in lines[1:11]}
    assert table["roundtrip-rslora"] == "inf"
    assert table["roundtrip-dora"] == "–"
    assert float(table["roundtrip-alpha"]) < 1
    assert caught.value.law == "roundtrip-rslora"
    assert "the logits of what was saved and loaded once: wrong" in str(caught.value)
    assert check(TAKEN["roundtrip"](by_hand), "roundtrip", all=True)


def test_what_is_not_given_is_not_checked():
    reports = {report.law: report.checked for report in check_adapters(by_hand.attach, by_hand.switch)}
    assert reports["adapters-switch"]
    assert not reports["adapters-disable"]
    assert not reports["adapters-delete"]
    assert not any(report.checked for report in check_roundtrip(lambda model, r: None, None, None))
    with pytest.raises(CheckFailure, match="missing 1 required positional argument: 'load'"):
        laws("roundtrip")["alpha"].check((by_hand.attach, by_hand.save))


def test_what_cannot_be_wrong_is_refused():
    def frozen(model, **config):
        return model

    def idle(model, **config):
        model.idle = nn.Parameter(torch.ones(1))

    with pytest.raises(CheckFailure, match="found no parameter that requires a gradient"):
        check_roundtrip(frozen, by_hand.save, by_hand.load)
    with pytest.raises(CheckFailure, match="found logits that do not depend on all that requires a gradient"):
        check_roundtrip(idle, by_hand.save, by_hand.load)
    with pytest.raises(CheckFailure, match="nothing is trained"):
        check_resume(lambda path, stop, total: [torch.zeros(2)])
    with pytest.raises(CheckFailure, match="of a second run: wrong"):
        check_resume(lambda path, stop, total: [torch.rand(2, generator=SHARED)])
    with pytest.raises(CheckFailure, match="found 0 for all gradients"):
        check_recompute(lambda recompute, seed: [torch.zeros(2)])


SHARED = torch.Generator()
