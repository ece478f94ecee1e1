"""Whoever looks on while a run goes: the border between the pipeline and the console."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Watch(Protocol):
    """Someone who looks on. No call may raise: looking on never changes a run."""

    def stage_started(self, name: str, detail: str) -> None:
        """A stage begins; `detail` says in a few words on what."""
        ...

    def stage_finished(self, name: str, line: str, seconds: float) -> None:
        """A stage ended (or was found finished: 0 seconds); `line` is its result in one line."""
        ...

    def progress(self, name: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """`done` of `total` steps of the running stage are over; `metrics` are of the last one."""
        ...

    def note(self, line: str) -> None:
        """Something worth a line that is not a stage's result."""
        ...


class Silent:
    """Watches nothing, for tests and library use."""

    def stage_started(self, name: str, detail: str) -> None:
        """Ignore it."""

    def stage_finished(self, name: str, line: str, seconds: float) -> None:
        """Ignore it."""

    def progress(self, name: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Ignore it."""

    def note(self, line: str) -> None:
        """Ignore it."""
