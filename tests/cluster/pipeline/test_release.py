"""Stages 7 and 8 around the bench: the rules, the bad checkpoint, and who is tried against whom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from cluster.pipeline import release
from cluster.pipeline.release import (
    describe_release,
    register_policies,
    release_all,
    release_plan,
    replace_policy,
    served,
)
from cluster.pipeline.run import Learned
from cluster.records.bundle import MEMBERS, Bundle, Component, diff_bundles
from cluster.records.frozen import freeze_policy, fresh
from cluster.records.summary import ReleaseOutcome
from rl_actors.contracts import Outcome
from rl_actors.contracts.errors import BadInputError, InfrastructureError
from rl_actors.contracts.versions import DataSnapshot, PolicyVersion
from serving.contracts.gates import ARTICLE_GATES
from serving.contracts.release import Canary, ReleasePlan, RollBack
from serving.gates.registry import check_gate_names
from serving.release.monitors.registry import evaluate_live
from serving.release.state_machine import decide
from serving.store.served import ServedPolicy
from tests.cluster.pipeline.fakes import (
    DeskRun,
    FakeRegistry,
    FakeVersions,
    make_policy,
    make_result,
    make_reward_model,
    make_run,
)
from tests.cluster.workflows.desk_runs import view
from tests.serving.fakes import START, good_evidence

SFT, PPO = make_policy("/models/sft", "sft-1", "sft"), make_policy("/models/ppo", "ppo-1")
BAD, RM = make_policy("/models/bad", "degraded-1", "degraded"), make_reward_model("/models/rm")
BUNDLE = Bundle(**{name: Component(version="v", sha256="e" * 64) for name in MEMBERS})


def plan_of(run: DeskRun, *, may_promote: bool) -> ReleasePlan:
    return release_plan(run.spec, run.workflow.critical_checks, may_promote=may_promote)


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_the_plan_follows_the_spec(home: Path):
    settings = ("canary_traffic_percent=10", "ramp=[10, 40]", "min_canary_requests=80", "alpha=0.02", "max_minutes=3.0")
    run = make_run(home, *(f"release.{setting}" for setting in settings))
    plan = plan_of(run, may_promote=True)
    assert [step.share for step in plan.ramp] == [0.1, 0.4]
    assert {step.min_requests for step in plan.ramp} == {80}
    assert {step.max_duration_s for step in plan.ramp} == {plan.max_duration_s} == {180.0}
    assert (plan.alpha, plan.min_samples, plan.full_samples, plan.seed) == (0.02, 50, 112, 7)
    assert set(plan.gates) == set(ARTICLE_GATES)
    check_gate_names(plan)


def test_a_drill_has_the_same_rules_and_can_never_promote(run: DeskRun):
    plan, drill = plan_of(run, may_promote=True), plan_of(run, may_promote=False)
    assert (plan.may_promote, drill.may_promote) == (True, False)
    assert (drill.ramp, drill.gates, drill.alpha) == (plan.ramp, plan.gates, plan.alpha)


def test_the_shares_of_the_spec_are_the_shares_of_the_plan(home: Path):
    """A hundred percent has no stable arm to compare with: the spec refuses it, nothing rounds it down."""
    run = make_run(home, "release.canary_traffic_percent=50", "release.ramp=[50, 99]")
    assert [step.share for step in plan_of(run, may_promote=True).ramp] == [0.5, 0.99]
    with pytest.raises(BadInputError, match="at most 99") as caught:
        make_run(home, "release.canary_traffic_percent=50", "release.ramp=[50, 100]")
    assert caught.value.field == "release.ramp"


@pytest.mark.parametrize("requests", [1, 2, 30])
def test_few_canary_requests_still_make_a_plan(home: Path, requests: int):
    plan = plan_of(make_run(home, f"release.min_canary_requests={requests}"), may_promote=True)
    assert plan.min_samples == max(2, requests)
    assert plan.ramp[0].min_requests == requests


def leak(run: DeskRun) -> Mapping[str, int]:
    """Failed checks of one reply that names another customer, as the workflow itself reports them."""
    (task,) = run.workflow.build_tasks("live", 1, 7)
    state = Outcome(success=True, violations=(), reasons=())
    own = task.prompt.partition(":")[0].removeprefix("From ")
    other = "C11_11" if own != "C11_11" else "C12_12"
    honest, leaking = (
        run.workflow.check_reply(f"The order of {name} is on its way.", view(task, (), "", state))
        for name in (own, other)
    )
    assert all(honest.values())
    return {name: 1 for name, holds in leaking.items() if not holds}


def test_one_foreign_customer_id_ends_a_candidate_at_once(run: DeskRun):
    """Everything else about this candidate passes: only the plan's critical check tells it from a good one."""
    plan = plan_of(run, may_promote=True)
    evidence = replace(good_evidence(), failed_checks=leak(run))
    assert evidence.failed_checks == {"no_foreign_customer_id": 1}
    (result,) = evaluate_live(evidence, plan)
    assert (result.gate, result.verdict) == ("no_safety_regression", "fail")
    assert "no_foreign_customer_id" in result.reason
    state = Canary(step=0, epoch=2, step_started_at=START, release_started_at=START)
    assert isinstance(decide(state, (result,), plan, START + 60.0), RollBack)


