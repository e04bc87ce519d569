"""Where tables of tuned tiles are kept; how tiles are chosen is tested in the interpreter."""

from __future__ import annotations

import inspect
import pwd
import re
from pathlib import Path

import pytest
from triton.backends.nvidia.compiler import get_ptxas

from amfm.kernels.runtime.tuning import Environment, Table, find_assembler_release
from amfm.kernels.runtime.user_cache import user_folder

ENVIRONMENT = Environment("A GPU", "3.9.0", "13.0.1")


def forget_home(number: int) -> None:
    raise KeyError(f"no user {number}")


def test_a_machine_without_a_home_directory_reads_the_package_and_is_told_why_it_cannot_keep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", forget_home)
    assert user_folder("tuned") is None
    assert Table.load(ENVIRONMENT).configs == {}
    with pytest.raises(RuntimeError, match="set HOME or XDG_CACHE_HOME"):
        Table(ENVIRONMENT).save()


def test_the_cache_folder_of_the_environment_keeps_a_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = Table(ENVIRONMENT, {"kernel 8": {"num_warps": 4}}).save()
    assert path.is_relative_to(tmp_path / "amfm" / "tuned")
    assert Table.load(ENVIRONMENT).configs == {"kernel 8": {"num_warps": 4}}


def test_the_assembler_is_asked_for_its_release_as_each_triton_wants_it() -> None:
    """Triton 3.5 has one for all architectures, later releases are told which."""
    tool = get_ptxas(90) if inspect.signature(get_ptxas).parameters else get_ptxas()
    own = find_assembler_release(90)
    assert re.fullmatch(r"\d+\.\d+\.\d+", own)
    assert find_assembler_release(90, lambda: tool) == find_assembler_release(90, lambda arch: tool) == own
