"""A run in progress: its journal, which makes stages resumable, whoever watches, and what it has learned."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from cluster.records import Journal, RunFolder, StageLine
from cluster.registry import NO_PINS, Pins
from rl_actors.contracts import DataSnapshot, PolicyVersion, RewardModelVersion
from rl_actors.durable import read_metrics

Value = TypeVar("Value")

_POLL_S: Final = 0.5
_ROW_KEYS: Final = ("stage", "step", "at", "num_steps")


class Watch(Protocol):
    """Someone who looks on. No call may raise: looking on never changes a run."""

    def stage_started(self, name: str, detail: str) -> None:
        """A stage begins; `detail` says in a few words on what."""

    def stage_finished(self, name: str, line: str, seconds: float) -> None:
        """A stage ended (or was found finished: 0 seconds); `line` is its result in one line."""

    def progress(self, name: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """`done` of `total` steps of the running stage are over; `metrics` are of the last one."""

    def note(self, line: str) -> None:
        """Something worth a line that is not a stage's result."""


class Silent(Watch):
    """Watches nothing, for tests and library use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """The frozen results of stages 1 to 4, each with its hash."""

    snapshot: DataSnapshot
    base: PolicyVersion
    baseline: PolicyVersion
    reward_model: RewardModelVersion
    candidate: PolicyVersion
    pins: Pins = NO_PINS

    @property
    def trained(self) -> tuple[PolicyVersion | RewardModelVersion, ...]:
        """The results of this run's training, in the order they were made; a pinned version is none."""
        baseline = () if self.pins.baseline else (self.baseline,)
        reward_model = () if self.pins.reward_model else (self.reward_model,)
        return (*baseline, *reward_model, self.candidate)


def left_at_path(output: object) -> tuple[str, ...]:
    """Return the directory a version or snapshot lies in; a report has none."""
    # The journal hashes what lies there: a resumed run goes on with a version only if its weights are still the same.
    path = getattr(output, "path", "")
    return (path,) if path else ()


class Run:
    """One run in progress: every stage is journaled, followed and shown. `lines` are its finished stages."""

    def __init__(self, folder: RunFolder, watch: Watch) -> None:
        """Read from the journal how far the run has come. Raises TamperedError."""
        self.folder, self.watch = folder, watch
        self.journal = Journal(folder.journal)
        self.lines: list[StageLine] = []

    def stage(
        self,
        name: str,
        inputs: Mapping[str, Any],
        compute: Callable[[], Value],
        output_type: type[Value],
        *,
        detail: str = "",
        describe: Callable[[Value], str] = str,
        artifacts: Callable[[Value], Iterable[Path | str]] = left_at_path,
    ) -> Value:
        """Run a stage, or take its recorded output when it has finished for equal inputs; tell whoever watches."""
        self.watch.stage_started(name, detail)
        # Asked before: afterwards the journal has a record either way.
        resumed = self.journal.find(name, inputs) is not None
        started = time.monotonic()
        with self._followed(name):
            value = self.journal.run_stage(name, inputs, compute, output_type, artifacts)
        # Zero says "kept from before" to whoever watches.
        seconds = 0.0 if resumed else time.monotonic() - started
        line = StageLine(name=name, seconds=seconds, line=describe(value), resumed=resumed)
        self.lines.append(line)
        self.watch.stage_finished(name, line.line, seconds)
        return value

    @contextmanager
    def _followed(self, name: str) -> Iterator[None]:
        """Turn new metric rows of the running stage into progress."""
        # From a thread of its own: a stage blocks for minutes in Ray, and its rows are written by other processes.
        stop = threading.Event()
        thread = threading.Thread(target=self._follow, args=(name, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            # Joined: a late row must not be shown as progress of the next stage.
            thread.join()

    def _follow(self, name: str, stop: threading.Event) -> None:
        # Rows of an earlier, killed attempt are no progress of this one.
        seen = len(read_metrics(self.folder.metrics, name))
        while not stop.wait(_POLL_S):
            rows = read_metrics(self.folder.metrics, name)
            if len(rows) > seen:
                seen = len(rows)
                row = rows[-1]
                self.watch.progress(name, int(row["step"]), int(row.get("num_steps", 0)), _step_metrics(row))


def _step_metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a metrics row that say something of its step; a non-finite one is text, and no number."""
    return {name: value for name, value in row.items() if name not in _ROW_KEYS and isinstance(value, int | float)}
