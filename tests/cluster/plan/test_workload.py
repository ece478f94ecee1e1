"""Is a workload worth it: steps and volume are measured, doubtful ones are told, hopeless ones start nothing."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.cli.plan import render_charter
from cluster.cli.runs import RunRequest, open_run, requested_spec
from cluster.pipeline.snapshot import read_demonstrations
from cluster.plan import workload as workload_module
from cluster.plan.workload import (
    SAMPLE_TASKS,
    Workload,
    check_critical,
    check_workflow,
    mean_tool_calls,
    measure_workload,
    require_workload,
    tickets_needed,
)
from cluster.spec.spec import WorkflowSpec, charter_answers, load_spec, override
from cluster.workflows import find_workflow
from cluster.workflows.support_desk import SupportDesk
from rl_actors.contracts import Demonstration, Task
from rl_actors.contracts.errors import BadInputError
from tests.cluster.pipeline.fakes import SMALL, freeze_data, make_run

GOOD = Workload(mean_tool_calls=1.8, tickets_per_day=20_000, tickets_to_verdict=1300)


class OtherDesk(SupportDesk):
    """The support desk with another volume, other critical checks, or an expert who calls fewer tools."""

    def __init__(self, most_calls: int = 9, **declared: Any) -> None:
        super().__init__()
        self.most_calls = most_calls
        for name, value in declared.items():
            setattr(self, name, value)

    def demonstrate(self, task: Task, rng: random.Random) -> Demonstration:
        found = super().demonstrate(task, rng)
        tools = [turn for turn in found.turns if turn.kind == "tool"][: self.most_calls]
        return replace(found, turns=(found.turns[0], *tools, found.turns[-1]))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEATRIAL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def staffed(monkeypatch: pytest.MonkeyPatch) -> Callable[[SupportDesk], None]:
    """Let another desk answer to the packaged one's name."""

    def staff(desk: SupportDesk) -> None:
        monkeypatch.setattr(workload_module, "find_workflow", lambda _name: desk)

    return staff


def spec_with(*settings: str) -> WorkflowSpec:
    return override(load_spec("support_desk"), list(settings))


def refusal(spec: WorkflowSpec, workload: Workload) -> BadInputError:
    with pytest.raises(BadInputError) as caught:
        require_workload(spec, workload)
    assert caught.value.exit_code == 2
    return caught.value


# --- what is measured -------------------------------------------------------------------------------------------------


def test_the_packaged_workload_is_multi_step_and_decided_within_a_day():
    spec = spec_with()
    found = measure_workload(spec, find_workflow("support_desk"))
    assert found.mean_tool_calls == pytest.approx(1.78)
    assert (found.tickets_per_day, found.tickets_to_verdict) == (20_000, tickets_needed(spec)) == (20_000, 1300)
    assert found.days_to_verdict == pytest.approx(0.065)
    assert found.warnings == ()
    require_workload(spec, found)


def test_a_plan_is_no_step_and_nothing_has_no_mean():
    task = SupportDesk().build_tasks("train", 1, 0)[0]
    attempt = SupportDesk().demonstrate(task, random.Random(0))
    calls = sum(turn.kind == "tool" for turn in attempt.turns)
    assert 0 < calls == len(attempt.turns) - 2
    silent = replace(attempt, turns=(attempt.turns[0], attempt.turns[-1]))
    assert mean_tool_calls([attempt, silent]) == calls / 2
    assert mean_tool_calls([]) == 0.0


def test_what_is_measured_is_the_head_of_what_is_frozen(home: Path):
    run = make_run(home)
    frozen = read_demonstrations(freeze_data(run))
    assert measure_workload(run.spec, run.workflow).mean_tool_calls == mean_tool_calls(frozen)


def test_a_sample_is_enough_and_a_small_spec_has_less():
    counts: list[int] = []

    class Counting(SupportDesk):
        def build_tasks(self, split: Any, count: int, seed: int) -> list[Task]:
            counts.append(count)
            return super().build_tasks(split, count, seed)

    measure_workload(spec_with(), Counting())
    measure_workload(spec_with(*SMALL), Counting())
    assert counts == [SAMPLE_TASKS, 24]


@pytest.mark.parametrize(
    ("settings", "tickets"),
    [
        (["release.min_canary_requests=7"], 140 + 28 + 14),
        (["release.canary_traffic_percent=50", "release.ramp=[50]"], 100),
        (["release.canary_traffic_percent=3", "release.ramp=[3]"], 1667),
    ],
)
def test_tickets_follow_from_requests_and_shares(settings: list[str], tickets: int):
    assert measure_workload(spec_with(*settings), SupportDesk()).tickets_to_verdict == tickets


@pytest.mark.parametrize("volume", [None, 0, -5, 2.5, True, "20000"])
def test_a_workflow_that_declares_no_volume_is_refused(volume: object):
    with pytest.raises(BadInputError, match="whole number above 0") as caught:
        measure_workload(spec_with(*SMALL), OtherDesk(tickets_per_day=volume))
    assert (caught.value.field, caught.value.value) == ("tickets_per_day", volume)


