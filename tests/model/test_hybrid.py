"""The whole model and each block kind against a step-by-step float64 reference, gradients included."""

import pytest
import torch
import torch.nn.functional as F

from amfm.model.config.core_options import AttentionConfig, FeedForwardConfig, Mamba2Config
from amfm.model.config.moe import MoeConfig
from amfm.model.config.rope import RopeConfig
from amfm.model.config.schema import MultipliersConfig
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.model.parallel.groups import single_rank_groups
from tests.model.reference_model import reference_forward
from tests.model.small_models import MOE, StandInGroup, loss_of, meta_of, packed_batch, small_config, small_model

# Rotary frequencies are float32 by definition, off by 6e-8 of an angle; all else would meet 1e-10.
FLOAT64 = 1e-6
# float32 rounds at 6e-8. Most tensors meet 1e-6; a decay's gradient is a small difference of two large sums.
FLOAT32 = 5e-5


def assert_near(actual, expected, tolerance, name=""):
    """The difference is at most `tolerance` of the expected tensor, as norms: what each gradient must meet on its
    own.
    """
    difference, scale = (actual.double() - expected).norm().item(), expected.norm().item()
    assert difference <= tolerance * scale + 1e-12, f"{name}: off by {difference:.3g} of {scale:.3g}"


def biases_of(model):
    return {
        index: block.mixer.expert_bias.double()
        for index, block in enumerate(model.blocks)
        if getattr(block.mixer, "expert_bias", None) is not None
    }


def reference_loss_and_gradients(model, config, tokens_BT, labels_BT, ids_BT, z_weight=0.0):
    parameters = {name: value.detach().double().requires_grad_() for name, value in model.named_parameters()}
    pattern = "".join(model.pattern.letters)
    logits, auxiliary = reference_forward(config, pattern, parameters, tokens_BT, ids_BT, biases_of(model))
    valid = labels_BT != -100
    nll = F.cross_entropy(logits[valid], labels_BT[valid], reduction="sum")
    total = nll + z_weight * logits[valid].logsumexp(-1).square().sum()
    (total / 10 + sum(auxiliary.values())).backward()
    return logits.detach(), auxiliary, total.detach(), {name: value.grad for name, value in parameters.items()}


def assert_equals_reference(config, tolerances, batch=None):
    """In each dtype, with weights that float32 has, next to one run of the reference."""
    tokens_BT, labels_BT, ids_BT = batch or packed_batch()
    weights = small_model(config, dtype=torch.float32).state_dict()
    meta = meta_of(ids_BT)
    expected = None
    for dtype, tolerance in tolerances.items():
        model = small_model(config, dtype=dtype)
        model.load_state_dict(weights)
        if expected is None:
            expected = reference_loss_and_gradients(
                model, config, tokens_BT, labels_BT, ids_BT, config.logits_z_loss_weight
            )
        logits, auxiliary, total, gradients = expected
        output = model(tokens_BT, meta, labels_BT)
        loss_of(output).backward()
        assert_near(model(tokens_BT, meta).logits_BTV, logits, tolerance, f"{dtype} logits")
        assert_near(output.loss.total, total, tolerance, f"{dtype} loss")
        assert output.auxiliary.keys() == auxiliary.keys()
        for name, value in auxiliary.items():
            assert_near(output.auxiliary[name], value.detach(), tolerance, f"{dtype} {name}")
        for name, parameter in model.named_parameters():
            assert_near(parameter.grad, gradients[name], tolerance, f"{dtype} {name}")


