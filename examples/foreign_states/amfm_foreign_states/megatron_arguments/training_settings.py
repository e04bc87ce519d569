"""Our other sections as the arguments of Megatron-LM describe them: length, schedule, optimizer, precision, layout, data, files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from amfm_foreign_states.megatron_arguments.table import Arguments, Line, approximated, line

SHAPES = {"minus_sqrt": "sqrt"}
DECAYS = {
    "cosine": "cosine",
    "constant": "constant",
    "inverse-square-root": "inverse_sqrt",
    "linear": "wsd",
    "WSD": "wsd",
}
RECIPES = {"blockwise": "fp8_block", "mxfp8": "mxfp8"}
SHARDED = {"optim": 1, "optim_grads": 2, "optim_grads_params": 3}
# Parts that are computed again there, and the blocks that are here.
PARTS = {
    "core_attn": "*",
    "mla_up_proj": "+",
    "moe": "E",
    "moe_act": "E",
    "shared_experts": "E",
    "mlp": "-",
    "mamba": "M",
}


def training_lines(given: Arguments, pattern: str) -> Iterator[Line]:
    """All but the model and what the table's `=` rows say."""
    yield from length_lines(given)
    yield from schedule_lines(given)
    yield from optimizer_lines(given)
    yield from precision_lines(given)
    yield from layout_lines(given, pattern)
    yield from memory_lines(given, pattern)
    yield from data_lines(given)
    yield from checkpoint_lines(given)


def in_steps(given: Arguments, kind: str) -> float | None:
    """Steps of `KIND_iters`, or of `KIND_samples` by the batch; None if neither was given. Whole where it is."""
    iters, samples = given[f"{kind}_iters"], given[f"{kind}_samples"]
    if iters:
        return int(iters)
    if not samples:
        return None
    return whole(samples / batch_of(given))


def batch_of(given: Arguments) -> int:
    """Rows per step."""
    if given["global_batch_size"]:
        return given.number("global_batch_size")
    sizes = [
        given[f"{axis}_size"] or 1 for axis in ("tensor_model_parallel", "context_parallel", "expert_tensor_parallel")
    ]
    ranks = (given["expert_model_parallel_size"] or 1) * sizes[2] // (sizes[0] * sizes[1])
    return int(given["micro_batch_size"] or 1) * max(1, ranks)


def whole(steps: float) -> float:
    """The same as an int where it is whole."""
    return int(steps) if steps == int(steps) else steps


