"""Installed packages: versions of those that can change numbers, without importing any, and the extras of ours.

An extra adds packages, and one message says which is not installed where a command needs it. Training on a prepared store needs
only the core. What reads text, exports, draws or measures tasks imports its packages where it needs them; a verb asks
`require_extra` before its work, and `absent_extras_in_words` catches what no verb could foresee."""

from __future__ import annotations

import hashlib
import importlib.util
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

LIBRARIES = ("amfm-pretrain", "torch", "deepspeed", "megatron-core", "numpy", "safetensors")
OWN_PACKAGES = ("launch", "pretrain", "model", "kernels", "data_pipeline")
OWN_CODE = "amfm's source files"
ROOT = Path(__file__).resolve().parent.parent


def collect_versions() -> dict[str, str]:
    """Collect the versions of Python and of libraries that can change numbers, and a digest of our code."""
    versions = {library: read_version(library) or "not installed as a distribution" for library in LIBRARIES}
    return {"python": platform.python_version()} | versions | {OWN_CODE: digest_code(ROOT)}


@cache
def read_version(library: str) -> str | None:
    """Look up the installed version of a distribution, None where it is missing. Read once a process."""
    from importlib import metadata  # not for a command line that only asks for an extra

    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


@cache
def digest_code(root: Path) -> str:
    """Digest our packages' source files, 12 hex digits: two checkouts of one version may differ.

    Read once a process.
    """
    digest = hashlib.sha256()
    files = (path for package in OWN_PACKAGES for path in (root / package).rglob("*.*"))
    for path in sorted(path for path in files if path.suffix in (".py", ".c")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


DISTRIBUTION = "amfm-pretrain"
# Extra to the modules of its packages, in pyproject.toml's order. A test compares the two.
EXTRAS = {
    "data": ("pyarrow", "obstore", "google.protobuf", "tokenizers"),
    "export": ("transformers", "tokenizers", "google.protobuf", "jinja2"),
    "report": ("matplotlib", "tensorboard"),
    "eval": ("lm_eval",),
}


def require_extra(extra: str, purpose: str) -> None:
    """Check that the packages of an extra are installed; `purpose` begins the message. Raises ValueError.

    Only looks for them: nothing is imported.
    """
    missing = [module for module in EXTRAS[extra] if not is_installed(module)]
    if missing:
        raise ValueError(describe_missing(purpose, missing[0], extra))


def is_installed(module: str) -> bool:
    """Whether a module can be found, its parents included."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def describe_missing(purpose: str, module: str, extra: str) -> str:
    """The message about a module of an extra that is not installed."""
    return f"{purpose} needs {module}, which is not installed; {install_command(extra)}"


def install_command(extra: str) -> str:
    """How to install an extra: from a clone, as long as no package index serves amfm under a name of ours."""
    return f"run pip install '.[{extra}]' in the clone of amfm"


@contextmanager
def absent_extras_in_words() -> Iterator[None]:
    """Inside the block, importing a package of an extra that is not installed raises ValueError with the command to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        extras = [extra for extra, modules in EXTRAS.items() if error.name in modules]
        if not extras:
            raise
        raise ValueError(describe_missing("this", str(error.name), extras[0])) from error
