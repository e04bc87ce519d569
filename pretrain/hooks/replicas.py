"""Replicas in the memory of the nodes, as `train.replica_every_steps` asks for them (checkpoint/replicas/)."""

from __future__ import annotations

from amfm.pretrain.checkpoint.replicas.memory import NodeMemory
from amfm.pretrain.hook import Hook
from amfm.pretrain.run import Run
from amfm.pretrain.saving import collect_state, record_begun


class Replicas(Hook):
    """Writes one where the newest checkpoint or replica is old enough; removes them when the run ended in order."""

    def __init__(self, run: Run, memory: NodeMemory, every_steps: int) -> None:
        self.run, self.memory, self.every_steps = run, memory, every_steps
        self.newest_step = 0

    def at_start(self) -> None:
        """Report what was found in memory, and what is kept there."""
        for text in self.memory.describe():
            self.run.tell("replicas", f"replicas: {text}", text=text)

    def between_saves(self) -> None:
        """Start a replica if it is due.

        Nothing is being written, or steps would wait for a checkpoint on a slow disk.
        """
        step = self.run.progress.step
        if step - max(self.run.saved_step or 0, self.newest_step) < self.every_steps:
            return
        finished = self.run.saver.replicate(step, **collect_state(self.run))
        self.newest_step = step
        record_begun(self.run, finished)

    def at_end(self) -> None:
        """Remove them: what is to continue is on the disk."""
        for remark in self.memory.clear():
            self.run.say(f"warning: {remark}")


def build_replicas(run: Run) -> list[Hook]:
    """The hook, where the run asks for it."""
    memory, every = run.saver.replicas, run.config.train.replica_every_steps
    return [] if memory is None or every is None else [Replicas(run, memory, every)]
