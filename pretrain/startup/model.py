"""Build the model of a run on this rank, with its kernels, first weights and pipeline.

What `train.freeze` leaves as it is: parameters that have no gradients, which no optimizer steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from amfm.data_pipeline.samples.samples import NO_TOKENIZER
from amfm.data_pipeline.store.store import TokenStore
from amfm.kernels.attention.varlen import OWN, activate_newest, restore
from amfm.kernels.runtime.backend import resolve_for_run
from amfm.kernels.runtime.product_backend import use_product_backend
from amfm.model.hybrid import HybridModel
from amfm.model.low_precision import attach_recipes
from amfm.model.pipeline_split import Piece, cut_pieces, pieces_of_rank
from amfm.pretrain.checkpoint.manifest_file import list_checkpoints
from amfm.pretrain.checks.blocks import check_graph_device, check_kernels, refuse_native_model
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.engine.engine import ZeroEngine
from amfm.pretrain.parallel import Parallel
from amfm.pretrain.recompute import recomputed_letters

if TYPE_CHECKING:
    from amfm.pretrain.pipeline import Pipeline


_LOG = logging.getLogger(__name__)


def choose_backend(config: RunConfig, parallel: Parallel) -> str:
    """Name the implementation of the kernels on this rank. Raises ValueError for one that cannot run here."""
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    return resolve_for_run(config.kernels.backend, parallel.device, dtype, unfit=refuse_native_model(config.model))


def share_tiles(config: RunConfig, parallel: Parallel) -> None:
    """Let all ranks launch Triton kernels with the same tuned tiles, where they run on CUDA.

    Every rank must call this.
    """
    use_product_backend(config.kernels.experts)
    if parallel.device.type != "cuda" or choose_backend(config, parallel) != "triton":
        return
    from amfm.kernels.runtime.tuning import load_table
    from amfm.pretrain.startup.arithmetic import agree_on_tiles

    agree_on_tiles(load_table(parallel.device))


def choose_flash(wanted: str, parallel: Parallel) -> None:
    """Let attention of all ranks on CUDA run the newest FlashAttention that all of them have, and log which.

    wanted: `kernels.attention`. Every rank must call this. Raises ValueError if it names another than there is.
    """
    if parallel.device.type != "cuda":
        if wanted != "auto":
            raise ValueError(f"kernels.attention={wanted} needs CUDA; this rank is on {parallel.device.type}. Use auto")
        return
    found = activate_newest(torch.cuda.get_device_capability(parallel.device)[0]) if wanted != OWN else (OWN, "as told")
    answers = parallel.gather_objects(found)
    differ = len({name for name, _ in answers}) > 1
    if differ:
        restore()
    if wanted not in ("auto", OWN if differ else found[0]):
        have = "; ".join(sorted({f"{name} ({reason})" if reason else name for name, reason in answers}))
        raise ValueError(f"kernels.attention={wanted}: ranks have {have}. Install it on all ranks, or use auto")
    if parallel.is_main:
        reasons = "; ".join(sorted({reason for _, reason in answers if reason}))
        words = f"{OWN} on all ranks, because not all have {found[0]}: {reasons}" if differ else found[0]
        _LOG.info("attention runs FlashAttention %s%s", words, "" if differ or not reasons else f": {reasons}")


def build_model(
    config: RunConfig, parallel: Parallel, remark: Callable[[str], None] = lambda _: None, *, draws: bool = True
) -> HybridModel:
    """Build the model in float32 with its initial weights, compiled, recomputed and narrowed as the run asks.

    With a pipeline it is this rank's part, and under tensor and expert parallelism its shard. Initial weights are
    random functions of the seed, the same on all layouts of ranks, or `run.initial_weights` when no checkpoint of the
    run exists to replace them; `remark` is called with a message for each of those that fits only in part. Without
    `draws` there are none: a checkpoint will be loaded, and of a large model they take minutes. Every rank must call this.
    """
    if parallel.device.type == "cpu" and parallel.world_size > 1:
        from amfm.pretrain.startup.arithmetic import share_native

        share_native(config, parallel, choose_backend(config, parallel))
    backend = choose_backend(config, parallel)
    check_kernels(config, backend)
    if config.low_precision.recipe != "none":
        from amfm.pretrain.checks.low_precision import check_device

        check_device(config, parallel.device)
    check_graph_device(config, parallel.device)
    model = HybridModel(
        config.model,
        parallel.groups,
        backend=backend,
        seed=config.train.seed,
        device=parallel.device,
        pieces=held_pieces(config, parallel),
        # A checkpoint from before a run had guides lacks theirs.
        draws=draws or config.model.self_guided_training is not None,
    )
    resumes = bool(list_checkpoints(Path(config.run.dir) / "checkpoints"))
    if config.run.initial_weights is not None and not resumes:
        from amfm.pretrain.inference.weights import load_initial_weights

        has_text = config.data.synthetic is None
        tokenizer = TokenStore.open(config.data.text_store()).tokenizer_identity if has_text else NO_TOKENIZER
        for text in load_initial_weights(model, config.run.initial_weights, tokenizer):
            remark(text)
    if config.convert is not None:
        from amfm.pretrain.startup.conversion import prepare_stage

        prepare_stage(model, config.convert, resumes=resumes)
    if config.train.freeze:
        from amfm.pretrain.startup.model import freeze_parameters

        freeze_parameters(model, config.train.freeze, parallel)
    attach_recipes(model, config.low_precision)
    if config.train.compile:
        model.compile_blocks()
    model.recompute_blocks(recomputed_letters(config))
    return model


def held_pieces(config: RunConfig, parallel: Parallel) -> tuple[Piece, ...] | None:
    """The pieces of the model that this rank holds; None if there is no pipeline."""
    section = config.parallel
    if section.pipeline == 1:
        return None
    length = config.train.sequence_length
    cut = cut_pieces(config.model, section.num_pieces(), length, section.balance, section.pipeline)
    return pieces_of_rank(cut, parallel.groups.pp.rank(), section.pipeline)


def build_pipeline(config: RunConfig, parallel: Parallel, engine: ZeroEngine) -> Pipeline | None:
    """Wrap the engine's model into pipeline stages; None without a pipeline.

    The engine is told of gradients that a schedule adds by hand, because its float32 sums come from autograd's hooks.
    """
    if config.parallel.pipeline == 1:
        return None
    from amfm.pretrain.pipeline import Pipeline  # torch's schedules import its compiler

    return Pipeline(engine.module, config.parallel, parallel, collect=engine.take_gradient)


def freeze_parameters(model: HybridModel, patterns: Sequence[str], parallel: Parallel) -> None:
    """Freeze each parameter that a pattern names, by its own name or that of a module around it.

    Engine, optimizer and checkpoints go by `requires_grad`. Collective: every rank must call this with its part of the
    model. Raises ValueError on all ranks for a pattern that no rank has a parameter of, and where a rank is left without
    any to train.
    """
    found: set[str] = set()
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        around = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        matching = {pattern for pattern in patterns if any(fnmatchcase(module, pattern) for module in around)}
        if matching:
            parameter.requires_grad_(False)
            found |= matching
    is_idle = not any(parameter.requires_grad for parameter in model.parameters())
    answers: list[tuple[set[str], bool]] = parallel.gather_objects((found, is_idle))
    unknown = [pattern for pattern in patterns if not any(pattern in matched for matched, _ in answers)]
    if unknown:
        tops = sorted({name for name, _ in model.named_children()})
        raise ValueError(
            f"train.freeze names {', '.join(unknown)}, and the model has no such parameter or module; names begin with "
            f"{', '.join(tops)}, such as blocks.0.mixer, and `*` stands for any part (manifest.json of a checkpoint lists all)"
        )
    idle = [rank for rank, (_, alone) in enumerate(answers) if alone]
    if idle:
        raise ValueError(f"train.freeze leaves rank {idle[0]} nothing to train; name less, or use fewer pipeline ranks")
