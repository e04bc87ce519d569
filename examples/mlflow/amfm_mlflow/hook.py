"""Each step's numbers as metrics of one MLflow run, which a resume continues; the settings are its parameters.

A server that does not answer must not end training: what it rejects is said once, and the run's own files have all of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from amfm.pretrain.config.fields import flatten_settings
from amfm.pretrain.hook import Hook
from amfm.pretrain.monitor.metrics import flatten_numbers
from amfm.pretrain.monitor.tracking import Tracking, read_commits
from amfm.pretrain.run import Run
from amfm_mlflow.spec import MlflowOptions

MAX_PARAM = 500  # characters that every server takes
PARAMS_AT_ONCE = 100


class Mlflow(Hook):
    """Logs from the main rank: parameters at the start, metrics after each step, and how the run ended."""

    def __init__(self, options: MlflowOptions, run: Run) -> None:
        self.options, self.run = options, run
        self.client: MlflowClient | None = None
        self.tracking = Tracking()
        self.run_id, self.has_ended, self.has_warned = "", False, False

    def at_start(self) -> None:
        """Continue with the run that a start before this one began, or begin one with the settings."""
        self._guarded(self._begin)

    def after_log(self, metrics: Mapping[str, Any]) -> None:
        """Log the step's numbers."""
        now, step = int(time.time() * 1000), int(metrics["step"])
        named = self.tracking.named(flatten_numbers(metrics))
        numbers = [Metric(name, value, now, step) for name, value in named.items()]
        self._guarded(lambda: self.client and self.client.log_batch(self.run_id, metrics=numbers))

    def at_end(self) -> None:
        """Note that the run ended in order."""
        self.has_ended = True

    def close(self) -> None:
        """End MLflow's run, as this one ended."""
        status = "FINISHED" if self.has_ended else "FAILED"
        self._guarded(lambda: self.client and self.client.set_terminated(self.run_id, status))

    def _begin(self) -> None:
        client = MlflowClient(self.options.tracking_uri)
        note = self.run.directory / "mlflow_run.json"
        if note.exists():
            kept = json.loads(note.read_text())
            self.run_id, self.tracking = kept["run_id"], Tracking(is_grouped=kept.get("is_grouped", False))
            client.update_run(self.run_id, status="RUNNING")
        else:
            experiment = client.get_experiment_by_name(self.options.experiment)
            number = (
                client.create_experiment(self.options.experiment) if experiment is None else experiment.experiment_id
            )
            name = self.run.config.run.name or self.run.directory.name
            tags = {f"commit_of_{place}": commit for place, commit in read_commits().items()}
            self.run_id = client.create_run(number, run_name=name, tags=tags).info.run_id
            self.tracking = Tracking(is_grouped=True)
            settings = flatten_settings(self.run.config.model_dump(mode="json"))
            params = [Param(key, str(value)[:MAX_PARAM]) for key, value in settings.items()]
            for first in range(0, len(params), PARAMS_AT_ONCE):
                client.log_batch(self.run_id, params=params[first : first + PARAMS_AT_ONCE])
            note.write_text(json.dumps({"run_id": self.run_id, "is_grouped": True}))
        self.client = client

    def _guarded(self, work: Callable[[], object]) -> None:
        try:
            work()
        except (MlflowException, OSError) as error:
            if not self.has_warned:
                self.run.say(f"warning: MLflow does not take this run's metrics: {error}; training continues")
            self.has_warned = True
