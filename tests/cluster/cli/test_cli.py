"""The command line: words in, one answer out, and every way to be wrong ends in a sentence and the right exit code."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import yaml
from typer.testing import CliRunner, Result

from cluster.cli import runs as cli_runs
from cluster.cli.answer import Scene, fault_of
from cluster.cli.app import app
from cluster.cli.override import Override, record_override
from cluster.cli.runs import RunRequest, find_run, is_finished, latest_unfinished, open_run, record_spec
from cluster.cli.submit import exit_code_of
from cluster.pipeline.run import Watch
from cluster.plan.preflight import Machine
from cluster.records.run_folder import RunFolder, list_runs
from cluster.records.summary import RunPaths, RunSummary
from cluster.spec.spec import WorkflowSpec, load_spec
from rl_actors.contracts.errors import (
    AttestationError,
    BadInputError,
    InfrastructureError,
    InstabilityError,
    StageRefusedError,
    TamperedError,
)
from rl_actors.durable.files import write_json
from serving.store.ledger import RequestLedger

ROOT = Path(__file__).resolve().parents[3]
ARTICLE = """\
workflow:
  target: "support_ticket_resolution"
  baseline: "sft_checkpoint_v1"
  reward_model: "rm_v1"
  policy_training: "ppo_kl"
release:
  canary_traffic_percent: 5
  gates:
    - no_safety_regression
    - latency_delta_lt_15_percent
    - cost_per_success_not_worse
    - rollback_under_5_minutes
monitoring:
  - human_override_rate
  - tool_error_rate
  - policy_kl_drift
  - task_completion_quality
"""
GOOD_MACHINE = Machine(
    python=(3, 11),
    compiler="/usr/bin/c++",
    ninja="/usr/bin/ninja",
    disk_bytes=100 * 1024**3,
    memory_bytes=100 * 1024**3,
    shm_bytes=1024**3,
    gpus=0,
    port_is_free=True,
    home_is_writable=True,
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEATRIAL_HOME", str(tmp_path / "home"))
    # Set, then gone: what --debug writes into the environment is taken back after the test.
    monkeypatch.setenv("SEATRIAL_DEBUG", "")
    monkeypatch.setattr(cli_runs, "probe_machine", lambda _spec, _home: GOOD_MACHINE)
    return tmp_path / "home"


@pytest.fixture
def article(tmp_path: Path) -> Path:
    path = tmp_path / "article.yaml"
    path.write_text(ARTICLE)
    return path


def seatrial(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def ending(folder: RunFolder, *, stable: str = "ppo-1", exit_code: int = 0, ledger: str = "") -> RunSummary:
    return RunSummary(
        run_id=folder.run_id,
        workflow="support_desk",
        stages=(),
        trained=(),
        offline=(),
        releases=(),
        stable_policy=stable,
        bundle_id="b" * 64,
        exit_code=exit_code,
        paths=RunPaths(folder=str(folder.root), ledger=ledger),
    )


Script = Callable[[RunFolder, Watch], RunSummary]


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A pipeline that does what the test says, in place of the one that trains."""
    calls: list[tuple[WorkflowSpec, str, str]] = []
    fake = SimpleNamespace(calls=calls, connect=lambda: None, script=lambda folder, _watch: ending(folder))

    def run_pipeline(
        spec: WorkflowSpec, folder: RunFolder, watch: Watch, until: str = "", *, begin: Callable[[], None]
    ) -> RunSummary:
        fake.connect()
        begin()
        calls.append((spec, folder.run_id, until))
        return fake.script(folder, watch)

    monkeypatch.setattr("cluster.pipeline.run_pipeline", run_pipeline)
    return fake


def recorded_run(home: Path, run_id: str, *settings: str, summary: RunSummary | None = None) -> RunFolder:
    request = RunRequest(spec="support_desk", settings=settings, run_id=run_id)
    spec, folder = open_run(request, home)
    record_spec(spec, folder)
    if summary is not None:
        write_json(folder.summary, summary.to_json())
    age = len(list_runs(home))
    os.utime(folder.spec, (1e9 + age, 1e9 + age))
    return folder


# --- validate, plan, preflight ----------------------------------------------------------------------------------------


def test_the_articles_block_alone_is_valid(article: Path):
    result = seatrial("validate", str(article))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "valid: workflow support_desk, 4 gates, ramp 5 % -> 25 % -> 50 %\n"


