"""Our model and the transformers classes are one function: logits and every weight's gradient agree in float32."""

from __future__ import annotations

import copy
import json
from functools import cache

import pytest
import torch

from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.classes import TokenIds, choose_target, explain_unfit, huggingface_config, weight_map
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from tests.model.huggingface.cases import NEMOTRON_H, TARGETED, VOCABULARY, build_ours
from tests.model.huggingface.differences import gradients_by_our_name, relative_difference

# Both sides compute in float32 and add in another order; the largest number of a tensor sets its scale.
RELATIVE_TOLERANCE = 1e-5
# Our own float32 gradients, which pass every layer twice: up to 1.3e-5 from float64 on one processor. As whole models elsewhere.
GRADIENT_TOLERANCE = 5e-5


def load_into_transformers(ours: HybridModel, tmp_path, target: str = "auto") -> torch.nn.Module:
    """The transformers model with our weights, through our maps and the files that an export writes."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    config = ours.config
    target = choose_target(config) if target == "auto" else target
    assert target != "own", explain_unfit(config, target)
    assert not explain_unfit(config, target)
    state = {name: tensor.detach() for name, tensor in ours.state_dict().items()}
    theirs = {name: tensor.clone() for name, tensor in weight_map(config, target).to_theirs(state).items()}
    save_file(theirs, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fields = huggingface_config(config, target, TokenIds(None, 2, None), max_position_embeddings=128)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize(("target", "config"), TARGETED.values(), ids=TARGETED.keys())
def test_logits_and_all_gradients_equal_transformers(target: str, config: ModelConfig, tmp_path) -> None:
    ours = build_ours(config)
    theirs = load_into_transformers(ours, tmp_path, target)
    generator = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(0, VOCABULARY, (2, 37), generator=generator)
    weight_BTV = torch.randn(2, 37, VOCABULARY, generator=generator)

    logits_BTV = ours(tokens_BT, PackMeta.one_document_a_row(2, 37)).logits_BTV
    their_logits_BTV = theirs(tokens_BT, use_cache=False).logits
    assert float(their_logits_BTV.std()) > 0.05, "the comparison would not see an error"
    assert relative_difference(logits_BTV, their_logits_BTV) < RELATIVE_TOLERANCE
    assert torch.equal(logits_BTV.argmax(-1), their_logits_BTV.argmax(-1))

    (logits_BTV * weight_BTV).sum().backward()
    (their_logits_BTV * weight_BTV).sum().backward()

    @cache
    def exact_gradients() -> dict[str, torch.Tensor]:
        exact = copy.deepcopy(ours).double()
        exact.zero_grad()
        (exact(tokens_BT, PackMeta.one_document_a_row(2, 37)).logits_BTV * weight_BTV).sum().backward()
        return {name: parameter.grad for name, parameter in exact.named_parameters()}

    their_gradients = gradients_by_our_name(ours, theirs, target)
    compared = 0
    for name, parameter in ours.named_parameters():
        if ".indexer." in name:
            # A choice has no gradient, here as there.
            assert parameter.grad is None and name not in their_gradients
            continue
        rounded = relative_difference(parameter.grad, their_gradients[name])
        # A wrong map or formula shows in both; rounding that only one side has shows in one. Sums of a few numbers at a time
        # round more: 1.2e-5 with SSE2, below 1e-5 with AVX2 and AVX-512.
        if rounded >= 2 * RELATIVE_TOLERANCE:
            unrounded = relative_difference(exact_gradients()[name], their_gradients[name])
            assert unrounded < 2 * RELATIVE_TOLERANCE, (name, rounded, unrounded)
        assert rounded < GRADIENT_TOLERANCE, (name, rounded)
        compared += 1
    assert compared == sum(".indexer." not in name for name, _ in ours.named_parameters())


def test_time_step_is_not_clamped_at_run_time(tmp_path) -> None:
    # The class clamps dt to time_step_min, by default 0.001: with steps below that the default gives other logits.
    ours = build_ours(NEMOTRON_H)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith("dt_bias"):
                parameter.fill_(-9.0)
    tokens_BT = torch.randint(0, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = ours(tokens_BT, PackMeta.one_document_a_row(1, 40)).logits_BTV
        theirs = load_into_transformers(ours, tmp_path)
        assert relative_difference(expected, theirs(tokens_BT).logits) < RELATIVE_TOLERANCE
        for layer in theirs.model.layers:
            if layer.block_type == "linear_attention":
                layer.mixer.time_step_limit = (0.001, float("inf"))
        assert relative_difference(expected, theirs(tokens_BT).logits) > 100 * RELATIVE_TOLERANCE


def test_bf16_stays_close_in_distribution(tmp_path) -> None:
    # Tokens near a routing boundary choose other experts in bf16, so single logits may be far off: the distribution of
    # the next token is what can be promised.
    ours = build_ours(NEMOTRON_H)
    theirs = load_into_transformers(ours, tmp_path).to(torch.bfloat16)
    tokens_BT = torch.randint(0, VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        exact = ours(tokens_BT, PackMeta.one_document_a_row(2, 64)).logits_BTV.log_softmax(-1)
        rounded = theirs(tokens_BT).logits.float().log_softmax(-1)
    divergence = (exact.exp() * (exact - rounded)).sum(-1)
    assert float(divergence.mean()) < 0.01
    assert float((exact.argmax(-1) == rounded.argmax(-1)).float().mean()) > 0.9
