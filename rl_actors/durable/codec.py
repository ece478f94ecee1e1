"""Frozen dataclasses to plain JSON and back, for the journal."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Set
from pathlib import PurePath
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter

Value = TypeVar("Value")
# JSON lacks them; pydantic reads these words back as floats.
_NOT_FINITE = {math.inf: "Infinity", -math.inf: "-Infinity"}


def encode(value: object) -> Any:
    """Return the plain JSON value of nested dataclasses, models, mappings, sequences, sets and scalars.

    Raises:
        TypeError: for a mapping key that is not a string (it would not come back as it was) or an unknown type.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: encode(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, BaseModel):
        return encode(value.model_dump(mode="json"))
    if isinstance(value, Mapping):
        if strange := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"mapping key {strange[0]!r} is not a string")
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return _encode_leaf(value)


def _encode_leaf(value: object) -> Any:
    if isinstance(value, Set):  # a set has no order of its own, and equal values must give equal JSON
        return sorted((encode(item) for item in value), key=repr)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return _NOT_FINITE.get(value, "NaN")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"{type(value).__qualname__} has no JSON form: {value!r}")


def decode(kind: type[Value], data: Any) -> Value:
    """Return the value of type `kind` that `encode` turned into `data`. Raises pydantic's ValidationError."""
    return TypeAdapter(kind).validate_python(data)