def length_lines(given: Arguments) -> Iterator[Line]:
    """Steps and batches."""
    steps = in_steps(given, "train")
    if steps is not None:
        yield line("train.steps", -int(-steps // 1), "train_iters", "train_samples", "global_batch_size")
    if not given["global_batch_size"] and not given.is_record:
        note = "there micro_batch_size times data ranks"
        yield approximated("train.global_batch_size", batch_of(given), note, "global_batch_size")
    ramp = given["rampup_batch_size"]
    if ramp:
        start, increment, samples = (int(each) for each in ramp)
        sizes = range(start, batch_of(given), increment)
        count = sum(-(-samples // len(sizes) // size) for size in sizes) or 1
        for key, value in (("start_size", start), ("increment", increment), ("steps", count)):
            yield approximated(f"train.batch_ramp.{key}", value, "there in samples, here in steps", "rampup_batch_size")
    if given["exit_duration_in_mins"]:
        yield line("train.stop_after_minutes", given["exit_duration_in_mins"], "exit_duration_in_mins")
    if given["eval_iters"] == 0:
        yield line("train.validate_every_steps", None, "eval_iters")
        yield approximated("train.validation_batches", 1, "nothing is validated", "eval_iters")
    if given["iterations_to_skip"]:
        skipped = [[int(step), int(step)] for step in given["iterations_to_skip"]]
        yield line("data.skip_steps", skipped, "iterations_to_skip")


def schedule_lines(given: Arguments) -> Iterator[Line]:
    """The learning rate."""
    style, peak, steps = given["lr_decay_style"], given["lr"], in_steps(given, "train")
    if peak:
        yield line("schedule.min_ratio", (given["min_lr"] or 0.0) / peak, "min_lr", "lr")
    if style not in DECAYS:
        yield approximated("schedule.kind", "wsd", f"lr_decay_style={style} is not known", "lr_decay_style")
        return
    yield line("schedule.kind", DECAYS[style], "lr_decay_style")
    end = in_steps(given, "lr_decay") or steps
    warmup = in_steps(given, "lr_warmup") or 0
    names = ["lr_warmup_iters", "lr_warmup_samples"]
    if given["lr_warmup_fraction"] and end:
        warmup, names = whole(given["lr_warmup_fraction"] * end), ["lr_warmup_fraction"]
    yield line("schedule.warmup_steps", warmup, *names)
    if style in ("constant", "inverse-square-root") or end is None:
        return
    if end != steps:
        yield line("schedule.decay_end_step", end, "lr_decay_iters", "lr_decay_samples")
    if style == "linear" and end > warmup:
        yield line("schedule.decay_steps", whole(end - warmup), "lr_decay_style")
        yield line("schedule.decay_shape", "linear", "lr_decay_style")
    if style == "WSD":
        shape = given["lr_wsd_decay_style"]
        yield line("schedule.decay_shape", SHAPES.get(shape, shape), "lr_wsd_decay_style")
        decay = in_steps(given, "lr_wsd_decay")
        if decay:
            yield line("schedule.decay_steps", decay, "lr_wsd_decay_iters", "lr_wsd_decay_samples")


def optimizer_lines(given: Arguments) -> Iterator[Line]:
    """The update."""
    kind = given["optimizer"]
    is_muon = kind in ("muon", "dist_muon")
    if kind == "adam" or is_muon:
        yield line("optimizer.kind", "muon" if is_muon else "adamw", "optimizer")
    else:
        yield approximated("optimizer.kind", "adamw", f"optimizer={kind} is not there", "optimizer")
    if is_muon:
        yield line("optimizer.muon.momentum", given["muon_momentum"], "muon_momentum")
        yield line("optimizer.muon.rounds", given["muon_num_ns_steps"], "muon_num_ns_steps")
    first, last = given["start_weight_decay"], given["end_weight_decay"]
    if last is not None and first in (None, last):
        yield line("optimizer.weight_decay", last, "end_weight_decay")
    elif last is not None:
        yield approximated("optimizer.weight_decay", last, f"there from {first} on", "end_weight_decay")
    yield line("optimizer.clip_grad_norm", given["clip_grad"] or None, "clip_grad")
    if given["decoupled_lr"] and given["lr"]:
        for group in ("embedding", "head"):
            yield line(f"optimizer.rates.{group}", given["decoupled_lr"] / given["lr"], "decoupled_lr", "lr")
    if given["qk_clip"]:
        yield line("qk_clip.limit", given["qk_clip_threshold"], "qk_clip", "qk_clip_threshold")


def precision_lines(given: Arguments) -> Iterator[Line]:
    """Number formats."""
    if given["fp16"]:
        yield approximated("train.precision", "bf16", "fp16 is not there", "fp16")
    elif not given["bf16"] and (given["fp8"] or given["fp4"]):
        yield approximated("train.precision", "bf16", "products in few bits need it", "bf16")
    else:
        yield line("train.precision", "bf16" if given["bf16"] else "float32", "bf16")
    if given["fp4"]:
        yield line("low_precision.recipe", "nvfp4", "fp4", "fp4_recipe")
    elif given["fp8"]:
        recipe = given["fp8_recipe"] or "delayed"
        if recipe in RECIPES:
            yield line("low_precision.recipe", RECIPES[recipe], "fp8", "fp8_recipe")
        else:
            note = f"fp8_recipe={recipe} is not there"
            yield approximated("low_precision.recipe", "fp8_block", note, "fp8", "fp8_recipe")
    if not given["fp8"] and not given["fp4"]:
        return
    if given["first_last_layers_bf16"]:
        for ours, theirs in (("first", "start"), ("last", "end")):
            name = f"num_layers_at_{theirs}_in_bf16"
            yield line(f"low_precision.bf16_{ours}_layers", given[name], "first_last_layers_bf16", name)
    if not given["fp8_wgrad"]:
        yield line("low_precision.weight_gradient", "bf16", "fp8_wgrad")


def layout_lines(given: Arguments, pattern: str) -> Iterator[Line]:
    """How ranks share the work."""
    tensor = given["tensor_model_parallel_size"] or 1
    if tensor > 1:
        yield line("parallel.sequence_parallel", bool(given["sequence_parallel"]), "sequence_parallel")
    if "E" in pattern and (given["expert_model_parallel_size"] or 1) > 1:
        yield line(
            "parallel.expert_tensor", given["expert_tensor_parallel_size"] or tensor, "expert_tensor_parallel_size"
        )
    virtual = given["num_virtual_stages_per_pipeline_rank"]
    stages, parts = given["pipeline_model_parallel_size"] or 1, pattern.partition("/")[0].count("|") + 1
    if parts > stages and parts % stages == 0:
        virtual = parts // stages
    if virtual and virtual > 1:
        yield line("parallel.virtual_stages", virtual, "num_virtual_stages_per_pipeline_rank", "hybrid_layer_pattern")
        yield line("parallel.schedule", "interleaved", "num_virtual_stages_per_pipeline_rank")
    if given["use_megatron_fsdp"] or given["use_torch_fsdp2"]:
        yield sharding_line(given, pattern)
    if "E" in pattern and (given["expert_model_parallel_size"] or 1) > 1:
        yield from overlap_lines(given)
    if given.get("distributed_timeout_minutes"):
        yield line("train.timeout_seconds", 60 * given["distributed_timeout_minutes"], "distributed_timeout_minutes")


def overlap_lines(given: Arguments) -> Iterator[Line]:
    """What runs while tokens are sent to experts; two-batch overlap needs two sequences, and experts that are not recomputed."""
    setting, name = "parallel.overlap_experts", "overlap_moe_expert_parallel_comm"
    if given[name] and (given["micro_batch_size"] or 1) % 2 == 0 and not given["recompute_granularity"]:
        yield line(setting, "two_batch", name)
    elif given[name] or given["moe_shared_expert_overlap"]:
        note = "two_batch needs two sequences and no recomputation" if given[name] else ""
        yield Line(setting, value=True, names=(name, "moe_shared_expert_overlap"), note=note, is_approximate=bool(note))


def sharding_line(given: Arguments, pattern: str) -> Line:
    """What is spread over data ranks; weights are not, of experts that ranks share or of products in few bits."""
    names = ("use_megatron_fsdp", "use_torch_fsdp2", "data_parallel_sharding_strategy")
    stage = SHARDED.get(given["data_parallel_sharding_strategy"], 3)
    is_spread = "E" in pattern and (given["expert_model_parallel_size"] or 1) > 1
    if stage == 3 and (is_spread or given["fp8"] or given["fp4"]):
        return approximated("parallel.zero_stage", 2, "3 does not go with expert ranks and few bits", *names)
    return line("parallel.zero_stage", stage, *names)


def memory_lines(given: Arguments, pattern: str) -> Iterator[Line]:
    """What is computed again, and what a GPU replays."""
    kind, blocks = given["recompute_granularity"], ""
    if kind == "full":
        some = given["recompute_method"] == "block"
        note = f"there {given['recompute_num_layers']} layers of each stage" if some else ""
        yield Line("train.recompute", "full", ("recompute_granularity",), note, is_approximate=some)
    if kind == "selective":
        modules = given["recompute_modules"] or ["core_attn"]
        blocks = "".join(dict.fromkeys(PARTS.get(each, "") for each in modules if PARTS.get(each, "?") in pattern))
        if blocks:
            note = f"whole blocks here, parts there ({' '.join(modules)})"
            yield approximated("train.recompute", "selective", note, "recompute_granularity", "recompute_modules")
            yield approximated("train.recompute_blocks", blocks, note, "recompute_modules")
    impl = given["cuda_graph_impl"] or "none"
    names = ("pipeline_model_parallel_size", "context_parallel_size")
    layout = {each.setting: each.value for each in layout_lines(given, pattern)}
    other = [
        *(["only with data, tensor and expert ranks"] if max(given[name] or 1 for name in names) > 1 else ()),
        *(["only without recomputation"] if kind == "full" or blocks else ()),
        *(["only in high precision"] if given["fp8"] or given["fp4"] else ()),
        *(["only without two-batch overlap"] if layout.get("parallel.overlap_experts") == "two_batch" else ()),
        *(["only with ZeRO 1"] if layout.get("parallel.zero_stage", 1) != 1 else ()),
    ]
    if impl != "none" and other:
        yield approximated("train.cuda_graphs", "none", f"graphs are there {' and '.join(other)}", "cuda_graph_impl")
    elif impl != "none":
        yield line("train.cuda_graphs", "blocks", "cuda_graph_impl")


def data_lines(given: Arguments) -> Iterator[Line]:
    """Sources, held-out documents, borders of documents."""
    paths = given["data_path"] or given["train_data_path"]
    paths = paths.split() if isinstance(paths, str) else list(paths or ())
    if paths:
        yield line("data.sources", read_sources(paths), "data_path")
    if given["tokenizer_type"] == "NullTokenizer" and given["vocab_size"]:
        yield line("data.tokenizer.eos_token", int(given["vocab_size"]), "tokenizer_type", "vocab_size")
    split = given["split"] if given["data_path"] else given.get("split")
    shares = re.findall(r"[\d.]+", split)[:3] if isinstance(split, str) else []
    if any(float(share) for share in shares):
        yield line("data.megatron_split", ",".join(shares), "split")
    masked = bool(given["reset_attention_mask"] or given["dataloader_inter_document_masking"])
    partly = not masked and bool(given["reset_position_ids"] or given["eod_mask_loss"])
    note = "positions and the loss at borders are reset only with the mask" if partly else ""
    names = ("reset_attention_mask", "reset_position_ids", "eod_mask_loss", "dataloader_inter_document_masking")
    yield Line("data.mask_document_boundaries", masked, names, note, is_approximate=partly)


def read_sources(words: list[Any]) -> list[dict[str, Any]]:
    """Sources of `--data-path`: prefixes, or a weight before each."""
    texts = [str(word) for word in words]
    weighted = len(texts) > 1 and all(re.fullmatch(r"[\d.eE+-]+", each) for each in texts[0::2])
    pairs = list(zip(map(float, texts[0::2]), texts[1::2])) if weighted else [(1.0, each) for each in texts]
    sources: list[dict[str, Any]] = []
    for weight, prefix in pairs:
        base = re.sub(r"[^A-Za-z0-9_.-]", "_", PurePosixPath(prefix).name.removesuffix(".idx")).strip("._") or "source"
        name = base if all(base != source["name"] for source in sources) else f"{base}_{len(sources)}"
        sources.append({"name": name, "paths": [prefix.removesuffix(".idx") + ".idx"], "weight": weight})
    return sources


def checkpoint_lines(given: Arguments) -> Iterator[Line]:
    """Which checkpoints stay: there all, unless told."""
    place = given["save"] or given["load"]
    if place:
        yield line("run.dir", str(place), "save", "load")
    most, interval = given["most_recent_k"], given["save_interval"]
    if most and most > 0:
        yield line("train.keep_last", most, "most_recent_k")
    elif interval and not given["save_retain_interval"]:
        yield line("train.keep_every_steps", interval, "most_recent_k")
