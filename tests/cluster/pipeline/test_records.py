"""What a run leaves behind: a bundle that names everything, a mirror in the registry, and an honest ending."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cluster.reports
from cluster.pipeline import records
from cluster.pipeline.evaluation import read_suites
from cluster.pipeline.records import (
    finish,
    make_bundle,
    mirror_stages,
    mirror_traces,
    registry_of,
    stage_links,
    summarise,
)
from cluster.pipeline.run import Learned
from cluster.records.bundle import MEMBERS, Bundle, diff_bundles, load_bundle
from cluster.records.frozen import freeze_policy
from cluster.records.summary import ChainHead, RunSummary, StageLine
from cluster.registry.entries import StageLinks
from cluster.registry.registry import Registry
from cluster.registry.versions import Pins
from cluster.workflows.support_desk import WORKFLOW
from rl_actors.contracts.errors import BadInputError, InfrastructureError, InstabilityError, TamperedError
from rl_actors.contracts.versions import Calibration, DataSnapshot, PolicyVersion
from rl_actors.durable.metrics_log import MetricsLog
from serving.store.ledger import RequestLedger
from serving.store.served import ReleaseFiles
from serving.store.trace_log import LiveTrace, TraceLog
from tests.cluster.pipeline.fakes import (
    CALIBRATION,
    DeskRun,
    FakeRegistry,
    freeze_data,
    make_policy,
    make_result,
    make_reward_model,
    make_run,
    watch_of,
)
from tests.rl_actors.fakes import make_turn
from tests.serving.fakes import make_report, make_suite, record_run

BASE, SFT = make_policy("/models/base", "base-1", "base"), make_policy("/models/sft", "sft-1", "sft")
PPO, RM = make_policy("/models/ppo", "ppo-1"), make_reward_model("/models/rm")

# --- the bundle -------------------------------------------------------------------------------------------------------


def bundle_of(run: DeskRun, snapshot: DataSnapshot, **changes: Any) -> Bundle:
    return make_bundle(run.spec, run.workflow, read_suites(snapshot), replace(learned(snapshot), **changes))


def learned(snapshot: DataSnapshot) -> Learned:
    return Learned(snapshot=snapshot, base=BASE, baseline=SFT, reward_model=RM, candidate=PPO)


def test_a_bundle_names_everything_a_release_stands_on(run: DeskRun, snapshot: DataSnapshot):
    bundle = bundle_of(run, snapshot)
    assert set(bundle.members) == set(MEMBERS)
    assert (bundle.base_model.sha256, bundle.sft.sha256) == (BASE.sha256, SFT.sha256)
    assert (bundle.policy.version, bundle.policy.sha256) == (PPO.name, PPO.sha256)
    assert (bundle.reward_model.version, bundle.data_snapshot.sha256) == (RM.name, snapshot.sha256)
    assert bundle.seed.version == "7"


def test_the_base_model_of_a_bundle_is_the_one_that_the_baseline_was_trained_from(run: DeskRun, snapshot: DataSnapshot):
    own = bundle_of(run, snapshot, baseline=replace(SFT, parent_sha256=BASE.sha256))
    assert own.base_model == bundle_of(run, snapshot).base_model
    pinned = bundle_of(run, snapshot, baseline=replace(SFT, parent_sha256="9" * 64))
    assert (pinned.base_model.version, pinned.base_model.sha256) == ("base-99999999", "9" * 64)


def test_equal_members_give_one_id(home: Path, snapshot: DataSnapshot):
    ids = {bundle_of(make_run(home, run_id=name), snapshot).id for name in ("run-1", "run-2")}
    assert len(ids) == 1


@pytest.mark.parametrize(
    ("member", "changes"),
    [
        ("base_model", {"base": replace(BASE, sha256="1" * 64)}),
        ("sft", {"baseline": replace(SFT, sha256="1" * 64)}),
        ("reward_model", {"reward_model": replace(RM, sha256="1" * 64)}),
        ("policy", {"candidate": replace(PPO, sha256="1" * 64)}),
    ],
)
def test_another_model_is_another_bundle(run: DeskRun, snapshot: DataSnapshot, member: str, changes: Mapping[str, Any]):
    before, after = bundle_of(run, snapshot), bundle_of(run, snapshot, **changes)
    assert before.id != after.id
    assert [change.member for change in diff_bundles(before, after)] == [member]


@pytest.mark.parametrize(("setting", "members"), [("ppo.num_steps=3", ["spec"]), ("seed=8", ["spec", "seed"])])
def test_another_spec_is_another_bundle(home: Path, snapshot: DataSnapshot, setting: str, members: list[str]):
    before, after = bundle_of(make_run(home), snapshot), bundle_of(make_run(home, setting), snapshot)
    assert [change.member for change in diff_bundles(before, after)] == members


def test_other_data_is_another_bundle(run: DeskRun, home: Path, snapshot: DataSnapshot):
    other = freeze_data(make_run(home, "data.num_held_out=6", run_id="run-2"))
    changes = diff_bundles(bundle_of(run, snapshot), bundle_of(run, other))
    assert [change.member for change in changes] == ["data_snapshot", "eval_suites"]


def test_other_train_tasks_leave_the_suites_what_they_are(run: DeskRun, home: Path, snapshot: DataSnapshot):
    other = freeze_data(make_run(home, "data.num_train=25", run_id="run-2"))
    changes = diff_bundles(bundle_of(run, snapshot), bundle_of(run, other))
    assert [change.member for change in changes] == ["data_snapshot"]


def test_another_code_is_another_bundle(run: DeskRun, snapshot: DataSnapshot, monkeypatch: pytest.MonkeyPatch):
    before = bundle_of(run, snapshot)
    monkeypatch.setattr(records, "code_component", lambda: replace(before.code_revision, sha256="1" * 64))
    assert [change.member for change in diff_bundles(before, bundle_of(run, snapshot))] == ["code_revision"]


def test_other_tools_are_another_bundle(run: DeskRun, snapshot: DataSnapshot, monkeypatch: pytest.MonkeyPatch):
    from cluster.workflows.support_desk.tools import WORLD

    before = bundle_of(run, snapshot)
    monkeypatch.setattr(WORLD, "tools", WORLD.tools[1:])
    assert [change.member for change in diff_bundles(before, bundle_of(run, snapshot))] == ["tool_set"]


@pytest.fixture
def own_workflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The support desk as a package of a user's own, outside this repository."""
    source = WORKFLOW.__class__.__module__.replace(".", "/")
    target = tmp_path / "mine" / "own_desk"
    shutil.copytree(Path(records.__file__).parents[2] / source, target, ignore=shutil.ignore_patterns("__pycache__"))
    with (target / "__init__.py").open("a") as file:
        file.write('\nWORKFLOW.name = "own_desk"\n')
    monkeypatch.setenv("SEATRIAL_WORKFLOWS", str(target.parent))
    monkeypatch.syspath_prepend(str(target.parent))
    yield target
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_desk"]:
        del sys.modules[name]


