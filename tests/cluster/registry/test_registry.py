"""The registry against real MLflow 3 on SQLite; one store for the module, for its migration takes seconds."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.registry.connection import Store, quieten, store_of
from cluster.registry.entries import (
    Lineage,
    StageLinks,
    StageLog,
    flatten,
    kind_of,
    metric_points,
    model_name,
    params_of,
    version_description,
    version_of,
    version_tags,
)
from cluster.registry.registry import Registry
from cluster.registry.traces import SampledTrace, TraceSpan, feedback_rows, root_span, turn_spans
from rl_actors.contracts.errors import InfrastructureError
from rl_actors.contracts.rollouts import Completion, ToolCall, ToolResult, Turn
from rl_actors.contracts.versions import Calibration, DataSnapshot, PolicyVersion, RewardModelVersion
from serving.contracts.requests import RequestRecord
from serving.release.controller import Aliases
from tests.serving.fakes import RELEASE, harness

AT = 1_800_000_000.0
WORKFLOW = "desk"
SNAPSHOT = DataSnapshot(path="/data/snap", sha256="d" * 64, num_rows={"tasks": 12}, num_tasks={"train": 10})
CALIBRATION = Calibration(
    num_pairs=200, pair_accuracy=0.81, ece=0.034, brier=0.15, temperature=1.3, criterion_mae={"tone": 0.2}
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return store_of(tmp_path_factory.mktemp("home"), {})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in ("base", "sft-1", "rm-1", "ppo-1", "ppo-2"):
        (root / name).mkdir()
        (root / name / "config.json").write_text(f'{{"name": "{name}"}}')
    return root


def registry_of(store: Store, run_id: str = "run-1") -> Registry:
    return Registry(WORKFLOW, run_id, store=store)


def policy(models: Path, name: str, kind: str = "ppo", digest: str = "") -> PolicyVersion:
    sha = (digest or name.encode().hex()).ljust(64, "0")[:64]
    return PolicyVersion(name=name, kind=kind, path=str(models / name), sha256=sha, parent_sha256="")  # type: ignore[arg-type]


def reward_model(models: Path) -> RewardModelVersion:
    return RewardModelVersion(name="rm-1", path=str(models / "rm-1"), sha256="7" * 64, calibration=CALIBRATION)


def lineage(reward: str = "", stage: str = "ppo") -> Lineage:
    return Lineage(bundle_id="b" * 64, snapshot_sha256=SNAPSHOT.sha256, reward_model=reward, stage=stage)


def record(run_id: str = "r1", **changes: object) -> RequestRecord:
    values = dict.fromkeys(
        ("request_id", "session_key", "model_version", "policy_version", "bundle_id", "intent", "sandbox_level"), "x"
    )
    row = RequestRecord(
        run_id=run_id,
        reward_model_version="rm-1",
        release_channel="canary",
        split_epoch=3,
        started_at=AT,
        status="ok",
        success="yes",
        duration_ms=120.0,
        **values,
    )
    return replace(row, **changes)


@pytest.fixture(scope="module")
def registry(store: Store, models: Path) -> Registry:
    """A registry in which one pipeline run was logged from start to end."""
    registry = registry_of(store)
    registry.start_run(spec={"ppo": {"num_steps": 3}, "seed": 0}, started_at=AT)
    base = policy(models, "base", "base", digest="1" * 64)
    sft, ppo = policy(models, "sft-1", "sft"), policy(models, "ppo-1")
    rows = [{"stage": "ppo", "step": step, "at": AT + step, "kl": 0.01 * step, "note": "text"} for step in range(3)]
    for log in (
        StageLog(stage="snapshot", started_at=AT, finished_at=AT + 1, links=StageLinks(snapshot=SNAPSHOT)),
        StageLog(stage="sft", started_at=AT, finished_at=AT + 2, links=StageLinks(inputs=(base,), outputs=(sft,))),
        StageLog(
            stage="ppo",
            started_at=AT,
            finished_at=AT + 9,
            params={"clip": 0.2},
            metrics={"success": 0.9, "nested": {"kl": 0.03}, "flag": True},
            rows=[*rows, {"stage": "sft", "step": 0, "at": AT, "loss": 9.0}],
            artifacts=(models / "ppo-1" / "config.json",),
            links=StageLinks(inputs=(sft, reward_model(models)), outputs=(ppo,)),
        ),
    ):
        registry.log_stage(log)
        registry.log_stage(log)  # a resumed run repeats what it had written
    rm = registry.versions.register(reward_model(models), lineage(stage=""))
    registry.versions.register(sft, lineage(stage="sft"))
    registry.versions.register(ppo, lineage(rm))
    return registry


def stage_run(registry: Registry, stage: str):
    found = registry.connect().search_runs(
        [registry.experiment_id], f"tags.`seatrial.run_id` = '{registry.run_id}' and tags.`seatrial.stage` = '{stage}'"
    )
    assert len(found) == 1, f"{stage}: {len(found)} runs"
    return registry.connect().get_run(found[0].info.run_id)  # a search leaves the edges out


# --- runs -------------------------------------------------------------------------------------------------------------


def test_one_experiment_one_parent_and_a_child_run_per_stage(registry: Registry):
    client = registry.connect()
    assert client.get_experiment_by_name(WORKFLOW).experiment_id == registry.experiment_id
    parent = stage_run(registry, "pipeline")
    assert parent.info.run_name == "run-1"
    assert parent.data.params == {"ppo.num_steps": "3", "seed": "0"}
    for stage in ("snapshot", "sft", "ppo"):
        child = stage_run(registry, stage)
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.info.status == "FINISHED"
    assert stage_run(registry, "ppo").info.end_time == int((AT + 9) * 1000)


def test_curves_and_metrics_are_numbers_of_their_own_stage(registry: Registry):
    run = stage_run(registry, "ppo")
    history = registry.connect().get_metric_history(run.info.run_id, "kl")
    assert [(m.step, m.value, m.timestamp) for m in history] == [
        (0, 0.0, int(AT * 1000)),
        (1, 0.01, int((AT + 1) * 1000)),
        (2, 0.02, int((AT + 2) * 1000)),
    ]
    assert set(run.data.metrics) == {"kl", "success", "nested.kl"}
    assert run.data.params == {"clip": "0.2"}


def test_artifacts_lie_below_the_embedded_store(registry: Registry, store: Store):
    run = stage_run(registry, "ppo")
    names = {item.path for item in registry.connect().list_artifacts(run.info.run_id)}
    assert names == {"config.json"}
    assert run.info.artifact_uri.startswith(str(store.artifacts))


def test_models_are_edges_between_stages_and_are_not_doubled(registry: Registry):
    client = registry.connect()
    known = {m.model_id: m for m in client.search_logged_models([registry.experiment_id])}
    kinds = sorted((m.name, m.model_type) for m in known.values())
    assert kinds == [("base", "base"), ("ppo-1", "policy"), ("rm-1", "reward_model"), ("sft-1", "sft")]
    ppo, sft = stage_run(registry, "ppo"), stage_run(registry, "sft")
    assert {known[m.model_id].name for m in ppo.inputs.model_inputs} == {"sft-1", "rm-1"}
    assert [known[m.model_id].name for m in ppo.outputs.model_outputs] == ["ppo-1"]
    assert [known[m.model_id].name for m in sft.inputs.model_inputs] == ["base"]
    assert all(m.status == "READY" for m in known.values())


def test_the_snapshot_is_a_dataset_input_with_its_whole_hash(registry: Registry):
    (entry,) = stage_run(registry, "snapshot").inputs.dataset_inputs
    assert entry.dataset.digest == "d" * 36
    assert {tag.key: tag.value for tag in entry.tags}["seatrial.sha256"] == "d" * 64
    assert '"tasks": 12' in entry.dataset.profile
    assert entry.dataset.source == '{"uri": "file:///data/snap"}'


def test_a_run_ends_as_it_went_and_resumes_where_it_was(store: Store):
    registry = registry_of(store, "run-ends")
    first = registry.start_run(spec={"seed": 1}, started_at=AT)
    registry.end_run(finished_at=AT + 5, is_success=False, metrics={"minutes": 5, "why": "text"})
    ended = registry.connect().get_run(first)
    assert (ended.info.status, ended.info.end_time) == ("FAILED", int((AT + 5) * 1000))
    assert ended.data.metrics == {"minutes": 5.0}
    again = registry_of(store, "run-ends")
    assert again.start_run(spec={"seed": 1}, started_at=AT + 60) == first
    assert again.connect().get_run(first).info.status == "RUNNING"
    again.end_run(finished_at=AT + 90, is_success=True, metrics={}, tags={"seatrial.decision": "promoted"})
    ended = again.connect().get_run(first)
    assert (ended.info.status, ended.data.tags["seatrial.decision"]) == ("FINISHED", "promoted")


def test_the_parents_tags_are_read_back_and_an_unknown_run_gets_none_and_is_not_created(store: Store):
    """What `seatrial audit --mlflow` holds a run to; a path is a good key."""
    registry, key = registry_of(store, "run-audited"), "seatrial.audit.release/decisions.jsonl"
    registry.end_run(finished_at=AT, is_success=True, metrics={}, tags={key: f"178 {'f' * 64}"})
    assert registry.parent_tags()[key] == f"178 {'f' * 64}"
    unknown = registry_of(store, "run-unknown")
    assert unknown.parent_tags() == {}
    wanted = "tags.`seatrial.run_id` = 'run-unknown'"
    assert not unknown.connect().search_runs([unknown.experiment_id], wanted)


def test_the_brief_is_an_artifact_of_the_parent_run(registry: Registry, tmp_path: Path):
    (tmp_path / "brief.fr.md").write_text("# Dossier")
    registry.log_report(tmp_path)
    run_id = stage_run(registry, "pipeline").info.run_id
    assert [item.path for item in registry.connect().list_artifacts(run_id, "report")] == ["report/brief.fr.md"]


# --- versions and aliases ---------------------------------------------------------------------------------------------


def test_a_policy_version_links_reward_model_snapshot_bundle_and_run(registry: Registry, models: Path):
    client, versions = registry.connect(), registry.versions
    version = client.get_model_version(versions.policy_model, 2)
    assert version.source == (models / "ppo-1").as_uri(), "the weights stay where they are"
    assert version.run_id == stage_run(registry, "ppo").info.run_id
    assert version.tags["seatrial.reward_model_version"] == "1"
    assert version.tags["seatrial.snapshot_sha256"] == "d" * 64
    assert version.tags["seatrial.bundle_id"] == "b" * 64
    for part in ("#/models/desk-reward-model/versions/1", f"/runs/{version.run_id}", "d" * 64, "b" * 64, "ppo-1"):
        assert part in version.description


def test_a_reward_model_version_leads_back_to_its_policies(registry: Registry):
    version = registry.connect().get_model_version(registry.versions.reward_model, 1)
    assert version.tags["seatrial.policy.2"] == "ppo-1"
    assert "[ppo-1](#/models/desk-policy/versions/2)" in version.description
    assert (version.tags["seatrial.ece"], version.tags["seatrial.pair_accuracy"]) == ("0.034", "0.81")


def test_registering_twice_gives_the_same_version(registry: Registry, models: Path):
    assert registry.versions.register(policy(models, "ppo-1"), lineage("1")) == "2"
    assert registry.versions.register(reward_model(models), lineage(stage="")) == "1"
    assert len(registry.connect().search_model_versions(f"name = '{registry.versions.policy_model}'")) == 2


def test_what_is_registered_is_read_back_newest_first(store: Store, models: Path):
    registry = Registry("read_back", "run-1", store=store)
    assert registry.versions.entries(registry.versions.policy_model) == ()
    sft = replace(policy(models, "sft-1", "sft"), parent_sha256="1" * 64)
    registry.versions.register(sft, lineage(stage="sft"))
    registry.versions.register(policy(models, "ppo-1"), lineage())
    ppo, first = Registry("read_back", "run-2", store=store).versions.entries("read_back-policy")
    assert ppo == policy(models, "ppo-1")
    assert first == sft
    registry.versions.register(reward_model(models), lineage(stage=""))
    (reward,) = registry.versions.entries("read_back-reward-model")
    known = replace(CALIBRATION, criterion_mae={})
    assert reward == replace(reward_model(models), calibration=known), "the rest of it lies beside the weights"


def test_the_aliases_follow_the_release(registry: Registry):
    aliases: Aliases = registry.versions
    assert registry.versions.alias_version("candidate") == ""
    aliases.move("stable", "sft-1")
    aliases.move("candidate", "ppo-1")
    aliases.move("candidate", "ppo-1")
    assert registry.versions.alias_version("candidate") == "ppo-1"
    aliases.move("stable", "ppo-1")
    aliases.clear("candidate")
    aliases.clear("candidate")
    assert (registry.versions.alias_version("stable"), registry.versions.alias_version("candidate")) == ("ppo-1", "")
    aliases.move("stable", "sft-1")
    assert registry.versions.alias_version("stable") == "sft-1"


def test_an_alias_never_names_an_unregistered_policy(registry: Registry):
    with pytest.raises(InfrastructureError, match=r"no version 'ppo-9'.*register"):
        registry.versions.move("stable", "ppo-9")


def test_clearing_an_alias_before_the_first_version_does_nothing(store: Store):
    fresh = Registry("untouched", "run-1", store=store)
    fresh.versions.clear("candidate")
    assert fresh.versions.alias_version("stable") == ""


def test_a_name_used_in_two_runs_means_this_runs_version(store: Store, models: Path):
    one, two = (Registry("twice", run_id, store=store) for run_id in ("run-a", "run-b"))
    assert one.versions.register(policy(models, "ppo-2", digest="aa"), lineage()) == "1"
    assert two.versions.register(policy(models, "ppo-2", digest="bb"), lineage()) == "2"
    one.versions.move("stable", "ppo-2")
    aliases = one.connect().get_registered_model("twice-policy").aliases
    assert {name: str(number) for name, number in aliases.items()} == {"stable": "1"}


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_store_that_cannot_be_opened_names_the_remedy(tmp_path: Path):
    (tmp_path / "mlflow").write_text("a file where the folder should be")
    registry = Registry(WORKFLOW, "run-1", store=store_of(tmp_path, {}))
    with pytest.raises(InfrastructureError, match=r"mlflow\.db can be written"):
        registry.start_run(spec={}, started_at=AT)
    thread = registry.connect_in_background()
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_a_server_that_does_not_answer_names_the_remedy(monkeypatch: pytest.MonkeyPatch, store: Store):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    gone = Registry(WORKFLOW, "run-1", store=Store(uri="http://127.0.0.1:9", artifacts=None))
    try:
        with pytest.raises(InfrastructureError, match=r"unset MLFLOW_TRACKING_URI"):
            gone.versions.move("stable", "ppo-1")
    finally:
        Registry(WORKFLOW, "again", store=store).connect()  # MLflow's address is global to the process


def test_connecting_in_the_background_gives_the_same_client(store: Store):
    registry = registry_of(store, "run-background")
    thread = registry.connect_in_background()
    clients: list[object] = []
    racer = threading.Thread(target=lambda: clients.append(registry.connect()))
    racer.start()
    thread.join(timeout=60)
    racer.join(timeout=60)
    assert clients == [registry.connect()]


# --- traces -----------------------------------------------------------------------------------------------------------


def sampled(run_id: str, **changes: object) -> SampledTrace:
    spans = (
        TraceSpan(kind="LLM", name="llm final", started_at=AT, duration_ms=20.0, inputs={"num_tokens": 3}),
        TraceSpan(kind="TOOL", name="get_order", started_at=AT + 0.02, duration_ms=5.0, outputs={}, error="timeout"),
    )
    return SampledTrace(
        record=record(run_id, **changes),
        request="where is it?",
        response="on its way",
        spans=spans,
        override_actor="agent 7",
        override_reason="wrong order",
    )


def test_sampled_runs_become_traces_with_feedback(registry: Registry):
    overridden = sampled("t1", human_override=True, critic_score=0.25, success="no", policy_checks={"no_pii": True})
    report = registry.mirror([overridden, sampled("t2", status="timeout")])
    assert (report.written, report.lost, report.first_error) == (2, 0, "")
    found = registry.connect().search_traces(
        locations=[registry.experiment_id], filter_string="tags.`seatrial.run_id` = 't1'"
    )
    (trace,) = found
    assert [(s.name, s.span_type) for s in trace.data.spans] == [
        ("agent", "AGENT"),
        ("llm final", "LLM"),
        ("get_order", "TOOL"),
    ]
    assert trace.info.request_time == int(AT * 1000)
    assert trace.info.execution_duration == 120
    feedback = {a.name: (a.value, a.source.source_type, a.source.source_id) for a in trace.info.assessments}
    assert feedback == {
        "human_override": (True, "HUMAN", "agent 7"),
        "critic": (0.25, "CODE", "rm-1"),
        "success": (False, "CODE", "verifier"),
        "no_pii": (True, "CODE", "policy_checks"),
    }


def test_mirroring_again_writes_nothing(registry: Registry):
    registry.mirror([sampled("t3")])
    report = registry.mirror([sampled("t3")])
    assert (report.written, report.already_there) == (0, 1)


def test_lost_traces_are_counted_and_never_raise(tmp_path: Path):
    (tmp_path / "mlflow").write_text("a file where the folder should be")
    registry = Registry(WORKFLOW, "run-1", store=store_of(tmp_path, {}))
    report = registry.mirror([sampled("t4"), sampled("t5")])
    assert (report.written, report.lost) == (0, 2)
    assert "can be written" in report.first_error


def test_a_trace_that_export_swallowed_counts_as_lost(registry: Registry, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry.connect(), "search_traces", lambda **_: [])
    report = registry.mirror([sampled("t6")])
    assert (report.written, report.lost) == (0, 1)
    assert "did not keep the trace of t6" in report.first_error


def test_an_unscored_unlabelled_run_has_no_feedback():
    assert feedback_rows(SampledTrace(record=record(success="unknown"), request="", response="")) == ()


def test_a_failed_run_is_a_failed_root_span():
    assert root_span(sampled("x", status="timeout")).error == "timeout"
    assert root_span(sampled("x")).error == ""


def turn(kind: str, tokens: int, call: ToolCall | None, result: ToolResult | None) -> Turn:
    completion = Completion(
        token_ids=tuple(range(tokens)), logprobs=(0.0,) * tokens, weights_version=4, finished=True, cached_tokens=2
    )
    return Turn(
        kind=kind,  # type: ignore[arg-type]
        prompt_token_ids=(1, 2, 3),
        completion=completion,
        tool_call=call,
        tool_result=result,
    )


def test_a_run_becomes_planner_tool_and_llm_spans():
    plan = ToolCall(name="plan", arguments={"steps": ["look up"], "tool_budget": 1}, raw="{}")
    call = ToolCall(name="get_order", arguments={"order_id": 7}, raw='{"order_id": 7}')
    turns = (
        turn("plan", 10, plan, ToolResult(content="ok", error="", duration_ms=0.0)),
        turn("tool", 20, call, ToolResult(content='{"status": "shipped"}', error="", duration_ms=40.0)),
        turn("malformed", 5, ToolCall(name="", arguments=None, raw="{oops"), None),
        turn("final", 5, None, None),
    )
    planner, look, tool, malformed, final = turn_spans(turns, started_at=AT, duration_ms=80.0)
    assert (planner.kind, planner.outputs) == ("CHAIN", {"steps": ["look up"], "tool_budget": 1})
    assert [child.kind for child in planner.children] == ["LLM"]
    assert (tool.kind, tool.name, tool.inputs, tool.outputs) == (
        "TOOL",
        "get_order",
        {"order_id": 7},
        {"status": "shipped"},
    )
    assert [s.duration_ms for s in (planner, look, tool, malformed, final)] == [10.0, 20.0, 40.0, 5.0, 5.0]
    assert final.started_at == pytest.approx(AT + 0.075)
    assert look.attributes["weights_version"] == 4
    assert look.attributes["timing"] == "estimated"


# --- plain values -----------------------------------------------------------------------------------------------------


def test_the_embedded_store_lies_under_the_home(tmp_path: Path):
    store = store_of(tmp_path, {"MLFLOW_TRACKING_URI": " "})
    assert store.uri == f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    assert store.artifacts == tmp_path / "mlflow" / "artifacts"
    assert not (tmp_path / "mlflow").exists(), "naming a store creates nothing"


def test_a_tracking_uri_overrides_the_embedded_store(tmp_path: Path):
    server = store_of(tmp_path, {"MLFLOW_TRACKING_URI": "http://mlflow:5000"})
    assert (server.uri, server.artifacts, server.is_server) == ("http://mlflow:5000", None, True)
    database = store_of(tmp_path, {"MLFLOW_TRACKING_URI": "postgresql://db/mlflow"})
    assert (database.is_server, database.artifacts) == (False, tmp_path / "mlflow" / "artifacts")


def test_mlflow_is_quiet_and_keeps_what_a_human_set(registry: Registry):
    environ = {"MLFLOW_LOGGING_LEVEL": "DEBUG"}
    quieten(environ)
    assert environ["MLFLOW_LOGGING_LEVEL"] == "DEBUG"
    assert environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert os.environ["MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"] == "false"
    registry.connect()
    assert logging.getLogger("mlflow").level >= logging.ERROR


def test_metric_rows_are_finite_numbers_with_dotted_keys():
    rows = [
        {"stage": "ppo", "step": 2, "at": 1.5, "kl": 0.1, "by intent": {"a?b": 1}, "x": float("nan"), "ok": True},
        {"stage": "sft", "step": 2, "at": 1.5, "loss": 0.1},
        {"step": 2, "loss": 0.1},
    ]
    points = [(p.key, p.value, p.step, p.at_ms) for p in metric_points(rows, "ppo")]
    assert points == [("kl", 0.1, 2, 1500), ("by intent.a_b", 1.0, 2, 1500)]


def test_params_fit_mlflow():
    assert params_of({"a": {"b": [1, 2]}, "long": "x" * 9000}) == {"a.b": "[1, 2]", "long": "x" * 6000}
    assert flatten({}) == {}
    assert model_name("org/ppo:1.5%") == "org-ppo-1-5-"


def test_a_description_names_what_is_missing():
    for version, says in (
        (policy(Path("/m"), "sft-1", "sft"), "reward model: none"),
        (reward_model(Path("/m")), "policies trained on it: none yet"),
    ):
        tags = version_tags(version, lineage(), "run-1") | {"seatrial.logged_model_id": "m-1"}
        assert says in version_description(tags, "1", "r", "desk")


# --- a whole release on the real registry -----------------------------------------------------------------------------


@pytest.fixture
def release_registry(store: Store, models: Path, request: pytest.FixtureRequest) -> Registry:
    """A registry that knows the two policies of the release fakes."""
    registry = Registry(f"release-{request.node.name}"[:60], "run-1", store=store)
    for name in (RELEASE.stable, RELEASE.candidate):
        registry.versions.register(policy(models, name), lineage(stage=""))
    registry.versions.move("stable", RELEASE.stable)
    return registry


def aliases_of(registry: Registry) -> tuple[str, str]:
    return registry.versions.alias_version("stable"), registry.versions.alias_version("candidate")


def test_a_promotion_moves_the_real_aliases(release_registry: Registry, tmp_path: Path):
    rig = replace(harness(tmp_path), aliases=release_registry.versions)  # type: ignore[arg-type]
    controller = rig.controller()
    controller.tick()
    assert aliases_of(release_registry) == (RELEASE.stable, RELEASE.candidate), "named before any traffic"
    controller.run()
    assert aliases_of(release_registry) == (RELEASE.candidate, "")


def test_a_fail_back_moves_them_back(release_registry: Registry, tmp_path: Path):
    rig = replace(harness(tmp_path), aliases=release_registry.versions)  # type: ignore[arg-type]
    rig.controller().run()
    rig.controller().roll_back(actor="ada", reason="complaints")
    rig.controller().tick()
    assert aliases_of(release_registry) == (RELEASE.stable, "")


def test_an_unregistered_candidate_never_gets_traffic(store: Store, tmp_path: Path):
    """The alias moves before the split: a candidate that the registry does not know stops there."""
    empty = Registry("release-unregistered", "run-1", store=store)
    rig = replace(harness(tmp_path), aliases=empty.versions)  # type: ignore[arg-type]
    with pytest.raises(InfrastructureError, match="register the policy first"):
        rig.controller().run()
    assert rig.platform.splits == []


def test_long_curves_and_many_parameters_go_in_batches(store: Store):
    registry = registry_of(store, "run-long")
    rows = [{"stage": "ppo", "step": step, "at": AT + step, "kl": step / 1e4, "reward": 0.5} for step in range(1200)]
    params = {"section": {f"knob_{number}": number for number in range(250)}}
    run_id = registry.log_stage(StageLog(stage="ppo", started_at=AT, finished_at=AT + 9, rows=rows, params=params))
    history = registry.connect().get_metric_history(run_id, "kl")
    assert [metric.step for metric in sorted(history, key=lambda metric: metric.step)] == list(range(1200))
    assert len(registry.connect().get_run(run_id).data.params) == 250


def test_a_changed_setting_of_a_finished_stage_is_refused(registry: Registry):
    """MLflow keeps a parameter for ever: a resumed run with other settings is another run."""
    changed = StageLog(stage="ppo", started_at=AT, finished_at=AT + 9, params={"clip": 0.9})
    with pytest.raises(InfrastructureError, match=r"log_stage: .*clip"):
        registry.log_stage(changed)


def test_the_base_model_and_the_baseline_are_told_from_policies(models: Path):
    kinds = {kind: kind_of(policy(models, "ppo-1", kind)) for kind in ("base", "sft", "ppo", "degraded")}
    assert kind_of(reward_model(models)) == "reward_model"
    assert kinds == {"base": "base", "sft": "sft", "ppo": "policy", "degraded": "policy"}


def test_one_registry_serves_several_threads(store: Store):
    registry = registry_of(store, "run-threads")
    registry.start_run(spec={}, started_at=AT)
    logs = [StageLog(stage=f"stage_{i}", started_at=AT, finished_at=AT + i, metrics={"i": i}) for i in range(4)]
    threads = [threading.Thread(target=registry.log_stage, args=(log,)) for log in logs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert {stage_run(registry, log.stage).data.metrics["i"] for log in logs} == {0.0, 1.0, 2.0, 3.0}
    stage_run(registry, "pipeline")


def test_a_reward_model_that_lost_its_figures_is_read_as_one_nobody_believes():
    """An earlier seatrial wrote them after the model: killed in between, it left a version without."""
    tags = version_tags(reward_model(Path("/m")), lineage(), "run-1")
    figures = ("num_pairs", "pair_accuracy", "ece", "brier", "temperature")
    bare = version_of({key: value for key, value in tags.items() if key.removeprefix("seatrial.") not in figures})
    assert isinstance(bare, RewardModelVersion)
    assert bare.calibration.num_pairs == 0
    assert not bare.calibration.ece <= 1.0
