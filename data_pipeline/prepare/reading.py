"""How the records of a source become texts: fields and templates, encodings, cuts of long files, filters and transforms of users.

Rules that drop documents see one text at a time and are part of a unit's key, so changing them writes again what they could
change. What they drop is a reject with the rule that dropped it: a filter that takes too much shows in the rejects file.
"""

from __future__ import annotations

import codecs
import io
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import IO, Any

from amfm.data_pipeline.config import CutConfig, FilterConfig, SourceConfig
from amfm.data_pipeline.prepare.own_code import Step, find_reader, find_steps
from amfm.data_pipeline.prepare.records import MAX_DOCUMENT_BYTES, read_line
from amfm.data_pipeline.prepare.sources import InputFile

WINDOW = 2**16  # bytes in which a cut by size looks for the end of a line
Filter = Callable[[str], str | None]


@dataclass(frozen=True)
class Template:
    """A text from several fields of a record. parts: text before each field, and the field; a last one without."""

    parts: tuple[tuple[str, str | None], ...]

    @classmethod
    def parse(cls, text: str) -> Template:
        """Read `"{title}\\n\\n{body.text}"`; braces are written twice. Raises ValueError for what is not a template."""
        try:
            found = [
                (before, name, spec, conversion) for before, name, spec, conversion in string.Formatter().parse(text)
            ]
        except ValueError as error:
            raise ValueError(f"template {text!r} is not one ({error}); write a brace of the text twice") from error
        if any(spec or conversion or name == "" for _, name, spec, conversion in found):
            raise ValueError(f"template {text!r} must have only names of fields in braces, such as {{title}}")
        if all(name is None for _, name, _, _ in found):
            raise ValueError(f"template {text!r} has no field; write one in braces, such as {{title}}")
        return cls(tuple((before, name) for before, name, _, _ in found))

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields."""
        return tuple(dict.fromkeys(name for _, name in self.parts if name is not None))

    def read(self, record: Mapping[str, Any]) -> str:
        """The text. Raises ValueError for a field that is missing or is not text or a number."""
        return "".join(before + ("" if name is None else _as_text(record, name)) for before, name in self.parts)


def _as_text(record: Mapping[str, Any], name: str) -> str:
    value = find_field(record, name)
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"field {name!r} is {type(value).__name__}, not text")


def find_field(record: Mapping[str, Any], name: str) -> Any:
    """The value of a field; `a.b` is b inside of a where no field is called so. Raises ValueError for a missing one."""
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(f"no field {name!r}")
        value = value[part]
    return value


def top_field(name: str, names: Sequence[str]) -> str:
    """The column among these that has a field: the first part of a dotted name, unless a column is called so."""
    return name if name in names else name.partition(".")[0]


@dataclass(frozen=True)
class Reading:
    """Settings of a source that shape its texts, beyond the names of fields."""

    template: Template | None = None
    encoding: str = "utf-8"
    errors: str = "strict"
    cut: CutConfig | None = None
    steps: tuple[Step, ...] = ()
    readers: tuple[tuple[str, Step], ...] = ()  # of users, by the suffix of files of the source

    def facts(self) -> dict[str, Any]:
        """What decides bytes, for keys of units: nothing where all is as it was before there were such settings."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {name: value for name, value in found.items() if value != getattr(AS_IT_IS, name)}
        if self.template is not None:
            changed["template"] = self.template.parts
        if self.cut is not None:
            changed["cut"] = self.cut.model_dump()
        for name in ("steps", "readers"):
            if name in changed:
                changed[name] = [(step.name, step.digest) for step in self.all_steps()]
        return changed

    def all_steps(self) -> tuple[Step, ...]:
        """All code of users."""
        return (*self.steps, *(step for _, step in self.readers))

    def code(self) -> dict[str, str]:
        """Digests of the users' code, by name."""
        return {step.name: step.digest for step in self.all_steps()}

    def decode(self, content: bytes | bytearray) -> str:
        """Decode text as the source has it; UnicodeDecodeError is the record's."""
        return content.decode(self.encoding, self.errors)

    @property
    def recodes(self) -> bool:
        """Whether records are to be decoded before a parser of UTF-8 sees them."""
        return (self.encoding, self.errors) != ("utf-8", "strict")


AS_IT_IS = Reading()


def reading_of(source: SourceConfig, files: Iterable[InputFile]) -> Reading:
    """The settings of a source of these files. Raises ValueError as its parts do."""
    readers = {}
    for suffix in sorted({file.suffix for file in files if file.kind == "own"}):
        spec = find_reader(suffix)
        assert spec is not None, "a file is of this kind if a reader has its suffix"
        readers[suffix] = Step(spec.name, False, spec.load(), spec.digest())
    return Reading(
        None if source.template is None else Template.parse(source.template),
        source.encoding,
        source.errors,
        source.cut,
        find_steps(source.steps, source.name),
        tuple(readers.items()),
    )


