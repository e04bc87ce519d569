"""Parameters and FLOPs from the configuration: the published sizes, and what the built model really holds."""

import pytest

from amfm.model.config.core_options import AttentionConfig, FeedForwardConfig, Mamba2Config
from amfm.model.config.moe import MoeConfig
from amfm.model.config.schema import ModelConfig, MtpConfig
from amfm.model.flops import block_flops, count_parameters, flops_per_token
from amfm.model.hybrid import HybridModel
from amfm.model.parallel.groups import single_rank_groups
from tests.model.small_models import MAMBA, MOE, small_config

NO_POSITIONS = AttentionConfig(num_heads=3, num_kv_heads=3, head_dim=6)

TURBOS = ModelConfig(
    pattern="((MF)*8 AF)*7 MF",
    vocab_size=128_000,
    hidden_size=5120,
    tie_embeddings=True,
    mamba=Mamba2Config(num_heads=64, head_dim=64, state_size=128, num_groups=16, chunk_size=128),
    attention=AttentionConfig(num_heads=64, num_kv_heads=8, head_dim=128, qk_norm=True, positions="rope"),
    moe=MoeConfig(
        num_experts=32,
        top_k=2,
        expert_hidden_size=17_024,
        shared_expert_hidden_size=17_024,
        activation="swiglu",
        router="softmax",
    ),
)
NEMOTRON3_NANO = ModelConfig(
    pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    vocab_size=131_072,
    hidden_size=2688,
    mamba=Mamba2Config(num_heads=64, head_dim=64, state_size=128, num_groups=8),
    attention=AttentionConfig(num_heads=32, num_kv_heads=2, head_dim=128),
    moe=MoeConfig(
        num_experts=128,
        top_k=6,
        expert_hidden_size=1856,
        shared_expert_hidden_size=3712,
        routed_scaling=2.5,
        expert_bias=True,
    ),
)


def test_turbos_has_its_published_size():
    counts = count_parameters(TURBOS)
    assert counts.total == pytest.approx(558.4e9, rel=2e-4)
    assert counts.active == pytest.approx(56.3e9, rel=2e-3)


def test_nemotron3_nano_has_its_published_size():
    # 31.6B total and 3.6B active (3.2B without the embedding's rows) in its model card.
    assert NEMOTRON3_NANO.pattern.count("M") == 23
    assert NEMOTRON3_NANO.pattern.count("*") == 6
    counts = count_parameters(NEMOTRON3_NANO)
    assert counts.total == pytest.approx(31.6e9, rel=2e-3)
    assert counts.active == pytest.approx(3.6e9, rel=1e-2)


def test_parts_add_up():
    counts = count_parameters(TURBOS)
    assert sum(counts.total_by_kind.values()) == counts.total
    assert sum(counts.active_by_kind.values()) == counts.active
    idle = 64 * 30 * 3 * 5120 * 17_024
    assert counts.total_by_kind["moe"] - counts.active_by_kind["moe"] == idle


def test_flops_are_six_a_used_weight_plus_what_has_no_weights():
    config = TURBOS
    flops = flops_per_token(config, 4096)
    dense = ModelConfig(
        pattern="-", vocab_size=7, hidden_size=4, feed_forward=FeedForwardConfig(hidden_size=10, activation="swiglu")
    )
    assert flops_per_token(dense, 5) == {"head": 6 * 7 * 4, "feed_forward": 6 * 3 * 4 * 10}
    attention_weights = 7 * 2 * 5120 * 128 * (64 + 8)
    scores = 7 * 3 * 4 * (4097 / 2) * 64 * 128
    assert flops["attention"] == 6 * attention_weights + scores
    assert flops["moe"] == 6 * (count_parameters(config).active_by_kind["moe"] - 64 * 5120)
    assert flops["mamba"] > 6 * 57 * 5120 * (2 * 4096 + 2 * 16 * 128 + 64 + 4096)
    assert flops_per_token(config, 8192)["attention"] > flops["attention"]
    assert flops_per_token(config, 8192)["mamba"] == flops["mamba"]


@pytest.mark.parametrize(
    ("pattern", "changes"),
    [
        ("M*E-", {}),
        ("ME", {"tie_embeddings": True, "mamba": MAMBA.model_copy(update={"conv_bias": False})}),
        (
            "*E",
            {
                "attention": NO_POSITIONS.model_copy(update={"gate": "element"}),
                "moe": MOE.model_copy(update={"shared_expert_gate": True}),
            },
        ),
        ("*", {"attention": NO_POSITIONS.model_copy(update={"gate": "head"})}),
        ("*E", {"moe": MOE.model_copy(update={"latent_size": 5, "activation": "swiglu"})}),
        ("M/*E/*E", {}),
        ("M/*E/*E", {"mtp": MtpConfig(shared=True)}),
        ("E*", {"moe": MoeConfig(num_experts=3, top_k=1, expert_hidden_size=4), "attention": NO_POSITIONS}),
    ],
)
def test_counts_are_those_of_the_built_model(pattern, changes):
    config = small_config(pattern, **changes)
    model = HybridModel(config, single_rank_groups(), device="meta")
    assert count_parameters(config).total == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("letter", ["M", "*", "-"])
def test_flops_in_closed_form_are_those_of_the_built_mixer(letter):
    config = small_config("M*-", attention=NO_POSITIONS.model_copy(update={"gate": "element"}))
    (mixer,) = (block.mixer for block in HybridModel(config, single_rank_groups()).blocks if block.letter == letter)
    matrices = sum(parameter.numel() for parameter in mixer.parameters() if parameter.dim() > 1)
    assert block_flops(config, letter, 63) == 3 * (2 * matrices + mixer.sequence_flops(63))


def test_a_transformer_counts_as_in_megatron_lm_but_for_half_a_key() -> None:
    """The table of docs/metrics.md: 3 (4 h p (h + h G / H + s / 2) + 6 h F) a layer, and 6 h V, of a token."""
    h, heads, groups, width, inner, vocabulary, s, layers = 48, 4, 2, 16, 80, 97, 64, 2
    config = ModelConfig(
        pattern="*-" * layers,
        vocab_size=vocabulary,
        hidden_size=h,
        attention=AttentionConfig(num_heads=heads, num_kv_heads=groups, head_dim=width),
        feed_forward=FeedForwardConfig(hidden_size=inner, activation="swiglu"),
    )
    p = heads * width / h
    megatron = layers * 3 * (4 * h * p * (h + h * groups / heads + s / 2) + 6 * h * inner) + 6 * h * vocabulary
    half_a_key = layers * 3 * 4 * heads * width / 2
    assert sum(flops_per_token(config, s).values()) == pytest.approx(megatron + half_a_key, rel=1e-12)


def test_depths_cost_their_blocks_projections_and_heads():
    plain, deep = (small_config(f"ME{end}", moe=MOE) for end in ("", "/*E/*E"))
    without, found = flops_per_token(plain, 64), flops_per_token(deep, 64)
    blocks = flops_per_token(small_config("*E", moe=MOE), 64)
    one = blocks["attention"] + blocks["moe"] + blocks["head"] + 6 * 2 * 12**2
    assert found == without | {"mtp": pytest.approx(2 * one)}
    shared = deep.model_copy(update={"mtp": MtpConfig(shared=True)})
    assert flops_per_token(shared, 64) == found
    assert 2 * count_parameters(shared).total_by_kind["mtp"] == count_parameters(deep).total_by_kind["mtp"]


def test_turbos_is_built_on_the_meta_device_with_its_published_size():
    model = HybridModel(TURBOS, single_rank_groups(), device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(TURBOS).total
