"""What configurations know of the tracker; read without torch."""

from __future__ import annotations

from pydantic import Field

from amfm.pretrain.config.hook_registry import HookOptions, HookSpec


class PrometheusOptions(HookOptions):
    """A text file with the newest step's numbers, for the textfile collector of Prometheus' node exporter."""

    file: str = Field(description="The file, in the collector's folder; its name ends in .prom.", pattern=r"\.prom$")


SPEC = HookSpec("prometheus", "amfm_prometheus.hook:Prometheus", PrometheusOptions, interface=2)
