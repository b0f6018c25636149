# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.5", "safetensors", "tokenizers", "numpy", "jinja2"]
# ///
"""Fine-tune a Llama with LoRA or QLoRA: all of it, in one file to read from top to bottom.

    python nanolora.py                                            # a small built-in model and task
    python nanolora.py --model smollm2 --data rows.jsonl --adapter mine --nf4     # yours, as QLoRA
    python nanolora.py --model smollm2 --adapter mine --prompt "Why is the sky blue?"

A linear layer stays frozen, and two thin matrices beside it are trained: y = W x + b + s·B A x.
A model is what its files contain: config.json and tensors by name, and the same of an adapter in
PEFT's layout. `Model` is these four dicts; everything else is a function.

    B  rows    T  tokens of a row    D  hidden size    V  vocabulary    M  labels    r  rank
    H  query heads    K  key/value heads    E  size of a head    in, out  features of a linear layer
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BATCH = 16  # rows of a step
MICROBATCH = 16  # rows that are computed at a time: fewer take less memory
MAX_LENGTH = 1024  # tokens of a row; what follows is cut off
RECOMPUTE = False  # True: compute blocks again in the backward pass, in less memory and more time
DTYPE = torch.float32  # of the base and the computation; an adapter is always float32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# --- the model -----------------------------------------------------------------------------------
class Model(NamedTuple):
    config: dict[str, Any]  # config.json
    weights: dict[str, Any]  # model.safetensors: a Tensor, or a tuple where it has four bits
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
    past = cache.get(path) if cache else None  # keys and values of earlier tokens
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
    f_i = θ^(-2i/E); since Llama 3.1 slow pairs turn slower: f ← ρ f + (1 - ρ) f / factor,
    ρ = (L f/2π - low) / (high - low) in [0, 1].   x (B, H, T, E) from position `start` -> same"""
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
    A, B, scale = lora_factors(model, path)
    return y if A is None else y + F.linear(scale * F.linear(x, A.to(x.dtype)), B.to(x.dtype))

def lora_factors(model: Model, path: str) -> tuple[Any, Any, float]:
    """A (r, in), B (out, r), s = α/r, or α/√r with rsLoRA; A is None where there is no adapter"""
    A, B = (model.adapter.get(f"base_model.model.{path}.lora_{name}.weight") for name in "AB")
    alpha, r = model.adapter_config.get("lora_alpha", 0), model.adapter_config.get("r", 1)
    return A, B, alpha / (math.sqrt(r) if model.adapter_config.get("use_rslora") else r)

def attach(model: Model, r: int, lora_alpha: float = 32, use_rslora: bool = False) -> Model:
    """A ~ U(-1/√in, 1/√in), B = 0 for each of the TARGETS: a new adapter changes nothing"""
    if r < 1:
        raise ValueError(f"the rank is {r}, need at least 1")
    generator, adapter = torch.Generator().manual_seed(0), {}
    for name, weight in model.weights.items():
        path = name.removesuffix(".weight")
        if path.endswith(TARGETS):
            out, inner = weight.shape if isinstance(weight, Tensor) else weight[-1]
            A = torch.empty(r, inner).uniform_(-(inner**-0.5), inner**-0.5, generator=generator)
            adapter[f"base_model.model.{path}.lora_A.weight"] = A
            adapter[f"base_model.model.{path}.lora_B.weight"] = torch.zeros(out, r)
    adapter = {name: factor.to(DEVICE).requires_grad_() for name, factor in adapter.items()}
    config: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r}
    config |= {"lora_alpha": lora_alpha, "use_rslora": use_rslora, "target_modules": list(TARGETS)}
    config["base_model_name_or_path"] = model.config["_name_or_path"]
    return model._replace(adapter_config=config, adapter=adapter)

# --- four bits -----------------------------------------------------------------------------------
NF4 = torch.tensor([  # quantiles of a normal distribution, scaled to [-1, 1]  (QLoRA app. E)
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0], device=DEVICE)
EDGES = [torch.linspace(0.1, 1, 2**i + 1) for i in range(7)]
MEANS = torch.cat([10.0 ** (i - 6) * (e[:-1] + e[1:]) / 2 for i, e in enumerate(EDGES)]).to(DEVICE)
DYNAMIC = torch.cat([-MEANS, MEANS, NF4[[7, 15]]]).sort().values  # 256 levels, with 0 and 1

