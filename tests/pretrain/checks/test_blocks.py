"""Sizes of registered mixers that Triton kernels do not take are named before anything runs, and what graphs of blocks do not go with.

Graphs do not go with what a replay would leave out; each is rejected with its reason and fix.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from amfm.model.config.kinds import BUILT_IN, find_kind
from amfm.model.config.mixer_options import LinearOptions
from amfm.model.config.schema import ModelConfig, MultipliersConfig
from amfm.pretrain.checks.blocks import check_kernels
from amfm.pretrain.checks.check_run import check_run
from amfm.pretrain.config.errors import ConfigError
from amfm.pretrain.config.file import load_config
from amfm.pretrain.inference.weights import function_settings
from tests.model.mixers.samples import mixer_config, sample_options

LINEAR = [spec.name for spec in BUILT_IN if issubclass(spec.options, LinearOptions)]


def run_of(base, model: ModelConfig, backend="triton"):
    config = load_config(base, [f"kernels.backend={backend}"])
    sections = {"pattern": model.pattern, "mixers": model.mixers}
    return config.model_copy(update={"model": config.model.model_copy(update=sections)})


def mixer_run(base, name: str, backend="triton", **changes):
    options = find_kind(name).options.model_validate(sample_options(name) | {"chunk_size": 64} | changes)
    model = mixer_config(name)
    return run_of(
        base, model.model_copy(update={"mixers": model.mixers.model_copy(update={name: options})}), backend=backend
    )


@pytest.mark.parametrize("name", LINEAR)
def test_every_linear_mixer_is_held_against_its_kernels(name, base):
    check_run(mixer_run(base, name))
    check_run(mixer_run(base, name, backend="torch", chunk_size=8))
    with pytest.raises(ConfigError) as caught:
        check_run(mixer_run(base, name, chunk_size=8))
    assert f"model.mixers.{name}.chunk_size = 8: must be " in str(caught.value)
    assert "for Triton kernels; use 64, or kernels.backend=torch" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gated_deltanet", {"head_dim": 257}, "heads with a state of 257 x 5, and Triton kernels hold up to 256 rows"),
        ("hgrn2", {"head_dim": 257}, "a state of 257 x 5, and Triton kernels hold up to 256 rows"),
        ("hedgehog", {"head_dim": 129}, "a state of 258 x 6, and Triton kernels hold up to 256 x 256"),
        ("mala", {"value_head_dim": 256}, "a state of 7 x 257, and Triton kernels hold up to 256 x 256"),
        ("mamba1", {"state_size": 17}, "a state of 17 x 1, and Triton kernels hold up to 16 rows"),
    ],
)
def test_states_that_no_kernel_holds_are_named_with_their_sums(name, changes, message, base):
    with pytest.raises(ConfigError) as caught:
        check_run(mixer_run(base, name, **changes))
    assert message in str(caught.value)


def test_a_mixer_inside_mom_is_held_against_its_kernels_too(base):
    with pytest.raises(ConfigError, match=r"model\.mixers\.gated_deltanet\.chunk_size = 8"):
        check_run(run_of(base, mixer_config("mom")))


def test_auto_is_checked_once_it_is_known_to_be_triton(base):
    config = load_config(base, ["model.mamba.chunk_size=48", "model.mamba.state_size=512"])
    check_run(config)
    check_kernels(config, "torch")
    with pytest.raises(ConfigError) as caught:
        check_kernels(config, "triton")
    assert "model.mamba.chunk_size = 48: must be 16, 32, 64 or a multiple of 128 for Triton kernels" in str(
        caught.value
    )
    assert "model.mamba: has heads with a state of 512 x" in str(caught.value)


def test_a_file_with_a_mixer_in_braces_without_quotes_is_told_what_to_write(base, tmp_path):
    path = tmp_path / "braces.yaml"
    path.write_text(f"extends: {base}\nmodel:\n  pattern: {{retnet}}\n")
    with pytest.raises(
        ConfigError, match=r"must be text; put it in quotes if it looks like a number or starts with \{"
    ):
        load_config(path)


def test_weights_go_to_the_same_mixers_whatever_their_chunks():
    def settings(**changes):
        inner = find_kind("deltanet").options.model_validate(sample_options("deltanet") | changes)
        model = mixer_config("mom over deltanet")
        return function_settings(
            model.model_copy(update={"mixers": model.mixers.model_copy(update={"deltanet": inner})})
        )

    assert settings(chunk_size=32) == settings()
    assert settings(allow_negative_eigenvalues=True) != settings(), "the mixer inside changes what MoM computes"


@pytest.mark.parametrize("changes", [{"norm_placement": "both"}, {"multipliers": MultipliersConfig(embedding=3.0)}])
def test_weights_go_to_no_model_that_multiplies_or_norms_otherwise(changes):
    model = mixer_config("deltanet")
    assert function_settings(model.model_copy(update=changes)) != function_settings(model)


@pytest.mark.parametrize(
    ("pattern", "backend", "message"),
    [
        ("M*E-", "torch", "kernels.experts = triton: has no effect if all operations run in kernels.backend=torch"),
        (
            "M*-",
            "triton",
            "kernels.experts = triton: has no effect if the model has no experts and "
            "low_precision.recipe is not fp8_block",
        ),
        ("M*E-", "triton", None),
        ("M*E-", "auto", None),
    ],
)
def test_a_backend_of_experts_needs_experts_and_kernels(pattern, backend, message, base):
    moe = ["model.moe={num_experts: 4, top_k: 2, expert_hidden_size: 8}"] if "E" in pattern else []
    settings = [f"model.pattern={pattern}", f"kernels.backend={backend}", "kernels.experts=triton"]
    config = load_config(base, [*settings, *moe])
    if message is None:
        check_kernels(config, backend)
        return
    with pytest.raises(ConfigError) as caught:
        check_kernels(config, backend)
    assert message in str(caught.value)


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
