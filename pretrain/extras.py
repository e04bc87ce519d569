"""The package's extras: which packages each one adds, and one message where a command needs one that is not installed.

Training on a prepared store needs only the core. What reads text, exports, draws or measures tasks imports its packages where
it needs them; a verb asks `require_extra` before its work, and `absent_extras_in_words` catches what no verb could foresee.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

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
