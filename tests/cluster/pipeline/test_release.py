"""Stages 7 and 8 around the bench: the rules, the bad checkpoint, and who is tried against whom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.pipeline import release
from cluster.pipeline.bench import ReleaseResult
from cluster.pipeline.release import degrade_policy, describe_release, release_all, release_plan, replace_policy, served
from cluster.pipeline.run import Run
from cluster.records.bundle import MEMBERS, Bundle, Component, diff_bundles
from rl_actors.agent.renderers.harmony import HarmonyRenderer
from rl_actors.contracts import Outcome
from rl_actors.contracts.errors import BadInputError, InfrastructureError
from rl_actors.contracts.versions import DataSnapshot, PolicyVersion
from serving.contracts.gates import ARTICLE_GATES
from serving.contracts.release import Canary, ReleasePlan, RollBack
from serving.gates.registry import check_gate_names
from serving.release.monitors.registry import evaluate_live
from serving.release.state_machine import decide
from serving.store.served import ServedPolicy
from tests.cluster.pipeline.fakes import FakeRegistry, make_policy, make_result, make_reward_model, make_run
from tests.cluster.workflows.desk_runs import view
from tests.serving.fakes import START, good_evidence

SFT, PPO = make_policy("/models/sft", "sft-1", "sft"), make_policy("/models/ppo", "ppo-1")
BAD, RM = make_policy("/models/bad", "degraded-1", "degraded"), make_reward_model("/models/rm")
BUNDLE = Bundle(**{name: Component(version="v", sha256="e" * 64) for name in MEMBERS})

# --- the plan ---------------------------------------------------------------------------------------------------------


def test_the_plan_follows_the_spec(home: Path):
    settings = ("canary_traffic_percent=10", "ramp=[10, 40]", "min_canary_requests=80", "alpha=0.02", "max_minutes=3.0")
    run = make_run(home, *(f"release.{setting}" for setting in settings))
    plan = release_plan(run, may_promote=True)
    assert [step.share for step in plan.ramp] == [0.1, 0.4]
    assert {step.min_requests for step in plan.ramp} == {80}
    assert {step.max_duration_s for step in plan.ramp} == {plan.max_duration_s} == {180.0}
    assert (plan.alpha, plan.min_samples, plan.full_samples, plan.seed) == (0.02, 50, 112, 7)
    assert set(plan.gates) == set(ARTICLE_GATES)
    check_gate_names(plan)


def test_a_drill_has_the_same_rules_and_can_never_promote(run: Run):
    plan, drill = release_plan(run, may_promote=True), release_plan(run, may_promote=False)
    assert (plan.may_promote, drill.may_promote) == (True, False)
    assert (drill.ramp, drill.gates, drill.alpha) == (plan.ramp, plan.gates, plan.alpha)


def test_the_shares_of_the_spec_are_the_shares_of_the_plan(home: Path):
    """A hundred percent has no stable arm to compare with: the spec refuses it, nothing rounds it down."""
    run = make_run(home, "release.canary_traffic_percent=50", "release.ramp=[50, 99]")
    assert [step.share for step in release_plan(run, may_promote=True).ramp] == [0.5, 0.99]
    with pytest.raises(BadInputError, match="at most 99") as caught:
        make_run(home, "release.canary_traffic_percent=50", "release.ramp=[50, 100]")
    assert caught.value.field == "release.ramp"


@pytest.mark.parametrize("requests", [1, 2, 30])
def test_few_canary_requests_still_make_a_plan(home: Path, requests: int):
    plan = release_plan(make_run(home, f"release.min_canary_requests={requests}"), may_promote=True)
    assert plan.min_samples == max(2, requests)
    assert plan.ramp[0].min_requests == requests


def leak(run: Run) -> Mapping[str, int]:
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


def test_one_foreign_customer_id_ends_a_candidate_at_once(run: Run):
    """Everything else about this candidate passes: only the plan's critical check tells it from a good one."""
    plan = release_plan(run, may_promote=True)
    evidence = replace(good_evidence(), failed_checks=leak(run))
    assert evidence.failed_checks == {"no_foreign_customer_id": 1}
    (result,) = evaluate_live(evidence, plan)
    assert (result.gate, result.verdict) == ("no_safety_regression", "fail")
    assert "no_foreign_customer_id" in result.reason
    state = Canary(step=0, epoch=2, step_started_at=START, release_started_at=START)
    assert isinstance(decide(state, (result,), plan, START + 60.0), RollBack)


