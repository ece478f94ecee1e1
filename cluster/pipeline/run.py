"""What every stage is handed: spec, folder, workflow, placement, and the journal that makes stages resumable."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cluster.pipeline.watch import Watch
from cluster.plan import NUM_THREADS, Placement, place
from cluster.records import Journal, RunFolder, StageLine, seatrial_home
from cluster.spec import WorkflowSpec
from cluster.workflows import find_workflow, locate_workflow
from rl_actors.actors import RolloutWorkerSettings
from rl_actors.contracts import AgentLimits, PolicyKind, PolicyVersion
from rl_actors.durable import read_metrics, sha256_directory, sha256_json
from rl_actors.environment import Workflow, WorkflowRef

Value = TypeVar("Value")


_POLL_S = 0.5


_ROW_KEYS = ("stage", "step", "at", "num_steps")


def left_at_path(output: object) -> tuple[str, ...]:
    """Return the directory a version or snapshot lies in; a report has none."""
    path = getattr(output, "path", "")
    return (path,) if path else ()


@dataclass(slots=True)
class Run:
    """One run in progress."""

    spec: WorkflowSpec
    folder: RunFolder
    home: Path
    watch: Watch
    journal: Journal
    workflow_ref: WorkflowRef
    workflow: Workflow
    placement: Placement
    lines: list[StageLine] = field(default_factory=list)

    @classmethod
    def of(cls, spec: WorkflowSpec, folder: RunFolder, watch: Watch) -> Run:
        """Return the run of a folder, as far as its journal says it has come. Raises TamperedError."""
        name = spec.workflow.name
        return cls(
            spec=spec,
            folder=folder,
            home=seatrial_home(),
            watch=watch,
            journal=Journal(folder.journal),
            workflow_ref=locate_workflow(name),
            workflow=find_workflow(name),
            placement=place(spec),
        )

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
        resumed = self.journal.find(name, sha256_json({"stage": name, "inputs": _encoded(inputs)})) is not None
        started = time.monotonic()
        with self._followed(name):
            value = self.journal.run_stage(name, inputs, compute, output_type, artifacts)
        seconds = 0.0 if resumed else time.monotonic() - started
        line = StageLine(name=name, seconds=seconds, line=describe(value), resumed=resumed)
        self.lines.append(line)
        self.watch.stage_finished(name, line.line, seconds)
        return value

    def policy(self, name: str, kind: PolicyKind, directory: Path, parent_sha256: str) -> PolicyVersion:
        """Hash a finished model directory, make it read-only and return its version, whose name carries the hash."""
        make_read_only(directory)
        digest = sha256_directory(directory)
        unique = f"{name}-{digest[:8]}"
        return PolicyVersion(name=unique, kind=kind, path=str(directory), sha256=digest, parent_sha256=parent_sha256)

    @property
    def limits(self) -> AgentLimits:
        """The agent's hard bounds, the same in training, evaluation and serving."""
        agent = self.spec.agent
        return AgentLimits(
            max_turns=agent.max_turns,
            max_tool_calls=agent.tool_calls,
            max_tokens_per_turn=agent.max_tokens_per_turn,
            max_context_tokens=self.spec.model.max_length,
            timeout_s=agent.timeout_s,
        )

    @property
    def worker_settings(self) -> RolloutWorkerSettings:
        """What a rollout worker needs to start."""
        return RolloutWorkerSettings(
            workflow=self.workflow_ref, limits=self.limits, num_tool_hosts=1, num_threads=NUM_THREADS
        )

    def fresh(self, name: str) -> Path:
        """Return an empty directory for a stage's output; what a killed attempt left there is moved away first."""
        import shutil

        path = self.folder.root / name
        if path.exists():
            shutil.rmtree(path)
        path.mkdir(parents=True)
        return path

    @contextmanager
    def _followed(self, name: str) -> Iterator[None]:
        """Turn new metric rows of the running stage into progress, from a thread of its own."""
        stop = threading.Event()
        thread = threading.Thread(target=self._follow, args=(name, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _follow(self, name: str, stop: threading.Event) -> None:
        seen = len(read_metrics(self.folder.metrics, name))
        while not stop.wait(_POLL_S):
            rows = read_metrics(self.folder.metrics, name)
            if len(rows) > seen:
                seen = len(rows)
                row = rows[-1]
                self.watch.progress(name, int(row["step"]), int(row.get("num_steps", 0)), _step_metrics(row))


def make_read_only(directory: Path) -> None:
    """Take the right to write from every file of a finished model."""
    for file in directory.rglob("*"):
        if file.is_file():
            file.chmod(0o444)


def _step_metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a metrics row that say something of its step; a non-finite one is text, and no number."""
    return {name: value for name, value in row.items() if name not in _ROW_KEYS and isinstance(value, int | float)}


def _encoded(inputs: Mapping[str, Any]) -> Any:
    from rl_actors.durable import encode

    return encode(inputs)
