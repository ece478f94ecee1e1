"""What a complete publish holds: every tensor of the checkpoint the engine was loaded from, in the same shape."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from rl_actors.errors import AttestationError

Shapes = Mapping[str, tuple[int, ...]]
_MAX_NAMED = 3


def checkpoint_shapes(directory: str | Path) -> Shapes:
    """Return name -> shape of all tensors of a safetensors checkpoint, from its headers; nothing for other formats."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


def require_complete(weights: Mapping[str, torch.Tensor], shapes: Shapes) -> None:
    """Refuse a publish that would leave a tensor at its old value, before anything is touched.

    Raises:
        AttestationError: A tensor of the checkpoint is missing, or has another shape.
    """
    missing = sorted(shapes.keys() - weights.keys())
    if missing:
        raise AttestationError(f"{len(missing)} tensors were not published and would stay old: {_some(missing)}")
    wrong = sorted(name for name, shape in shapes.items() if tuple(weights[name].shape) != shape)
    if wrong:
        name = wrong[0]
        found = tuple(weights[name].shape)
        raise AttestationError(f"{name} was published with shape {found}, the engine was loaded with {shapes[name]}")


def _some(names: list[str]) -> str:
    rest = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")