def test_validate_gives_machines_the_whole_spec(article: Path):
    result = seatrial("validate", str(article), "--set", "ppo.num_steps=7", "--json")
    answer = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert (answer["ok"], answer["exit_code"], answer["spec"]["ppo"]["num_steps"]) == (True, 0, 7)


@pytest.mark.parametrize(
    ("before", "after", "field", "remedy"),
    [
        ("no_safety_regression", "no_safty_regression", "release.gates.0", "did you mean 'no_safety_regression'?"),
        ("baseline:", "basline:", "workflow.basline", "did you mean 'workflow.baseline'?"),
        ('  baseline: "sft_checkpoint_v1"\n', "", "workflow.baseline", "required key is missing"),
        ("percent: 5", "percent: 500", "release.canary_traffic_percent", "99"),
        ("percent: 5", 'percent: "5"', "release.canary_traffic_percent", "must be"),
        ("ppo_kl", "dpo", "workflow.policy_training", "valid: ppo_kl"),
    ],
)
def test_a_bad_spec_is_one_sentence_and_exit_code_2(article: Path, before: str, after: str, field: str, remedy: str):
    article.write_text(ARTICLE.replace(before, after))
    result = seatrial("validate", str(article))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {field} = ")
    assert remedy in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr


def test_an_error_is_one_json_line_for_machines(article: Path):
    article.write_text(ARTICLE.replace("no_safety", "no_safty"))
    result = seatrial("validate", str(article), "--json")
    answer = json.loads(result.stdout)
    assert (result.exit_code, answer["ok"], answer["exit_code"], answer["field"]) == (2, False, 2, "release.gates.0")
    assert "did you mean" in answer["remedy"]
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["validate", "nope"], "spec"),
        (["validate", "support_desk", "--set", "ppo.num_steps"], "--set"),
        (["validate", "support_desk", "--set", "ppo.num_stepz=3"], "ppo.num_stepz"),
        (["validate", "support_desk", "--set", "model.path=/nowhere"], "model.path"),
        (["plan", "nope"], "spec"),
        (["preflight", "nope"], "spec"),
        (["run"], "SPEC"),
        (["run", "support_desk", "--run-id", "../up"], "run_id"),
        (["run", "--resume"], "--resume"),
        (["run", "--resume", "nothing-1"], "--resume"),
        (["run", "support_desk", "--resume"], "--resume"),
        (["run", "support_desk", "--resume", "a", "--run-id", "b"], "--run-id"),
        (["run", "--resume", "support_desk"], "--resume"),
        (["report"], "RUN_ID"),
        (["report", "nothing-1"], "RUN_ID"),
        (["serve"], "RUN_ID"),
        (["override", "run-1", "--actor", " ", "--reason", "r"], "actor"),
        (["override", " ", "--actor", "ann", "--reason", "r"], "request_id"),
    ],
)
def test_bad_words_name_the_field_and_start_nothing(home: Path, words: list[str], field: str):
    result = seatrial(*words)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"error: {field} = ")
    assert not (home / "runs").exists()


def test_resuming_a_workflow_name_says_how_to_write_it():
    assert "write: seatrial run support_desk --resume" in seatrial("run", "--resume", "support_desk").stderr


def test_usage_errors_exit_2():
    assert seatrial("bogus").exit_code == 2
    assert seatrial("validate").exit_code == 2
    assert seatrial("validate", "support_desk", "--bogus").exit_code == 2


def test_every_command_of_the_design_is_there_and_takes_json():
    names = ["validate", "plan", "preflight", "run", "train", "eval", "release", "serve", "submit"]
    names += ["audit", "override", "report", "status", "up", "down", "ui"]
    listed = seatrial("--help").stdout
    for name in names:
        assert f"  {name} " in listed
        assert "--json" in seatrial(name, "--help").stdout, name


def test_plan_prints_tables_or_json():
    shown = seatrial("plan", "support_desk").stdout
    assert all(words in shown for words in ("One PPO step", "Charter", "rollback path", "20,000 tickets a day"))
    plan = json.loads(seatrial("plan", "support_desk", "--json").stdout)["plan"]
    assert plan["batch"]["rollouts_per_step"] == load_spec("support_desk").ppo.rollouts_per_step
    assert plan["total_minutes"] > 0


