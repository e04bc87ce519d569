"""Rules of resuming: what may differ between a checkpoint and the run that resumes from it; everything else is rejected.

A resumed run should be the run that was interrupted. Where it runs, how it is spread over ranks,
with which kernels, and what it reports may differ. So may what is checked elsewhere: data by the loader's state, stages by
`stage_faults`. The list names what is allowed, not what is rejected, so that a new setting is rejected until someone has
decided that it is harmless.

Reports when a resume would raise the learning rate again: a longer run spreads its schedule over more steps.

Who extends a finished run wants to keep what it learned in its decay. Under more steps the decay begins later, so the next
step would have a rate that the run had left behind. From the checkpoint before the decay it continues as a run of so
many steps.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from amfm.pretrain.checkpoint.manifest_file import step_of
from amfm.pretrain.config.fields import flatten_settings
from amfm.pretrain.config.saved import read_saved_config
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.stages import RunStage, last_stage, resolve_stages, total_steps

TOLERANCE = 1e-6  # relative; nearer rates are the same number, computed another way


def describe_raised_rate(saved: RunConfig, current: RunConfig, step: int, checkpoints: Sequence[Path]) -> str | None:
    """Report that the step after `step`, which is done, has a higher rate than it by a changed schedule, and where to
    go back to.

    None if the schedule gives step `step` the rate that it had, or a lower one. checkpoints: of the run, newest first.
    """
    if step == 0:
        return None
    before, now = (last_stage(resolve_stages(config), step) for config in (saved, current))
    next_step = min(step + 1, now.last_step)
    if min(now.rate(step), now.rate(next_step)) <= before.rate(step) * (1 + TOLERANCE):
        return None
    said = (
        f"over {now.num_steps:,} steps the schedule raises the learning rate again: step {next_step:,} runs at "
        f"{now.rate(next_step):.1e}, step {step:,} ran at {before.rate(step):.1e}"
    )
    for path in checkpoints:
        older = step_of(path)
        if before.first_step < older < step and math.isclose(now.rate(older), before.rate(older), rel_tol=TOLERANCE):
            return (
                f"{said}. To continue from where the old schedule and the new one agree, at step {older:,}: stop this, and amfm rollback "
                f"{path.parent.parent} --to {older}. To keep the rate low, append a stage with its own learning_rate"
            )
    return f"{said}, and no older checkpoint has the same rate under both. To keep it low, append a stage with its own learning_rate"


# Settings that a resumed run may change: where it runs, how it is spread, what it reports and when it saves. A name
# ending in ".*" allows a whole section. docs/checkpoints.md says why for each; everything else is rejected.
MAY_CHANGE = (
    "run.*",
    "ema",
    "ema.*",
    "evaluate.*",
    "export.*",
    "health.*",
    "kernels.*",
    "launch.*",
    "low_precision.*",
    "parallel.*",
    "plugins",
    "stages.*",
    "validation.*",
    "train.steps",
    "train.stop_after_steps",
    "train.stop_after_minutes",
    "train.micro_batch_size",
    "train.checkpoint_every_steps",
    "train.checkpoint_in_background",
    "train.keep_last",
    "train.checkpoint_store",
    "train.resume_step",
    "train.keep_every_steps",
    "train.replica_every_steps",
    "train.replica_folder",
    "train.precision",
    "train.validate_every_steps",
    "train.validation_batches",
    "train.log_every_steps",
    "train.inspect_every_steps",
    "train.timeout_seconds",
    "train.max_skipped_steps",
    "train.compile",
    "train.recompute",
    "train.recompute_blocks",
    "train.gradient_sums",
    "train.cuda_graphs",
    "train.num_threads",
    "train.profile",
    "train.profile.*",
    "train.deterministic",
    "data.store",
    "data.cache.*",
    "data.sources.*",
    "data.phases.*",
    "data.skip",
    "data.skip_steps",
    "data.num_workers",
    "data.on_corruption",
    "data.prepare.*",
    "data.tokenizer.*",
)
# Rejected as such, and yet a run can change them: in a stage that has not begun.
STAGED = ("optimizer.learning_rate", "schedule.", "train.global_batch_size", "train.sequence_length")
# An identity that may change: the data state rejects other text or weights for what was read, and lets sources join.
GUARDED_BY_DATA_STATE = "dataset"


def digest_config(config: RunConfig) -> str:
    """Hash the resolved configuration: SHA-256 of its JSON with sorted keys, so that the order in a file does not count."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def may_change(name: str) -> bool:
    """Whether a resumed run may set this dotted name to another value."""
    return any(
        name == allowed.removesuffix(".*") or (allowed.endswith(".*") and name.startswith(allowed.removesuffix("*")))
        for allowed in MAY_CHANGE
    )


