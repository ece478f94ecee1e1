"""Registered versions: nothing carries traffic that MLflow cannot name, with the data and reward model it stands on.

Stages 7 and 8: a canary beside the stable policy, until evidence promotes it or fails it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from cluster.pipeline.bench import ReleaseBench, ReleaseResult
from cluster.pipeline.run import Run
from cluster.pipeline.training import copy_tokenizer
from cluster.records import Bundle, Component
from cluster.registry import Lineage, Registry
from cluster.spec import MAX_ROLLBACK_S
from rl_actors.contracts import DataSnapshot, PolicyVersion, RewardModelVersion
from serving.contracts import RampStep, ReleasePlan
from serving.store import ServedPolicy


def register_policies(
    registry: Registry,
    snapshot: DataSnapshot,
    reward_model: RewardModelVersion,
    policies: Sequence[tuple[PolicyVersion, Bundle]],
) -> None:
    """Register the reward model and every policy that may carry traffic, linked to each other."""
    bundle_id = policies[0][1].id
    lineage = Lineage(bundle_id=bundle_id, snapshot_sha256=snapshot.sha256, stage="reward_model")
    number = registry.versions.register_reward_model(reward_model, lineage)
    for policy, bundle in policies:
        stage = "degrade" if policy.kind == "degraded" else policy.kind
        lineage = Lineage(bundle_id=bundle.id, snapshot_sha256=snapshot.sha256, reward_model=number, stage=stage)
        registry.versions.register_policy(policy, lineage)


FULL_WEIGHT = 1.4
"""`full_samples` in `min_canary_requests`. With the default 50, latency is decided after 100 candidate runs at 5 and
25 %, and after 200 at 50 %, where stable's sample is no larger."""


DEGRADE_SCALE = 0.6
"""Noise of the deliberately bad candidate, in standard deviations of each weight tensor."""


def release_plan(run: Run, *, may_promote: bool) -> ReleasePlan:
    """Return the rules of a release from the spec; a drill has the same rules and can never promote."""
    release = run.spec.release
    max_duration_s = release.max_minutes * 60.0
    ramp = tuple(
        RampStep(share=share / 100.0, min_requests=release.min_canary_requests, max_duration_s=max_duration_s)
        for share in release.ramp
    )
    return ReleasePlan(
        ramp=ramp,
        max_duration_s=max_duration_s,
        gates=tuple(release.gates),
        critical_checks=tuple(run.workflow.critical_checks),
        alpha=release.alpha,
        full_samples=round(FULL_WEIGHT * release.min_canary_requests),
        min_samples=max(2, min(50, release.min_canary_requests)),  # one sample has no spread
        max_rollback_s=MAX_ROLLBACK_S,
        may_promote=may_promote,
        tick_s=1.0,
        seed=run.spec.seed,
    )


def degrade_policy(run: Run, policy: PolicyVersion) -> PolicyVersion:
    """Write a really bad checkpoint: every weight of the policy with noise added. What a broken training run leaves."""
    from transformers import AutoModelForCausalLM

    directory = run.fresh("models/degraded")
    model = AutoModelForCausalLM.from_pretrained(policy.path, dtype=torch.float32)
    generator = torch.Generator().manual_seed(run.spec.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * parameter.std() * DEGRADE_SCALE)
    model.save_pretrained(directory)
    copy_tokenizer(policy.path, directory)
    return run.policy("degraded_v1", "degraded", directory, policy.sha256)


def served(policy: PolicyVersion, reward_model_version: str, bundle_id: str) -> ServedPolicy:
    """Return a policy as Serve deploys it, with the stamps every response will carry."""
    return ServedPolicy(
        version=policy.name,
        path=policy.path,
        model_version=policy.sha256[:16],
        reward_model_version=reward_model_version,
        bundle_id=bundle_id,
    )


def release_all(
    run: Run,
    snapshot: DataSnapshot,
    registry: Registry,
    bundle: Bundle,
    baseline: PolicyVersion,
    candidate: PolicyVersion,
    reward_model: RewardModelVersion,
) -> tuple[ReleaseResult, ReleaseResult]:
    """Release the candidate against the baseline, then a deliberately bad one against whoever is stable after that."""
    plan, drill = release_plan(run, may_promote=True), release_plan(run, may_promote=False)
    degraded = run.stage(
        "degrade",
        {"policy": candidate.sha256, "scale": DEGRADE_SCALE, "seed": run.spec.seed},
        lambda: degrade_policy(run, candidate),
        PolicyVersion,
        detail="a really bad checkpoint for the fail-back drill",
        describe=lambda p: p.name,
    )
    bundles = {p.name: replace_policy(bundle, p) for p in (baseline, candidate, degraded)}
    register_policies(registry, snapshot, reward_model, [(p, bundles[p.name]) for p in (baseline, candidate, degraded)])
    versions = {p.name: served(p, reward_model.name, bundles[p.name].id) for p in (baseline, candidate, degraded)}
    with ReleaseBench(run, snapshot, registry.versions, reward_model.path) as bench:
        first = run.stage(
            "canary",
            {"plan": plan, "stable": baseline.sha256, "candidate": candidate.sha256, "bundle": bundle.id},
            lambda: bench.release(
                0, versions[baseline.name], versions[candidate.name], plan, run.folder.decisions.parent
            ),
            ReleaseResult,
            detail=f"{run.spec.release.canary_traffic_percent:g} % of live tickets on Ray Serve",
            describe=describe_release,
        )
        stable = candidate if first.outcome == "promoted" else baseline
        second = run.stage(
            "failback_drill",
            {"plan": drill, "stable": stable.sha256, "candidate": degraded.sha256},
            lambda: bench.release(
                1, versions[stable.name], versions[degraded.name], drill, run.folder.root / "release_drill"
            ),
            ReleaseResult,
            detail="the bad checkpoint meets live traffic",
            describe=describe_release,
        )
    return first, second


def replace_policy(bundle: Bundle, policy: PolicyVersion) -> Bundle:
    """Return the bundle with another policy in it: every version that may answer users has a bundle of its own."""
    return replace(bundle, policy=Component(version=policy.name, sha256=policy.sha256))


def describe_release(result: ReleaseResult) -> str:
    """Return one line for the person who watches."""
    counts = f"{result.canary_requests} canary of {result.requests} requests, {result.failed_requests} failed"
    has_recovered = result.outcome in {"rolled_back", "failed_back"}  # after a halt nobody has acknowledged anything
    recovery = f", recovered in {result.time_to_recovery_s:.2f} s" if has_recovered else ""
    return f"{result.outcome.replace('_', ' ')}{recovery} ({counts})"
