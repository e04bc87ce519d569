"""Base class of the sections of a model's configuration."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of the configuration: immutable; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
