"""Stages 5 and 6: both policies on equal suites with equal seeds, and a bad candidate that never meets a user."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.pipeline import evaluation, sampling
from cluster.pipeline.evaluation import SUITE_SPLITS, evaluate, evaluate_together, read_suites, require_offline_gates
from cluster.pipeline.release import release_plan
from cluster.pipeline.snapshot import read_tasks
from rl_actors.contracts import Outcome, RolloutRequest
from rl_actors.contracts.errors import InfrastructureError, StageRefusedError, TamperedError
from rl_actors.contracts.reports import EvalReport
from rl_actors.contracts.versions import DataSnapshot
from rl_actors.durable.codec import decode
from serving.contracts.release import ReleasePlan
from serving.gates.registry import evaluate_offline
from tests.cluster.pipeline.fakes import (
    NUM_TASKS,
    DeskRun,
    FakePool,
    Places,
    PoolRecorder,
    freeze_data,
    make_policy,
    make_run,
)
from tests.serving.fakes import make_report, make_suite

BASELINE, CANDIDATE = make_policy("/models/sft", "sft-1", "sft"), make_policy("/models/ppo", "ppo-1")
GOOD = Outcome(success=True, violations=(), reasons=())
BAD = Outcome(success=False, violations=(), reasons=("wrong",))
UNSAFE = Outcome(success=True, violations=("refund_without_owner",), reasons=())

# --- suites -----------------------------------------------------------------------------------------------------------


def test_the_suites_are_the_splits_nobody_trains_on(snapshot: DataSnapshot):
    suites = {suite.name: suite for suite in read_suites(snapshot)}
    assert {name: suite.tasks[0].split for name, suite in suites.items()} == dict(SUITE_SPLITS)
    assert {name: len(suite.tasks) for name, suite in suites.items()} == {
        name: NUM_TASKS[split] for name, split in SUITE_SPLITS.items()
    }
    trained_on = {task.task_id for split in ("train", "calibration") for task in read_tasks(snapshot, split)}
    assert not trained_on & {task.task_id for suite in suites.values() for task in suite.tasks}


def test_equal_data_gives_equal_suites_and_other_data_gives_others(home: Path, snapshot: DataSnapshot):
    again, other = freeze_data(make_run(home)), freeze_data(make_run(home, "seed=8"))
    hashes = [{suite.name: suite.sha256 for suite in read_suites(frozen)} for frozen in (snapshot, again, other)]
    assert hashes[0] == hashes[1]
    assert all(hashes[0][name] != hashes[2][name] for name in SUITE_SPLITS)


def test_suites_of_a_changed_snapshot_are_refused(run: DeskRun):
    frozen = freeze_data(run)
    (Path(frozen.path) / "tasks.parquet").chmod(0o644)
    (Path(frozen.path) / "tasks.parquet").write_bytes(b"easier tasks")
    with pytest.raises(TamperedError):
        read_suites(frozen)


def plan_of(run: DeskRun) -> ReleasePlan:
    return release_plan(run.spec, run.workflow.critical_checks, may_promote=True)


def evaluate_both(run: DeskRun, snapshot: DataSnapshot) -> EvalReport:
    file = run.folder.evaluations / "candidate.json"
    return evaluate(run.spec, read_suites(snapshot), BASELINE, CANDIDATE, plan_of(run), file)


# --- evaluation -------------------------------------------------------------------------------------------------------


class Policies:
    """Which policy solves which task: the candidate all, the baseline every other one."""

    def __call__(self, path: str, request: RolloutRequest) -> Outcome:
        return GOOD if path == CANDIDATE.path or request.group_id % 2 == 0 else BAD


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> PoolRecorder:
    recorder = PoolRecorder(Policies())
    monkeypatch.setattr(sampling, "RolloutPool", recorder)
    return recorder


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> Places:
    recorder = Places()
    monkeypatch.setattr(evaluation, "placed", recorder)
    return recorder


@pytest.fixture(params=[True, False], ids=["together", "in turn"], autouse=True)
def room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A cluster with room for both engines, and one without."""
    monkeypatch.setattr(evaluation, "has_room", lambda placement, stage, times: request.param)
    return request.param


@pytest.fixture
def report(run: DeskRun, snapshot: DataSnapshot, pools: PoolRecorder, places: Places) -> EvalReport:
    return evaluate_both(run, snapshot)


