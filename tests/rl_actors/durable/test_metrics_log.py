"""Rows of metrics survive torn lines, non-finite numbers and two writers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rl_actors.durable.metrics_log import MetricsLog, read_metrics


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def log(file: Path, stage: str = "ppo") -> MetricsLog:
    return MetricsLog(file, stage, clock=lambda: 12.34567)


def test_rows_come_back_in_order(file: Path):
    log(file).write(1, {"reward": 0.25})
    log(file).write(2, {"reward": 0.5, "kl": 0.01})
    assert read_metrics(file) == [
        {"stage": "ppo", "step": 1, "at": 12.346, "reward": 0.25},
        {"stage": "ppo", "step": 2, "at": 12.346, "reward": 0.5, "kl": 0.01},
    ]


def test_a_log_that_was_never_written_is_empty(file: Path):
    log(file)
    assert not file.exists()
    assert read_metrics(file) == []


def test_stages_share_a_file_and_are_read_apart(file: Path):
    log(file, "sft").write(1, {"loss": 2.0})
    log(file, "ppo").write(1, {"reward": 0.1})
    assert [row["loss"] for row in read_metrics(file, "sft")] == [2.0]
    assert [row["reward"] for row in read_metrics(file, "ppo")] == [0.1]
    assert len(read_metrics(file)) == 2
    assert read_metrics(file, "eval") == []


@pytest.mark.parametrize(("value", "text"), [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity")])
def test_a_non_finite_number_is_kept_and_the_line_stays_json(file: Path, value: float, text: str):
    """A NaN loss is the very row one looks for; `NaN` itself is no JSON and breaks other readers."""
    log(file).write(1, {"loss": value})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    (line,) = file.read_text().splitlines()
    assert json.loads(line, parse_constant=refuse)["loss"] == text
    assert str(read_metrics(file)[0]["loss"]) == text


def test_whole_numbers_stay_whole(file: Path):
    log(file).write(1, {"num_steps": 40})
    assert '"num_steps": 40' in file.read_text()


@pytest.mark.parametrize("torn", ['{"stage": "ppo", "st', "{", '{"stage": "ppo", "step": 3, "reward": 0.'])
def test_a_torn_last_line_is_skipped(file: Path, torn: str):
    log(file).write(1, {"reward": 0.25})
    with file.open("a") as out:
        out.write(torn)
    assert [row["step"] for row in read_metrics(file)] == [1]


def test_a_row_after_a_torn_one_costs_no_other(file: Path):
    log(file).write(1, {"reward": 0.25})
    with file.open("a") as out:
        out.write('{"stage": "ppo", "st\n')
    log(file).write(3, {"reward": 0.5})
    assert [row["step"] for row in read_metrics(file)] == [1, 3]


def test_empty_lines_are_no_rows(file: Path):
    file.write_text("\n\n")
    assert read_metrics(file) == []


def test_the_clock_is_the_callers(file: Path):
    ticks = iter([1.0, 2.5])
    two = MetricsLog(file, "ppo", clock=lambda: next(ticks))
    two.write(1, {})
    two.write(2, {})
    assert [row["at"] for row in read_metrics(file)] == [1.0, 2.5]
