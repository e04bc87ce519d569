import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from amfm.data_pipeline.config import SourceConfig
from amfm.data_pipeline.prepare import documents, records
from amfm.data_pipeline.prepare.documents import SegmentReader
from amfm.data_pipeline.prepare.records import Document, Reject
from amfm.data_pipeline.prepare.rejects import place_of
from amfm.data_pipeline.prepare.segments import Segment, check_column, cut_segments
from amfm.data_pipeline.prepare.sources import list_files
from amfm.data_pipeline.store.megatron_files import HEADER, MAGIC


def source_of(*paths, **settings):
    return SourceConfig(name="web", paths=tuple(str(path) for path in paths), **settings)


def read_all(files, segment_bytes, column="text"):
    return [
        item
        for file in files
        for segment in cut_segments(file, segment_bytes)
        for item in SegmentReader(segment, column)
    ]


def texts_of(items):
    return [item.text for item in items if isinstance(item, Document)]


def jsonl(records):
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize("last_newline", [True, False])
@pytest.mark.parametrize("segment_bytes", [1, 7, 64, 1000, 10**6])
def test_byte_ranges_of_any_size_read_each_line_exactly_once(tmp_path, segment_bytes, last_newline):
    records = [{"text": f"{number} é 漢 " + "x" * (number * 7 % 53)} for number in range(60)]
    content = jsonl(records)
    path = tmp_path / "a.jsonl"
    path.write_text(content if last_newline else content.rstrip("\n"))
    (file,) = list_files(source_of(path))
    segments = cut_segments(file, segment_bytes)
    readers = [SegmentReader(segment, "text") for segment in segments]
    texts = [item.text for reader in readers for item in reader]
    assert texts == [record["text"] for record in records]
    assert sum(reader.covered_bytes for reader in readers) == file.num_bytes


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "md", "jsonl", "parquet", "arrow"])
def test_every_kind_reads_alike_in_every_compression(tmp_path, kind, suffix):
    text = "First line.\n\nSecond é 漢.\n"
    table, sink = pyarrow.table({"text": [text]}), pyarrow.BufferOutputStream()
    if kind == "parquet":
        pyarrow.parquet.write_table(table, sink)
    elif kind == "arrow":
        with pyarrow.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    else:
        sink.write((jsonl([{"text": text}]) if kind == "jsonl" else text).encode())
    content = sink.getvalue().to_pybytes()
    path = tmp_path / f"a.{kind}{suffix}"
    if suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    elif suffix == ".zst":
        with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(content)
    else:
        path.write_bytes(content)
    assert texts_of(read_all(list_files(source_of(path)), 1000)) == [text]


def test_parquet_is_read_by_runs_of_row_groups(tmp_path):
    texts = [f"document {number} " * 400 for number in range(50)]
    table = pyarrow.table({"id": range(50), "body": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    files = list_files(source_of(tmp_path / "a.parquet"))
    assert [len(cut_segments(files[0], segment_bytes)) for segment_bytes in (10, 90_000, 10**6)] == [8, 4, 1]
    for segment_bytes in (10, 90_000):
        assert texts_of(read_all(files, segment_bytes, "body")) == texts


def test_two_columns_of_one_name_are_refused(tmp_path):
    schema = pyarrow.schema([("text", pyarrow.string()), ("text", pyarrow.string())])
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], schema=schema)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(tmp_path / "b.arrow", schema) as stream:
        stream.write_table(table)
    a, b = list_files(source_of(tmp_path))
    with pytest.raises(ValueError, match=r"a.parquet has 2 columns 'text' among text, text; set text_column"):
        check_column([a], "text")
    assert [item.reason for item in read_all([a, b], 1000)] == ["2 columns 'text' among text, text"] * 2


def bytes_read(read):
    """Bytes that this process asks of files while `read` runs."""

    def so_far():
        return int(Path("/proc/self/io").read_text().split()[1])

    before = so_far()
    read()
    return so_far() - before


