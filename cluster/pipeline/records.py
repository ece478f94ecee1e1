"""What the learning stages hand on to evaluation, release and records.

What a run leaves behind for others: bundle, registry entries, traces, briefs and the summary.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from cluster.pipeline.evaluation import read_suites
from cluster.pipeline.release import ReleaseResult
from cluster.pipeline.run import Run
from cluster.records import (
    Bundle,
    Component,
    ReleaseLine,
    RunPaths,
    RunSummary,
    SuiteLine,
    TrainedLine,
    build_bundle,
    chain_heads,
    code_component,
    component_of,
    head_tags,
)
from cluster.registry import NO_PINS, ModelEntry, Pins, Registry, StageLog, sampled_traces, store_of
from rl_actors.contracts import (
    DataSnapshot,
    EvalReport,
    InfrastructureError,
    PolicyVersion,
    RewardModelVersion,
    SeatrialError,
)
from rl_actors.durable import read_metrics, sha256_file
from serving.store import ReleaseFiles, RequestLedger, read_traces


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """The frozen results of stages 1 to 4, each with its hash."""

    snapshot: DataSnapshot
    base: PolicyVersion
    baseline: PolicyVersion
    reward_model: RewardModelVersion
    candidate: PolicyVersion
    pins: Pins = NO_PINS

    @property
    def trained(self) -> tuple[PolicyVersion | RewardModelVersion, ...]:
        """The results of this run's training, in the order they were made; a pinned version is none."""
        baseline = () if self.pins.baseline else (self.baseline,)
        reward_model = () if self.pins.reward_model else (self.reward_model,)
        return (*baseline, *reward_model, self.candidate)


NUM_MIRRORED_TRACES: Final = 40


def make_bundle(
    run: Run,
    snapshot: DataSnapshot,
    base: PolicyVersion,
    baseline: PolicyVersion,
    reward_model: RewardModelVersion,
    policy: PolicyVersion,
) -> Bundle:
    """Freeze everything a release of `policy` stands on."""
    tools = importlib.import_module(run.workflow.tools_module).WORLD.tools
    suites = {suite.name: suite.sha256 for suite in read_suites(snapshot)}
    return build_bundle(
        {
            "base_model": _base_of(baseline, base),
            "sft": Component(version=baseline.name, sha256=baseline.sha256),
            "reward_model": Component(version=reward_model.name, sha256=reward_model.sha256),
            "policy": Component(version=policy.name, sha256=policy.sha256),
            "data_snapshot": Component(version=snapshot.sha256[:12], sha256=snapshot.sha256),
            "eval_suites": component_of("suites", suites),
            "tool_set": component_of(run.workflow.name, list(tools)),
            "policy_checks": component_of(run.workflow.name, _sources_of(run.workflow_ref.module)),
            "spec": component_of("spec", run.spec),
            "code_revision": code_component(),
            "seed": component_of(str(run.spec.seed), run.spec.seed),
        }
    )


def _base_of(baseline: PolicyVersion, base: PolicyVersion) -> Component:
    """Return the model that the baseline was trained from: a pinned one need not stand on this run's."""
    parent = baseline.parent_sha256 or base.sha256
    return Component(version=base.name if parent == base.sha256 else f"base-{parent[:8]}", sha256=parent)


def _sources_of(package: str) -> Mapping[str, str]:
    """Return the hash of every module of a workflow: its policy checks lie in any of them, tools included."""
    folder = Path(str(importlib.import_module(package).__file__)).parent
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in sorted(folder.rglob("*.py"))}


@contextmanager
def registry_of(run: Run) -> Iterator[Registry]:
    """Open the registry of this run, connecting beside other work: the first migration takes seconds.

    A run that is stopped leaves there what it has learned so far.
    """
    registry = Registry(run.workflow.name, run.folder.run_id, store=store_of(run.home))
    registry.connect_in_background()
    try:
        yield registry
    except SeatrialError as error:
        mirror_stopped(run, registry, error)
        raise


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLinks:
    """What a stage read and made, as MLflow draws it."""

    inputs: tuple[ModelEntry, ...] = ()
    outputs: tuple[ModelEntry, ...] = ()
    snapshot: DataSnapshot | None = None


def stage_links(learned: Learned) -> dict[str, StageLinks]:
    """Return the edges between stages, models and data of a run. A pinned version is read by its stage, not made."""
    base, baseline, candidate = (
        ModelEntry.of_policy(policy) for policy in (learned.base, learned.baseline, learned.candidate)
    )
    reward_model, snapshot = ModelEntry.of_reward_model(learned.reward_model), learned.snapshot
    sft = StageLinks(inputs=(base,), outputs=(baseline,), snapshot=snapshot)
    reward = StageLinks(inputs=(baseline,), outputs=(reward_model,))
    return {
        "snapshot": StageLinks(snapshot=snapshot),
        "base": StageLinks(outputs=(base,)),
        "sft": StageLinks(inputs=(baseline,)) if learned.pins.baseline else sft,
        "preferences": StageLinks(inputs=(baseline,), snapshot=snapshot),
        "reward_model": StageLinks(inputs=(reward_model,)) if learned.pins.reward_model else reward,
        "ppo": StageLinks(inputs=(baseline, reward_model), outputs=(candidate,), snapshot=snapshot),
        "offline_eval": StageLinks(inputs=(baseline, candidate), snapshot=snapshot),
    }