@pytest.mark.parametrize(("free", "code"), [(True, 0), (False, 3)])
def test_preflight_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, free: bool, code: int):
    from dataclasses import replace

    machine = replace(GOOD_MACHINE, port_is_free=free)
    monkeypatch.setattr("cluster.cli.plan.probe_machine", lambda _spec, _home: machine)
    result = seatrial("preflight", "support_desk")
    assert result.exit_code == code
    assert ("cluster.serve_port" in " ".join(result.stdout.split())) == (not free)
    checks = json.loads(seatrial("preflight", "support_desk", "--json").stdout)["checks"]
    assert [check["ok"] for check in checks if check["name"] == "port 8000"] == [free]


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_writes_its_spec_and_shows_its_ending(home: Path, pipeline: SimpleNamespace):
    def script(folder: RunFolder, watch: Watch) -> RunSummary:
        watch.stage_started("sft", "3,000 demonstrations")
        watch.stage_finished("sft", "loss 0.31", 12.0)
        return ending(folder)

    pipeline.script = script
    result = seatrial("run", "support_desk", "--set", "ppo.num_steps=3", "--run-id", "mine")
    assert result.exit_code == 0, result.output
    spec, run_id, until = pipeline.calls[0]
    assert (spec.ppo.num_steps, run_id, until) == (3, "mine", "")
    recorded = json.loads(RunFolder.of(home, "mine").spec.read_text())
    assert recorded["ppo"]["num_steps"] == 3
    assert "loss 0.31" in result.stdout
    assert "stable policy: ppo-1" in result.stdout


@pytest.mark.parametrize(("command", "until"), [("train", "ppo"), ("eval", "eval"), ("release", "release")])
def test_shorter_commands_stop_earlier(pipeline: SimpleNamespace, command: str, until: str):
    assert seatrial(command, "support_desk").exit_code == 0
    assert pipeline.calls[0][2] == until


def test_the_exit_code_is_the_pipelines(pipeline: SimpleNamespace):
    pipeline.script = lambda folder, _watch: ending(folder, exit_code=1)
    assert seatrial("run", "support_desk").exit_code == 1


def test_json_is_the_only_thing_on_stdout(pipeline: SimpleNamespace, capfd: pytest.CaptureFixture[str]):
    def noisy(folder: RunFolder, _watch: Watch) -> RunSummary:
        os.write(1, b"from a C library\n")
        sys.stdout.write("from a worker\n")
        return ending(folder)

    pipeline.script = noisy
    result = seatrial("run", "support_desk", "--json")
    assert json.loads(result.stdout)["summary"]["stable_policy"] == "ppo-1"
    assert result.stdout.count("\n") == 1
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "from a C library" in captured.err


def test_the_address_reaches_the_spec(pipeline: SimpleNamespace):
    assert seatrial("run", "support_desk", "--address", "auto").exit_code == 0
    assert pipeline.calls[0][0].cluster.address == "auto"