def write_kind(kind, path, size):
    """A file of about `size` or 8 times `size` KiB that was quadratic to read: of as many small pieces as there can be."""
    if kind == "many row groups":
        table = pyarrow.table({f"c{number}": ["some text " * 10] * size for number in range(5)})
        pyarrow.parquet.write_table(table.rename_columns([*"abcd", "text"]), path, row_group_size=1)
    elif kind == "documents of tokens":
        lengths, ids = np.full(size * 64, 4, "<i4"), np.arange(size * 256, dtype="<i4") % 1000
        path.with_suffix(".bin").write_bytes(ids.tobytes())
        pointers, bounds = np.arange(len(lengths), dtype="<i8") * 16, np.arange(len(lengths) + 1, dtype="<i8")
        head = HEADER.pack(MAGIC, 1, 4, len(lengths), len(bounds))
        path.write_bytes(head + lengths.tobytes() + pointers.tobytes() + bounds.tobytes())
    elif kind == "rejects":
        path.write_text((json.dumps({"text": "x" * 500}) + "\n" + "no JSON" * 70 + "\n") * size * 8)
    else:
        path.write_text(json.dumps({"text": "x" * 8192 * size}))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("many row groups", "a.parquet"),
        ("documents of tokens", "a.idx"),
        ("rejects", "a.jsonl"),
        ("one line", "a.jsonl"),
    ],
)
def test_bytes_that_are_read_grow_with_the_file_and_no_faster(tmp_path, kind, name):
    """Whatever is read again for each segment makes 1 TB impossible."""
    read, sizes = [], []
    for size in (250, 1000):
        write_kind(kind, tmp_path / name, size)
        files = list_files(source_of(tmp_path / name))
        sizes.append(sum(path.stat().st_size for path in tmp_path.iterdir()))
        read.append(bytes_read(lambda files=files: read_all(files, 50_000)))
    assert read[1] / read[0] < 1.5 * sizes[1] / sizes[0]


