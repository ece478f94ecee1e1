"""What a run leaves behind for others: bundle, registry entries, traces, briefs and the summary."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from cluster.pipeline.run import Learned, Run
from cluster.records import (
    Bundle,
    Component,
    ReleaseOutcome,
    RunPaths,
    RunSummary,
    TrainedLine,
    build_bundle,
    chain_heads,
    code_component,
    component_of,
    head_tags,
    seatrial_home,
)
from cluster.registry import ModelVersion, Registry, StageLinks, StageLog, sampled_traces, store_of
from cluster.spec import WorkflowSpec
from cluster.workflows import locate_workflow
from rl_actors.contracts import EvalReport, InfrastructureError, PolicyVersion, SeatrialError
from rl_actors.durable import read_metrics, sha256_file
from rl_actors.environment import Workflow
from rl_actors.evaluation import Suite
from serving.store import ReleaseFiles, RequestLedger, read_traces

NUM_MIRRORED_TRACES: Final = 40  # enough to look at; the ledger keeps them all


def make_bundle(spec: WorkflowSpec, workflow: Workflow, suites: Sequence[Suite], learned: Learned) -> Bundle:
    """Freeze everything a release of the candidate stands on."""
    tools = importlib.import_module(workflow.tools_module).WORLD.tools
    baseline, snapshot = learned.baseline, learned.snapshot
    named = {"sft": baseline, "reward_model": learned.reward_model, "policy": learned.candidate}
    return build_bundle(
        {
            "base_model": _base_of(baseline, learned.base),
            **{name: Component(version=version.name, sha256=version.sha256) for name, version in named.items()},
            "data_snapshot": Component(version=snapshot.sha256[:12], sha256=snapshot.sha256),
            "eval_suites": component_of("suites", {suite.name: suite.sha256 for suite in suites}),
            "tool_set": component_of(workflow.name, list(tools)),
            "policy_checks": component_of(workflow.name, _sources_of(locate_workflow(workflow.name).module)),
            "spec": component_of("spec", spec),
            "code_revision": code_component(),
            "seed": component_of(str(spec.seed), spec.seed),
        }
    )


def _base_of(baseline: PolicyVersion, base: PolicyVersion) -> Component:
    """Return the model that the baseline was trained from."""
    # A pinned baseline need not stand on this run's base model.
    parent = baseline.parent_sha256 or base.sha256
    return Component(version=base.name if parent == base.sha256 else f"base-{parent[:8]}", sha256=parent)


def _sources_of(package: str) -> Mapping[str, str]:
    """Return the hash of every module of a workflow."""
    # Its policy checks may lie in any of them, tools included: the desk's only delegates.
    folder = Path(str(importlib.import_module(package).__file__)).parent
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in sorted(folder.rglob("*.py"))}


@contextmanager
def registry_of(run: Run, spec: WorkflowSpec) -> Iterator[Registry]:
    """Open the registry of this run. A run that is stopped leaves there what it has learned so far."""
    registry = Registry(spec.workflow.name, run.folder.run_id, store=store_of(seatrial_home()))
    registry.connect_in_background()  # beside other work: the first migration takes seconds
    try:
        yield registry
    except SeatrialError as error:
        mirror_stopped(run, spec, registry, error)
        raise


def stage_links(learned: Learned) -> dict[str, StageLinks]:
    """Return the edges between stages, models and data of a run. A pinned version is read by its stage, not made."""
    base, baseline, candidate = learned.base, learned.baseline, learned.candidate
    reward_model, snapshot, pins = learned.reward_model, learned.snapshot, learned.pins
    sft = StageLinks(inputs=(base,), outputs=(baseline,), snapshot=snapshot)
    reward = StageLinks(inputs=(baseline,), outputs=(reward_model,))
    return {
        "snapshot": StageLinks(snapshot=snapshot),
        "base": StageLinks(outputs=(base,)),
        "sft": StageLinks(inputs=(baseline,)) if pins.baseline else sft,
        "preferences": StageLinks(inputs=(baseline,), snapshot=snapshot),
        "reward_model": StageLinks(inputs=(reward_model,)) if pins.reward_model else reward,
        "ppo": StageLinks(inputs=(baseline, reward_model), outputs=(candidate,), snapshot=snapshot),
        "offline_eval": StageLinks(inputs=(baseline, candidate), snapshot=snapshot),
    }


def mirror_stages(run: Run, spec: WorkflowSpec, registry: Registry, links: Mapping[str, StageLinks]) -> None:
    """Write every finished stage to MLflow with its curves and its edges to models and data."""
    rows = read_metrics(run.folder.metrics)
    registry.start_run(spec=spec.model_dump(mode="json"), started_at=run.journal.records[0].started_at)
    for record in run.journal.records:
        output = record.output if isinstance(record.output, Mapping) else {}
        # A flag is an int to Python and no metric to people.
        numbers = {k: v for k, v in output.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        registry.log_stage(
            StageLog(
                stage=record.stage,
                started_at=record.started_at,
                finished_at=record.finished_at,
                metrics={"seconds": record.seconds, **numbers},
                rows=rows,
                artifacts=_tripwires(run, record.stage),
                links=links.get(record.stage, StageLinks()),
            )
        )


def _tripwires(run: Run, stage: str) -> tuple[Path, ...]:
    return (run.folder.tripwires,) if stage == "ppo" and run.folder.tripwires.exists() else ()


def mirror_stopped(run: Run, spec: WorkflowSpec, registry: Registry, error: SeatrialError) -> None:
    """Leave what a run that was stopped has learned in MLflow, the unfinished stage's curves and tripwires included."""
    if not run.journal.records:
        return
    try:
        mirror_stages(run, spec, registry, {})
        rows = read_metrics(run.folder.metrics)
        done = {record.stage for record in run.journal.records}
        for stage in dict.fromkeys(str(row["stage"]) for row in rows if row["stage"] not in done):
            times, files = [row["at"] for row in rows if row["stage"] == stage], _tripwires(run, stage)
            registry.log_stage(
                StageLog(stage=stage, started_at=times[0], finished_at=times[-1], rows=rows, artifacts=files)
            )
        registry.end_run(finished_at=time.time(), is_success=False, metrics={}, tags={"seatrial.stopped": str(error)})
    except InfrastructureError as failure:
        # Only noted: the reason the run was stopped must reach the user whatever MLflow says.
        run.watch.note(f"MLflow does not have this run: {failure}")


