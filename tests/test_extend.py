"""README's "Extend": each recipe followed to the letter in a copy of the tree, and what it added then used."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house import PACKAGES, ROOT

SPEC = "cluster/workflows/support_desk/spec.yaml"


# --- the table --------------------------------------------------------------------------------------------------------


def recipes(readme: str) -> dict[str, str]:
    """What to add -> what to do, as the table says it."""
    section = readme.partition("\n## Extend\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return {row[0]: row[1] for row in rows[2:]}


RECIPES = recipes((ROOT / "README.md").read_text(encoding="utf-8"))


def files_of(recipe: str) -> list[str]:
    """The files and folders of this repository that a recipe names."""
    return [name for name in re.findall(r"`([^`]+)`", recipe) if "/" in name]


def absent(recipe: str, *names: str) -> list[str]:
    """Names that the recipe does not say, or that its files do not hold."""
    paths = [ROOT / name for name in files_of(recipe)]
    text = "".join(path.read_text(encoding="utf-8") for path in paths if path.is_file())
    return [name for name in names if f"`{name}`" not in recipe or name not in text]


def test_the_table_has_the_six_kinds():
    assert list(RECIPES) == [
        "a workflow", "a tool", "a reward term", "a gate", "a monitor", "an update",
    ]  # fmt: skip


@pytest.mark.parametrize("what", RECIPES)
def test_every_file_that_a_recipe_names_is_there(what: str):
    assert files_of(RECIPES[what])
    assert [name for name in files_of(RECIPES[what]) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("a workflow", ["Workflow", "World", "WORKFLOW"]),
        ("a tool", ["ToolSpec", "WORLD", "functions", "tools", "_TOOLS"]),
        ("a reward term", ["REWARD_TERMS"]),
        ("an update", ["Recipe", "RECIPES", "dapo"]),
    ],
)
def test_what_a_recipe_names_is_in_its_files(what: str, names: list[str]):
    assert absent(RECIPES[what], *names) == []


def test_a_file_or_name_that_is_not_there_is_seen():
    recipe = "a function and an entry in `GATES` of `serving/gates.py`, by `Nothing` of `tests/house.py`"
    assert recipes(f"\n## Extend\n\n| to add | do |\n|---|---|\n| x | {recipe} |\n\n## Next\n| y | z |") == {
        "x": recipe
    }
    assert [name for name in files_of(recipe) if not (ROOT / name).exists()] == ["serving/gates.py"]
    assert absent(recipe, "GATES", "Nothing") == ["GATES", "Nothing"]


# --- the tree that is added to ----------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the packages, before anything was added."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def add(path: Path, text: str, *, after: str) -> None:
    """Insert text behind the only line that begins so."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    (place,) = [number for number, line in enumerate(lines) if line.startswith(after)]
    path.write_text("".join([*lines[: place + 1], text, *lines[place + 1 :]]), encoding="utf-8")


def python(tree: Path, *words: str, workflows: str = "") -> subprocess.CompletedProcess[str]:
    """Run Python on the packages of the tree; the tests' own fakes come from this repository."""
    kept = {name: value for name, value in os.environ.items() if name != "SEATRIAL_WORKFLOWS"}
    paths = {"PYTHONPATH": f"{tree}{os.pathsep}{ROOT}", "SEATRIAL_HOME": str(tree / "home")}
    environ = kept | paths | ({"SEATRIAL_WORKFLOWS": workflows} if workflows else {})
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=tree, env=environ, capture_output=True, text=True, timeout=240, check=False)


def answer(tree: Path, script: str) -> object:
    """Return what a script printed last, as JSON; the packages must be those of the tree."""
    done = python(tree, "-c", f"import json, cluster, rl_actors, serving\n{script}\nprint(cluster.__file__)")
    assert done.returncode == 0, done.stderr
    *_, value, place = done.stdout.splitlines()
    assert place == str(tree / "cluster/__init__.py")
    return json.loads(value)