def test_a_hugging_face_dataset_on_disk_is_read(tmp_path):
    """save_to_disk writes data-*.arrow streams next to two .json files that are not text."""
    table = pyarrow.table({"text": ["one", "two", None, "three"]})
    for number in range(2):
        with pyarrow.ipc.new_stream(tmp_path / f"data-0000{number}-of-00002.arrow", table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    (tmp_path / "state.json").write_text("{}")
    items = read_all(list_files(source_of(tmp_path)), 1000)
    assert texts_of(items) == ["one", "two", "three"] * 2
    (tmp_path / "data-00001-of-00002.arrow").write_bytes(b"broken")
    assert any(
        isinstance(item, Reject) and "damaged arrow stream" in item.reason
        for item in read_all(list_files(source_of(tmp_path)), 1000)
    )


def test_by_products_of_the_datasets_library_are_left_out_and_its_splits_must_be_named(tmp_path):
    """map and filter leave cache-*.arrow next to the data; a DatasetDict has a folder a split."""
    table = pyarrow.table({"text": ["one"]})
    for name in ("train/data-00000-of-00001.arrow", "train/cache-1f.arrow", "test/data-00000-of-00001.arrow"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with pyarrow.ipc.new_stream(tmp_path / name, table.schema) as stream:
            stream.write_table(table)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match=r"is a dataset of the splits test, train; name the folder of one of them"):
        list_files(source_of(tmp_path))
    assert texts_of(read_all(list_files(source_of(tmp_path / "train")), 1000)) == ["one"]


def test_bad_records_become_rejects_with_place_and_reason(tmp_path):
    lines = [
        b'{"text": "good"}', b"", b"not json", b'["list"]', b'{"body": "x"}', b'{"text": 5}', b'{"text": null}',
        b'{"text": "  "}', b'{"text": "\xff"}', b'{"text": "\\ud800"}', b'{"text": "also good"}',
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    items = read_all(list_files(source_of(tmp_path / "a.jsonl")), 1000)
    assert texts_of(items) == ["good", "also good"]
    rejects = [item for item in items if isinstance(item, Reject)]
    reasons = [reject.reason for reject in rejects]
    for reason, part in zip(
        reasons, ["not JSON", "no field 'text'", "no field 'text'", "is int, not text", "is NoneType", "empty text", "not JSON", "surrogate"]
    ):  # fmt: skip
        assert part in reason
    assert len(reasons) == 8
    # A blank line counts; the first record begins at byte 0.
    numbers = (3, 4, 5, 6, 7, 8, 9, 10)
    positions = [f"0/a.jsonl:byte {len(b'x'.join(lines[: number - 1])) + 1}" for number in numbers]
    assert [reject.position for reject in rejects] == positions
    segments = cut_segments(*list_files(source_of(tmp_path / "a.jsonl")), 17)
    for number, position in zip(numbers, positions):
        shown = f"{tmp_path}/a.jsonl:line {number} ({position.partition(':')[2]})"
        assert place_of(position, segments) == shown
    for segment_bytes in (1, 17, 40):
        cut = read_all(list_files(source_of(tmp_path / "a.jsonl")), segment_bytes)
        assert [item.position for item in cut if isinstance(item, Reject)] == positions


def test_text_that_is_not_utf8_is_rejected_with_the_byte(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"abc\xff\xfe")
    (tmp_path / "good.txt").write_text("good")
    items = read_all(list_files(source_of(tmp_path)), 1000)
    assert texts_of(items) == ["good"]
    assert items[0].reason.startswith("not UTF-8") and items[0].reason.endswith("byte 3")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_document_beyond_the_limit_is_a_reject_and_the_rest_is_read(tmp_path, monkeypatch, suffix):
    """A small .gz may hold gigabytes in one line or text."""
    for module in (documents, records):
        monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 1000)
    for module in (documents, records):
        monkeypatch.setattr(module, "MAX_UNPACKED_BYTES", 10**6)
    pack = gzip.compress if suffix else bytes
    long, short = json.dumps({"text": "a" * 10**5}), json.dumps({"text": "short"})
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack("\n".join([short, long, short, long]).encode()))
    (tmp_path / f"b.txt{suffix}").write_bytes(pack(b"b" * 1001))
    (tmp_path / f"c.txt{suffix}").write_bytes(pack(b"c" * 1000))
    if suffix:
        (tmp_path / "d.parquet.gz").write_bytes(pack(bytes(10**6 + 1)))
    for segment_bytes in (10**7, 17, 50_000):
        items = read_all(list_files(source_of(tmp_path)), segment_bytes)
        assert texts_of(items) == ["short", "short", "c" * 1000]
        rejects = [item for item in items if isinstance(item, Reject)]
        places = ["line 2", "line 4"] if suffix else ["byte 18", "byte 100049"]
        assert [item.position.split(":")[-1] for item in rejects[:2]] == places
        assert ["longer than" in item.reason for item in rejects[:3]] == [True] * 3
        assert len(rejects) == 3 + bool(suffix) and (not suffix or "unpacks to more than" in rejects[3].reason)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.parquet.gz", "a.txt.zst", "a.jsonl.zst", "a.arrow.zst"])
def test_a_broken_compressed_file_is_rejected(tmp_path, name):
    (tmp_path / name).write_bytes(b"this is not a compressed stream at all")
    (item,) = read_all(list_files(source_of(tmp_path / name)), 1000)
    assert isinstance(item, Reject) and item.reason.startswith("damaged ")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_cell_that_is_not_utf8_is_a_reject_and_the_rest_is_read(tmp_path, kind):
    """Writers of both formats may take bytes for text without a look."""
    cells = pyarrow.array([b"one", b"bad \xff bytes", b"three"], pyarrow.binary())
    table = pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), 3, cells.buffers())})
    if kind == "parquet":
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    else:
        with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
            stream.write_table(table)
    items = read_all(list_files(source_of(tmp_path)), 1000)
    assert texts_of(items) == ["one", "three"]
    (reject,) = [item for item in items if isinstance(item, Reject)]
    assert reject.position.endswith("row 1") and reject.reason == "not UTF-8: invalid start byte at byte 4"


