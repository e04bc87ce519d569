"""RunConfig: everything one run is, in sections that the packages own.

Sections are frozen pydantic models that reject unknown keys, so that a misspelt setting stops the run instead of leaving a
default in force. Bounds of one field stand here, in its declaration; rules between fields stand in pretrain/checks, because
they need the whole run and give better fixes than a validator of one section could. The descriptions are the
documentation: docs/configuration.md and the editors' JSON Schema are generated from them. Model and data own their
sections (model/config/schema.py, data_pipeline/config.py), since both work without this package.
"""

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from amfm.data_pipeline.config import DataConfig
from amfm.model.config.key_mixer_options import IndexerStage
from amfm.model.config.low_precision import LowPrecisionConfig
from amfm.model.config.rope import RopeConfig
from amfm.model.config.schema import ModelConfig
from amfm.model.config.section import Section
from amfm.model.huggingface.hf_class import Target
from amfm.pretrain.config.convert import ConvertConfig
from amfm.pretrain.config.hook_sections import (
    DistillConfig,
    EmaConfig,
    ForgetConfig,
    PruneConfig,
    QkClipConfig,
    TraceConfig,
    ValidationSet,
    with_sources,
)
from amfm.pretrain.config.hooks import RegisteredHooks
from amfm.pretrain.config.optimizers import (
    OWN_OPTIMIZERS,
    OWN_SCHEDULES,
    DecayFactors,
    MatrixOptimizerSpec,
    MuonConfig,
    OptimizerSpec,
    PackageMatrices,
    RateFactors,
    RegisteredOptimizers,
    RegisteredSchedules,
    optimizer_specs,
    schedule_specs,
)
from amfm.pretrain.config.train_and_launch import LaunchConfig, TrainConfig

if TYPE_CHECKING:
    OptimizerKind = str
    ScheduleKind = str
else:
    OptimizerKind = Literal[(*OWN_OPTIMIZERS, *optimizer_specs())]
    ScheduleKind = Literal[(*OWN_SCHEDULES, *schedule_specs())]


class RunSection(Section):
    """Directory and name of the run."""

    dir: str = Field(description="Run directory: checkpoints, metrics, report; a second start resumes from it.")
    name: str | None = Field(None, description="Shown in logs and the report; null: the last part of dir.")
    initial_weights: str | None = Field(
        None,
        description="Start from these weights (an import, a checkpoint or another run) instead of random ones; read once; a resumed run uses its checkpoint.",
    )
    tensorboard: bool = Field(True, description="Write TensorBoard event files below dir.")
    wandb_project: str | None = Field(
        None, description="Also log to this Weights & Biases project; needs the wandb package."
    )