def seatrial(tree: Path, *words: str, workflows: str = "") -> tuple[int, dict[str, object]]:
    """Return exit code and answer of a command line."""
    done = python(tree, "-m", "cluster.cli", *words, "--json", workflows=workflows)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


# --- a gate -----------------------------------------------------------------------------------------------------------

GATE_FILE = '''
"""Replies that hold no word."""

from __future__ import annotations

from serving.contracts import LiveEvidence, ReleasePlan
from serving.gates.registry import Finding, gate


@gate("no_empty_reply")
def find_empty_replies(evidence: LiveEvidence, plan: ReleasePlan) -> Finding:
    """Judge by the check of the same kind."""
    count = evidence.failed_checks.get("non_empty", 0)
    return "fail" if count else "pass", f"{count} empty replies", {"num_runs": count}
'''
GATE_USED = """
from dataclasses import replace
from cluster.reports.locales import strings_of
from serving.contracts import ARTICLE_GATES
from serving.release.monitors import evaluate_live
from tests.serving.fakes import good_evidence, make_plan
plan = make_plan(gates=(*ARTICLE_GATES, "no_empty_reply"))
worlds = good_evidence(), replace(good_evidence(), failed_checks={"non_empty": 2})
found = [{each.gate: each.verdict for each in evaluate_live(world, plan)}["no_empty_reply"] for world in worlds]
words = [strings_of(locale)["gate.no_empty_reply"] for locale in ("en-GB", "en-US", "fr")]
print(json.dumps(found + words))
"""


def add_gate(tree: Path) -> None:
    (tree / "serving/gates/empty_reply.py").write_text(GATE_FILE, encoding="utf-8")
    for strings in (tree / "cluster/reports/strings").iterdir():
        add(strings, '  "gate.no_empty_reply": "no empty reply",\n', after='  "gate.candidate_healthy"')


def test_a_gate(tree: Path):
    text = (tree / SPEC).read_text(encoding="utf-8")
    (tree / "spec.yaml").write_text(text.replace("  ramp:", "    - no_empty_reply\n  ramp:"), encoding="utf-8")
    code, refusal = seatrial(tree, "validate", "spec.yaml")
    assert (code, refusal["field"], refusal["value"]) == (2, "release.gates.4", "no_empty_reply")
    add_gate(tree)
    code, valid = seatrial(tree, "validate", "spec.yaml")
    assert code == 0, valid
    assert valid["spec"]["release"]["gates"][4] == "no_empty_reply"  # type: ignore[index]
    code, plan = seatrial(tree, "plan", "spec.yaml", "--explain", "release.gates")
    assert code == 0, plan
    assert "no_empty_reply" in plan["explained"][0]["limits"]  # type: ignore[index]
    assert answer(tree, GATE_USED) == ["pass", "fail", *["no empty reply"] * 3]


# --- a reward term ----------------------------------------------------------------------------------------------------

TERM = '''
def _brevity(_mix: RewardMix, rollout: Rollout, _critic_score: float) -> float:
    """A tenth less for each turn."""
    return -0.1 * len(rollout.turns)


'''
TERM_USED = """
from rl_actors.algorithms.rewards import RewardMix
from tests.rl_actors.fakes import make_rollout
rollout = make_rollout()
score = RewardMix(outcome_weight=0.8).score(rollout, 0.5, rubric={}, reward_model_version="rm")
print(json.dumps([score.reward, score.outcome_reward, len(rollout.turns)]))
"""


@pytest.mark.slow
def test_a_reward_term(tree: Path):
    rewards = tree / "rl_actors/algorithms/rewards.py"
    add(rewards, '    "brevity": _brevity,\n', after="REWARD_TERMS: ")
    add(rewards, TERM, after="RewardTerm = ")
    found, outcome, num_turns = answer(tree, TERM_USED)  # type: ignore[misc]
    assert num_turns > 0
    assert found == pytest.approx(0.8 * outcome + 0.2 * 0.5 - 0.1 * num_turns)


# --- a tool -----------------------------------------------------------------------------------------------------------

