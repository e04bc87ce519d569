"""Exact duplicates of a source: every unit hashes its documents, one merge finds the later copies, writing skips them.

Of equal texts the first in the order of the plan stays, so the result depends on neither the number of actors nor on
when a preparation was stopped. The text is read twice, once to hash and once to write: to keep it between the two would
need as much space as the source. The merge holds one range of hashes of all units at a time, so memory does not grow with
the source. What a unit skips is a list of places, and its digest is part of the unit's key: a unit whose list changed is
written again.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from amfm.data_pipeline.durable.files import delete, make_folders, write_file_atomically
from amfm.data_pipeline.prepare.plan import Unit

# A document: its hash as two numbers and its place among the documents of the unit. Files are sorted by the hash.
HASHED = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<u4")])
HASHES_NAME = re.compile(r"\d{6,}-[0-9a-f]+\.hashes\.npy")
PARTITION_DOCUMENTS = 4_000_000  # merged at a time: about 250 MB

Hashes = npt.NDArray[np.void]


def hash_text(text: bytes) -> bytes:
    """BLAKE3, 128 bits, of a text: of 10^12 texts two different ones agree with probability 10^-15."""
    return blake3(text).digest(16)


def write_hashes(store: Path, unit: Unit, digests: Sequence[bytes]) -> None:
    """Keep the hashes of a unit's documents, which come in the order of reading; OSError of the disk passes through."""
    hashes = np.zeros(len(digests), HASHED)
    numbers = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
    hashes["high"], hashes["low"], hashes["place"] = numbers[:, 0], numbers[:, 1], np.arange(len(digests))
    path = _hashes_path(store, unit)
    make_folders(path.parent)
    write_file_atomically(path, _to_bytes(hashes[np.lexsort((hashes["place"], hashes["low"], hashes["high"]))]))


def units_to_hash(store: Path, units: Sequence[Unit]) -> list[Unit]:
    """Units of a source whose hashes are not there yet, as tasks to hash; none once the duplicates are known."""
    if _find_known(store, units) is not None:
        return []
    return [replace(unit, stage="hash") for unit in units if not _hashes_path(store, unit).is_file()]


def mark_duplicates(store: Path, units: Sequence[Unit]) -> list[Unit]:
    """Find the duplicates of a source and give its units, each with the digest of what it must skip.

    All units have been hashed. The lists are kept next to the store's parts, and the hashes, which are larger, deleted.

    OSError of the disk passes through.
    """
    known = _find_known(store, units)
    if known is None:
        skipped: list[list[npt.NDArray[np.uint32]]] = [[] for _ in units]
        for partition in _partitions([_load_hashes(_hashes_path(store, unit)) for unit in units]):
            for number, places in _later_copies(partition):
                skipped[number].append(places)
        known = {}
        for unit, pieces in zip(units, skipped):
            content = _to_bytes(np.sort(np.concatenate(pieces)) if pieces else np.zeros(0, np.uint32))
            known[unit.name] = hashlib.blake2b(content, digest_size=16).hexdigest()
            write_file_atomically(_skips_path(store, unit), content)
        write_file_atomically(_summary_path(store, units), json.dumps([_key(units), known]).encode())
    for path in _folder(store, units[0]).glob("*.hashes.npy"):
        delete(path, HASHES_NAME)
    return [replace(unit, duplicates=known[unit.name]) for unit in units]


def load_skips(store: Path, unit: Unit) -> frozenset[int]:
    """Load the places of the documents that a unit skips, among those that pass the filters; RuntimeError if damaged."""
    if not unit.duplicates:
        return frozenset()
    content = _skips_path(store, unit).read_bytes()
    found = hashlib.blake2b(content, digest_size=16).hexdigest()
    if found != unit.duplicates:
        raise RuntimeError(
            f"{_skips_path(store, unit)} is damaged; delete its folder and run `amfm prepare CONFIG` again"
        )
    return frozenset(np.load(io.BytesIO(content)).tolist())


def _load_hashes(path: Path) -> Hashes:
    """Mapped, because all files together may be larger than memory; a file without documents cannot be mapped."""
    try:
        return np.load(path, mmap_mode="r")
    except ValueError:
        return np.load(path)


def _later_copies(partition: Sequence[Hashes]) -> Iterator[tuple[int, npt.NDArray[np.uint32]]]:
    """(number of the unit, places) of every document whose hash came before, in the units or in its own."""
    joined = np.concatenate(partition)
    numbers = np.repeat(np.arange(len(partition)), [len(hashes) for hashes in partition])
    order = np.lexsort((joined["place"], numbers, joined["low"], joined["high"]))
    joined, numbers = joined[order], numbers[order]
    same = (joined["high"][1:] == joined["high"][:-1]) & (joined["low"][1:] == joined["low"][:-1])
    later = np.flatnonzero(same) + 1
    for number in np.unique(numbers[later]).tolist():
        yield number, joined["place"][later[numbers[later] == number]]


def _partitions(files: Sequence[Hashes]) -> Iterator[list[Hashes]]:
    """The same range of hashes of every file, range after range, so that memory holds one."""
    count = 1 + sum(len(hashes) for hashes in files) // PARTITION_DOCUMENTS
    edges = [number * 2**64 // count for number in range(1, count)]
    cuts = [[0, *np.searchsorted(hashes["high"], np.array(edges, np.uint64)).tolist(), len(hashes)] for hashes in files]
    for number in range(count):
        yield [np.asarray(hashes[cut[number] : cut[number + 1]]) for hashes, cut in zip(files, cuts)]


def _key(units: Sequence[Unit]) -> str:
    """Digest of all units of a source: one changed input may move duplicates in any of them."""
    return hashlib.blake2b("\n".join(unit.key() for unit in units).encode(), digest_size=16).hexdigest()


def _find_known(store: Path, units: Sequence[Unit]) -> dict[str, str] | None:
    """Digests by unit that an earlier call found for the same units, if all of its files are there."""
    path = _summary_path(store, units)
    if not path.is_file():
        return None
    try:
        key, known = json.loads(path.read_bytes())
    except (ValueError, TypeError, RecursionError):  # cut or damaged: found again
        return None
    if key != _key(units) or not isinstance(known, dict) or {type(digest) for digest in known.values()} - {str}:
        return None
    return known if all(unit.name in known and _skips_path(store, unit).is_file() for unit in units) else None


def _folder(store: Path, unit: Unit) -> Path:
    return store / "duplicates" / unit.source


def _hashes_path(store: Path, unit: Unit) -> Path:
    return _folder(store, unit) / f"{unit.number:06d}-{replace(unit, stage='write').key()}.hashes.npy"


def _skips_path(store: Path, unit: Unit) -> Path:
    return _folder(store, unit) / f"{unit.number:06d}.skips.npy"


def _summary_path(store: Path, units: Sequence[Unit]) -> Path:
    return _folder(store, units[0]) / "found.json"


def _to_bytes(values: npt.NDArray[np.generic]) -> bytes:
    content = io.BytesIO()
    np.save(content, values)
    return content.getvalue()
