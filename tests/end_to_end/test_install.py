"""The wheel, installed outside of a clone beside Hugging Face's `kernels`, whose name one of our folders has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # it may name the clone
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with the wheel and `kernels`, which reads all other packages from this environment.

    A folder that a .pth file adds is searched, its own .pth files are not read: the editable install is not seen there.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    (packages,) = (folder / "lib").glob("python*/site-packages")
    (packages / "shared.pth").write_text(sysconfig.get_paths()["purelib"])
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages, wheel, "kernels", cwd=folder)
    return python


def test_a_wheel_holds_amfm_alone_and_every_source_file_of_it(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = run(
        "git", "ls-files", "pretrain", "model", "kernels", "data_pipeline", "launch", "configs", cwd=ROOT
    ).split()
    own = {f"amfm/{name}" for name in tracked if not name.endswith(".md")}
    assert names == own | {"amfm/__init__.py", "amfm/py.typed"}


def test_hugging_faces_kernels_and_ours_are_both_found(installed: Path, tmp_path: Path) -> None:
    program = """
import json, kernels, amfm.kernels, amfm.kernels.norm.op, transformers
print(json.dumps([kernels.__file__, hasattr(kernels, "get_kernel"), amfm.kernels.__path__[0]]))
"""
    theirs, has_its_own, ours = json.loads(run(installed, "-c", program, cwd=tmp_path).splitlines()[-1])
    packages = installed.parents[1]
    assert has_its_own and Path(theirs).is_relative_to(packages)
    assert Path(ours).is_relative_to(packages)


def test_a_preset_of_the_wheel_trains_by_its_name(installed: Path, tmp_path: Path) -> None:
    keys = ("run.dir=run", "train.steps=2", "train.validate_every_steps=null", "train.log_every_steps=1")
    run(installed, "-P", "-m", "amfm.launch", "train", "--preset", "probes/mqar", *keys, cwd=tmp_path)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
