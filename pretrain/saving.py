"""Save a run, resume it, and put back the weights of its newest checkpoint."""

from __future__ import annotations

from dataclasses import asdict

from pretrain.checkpoint.commit import SavedCheckpoint
from pretrain.checkpoint.load import LoadedCheckpoint, load_newest
from pretrain.run import Progress, Run


def resume(run: Run) -> LoadedCheckpoint | None:
    """Continue from the newest checkpoint that verifies, if there is one. Every rank must call this."""
    loaded = load_newest(run.directory / "checkpoints", run.saver.layout, config=run.config, identities=run.identities)
    if loaded is not None:
        run.loader.load_state_dict(loaded.state["loader"])
        run.progress = Progress(**loaded.state["progress"])
        run.saved_step = loaded.step
    return loaded


def restore_newest_weights(run: Run) -> int | None:
    """Put weights and optimizer back to the newest checkpoint, which may be being written; its step, None without one.

    Progress and data stay where they are. Every rank must call this.
    """
    finish_saving(run)
    loaded = load_newest(run.directory / "checkpoints", run.saver.layout, config=run.config, identities=run.identities)
    if loaded is None:
        return None
    run.progress.skipped_steps += run.progress.step - loaded.step
    run.progress.skipped_in_row = 0
    is_same_stage = loaded.step > run.stage.first_step
    run.progress.recent_losses = Progress(**loaded.state["progress"]).recent_losses if is_same_stage else []
    run.saved_step = None
    return loaded.step


def save(run: Run) -> None:
    """Begin to write a checkpoint of the current step boundary, once; its event follows when it stands.

    Every rank must call this. Raises RuntimeError when the save before failed.
    """
    if run.saved_step == run.progress.step:
        return
    run.heartbeat.at(run.progress.step, "save")
    if run.log is not None:
        run.log.sync()
    loader_state = run.loader.state_dict()
    # The cursor is the same everywhere; what a rank left out because it was damaged is its own.
    damages = [entry for entries in run.parallel.gather_objects(loader_state["quarantined"]) for entry in entries]
    loader_state["quarantined"] = sorted(damages)
    finished = run.saver.save(
        run.directory / "checkpoints",
        run.progress.step,
        state={"progress": asdict(run.progress), "loader": loader_state},
        config=run.config,
        identities=run.identities,
        keep_last=run.config.train.keep_last,
    )
    run.saved_step = run.progress.step
    record_saved(run, finished)
    if not run.config.train.checkpoint_in_background:
        finish_saving(run)


def finish_saving(run: Run) -> None:
    """Wait until the checkpoint that is being written stands. Every rank must call this; RuntimeError if it failed."""
    finished = run.saver.wait()
    record_saved(run, finished)


def record_saved(run: Run, saved: SavedCheckpoint | None) -> None:
    """Write down a checkpoint that stands, and what can't be cleared away around it."""
    if saved is None:
        return
    remarks = {"remarks": list(saved.remarks)} if saved.remarks else {}
    run.record_event("checkpoint", path=saved.name, **remarks)
    for remark in saved.remarks:
        run.say(f"warning: {remark}")
