"""Adding a second workflow means adding a folder: its words on the command line, its data, its tools, its verifier."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cluster.cli import runs as cli_runs
from cluster.cli.app import app
from cluster.cli.runs import RunRequest, latest_unfinished, open_run, record_spec, requested_spec
from cluster.cli.submit import shipped_variables
from cluster.pipeline.snapshot import read_demonstrations, read_tasks
from cluster.plan.preflight import Machine
from cluster.records.run_folder import RunFolder
from cluster.records.summary import RunPaths, RunSummary
from cluster.spec.spec import WorkflowSpec, load_spec, override
from cluster.workflows import PATH_VARIABLE
from rl_actors.agent.executor import Toolset
from rl_actors.agent.renderers.harmony import HarmonyRenderer
from rl_actors.agent.rollout import RolloutPorts, run_rollout
from rl_actors.contracts import Demonstration, RolloutRequest, Task
from rl_actors.contracts.errors import BadDataError, BadInputError
from rl_actors.contracts.rollouts import Rollout
from rl_actors.sandbox.process import ProcessSandbox
from tests.cluster.pipeline.fakes import SMALL, DeskRun, build_model, freeze_data
from tests.rl_actors.fakes import ScriptedEngine

NAME = "night_desk"
PACKAGE = """
from dataclasses import replace

from cluster.workflows.support_desk import SupportDesk


class NightDesk(SupportDesk):
    name = "night_desk"
    tools_module = "night_desk.tools"
    most_tasks = {"live": 40, "frozen": 200}

    def build_tasks(self, split, count, seed):
        tasks = super().build_tasks(split, count, seed)
        return [replace(t, task_id=t.task_id.replace("support_desk", self.name), workflow=self.name) for t in tasks]

    def demonstrate(self, task, rng):
        return replace(super().demonstrate(task, rng), task_id=task.task_id)


WORKFLOW = NightDesk()
"""
TOOLS = """
from cluster.workflows.support_desk.tools import WORLD as DAY


class NightWorld:
    tools = DAY.tools
    functions = DAY.functions
    open = DAY.open
    close = DAY.close
    read_state = DAY.read_state


