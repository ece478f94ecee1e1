"""The whole story on one page: from a spec to a served policy. Each stage returns a frozen value and is journaled.

A stage whose inputs are unchanged is taken from the journal, so a resumed run goes on where the last one stopped.
Stages are handed what they need and call no other: all wiring is here.
"""

from __future__ import annotations

from collections.abc import Callable

from cluster.pipeline import evaluation, pinned, preferences, records, release, training
from cluster.pipeline.run import Learned, Run, Watch
from cluster.pipeline.snapshot import freeze_snapshot
from cluster.plan import place
from cluster.ray_cluster import connected
from cluster.records import RunFolder, RunSummary, lock_run
from cluster.registry import Pins, Registry
from cluster.spec import WorkflowSpec
from cluster.workflows import find_workflow
from rl_actors.contracts import DataSnapshot, EvalReport, PolicyVersion, RewardModelVersion
from rl_actors.durable import write_json
from rl_actors.environment import Workflow
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
        run = Run(folder, watch)
        with records.registry_of(run, spec) as registry:
            pins = pinned.resolve(spec, {record.stage for record in run.journal.records}, registry.versions)
            begin()
            summary = _learn_and_release(run, spec, registry, pins, until)
        write_json(folder.summary, summary.to_json())
        return summary


def _learn_and_release(run: Run, spec: WorkflowSpec, registry: Registry, pins: Pins, until: str) -> RunSummary:
    """Stages 1 to 9 of design section 2, in order."""
    workflow = find_workflow(spec.workflow.name)
    # First: what cannot be is refused before any training.
    plan = release.release_plan(spec, workflow.critical_checks, may_promote=True)
    release.require_room(spec, run.folder, until)
    learned = _learn(run, spec, workflow, pins)
    if until == "ppo":
        return records.summarise(run, spec, learned.trained)
    report = _compare(run, spec, learned, plan)
    if until == "eval":
        return records.summarise(run, spec, learned.trained, report=report)
    run.stage(
        "offline_gates",
        {"report": report, "plan": plan},
        lambda: evaluation.require_offline_gates(report, plan),
        tuple[GateResult, ...],
        describe=lambda results: ", ".join(f"{r.gate} {r.verdict}" for r in results),
    )
    snapshot, versions, critic = learned.snapshot, registry.versions, learned.reward_model.path
    bundle = records.make_bundle(spec, workflow, evaluation.read_suites(snapshot), learned)
    bundle.write(run.folder.bundle)
    with release.ReleaseBench(spec, run.folder, workflow, snapshot, versions, critic, run.watch.progress) as site:
        releases = release.release_all(run, spec.seed, plan, learned, bundle, versions, site)
    return records.finish(run, spec, registry, bundle, learned, report, releases)


def _learn(run: Run, spec: WorkflowSpec, workflow: Workflow, pins: Pins) -> Learned:
    """Stages 1 to 4: frozen data, the baseline, a reward model on its own rollouts, and PPO against both."""
    folder, seed, prompt = run.folder, spec.seed, workflow.system_prompt
    snapshot = run.stage(
        "snapshot",
        {"workflow": spec.workflow.name, "data": spec.data, "seed": seed},
        lambda: freeze_snapshot(workflow, spec.num_tasks, seed, folder.snapshots),
        DataSnapshot,
        detail="freeze tasks and demonstrations",
        describe=lambda s: f"{s.num_rows['tasks']} tasks, {s.num_rows['demonstrations']} demonstrations",
    )
    base = run.stage(
        "base",
        {"model": spec.model, "seed": seed, "snapshot": snapshot.sha256},
        lambda: training.build_base(spec.model, seed, prompt, snapshot, folder.models / "base"),
        PolicyVersion,
        detail=spec.model.path or "tiny GPT-OSS architecture",
        describe=lambda p: p.name,
    )

    def train_baseline() -> PolicyVersion:
        return training.train_baseline(spec, folder, prompt, snapshot, base)

    baseline = run.stage(
        "sft",
        {"sft": spec.sft, "base": base.sha256, "snapshot": snapshot.sha256, "seed": seed, **pins.of_baseline},
        lambda: pinned.baseline_of(pins, base, folder.models / "sft", run.watch.note, train_baseline),
        PolicyVersion,
        detail=pinned.detail(pins.baseline, "Ray Train, DeepSpeed"),
        describe=lambda p: f"{p.name}, frozen as the KL reference",
    )
    reward_model = _reward_model(run, spec, workflow, pins, snapshot, baseline)
    candidate = run.stage(
        "ppo",
        {"ppo": (spec.ppo, spec.recipe), "baseline": baseline.sha256, "reward": reward_model.sha256, "seed": seed},
        lambda: training.train_policy(spec, folder, prompt, snapshot, baseline, reward_model, run.watch.note),
        PolicyVersion,
        detail="vLLM rollout workers, reward scorers, DeepSpeed learners",
        describe=lambda p: p.name,
    )
    return Learned(
        snapshot=snapshot, base=base, baseline=baseline, reward_model=reward_model, candidate=candidate, pins=pins
    )


def _reward_model(
    run: Run, spec: WorkflowSpec, workflow: Workflow, pins: Pins, snapshot: DataSnapshot, baseline: PolicyVersion
) -> RewardModelVersion:
    """Stage 3: a reward model on the baseline's own rollouts, or the pinned one; two pinned versions need none."""
    folder, note, ranked = run.folder, run.watch.note, snapshot
    if pins.need_rollouts:
        ranked = run.stage(
            "preferences",
            {"reward": spec.reward, "baseline": baseline.sha256, "snapshot": snapshot.sha256, "seed": spec.seed},
            lambda: preferences.collect_preferences(spec, folder, workflow, snapshot, baseline, note),
            DataSnapshot,
            detail="the baseline's own rollouts, three simulated annotators",
            describe=lambda s: f"{s.num_rows['rollouts']} rollouts, {s.num_rows['preferences']} choices",
        )

    def train() -> RewardModelVersion:
        pairs, held_out = (preferences.read_pairs(ranked, workflow.rubric, s) for s in ("train", "calibration"))
        return training.train_reward_model(spec, folder, workflow.rubric, pairs, held_out, baseline)

    inputs = {"reward": spec.reward, "baseline": baseline.sha256, "preferences": ranked.sha256, "seed": spec.seed}
    return run.stage(
        "reward_model",
        {**inputs, **pins.of_reward_model},
        lambda: pinned.reward_model_of(spec, pins.reward_model, baseline, folder.models / "reward", train),
        RewardModelVersion,
        detail=pinned.detail(pins.reward_model, "Ray Train: Bradley-Terry and rubric heads"),
        describe=lambda r: f"pair accuracy {r.calibration.pair_accuracy:.1%}, ECE {r.calibration.ece:.3f}",
    )


def _compare(run: Run, spec: WorkflowSpec, learned: Learned, plan: ReleasePlan) -> EvalReport:
    """Stage 5: what both policies can do, before any traffic."""
    snapshot, baseline, candidate = learned.snapshot, learned.baseline, learned.candidate
    file = run.folder.evaluations / "candidate.json"
    return run.stage(
        "offline_eval",
        {"baseline": baseline.sha256, "candidate": candidate.sha256, "snapshot": snapshot.sha256, "seed": spec.seed},
        lambda: evaluation.evaluate(spec, evaluation.read_suites(snapshot), baseline, candidate, plan, file),
        EvalReport,
        detail="capability, adversarial and frozen suites",
        describe=lambda r: f"success {r.success_gain:+.1%} (p = {r.p_value:.2g})",
    )
