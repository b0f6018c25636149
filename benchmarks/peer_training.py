"""The peers' losses, training loops and chat masks, as the callables that `minilora.testing` checks.

A loop is the peer's own, run for one step of its optimizer on a model whose logits are x Wᵀ.

    B batch    T tokens    D width    V vocabulary
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peer_callables import MlxCall, to_mlx, to_torch

IGNORE_INDEX = -100
MicroBatches = Sequence[tuple[Tensor, Tensor]]  # x (B, T, D), labels (B, T)
Messages = list[dict[str, str]]
Rendered = tuple[list[str], list[bool]]


# --- transformers and TRL ---


def transformers_loss(logits: Tensor, labels: Tensor) -> Tensor:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss(logits, labels, logits.shape[-1])


def causal_lm(W: Tensor) -> Any:
    """Return a causal language model of transformers: its last hidden state is x, its head W."""
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

    class Backbone(nn.Module):
        def forward(self, x: Tensor, **_: Any) -> Any:
            return BaseModelOutput(last_hidden_state=x)

    class HeadForCausalLM(PreTrainedModel):  # the name says which loss transformers gives it
        config_class, base_model_prefix = PretrainedConfig, "model"

        def __init__(self, config: Any):
            super().__init__(config)
            self.model, self.lm_head = Backbone(), nn.Linear(*W.T.shape, bias=False, dtype=W.dtype)
            self.post_init()

        def get_output_embeddings(self) -> Any:
            return self.lm_head

        def forward(self, x: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
            logits = self.lm_head(self.model(x).last_hidden_state)
            kwargs = {name: value for name, value in kwargs.items() if name == "num_items_in_batch"}
            loss = None if labels is None else self.loss_function(logits, labels, logits.shape[-1], **kwargs)
            return CausalLMOutput(loss=loss, logits=logits)

    model = HeadForCausalLM(PretrainedConfig(vocab_size=len(W)))
    model.lm_head.weight.data.copy_(W)
    return model


def transformers_accumulation(W: Tensor, micro_batches: MicroBatches) -> Tensor:
    from transformers import Trainer, TrainingArguments

    return _by_trainer(Trainer, TrainingArguments, W, micro_batches)


def trl_accumulation(W: Tensor, micro_batches: MicroBatches) -> Tensor:
    from trl import SFTConfig, SFTTrainer

    return _by_trainer(SFTTrainer, SFTConfig, W, micro_batches)


def _by_trainer(trainer_type: Any, arguments: Any, W: Tensor, micro_batches: MicroBatches) -> Tensor:
    from transformers import TrainerCallback

    found: list[Tensor] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            found.append(model.lm_head.weight.grad.clone())

    with trainer(trainer_type, arguments, causal_lm(W), micro_batches, [Watch()]) as runs, quiet():
        runs.train()
    return found[0]


@contextlib.contextmanager
def trainer(
    trainer_type: Any, arguments: Any, model: Any, micro_batches: MicroBatches, callbacks: Sequence[Any] = ()
) -> Iterator[Any]:
    """Yield a trainer of one step over all micro-batches, each of which is one row of its data set."""
    from datasets import Dataset

    is_sft = trainer_type.__name__ == "SFTTrainer"
    own: dict[str, Any] = {}
    if is_sft:
        own = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, "bf16": False}

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        x, labels = micro_batches[rows[0]["input_ids"][0]]
        mask = {"attention_mask": torch.ones_like(labels)} if is_sft else {}
        return {"x": x, "labels": labels, **mask}

    with tempfile.TemporaryDirectory() as folder:
        settings = arguments(
            folder,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=len(micro_batches),
            max_steps=1,
            max_grad_norm=0.0,
            gradient_checkpointing=False,
            remove_unused_columns=False,
            train_sampling_strategy="sequential",
            optim="sgd",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **own,
        )
        data = Dataset.from_list([{"input_ids": [i], "labels": [i]} for i in range(len(micro_batches))])
        tokenizer = {"processing_class": character_tokenizer("", [])} if is_sft else {}
        yield trainer_type(
            model, settings, train_dataset=data, data_collator=collate, callbacks=list(callbacks), **tokenizer
        )


def trl_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """SFTTrainer's `compute_loss` of a model whose last hidden state is `logits`, and whose head is the identity."""
    from trl import SFTConfig, SFTTrainer

    model = causal_lm(torch.eye(logits.shape[-1], dtype=logits.dtype))
    with quiet(), trainer(SFTTrainer, SFTConfig, model, [(logits, labels)]) as made:
        inputs = {"x": logits, "labels": labels, "attention_mask": torch.ones_like(labels)}
        return made.compute_loss(made.model.train(), inputs)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what a loop prints to itself."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


