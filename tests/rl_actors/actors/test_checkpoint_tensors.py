"""A publish is complete or refused, and the refusal names what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rl_actors.actors.vllm_engine import checkpoint_shapes, require_complete
from rl_actors.contracts.errors import AttestationError

SHAPES = {"a": (2, 3), "b": (4,)}


def weights(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"a": torch.zeros(2, 3), "b": torch.zeros(4), **changes}


def test_shapes_are_those_of_every_file_of_the_checkpoint(tmp_path: Path):
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.zeros(4)}, tmp_path / "model-2.safetensors")
    assert checkpoint_shapes(tmp_path) == SHAPES


def test_a_directory_without_such_files_asks_for_nothing(tmp_path: Path):
    assert checkpoint_shapes(tmp_path) == checkpoint_shapes(tmp_path / "missing") == {}


def test_everything_and_more_is_complete():
    require_complete(weights(), SHAPES)
    require_complete(weights(tied=torch.zeros(1)), SHAPES)


def test_what_is_missing_is_named():
    with pytest.raises(AttestationError, match=r"1 tensors were not published and would stay old: b$"):
        require_complete({"a": torch.zeros(2, 3)}, SHAPES)


def test_a_long_list_is_cut():
    shapes = {f"layer{number}": (1,) for number in range(5)}
    with pytest.raises(AttestationError, match=r"5 tensors .*: layer0, layer1, layer2 and 2 more"):
        require_complete({}, shapes)


def test_another_shape_is_another_model():
    with pytest.raises(AttestationError, match=r"b was published with shape \(5,\), .* loaded with \(4,\)"):
        require_complete(weights(b=torch.zeros(5)), SHAPES)
