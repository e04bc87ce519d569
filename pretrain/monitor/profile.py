"""Traces of chosen steps (`train.profile`): what every operation took, under the names of the model's blocks.

torch.profiler records operations and kernels but knows nothing of our blocks. So during a traced step hooks open a
range around each block and the embedding, and the heartbeat, which every phase of a step passes anyway, opens one for
the phase. `amfm profile` (examples/profile) puts the time of an operation to the innermost of them, and a backward
operation to the block of the forward operation with its sequence number. Outside of the traced steps there is no hook
and no cost.

Files: RUN/profile/step-N/rank-R.json.gz, Chrome's trace format, which Perfetto opens; with `memory` also
rank-R.memory.pickle on CUDA, for PyTorch's memory viewer, and each allocation in the trace on any device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from amfm.data_pipeline.durable.files import named
from amfm.model.hybrid import HybridModel
from amfm.pretrain.config.train_and_launch import PREFIX, ProfileConfig
from amfm.pretrain.monitor.heartbeat import Heartbeat

MEMORY_ENTRIES = 200_000  # allocations that a memory snapshot keeps


class StepProfiler:
    """Traces the steps of this rank that the configuration names; `paths`: files written so far."""

    def __init__(
        self, config: ProfileConfig | None, directory: Path, rank: int, model: HybridModel, heartbeat: Heartbeat
    ) -> None:
        self.steps = config.steps if config is not None and rank in config.ranks else ()
        self.with_memory = config is not None and config.memory
        self.directory, self.rank, self.model, self.heartbeat = directory / "profile", rank, model, heartbeat
        self.is_warm = False
        self.paths: list[Path] = []

    @contextmanager
    def trace(self, step: int) -> Iterator[None]:
        """Trace the block if it is one of the steps; an error inside leaves no file and passes through.

        Raises OSError if the trace cannot be written.
        """
        if step not in self.steps:
            yield
            return
        on_cuda = torch.cuda.is_available()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
        if not self.is_warm:  # the first trace of a process waits for the GPU's tracing library
            with profile(activities=activities):
                torch.zeros(1)
            self.is_warm = True
        place = self.directory / f"step-{step}" / f"rank-{self.rank}.json.gz"
        place.parent.mkdir(parents=True, exist_ok=True)
        if on_cuda and self.with_memory:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_ENTRIES)
        with profile(activities=activities, profile_memory=self.with_memory) as profiler:
            with record_function(f"{PREFIX}step {step}"), name_phases(self.heartbeat), name_blocks(self.model):
                yield
            if on_cuda:
                torch.cuda.synchronize()
        with named(place):
            profiler.export_chrome_trace(str(place))
        self.paths.append(place)
        if on_cuda and self.with_memory:
            snapshot = place.with_name(f"rank-{self.rank}.memory.pickle")
            with named(snapshot):
                torch.cuda.memory._dump_snapshot(str(snapshot))
            torch.cuda.memory._record_memory_history(enabled=None)
            self.paths.append(snapshot)


@contextmanager
def name_phases(heartbeat: Heartbeat) -> Iterator[None]:
    """Inside the block, a range for each phase that the heartbeat passes."""
    with ExitStack() as last:

        def enter(phase: str) -> None:
            last.close()
            last.enter_context(record_function(f"{PREFIX}phase {phase}"))

        heartbeat.listener = enter
        try:
            yield
        finally:
            heartbeat.listener = None


@contextmanager
def name_blocks(model: HybridModel) -> Iterator[None]:
    """Inside the block, a range around each block of the model and its embedding.

    What else is in a forward pass is the head.

    Around its mixer too, which is all that recomputation calls; not where that is compiled, as hooks would be compiled with
    it.
    """
    parts: list[tuple[str, nn.Module]] = [] if model.embedding is None else [("embedding", model.embedding)]
    for index, block in model.all_blocks():
        is_compiled = block.mixer._compiled_call_impl is not None
        parts += [
            (f"block {index} {block.letter}", module) for module in ([block] if is_compiled else [block, block.mixer])
        ]
    with ExitStack() as hooks:
        for name, module in parts:
            for handle in hook_range(module, f"{PREFIX}{name}"):
                hooks.callback(handle.remove)
        yield


def hook_range(module: nn.Module, name: str) -> list[Any]:
    """Open a range when the module's forward pass begins and close it when it ends, or fails; returns the hooks."""
    opened: list[record_function] = []

    def begin(module: nn.Module, inputs: Any) -> None:
        opened.append(record_function(name))
        opened[-1].__enter__()

    def end(module: nn.Module, inputs: Any, output: Any) -> None:
        opened.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(begin), module.register_forward_hook(end, always_call=True)]
