"""Packed questions get what each row gets on its own, and recurrent decoding gives what the full forward gives."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from amfm.model.packing import PackMeta
from amfm.pretrain.inference.generate import Sampling, generate_tokens
from amfm.pretrain.inference.over_ranks import RowPasses
from amfm.pretrain.tasks.scoring import GreedyJob, LikelihoodJob, Scorer, pack_questions
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
    passes = RowPasses.of_model(model, rows_at_once, predicts=True)
    return Scorer(passes, model, model.empty_state, tokenizer, max_length=40)


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


def test_questions_are_packed_whole_and_labelled_where_they_are_scored() -> None:
    rows, owners_BT = pack_questions(LikelihoodJob(ROWS, COUNTS), 40)
    assert [row.num_valid for row in rows] == [33 + 6 + 2, 17 + 5]  # of 41: longest first, into the most loaded row
    for row, owners_T in zip(rows, owners_BT):
        starts = [*row.starts.tolist(), row.num_valid]
        documents = [tuple(row.tokens[begin:end].tolist()) for begin, end in pairwise(starts)]
        assert all(document in ROWS for document in documents)
        assert row.labels is not None
        scored = {place: ROWS[owners_T[place]] for place in range(40) if owners_T[place] >= 0}
        assert [place for place in range(40) if row.labels[place] != -100] == list(scored)
        assert all(row.labels[place] in question for place, question in scored.items())
    assert [int((owners_BT == number).sum()) for number in range(len(ROWS))] == list(COUNTS)


def test_as_long_a_question_as_a_row_allows_needs_no_place_for_its_last_id() -> None:
    scorer = replace(make_scorer(), row_length=40)
    longest = tuple(index % 30 for index in range(41))
    (found,) = scorer.run(LikelihoodJob((longest,), (40,)))
    (shorter,) = scorer.run(LikelihoodJob((longest[:-1],), (39,)))
    assert found.log_probability < shorter.log_probability
    assert scorer.run(LikelihoodJob((), ())) == []


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