def quantize(x: Tensor, levels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """scale_b = max |x| of block b;   code = number of midpoints of levels below x / scale_b
    x (n) -> codes (n) uint8, scales (⌈n/size⌉)"""
    blocks = F.pad(x, (0, -len(x) % size)).view(-1, size)
    scales = blocks.abs().amax(dim=1)
    blocks = blocks * (1 / scales.clamp(min=1e-38))[:, None]
    if len(levels) == 256:  # bitsandbytes on a CPU looks these up in a table of 65,536 numbers
        blocks = ((blocks.clamp(-1, 1) + 1) * 32767.5 + 0.5).int() * (2 / 65535) - 1
    codes = torch.bucketize(blocks, (levels[:-1] + levels[1:]) / 2)
    return codes.to(torch.uint8).flatten()[: len(x)], scales

def dequantize(codes: Tensor, scales: Tensor, levels: Tensor, size: int) -> Tensor:
    """x ≈ level[code] · scale_b.   codes (n), scales (⌈n/size⌉) -> (n)"""
    return levels.index_select(0, codes.int()) * scales.repeat_interleave(size)[: len(codes)]

def pack(W: Tensor) -> tuple[Any, ...]:
    """Quantize W (out, in) in blocks of 64; then the scales, less their mean, in blocks of 256
    -> two codes a byte, the first in the high half; codes of scales; their scales; mean; shape"""
    codes, absmax = quantize(W.float().flatten(), NF4, 64)
    codes = F.pad(codes, (0, len(codes) % 2), value=7)  # the code of 0
    mean = absmax.mean()
    return codes[0::2] << 4 | codes[1::2], *quantize(absmax - mean, DYNAMIC, 256), mean, W.shape

def dense(weight: Any) -> Tensor:
    """W (out, in): a Tensor as it is, or what `pack` returned, dequantized"""
    if isinstance(weight, Tensor):
        return weight
    packed, codes, scales, mean, shape = weight
    absmax = dequantize(codes, scales, DYNAMIC, 256) + mean
    codes = torch.stack((packed >> 4, packed & 15), dim=1).flatten()[: math.prod(shape)]
    return dequantize(codes, absmax, NF4, 64).view(shape)

class FourBitLinear(torch.autograd.Function):  # y = x Wᵀ + b;  dx = dy W, and W is unpacked again
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: tuple[Any, ...], bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, dense(weight).to(x.dtype), bias)
    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return dy @ dense(ctx.weight).to(dy.dtype), None, None

# --- data ----------------------------------------------------------------------------------------
def load_tokenizer(directory: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer, and its settings; the model's own chat template, if any, is compiled"""
    settings = json.loads((directory / "tokenizer_config.json").read_text("utf-8"))
    tokenizer = Tokenizer.from_str((directory / "tokenizer.json").read_text("utf-8"))
    settings["end"] = tokenizer.token_to_id(settings["eos_token"])
    file = directory / "chat_template.jinja"
    if text := file.read_text("utf-8") if file.exists() else settings.get("chat_template"):
        from jinja2.sandbox import ImmutableSandboxedEnvironment as Sandbox
        settings["chat_template"] = Sandbox(trim_blocks=True, lstrip_blocks=True).from_string(text)
    return tokenizer, settings

def render(messages: list[dict[str, str]], settings: dict[str, Any], ask: bool) -> str:
    """A conversation as text, by the model's template or as ChatML; `ask`: an answer will follow"""
    if template := settings.get("chat_template"):
        return str(template.render(settings, messages=messages, add_generation_prompt=ask))
    turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
    return "".join(turns) + ("<|im_start|>assistant\n" if ask else "")

def encode(row: Any, tokenizer: Tokenizer, settings: dict[str, Any]) -> tuple[list[int], ...]:
    """The tokens of a row before its answer, and those of the answer, which alone are learned:
    from the first that ends in it to the end token, by which the model learns to stop"""
    match row:
        case {"messages": [*before, _] as messages}:
            prompt = render(before, settings, ask=True)
            text = render(messages, settings, ask=False)
        case {"prompt": str(prompt), "completion": str(completion)}:
            text = prompt + completion
        case _:
            raise ValueError(f"a row needs prompt and completion, or messages: {str(row)[:50]}")
    encoding = tokenizer.encode(text, add_special_tokens="messages" not in row)
    start = sum(stop <= len(prompt) for _, stop in encoding.offsets)
    tokens = encoding.ids
    if settings["end"] not in tokens[start:]:
        tokens.append(settings["end"])
    if not text.startswith(prompt) or max(start, 1) >= min(len(tokens), MAX_LENGTH):
        raise ValueError(f"no answer after a prompt in {MAX_LENGTH} tokens: {text[:50]!r}")
    return tokens[:start], tokens[start:MAX_LENGTH]

def read_rows(path: Path, tokenizer: Tokenizer, settings: dict[str, Any]) -> list[Any]:
    """Encode a file of one JSON object a line, read as one array, so that errors have a line."""
    rows = json.loads("[" + path.read_text("utf-8").strip().replace("\n", ",\n") + "]")
    if len(rows) < 2:
        raise ValueError(f"{path}: need at least two rows, one to train on and one held out")
    return [encode(row, tokenizer, settings) for row in rows]

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

def train_step(model: Model, optimizer: Any, batches: list[Any], max_norm: float = 1.0) -> float:
    """Step on L = 1/n Σ -log p, n labels in all micro-batches;  g ← g · min(1, max_norm / ‖g‖)"""
    count = sum(int((labels[:, 1:] != -100).sum()) for _, labels in batches)
    optimizer.zero_grad()
    total = 0.0
    for tokens, labels in batches:
        loss = score(model, tokens, labels)[0] / count
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.adapter.values(), max_norm, error_if_nonfinite=True)
    optimizer.step()
    return total