def test_both_policies_get_the_same_tasks_and_seeds(run: DeskRun, report: EvalReport, pools: PoolRecorder):
    by_path = {pool.model_path: pool for pool in pools.pools}
    baseline, candidate = by_path[BASELINE.path], by_path[CANDIDATE.path]
    assert baseline.requests == candidate.requests
    assert len(baseline.requests) == sum(NUM_TASKS[split] for split in SUITE_SPLITS.values())
    assert {*baseline.temperatures, *candidate.temperatures} == {run.spec.ppo.temperature}


def test_engines_run_side_by_side_where_there_is_room_and_all_places_are_given_back(
    report: EvalReport, pools: PoolRecorder, places: Places, room: bool
):
    assert all(pool.is_closed for pool in pools.pools)
    assert (places.stages, places.open) == (["offline_eval", "offline_eval"], 0)
    assert places.most_open == (2 if room else 1)
    assert {pool.settings.num_threads for pool in pools.pools} == {1 if room else 2}


def test_the_report_compares_task_by_task(report: EvalReport):
    assert set(report.baseline) == set(report.candidate) == set(SUITE_SPLITS)
    assert report.baseline["capability"].success.mean == pytest.approx(3 / 5)
    assert report.candidate["capability"].success.mean == 1.0
    assert report.success_gain == pytest.approx(2 / 5)
    assert report.baseline["frozen"].policy == BASELINE.name
    assert report.candidate["frozen"].policy == CANDIDATE.name
    for name, suite in report.baseline.items():
        assert suite.suite_sha256 == report.candidate[name].suite_sha256


def test_the_report_lies_under_eval_and_reads_back_equal(run: DeskRun, report: EvalReport):
    written = json.loads((run.folder.evaluations / "candidate.json").read_text())
    assert decode(EvalReport, written) == report


def test_another_seed_samples_otherwise(home: Path, snapshot: DataSnapshot, pools: PoolRecorder, places: Places):
    for run_id, seed in (("run-1", 7), ("run-2", 7), ("run-3", 8)):
        evaluate_together(make_run(home, f"seed={seed}", run_id=run_id).spec, read_suites(snapshot), [CANDIDATE])
    seeds = [[request.seed for request in pool.requests] for pool in pools.pools]
    assert seeds[0] == seeds[1] != seeds[2]


def test_a_dead_engine_is_no_report(run: DeskRun, snapshot: DataSnapshot, pools: PoolRecorder, places: Places):
    pools.breaks = True
    with pytest.raises(InfrastructureError, match="workers died"):
        evaluate_both(run, snapshot)
    assert all(pool.is_closed for pool in pools.pools)
    assert places.open == 0
    assert not run.folder.evaluations.exists()


def test_a_suite_with_a_lost_task_is_no_report(
    run: DeskRun, snapshot: DataSnapshot, places: Places, monkeypatch: pytest.MonkeyPatch
):
    class Losing(PoolRecorder):
        def __call__(self, model_path: str, settings: object, **options: object) -> object:  # type: ignore[override]
            pool = super().__call__(model_path, settings, **options)
            whole = pool.rollouts
            pool.rollouts = lambda requests, temperature=1.0: whole(requests, temperature)[1:]  # type: ignore[method-assign]
            return pool

    recorder = Losing(Policies())
    monkeypatch.setattr(sampling, "RolloutPool", recorder)
    with pytest.raises(InfrastructureError, match="1 tasks lost to infrastructure"):
        evaluate_together(run.spec, read_suites(snapshot), [CANDIDATE])
    assert recorder.pools[0].is_closed


# --- time on a machine that others use --------------------------------------------------------------------------------


class Stopwatch(PoolRecorder):
    """Pools whose rollouts take, per pass over all suites, what a list says; the baseline always takes 100 ms."""

    candidate_ms: tuple[float, ...] = ()

    def __call__(self, model_path: str, settings: object, **options: object) -> FakePool:
        earlier = sum(pool.model_path == model_path for pool in self.pools)
        duration = 100.0 if model_path == BASELINE.path else self.candidate_ms[earlier]
        pool = super().__call__(model_path, settings, **options)
        answers = pool.rollouts
        pool.rollouts = lambda requests, temperature=1.0: [  # type: ignore[method-assign]
            replace(rollout, duration_ms=duration) for rollout in answers(requests, temperature)
        ]
        return pool


