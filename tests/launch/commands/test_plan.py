"""`amfm plan`: what its options need."""

from amfm.launch.cli import run


def test_reasons_without_a_search_are_refused(capsys):
    assert run(["plan", "--preset", "tiny_cpu", "--gpus", "1", "--why"]) == 2
    assert "--why has no effect without --search" in capsys.readouterr().err
