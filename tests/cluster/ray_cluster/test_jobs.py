"""Jobs: only the packages and the spec are shipped, and following a job ends, whatever the server does."""

from __future__ import annotations

import copy
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import jsonschema
import pytest
import yaml

from cluster.cli import submit as cli_submit
from cluster.cli.answer import Scene
from cluster.ray_cluster.connection import (
    MAX_MISSED_POLLS,
    PACKAGES,
    PROJECT_ROOT,
    SPEC_FILE,
    SUBMIT_PAUSE_S,
    connect,
    entrypoint,
    follow,
    stage_working_dir,
    submit,
)
from cluster.spec.spec import load_spec, override, parse_spec, spec_to_yaml
from rl_actors.contracts.errors import InfrastructureError


class FakeClient:
    """Answers a script of (status, log) pairs, an exception among them is raised; the last one repeats."""

    def __init__(self, script: Sequence[tuple[str, str] | Exception] = (("SUCCEEDED", ""),)) -> None:
        self.script = list(script)
        self.submitted: dict = {}
        self.shipped: list[str] = []

    def _now(self, *, advance: bool) -> tuple[str, str]:
        answer = self.script.pop(0) if advance and len(self.script) > 1 else self.script[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def get_job_status(self, job_id: str) -> str:
        if isinstance(self.script[0], Exception):
            return self._now(advance=True)[0]
        return self.script[0][0]

    def get_job_logs(self, job_id: str) -> str:
        return self._now(advance=True)[1]

    def submit_job(self, *, entrypoint: str, runtime_env: dict) -> str:
        if isinstance(self.script[0], Exception):
            raise self.script[0]
        folder = Path(runtime_env["working_dir"])
        self.shipped = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        self.submitted = {"entrypoint": entrypoint, "folder": folder, "env": runtime_env["env_vars"]}
        return "raysubmit_1"


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def followed(client: FakeClient, timeout_s: float = 100.0) -> tuple[str, str]:
    written: list[str] = []
    time = Time()
    ending = follow(client, "j", written.append, timeout_s=timeout_s, clock=time.clock, sleep=time.sleep)
    return ending.status, "".join(written)


def test_the_log_is_printed_once_and_whole():
    script = [
        ("PENDING", ""),
        ("RUNNING", "a\n"),
        ("RUNNING", "a\nb\n"),
        ("RUNNING", "a\nb\n"),
        ("SUCCEEDED", "a\nb\nc\n"),
    ]
    assert followed(FakeClient(script)) == ("SUCCEEDED", "a\nb\nc\n")


@pytest.mark.parametrize("status", ["FAILED", "STOPPED"])
def test_a_job_that_fails_is_reported_as_such(status: str):
    written: list[str] = []
    ending = follow(FakeClient([(status, "why")]), "j", written.append, timeout_s=1)
    assert (ending.status, ending.succeeded, written) == (status, False, ["why"])


@pytest.mark.parametrize(
    ("log", "missing"),
    [
        ("Traceback\n  File x\nModuleNotFoundError: No module named 'typer'\n", "typer"),
        ("ModuleNotFoundError: No module named 'typer'\nand then it went on\n", ""),
        ("error: spec = 'x': no such file\n", ""),
        ("", ""),
    ],
)
def test_a_cluster_without_the_dependencies_is_told_from_a_run_that_failed(log: str, missing: str):
    ending = follow(FakeClient([("FAILED", log)]), "j", lambda _text: None, timeout_s=1)
    assert ending.missing_module == missing


def test_submit_says_what_the_cluster_lacks(monkeypatch: pytest.MonkeyPatch):
    client = FakeClient([("FAILED", "ModuleNotFoundError: No module named 'typer'\n")])
    monkeypatch.setattr(cli_submit, "connect", lambda _address: client)
    with pytest.raises(InfrastructureError, match="the cluster's python has no 'typer'; start Ray from an activated"):
        cli_submit.submit_and_follow(
            load_spec("support_desk"), "http://here", Scene(), write=lambda _text: None, timeout_s=1.0
        )


def test_a_job_that_never_ends_is_left_alone_after_the_bound():
    with pytest.raises(InfrastructureError, match=r"did not end within 30 s.*ray job stop j"):
        followed(FakeClient([("RUNNING", "x")]), timeout_s=30)


def test_a_short_outage_is_waited_out_and_a_long_one_is_not():
    outage = ConnectionError("refused")
    assert followed(FakeClient([outage, outage, ("SUCCEEDED", "done")])) == ("SUCCEEDED", "done")
    with pytest.raises(InfrastructureError, match=f"did not answer {MAX_MISSED_POLLS} times"):
        followed(FakeClient([outage]))


def test_what_is_shipped_is_the_packages_and_the_spec_alone(tmp_path: Path):
    for name in (".venv/lib", ".git", "cluster/__pycache__", "cluster/workflows", "serving", "rl_actors", "benchmarks"):
        (tmp_path / "root" / name).mkdir(parents=True)
        (tmp_path / "root" / name / "file.py").write_text("")
    (tmp_path / "root" / "cluster" / ".secret").write_text("")
    target = stage_working_dir("a: 1", tmp_path / "target", tmp_path / "root")
    files = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
    assert files == ["cluster/workflows/file.py", "rl_actors/file.py", "serving/file.py", SPEC_FILE]


def test_a_submitted_job_carries_the_spec_and_its_environment():
    client = FakeClient()
    spec = load_spec("support_desk")
    job_id = submit(client, spec_to_yaml(spec), entrypoint(), {"SEATRIAL_HOME": "/shared"})  # type: ignore[arg-type]
    assert job_id == "raysubmit_1"
    assert client.submitted["env"] == {"SEATRIAL_HOME": "/shared"}
    assert {name.split("/")[0] for name in client.shipped} == {*PACKAGES, SPEC_FILE}
    assert "cluster/workflows/support_desk/spec.yaml" in client.shipped
    assert not any("__pycache__" in name or name.startswith(".") for name in client.shipped)
    assert not client.submitted["folder"].exists(), "the copy is removed once Ray has uploaded it"


def test_the_shipped_spec_is_the_one_that_was_asked_for(tmp_path: Path):
    spec = load_spec("support_desk")
    target = stage_working_dir(spec_to_yaml(spec), tmp_path / "t")
    assert parse_spec((target / SPEC_FILE).read_text()) == spec


def test_the_entry_point_survives_the_shell():
    command = entrypoint("/opt/my env/bin/python", ("--resume",))
    words = shlex.split(command)
    assert words == ["/opt/my env/bin/python", "-m", "cluster.cli", "run", SPEC_FILE, "--address", "auto", "--resume"]


def test_a_cluster_that_refuses_is_an_infrastructure_failure():
    client = FakeClient([RuntimeError("no room")])
    with pytest.raises(InfrastructureError, match="refused the job: no room"):
        submit(client, "a: 1", entrypoint())  # type: ignore[arg-type]


class LateAgent(FakeClient):
    """A cluster whose agent is there after some refusals."""

    def __init__(self, refusals: int) -> None:
        super().__init__()
        self.refusals = refusals

    def submit_job(self, *, entrypoint: str, runtime_env: dict) -> str:
        self.refusals -= 1
        if self.refusals >= 0:
            raise RuntimeError("status code 500: No available agent to submit job, please try again later..")
        return super().submit_job(entrypoint=entrypoint, runtime_env=runtime_env)


def test_a_cluster_that_has_just_started_gets_a_minute():
    pauses: list[float] = []
    assert submit(LateAgent(3), spec_to_yaml(load_spec("support_desk")), "true", sleep=pauses.append) == "raysubmit_1"
    assert pauses == [SUBMIT_PAUSE_S] * 3
    pauses.clear()
    with pytest.raises(InfrastructureError, match=r"the cluster refused the job: .*No available agent"):
        submit(LateAgent(1000), spec_to_yaml(load_spec("support_desk")), "true", sleep=pauses.append)
    assert 50 <= sum(pauses) <= 60


def test_no_job_server_is_named_with_its_address():
    with pytest.raises(InfrastructureError, match=r"no Ray job server at http://127\.0\.0\.1:9"):
        connect("http://127.0.0.1:9")


def test_a_job_server_that_asks_for_a_token_says_where_it_is(monkeypatch: pytest.MonkeyPatch):
    import ray.job_submission
    from ray.exceptions import AuthenticationError

    def refuse(address: str) -> None:
        raise AuthenticationError("Missing authentication token")

    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", refuse)
    with pytest.raises(
        InfrastructureError, match=r"http://head:8265 asks for a token; copy the cluster's ~/\.ray/auth"
    ):
        connect("http://head:8265")


@pytest.mark.ray
@pytest.mark.idle
def test_a_real_job_server_runs_what_was_shipped():
    """The job finds the shipped packages and spec, not this checkout; a failing one is reported as failed."""
    import ray

    program = (
        "import cluster.ray_cluster.connection as j, cluster.spec.spec as s; "
        f"print('ran', s.load_spec({SPEC_FILE!r}).seed, str(j.PROJECT_ROOT) != {str(PROJECT_ROOT)!r})"
    )
    context = ray.init(
        address="local", num_cpus=1, num_gpus=0, include_dashboard=True, dashboard_port=0, log_to_driver=False
    )
    try:
        client = connect(f"http://{context.dashboard_url}")
        spec_text = spec_to_yaml(override(load_spec("support_desk"), ["seed=41"]))
        written: list[str] = []
        job_id = submit(client, spec_text, shlex.join([sys.executable, "-c", program]))
        ending = follow(client, job_id, written.append, timeout_s=120, poll_s=0.5)
        assert ending.succeeded, written
        assert "ran 41 True" in "".join(written)
        failing = submit(client, spec_text, shlex.join([sys.executable, "-c", "raise SystemExit(2)"]))
        assert follow(client, failing, written.append, timeout_s=120, poll_s=0.5).status == "FAILED"
    finally:
        ray.shutdown()


CLUSTER = yaml.safe_load((PROJECT_ROOT / "ray_cluster.yaml").read_text())


def validate(config: dict) -> dict:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def test_the_cluster_file_is_valid_for_ray():
    prepared = validate(CLUSTER)
    assert prepared["max_workers"] == 4


def test_the_head_has_no_gpu_and_the_workers_do():
    types = CLUSTER["available_node_types"]
    head = types[CLUSTER["head_node_type"]]
    workers = [node for name, node in types.items() if name != CLUSTER["head_node_type"]]
    assert "GPU" not in head["resources"]
    assert workers
    assert all(node["resources"]["GPU"] >= 1 and node["min_workers"] >= 1 for node in workers)


def test_the_job_server_is_not_open_to_the_network():
    # It has no login: whoever reaches it runs code.
    starts = [line for line in CLUSTER["head_start_ray_commands"] if "ray start" in line]
    assert starts
    assert all("--dashboard-host=127.0.0.1" in line for line in starts)


@pytest.mark.parametrize(
    "change", [{"max_worker": 3}, {"available_node_types": {"a": {"cpus": 3}}}, {"cluster_name": 3}]
)
def test_a_wrong_cluster_file_is_caught_by_the_same_validator(change: dict):
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        validate(CLUSTER | change)