def test_without_critical_checks_the_same_leak_would_pass(run: DeskRun):
    """Negative control: what the plan does not name is an event among others."""
    plan = replace(plan_of(run, may_promote=True), critical_checks=())
    results = evaluate_live(replace(good_evidence(), failed_checks=leak(run)), plan)
    assert {result.verdict for result in results} <= {"pass", "inconclusive"}


def test_a_check_that_is_not_critical_ends_nothing_at_once(run: DeskRun):
    plan = plan_of(run, may_promote=True)
    assert len(evaluate_live(replace(good_evidence(), failed_checks={"within_length": 3}), plan)) > 1


def test_a_workflow_without_critical_checks_has_a_plan_without(run: DeskRun):
    assert plan_of(run, may_promote=False).critical_checks == ("no_foreign_customer_id",)
    run.workflow.critical_checks = []
    try:
        assert plan_of(run, may_promote=False).critical_checks == ()
    finally:
        del run.workflow.critical_checks


def test_rules_that_cannot_be_are_refused(home: Path):
    with pytest.raises(BadInputError) as caught:
        plan_of(make_run(home, "release.alpha=0.6"), may_promote=True)
    assert caught.value.field == "plan.alpha"


# --- stamps and lines -------------------------------------------------------------------------------------------------


def test_a_served_policy_carries_all_its_stamps():
    policy = served(PPO, "rm_v1", "b" * 64)
    assert policy == ServedPolicy(
        version="ppo-1",
        path="/models/ppo",
        model_version=PPO.sha256[:16],
        reward_model_version="rm_v1",
        bundle_id="b" * 64,
    )


@pytest.mark.parametrize(("reward_model", "bundle_id"), [("", "b"), ("rm", "")])
def test_a_policy_without_a_stamp_is_not_served(reward_model: str, bundle_id: str):
    with pytest.raises(BadInputError, match="every response is stamped"):
        served(PPO, reward_model, bundle_id)


def test_every_policy_has_a_bundle_of_its_own_that_differs_in_nothing_else():
    bundles = [replace_policy(BUNDLE, policy) for policy in (SFT, PPO, BAD)]
    assert len({bundle.id for bundle in bundles}) == 3
    for bundle, policy in zip(bundles, (SFT, PPO, BAD), strict=True):
        assert bundle.policy == Component(version=policy.name, sha256=policy.sha256)
        assert [change.member for change in diff_bundles(BUNDLE, bundle)] == ["policy"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"outcome": "promoted"}, "promoted (90 canary of 400 requests, 0 failed)"),
        (
            {"outcome": "rolled_back", "time_to_recovery_s": 0.517, "failed_requests": 2},
            "rolled back, recovered in 0.52 s (90 canary of 400 requests, 2 failed)",
        ),
        ({"outcome": "halted"}, "halted (90 canary of 400 requests, 0 failed)"),
    ],
)
def test_a_release_is_told_in_one_line(changes: dict[str, Any], line: str):
    assert describe_release(make_result(**changes)) == line


@pytest.mark.parametrize(("requests", "canary", "share"), [(200, 12, 0.06), (0, 0, 0.0)])
def test_the_observed_share_is_of_the_first_step(requests: int, canary: int, share: float):
    result = make_result(first_step_requests=requests, first_step_canary_requests=canary)
    assert result.observed_share == pytest.approx(share)


def test_every_version_is_linked_to_reward_model_data_and_its_own_bundle(snapshot: DataSnapshot):
    versions = FakeVersions()
    own = Learned(snapshot=snapshot, base=SFT, baseline=SFT, reward_model=RM, candidate=PPO)
    found = register_policies(versions, own, BUNDLE, (SFT, PPO, BAD))  # type: ignore[arg-type]
    (reward, *policies) = versions.registered
    assert reward[:2] == ("reward", RM.name)
    assert [name for _, name, _ in policies] == [SFT.name, PPO.name, BAD.name] == list(found)
    assert [lineage.stage for _, _, lineage in policies] == ["sft", "ppo", "degrade"]
    bundles = [replace_policy(BUNDLE, policy).id for policy in (SFT, PPO, BAD)]
    assert [lineage.bundle_id for _, _, lineage in policies] == bundles
    assert [policy.bundle_id for policy in found.values()] == bundles
    assert reward[2].bundle_id == bundles[0]
    assert len(set(bundles)) == 3
    assert {lineage.reward_model for _, _, lineage in policies} == {"4"}
    assert {lineage.snapshot_sha256 for _, _, lineage in (reward, *policies)} == {snapshot.sha256}


# --- both releases ----------------------------------------------------------------------------------------------------


