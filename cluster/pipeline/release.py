"""Stages 7 and 8: a canary beside the stable policy, until evidence promotes it or fails it back; then a bad one.

Nothing carries traffic that MLflow cannot name, with the data and reward model it stands on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from cluster.pipeline.bench import ReleaseBench
from cluster.pipeline.run import Learned, Run
from cluster.records import Bundle, Component, ReleaseOutcome
from cluster.registry import Lineage, RegisteredVersions
from cluster.simulation import DEGRADE_SCALE, degrade_policy
from cluster.spec import MAX_ROLLBACK_S, WorkflowSpec
from rl_actors.contracts import PolicyVersion
from serving.contracts import RampStep, ReleasePlan
from serving.store import ServedPolicy

# `full_samples` in `min_canary_requests`. With the default 50, latency is decided after 100 candidate requests at 5 and
# 25 %, and after 200 at 50 %, where stable's sample is no larger.
FULL_WEIGHT: Final = 1.4


def release_plan(spec: WorkflowSpec, critical_checks: Sequence[str], *, may_promote: bool) -> ReleasePlan:
    """Return the rules of a release from the spec; a drill has the same rules and can never promote."""
    release = spec.release
    max_duration_s = release.max_minutes * 60.0
    ramp = tuple(
        RampStep(share=share / 100.0, min_requests=release.min_canary_requests, max_duration_s=max_duration_s)
        for share in release.ramp
    )
    return ReleasePlan(
        ramp=ramp,
        max_duration_s=max_duration_s,
        gates=tuple(release.gates),
        critical_checks=tuple(critical_checks),
        alpha=release.alpha,
        full_samples=round(FULL_WEIGHT * release.min_canary_requests),
        min_samples=max(2, min(50, release.min_canary_requests)),  # one sample has no spread
        max_rollback_s=MAX_ROLLBACK_S,
        may_promote=may_promote,
        tick_s=1.0,
        seed=spec.seed,
    )


def release_all(
    run: Run,
    seed: int,
    plan: ReleasePlan,
    learned: Learned,
    bundle: Bundle,
    versions: RegisteredVersions,
    bench: ReleaseBench,
) -> tuple[ReleaseOutcome, ReleaseOutcome]:
    """Release the candidate against the baseline, then a deliberately bad one against whoever is stable after that."""
    baseline, candidate, drill = learned.baseline, learned.candidate, replace(plan, may_promote=False)
    degraded = run.stage(
        "degrade",
        {"policy": candidate.sha256, "scale": DEGRADE_SCALE, "seed": seed},
        lambda: degrade_policy(candidate, run.folder.models / "degraded", seed),
        PolicyVersion,
        detail="a really bad checkpoint for the fail-back drill",
        describe=lambda p: p.name,
    )
    # Before any traffic: an alias cannot name a version that MLflow does not have.
    served = register_policies(versions, learned, bundle, (baseline, candidate, degraded))
    first = run.stage(
        "canary",
        {"plan": plan, "stable": baseline.sha256, "candidate": candidate.sha256, "bundle": bundle.id},
        lambda: bench.release(0, served[baseline.name], served[candidate.name], plan, run.folder.decisions.parent),
        ReleaseOutcome,
        detail=f"{100 * plan.ramp[0].share:g} % of live tickets on Ray Serve",
        describe=describe_release,
    )
    # A candidate that lost must not be what the drill falls back to.
    stable = candidate if first.outcome == "promoted" else baseline
    second = run.stage(
        "failback_drill",
        {"plan": drill, "stable": stable.sha256, "candidate": degraded.sha256},
        lambda: bench.release(1, served[stable.name], served[degraded.name], drill, run.folder.root / "release_drill"),
        ReleaseOutcome,
        detail="the bad checkpoint meets live traffic",
        describe=describe_release,
    )
    return first, second


def register_policies(
    versions: RegisteredVersions, learned: Learned, bundle: Bundle, policies: Sequence[PolicyVersion]
) -> dict[str, ServedPolicy]:
    """Register the reward model and every policy that may carry traffic, linked to each other; return them as served.

    Each policy has a bundle of its own, and the reward model stands on that of the first.
    """
    data, reward_model = learned.snapshot.sha256, learned.reward_model
    bundle_ids = {policy.name: replace_policy(bundle, policy).id for policy in policies}
    first = bundle_ids[policies[0].name]
    number = versions.register(reward_model, Lineage(bundle_id=first, snapshot_sha256=data, stage="reward_model"))
    for policy in policies:
        stage = "degrade" if policy.kind == "degraded" else policy.kind
        bundle_id = bundle_ids[policy.name]
        versions.register(policy, Lineage(bundle_id=bundle_id, snapshot_sha256=data, reward_model=number, stage=stage))
    return {policy.name: served(policy, reward_model.name, bundle_ids[policy.name]) for policy in policies}


def served(policy: PolicyVersion, reward_model_version: str, bundle_id: str) -> ServedPolicy:
    """Return a policy as Serve deploys it, with the stamps every response will carry."""
    return ServedPolicy(
        version=policy.name,
        path=policy.path,
        model_version=policy.sha256[:16],
        reward_model_version=reward_model_version,
        bundle_id=bundle_id,
    )


def replace_policy(bundle: Bundle, policy: PolicyVersion) -> Bundle:
    """Return the bundle with another policy in it: every version that may answer users has a bundle of its own."""
    return replace(bundle, policy=Component(version=policy.name, sha256=policy.sha256))


def describe_release(result: ReleaseOutcome) -> str:
    """Return one line for the person who watches."""
    counts = f"{result.canary_requests} canary of {result.requests} requests, {result.failed_requests} failed"
    has_recovered = result.outcome in {"rolled_back", "failed_back"}  # after a halt nobody has acknowledged anything
    recovery = f", recovered in {result.time_to_recovery_s:.2f} s" if has_recovered else ""
    return f"{result.outcome.replace('_', ' ')}{recovery} ({counts})"