def learning_rate(step: int, steps: int, peak: float, warmup: float = 0.03) -> float:
    """Rise linearly in a share of the steps, and fall as half a cosine  (SGDR eq. 5)"""
    rise = min(1, (step + 1) / (warmup * steps))
    return peak * rise * (1 + math.cos(math.pi * step / steps)) / 2

def train(model: Model, examples: list[Any], epochs: int, peak: float) -> None:
    """Train the adapter by AdamW. Rows of like length share a batch, which saves padding."""
    optimizer = torch.optim.AdamW(model.adapter.values(), weight_decay=0.0)
    batches = chunks(sorted(examples, key=lambda example: len(example[0] + example[1])), BATCH)
    rng = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(len(batches), generator=rng) for _ in range(epochs)]).tolist()
    for step, i in enumerate(order):
        optimizer.param_groups[0]["lr"] = learning_rate(step, len(order), peak)
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
    answer, new, cache = list[int](), prompt, dict[str, Any]()
    while len(answer) < limit:
        hidden = decode(model, torch.tensor([new], device=DEVICE), cache)
        new = [int(linear(model, "lm_head", hidden[0, -1]).argmax())]
        if new == [end]:
            break
        answer += new
    return answer

@torch.no_grad()
def merge(model: Model) -> Model:
    """W ← W + s·B A, rounded once to W's dtype; all weights become dense, and no adapter is left"""
    weights = {name: dense(weight) for name, weight in model.weights.items()}
    for name, W in weights.items():
        A, B, scale = lora_factors(model, name.removesuffix(".weight"))
        weights[name] = W if A is None else (W + scale * (B @ A)).to(W.dtype)
    return Model(model.config, weights, {}, {})

# --- files ---------------------------------------------------------------------------------------
def load_model(directory: Path, nf4: bool = False) -> Model:
    """Read a Llama from config.json and model*.safetensors; with `nf4`, layers get four bits."""
    config = json.loads((directory / "config.json").read_text("utf-8"))
    rope = {"rope_theta": config.get("rope_theta", 10_000.0), "rope_type": "default"}
    rope |= config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope["rope_type"] = rope.get("type", rope["rope_type"])  # "type" in older files
    if config["model_type"] != "llama" or rope["rope_type"] not in ("default", "llama3"):
        raise ValueError(f"{directory}: {config['model_type']}, {rope}: need llama and llama3")
    config |= {"rope_parameters": rope, "_name_or_path": str(directory)}
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    weights = {}
    for file in sorted(directory.glob("model*.safetensors")):
        for name, tensor in load_file(file).items():
            weight = tensor.to(DEVICE, DTYPE)
            weights[name] = pack(weight) if nf4 and name.endswith("_proj.weight") else weight
    if config.get("tie_word_embeddings"):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    count = sum(name.endswith(".weight") for name in weights)
    if count != 9 * config["num_hidden_layers"] + 3:
        raise ValueError(f"{directory}: {count} weights are not those of its config.json")
    return Model(config, weights, {}, {})

