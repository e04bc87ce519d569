"""The package as if it were installed: here, and in the processes that a test starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.examples import ROOT, install_example


@pytest.fixture(autouse=True, scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """Put the package and its entry point on the paths of Python."""
    packages = install_example("study", tmp_path_factory.mktemp("packages"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(packages[0]))
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (*packages, ROOT / "src"))))
        yield packages