def check_reading(source: SourceConfig, *, has_lines: bool) -> None:
    """Raise ValueError for an encoding that Python does not know, or a cut that is not one. has_lines: files are read by lines."""
    try:
        is_text = codecs.lookup(source.encoding)._is_text_encoding
    except LookupError:
        is_text = False
    where = f"source {source.name!r}: encoding={source.encoding!r}"
    if not is_text:
        raise ValueError(f"{where} is none of Python's; use for example latin-1, cp1252 or gb18030")
    if has_lines and "\n".encode(source.encoding) != b"\n":
        raise ValueError(
            f"{where} ends a line in other bytes than one newline, by which lines are found; convert the files"
        )
    if source.cut is None:
        return
    cut = [value for value in (source.cut.separator, source.cut.first_line, source.cut.size) if value is not None]
    if len(cut) != 1:
        raise ValueError(f"source {source.name!r}: cut must have one of separator, first_line and size")
    try:
        re.compile(str(cut[0]))
    except re.error as error:
        raise ValueError(
            f"source {source.name!r}: cut has {cut[0]!r}, which is not a regular expression ({error}); correct it"
        ) from error


def cut_stream(stream: IO[bytes], start: int, stop: int, cut: CutConfig, encoding: str) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of the documents that a file is cut into and that begin in [start, stop)."""
    if cut.size is not None:
        return cut_by_size(stream, start, stop, cut.size)
    return cut_by_lines(lines_from(stream, start), cut, start, stop, encoding)


def lines_from(stream: IO[bytes], start: int) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of the lines whose first byte is at `start` or after it."""
    offset = max(0, start - 1)
    stream.seek(offset)
    if start:
        offset += read_line(stream)[1]
    while (found := read_line(stream))[1]:
        yield offset, found[0]
        offset += found[1]


def cut_by_size(stream: IO[bytes], start: int, stop: int, size: int) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of the pieces of a file that begin at multiples of `size` in [start, stop), each moved to the next line.

    Where no line ends within a window, to the next space, or the next whole character of UTF-8.
    """
    end = stream.seek(0, io.SEEK_END)
    first = _boundary(stream, start, size, end)
    for nominal in range(start + size, stop + size, size):
        last = _boundary(stream, min(nominal, end), size, end)
        if last > first:
            stream.seek(first)
            yield first, stream.read(last - first)
        first = last


def _boundary(stream: IO[bytes], nominal: int, size: int, end: int) -> int:
    if nominal == 0 or nominal >= end:
        return min(nominal, end)
    stream.seek(nominal - 1)
    window = stream.read(min(size, WINDOW))
    for mark in (b"\n", b" "):
        if (found := window.find(mark)) >= 0:
            return nominal + found
    return nominal + next((index for index, byte in enumerate(window[1:5]) if byte & 0xC0 != 0x80), 0)


def cut_by_lines(
    lines: Iterator[tuple[int, bytes]], cut: CutConfig, start: int, stop: int, encoding: str
) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of the documents that begin in [start, stop): after a separator, or with a first line.

    lines: offset and bytes of each from `start` on, to the end of the file. Of a document longer than MAX_DOCUMENT_BYTES
    somewhat more than that is given.
    """
    pattern = re.compile(cut.separator if cut.separator is not None else cut.first_line or "")
    held: list[bytes] = []
    num_bytes = 0
    begin = 0 if start == 0 else None
    for offset, line in lines:
        if pattern.search(line.decode(encoding, "replace").rstrip("\r\n")):
            if held and begin is not None:
                yield begin, b"".join(held)
            if offset >= stop:
                return
            held = [] if cut.separator is not None else [line]
            begin, num_bytes = offset, len(line)
        elif begin is not None:
            if num_bytes <= MAX_DOCUMENT_BYTES:
                held.append(line)
            num_bytes += len(line)
        elif offset >= stop:
            return
    if held and begin is not None:
        yield begin, b"".join(held)


def make_filter(config: FilterConfig, source: str) -> Filter | None:
    """Make the function that says why a text is dropped, None for a text that stays; None without any filter.

    Raises ValueError for a bad pattern.
    """
    if config == FilterConfig():
        return None
    keep = _compile(config.keep_pattern, f"source {source!r}: filters.keep_pattern")
    drop = _compile(config.drop_pattern, f"source {source!r}: filters.drop_pattern")

    def reason_to_drop(text: str) -> str | None:
        if len(text) < config.min_characters:
            return f"filter: {len(text)} characters, fewer than min_characters={config.min_characters}"
        if config.max_characters is not None and len(text) > config.max_characters:
            return f"filter: {len(text)} characters, more than max_characters={config.max_characters}"
        if keep is not None and not keep.search(text):
            return f"filter: keep_pattern {keep.pattern!r} not found"
        if drop is not None and (found := drop.search(text)):
            return f"filter: drop_pattern {drop.pattern!r} found at character {found.start()}"
        return None

    return reason_to_drop


def _compile(pattern: str | None, where: str) -> re.Pattern[str] | None:
    """Compile a pattern if there is one; ValueError names its setting."""
    if pattern is None:
        return None
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{where}={pattern!r} is not a regular expression ({error}); correct it") from error
