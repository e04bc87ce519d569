"""The pinned versions for GPU nodes: they cover every dependency, agree with pyproject.toml, and are of the CUDA they name."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "constraints").glob("cuda-*.txt"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = ("data", "export", "report", "eval")
DEPENDENCIES = [
    Requirement(text)
    for texts in (PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in EXTRAS))
    for text in texts
]
NODE = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}


def pinned(path: Path, python: str) -> dict[str, Version]:
    """Versions by name on a Linux node with this Python; a name that is pinned twice fails."""
    versions: dict[str, Version] = {}
    for line in path.read_text().splitlines():
        if line.startswith("#") or not line.strip():
            continue
        requirement = Requirement(line)
        environment = NODE | {"python_version": python, "python_full_version": f"{python}.0"}
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", line
            name = canonicalize_name(requirement.name)
            assert name not in versions, f"{name} is pinned twice"
            versions[name] = Version(specifier.version)
    return versions


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_dependency_is_pinned_to_a_version_that_fits(path: Path, python: str):
    versions = pinned(path, python)
    environment = NODE | {"python_version": python, "python_full_version": f"{python}.0"}
    for dependency in DEPENDENCIES:
        if dependency.marker is not None and not dependency.marker.evaluate(environment):
            continue
        found = versions.get(canonicalize_name(dependency.name))
        assert found is not None, f"{dependency.name} is missing: make constraints"
        assert dependency.specifier.contains(found), f"{dependency} is pinned to {found}: make constraints"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_wheels_are_of_the_cuda_in_the_name(path: Path):
    versions = pinned(path, "3.12")
    runtime = next(version for name, version in versions.items() if name.startswith("nvidia-cuda-runtime"))
    assert path.stem == f"cuda-{runtime.major}.{runtime.minor}"
    assert str(versions["triton"]) != "3.8.0", "it is rejected"


def test_the_image_takes_one_of_them_and_what_it_copies_is_there():
    text = (ROOT / "Dockerfile").read_text()
    (default,) = re.findall(r"^ARG CUDA=(\S+)$", text, re.MULTILINE)
    assert (ROOT / "constraints" / f"cuda-{default}.txt") in FILES
    for source in re.findall(r"^COPY (\S+) ", text, re.MULTILINE):
        assert (ROOT / source).exists(), source
    assert f"CUDA: a version of constraints/ ({', '.join(path.stem.removeprefix('cuda-') for path in FILES)})" in text