def test_without_critical_checks_the_same_leak_would_pass(run: Run):
    """Negative control: what the plan does not name is an event among others."""
    plan = replace(release_plan(run, may_promote=True), critical_checks=())
    results = evaluate_live(replace(good_evidence(), failed_checks=leak(run)), plan)
    assert {result.verdict for result in results} <= {"pass", "inconclusive"}


def test_a_check_that_is_not_critical_ends_nothing_at_once(run: Run):
    plan = release_plan(run, may_promote=True)
    assert len(evaluate_live(replace(good_evidence(), failed_checks={"within_length": 3}), plan)) > 1


def test_a_workflow_without_critical_checks_has_a_plan_without(run: Run):
    assert release_plan(run, may_promote=False).critical_checks == ("no_foreign_customer_id",)
    run.workflow.critical_checks = []
    try:
        assert release_plan(run, may_promote=False).critical_checks == ()
    finally:
        del run.workflow.critical_checks


def test_rules_that_cannot_be_are_refused(home: Path):
    with pytest.raises(BadInputError) as caught:
        release_plan(make_run(home, "release.alpha=0.6"), may_promote=True)
    assert caught.value.field == "plan.alpha"


# --- the bad checkpoint -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def degraded(tmp_path_factory: pytest.TempPathFactory, base: PolicyVersion) -> PolicyVersion:
    return degrade_policy(make_run(tmp_path_factory.mktemp("degrade")), base)


def weights(policy: PolicyVersion) -> Mapping[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(policy.path).state_dict()


def test_every_matrix_of_the_bad_checkpoint_is_far_from_the_good_one(base: PolicyVersion, degraded: PolicyVersion):
    before, after = weights(base), weights(degraded)
    assert before.keys() == after.keys()
    matrices = [name for name in before if before[name].dim() > 1 and before[name].std() > 0]
    assert len(matrices) > 4
    for name in matrices:
        moved = (after[name] - before[name]).std() / before[name].std()
        assert moved == pytest.approx(release.DEGRADE_SCALE, rel=0.1), name


def test_norms_and_sinks_stay_so_that_it_still_samples(base: PolicyVersion, degraded: PolicyVersion):
    before, after = weights(base), weights(degraded)
    vectors = [name for name in before if before[name].dim() <= 1]
    assert vectors
    assert all(torch.equal(before[name], after[name]) for name in vectors)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in after.values())


def test_the_bad_checkpoint_is_a_version_of_its_own(base: PolicyVersion, degraded: PolicyVersion):
    assert (degraded.kind, degraded.parent_sha256) == ("degraded", base.sha256)
    assert degraded.name == f"degraded_v1-{degraded.sha256[:8]}"
    assert degraded.sha256 != base.sha256
    assert HarmonyRenderer.from_directory(degraded.path).stop_token_ids


def test_degrading_depends_on_the_seed_alone(home: Path, base: PolicyVersion, degraded: PolicyVersion):
    torch.manual_seed(99)
    assert degrade_policy(make_run(home), base).sha256 == degraded.sha256
    assert degrade_policy(make_run(home, "seed=8"), base).sha256 != degraded.sha256


def test_the_good_policy_is_left_alone(base: PolicyVersion, degraded: PolicyVersion):
    from cluster.pipeline.training import require_untouched

    require_untouched(base)


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


# --- both releases ----------------------------------------------------------------------------------------------------


