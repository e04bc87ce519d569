import gzip
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers

from amfm.data_pipeline.config import DataConfig, PrepareConfig, SourceConfig, TokenizerConfig
from amfm.data_pipeline.prepare.finished_units import Journal
from amfm.data_pipeline.prepare.prepare import prepare
from amfm.data_pipeline.store.store import TokenStore
from amfm.data_pipeline.tokenizer.tokenizer import load_tokenizer
from amfm.data_pipeline.verify import verify_store
from tests.data_pipeline.prepare.stores import KILLED_DRIVER, ROOT, contents, elsewhere, in_process, moments
from tests.helpers.full_disk import largest_file, limit_files
from tests.helpers.tiny_store import make_tiny_store, run_in_process, write_jsonl


@pytest.mark.parametrize("attempts", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_a_driver_killed_at_any_moment_loses_and_duplicates_nothing(reference, tmp_path, attempts):
    """Killed again and again, a little later each time, or until it gets through."""
    config = elsewhere(reference, tmp_path)
    kills = 0
    for attempt in range(attempts):
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


def test_second_preparation_writes_nothing(reference, monkeypatch):
    before = moments(reference.store)
    monkeypatch.setattr(
        "amfm.data_pipeline.prepare.prepare.run_units", lambda *_, **__: pytest.fail("something was written")
    )
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
    config = elsewhere(reference, tmp_path)
    done = []

    def tighten(progress):
        done.append(progress.units_done)
        if progress.units_done == 3:
            limit_files(4000)

    with (
        largest_file(),
        pytest.raises(
            RuntimeError,
            match=r"the disk is full while writing .*; 3 of \d+ missing parts are done and kept: free space",
        ),
    ):
        in_process(config, progress=tighten)
    assert not list(Path(config.store).rglob(".writing*")), "no half-written part stays"
    report = in_process(config)
    assert report.units_written == report.units_total - 3
    assert contents(config.store) == contents(reference.store)


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
        ValueError, match=r"vocab_size=500.* was prepared with .*vocab_size=400.*name another data.store"
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
    with pytest.raises(ValueError, match=r"cannot be made \(File exists\); name a writable folder"):
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


def test_a_given_tokenizer_is_refused_in_words_where_the_store_trained_one(tmp_path):
    config = make_tiny_store(tmp_path)
    model = Path(config.store) / "tokenizer.model"
    given = config.model_copy(update={"tokenizer": config.tokenizer.model_copy(update={"model": str(model)})})
    with pytest.raises(
        ValueError, match=r"is a file \(tokenizer [0-9a-f]+\), .* with one trained here on the sources;"
    ):
        in_process(given)


def test_a_tokenizer_json_whose_end_token_is_named_beside_it_serves_a_second_call(tmp_path):
    text = write_jsonl(tmp_path / "a.jsonl", 50, seed=0)
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train([str(text)], vocab_size=300, special_tokens=["<|end|>"], show_progress=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    config = DataConfig(
        store=str(tmp_path / "store"),
        sources=(SourceConfig(name="web", paths=(str(text),)),),
        tokenizer=TokenizerConfig(model=str(tmp_path / "tokenizer.json")),
    )
    assert in_process(config).units_written > 0
    assert in_process(config).units_written == 0


def test_the_first_reject_is_named_with_file_and_line(tmp_path):
    config = make_tiny_store(tmp_path / "data")
    text = Path(config.sources[0].paths[0])
    text.write_text("not json\n" + text.read_text())
    report = in_process(config)
    assert report.first_rejects["source0"].startswith(f"{text}:line 1 (byte 0): not JSON")


def test_a_file_that_is_cut_ends_the_preparation_unless_its_rest_may_be_lost(tmp_path):
    config = make_tiny_store(tmp_path / "data")
    text = Path(config.sources[0].paths[0])
    whole = gzip.compress(text.read_bytes())
    cut = text.with_suffix(".jsonl.gz")
    cut.write_bytes(whole[: len(whole) // 2])
    sources = (config.sources[0].model_copy(update={"paths": (str(cut),)}),)
    config = elsewhere(config.model_copy(update={"sources": sources}), tmp_path)
    with pytest.raises(
        ValueError, match=r"jsonl\.gz:line \d+: damaged compressed file, the rest is lost: .*on_damage=keep"
    ):
        in_process(config)
    kept = in_process(elsewhere(config, tmp_path, on_damage="keep"))
    assert kept.rejects == 1 and kept.units_written == 0, "what was read is read once"


def test_a_file_that_a_source_has_twice_is_a_remark(reference: DataConfig, tmp_path: Path) -> None:
    config = elsewhere(reference, tmp_path)
    (tmp_path / "link.jsonl").symlink_to(config.sources[0].paths[0])
    twice = config.sources[0].model_copy(update={"paths": (config.sources[0].paths[0], str(tmp_path / "link.jsonl"))})
    (remark,) = in_process(config.model_copy(update={"sources": (twice, config.sources[1])})).remarks
    assert (
        remark
        == f"source 'source0' has {config.sources[0].paths[0]} 2 times, by its paths or by links, and so each of its documents"
    )


def test_a_source_of_which_nothing_is_held_out_is_named(reference: DataConfig, tmp_path: Path) -> None:
    config = elsewhere(reference, tmp_path).model_copy(update={"validation_fraction": 1e-9})
    assert [remark.partition(" at ")[0] for remark in in_process(config).remarks] == [
        f"source 'source{number}' has no validation documents" for number in range(2)
    ]
