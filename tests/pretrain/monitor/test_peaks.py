"""The peak of a machine is the best that any start has measured."""

from amfm.pretrain.monitor.peaks import keep_best


def test_the_best_peak_of_all_starts_counts_and_a_damaged_note_of_it_does_not(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert keep_best(3e9, "float32", 1) == (3e9, 1)
    assert keep_best(1e9, "float32", 1) == (3e9, 2), "a busy moment does not count"
    assert keep_best(4e9, "float32", 1) == (4e9, 3)
    assert keep_best(1e9, "bf16", 1) == (1e9, 1)
    for note in (tmp_path / "amfm" / "peaks").iterdir():
        note.write_text('{"flops_per_second": "many"')
    assert keep_best(2e9, "float32", 1) == (2e9, 1)
