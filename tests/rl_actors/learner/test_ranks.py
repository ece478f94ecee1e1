"""Every generator goes on where it was; what could not be put back is named."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from rl_actors.learner.ranks import capture_random_state, restore_random_state


def drawn(own: random.Random) -> tuple[float, ...]:
    return (own.random(), random.random(), float(np.random.rand()), float(torch.rand(())))


def test_every_generator_goes_on_where_it_was():
    own = random.Random(3)
    state = capture_random_state(own)
    expected = drawn(own)
    other = random.Random(99)
    assert drawn(other) != expected, "negative control: they have moved on"
    assert restore_random_state(state, other) == ()
    assert drawn(other) == expected


@pytest.mark.parametrize("name", ["own", "python", "numpy", "torch"])
def test_a_generator_that_is_forgotten_is_seen(name: str):
    own = random.Random(3)
    state, late = capture_random_state(own), dict[str, Any]()
    expected = drawn(own)
    late = capture_random_state(own)
    restore_random_state({**state, name: late[name]}, own)
    assert drawn(own) != expected


def test_a_gpu_that_came_or_went_is_named(monkeypatch: pytest.MonkeyPatch):
    own = random.Random(3)
    state = capture_random_state(own)
    if state["cuda"] is None:
        assert restore_random_state({**state, "cuda": torch.zeros(16, dtype=torch.uint8)}, own)[0].startswith(
            "random state of CUDA"
        )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert restore_random_state({**state, "cuda": None}, own)[0].startswith("random state of CUDA")
