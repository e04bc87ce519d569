"""Megatron-core's groups and layers without the rest of it, and without the compiler.

`megatron/core/__init__.py` imports optimizers, two kinds of FSDP and checkpoints of distributed tensors; its modules compile 24
functions where they define them, and look for Triton and TensorBoard. None of that is called here, and it is half of what a start
of a run costs. Who asks the package for another name gets all of it, then.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

from amfm.kernels.runtime.compiling import nothing_compiled

PARENT, PACKAGE = "megatron", "megatron.core"
# What Megatron-core does without where it cannot be imported.
ABSENT = ("torch.distributed._tensor", "triton", "torch.utils.tensorboard")


def import_lean() -> None:
    """Put the package in its place, if no one has imported it, and import the modules that need nothing of the rest."""
    if PACKAGE in sys.modules:
        return
    sys.modules[PACKAGE] = package = _empty_package()
    importlib.import_module(PARENT).core = package  # type: ignore[attr-defined]
    with nothing_compiled(*ABSENT):
        importlib.import_module(f"{PACKAGE}.tensor_parallel")


def _empty_package() -> ModuleType:
    """The package with only its place; a name that is not one of its modules' runs its `__init__.py`."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.loader is not None, "megatron-core is required"
    package, loader = importlib.util.module_from_spec(spec), spec.loader

    def find(name: str) -> Any:
        if name.startswith("__") or importlib.util.find_spec(f"{PACKAGE}.{name}") is not None:
            raise AttributeError(f"module {PACKAGE!r} has no attribute {name!r}")
        del vars(package)["__getattr__"]
        loader.exec_module(package)
        return getattr(package, name)

    vars(package)["__getattr__"] = find
    return package
