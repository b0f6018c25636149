"""A second correct implementation of each kind of callable, and what can be seen of any: `KINDS`.

An `observe_…` calls what it is given on drawn inputs and returns what comes out as a list of (value, tolerance).
"""

import copy
import inspect
import math

import torch
import torch.nn.functional as F
from torch import nn

from minilora.testing import implementations as first
from minilora.testing import reference, reference_nf4
from tests.tolerance import MATHS, relative

SINGLE = 1e-5  # float32, two ways
SAMPLED = 0.02  # means and deviations of 40,000 rows, two draws


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def distance(seen, expected):
    """How many times the tolerance two observations are apart; each is a list of (value, tolerance)."""
    return max(apart(value, *wanted) for (value, _), wanted in zip(seen, expected, strict=True))


def apart(value, wanted, tolerance):
    if not isinstance(value, torch.Tensor) or not isinstance(wanted, torch.Tensor):
        return 0.0 if value is wanted or value == wanted else math.inf
    if value.shape != wanted.shape or not tolerance:
        return 0.0 if torch.equal(value, wanted) else math.inf
    return relative(value, wanted, tolerance)


# --- LoRA and DoRA ---

LAYERS = (  # shape of x, out, r, alpha, with a bias, options
    ((2, 3, 6), 5, 2, 5.5, True, {}),
    ((5, 4), 4, 3, 7.0, False, {}),
    ((3,), 4, 5, 2.5, True, {"use_rslora": True}),
    ((6, 5), 7, 4, 3.0, True, {"use_rslora": True, "magnitude": normal(7, seed=9).abs()}),
    ((2, 7), 3, 1, 0.5, False, {"magnitude": normal(3, seed=8).abs()}),
    ((40_000, 4), 3, 2, 3.0, True, {"dropout": 0.6}),
)


class SecondLoRA(nn.Module):
    """Keeps the factors transposed and draws its own mask."""

    def __init__(self, W, b, A, B, alpha, use_rslora=False, dropout=0.0):
        super().__init__()
        self.down, self.up = nn.Parameter(A.T.clone()), nn.Parameter(B.T.clone())
        self.W, self.b, self.keep = W, 0 if b is None else b, 1 - dropout
        self.s = alpha * len(A) ** (-0.5 if use_rslora else -1)

    def forward(self, x):
        kept = (torch.rand_like(x) < self.keep) / self.keep if self.training else 1
        return x @ self.W.T + self.b + x * kept @ self.down @ self.up * self.s


class SecondDoRA(nn.Module):
    def __init__(self, W, b, A, B, alpha, magnitude=None, **options):
        super().__init__()
        self.lora, self.b = SecondLoRA(W, None, A, B, alpha, **options), 0 if b is None else b
        self.m = nn.Parameter(W.square().sum(1).sqrt() if magnitude is None else magnitude.clone())

    def forward(self, x):
        merged = self.lora.W + self.lora.s * (self.lora.down @ self.lora.up).T
        return self.lora(x) * (self.m / merged.detach().square().sum(1).sqrt()) + self.b


SecondDoRA.__signature__ = inspect.signature(first.DoRALayer)


def observe_layer(make):
    return [entry for case in LAYERS for entry in observe_one_layer(make, *case)]


def observe_one_layer(make, shape, out, r, alpha, has_bias, options):
    x, W, A, B = (normal(*size, seed=i) for i, size in enumerate((shape, (out, shape[-1]), (r, shape[-1]), (out, r))))
    b, dropout = normal(out, seed=5) if has_bias else None, "dropout" in options
    x = x[:1].repeat(len(x), 1) if dropout else x
    norm = W.norm(dim=1)
    accepted = inspect.signature(make).parameters
    layer = make(W, b, A, B, alpha, **{name: value for name, value in options.items() if name in accepted})
    trained = (A, B, options.get("magnitude", norm)) if "magnitude" in accepted else (A, B)
    torch.manual_seed(0)
    seen = [*call(layer, x, dropout), *gradients(layer, x, trained, dropout)]
    seen.append((sum(p.numel() for p in layer.parameters() if p.requires_grad), 0))
    seen += [(layer.eval()(x).detach(), MATHS), (layer.eval()(x).detach(), MATHS)]
    with torch.no_grad():
        parameter_of(A, layer)[0].mul_(2)
    seen += [(layer(x).detach(), MATHS), *call(layer.train(), x, dropout)]
    return seen + [(now, 0) for now in (W, b, x)]


def call(layer, x, dropout):
    y = layer(x).detach()
    return [(y.mean(0), SAMPLED), (y.std(0), SAMPLED)] if dropout else [(y, MATHS)]


def gradients(layer, x, trained, dropout):
    leaf = x.clone().requires_grad_()
    y = layer(leaf * 1)
    (y if dropout else y * normal(*y.shape, seed=6)).sum().backward()
    yield (True, 0) if dropout else (leaf.grad, MATHS)
    for tensor in trained:
        parameter, transposed = parameter_of(tensor, layer)
        gradient = None if parameter is None else parameter.grad
        yield gradient if gradient is None or not transposed else gradient.T, SAMPLED if dropout else MATHS


