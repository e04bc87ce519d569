"""Padded, sorted and shared batches give what each row gives on its own, and recurrent decoding what the full forward
gives.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from amfm.model.packing import PackMeta
from amfm.pretrain.inference.generate import Sampling, generate_tokens
from amfm.pretrain.tasks.scoring import GreedyJob, LikelihoodJob, Scorer, Share
from tests.model.small_models import small_config, small_model

ROWS = tuple(
    tuple(range(3 + start, 3 + start + length)) for start, length in ((0, 5), (1, 17), (4, 33), (0, 6), (2, 2))
)
COUNTS = (2, 16, 5, 1, 1)


class Letters:
    """A tokenizer whose ids are letters, enough to cut continuations."""

    vocab_size = 30
    eos_id = 2

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + index) for index in ids)


def make_scorer(pattern: str = "M*E", rows_at_once: int = 2) -> Scorer:
    model = small_model(small_config(pattern)).eval()
    tokenizer: Any = Letters()
    return Scorer(model, model.empty_state, tokenizer, torch.device("cpu"), 40, rows_at_once, Share())


def test_batches_score_what_each_row_scores_alone() -> None:
    scorer = make_scorer()
    found = scorer.run(LikelihoodJob(ROWS, COUNTS))
    for row, count, answer in zip(ROWS, COUNTS, found):
        tokens_BT = torch.tensor([row])
        with torch.no_grad():
            logits_TV = scorer.forward(tokens_BT, PackMeta.one_document_a_row(1, len(row))).logits_BTV[0, :-1]
        scores_TV = logits_TV.float().log_softmax(-1)
        targets = list(enumerate(row[1:]))[-count:]
        assert answer.log_probability == pytest.approx(
            sum(float(scores_TV[at, token]) for at, token in targets), abs=1e-4
        )
        assert answer.is_greedy == all(int(scores_TV[at].argmax()) == token for at, token in targets)


def test_rows_that_differ_in_the_last_id_share_a_forward_pass() -> None:
    scorer = make_scorer()
    calls: list[torch.Size] = []

    def forward(tokens_BT: torch.Tensor, *rest: Any) -> Any:
        calls.append(tokens_BT.shape)
        return scorer.forward(tokens_BT, *rest)

    rows = tuple((3, 4, 5, last) for last in (6, 7, 8))
    answers = replace(scorer, forward=forward).run(LikelihoodJob(rows, (1, 1, 2)))
    assert calls == [(1, 32)]
    assert len({answer.log_probability for answer in answers}) == 3


@pytest.mark.parametrize("pattern", ["M", "*", "ME*-"])
def test_continuations_of_a_batch_are_those_of_each_prompt_alone(pattern: str) -> None:
    scorer = make_scorer(pattern)
    prompts = ((3, 4, 5), (9, 8, 7, 6), (5, 5, 6), (10, 4, 4), (3,))
    found = scorer.run(GreedyJob(prompts, (6, 5, 0, 6, 3), ((),) * 5))
    for prompt, limit, answer in zip(prompts, (6, 5, 0, 6, 3), found):
        model: Any = scorer.forward
        alone = (
            list(generate_tokens(model, prompt, limit, Sampling(temperature=0), vocab_size=30, eos_id=2))
            if limit
            else []
        )
        assert answer == alone


def test_a_stop_text_ends_its_row_alone() -> None:
    scorer = make_scorer()
    free = scorer.run(GreedyJob(((3, 4), (7, 8)), (6, 6), ((), ())))
    stop = Letters().decode(free[0][1:3])
    stopped = scorer.run(GreedyJob(((3, 4), (7, 8)), (6, 6), ((stop,), ())))
    assert stopped[1] == free[1]
    assert stopped[0] == free[0][: len(stopped[0])] and stop in Letters().decode(stopped[0])


def test_data_ranks_run_as_many_passes_and_together_answer_all() -> None:
    whole = make_scorer().run(LikelihoodJob(ROWS, COUNTS))
    parts: list[dict[int, Any]] = []
    passes = []
    for rank in range(2):
        scorer = make_scorer()
        calls: list[int] = []

        def forward(*inputs: Any, own: Scorer = scorer, seen: list[int] = calls) -> Any:
            seen.append(1)
            return own.forward(*inputs)

        def gather(found: dict[int, Any]) -> list[dict[int, Any]]:
            parts.append(found)
            return [found, dict.fromkeys(range(len(ROWS)))] if len(parts) == 1 else parts

        shared = replace(scorer, forward=forward, share=Share(rank, 2, gather=gather))
        answers = shared.run(LikelihoodJob(ROWS, COUNTS))
        passes.append(len(calls))
    assert passes == [2, 2] and answers == whole
    assert not parts[0].keys() & parts[1].keys()
