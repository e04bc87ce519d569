"""Where ranks must be rebuilt inside a run: the next stage has its own layout, or the guides are gone."""

from __future__ import annotations

from amfm.pretrain.checks.ranks import describe_parallel
from amfm.pretrain.run import Run
from amfm.pretrain.stages import Built, stage_of


def needed_now(run: Run) -> Built:
    """What the next step is to be built by."""
    return Built.for_step_after(run.progress.step, run.config, run.stages)


def announce_fresh_start(run: Run) -> None:
    """Record and say that the ranks restart for the next step, and why; everything is saved."""
    saved, needed = f"saved at step {run.progress.step}", needed_now(run)
    if needed.parallel == run.built.parallel:
        run.tell("guide_removed", f"{saved}: the factored matrices continue without guides; ranks restart")
        return
    stage = stage_of(run.stages, run.progress.step)
    run.tell(
        "next_layout",
        f"{saved}: stage {stage.name} has its own layout, {describe_parallel(needed.parallel)}; its ranks restart",
        stage=stage.name,
        parallel=needed.parallel.model_dump(mode="json"),
    )
