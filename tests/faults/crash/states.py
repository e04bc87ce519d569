"""All states in which a crash may leave a disk, from the operations that a process really asked of it.

The model is what POSIX promises and no more. Written bytes are on the disk after an fsync of their file; before it all,
none, or half of the last write may be there. A name (file or folder made, renamed, removed) is on the disk after an fsync
of the folder that holds it; before it each such operation may have happened or not, whatever its order, as long as it is
possible (no file in a folder that is not there). A crash may come after every operation.
"""

from __future__ import annotations

import itertools
import shutil
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

NAMES = "cmrud"  # create, make folder, rename, unlink, remove folder
MAX_PENDING = 9  # newest names that may be on the disk or not, older ones are: 2 to the power of them states


@dataclass(frozen=True)
class Operation:
    """One line of the record of disk.c, paths relative to the folder that was watched."""

    kind: str
    path: str
    second: str
    offset: int
    data: bytes

    @property
    def folder(self) -> str:
        """The folder whose fsync makes the name durable."""
        return self.path.rpartition("/")[0]


def read_record(content: bytes, under: Path) -> list[Operation]:
    """The operations of a record that are below a folder."""
    operations, at, prefix = [], 0, f"{under}/"
    while at < len(content):
        kind, (length,) = chr(content[at]), struct.unpack_from("<I", content, at + 1)
        path = content[at + 5 : at + 5 + length].decode().removesuffix(" (deleted)")
        at += 5 + length
        (length,) = struct.unpack_from("<I", content, at)
        second = content[at + 4 : at + 4 + length].decode()
        at += 4 + length
        offset, length = struct.unpack_from("<qI", content, at)
        data = content[at + 12 : at + 12 + length]
        at += 12 + length
        if path == str(under) or path.startswith(prefix):
            names = (path.removeprefix(str(under)).strip("/"), second.removeprefix(str(under)).strip("/"))
            operations.append(Operation(kind, *names, offset, data))
    return operations


@dataclass
class Content:
    """What a file may hold: what the disk surely has, and what was asked of it since."""

    durable: bytearray = field(default_factory=bytearray)
    pending: list[Operation] = field(default_factory=list)

    def settle(self) -> None:
        """After an fsync."""
        self.durable = self.after(self.pending)
        self.pending = []

    def after(self, operations: Sequence[Operation], *, torn: bool = False) -> bytearray:
        """The bytes after some of what is pending."""
        content = bytearray(self.durable)
        for number, operation in enumerate(operations):
            if operation.kind == "t":
                del content[operation.offset :]
                continue
            data = operation.data
            if torn and number == len(operations) - 1:
                data = data[: len(data) // 2]
            content.extend(bytes(max(0, operation.offset - len(content))))
            content[operation.offset : operation.offset + len(data)] = data
        return content


class Tree:
    """Names of a disk: folders, and files by the number of their content."""

    def __init__(self, files: dict[str, int], folders: set[str]) -> None:
        self.files, self.folders = dict(files), set(folders)

    def copy(self) -> Tree:
        return Tree(self.files, self.folders)

    def apply(self, operation: Operation, number: int) -> None:
        """One operation on names, if it is possible."""
        path, second = operation.path, operation.second
        if operation.kind == "c" and operation.folder in self.folders and path not in self.files:
            self.files[path] = number
        elif operation.kind == "m" and operation.folder in self.folders:
            self.folders.add(path)
        elif operation.kind == "u":
            self.files.pop(path, None)
        elif operation.kind == "d" and not any(name.startswith(f"{path}/") for name in (*self.files, *self.folders)):
            self.folders.discard(path)
        elif operation.kind == "r" and path in self.files:
            self.files[second] = self.files.pop(path)
        elif operation.kind == "r" and path in self.folders and second not in self.folders:
            self.files = {moved(name, path, second): content for name, content in self.files.items()}
            self.folders = {moved(name, path, second) for name in self.folders}


def moved(name: str, path: str, second: str) -> str:
    """A name after the folder `path` was renamed to `second`."""
    return second + name[len(path) :] if name == path or name.startswith(f"{path}/") else name


@dataclass(frozen=True)
class CrashState:
    """One state: names and bytes, the operation after which the crash came, and how many had come by then in all."""

    after: int
    total: int
    files: dict[str, bytes]
    folders: frozenset[str]

    def write(self, folder: Path) -> Path:
        """Put the state into a folder, in place of what is there."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in sorted(self.folders):
            (folder / name).mkdir(exist_ok=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return folder


def crash_states(
    initial: Path, operations: Sequence[Operation], max_pending: int = MAX_PENDING, each_file: bool = True
) -> Iterator[CrashState]:
    """Every state that a crash may leave, each once, from the folder as it was before the first operation."""
    found = sorted(path for path in initial.rglob("*"))
    contents = {
        -1 - number: Content(bytearray(path.read_bytes())) for number, path in enumerate(found) if path.is_file()
    }
    names = {str(path.relative_to(initial)): -1 - number for number, path in enumerate(found) if path.is_file()}
    start = Tree(names, {"", *(str(path.relative_to(initial)) for path in found if path.is_dir())})
    now, on_disk, seen = start.copy(), set(), set()
    named: list[tuple[int, Operation]] = []  # so far, in order
    for number in range(len(operations) + 1):
        for state in _states_at(number, len(operations), start, named, on_disk, contents, max_pending, each_file):
            key = hash((frozenset(state.files.items()), state.folders))
            if key not in seen:
                seen.add(key)
                yield state
        if number == len(operations):
            return
        operation = operations[number]
        if operation.kind in NAMES:
            if operation.kind == "c":
                contents[number] = Content()
            now.apply(operation, number)
            named.append((number, operation))
        elif operation.kind == "s" and operation.path in now.folders:
            # By the name that the folder had then: it may have been renamed since, with what is in it.
            on_disk |= {index for index, entry in named if entry.folder == operation.path}
        elif operation.path in now.files:
            content = contents[now.files[operation.path]]
            content.settle() if operation.kind == "s" else content.pending.append(operation)


def _states_at(
    number: int,
    total: int,
    start: Tree,
    named: list[tuple[int, Operation]],
    on_disk: set[int],
    contents: dict[int, Content],
    max_pending: int,
    each_file: bool,
) -> Iterator[CrashState]:
    free = [index for index, _ in named if index not in on_disk][-max_pending:]
    for chosen in itertools.product((True, False), repeat=len(free)):
        left_out = {index for index, happened in zip(free, chosen) if not happened}
        tree = start.copy()
        for index, operation in named:
            if index not in left_out:
                tree.apply(operation, index)
        loose = [index for index in set(tree.files.values()) if contents[index].pending]
        # All bytes there, none, half, and (`each_file`) for each single file none and half.
        fates: list[dict[int, str]] = [{}, dict.fromkeys(loose, "none"), dict.fromkeys(loose, "half")]
        fates += [{index: fate} for index in loose for fate in ("none", "half")] if each_file else []
        for fate in fates if loose else [{}]:
            files = {}
            for name, index in tree.files.items():
                content = contents[index]
                kept = [] if fate.get(index) == "none" else content.pending
                files[name] = bytes(content.after(kept, torn=fate.get(index) == "half"))
            yield CrashState(number, total, files, frozenset(tree.folders - {""}))
