"""A class of transformers is one name and a value in a file of its family, or a row of the table of plain families."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import get_args

from amfm.model.huggingface.classes import BY_NAME, BY_TYPE, CLASSES, NATIVE_TARGETS, TARGETS
from amfm.model.huggingface.hf_class import Target
from amfm.model.huggingface.plain.families import FAMILIES

FOLDER = Path(__file__).parents[3] / "model" / "huggingface"


def test_every_class_is_in_one_file_of_the_folder_or_in_the_table_and_every_target_is_written() -> None:
    plain = {family.name for family in FAMILIES}
    files = [
        import_module(f"amfm.model.huggingface.{path.stem}")
        for path in FOLDER.iterdir()
        if not path.stem.startswith("_") and path.stem not in ("classes", "latent", "plain")
    ]
    for found in CLASSES:
        places = [
            file for file in files for name, value in vars(file).items() if name.endswith("CLASS") and value is found
        ]
        assert found.name in plain or len(places) == 1, found.name
    assert set(TARGETS) == set(get_args(Target)) == {*NATIVE_TARGETS, "own"}
    assert len(BY_NAME) == len(BY_TYPE) == len(CLASSES)


def test_the_names_of_the_classes_need_no_torch() -> None:
    code = "import sys, amfm.model.huggingface.hf_class; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
