"""The hooks of a run, in the order in which they are called."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amfm.pretrain.hook import Hook
from amfm.pretrain.hooks.experts import Experts
from amfm.pretrain.hooks.kept_weights import build_kept_weights
from amfm.pretrain.hooks.metrics import Metrics
from amfm.pretrain.hooks.quantization import build_quantization
from amfm.pretrain.hooks.replicas import build_replicas
from amfm.pretrain.hooks.spikes import Spikes
from amfm.pretrain.hooks.state_watch import build_state_watch
from amfm.pretrain.hooks.stragglers import Stragglers
from amfm.pretrain.hooks.table import build_table
from amfm.pretrain.hooks.validate import Validations
from amfm.pretrain.run import Run

if TYPE_CHECKING:
    from amfm.pretrain.tasks.suite import TaskSuite


def build_hooks(run: Run, suite: TaskSuite | None) -> tuple[Hook, ...]:
    """Build what the run does besides training. Every rank must call this.

    Those that edit masters come first, so that all others see the weights of the next step; the log comes after all that
    add to its line. suite: the tasks of `evaluate`, on the main rank alone.
    """
    tasks: list[Hook] = []
    graphs: list[Hook] = []
    if run.config.evaluate.tasks:
        from amfm.pretrain.hooks.tasks import Tasks

        tasks.append(Tasks(run, suite))
    if run.config.train.cuda_graphs == "blocks":
        from amfm.pretrain.hooks.cuda_graphs import CudaGraphs

        graphs.append(CudaGraphs(run))
    sets: list[Hook] = []
    if run.config.validation:
        from amfm.pretrain.hooks.validation_sets import ValidationSets

        sets.append(ValidationSets(run))
    if run.config.health.spike_sigma is not None:
        sets.append(Spikes(run, run.config.health.spike_sigma))
    if run.config.train.stop_after_minutes is not None:
        from amfm.pretrain.hooks.time_limit import TimeLimit

        sets.append(TimeLimit(run, run.config.train.stop_after_minutes))
    watched = [
        *build_state_watch(run),
        *build_quantization(run),
        *build_kept_weights(run),
        Validations(run),
        *sets,
        *tasks,
    ]
    return (
        *build_table(run),
        *watched,
        *graphs,
        Metrics(run),
        Stragglers(run),
        Experts(run),
        *build_replicas(run),
    )
