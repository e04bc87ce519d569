"""Real text without a network: the Python sources that are installed next to this program, as jsonl for a benchmark.

Every machine that runs this program has them. Their lengths are as uneven as those of a real corpus, which generated text
lacks. They differ between machines, so they serve to compare two programs on one.
"""

from __future__ import annotations

import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from amfm.data_pipeline.durable.files import delete, write_file_atomically

FILE_BYTES = 16_000_000
FILE_NAME = re.compile(r"python-\d{3,}\.jsonl")
COLLECTED = "collected.json"


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