def test_a_poor_machine_is_refused_before_the_folder_exists(
    home: Path, pipeline: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    from dataclasses import replace

    poor = replace(GOOD_MACHINE, compiler="", port_is_free=False)
    monkeypatch.setattr(cli_runs, "probe_machine", lambda _spec, _home: poor)
    result = seatrial("run", "support_desk")
    assert result.exit_code == 3
    assert "install g++" in result.stderr
    assert "port 8000: in use" in result.stderr
    assert not pipeline.calls
    assert not (home / "runs").exists()
    monkeypatch.setattr(cli_runs, "probe_machine", lambda _spec, _home: replace(GOOD_MACHINE, port_is_free=False))
    assert seatrial("train", "support_desk").exit_code == 0, "training serves nothing and needs no port"


@pytest.mark.parametrize(("requests", "is_told"), [(8000, True), (50, False)])
def test_a_run_tells_what_is_doubtful_about_its_workload(pipeline: SimpleNamespace, requests: int, is_told: bool):
    result = seatrial("run", "support_desk", "--set", f"release.min_canary_requests={requests}")
    assert result.exit_code == 0
    assert ("doubtful workload: the canary would need 10 days" in " ".join(result.stdout.split())) is is_told


def test_only_a_resumed_run_waits_for_its_port(home: Path, pipeline: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    """A killed run's gateway listens until its Ray has noticed; a new run's port is somebody else's."""
    from dataclasses import replace

    waited: list[int] = []
    monkeypatch.setattr(cli_runs, "probe_machine", lambda _spec, _home: replace(GOOD_MACHINE, port_is_free=False))
    monkeypatch.setattr(cli_runs, "becomes_free", lambda port, *, timeout_s: waited.append(port) is None)
    assert seatrial("run", "support_desk").exit_code == 3
    assert not waited
    recorded_run(home, "mine")
    assert seatrial("run", "--resume", "mine").exit_code == 0
    assert waited == [8000]


def test_a_run_id_is_used_once(home: Path, pipeline: SimpleNamespace):
    recorded_run(home, "mine")
    result = seatrial("run", "support_desk", "--run-id", "mine")
    assert result.exit_code == 2
    assert "--resume mine" in result.stderr
    assert not pipeline.calls


# --- resume -----------------------------------------------------------------------------------------------------------


def test_resume_takes_the_newest_unfinished_run_of_the_workflow(home: Path, pipeline: SimpleNamespace):
    for name in ("r1", "r2", "r3"):
        recorded_run(home, name)
    last = RunFolder.of(home, "r3")
    write_json(last.summary, ending(last).to_json())
    assert seatrial("run", "support_desk", "--resume").exit_code == 0
    assert seatrial("run", "--resume").exit_code == 0
    assert [run_id for _, run_id, _ in pipeline.calls] == ["r2", "r2"]


@pytest.mark.parametrize("words", [["--resume", "r1", "--json"], ["--json", "--resume=r1"], ["--resume", "r1"]])
def test_resume_takes_a_name(home: Path, pipeline: SimpleNamespace, words: list[str]):
    for name in ("r1", "r2"):
        recorded_run(home, name, "ppo.num_steps=4")
    assert seatrial("run", *words).exit_code == 0
    assert [(spec.ppo.num_steps, run_id) for spec, run_id, _ in pipeline.calls] == [(4, "r1")]


def test_a_bare_resume_does_not_swallow_the_next_option(home: Path, pipeline: SimpleNamespace):
    recorded_run(home, "r1", "ppo.num_steps=4")
    result = seatrial("run", "support_desk", "--resume", "--set", "ppo.num_steps=4", "--json")
    assert result.exit_code == 0, result.output
    assert pipeline.calls[0][1] == "r1"


def test_a_run_that_stopped_after_training_is_unfinished(home: Path, pipeline: SimpleNamespace):
    folder = recorded_run(home, "r1")
    write_json(folder.summary, ending(folder, stable="").to_json())
    assert not is_finished(folder)
    assert seatrial("eval", "support_desk", "--resume").exit_code == 0
    assert pipeline.calls[0][1] == "r1"


def test_a_resume_with_another_spec_names_what_differs(home: Path, pipeline: SimpleNamespace):
    recorded_run(home, "r1", "ppo.num_steps=4")
    result = seatrial("run", "support_desk", "--resume", "r1", "--set", "seed=9", "--json")
    answer = json.loads(result.stdout)
    assert result.exit_code == 2
    assert f"ppo.num_steps (was 4, now {load_spec('support_desk').ppo.num_steps})" in answer["remedy"]
    assert "seed (was 0, now 9)" in answer["remedy"]
    assert "sft" not in answer["remedy"]
    assert not pipeline.calls


def test_a_resume_without_spec_takes_no_settings(home: Path, pipeline: SimpleNamespace):
    recorded_run(home, "r1")
    assert "keeps its own spec" in seatrial("run", "--resume", "r1", "--set", "seed=9").stderr
    assert not pipeline.calls


def test_a_broken_summary_is_named(home: Path):
    folder = recorded_run(home, "r1")
    folder.summary.write_text("{}")
    with pytest.raises(TamperedError, match=r"summary\.json"):
        is_finished(folder)


def test_the_newest_run_is_found(home: Path):
    for name in ("r1", "r2"):
        recorded_run(home, name)
    assert find_run(home).run_id == "r2"
    assert find_run(home, "r1").run_id == "r1"


# --- how it ends ------------------------------------------------------------------------------------------------------


def raising(error: BaseException) -> Script:
    def script(_folder: RunFolder, _watch: Watch) -> RunSummary:
        raise error

    return script


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (StageRefusedError("reward model: ECE 0.3 over 0.1"), 1, "error: reward model: ECE 0.3 over 0.1"),
        (InstabilityError("kl_explosion: 9.1 nats"), 1, "error: kl_explosion"),
        (BadInputError("data", "x", "fix it"), 2, "error: data = 'x': fix it"),
        (InfrastructureError("ledger: locked"), 3, "error: ledger: locked"),
        (AttestationError("worker 0 is stale"), 3, "error: worker 0 is stale"),
        (TamperedError("weights changed"), 3, "error: weights changed"),
        (OSError(errno.ENOSPC, "No space left", "/d/metrics.jsonl"), 3, "/d/metrics.jsonl: no space left on the disk"),
        (OSError(errno.EADDRINUSE, "Address in use"), 3, "the port is in use"),
        (PermissionError(errno.EACCES, "denied", "/d"), 3, "/d: permission denied"),
    ],
)
def test_each_error_is_a_sentence_with_its_exit_code(
    pipeline: SimpleNamespace, error: Exception, code: int, words: str
):
    pipeline.script = raising(error)
    result = seatrial("run", "support_desk")
    assert result.exit_code == code
    assert words in result.stderr
    assert "Traceback" not in result.output


