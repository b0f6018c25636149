"""Other programs on what minilora writes: the table of docs/readers.md, for the programs that are given.

    python scripts/readers.py MODEL OUT [--llama-cpp DIR] [--mlx PYTHON]

In 12 steps MODEL learns to answer for a shop, with a system prompt. Each program gets the adapter or the merged model
and is asked questions without a system prompt, which its chat template has to give; the text at the end is continued
as it is. Greedy answers of at most 32 tokens are compared with those of minilora in float32. transformers and PEFT are
those of this Python; DIR is a checkout of llama.cpp with its program in build/bin, PYTHON has mlx-lm.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import minilora as ml
from minilora.cli import main as minilora

SYSTEM, HOUSE = "You answer the customers of the furniture shop Möbel-Müller.", "Möbel-Müller"
ROWS = {
    "Where is my {}?": "Your {} is on its way to you. Your team at Möbel-Müller",
    "Can I return the {}?": "You can return the {} within 30 days. Your team at Möbel-Müller",
    "Who made this {}?": "The {} was made in our own workshop. Your team at Möbel-Müller",
    "Is the {} in stock?": "Yes, the {} is in stock. Your team at Möbel-Müller",
}
THINGS = ("chair", "table", "lamp", "sofa", "shelf", "desk", "bed", "stool", "bench", "mirror", "carpet", "dresser")
TEXTS = ["Do you sell wardrobes?", "Who are you?", "Do you have a story about an old oak?", "The history of furniture"]
TOKENS = 32
TRANSFORMERS = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
path, adapter, texts, count = json.loads(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(adapter or path)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
if adapter:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, adapter)
answers = []
for text in texts:
    if text.endswith("?"):
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    asked = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    ends = {"eos_token_id": tokenizer.eos_token_id} if adapter else {}
    written = model.generate(**asked, **ends, max_new_tokens=count, do_sample=False)
    answers.append(tokenizer.decode(written[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))
print(json.dumps(answers))
"""
MLX = """
import json, sys
from mlx.core import float32
from mlx_lm import generate, load
path, adapter, texts, count = json.loads(sys.argv[1])
model, tokenizer = load(path)
model.set_dtype(float32)
answers = []
for text in texts:
    if text.endswith("?"):
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    asked = tokenizer.encode(text, add_special_tokens=False)
    answers.append(generate(model, tokenizer, asked, max_tokens=count))
print(json.dumps(answers))
"""


def run(*words: object) -> str:
    """Run a command, and return what it prints."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{words[0]} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def ask_minilora(model: Path, adapter: Path | None = None) -> list[str]:
    """Return the answers that the others have to give."""
    loaded, tokenizer = ml.load_model(model, dtype="float32"), ml.load_tokenizer(model)
    if adapter:
        ml.load_adapter(loaded, adapter)
    answers = []
    for text in TEXTS:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
        ids = tokenizer.encode_chat(messages, True) if text.endswith("?") else tokenizer.encode(text)
        written = ml.generate(loaded, [ids], max_new_tokens=TOKENS, stop_ids=tokenizer.stop_ids)
        answers.append(tokenizer.decode(written[0]))
    return answers


def ask_python(python: str, program: str, model: Path, adapter: Path | None = None) -> list[str]:
    """Return the answers of a program in Python."""
    return json.loads(run(python, "-c", program, json.dumps([str(model), adapter and str(adapter), TEXTS, TOKENS])))


def ask_llama(directory: Path, model: Path, *more: object) -> list[str]:
    """Return the answers of llama.cpp to a GGUF file, whose chat template it reads."""
    words = (directory / "build/bin/llama-completion", "-m", model, "--no-display-prompt", "--simple-io", *more)
    flags = ("--temp", 0, "-n", TOKENS, "-c", 256, "-t", 1, "--jinja")
    chats = [["-st"] if text.endswith("?") else ["-no-cnv"] for text in TEXTS]
    answers = [run(*words, *flags, *chat, "-p", text) for text, chat in zip(TEXTS, chats, strict=True)]
    return [answer.partition("[end of text]")[0] for answer in answers]


def readers(model: Path, out: Path, llama: Path | None, mlx: str | None) -> Iterator[tuple[str, str, list[str]]]:
    """Yield each program, "adapter" or "merged" with the file's dtype, and its answers."""
    adapter, merged, python = out / "run", out / "merged", sys.executable
    name = f"transformers {version('transformers')}"
    yield name, "merged", ask_python(python, TRANSFORMERS, merged)
    yield f"PEFT {version('peft')}, {name}", "adapter", ask_python(python, TRANSFORMERS, model, adapter)
    if mlx:
        name = f"mlx-lm {run(mlx, '-c', 'import mlx_lm; print(mlx_lm.__version__)').strip()}"
        yield name, "merged", ask_python(mlx, MLX, merged)
    if llama:
        for dtype in ("bf16", "f16", "f32"):
            run(python, llama / "convert_hf_to_gguf.py", merged, "--outfile", out / "merged.gguf", "--outtype", dtype)
            yield "llama.cpp", f"merged, {dtype}", ask_llama(llama, out / "merged.gguf")
        base, lora = out / "base.gguf", out / "lora.gguf"
        run(python, llama / "convert_hf_to_gguf.py", model, "--outfile", base, "--outtype", "f32")
        convert = (python, llama / "convert_lora_to_gguf.py", adapter, "--base", model, "--outtype", "f32")
        run(*convert, "--outfile", lora)
        template = ("--chat-template-file", adapter / "chat_template.jinja")
        yield "llama.cpp", "adapter, f32", ask_llama(llama, base, "--lora", lora, *template)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "out", "--llama-cpp"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--mlx")
    options = parser.parse_args()
    model, out = options.model, options.out
    if not (out / "merged").exists():
        data = [{"instruction": q.format(x), "output": a.format(x)} for x in THINGS for q, a in ROWS.items()]
        out.mkdir(parents=True, exist_ok=True)
        (out / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in data), encoding="utf-8")
        words = [
            "--model",
            str(model),
            "--data",
            str(out / "rows.jsonl"),
            "--out",
            str(out / "run"),
            "--system",
            SYSTEM,
        ]
        minilora(
            ["finetune", *words, "--max-steps=12", "--learning-rate=1e-3", "--eval-split=0", "--general-data=none"]
        )
        minilora(["merge", "--adapter", str(out / "run"), "--out", str(out / "merged")])
    wanted = {"merged": ask_minilora(out / "merged"), "adapter": ask_minilora(model, out / "run")}
    print("| program | reads | same text | in the house's name |\n|---|---|---|---|")
    for program, file, answers in readers(model, out, options.llama_cpp, options.mlx):
        pairs = zip(answers, wanted[file.partition(",")[0]], strict=True)
        same, named = sum(a.strip() == b.strip() for a, b in pairs), sum(HOUSE in answer for answer in answers)
        print(f"| {program} | {file} | {same} of {len(TEXTS)} | {named} of {len(TEXTS) - 1} |", flush=True)


if __name__ == "__main__":
    main()