ROPE_PARTIAL = AttentionConfig(
    num_heads=4,
    num_kv_heads=1,
    head_dim=8,
    positions="rope",
    rope=RopeConfig(fraction=0.5, scaling="ntk", ntk_alpha=50.0),
    softmax_scale=0.3,
)
NO_POSITIONS = AttentionConfig(num_heads=3, num_kv_heads=3, head_dim=6)
ONE_GROUP = Mamba2Config(num_heads=3, head_dim=2, state_size=7, num_groups=1, conv_kernel=3, conv_bias=False)
BALANCED = MoeConfig(
    num_experts=6,
    top_k=2,
    expert_hidden_size=4,
    activation="swiglu",
    router="softmax",
    routed_scaling=2.5,
    auxiliary_loss_weight=0.3,
    sequence_loss_weight=0.2,
    z_loss_weight=0.1,
)
GROUPED = MoeConfig(
    num_experts=8,
    top_k=3,
    expert_hidden_size=4,
    shared_expert_hidden_size=4,
    normalize_probabilities=False,
    router="sqrt_softplus",
    num_router_groups=4,
    router_group_top_k=2,
    group_score_top_k=1,
    expert_bias=True,
    latent_size=5,
)


@pytest.mark.parametrize(
    ("pattern", "changes"),
    [
        ("M", {}),
        ("M", {"mamba": ONE_GROUP, "tie_embeddings": True}),
        ("*", {}),
        ("*", {"attention": ROPE_PARTIAL}),
        ("*", {"attention": NO_POSITIONS}),
        ("*", {"attention": NO_POSITIONS.model_copy(update={"gate": "head"})}),
        ("*", {"attention": ROPE_PARTIAL.model_copy(update={"gate": "element"})}),
        ("-", {}),
        ("-", {"feed_forward": FeedForwardConfig(hidden_size=9)}),
        ("E", {}),
        ("E", {"moe": BALANCED}),
        ("E", {"moe": GROUPED}),
        ("E", {"moe": GROUPED.model_copy(update={"shared_expert_gate": True})}),
        ("*-", {"multipliers": MultipliersConfig(embedding=3.0, residual=0.22, logits=0.3), "tie_embeddings": True}),
        ("(ME)x2 *E M-", {"logits_z_loss_weight": 0.05}),
    ],
)
def test_outputs_and_gradients_equal_the_step_by_step_reference(pattern, changes):
    assert_equals_reference(small_config(pattern, **changes), {torch.float64: FLOAT64, torch.float32: FLOAT32})


def test_one_token_rows_equal_the_reference():
    tokens_BT = torch.tensor([[3], [5]])
    batch = tokens_BT, torch.tensor([[5], [-100]]), torch.zeros_like(tokens_BT)
    assert_equals_reference(small_config("M*E-"), {torch.float64: FLOAT64}, batch)


def test_an_expert_without_tokens_gets_zero_gradients():
    model = small_model(small_config("E", moe=MoeConfig(num_experts=9, top_k=1, expert_hidden_size=4)))
    tokens_BT = torch.full((1, 3), 7)
    output = model(tokens_BT, meta_of(torch.zeros_like(tokens_BT)), tokens_BT)
    output.loss.total.backward()
    counts = output.expert_counts[0]
    assert counts.sum() == 3 and (counts == 0).any()
    experts = model.blocks[0].mixer.experts
    for gradient in (experts.up.grad, experts.down.grad):
        assert (gradient[counts == 0] == 0).all() and (gradient[counts > 0] != 0).any()