TOOL = '''
def count_orders(desk: Desk, customer_id: str) -> dict[str, Any]:
    """Return how many orders a customer has."""
    statement = "SELECT COUNT(*) FROM orders WHERE customer_id = ?"
    return {"orders": desk.connection.execute(statement, (customer_id,)).fetchone()[0]}


'''
TOOL_USED = """
import asyncio
from cluster.workflows import find_workflow
from rl_actors.agent import RolloutPorts, Toolset, run_rollout
from rl_actors.contracts import RolloutRequest
from rl_actors.sandbox import ProcessSandbox
from tests.rl_actors.fakes import LIMITS, ScriptedEngine, call, final, plan, renderer
from cluster.workflows.support_desk.tools import WORLD

async def attempt():
    workflow = find_workflow("support_desk")
    task = next(task for task in workflow.build_tasks("train", 60, 0) if task.intent == "order_status")
    customer = task.world["customers"][0]["customer_id"]
    script = [plan(1), call("count_orders", customer_id=customer), call("count_orders", customer_id="x"), final("ok")]
    sandbox = ProcessSandbox(workflow.tools_module, num_hosts=1)
    ports = RolloutPorts(workflow=workflow, renderer=renderer(), toolset=Toolset(WORLD.tools), sandbox=sandbox,
                         generate=ScriptedEngine(script), limits=LIMITS)
    try:
        return task, await run_rollout(RolloutRequest(task=task, group_id=0, seed=1), ports, temperature=1.0)
    finally:
        await sandbox.close()

task, rollout = asyncio.run(attempt())
answers = [turn.tool_result.content for turn in rollout.turns if turn.tool_result is not None]
print(json.dumps([len(task.world["orders"]), rollout.status, rollout.tool_error_count, *answers]))
"""


@pytest.mark.slow
def test_a_tool(tree: Path):
    """Called by a rollout, in a tool host of its own, with arguments held to its schema."""
    tools = tree / "cluster/workflows/support_desk/tools.py"
    add(tools, '    _tool(count_orders, "Orders of a customer.", "read", customer_id=_CUSTOMER),\n', after="_TOOLS = (")
    add(tools, TOOL, after="_REASON = ")
    num_orders, status, num_errors, *answers = answer(tree, TOOL_USED)  # type: ignore[misc]
    assert (status, num_errors) == ("ok", 1)
    assert f'{{"orders":{num_orders}}}' in answers
    assert any("error" in text for text in answers), "refused by its schema"


# --- a workflow -------------------------------------------------------------------------------------------------------

