"""The random state of one rank, as a value: all generators that a library on the way may draw from."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def captured(own: random.Random) -> dict[str, Any]:
    """Return the states of `own` and of the process-wide generators of Python, NumPy, torch and (with a GPU) CUDA."""
    return {
        "own": own.getstate(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def put_back(state: dict[str, Any], own: random.Random) -> tuple[str, ...]:
    """Set all generators to what `captured` saw; returns what could not be, by name."""
    own.setstate(state["own"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    has_cuda = torch.cuda.is_available()
    if has_cuda and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    if has_cuda != (state["cuda"] is not None):
        return ("random state of CUDA (saved with and resumed without a GPU, or the other way round)",)
    return ()