def load_adapter(model: Model, directory: Path) -> Model:
    """Read an adapter in PEFT's layout: LoRA or rsLoRA, of one rank and alpha, on linear layers"""
    config = json.loads((directory / "adapter_config.json").read_text("utf-8"))
    adapter = load_file(directory / "adapter_model.safetensors", DEVICE)
    shapes = {name: factor.shape for name, factor in attach(model, config["r"]).adapter.items()}
    wrong = [name for name, tensor in adapter.items() if tensor.shape != shapes.get(name)]
    if wrong or config.get("alpha_pattern") or config.get("init_lora_weights", True) is not True:
        raise ValueError(f"{directory}: this is not plain LoRA for this model: {wrong[:3]}")
    return model._replace(adapter_config=config, adapter=adapter)

def save(model: Model, directory: Path) -> None:
    """Write a new directory: an adapter for PEFT or, of a merged model, all for transformers"""
    directory.mkdir(parents=True)
    kind, config, tensors = "adapter_", model.adapter_config, model.adapter
    if not model.adapter:
        kind, config, tensors = "", model.config | {"dtype": str(DTYPE)[6:]}, dict(model.weights)
        if config.get("tie_word_embeddings"):
            del tensors["lm_head.weight"]
        source = Path(config["_name_or_path"])
        for file in [*source.glob("*token*"), *source.glob("*.jinja")]:
            (directory / file.name).write_bytes(file.read_bytes())
    (directory / f"{kind}config.json").write_text(json.dumps(config, indent=2), "utf-8")
    save_file(tensors, directory / f"{kind}model.safetensors", {"format": "pt"})

# --- main ----------------------------------------------------------------------------------------
def main() -> None:
    """Train an adapter and compare it with its base, or load one; answer and merge, if asked."""
    assets = Path(__file__).resolve().parent / "minilora" / "assets"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--model", type=Path, default=assets / "model", help="directory of a Llama")
    flag("--data", type=Path, default=assets / "data" / "train.jsonl", help="rows: a .jsonl file")
    flag("--adapter", type=Path, default="nanolora-adapter", help="trained if it is new, or loaded")
    flag("--nf4", action="store_true", help="keep the base in four bits (QLoRA)")
    flag("--lora-r", type=int, default=16, help="rank")
    flag("--learning-rate", type=float, default=1e-3, help="peak; for a 7B model about 2e-4")
    flag("--epochs", type=int, default=4, help="passes over the rows")
    flag("--prompt", help="answer it, as a chat if the model has a chat template")
    flag("--merged", type=Path, help="write the merged model to this new directory")
    args = parser.parse_args()
    if not args.model.exists():
        raise ValueError(f"{args.model} does not exist. Give a Llama and your rows:\n"
                         "    python nanolora.py --model DIRECTORY --data ROWS.jsonl")
    text = tokenizer, settings = load_tokenizer(args.model)
    model = load_model(args.model, args.nf4)
    if args.adapter.exists():
        model = load_adapter(model, args.adapter)
    else:
        rows, test = read_rows(args.data, *text), args.data.with_name("test.jsonl")
        held_out = read_rows(test, *text) if test.exists() else [rows.pop() for _ in rows[::10]]
        model = attach(model, args.lora_r)
        train(model, rows, args.epochs, args.learning_rate)
        save(model, args.adapter)
        for name, each in {"base": model._replace(adapter={}), "adapter": model}.items():
            loss, accuracy = evaluate(each, held_out)
            print(f"{name:8} held-out loss {loss:.4f}    right answers {accuracy:.4f}")
    if args.prompt:
        chat = render([{"role": "user", "content": args.prompt}], settings, ask=True)
        asked = chat if settings.get("chat_template") else args.prompt
        prompt = tokenizer.encode(asked, add_special_tokens=asked is args.prompt)
        print(tokenizer.decode(generate(model, prompt.ids, settings["end"])))
    if args.merged:
        save(merge(model), args.merged)

if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"nanolora: {error}") from None
