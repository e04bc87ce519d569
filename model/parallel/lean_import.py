"""Megatron-core's groups and layers without the rest of it, and without the compiler.

`megatron/core/__init__.py` imports optimizers, two kinds of FSDP and checkpoints of distributed tensors; its modules compile 24
functions where they define them, and look for Triton and TensorBoard. Since 0.18 its packages import each other's layers too,
down to CUDA graphs and inference. None of that is called here, and it is half of what a start of a run costs. Who asks a
package for another name gets all of it, then.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from types import ModuleType
from typing import Any

from amfm.kernels.runtime.compiling import nothing_compiled

PACKAGE = "megatron.core"
# With the packages whose modules those of ours import; parents first.
PACKAGES = (
    PACKAGE,
    *(f"{PACKAGE}.{name}" for name in ("dist_checkpointing", "inference", "tensor_parallel", "transformer")),
)
# Modules of these whose names the others import from the package.
MODULES = {
    "tensor_parallel": ("cross_entropy", "data", "layers", "mappings", "random"),
    "transformer": ("transformer_config",),
}
# What Megatron-core does without where it cannot be imported.
ABSENT = ("torch.distributed._tensor", "triton", "torch.utils.tensorboard")
EXTENSIONS = "torch.utils.cpp_extension"  # of which 0.18 imports a function; warns where there is nvcc and no driver


def import_lean() -> None:
    """Put the packages in their places, if no one has imported them, and import the modules that need nothing of the rest."""
    if PACKAGE in sys.modules:
        return
    for name in PACKAGES:
        sys.modules[name] = package = _empty_package(name)
        parent, _, own = name.rpartition(".")
        setattr(importlib.import_module(parent), own, package)
    logger = logging.getLogger(EXTENSIONS)
    level = logger.level
    logger.setLevel(logging.ERROR)
    with nothing_compiled(*ABSENT):
        for own, name in ((own, name) for own, names in MODULES.items() for name in names):
            module = importlib.import_module(f"{PACKAGE}.{own}.{name}")
            public = {key: value for key, value in vars(module).items() if not key.startswith("_")}
            vars(sys.modules[f"{PACKAGE}.{own}"]).update(public)
    logger.setLevel(level)


def _empty_package(name: str) -> ModuleType:
    """A package with only its place; a name that is not one of its modules' runs its `__init__.py`."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.loader is not None, "megatron-core is required"
    package, loader = importlib.util.module_from_spec(spec), spec.loader

    def find(attribute: str) -> Any:
        if attribute.startswith("__") or importlib.util.find_spec(f"{name}.{attribute}") is not None:
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}")
        del vars(package)["__getattr__"]
        loader.exec_module(package)
        return getattr(package, attribute)

    vars(package)["__getattr__"] = find
    return package