@pytest.mark.parametrize("offsets", [[0, 3, -(2**31), 6], [0, 3, 2**30, 6], [0, 3, 2, 6]])
def test_arrow_cells_outside_of_their_bytes_are_damage_and_not_looked_at(tmp_path, offsets):
    """Arrow ends the process at the first look, by std::length_error or a segmentation fault."""
    buffers = [None, pyarrow.py_buffer(np.array(offsets, "<i4")), pyarrow.py_buffer(b"onetwo")]
    column = pyarrow.Array.from_buffers(pyarrow.string(), 3, buffers)
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", pyarrow.schema([("text", pyarrow.string())])) as stream:
        stream.write_batch(pyarrow.RecordBatch.from_arrays([column], ["text"]))
    (item,) = read_all(list_files(source_of(tmp_path / "a.arrow")), 1000)
    assert isinstance(item, Reject) and item.reason.startswith("damaged arrow stream")


def test_parquet_without_text_in_the_column_is_refused_by_its_footer(tmp_path):
    """A source of which no file can have text; one such file among others gives rejects."""
    for name, column in {"a": [1.5], "b": [["x"]], "c": ["x"]}.items():
        pyarrow.parquet.write_table(pyarrow.table({"text": column, "body": ["x"]}), tmp_path / f"{name}.parquet")
    a, b, c = list_files(source_of(tmp_path))
    with pytest.raises(ValueError, match=r"column 'text' of .*a.parquet holds double, not text; set text_column"):
        check_column([a, b], "text")
    with pytest.raises(ValueError, match=r"b.parquet has no column 'body2' among text, body; set text_column"):
        check_column([b], "body2")
    check_column([a, b, c], "text")
    check_column([b], "body")


def test_a_broken_parquet_file_is_an_error_that_names_it(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"a.parquet is not a whole parquet file"):
        read_all(list_files(source_of(tmp_path / "a.parquet")), 1000)


def test_folders_and_globs_give_names_that_do_not_depend_on_where_they_are(tmp_path):
    for root in ("here", "there"):
        (tmp_path / root / "sub").mkdir(parents=True)
        for name in ("b.txt", "a.md", "sub/c.jsonl", "skip.bin", ".hidden.txt"):
            (tmp_path / root / name).write_text("x")
    names = [[file.name for file in list_files(source_of(tmp_path / root))] for root in ("here", "there")]
    assert names[0] == names[1] == ["0/a.md", "0/b.txt", "0/sub/c.jsonl"]
    globbed = list_files(source_of(tmp_path / "here" / "**" / "*.*"))
    assert [file.name for file in globbed] == ["0/a.md", "0/b.txt", "0/sub/c.jsonl"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "missing.txt", r"source 'web': path '.*missing.txt' does not exist; name a file"),
        (lambda root: root / "no*.txt", "does not exist; name a file, a folder or a glob"),
        (lambda root: root / "empty", r"holds no .txt, .md, .jsonl"),
        (lambda root: root / "a.docx", "must end in .txt, .md, .jsonl"),
        (lambda root: root / "zero.txt", "is an empty file; remove it from data.sources or put text into it"),
    ],
)
def test_paths_that_give_nothing_are_refused_with_a_remedy(tmp_path, make, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.docx").write_text("x")
    (tmp_path / "zero.txt").touch()
    with pytest.raises(ValueError, match=message):
        list_files(source_of(make(tmp_path)))


def test_a_segment_beyond_the_last_line_start_is_empty(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * 100}) + "\n")
    (file,) = list_files(source_of(tmp_path / "a.jsonl"))
    assert list(SegmentReader(Segment(file, 50, file.num_bytes, 50), "text")) == []
