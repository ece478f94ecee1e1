"""The charter: three answers that every run has, that follow the spec, and that nobody can leave blank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cluster.cli.app import app
from cluster.cli.runs import RunRequest, open_run, record_spec, recorded_spec
from cluster.pipeline.release import release_plan
from cluster.plan.estimate import compare
from cluster.spec.spec import WorkflowSpec, charter_answers, override, parse_spec, spec_to_yaml
from rl_actors.contracts.errors import BadInputError
from tests.cluster.pipeline.fakes import make_run
from tests.cluster.spec.test_spec import ARTICLE

CONSTRAINTS = (
    "at most 6 tool calls, 96 tokens a turn and 30 s a request; every reply passes all policy checks, a release all 4 "
    "gates"
)
PATH = "all sessions back to the stable policy (first sft_checkpoint_v1) by one split record, within 300 s"
BLANK = ["''", '"  "', "", '" \\n "']


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEATRIAL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def seatrial(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def charter(text: str) -> str:
    return f"{ARTICLE}charter: {text}\n"


# --- answers that follow ----------------------------------------------------------------------------------------------


def test_the_articles_block_answers_all_three():
    assert charter_answers(parse_spec(ARTICLE)) == {
        "workload": "one high-volume, multi-step support or ops task",
        "constraints": CONSTRAINTS,
        "rollback_path": PATH,
    }


def test_an_unset_answer_moves_with_the_knobs_it_speaks_of():
    budget = ["agent.tool_calls=9", "agent.max_tokens_per_turn=64", "agent.timeout_s=12.5"]
    found = override(parse_spec(ARTICLE), [*budget, "workflow.baseline=old_v3"]).charter
    assert found.constraints.startswith("at most 9 tool calls, 64 tokens a turn and 12.5 s a request;")
    assert "(first old_v3)" in found.rollback_path


def test_the_limit_it_names_is_the_one_the_release_is_held_to(home: Path):
    run = make_run(home)
    limit = release_plan(run.spec, (), may_promote=True).max_rollback_s
    assert run.spec.charter.rollback_path.endswith(f"within {limit:g} s")


def test_an_answer_of_ones_own_stays_and_the_other_still_follows():
    spec = parse_spec(charter("{constraints: 'no refund\n   above 50 euros'}"))
    assert spec.charter.constraints == "no refund above 50 euros", "one line"
    assert spec.charter.rollback_path == PATH
    moved = override(spec, ["workflow.baseline=old_v3", "agent.tool_calls=9"])
    assert moved.charter.constraints == "no refund above 50 euros"
    assert "(first old_v3)" in moved.charter.rollback_path


@pytest.mark.parametrize(
    "text", ["{}", "{constraints: own words}", "{constraints: own words, rollback_path: call Ada}"]
)
def test_a_resolved_spec_reads_back_equal_and_its_answers_still_follow(text: str):
    spec = parse_spec(charter(text))
    again = parse_spec(spec_to_yaml(spec))
    assert again == spec == WorkflowSpec.model_validate_json(spec.model_dump_json())
    assert override(again, ["agent.tool_calls=9"]).charter == override(spec, ["agent.tool_calls=9"]).charter


def test_two_specs_share_no_charter():
    first = override(parse_spec(ARTICLE), ["charter.constraints=own words"])
    assert parse_spec(ARTICLE).charter.constraints == CONSTRAINTS
    assert first.charter.constraints == "own words"


def test_what_follows_from_another_knob_is_no_change_of_its_own():
    spec = parse_spec(ARTICLE)
    (change,) = compare(spec, override(spec, ["agent.tool_calls=9"]), "it").changes
    assert change.knob == "agent.tool_calls"
    (change,) = compare(spec, override(spec, ["charter.constraints=own words"]), "it").changes
    assert (change.knob, change.shifts, change.refusal) == ("charter.constraints", (), "")


# --- blank ones are refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["constraints", "rollback_path"])
@pytest.mark.parametrize("blank", BLANK)
def test_a_blank_answer_starts_nothing(home: Path, tmp_path: Path, field: str, blank: str):
    path = tmp_path / "spec.yaml"
    path.write_text(f"{ARTICLE}charter:\n  {field}: {blank}\n")
    for command in ("validate", "plan", "run"):
        result = seatrial(command, str(path), "--json")
        answer = json.loads(result.stdout)
        assert (result.exit_code, answer["field"]) == (2, f"charter.{field}")
        assert "empty" in answer["remedy"]
        assert "line 19" in answer["remedy"]
    assert not (home / "runs").exists()


@pytest.mark.parametrize(
    ("text", "field", "remedy"),
    [
        ("{constraint: x}", "charter.constraint", "'charter.constraints'"),
        ("{rollback_path: 3}", "charter.rollback_path", "valid string"),
        ("words", "charter", "mapping"),
    ],
)
def test_a_wrong_answer_is_named(text: str, field: str, remedy: str):
    with pytest.raises(BadInputError) as caught:
        parse_spec(charter(text))
    assert caught.value.field == field
    assert remedy in caught.value.remedy


def test_a_blank_workload_is_refused_as_it_was():
    with pytest.raises(BadInputError) as caught:
        parse_spec(ARTICLE.replace("one high-volume, multi-step support or ops task", " "))
    assert caught.value.field == "workflow.target"


# --- where it is read -------------------------------------------------------------------------------------------------


def test_a_runs_own_record_holds_the_answers(home: Path, tmp_path: Path):
    (tmp_path / "spec.yaml").write_text(charter("{rollback_path: call Ada}"))
    spec, folder = open_run(RunRequest(spec=str(tmp_path / "spec.yaml"), run_id="r-1"), home)
    record_spec(spec, folder)
    recorded = json.loads(folder.spec.read_text())["charter"]
    assert recorded == {"constraints": CONSTRAINTS, "rollback_path": "call Ada"}
    assert recorded_spec(folder) == spec


def test_machines_read_it_from_plan_and_validate(home: Path):
    plan = json.loads(seatrial("plan", "support_desk", "--json").stdout)
    assert list(plan["charter"]) == ["workload", "constraints", "rollback_path"]
    assert plan["charter"]["rollback_path"] == PATH
    assert json.loads(seatrial("validate", "support_desk", "--json").stdout)["spec"]["charter"]["rollback_path"] == PATH
