"""The recipe of a spec: what `workflow.policy_training` names, changed field by field by `ppo.recipe`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Final, Literal, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from rl_actors.contracts import RECIPES, BadInputError, Recipe, unknown_name

_LIMITED: Final[Mapping[str, Any]] = {  # as in `rl_actors.algorithms`, before hours of training instead of after
    "dual_clip": Annotated[float | None, Field(gt=1)],
    "value_clip": Annotated[float | None, Field(gt=0)],
    "correction_cap": Annotated[float, Field(ge=1)],
    "correction_floor": Annotated[float | None, Field(ge=0, le=1)],
    "veto": Annotated[float | None, Field(gt=0, lt=1)],
}


_STRICT: Final = ConfigDict(strict=True, allow_inf_nan=False)


_HINTS: Final[Mapping[str, Any]] = get_type_hints(Recipe)


_FIELDS: Final[Mapping[str, TypeAdapter[Any]]] = {
    name: TypeAdapter(_LIMITED.get(name, hint), config=_STRICT) for name, hint in _HINTS.items()
}


def chosen_recipe(name: str, changes: Mapping[Any, Any]) -> Recipe:
    """Return a named recipe with fields changed.

    Raises:
        BadInputError: An unknown field, a value that the field does not take, or choices that contradict each other.
    """
    return replace(RECIPES[name], **{field: _checked(field, value) for field, value in changes.items()})


def _checked(field: Any, value: object) -> Any:
    if field not in _FIELDS:
        raise BadInputError(f"recipe.{field}", value, unknown_name(str(field), _FIELDS))
    try:
        return _FIELDS[field].validate_python(value)
    except ValidationError as error:
        raise BadInputError(f"recipe.{field}", value, _remedy(_HINTS[field], value, error)) from error


def _remedy(hint: Any, value: object, error: ValidationError) -> str:
    """Name the nearest choice and all others, or the type or limit; null where it is a way out."""
    if choices := _choices(hint):
        return unknown_name(str(value), choices)
    remedy = error.errors()[0]["msg"].replace("Input should be", "must be")
    return f"{remedy}, or null to turn it off" if type(None) in get_args(hint) else remedy


def _choices(hint: Any) -> tuple[str, ...]:
    """Return the names in a Literal or in a union of them."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(name for part in get_args(hint) for name in _choices(part))
