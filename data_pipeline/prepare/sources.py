"""The files of a source: local files, folders and globs, the same below a URL or in a data set of the Hub; and their kinds.

A file's name in the plan is the number of the path that found it and what follows below it, so a plan does not depend on
where a source is mounted, and its order is that of the names. The kind follows only from the suffix and no file is opened.
A path that is named directly must be usable; of a folder or a glob the files of known kinds are taken.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import os
import re
import stat
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow

from amfm.data_pipeline.config import SourceConfig
from amfm.data_pipeline.prepare.hub import headers_for, is_hub, list_hub, pin_revisions
from amfm.data_pipeline.prepare.own_code import find_reader
from amfm.data_pipeline.store.http_files import HttpError, HttpFile, is_http, without_secrets
from amfm.data_pipeline.store.object_store import RemoteFolder, is_url, split_url

Kind = Literal[
    "text", "jsonl", "parquet", "arrow", "mds", "megatron", "dolma", "datatrove", "nanogpt", "litdata", "own"
]
Compression = Literal["none", "gz", "zst"]

KIND_BY_SUFFIX: dict[str, Kind] = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".mds": "mds",
    ".idx": "megatron",
    ".npy": "dolma",
    ".ds": "datatrove",
    ".bin": "nanogpt",
}
# Of kinds that hold token ids. Files that end in .bin are of many programs, and taken where they are named.
TOKEN_KINDS = ("megatron", "dolma", "datatrove", "nanogpt", "litdata")
NAMED_ALONE = "nanogpt"
LITDATA_NAME = re.compile(r"chunk-\d+-\d+\.bin")
COMPRESSION_BY_SUFFIX: dict[str, Compression] = {".gz": "gz", ".zst": "zst", ".zstd": "zst"}
BUFFER_BYTES = 2**18  # a line of jsonl is often longer than the buffer that Python would take: a third of the CPU time
DATASET_DICT = "dataset_dict.json"  # written by the datasets library next to one folder a split
MAPPED = "cache-*.arrow"  # left by the datasets library next to the data: results of map and filter


@dataclass(frozen=True)
class InputFile:
    """A file of a source. path: local, or a URL. name: stable across machines, the index of the path and what follows.

    modified_ns: the time of its last change; of a file behind http a number from its version, which changes as that does.
    """

    path: str
    name: str
    kind: Kind
    compression: Compression
    num_bytes: int
    modified_ns: int

    @property
    def suffix(self) -> str:
        """That of its kind, without that of its compression."""
        return Path(_split_suffixes(self.name)[0]).suffix

    @property
    def shown(self) -> str:
        """The path for messages."""
        return without_secrets(self.path)

    def open_next(self, path: str) -> IO[bytes]:
        """Open it, or another file where it is; FileNotFoundError where that is missing."""
        return self.open() if path == self.path else replace(self, path=path).open()

    def open(self) -> IO[bytes]:
        """Open the file for reading at random, its bytes as they are stored."""
        if not is_url(self.path):
            return open(self.path, "rb", buffering=BUFFER_BYTES)
        if is_http(self.path):
            return HttpFile(self.path, self.num_bytes, headers=headers_for(self.path)).open()
        folder, name = split_url(self.path)
        return RemoteFolder(folder).open(name)

    def open_arrow(self) -> Any:
        """Open the file for pyarrow, which reads local ones without Python."""
        return pyarrow.PythonFile(self.open(), mode="r") if is_url(self.path) else pyarrow.OSFile(self.path)


@dataclass(frozen=True)
class _Found:
    """A file below the folder, glob or URL that was given; name: relative to it."""

    name: str
    path: str
    num_bytes: int
    modified_ns: int


def list_files(source: SourceConfig, pins: Mapping[str, str] = {}) -> list[InputFile]:
    """Find the files of a source, sorted by name; of data sets of the Hub at the commits that `pins` has for them.

    ValueError for a path, glob or URL that matches nothing, a file of unknown kind, an empty file named directly, or
    a dataset of several splits, and where a web server or the Hub cannot be reached; RuntimeError when an object store cannot be reached.
    """
    files: list[InputFile] = []
    for number, given in enumerate(source.paths):
        where = f"source {source.name!r}: path {without_secrets(given)!r}"
        if is_http(given) and "@" in urllib.parse.urlsplit(given).netloc:
            raise ValueError(
                f"{where} has a user name or password, which would be recorded with the run; leave it out, and give a signed "
                "link or a local file"
            )
        if is_hub(given):
            found = _list_hub(given, pins.get(given) or pin_revisions([given], {})[given], where)
        elif is_http(given):
            found = _choose_one(_find_source(given, where), where)
        else:
            found = _list_remote(given, where) if is_url(given) else _list_local(given, where)
        files += [_describe(item, f"{number}/{item.name}") for item in found]
    return sorted(files, key=lambda file: file.name)


def _list_local(given: str, where: str) -> list[_Found]:
    """List a folder (all levels), a file, or the files that a glob matches."""
    if not given.strip():
        raise ValueError(f"{where} is empty, and would be all of the working directory; {_REMEDY}")
    path = Path(given).expanduser()
    index = Path(f"{path}.idx")
    if not path.exists() and index.is_file():
        return [_stat(index, index.name, where)]  # the prefix of Megatron's --data-path
    if path.is_dir():
        items = _walk(path, where)
        for item in items:
            _refuse_dead_link(item, item.name, where)
        return _choose_in_folder([_stat(item, item.relative_to(path).as_posix(), where) for item in items], where)
    if path.exists():  # a device, too, which is rejected
        return _choose_one(_stat(path, path.name, where), where)
    matches = _match(path, where)
    root = _fixed_root(str(path))
    for item in matches:
        _refuse_dead_link(item, item.name, where)
        for folder in item.relative_to(root).parents:
            _refuse_linked_folder(root / folder, where, but=root)
    found = [_stat(item, item.relative_to(root).as_posix(), where) for item in matches if not item.is_dir()]
    return _choose_matches(found, where, given)


def _match(path: Path, where: str) -> list[Path]:
    """List what a glob matches. Below `**` folders are walked as below one that is named: links may lead back to them."""
    if "**" not in path.parts:
        return [Path(item) for item in glob.glob(str(path))]
    depth = path.parts.index("**")
    pattern = _compile_glob("/".join(path.parts[depth:]))
    folders = [Path(item) for item in glob.glob(str(Path(*path.parts[:depth])) or ".")]
    found = [(folder, item) for folder in folders if folder.is_dir() for item in _walk(folder, where)]
    return [item for folder, item in found if pattern.fullmatch(item.relative_to(folder).as_posix())]


def _walk(folder: Path, where: str) -> list[Path]:
    """List the files below a folder. Raises ValueError for text that would be left out silently.

    That is below a folder that cannot be read, or behind a link. Hidden folders and `lost+found` hold no text of the source.
    """

    def refuse(error: OSError) -> None:
        remedy = "make it readable, or name what is wanted in paths"
        raise ValueError(f"{where}: {error.filename} cannot be read ({error.strerror}); {remedy}") from error

    found = []
    for current, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "lost+found"]
        for item in (Path(current, name) for name in folders):
            _refuse_linked_folder(item, where)
        for item in (Path(current, name) for name in names):
            if item.is_file() or _is_data(item.name):
                found.append(item)
    return found


def _refuse_linked_folder(path: Path, where: str, *, but: Path | None = None) -> None:
    """Reject a link to a folder, which may hold text of the source a second time; `but`: where the user's own path leads."""
    if path != but and path.is_symlink():
        remedy = f"add {path.resolve()} to paths, or remove the link"
        raise ValueError(f"{where}: {path} is a link to a folder, and those are not followed; {remedy}")


