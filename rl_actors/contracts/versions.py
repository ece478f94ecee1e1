"""Frozen results of training and of data, each named by the hash of its content."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

PolicyKind = Literal["base", "sft", "ppo", "degraded"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyVersion:
    """A releasable policy: a Hugging Face model directory and the hash of its content."""

    # The hash is what is compared: a path can hold other weights tomorrow.
    name: str
    kind: PolicyKind
    path: str
    sha256: str
    parent_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Calibration of a reward model's probabilities, on a split it never trained on."""

    num_pairs: int
    pair_accuracy: float
    ece: float
    brier: float
    temperature: float
    criterion_mae: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModelVersion:
    """A trained reward model with the calibration it was accepted on."""

    name: str
    path: str
    sha256: str
    calibration: Calibration


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSnapshot:
    """Frozen Parquet tables under one content hash. `num_rows` is by table, `num_tasks` by split."""

    path: str
    sha256: str
    num_rows: Mapping[str, int]
    num_tasks: Mapping[str, int]
