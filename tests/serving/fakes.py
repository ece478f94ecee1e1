"""Fakes and builders for the release tests: a clock that only moves when told, ports that remember and can kill."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from rl_actors.contracts.errors import EngineError
from rl_actors.contracts.reports import EvalReport, Interval, SuiteResult
from rl_actors.durable.files import ChainedLog
from serving.contracts.gates import ArmEvent, Drill, LiveEvidence
from serving.contracts.release import Canary, RampStep, Release, ReleasePlan, SplitRecord
from serving.contracts.requests import (
    ReleaseChannel,
    RequestCompletion,
    RequestRecord,
    RequestSample,
    Success,
    TrafficWindow,
)
from serving.release.controller import ReleaseController
from serving.split import record as split_module
from serving.split.record import SplitStore, slot_position
from serving.store.ledger import RequestLedger

RELEASE = Release(release_id="release-1", stable="sft-a", candidate="ppo-b")
START = 1_000_000.0


class Killed(BaseException):
    """kill -9, as seen from inside: no `except Exception` may catch it."""


@dataclass
class FakeClock:
    """Unix seconds that move only by `sleep` or by hand."""

    now: float = START

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class FakePlatform:
    """Gateways that acknowledge an epoch `ack_delay_s` after it was put in force; an engine that can fall ill."""

    clock: FakeClock
    ack_delay_s: float = 0.0
    is_healthy: bool = True
    health_error: str = ""
    splits: list[tuple[float, SplitRecord]] = field(default_factory=list)

    def set_split(self, record: SplitRecord) -> None:
        if not self.splits or self.splits[-1][1].epoch != record.epoch:
            self.splits.append((self.clock.now, record))

    def acknowledged_epoch(self) -> int:
        seen = [record.epoch for at, record in self.splits if self.clock.now - at >= self.ack_delay_s]
        return max(seen, default=0)

    def candidate_healthy(self) -> bool:
        if self.health_error:
            raise EngineError(self.health_error)
        return self.is_healthy

    @property
    def shares(self) -> list[float]:
        return [record.share for _, record in self.splits]


@dataclass
class FakeAliases:
    """A registry of two aliases, with every call it saw."""

    named: dict[str, str] = field(default_factory=dict)
    calls: list[tuple[str, ...]] = field(default_factory=list)

    def alias_version(self, alias: str) -> str:
        return self.named.get(alias, "")

    def move(self, alias: str, version: str) -> None:
        self.calls.append(("move", alias, version))
        self.named[alias] = version

    def clear(self, alias: str) -> None:
        self.calls.append(("clear", alias))
        self.named.pop(alias, None)


@dataclass
class FakeEvidence:
    """Live evidence made by a function of the canary state, so that a test scripts a whole release."""

    make: Callable[[Canary], LiveEvidence]
    seen: list[Canary] = field(default_factory=list)

    def collect(self, release: Release, state: Canary, drills: tuple[Drill, ...], now: float) -> LiveEvidence:
        assert release == RELEASE
        self.seen.append(state)
        return replace(self.make(state), drills=drills, now=now)


@dataclass
class Harness:
    """One release on fakes: everything a controller needs, and a fresh controller whenever one is asked for."""

    directory: Path
    plan: ReleasePlan
    evidence: FakeEvidence
    clock: FakeClock
    platform: FakePlatform
    aliases: FakeAliases
    splits: SplitStore

    def controller(self) -> ReleaseController:
        """A new one, as after a restart: it knows only what is on disk."""
        return ReleaseController(
            RELEASE,
            self.plan,
            directory=self.directory / "release",
            splits=self.splits,
            platform=self.platform,
            evidence=self.evidence,
            aliases=self.aliases,
            clock=self.clock,
            sleep=self.clock.sleep,
        )


def harness(
    directory: Path, *, plan: ReleasePlan | None = None, make: Callable[[Canary], LiveEvidence] | None = None
) -> Harness:
    clock = FakeClock()
    chosen = plan or make_plan()
    return Harness(
        directory=directory,
        plan=chosen,
        evidence=FakeEvidence(make or (lambda state: good_evidence(share=chosen.ramp[state.step].share))),
        clock=clock,
        platform=FakePlatform(clock),
        aliases=FakeAliases(),
        splits=SplitStore(directory / "split"),
    )


@contextmanager
def killed_at(nth: int, rig: Harness) -> Iterator[list[str]]:
    """Kill before the nth act on the outside world (counted from 0). Yields the acts seen so far."""
    acts: list[str] = []

    def armed(name: str, act: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*args: object, **kwargs: object) -> object:
            if len(acts) == nth:
                raise Killed(name)
            acts.append(name)
            return act(*args, **kwargs)

        return wrapper

    places: Sequence[tuple[object, str]] = (
        (ChainedLog, "append"),
        (split_module, "write_atomic"),
        (rig.platform, "set_split"),
        (rig.platform, "acknowledged_epoch"),
        (rig.aliases, "move"),
        (rig.aliases, "clear"),
    )
    patches = [mock.patch.object(place, name, armed(name, getattr(place, name))) for place, name in places]
    for patch in patches:
        patch.start()
    try:
        yield acts
    finally:
        for patch in patches:
            patch.stop()


def make_plan(**changes: Any) -> ReleasePlan:
    values: dict[str, Any] = {
        "ramp": (
            RampStep(share=0.05, min_requests=50, max_duration_s=600.0),
            RampStep(share=0.25, min_requests=50, max_duration_s=600.0),
        ),
        "max_duration_s": 3600.0,
        "critical_checks": ("no_secret_leak",),
    }
    return ReleasePlan(**(values | changes))


def make_sample(index: int = 0, **changes: Any) -> RequestSample:
    values: dict[str, Any] = {
        "session_key": f"session-{index}",
        "duration_ms": 100.0,
        "cost": 1.0,
        "success": "yes",
        "completed_at": START + index,
    }
    return RequestSample(**(values | changes))


def make_samples(
    num_runs: int, *, success_rate: float = 1.0, duration_ms: float = 100.0, cost: float = 1.0, until: float = START
) -> tuple[RequestSample, ...]:
    """Runs of distinct sessions, evenly spaced up to `until`, whose failures are evenly spread."""
    outcomes: list[Success] = [
        "yes" if int((i + 1) * success_rate) > int(i * success_rate) else "no" for i in range(num_runs)
    ]
    return tuple(
        make_sample(i, duration_ms=duration_ms, cost=cost, success=outcome, completed_at=until - num_runs + i)
        for i, outcome in enumerate(outcomes)
    )


def noisy_durations(num_runs: int, rng: np.random.Generator, *, factor: float = 1.0) -> tuple[RequestSample, ...]:
    """Log-normal durations around 100 ms (sigma 0.5), times `factor`."""
    durations = factor * 100.0 * np.exp(rng.normal(0.0, 0.5, num_runs))
    return tuple(
        make_sample(i, duration_ms=float(d), completed_at=START + i / num_runs) for i, d in enumerate(durations)
    )


def make_window(
    samples: Sequence[RequestSample] = (), *, channel: ReleaseChannel = "canary", **changes: Any
) -> TrafficWindow:
    values: dict[str, Any] = {
        "policy_version": RELEASE.candidate if channel == "canary" else RELEASE.stable,
        "release_channel": channel,
        "split_epoch": 2,
        "num_runs": len(samples),
        "num_running": 0,
        "num_sessions": len({sample.session_key for sample in samples}),
        "num_labelled": sum(sample.success != "unknown" for sample in samples),
        "num_successes": sum(sample.success == "yes" for sample in samples),
        "num_overrides": 0,
        "tool_calls_count": 2 * len(samples),
        "tool_error_count": 0,
        "failed_checks": {},
        "samples": tuple(samples),
    }
    return TrafficWindow(**(values | changes))


def make_evidence(
    stable: Sequence[RequestSample] = (),
    candidate: Sequence[RequestSample] = (),
    *,
    share: float = 0.05,
    **changes: Any,
) -> LiveEvidence:
    canary = len({sample.session_key for sample in candidate})
    values: dict[str, Any] = {
        "stable": make_window(stable, channel="general"),
        "candidate": make_window(candidate),
        "share": share,
        "epoch_sessions": (canary, round(canary / share)),
        "canary_sessions": canary,
        "failed_checks": {},
        "safety_events": (),
        "failure_events": (),
        "drills": (Drill(at=START, seconds=1.0),),
        "now": START + 60.0,
    }
    return LiveEvidence(**(values | changes))


@functools.cache
def good_evidence(*, share: float = 0.05, num_canary: int = 400) -> LiveEvidence:
    """Plenty of equally good traffic in both arms: every gate passes."""
    stable = make_samples(round(num_canary * (1 - share) / share), success_rate=0.9)
    return make_evidence(stable, make_samples(num_canary, success_rate=0.9), share=share)


def arm_events(num_canary: int, num_stable: int, share: float = 0.05) -> tuple[ArmEvent, ...]:
    return (ArmEvent(is_canary=True, share=share),) * num_canary + (
        ArmEvent(is_canary=False, share=share),
    ) * num_stable


def make_record(index: int = 0, **changes: Any) -> RequestRecord:
    values: dict[str, Any] = {
        "run_id": f"run-{index}",
        "request_id": f"request-{index}",
        "session_key": f"session-{index}",
        "model_version": "gpt-oss-1m@sha",
        "reward_model_version": "rm-1",
        "policy_version": RELEASE.candidate,
        "bundle_id": "bundle-1",
        "release_channel": "canary",
        "split_epoch": 2,
        "started_at": START + index,
        "intent": "order_status",
        "sandbox_level": "bwrap+seccomp",
    }
    return RequestRecord(**(values | changes))


def make_completion(**changes: Any) -> RequestCompletion:
    values: dict[str, Any] = {
        "status": "ok",
        "success": "yes",
        "tool_calls_count": 2,
        "tool_error_count": 0,
        "tokens_in": 100,
        "tokens_out": 20,
        "duration_ms": 120.0,
        "cost": 1.5,
        "policy_checks": {"no_secret_leak": True},
    }
    return RequestCompletion(**(values | changes))


def record_run(ledger: RequestLedger, index: int, *, at: float | None = None, **changes: Any) -> str:
    """Start and complete one run; `changes` go to whichever half knows the field."""
    known = set(RequestCompletion.__dataclass_fields__)
    record = make_record(index, **{name: value for name, value in changes.items() if name not in known})
    completion = make_completion(**{name: value for name, value in changes.items() if name in known})
    assert ledger.start(record)
    ledger.complete(record.run_id, completion, at=record.started_at + 1.0 if at is None else at)
    return record.run_id


def make_suite(
    name: str,
    *,
    failed: Sequence[str] = (),
    violations: Mapping[str, tuple[str, ...]] | None = None,
    num_tasks: int = 40,
    cost_per_success: float = 2.0,
    p95_duration_ms: float = 100.0,
) -> SuiteResult:
    tasks = [f"{name}-{i}" for i in range(num_tasks)]
    rate = 1 - len(failed) / num_tasks
    return SuiteResult(
        suite=name,
        suite_sha256="0" * 64,
        policy="any",
        num_tasks=num_tasks,
        success=Interval(mean=rate, low=rate, high=rate),
        success_by_intent={},
        tasks_by_intent={},
        violations=len(violations or {}),
        tokens_in=0,
        tokens_out=0,
        tool_calls=0,
        tool_errors=0,
        cost_per_success=cost_per_success,
        p95_duration_ms=p95_duration_ms,
        success_by_task={task: task not in failed for task in tasks},
        violations_by_task=violations or {},
    )


def make_report(
    baseline: Sequence[SuiteResult] | None = None, candidate: Sequence[SuiteResult] | None = None
) -> EvalReport:
    names = ("capability", "adversarial")
    return EvalReport(
        baseline={suite.suite: suite for suite in baseline or [make_suite(name) for name in names]},
        candidate={suite.suite: suite for suite in candidate or [make_suite(name) for name in names]},
        success_gain=0.0,
        p_value=1.0,
    )


class FakeSlots:
    """Slots in memory, dealt out as the ledger does."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, str], int] = {}

    def __call__(self, salt: str, session_key: str) -> int:
        count = sum(known == salt for known, _ in self.seen)
        return self.seen.setdefault((salt, session_key), count)

    def position(self, salt: str, session_key: str) -> float:
        return slot_position(self(salt, session_key), salt)
