"""What `amfm plan --trace` does and prints: a part of the verb, an entry point of `amfm.verbs`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from amfm.launch.console import say, show_progress
from amfm.pretrain.packages import is_installed

if TYPE_CHECKING:
    from amfm.launch.plan.estimate import Assumptions
    from amfm.launch.plan.hardware import Hardware
    from amfm.launch.plan.time import StepTime
    from amfm.pretrain.config.schema import RunConfig
    from amfm_simulate.timeline import Timeline
    from amfm_simulate.trace import TracedRank


class PlanTrace:
    """Ranks of a run that take steps on simulated GPUs. Raises ValueError, before any work, where that is not possible.

    rank: the one to trace, None for one of the first and one of the last pipeline stage; stage: of training, None for the first;
    timeline: where a timeline of every pipeline stage is written, if any.
    """

    def __init__(self, rank: int | None, stage: str | None, timeline: Path | None) -> None:
        if not is_installed("triton"):
            raise ValueError(
                "--trace counts launches of kernels that need Triton, which is not installed; pip install triton"
            )
        if timeline is not None and timeline.suffix != ".json":
            raise ValueError(f"--timeline {timeline} is JSON; use a name that ends in .json")
        if timeline is not None and not timeline.parent.is_dir():
            raise ValueError(f"--timeline {timeline}: there is no folder {timeline.parent}; make it first")
        self.rank, self.stage, self.timeline = rank, stage, timeline
        self.traced: list[TracedRank] = []
        self.steps: list[tuple[Timeline, StepTime]] = []  # each rank's timeline, with the step that the plan has for it

    def run(self, config: RunConfig, gpus: int, hardware: Hardware, assumptions: Assumptions) -> None:
        """Trace the ranks under a progress bar, and write the timeline where one is asked for."""
        from amfm_simulate.timeline import lay_out, planned_step, write_timeline
        from amfm_simulate.trace import trace_run

        events = self.timeline is not None
        with show_progress("trace") as report:
            self.traced = trace_run(
                config, gpus, hardware, only_rank=self.rank, stage_name=self.stage, report=report, events=events
            )
        if self.timeline is not None:
            lines = lay_out(self.traced, hardware)
            write_timeline(lines, self.timeline)
            say(f"wrote {self.timeline}: open it at https://ui.perfetto.dev")
            self.steps = [(line, planned_step(line.entry, hardware, assumptions)) for line in lines]

    def draw(self, path: Path) -> None:
        """Draw the memory of the traced ranks, and the timelines that there are."""
        from amfm_simulate.timeline import draw_trace

        draw_trace(self.traced, [line for line, _ in self.steps], path)

    def as_dict(self) -> dict[str, Any]:
        """Traced ranks as JSON values, with the seconds of their step by part if there is a timeline."""
        from amfm_simulate.timeline import compare_seconds
        from amfm_simulate.trace import trace_as_dict

        seconds = {line.entry.rank: {"seconds": compare_seconds(line, planned)} for line, planned in self.steps}
        return {"trace": [trace_as_dict(entry) | seconds.get(entry.rank, {}) for entry in self.traced]}

    def print(self) -> None:
        """Print the tables of each rank."""
        from amfm_simulate.tables import print_seconds, print_trace

        for entry in self.traced:
            print_trace(entry)
        for line, planned in self.steps:
            print_seconds(line, planned)
