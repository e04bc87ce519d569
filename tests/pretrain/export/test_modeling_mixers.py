"""Registered mixers of the modelling file next to an export equal ours: logits, gradients, decoding, padded rows."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import Tensor

from amfm.data_pipeline.config import DataConfig
from amfm.model.config import kinds as registry
from amfm.model.config.schema import ModelConfig
from amfm.model.huggingface.classes import (
    TokenIds,
    choose_target,
    explain_unfit,
    huggingface_config,
    model_config_from_huggingface,
    weight_map,
)
from amfm.model.hybrid import HybridModel
from amfm.model.packing import PackMeta
from amfm.model.shapes import weight_shapes
from amfm.pretrain.export.export import LOGIT_TOLERANCE, export_checkpoint
from amfm.pretrain.export.files import mark_configuration
from amfm.pretrain.export.import_huggingface import import_huggingface
from amfm.pretrain.export.modeling_template.configuration_amfm import AmfmConfig
from amfm.pretrain.export.modeling_template.modeling_amfm import AmfmForCausalLM
from amfm.pretrain.inference.weights import read_weights, write_weights
from tests.helpers.numbers import assert_near, relative_rms
from tests.model.mixers.samples import ROTARY_FORMS, WINDOW_LINEAR_FORMS, mixer_config, sample_names, sample_options
from tests.model.small_models import ATTENTION, FEED_FORWARD, MOE, small_config, small_model
from tests.pretrain.export.exported_models import random_weights
from tests.pretrain.export.own_forms import FLOAT32, assert_padding_changes_nothing, assert_pieces_are_the_whole
from tests.pretrain.tiny_run import MODEL

NAMES = sample_names()
# One inside is enough where what a mixture of memories does is the same for all; LightNet has a state more.
FORMS = [
    pytest.param(name, marks=[pytest.mark.slow] if " over " in name and name != "mom over lightnet" else [])
    for name in NAMES
]
DECODED = [name for name in NAMES if " over " not in name or name.endswith("lightnet")]
TOKENS = 21


@cache
def both_models(name: str) -> tuple[HybridModel, AmfmForCausalLM]:
    config = mixer_config(name)
    ours = small_model(config, dtype=torch.float32).eval()
    fields = huggingface_config(config, "own", TokenIds(None, None, None), max_position_embeddings=64)
    theirs = AmfmForCausalLM(AmfmConfig(**fields)).eval()
    theirs.load_state_dict(weight_map(config, "own").to_theirs(ours.state_dict()))
    return ours, theirs


def sample_tokens() -> Tensor:
    return torch.randint(40, (2, TOKENS), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", FORMS)
def test_logits_and_all_gradients_equal_ours(name: str) -> None:
    ours, theirs = both_models(name)
    tokens_BT, meta = sample_tokens(), PackMeta.one_document_a_row(2, TOKENS)
    expected_BTV = ours(tokens_BT, meta).logits_BTV
    actual_BTV = theirs(tokens_BT, use_cache=False).logits
    assert_near(actual_BTV, expected_BTV, FLOAT32, "logits")
    weight_BTV = torch.randn(expected_BTV.shape, generator=torch.Generator().manual_seed(4))
    expected = torch.autograd.grad((expected_BTV * weight_BTV).sum(), list(ours.parameters()))
    actual = torch.autograd.grad((actual_BTV * weight_BTV).sum(), list(theirs.parameters()))

    @cache
    def unrounded() -> dict[str, Tensor]:
        wide = copy.deepcopy(ours).double()
        found = torch.autograd.grad((wide(tokens_BT, meta).logits_BTV * weight_BTV).sum(), list(wide.parameters()))
        return dict(zip((key for key, _ in ours.named_parameters()), found, strict=True))

    of_theirs = dict(zip((key for key, _ in theirs.named_parameters()), actual))
    names = weight_map(mixer_config(name), "own").to_ours(of_theirs | dict(theirs.named_buffers()))
    for (key, _), gradient in zip(ours.named_parameters(), expected, strict=True):
        # A wrong formula shows in both; rounding that only our side has shows in one.
        error = relative_rms(names[key], gradient)
        assert error <= 25 * FLOAT32, (key, error)
        if error > 5 * FLOAT32:
            assert relative_rms(names[key], unrounded()[key]) <= 5 * FLOAT32, (key, error)


@pytest.mark.parametrize("name", WINDOW_LINEAR_FORMS)
@torch.no_grad()
def test_logits_of_every_form_of_a_conversion_equal_ours(name: str) -> None:
    options = sample_options("window_linear") | {"meta_tokens": 0} | WINDOW_LINEAR_FORMS[name]
    assert_same_logits(small_config("{window_linear}" * 2, mixers={"window_linear": options}))


@pytest.mark.parametrize(("name", "positions"), ROTARY_FORMS)
@torch.no_grad()
def test_logits_with_rotary_positions_equal_ours(name: str, positions: str) -> None:
    options = sample_options(name) | {"positions": positions, "rope_theta": 100.0}
    assert_same_logits(small_config(f"{{{name}}}" * 2, mixers={name: options}))


@torch.no_grad()
def test_sinks_limits_and_the_cores_mixers_side_by_side_give_the_same_logits() -> None:
    config = small_config(
        "(M&*)E-*",
        attention=ATTENTION.model_copy(update={"sinks": True}),
        moe=MOE.model_copy(update={"activation": "swiglu_oai", "activation_limit": 0.2}),
        feed_forward=FEED_FORWARD.model_copy(update={"activation_limit": 0.3}),
    )
    theirs = assert_same_logits(config)
    tokens_BT, other = sample_tokens(), AmfmForCausalLM(theirs.config).eval()
    other.load_state_dict(theirs.state_dict())
    whole_BTV = theirs(tokens_BT).logits
    cache = theirs(tokens_BT[:, :9], use_cache=True).cache
    assert cache.batch_size == 2
    # No model owns a cache, and beam search changes its rows.
    cache.reorder_cache(torch.tensor([1, 0]))
    assert_near(other(tokens_BT[[1, 0], 9:], cache=cache).logits, whole_BTV[[1, 0], 9:], FLOAT32, "the other rows")


def assert_same_logits(config: ModelConfig) -> AmfmForCausalLM:
    ours = small_model(config, dtype=torch.float32).eval()
    fields = huggingface_config(config, "own", TokenIds(None, None, None), max_position_embeddings=64)
    theirs = AmfmForCausalLM(AmfmConfig(**fields)).eval()
    theirs.load_state_dict(weight_map(config, "own").to_theirs(ours.state_dict()))
    expected_BTV = ours(sample_tokens(), PackMeta.one_document_a_row(2, TOKENS)).logits_BTV
    assert_near(theirs(sample_tokens()).logits, expected_BTV, FLOAT32, "logits")
    return theirs


@pytest.mark.parametrize("name", DECODED)
def test_a_text_in_pieces_is_the_whole_text(name: str) -> None:
    assert_pieces_are_the_whole(both_models(name)[1], sample_tokens(), (9, 1, 1, 6, 1, 3))


@pytest.mark.parametrize("name", DECODED)
def test_padding_before_a_text_changes_nothing(name: str) -> None:
    assert_padding_changes_nothing(both_models(name)[1], sample_tokens(), cut=14)


@pytest.mark.parametrize("name", FORMS)
def test_weights_and_config_json_give_the_model_back(name: str) -> None:
    config = mixer_config(name)
    ours, _ = both_models(name)
    assert choose_target(config) == "own"
    assert weight_shapes(config) == {key: tuple(tensor.shape) for key, tensor in ours.state_dict().items()}
    none = TokenIds(None, None, None)
    fields = huggingface_config(config, "own", none, max_position_embeddings=64)
    read = model_config_from_huggingface(fields)
    assert huggingface_config(read, "own", none, max_position_embeddings=64) == fields
    assert {key for key, value in read.mixers if value is not None} == set(fields["mixers"])


def mixed_model() -> dict:
    mixers = {
        name: sample_options(name)
        for name in ("gated_deltanet", "window", "lightnet", "mom", "mamba1", "window_linear")
    }
    return {**MODEL, "pattern": "MG-{lightnet}EW{mom}*{mamba1}{window_linear}", "mixers": mixers}


def test_an_export_with_registered_mixers_has_our_logits_generates_and_comes_back(data: DataConfig, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    from amfm.pretrain.inference.generate import Sampling, generate_tokens

    weights = random_weights(data, mixed_model())
    (tmp_path / "weights").mkdir()
    write_weights(tmp_path / "weights", weights)
    report = export_checkpoint(tmp_path / "weights", tmp_path / "out", verify=False)
    assert report.target == "own"
    assert any("nemotron_h has no such block; use target own" in reason for reason in report.reasons)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "G gated deltanet" in card and "tags: [mamba2, attention, mixture-of-experts" in card
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, trust_remote_code=True)
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, trust_remote_code=True)
    assert rounded.model.layers[1].mixer.A_log.dtype == torch.float32
    assert rounded(torch.tensor([[5, 6, 7, 8]])).logits.isfinite().all()
    prompt = weights.tokenizer.encode("A man said what a word is worth.")[:11]
    with torch.no_grad():
        logits_BTV = weights.build()(torch.tensor([prompt]), PackMeta.one_document_a_row(1, 11)).logits_BTV
        assert (theirs(torch.tensor([prompt])).logits - logits_BTV).abs().max() <= LOGIT_TOLERANCE
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


def test_exports_of_other_modeling_files_have_other_files_of_the_configuration(tmp_path) -> None:
    texts = []
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "configuration_amfm.py").write_text("class AmfmConfig: ...\n")
        (folder / "modeling_amfm.py").write_text(f"NUMBER = {number // 2}\n")
        mark_configuration(folder)
        texts.append((folder / "configuration_amfm.py").read_text())
    assert texts[0] == texts[1] != texts[2]


def test_a_mixer_of_another_package_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    config = mixer_config("mom over deltanet")
    fewer = tuple(spec for spec in registry.BUILT_IN if spec.name != "deltanet")
    monkeypatch.setattr("amfm.model.huggingface.own.BUILT_IN", fewer)
    (reason,) = explain_unfit(config, "own")
    assert "{mom} over deltanet: the mixer deltanet of another package is not in our modeling file; use" in reason
    with pytest.raises(ValueError, match="deltanet of another package"):
        choose_target(config)