def mirror_stages(run: Run, registry: Registry, links: Mapping[str, StageLinks]) -> None:
    """Write every finished stage to MLflow with its curves and its edges to models and data."""
    rows = read_metrics(run.folder.metrics)
    registry.start_run(spec=run.spec.model_dump(mode="json"), started_at=run.journal.records[0].started_at)
    for record in run.journal.records:
        output = record.output if isinstance(record.output, Mapping) else {}
        numbers = {k: v for k, v in output.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        edges = links.get(record.stage, StageLinks())
        registry.log_stage(
            StageLog(
                stage=record.stage,
                started_at=record.started_at,
                finished_at=record.finished_at,
                metrics={"seconds": record.seconds, **numbers},
                rows=rows,
                artifacts=_tripwires(run) if record.stage == "ppo" else (),
                inputs=edges.inputs,
                outputs=edges.outputs,
                snapshot=edges.snapshot,
            )
        )


def _tripwires(run: Run) -> tuple[Path, ...]:
    return (run.folder.tripwires,) if run.folder.tripwires.exists() else ()


def mirror_stopped(run: Run, registry: Registry, error: SeatrialError) -> None:
    """Leave what a run that was stopped has learned in MLflow, the unfinished stage's curves and tripwires included.

    The reason it was stopped must reach the user whatever MLflow says: a failure here is only noted.
    """
    if not run.journal.records:
        return
    try:
        mirror_stages(run, registry, {})
        rows = read_metrics(run.folder.metrics)
        done = {record.stage for record in run.journal.records}
        for stage in dict.fromkeys(str(row["stage"]) for row in rows if row["stage"] not in done):
            times = [row["at"] for row in rows if row["stage"] == stage]
            log = StageLog(stage=stage, started_at=times[0], finished_at=times[-1], metrics={}, rows=rows)
            registry.log_stage(replace(log, artifacts=_tripwires(run) if stage == "ppo" else ()))
        registry.end_run(finished_at=time.time(), is_success=False, metrics={}, tags={"seatrial.stopped": str(error)})
    except InfrastructureError as failure:
        run.watch.note(f"MLflow does not have this run: {failure}")


def mirror_traces(run: Run, registry: Registry, files: ReleaseFiles) -> None:
    """Copy a few live runs to MLflow with what people said of them; losses are told, and stop nothing."""
    with closing(RequestLedger(files.ledger, owner="mirror")) as ledger:
        report = registry.mirror(sampled_traces(read_traces(files.traces), ledger, NUM_MIRRORED_TRACES))
    if report.lost:
        run.watch.note(f"{report.lost} traces could not be copied to MLflow: {report.first_error}")


def finish(
    run: Run,
    registry: Registry,
    bundle: Bundle,
    learned: Learned,
    report: EvalReport,
    releases: tuple[ReleaseResult, ...],
) -> RunSummary:
    """Mirror the run to MLflow, write the briefs, and return the summary."""
    from cluster.reports import write_briefs

    files = ReleaseFiles(root=run.folder.root / "serving")
    write_briefs(run.folder.root, ledger=files.ledger)
    mirror_stages(run, registry, stage_links(learned))
    mirror_traces(run, registry, files)
    registry.log_report(run.folder.report)
    is_promoted = releases[0].outcome == "promoted"
    registry.end_run(
        finished_at=time.time(),
        is_success=is_promoted,
        metrics={"success_gain": report.success_gain},
        tags=head_tags(chain_heads(run.folder)),
    )
    paths = RunPaths(
        folder=str(run.folder.root),
        brief_html=str(run.folder.report / "brief.en-US.html"),
        brief_md=str(run.folder.report / "brief.en-US.md"),
        ledger=str(files.ledger),
        mlflow_uri=registry.store.public_uri,
    )
    stable = learned.candidate if is_promoted else learned.baseline
    return summarise(
        run,
        trained=learned.trained,
        report=report,
        releases=releases,
        stable=stable.name,
        bundle_id=bundle.id,
        paths=paths,
    )


def summarise(
    run: Run,
    *,
    trained: Iterable[PolicyVersion | RewardModelVersion],
    paths: RunPaths | None = None,
    report: EvalReport | None = None,
    releases: Iterable[ReleaseResult] = (),
    stable: str = "",
    bundle_id: str = "",
) -> RunSummary:
    """Return the run's ending as the final table shows it."""
    lines = tuple(_release_line(result) for result in releases)
    return RunSummary(
        run_id=run.folder.run_id,
        workflow=run.workflow.name,
        stages=tuple(run.lines),
        trained=tuple(TrainedLine(name=version.name, sha256=version.sha256) for version in trained),
        offline=tuple(_suite_lines(report)) if report else (),
        releases=lines,
        stable_policy=stable,
        bundle_id=bundle_id,
        exit_code=0 if not lines or lines[0].outcome == "promoted" else 1,
        paths=paths or RunPaths(folder=str(run.folder.root)),
        heads=chain_heads(run.folder),
    )


def _release_line(result: ReleaseResult) -> ReleaseLine:
    return ReleaseLine(
        candidate=result.candidate,
        outcome=result.outcome,
        reason=result.reason,
        canary_requests=result.canary_requests,
        observed_share=result.observed_share,
        time_to_recovery_s=result.time_to_recovery_s,
    )


def _suite_lines(report: EvalReport) -> Iterable[SuiteLine]:
    for name, baseline in report.baseline.items():
        candidate = report.candidate[name]
        yield SuiteLine(
            suite=name,
            baseline_success=baseline.success.mean,
            candidate_success=candidate.success.mean,
            baseline_violations=baseline.violations,
            candidate_violations=candidate.violations,
        )