@pytest.mark.parametrize("module", ["__init__.py", "replies.py", "verifier.py"])
def test_other_policy_checks_are_another_bundle_wherever_they_lie(
    home: Path, snapshot: DataSnapshot, own_workflow: Path, module: str
):
    """The desk only delegates to its checks: it is the whole package that decides."""
    run = make_run(home, name="own_desk")
    before = bundle_of(run, snapshot)
    with (own_workflow / module).open("a") as file:
        file.write("\nSTRICT = False\n")
    assert [change.member for change in diff_bundles(before, bundle_of(run, snapshot))] == ["policy_checks"]


def test_a_bundle_never_changes_once_written(run: DeskRun, snapshot: DataSnapshot):
    bundle = bundle_of(run, snapshot)
    for _ in range(2):
        bundle.write(run.folder.bundle)
    assert load_bundle(run.folder.bundle).id == bundle.id
    with pytest.raises(TamperedError, match="never changes"):
        bundle_of(run, snapshot, candidate=SFT).write(run.folder.bundle)


# --- registry ---------------------------------------------------------------------------------------------------------


def stage_policy(run: DeskRun, name: str) -> PolicyVersion:
    directory = run.fresh(f"models/{name}")
    (directory / "model.bin").write_text(name)
    return run.stage(name, {}, lambda: freeze_policy(name, "sft", directory, ""), PolicyVersion)