def _refuse_dead_link(path: Path, name: str, where: str) -> None:
    """Reject a link to nothing that has the name of a file of text."""
    if path.is_symlink() and not path.exists() and _is_data(name):
        raise ValueError(f"{where}: {path} is a link to {path.readlink()}, which is not there; fix or remove it")


def _list_hub(given: str, commit: str, where: str) -> list[_Found]:
    """List the files of a data set that its dataset card, a folder or a glob means."""
    files, patterns = list_hub(given, commit)
    globs = [_compile_glob(pattern) for pattern in patterns]
    found = [
        _Found(file.name, file.url, file.num_bytes, _version_number(file.digest))
        for file in files
        if any(pattern.fullmatch(file.name) for pattern in globs)
    ]
    matches = [item for item in found if _is_data(item.name)]
    if not matches:
        raise ValueError(
            f"{where} holds no {', '.join(KIND_BY_SUFFIX)} file in {', '.join(patterns)}; name a folder that does"
        )
    return matches


def _find_source(given: str, where: str) -> _Found:
    """Describe one file of a web server. Raises ValueError if it cannot be had."""
    name = urllib.parse.unquote(urllib.parse.urlsplit(given).path.rpartition("/")[2])
    try:
        file = HttpFile.stat(given, headers_for(given))
    except HttpError as error:
        raise ValueError(
            f"{where} cannot be read ({error}); check the address, the network and HTTPS_PROXY, or name a local file"
        ) from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return _Found(name, given, file.num_bytes, _version_number(file.version))