def test_the_reference_backend_agrees_with_torch():
    config = small_config("M*E-")
    tokens_BT, labels_BT, ids_BT = packed_batch()
    gradients = []
    for backend in ("torch", "reference"):
        model = small_model(config, backend=backend)
        loss_of(model(tokens_BT, meta_of(ids_BT), labels_BT)).backward()
        gradients.append({name: value.grad for name, value in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("in_fp32", [False, True])
def test_bf16_stays_near_float32(in_fp32):
    config = small_config("ME*-", residual_in_fp32=in_fp32, moe=MOE.model_copy(update={"expert_bias": False}))
    tokens_BT, labels_BT, ids_BT = packed_batch()
    # Weights are rounded first, so that only the arithmetic differs; the router still may choose otherwise near a tie.
    rounded = small_model(config, dtype=torch.bfloat16).float()
    model = small_model(config, dtype=torch.bfloat16)
    expected = rounded(tokens_BT, meta_of(ids_BT)).logits_BTV
    logits = model(tokens_BT, meta_of(ids_BT)).logits_BTV.float()
    error = (logits - expected).norm() / expected.norm()
    # bf16 keeps 8 bits: each of some thirty roundings in sequence is off by at most 4e-3.
    assert error < 0.05
    output = model(tokens_BT, meta_of(ids_BT), labels_BT)
    output.loss.total.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in model.parameters())


def test_names_of_parameters_are_the_published_ones():
    moe = MOE.model_copy(update={"latent_size": 4})
    model = small_model(small_config("M*E-", moe=moe))
    mamba = ["in_proj.weight", "conv.weight", "conv.bias", "A_log", "D", "dt_bias", "norm.weight", "out_proj.weight"]
    attention = [f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    experts = [
        *("router.weight", "latent_down.weight", "latent_up.weight", "experts.up", "experts.down"),
        *("shared.up_proj.weight", "shared.down_proj.weight"),
    ]
    dense = ["up_proj.weight", "down_proj.weight"]
    expected = {"embedding.weight", "final_norm.weight", "head.weight"}
    for index, names in enumerate((mamba, attention, experts, dense)):
        expected |= {f"blocks.{index}.mixer.{name}" for name in names} | {f"blocks.{index}.norm.weight"}
    assert {name for name, _ in model.named_parameters()} == expected
    assert set(model.state_dict()) == expected | {"blocks.2.mixer.expert_bias"}


def test_state_dict_loads_strictly_and_brings_the_outputs_along():
    config = small_config("M*E-")
    tokens_BT, _, ids_BT = packed_batch()
    model, other = small_model(config), small_model(config, seed=2)
    other.load_state_dict(model.state_dict(), strict=True)
    expected, logits = (each(tokens_BT, meta_of(ids_BT)).logits_BTV for each in (model, other))
    assert torch.equal(expected, logits)


def test_a_pipeline_stage_that_does_not_know_its_blocks_is_refused():
    groups = single_rank_groups()
    groups.pp = StandInGroup(2)
    with pytest.raises(ValueError, match=r"pp group has 2 ranks; give the model chunks that this one holds"):
        HybridModel(small_config(), groups)


def test_an_unsound_configuration_is_refused_before_anything_is_allocated():
    huge = small_config("M").model_copy(update={"mamba": None, "vocab_size": 10**12})
    with pytest.raises(ValueError, match=r"model\.mamba is missing"):
        HybridModel(huge, single_rank_groups())


def test_meta_device_model_can_be_moved_and_initialised():
    config = small_config("M*E-")
    expected = HybridModel(config, single_rank_groups(), seed=3)
    model = HybridModel(config, single_rank_groups(), seed=3, device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    model.initialize()
    tokens_BT, _, ids_BT = packed_batch()
    for name, value in expected.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    meta = meta_of(ids_BT)
    assert torch.equal(expected(tokens_BT, meta).logits_BTV, model(tokens_BT, meta).logits_BTV)


def test_eval_mode_has_no_auxiliary_losses():
    config = small_config("E", moe=BALANCED)
    tokens_BT, _, ids_BT = packed_batch()
    model = small_model(config)
    assert set(model(tokens_BT, meta_of(ids_BT)).auxiliary) == {"balance", "sequence_balance", "router_z"}
    assert model.eval()(tokens_BT, meta_of(ids_BT)).auxiliary == {}


def test_a_row_of_one_document_takes_the_path_without_masks_to_the_same_logits():
    tokens_BT, _, _ = packed_batch()
    model = small_model(small_config("M*E-"))
    fast = PackMeta.one_document_a_row(*tokens_BT.shape)
    masked = PackMeta(**{**vars(fast), "single_document": False})
    assert_near(model(tokens_BT, fast).logits_BTV, model(tokens_BT, masked).logits_BTV.detach(), FLOAT64)
