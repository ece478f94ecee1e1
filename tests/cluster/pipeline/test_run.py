"""A run's stages: finished work is never done again, whoever watches hears of it, and frozen files stay frozen."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.pipeline.run import left_at_path
from cluster.records.frozen import freeze_policy
from rl_actors.contracts.errors import StageRefusedError, TamperedError
from rl_actors.contracts.versions import PolicyVersion
from rl_actors.durable.metrics_log import MetricsLog
from tests.cluster.pipeline.fakes import DeskRun, make_policy, make_result, make_run, watch_of


@dataclass(frozen=True)
class Counted:
    """A stage's output."""

    number: int


class Counter:
    """Computes a value and knows how often it was asked to."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Counted:
        self.calls += 1
        return Counted(number=self.calls)


def run_twice(home: Path, first: dict[str, object], second: dict[str, object]) -> tuple[DeskRun, Counter]:
    """Run one stage in one process and again in the next."""
    compute = Counter()
    make_run(home).stage("count", first, compute, Counted)
    resumed = make_run(home)
    resumed.stage("count", second, compute, Counted, describe=lambda value: f"number {value.number}")
    return resumed, compute


# --- stages -----------------------------------------------------------------------------------------------------------


def test_a_finished_stage_is_taken_from_the_journal(home: Path):
    run, compute = run_twice(home, {"seed": 1}, {"seed": 1})
    assert compute.calls == 1
    assert [(line.name, line.line, line.resumed, line.seconds) for line in run.lines] == [
        ("count", "number 1", True, 0.0)
    ]
    assert watch_of(run).finished == [("count", "number 1", 0.0)]


def test_other_inputs_are_computed_again(home: Path):
    run, compute = run_twice(home, {"seed": 1}, {"seed": 2})
    assert compute.calls == 2
    assert [(line.line, line.resumed) for line in run.lines] == [("number 2", False)]


def test_the_same_inputs_of_another_stage_are_not_mistaken_for_it(run: DeskRun):
    compute = Counter()
    run.stage("one", {"seed": 1}, compute, Counted)
    assert run.stage("two", {"seed": 1}, compute, Counted) == Counted(number=2)


def test_whoever_watches_hears_start_and_end(run: DeskRun):
    def compute() -> Counted:
        assert watch_of(run).started == [("count", "to one")]
        assert watch_of(run).finished == []
        return Counted(number=1)

    run.stage("count", {}, compute, Counted, detail="to one", describe=lambda value: f"is {value.number}")
    assert [(name, line) for name, line, _ in watch_of(run).finished] == [("count", "is 1")]
    assert run.lines[0].seconds > 0


def test_a_stage_that_raises_leaves_no_trace_and_can_be_tried_again(home: Path):
    def refuse() -> Counted:
        raise StageRefusedError("no")

    run = make_run(home)
    with pytest.raises(StageRefusedError, match="no"):
        run.stage("count", {}, refuse, Counted)
    assert (run.lines, watch_of(run).finished, run.journal.records) == ([], [], [])
    assert make_run(home).stage("count", {}, Counter(), Counted) == Counted(number=1)


def test_the_output_comes_back_as_what_it_was(home: Path):
    wanted = make_policy(home / "runs" / "run-1" / "models")
    for run in (make_run(home), make_run(home)):
        (run.folder.root / "models").mkdir(exist_ok=True)
        found = run.stage("sft", {}, lambda: wanted, PolicyVersion)
        assert found == wanted
        assert isinstance(found, PolicyVersion)


# --- artifacts --------------------------------------------------------------------------------------------------------


def policy_stage(run: DeskRun, text: str = "weights") -> PolicyVersion:
    def compute() -> PolicyVersion:
        directory = run.fresh("models/sft")
        (directory / "model.bin").write_text(text)
        return freeze_policy("sft", "sft", directory, "")

    return run.stage("sft", {}, compute, PolicyVersion)


def test_a_changed_artifact_of_a_finished_stage_is_refused(home: Path):
    version = policy_stage(make_run(home))
    assert policy_stage(make_run(home)) == version
    file = Path(version.path) / "model.bin"
    file.chmod(0o644)
    file.write_text("other weights")
    with pytest.raises(TamperedError, match=r"model\.bin: changed after finished stage 'sft'"):
        policy_stage(make_run(home))


def test_a_version_stands_on_its_directory_and_a_report_on_nothing():
    assert left_at_path(make_policy("/models/a")) == ("/models/a",)
    assert left_at_path(make_result()) == ()
    assert left_at_path(Counted(number=1)) == ()


# --- progress ---------------------------------------------------------------------------------------------------------


def wait_until(condition: object, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_new_metric_rows_of_the_running_stage_become_progress(run: DeskRun, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cluster.pipeline.run._POLL_S", 0.02)
    log, other = MetricsLog(run.folder.metrics, "sft"), MetricsLog(run.folder.metrics, "ppo")
    log.write(1, {"num_steps": 9, "loss": 9.0})  # of an earlier, killed attempt

    def compute() -> Counted:
        time.sleep(0.1)
        other.write(7, {"num_steps": 8, "loss": 1.0})
        log.write(2, {"num_steps": 9, "loss": 0.5})
        wait_until(lambda: watch_of(run).progressed)
        return Counted(number=1)

    run.stage("sft", {}, compute, Counted)
    told = [(name, done, total, metrics["loss"]) for name, done, total, metrics in watch_of(run).progressed]
    assert told == [("sft", 2, 9, 0.5)]


def test_nothing_is_told_once_the_stage_is_over(run: DeskRun, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cluster.pipeline.run._POLL_S", 0.02)
    run.stage("sft", {}, Counter(), Counted)
    MetricsLog(run.folder.metrics, "sft").write(1, {"num_steps": 2})
    time.sleep(0.1)
    assert watch_of(run).progressed == []


def test_the_journal_is_one_json_line_per_stage(run: DeskRun):
    run.stage("one", {}, Counter(), Counted)
    run.stage("two", {}, Counter(), Counted)
    rows = [json.loads(line) for line in run.folder.journal.read_text().splitlines()]
    assert [(row["stage"], row["output"]) for row in rows] == [("one", {"number": 1}), ("two", {"number": 1})]
