import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from amfm.data_pipeline.config import FilterConfig
from amfm.data_pipeline.prepare.prepare import prepare
from amfm.data_pipeline.store.store import TokenStore
from amfm.data_pipeline.tokenizer.tokenizer import load_tokenizer
from tests.data_pipeline.prepare.stores import KILLED_DRIVER, ROOT, contents, elsewhere
from tests.helpers.full_disk import largest_file, limit_files
from tests.helpers.tiny_store import make_tiny_store, run_in_process


def in_process(config, **arguments):
    return prepare(config, runner=run_in_process, **arguments)


def all_texts(store):
    """Every document of a store as text, in the order of its parts."""
    opened, tokenizer = TokenStore.open(store), load_tokenizer(store)
    texts = []
    for _, _, part in opened.all_parts():
        tokens = opened.read_tokens(part, 0, part.num_tokens).astype(np.int64)
        texts += [tokenizer.decode(piece.tolist()) for piece in np.split(tokens, opened.document_ends(part))[:-1]]
    return texts


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """A configuration whose text has 300 documents, of which 100 come again, some of those twice."""
    config = make_tiny_store(tmp_path_factory.mktemp("copies"), part_bytes=20_000)
    path = Path(config.sources[0].paths[0])
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, *lines[:100], *lines[50:80]]))
    shutil.rmtree(config.store)
    dropping = config.sources[0].model_copy(update={"filters": FilterConfig(exact_duplicates="drop")})
    return config.model_copy(update={"sources": (dropping,)}), [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="module")
def reference(copies):
    config, _ = copies
    in_process(config)
    return config


def test_each_text_stays_once_wherever_its_copies_are(copies, reference):
    _, texts = copies
    assert sorted(all_texts(reference.store)) == sorted(texts)
    rejects = [json.loads(line) for file in Path(reference.store).glob("rejects/*/*") for line in file.open()]
    assert len(rejects) == 130
    assert {reject["reason"] for reject in rejects} == {"filter: the text came before, exact_duplicates=drop"}
    # The first in the order of the plan stays, so a later unit has no text of an earlier one.
    assert len(TokenStore.open(reference.store).parts("source0", "train")) > 3


def test_a_second_call_reads_no_text_again(reference):
    before = {path: path.stat().st_mtime_ns for path in Path(reference.store).rglob("*.npy")}
    stages = []
    assert in_process(reference, progress=lambda now: stages.append(now.stage)).units_written == 0
    assert stages == [] and before == {path: path.stat().st_mtime_ns for path in Path(reference.store).rglob("*.npy")}
    assert not list(Path(reference.store).rglob("*.hashes.npy"))


@pytest.mark.slow
def test_ray_finds_the_same_with_several_actors(reference, ray_session, tmp_path):
    config = elsewhere(reference, tmp_path, num_actors=3)
    prepare(config)
    assert contents(config.store) == contents(reference.store)


@pytest.mark.parametrize("attempts", [(3,), pytest.param((0, 3, 6, 9), marks=pytest.mark.slow)])
def test_a_driver_killed_while_looking_for_duplicates_changes_nothing(reference, tmp_path, attempts):
    config = elsewhere(reference, tmp_path)
    for attempt in attempts:
        command = [sys.executable, "-c", KILLED_DRIVER, str(ROOT), config.model_dump_json()]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            for _ in range(1 + attempt):
                process.stdout.readline()
            time.sleep(0.002 * (attempt % 5))
            process.kill()
            if process.wait() != -signal.SIGKILL:
                break
    in_process(config)
    assert contents(config.store) == contents(reference.store)


def test_without_the_filter_every_copy_stays(copies, tmp_path):
    config, texts = copies
    keeping = config.sources[0].model_copy(update={"filters": FilterConfig()})
    config = elsewhere(config, tmp_path).model_copy(update={"sources": (keeping,)})
    in_process(config)
    assert len(all_texts(config.store)) == len(texts) + 130


def test_an_altered_list_of_duplicates_is_an_error(reference, tmp_path):
    shutil.copytree(reference.store, tmp_path / "store")
    config = elsewhere(reference, tmp_path)
    store = TokenStore.open(config.store)
    shutil.rmtree(store.path / store.parts("source0", "train")[0].path)
    for path in Path(config.store).rglob("*.skips.npy"):
        path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    with pytest.raises(RuntimeError, match=r"skips.npy is damaged; delete its folder and run"):
        in_process(config)


def test_a_full_disk_while_looking_for_duplicates_is_one_message_and_the_next_call_goes_on(reference, tmp_path):
    config = elsewhere(reference, tmp_path)

    def tighten(progress):
        if progress.stage == "duplicates" and progress.units_done == 2:
            limit_files(100)

    with (
        largest_file(),
        pytest.raises(
            RuntimeError, match=r"the disk is full while writing .*; 2 of \d+ missing parts are done and kept"
        ),
    ):
        in_process(config, progress=tighten)
    in_process(config)
    assert contents(config.store) == contents(reference.store)


@pytest.mark.parametrize("known", [[], {}, {"web/000000": 3}, "x", None])
def test_what_was_found_and_is_damaged_is_found_again(tmp_path, known):
    config = make_tiny_store(tmp_path, num_documents=30)
    drop = {"filters": FilterConfig(exact_duplicates="drop")}
    config = config.model_copy(update={"sources": tuple(source.model_copy(update=drop) for source in config.sources)})
    first = in_process(config)
    (found,) = Path(config.store).glob("duplicates/*/found.json")
    key, _ = json.loads(found.read_bytes())
    found.write_text(json.dumps([key, known]))
    assert in_process(config).identity == first.identity