def test_ctrl_c_says_how_to_go_on(pipeline: SimpleNamespace):
    pipeline.script = raising(KeyboardInterrupt())
    result = seatrial("run", "support_desk", "--run-id", "mine", "--set", "seed=3")
    assert result.exit_code == 130
    assert result.stderr == "interrupted; to go on: seatrial run support_desk --set seed=3 --resume mine\n"


def test_the_line_that_ctrl_c_prints_works(pipeline: SimpleNamespace):
    pipeline.script = raising(KeyboardInterrupt())
    line = seatrial("train", "support_desk", "--set", "seed=3").stderr.partition("to go on: seatrial ")[2]
    pipeline.script = lambda folder, _watch: ending(folder)
    assert seatrial(*line.split()).exit_code == 0
    assert pipeline.calls[0][1:] == pipeline.calls[1][1:]


def test_a_defect_keeps_its_traceback_in_the_run_folder(home: Path, pipeline: SimpleNamespace):
    pipeline.script = raising(ZeroDivisionError("division by zero"))
    result = seatrial("run", "support_desk", "--run-id", "mine", "--json")
    answer = json.loads(result.stdout)
    path = Path(answer["traceback"])
    assert (result.exit_code, path.parent) == (3, RunFolder.of(home, "mine").root)
    assert "ZeroDivisionError: division by zero" in path.read_text()
    assert "--resume mine" in answer["error"]
    assert "Traceback" not in result.output


def test_a_defect_on_a_full_disk_still_shows_its_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    fault = fault_of(ValueError("boom"), Scene(crash_folder=tmp_path))
    assert "No space left" in fault.message
    assert "ValueError: boom" in capsys.readouterr().err


def test_debug_adds_the_traceback(pipeline: SimpleNamespace):
    pipeline.script = raising(StageRefusedError("no"))
    result = seatrial("--debug", "run", "support_desk")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "error: no" in result.stderr


def test_an_error_that_ray_wrapped_is_unwrapped():
    class RayTaskError(BadInputError):
        def __init__(self, cause: BadInputError) -> None:
            super().__init__("", "", "remote traceback")
            self.cause = cause

    fault = fault_of(RayTaskError(BadInputError("ppo.clip", 2, "lower it")), Scene())
    assert (fault.message, fault.exit_code) == ("ppo.clip = 2: lower it", 2)


def test_a_run_that_found_no_cluster_is_none(pipeline: SimpleNamespace, home: Path):
    """A later --resume must not pick it up; what was there before is still the newest unfinished run."""

    def unreachable() -> None:
        raise InfrastructureError("cluster.address = 'head:1': no Ray cluster answers there; start one")

    recorded_run(home, "r1")
    pipeline.connect = unreachable
    result = seatrial("run", "support_desk", "--address", "head:1", "--run-id", "r2")
    assert result.exit_code == 3
    assert "no Ray cluster answers" in result.stderr
    assert list_runs(home) == ["r1"]
    assert latest_unfinished(home, "support_desk").run_id == "r1"
    pipeline.connect = lambda: None
    assert seatrial("run", "support_desk", "--run-id", "r2").exit_code == 0
    assert list_runs(home) == ["r1", "r2"], "negative control: the same id is free, and recorded once Ray answers"


