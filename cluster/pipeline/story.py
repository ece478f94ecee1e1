"""The whole story on one page: from a spec to a served policy. Each stage returns a frozen value and is journaled.

A stage whose inputs are unchanged is taken from the journal, so a resumed run goes on where the last one stopped.
"""

from __future__ import annotations

from collections.abc import Callable

from cluster.pipeline import bench, data, evaluation, pinned, preferences, records, release, training
from cluster.pipeline.records import Learned
from cluster.pipeline.run import Run
from cluster.pipeline.watch import Watch
from cluster.plan import place
from cluster.ray_cluster import connected
from cluster.records import RunFolder, RunSummary, lock_run
from cluster.registry import Pins, Registry
from cluster.spec import WorkflowSpec
from rl_actors.contracts import DataSnapshot, EvalReport, PolicyVersion, RewardModelVersion
from rl_actors.durable import write_json
from serving.contracts import GateResult, ReleasePlan


def run_pipeline(
    spec: WorkflowSpec, folder: RunFolder, watch: Watch, until: str = "", *, begin: Callable[[], None] = lambda: None
) -> RunSummary:
    """Run every stage, or those up to `until` ("ppo", "eval" or "release"), and return how it ended.

    `begin` is called once Ray and the pinned versions were found: what is refused before is no run to be resumed.

    Raises:
        SeatrialError: With the exit code of design section 8; what has finished stays finished.
    """
    with lock_run(folder.root), connected(spec.cluster.address, place(spec)):
        run = Run.of(spec, folder, watch)
        with records.registry_of(run) as registry:
            pins = pinned.resolve(run, registry)
            begin()
            summary = _learn_and_release(run, registry, pins, until)
        write_json(folder.summary, summary.to_json())
        return summary


def _learn_and_release(run: Run, registry: Registry, pins: Pins, until: str) -> RunSummary:
    """Stages 1 to 9 of design section 2, in order."""
    plan = release.release_plan(run, may_promote=True)  # first: what cannot be is refused before any training
    bench.require_room(run, until)
    learned = _learn(run, pins)
    if until == "ppo":
        return records.summarise(run, trained=learned.trained)
    report = _compare(run, learned, plan)
    if until == "eval":
        return records.summarise(run, trained=learned.trained, report=report)
    return _release(run, registry, learned, report, plan)


def _learn(run: Run, pins: Pins) -> Learned:
    """Stages 1 to 4: frozen data, the baseline, a reward model on its own rollouts, and PPO against both."""
    spec = run.spec
    snapshot = run.stage(
        "snapshot",
        {"workflow": spec.workflow.name, "data": spec.data, "seed": spec.seed},
        lambda: data.freeze_snapshot(run),
        DataSnapshot,
        detail="freeze tasks and demonstrations",
        describe=lambda s: f"{s.num_rows['tasks']} tasks, {s.num_rows['demonstrations']} demonstrations",
    )
    base = run.stage(
        "base",
        {"model": spec.model, "seed": spec.seed, "snapshot": snapshot.sha256},
        lambda: data.build_base(run, snapshot),
        PolicyVersion,
        detail=spec.model.path or "tiny GPT-OSS architecture",
        describe=lambda p: p.name,
    )
    baseline = run.stage(
        "sft",
        {"sft": spec.sft, "base": base.sha256, "snapshot": snapshot.sha256, "seed": spec.seed, **pins.of_baseline},
        lambda: pinned.baseline_of(run, pins, snapshot, base),
        PolicyVersion,
        detail=pinned.detail(pins.baseline, "Ray Train, DeepSpeed"),
        describe=lambda p: f"{p.name}, frozen as the KL reference",
    )
    reward_model = _reward_model(run, pins, snapshot, baseline)
    candidate = run.stage(
        "ppo",
        {"ppo": (spec.ppo, spec.recipe), "baseline": baseline.sha256, "reward": reward_model.sha256, "seed": spec.seed},
        lambda: training.train_policy(run, snapshot, baseline, reward_model),
        PolicyVersion,
        detail="vLLM rollout workers, reward scorers, DeepSpeed learners",
        describe=lambda p: p.name,
    )
    return Learned(
        snapshot=snapshot, base=base, baseline=baseline, reward_model=reward_model, candidate=candidate, pins=pins
    )


def _reward_model(run: Run, pins: Pins, snapshot: DataSnapshot, baseline: PolicyVersion) -> RewardModelVersion:
    """Stage 3: a reward model on the baseline's own rollouts, or the pinned one; two pinned versions need none."""
    spec, ranked = run.spec, snapshot
    if pins.need_rollouts:
        ranked = run.stage(
            "preferences",
            {"reward": spec.reward, "baseline": baseline.sha256, "snapshot": snapshot.sha256, "seed": spec.seed},
            lambda: preferences.collect_preferences(run, snapshot, baseline),
            DataSnapshot,
            detail="the baseline's own rollouts, three simulated annotators",
            describe=lambda s: f"{s.num_rows['rollouts']} rollouts, {s.num_rows['preferences']} choices",
        )
    inputs = {"reward": spec.reward, "baseline": baseline.sha256, "preferences": ranked.sha256, "seed": spec.seed}
    return run.stage(
        "reward_model",
        {**inputs, **pins.of_reward_model},
        lambda: pinned.reward_model_of(run, pins, baseline, ranked),
        RewardModelVersion,
        detail=pinned.detail(pins.reward_model, "Ray Train: Bradley-Terry and rubric heads"),
        describe=lambda r: f"pair accuracy {r.calibration.pair_accuracy:.1%}, ECE {r.calibration.ece:.3f}",
    )


def _compare(run: Run, learned: Learned, plan: ReleasePlan) -> EvalReport:
    """Stage 5: what both policies can do, before any traffic."""
    spec, snapshot, baseline, candidate = run.spec, learned.snapshot, learned.baseline, learned.candidate
    return run.stage(
        "offline_eval",
        {"baseline": baseline.sha256, "candidate": candidate.sha256, "snapshot": snapshot.sha256, "seed": spec.seed},
        lambda: evaluation.evaluate(run, snapshot, baseline, candidate, "candidate", plan),
        EvalReport,
        detail="capability, adversarial and frozen suites",
        describe=lambda r: f"success {r.success_gain:+.1%} (p = {r.p_value:.2g})",
    )


def _release(run: Run, registry: Registry, learned: Learned, report: EvalReport, plan: ReleasePlan) -> RunSummary:
    """Stages 6 to 9: offline gates, the canary and the fail-back drill, reports."""
    baseline, candidate, reward_model = learned.baseline, learned.candidate, learned.reward_model
    run.stage(
        "offline_gates",
        {"report": report, "plan": plan},
        lambda: evaluation.require_offline_gates(report, plan),
        tuple[GateResult, ...],
        describe=lambda results: ", ".join(f"{r.gate} {r.verdict}" for r in results),
    )
    bundle = records.make_bundle(run, learned.snapshot, learned.base, baseline, reward_model, candidate)
    bundle.write(run.folder.bundle)
    releases = release.release_all(run, learned.snapshot, registry, bundle, baseline, candidate, reward_model)
    return records.finish(run, registry, bundle, learned, report, releases)
