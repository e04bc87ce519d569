from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amfm.kernels.functional import *  # noqa: F403

if __name__ == "amfm.kernels":  # else it was found in place of Hugging Face's package of that name, and has nothing

    def __getattr__(name: str) -> Any:
        """The operations of functional.py, imported when one is asked for."""
        if name.startswith("__") or find_spec(f"amfm.kernels.{name}") is not None:
            raise AttributeError(f"module 'amfm.kernels' has no attribute {name!r}")
        return getattr(import_module("amfm.kernels.functional"), name)