WORLD = NightWorld()
"""
DEEDS = {"refund", "cancel", "change_address", "send_invoice", "damage_note"}  # nothing that a reply alone could do
GOOD_MACHINE = Machine(
    python=(3, 11), compiler="c++", ninja="ninja", disk_bytes=2**40, memory_bytes=2**40, shm_bytes=2**40, gpus=0,
    port_is_free=True, home_is_writable=True,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[Path]:
    """A folder with one workflow in it, named by the environment; nothing else is done, and all is forgotten after."""
    package = tmp_path / "workflows" / NAME
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(PACKAGE)
    (package / "tools.py").write_text(TOOLS)
    text = Path("cluster/workflows/support_desk/spec.yaml").read_text()
    text = text.replace("name: support_desk", f"name: {NAME}").replace("num_live: 4000", "num_live: 20")
    (package / "spec.yaml").write_text(text + "seed: 5\nagent: {tool_calls: 5}\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv(PATH_VARIABLE, str(package.parent))
    monkeypatch.setattr(cli_runs, "probe_machine", lambda _spec, _home: GOOD_MACHINE)
    yield package.parent
    for module in [name for name in sys.modules if name.partition(".")[0] == NAME]:
        del sys.modules[module]


def small() -> WorkflowSpec:
    return override(load_spec(NAME), [*SMALL])


@pytest.fixture
def night(folder: Path, home: Path) -> DeskRun:
    """A run of it, put together as the pipeline does."""
    spec, run_folder = small(), RunFolder.of(home, "night-1")
    run_folder.root.mkdir(parents=True)
    return DeskRun(spec, run_folder, NAME)


def seatrial(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


# --- words on the command line ----------------------------------------------------------------------------------------


def test_validate_and_plan_know_it_by_name(folder: Path):
    assert f"valid: workflow {NAME}, 4 gates" in seatrial("validate", NAME).stdout
    assert json.loads(seatrial("validate", NAME, "--json").stdout)["spec"]["seed"] == 5
    answer = json.loads(seatrial("plan", NAME, "--json").stdout)
    assert answer["plan"]["tickets_given"] == 20
    assert answer["comparison"]["changes"] == []
    changed = json.loads(seatrial("plan", NAME, "--set", "seed=6", "--json").stdout)
    assert [change["knob"] for change in changed["comparison"]["changes"]] == ["seed"]


def test_without_the_folder_it_is_unknown(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(PATH_VARIABLE)
    for command in ("validate", "plan", "run", "submit"):
        result = seatrial(command, NAME)
        assert result.exit_code == 2
        assert PATH_VARIABLE in result.stderr, "the remedy"


def test_a_spec_of_ones_own_is_planned_where_the_workflow_brings_none(folder: Path, tmp_path: Path):
    own = tmp_path / "own.yaml"
    (folder / NAME / "spec.yaml").rename(own)
    assert seatrial("plan", str(own)).exit_code == 0
    refused = seatrial("plan", NAME)
    assert refused.exit_code == 2
    assert str(folder / NAME / "spec.yaml") in "".join(refused.stderr.split("\n"))


def test_run_reaches_the_pipeline_with_it(folder: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[str] = []

    def run_pipeline(
        spec: WorkflowSpec, run_folder: RunFolder, _watch: Any, until: str, begin: Callable[[], None]
    ) -> RunSummary:
        begin()
        seen.append(f"{spec.workflow.name}{until}")
        return RunSummary(
            run_id=run_folder.run_id, workflow=NAME, stages=(), trained=(), offline=(), releases=(), stable_policy="p",
            bundle_id="b" * 64, exit_code=0, paths=RunPaths(folder=str(run_folder.root)),
        )  # fmt: skip

    monkeypatch.setattr("cluster.pipeline.run_pipeline", run_pipeline)
    assert seatrial("run", NAME, "--json").exit_code == 0
    assert seen == [NAME]


@pytest.mark.parametrize(
    ("setting", "field", "most"),
    [("data.num_live=21", "data.num_live", 20), ("data.num_frozen=201", "data.num_frozen", 200)],
)
def test_more_tasks_than_it_has_are_refused_before_anything_starts(folder: Path, setting: str, field: str, most: int):
    """Live tickets are built for two releases; `most` itself is fine."""
    request = RunRequest(spec=NAME, settings=[setting])
    with pytest.raises(BadInputError, match=f"night_desk has tasks for at most {most}; lower it") as caught:
        requested_spec(request)
    assert (caught.value.field, caught.value.exit_code) == (field, 2)
    assert requested_spec(replace(request, settings=[f"{field}={most}"])).data.num_live == 20


def test_a_package_that_cannot_be_imported_is_refused_by_validate(folder: Path):
    (folder / NAME / "__init__.py").write_text("import no_such_thing\n")
    result = seatrial("validate", NAME)
    assert result.exit_code == 2
    assert "cannot be imported: No module named 'no_such_thing'" in " ".join(result.stderr.split())


def test_resuming_another_workflow_steps_over_its_runs(folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch):
    """Without the folder, night_desk's own spec cannot be read any more; nobody asked for it."""
    for name in ("support_desk", NAME):
        spec, run_folder = open_run(RunRequest(spec=name, run_id=f"run-{name}"), home)
        record_spec(spec, run_folder)
    monkeypatch.delenv(PATH_VARIABLE)
    assert latest_unfinished(home, "support_desk").run_id == "run-support_desk"
    with pytest.raises(BadInputError, match="no unfinished run of day_desk"):
        latest_unfinished(home, "day_desk")


def test_submit_ships_where_workflows_lie(folder: Path, monkeypatch: pytest.MonkeyPatch, home: Path):
    """As absolute paths: the job starts elsewhere."""
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv(PATH_VARIABLE, f"workflows{os.pathsep}")
    submitted: list[dict[str, Any]] = []

    def submit_job(**job: Any) -> str:
        submitted.append(job)
        return "raysubmit_1"

    client = SimpleNamespace(
        submit_job=submit_job, get_job_status=lambda _id: "SUCCEEDED", get_job_logs=lambda _id: "ok\n"
    )
    monkeypatch.setattr("cluster.cli.submit.connect", lambda _address: client)
    assert seatrial("submit", NAME).exit_code == 0
    variables = submitted[0]["runtime_env"]["env_vars"]
    assert variables == {"SEATRIAL_HOME": str(home), PATH_VARIABLE: str(folder)}


