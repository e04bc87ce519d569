"""The counted bytes of decode states are those that decoding carries."""

import pytest
import torch

from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups
from amfm.model.state_size import count_bytes, state_bytes
from tests.model.small_models import small_config

MIXERS = {
    "retnet": {"num_heads": 2, "head_dim": 8, "conv_kernel": 4},
    "lightning": {"num_heads": 3, "head_dim": 4, "value_head_dim": 8},
}


def config_of(pattern):
    return ModelConfig.model_validate(small_config(pattern).model_dump() | {"mixers": MIXERS})


@pytest.mark.parametrize("pattern", ["M*E-", "{retnet}L", "**M"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counted_bytes_are_those_of_a_decoded_state(pattern, dtype):
    model = HybridModel(config_of(pattern), single_rank_groups()).to(dtype).eval()
    state, length = model.empty_state(1), 0
    for num_tokens in (9, 1, 1):  # a prompt, then token by token
        meta = PackMeta.one_document_a_row(1, num_tokens, start=length)
        with torch.no_grad():
            state = model(torch.zeros(1, num_tokens, dtype=torch.int64), meta, state=state).state
        length += num_tokens
    assert state_bytes(config_of(pattern), length, dtype) == count_bytes(state.blocks)


def test_a_cache_grows_by_the_token_and_a_recurrence_does_not():
    # Keys and values of 2 heads of 8 channels, 4 bytes each.
    assert state_bytes(config_of("*"), 1000) == 2 * 1000 * 2 * 8 * 4
    assert state_bytes(config_of("M"), 1000) == state_bytes(config_of("M"), 10)
    # 3 heads of 4 x 8 floats.
    assert state_bytes(config_of("L"), 1000) == 3 * 4 * 8 * 4
