"""lm-eval's view of our model: texts become token ids, ids become jobs, answers become what lm-eval counts.

Row lengths, the token before an empty context and the cutting of long texts are lm-eval's own rules for transformers
models, so that a task gives the same numbers on the export. This file needs lm-eval, so it is imported only where tasks
are asked for (`suite.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from amfm.data_pipeline.tokenizer.tokenizer import Tokenizer
from amfm.pretrain.tasks.scoring import GreedyJob, Job, LikelihoodJob

# lm-eval's own default, for a task that does not say how many tokens it generates at most.
DEFAULT_NEW_TOKENS = 256
LIMIT_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class ModelAdapter(TemplateLM):
    """An lm-eval model that hands its questions to `answer`, which runs a `Job` on all ranks.

    `scoring_failed` tells afterwards whether an error came from the model, not from the task. Raises ValueError for
    what a task asks and the model cannot do: sampling, more new tokens than a row has, an empty continuation.
    """

    def __init__(self, answer: Callable[[Job], list[Any]], tokenizer: Tokenizer, max_length: int) -> None:
        super().__init__()
        self.answer, self.ids_of, self.max_length = answer, tokenizer, max_length
        self.scoring_failed = False

    @property
    def eot_token_id(self) -> int:
        """Id of the end of a text."""
        return self.ids_of.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Id that stands before a text without context: the begin token, or the end token where there is none."""
        bos = self.ids_of.bos_id
        return self.ids_of.eos_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encode as in pretraining, without special tokens, whatever is asked: the export's tokenizer adds none either."""
        return self.ids_of.encode(string)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of continuations, without a progress bar."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations (ids) after contexts (ids); what is too long loses tokens on the left."""
        for texts, _context, continuation in requests:
            if not continuation:
                raise ValueError(f"the continuation {texts and texts[1]!r} adds no token to its context")
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens is longer than the model's sequences of {self.max_length}; "
                    "use a model of longer sequences, or a task with shorter answers"
                )
        # Blanks at the end of a context go to its continuation, so one of only blanks is empty here.
        start = [self.prefix_token_id]
        rows = [tuple(((context or start) + more)[-(self.max_length + 1) :]) for _, context, more in requests]
        counts = tuple(len(continuation) for _, _, continuation in requests)
        found = self._ask(LikelihoodJob(tuple(rows), counts))
        return [(one.log_probability, one.is_greedy) for one in found]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of whole texts, cut into windows in which each token counts once."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            pairs = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            for context, continuation in map(make_disjoint_window, pairs):
                windows.append((None, context, continuation))
                owners.append(index)
        sums = [0.0] * len(requests)
        for index, (log_probability, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[index] += log_probability
        return sums

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """Continue contexts greedily until a stop text, the end of a text or the task's limit; stop texts are cut off."""
        prompts, limits, stops = [], [], []
        for request in requests:
            context, settings = request.args
            limit, until = read_generation(settings)
            if limit >= self.max_length:
                raise ValueError(
                    f"the task generates up to {limit} tokens, and the model was trained on sequences of {self.max_length}; "
                    "set generation_kwargs.max_gen_toks of the task lower"
                )
            ids = self.tok_encode(context) or [self.prefix_token_id]
            prompts.append(tuple(ids[-(self.max_length - limit) :]))
            limits.append(limit)
            stops.append(until)
        found = self._ask(GreedyJob(tuple(prompts), tuple(limits), tuple(stops)))
        texts = []
        for ids, until in zip(found, stops, strict=True):
            text = self.ids_of.decode(ids)
            for stop in until:
                text = text.split(stop)[0]
            texts.append(text)
        return texts

    def _ask(self, job: Job) -> list[Any]:
        """Have the model answer; remember that an error was its own."""
        self.scoring_failed = True
        answers = self.answer(job)
        self.scoring_failed = False
        return answers


def read_generation(settings: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Read a task's generation_kwargs: new tokens at most, and stop texts. Raises ValueError for sampling and no limit."""
    limit = next((int(settings[name]) for name in LIMIT_NAMES if settings.get(name) is not None), DEFAULT_NEW_TOKENS)
    if limit < 0:
        raise ValueError(
            f"the task generates {limit} tokens at most; set max_gen_toks in its generation_kwargs to 1 or more"
        )
    until = settings.get("until") or ()
    temperature = float(settings.get("temperature") or 0)
    samples = settings.get("do_sample")
    if temperature > 0 and (samples or samples is None):
        raise ValueError(
            f"the task samples (temperature={temperature:g}), and generation here is greedy; set do_sample: false in "
            "its generation_kwargs"
        )
    return limit, (until,) if isinstance(until, str) else tuple(text for text in until if text)
