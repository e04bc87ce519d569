"""Graphs of blocks do not go with what a replay would leave out; each is rejected with its reason and fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.file import load_config

GRAPHS = ["train.cuda_graphs=blocks", "train.precision=bf16", "kernels.backend=auto", "parallel.zero_stage=1"]


def test_data_tensor_and_expert_ranks_may_have_graphs(base: Path) -> None:
    experts = ["model.pattern=M*E", "model.moe={num_experts: 4, top_k: 2, expert_hidden_size: 32}", "parallel.expert=2"]
    check_run(load_config(base, [*GRAPHS, *experts]))
    two_batch = [*experts, "parallel.overlap_experts=two_batch"]
    with pytest.raises(
        ConfigError, match=r"parallel.overlap_experts = two_batch: .* halves of a micro-batch .* use false"
    ):
        check_run(load_config(base, [*GRAPHS, *two_batch]))
    check_run(load_config(base, [*GRAPHS, "parallel.tensor=2"]))
    check_run(load_config(base, [*GRAPHS, "parallel.tensor=2", "parallel.sequence_parallel=true"]))
    check_run(load_config(base, GRAPHS))
    check_run(load_config(base, [*GRAPHS, "kernels.backend=triton", "train.precision=float32"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "train.compile=true",
            "train.compile = true: does not go with train.cuda_graphs=blocks: it compiles blocks, .* use false, or train.cuda_graphs=none",
        ),
        (
            "train.recompute=full",
            "train.recompute = full: .* it computes blocks again .* use none, or train.cuda_graphs=none",
        ),
        ("train.gradient_sums=hook", "train.gradient_sums = hook: .* it hands gradients to autograd"),
        ("parallel.zero_stage=0", "parallel.zero_stage = 0: .* it sums gradients by autograd"),
        ("parallel.zero_stage=2", "parallel.zero_stage = 2: .* it sends the sum of each pass"),
        ("parallel.zero_stage=3", "parallel.zero_stage = 3: .* it gathers weights to other memory"),
        ("parallel.pipeline=2", "parallel.pipeline = 2: .* it has several micro-batches in flight"),
        ("parallel.context=2", "parallel.context = 2: .* it cuts sequences into segments"),
        ("low_precision.recipe=fp8_block", "low_precision.recipe = fp8_block: .* it keeps codes of weights"),
        ("kernels.backend=torch", "kernels.backend = torch: .* it reads numbers on the host.* use auto"),
        (
            "train.precision=float32",
            "kernels.backend = auto: .* it computes in PyTorch's operations in float32.* use triton",
        ),
        (
            "model.attention_residuals.blocks_per_source=2",
            "model.attention_residuals: .* it hands on another residual stream than graphs keep",
        ),
        ("health.check_state_every_steps=5", "health.check_state_every_steps: .* it computes its own gradients"),
    ],
)
def test_what_excludes_graphs_is_refused(base: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_run(load_config(base, [*GRAPHS, change]))
