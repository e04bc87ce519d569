"""Generates text from a checkpoint, a token at a time.

The prompt is read in one pass, which leaves a decode state: windows and matrix states of recurrent blocks, whose size does
not grow, and key-value caches of attention. Every further token is computed only from the last token and that state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from amfm.data_pipeline.terminal import Report, silent
from amfm.data_pipeline.tokenizer.tokenizer import Tokenizer
from amfm.model.hybrid import HybridModel
from amfm.pretrain.inference.replay import OneText
from amfm.pretrain.inference.weights import Weights, read_weights

# A character has at most four bytes, so never more byte pieces have to wait for one.
MAX_PENDING = 4


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0: always the most likely one; then top_k, top_p and seed do nothing.

    top_k: only the k most likely tokens; top_p: only the smallest set of most likely tokens that holds this probability
    (Holtzman et al. 2020, arXiv 1904.09751, section 3.1). None: all tokens.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def check(self) -> None:
        """Raise ValueError for a value out of range."""
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature} must be at least 0 and finite; use 0 for the most likely token"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1; leave it out to allow all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1; leave it out to allow all tokens")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must fit into 64 bits; use a smaller number")


class TextModel:
    """A model with its tokenizer, loaded once, that continues texts."""

    def __init__(self, weights: Weights, *, device: str = "cpu", backend: str = "auto") -> None:
        self.origin, self.tokenizer = weights.origin, weights.tokenizer
        self.model = weights.build(backend=backend, device=device)

    @overload
    def generate(self, prompt: str, max_new_tokens: int = 200, sampling: Sampling | None = None) -> str: ...
    @overload
    def generate(self, prompt: list[str], max_new_tokens: int = 200, sampling: Sampling | None = None) -> list[str]: ...
    def generate(
        self, prompt: str | list[str], max_new_tokens: int = 200, sampling: Sampling | None = None
    ) -> str | list[str]:
        """Continue a prompt and return what follows it, or each of several as if it were the only one. Raises as `stream` does."""
        if isinstance(prompt, str):
            return "".join(self.stream(prompt, max_new_tokens, sampling))
        return [self.generate(each, max_new_tokens, sampling) for each in prompt]

    def stream(self, prompt: str, max_new_tokens: int = 200, sampling: Sampling | None = None) -> Iterator[str]:
        """Yield pieces of what follows as soon as they are whole characters; ends at end-of-text.

        Raises ValueError for an empty prompt or impossible settings.
        """
        sampling = sampling or Sampling()
        check_request(max_new_tokens, sampling)
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise ValueError(f"the prompt {prompt!a} must be Unicode; give it as UTF-8")
        ids, tokenizer = self.tokenizer.encode(prompt), self.tokenizer
        if not ids:
            raise ValueError("the prompt is empty; give at least one character (training inserts no begin token)")
        sizes = {"vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id}
        return stream_text(tokenizer, ids, generate_tokens(self.model, ids, max_new_tokens, sampling, **sizes))


def check_request(max_new_tokens: int, sampling: Sampling) -> None:
    """Raise ValueError for settings of a generation that are out of range."""
    sampling.check()
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")


def generate(
    checkpoint: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    sampling: Sampling | None = None,
    device: str = "cpu",
    backend: str = "auto",
    report: Report = silent,
) -> Iterator[str]:
    """Continue the prompt: yields pieces of text as soon as they are whole characters, and ends at end-of-text.

    `checkpoint`: a checkpoint, a run directory or an imported model. A token costs the same time and memory in Mamba2
    blocks however long the text is. Raises ValueError for an empty prompt or impossible settings.
    """
    check_request(max_new_tokens, sampling or Sampling())  # before the model is read, which takes time
    model = TextModel(read_weights(checkpoint, report), device=device, backend=backend)
    return model.stream(prompt, max_new_tokens, sampling)


def generate_tokens(
    model: HybridModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    vocab_size: int | None = None,
    eos_id: int | None = None,
) -> Iterator[int]:
    """Yield new token ids after the prompt's, at most `max_new_tokens`; `eos_id` ends the text and is not yielded.

    Ids from `vocab_size` on, which the tokenizer does not have, are never chosen.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    text, ids = OneText(model), list(prompt)
    for _ in range(max_new_tokens):
        logits_V = text.read(ids)
        token = choose_token(logits_V[:vocab_size], sampling, generator)
        if token == eos_id:
            return
        yield token
        ids = [token]


def choose_token(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Choose one token from float32 logits [V] on the CPU, where the generator gives the same numbers on all devices.

    Order: temperature, top_k, top_p, as they narrow the distribution one after the other.
    """
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    # The largest becomes 0, which stays 0 at a temperature that float32 rounds to nothing; inf - inf would be NaN.
    logits_V = (logits_V - logits_V.max()) / max(sampling.temperature, torch.finfo(torch.float32).tiny)
    if sampling.top_k is not None and sampling.top_k < len(logits_V):
        smallest = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < smallest, -torch.inf)
    if sampling.top_p is not None:
        logits_V = _keep_top_p(logits_V, sampling.top_p)
    return int(torch.multinomial(logits_V.softmax(dim=-1), 1, generator=generator))


def _keep_top_p(logits_V: Tensor, top_p: float) -> Tensor:
    """Set the logits [V] outside of the nucleus to minus infinity; the most likely token always stays.

    A token stays while the probability of all likelier ones together is below `top_p`.
    """
    ordered_V, order_V = logits_V.sort(descending=True)
    probabilities_V = ordered_V.softmax(dim=-1)
    before_V = probabilities_V.cumsum(dim=-1) - probabilities_V
    return logits_V.index_fill(0, order_V[before_V >= top_p], -torch.inf)


def stream_text(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterator[int]) -> Iterator[str]:
    """Decode tokens as they come; the bytes of one character wait for each other.

    A text that ends in the replacement character is taken for an unfinished one, for at most MAX_PENDING tokens.
    """
    context = list(prompt[-1:])
    pending: list[int] = []
    for token in tokens:
        pending.append(token)
        text = _text_after(tokenizer, context, pending)
        if text.endswith("\ufffd") and len(pending) < MAX_PENDING:
            continue
        yield text
        context, pending = pending[-1:], []
    if pending:
        yield _text_after(tokenizer, context, pending)


def _text_after(tokenizer: Tokenizer, context: list[int], pending: list[int]) -> str:
    """Decode what the pending ids add to the context.

    Not decoded on its own: some tokenizers drop the space of a text's first piece.
    """
    before = tokenizer.decode(context)
    return tokenizer.decode(context + pending)[len(before) :]