def test_every_finished_stage_is_mirrored_with_its_curves_and_models(run: DeskRun):
    policy = stage_policy(run, "sft")
    run.stage("reward_model", {}, lambda: CALIBRATION, Calibration)
    MetricsLog(run.folder.metrics, "sft").write(1, {"loss": 0.5})
    registry = FakeRegistry()
    mirror_stages(run, run.spec, registry, {"sft": StageLinks(outputs=(policy,))})  # type: ignore[arg-type]
    sft, reward = registry.stages
    assert (sft.stage, reward.stage) == ("sft", "reward_model")
    assert [version.name for version in sft.links.outputs] == [policy.name]
    assert reward.links.outputs == ()
    assert [row["loss"] for row in sft.rows] == [0.5]
    assert sft.metrics == {"seconds": run.journal.records[0].seconds}
    assert {name: reward.metrics[name] for name in ("ece", "num_pairs")} == {"ece": 0.05, "num_pairs": 40}
    assert all(isinstance(value, int | float) for value in reward.metrics.values())
    assert sft.started_at <= sft.finished_at <= reward.finished_at


def test_the_parent_run_starts_with_the_first_stage_and_holds_the_spec(run: DeskRun):
    stage_policy(run, "sft")
    registry = FakeRegistry()
    mirror_stages(run, run.spec, registry, {})  # type: ignore[arg-type]
    ((what, values),) = registry.runs
    assert what == "start"
    assert values["started_at"] == run.journal.records[0].started_at
    assert values["spec"]["data"]["num_train"] == 24


def test_a_stage_whose_output_is_a_list_is_mirrored_without_numbers(run: DeskRun):
    run.stage("offline_gates", {}, lambda: ("a", "b"), tuple[str, ...])
    registry = FakeRegistry()
    mirror_stages(run, run.spec, registry, {})  # type: ignore[arg-type]
    assert set(registry.stages[0].metrics) == {"seconds"}


def test_what_every_stage_read_and_made_is_drawn(snapshot: DataSnapshot):
    links = stage_links(learned(snapshot))
    drawn = {name: ([e.name for e in link.inputs], [e.name for e in link.outputs]) for name, link in links.items()}
    assert drawn["sft"] == (["base-1"], [SFT.name])
    assert drawn["reward_model"] == ([SFT.name], [RM.name])
    assert drawn["ppo"] == ([SFT.name, RM.name], [PPO.name])
    assert drawn["offline_eval"] == ([SFT.name, PPO.name], [])
    assert {name for name, link in links.items() if link.snapshot} == {
        "snapshot", "sft", "preferences", "ppo", "offline_eval",
    }  # fmt: skip


def test_a_pinned_version_is_read_by_its_stage_and_not_trained_by_this_run(snapshot: DataSnapshot):
    pins = Pins(baseline=SFT, reward_model=RM)
    own = learned(snapshot)
    for both, one in ((replace(own, pins=pins), PPO), (replace(own, pins=replace(pins, baseline=None)), SFT)):
        assert both.trained[0] == one
        links = stage_links(both)
        assert (links["reward_model"].inputs, links["reward_model"].outputs) == ((pins.reward_model,), ())
    sft = stage_links(replace(own, pins=pins))["sft"]
    assert (sft.inputs, sft.outputs) == ((pins.baseline,), ())
    assert own.trained == (SFT, RM, PPO)


