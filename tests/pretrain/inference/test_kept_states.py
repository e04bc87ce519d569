"""States that are kept between requests change what an answer costs, never what it says."""

from __future__ import annotations

import pytest
import torch

from amfm.data_pipeline.config import DataConfig
from amfm.model.hybrid import HybridModel
from amfm.pretrain.inference.generate import Sampling, generate_tokens
from amfm.pretrain.inference.kept_states import TAIL_TOKENS, KeptStates, SharedModel
from tests.pretrain.export.exported_models import MODELS, random_weights

GREEDY = Sampling(temperature=0)
PROMPT = [(7 * number + 3) % 400 for number in range(60)]


@pytest.fixture(scope="module")
def model(data: DataConfig) -> HybridModel:
    return random_weights(data, MODELS["nemotron_h"]).build()


def share(model: HybridModel, max_state_bytes: int = 1 << 30) -> SharedModel:
    return SharedModel(model, vocab_size=448, max_state_bytes=max_state_bytes)


def test_a_conversation_that_goes_on_gets_the_answers_of_a_fresh_model(model: HybridModel) -> None:
    shared, ids = share(model), list(PROMPT)
    for turn in range(3):
        answer = list(shared.generate(ids, 12, GREEDY, ()))
        assert answer == list(generate_tokens(model, ids, 12, GREEDY, vocab_size=448))
        ids += [*answer, 5 + turn, 90, 11]


def test_a_turn_reads_its_own_tokens_alone(model: HybridModel) -> None:
    shared = share(model)
    answer = list(shared.generate(PROMPT, 12, GREEDY, ()))
    seen, kept = shared.kept.find([*PROMPT, *answer, 1, 2, 3])
    # The last token of the answer was chosen and not read.
    assert seen == len(PROMPT) + 11 and kept is not None and kept.state.length == seen
    assert shared.kept.find(PROMPT)[0] == len(PROMPT)
    split_otherwise = [*PROMPT[:-1], 399, 1, 2]
    assert shared.kept.find(split_otherwise)[0] == len(PROMPT) - TAIL_TOKENS
    assert shared.kept.find([4, *PROMPT]) == (0, None)


def test_an_answer_that_nobody_waits_for_is_kept_as_far_as_it_came(model: HybridModel) -> None:
    shared = share(model)
    answer = shared.generate(PROMPT, 100, GREEDY, ())
    first = [next(answer) for _ in range(5)]
    answer.close()
    assert shared.kept.find([*PROMPT, *first])[0] == len(PROMPT) + 4


def test_an_end_token_ends_the_text_and_is_not_part_of_it(model: HybridModel) -> None:
    answer = list(share(model).generate(PROMPT, 12, GREEDY, ()))
    end = answer[6]
    assert list(share(model).generate(PROMPT, 12, GREEDY, {end})) == answer[: answer.index(end)]


def test_the_least_recently_used_states_make_room(model: HybridModel) -> None:
    state, logits_V = model.empty_state(1), torch.zeros(256)
    kept = KeptStates(1 << 20)
    kept.keep([1], state, logits_V)
    each = kept.num_bytes
    assert 1024 < each < 1 << 20
    kept.max_bytes = 2 * each
    kept.keep([2], state, logits_V)
    assert kept.find([1, 9])[0] == 1
    kept.keep([3], state, logits_V)
    assert [kept.find([first])[0] for first in (1, 2, 3)] == [1, 0, 1]
    assert kept.num_bytes == 2 * each and len(kept) == 2
    nothing = KeptStates(0)
    nothing.keep([1], state, logits_V)
    assert len(nothing) == 0
