# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.5", "safetensors", "tokenizers", "numpy", "jinja2"]
# ///
"""Fine-tune a Llama with LoRA or QLoRA: all of it, in one file to read from top to bottom.

    python nanolora.py                                            # a small built-in model and task
    python nanolora.py --model path/to/smollm2 --data rows.jsonl --adapter mine --nf4      # QLoRA
    python nanolora.py --model path/to/smollm2 --adapter mine --prompt "Why is the sky blue?"

A linear layer stays frozen, and two thin matrices beside it are trained: y = W x + b + s·B A x,
where s = α/r (row vectors: x Wᵀ in code). A model is what its files contain, config.json and
tensors by name, and so is an adapter in PEFT's layout. `Model` is these four dicts.

    B  rows    T  tokens of a row    D  hidden size    V  vocabulary    M  labels    r  rank
    H  query heads    K  key/value heads    E  size of a head    in, out  features of a linear layer
"""

import argparse
import json
import math
from collections import namedtuple
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # a tuple
BATCH, MICROBATCH = 16, 16  # rows of a step; rows computed at a time: fewer take less memory
MAX_LENGTH = 1024  # tokens of a row; what follows is cut off
RECOMPUTE = False  # True: compute blocks again in the backward pass: less memory, more time
DTYPE = torch.float32  # of the base and the computation; an adapter is always float32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# --- the model -----------------------------------------------------------------------------------
class Model(NamedTuple):
    config: dict[str, Any]  # config.json
    weights: dict[str, Any]  # model.safetensors: each a Tensor, or a FourBit if quantized
    adapter_config: dict[str, Any]  # adapter_config.json
    adapter: dict[str, Tensor]  # adapter_model.safetensors; if it is empty, the base computes alone

def decode(model: Model, tokens: Tensor, cache: dict[str, Any] | None = None) -> Tensor:
    """Embedding, blocks, norm.   tokens (B, T), or one (B, 1) after a cache -> hidden (B, T, D)"""
    x = F.embedding(tokens, model.weights["model.embed_tokens.weight"])
    for i in range(model.config["num_hidden_layers"]):
        inputs = (model, f"model.layers.{i}", x, cache)
        x = checkpoint(block, *inputs, use_reentrant=False) if RECOMPUTE else block(*inputs)
    return rms_norm(model, "model.norm", x)

def block(model: Model, path: str, x: Tensor, cache: dict[str, Any] | None) -> Tensor:
    """x ← x + attention(norm x);  x ← x + down(silu(gate n) ∘ up n),  n = norm x;   x (B, T, D)"""
    n = rms_norm(model, f"{path}.input_layernorm", x)
    x = x + attention(model, f"{path}.self_attn", n, cache)
    n = rms_norm(model, f"{path}.post_attention_layernorm", x)
    gate = F.silu(linear(model, f"{path}.mlp.gate_proj", n))
    up = linear(model, f"{path}.mlp.up_proj", n)
    return x + linear(model, f"{path}.mlp.down_proj", gate * up)

def attention(model: Model, path: str, x: Tensor, cache: dict[str, Any] | None) -> Tensor:
    """softmax(q kᵀ/√E + causal mask) v;   each key and value head serves H/K query heads
    x (B, T, D), q (B, H, T, E), k and v (B, K, S, E) of the S tokens so far -> (B, T, D)"""
    projected = [linear(model, f"{path}.{name}_proj", x) for name in "qkv"]
    q, k, v = (y.unflatten(2, (-1, model.config["head_dim"])).transpose(1, 2) for y in projected)
    past = cache.get(path) if cache is not None else None  # keys and values of earlier tokens
    start = past[0].size(2) if past else 0
    q, k = rotate(model.config, q, start), rotate(model.config, k, start)
    if past:
        k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
    if cache is not None:
        cache[path] = k, v
    o = F.scaled_dot_product_attention(q, k, v, is_causal=not past, enable_gqa=True)
    return linear(model, f"{path}.o_proj", o.transpose(1, 2).flatten(2))

