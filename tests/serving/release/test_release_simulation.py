"""Whole releases on simulated traffic: the real gates, looked at after every batch, and the ending of each release.

Sessions are independent, one run each. What is checked is what a release owner cares about: how often an equally good
candidate is thrown out, how soon a bad one is, and that a real SIGKILL of the controller changes neither.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from rl_actors.durable.files import read_rows
from serving.contracts.gates import ArmEvent, Drill, LiveEvidence
from serving.contracts.release import Canary, RampStep
from serving.contracts.requests import RequestSample, Success
from serving.release.controller import ReleaseController
from serving.release.monitors.registry import evaluate_live
from serving.release.state_machine import decide, traffic_result
from serving.split.record import SplitStore, route
from tests.serving.fakes import (
    RELEASE,
    START,
    FakeAliases,
    FakeEvidence,
    FakeSlots,
    good_evidence,
    harness,
    make_evidence,
    make_plan,
)

PLAN = make_plan(
    ramp=(RampStep(share=0.2, min_requests=100, max_duration_s=1e9),),
    max_duration_s=1e9,
    full_samples=400,
    event_rate_tolerance=0.02,
)


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """How one policy version behaves: rates per run, and the scale of its durations and costs."""

    success: float = 0.85
    safety_event: float = 0.002
    slowness: float = 1.0
    cost: float = 1.0


@dataclass
class Traffic:
    """Requests as they arrive, split by a coin at `share`; everything the gates read of them."""

    candidate: Behaviour
    rng: np.random.Generator
    share: float = 0.2
    stable: Behaviour = field(default_factory=Behaviour)
    samples: dict[bool, list[RequestSample]] = field(default_factory=lambda: {True: [], False: []})
    safety: list[ArmEvent] = field(default_factory=list)
    failures: list[ArmEvent] = field(default_factory=list)

    def serve(self, num_requests: int) -> None:
        for _ in range(num_requests):
            is_canary = bool(self.rng.random() < self.share)
            behaviour = self.candidate if is_canary else self.stable
            success: Success = "yes" if self.rng.random() < behaviour.success else "no"
            number = len(self.samples[True]) + len(self.samples[False])
            sample = RequestSample(
                session_key=f"session-{number}",
                duration_ms=float(100 * behaviour.slowness * np.exp(self.rng.normal(0, 0.3))),
                cost=float(behaviour.cost * self.rng.gamma(20, 0.05)),
                success=success,
                completed_at=START + number,
            )
            self.samples[is_canary].append(sample)
            if success == "no":
                self.failures.append(ArmEvent(is_canary=is_canary, share=self.share))
            if self.rng.random() < behaviour.safety_event:
                self.safety.append(ArmEvent(is_canary=is_canary, share=self.share))

    def evidence(self) -> LiveEvidence:
        canary, total = len(self.samples[True]), len(self.samples[True]) + len(self.samples[False])
        return make_evidence(
            self.samples[False],
            self.samples[True],
            share=self.share,
            epoch_sessions=(canary, total),
            canary_sessions=canary,
            safety_events=tuple(self.safety),
            failure_events=tuple(self.failures),
            drills=(Drill(at=START, seconds=0.5),),
        )


def release(candidate: Behaviour, seed: int, *, max_requests: int = 6000, batch: int = 250) -> tuple[str, int]:
    """Run one canary; returns (last decision, candidate requests it took)."""
    traffic = Traffic(candidate=candidate, rng=np.random.default_rng(seed))
    state = Canary(step=0, epoch=2, step_started_at=START, release_started_at=START)
    for _ in range(max_requests // batch):
        traffic.serve(batch)
        enough = traffic_result(len(traffic.samples[True]), PLAN.ramp[0].min_requests)
        decision = decide(state, (enough, *evaluate_live(traffic.evidence(), PLAN)), PLAN, START)
        if type(decision).__name__ != "Hold":
            return type(decision).__name__, len(traffic.samples[True])
    return "Hold", len(traffic.samples[True])


def endings(candidate: Behaviour, num_releases: int) -> tuple[Counter[str], float]:
    """Count how releases end; and the median number of candidate requests until then."""
    found = [release(candidate, 7000 + seed) for seed in range(num_releases)]
    return Counter(name for name, _ in found), float(np.median([number for _, number in found]))


class TestEndings:
    def test_an_equal_candidate_is_promoted_and_rarely_thrown_out(self):
        found, requests = endings(Behaviour(), 10)
        assert found["RollBack"] + found["Halt"] <= 1
        assert found["Promote"] >= 9
        assert requests <= 800

    def test_a_better_candidate_is_promoted(self):
        found, _ = endings(Behaviour(success=0.95, slowness=0.9, cost=0.9), 6)
        assert found["Promote"] == 6

    @pytest.mark.parametrize(
        ("candidate", "most_requests"),
        [
            (Behaviour(success=0.5), 150),
            (Behaviour(safety_event=0.2), 150),
            (Behaviour(slowness=1.6), 200),
            (Behaviour(cost=1.8), 200),
        ],
        ids=["fails", "unsafe", "slow", "costly"],
    )
    def test_a_clearly_bad_candidate_always_goes_and_soon(self, candidate: Behaviour, most_requests: int):
        found, requests = endings(candidate, 6)
        assert found == {"RollBack": 6}
        assert requests <= most_requests

    @pytest.mark.parametrize(
        "candidate",
        [Behaviour(success=0.75), Behaviour(slowness=1.25), Behaviour(cost=1.25), Behaviour(safety_event=0.03)],
        ids=["fails", "slow", "costly", "unsafe"],
    )
    def test_a_somewhat_bad_candidate_is_hardly_ever_promoted(self, candidate: Behaviour):
        found, _ = endings(candidate, 6)
        assert found["Promote"] <= 1


class SlowPlatform:
    """Gateways that poll the split file; usable from another process."""

    def __init__(self, splits: SplitStore) -> None:
        self._splits = splits

    def set_split(self, record) -> None:
        pass

    def acknowledged_epoch(self) -> int:
        record = self._splits.read()
        return record.epoch if record else 0

    def candidate_healthy(self) -> bool:
        return True


def controller_at(directory: Path, evidence: FakeEvidence, sleep) -> ReleaseController:
    splits = SplitStore(directory / "split")
    return ReleaseController(
        RELEASE,
        make_plan(tick_s=0.01),
        directory=directory / "release",
        splits=splits,
        platform=SlowPlatform(splits),
        evidence=evidence,
        aliases=FakeAliases(),
        clock=time.time,
        sleep=sleep,
    )


def run_slowly(directory: Path) -> None:
    """A controller with no evidence: it ticks until someone kills it."""
    evidence = FakeEvidence(lambda state: make_evidence(share=0.05))
    controller_at(directory, evidence, time.sleep).run()


class TestRealKill:
    """SIGKILL of a real process at whatever point it happens to be, five times over."""

    @pytest.mark.parametrize("delay_s", [0.0, 0.013, 0.029, 0.061, 0.1])
    def test_the_release_goes_on_from_the_disk(self, tmp_path: Path, delay_s: float):
        victim = multiprocessing.get_context("fork").Process(target=run_slowly, args=(tmp_path,))
        victim.start()
        log = tmp_path / "release" / "decisions.jsonl"
        deadline = time.time() + 20
        while not log.exists() and time.time() < deadline:
            time.sleep(0.002)
        time.sleep(delay_s)
        os.kill(victim.pid or 0, signal.SIGKILL)
        victim.join()
        good = FakeEvidence(lambda state: good_evidence(share=0.25 if state.step else 0.05))
        state = controller_at(tmp_path, good, lambda seconds: None).run()
        assert type(state).__name__ == "Promoted"
        splits = SplitStore(tmp_path / "split")
        assert {epoch: record.share for epoch, record in splits.history().items()} == {1: 0.0, 2: 0.05, 3: 0.25, 4: 0.0}
        decisions = [row["decision"] for row in read_rows(log) if row["decision"] != "Hold"]
        assert decisions == ["Advance", "Advance", "Advance", "Promote", "Advance"]


class TestStickiness:
    def test_a_session_keeps_its_version_through_the_whole_ramp(self, tmp_path: Path):
        """Stable -> candidate happens at most once per session; candidate -> stable only by a roll back."""
        rig = harness(tmp_path)
        seen: dict[str, list[str]] = {f"user-{i}": [] for i in range(400)}
        slots, salt = FakeSlots(), RELEASE.release_id
        positions = {key: slots.position(salt, key) for key in seen}
        for _ in range(6):
            rig.controller().tick()
            record = rig.splits.read()
            assert record is not None
            for key, versions in seen.items():
                versions.append(route(record, positions[key], record.updated_at, 30.0).policy_version)
        switches = [sum(a != b for a, b in itertools.pairwise(versions)) for versions in seen.values()]
        assert max(switches) == 1
        assert {versions[-1] for versions in seen.values()} == {"ppo-b"}

    def test_a_roll_back_returns_everybody_at_once(self, tmp_path: Path):
        rig = harness(tmp_path, make=lambda state: make_evidence(share=0.05, failed_checks={"no_secret_leak": 1}))
        rig.controller().run()
        record = rig.splits.read()
        assert record is not None
        routes = [route(record, i / 2000, record.updated_at, 30.0) for i in range(2000)]
        assert {found.policy_version for found in routes} == {"sft-a"}
        assert {found.release_channel for found in routes} == {"general"}
