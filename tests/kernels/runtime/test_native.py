"""C code of our own: compiled once, kept where only this user writes, and an error with its reason where it cannot be."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from amfm.kernels.runtime import native
from amfm.kernels.runtime.native import NoNativeCode, load_library

SOURCE = "int mix_check(void) { return 0; }\nint answer(void) { return 42; }\n"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A C file, a cache of its own, and a compiler that says in compiled.txt when it was called."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    script = tmp_path / "compiler"
    script.write_text(f'#!/bin/sh\necho called >> "{tmp_path}/compiled.txt"\nexec {compiler} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    path = tmp_path / "small.c"
    path.write_text(SOURCE)
    return path


def load(source: Path) -> int:
    """What the code says, as by a process that has not loaded it."""
    return int(load_library.__wrapped__(source).answer())


def count_compilations(source: Path) -> int:
    return len((source.parent / "compiled.txt").read_text().splitlines())


def test_whoever_comes_together_compiles_once_and_other_processors_have_their_own(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[int] = []
    threads = [threading.Thread(target=lambda: answers.append(load(source))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [42] * 3 and count_compilations(source) == 1
    folder = source.parent / "cache/amfm/native"
    assert folder.stat().st_mode & 0o777 == 0o700 and not list(folder.glob("*.partial"))
    monkeypatch.setattr(native, "describe_processor", lambda: ["flags: fewer"])
    assert load(source) == 42 and count_compilations(source) == 2
    source.write_text(SOURCE.replace("42", "43"))
    assert load(source) == 43 and count_compilations(source) == 3


def test_code_that_others_could_write_is_never_loaded(source: Path) -> None:
    assert load(source) == 42
    folder = source.parent / "cache/amfm/native"
    (library,) = folder.glob("*.so")
    library.chmod(0o777)
    with pytest.raises(NoNativeCode, match="is not a file of this user that only this user can write; delete it"):
        load(source)
    target = library.rename(source.parent / "elsewhere.so")
    library.symlink_to(target)
    with pytest.raises(NoNativeCode, match="is not a file of this user"):
        load(source)
    library.unlink()
    folder.chmod(0o777)
    assert load(source) == 42, "compiled into $TMPDIR"
    assert not list(folder.glob("*.so"))


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-compiler", "there is no C compiler (no-such-compiler)"),
        ("false", "false cannot compile small.c: it said nothing (exit code 1)"),
    ],
)
def test_without_a_compiler_that_works_the_reason_is_given(
    compiler: str, reason: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(NoNativeCode) as caught:
        load(source)
    assert reason in str(caught.value)


def test_code_that_does_not_run_here_or_does_not_compile_is_not_kept(source: Path) -> None:
    source.write_text("int mix_check(void) { __builtin_trap(); return 0; }\n")
    with pytest.raises(NoNativeCode, match=r"made of small\.c does not run"):
        load(source)
    source.write_text("int mix_check(void) { return unknown; }\n")
    with pytest.raises(NoNativeCode, match=r"cannot compile small\.c: .*error.*unknown"):
        load(source)
    assert not [path for path in (source.parent / "cache/amfm/native").iterdir() if path.suffix != ".lock"]
