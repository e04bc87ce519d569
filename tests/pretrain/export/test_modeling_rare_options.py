"""Biases and indexers in the modelling file next to an export: logits, gradients, pieces, padding, documents, and back."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from amfm.data_pipeline.config import DataConfig
from amfm.model.config.core_options import AttentionConfig, FeedForwardConfig
from amfm.model.config.moe import MoeConfig
from amfm.model.config.rope import YarnStretch
from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.classes import TokenIds, huggingface_config, model_config_from_huggingface, weight_map
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.pretrain.export.export import LOGIT_TOLERANCE, export_checkpoint
from amfm.pretrain.export.import_huggingface import import_huggingface
from amfm.pretrain.export.modeling_template.blocks_amfm import BIAS_CHANNELS
from amfm.pretrain.export.modeling_template.configuration_amfm import AmfmConfig
from amfm.pretrain.export.modeling_template.modeling_amfm import AmfmForCausalLM
from amfm.pretrain.inference.weights import read_weights, write_weights
from tests.helpers.numbers import assert_bitwise, assert_near
from tests.model.mixers.samples import sample_options
from tests.model.small_models import ATTENTION, MOE, meta_of, small_config, small_model
from tests.pretrain.export.exported_models import random_weights
from tests.pretrain.export.own_forms import FLOAT32, assert_padding_changes_nothing, assert_pieces_are_the_whole
from tests.pretrain.tiny_run import MODEL

NONE = TokenIds(None, None, None)
TOKENS = 27
YARN = {"factor": 4.0, "original_length": 6, "beta_fast": 2.0, "beta_slow": 0.2, "truncate": False}
# Of four heads many scores are 0 in all, and of equal scores both sides must take the earliest.
INDEXER: dict[str, Any] = {"top_k": 4, "num_heads": 4, "head_dim": 8}


def attention(**changes: Any) -> AttentionConfig:
    return AttentionConfig.model_validate(ATTENTION.model_dump() | changes)


def choosing(**changes: Any) -> ModelConfig:
    indexer = INDEXER | changes
    mixers = {"mla": sample_options("mla") | {"indexer": indexer, "yarn": YARN | {"mscale": 0.7}}}
    return small_config("*+*+", attention=attention(gate="head", indexer=indexer), mixers=mixers)


BIASED = MoeConfig.model_validate(
    MOE.model_dump()
    | {"bias": True, "activation": "swiglu_oai", "activation_limit": 0.5, "router": "softmax", "expert_bias": False}
)
MODELS: dict[str, ModelConfig] = {
    "biases and sinks": small_config(
        "*WE(M&*)E",
        attention=attention(bias=True, sinks=True),
        mixers={"window": sample_options("window") | {"bias": True, "sinks": True, "yarn": YARN}},
        moe=BIASED,
    ),
    "LayerNorms after blocks, wide norms of queries, biases of these and of feed-forwards": small_config(
        "*-M-W",
        norm="layernorm",
        norm_placement="after_attention",
        attention=attention(bias="qkv", qk_norm="wide"),
        mixers={"window": sample_options("window") | {"bias": "qkv", "qk_norm": "wide"}},
        feed_forward=FeedForwardConfig(hidden_size=20, activation="geglu_erf", bias=True),
    ),
    "norms around blocks, GEGLU, scales, and positions stretched linearly": small_config(
        "*-M-W-",
        norm_placement="both",
        attention=attention(
            softmax_scale=0.3, positions="rope", rope={"theta": 90.0, "scaling": "linear", "linear_factor": 3.0}
        ),
        mixers={"window": sample_options("window") | {"softmax_scale": 0.4}},
        feed_forward=FeedForwardConfig(hidden_size=20, activation="geglu"),
    ),
    "biases of narrow experts, GELU": small_config(
        "*E-*E",
        feed_forward=FeedForwardConfig(hidden_size=20, activation="gelu_tanh"),
        moe=MOE.model_copy(update={"bias": True, "latent_size": 7, "activation": "gelu"}),
    ),
    "attention residuals": small_config("M*E-M(M&*)-", attention_residuals={"blocks_per_source": 3}),
    "hyper-connections": small_config("M*E-M(M&*)-", hyper_connections={"streams": 3, "sinkhorn_iterations": 4}),
    "attention residuals of every block": small_config("M*-", attention_residuals={"blocks_per_source": 1}),
    "indexers": choosing(),
    "indexers without positions": small_config(
        "*+",
        attention=attention(positions="none", rope={}, indexer=INDEXER | {"top_k": 5}),
        mixers={"mla": sample_options("mla") | {"positions": "none", "query_latent_size": None, "indexer": INDEXER}},
    ),
    "stretched positions": small_config(
        "**",
        attention=attention(
            rope=YarnStretch(**YARN).rope(90.0).model_dump(),
            indexer=INDEXER | {"rope_fraction": 0.75},
        ),
    ),
    "indexers that learn": choosing(stage="warm_up"),
}


@cache
def both_models(name: str) -> tuple[HybridModel, AmfmForCausalLM]:
    config = MODELS[name]
    ours = small_model(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, weight in ours.named_parameters():
            if key.endswith((".bias", "down_bias")) or ".stream." in f".{key}":
                weight += 0.3 * torch.randn(weight.shape, generator=generator)
            if key.endswith("experts.up") and config.moe is not None and config.moe.bias:
                weight[..., -BIAS_CHANNELS] = 0.3 * torch.randn(weight.shape[:2], generator=generator)
    fields = huggingface_config(config, "own", NONE, max_position_embeddings=64)
    theirs = AmfmForCausalLM(AmfmConfig(**fields)).eval()
    theirs.load_state_dict(weight_map(config, "own").to_theirs(ours.state_dict()))
    return ours, theirs


def sample_tokens() -> Tensor:
    return torch.randint(40, (2, TOKENS), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_all_gradients_equal_ours(name: str) -> None:
    ours, theirs = both_models(name)
    tokens_BT = sample_tokens()
    expected_BTV = ours(tokens_BT, meta_of(torch.zeros_like(tokens_BT))).logits_BTV
    actual_BTV = theirs(tokens_BT, use_cache=False).logits
    assert_near(actual_BTV, expected_BTV, FLOAT32, "logits")
    weight_BTV = torch.randn(expected_BTV.shape, generator=torch.Generator().manual_seed(4))
    names, parameters = zip(*theirs.named_parameters(), strict=True)
    found = torch.autograd.grad((actual_BTV * weight_BTV).sum(), parameters, allow_unused=True)
    of_theirs = dict(zip(names, found, strict=True))
    names, parameters = zip(*ours.named_parameters(), strict=True)
    expected = torch.autograd.grad((expected_BTV * weight_BTV).sum(), parameters, allow_unused=True)
    for entry in weight_map(MODELS[name], "own").entries:
        if entry.ours not in names:
            continue  # a buffer
        gradient, actual = expected[names.index(entry.ours)], of_theirs[entry.theirs[0]]
        assert (gradient is None) == (actual is None) == (".indexer." in entry.ours), entry.ours
        if gradient is not None and actual is not None:
            assert_near(actual, gradient, 5 * FLOAT32, entry.ours)


@pytest.mark.parametrize("name", MODELS)
def test_a_text_in_pieces_is_the_whole_text(name: str) -> None:
    assert_pieces_are_the_whole(both_models(name)[1], sample_tokens(), (9, 1, 1, 12, 1, 3))


@pytest.mark.parametrize("name", MODELS)
def test_padding_before_a_text_changes_nothing(name: str) -> None:
    assert_padding_changes_nothing(both_models(name)[1], sample_tokens(), cut=17)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_packed_documents_are_what_they_are_alone_and_equal_ours(name: str) -> None:
    ours, theirs = both_models(name)
    tokens_BT, lengths = sample_tokens()[:1], (11, 1, 13, 2)
    ids_BT = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    found_BTV = theirs(tokens_BT, seq_idx=ids_BT, use_cache=False).logits
    assert_near(found_BTV, ours(tokens_BT, meta_of(ids_BT)).logits_BTV, FLOAT32, "packed here and there")
    for number in range(len(lengths)):
        own = ids_BT[0] == number
        assert_bitwise(found_BTV[:, own], theirs(tokens_BT[:, own], use_cache=False).logits, f"document {number}")


@pytest.mark.parametrize("name", MODELS)
def test_config_json_gives_the_model_back(name: str) -> None:
    fields = huggingface_config(MODELS[name], "own", NONE, max_position_embeddings=64)
    read = model_config_from_huggingface(fields)
    assert huggingface_config(read, "own", NONE, max_position_embeddings=64) == fields
    assert read.stream == MODELS[name].stream
    assert (read.attention, read.mixers) == (MODELS[name].attention, MODELS[name].mixers)


def test_a_fresh_model_has_no_biases_and_neither_have_the_channels_behind_them() -> None:
    torch.manual_seed(0)
    fields = huggingface_config(MODELS["biases and sinks"], "own", NONE, max_position_embeddings=64)
    model = AmfmForCausalLM._from_config(AmfmConfig(**fields))
    experts = model.model.layers[2].mixer.experts
    assert not experts.up[..., -BIAS_CHANNELS:].any() and not experts.down[:, -BIAS_CHANNELS:].any()
    assert bool(experts.up[..., :-BIAS_CHANNELS].all()) and bool(experts.down[:, :-BIAS_CHANNELS].all())
    biases = [
        weight for name, weight in model.named_parameters() if name.endswith(("proj.bias", "router.bias", "down_bias"))
    ]
    assert len(biases) == 2 * 4 + 2 + 2 * 2 and not any(weight.any() for weight in biases)
    fields = huggingface_config(MODELS["indexers"], "own", NONE, max_position_embeddings=64)
    norm = AmfmForCausalLM._from_config(AmfmConfig(**fields)).model.layers[0].mixer.indexer.key_norm
    assert bool((norm.weight == 1).all()) and not norm.bias.any()


def test_flash_attention_is_refused_where_an_indexer_chooses() -> None:
    config = small_config("*", attention=attention(indexer=INDEXER))
    fields = huggingface_config(config, "own", NONE, max_position_embeddings=64)
    with pytest.raises(
        ValueError, match="does not read the keys that an indexer chooses; use attn_implementation='sdpa'"
    ):
        AmfmForCausalLM._from_config(AmfmConfig(**fields), attn_implementation="flash_attention_2")


def rare_model() -> dict[str, Any]:
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    return {
        **MODEL,
        "pattern": "W*E+-",
        "attention": {**heads, "positions": "rope", "bias": True, "indexer": INDEXER},
        "mixers": {
            "window": {**heads, "window": 6, "bias": True, "sinks": True},
            "mla": sample_options("mla") | {"indexer": INDEXER},
        },
        "moe": {"num_experts": 5, "top_k": 2, "expert_hidden_size": 12, "bias": True, "activation": "swiglu"},
    }


def test_an_export_has_our_logits_generates_and_comes_back(data: DataConfig, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    from amfm.pretrain.inference.generate import Sampling, generate_tokens

    weights = random_weights(data, rare_model())
    generator = torch.Generator().manual_seed(6)
    for key, weight in weights.state.items():
        if key.endswith((".bias", "down_bias", "sinks")):
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
        if key.endswith("experts.up"):
            weight[..., -BIAS_CHANNELS] = 0.3 * torch.randn(weight.shape[:2], generator=generator)
    (tmp_path / "weights").mkdir()
    write_weights(tmp_path / "weights", weights)
    report = export_checkpoint(tmp_path / "weights", tmp_path / "out", verify=False)
    assert report.target == "own"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The loss of an indexer is not part of this class" in card
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, trust_remote_code=True)
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, trust_remote_code=True)
    router = rounded.model.layers[2].mixer.router
    assert router.weight.dtype == router.bias.dtype == torch.float32
    assert rounded(torch.tensor([[5, 6, 7, 8, 9, 10, 11]])).logits.isfinite().all()
    prompt = weights.tokenizer.encode("A man said what a word is worth.")[:11]
    with torch.no_grad():
        their_logits = theirs(torch.tensor([prompt])).logits
        our_logits = weights.build()(torch.tensor([prompt]), PackMeta.one_document_a_row(1, len(prompt))).logits_BTV
    assert (their_logits - our_logits).abs().max() <= LOGIT_TOLERANCE
    ours = list(generate_tokens(weights.build(), prompt, 16, Sampling(temperature=0)))
    settings = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    assert theirs.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist() == ours
    beams = settings | {"num_beams": 2}
    with_state = theirs.generate(torch.tensor([prompt]), **beams)
    assert torch.equal(with_state, theirs.generate(torch.tensor([prompt]), use_cache=False, **beams))
    import_huggingface(tmp_path / "out", tmp_path / "back")
    back = read_weights(tmp_path / "back")
    assert back.model == weights.model
    assert all(torch.equal(back.state[name], weights.state[name]) for name in weights.state)
