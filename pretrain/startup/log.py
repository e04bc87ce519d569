"""Open the log of a run: what it is, where it begins, and everything that the start has to say.

Where the steps of a start come from: hosts, job, code, versions and configuration, as its event `start` records them.

The configuration is kept too, under its digest: config.yaml is only that of the newest start, and checkpoints, which carry
theirs, are pruned.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from amfm.data_pipeline.durable.files import make_folders, write_file_atomically
from amfm.model.config.pattern import explain_d
from amfm.model.flops import count_parameters, flops_per_token
from amfm.pretrain.checkpoint.compatibility import digest_config
from amfm.pretrain.checkpoint.load import LoadedCheckpoint
from amfm.pretrain.config.file import resolved_yaml
from amfm.pretrain.launcher_protocol import FRESH_START_EVENTS, RESTART_CAUSE, TORCHRUN_RESTARTS, read_events
from amfm.pretrain.monitor.anomalies import describe_unbalanced
from amfm.pretrain.monitor.environment import record_environment
from amfm.pretrain.monitor.live import Display
from amfm.pretrain.monitor.metrics import RunLog
from amfm.pretrain.monitor.panel import plural
from amfm.pretrain.packages import OWN_CODE, collect_versions
from amfm.pretrain.parallel import describe_environment
from amfm.pretrain.ranks.group import RankGroup
from amfm.pretrain.run import Run
from amfm.pretrain.startup.data import check_tokenizer

FOLDER = "starts"  # of configurations, below the run directory
JOB = (
    *("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"),
    *("TORCHELASTIC_RUN_ID", "RAY_JOB_ID", "JOBSET_NAME", "PBS_JOBID", "LSB_JOBID"),
)


def gather_hosts(ranks: RankGroup) -> dict[str, str]:
    """Ranks of each host, such as `0-7`, hosts in the order of their ranks. All ranks must call it."""
    own = {socket.gethostname(): [ranks.rank]}

    def join(known: dict[str, list[int]], more: dict[str, list[int]]) -> dict[str, list[int]]:
        return {host: [*known.get(host, []), *more.get(host, [])] for host in {**known, **more}}

    found = {host: sorted(members) for host, members in ranks.merge(own, join).items()}
    return {host: in_ranges(found[host]) for host in sorted(found, key=lambda host: found[host][0])}


def in_ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers in short: 0, 1, 2, 5 as `0-2,5`."""
    ends = [place for place, (one, other) in enumerate(pairwise(numbers), 1) if other != one + 1]
    parts = [numbers[begin:end] for begin, end in zip([0, *ends], [*ends, len(numbers)])]
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def describe_origin(run: Run, text: str) -> dict[str, Any]:
    """Keep the configuration of this start, `text`, and give what its event records of it, besides the hosts. Main rank only."""
    digest = digest_config(run.config)
    kept = run.directory / FOLDER / f"config-{digest[:12]}.yaml"
    make_folders(kept.parent)
    write_file_atomically(kept, text.encode())
    versions = collect_versions()
    return {
        "job": describe_environment(JOB),
        "code": versions.pop(OWN_CODE),
        "versions": versions,
        "config_sha256": digest,
        "config": f"{FOLDER}/{kept.name}",
    }