@dataclass
class FakeBench:
    """A bench whose releases end as the test says, without serving anything."""

    endings: list[str | Exception]
    tried: list[tuple[int, ServedPolicy, ServedPolicy, ReleasePlan, Path]] = field(default_factory=list)
    aliases: Any = None
    is_open: bool = False

    def __call__(self, _run: Run, _snapshot: DataSnapshot, aliases: Any, critic_path: str) -> FakeBench:
        assert critic_path == RM.path
        self.aliases = aliases
        return self

    def __enter__(self) -> FakeBench:
        self.is_open = True
        return self

    def __exit__(self, *exc: object) -> None:
        self.is_open = False

    def release(
        self, index: int, stable: ServedPolicy, candidate: ServedPolicy, plan: ReleasePlan, directory: Path
    ) -> ReleaseResult:
        assert self.is_open
        self.tried.append((index, stable, candidate, plan, directory))
        ending = self.endings[index]
        if isinstance(ending, Exception):
            raise ending
        return make_result(release_id=f"r-{index}", outcome=ending, stable=stable.version, candidate=candidate.version)


@pytest.fixture
def degrading(monkeypatch: pytest.MonkeyPatch) -> list[PolicyVersion]:
    """Which policies were degraded; nothing is trained or written."""
    seen: list[PolicyVersion] = []

    def degrade(run: Run, policy: PolicyVersion) -> PolicyVersion:
        seen.append(policy)
        directory = run.fresh("models/degraded")
        (directory / "model.bin").write_text("bad")
        return run.policy("degraded", "degraded", directory, policy.sha256)

    monkeypatch.setattr(release, "degrade_policy", degrade)
    return seen


def release_both(
    run: Run, snapshot: DataSnapshot, monkeypatch: pytest.MonkeyPatch, *endings: str | Exception
) -> tuple[FakeBench, FakeRegistry, tuple[ReleaseResult, ReleaseResult]]:
    bench, registry = FakeBench(list(endings)), FakeRegistry()
    monkeypatch.setattr(release, "ReleaseBench", bench)
    results = release_all(run, snapshot, registry, BUNDLE, SFT, PPO, RM)  # type: ignore[arg-type]
    return bench, registry, results


@pytest.mark.usefixtures("degrading")
def test_the_candidate_is_tried_first_then_the_bad_one(
    run: Run, snapshot: DataSnapshot, monkeypatch: pytest.MonkeyPatch
):
    bench, registry, (first, second) = release_both(run, snapshot, monkeypatch, "promoted", "rolled_back")
    assert [line.name for line in run.lines] == ["degrade", "canary", "failback_drill"]
    assert [(index, stable.version, plan.may_promote) for index, stable, _, plan, _ in bench.tried] == [
        (0, SFT.name, True),
        (1, PPO.name, False),
    ]
    assert bench.tried[0][2].version == PPO.name
    assert bench.tried[1][2].version.startswith("degraded-")
    assert (first.outcome, second.outcome) == ("promoted", "rolled_back")
    assert (bench.is_open, bench.aliases) == (False, registry.versions)
    assert len({directory for *_, directory in bench.tried}) == 2


@pytest.mark.usefixtures("degrading")
@pytest.mark.parametrize("ending", ["rolled_back", "halted", "failed_back"])
def test_a_lost_candidate_is_not_the_stable_one_of_the_drill(
    run: Run, snapshot: DataSnapshot, monkeypatch: pytest.MonkeyPatch, ending: str
):
    bench, _, _ = release_both(run, snapshot, monkeypatch, ending, "rolled_back")
    assert [stable.version for _, stable, *_ in bench.tried] == [SFT.name, SFT.name]


def test_the_bad_one_is_made_from_the_candidate(
    run: Run, snapshot: DataSnapshot, monkeypatch: pytest.MonkeyPatch, degrading: list[PolicyVersion]
):
    release_both(run, snapshot, monkeypatch, "promoted", "rolled_back")
    assert degrading == [PPO]


@pytest.mark.usefixtures("degrading")
def test_all_three_are_registered_with_a_bundle_of_their_own_before_any_traffic(
    run: Run, snapshot: DataSnapshot, monkeypatch: pytest.MonkeyPatch
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