def test_sampled_runs_are_mirrored_with_their_overrides_and_losses_are_said(run: DeskRun):
    files = ReleaseFiles(root=run.folder.root / "serving")
    with closing(RequestLedger(files.ledger, owner="gateway")) as ledger:
        record_run(ledger, 1)
        ledger.override("run-1", actor="ann", reason="wrong", at=3.0)
    turns = (make_turn((1, 2), (3, 4)),)
    TraceLog(files.traces, 1.0).write(LiveTrace(run_id="run-1", request="a", response="b", turns=turns))
    registry = FakeRegistry()
    mirror_traces(run, registry, files)  # type: ignore[arg-type]
    (trace,) = registry.traces
    assert (trace.record.run_id, trace.override_actor, trace.request) == ("run-1", "ann", "a")
    registry.lost = 3
    notes: list[str] = []
    run.watch.note = notes.append  # type: ignore[method-assign]
    mirror_traces(run, registry, files)  # type: ignore[arg-type]
    assert notes == ["3 traces could not be copied to MLflow: gone"]


def test_the_registry_connects_beside_other_work(run: DeskRun, home: Path, monkeypatch: pytest.MonkeyPatch):
    connected: list[Registry] = []
    monkeypatch.setattr(Registry, "connect_in_background", lambda registry: connected.append(registry))
    with registry_of(run, run.spec) as registry:
        assert connected == [registry]
        assert (registry.workflow, registry.run_id) == ("support_desk", "run-1")
        assert str(home / "mlflow") in registry.store.uri


# --- a run that is stopped --------------------------------------------------------------------------------------------


def finish_sft(run: DeskRun) -> None:
    directory = run.fresh("models/sft")
    (directory / "weights").write_text("w")
    run.stage("sft", {}, lambda: freeze_policy("sft", "sft", directory, "0" * 64), PolicyVersion)


def stop(run: DeskRun, error: BaseException) -> None:
    with registry_of(run, run.spec):
        raise error


@pytest.fixture
def mirrored(monkeypatch: pytest.MonkeyPatch) -> FakeRegistry:
    fake = FakeRegistry()
    monkeypatch.setattr(records, "Registry", lambda *_, **__: fake)
    return fake


def test_a_stopped_run_leaves_its_curves_its_tripwires_and_the_reason(run: DeskRun, mirrored: FakeRegistry):
    finish_sft(run)
    MetricsLog(run.folder.metrics, "ppo").write(3, {"reward": 0.5})
    run.folder.tripwires.write_text("{}\n")
    with pytest.raises(InstabilityError):
        stop(run, InstabilityError("entropy_collapse: entropy = 0.0001, limit 0.0005"))
    logs = {log.stage: log for log in mirrored.stages}
    assert list(logs) == ["sft", "ppo"]
    assert logs["ppo"].artifacts == (run.folder.tripwires,)
    assert [row["reward"] for row in logs["ppo"].rows if row["stage"] == "ppo"] == [0.5]
    assert mirrored.ended == [(False, {"seatrial.stopped": "entropy_collapse: entropy = 0.0001, limit 0.0005"})]


def test_a_run_that_did_nothing_leaves_nothing(run: DeskRun, mirrored: FakeRegistry):
    with pytest.raises(BadInputError):
        stop(run, BadInputError("cluster.serve_port", 8000, "already in use"))
    assert (mirrored.stages, mirrored.ended) == ([], [])


def test_a_silent_mlflow_does_not_hide_why_a_run_was_stopped(run: DeskRun, mirrored: FakeRegistry):
    finish_sft(run)
    mirrored.refusal = InfrastructureError("MLflow does not answer")
    with pytest.raises(InstabilityError, match="entropy_collapse"):
        stop(run, InstabilityError("entropy_collapse: entropy = 0.0001, limit 0.0005"))
    assert watch_of(run).notes == ["MLflow does not have this run: MLflow does not answer"]


def test_a_run_that_goes_well_is_no_stopped_one(run: DeskRun, mirrored: FakeRegistry):
    finish_sft(run)
    with registry_of(run, run.spec):
        pass
    assert (mirrored.stages, mirrored.ended) == ([], [])


# --- the ending -------------------------------------------------------------------------------------------------------


