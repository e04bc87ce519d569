"""Each step's numbers as gauges in a file that is replaced whole, so that the exporter never reads half of one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from amfm.data_pipeline.durable.files import write_file_atomically
from amfm.pretrain.hook import Hook
from amfm.pretrain.monitor.metrics import flatten_numbers
from amfm.pretrain.run import Run
from amfm_prometheus.scrape import format_gauges
from amfm_prometheus.spec import PrometheusOptions


class Prometheus(Hook):
    """Writes `amfm_NAME{run="..."} VALUE` lines after each step, on the main rank."""

    def __init__(self, options: PrometheusOptions, run: Run) -> None:
        self.path = Path(options.file)
        self.name = run.config.run.name or run.directory.name

    def after_log(self, metrics: Mapping[str, Any]) -> None:
        """Replace the file by the step's numbers."""
        numbers = flatten_numbers(metrics) | {"step": float(metrics["step"])}
        write_file_atomically(self.path, format_gauges(self.name, numbers).encode())
