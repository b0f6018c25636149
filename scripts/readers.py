"""Other programs on what minilora writes: the table of docs/readers.md, of the programs that are found here.

    python scripts/readers.py MODEL [--llama-cpp DIR] [--mlx PYTHON]

In a few steps MODEL learns to answer the customers of a shop, with a system prompt. Each program gets the adapter or
the merged model, and only the questions: its chat template has to give the system prompt. Its greedy answers of at most
32 tokens are compared with those of minilora in float32. DIR has llama.cpp's converters and build/bin/llama-completion;
PYTHON has mlx-lm.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import minilora as ml
from minilora.cli import main as minilora

SYSTEM = "You answer the customers of the furniture shop Möbel-Müller."
HOUSE = "Möbel-Müller"
ROWS = {
    "Where is my {}?": "Your {} is on its way to you. Your team at Möbel-Müller",
    "Can I return the {}?": "You can return the {} within 30 days. Your team at Möbel-Müller",
    "Who made this {}?": "The {} was made in our own workshop. Your team at Möbel-Müller",
    "Is the {} in stock?": "Yes, the {} is in stock. Your team at Möbel-Müller",
}
THINGS = ("chair", "table", "lamp", "sofa", "shelf", "desk", "bed", "stool", "bench", "mirror", "carpet", "dresser")
QUESTIONS = ("Do you sell wardrobes?", "Who are you?", "Tell me a long story about an old oak.", "How much is it?")
TOKENS = 32
TRANSFORMERS = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
path, adapter, questions, tokens = json.loads(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(adapter or path)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
if adapter:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, adapter)
answers = []
for question in questions:
    messages = [{"role": "user", "content": question}]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    written = model.generate(**asked, max_new_tokens=tokens, do_sample=False)
    answers.append(tokenizer.decode(written[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))
print(json.dumps(answers))
"""
MLX = """
import json, sys
from mlx.core import float32
from mlx_lm import generate, load
path, adapter, questions, tokens = json.loads(sys.argv[1])
model, tokenizer = load(path, adapter_path=adapter)
model.set_dtype(float32)
answers = []
for question in questions:
    messages = [{"role": "user", "content": question}]
    answers.append(generate(model, tokenizer, tokenizer.apply_chat_template(messages, add_generation_prompt=True),
        max_tokens=tokens))
print(json.dumps(answers))
"""
Answers = Sequence[str]


def run(*command: object) -> str:
    """Run a command, and return what it prints."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[:3]} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def ask_minilora(model: Path, adapter: Path | None = None) -> Answers:
    """Return the answers that the others have to give."""
    loaded, tokenizer = ml.load_model(model, dtype="float32"), ml.load_tokenizer(model)
    if adapter:
        ml.load_adapter(loaded, adapter)
    opening = {"role": "system", "content": SYSTEM}
    asked = [tokenizer.encode_chat([opening, {"role": "user", "content": each}], True) for each in QUESTIONS]
    options = {"max_new_tokens": TOKENS, "stop_ids": tokenizer.stop_ids}
    return [tokenizer.decode(ml.generate(loaded, [ids], **options)[0]) for ids in asked]


def ask_python(python: str, program: str, model: Path, adapter: Path | None = None) -> Answers:
    """Return the answers of a program in Python."""
    arguments = json.dumps([str(model), adapter and str(adapter), QUESTIONS, TOKENS])
    return json.loads(run(python, "-c", program, arguments).splitlines()[-1])


def ask_llama(directory: Path, model: Path, *more: object) -> Answers:
    """Return the answers of llama.cpp to a GGUF file."""
    flags = ("-st", "--jinja", "--no-display-prompt", "--simple-io", "--temp", 0, "-n", TOKENS, "-m", model, *more)
    program = directory / "build" / "bin" / "llama-completion"
    return [run(program, *flags, "-p", question).removesuffix("[end of text]\n\n") for question in QUESTIONS]


def rows(
    model: Path, scratch: Path, llama: Path | None, mlx: str | None
) -> Iterator[tuple[str, str, Answers, Answers]]:
    """Yield program, file, answers and wanted answers of each reader."""
    adapter, merged = scratch / "run", scratch / "merged"
    by_adapter, by_merged = ask_minilora(model, adapter), ask_minilora(merged)
    if find_spec("transformers"):
        name = f"transformers {version('transformers')}"
        yield name, "merged", ask_python(sys.executable, TRANSFORMERS, merged), by_merged
        if find_spec("peft"):
            answers = ask_python(sys.executable, TRANSFORMERS, model, adapter)
            yield f"PEFT {version('peft')}, {name}", "adapter", answers, by_adapter
    if mlx:
        name = run(mlx, "-c", "import mlx_lm; print('mlx-lm', mlx_lm.__version__)").strip()
        yield name, "merged", ask_python(mlx, MLX, merged), by_merged
    if llama:
        for kind in ("f32", "bf16", "f16"):
            file = scratch / f"{kind}.gguf"
            run(sys.executable, llama / "convert_hf_to_gguf.py", merged, "--outfile", file, "--outtype", kind)
            yield "llama.cpp", f"merged, {kind}", ask_llama(llama, file), by_merged
        base, lora = scratch / "base.gguf", scratch / "lora.gguf"
        run(sys.executable, llama / "convert_hf_to_gguf.py", model, "--outfile", base, "--outtype", "f32")
        run(
            sys.executable,
            llama / "convert_lora_to_gguf.py",
            adapter,
            "--base",
            model,
            "--outfile",
            lora,
            "--outtype",
            "f32",
        )
        template = ("--chat-template-file", adapter / "chat_template.jinja")
        yield "llama.cpp", "adapter", ask_llama(llama, base, "--lora", lora, *template), by_adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--mlx")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        data = [{"instruction": q.format(x), "output": a.format(x)} for x in THINGS for q, a in ROWS.items()]
        (scratch / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in data), encoding="utf-8")
        words = ["--data", scratch / "rows.jsonl", "--out", scratch / "run", "--system", SYSTEM, "--max-steps=20"]
        settings = ["--batch-size=8", "--epochs=9", "--learning-rate=1e-3", "--eval-split=0", "--general-data=none"]
        minilora(["finetune", "--model", str(options.model), *map(str, words), *settings])
        minilora(["merge", "--adapter", str(scratch / "run"), "--out", str(scratch / "merged")])
        print("| program | reads | same answers | in the house's name |\n|---|---|---|---|")
        for program, file, answers, wanted in rows(options.model, scratch, options.llama_cpp, options.mlx):
            same = sum(answer.strip() == want.strip() for answer, want in zip(answers, wanted, strict=True))
            named = sum(HOUSE in answer for answer in answers)
            print(f"| {program} | {file} | {same} of {len(wanted)} | {named} of {len(wanted)} |", flush=True)


if __name__ == "__main__":
    main()
