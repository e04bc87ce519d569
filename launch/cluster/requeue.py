"""Whether a job of Slurm is queued again when its launcher ends: where a signal stopped the run, and steps are left.

By the newest checkpoint and by the events that came while this launcher ran, and not by the log of metrics, which others may
rotate. A run that was told to stop at a step (`train.stop_after_steps`) has ended.
"""

from __future__ import annotations

from pathlib import Path

from amfm.launch.cluster.controller import ask, describe, name_job
from amfm.launch.cluster.slurm import Allocation
from amfm.launch.console import say
from amfm.pretrain.checkpoint.names import newest_saved_step
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.launcher_protocol import DONE, last_word
from amfm.pretrain.stages import resolve_stages


def queue_rest(config: RunConfig, allocation: Allocation, code: int) -> int:
    """Queue the job again where a signal, or Slurm, stopped a run that has steps left; returns the launcher's exit code.

    code: of the attempts. Raises RuntimeError when Slurm rejects.
    """
    is_ending, word = allocation.is_ending(), last_word(Path(config.run.dir), allocation.num_events)
    is_finished = newest_saved_step(config.run.dir) >= resolve_stages(config)[-1].last_step
    # Ranks that the time limit's signal ended badly (while they loaded, or in a collective) continue in the next job too.
    is_stopped = is_ending or allocation.was_signalled or allocation.is_lost() or (code == DONE and word == "signal")
    if not config.launch.slurm.requeue or word == "end" or is_finished or not is_stopped:
        return code
    reason = "the job's time" if is_ending else "a signal"
    if allocation.is_lost():
        reason = "Slurm, which starts no more steps in this job,"
    fields = describe("job", name_job())
    if fields.get("BatchFlag") == "0":
        say(
            f"amfm launch: {reason} ended the run before its last step; the same command continues it in another allocation"
        )
        return code
    if fields.get("JobState") == "RUNNING":  # else Slurm has cancelled the job, or queued it itself
        say(f"amfm launch: {reason} ended the run before its last step; the job is queued again")
        ask("scontrol", "requeue", name_job())
    return code
