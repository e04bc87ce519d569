"""Second options of a kind of block in one model: `model.variants`, whose names stand in the pattern as `{mamba_narrow}`.

A variant is named after its kind, `KIND_SUFFIX`, so that a symbol says what it is wherever it is read without the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Literal, cast

from pydantic import ConfigDict, Field, PlainValidator, ValidationInfo, create_model, model_validator
from pydantic_core import PydanticCustomError

from amfm.model.config.kinds import VariantKind, all_kinds, find_kind
from amfm.model.config.options import MixerOptions
from amfm.model.config.plugins import until_registered
from amfm.model.config.section import Section


class VariantOptions(MixerOptions):
    """Options of a kind that say which one it is."""

    of: str

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by the name of the kind: its class is made when it is first read."""
        return _rebuild, (self.of, dict(self))


def _rebuild(of: str, values: dict[str, Any]) -> VariantOptions:
    return variant_options(of).model_construct(**values)


@until_registered
@cache
def variant_options(of: str) -> type[VariantOptions]:
    """The options of a variant of a kind: those of the kind, and `of`. Raises ValueError for any other name."""
    kind = find_kind(of)
    if isinstance(kind, VariantKind) or kind.mixes == "logits":
        what = "a variant itself" if isinstance(kind, VariantKind) else "a head"
        raise ValueError(f"{of!r} is {what}; name a kind of block")
    bases: Any = (VariantOptions, kind.options)
    fields: dict[str, Any] = {"of": (Literal[of], Field(description="The kind whose block it is."))}
    made: Any = create_model(f"{kind.options.__name__}Variant", __base__=bases, __module__=__name__, **fields)
    made.__doc__ = kind.options.__doc__
    return cast("type[VariantOptions]", made)


def read_variant(given: Any, info: ValidationInfo) -> MixerOptions:
    """Read the options of one variant as those of the kind that its `of` names."""
    if isinstance(given, VariantOptions):
        return given
    if not isinstance(given, dict) or not isinstance(given.get("of"), str):
        raise PydanticCustomError(
            "variant", "needs `of`, the kind of block that it is a variant of, such as `of: mamba`"
        )
    options = variant_options(given["of"])
    if info.mode == "json":
        return options.model_validate_json(json.dumps(given), strict=True)
    return options.model_validate(given)


class Variants(Section):
    """Second options of kinds of block by name, `mamba_narrow: {of: mamba, ...}`; in the pattern as `{mamba_narrow}`."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, Annotated[Any, PlainValidator(read_variant)]]

    @model_validator(mode="after")
    def check_names(self) -> Variants:
        """A variant is named after its kind, and no kind has its name."""
        for name, options in self.items():
            kind = None if name in all_kinds() else VariantKind.named(name)
            if kind is None or kind.of != options.of:
                rule = f"a variant of {options.of} is called {options.of}_ and more, and as no kind of block is"
                raise ValueError(f"{name}: {rule}; rename it, for example {options.of}_b")
        return self

    def items(self) -> Iterator[tuple[str, VariantOptions]]:
        """Iterate over names and options."""
        yield from (self.model_extra or {}).items()

    def get(self, name: str) -> MixerOptions | None:
        """The options of a variant; None if there is none of this name."""
        return dict(self.items()).get(name)

    @classmethod
    def section_named(cls, name: str) -> type[Section] | None:
        """The options of a variant of this name, for messages."""
        kind = VariantKind.named(name)
        return None if kind is None else variant_options(kind.of)
