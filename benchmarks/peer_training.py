"""The peers' losses and training loops, as the callables that `minilora.testing` checks.

A loop is the peer's own, run for one step of its optimizer on a model whose logits are x Wᵀ.

    B batch    T tokens    D width    V vocabulary
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import io
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peer_data import character_tokenizer

IGNORE_INDEX = -100
MicroBatches = Sequence[tuple[Tensor, Tensor]]  # x (B, T, D), labels (B, T)


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


def torchtune_accumulation(W: Tensor, micro_batches: MicroBatches) -> Tensor:
    """The loop of the recipe `lora_finetune_single_device` itself."""
    model = Head(W)
    recipe = torchtune_recipe(model)
    optimizer = Keep(model.W)
    rows = Rows({"x": x, "labels": labels} for x, labels in micro_batches)
    recipe.epochs_run, recipe.total_epochs, recipe.global_step, recipe.max_steps_per_epoch = 0, 1, 0, None
    recipe._gradient_accumulation_steps, recipe._steps_per_epoch, recipe._log_every_n_steps = len(rows), 1, 2
    recipe._dataloader, recipe._optimizer = rows, optimizer
    recipe._lr_scheduler = SimpleNamespace(step=lambda: None)
    with quiet():
        recipe.train()
    return optimizer.found[0]


def torchtune_recipe(model: Any) -> Any:
    """Return the recipe with a model, and without what `setup` reads from files."""
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