def parameter_of(tensor, layer):
    """The layer's parameter that has a tensor's value, or its transpose's."""
    for parameter in layer.parameters():
        for transposed in (False, True) if tensor.ndim == 2 else (False,):
            view = parameter.mT if transposed and parameter.ndim == 2 else parameter
            if view.shape == tensor.shape and relative(view, tensor, MATHS) <= 1:
                return parameter, transposed
    return None, False


# --- merging and sums ---


def second_merge(W, A, B, scale, *magnitude):
    args = [tensor.numpy() for tensor in (W, A, B)]
    if magnitude:
        return torch.from_numpy(reference.dora_merged_weight(*args, scale, magnitude[0].numpy()))
    return torch.from_numpy(reference.lora_merged_weight(*args, scale))


def observe_merge(merge):
    seen = []
    for seed, (out, features, r) in enumerate([(5, 3, 2), (4, 4, 3)]):
        W, A, B = (normal(*shape, seed=seed) for shape in ((out, features), (r, features), (out, r)))
        for magnitude in ((), (normal(out, seed=7).abs(),)):
            seen += [(merge(W, A, B, 2.5, *magnitude), MATHS), (W.clone(), 0)]
    return seen


def second_sum(adapters, weights):
    """Adapters add by concatenating ranks."""
    B = torch.cat([w * scale * B for (_, B, scale), w in zip(adapters, weights, strict=True)], dim=1)
    return torch.cat([A for A, _, _ in adapters]), B, 1.0


def observe_sum(add):
    seen = []
    for ranks in ((2, 3), (2, 2, 2), (1,)):
        adapters = [(normal(r, 4, seed=r + i), normal(5, r, seed=9 * r + i), 0.5 + i) for i, r in enumerate(ranks)]
        total = add(adapters, [0.7, -1.5, 2.0][: len(ranks)])
        seen.append((total[2] * total[1] @ total[0] if isinstance(total, tuple) else total, MATHS))
        seen += [(A, 0) for A, _, _ in adapters]
    return seen


# --- four bits ---


def second_nf4():
    def quantize(W, block_size):
        codes, absmax = reference_nf4.nf4_quantize(W.numpy(), block_size)
        packed = reference_nf4.nf4_pack(codes.tolist())
        return torch.tensor(list(packed), dtype=torch.uint8), torch.from_numpy(absmax).float()

    def dequantize(packed, absmax, shape, block_size):
        flat = reference_nf4.nf4_dequantize(bytes(packed.tolist()), absmax.numpy(), math.prod(shape), block_size)
        return torch.from_numpy(flat).float().view(*shape)

    return quantize, dequantize


def weights():
    """Weights of all sorts, each with a block size."""
    plain = normal(6, 48, seed=0, dtype=torch.float32)
    ties = [m.item() for m, low, high in midpoints(first.LEVELS) if 2 * m.double() == low.double() + high.double()]
    yield from (
        (plain, 32),
        (normal(5, 7, seed=1, dtype=torch.float32), 32),
        (plain[:4, :32].T, 64),
        (1e-6 * plain, 64),
    )
    yield from ((1e6 * plain, 64), (torch.zeros(2, 32), 32), (-plain.abs(), 32), (torch.tensor([[1.0, *ties]]), 64))
    yield normal(40, 32, seed=2, dtype=torch.float32), 1024


def midpoints(levels):
    return zip((levels[1:] + levels[:-1]) / 2, levels[:-1], levels[1:], strict=True)


