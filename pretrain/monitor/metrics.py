"""Logs of a run: metrics.jsonl, events.jsonl, TensorBoard and, on request, Weights & Biases.

metrics.jsonl has one line for each step: a run that resumes from step n first drops the lines after n, because it will do
these steps again. events.jsonl is never shortened: it tells what happened, repeated or not. One line is
one JSON object, so that a kill damages the last line at most, and any program can follow the files while they grow.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from amfm.data_pipeline.durable.files import replacing
from amfm.data_pipeline.durable.json_files import LineFile, read_lines
from amfm.pretrain.config.schema import RunConfig
from amfm.pretrain.launcher_protocol import describe_event
from amfm.pretrain.packages import describe_missing, is_installed

if TYPE_CHECKING:
    from amfm.pretrain.monitor.tracking import Services

Metrics = dict[str, Any]


class RunLog:
    """The open log files of one run; exists only on the main rank.

    A line is with the operating system when the call returns, and on the disk after `sync`. `cut`: lines of
    metrics.jsonl that were left out at the start. Raises OSError when the directory cannot be written.
    """

    def __init__(self, config: RunConfig, *, resumed_at_step: int) -> None:
        directory = self.directory = Path(config.run.dir)
        self._place = os.stat(directory)
        self.cut = keep_until(directory / "metrics.jsonl", resumed_at_step)
        self.metrics = LineFile(directory / "metrics.jsonl")
        self.events = LineFile(directory / "events.jsonl")
        self.services: Services | None = None
        if config.run.tensorboard or config.run.wandb_project is not None:
            from amfm.pretrain.monitor.tracking import Services

            self.services = Services(config, resumed_at_step=resumed_at_step)

    def write_metrics(self, metrics: Metrics) -> None:
        """Write one step's line; numbers also go to the services, in groups, nested ones as `moe/load/003`."""
        self.metrics.write(metrics)
        if self.services is not None:
            step, numbers = int(metrics["step"]), self.services.tracking.named(flatten_numbers(metrics))
            with self._plots(step):
                self.services.write_tensorboard(step, numbers)
            self.services.write_wandb(step, numbers)

    def write_event(self, event: str, step: int, **details: Any) -> None:
        """Write one line for what does not happen at every step: start, checkpoint, validation, signal, skip, end."""
        self.events.write(describe_event(event, step, **details))

    def sync(self) -> None:
        """Make the lines durable: a checkpoint of a step must not outlive the line of the step.

        Raises RuntimeError if the run directory is not the one that the log began in: a checkpoint would go elsewhere.
        """
        self._require_place()
        self.metrics.sync()
        self.events.sync()

    def close(self) -> None:
        """Flush and close everything."""
        self.metrics.close()
        if self.services is not None:
            with self._plots(0):
                self.services.close_tensorboard()
        self.events.close()
        if self.services is not None:
            self.services.finish_wandb()

    @contextmanager
    def _plots(self, step: int) -> Iterator[None]:
        """Inside, plots are written, which no run ends for: what the disk rejects is said once, and they stop."""
        try:
            yield
        except OSError as error:
            self._require_place()
            assert self.services is not None, "it rejected"
            self.services.tensorboard = None  # its thread ended with the error; there is nothing to close
            text = f"TensorBoard's files in {self.directory / 'tensorboard'} cannot be written any more: {error.strerror or error}"
            sys.stderr.write(f"amfm: warning: {text}; training continues without them\n")
            self.write_event("tensorboard_failed", step, error=text)

    def _require_place(self) -> None:
        """Raise RuntimeError if the run directory was moved or replaced since this log was opened."""
        try:
            found = os.stat(self.directory)
        except FileNotFoundError:
            found = None
        if found is None or not os.path.samestat(found, self._place):
            raise RuntimeError(
                f"{self.directory} is not the folder any more that this run writes to: it was moved, replaced or removed; put "
                "it back and give the same command"
            )


class Cut(NamedTuple):
    """Lines that were left out of metrics.jsonl: damaged ones, those of steps to be done again, and the seconds of these.

    last_line_at: time of the newest line before anything was left out, in seconds since 1970.
    """

    damaged: int = 0
    steps: int = 0
    seconds: float = 0.0
    last_line_at: float | None = None

    def facts(self) -> dict[str, Any]:
        """What an event tells of it."""
        facts = {"discarded_steps": self.steps, "discarded_seconds": self.seconds, "last_line_at": self.last_line_at}
        return {name: value for name, value in facts.items() if value is not None}


def keep_until(path: Path, step: int) -> Cut:
    """Drop the lines of steps that a resumed run will do again, and those that are cut or damaged; returns what was dropped.

    The file is replaced at once, line by line, so that neither a kill nor its size matters.
    """
    if not path.exists():
        return Cut()
    damaged, steps, seconds, times = 0, 0, 0.0, [0.0]
    with replacing(path) as file:
        for _, record in read_lines(path):
            found = None if record is None else record.get("step")
            if record is None or not isinstance(found, int):
                damaged += 1
                continue
            times.append(number_of(record, "time"))
            if found <= step:
                file.write(json.dumps(record).encode() + b"\n")
            else:
                steps += 1
                seconds += sum(number_of(record, name) for name in ("seconds", "validation_seconds", "tasks_seconds"))
    return Cut(damaged, steps, seconds, max(times) or None)


def number_of(record: Mapping[str, Any], name: str) -> float:
    """A finite number of a line, 0 where it has none."""
    value = record.get(name)
    return finite(value) or 0.0 if isinstance(value, int | float) else 0.0


def check_plot_services(config: RunConfig) -> None:
    """Reject, on every rank and before any work, a plot service whose package is missing. Raises ValueError."""
    if config.run.tensorboard and not is_installed("tensorboard"):
        raise ValueError(
            f"{describe_missing('run.tensorboard=true', 'tensorboard', 'report')}, or set run.tensorboard: false"
        )
    if config.run.wandb_project is not None and not is_installed("wandb"):
        raise ValueError(
            f"{describe_missing(f'run.wandb_project={config.run.wandb_project}', 'wandb', 'wandb')}, or remove run.wandb_project"
        )


def flatten_numbers(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Flatten nested metrics to numbers named by their path (`expert_load/3`; of a list, by place: `mtp_loss/1`).

    The step itself, its time, texts, null and lists of lists are left out; truth values become 0 and 1.
    """
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            flat |= flatten_numbers(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            flat |= flatten_numbers(
                {str(place): item for place, item in enumerate(value, 1) if not isinstance(item, list)},
                f"{prefix}{name}/",
            )
        elif isinstance(value, int | float) and prefix + name not in ("step", "time"):
            flat[prefix + name] = float(value)
    return flat


def finite(value: float) -> float | None:
    """Replace NaN and infinities by None."""
    return value if abs(value) < float("inf") else None
