"""The hooks that a section asks for, ours and those of packages, from one table (config/hook_registry.py)."""

from __future__ import annotations

from functools import partial
from types import TracebackType
from typing import Any

from amfm.pretrain.config.hook_registry import BUILT_IN, HookSpec, hook_specs
from amfm.pretrain.failures import describe, describe_exit
from amfm.pretrain.hook import Hook
from amfm.pretrain.run import Run

MOMENTS = tuple(name for name in vars(Hook) if not name.startswith("_"))


def build_table(run: Run) -> list[Hook]:
    """Build the hooks whose sections are there, ours first. Every rank must call this."""
    own = [(spec, getattr(run.config, spec.name)) for spec in BUILT_IN]
    others = [(spec, getattr(run.config.hooks, spec.name)) for spec in hook_specs().values()]
    hooks: list[Hook] = [spec.load()(options, run) for spec, options in own if options is not None]
    packages = run.config.hooks.packages
    return hooks + [
        OfPackage(spec, packages[spec.name], options, run) for spec, options in others if options is not None
    ]


class OfPackage(Hook):
    """A hook of an installed package: an error in one of its moments names it, the moment and the package."""

    def __init__(self, spec: HookSpec, package: str, options: Any, run: Run) -> None:
        self.words = f"the hook {spec.name} of {package}"
        with Blame(f"{self.words} cannot be built"):
            self.hook = spec.load()(options, run)
            if not isinstance(self.hook, Hook):
                raise TypeError(f"{spec.hook} is not a subclass of amfm.pretrain.hook.Hook")
        for moment in MOMENTS:
            setattr(self, moment, partial(self._call, moment))

    def _call(self, moment: str, *arguments: Any) -> None:
        with Blame(f"{self.words} failed in {moment}"):
            getattr(self.hook, moment)(*arguments)


class Blame:
    """As a context: an error inside becomes a RuntimeError that begins with these words.

    Its own traceback stays with it.
    """

    def __init__(self, words: str) -> None:
        self.words = words

    def __enter__(self) -> None:
        """Nothing happened yet."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        cause = None
        if isinstance(error, SystemExit):
            cause = describe_exit(error)
        elif isinstance(error, Exception):
            cause = f"{type(error).__name__}: {describe(error)}"
        if cause is not None:
            raise RuntimeError(f"{self.words}: {cause}") from error
