"""The wheel, installed outside of a clone: with everything next to Hugging Face's `kernels`, and with only its core dependencies."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import amfm

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def play(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # it may name the clone
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env=variables, capture_output=True, text=True, check=False)


def run(*command: str | Path, cwd: Path) -> str:
    done = play(*command, cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with the wheel, synthetic tasks and `kernels`, which reads all other packages from this environment.

    A folder that a .pth file adds is searched, its own .pth files are not read: the editable install is not seen there.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    (packages,) = (folder / "lib").glob("python*/site-packages")
    (packages / "shared.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        packages,
        wheel,
        shutil.copytree(ROOT / "examples/synthetic", folder / "synthetic"),  # which a build writes to
        "kernels",
        cwd=folder,
    )
    return python


def needed(requirement: Requirement, found: set[str]) -> None:
    """Add to `found` the distributions of this environment that a requirement needs, and those that these need."""
    name = canonicalize_name(requirement.name)
    if name in found:
        return
    found.add(name)
    for text in importlib.metadata.requires(name) or []:
        below = Requirement(text)
        if below.marker is None or any(below.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)):
            needed(below, found)


@pytest.fixture(scope="module")
def core(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with the wheel and its core dependencies: links to those of this environment, and no others."""
    folder = tmp_path_factory.mktemp("core")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    (packages,) = (folder / "lib").glob("python*/site-packages")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages, wheel, cwd=folder)
    found: set[str] = set()
    for requirement in core_requirements(wheel):
        needed(requirement, found)
    for name in found:
        for file in importlib.metadata.files(name) or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (packages / top).exists():
                (packages / top).symlink_to(Path(str(importlib.metadata.distribution(name).locate_file(top))))
    return python


def core_requirements(wheel: Path) -> list[Requirement]:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    texts = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []
    requirements = [Requirement(text) for text in texts]
    return [item for item in requirements if item.marker is None or item.marker.evaluate({"extra": ""})]


def source_files(*folders: str) -> list[str]:
    """Files of the repository, those that are not committed yet included."""
    return run("git", "ls-files", "--cached", "--others", "--exclude-standard", *folders, cwd=ROOT).splitlines()


def test_a_wheel_holds_amfm_alone_and_every_source_file_of_it(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    folders = ("pretrain", "model", "kernels", "data_pipeline", "launch", "configs", "recipes")
    tracked = source_files(*folders)
    own = {f"amfm/{name}" for name in tracked if not name.endswith(".md") or name.startswith("recipes/")}
    tops = {name.removeprefix("src/") for name in source_files("src/amfm") if not (ROOT / name).is_symlink()}
    assert names == own | tops


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


def test_a_source_distribution_holds_what_is_tracked(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    top = f"amfm_pretrain-{amfm.__version__}/"
    with tarfile.open(path) as archive:
        names = {name.removeprefix(top) for name in archive.getnames()} - {"PKG-INFO"}
    links = {f"src/amfm/{path.name}" for path in (ROOT / "src" / "amfm").iterdir() if path.is_symlink()}
    assert names == set(source_files()) - links


TOY = (
    *("data.validation_fraction=0.1", "train.global_batch_size=4", "train.sequence_length=128"),
    *(
        "train.validate_every_steps=4",
        "train.validation_batches=1",
        "schedule.warmup_steps=1",
        "schedule.decay_steps=1",
    ),
    *("train.steps=4", "train.checkpoint_every_steps=2"),
)


def test_first_steps_from_init_to_an_export_and_training_with_the_core_alone(
    installed: Path, core: Path, tmp_path: Path
) -> None:
    def amfm_of(python: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
        return play(python, "-P", "-m", "amfm.launch", *words, cwd=tmp_path)

    def do(*words: str | Path) -> str:
        done = amfm_of(installed, *words)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert do("--version") == f"amfm {amfm.__version__}\n"
    assert Path(do("recipes", "one_gpu").strip()).is_file()
    do("sample-data", "python-sources", "text", "--megabytes", "1")
    do("init", "my", "--size", "20m", "--style", "nemotron", "--data", "text", "--hardware", "cpu")
    do("prepare", "my/run.yaml", *TOY)
    do("train", "my/run.yaml", *TOY, "train.stop_after_steps=2")
    do("train", "my/run.yaml", *TOY)
    run_dir = tmp_path / "my" / "runs" / "nemotron_20m"
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    do("export", run_dir, "export")
    assert (tmp_path / "export" / "config.json").is_file()

    other = (*TOY, "run.dir=core")
    refused = amfm_of(core, "prepare", "my/run.yaml", *TOY)
    assert refused.returncode == 2 and "pip install '.[data]'" in refused.stderr
    refused = amfm_of(core, "train", "my/run.yaml", *other)
    assert (
        refused.returncode == 2
        and "pip install '.[report]' in the clone of amfm, or set run.tensorboard: false" in refused.stderr
    )
    for stop in ("2", "4"):
        trained = amfm_of(
            core, "train", "my/run.yaml", *other, "run.tensorboard=false", f"train.stop_after_steps={stop}"
        )
        assert trained.returncode == 0, trained.stderr[-3000:]
    again = [json.loads(line)["loss"] for line in (tmp_path / "core" / "metrics.jsonl").read_text().splitlines()]
    assert again == [line["loss"] for line in lines]
    assert amfm_of(core, "generate", "core", "--prompt", "import", "--max-new-tokens", "2").returncode == 0
    refused = amfm_of(core, "export", "core", "core_export")
    assert refused.returncode == 2 and "pip install '.[export]'" in refused.stderr
