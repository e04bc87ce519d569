"""Verbs and options under their old names: read, with one message that names the new one."""

import pytest

from amfm.launch.cli import run, use_current_words


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--plugins corpus corpus shakespeare corpus", "--plugins corpus sample-data shakespeare corpus"),
        ("shrink runs/a weights/a", "compact runs/a weights/a"),
        ("evaluate runs/a --probe=mqar", "evaluate runs/a --synthetic=mqar"),
        ("inspect step-1 --keep", "inspect step-1 --protect"),
        ("--traceback inspect step-1 --release", "--traceback inspect step-1 --unprotect"),
    ],
)
def test_an_old_word_is_the_new_one_with_one_note(capsys, old, new):
    assert use_current_words(old.split()) == new.split()
    said = capsys.readouterr().err
    assert said.count("note: ") == 1 and "is called" in said
    assert use_current_words(new.split()) == new.split()
    assert not capsys.readouterr().err


def test_an_old_option_reaches_its_verb(capsys, tmp_path):
    assert run(["inspect", str(tmp_path / "missing"), "--keep"]) == 2
    assert "--keep is called --protect now" in capsys.readouterr().err
    assert run(["corpus", "encyclopedia"]) == 2
    assert "`amfm corpus` is called `amfm sample-data` now" in capsys.readouterr().err