def _version_number(version: str) -> int:
    """A number instead of a time of change."""
    return int.from_bytes(hashlib.blake2b(version.encode(), digest_size=7).digest(), "big")


def _stat(path: Path, name: str, where: str) -> _Found:
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError(
            f"{where}: {path} is not a regular file, and a pipe or device cannot be read twice; name a file"
        )
    return _Found(name, str(path.resolve()), facts.st_size, facts.st_mtime_ns)


def _list_remote(given: str, where: str) -> list[_Found]:
    """List what a URL names: objects below it, those that a glob matches, or one object."""
    given = given.rstrip("/")
    is_glob = glob.has_magic(given.partition("://")[2])
    # Object stores list only by prefix: everything below the last folder before the first wildcard, then matched here.
    root = re.split(r"[*?[]", given)[0].rpartition("/")[0] if is_glob else given
    found = [
        _Found(item.name, f"{root}/{item.name}", item.num_bytes, item.modified_ns) for item in RemoteFolder(root).list()
    ]
    if is_glob:
        pattern = _compile_glob(given.removeprefix(f"{root}/"))
        return _choose_matches([item for item in found if pattern.fullmatch(item.name)], where, given)
    if found:
        return _choose_in_folder(found, where)
    # A prefix without objects below it may be an object itself, or that of Megatron's --data-path.
    for path in (given, f"{given}.idx"):
        folder, name = split_url(path)
        try:
            facts = RemoteFolder(folder).stat(name)
        except FileNotFoundError:
            continue
        return _choose_one(_Found(name, path, facts.num_bytes, facts.modified_ns), where)
    raise ValueError(f"{where} does not exist; {_REMEDY}")


def _compile_glob(pattern: str) -> re.Pattern[str]:
    """Compile a glob as a regular expression: `**/` any folders, `*` and `?` within one, [...] a set."""
    pieces = []
    for part in re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern):
        known = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
        pieces.append(known.get(part) or (fnmatch.translate(part)[4:-3] if part.startswith("[") else re.escape(part)))
    return re.compile("".join(pieces))


def _choose_in_folder(found: Sequence[_Found], where: str) -> list[_Found]:
    splits = [item.name.removesuffix(DATASET_DICT) for item in found if item.name.endswith(DATASET_DICT)]
    if splits:
        below = sorted({item.name.removeprefix(splits[0]).partition("/")[0] for item in found if "/" in item.name})
        raise ValueError(f"{where} is a dataset of the splits {', '.join(below)}; name the folder of one of them")
    matches = [item for item in found if _is_data(item.name)]
    if not matches:
        raise ValueError(f"{where} holds no {', '.join(KIND_BY_SUFFIX)} file; name a folder that does")
    return matches


