"""A run's stages: finished work is never done again, whoever watches hears of it, and frozen files stay frozen."""

from __future__ import annotations

import json
import stat
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.pipeline.run import Run, left_at_path
from cluster.plan.placement import NUM_THREADS
from rl_actors.contracts.errors import StageRefusedError, TamperedError
from rl_actors.contracts.versions import PolicyVersion
from rl_actors.durable.hashing import sha256_directory
from rl_actors.durable.metrics_log import MetricsLog
from tests.cluster.pipeline.fakes import make_policy, make_result, make_run, watch_of


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


def run_twice(home: Path, first: dict[str, object], second: dict[str, object]) -> tuple[Run, Counter]:
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


def test_the_same_inputs_of_another_stage_are_not_mistaken_for_it(run: Run):
    compute = Counter()
    run.stage("one", {"seed": 1}, compute, Counted)
    assert run.stage("two", {"seed": 1}, compute, Counted) == Counted(number=2)


def test_whoever_watches_hears_start_and_end(run: Run):
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


def policy_stage(run: Run, text: str = "weights") -> PolicyVersion:
    def compute() -> PolicyVersion:
        directory = run.fresh("models/sft")
        (directory / "model.bin").write_text(text)
        return run.policy("sft", "sft", directory, "")

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


def test_a_policy_is_hashed_named_by_its_hash_and_read_only(run: Run):
    directory = run.fresh("models/sft")
    (directory / "nested").mkdir()
    for name in ("model.bin", "nested/config.json"):
        (directory / name).write_text(name)
    version = run.policy("sft_v1", "sft", directory, "parent")
    assert version.sha256 == sha256_directory(directory)
    assert version.name == f"sft_v1-{version.sha256[:8]}"
    assert (version.kind, version.path, version.parent_sha256) == ("sft", str(directory), "parent")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in directory.rglob("*") if path.is_file()}
    assert modes == {0o444}


def test_two_contents_never_share_a_name(run: Run):
    versions = []
    for text in ("one", "two"):
        directory = run.fresh("models/ppo")
        (directory / "model.bin").write_text(text)
        versions.append(run.policy("ppo_v1", "ppo", directory, ""))
    assert versions[0].name != versions[1].name


def test_fresh_empties_what_a_killed_attempt_left_even_when_it_was_frozen(run: Run):
    directory = run.fresh("models/ppo")
    (directory / "half.bin").write_text("half")
    (directory / "half.bin").chmod(0o444)
    (directory / "nested").mkdir()
    assert run.fresh("models/ppo") == directory
    assert list(directory.iterdir()) == []
    assert directory == run.folder.root / "models" / "ppo"


def test_fresh_leaves_its_neighbours_alone(run: Run):
    (run.fresh("models/sft") / "model.bin").write_text("keep")
    run.fresh("models/ppo")
    assert (run.folder.root / "models" / "sft" / "model.bin").read_text() == "keep"


# --- progress ---------------------------------------------------------------------------------------------------------


def wait_until(condition: object, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_new_metric_rows_of_the_running_stage_become_progress(run: Run, monkeypatch: pytest.MonkeyPatch):
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


def test_nothing_is_told_once_the_stage_is_over(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cluster.pipeline.run._POLL_S", 0.02)
    run.stage("sft", {}, Counter(), Counted)
    MetricsLog(run.folder.metrics, "sft").write(1, {"num_steps": 2})
    time.sleep(0.1)
    assert watch_of(run).progressed == []


# --- what the spec says -----------------------------------------------------------------------------------------------


def test_limits_and_worker_settings_follow_the_spec(home: Path):
    run = make_run(home, "agent.tool_calls=3", "agent.max_tokens_per_turn=40", "agent.timeout_s=9.0")
    assert run.limits.max_tool_calls == 3
    assert run.limits.max_turns == 3 + 4
    assert (run.limits.max_tokens_per_turn, run.limits.max_context_tokens, run.limits.timeout_s) == (40, 256, 9.0)
    settings = run.worker_settings
    assert (settings.workflow, settings.limits, settings.num_threads) == (run.workflow_ref, run.limits, NUM_THREADS)


def test_the_journal_is_one_json_line_per_stage(run: Run):
    run.stage("one", {}, Counter(), Counted)
    run.stage("two", {}, Counter(), Counted)
    rows = [json.loads(line) for line in run.folder.journal.read_text().splitlines()]
    assert [(row["stage"], row["output"]) for row in rows] == [("one", {"number": 1}), ("two", {"number": 1})]
