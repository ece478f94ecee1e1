"""Append-only rows of training metrics; what curves, progress bars and MLflow are drawn from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from time import time


class MetricsLog:
    """One JSON object a line: {"stage", "step", "at", metrics...}. Non-finite numbers are written as strings."""

    def __init__(self, path: str | Path, stage: str, clock: Callable[[], float] = time) -> None:
        """Open nothing yet; each row is one append, so several processes may share the file."""
        self._path, self._stage, self._clock = Path(path), stage, clock

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one row."""
        row = {"stage": self._stage, "step": step, "at": round(self._clock(), 3)}
        row |= {name: _jsonable(value) for name, value in metrics.items()}
        with self._path.open("a", encoding="utf8") as file:
            file.write(json.dumps(row) + "\n")


def _jsonable(value: float) -> float | str:
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def read_metrics(path: str | Path, stage: str | None = None) -> list[dict[str, float]]:
    """Return the rows of a stage (or all), in order; a torn last line is skipped."""
    file = Path(path)
    if not file.exists():
        return []
    rows = [row for line in file.read_text(encoding="utf8").splitlines() if (row := _row(line))]
    return [row for row in rows if stage is None or row.get("stage") == stage]


def _row(line: str) -> dict[str, float]:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return {}
