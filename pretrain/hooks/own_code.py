"""Whether an error is one of a user's own code, which trying again does not help: where it was raised says so.

PyTorch and our checks raise RuntimeError and ValueError for a wrong shape as the machine's state does, so the type on its own does not.
"""

from __future__ import annotations

import traceback

from amfm.model.config.plugins import package_modules
from amfm.pretrain.failures import OwnCodeError, describe, is_out_of_memory

COMPUTED = ("amfm.model.", "amfm.kernels.")


def describe_in(error: Exception, phase: str) -> str:
    """Describe an error of a step; one of memory with its phase, if no block says more."""
    if is_out_of_memory(error) and not getattr(error, "__notes__", ()):
        error.add_note(f"in the phase {phase}")
    return describe(error)


def first_cause(error: BaseException) -> BaseException:
    """The error that others were raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def own_code_error(error: BaseException, text: str, *, in_first_step: bool) -> OwnCodeError | None:
    """The error to raise with this text, where the innermost frames are a package's or the first step was never done.

    Frames of PyTorch and other libraries are not asked: who called them is. None for an error of the machine, such as of
    memory or of a file.
    """
    cause = first_cause(error)
    if isinstance(cause, OSError) or is_out_of_memory(cause):
        return None
    packages = package_modules()
    names = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(cause.__traceback__)]
    known = [name for name in names if name.partition(".")[0] in {"amfm", *packages}]
    raiser = known[-1] if known else ""
    is_own = raiser.partition(".")[0] in packages or (in_first_step and raiser.startswith(COMPUTED))
    if not is_own:
        return None
    own = OwnCodeError(text)
    own.in_first_step = in_first_step
    return own