WORKFLOW = '''
"""Count parcels on shelves."""
from rl_actors.contracts import Demonstration, DemonstrationTurn, Outcome, Task
from rl_actors.environment import RubricCriterion


class ParcelCounter:
    name = "parcel_counter"
    system_prompt = "Count parcels."
    tools_module = "parcel_counter.tools"
    intents = ("count",)
    rubric = (RubricCriterion(name="right", question="Is it right?", low=0, high=1, weight=1.0),)
    num_annotators = 1
    tickets_per_day = 5000
    critical_checks = ()

    def build_tasks(self, split, count, seed):
        return [
            Task(
                task_id=f"{self.name}/{split}/{seed}-{shelf}", workflow=self.name, split=split, intent="count",
                prompt=f"How many parcels are on {split} shelf {shelf}, and on the next?", seed=seed,
                world={"parcels": shelf + 2}, goal={"selector": {}, "parcels": 2 * shelf + 5},
            )
            for shelf in range(count)
        ]

    def demonstrate(self, task, rng):
        first = task.world["parcels"]
        turns = [
            DemonstrationTurn(kind="tool", tool="count_parcels", arguments={"steps": steps}, text="",
                              observation=f'{{"parcels":{first + steps}}}')
            for steps in (0, 1)
        ]
        final = DemonstrationTurn(kind="final", tool="", arguments={}, text=f"{2 * first + 1} parcels.", observation="")
        return Demonstration(task_id=task.task_id, prompt=task.prompt, turns=(*turns, final))

    def verify(self, task, state, reply):
        is_right = state["calls"] == 2 and str(task.goal["parcels"]) in reply
        return Outcome(success=is_right, violations=(), reasons=() if is_right else ("miscounted",))

    def annotate(self, run, annotator, rng):
        return {"right": int(run.outcome.success)}

    def prefer(self, first, second, annotator, rng):
        return int(first.outcome.success > second.outcome.success)

    def check_reply(self, reply, run):
        return {"non_empty": bool(reply)}

    def build_live_database(self, tasks, path):
        open(path, "x").close()


WORKFLOW = ParcelCounter()
'''
TOOLS = '''
"""The shelves."""
from rl_actors.environment import ToolSpec

STEPS = {"type": "object", "properties": {"steps": {"type": "integer"}}, "required": ["steps"]}


def count_parcels(handle, steps):
    handle["calls"] += 1
    return {"parcels": handle["parcels"] + steps}


class Shelves:
    tools = (ToolSpec(name="count_parcels", description="Count.", parameters=STEPS, side_effect="read"),)
    functions = {"count_parcels": count_parcels}

    def open(self, world):
        return {**world, "calls": 0}

    def read_state(self, handle, selector):
        return {"calls": handle["calls"]}

    def close(self, handle):
        handle.clear()


WORLD = Shelves()
'''
WORKFLOW_USED = """
import importlib, json, random
from cluster.workflows import find_workflow
workflow = find_workflow("parcel_counter")
WORLD = importlib.import_module(workflow.tools_module).WORLD
outcomes = []
for task in workflow.build_tasks("train", 3, 0):
    attempt = workflow.demonstrate(task, random.Random(0))
    handle = WORLD.open(task.world)
    for turn in attempt.turns[:-1]:
        value = WORLD.functions[turn.tool](handle, **turn.arguments)
        assert json.loads(turn.observation) == value
    state = WORLD.read_state(handle, task.goal["selector"])
    replies = attempt.turns[-1].text, "no idea"
    outcomes += [workflow.verify(task, state, reply).success for reply in replies]
print(json.dumps(outcomes))
"""


def test_a_workflow(tmp_path: Path):
    """Nothing of the tree is touched: a folder and the variable that names it."""
    package = tmp_path / "mine" / "parcel_counter"
    package.mkdir(parents=True)
    spec = (ROOT / SPEC).read_text(encoding="utf-8").replace("name: support_desk", "name: parcel_counter")
    for name, text in {"__init__.py": WORKFLOW, "tools.py": TOOLS, "spec.yaml": spec}.items():
        (package / name).write_text(text.lstrip(), encoding="utf-8")
    folder = str(package.parent)
    code, refusal = seatrial(tmp_path, "validate", "parcel_counter")
    assert (code, refusal["field"]) == (2, "spec")
    for command in ("validate", "plan"):
        code, found = seatrial(tmp_path, command, "parcel_counter", workflows=folder)
        assert code == 0, found
    done = python(tmp_path, "-c", WORKFLOW_USED, workflows=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True, False] * 3


# --- an update --------------------------------------------------------------------------------------------------------


def trained_by(tree: Path, name: str) -> tuple[int, dict[str, object]]:
    return seatrial(tree, "validate", "support_desk", "--set", f"workflow.policy_training={name}")


def test_an_update(tree: Path):
    code, refusal = trained_by(tree, "ppo_two_sided")
    assert (code, refusal["field"]) == (2, "workflow.policy_training")
    recipe = tree / "rl_actors/contracts/recipe.py"
    add(recipe, '    "ppo_two_sided": Recipe(dual_clip=3.0),\n', after="RECIPES: Final")
    code, valid = trained_by(tree, "ppo_two_sided")
    assert (code, valid["spec"]["workflow"]["policy_training"]) == (0, "ppo_two_sided")  # type: ignore[index]
    used = "from cluster.spec import load_spec, override\n"
    used += "spec = override(load_spec('support_desk'), ['workflow.policy_training=ppo_two_sided'])\n"
    assert answer(tree, f"{used}print(json.dumps([spec.recipe.dual_clip, spec.recipe.has_critic]))") == [3.0, True]
