"""Rules of the parallel section: each rejection names value, rule and fix."""

import pytest

from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.config.file import load_config
from tests.pretrain.checks.test_check_run import broken

BF16_STATES = ("train.precision=bf16", "optimizer.state_dtype=bf16")
MOE = "model.moe={num_experts: 6, top_k: 2, expert_hidden_size: 12, shared_expert_hidden_size: 10}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["parallel.sequence_parallel=true"],
            "parallel.sequence_parallel = true: cuts tokens over the tensor ranks, and parallel.tensor is 1; raise",
        ),
        (
            ["parallel.overlap_experts=true"],
            "parallel.overlap_experts = true: sends tokens between expert ranks while experts compute, and parallel.expert is 1; "
            "raise parallel.expert, or use false",
        ),
        (
            [
                "model.pattern=M*E",
                MOE,
                "parallel.expert=2",
                "parallel.overlap_experts=two_batch",
                "train.micro_batch_size=1",
            ],
            "train.micro_batch_size = 1: must be even, because parallel.overlap_experts=two_batch "
            "cuts each micro-batch into two halves; use 2, or parallel.overlap_experts=true",
        ),
        (
            [
                "model.pattern=M*E",
                MOE,
                "parallel.expert=2",
                "parallel.overlap_experts=two_batch",
                "train.recompute=full",
            ],
            "parallel.overlap_experts = two_batch: stops blocks of routed experts on their way, and train.recompute computes E again",
        ),
        (
            ["model.pattern=M*E", MOE, "parallel.expert=2", "parallel.overlap_experts=two_batch", "train.compile=true"],
            "parallel.overlap_experts = two_batch: stops blocks of routed experts on their way, and train.compile=true compiles",
        ),
        (
            ["model.pattern=M*E", MOE, "parallel.expert=2", "parallel.overlap_experts=half"],
            "parallel.overlap_experts=half: must be one of: false, true, two_batch; use for example false",
        ),
        (
            ["parallel.expert_buffer_factor=1.5"],
            "parallel.expert_buffer_factor = 1.5: is a buffer for tokens between expert ranks, and parallel.expert is 1; raise",
        ),
        (
            [
                "model.pattern=M*E",
                MOE,
                "model.moe.capacity_factor=2",
                "parallel.expert=2",
                "parallel.expert_buffer_factor=1.5",
            ],
            "parallel.expert_buffer_factor = 1.5: is a buffer for tokens that are not limited, and model.moe.capacity_factor=2 limits",
        ),
        (
            ["parallel.tensor=2", "parallel.expert_tensor=1"],
            "parallel.expert_tensor = 1: must be parallel.tensor=2 while parallel.expert is 1; remove it, or raise",
        ),
        (["parallel.expert=2"], "parallel.expert = 2: spreads routed experts, and model.pattern has no E block; use 1"),
        (
            ["parallel.schedule=zero_bubble"],
            "parallel.schedule = zero_bubble: orders pipeline stages, and parallel.pipeline is 1; remove it, or raise",
        ),
        (
            ["parallel.pipeline=2", "parallel.virtual_stages=2"],
            "parallel.virtual_stages = 2: needs a schedule that interleaves virtual stages, and",
        ),
        (
            ["parallel.pipeline=2", "parallel.schedule=interleaved"],
            "parallel.schedule = interleaved: interleaves several model chunks per rank, and parallel.virtual_stages is 1; use",
        ),
        (
            ["model.pattern=M*E", MOE, "parallel.expert=2", "parallel.zero_stage=3"],
            "parallel.zero_stage = 3: does not go with parallel.expert=2: ZeRO 3 gathers weights over ranks that hold other experts",
        ),
        (
            ["model.pattern=M*E", MOE, "parallel.expert=2", "parallel.zero_stage=0"],
            "parallel.zero_stage = 0: does not go with parallel.expert=2: ZeRO 0 computes the gradient norm without the experts of",
        ),
        (
            ["parallel.pipeline=2", "parallel.zero_stage=3"],
            "parallel.zero_stage = 3: does not go with parallel.pipeline=2: ZeRO 3 gathers weights in the order of one "
            "forward and one backward pass, and a schedule mixes several; use 0, 1 or 2, or parallel.pipeline=1",
        ),
        (
            ["parallel.offload_optimizer=true", "parallel.zero_stage=0"],
            "parallel.offload_optimizer = true: moves what ZeRO spreads, and parallel.zero_stage is 0; use",
        ),
        (
            ["train.gradient_sums=product", "parallel.zero_stage=3"],
            "train.gradient_sums = product: adds to the sums of ZeRO 1 and 2, and parallel.zero_stage is 3; use auto, or",
        ),
        (
            ["train.gradient_sums=product", "train.compile=true"],
            "train.gradient_sums = product: is not for train.compile=true: compiled blocks hand their gradients to autograd;",
        ),
        (
            ["parallel.offload_optimizer=true", "optimizer.kind=muon"],
            "parallel.offload_optimizer = true: would have the host's processors multiply the matrices of optimizer.kind=muon; use",
        ),
        (
            ["optimizer.muon={rounds: 6}"],
            "optimizer.muon: has settings of Muon, and optimizer.kind is adamw; use optimizer.kind=muon, or remove",
        ),
        (
            ["optimizer.kind=muon", "optimizer.muon={rule: hyperball}", "model.mup={base_hidden_size: 32}"],
            "model.mup: is for steps whose size it sets, and Hyperball's are a share of the weights' norm at every width",
        ),
        (
            ["optimizer.kind=muon", "optimizer.muon={rule: hyperball}", "optimizer.decays={matrices: 0.5}"],
            "optimizer.decays.matrices = 0.5: has no effect: Hyperball keeps the norm of these and has no weight decay; remove",
        ),
        (
            [
                "optimizer.kind=muon",
                "optimizer.muon={rule: normuon}",
                "prune={groups: heads, keep: 0.5, start_step: 1, every_steps: 1, end_step: 2}",
            ],
            "prune: sets the moments of pruned weights to zero, which an optimizer that keeps whole matrices has with their owners",
        ),
        (
            ["train.precision=float32", "optimizer.state_dtype=bf16"],
            "optimizer.state_dtype = bf16: keeps master weights in bf16, which needs train.precision=bf16; got float32; use",
        ),
        (
            [*BF16_STATES, "optimizer.kind=muon"],
            "optimizer.state_dtype = bf16: is only for AdamW: Muon would orthogonalise a momentum that was rounded, which has",
        ),
        (
            [*BF16_STATES, "parallel.zero_stage=0"],
            "optimizer.state_dtype = bf16: is not for parallel.zero_stage=0, where DeepSpeed makes float32 master weights whatever",
        ),
        (
            [*BF16_STATES, "parallel.offload_optimizer=true"],
            "optimizer.state_dtype = bf16: is not for parallel.offload_optimizer: DeepSpeed keeps bf16 states on the host only with",
        ),
        (["parallel.tensor=3"], "parallel.tensor = 3: must divide model.vocab_size=512; use 1, 2, 4"),
        (["parallel.tensor=3"], "parallel.tensor = 3: must divide model.mamba.num_heads=4; use 1, 2, 4"),
        (["parallel.tensor=3"], "parallel.tensor = 3: must divide model.attention.num_heads=4; use 1, 2, 4"),
        (["parallel.tensor=3"], "parallel.tensor = 3: must divide model.feed_forward.hidden_size=128; use 1, 2, 4"),
        (
            ["parallel.tensor=4", "model.feed_forward.linear_kind=blockshuffle", "model.feed_forward.linear_blocks=2"],
            "parallel.tensor = 4: must divide model.feed_forward.linear_blocks=2; use 1, 2",
        ),
        (
            ["parallel.tensor=3"],
            "parallel.tensor = 3: must divide model.attention.num_kv_heads=2, or be a multiple of it; use 1, 2 or a",
        ),
        (
            ["model.pattern=M*E", MOE, "parallel.expert=4"],
            "parallel.expert = 4: must divide model.moe.num_experts=6; use 1, 2, 3, 6",
        ),
        (
            ["model.pattern=M*E", MOE, "parallel.tensor=4"],
            "parallel.tensor = 4: must divide model.moe.shared_expert_hidden_size=10; use 1, 2, 5, 10",
        ),
        (
            ["model.pattern=M*E", MOE, "parallel.tensor=8"],
            "parallel.expert_tensor = 8: must divide model.moe.expert_hidden_size=12; use 1, 2, 3, 4, 6, 12",
        ),
        (
            ["parallel.tensor=2", "parallel.sequence_parallel=true", "train.sequence_length=127"],
            "train.sequence_length = 127: must be a multiple of parallel.tensor=2 "
            "(parallel.sequence_parallel); use 126 or 128",
        ),
        (
            ["model.pattern=M*E", MOE, "parallel.tensor=2", "parallel.expert=2", "train.sequence_length=127"],
            "train.sequence_length = 127: must be a multiple of parallel.tensor=2 (parallel.expert)",
        ),
        (
            ["parallel.context=2", "train.sequence_length=126"],
            "train.sequence_length = 126: must be a multiple of 2 x parallel.context=2; use 124 or 128",
        ),
        (
            ["parallel.context=2", "parallel.tensor=4", "parallel.sequence_parallel=true", "train.sequence_length=124"],
            "train.sequence_length = 124: must be a multiple of 2 x parallel.context=2 and of parallel.context x "
            "parallel.tensor=4 (parallel.sequence_parallel); use 120 or 128",
        ),
        (
            ["parallel.context=4", "train.sequence_length=16"],
            "train.sequence_length = 16: gives segments shorter than the tokens that model.mamba.conv_kernel=4 looks back on; "
            "use at least 24",
        ),
        (
            ["parallel.context=2", "data.phases=[{start_sample: 8, sequence_length: 66}]"],
            "data.phases.0.sequence_length = 66: must be a multiple of 2 x parallel.context=2; use 64 or 68",
        ),
    ],
)
def test_a_broken_rule_names_value_rule_and_remedy(base, overrides, message):
    assert message in broken(base, *overrides)


def test_axes_that_do_not_tile_the_ranks_are_refused(base):
    assert broken(base, "parallel.tensor=4", "train.global_batch_size=8", world_size=6) == (
        "parallel: tensor 4 x context 1 x pipeline 1 = 4 must divide the 6 ranks; start a multiple of 4 ranks, or lower an axis"
    )
    overrides = ["model.pattern=M*E", MOE, "parallel.expert=3", "train.global_batch_size=8"]
    assert "expert_tensor 1 x expert 3 x pipeline 1 = 3 must divide the 4 ranks" in broken(
        base, *overrides, world_size=4
    )


def test_tensor_ranks_share_micro_batches(base):
    check_run(load_config(base, ["parallel.tensor=2", "train.global_batch_size=2"]), 2)
    assert "x 2 data ranks = 4" in broken(base, "parallel.tensor=2", "train.global_batch_size=2", world_size=4)
