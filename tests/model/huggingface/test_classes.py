"""A class of transformers is one name and a file of its own, or a row of the table of plain families."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from typing import get_args

from amfm.model.huggingface.classes import BY_NAME, BY_TYPE, CLASSES, NATIVE_TARGETS, TARGETS
from amfm.model.huggingface.hf_class import Target
from amfm.model.huggingface.plain.families import FAMILIES


def test_every_class_stands_in_the_file_of_its_name_or_in_the_table_and_every_target_is_written() -> None:
    plain = {family.name for family in FAMILIES}
    for found in CLASSES:
        assert found.name in plain or import_module(f"amfm.model.huggingface.{found.name}").CLASS is found
    assert set(TARGETS) == set(get_args(Target)) == {*NATIVE_TARGETS, "own"}
    assert len(BY_NAME) == len(BY_TYPE) == len(CLASSES)


def test_the_names_of_the_classes_need_no_torch() -> None:
    code = "import sys, amfm.model.huggingface.hf_class; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
