"""The private names through which DeepSpeed learns of spread experts still mean what we take them for."""

from __future__ import annotations

from deepspeed.moe.utils import is_moe_param
from deepspeed.utils import groups as registry

from amfm.model.config.schema import ModelConfig
from amfm.model.hybrid import HybridModel
from amfm.pretrain.config.schema import OptimizerConfig, ParallelConfig
from amfm.pretrain.engine.deepspeed_adapters import SIGN
from amfm.pretrain.engine.engine import build_engine
from amfm.pretrain.parallel import initialize_parallel
from tests.helpers.patience import PATIENCE_SECONDS
from tests.helpers.spawn import run_ranks
from tests.pretrain.tiny_run import MODEL

# Routers of several sizes in one model.
WIDE = {"moe_wide": {"of": "moe", "num_experts": 8, "top_k": 1, "expert_hidden_size": 16}}


def build() -> list[bool]:
    parallel = initialize_parallel(ParallelConfig(expert=2), timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    with_variant = {**MODEL, "pattern": f"{MODEL['pattern']}{{moe_wide}}", "variants": WIDE}
    model = HybridModel(ModelConfig.model_validate(with_variant), parallel.groups)
    engine = build_engine(
        model, optimizer=OptimizerConfig(learning_rate=1e-3), precision="float32", zero_stage=1, parallel=parallel
    )
    optimizer = engine.optimizer
    (expert_group,) = [index for index, group in enumerate(engine.adamw.param_groups) if group.get("moe")]
    num_experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    return [
        engine.deepspeed.has_moe_layers,
        optimizer.has_moe_layers,
        optimizer.is_moe_param_group == [index == expert_group for index in range(len(engine.adamw.param_groups))],
        optimizer.expert_dp_process_group["ep_size_2"] is parallel.groups.expt_dp,
        # No one else holds this rank's experts, so their state is whole here; dense state is halved.
        optimizer.partition_count[expert_group] == 1,
        optimizer.single_partition_of_fp32_groups[expert_group].numel() >= num_experts,
        registry._EXPERT_PARALLEL_GROUP_RANKS["ep_size_2"] == [0, 1],
        registry._EXPERT_DATA_PARALLEL_GROUP_RANKS["ep_size_2"] == [parallel.rank],
        not any(SIGN in name for name, _ in model.named_modules()),
    ]


def test_deepspeed_takes_our_experts_and_groups_for_its_own() -> None:
    for facts in run_ranks(build, num_ranks=2):
        assert all(facts), facts


def build_on_one_rank() -> list[bool]:
    parallel = initialize_parallel(ParallelConfig(), timeout_seconds=PATIENCE_SECONDS, num_threads=1)
    model = HybridModel(ModelConfig.model_validate(MODEL), parallel.groups)
    engine = build_engine(
        model, optimizer=OptimizerConfig(learning_rate=1e-3), precision="float32", zero_stage=1, parallel=parallel
    )
    return [engine.deepspeed.has_moe_layers, any(is_moe_param(p) for p in model.parameters())]


def test_experts_that_every_rank_holds_are_dense_weights_to_deepspeed() -> None:
    assert run_ranks(build_on_one_rank, num_ranks=1) == [[False, False]]
