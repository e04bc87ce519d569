"""The hooks of a run, in the order in which they are called.

The hooks that a section asks for, ours and those of packages, are from one table (config/hook_registry.py). The two of `train`
that are a few lines are here: replicas in the memory of the nodes, and the end of a start after some minutes.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from amfm.pretrain.checkpoint.replicas.memory import NodeMemory
from amfm.pretrain.config.hook_registry import BUILT_IN, HookSpec, hook_specs
from amfm.pretrain.failures import describe, describe_exit
from amfm.pretrain.hook import Hook, HookMaker
from amfm.pretrain.hooks.metrics import Experts, Metrics, Stragglers
from amfm.pretrain.hooks.validate import Validations
from amfm.pretrain.run import Run
from amfm.pretrain.saving import collect_state, record_begun
from amfm.pretrain.step_sums import StepResult

if TYPE_CHECKING:
    from amfm.pretrain.tasks.suite import TaskSuite


MOMENTS = tuple(name for name in vars(Hook) if not name.startswith("_"))


def build_table(run: Run, makers: Sequence[HookMaker]) -> list[Hook]:
    """Build the hooks whose sections are there, ours first, then those of `makers`. Every rank must call this."""
    own = [(spec, getattr(run.config, spec.name)) for spec in BUILT_IN]
    others = [(spec, getattr(run.config.hooks, spec.name)) for spec in hook_specs().values()]
    hooks: list[Hook] = [spec.load()(options, run) for spec, options in own if options is not None]
    packages = run.config.hooks.packages
    hooks += [make(run) for make in makers]
    return hooks + [
        OfPackage(spec, packages[spec.name], options, run) for spec, options in others if options is not None
    ]


class OfPackage(Hook):
    """A hook of an installed package: an error in one of its moments names it, the moment and the package."""

    def __init__(self, spec: HookSpec, package: str, options: Any, run: Run) -> None:
        self.words = f"the hook {spec.name} of {package}"
        with Blame(f"{self.words} cannot be built"):
            self.hook = spec.load()(options, run)
            if not isinstance(self.hook, Hook):
                raise TypeError(f"{spec.hook} is not a subclass of amfm.pretrain.hook.Hook")
        for moment in MOMENTS:
            setattr(self, moment, partial(self._call, moment))

    def _call(self, moment: str, *arguments: Any) -> None:
        with Blame(f"{self.words} failed in {moment}"):
            getattr(self.hook, moment)(*arguments)


class Blame:
    """As a context: an error inside becomes a RuntimeError that begins with these words.

    Its own traceback stays with it.
    """

    def __init__(self, words: str) -> None:
        self.words = words

    def __enter__(self) -> None:
        """Nothing happened yet."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        cause = None
        if isinstance(error, SystemExit):
            cause = describe_exit(error)
        elif isinstance(error, Exception):
            cause = f"{type(error).__name__}: {describe(error)}"
        if cause is not None:
            raise RuntimeError(f"{self.words}: {cause}") from error


def build_hooks(run: Run, suite: TaskSuite | None, makers: Sequence[HookMaker] = ()) -> tuple[Hook, ...]:
    """Build what the run does besides training. Every rank must call this.

    Those that edit master weights come first, so that all others see the weights of the next step; the log comes after all that
    add to its line. suite: the tasks of `evaluate`, only on the main rank. makers: of a program's own hooks.
    """
    tasks: list[Hook] = []
    graphs: list[Hook] = []
    if run.config.evaluate.tasks:
        from amfm.pretrain.hooks.tasks import Tasks

        tasks.append(Tasks(run, suite))
    if run.config.train.cuda_graphs == "blocks":
        from amfm.pretrain.hooks.cuda_graphs import CudaGraphs

        graphs.append(CudaGraphs(run))
    quantized: list[Hook] = []
    if run.config.low_precision.recipe != "none" or run.config.low_precision.quantize_weights == "each_step":
        from amfm.pretrain.hooks.quantization import build_kept_weights, build_quantization

        quantized += [*build_quantization(run), *build_kept_weights(run)]
    states: list[Hook] = []
    if run.config.health.check_state_every_steps is not None:
        from amfm.pretrain.hooks.state_watch import StateWatchHook

        states.append(StateWatchHook(run, run.config.health.check_state_every_steps))
    validations, sets = Validations(run), list[Hook]()
    if run.config.validation:
        from amfm.pretrain.hooks.validation_sets import ValidationSets

        sets.append(ValidationSets(run))
    if run.config.evaluate.merge_last is not None:
        from amfm.pretrain.hooks.weight_averages import MergedValidation

        sets.append(MergedValidation(run, validations, run.config.evaluate.merge_last))
    if run.config.evaluate.prompts:
        from amfm.pretrain.hooks.tasks import Samples

        sets.append(Samples(run))
    if run.config.health.spike_sigma is not None:
        from amfm.pretrain.hooks.lost_losses import Spikes

        sets.append(Spikes(run, run.config.health.spike_sigma))
    if run.config.train.inspect_every_steps is not None:
        from amfm.pretrain.hooks.inspection import Inspection

        sets.append(Inspection(run, run.config.train.inspect_every_steps))
    if run.config.train.stop_after_minutes is not None:
        sets.append(TimeLimit(run, run.config.train.stop_after_minutes))
    if run.parallel.device.type == "cuda":
        from amfm.pretrain.hooks.energy import Energy

        sets.append(Energy(run))
    from amfm.pretrain.hooks.lost_losses import Divergence, FirstNonfinite

    watched = [
        FirstNonfinite(run),
        Divergence(run),
        *states,
        *quantized,
        validations,
        *sets,
        *tasks,
    ]
    return (
        *build_table(run, makers),
        *watched,
        *graphs,
        Metrics(run),
        Stragglers(run),
        Experts(run),
        *build_replicas(run),
    )


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


class TimeLimit(Hook):
    """Gives the main rank a signal once the time is over: with the next step, all ranks agree, save and end."""

    def __init__(self, run: Run, minutes: float) -> None:
        self.run, self.minutes = run, minutes
        self.ends = time.monotonic() + 60 * minutes

    def after_step(self, result: StepResult) -> None:
        """Note that the time is over, once, on the main rank."""
        run = self.run
        if run.parallel.is_main and not run.signals.received and time.monotonic() >= self.ends:
            run.tell(
                "time_limit", f"train.stop_after_minutes={self.minutes:g} are over: the next step is this start's last"
            )
            run.signals.received = signal.SIGTERM
