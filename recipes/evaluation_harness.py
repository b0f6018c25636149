"""Run tasks of lm-evaluation-harness on a model with its adapters, without files in between.

    log p(continuation | context) = Σ_t log p(token t | tokens before), and whether each token is the most likely one

    from lm_eval import simple_evaluate
    model, tokenizer = ml.load_model("path/to/model"), ml.load_tokenizer("path/to/model")
    ml.load_adapter(model, "out")
    tuned = simple_evaluate(HarnessModel(model, tokenizer), tasks=["arc_easy", "gsm8k"], limit=100)["results"]
    with ml.disable_adapter(model):
        base = simple_evaluate(HarnessModel(model, tokenizer), tasks=["arc_easy", "gsm8k"], limit=100)["results"]

As in the harness's own model `hf`, no special tokens are added, long texts lose their beginning, and no context is BOS.
"""

from collections.abc import Iterable, Sequence
from hashlib import sha256
from itertools import groupby
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

import minilora as ml
from minilora.data import IGNORE_INDEX, collate
from minilora.llama import Documents, Llama


class HarnessModel(LM):
    def __init__(self, model: Llama, tokenizer: ml.Tokenizer, batch_size: int = 16, max_length: int = 2048):
        super().__init__()
        self.model, self.tokenizer, self.batch_size, self.max_length = model.eval(), tokenizer, batch_size, max_length
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
        names = tokenizer.special_tokens
        self.prefix = [tokenizer.token_id(names.get("bos_token", names.get("eos_token")))]

    @property
    def tokenizer_name(self) -> str:  # by which the harness caches prompts, so it follows from the chat template
        return sha256(self.apply_chat_template([{"role": "user", "content": ""}]).encode()).hexdigest()

    @torch.no_grad()
    def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Return log p(continuation | context) of each pair, and whether greedy decoding gives this continuation."""
        results = []
        for i in range(0, len(pairs), self.batch_size):
            rows = []
            for context, continuation in pairs[i : i + self.batch_size]:
                labels = [IGNORE_INDEX] * len(context) + continuation
                rows.append(ml.Example(*(part[-self.max_length - 1 :] for part in (context + continuation, labels))))
            batch = collate(rows, next(self.model.parameters()).device)
            hidden = self.model.model(batch.tokens, Documents(batch.lengths))[batch.label_positions]
            logs = self.model.get_output_embeddings()(hidden).float().log_softmax(-1)
            scores = torch.stack((logs.gather(1, batch.labels[:, None])[:, 0], logs.argmax(-1) == batch.labels), 1)
            for part in scores.split([row.labelled for row in rows]):
                results.append((part[:, 0].sum().item(), bool(part[:, 1].all())))
        return results

    def loglikelihood(self, requests: Iterable[Instance]) -> list[tuple[float, bool]]:
        pairs = []
        for context, continuation in (request.args for request in requests):
            whole, begin = self.encode(context + continuation), self.encode(context.rstrip())
            pairs.append((begin or self.prefix, whole[len(begin) :]))
        return self.score(pairs)

    def loglikelihood_rolling(self, requests: Iterable[Instance]) -> list[float]:
        sums = []
        for request in requests:
            windows = get_rolling_token_windows(self.encode(*request.args), self.prefix[0], self.max_length, 1)
            sums.append(sum(log for log, _ in self.score([make_disjoint_window(window) for window in windows])))
        return sums

    def generate_until(self, requests: Iterable[Instance]) -> list[str]:
        texts = []
        for settings, group in groupby(requests, lambda request: request.args[1]):
            prompts = [request.args[0] for request in group]
            for i in range(0, len(prompts), self.batch_size):
                texts += self.write(prompts[i : i + self.batch_size], **settings)
        return texts

    def write(self, prompts: Sequence[str], until: Any = (), max_gen_toks: int = 256, **sampling: Any) -> list[str]:
        """Continue each prompt until one of the texts in `until`, which is left off."""
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        written: list[list[int]] = [[] for _ in prompts]

        def is_last(row: int, token: int) -> bool:
            written[row].append(token)
            return any(stop in self.tokenizer.decode(written[row]) for stop in stops)

        ids = [self.encode(prompt)[max_gen_toks - self.max_length :] for prompt in prompts]
        chosen = {key: value for key, value in sampling.items() if key in ("temperature", "top_p", "top_k")}
        settings = {"temperature": 1.0, **chosen} if sampling.get("do_sample") else {}
        ml.generate(self.model, ids, max_gen_toks, stop_ids=self.tokenizer.stop_ids, on_token=is_last, **settings)
        texts = [self.tokenizer.decode(tokens) for tokens in written]
        for stop in stops:
            texts = [text.split(stop)[0] for text in texts]
        return texts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.render(chat_history, add_generation_prompt)
