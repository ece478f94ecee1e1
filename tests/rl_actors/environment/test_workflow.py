"""Adding a folder is enough: a second workflow, found by the environment, runs in real tool hosts."""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.workflows import PATH_VARIABLE, known_workflows, locate_workflow
from rl_actors.agent.executor import Toolset
from rl_actors.agent.rollout import RolloutPorts, run_rollout
from rl_actors.contracts.rollouts import Rollout
from rl_actors.contracts.tasks import RolloutRequest
from rl_actors.environment import Annotator, Demonstrator, TaskSource, Verifier, WorkflowRef
from rl_actors.sandbox.process import ProcessSandbox
from tests.rl_actors.fakes import LIMITS, ScriptedEngine, Step, call, final, plan, renderer

NAME = "parcel_counter"
PACKAGE = """
from __future__ import annotations

from rl_actors.contracts import Outcome, Task


class ParcelCounter:
    name = "parcel_counter"
    system_prompt = "Count parcels."
    tools_module = "parcel_counter.tools"
    intents = ("count",)
    rubric = ()
    num_annotators = 0
    tickets_per_day = 50
    critical_checks = ()

    def build_tasks(self, split, count, seed):
        return [
            Task(
                task_id=f"{self.name}/{split}/{i}", workflow=self.name, split=split, intent="count",
                prompt=f"shelf {i}",
                world={"shelf": i, "parcels": i + 2}, goal={"selector": {}, "parcels": i + 2}, seed=seed,
            )
            for i in range(count)
        ]

    def verify(self, task, state, reply):
        honest = str(task.goal["parcels"]) in reply
        return Outcome(success=honest and state["counted"] == 1, violations=(), reasons=())

    def check_reply(self, reply, run):
        return {"polite": "please" not in reply}


WORKFLOW = ParcelCounter()
"""
TOOLS = """
from __future__ import annotations

from rl_actors.environment import ToolFailure, ToolSpec

_SHELF = {"type": "object", "properties": {"shelf": {"type": "integer"}}, "required": ["shelf"]}


def count_parcels(handle, shelf):
    if shelf != handle["shelf"]:
        raise ToolFailure(f"no shelf {shelf}")
    handle["counted"] += 1
    return {"parcels": handle["parcels"]}


class Counter:
    tools = (ToolSpec(name="count_parcels", description="Count.", parameters=_SHELF, side_effect="read"),)
    functions = {"count_parcels": count_parcels}

    def open(self, world):
        return {**world, "counted": 0}

    def read_state(self, handle, selector):
        return {"counted": handle["counted"]}

    def close(self, handle):
        handle.clear()


WORLD = Counter()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with one workflow in it; nothing else is done, and all is forgotten afterwards."""
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "__init__.py").write_text(PACKAGE)
    (tmp_path / NAME / "tools.py").write_text(TOOLS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv(PATH_VARIABLE, str(tmp_path))
    yield tmp_path
    for module in [name for name in sys.modules if name.partition(".")[0] == NAME]:
        del sys.modules[module]


def attempt(script: list[Step]) -> Rollout:
    """What a rollout worker does with a workflow it has only the name of."""
    workflow = pickle.loads(pickle.dumps(locate_workflow(NAME))).load()
    tools = __import__(workflow.tools_module, fromlist=["WORLD"]).WORLD.tools

    async def run() -> Rollout:
        hosts = ProcessSandbox(workflow.tools_module, num_hosts=1)
        ports = RolloutPorts(
            workflow=workflow, renderer=renderer(), toolset=Toolset(tools), sandbox=hosts,
            generate=ScriptedEngine(script), limits=LIMITS,
        )  # fmt: skip
        try:
            task = workflow.build_tasks("train", 3, 1)[2]
            return await run_rollout(RolloutRequest(task=task, group_id=0, seed=1), ports, temperature=1.0)
        finally:
            await hosts.close()

    return asyncio.run(run())


def test_a_workflow_in_a_folder_runs_end_to_end(folder: Path):
    rollout = attempt([plan(1), call("count_parcels", shelf=2), final("There are 4.")])
    assert rollout.outcome.success
    assert (rollout.status, rollout.tool_error_count) == ("ok", 0)
    assert rollout.turns[1].tool_result is not None
    assert rollout.turns[1].tool_result.content == '{"parcels":4}'
    assert rollout.policy_checks == {"polite": True}


@pytest.mark.parametrize(
    ("script", "errors"),
    [
        ([plan(1), final("There are 4.")], 0),  # guessed
        ([plan(1), call("count_parcels", shelf=2), final("There are 5.")], 0),  # counted and lied
        ([plan(1), call("count_parcels", shelf=1), final("There are 4.")], 1),  # another shelf
        ([plan(1), call("count_parcels", shelf="2"), final("There are 4.")], 1),  # refused by the schema
    ],
)
def test_its_own_verifier_decides(folder: Path, script: list[Step], errors: int):
    rollout = attempt(script)
    assert not rollout.outcome.success
    assert rollout.tool_error_count == errors


def test_without_the_environment_there_is_no_such_workflow(folder: Path):
    assert NAME in known_workflows()
    assert NAME not in known_workflows({})


def test_a_reference_loads_in_a_process_that_knows_nothing(folder: Path):
    reference = pickle.dumps(locate_workflow(NAME))
    code = (
        f"import pickle; w = pickle.loads({reference!r}).load(); print(w.name, w.build_tasks('train', 1, 0)[0].prompt)"
    )
    environ = {name: value for name, value in os.environ.items() if name != PATH_VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "parcel_counter shelf 0\n"


def test_a_workflow_says_by_its_methods_which_parts_it_has(folder: Path):
    parts = (TaskSource, Verifier, Demonstrator, Annotator)
    desk, counter = locate_workflow("support_desk").load(), locate_workflow(NAME).load()
    assert [isinstance(desk, part) for part in parts] == [True] * 4
    assert [isinstance(counter, part) for part in parts] == [True, True, False, False]


def test_a_rubric_without_annotators_is_no_part():
    """Half of a part must not pass for one: the stage that needs it would fail after hours."""
    half = SimpleNamespace(rubric=(), num_annotators=3, annotate=lambda run, annotator, rng: {})
    assert not isinstance(half, Annotator)
    half.prefer = lambda first, second, annotator, rng: 0
    assert isinstance(half, Annotator)


def test_a_reference_without_a_search_path_leaves_the_path_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = list(sys.path)
    assert WorkflowRef(module="cluster.workflows.support_desk").load().name == "support_desk"
    assert sys.path == before


def test_a_search_path_is_added_once(folder: Path):
    reference = WorkflowRef(module=NAME, search_path=str(folder))
    assert reference.load() is reference.load()
    assert sys.path.count(str(folder)) == 1
    with pytest.raises(ModuleNotFoundError, match="parcel_counters"):
        replace(reference, module="parcel_counters").load()