def observe_nf4(pair):
    quantize, dequantize = pair
    seen = []
    for W, block_size in weights():
        W = W.clone()
        packed, absmax = quantize(W, block_size)
        seen += [(packed, 0), (absmax, 0), (W, 0)]
        if packed.numel() == -(-W.numel() // 2):
            seen.append((dequantize(packed, absmax, tuple(W.shape), block_size), SINGLE))
        else:
            seen.append((None, 0))
    return seen


def second_double_quant():
    def quantize(absmax):
        codes, scales, offset = reference_nf4.absmax_quantize(absmax.numpy())
        return torch.from_numpy(codes).to(torch.uint8), torch.from_numpy(scales).float(), torch.tensor(offset).float()

    def dequantize(codes, scales, offset):
        flat = reference_nf4.absmax_dequantize(codes.tolist(), scales.numpy(), offset.item())
        return torch.from_numpy(flat).float()

    return quantize, dequantize


def observe_double_quant(pair):
    quantize, dequantize = pair
    seen = []
    for count, size in ((600, 1.0), (256, 1e6), (7, 1e-3)):
        absmax = size * (1 + 0.2 * normal(count, seed=count, dtype=torch.float32))
        codes, scales, offset = quantize(absmax)
        seen += [
            (codes, 0),
            (scales, SINGLE),
            (offset, SINGLE),
            (dequantize(codes, scales, offset), SINGLE),
            (absmax, 0),
        ]
    return seen


class Second4bit(nn.Module):
    def __init__(self, W, b):
        super().__init__()
        codes, self.absmax = second_nf4()[0](W, 64)
        self.codes, self.shape, self.b = codes, W.shape, 0 if b is None else b

    def forward(self, x):
        return torch.einsum("...i,oi->...o", x, second_nf4()[1](self.codes, self.absmax, self.shape, 64)) + self.b


def observe_linear4bit(make):
    seen = []
    for out, features, has_bias in ((6, 48, True), (16, 16, False)):
        W, b = (normal(*size, seed=out, dtype=torch.float32) for size in ((out, features), (out,)))
        layer = make(W, b if has_bias else None)
        for shape in ((3, features), (1, features), (2, 2, features)):
            x = normal(*shape, seed=1, dtype=torch.float32).requires_grad_()
            y = layer.train()(x)
            (y * normal(*y.shape, seed=2, dtype=torch.float32)).sum().backward()
            seen += [(y.detach(), SINGLE), (x.grad, SINGLE), (layer.eval()(x).detach(), SINGLE), (W, 0)]
        seen.append((sum(p.numel() for p in layer.parameters() if p.requires_grad), 0))
    return seen


# --- losses and gradients ---


def second_loss(logits, labels):
    log_p = logits[:, :-1] - torch.logsumexp(logits[:, :-1], -1, keepdim=True)
    chosen = log_p.gather(2, labels[:, 1:, None].clamp(min=0))[..., 0]
    return -chosen[labels[:, 1:] != -100].mean()


def labels_of(*rows):
    return torch.tensor(rows)


LABELS = (
    labels_of([-100, -100, 3, 0, 2, -100], [1, 4, -100, 3, -100, 2]),
    labels_of([-100, 1, 0, 4, -100, -100], [-100] * 6, [2, -100, -100, -100, -100, 3]),
)


def observe_loss(loss):
    seen = []
    for labels in LABELS:
        for size in (1.0, 1000.0):
            logits, labels = (size * normal(*labels.shape, 5, seed=len(labels))).requires_grad_(), labels.clone()
            value = loss(logits, labels)
            value.backward()
            seen += [(value.detach(), MATHS), (logits.grad, MATHS), (labels, 0)]
    return seen


def second_step(W, micro_batches):
    """dW = (softmax - one-hot)ᵀ x / count, over the labelled tokens."""
    x = torch.cat([x[:, :-1].reshape(-1, W.shape[1]) for x, _ in micro_batches])
    labels = torch.cat([labels[:, 1:].flatten() for _, labels in micro_batches])
    x, labels = x[labels != -100], labels[labels != -100]
    return ((x @ W.T).softmax(-1) - F.one_hot(labels, len(W))).T @ x / len(x)


def observe_step(step):
    W, seen = normal(5, 4, seed=0), []
    batches = [(normal(*labels.shape, 4, seed=i), labels) for i, labels in enumerate([*LABELS, LABELS[0][:1]])]
    for micro_batches in (batches, [*batches[:2], (batches[0][0], torch.full_like(LABELS[0], -100))], batches[1:]):
        seen += [(step(W, micro_batches), MATHS), (W.clone(), 0)]
    return seen


# --- chats ---


def talk(*turns):
    return [{"role": {"s": "system", "u": "user", "a": "assistant"}[who], "content": text} for who, text in turns]


CHATS = (
    talk(("s", "be brief"), ("u", "say yes please"), ("a", "yes"), ("u", "and now"), ("a", "no it is not")),
    talk(("u", "one"), ("a", "two three"), ("a", "four"), ("u", "five"), ("a", "")),
    talk(("u", "one"), ("a", "two"), ("u", "three")),
    talk(
        ("u", "only a question"),
    ),
)


def second_chat(messages):
    tokens, is_label = [], []
    for message in messages:
        added = f"<|{message['role']}|> {message['content']} <|end|>".split()
        learned = message["role"] == "assistant"
        is_label += [learned and i > 0 for i in range(len(added))] + [False]
        tokens += [*added, "\n"]
    return tokens, is_label


def observe_chat(render):
    seen = []
    for messages in copy.deepcopy(CHATS):
        seen += [(tuple(map(tuple, render(messages))), 0), (messages, 0)]
    return seen


# --- files ---


def observe_files(files):
    arrays = {name: (array.shape, array.tobytes()) for name, array in files["tensors"].items()}
    return [(files["config"], 0), (arrays, 0)]


KINDS = {
    "lora": (observe_layer, first.LoRALayer, SecondLoRA),
    "dora": (observe_layer, first.DoRALayer, SecondDoRA),
    "merge": (observe_merge, first.merge, second_merge),
    "adapter_sum": (observe_sum, first.add_adapters, second_sum),
    "nf4": (observe_nf4, (first.nf4_quantize, first.nf4_dequantize), second_nf4()),
    "double_quant": (observe_double_quant, (first.double_quantize, first.double_dequantize), second_double_quant()),
    "linear4bit": (observe_linear4bit, first.Linear4bit, Second4bit),
    "loss_masking": (observe_loss, first.masked_loss, second_loss),
    "accumulation": (observe_step, first.accumulated_gradient, second_step),
    "chat_mask": (observe_chat, first.render_chat, second_chat),
    "adapter_directory": (observe_files, first.adapter_files(), first.adapter_files()),
}
