"""Every generator goes on where it was; what could not be put back is named."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from rl_actors.learner.ranks import captured, put_back


def drawn(own: random.Random) -> tuple[float, ...]:
    return (own.random(), random.random(), float(np.random.rand()), float(torch.rand(())))


def test_every_generator_goes_on_where_it_was():
    own = random.Random(3)
    state = captured(own)
    expected = drawn(own)
    other = random.Random(99)
    assert drawn(other) != expected, "negative control: they have moved on"
    assert put_back(state, other) == ()
    assert drawn(other) == expected


@pytest.mark.parametrize("name", ["own", "python", "numpy", "torch"])
def test_a_generator_that_is_forgotten_is_seen(name: str):
    own = random.Random(3)
    state, late = captured(own), dict[str, Any]()
    expected = drawn(own)
    late = captured(own)
    put_back({**state, name: late[name]}, own)
    assert drawn(own) != expected


def test_a_gpu_that_came_or_went_is_named(monkeypatch: pytest.MonkeyPatch):
    own = random.Random(3)
    state = captured(own)
    if state["cuda"] is None:
        assert put_back({**state, "cuda": torch.zeros(16, dtype=torch.uint8)}, own)[0].startswith(
            "random state of CUDA"
        )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert put_back({**state, "cuda": None}, own)[0].startswith("random state of CUDA")