def rotate(config: dict[str, Any], x: Tensor, start: int) -> Tensor:
    """Pairs (i, i + E/2) of a head turn by position · f_i: (a, b) ↦ (a cos - b sin, b cos + a sin)
    f_i = θ^(-2i/E); Llama 3.1 divides it by `factor` where a pair makes fewer than `low` turns in
    the original context, keeps it above `high`, blends between.   x (B, H, T, E) -> same"""
    rope, E = config["rope_parameters"], x.size(-1)
    f = 1 / rope["rope_theta"] ** (torch.arange(0, E, 2, device=x.device).float() / E)
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * f / (2 * math.pi)
        rho = ((turns - low) / (high - low)).clamp(0, 1)
        f = rho * f + (1 - rho) * f / rope["factor"]
    angles = torch.arange(start, start + x.size(2), device=x.device).float()[:, None] * f
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

def rms_norm(model: Model, path: str, x: Tensor) -> Tensor:
    """w ∘ x / √(mean(x²) + ε).   x (..., D), w (D) -> (..., D)"""
    weight = model.weights[f"{path}.weight"]
    return F.rms_norm(x, weight.shape, weight, model.config.get("rms_norm_eps", 1e-6))
# --- LoRA ----------------------------------------------------------------------------------------
def linear(model: Model, path: str, x: Tensor) -> Tensor:
    """y = x Wᵀ + b + (s·x Aᵀ) Bᵀ  (LoRA eq. 3), where B A is never formed
    x (..., in), W (out, in), A (r, in), B (out, r) -> (..., out)"""
    weight, bias = model.weights[f"{path}.weight"], model.weights.get(f"{path}.bias")
    y = (F.linear if isinstance(weight, Tensor) else FourBitLinear.apply)(x, weight, bias)
    A, B, s = lora_factors(model, path)
    return y if A is None else y + F.linear(s * F.linear(x, A.to(x.dtype)), B.to(x.dtype))

def lora_factors(model: Model, path: str) -> tuple[Any, Any, float]:
    """A (r, in), B (out, r), s = α/r, or α/√r with rsLoRA; A is None where there is no adapter"""
    A, B = (model.adapter.get(f"base_model.model.{path}.lora_{name}.weight") for name in "AB")
    alpha, r = model.adapter_config.get("lora_alpha", 0), model.adapter_config.get("r", 1)
    return A, B, alpha / (math.sqrt(r) if model.adapter_config.get("use_rslora") else r)

def attach(model: Model, r: int, lora_alpha: float = 32, use_rslora: bool = False,
           targets: Any = TARGETS) -> Model:
    """A ~ U(-1/√in, 1/√in), B = 0 for each of the targets: a new adapter changes nothing"""
    generator = torch.Generator().manual_seed(0)
    adapter = {}
    for name, weight in model.weights.items():
        path = f"base_model.model.{name.removesuffix('.weight')}"
        if path.endswith("_proj") and path.endswith(tuple(f".{target}" for target in targets)):
            out, inner = weight.shape
            A = torch.empty(r, inner).uniform_(-(inner**-0.5), inner**-0.5, generator=generator)
            adapter[f"{path}.lora_A.weight"] = A.to(DEVICE).requires_grad_()
            adapter[f"{path}.lora_B.weight"] = torch.zeros(out, r).to(DEVICE).requires_grad_()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": lora_alpha}
    config |= {"use_rslora": use_rslora, "target_modules": list(targets), "init_lora_weights": True}
    config["base_model_name_or_path"] = model.config["_name_or_path"]
    return model._replace(adapter_config=config, adapter=adapter)
# --- four bits -----------------------------------------------------------------------------------
NF4 = torch.tensor([  # quantiles of a normal distribution, scaled to [-1, 1]  (QLoRA app. E)
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]).to(DEVICE)
EDGES = [torch.linspace(0.1, 1, 2**i + 1) for i in range(7)]
MEANS = torch.cat([10.0 ** (i - 6) * (e[:-1] + e[1:]) / 2 for i, e in enumerate(EDGES)]).to(DEVICE)
DYNAMIC = torch.cat([-MEANS, MEANS, NF4[[7, 15]]]).sort().values  # 256 levels, with 0 and 1
FourBit = namedtuple("FourBit", "packed codes scales mean shape")  # what `pack` returns