@dataclass
class FakeBench:
    """A bench whose releases end as the test says, without serving anything."""

    endings: list[str | Exception]
    tried: list[tuple[int, ServedPolicy, ServedPolicy, ReleasePlan, Path]] = field(default_factory=list)

    def release(
        self, index: int, stable: ServedPolicy, candidate: ServedPolicy, plan: ReleasePlan, directory: Path
    ) -> ReleaseOutcome:
        self.tried.append((index, stable, candidate, plan, directory))
        ending = self.endings[index]
        if isinstance(ending, Exception):
            raise ending
        return make_result(release_id=f"r-{index}", outcome=ending, stable=stable.version, candidate=candidate.version)


@pytest.fixture
def degrading(monkeypatch: pytest.MonkeyPatch) -> list[PolicyVersion]:
    """Which policies were degraded; nothing is trained or written."""
    seen: list[PolicyVersion] = []

    def degrade(policy: PolicyVersion, directory: Path, _seed: int) -> PolicyVersion:
        seen.append(policy)
        (fresh(directory) / "model.bin").write_text("bad")
        return freeze_policy("degraded", "degraded", directory, policy.sha256)

    monkeypatch.setattr(release, "degrade_policy", degrade)
    return seen


def release_both(
    run: DeskRun, snapshot: DataSnapshot, monkeypatch: pytest.MonkeyPatch, *endings: str | Exception
) -> tuple[FakeBench, FakeRegistry, tuple[ReleaseOutcome, ReleaseOutcome]]:
    bench, registry = FakeBench(list(endings)), FakeRegistry()
    learned = Learned(snapshot=snapshot, base=SFT, baseline=SFT, reward_model=RM, candidate=PPO)
    plan = plan_of(run, may_promote=True)
    results = release_all(run, run.spec.seed, plan, learned, BUNDLE, registry.versions, bench)  # type: ignore[arg-type]
    return bench, registry, results


@pytest.mark.usefixtures("degrading")
def test_the_candidate_is_tried_first_then_the_bad_one(
    run: DeskRun, snapshot: DataSnapshot, monkeypatch: pytest.MonkeyPatch
):
    bench, _, (first, second) = release_both(run, snapshot, monkeypatch, "promoted", "rolled_back")
    assert [line.name for line in run.lines] == ["degrade", "canary", "failback_drill"]
    assert [(index, stable.version, plan.may_promote) for index, stable, _, plan, _ in bench.tried] == [
        (0, SFT.name, True),
        (1, PPO.name, False),
    ]
    assert bench.tried[0][2].version == PPO.name
    assert bench.tried[1][2].version.startswith("degraded-")
    assert (first.outcome, second.outcome) == ("promoted", "rolled_back")
    assert len({directory for *_, directory in bench.tried}) == 2


@pytest.mark.usefixtures("degrading")
@pytest.mark.parametrize("ending", ["rolled_back", "halted", "failed_back"])
def test_a_lost_candidate_is_not_the_stable_one_of_the_drill(
    run: DeskRun, snapshot: DataSnapshot, monkeypatch: pytest.MonkeyPatch, ending: str
):
    bench, _, _ = release_both(run, snapshot, monkeypatch, ending, "rolled_back")
    assert [stable.version for _, stable, *_ in bench.tried] == [SFT.name, SFT.name]


def test_the_bad_one_is_made_from_the_candidate(
    run: DeskRun, snapshot: DataSnapshot, monkeypatch: pytest.MonkeyPatch, degrading: list[PolicyVersion]
):
    release_both(run, snapshot, monkeypatch, "promoted", "rolled_back")
    assert degrading == [PPO]


@pytest.mark.usefixtures("degrading")
def test_all_three_are_registered_with_a_bundle_of_their_own_before_any_traffic(
    run: DeskRun, snapshot: DataSnapshot, monkeypatch: pytest.MonkeyPatch
):
    bench, registry, _ = release_both(run, snapshot, monkeypatch, "promoted", "rolled_back")
    lineages = {name: lineage for kind, name, lineage in registry.versions.registered if kind == "policy"}
    assert len(lineages) == 3
    for _, stable, candidate, *_ in bench.tried:
        for policy in (stable, candidate):
            assert lineages[policy.version].bundle_id == policy.bundle_id
    assert lineages[PPO.name].bundle_id == replace_policy(BUNDLE, PPO).id


@pytest.mark.usefixtures("degrading")
def test_a_broken_drill_does_not_repeat_the_canary(home: Path, snapshot: DataSnapshot, monkeypatch: pytest.MonkeyPatch):
    broken = InfrastructureError("gateway died")
    first = make_run(home)
    with pytest.raises(InfrastructureError, match="gateway died"):
        release_both(first, snapshot, monkeypatch, "promoted", broken)
    resumed = make_run(home)
    bench, _, (canary, drill) = release_both(resumed, snapshot, monkeypatch, "rolled_back", "rolled_back")
    assert [index for index, *_ in bench.tried] == [1]
    assert bench.tried[0][1].version == PPO.name
    assert (canary.outcome, drill.outcome) == ("promoted", "rolled_back")
    assert [(line.name, line.resumed) for line in resumed.lines] == [
        ("degrade", True),
        ("canary", True),
        ("failback_drill", False),
    ]