# --- litgpt ---


def litgpt_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """`chunked_cross_entropy` of logits in chunks of 128 tokens, shifted as `finetune.lora.fit` does."""
    from litgpt.utils import chunked_cross_entropy

    chunks = list(logits.split(128, dim=1))
    chunks[-1] = chunks[-1][..., :-1, :]
    return chunked_cross_entropy(chunks, labels[..., 1:])


class Head(nn.Module):
    """A model whose logits are x Wᵀ; in chunks, as litgpt's loop asks for them, and torchtune's expects them."""

    def __init__(self, W: Tensor):
        super().__init__()
        self.W = nn.Parameter(W.clone())
        self.max_seq_length, self.config = 0, SimpleNamespace(block_size=1 << 20)

    def forward(self, x: Tensor, lm_head_chunk_size: int = 1 << 20) -> list[Tensor]:
        return list((x @ self.W.T).split(lm_head_chunk_size, dim=1))


class Rows(list[Any]):
    """A data loader of given batches."""

    sampler = SimpleNamespace(set_epoch=lambda epoch: None)
    dataset = property(lambda self: [{"input_ids": row["input_ids"][0]} for row in self])


class Keep:
    """An optimizer and a schedule that keep the gradient of the step, and do no more."""

    def __init__(self, parameter: Tensor):
        self.parameter, self.found, self.param_groups = parameter, [], [{"lr": 0.0}]

    def step(self) -> None:
        if self.parameter.grad is not None:
            self.found.append(self.parameter.grad.clone())

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.parameter.grad = None


def litgpt_accumulation(W: Tensor, micro_batches: MicroBatches) -> Tensor:
    """The loop `finetune.lora.fit` itself."""
    from lightning.fabric import Fabric
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.finetune.lora import fit

    fabric = Fabric(accelerator="cpu", devices=1, precision="64-true" if W.dtype == torch.float64 else "32-true")
    model = fabric.setup_module(Head(W))
    optimizer = Keep(model.W)
    counts = {name: torch.ones(1, dtype=torch.long) for name in ("raw", "raw_plus_prompt_template")}
    rows = Rows({"input_ids": x, "labels": labels, "token_counts": counts} for x, labels in micro_batches)
    steps = {"global_batch_size": len(rows), "micro_batch_size": 1, "max_steps": 1, "epochs": 2}
    with tempfile.TemporaryDirectory() as folder, quiet():
        character_tokenizer("", []).backend_tokenizer.save(f"{folder}/tokenizer.json")
        fit(
            fabric=fabric,
            model=model,
            optimizer=optimizer,
            scheduler=SimpleNamespace(step=lambda: None, get_last_lr=lambda: [0.0]),
            train_dataloader=rows,
            val_dataloader=Rows(),
            devices=1,
            checkpoint_dir=Path(folder),
            out_dir=Path(folder),
            train=TrainArgs(**steps, save_interval=None, log_interval=len(rows) + 1),
            eval=EvalArgs(interval=2),
            data=None,
        )
    return optimizer.found[0]


# --- torchtune ---


def torchtune_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The recipe's `_loss_step` on a model that returns these logits, with the loss of its configurations."""
    return _torchtune_recipe(lambda x: [x])._loss_step({"x": logits, "labels": labels})


def torchtune_accumulation(W: Tensor, micro_batches: MicroBatches) -> Tensor:
    """The loop of the recipe `lora_finetune_single_device` itself."""
    model = Head(W)
    recipe = _torchtune_recipe(model)
    optimizer = Keep(model.W)
    rows = Rows({"x": x, "labels": labels} for x, labels in micro_batches)
    recipe.epochs_run, recipe.total_epochs, recipe.global_step, recipe.max_steps_per_epoch = 0, 1, 0, None
    recipe._gradient_accumulation_steps, recipe._steps_per_epoch, recipe._log_every_n_steps = len(rows), 1, 2
    recipe._dataloader, recipe._optimizer = rows, optimizer
    recipe._lr_scheduler = SimpleNamespace(step=lambda: None)
    with quiet():
        recipe.train()
    return optimizer.found[0]