def mirror_traces(run: Run, registry: Registry, files: ReleaseFiles) -> None:
    """Copy a few live requests to MLflow with what people said of them; losses are noted, and stop nothing."""
    with closing(RequestLedger(files.ledger, owner="mirror")) as ledger:
        report = registry.mirror(sampled_traces(read_traces(files.traces), ledger, NUM_MIRRORED_TRACES))
    if report.lost:
        run.watch.note(f"{report.lost} traces could not be copied to MLflow: {report.first_error}")


def finish(
    run: Run,
    spec: WorkflowSpec,
    registry: Registry,
    bundle: Bundle,
    learned: Learned,
    report: EvalReport,
    releases: tuple[ReleaseOutcome, ...],
) -> RunSummary:
    """Mirror the run to MLflow, write the briefs, and return the summary."""
    # Imported here: matplotlib and Babel are for runs that reach their end.
    from cluster.reports import write_briefs

    folder, files = run.folder, ReleaseFiles(root=run.folder.serving)
    # Briefs first: they need no MLflow, and are there for whoever has to go without it.
    write_briefs(folder.root, ledger=files.ledger)
    mirror_stages(run, spec, registry, stage_links(learned))
    mirror_traces(run, registry, files)
    registry.log_report(folder.report)
    is_promoted = releases[0].outcome == "promoted"
    registry.end_run(
        finished_at=time.time(),
        is_success=is_promoted,
        metrics={"success_gain": report.success_gain},
        # A copy outside the run folder, for a summary lies beside what it vouches for.
        tags=head_tags(chain_heads(folder)),
    )
    paths = RunPaths(
        folder=str(folder.root),
        brief_html=str(folder.report / "brief.en-US.html"),
        brief_md=str(folder.report / "brief.en-US.md"),
        ledger=str(files.ledger),
        mlflow_uri=registry.store.public_uri,
    )
    ending = summarise(run, spec, learned.trained, report=report, releases=releases)
    stable = learned.candidate if is_promoted else learned.baseline
    return replace(ending, stable_policy=stable.name, bundle_id=bundle.id, paths=paths)


def summarise(
    run: Run,
    spec: WorkflowSpec,
    trained: Iterable[ModelVersion],
    *,
    report: EvalReport | None = None,
    releases: tuple[ReleaseOutcome, ...] = (),
) -> RunSummary:
    """Return the run's ending as the final table shows it; nothing is stable in a run that has released nothing."""
    suites = [(baseline, report.candidate[name]) for name, baseline in report.baseline.items()] if report else []
    return RunSummary(
        run_id=run.folder.run_id,
        workflow=spec.workflow.name,
        stages=tuple(run.lines),
        trained=tuple(TrainedLine(name=version.name, sha256=version.sha256) for version in trained),
        offline=tuple(suites),
        releases=releases,
        stable_policy="",
        bundle_id="",
        # The candidate's own release decides; the drill after it is lost on purpose.
        exit_code=0 if not releases or releases[0].outcome == "promoted" else 1,
        paths=RunPaths(folder=str(run.folder.root)),
        heads=chain_heads(run.folder),
    )
