"""States that are kept between requests change what an answer costs, never what it says."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from amfm_serve.kept_states import TAIL_TOKENS, KeptStates, SharedModel
from amfm_serve.rows import TextRows

from amfm.data_pipeline.config import DataConfig
from amfm.model.hybrid import HybridModel
from amfm.model.state_size import state_tensors
from amfm.pretrain.inference.generate import Sampling, generate_tokens
from amfm.pretrain.inference.replay import advance
from tests.pretrain.export.exported_models import MODELS, random_weights

ROWS = [("nemotron_h", 1), ("nemotron_h", 8), ("qwen3_next", 3), ("lfm2_moe", 5), ("gpt_oss", 2), ("falcon_h1", 4)]
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


def test_what_several_texts_are_answered_at_once_is_what_each_is_alone(model: HybridModel) -> None:
    prompts = [PROMPT[: 20 + 7 * number] for number in range(6)]
    settings = [Sampling(temperature=0.0 if number % 2 else 1.0, seed=number) for number in range(6)]
    alone = [list(share(model).generate(*each, ())) for each in zip(prompts, [5, 12, 9, 3, 12, 8], settings)]
    shared = share(model)
    with ThreadPoolExecutor(6) as threads:
        asked = [
            threads.submit(lambda each: list(shared.generate(*each, ())), each)
            for each in zip(prompts, [5, 12, 9, 3, 12, 8], settings)
        ]
        assert [each.result() for each in asked] == alone


@pytest.mark.parametrize(("name", "number"), ROWS)
def test_a_row_of_a_pass_does_not_depend_on_the_others(data: DataConfig, name: str, number: int) -> None:
    model = random_weights(data, MODELS[name]).build()
    states = [advance(model, model.empty_state(1), PROMPT[: 9 + 5 * row])[0] for row in range(number)]
    rows = TextRows(model)
    for row, state in enumerate(states):
        rows.join(row, state)
    together = rows.read({row: row for row in range(number)})
    for row, logits_V in together.items():
        one, state = TextRows(model), rows.leave(row)
        one.join(9, states[row])
        alone_V = one.read({9: row})[9]
        alone = one.leave(9)
        # Libraries may add in another order for another number of rows: float32, sums of at most 100 products.
        torch.testing.assert_close(logits_V, alone_V)
        for left, right in zip(state_tensors(state.blocks), state_tensors(alone.blocks), strict=True):
            torch.testing.assert_close(left, right)
        assert torch.allclose(logits_V, advance(model, states[row], [row])[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_texts_join_rest_and_leave_between_tokens_without_a_trace(data: DataConfig, name: str) -> None:
    model = random_weights(data, MODELS[name]).build()
    states = {text: advance(model, model.empty_state(1), PROMPT[: 9 + 5 * text])[0] for text in range(6)}
    alone, read = dict(states), {text: 0 for text in states}
    rows = TextRows(model)
    # By pass, the texts that read: some join later, some rest, some leave; six need eight slots, three need four.
    for asking in ("01", "012", "02", "12345", "0345", "345", "35", "35"):
        texts = [int(text) for text in asking]
        given = {text: PROMPT[7 * text + read[text]] for text in texts}
        for text in set(texts) - rows.places.keys():
            rows.join(text, states[text])
        logits = rows.read(given)
        for text, token in given.items():
            alone[text], expected_V = advance(model, alone[text], [token])
            assert torch.allclose(logits[text], expected_V, rtol=1e-4, atol=1e-4), (asking, text)
            read[text] += 1
        if asking == "0345":
            for text in (0, 1, 2):
                left = rows.leave(text)
                assert left.length == alone[text].length
                for one, other in zip(state_tensors(left.blocks), state_tensors(alone[text].blocks), strict=True):
                    assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)
    assert sorted(rows.of_size) == [4, 8]


def test_a_pass_that_fails_ends_every_text_of_it_and_the_next_goes_on(
    model: HybridModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = share(model)
    answer = shared.generate(PROMPT, 12, GREEDY, ())
    next(answer)
    with monkeypatch.context() as patch:
        patch.setattr(model.embedding, "forward", lambda *_: exec("raise RuntimeError('out of memory')"))
        with pytest.raises(RuntimeError, match="out of memory"):
            next(answer)
    assert len(list(shared.generate(PROMPT, 12, GREEDY, ()))) == 12


def test_a_text_whose_logits_are_not_numbers_ends_and_the_others_continue(model: HybridModel) -> None:
    shared, draw = share(model), Sampling(seed=3)
    expected = list(share(model).generate(PROMPT, 9, draw, ()))
    good, bad = (shared.generate(PROMPT[: 60 - cut], 9, draw, ()) for cut in (0, 7))
    found = [next(good)]
    next(bad)
    slots, slot = shared.rows.places[1]
    with torch.inference_mode():
        for rows in state_tensors(tuple(slots.states)):  # as a weight that has overflowed would leave them
            rows[slot] = torch.nan
    found += list(good)
    assert found == expected
    with pytest.raises(RuntimeError, match="probability"):
        list(bad)
    assert not shared.rows.places and shared.kept.find([*PROMPT[:53], *found])[0] == 53
