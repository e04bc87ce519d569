"""Whether what an operation tells PyTorch of itself is true: its schema, its shapes without data, its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef

CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")


def assert_registered(operation: CustomOpDef, *arguments: Any) -> None:
    """Fail unless all checks of `torch.library.opcheck` succeed for a custom operation and these arguments."""
    found = torch.library.opcheck(operation, arguments, test_utils=CHECKS, raise_exception=False)
    assert found == dict.fromkeys(CHECKS, "SUCCESS"), f"{operation}: {found}"
