"""What configurations know of the tracker; read without torch and MLflow."""

from __future__ import annotations

from pydantic import Field

from amfm.pretrain.config.hook_registry import HookOptions, HookSpec


class MlflowOptions(HookOptions):
    """Where a run is logged; credentials come from MLflow's own variables, such as MLFLOW_TRACKING_TOKEN."""

    experiment: str = Field(description="Name of the experiment; made if there is none.")
    tracking_uri: str | None = Field(None, description="The server; none: MLFLOW_TRACKING_URI, or a local store.")


SPEC = HookSpec("mlflow", "amfm_mlflow.hook:Mlflow", MlflowOptions, interface=2)