def quantize(x: Tensor, levels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """scale = max |x| of a block;   code = number of midpoints of levels below x / scale
    x (n) -> codes (n) uint8, scales (⌈n/size⌉)"""
    blocks = F.pad(x, (0, -len(x) % size)).view(-1, size)
    scales = blocks.abs().amax(dim=1)
    blocks = blocks * (1 / scales.clamp(min=1e-38))[:, None]
    if len(levels) == 256:  # bitsandbytes on a CPU looks these up in a table of 65,536 numbers
        blocks = ((blocks.clamp(-1, 1) + 1) * 32767.5 + 0.5).int() * (2 / 65535) - 1
    codes = torch.bucketize(blocks, (levels[:-1] + levels[1:]) / 2)
    return codes.to(torch.uint8).flatten()[: len(x)], scales

def dequantize(codes: Tensor, scales: Tensor, levels: Tensor, size: int) -> Tensor:
    """x ≈ level[code] · scale.   codes (n), scales (⌈n/size⌉) -> (n)"""
    return levels.index_select(0, codes.int()) * scales.repeat_interleave(size)[: len(codes)]

def pack(W: Tensor) -> FourBit:
    """Quantize W (out, in) in blocks of 64; then the scales, less their mean, in blocks of 256
    -> two codes a byte, the first in the high half; codes of scales; their scales; mean; shape"""
    codes, absmax = quantize(W.float().flatten(), NF4, 64)
    codes = F.pad(codes, (0, len(codes) % 2), value=7)  # the code of 0
    mean = absmax.mean()
    packed = codes[0::2] << 4 | codes[1::2]
    return FourBit(packed, *quantize(absmax - mean, DYNAMIC, 256), mean, W.shape)

def dense(weight: Any) -> Tensor:
    """W (out, in): a Tensor as it is, or a FourBit, dequantized"""
    if isinstance(weight, Tensor):
        return weight
    absmax = dequantize(weight.codes, weight.scales, DYNAMIC, 256) + weight.mean
    codes = torch.stack((weight.packed >> 4, weight.packed & 15), dim=1).flatten()
    return dequantize(codes[: math.prod(weight.shape)], absmax, NF4, 64).view(weight.shape)

class FourBitLinear(torch.autograd.Function):  # y = x Wᵀ + b;  dx = dy W, and W is unpacked again
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FourBit, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, dense(weight).to(x.dtype), bias)
    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return dy @ dense(ctx.weight).to(dy.dtype), None, None