def test_submit_ships_no_folder_that_is_not_there(tmp_path: Path):
    assert shipped_variables({}) == shipped_variables({PATH_VARIABLE: "", "PATH": "/bin"}) == {}
    with pytest.raises(BadInputError, match="not a folder"):
        shipped_variables({PATH_VARIABLE: str(tmp_path / "nowhere")})


# --- its data and its tools -------------------------------------------------------------------------------------------


def test_its_data_is_frozen_and_a_base_model_built_on_it(night: DeskRun):
    snapshot = freeze_data(night)
    assert snapshot.num_tasks["live"] == 12
    tasks = read_tasks(snapshot, "train")
    assert {task.workflow for task in tasks} == {NAME}
    assert tasks[0].task_id.startswith(f"{NAME}/train/")
    assert [item.task_id for item in read_demonstrations(snapshot)] == [task.task_id for task in tasks]
    assert HarmonyRenderer.from_directory(build_model(night, snapshot).path).vocabulary


def test_too_many_live_tasks_would_have_been_refused_here_only_later(night: DeskRun):
    """Negative control of the check before the start: the snapshot itself asks nobody."""
    night.spec = override(night.spec, ["data.num_live=30"])
    assert freeze_data(night).num_tasks["live"] == 60 > 40


def script_of(renderer: HarmonyRenderer, attempt: Demonstration) -> list[list[int]]:
    """What an engine would have to sample to do as the expert did."""
    steps = [renderer.call("plan", {"steps": ["look"], "tool_budget": 4})]
    for turn in attempt.turns:
        if turn.kind == "tool":
            steps.append(renderer.call(turn.tool, turn.arguments))
    return [*steps, renderer.final(attempt.turns[-1].text)]


def attempt(run: DeskRun, task: Task, renderer: HarmonyRenderer, script: list[list[int]]) -> Rollout:
    """What a rollout worker does, with the run's own limits, real tool hosts and a scripted engine."""
    tools = __import__(run.workflow.tools_module, fromlist=["WORLD"]).WORLD.tools

    async def roll() -> Rollout:
        hosts = ProcessSandbox(run.workflow.tools_module, num_hosts=1)
        ports = RolloutPorts(
            workflow=run.workflow_ref.load(), renderer=renderer, toolset=Toolset(tools), sandbox=hosts,
            generate=ScriptedEngine(script), limits=replace(run.limits, max_context_tokens=4096),
        )  # fmt: skip
        try:
            return await run_rollout(RolloutRequest(task=task, group_id=0, seed=1), ports, temperature=1.0)
        finally:
            await hosts.close()

    return asyncio.run(roll())


def test_its_tools_run_and_its_verifier_decides(night: DeskRun):
    snapshot = freeze_data(night)
    renderer = HarmonyRenderer.from_directory(build_model(night, snapshot).path)
    demonstrations = {item.task_id: item for item in read_demonstrations(snapshot)}
    task = next(task for task in read_tasks(snapshot, "train") if task.intent in DEEDS)
    script = script_of(renderer, demonstrations[task.task_id])
    rollout = attempt(night, task, renderer, script)
    assert (rollout.task_id, rollout.status, rollout.tool_error_count) == (task.task_id, "ok", 0)
    assert rollout.tool_calls_count > 0
    assert rollout.outcome.success
    assert not attempt(night, task, renderer, [script[0], script[-1]]).outcome.success, "negative control: a guess"


def test_a_package_without_a_workflow_is_refused(folder: Path):
    (folder / NAME / "__init__.py").write_text("")
    with pytest.raises(BadDataError, match="must define WORKFLOW"):
        requested_spec(RunRequest(spec=NAME))
