"""mlx-lm's layers, loss, loop and chat mask, as the callables that `minilora.testing` checks; on MLX's CPU backend."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peer_data import CHATML, Messages, Rendered, character_tokenizer
from benchmarks.peer_training import IGNORE_INDEX, MicroBatches, Rows, quiet


class FromMlx(nn.Module):
    """A layer of MLX as PyTorch's, whose parameters are given to the layer at each call."""

    def __init__(self, layer: Any, **tensors: Tensor):
        super().__init__()
        self.layer, self.names = layer, list(tensors)
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.detach().clone()))

    def train(self, mode: bool = True) -> FromMlx:
        self.layer.train(mode)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        def call(x: Any, *own: Any) -> Any:
            self.layer.update(dict(zip(self.names, own, strict=True)))
            return self.layer(x)

        return MlxCall.apply(call, x, *(getattr(self, name) for name in self.names))


class MlxCall(torch.autograd.Function):
    """y = function(*inputs) on arrays of MLX, with the gradients of its own `mx.vjp`."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *inputs: Tensor) -> Tensor:
        ctx.function, ctx.inputs = function, [to_mlx(each) for each in inputs]
        return to_torch(function(*ctx.inputs))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        import mlx.core as mx

        _, gradients = mx.vjp(lambda *inputs: [ctx.function(*inputs)], ctx.inputs, [to_mlx(dy)])
        return None, *map(to_torch, gradients)


def to_mlx(tensor: Tensor) -> Any:
    import mlx.core as mx

    dtype = getattr(mx, str(tensor.dtype).removeprefix("torch."))
    exact = tensor.detach().float() if tensor.dtype == torch.bfloat16 else tensor.detach()
    return mx.array(exact.contiguous().numpy(), dtype=dtype)


def to_torch(array: Any) -> Tensor:
    import mlx.core as mx
    import numpy as np

    exact = array.astype(mx.float32) if array.dtype == mx.bfloat16 else array
    return torch.from_numpy(np.array(exact)).to(getattr(torch, str(array.dtype).rpartition(".")[2]))


def mlx_linear(
    W: Tensor,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    alpha: float,
    *,
    dropout: float = 0.0,
) -> Any:
    from mlx_lm.tuner.lora import LoRALinear

    layer = LoRALinear.from_base(_mlx_base(W, b), len(A), dropout, alpha / len(A))
    return FromMlx(layer, lora_a=A.T, lora_b=B.T)


def mlx_dora(
    W: Tensor,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    alpha: float,
    *,
    dropout: float = 0.0,
    use_dora: bool = True,
    magnitude: Tensor | None = None,
) -> Any:
    from mlx_lm.tuner.dora import DoRALinear

    layer = DoRALinear.from_base(_mlx_base(W, b), len(A), dropout, alpha / len(A))
    return FromMlx(layer, lora_a=A.T, lora_b=B.T, m=to_torch(layer.m) if magnitude is None else magnitude)


def _mlx_base(W: Tensor, b: Tensor | None) -> Any:
    import mlx.nn

    linear = mlx.nn.Linear(W.shape[1], W.shape[0], bias=b is not None)
    linear.update({"weight": to_mlx(W)} | ({} if b is None else {"bias": to_mlx(b)}))
    return linear


def mlx_merge(W: Tensor, A: Tensor, B: Tensor, scale: float, magnitude: Tensor | None = None) -> Tensor:
    alpha = scale * len(A)
    if magnitude is None:
        wrapped = mlx_linear(W, None, A, B, alpha)
    else:
        wrapped = mlx_dora(W, None, A, B, alpha, magnitude=magnitude)
    wrapped.layer.update({name: to_mlx(getattr(wrapped, name)) for name in wrapped.names})
    return to_torch(wrapped.layer.fuse().weight)


# --- loss, loop and chat mask ---


def mlx_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """`default_loss` of rows that are padded with 0, and by at least one token, as `iterate_batches` does.

    A row of mlx-lm has one range of labels, (offset, length); a row with several is given once for each.
    """
    from mlx_lm.tuner.trainer import default_loss

    ranges = [(row, *each) for row, own in enumerate(labels.tolist()) for each in _runs(own)]
    rows = [row for row, _, _ in ranges]
    tokens = torch.nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)
    batch = tokens.masked_fill(tokens == IGNORE_INDEX, 0)[rows]
    lengths = to_mlx(torch.tensor([each for _, *each in ranges]))

    def loss(logits: Any) -> Any:
        return default_loss(lambda _: logits, to_mlx(batch), lengths)[0]

    return MlxCall.apply(loss, logits[rows])


def _runs(labels: list[int]) -> list[tuple[int, int]]:
    """Return where labels begin and end."""
    is_label = [False, *(label != IGNORE_INDEX for label in labels), False]
    edges = [i for i in range(len(labels) + 1) if is_label[i] != is_label[i + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def mlx_accumulation(W: Tensor, micro_batches: MicroBatches) -> Tensor:
    """The loop `tuner.trainer.train` itself, with a loss that is the mean over labels of a micro-batch, as its own is.

    Without `mx.compile`, of which MLX 0.32.4 makes IndexError('_Map_base::at') here, also with its own SGD.
    """
    import mlx.core as mx
    import mlx.nn
    from mlx.optimizers import SGD
    from mlx_lm.tuner.trainer import TrainingArgs, train

    class MlxHead(mlx.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = to_mlx(W.float())  # MLX saves no float64

        def __call__(self, x: Any) -> Any:
            return x @ self.weight.T

    def loss(model: Any, x: Any, labels: Any) -> tuple[Any, Any]:
        targets = labels[:, 1:]
        mask = targets != IGNORE_INDEX
        losses = mlx.nn.losses.cross_entropy(model(x)[:, :-1], mx.where(mask, targets, 0)) * mask
        return losses.sum() / mask.sum(), mask.sum()

    def batches(**_: Any) -> Iterator[Any]:
        return ((to_mlx(x.float()), to_mlx(labels)) for x, labels in micro_batches)

    optimizer, count = SGD(0.0, momentum=0.5), len(micro_batches)
    with tempfile.TemporaryDirectory() as folder, quiet():
        args = TrainingArgs(
            batch_size=1,
            iters=count,
            val_batches=0,
            steps_per_report=count + 1,
            steps_per_save=count + 1,
            adapter_file=f"{folder}/adapters.safetensors",
            grad_accumulation_steps=count,
        )
        mx.disable_compile()
        train(MlxHead(), optimizer, Rows(), None, args, loss, batches)
        mx.enable_compile()
    return to_torch(optimizer.state["weight"]["v"])  # the momentum: of one step, the gradient


def mlx_mask(messages: Messages) -> Rendered:
    """`ChatDataset` with `mask_prompt`, and the mask of `default_loss`: the tokens from the offset on."""
    from mlx_lm.tuner.datasets import ChatDataset

    tokenizer = character_tokenizer(CHATML, messages)
    tokens, offset = ChatDataset([], tokenizer, mask_prompt=True).process({"messages": messages})
    return tokenizer.convert_ids_to_tokens(tokens), [i >= offset for i in range(len(tokens))]
