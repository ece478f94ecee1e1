"""Sums, maxima and gathers over data-parallel ranks, and the random state of each rank."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_SUFFIX = "_max"


def capture_random_state(own: random.Random) -> dict[str, Any]:
    """Return the states of `own` and of the process-wide generators of Python, NumPy, torch and (with a GPU) CUDA."""
    return {
        "own": own.getstate(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_state(state: dict[str, Any], own: random.Random) -> tuple[str, ...]:
    """Set all generators to what `capture_random_state` saw; returns the names of those that could not be set."""
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


def num_ranks() -> int:
    """Return the size of the process group; 1 without one."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def summed(values: Tensor) -> Tensor:
    """Return the element-wise sum over ranks, in float64."""
    return _reduced(values, torch.distributed.ReduceOp.SUM)


def largest(value: int) -> int:
    """Return the largest value of any rank."""
    return int(_reduced(torch.tensor([float(value)]), torch.distributed.ReduceOp.MAX))


def smallest(value: int) -> int:
    """Return the smallest value of any rank."""
    return int(_reduced(torch.tensor([float(value)]), torch.distributed.ReduceOp.MIN))


def gathered(value: Any) -> list[Any]:
    """Return every rank's value, in order of rank; values are pickled, so keep them small."""
    if num_ranks() == 1:
        return [value]
    values: list[Any] = [None] * num_ranks()
    torch.distributed.all_gather_object(values, value)
    return values


def rank() -> int:
    """Return this process's place in the group; 0 without one."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def merge_ranks(metrics: Mapping[str, float]) -> dict[str, float]:
    """Merge additive shares of all ranks, names ending in `_max` by maximum; every rank gets the same numbers.

    Every rank must hold the same names.
    """
    merged: dict[str, float] = {}
    for is_max in (False, True):
        # Sorted: ranks may have filled their dicts in another order, and the collective pairs numbers by place.
        names = sorted(name for name in metrics if name.endswith(MAX_SUFFIX) == is_max)
        if not names:
            continue
        operation = torch.distributed.ReduceOp.MAX if is_max else torch.distributed.ReduceOp.SUM
        values = _reduced(torch.tensor([metrics[name] for name in names], dtype=torch.float64), operation)
        merged |= zip(names, values.tolist(), strict=True)
    return {name: merged[name] for name in metrics}


def _reduced(values: Tensor, operation: torch.distributed.ReduceOp.RedOpType) -> Tensor:
    if num_ranks() == 1:
        return values.double()
    # NCCL reduces on the GPU only, wherever the numbers are.
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    wide = values.double().to(device)
    torch.distributed.all_reduce(wide, operation)
    return wide.to(values.device)
