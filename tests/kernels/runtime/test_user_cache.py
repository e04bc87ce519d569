"""Where Triton's compiled kernels are stored on machines whose home cannot be written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from amfm.kernels.runtime.user_cache import place_triton_cache, scratch_folder


@pytest.fixture(autouse=True)
def no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """HOME is a file, TMPDIR a folder, and no one has asked yet."""
    (tmp_path / "home").write_text("")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    place_triton_cache.cache_clear()


def test_kernels_go_to_the_cache_of_the_environment_then_to_scratch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place_triton_cache()
    scratch = tmp_path / "scratch" / f"amfm-{os.getuid()}" / "triton"
    assert Path(os.environ["TRITON_CACHE_DIR"]) == scratch and scratch.is_dir()
    assert scratch.parent.stat().st_mode & 0o077 == 0
    (said,) = caplog.messages
    assert "cannot be written: compiled kernels go to" in said
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place_triton_cache.cache_clear()
    place_triton_cache()
    assert Path(os.environ["TRITON_CACHE_DIR"]) == tmp_path / "cache" / "amfm" / "triton"


def test_what_the_user_set_and_a_home_that_can_be_written_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    place_triton_cache()
    assert "TRITON_CACHE_DIR" not in os.environ
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TRITON_CACHE_DIR", "/given")
    place_triton_cache.cache_clear()
    place_triton_cache()
    assert os.environ["TRITON_CACHE_DIR"] == "/given"


def test_a_scratch_folder_that_others_can_write_is_not_used(tmp_path: Path) -> None:
    own = tmp_path / "scratch" / f"amfm-{os.getuid()}"
    own.symlink_to(tmp_path)
    assert scratch_folder("checked") is None
    own.unlink()
    own.mkdir()
    own.chmod(0o777)
    assert scratch_folder("checked") is None
