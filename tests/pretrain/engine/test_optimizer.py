"""Which parameters decay."""

from __future__ import annotations

from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.model.parallel.groups import single_rank_groups
from amfm.pretrain.config.schema import OptimizerConfig
from amfm.pretrain.engine.optimizer import build_optimizer, group_parameters
from tests.model.mixers.samples import mixer_config
from tests.pretrain.tiny_run import MODEL


def test_matrices_decay_and_nothing_else_does() -> None:
    model = HybridModel(ModelConfig.model_validate(MODEL), single_rank_groups())
    decay, no_decay = group_parameters(model, 0.1)
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0.0)
    assert set(no_decay["parameter_names"]) == {
        *(f"blocks.{index}.norm.weight" for index in range(4)),
        "final_norm.weight",
        "blocks.0.mixer.norm.weight",
        "blocks.0.mixer.conv.bias",
        "blocks.0.mixer.A_log",
        "blocks.0.mixer.D",
        "blocks.0.mixer.dt_bias",
    }
    names = {name for name, _ in model.named_parameters()}
    assert set(decay["parameter_names"]) == names - set(no_decay["parameter_names"])
    assert [id(parameter) for parameter in decay["params"]] == [
        id(dict(model.named_parameters())[name]) for name in decay["parameter_names"]
    ]


def test_adamw_is_fused_and_starts_without_a_rate() -> None:
    model = HybridModel(ModelConfig.model_validate(MODEL), single_rank_groups())
    adamw = build_optimizer(model, OptimizerConfig(learning_rate=1e-3, beta2=0.98))
    assert adamw.defaults["fused"] and adamw.defaults["lr"] == 0.0
    assert all(group["betas"] == (0.9, 0.98) for group in adamw.param_groups)


def test_experts_that_are_spread_over_ranks_are_groups_of_their_own_with_the_same_settings() -> None:
    model = HybridModel(ModelConfig.model_validate(MODEL), single_rank_groups())
    experts = {name: parameter for name, parameter in model.named_parameters() if ".experts." in name}
    plain, no_decay = group_parameters(model, 0.1)
    for parameter in experts.values():
        parameter.group_name = "ep_size_2"
    decay, no_decay_again, spread = group_parameters(model, 0.1)
    assert spread["parameter_names"] == list(experts) and spread["params"] == list(experts.values())
    assert (spread["label"], spread["weight_decay"]) == ("decay", 0.1)
    assert (spread["moe"], spread["name"]) == (True, "ep_size_2")
    assert decay["parameter_names"] == [name for name in plain["parameter_names"] if name not in experts]
    assert no_decay_again["parameter_names"] == no_decay["parameter_names"]


def test_no_decay_or_bias_of_a_registered_mixer_decays() -> None:
    matrices = {"in_proj.weight", "out_proj.weight", "x_proj.weight", "dt_proj", "conv.weight"}
    for name, decaying in (("plstm", {"in_proj.weight", "out_proj.weight", "conv.weight"}), ("mamba1", matrices)):
        model = HybridModel(mixer_config(name, blocks=1), single_rank_groups())
        decay, _ = group_parameters(model, 0.1)
        inside = {key.partition(".mixer.")[2] for key in decay["parameter_names"] if ".mixer." in key}
        assert inside == decaying
