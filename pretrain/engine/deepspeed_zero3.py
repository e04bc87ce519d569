"""Lets ZeRO-3 see the tensors inside dataclasses that modules return.

DeepSpeed gathers a module's weights for the backward pass from hooks on the tensors of its output, and looks for them
in tensors, lists, tuples and dicts only. Our blocks return dataclasses. Around DeepSpeed's own forward hooks stand two
of ours: the first replaces the dataclass by a tuple of its differentiable tensors, the last puts DeepSpeed's versions of
them back into the dataclass.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def find_tensors(value: Any) -> Iterator[Tensor]:
    """Find the tensors that take part in a backward pass, in a fixed order."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from find_tensors(getattr(value, field.name))
    elif isinstance(value, dict):
        for item in value.values():
            yield from find_tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from find_tensors(item)


def replace_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Copy a value with the tensors that `find_tensors` found replaced, in its order."""
    if isinstance(value, Tensor):
        return next(tensors) if value.requires_grad else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changes = {
            field.name: replace_tensors(getattr(value, field.name), tensors) for field in dataclasses.fields(value)
        }
        return dataclasses.replace(value, **changes)
    if isinstance(value, dict):
        return {key: replace_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(replace_tensors(item, tensors) for item in value)
    if isinstance(value, list | tuple):
        return type(value)(replace_tensors(item, tensors) for item in value)
    return value


class DataclassOutputHooks:
    """Two hooks on every module: `open` before `deepspeed.initialize`, `close` after it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.outputs: list[Any] = []

    def open(self) -> None:
        """Return tuples of tensors from modules, which DeepSpeed understands."""
        for module in self.module.modules():
            module.register_forward_hook(self._flatten)

    def close(self) -> None:
        """Return the dataclass to the caller again."""
        for module in self.module.modules():
            module.register_forward_hook(self._rebuild)

    def _flatten(self, module: nn.Module, inputs: Any, output: Any) -> tuple[Tensor, ...]:
        """First hook: remember the output and return its differentiable tensors."""
        self.outputs.append(output)
        return tuple(find_tensors(output))

    def _rebuild(self, module: nn.Module, inputs: Any, tensors: tuple[Tensor, ...]) -> Any:
        """Last hook: put DeepSpeed's versions of the tensors back into the remembered output."""
        return replace_tensors(self.outputs.pop(), iter(tensors))


def is_not_about_types(record: logging.LogRecord) -> bool:
    """Filter DeepSpeed's warning that it cannot look into a type: the hooks did so for it."""
    return record.funcName != "apply_to_tensors_only"
