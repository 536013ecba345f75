"""The decorator that makes a class a typed, strict, immutable piece of a run's configuration."""

from dataclasses import field
from typing import Annotated, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

T = TypeVar("T")

Share = Annotated[float, Field(ge=0, le=1)]
"""From 0 to 1: a fraction or a probability."""


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
def settings(cls: type[T]) -> type[T]:
    """A keyword-only frozen dataclass that refuses unknown keys and wrong types."""
    return dataclass(config=ConfigDict(extra="forbid"), kw_only=True, frozen=True)(cls)  # type: ignore[return-value]