@pytest.mark.parametrize(
    ("candidate_ms", "num_passes", "delta", "is_refused"),
    [
        ((110.0,), 1, 0.10, False),
        ((140.0, 105.0, 104.0), 3, 0.05, False),
        ((140.0, 105.0, 150.0), 3, 0.40, True),
        ((116.0, 117.0, 118.0), 3, 0.17, True),
    ],
    ids=["fast", "one slow moment", "two of three", "always slow"],
)
def test_a_candidate_that_looks_too_slow_is_timed_again(
    home: Path,
    places: Places,
    monkeypatch: pytest.MonkeyPatch,
    candidate_ms: tuple[float, ...],
    num_passes: int,
    delta: float,
    is_refused: bool,
):
    run = make_run(home, "data.num_held_out=40", "data.num_frozen=40", "data.num_adversarial=40")
    frozen, plan = freeze_data(run), plan_of(run)
    watch = Stopwatch(lambda _path, _request: GOOD)
    watch.candidate_ms = candidate_ms
    monkeypatch.setattr(sampling, "RolloutPool", watch)
    report = evaluate_both(run, frozen)
    assert len(watch.pools) == 2 * num_passes
    assert all(pool.is_closed for pool in watch.pools)
    latency = {result.gate: result for result in evaluate_offline(report, plan)}["latency_delta_lt_15_percent"]
    assert latency.evidence["p95_delta"] == pytest.approx(delta)
    assert (latency.verdict == "fail") == is_refused


# --- offline gates ----------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(run: DeskRun) -> ReleasePlan:
    return plan_of(run)


def test_an_equally_good_candidate_may_go_on(plan: ReleasePlan):
    results = require_offline_gates(make_report(), plan)
    assert {result.verdict for result in results} == {"pass"}
    assert {result.gate for result in results} >= {"no_safety_regression", "cost_per_success_not_worse"}


FAILED = tuple(f"capability-{index}" for index in range(30))


@pytest.mark.parametrize(
    ("candidate", "gate"),
    [
        (make_suite("capability", failed=FAILED), "task_success_not_worse"),
        (make_suite("capability", violations=dict.fromkeys(FAILED, ("leak",))), "no_safety_regression"),
        (make_suite("capability", cost_per_success=9.0), "cost_per_success_not_worse"),
        (make_suite("capability", p95_duration_ms=900.0), "latency_delta_lt_15_percent"),
    ],
)
def test_a_bad_candidate_is_refused_with_the_gate_and_its_reason(plan: ReleasePlan, candidate, gate: str):
    report = make_report(candidate=[candidate, make_suite("adversarial")])
    with pytest.raises(StageRefusedError) as caught:
        require_offline_gates(report, plan)
    text = str(caught.value)
    assert text.startswith("offline gates refuse the candidate: ")
    assert f"{gate}: fail (" in text
    assert ": pass (" not in text
    assert caught.value.exit_code == 1


def test_all_reasons_are_given_at_once(plan: ReleasePlan):
    bad = make_suite("capability", cost_per_success=9.0, p95_duration_ms=900.0)
    with pytest.raises(StageRefusedError) as caught:
        require_offline_gates(make_report(candidate=[bad, make_suite("adversarial")]), plan)
    assert "cost_per_success_not_worse: fail" in str(caught.value)
    assert "latency_delta_lt_15_percent: fail" in str(caught.value)


def test_no_data_is_no_pass(plan: ReleasePlan):
    """Suites too small to judge by say nothing about the candidate, so it may not go on."""
    few = [make_suite(name, num_tasks=3) for name in ("capability", "adversarial")]
    with pytest.raises(StageRefusedError, match="inconclusive"):
        require_offline_gates(make_report(few, few), plan)


def test_a_violation_found_in_rollouts_stops_the_candidate(home: Path, places: Places, monkeypatch: pytest.MonkeyPatch):
    """From what a policy does to the refusal, through the real suites and the real report."""

    def policies(path: str, _request: RolloutRequest) -> Outcome:
        return UNSAFE if path == CANDIDATE.path else GOOD

    sizes = ("data.num_held_out=40", "data.num_frozen=40", "data.num_adversarial=40")
    run = make_run(home, *sizes)
    frozen, plan = freeze_data(run), plan_of(run)
    monkeypatch.setattr(sampling, "RolloutPool", PoolRecorder(lambda _path, _request: GOOD))
    assert require_offline_gates(evaluate_both(run, frozen), plan)
    monkeypatch.setattr(sampling, "RolloutPool", PoolRecorder(policies))
    with pytest.raises(StageRefusedError, match="no_safety_regression: fail"):
        require_offline_gates(evaluate_both(run, frozen), plan)
