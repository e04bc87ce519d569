"""Writes a training state as Megatron-Core's distributed checkpoint (`torch_dist`), for any layout of its ranks.

The names of MambaModel (HybridModel), one block a layer, or of GPTModel, two. Moments and float32 weights have the form of
its distributed optimizer (`--dist-ckpt-optim-fully-reshardable`), so that Megatron-LM cuts them for its own ranks. Norms
are written under two names, of a layer of its own and of Transformer Engine's fused one, so both implementations load.

Not written, because our state does not have them: its arguments, its random generators (`--no-load-rng`) and
Transformer Engine's `_extra_state` (`--dist-ckpt-strictness log_unexpected`).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from amfm.data_pipeline.terminal import Report, silent
from amfm.model.config.schema import ModelConfig
from amfm.model.on_demand import Source
from amfm.pretrain.config.saved import read_saved_config
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.stages import last_stage, resolve_stages
from amfm_foreign_states.adopt import check_adoptable
from amfm_foreign_states.dcp import StreamedPlanner
from amfm_foreign_states.megatron.blocks import (
    EXPERTS,
    FUSED,
    NORMS,
    PARTS,
    UP_BIAS,
    check_fits,
    depth_names,
    extra_channels,
    fused_rows,
    key_heads,
    layers,
    names_of,
    norm_names,
    part_rows,
    row_order,
)
from amfm_foreign_states.megatron.read import COMMON, DESCRIPTION, LATEST
from amfm_foreign_states.rows import interleave, join, last_column, permuted, resized
from amfm_foreign_states.state import ExportedState, TrainingState, export_state
from amfm_foreign_states.torch_file import system_errors

# How Megatron-LM is to ask for the tensors: it reads this of a checkpoint before it loads it.
CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
    "non_homogeneous_layers": True,
}
BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# Our kinds of tensors as its distributed optimizer names them.
KINDS = {"weight": "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


def export_megatron(
    checkpoint: str | Path, out_dir: str | Path, report: Report = silent, *, is_gpt: bool = False
) -> ExportedState:
    """Write a checkpoint (or a run's newest) as `OUT/iter_N` with `latest_checkpointed_iteration.txt`; holds one block of rows.

    is_gpt: with the names of GPTModel. Raises ValueError for a model or optimizer that Megatron-Core has no place for.
    """

    def write(folder: Path, state: TrainingState) -> str:
        config = read_saved_config(state.record)
        check_adoptable(config)
        check_fits(config.model, state.origin)
        if is_gpt:
            check_pairs(config.model)
        step = state.record["step"]
        inside = folder / f"iter_{step:07d}"
        inside.mkdir()
        writer = FileSystemWriter(inside, thread_count=1, per_thread_copy_ahead=0, sync_files=True)
        with system_errors(folder), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            tensors = dict(megatron_tensors(config, state, is_gpt=is_gpt))
            save(tensors, storage_writer=writer, planner=StreamedPlanner(report), no_dist=True)
            torch.save(common_state(config, state.record), inside / COMMON)
            (inside / DESCRIPTION).write_text(json.dumps(BACKENDS), encoding="utf-8")
            (folder / LATEST).write_text(str(step), encoding="utf-8")
        return inside.name

    return export_state(checkpoint, Path(out_dir), write, report)


def check_pairs(model: ModelConfig) -> None:
    """Raise ValueError for a pattern whose blocks are not attention and what follows it, in pairs."""
    depth = model.parsed_pattern.depth_letters
    halves = [letters[place::2] for letters in (model.letters, depth) for place in (0, 1)]
    are_pairs = set(halves[0] + halves[2]) <= {"*", "G", "W", "+"} and set(halves[1] + halves[3]) <= {"-", "E"}
    if not are_pairs or len(model.letters) % 2 or len(depth) not in (0, 2):
        raise ValueError(
            f"model.pattern={model.pattern} has no layers of GPTModel, which are *, W, + or G and then - or E, one for each depth; "
            "use --format torch-dist, whose names are those of MambaModel"
        )


def megatron_tensors(config: RunConfig, state: TrainingState, *, is_gpt: bool) -> Iterator[tuple[str, Source]]:
    """Iterate over the tensors of weights, float32 weights and moments, by Megatron-Core's names."""
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    weights = dict(in_their_names(config.model, state.tensors["weight"], is_gpt=is_gpt))
    buffers = {name: source for name, source in state.buffers.items() if name.endswith("expert_bias")}
    yield from ((name, in_dtype(source, dtype)) for name, source in weights.items())
    yield from in_their_names(config.model, buffers, is_gpt=is_gpt)
    for kind, name in KINDS.items():
        found = weights if kind == "weight" else dict(in_their_names(config.model, state.tensors[kind], is_gpt=is_gpt))
        yield from ((f"optimizer.state.{name}.{key}", source) for key, source in found.items())


def in_their_names(model: ModelConfig, ours: Mapping[str, Source], *, is_gpt: bool) -> Iterator[tuple[str, Source]]:
    """Iterate over tensors of one kind by Megatron-Core's names of a model; those of ours that are not there are left out."""
    last = "decoder.final_layernorm" if is_gpt else "decoder.final_norm"
    names = {"embedding.weight": "embedding.word_embeddings.weight", "head.weight": "output_layer.weight"}
    names |= {f"final_norm.{part}": f"{last}.{part}" for part in model.norm_parts()}
    for depth in range(model.num_depth_modules):
        names |= {f"mtp.{depth}.{name}": f"mtp.layers.{depth}.{theirs}" for name, theirs in depth_names(model).items()}
    yield from ((theirs, ours[name]) for name, theirs in names.items() if name in ours)
    for prefix, symbol, layer, _ in layers(model, is_pairs=is_gpt):
        for part in model.norm_parts():
            if f"{prefix}norm.{part}" in ours:
                yield from ((layer + name, ours[f"{prefix}norm.{part}"]) for name in norm_names(NORMS[symbol], part))
        inside = f"{prefix}mixer."
        block = {name.removeprefix(inside): source for name, source in ours.items() if name.startswith(inside)}
        yield from ((layer + name, source) for name, source in block_tensors(model, symbol, block))


def block_tensors(model: ModelConfig, symbol: str, block: Mapping[str, Source]) -> Iterator[tuple[str, Source]]:
    """Iterate over what a layer has of a block's tensors."""
    for name, source in block.items():
        if names := names_of(model, symbol, name):
            order = row_order(model, symbol, name)
            if order is not None:
                source = permuted(source, sorted(range(len(order)), key=order.__getitem__))
            yield from ((theirs, source) for theirs in names)
        elif name in EXPERTS:
            extra = extra_channels(model, name)
            if extra:
                outputs, width = (
                    size - extra * (name == own) for size, own in zip(source.shape[1:], ("experts.down", "experts.up"))
                )
                if name == "experts.up":
                    yield f"mlp.experts.experts.{UP_BIAS}", last_column(source, width)
                source = resized(source, outputs, width)
            yield f"mlp.experts.experts.{EXPERTS[name]}", source
        elif name in PARTS.get(symbol, {}):
            base, parts = PARTS[symbol][name]
            sizes, begin = part_rows(model, symbol), 0
            for part in parts:
                piece = join([(source, begin, begin + sizes[part])])
                yield f"{base}.{part}", with_channel_dim(piece) if name == "conv.weight" else piece
                begin += sizes[part]
    fused = fused_rows(model, symbol)
    for part in ("weight", "bias"):
        present = [block[f"{name}.{part}"] for name in fused if f"{name}.{part}" in block]
        if present and len(present) == len(fused):
            yield f"{FUSED}.{part}", interleave(present, key_heads(model))


def with_channel_dim(source: Source) -> Source:
    """The weights of a convolution over channels with a dimension of inputs per channel, which is 1."""
    rows, width = source.shape
    return Source((rows, 1, width), source.dtype, lambda start, stop: source.read(start, stop).unsqueeze(1))


def in_dtype(source: Source, dtype: torch.dtype) -> Source:
    """The same numbers in the dtype that the model computes in."""

    def read(start: int, stop: int) -> Tensor:
        return source.read(start, stop).to(dtype)

    return Source(source.shape, dtype, read)


def common_state(config: RunConfig, record: Mapping[str, Any]) -> dict[str, Any]:
    """What Megatron-LM reads next to the tensors: counters, the groups of its optimizer, and the place in its schedule."""
    step = record["step"]
    optimizer_step = max(entry["optimizer_step"] for entry in record["parameters"].values())
    optimizer, rate = config.optimizer, config.optimizer.learning_rate
    lowest = rate * config.schedule.min_ratio
    settings = {"lr": rate, "betas": (optimizer.beta1, optimizer.beta2), "eps": optimizer.epsilon}
    settings |= {"lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False, "step": optimizer_step}
    settings |= {"max_lr": rate, "min_lr": lowest, "default_config": True, "bias_correction": True}
    groups = [{**settings, "wd_mult": share, "weight_decay": share * optimizer.weight_decay} for share in (1.0, 0.0)]
    stages = resolve_stages(config)
    stage, total, batch = last_stage(stages, step), stages[-1].last_step, config.train.global_batch_size
    schedule = {
        "max_lr": rate,
        "min_lr": lowest,
        "lr_warmup_steps": round(config.schedule.warmup_length(total) * batch),
        "lr_decay_steps": round((config.schedule.decay_end_step or total) * batch),
        "lr_decay_style": config.schedule.kind.replace("inverse_sqrt", "inverse-square-root").replace("wsd", "WSD"),
        # Its next update has the rate of the samples before it, ours that of its step: one batch further.
        "num_steps": stage.first_sample + stage.samples_before(step + 2),
        "start_wd": optimizer.weight_decay,
        "end_wd": optimizer.weight_decay,
        "wd_incr_style": "constant",
        "wd_incr_steps": total * batch,
    }
    return {
        "iteration": step,
        "checkpoint_version": 3.0,
        "content_metadata": CONTENT,
        "optimizer": {"optimizer": {"param_groups": groups}, "param_state_sharding_type": "fully_reshardable"},
        "opt_param_scheduler": schedule,
    }
