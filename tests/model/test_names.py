"""Names and shapes of parameters and buffers: what checkpoints, exports and optimizer groups of earlier commits hold."""

import hashlib

from amfm.model.config.core_options import FeedForwardConfig
from amfm.model.hybrid import HybridModel
from amfm.model.parallel.groups import single_rank_groups
from tests.model.mixers.samples import mixer_config, sample_options
from tests.model.small_models import small_config

# Of the models below at 32c2e02. A change of these numbers is a change of format: checkpoints of before do not load.
DIGESTS = {
    "core": "1ac3c1b09fecd127",
    "depths": "9a64a00ead315416",
    "factored": "586e91590ad92a29",
    "routed updates": "0a4f2689a60b1253",
    "gated_deltanet": "53610f378b320829",
    "kda": "6a34f36c07a342c9",
    "mamba1": "f255681f9eb47274",
    "mla": "e597533f0699cf59",
    "mom": "1909cd53dcb04f15",
    "window": "95afd3ce5d519fad",
    "window_linear": "a98186baa48e9403",
}


def config_of(case):
    window = {"window": sample_options("window")}
    factored = FeedForwardConfig(hidden_size=12, linear_kind="lowrank", linear_rank=2)
    own = {
        "core": lambda: small_config("M*E-"),
        "depths": lambda: small_config("M/*E/*E", tie_embeddings=True),
        "factored": lambda: small_config("-", feed_forward=factored, self_guided_training={"share": 0.5}),
        "routed updates": lambda: small_config("M*W", mixers=window, lora_mixer={"num_experts": 3}),
    }
    return own[case]() if case in own else mixer_config(case, blocks=1)


def digest(case):
    state = HybridModel(config_of(case), single_rank_groups(), device="meta").state_dict()
    lines = [f"{name} {list(value.shape)}" for name, value in state.items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def test_names_and_shapes_are_those_of_saved_checkpoints():
    assert {case: digest(case) for case in DIGESTS} == DIGESTS