# --- doubtful and hopeless --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mean_tool_calls": 1.5}, []),
        ({"mean_tool_calls": 1.49}, ["single-step: 1.49 tool calls a ticket"]),
        ({"tickets_to_verdict": 140_000}, []),
        ({"tickets_to_verdict": 160_000}, ["the canary would need 8 days; lower release.min_canary_requests"]),
        ({"mean_tool_calls": 1.2, "tickets_per_day": 100}, ["single-step", "13 days"]),
    ],
)
def test_a_doubtful_workload_is_told(changes: dict[str, Any], words: list[str]):
    found = replace(GOOD, **changes).warnings
    assert len(found) == len(words)
    assert all(word in line for word, line in zip(words, found, strict=True))


def test_a_workload_without_steps_is_refused():
    error = refusal(spec_with(), replace(GOOD, mean_tool_calls=0.99))
    assert (error.field, error.value) == ("workflow.name", "support_desk")
    assert "0.99 tool calls" in error.remedy
    assert "use a prompt" in error.remedy
    require_workload(spec_with(), replace(GOOD, mean_tool_calls=1.0))


def test_a_canary_of_a_season_is_refused():
    spec = spec_with("release.min_canary_requests=77")
    error = refusal(spec, replace(GOOD, tickets_per_day=14))
    assert (error.field, error.value) == ("release.min_canary_requests", 77)
    assert "need 93 days at 14 tickets a day, at most 90" in error.remedy
    require_workload(spec, replace(GOOD, tickets_per_day=15))


@pytest.mark.parametrize(
    ("desk", "field"),
    [
        (OtherDesk(most_calls=0), "workflow.name"),
        (OtherDesk(tickets_per_day=10), "release.min_canary_requests"),
        (OtherDesk(critical_checks=("no_foreign_custmer_id",)), "critical_checks"),
    ],
)
def test_it_is_refused_before_a_run_is_recorded(
    home: Path, staffed: Callable[[SupportDesk], None], desk: SupportDesk, field: str
):
    open_run(RunRequest(spec="support_desk"), home)
    staffed(desk)
    with pytest.raises(BadInputError) as caught:
        open_run(RunRequest(spec="support_desk"), home)
    assert caught.value.field == field
    assert not (home / "runs").exists()


def test_the_knob_that_makes_it_too_long_is_named_on_the_command_line():
    with pytest.raises(BadInputError, match="130 days at 20,000 tickets a day"):
        requested_spec(RunRequest(spec="support_desk", settings=["release.min_canary_requests=100000"]))


# --- where it is shown ------------------------------------------------------------------------------------------------


def printed(workload: Workload) -> str:
    screen = io.StringIO()
    Console(file=screen, width=80).print(render_charter(charter_answers(spec_with()), workload))
    return " ".join(screen.getvalue().replace("│", " ").split())


def test_the_plan_shows_it_in_eighty_columns():
    text = printed(GOOD)
    assert "1.80 tool calls a ticket (measured), 20,000 tickets a day (declared), at least 1,300 tickets" in text
    assert "doubtful" not in text
    assert "doubtful single-step" in printed(replace(GOOD, mean_tool_calls=1.1))


def test_machines_get_days_and_warnings():
    data = replace(GOOD, tickets_per_day=100).to_json()
    assert (data["days_to_verdict"], len(data["warnings"])) == (13.0, 1)
    assert data["mean_tool_calls"] == 1.8


# --- critical checks --------------------------------------------------------------------------------------------------


def test_every_critical_check_of_the_packaged_workflow_is_reported():
    check_critical(find_workflow("support_desk"))
    check_critical(OtherDesk(critical_checks=[]))


@pytest.mark.parametrize(
    ("named", "value", "remedy"),
    [
        (("no_foreign_custmer_id",), "no_foreign_custmer_id", "did you mean 'no_foreign_customer_id'?"),
        (("non_empty", 7), 7, "valid: non_empty, within_length"),
        ("non_empty", "non_empty", "() where it has none"),
        (None, None, "() where it has none"),
    ],
)
def test_a_critical_check_that_nobody_reports_is_refused(named: object, value: object, remedy: str):
    with pytest.raises(BadInputError) as caught:
        check_critical(OtherDesk(critical_checks=named))
    assert (caught.value.field, caught.value.value) == ("critical_checks", value)
    assert remedy in caught.value.remedy


def test_a_small_spec_passes_every_check():
    check_workflow(spec_with(*SMALL))


def test_a_check_that_appears_only_in_answers_is_unknown():
    """What the workflow reports is asked of the workflow itself, on a task of its own."""

    class Quiet(SupportDesk):
        def check_reply(self, reply: str, run: Any) -> Mapping[str, bool]:
            assert run.task.split == "train"
            return {"polite": True}

    with pytest.raises(BadInputError, match="valid: polite"):
        check_critical(Quiet())
