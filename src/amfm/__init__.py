"""Pretraining of hybrid language models. In a clone the packages here are links to the folders at its root.

`amfm.build`, `amfm.load_model` and the other names of docs/python.md are imported when they are asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amfm.data_pipeline.prepare.own_code import DocumentFilter, DocumentTransform, FileReader
    from amfm.launch.api import load, load_model, plan, prepare, read_run, train
    from amfm.launch.modules import batches, build, save_model
    from amfm.model.config.kinds import Kind
    from amfm.model.config.registering import register
    from amfm.model.config.routers import Routed, RouterInput, RouterSpec
    from amfm.pretrain.config.errors import ConfigError
    from amfm.pretrain.config.hook_registry import HookSpec
    from amfm.pretrain.config.optimizers import OptimizerSpec, ScheduleSpec
    from amfm.pretrain.failures import OwnCodeError
    from amfm.pretrain.hook import Hook

__version__ = "0.1.0"
_API = ("load", "load_model", "plan", "prepare", "read_run", "train")
_ELSEWHERE = {
    **dict.fromkeys(("batches", "build", "save_model"), "amfm.launch.modules"),
    **dict.fromkeys(("DocumentFilter", "DocumentTransform", "FileReader"), "amfm.data_pipeline.prepare.own_code"),
    "ConfigError": "amfm.pretrain.config.errors",
    "Hook": "amfm.pretrain.hook",
    "HookSpec": "amfm.pretrain.config.hook_registry",
    "Kind": "amfm.model.config.kinds",
    "OptimizerSpec": "amfm.pretrain.config.optimizers",
    "OwnCodeError": "amfm.pretrain.failures",
    **dict.fromkeys(("Routed", "RouterInput"), "amfm.model.config.routers"),
    "RouterSpec": "amfm.model.config.routers",
    "ScheduleSpec": "amfm.pretrain.config.optimizers",
    "register": "amfm.model.config.registering",
}
__all__ = [
    "ConfigError",
    "DocumentFilter",
    "DocumentTransform",
    "FileReader",
    "Hook",
    "HookSpec",
    "Kind",
    "OptimizerSpec",
    "OwnCodeError",
    "Routed",
    "RouterInput",
    "RouterSpec",
    "ScheduleSpec",
    "batches",
    "build",
    "load",
    "load_model",
    "plan",
    "prepare",
    "read_run",
    "register",
    "save_model",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(_ELSEWHERE.get(name, "amfm.launch.api")), name)
    if name in ("kernels", "layers"):
        return importlib.import_module(f"amfm.{name}")
    raise AttributeError(f"module 'amfm' has no attribute {name!r}")