# --- data ----------------------------------------------------------------------------------------
def load_tokenizer(directory: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer, and its settings: tokens as text, and the model's chat template compiled"""
    tokenizer = Tokenizer.from_str((directory / "tokenizer.json").read_text("utf-8"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    settings = json.loads((directory / "tokenizer_config.json").read_text("utf-8"))
    settings |= {k: v.get("content", v) for k, v in settings.items() if isinstance(v, dict)}
    settings["end"] = tokenizer.token_to_id(settings["eos_token"])
    file = directory / "chat_template.jinja"
    if text := file.read_text("utf-8") if file.exists() else settings.get("chat_template"):
        from jinja2.sandbox import ImmutableSandboxedEnvironment as Sandbox
        settings["chat_template"] = Sandbox(trim_blocks=True, lstrip_blocks=True).from_string(text)
    return tokenizer, settings

def render(messages: list[dict[str, str]], settings: dict[str, Any], ask: bool) -> str:
    """A conversation as text, by the model's chat template; `ask`: an answer will follow"""
    template = settings["chat_template"]
    return str(template.render(settings, messages=messages, add_generation_prompt=ask))

def encode(row: Any, tokenizer: Tokenizer, settings: dict[str, Any]) -> tuple[list[int], ...]:
    """The tokens of a row before its answer, and those of the answer, which alone are learned.
    The answer starts at the first token that ends past the prompt's text, and has an end token."""
    match row:
        case {"messages": [*before, _] as messages}:
            prompt = render(before, settings, ask=True)
            text = render(messages, settings, ask=False)
        case {"prompt": str(prompt), "completion": str(completion)}:
            text = prompt + completion
        case _:
            raise ValueError(f"a row needs prompt and completion, or messages: {str(row)[:50]}")
    coded = tokenizer.encode(text, add_special_tokens="messages" not in row)
    start = next((i for i, (_, stop) in enumerate(coded.offsets) if stop > len(prompt)), MAX_LENGTH)
    end = settings["end"]
    tokens = coded.ids if end in coded.ids[start:] else [*coded.ids, end]
    if not text.startswith(prompt) or max(start, 1) >= min(len(tokens), MAX_LENGTH):
        raise ValueError(f"no answer after a prompt in {MAX_LENGTH} tokens: {text[:50]!r}")
    return tokens[:start], tokens[start:MAX_LENGTH]

def read_rows(path: Path, tokenizer: Tokenizer, settings: dict[str, Any]) -> list[Any]:
    """Encode a file of one JSON object a line."""
    rows = []
    for number, line in enumerate(path.read_text("utf-8-sig").rstrip().split("\n"), 1):
        try:
            rows.append(encode(json.loads(line), tokenizer, settings))
        except Exception as error:
            raise ValueError(f"{path}:{number}: {type(error).__name__}: {error}") from None
    if len(rows) < 2:
        raise ValueError(f"{path}: need at least two rows, one to train on and one held out")
    return rows

def collate(examples: list[Any]) -> tuple[Tensor, Tensor]:
    """Tokens and labels (B, T); -100: not learned.   Causal attention never looks at the padding"""
    tokens = [torch.tensor(prompt + answer) for prompt, answer in examples]
    labels = [torch.tensor([-100] * len(prompt) + answer) for prompt, answer in examples]
    return pad_sequence(tokens, True).to(DEVICE), pad_sequence(labels, True, -100).to(DEVICE)
# --- the step ------------------------------------------------------------------------------------
def score(model: Model, tokens: Tensor, labels: Tensor) -> tuple[Tensor, int, int]:
    """Σ -log p(label | tokens before it), the number of labels, and that of rows answered wrongly
    tokens and labels (B, T);   the head sees only the hidden states (M, D) that predict a label"""
    row, position = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    targets = labels[row, position + 1]
    logits = linear(model, "lm_head", decode(model, tokens)[row, position])
    wrong = row[logits.argmax(dim=-1) != targets].unique()
    return F.cross_entropy(logits.float(), targets, reduction="sum"), len(targets), len(wrong)

def train_step(model: Model, optimizer: Any, batches: list[Any]) -> float:
    """Step on L = 1/n Σ -log p, n labels in all micro-batches;  g ← g · min(1, 1 / ‖g‖)"""
    count = sum(int((labels[:, 1:] != -100).sum()) for _, labels in batches)
    optimizer.zero_grad()
    total = 0.0
    for tokens, labels in batches:
        loss = score(model, tokens, labels)[0] / count
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.adapter.values(), 1.0, error_if_nonfinite=True)
    optimizer.step()
    return total

def train(model: Model, examples: list[Any], epochs: int, peak: float) -> None:
    """Train the adapter by AdamW. Rows of like length share a batch, which saves padding."""
    optimizer = torch.optim.AdamW(model.adapter.values(), weight_decay=0.0)
    batches = chunks(sorted(examples, key=lambda example: len(example[0] + example[1])), BATCH)
    rng = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(len(batches), generator=rng) for _ in range(epochs)]).tolist()
    warmup = math.ceil(0.03 * len(order))  # steps of a linear rise; then half a cosine (SGDR eq. 5)
    for step, i in enumerate(order):
        fall = (1 + math.cos(math.pi * (step - warmup) / max(1, len(order) - warmup))) / 2
        optimizer.param_groups[0]["lr"] = peak * ((step + 1) / warmup if step < warmup else fall)
        loss = train_step(model, optimizer, [collate(p) for p in chunks(batches[i], MICROBATCH)])
        if step % max(1, len(order) // 20) == 0:
            print(f"step {step:5} of {len(order)}    loss {loss:.4f}", flush=True)

def chunks(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]

@torch.no_grad()
def evaluate(model: Model, examples: list[Any]) -> tuple[float, float]:
    """The mean loss of all labels, and the share of rows whose labels are the likeliest tokens"""
    scores = [score(model, *collate(part)) for part in chunks(examples, BATCH)]
    loss, count, wrong = (sum(each) for each in zip(*scores, strict=True))
    return float(loss / count), 1 - wrong / len(examples)
# --- generate, merge -----------------------------------------------------------------------------
@torch.no_grad()
def generate(model: Model, prompt: list[int], end: int, limit: int = 100) -> list[int]:
    """Append the likeliest token until it is the end token; the cache keeps keys and values."""
    answer: list[int] = []
    cache: dict[str, Any] = {}
    while len(answer) < limit and answer[-1:] != [end]:
        hidden = decode(model, torch.tensor([answer[-1:] or prompt], device=DEVICE), cache)
        answer.append(int(linear(model, "lm_head", hidden[0, -1]).argmax()))
    return answer

@torch.no_grad()
def merge(model: Model) -> Model:
    """W ← W + s·B A, rounded once to DTYPE; all weights become dense, and no adapter is left"""
    weights = {name: dense(weight) for name, weight in model.weights.items()}
    for name, W in weights.items():
        A, B, s = lora_factors(model, name.removesuffix(".weight"))
        weights[name] = (W if A is None else W + s * (B @ A)).to(DTYPE)
    return Model(model.config, weights, {}, {})
# --- files ---------------------------------------------------------------------------------------
def load_model(directory: Path, nf4: bool = False) -> Model:
    """Read a Llama from config.json and its safetensors; with `nf4`, layers get four bits."""
    config = json.loads((directory / "config.json").read_text("utf-8"))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    old = {"rope_theta": config.get("rope_theta", 1e4), "rope_type": rope.get("type", "default")}
    config |= {"rope_parameters": old | rope, "_name_or_path": str(directory)}
    kind = (config["model_type"], config.get("hidden_act", "silu"), (old | rope)["rope_type"])
    if kind not in (("llama", "silu", "default"), ("llama", "silu", "llama3")):
        raise ValueError(f"{directory}: found {kind}, need llama, silu, default or llama3 rope")
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    weights: dict[str, Any] = {}
    for file in sorted(directory.glob("model-*.safetensors")) or [directory / "model.safetensors"]:
        for name, tensor in load_file(file).items():
            weight = tensor.to(DEVICE, DTYPE)
            weights[name] = pack(weight) if nf4 and name.endswith("_proj.weight") else weight
    if config.get("tie_word_embeddings"):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    if sum(name.endswith(".weight") for name in weights) != 9 * config["num_hidden_layers"] + 3:
        raise ValueError(f"{directory}: not 7 projections, 2 norms a block; embedding, norm, head")
    return Model(config, weights, {}, {})

def load_adapter(model: Model, directory: Path) -> Model:
    """Read an adapter in PEFT's layout: LoRA or rsLoRA, of one rank and alpha, on linear layers"""
    config = json.loads((directory / "adapter_config.json").read_text("utf-8"))
    file = directory / "adapter_model.safetensors"
    adapter = {name: factor.float() for name, factor in load_file(file, DEVICE).items()}
    plain = attach(model, *map(config.get, ("r", "lora_alpha", "use_rslora", "target_modules")))
    harmless = ["base_model_name_or_path", "revision", "peft_version", "inference_mode",
                "lora_dropout", "auto_mapping", "megatron_core", "qalora_group_size"]
    wrong = [key for key, value in config.items() if value and key not in harmless
             and value not in (plain.adapter_config.get(key), "none", "gaussian")]
    found, expected = ({n: t.shape for n, t in each.items()} for each in (adapter, plain.adapter))
    wrong += sorted({name for name, _ in found.items() ^ expected.items()})
    if wrong:
        raise ValueError(f"{directory}: this is not plain LoRA for this model: {wrong[:3]}")
    return model._replace(adapter_config=config, adapter=adapter)

def save(model: Model, directory: Path) -> None:
    """Write an adapter in PEFT's layout or, of a merged model, all that transformers reads."""
    directory.mkdir(parents=True)
    kind, config, tensors = "adapter_", model.adapter_config, model.adapter
    if not model.adapter:
        dtype = str(DTYPE).removeprefix("torch.")
        kind, config, tensors = "", model.config | {"dtype": dtype}, dict(model.weights)
        if config.get("tie_word_embeddings"):
            del tensors["lm_head.weight"]
        source = Path(config["_name_or_path"])
        for file in [*source.glob("*token*"), *source.glob("*.jinja")]:
            (directory / file.name).write_bytes(file.read_bytes())
    (directory / f"{kind}config.json").write_text(json.dumps(config, indent=2), "utf-8")
    save_file(tensors, directory / f"{kind}model.safetensors", {"format": "pt"})

def main() -> None:
    """Train an adapter and compare it with its base, or load one; answer and merge, if asked."""
    assets = Path(__file__).resolve().parent / "minilora" / "assets"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--model", type=Path, default=assets / "model", help="directory of a Llama")
    flag("--data", type=Path, default=assets / "data" / "train.jsonl", help="rows: a .jsonl file")
    flag("--adapter", type=Path, default="nanolora-adapter", help="trained if it is new, or loaded")
    flag("--nf4", action="store_true", help="quantize the base to 4 bits (QLoRA)")
    flag("--lora-r", type=int, default=16, help="rank")
    flag("--learning-rate", type=float, default=1e-3, help="peak; for a 7B model about 2e-4")
    flag("--epochs", type=int, default=4, help="passes over the rows")
    flag("--prompt", help="answer it, as a chat if the model has a chat template")
    flag("--merged", type=Path, help="write the merged model to this new directory")
    args = parser.parse_args()
    if min(args.lora_r, args.epochs) < 1:
        raise ValueError("--lora-r and --epochs must be at least 1")
    if not args.model.exists():
        raise ValueError(f"no file {args.model}\nGive a Llama: --model DIRECTORY --data ROWS.jsonl")
    codec = tokenizer, settings = load_tokenizer(args.model)
    model = load_model(args.model, args.nf4)
    if args.adapter.exists():
        model = load_adapter(model, args.adapter)
        print(f"loaded {args.adapter}, nothing trained")
    else:
        rows = read_rows(args.data, *codec)
        test = args.data.with_name("test.jsonl")
        held_out = read_rows(test, *codec) if test.exists() else [rows.pop() for _ in rows[::10]]
        model = attach(model, args.lora_r)
        train(model, rows, args.epochs, args.learning_rate)
        save(model, args.adapter)
        for name, each in {"base": model._replace(adapter={}), "adapter": model}.items():
            loss, accuracy = evaluate(each, held_out)
            print(f"{name:8} held-out loss {loss:.4f}    right answers {accuracy:.4f}")
    if args.prompt:
        chat = settings.get("chat_template")
        messages = [{"role": "user", "content": args.prompt}]
        text = render(messages, settings, ask=True) if chat else args.prompt
        prompt = tokenizer.encode(text, add_special_tokens=not chat).ids
        print(tokenizer.decode(generate(model, prompt, settings["end"])))
    if args.merged:
        save(merge(model), args.merged)

if __name__ == "__main__":
    try:
        main()
    except (ImportError, KeyError, OSError, RuntimeError, ValueError) as error:
        raise SystemExit(f"nanolora: {type(error).__name__}: {error}") from None
