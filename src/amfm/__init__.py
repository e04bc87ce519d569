"""Pretraining of hybrid language models. In a clone the packages here are links to the folders at its root.

`amfm.build`, `amfm.load_model` and the other names of docs/python.md are imported when they are asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amfm.launch.api import load, load_model, plan, prepare, read_run, train
    from amfm.launch.modules import batches, build, save_model
    from amfm.pretrain.config.errors import ConfigError

__version__ = "0.1.0"
__all__ = [
    "ConfigError",
    "batches",
    "build",
    "load",
    "load_model",
    "plan",
    "prepare",
    "read_run",
    "save_model",
    "train",
]

_MODULES = dict.fromkeys(("batches", "build", "save_model"), "amfm.launch.modules")
_ELSEWHERE = {"ConfigError": "amfm.pretrain.config.errors", **_MODULES}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(_ELSEWHERE.get(name, "amfm.launch.api")), name)
    if name in ("kernels", "layers"):
        return importlib.import_module(f"amfm.{name}")
    raise AttributeError(f"module 'amfm' has no attribute {name!r}")