def _torchtune_recipe(model: Any) -> Any:
    """Return the recipe with a model and without what `setup` reads from files."""
    from torchtune.modules.loss import CEWithChunkedOutputLoss
    from torchtune.training import DummyProfiler

    class Recipe(_torchtune_file().LoRAFinetuneRecipeSingleDevice):
        def __init__(self) -> None:
            self._model, self._loss_fn = model, CEWithChunkedOutputLoss(num_output_chunks=1)
            self._profiler, self.profiler_profile_memory = DummyProfiler(), False
            self._device, self._compile, self._clip_grad_norm = torch.device("cpu"), False, None
            self.activations_handling_ctx = contextlib.nullcontext()
            self.ignore_labels_cache = torch.full((64, 1), IGNORE_INDEX)

        def save_checkpoint(self, epoch: int) -> None:
            pass

    return Recipe()


@functools.cache
def _torchtune_file() -> Any:
    """Import the recipe from its file; the folder is no package."""
    path = importlib.metadata.distribution("torchtune").locate_file("recipes/lora_finetune_single_device.py")
    spec: Any = importlib.util.spec_from_file_location("lora_finetune_single_device", str(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- mlx-lm ---


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


# --- chat masks ---

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>")
SPECIAL += ("<start_of_turn>", "<end_of_turn>", "<bos>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


def character_tokenizer(template: str, messages: Messages) -> Any:
    """Return a fast tokenizer of transformers, a token of which is a character or a special token."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    text = template + "".join(message["role"] + message["content"] for message in messages)
    tokens = [*SPECIAL, *sorted(set(text) | set(map(chr, range(32, 127))) | {"\n"})]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<|im_end|>",
        pad_token="<|end|>",
        chat_template=template or None,
    )


def transformers_mask(messages: Messages) -> Rendered:
    """`apply_chat_template` with `return_assistant_tokens_mask`, of ChatML with generation tags."""
    return _rendered(character_tokenizer(CHATML, messages), messages)


def _rendered(tokenizer: Any, messages: Messages, template: str | None = None) -> Rendered:
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    found = tokenizer.apply_chat_template(messages, chat_template=template, **options)
    return tokenizer.convert_ids_to_tokens(found["input_ids"]), [bool(each) for each in found["assistant_masks"]]


def trl_mask(family: str) -> Callable[[Messages], Rendered]:
    """Return what `assistant_only_loss` learns with TRL's training template for a family's own template."""

    def render(messages: Messages) -> Rendered:
        from trl import chat_template_utils

        tokenizer = character_tokenizer(getattr(chat_template_utils, f"{family}_chat_template"), messages)
        return _rendered(tokenizer, messages, chat_template_utils.get_training_chat_template(tokenizer))

    return render


def mlx_mask(messages: Messages) -> Rendered:
    """`ChatDataset` with `mask_prompt`, and the mask of `default_loss`: the tokens from the offset on."""
    from mlx_lm.tuner.datasets import ChatDataset

    tokenizer = character_tokenizer(CHATML, messages)
    tokens, offset = ChatDataset([], tokenizer, mask_prompt=True).process({"messages": messages})
    return tokenizer.convert_ids_to_tokens(tokens), [i >= offset for i in range(len(tokens))]


def torchtune_mask(messages: Messages) -> Rendered:
    """`OpenAIToMessages`, and `tokenize_messages_no_special_tokens` with an end token."""
    from torchtune.data import OpenAIToMessages
    from torchtune.modules.transforms.tokenizers import tokenize_messages_no_special_tokens

    def encode(text: str, **_: Any) -> list[int]:
        return [ord(character) for character in text]

    tokenizer: Any = SimpleNamespace(encode=encode, max_seq_len=None)
    own = OpenAIToMessages()({"messages": messages})["messages"]
    tokens, is_masked = tokenize_messages_no_special_tokens(tokenizer, own, eos_id=0)
    return [chr(token) if token else "<|im_end|>" for token in tokens], [not each for each in is_masked]
