"""Which operations of PyTorch the package calls on a device, and those that have limits on CUDA or MPS.

The tests of the simulated device are run, all families and kinds of adapters among them (some minutes), and what they
call is looked up in PyTorch's own list of kernels: `python -m scripts.operations`. The table of
docs/internals/devices.md is `table()`.
"""

import re
from pathlib import Path

import pytest
import torchgen

ISSUES = "https://github.com/pytorch/pytorch/issues/"
DOCS = "https://docs.pytorch.org/docs/stable/"
LIMITS = (  # operation, device and limit, what is done about it, source
    (
        "scaled_dot_product_attention",
        "MPS: with `is_causal`, queries in 16 bits may see later keys",
        "on MPS attention is computed in blocks, by products of matrices",
        f"{ISSUES}195910",
    ),
    (
        "scaled_dot_product_attention",
        "CUDA: heads that share keys can fall back to a kernel that keeps all scores",
        "not on a CPU, keys and values are repeated for each head",
        "https://github.com/huggingface/transformers/pull/46960",
    ),
    (
        "copy_",
        "MPS: a copy to it that is `non_blocking` may read a tensor that is freed already",
        "`definition.to_device` waits on MPS, and on no other device",
        f"{ISSUES}189690",
    ),
    (
        "_to_copy",
        "from a device, `non_blocking`: the numbers may not be there yet",
        "no copy from a device is `non_blocking`",
        "https://docs.pytorch.org/tutorials/intermediate/pinmem_nonblock.html",
    ),
    (
        "empty_like",
        "MPS: no float64",
        "what needs it is computed on the CPU: sums of adapters, probabilities to sample from, errors of a merge",
        f"{ISSUES}122602",
    ),
    (
        "_linalg_svd",
        "MPS: no kernel in PyTorch 2.13, and factors that are not orthogonal in 2.14",
        "PiSSA decomposes on the CPU instead of MPS",
        f"{ISSUES}196112",
    ),
    (
        "mm",
        "MPS: errors where a product has more than 2³¹ numbers",
        "logits and scores are computed in chunks",
        f"{ISSUES}84039",
    ),
    (
        "addmm",
        "CUDA: sums of products in 16 bits may be rounded on the way; TF32 is off unless it is asked for",
        "nothing is set; `selftest --dtype bfloat16` shows whether its bounds hold",
        f"{DOCS}notes/numerical_accuracy.html",
    ),
    (
        "cumsum",
        "CUDA: the order of a sum may differ between two calls, as in `index_add` and `embedding_dense_backward`",
        "nothing: that a resumed run ends in the same bytes is tested on a CPU only",
        f"{DOCS}generated/torch.use_deterministic_algorithms.html",
    ),
    (
        "bernoulli_",
        "the same seed gives other numbers on another device",
        "masks of dropout are functions of the seed on the device; A, B and samples are drawn on the CPU",
        f"{DOCS}notes/randomness.html",
    ),
    (
        "_local_scalar_dense",
        "CUDA: the processor waits, as for a mask as an index, or a copy to the device that is not `non_blocking`",
        "the tests count this: once in a step, once for a token",
        f"{DOCS}notes/cuda.html",
    ),
)


def called() -> list[str]:
    """Run the works of the tests; return all operations on tensors of the device."""
    pytest.main(["-q", "-n", "0", "-m", "", "-k", "every_work or stopped_run", "tests/test_device.py"])
    from tests.simulated import OPERATIONS  # registers the device, so not before

    return sorted(name.removeprefix("aten.").removesuffix(".default") for name in OPERATIONS)


def kernels() -> dict[str, str]:
    """Return the entry of each operation in PyTorch's list."""
    file = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    entries = file.read_text(encoding="utf-8").split("\n- func: ")
    return {entry.partition("(")[0]: entry for entry in entries}


def is_there(name: str, device: str, entries: dict[str, str]) -> bool:
    """Return whether an operation has a kernel for a device, or is made of others that have."""
    entry = entries[name]
    if delegate := re.search(r"structured_delegate: (\S+)", entry):
        return is_there(delegate[1], device, entries)
    return "dispatch:" not in entry or bool(re.search(rf"\b({device}|Composite\w+|ufunc_inner_loop)\b", entry))


def table() -> str:
    """Return the table of the operations with limits."""
    rows = [f"| `{name}` | {limit} | {done} | {source} |" for name, limit, done, source in LIMITS]
    return "\n".join(["| operation | limit | what is done | source |", "|---|---|---|---|", *rows])


if __name__ == "__main__":
    names, entries = called(), kernels()
    print(f"{len(names)} operations:", ", ".join(names))
    for device in ("CUDA", "MPS"):
        print(f"no kernel on {device}:", [name for name in names if not is_there(name, device, entries)])
    print(table())