def _choose_matches(found: Sequence[_Found], where: str, given: str) -> list[_Found]:
    names_all = _kind_of(given) == NAMED_ALONE
    matches = [item for item in found if names_all or _is_data(item.name)]
    if not matches:
        raise ValueError(f"{where} does not exist; {_REMEDY}")
    return matches


def _choose_one(found: _Found, where: str) -> list[_Found]:
    if _kind_of(found.name) is None:
        raise ValueError(f"{where} must end in {', '.join(KIND_BY_SUFFIX)}, on its own or with .gz or .zst")
    if found.num_bytes == 0:
        raise ValueError(f"{where} is an empty file; remove it from data.sources or put text into it")
    return [found]


_REMEDY = "name a file, a folder or a glob that matches text files"


def _is_data(name: str) -> bool:
    """Whether a file is of a kind that is taken of a folder, not hidden, and not a by-product of the datasets library."""
    parts = name.split("/")
    hidden = any(part.startswith(".") for part in parts)
    return not hidden and _kind_of(name) not in (None, NAMED_ALONE) and not fnmatch.fnmatchcase(parts[-1], MAPPED)


def _fixed_root(pattern: str) -> Path:
    """The folders of a glob before its first magic character."""
    parts = Path(pattern).parts
    fixed = [part for number, part in enumerate(parts) if not glob.has_magic("/".join(parts[: number + 1]))]
    return Path(*fixed) if fixed else Path()


def _split_suffixes(name: str) -> tuple[str, Compression]:
    suffix = Path(name).suffix
    if suffix in COMPRESSION_BY_SUFFIX:
        return name[: -len(suffix)], COMPRESSION_BY_SUFFIX[suffix]
    return name, "none"


def _kind_of(name: str) -> Kind | None:
    path = Path(_split_suffixes(name)[0])
    if LITDATA_NAME.fullmatch(path.name):
        return "litdata"
    known = KIND_BY_SUFFIX.get(path.suffix)
    return known if known is not None or find_reader(path.suffix) is None else "own"


def _describe(found: _Found, name: str) -> InputFile:
    """Describe a file for the plan; a Megatron index has the size and time of its .bin, which holds the tokens."""
    kind = _kind_of(found.name)
    assert kind is not None, f"{found.path} has no known kind"
    num_bytes, modified_ns = found.num_bytes, found.modified_ns
    compression = _split_suffixes(found.name)[1]
    if kind in TOKEN_KINDS and compression != "none":
        raise ValueError(f"{without_secrets(found.path)} holds tokens, which are read at random; unpack it")
    if kind in ("megatron", "dolma", "datatrove", "litdata") and is_http(found.path):
        raise ValueError(
            f"{without_secrets(found.path)} needs its other file next to it; copy both here, or to an object store"
        )
    if kind == "nanogpt" and not is_url(found.path) and Path(found.path).with_suffix(".idx").is_file():
        raise ValueError(
            f"{found.path} belongs to {Path(found.path).stem}.idx, which states where documents end; name that"
        )
    if kind == "megatron":
        num_bytes, modified_ns = _stat_tokens(found.path)
    return InputFile(found.path, name, kind, compression, num_bytes, modified_ns)


def _stat_tokens(index: str) -> tuple[int, int]:
    """Size and time of the .bin next to a Megatron index."""
    path = f"{index.removesuffix('.idx')}.bin"
    try:
        if is_url(path):
            folder, name = split_url(path)
            facts = RemoteFolder(folder).stat(name)
            return facts.num_bytes, facts.modified_ns
        local = os.stat(path)
    except FileNotFoundError as error:
        raise ValueError(f"{index} needs {path.rpartition('/')[2]} next to it; restore the pair") from error
    return local.st_size, local.st_mtime_ns