def open_log(run: Run, loaded: LoadedCheckpoint | None, origin: dict[str, Any]) -> None:
    """Write configuration and environment, open log and display, and report how the run begins. Main rank only.

    Drops lines of metrics.jsonl beyond the step that the run resumes from. Everything that loading passed over, warned
    of or found changed goes to the events too. origin: what else the event of the start records.
    """
    from amfm.pretrain.startup import arithmetic  # of the main rank only

    counts = count_parameters(run.model.config)
    length = run.stage.train.sequence_length
    facts = {
        "pattern": run.model.pattern.canonical(),
        "parameters": counts.total,
        "active_parameters": counts.active,
        "flops_per_token": sum(flops_per_token(run.model.config, length).values()),
        "by_kind": arithmetic.describe_kinds(run.config),
        "kernels": run.model.backend,
    } | arithmetic.describe_products(run.config)
    changed_kernels = arithmetic.kernel_changes(run.directory, run.model.backend)
    environment = record_environment(run.parallel, run.peak, facts, keeps_freed_memory=run.keeps_freed_memory)
    # Whole or as they were: a full disk or a kill must not take from a run what it is.
    text = resolved_yaml(run.config)
    write_file_atomically(run.directory / "config.yaml", text.encode())
    write_file_atomically(run.directory / "environment.json", json.dumps(environment, indent=2).encode() + b"\n")
    keep_released(run)
    check_tokenizer(run.config, keeps=True)
    last_event = find_last_event(run.directory)
    run.files.log = log = RunLog(run.config, resumed_at_step=run.progress.step)
    device = run.parallel.device.type
    run.files.display = Display(
        run.config, first_step=run.progress.step, last_step=run.last_step, shows_mfu=device != "cpu"
    )
    run.signals.answer = run.files.display.answer_interrupt
    run.say(
        f"{facts['pattern']}: {counts.total:,} parameters ({counts.active:,} active), {run.config.train.precision}, "
        f"ZeRO {run.engine.zero_stage}, {plural(run.parallel.world_size, 'rank')} on {device} with "
        f"{plural(torch.get_num_threads(), 'thread')}, {arithmetic.describe_kernels(run.config, run.model.backend)}, "
        f"{run.stage.train.global_batch_size} x {length} tokens per step"
    )
    for remark in run.loader.describe_repeats(run.stages[-1].first_sample + run.stages[-1].num_samples()):
        run.say(remark)
    if log.cut.damaged:
        run.say(f"metrics.jsonl: {plural(log.cut.damaged, 'line')} truncated or damaged, left out")
    run.record_event(
        "start",
        world_size=run.parallel.world_size,
        device=device,
        resumed_from=loaded and loaded.path.name,
        **log.cut.facts(),
        **describe_origin(run, text),
        **origin,
    )
    for event, text in run.remarks:
        run.tell(event, text, text=text)
    warn_of_model(run)
    cause = find_restart_cause(describe_environment([RESTART_CAUSE, TORCHRUN_RESTARTS]), last_event)
    if cause is not None:
        run.record_event("restarted", cause=cause)
    for hook in run.hooks:
        hook.at_start()
    if loaded is not None:
        report_resumed(run, loaded, changed_kernels)


def warn_of_model(run: Run) -> None:
    """Report settings of the model that train and that may not be meant. Main rank only."""
    ambiguous = explain_d(run.config.model.pattern)
    if ambiguous is not None:
        run.tell("pattern", f"warning: {ambiguous}", text=ambiguous)
    unbalanced = describe_unbalanced(run.config.model)
    if unbalanced is not None:
        run.tell("unbalanced_experts", f"warning: {unbalanced}", text=unbalanced)
    if run.config.low_precision.recipe != "none":
        from amfm.pretrain.checks.low_precision import warn_of_recipe

        warning = warn_of_recipe(run.config.low_precision)
        if warning is not None:
            run.tell("low_precision", f"warning: {warning}", text=warning)
    if run.config.export.target == "auto":
        from amfm.model.huggingface.classes import unfit_for_all

        for reason in unfit_for_all(run.config.model):
            run.say(f"this model trains, and amfm export will reject it: {reason}")


def report_resumed(run: Run, loaded: LoadedCheckpoint, changed_kernels: Sequence[str]) -> None:
    """Report which checkpoint the run continues, and everything that loading passed over or found changed. Main rank only."""
    if loaded.fetched is not None:
        store = run.config.train.checkpoint_store
        run.tell("fetched", f"{loaded.fetched} was fetched from {store}", checkpoint=loaded.fetched, store=store)
    run.say(f"resumed from {loaded.path} at step {loaded.step}")
    if loaded.step >= run.num_steps:
        run.say("already finished: to continue, raise train.steps or declare another stage")
    remarks = {
        "passed over": loaded.skipped,
        "warning": loaded.warnings,
        "changed since the checkpoint": (*loaded.changes, *changed_kernels),
    }
    for kind, texts in remarks.items():
        for text in texts:
            run.tell("resume", f"{kind}: {text}", kind=kind, text=text)


def keep_released(run: Run) -> None:
    """Copy what the released model that a run continues brings into its directory, for the export."""
    path = run.config.run.initial_weights
    if path is None:
        return
    from amfm.pretrain.inference.released import FILE as RELEASED
    from amfm.pretrain.inference.released import find_released

    if (run.directory / RELEASED).is_file():
        return
    found = find_released(Path(path))
    if found is not None:
        write_file_atomically(run.directory / RELEASED, found.to_bytes())


def find_last_event(directory: Path) -> str | None:
    """The newest event of a run directory; None if there is none."""
    events = [event.get("event") for event in read_events(directory)]
    return events[-1] if events else None


def find_restart_cause(environment: Mapping[str, str], last_event: str | None = None) -> str | None:
    """Why the ranks were started again: as `amfm launch` says, or torchrun's number of the restart.

    None if nothing failed.

    torchrun counts a start in the layout of the next stage, the run's last event then, as a restart too.
    """
    if RESTART_CAUSE in environment or last_event in FRESH_START_EVENTS:
        return environment.get(RESTART_CAUSE)
    number = environment.get(TORCHRUN_RESTARTS, "0")
    return f"torchrun started its ranks again, restart {number}" if number != "0" else None