def test_a_run_that_only_trained_ends_well_and_without_a_stable_policy(run: DeskRun):
    run.lines.append(StageLine(name="sft", seconds=2.0, line="sft-1"))
    summary = summarise(run, run.spec, (SFT, RM, PPO))
    assert (summary.exit_code, summary.stable_policy, summary.bundle_id) == (0, "", "")
    assert [(line.name, line.sha256) for line in summary.trained] == [(v.name, v.sha256) for v in (SFT, RM, PPO)]
    assert summary.stages == tuple(run.lines)
    assert (summary.offline, summary.releases) == ((), ())
    assert RunSummary.from_json(summary.to_json()) == summary


@pytest.mark.parametrize(
    ("outcomes", "exit_code"),
    [
        (("promoted", "rolled_back"), 0),
        (("rolled_back", "rolled_back"), 1),
        (("halted", "rolled_back"), 1),
        (("failed_back", "rolled_back"), 1),
        (("promoted", "halted"), 0),
        ((), 0),
    ],
)
def test_the_candidates_release_decides_the_exit_code(run: DeskRun, outcomes: tuple[str, ...], exit_code: int):
    releases = [make_result(outcome=outcome) for outcome in outcomes]
    assert summarise(run, run.spec, (), releases=tuple(releases)).exit_code == exit_code


def test_the_summary_tells_releases_and_suites(run: DeskRun):
    worse = make_suite("capability", failed=("capability-1",), violations={"capability-2": ("leak",)})
    report = make_report(candidate=[worse, make_suite("adversarial")])
    lost = make_result(outcome="rolled_back", reason="drop", time_to_recovery_s=0.7, candidate="ppo-1")
    summary = summarise(run, run.spec, (), report=report, releases=(lost,))
    (line,) = summary.releases
    assert (line.candidate, line.outcome, line.reason, line.time_to_recovery_s) == ("ppo-1", "rolled_back", "drop", 0.7)
    assert (line.canary_requests, line.observed_share) == (90, pytest.approx(12 / 200))
    assert line is lost, "one value from the controller to the file"
    assert summary.offline[0] == (report.baseline["capability"], report.candidate["capability"])
    written = summary.to_json()
    assert written["offline"][0] == {
        "suite": "capability", "baseline_success": 1.0, "candidate_success": pytest.approx(39 / 40),
        "baseline_violations": 0, "candidate_violations": 1,
    }  # fmt: skip
    assert RunSummary.from_json(written) == summary


@pytest.mark.parametrize(("outcome", "stable", "is_success"), [("promoted", PPO, True), ("rolled_back", SFT, False)])
def test_finishing_writes_briefs_mirrors_and_names_who_is_stable(
    run: DeskRun,
    snapshot: DataSnapshot,
    monkeypatch: pytest.MonkeyPatch,
    outcome: str,
    stable: PolicyVersion,
    is_success: bool,
):
    written: list[tuple[Path, Path]] = []
    monkeypatch.setattr(cluster.reports, "write_briefs", lambda folder, *, ledger: written.append((folder, ledger)))
    stage_policy(run, "sft")
    bundle, registry = bundle_of(run, snapshot), FakeRegistry()
    releases = (make_result(outcome=outcome), make_result(outcome="rolled_back"))
    summary = finish(run, run.spec, registry, bundle, learned(snapshot), make_report(), releases)  # type: ignore[arg-type]
    assert (summary.stable_policy, summary.bundle_id) == (stable.name, bundle.id)
    assert summary.exit_code == (0 if is_success else 1)
    assert written == [(run.folder.root, run.folder.root / "serving" / "ledger.sqlite")]
    assert [what for what, _ in registry.runs] == ["start", "report", "end"]
    assert registry.runs[-1][1]["is_success"] is is_success
    assert summary.heads == {"journal.jsonl": ChainHead(rows=1, chain=run.journal.records[-1].chain)}
    assert registry.runs[-1][1]["tags"] == {"seatrial.audit.journal.jsonl": f"1 {run.journal.records[-1].chain}"}
    assert (summary.paths.mlflow_uri, summary.paths.folder) == ("postgresql://db/mlflow", str(run.folder.root))
    assert summary.paths.brief_html.endswith("report/brief.en-US.html")
