"""Append-only rows of training metrics, from which curves, progress bars and MLflow are drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from time import time

from rl_actors.durable.codec import encode
from rl_actors.durable.files import append_row, shared_rows


class MetricsLog:
    """One JSON object a line: {"stage", "step", "at", metrics...}. Non-finite numbers are written as strings."""

    def __init__(self, path: str | Path, stage: str, clock: Callable[[], float] = time) -> None:
        self._path, self._stage, self._clock = Path(path), stage, clock

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one row."""
        # Stages, ranks and the driver share the file: one append a row, and nobody cuts off another's torn line.
        row = {"stage": self._stage, "step": step, "at": round(self._clock(), 3), **metrics}
        append_row(self._path, encode(row), is_shared=True)


def read_metrics(path: str | Path, stage: str | None = None) -> list[dict[str, float]]:
    """Return the rows of a stage (or all), in order; a torn line is skipped."""
    return [row for row in shared_rows(Path(path)) if stage is None or row.get("stage") == stage]