def understand_config(manifest: dict[str, Any]) -> RunConfig:
    """Read a checkpoint's configuration, with the defaults of fields that were added after it was saved.

    Raises ValueError when this program no longer understands it, or lacks a package that it needs.
    """
    try:
        return read_saved_config(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ValueError(
            f"the checkpoint was saved with a configuration that this version does not understand: {name}: "
            f"{first['msg']}; resume it with the version that wrote it"
        ) from error


def compare_settings(saved: dict[str, Any], current: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Compare settings: dotted names whose values differ -> (saved, current); a missing one shows as None."""
    before, now = flatten_settings(saved), flatten_settings(current)
    names = sorted(before.keys() | now.keys())
    return {name: (before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)}


def stage_faults(saved: RunConfig, current: RunConfig, steps_done: int) -> list[str]:
    """List how stages that have begun differ: a finished one must stay as it was, the present one may move its end.

    Names and layouts are free. Stages that have not begun may change at will.
    """
    begun = [stage for stage in resolve_stages(saved) if stage.first_step < steps_done]
    now = resolve_stages(current)
    faults = []
    for before, after in zip_longest(begun, now[: len(begun)]):
        if after is None:
            faults.append(f"stages.{before.index}: the checkpoint has {before.name}, this run ends before it")
            continue
        old, new = kept_settings(before), kept_settings(after)
        for name in old:
            if old[name] != new[name] and not (name == "num_steps" and before is begun[-1]):
                faults.append(
                    f"stages.{before.index} ({before.name}): {name}: the checkpoint has {old[name]!r}, this run has "
                    f"{new[name]!r}"
                )
    return faults


def kept_settings(stage: RunStage) -> dict[str, Any]:
    """What a stage that has begun must keep, by name."""
    attention = stage.config.model.attention
    return {
        "first_step": stage.first_step,
        "num_steps": stage.num_steps,
        "first_sample": stage.first_sample,
        "sequence_length": stage.train.sequence_length,
        "global_batch_size": stage.train.global_batch_size,
        "peak": stage.config.optimizer.learning_rate,
        "schedule": stage.config.schedule,
        "rope": attention.rope if attention is not None else None,
        "indexer": stage.indexer,
        "weights": stage.weights,
        "ramp": stage.train.batch_ramp,
    }


def end_faults(saved: RunConfig, current: RunConfig, steps_done: int) -> list[str]:
    """Report that the run, or the stage under way, would end before the step that the checkpoint has reached."""
    stop = current.train.stop_after_steps
    if stop is not None and stop < steps_done:
        return [
            f"train.stop_after_steps ends this start at step {stop}, and the checkpoint has done {steps_done} (raise it, or leave it out)"
        ]
    begun = [stage for stage in resolve_stages(saved) if stage.first_step < steps_done]
    now = resolve_stages(current)
    if not begun or len(now) < len(begun) or now[len(begun) - 1].last_step >= steps_done:
        return []
    where = f"stages.{len(begun) - 1} ends" if current.stages else "train.steps ends the run"
    return [f"{where} at step {now[len(begun) - 1].last_step}, and the checkpoint has done {steps_done}"]


def guide_faults(saved: RunConfig, current: RunConfig) -> list[str]:
    """Report that another number of steps would move the end of the guides, which fade over a share of all steps."""
    guide = saved.model.self_guided_training
    if guide is None or current.model.self_guided_training is None:
        return []
    before, now = guide.last_step(total_steps(saved)), guide.last_step(total_steps(current))
    if before == now:
        return []
    return [f"model.self_guided_training: the checkpoint's guides end after step {before}, this run's after step {now}"]


def explain_remedy(refused: Sequence[str], saved: RunConfig, step: int) -> str:
    """Report how to continue: with the old value, in its own stage where that can be, or as a new run."""
    remedy = "Restore the value, or give run.dir another name to start a new run."
    if any(name.startswith("optimizer.kind:") for name in refused):
        remedy += (
            " One kind of optimizer cannot continue from the other's moments: a new run takes only the weights, with "
            "run.initial_weights set to this run's directory."
        )
    if any(name.startswith("optimizer.state_dtype:") for name in refused):
        remedy += (
            " Rounding states on the way would be another run: one takes only the weights, with run.initial_weights."
        )
    if not any(name.startswith(STAGED) for name in refused):
        return remedy
    if saved.stages:
        how = f"let the present stage end at step {step} and append one with its own value"
    else:
        how = (
            f"remove train.steps and declare stages: [{{name: before, steps: {step}}}, {{name: after, steps: N, "
            "learning_rate: ...}]"
        )
    return (
        f"{remedy} To change learning rate, schedule, batch or sequence length on the way, leave these settings as they were, "
        f"{how} (docs/getting_started.md, stages)."
    )


def check_resumable(manifest: dict[str, Any], config: RunConfig, identities: dict[str, str]) -> tuple[str, ...]:
    """Refuse to resume from a checkpoint of another run; return the allowed changes as sentences for the event log.

    Raises ValueError naming each rejected setting or identity (dataset, tokenizer) with both values.
    """
    refused, changes = [], []
    for name in sorted(manifest["identities"].keys() | identities.keys()):
        saved, given = manifest["identities"].get(name), identities.get(name)
        if saved != given and name == GUARDED_BY_DATA_STATE:
            changes.append(f"{name}: {saved!r} -> {given!r}")
        elif saved != given:
            refused.append(f"{name}: the checkpoint has {saved}, this run has {given}")
    # Defaults first: a field that is newer than the checkpoint differs only where this run sets it.
    saved_config = understand_config(manifest)
    if saved_config.stages or config.stages:
        refused += stage_faults(saved_config, config, int(manifest["step"]))
    refused += end_faults(saved_config, config, int(manifest["step"]))
    differences = compare_settings(saved_config.model_dump(mode="json"), config.model_dump(mode="json"))
    for name, (saved, given) in differences.items():
        if may_change(name):
            changes.append(f"{name}: {saved!r} -> {given!r}")
        else:
            refused.append(f"{name}: the checkpoint has {saved!r}, this run has {given!r}")
    refused += guide_faults(saved_config, config)
    if refused:
        raise ValueError(
            f"cannot resume step {manifest['step']}: "
            + "; ".join(refused)
            + f". {explain_remedy(refused, saved_config, int(manifest['step']))}"
        )
    return tuple(changes)
