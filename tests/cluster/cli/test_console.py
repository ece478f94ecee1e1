"""What people see: read as text at the widths people have, and at the pace a log can take."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from cluster.cli.console import (
    LINE_EVERY_S,
    PlainWatch,
    RichWatch,
    duration,
    metrics_line,
    percent,
    render_summary,
    stage_text,
    watch_for,
)
from cluster.pipeline.run import Silent, Watch
from cluster.records.summary import ReleaseOutcome, RunPaths, RunSummary, StageLine, TrainedLine
from rl_actors.contracts.reports import SuiteResult
from tests.serving.fakes import make_suite

PPO = {
    "reward": 0.6123,
    "success": 0.583,
    "kl_to_reference": 0.0312,
    "tokens_per_s": 3410.2,
    "generate_s": 6.12,
    "score_s": 0.4,
    "train_s": 3.31,
    "sync_s": 0.22,
    "entropy": 1.2,
}
FOLDER = "/home/someone/.seatrial/runs/support_desk-20261122-183000-1f3a"


def suite_of(success: float, violations: int) -> SuiteResult:
    found = make_suite("capability")
    return replace(found, success=replace(found.success, mean=success), violations=violations)


def summary(**changes: object) -> RunSummary:
    values: dict = {
        "run_id": "support_desk-20261122-183000-1f3a",
        "workflow": "support_desk",
        "stages": (
            StageLine(name="sft", seconds=184.2, line="loss 0.31"),
            StageLine(name="ppo", seconds=412.0, line="40 steps"),
        ),
        "trained": (
            TrainedLine(name="sft-9c1f22ab", sha256="9c1f22ab" * 8),
            TrainedLine(name="ppo-0b7d9c11", sha256="0b7d9c11" * 8),
        ),
        "offline": ((suite_of(0.585, 31), suite_of(0.7625, 12)),),
        "releases": (
            ReleaseOutcome(
                candidate="ppo-0b7d9c11",
                outcome="promoted",
                reason="all 4 gates passed at 50 %",
                canary_requests=1412,
                observed_share=0.0512,
            ),
            ReleaseOutcome(
                candidate="degraded-77ab01ff",
                outcome="rolled_back",
                reason="no_safety_regression: e_fail 104 >= 100 after 31 events [14 on the canary]",
                canary_requests=71,
                observed_share=0.0487,
                time_to_recovery_s=1.42,
            ),
        ),
        "stable_policy": "ppo-0b7d9c11",
        "bundle_id": "ab" * 32,
        "exit_code": 0,
        "paths": RunPaths(
            folder=FOLDER,
            brief_html=f"{FOLDER}/report/brief.en-US.html",
            ledger=f"{FOLDER}/serving/ledger.sqlite",
            mlflow_uri="sqlite:///mlflow.db",
        ),
    }
    return RunSummary(**(values | changes))


def rendered(found: RunSummary, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    render_summary(console, found)
    return console.file.getvalue()  # type: ignore[attr-defined]


# --- numbers in words -------------------------------------------------------------------------------------------------


def test_a_steps_metrics_are_named_and_ordered():
    line = metrics_line(PPO)
    assert line == (
        "reward 0.612  success 58 %  KL 0.0312  tokens/s 3,410  generate 6.1 s  score 0.4 s  train 3.3 s  sync 0.2 s"
    )
    assert "entropy" not in line


def test_the_seconds_can_stand_on_their_own_line():
    curve, seconds = metrics_line(PPO, separator="\n").split("\n")
    assert curve.endswith("tokens/s 3,410")
    assert seconds.startswith("generate")
    assert max(len(curve), len(seconds)) <= 76


def test_unknown_metrics_are_shown_when_there_is_nothing_better():
    assert (
        metrics_line({"pair_accuracy": 0.71234, "tool_error_rate": 0.02})
        == "pair accuracy 0.712  tool error rate 2.0 %"
    )
    assert len(metrics_line({f"m{n}": 1.0 for n in range(9)}).split("  ")) == 4
    assert metrics_line({}) == ""


@pytest.mark.parametrize(
    ("fraction", "text"), [(0.05, "5.0 %"), (0.0512, "5.1 %"), (0.5, "50 %"), (0, "0.0 %"), (1, "100 %")]
)
def test_percentages(fraction: float, text: str):
    assert percent(fraction) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (1.42, "1.4 s"), (42.4, "42 s"), (60, "1 min 00 s"), (184.6, "3 min 05 s"), (119.7, "2 min 00 s")],
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text


# --- watching ---------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def plain() -> tuple[PlainWatch, io.StringIO, Clock]:
    text, clock = io.StringIO(), Clock()
    return PlainWatch(Console(file=text, width=40), clock), text, clock


def test_a_log_gets_at_most_one_line_every_two_seconds():
    watch, text, clock = plain()
    watch.stage_started("ppo", "100 steps")
    for step in range(1, 101):
        clock.now += 0.1
        watch.progress("ppo", step, 100, PPO)
    steps = re.findall(r"ppo (\d+)/100", text.getvalue())
    assert len(steps) <= 10 / LINE_EVERY_S + 2
    assert (steps[0], steps[-1]) == ("1", "100")


def test_a_new_stage_is_shown_at_once():
    watch, text, _ = plain()
    watch.progress("sft", 1, 9, {"loss": 2.0})
    watch.stage_started("ppo", "")
    watch.progress("ppo", 1, 9, {})
    assert text.getvalue().splitlines() == ["    sft 1/9  loss 2", "... ppo", "    ppo 1/9"]


def test_a_log_line_is_never_wrapped_nor_read_as_markup():
    watch, text, _ = plain()
    watch.note("a [bold]path[/bold] " + "x" * 100)
    watch.stage_finished("sft", "kept [frozen] " + "y" * 100, 3.0)
    lines = text.getvalue().splitlines()
    assert len(lines) == 2
    assert "[bold]path[/bold]" in lines[0]
    assert "[frozen]" in lines[1]


def test_a_stage_that_was_finished_before_says_so():
    assert "kept" in stage_text("sft", "x", 0).plain
    assert "3.0 s" in stage_text("sft", "x", 3).plain


def test_a_terminal_gets_a_bar_and_gets_its_lines_back():
    text = io.StringIO()
    console = Console(file=text, width=80, force_terminal=True, _environ={"TERM": "xterm-256color"})
    watch = watch_for(console)
    assert isinstance(watch, RichWatch)
    with watch:
        watch.stage_started("ppo", "40 steps")
        watch.progress("ppo", 20, 40, PPO)
        watch._live.refresh()
        watch.note("step 20: [checkpoint]")
        watch.stage_finished("ppo", "success 58 % -> 76 %", 412)
    shown = text.getvalue()
    assert "20/40" in shown
    assert "generate 6.1 s" in shown
    assert "step 20: [checkpoint]" in shown
    assert "success 58 % -> 76 %" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1, "the cursor is shown again"


def test_progress_without_a_start_makes_its_own_bar():
    watch = RichWatch(Console(file=io.StringIO(), width=80, force_terminal=True))
    with watch:
        watch.progress("eval", 1, 3, {})
        assert watch._progress.tasks[0].description == "eval"
        watch.stage_started("canary", "5 %")
        assert [task.description for task in watch._progress.tasks] == ["canary: 5 %"]


def test_a_run_that_dies_gives_the_terminal_back():
    text = io.StringIO()
    watch = RichWatch(Console(file=text, width=80, force_terminal=True))

    def die() -> None:
        with watch:
            watch.stage_started("ppo", "")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        die()
    assert text.getvalue().count("\x1b[?25h") == 1


def test_a_pipe_gets_plain_lines():
    with watch_for(Console(file=io.StringIO())) as watch:
        assert isinstance(watch, PlainWatch)


def test_silence_is_a_watch():
    watch: Watch = Silent()
    watch.stage_started("a", "b")
    watch.progress("a", 1, 2, {})
    watch.stage_finished("a", "b", 1.0)
    watch.note("c")


# --- the ending -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_fit_and_say_it_all(width: int):
    text = rendered(summary(), width)
    table = [line for line in text.splitlines() if line.startswith(("┃", "│", "┏"))]
    assert table
    assert max(map(len, table)) <= width
    for fact in ("58.5 %", "76.2 %", "+17.8 pt", "31 -> 12", "1,412", "5.1 %", "rolled back", "1.4 s", "now stable"):
        assert fact in text, fact
    assert "degraded-77ab01ff" in text, "a version's name is never broken over lines"


def test_a_reason_is_a_sentence_not_markup():
    assert "[14 on the canary]" in " ".join(rendered(summary()).split())


def test_paths_can_be_copied_from_a_narrow_terminal():
    assert f"{FOLDER}/report/brief.en-US.html" in rendered(summary(), width=40)


def test_the_ending_says_how_long_and_what_is_stable():
    text = rendered(summary())
    assert "done in 9 min 56 s; longest: ppo, 6 min 52 s; stable policy: ppo-0b7d9c11" in text
    assert "seatrial serve" in text


def test_a_resumed_run_counts_only_its_own_seconds():
    stages = (
        StageLine(name="sft", seconds=184.0, line="", resumed=True),
        StageLine(name="ppo", seconds=40.0, line=""),
    )
    assert "done in 40 s; longest: ppo, 40 s; 1 stage kept from before" in rendered(summary(stages=stages))


def test_a_served_run_shows_its_endpoint_and_no_hint():
    text = rendered(summary(endpoint="http://127.0.0.1:8000/v1"))
    assert "http://127.0.0.1:8000/v1" in text
    assert "seatrial serve" not in text


def test_a_refused_run_shows_only_what_it_reached():
    bare = summary(
        offline=(), releases=(), stable_policy="", bundle_id="", exit_code=1, paths=RunPaths(folder=FOLDER), stages=()
    )
    text = rendered(bare)
    assert "refused" in text
    assert "What was decided" not in text
    assert "What was tested" not in text
    assert "MLflow" not in text
    assert FOLDER in text


def test_a_summary_survives_json():
    assert RunSummary.from_json(summary().to_json()) == summary()