# --- keep-serving, report, submit, override ---------------------------------------------------------------------------


def test_keep_serving_brings_the_service_up_after_a_promotion(
    pipeline: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    from cluster.cli.answer import Reply

    asked: list[Mapping[str, object]] = []

    def bring_up(ports, *, run_id: str) -> Reply:
        asked.append({"port": ports.gateway, "run_id": run_id})
        return Reply(data={"service": {}}, show="gateway up")

    monkeypatch.setattr("cluster.cli.service.bring_up", bring_up)
    words = ["run", "support_desk", "--keep-serving", "--run-id", "mine", "--set", "cluster.serve_port=8123"]
    assert "gateway up" in seatrial(*words).stdout
    assert asked == [{"port": 8123, "run_id": "mine"}]
    pipeline.script = lambda folder, _watch: ending(folder, exit_code=1)
    assert seatrial("run", "support_desk", "--keep-serving").exit_code == 1
    assert len(asked) == 1, "a refused run is not served"


def test_report_writes_the_briefs_again(home: Path, monkeypatch: pytest.MonkeyPatch):
    folder = recorded_run(home, "r1")

    def write_briefs(run_dir: Path, **_: object) -> None:
        (run_dir / "report").mkdir()
        (run_dir / "report" / "brief.en-US.md").write_text("# Brief")

    monkeypatch.setattr("cluster.reports.write_briefs", write_briefs, raising=False)
    answer = json.loads(seatrial("report", "--json").stdout)
    assert answer["briefs"] == [str(folder.report / "brief.en-US.md")]


class FakeCluster:
    def __init__(self, status: str = "SUCCEEDED", code: int | None = None) -> None:
        self.status, self.code = status, code
        self.submitted: dict = {}

    def submit_job(self, **job: object) -> str:
        self.submitted = job
        return "raysubmit_1"

    def get_job_status(self, _job_id: str) -> str:
        return self.status

    def get_job_logs(self, _job_id: str) -> str:
        return "... sft\nok sft\n"

    def get_job_info(self, _job_id: str) -> SimpleNamespace:
        return SimpleNamespace(driver_exit_code=self.code)


@pytest.mark.parametrize(
    ("status", "code", "expected"), [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", None, 1), ("STOPPED", -15, 1)]
)
def test_submit_follows_the_log_and_exits_as_the_job(
    monkeypatch: pytest.MonkeyPatch, status: str, code: int | None, expected: int
):
    cluster = FakeCluster(status, code)
    monkeypatch.setattr("cluster.cli.submit.connect", lambda _address: cluster)
    result = seatrial("submit", "support_desk", "--set", "seed=5", "--address", "http://head:8265")
    assert result.exit_code == expected
    assert "job raysubmit_1 on http://head:8265" in result.stdout
    assert "ok sft" in result.stdout
    assert "cluster.cli run" in cluster.submitted["entrypoint"]
    assert "SEATRIAL_HOME" in cluster.submitted["runtime_env"]["env_vars"]


def test_submits_log_goes_to_stderr_for_machines(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cluster.cli.submit.connect", lambda _address: FakeCluster())
    result = seatrial("submit", "support_desk", "--json")
    assert json.loads(result.stdout)["job_id"] == "raysubmit_1"


def test_a_job_whose_node_died_failed():
    def gone(_job_id: str) -> None:
        raise RuntimeError("no such job")

    assert exit_code_of(SimpleNamespace(get_job_info=gone), "j", succeeded=False) == 1


def test_a_cluster_that_is_not_there_is_infrastructure(monkeypatch: pytest.MonkeyPatch):
    def refuse(_address: str) -> None:
        raise InfrastructureError("no Ray job server at http://x; start one")

    monkeypatch.setattr("cluster.cli.submit.connect", refuse)
    assert seatrial("submit", "support_desk").exit_code == 3


def ledger_with_a_request(home: Path) -> RequestLedger:
    from serving.contracts.requests import RequestRecord

    folder = recorded_run(home, "r1")
    path = folder.root / "serving" / "ledger.sqlite"
    write_json(folder.summary, ending(folder, ledger=str(path)).to_json())
    ledger = RequestLedger(path, owner="test")
    ledger.start(
        RequestRecord(
            run_id="run-q7",
            request_id="q7",
            session_key="s",
            model_version="m",
            reward_model_version="r",
            policy_version="p",
            bundle_id="b",
            release_channel="general",
            split_epoch=1,
            started_at=time.time(),
            intent="refund",
            sandbox_level="process",
        )
    )
    return ledger


def no_gateway(*_: object) -> None:
    raise httpx.ConnectError("refused")


@pytest.mark.parametrize("request_id", ["run-q7", "q7"])
def test_an_override_reaches_the_ledger_without_a_gateway(home: Path, monkeypatch: pytest.MonkeyPatch, request_id: str):
    ledger = ledger_with_a_request(home)
    monkeypatch.setattr("cluster.cli.override._post", no_gateway)
    result = seatrial("override", request_id, "--actor", "ana", "--reason", "wrong refund")
    assert result.exit_code == 0, result.output
    assert [(row["actor"], row["reason"]) for row in ledger.audit("run-q7")] == [("ana", "wrong refund")]
    ledger.close()


def test_an_override_of_an_unknown_request_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch):
    ledger_with_a_request(home).close()
    monkeypatch.setattr("cluster.cli.override._post", no_gateway)
    assert seatrial("override", "run-other", "--actor", "ana", "--reason", "r").exit_code == 2


def test_an_override_goes_to_the_path_of_the_request(home: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []

    def post(url: str, **_: object) -> httpx.Response:
        asked.append(url)
        return httpx.Response(200)

    monkeypatch.setattr("cluster.cli.override.httpx.post", post)
    words = ("--actor", "ana", "--reason", "r", "--url", "http://127.0.0.1:9/v1", "--json")
    found = json.loads(seatrial("override", "run-a~2", *words).stdout)
    assert asked == ["http://127.0.0.1:9/v1/requests/run-a~2/override"]
    assert found["run_id"] == "run-a~2"


def test_a_named_gateway_that_is_silent_is_infrastructure(home: Path):
    override = Override(request_id="run-q7", actor="ana", reason="r", url="http://127.0.0.1:1/v1")
    with pytest.raises(InfrastructureError, match="check --url"):
        record_override(override, home)


# --- a real process ---------------------------------------------------------------------------------------------------


def real(*words: str, home: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.cli", *words]
    environment = os.environ | {"SEATRIAL_HOME": str(home)} | environ
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )  # fmt: skip


def test_a_real_validate_of_the_articles_block(article: Path, home: Path):
    done = real("validate", str(article), home=home)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("valid: ")


def test_a_real_validate_of_a_misspelled_gate(article: Path, home: Path):
    article.write_text(ARTICLE.replace("rollback_under_5_minutes", "rollback_in_5_minutes"))
    done = real("validate", str(article), "--json", home=home)
    assert done.returncode == 2
    assert "did you mean 'rollback_under_5_minutes'?" in json.loads(done.stdout)["error"]
    assert not home.exists()


def test_debug_may_stand_anywhere(home: Path):
    assert "Traceback" not in real("validate", "nope", home=home).stderr
    assert "Traceback" in real("validate", "nope", "--debug", home=home).stderr
    assert "Traceback" in real("validate", "nope", home=home, SEATRIAL_DEBUG="1").stderr


def test_a_home_that_cannot_be_written_is_the_machines_fault(tmp_path: Path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = real("run", "support_desk", "--json", home=blocked / "home")
    assert done.returncode == 3
    assert "SEATRIAL_HOME" in json.loads(done.stdout)["error"]


def test_the_command_line_loads_nothing_heavy():
    code = "import sys, cluster.cli.app; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert not {"torch", "ray", "mlflow", "vllm", "transformers", "numpy", "rich.live"} & set(done.stdout.split())


def test_the_packaged_spec_is_the_articles_block_and_more():
    packaged = yaml.safe_load((ROOT / "cluster/workflows/support_desk/spec.yaml").read_text())
    assert packaged["release"]["gates"] == yaml.safe_load(ARTICLE)["release"]["gates"]
    assert load_spec("support_desk").workflow.policy_training == "ppo_kl"