class OptimizerConfig(Section):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), fused where the device has it, or Muon for matrices."""

    kind: OptimizerKind = Field(
        "adamw",
        description="muon: the matrices inside blocks are stepped by Muon, everything else by AdamW; likes 2 to 4 times AdamW's rate. Or an optimizer of an installed package.",
    )
    learning_rate: float = Field(gt=0, description="Peak rate.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    beta2: float = Field(0.95, ge=0, lt=1, description="Decay of the second moment.")
    epsilon: float = Field(1e-8, gt=0, description="Added to the root of the second moment.")
    weight_decay: float = Field(
        0.1,
        ge=0,
        description="On matrices; norms, biases, A_log, D and dt_bias never decay, but of model.moe.bias those of the first product do, which are columns of its matrix.",
    )
    clip_grad_norm: float | None = Field(1.0, gt=0, description="Largest global gradient norm; null: no clipping.")
    rates: RateFactors | None = Field(None, description="Factors on the rate by group; null: one rate for all.")
    decays: DecayFactors | None = Field(None, description="Factors on weight_decay by group; null: one for all.")
    muon: MuonConfig | None = Field(None, description="Settings of kind muon; null: its defaults.")
    state_dtype: Literal["float32", "bf16"] = Field(
        "float32",
        description="Of master weights and moments; bf16: 6 bytes per parameter instead of 12, with stochastic rounding (train.precision=bf16, ZeRO 1 to 3, adamw).",
    )
    options: RegisteredOptimizers = RegisteredOptimizers()

    def num_moments(self) -> int:
        """Tensors that are kept for each weight which Muon does not step."""
        spec = optimizer_specs().get(self.kind)
        return spec.num_moments if isinstance(spec, OptimizerSpec) else 2

    def matrix_settings(self) -> MuonConfig | PackageMatrices | None:
        """Settings of what steps whole matrices: Muon's, as given or its defaults, or a package's; None for AdamW."""
        spec = optimizer_specs().get(self.kind)
        if isinstance(spec, MatrixOptimizerSpec):
            return PackageMatrices(spec, getattr(self.options, self.kind) or spec.options())
        return (self.muon or MuonConfig()) if self.kind == "muon" else None


class ScheduleConfig(Section):
    """Learning rate over the steps of the run."""

    kind: ScheduleKind = Field(
        "wsd",
        description="Warm-up, stable, decay; warm-up and cosine; warm-up and constant; warm-up, then the peak times sqrt(warm-up / step); or a schedule of an installed package.",
    )
    warmup_steps: int | float | None = Field(
        None,
        ge=0,
        description="Linear rise from 0 to the peak, such as 16.28 for 50,000 samples in batches of 3,072; null: a twentieth of train.steps.",
    )
    decay_steps: int | float | None = Field(
        None, gt=0, description="wsd: length of the final decay; null: a fifth of train.steps."
    )
    decay_end_step: int | float | None = Field(
        None,
        gt=0,
        description="wsd, cosine: step at which the decay reaches min_ratio, before the end of the run or after it; null: train.steps.",
    )
    decay_shape: Literal["linear", "sqrt", "cosine", "exponential"] = Field(
        "linear",
        description="wsd: form of the decay (sqrt: 1 - sqrt, Haegele et al. 2024, arXiv 2405.18392; exponential: 2 * 0.5^p - 1).",
    )
    min_ratio: float = Field(0.1, ge=0, le=1, description="Final rate over peak rate.")
    options: RegisteredSchedules = RegisteredSchedules()

    def warmup_length(self, total_steps: int) -> int | float:
        """Steps of the rise: as configured, else a twentieth of the run."""
        return total_steps // 20 if self.warmup_steps is None else self.warmup_steps


class ParallelConfig(Section):
    """How the run is distributed over ranks; data parallelism uses the remaining ones."""

    tensor: int = Field(
        1, gt=0, description="Ranks that share each matrix, head by head; keep them inside one machine."
    )
    sequence_parallel: bool = Field(
        False, description="Cut the tokens between blocks over the tensor ranks: less memory for activations."
    )
    expert: int = Field(1, gt=0, description="Ranks over which the routed experts are spread.")
    expert_tensor: int | None = Field(
        None, gt=0, description="Ranks that share each routed expert; null: `tensor`, or 1 with `expert` above 1."
    )
    overlap_experts: Literal[False, True, "two_batch"] = Field(
        False,
        description="Other work that overlaps sending tokens to experts on other ranks, in addition to the shared expert. true: tokens are cut in halves, and experts compute one while the other is sent (reads experts' weights twice). two_batch: two-batch overlap; the two halves of a micro-batch alternate through all blocks, as two micro-batches of half the sequences would.",
    )
    expert_buffer_factor: float | None = Field(
        None,
        ge=1,
        le=1e3,
        description="Size of fixed buffers for tokens to experts on other ranks, relative to balanced routing, such as 1.5, so that the host need not count tokens; a step in which they overflow is computed again. null: the host counts tokens.",
    )
    context: int = Field(1, gt=0, description="Ranks that share the tokens of each sequence.")
    pipeline: int = Field(1, gt=0, description="Stages of consecutive blocks; `|` in model.pattern cuts them.")
    schedule: Literal["1f1b", "interleaved", "zero_bubble"] = Field(
        "1f1b", description="Order of the stages' forward and backward passes (Narayanan et al. 2021, Qi et al. 2023)."
    )
    virtual_stages: int = Field(
        1, gt=0, description="Model chunks of the pipeline per rank; above 1 only with interleaving."
    )
    balance: Literal["chunks", "ranks"] = Field(
        "chunks", description="What cuts without `|` make even in FLOPs: model chunks, or ranks that hold several."
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="State that DeepSpeed shards over data ranks: 1 optimizer, 2 + gradients, 3 + weights."
    )
    offload_optimizer: bool = Field(
        False, description="Keep master weights and moments in the memory of the host, and step there."
    )

    def expert_tensor_size(self) -> int:
        """Ranks that share each routed expert."""
        if self.expert_tensor is not None:
            return self.expert_tensor
        return 1 if self.expert > 1 else self.tensor

    def num_pieces(self) -> int:
        """Pieces into which the pipeline cuts the model."""
        return self.pipeline * self.virtual_stages

    def model_ranks(self) -> int:
        """Ranks that work on one micro-batch together."""
        return self.tensor * self.context * self.pipeline

    def data_ranks(self, world_size: int) -> int:
        """Shares of the global batch among this many ranks."""
        return max(1, world_size // self.model_ranks())


class StageConfig(Section):
    """A part of the run; what it leaves out stays as in the stage before it, at first as in `train` and `parallel`.

    A `parallel` section is a whole layout: what it leaves out has its default, and the ranks restart in it.
    """

    name: str = Field(min_length=1, description="Shown in the log and the report.")
    tokens: float | None = Field(None, gt=0, description="At least this many tokens; or set steps.")
    steps: int | None = Field(None, gt=0, description="Optimizer steps; or set tokens.")
    sequence_length: int | None = Field(None, gt=0, description="Tokens per sequence.")
    micro_batch_size: int | None = Field(None, gt=0, description="Sequences per forward pass and rank.")
    global_batch_size: int | None = Field(None, gt=0, description="Sequences per optimizer step, over all ranks.")
    rope: RopeConfig | None = Field(None, description="Rotary positions from here on.")
    indexer: IndexerStage | None = Field(
        None, description="Mode of indexers from here on; null: as before, at first as their own `stage`."
    )
    weights: dict[str, float] | None = Field(None, description="Weight of each source from here on; absent: not used.")
    learning_rate: float | None = Field(None, gt=0, description="Peak rate; null: optimizer.learning_rate.")
    schedule: ScheduleConfig | None = Field(None, description="Over the steps of this stage; null: `schedule`.")
    parallel: ParallelConfig | None = Field(
        None,
        description="Complete layout from here on: settings that it leaves out have their defaults. The run saves, and continues with new processes; null: as before.",
    )
    recompute: Literal["none", "selective", "full"] | None = Field(
        None, description="Blocks that are computed again in backward passes, as train.recompute."
    )
    recompute_blocks: str | None = Field(
        None, description="Block types for recompute: selective; null: as before, or empty if recompute is set."
    )


class HealthConfig(Section):
    """How a run handles steps that went wrong and ranks that are slow; every case is written to events.jsonl."""

    on_nonfinite: Literal["skip", "rollback", "stop"] = Field(
        "skip",
        description="Gradients with NaN or infinity: leave the step out (train.max_skipped_steps in a row stop the run), load the newest checkpoint's weights and continue with the next data, or stop.",
    )
    on_spike: Literal["ignore", "skip", "rollback", "stop"] = Field(
        "ignore", description="The same actions for a loss, or a gradient norm, far above the recent ones."
    )
    spike_rule: Literal["ratio", "sigma"] = Field(
        "ratio",
        description="Spikes that on_spike acts on: a loss above spike_ratio times the median, or a loss or gradient norm above spike_sigma.",
    )
    spike_ratio: float = Field(1.5, gt=1, description="A spike is a loss above this times the median of the window.")
    spike_window: int = Field(
        64, ge=8, description="Steps of the median; before there are so many, no spike is detected."
    )
    spike_sigma: float | None = Field(
        6.0,
        gt=0,
        description="Report a step whose loss or gradient norm is this many standard deviations above the mean of spike_window steps; null: never.",
    )
    max_rollbacks: int = Field(3, ge=0, description="Rollbacks of the whole run; one more stops it.")
    straggler_percent: float | None = Field(
        25.0,
        gt=0,
        description="Report ranks that compute this many percent longer than the median, every 20 steps; null: never.",
    )
    check_state_every_steps: int | None = Field(
        None,
        gt=0,
        description="Look for silent corruption every N steps and before each save: state that changed at rest, copies that differ, a micro-batch with other results when run again. The run ends (code 3) and prints the rank; null: never.",
    )


class KernelsConfig(Section):
    """Which implementation of each operation runs."""

    backend: Literal["auto", "triton", "native", "torch", "reference"] = Field(
        "auto",
        description="auto: on CUDA triton in bf16 and torch in float32; on a CPU native (Mamba2 in C) where a C compiler and a block for it are, else torch. A backend that cannot run here is an error.",
    )
    attention: Literal["auto", "FA2", "FA3", "FA4"] = Field(
        "auto",
        description="FlashAttention of PyTorch's attention on CUDA. auto: the newest that all ranks have; one that is named and not there is an error. FA3 is planned at its published rate on Hopper, others at FA2's.",
    )
    experts: Literal["auto", "triton", "torch"] = Field(
        "auto",
        description="Products of experts, and by fp8_block of whole matrices, if `backend` is triton: our kernels, PyTorch's (CUTLASS on Hopper and later; cuBLASLt for fp8_block on Hopper), or the faster of both by `amfm bench kernels --tune` on this GPU; ours if nothing was tuned.",
    )


class ExportConfig(Section):
    """Which transformers class the model must fit, checked before training starts, and which checkpoints are exported."""

    target: Literal[Target, "auto"] = Field(
        "auto",
        description="`own`: our modeling file next to the weights; `auto`: a native class if one holds the config exactly, else own.",
    )
    every_steps: int | None = Field(
        None,
        gt=0,
        description="Export the checkpoints of every N steps to exports/ below run.dir while training continues, in a process on the launcher's host; null: none.",
    )
    max_position_embeddings: int | None = Field(
        None,
        gt=0,
        description="Tokens per text that the export declares; null: the sequence length of training, and no fewer than the released model had that the run continues.",
    )


class EvaluateConfig(Section):
    """What is measured while a model trains, besides its validation: tasks of lm-eval, a merge of checkpoints, samples."""

    tasks: tuple[str, ...] = Field((), description="Tasks, groups or tags of lm-eval, by name; empty: none.")
    include_path: str | None = Field(None, description="Folder with YAML files of further tasks; null: lm-eval's own.")
    every_steps: int | None = Field(None, gt=0, description="None: only after the last step.")
    limit: int | None = Field(None, gt=0, description="Documents of each task; null: all.")
    num_fewshot: int | None = Field(
        None, ge=0, description="Examples before each question; null: as the task defines, else 0."
    )
    micro_batch_size: int | None = Field(
        None, gt=0, description="Sequences per forward pass and rank; null: train.micro_batch_size."
    )
    merge_last: int | None = Field(
        None, gt=1, description="Validate the mean of this many last checkpoints next to the run; null: of none."
    )
    prompts: tuple[str, ...] = Field(
        (), description="Texts that the model continues after each validation, by 60 tokens each; empty: none."
    )


class RunConfig(Section):
    """A whole run: one YAML file plus overrides."""

    run: RunSection
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    stages: tuple[StageConfig, ...] = Field((), description="Consecutive stretches of the run; null: one, as above.")
    parallel: ParallelConfig = ParallelConfig()
    health: HealthConfig = HealthConfig()
    kernels: KernelsConfig = KernelsConfig()
    low_precision: LowPrecisionConfig = LowPrecisionConfig()
    export: ExportConfig = ExportConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    validation: tuple[ValidationSet, ...] = Field(
        (), description="Held-out text that is measured on its own and reported by name."
    )
    prune: PruneConfig | None = Field(None, description="Set groups of weights to zero on the way; null: no pruning.")
    forget: ForgetConfig | None = Field(None, description="Re-initialize the embedding on the way; null: never.")
    qk_clip: QkClipConfig | None = Field(None, description="Bound the scores of attention; null: they may grow.")
    ema: EmaConfig | None = Field(None, description="Keep a moving average of the weights; null: none.")
    distill: DistillConfig | None = Field(
        None, description="Learn from a teacher (docs/distillation.md); null: only from the text."
    )
    trace_choices: TraceConfig | None = Field(
        None, description="Write the routing decisions of each token; null: none."
    )
    hooks: RegisteredHooks = RegisteredHooks()
    plugins: tuple[str, ...] = Field(
        (), description="Folders of code that is imported on every rank and registers parts (docs/hooks.md)."
    )
    convert: ConvertConfig | None = Field(
        None, description="Of `amfm convert`; null: train the model of the section `model`."
    )
    launch: LaunchConfig = LaunchConfig()

    @model_validator(mode="after")
    def _add_sources(self) -> Self:
        """Paths of validation sets are sources like all others, to those who prepare and to those who read."""
        if any(each.paths is not None for each in self.validation):
            for name, value in zip(("validation", "data"), with_sources(self.validation, self.data)):
                object.__setattr__(self, name, value)
        return self

    def own_losses(self) -> tuple[str, ...]:
        """Auxiliary losses that the run's blocks give besides those of the section `model`."""
        own = () if self.convert is None else self.convert.own_losses()
        return own if self.distill is None else (*own, "distill")
