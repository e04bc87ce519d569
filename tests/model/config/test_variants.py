"""A second variant of a kind of block in one model: as a model that has its options as the kind's own, on any ranks, in exports."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import amfm
from amfm.launch.cli import run as run_verb
from amfm.model.config.schema import ModelConfig
from amfm.model.flops import count_parameters, flops_per_token
from amfm.model.huggingface.classes import TokenIds, huggingface_config, model_config_from_huggingface, weight_map
from amfm.pretrain.config.file import resolved_yaml
from amfm.pretrain.export.modeling_template.configuration_amfm import AmfmConfig
from amfm.pretrain.export.modeling_template.modeling_amfm import AmfmForCausalLM
from tests.helpers.numbers import assert_near
from tests.pretrain.tiny_run import MODEL, read_metrics, tiny_config, tiny_data

VARIANTS: dict[str, dict[str, Any]] = {
    "mamba_narrow": {"of": "mamba", "num_heads": 2, "head_dim": 8, "state_size": 8, "num_groups": 2, "chunk_size": 16},
    "moe_wide": {"of": "moe", "num_experts": 8, "top_k": 1, "expert_hidden_size": 16, "normalize_probabilities": False},
    "attention_wide": {"of": "attention", "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "sinks": True},
    "gated_deltanet_b": {"of": "gated_deltanet", "num_heads": 2, "head_dim": 8},
}
PATTERN = "M{mamba_narrow}E{moe_wide}*{attention_wide}{gated_deltanet_b}-"


def build(pattern: str, variants: dict[str, Any], **sections: Any) -> Any:
    return amfm.build({**MODEL, "pattern": pattern, "variants": variants, **sections})


@pytest.mark.parametrize(("symbol", "kind"), [("M", "mamba"), ("*", "attention"), ("E", "moe"), ("-", "feed_forward")])
def test_a_variant_with_the_options_of_its_kind_is_the_kind(symbol: str, kind: str) -> None:
    variant = build(f"{symbol}{{{kind}_same}}", {f"{kind}_same": {"of": kind, **MODEL[kind]}})
    plain = build(symbol * 2, {})
    tokens = torch.arange(24).view(2, 12)
    outputs = [model(tokens, labels=tokens) for model in (variant, plain)]
    assert outputs[0].loss.total.equal(outputs[1].loss.total) and outputs[0].auxiliary == outputs[1].auxiliary
    assert count_parameters(variant.config).active == count_parameters(plain.config).active
    ours, theirs = (flops_per_token(model.config, 64) for model in (variant, plain))
    assert sum(ours.values()) == sum(theirs.values()) and f"{kind}_same" in ours


def test_counts_are_those_of_the_model_that_is_built_and_configurations_are_read_back() -> None:
    model = build(PATTERN, VARIANTS)
    config: ModelConfig = model.config
    counts = count_parameters(config)
    assert counts.total == sum(weight.numel() for weight in model.parameters())
    # One of eight experts of two matrices [16, 32] for a token.
    assert counts.total_by_kind["moe_wide"] - counts.active_by_kind["moe_wide"] == 7 * 2 * 16 * 32
    assert ModelConfig.model_validate(config.model_dump()) == config == pickle.loads(pickle.dumps(config))
    assert ModelConfig.model_validate_json(config.model_dump_json(), strict=True) == config
    assert config.with_options(*next(iter(config.sections()))) == config
    assert {hash(config), hash(build(PATTERN, VARIANTS).config)} == {hash(config)}


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ({"mamba_b": {"of": "mamba", "num_head": 2}}, r"did you mean variants\.mamba_b\.num_heads"),
        ({"mamba_b": {"of": "mambo"}}, "no mixer is called 'mambo'"),
        ({"mamba_b": {"num_heads": 2}}, "needs `of`, the kind of block"),
        ({"narrow": VARIANTS["mamba_narrow"]}, "narrow: a variant of mamba is called mamba_ and more"),
        ({"window_linear": VARIANTS["mamba_narrow"]}, "a variant of mamba is called mamba_ and more"),
        (
            {"mamba_b": VARIANTS["mamba_narrow"] | {"num_heads": 3}},
            r"model\.variants\.mamba_b\.num_groups=2 must divide",
        ),
        ({"mamba_c": VARIANTS["mamba_narrow"]}, r"model\.variants\.mamba_b is missing; add model\.variants\.mamba_b"),
        ({"mamba_b_c": {"of": "mamba_b"}}, "'mamba_b' is a variant itself"),
    ],
)
def test_what_is_no_variant_is_refused_by_name(variants: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("M{mamba_b}", variants)


def test_other_positions_of_attention_leave_its_variants_as_they_are() -> None:
    attention = {**MODEL["attention"], "positions": "rope"}
    variant = {"of": "attention", **attention, "rope": {"theta": 500.0}}
    model = build("*{attention_b}", {"attention_b": variant}, attention=attention)
    model.set_rope(model.config.attention.rope.model_copy(update={"theta": 7.0}))
    assert [block.mixer.section.rope.theta for block in model.blocks] == [7.0, 500.0]


def test_an_export_in_the_own_modeling_file_computes_the_same_and_comes_back() -> None:
    ours = build(PATTERN, VARIANTS | {"mamba_unused": VARIANTS["mamba_narrow"]}).eval()
    fields = json.loads(
        json.dumps(huggingface_config(ours.config, "own", TokenIds(None, None, None), max_position_embeddings=64))
    )
    assert "mamba_unused" not in fields["mixers"]
    theirs = AmfmForCausalLM(AmfmConfig(**fields)).eval()
    theirs.load_state_dict(weight_map(ours.config, "own").to_theirs(ours.state_dict()))
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        expected = ours(tokens).logits_BTV
        assert_near(theirs(tokens).logits, expected, 2e-5, "logits")
        begun = theirs(tokens[:, :7], use_cache=True)
        assert_near(theirs(tokens[:, 7:], cache=begun.cache).logits, expected[:, 7:], 2e-5, "decoded")
    back = model_config_from_huggingface(fields)
    assert dict(back.variants.items()) == {name: getattr(ours.config.variants, name) for name in VARIANTS}


def test_a_run_continues_from_its_checkpoint_and_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny_data(tmp_path / "data")
    config = tiny_config(data, tmp_path / "run", model__pattern=PATTERN, model__variants=VARIANTS, train__steps=3)
    stopped = config.train.model_copy(update={"stop_after_steps": 2})
    amfm.train(config.model_copy(update={"train": stopped}))
    record = amfm.train(config)
    assert [line["step"] for line in record.metrics] == [1, 2, 3] and record.config.model == config.model
    (tmp_path / "run.yaml").write_text(resolved_yaml(config))
    change = "model.variants.moe_wide.num_experts"
    assert run_verb(["config", str(tmp_path / "run.yaml"), f"{change}=16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["variants"]["moe_wide"]["num_experts"] == 16
    assert amfm.load_model(tmp_path / "run").generate("some", max_new_tokens=3)


@pytest.mark.slow
def test_any_ranks_train_as_one_rank_does(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = tiny_data(tmp_path / "data")
    config = tiny_config(data, tmp_path / "one", model__pattern=PATTERN, model__variants=VARIANTS)
    (tmp_path / "run.yaml").write_text(resolved_yaml(config))
    assert run_verb(["plan", str(tmp_path / "run.yaml"), "--gpus", "2", "--json"]) == 0
    axes = ("tensor", "expert", "context", "pipeline")
    runs = {"one": []} | {axis: ["--nproc", "2", f"parallel.{axis}=2"] for axis in axes}
    for name, words in runs.items():
        assert run_verb(["train", str(tmp_path / "run.yaml"), f"run.dir={tmp_path / name}", *words]) == 0
    expected = [line["loss"] for line in read_metrics(tmp_path / "one")]
    for axis in axes:
        assert [line["loss"] for line in read_metrics(tmp_path / axis)] == pytest.approx(expected, rel=1e-5), axis
    capfd.readouterr()
    assert run_verb(["export", str(tmp_path / "tensor"), str(tmp_path / "out"), "--format", "huggingface"]) == 0
    assert run_verb(["import", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
