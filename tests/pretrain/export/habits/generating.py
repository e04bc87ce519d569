"""How users generate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.pretrain.export.habits.exported import Exported, assert_near, habit, tokens


def generate(export: Exported, ids: Tensor, **settings: Any) -> Any:
    usual = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    return export.model().generate(ids, **(usual | settings))


@habit()
def greedy_tokens_are_the_same_with_and_without_a_cache(export: Exported) -> None:
    assert torch.equal(generate(export, tokens(2, 7)), generate(export, tokens(2, 7), use_cache=False))


@habit(slow=True)
def beams_are_the_same_with_and_without_a_cache(export: Exported) -> None:
    found = generate(export, tokens(1, 7), num_beams=3, num_return_sequences=2)
    assert torch.equal(found, generate(export, tokens(1, 7), num_beams=3, num_return_sequences=2, use_cache=False))


@habit(slow=True)
def samples_are_drawn_in_several_rows(export: Exported) -> None:
    torch.manual_seed(1)
    first = generate(export, tokens(2, 5), do_sample=True, num_return_sequences=3, top_k=20)
    torch.manual_seed(1)
    again = generate(export, tokens(2, 5), do_sample=True, num_return_sequences=3, top_k=20, use_cache=False)
    assert first.shape == (6, 11) and torch.equal(first, again)


@habit()
def prompts_padded_on_the_left_go_on_as_alone(export: Exported) -> None:
    short, long = tokens(1, 4, seed=1), tokens(1, 9, seed=2)
    padded = torch.cat([torch.cat([torch.full((1, 5), 3), short], dim=1), long])
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :5] = 0
    together = generate(export, padded, attention_mask=mask)[:, 9:]
    alone = [generate(export, ids)[:, ids.shape[1] :] for ids in (short, long)]
    assert torch.equal(together, torch.cat(alone))


@habit(slow=True)
def scores_and_hidden_states_come_with_the_tokens(export: Exported) -> None:
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True}
    found = generate(export, tokens(1, 5), **asked)
    assert len(found.scores) == len(found.hidden_states) == 6
    logits = export.model()(found.sequences).logits
    assert_near(found.scores[3], logits[:, 7])
    assert found.hidden_states[1][-1].shape[1] == 1, "later steps read one token"


@habit(slow=True)
def arguments_of_the_forward_pass_go_through_generate(export: Exported) -> None:
    assert torch.equal(generate(export, tokens(1, 5), logits_to_keep=1), generate(export, tokens(1, 5)))
    with pytest.raises(ValueError, match="are not used by the model"):
        generate(export, tokens(1, 5), no_such_argument=1)


@habit()
def generation_begins_with_embeddings(export: Exported) -> None:
    embeds = export.model().get_input_embeddings()(tokens(1, 5))
    usual = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    found = export.model().generate(inputs_embeds=embeds, attention_mask=torch.ones(1, 5), **usual)
    assert torch.equal(found, generate(export, tokens(1, 5))[:, 5:])


@habit(slow=True)
def a_text_goes_on_from_the_cache_of_its_beginning(export: Exported) -> None:
    ids = tokens(1, 9)
    cache = export.model()(ids[:, :6], use_cache=True).cache
    asked = {"return_dict_in_generate": True, "output_scores": True}
    found = generate(export, ids, cache=cache, **asked)
    expected = generate(export, ids, **asked)
    assert torch.equal(found.sequences, expected.sequences)
    assert_near(found.scores[-1], expected.scores[-1])
    assert found.cache.get_seq_length() == expected.cache.get_seq_length() == 9 + 5


@habit(slow=True)
def tokens_are_streamed_as_they_come(export: Exported) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.seen.append(-1)

    streamer = Streamer()
    found = generate(export, tokens(1, 5), streamer=streamer)
    assert streamer.seen == [*found[0].tolist(), -1]
