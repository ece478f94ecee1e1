"""Neighbours of the stages: a small real run, someone who watches it, a workflow with faults, pools without engines."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.pipeline.run import Run
from cluster.pipeline.sampling import agent_limits
from cluster.pipeline.snapshot import freeze_snapshot
from cluster.pipeline.training import build_base
from cluster.records.frozen import fresh
from cluster.records.run_folder import RunFolder
from cluster.records.summary import ReleaseOutcome
from cluster.registry.connection import Store
from cluster.registry.entries import ModelVersion, StageLog
from cluster.registry.traces import MirrorReport, SampledTrace
from cluster.spec.spec import WorkflowSpec, load_spec, override
from cluster.workflows import find_workflow, locate_workflow
from cluster.workflows.support_desk import SupportDesk
from rl_actors.contracts import AgentLimits, Demonstration, Outcome, RolloutRequest, Split, Task
from rl_actors.contracts.errors import InfrastructureError
from rl_actors.contracts.rollouts import Completion, Rollout, ToolCall, ToolResult, Turn
from rl_actors.contracts.versions import Calibration, DataSnapshot, PolicyKind, PolicyVersion, RewardModelVersion
from rl_actors.environment.workflow import WorkflowRef
from tests.cluster.workflows.desk_runs import calls_of, reply_of, right, score, wrong

SMALL = (
    "data.num_train=24", "data.num_calibration=12", "data.num_held_out=5", "data.num_frozen=4",
    "data.num_adversarial=4", "data.num_live=6", "model.hidden_size=32", "model.num_layers=1",
    "model.num_experts=2", "model.vocab_size=320", "model.max_length=256", "reward.num_pairs=16", "seed=7",
)  # fmt: skip
NUM_TASKS: Mapping[Split, int] = {
    "train": 24, "calibration": 12, "held_out": 5, "frozen": 4, "adversarial": 4, "live": 12,
}  # fmt: skip
CALIBRATION = Calibration(
    num_pairs=40, pair_accuracy=0.8, ece=0.05, brier=0.15, temperature=1.2, criterion_mae={"safety": 0.2}
)


@dataclass
class RecordingWatch:
    """Remembers what it was told, in order."""

    started: list[tuple[str, str]] = field(default_factory=list)
    finished: list[tuple[str, str, float]] = field(default_factory=list)
    progressed: list[tuple[str, int, int, Mapping[str, float]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def stage_started(self, name: str, detail: str) -> None:
        self.started.append((name, detail))

    def stage_finished(self, name: str, line: str, seconds: float) -> None:
        self.finished.append((name, line, seconds))

    def progress(self, name: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        self.progressed.append((name, done, total, metrics))

    def note(self, line: str) -> None:
        self.notes.append(line)


class DeskRun(Run):
    """A run with the spec and the workflow that the story would hand to its stages."""

    def __init__(self, spec: WorkflowSpec, folder: RunFolder, name: str = "support_desk") -> None:
        super().__init__(folder, RecordingWatch())
        self.spec, self.workflow = spec, find_workflow(name)

    @property
    def limits(self) -> AgentLimits:
        return agent_limits(self.spec)

    @property
    def workflow_ref(self) -> WorkflowRef:
        return locate_workflow(self.workflow.name)

    @property
    def prompt(self) -> str:
        return self.workflow.system_prompt

    def fresh(self, name: str) -> Path:
        return fresh(self.folder.root / name)


def make_run(home: Path, *settings: str, run_id: str = "run-1", name: str = "support_desk") -> DeskRun:
    """A run of the packaged workflow with little data; the same home and id give the same run again, as a resume."""
    folder = RunFolder.of(home, run_id)
    folder.root.mkdir(parents=True, exist_ok=True)
    return DeskRun(override(load_spec("support_desk"), [*SMALL, *settings]), folder, name)


def freeze_data(run: DeskRun) -> DataSnapshot:
    return freeze_snapshot(run.workflow, run.spec.num_tasks, run.spec.seed, run.folder.snapshots)


def build_model(run: DeskRun, snapshot: DataSnapshot) -> PolicyVersion:
    return build_base(run.spec.model, run.spec.seed, run.prompt, snapshot, run.folder.models / "base")


def watch_of(run: Run) -> RecordingWatch:
    assert isinstance(run.watch, RecordingWatch)
    return run.watch


class FaultyDesk(SupportDesk):
    """The support desk, with its tasks or demonstrations changed on the way out."""

    def __init__(
        self,
        tasks: Callable[[list[Task]], list[Task]] = lambda tasks: tasks,
        demonstration: Callable[[Demonstration], Demonstration] = lambda item: item,
    ) -> None:
        super().__init__()
        self._change_tasks, self._change_demonstration = tasks, demonstration

    def build_tasks(self, split: Split, count: int, seed: int) -> list[Task]:
        return self._change_tasks(super().build_tasks(split, count, seed))

    def demonstrate(self, task: Task, rng: random.Random) -> Demonstration:
        return self._change_demonstration(super().demonstrate(task, rng))


# --- versions ---------------------------------------------------------------------------------------------------------


def make_policy(directory: Path | str, name: str = "ppo_v1-1", kind: PolicyKind = "ppo") -> PolicyVersion:
    """A version whose hash depends on its name; nothing needs to lie at its path."""
    digest = name.encode().hex().ljust(64, "0")[:64]
    return PolicyVersion(name=name, kind=kind, path=str(directory), sha256=digest, parent_sha256="")


def make_reward_model(directory: Path | str, name: str = "rm_v1") -> RewardModelVersion:
    return RewardModelVersion(name=name, path=str(directory), sha256="a" * 64, calibration=CALIBRATION)


def make_result(**changes: Any) -> ReleaseOutcome:
    values: dict[str, Any] = {
        "release_id": "run-1-0", "stable": "sft-1", "candidate": "ppo-1", "outcome": "promoted",
        "reason": "all gates passed", "requests": 400, "failed_requests": 0, "ledger_rows": 400,
        "first_step_requests": 200, "first_step_canary_requests": 12, "canary_requests": 90,
        "time_to_recovery_s": 0.0, "drill_s": 0.4, "seconds": 30.0,
    }  # fmt: skip
    return ReleaseOutcome(**(values | changes))


# --- rollouts ---------------------------------------------------------------------------------------------------------


def desk_rollout(task: Task, rollout_id: str, token_ids: Sequence[int], *, is_good: bool = True) -> Rollout:
    """What the right (or a wrong) expert does, verified on a real world; the tokens are only what the test says."""
    attempt = right(task) if is_good else wrong(task)
    turns = tuple(_tool_turn(name, arguments) for name, arguments in calls_of(attempt))
    return Rollout(
        rollout_id=rollout_id,
        task_id=task.task_id,
        group_id=0,
        intent=task.intent,
        turns=(*turns, _turn((1, 2), tuple(token_ids))),
        status="ok",
        reply=reply_of(attempt),
        outcome=score(task, attempt),
        tool_calls_count=len(turns),
        tool_error_count=0,
        duration_ms=5.0,
    )


def _tool_turn(name: str, arguments: Mapping[str, Any]) -> Turn:
    call = ToolCall(name=name, arguments=arguments, raw="{}")
    done = ToolResult(content="{}", error="", duration_ms=1.0)
    return replace(_turn((1,), (2,)), kind="tool", tool_call=call, tool_result=done)


def _turn(prompt: tuple[int, ...], completion: tuple[int, ...]) -> Turn:
    sampled = Completion(
        token_ids=completion,
        logprobs=(-1.0,) * len(completion),
        weights_version=0,
        finished=True,
        cached_tokens=0,
    )
    return Turn(kind="final", prompt_token_ids=prompt, completion=sampled, tool_call=None, tool_result=None)


def answer(request: RolloutRequest, outcome: Outcome) -> Rollout:
    """The shortest finished attempt at a request."""
    return Rollout(
        rollout_id=request.rollout_id,
        task_id=request.task.task_id,
        group_id=request.group_id,
        intent=request.task.intent,
        turns=(_turn((1, 2), (3, request.seed % 1000)),),
        status="ok",
        reply="done",
        outcome=outcome,
        tool_calls_count=1,
        tool_error_count=0,
        duration_ms=5.0,
    )


@dataclass
class PoolRecorder:
    """Stands in for the class `RolloutPool`: makes pools that answer by a rule, and remembers each of them."""

    solve: Callable[[str, RolloutRequest], Outcome]
    pools: list[FakePool] = field(default_factory=list)
    breaks: bool = False

    def __call__(self, model_path: str, settings: Any, **options: Any) -> FakePool:
        self.pools.append(FakePool(self, model_path, settings, options))
        return self.pools[-1]


@dataclass
class FakePool:
    """A pool without an engine."""

    recorder: PoolRecorder
    model_path: str
    settings: Any
    options: Mapping[str, Any]
    requests: list[RolloutRequest] = field(default_factory=list)
    temperatures: list[float] = field(default_factory=list)
    is_closed: bool = False

    def rollouts(self, requests: Sequence[RolloutRequest], temperature: float = 1.0) -> list[Rollout]:
        assert not self.is_closed
        self.requests += requests
        self.temperatures.append(temperature)
        if self.recorder.breaks:
            raise InfrastructureError("rollout workers died")
        return [answer(request, self.recorder.solve(self.model_path, request)) for request in requests]

    def close(self) -> None:
        self.is_closed = True


@dataclass
class Places:
    """Stands in for `placed`: says which stages reserved bundles, and that all were given back."""

    stages: list[str] = field(default_factory=list)
    open: int = 0
    most_open: int = 0

    @contextmanager
    def __call__(self, _placement: object, stage: str) -> Iterator[Callable[[str, int], Mapping[str, Any]]]:
        self.stages.append(stage)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            yield lambda role, rank: {"place": (role, rank)}
        finally:
            self.open -= 1


# --- registry ---------------------------------------------------------------------------------------------------------


@dataclass
class FakeVersions:
    """Registered versions, in order, with what they were said to stand on."""

    registered: list[tuple[str, str, Any]] = field(default_factory=list)
    named: dict[str, str] = field(default_factory=dict)
    known: dict[str, tuple[ModelVersion, ...]] = field(default_factory=dict)
    policy_model: str = "desk-policy"
    reward_model: str = "desk-reward-model"

    def entries(self, model: str) -> tuple[ModelVersion, ...]:
        return self.known.get(model, ())

    def register(self, version: ModelVersion, lineage: Any) -> str:
        is_reward = isinstance(version, RewardModelVersion)
        self.registered.append(("reward" if is_reward else "policy", version.name, lineage))
        return "4" if is_reward else "1"

    def move(self, alias: str, version: str) -> None:
        self.named[alias] = version

    def clear(self, alias: str) -> None:
        self.named.pop(alias, None)

    def alias_version(self, alias: str) -> str:
        return self.named.get(alias, "")


@dataclass
class FakeRegistry:
    """An MLflow that only remembers."""

    versions: FakeVersions = field(default_factory=FakeVersions)
    runs: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    stages: list[StageLog] = field(default_factory=list)
    traces: list[SampledTrace] = field(default_factory=list)
    lost: int = 0
    ended: list[tuple[bool, Mapping[str, str]]] = field(default_factory=list)
    refusal: InfrastructureError | None = None

    def connect_in_background(self) -> None:
        """Nothing to connect to."""

    @property
    def store(self) -> Store:
        return Store(uri="postgresql://ann:s3cret@db/mlflow", artifacts=None)

    def start_run(self, **values: Any) -> str:
        if self.refusal is not None:
            raise self.refusal
        self.runs.append(("start", values))
        return "1"

    def end_run(self, **values: Any) -> None:
        self.runs.append(("end", values))
        self.ended.append((values["is_success"], values.get("tags", {})))

    def log_stage(self, log: StageLog) -> str:
        self.stages.append(log)
        return "1"

    def mirror(self, traces: Iterable[SampledTrace]) -> MirrorReport:
        self.traces += list(traces)
        return MirrorReport(lost=self.lost, first_error="gone" if self.lost else "")

    def log_report(self, directory: Path) -> None:
        self.runs.append(("report", {"directory": directory}))
