"""Paths: a run id cannot leave its folder, and no reader ever sees half a file."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cluster.records.run_folder import RunFolder, list_runs, new_run_id, seatrial_home
from rl_actors.contracts.errors import BadInputError
from rl_actors.durable.files import write_json


def test_home_is_the_variable_or_a_folder_of_the_user():
    assert seatrial_home({"SEATRIAL_HOME": "/data/sea"}) == Path("/data/sea")
    assert seatrial_home({}) == seatrial_home({"SEATRIAL_HOME": ""}) == Path.home() / ".seatrial"
    assert seatrial_home({"SEATRIAL_HOME": "~/x"}) == Path.home() / "x"
    assert seatrial_home({"SEATRIAL_HOME": "here"}).is_absolute()


def test_run_ids_sort_by_time_and_differ():
    early = new_run_id("desk", datetime(2026, 11, 22, 9, 5, tzinfo=UTC), "ffff")
    late = new_run_id("desk", datetime(2026, 11, 22, 10, 5, tzinfo=UTC), "0000")
    assert early == "desk-20261122-090500-ffff"
    assert early < late
    assert new_run_id("desk") != new_run_id("desk")
    RunFolder.of(Path("/h"), new_run_id("support_desk"))


def test_a_run_folder_has_the_files_of_the_design():
    folder = RunFolder.of(Path("/h"), "r1")
    assert folder.run_id == "r1"
    names = {
        str(path.relative_to("/h/runs/r1")) for path in (folder.spec, folder.journal, folder.bundle, folder.metrics)
    }
    assert names == {"spec.resolved.json", "journal.jsonl", "bundle.json", "metrics.jsonl"}
    assert folder.decisions == Path("/h/runs/r1/release/decisions.jsonl")
    assert (folder.snapshots.name, folder.evaluations.name, folder.report.name) == ("snapshots", "eval", "report")
    assert folder.summary == Path("/h/runs/r1/summary.json")
    assert folder.split_history == Path("/h/runs/r1/serving/split/split_history.jsonl")


@pytest.mark.parametrize("run_id", ["", "..", "../x", "a/b", ".hidden", "a b", "x" * 101, "a\n"])
def test_a_run_id_that_could_leave_the_folder_is_refused(run_id: str):
    with pytest.raises(BadInputError) as caught:
        RunFolder.of(Path("/h"), run_id)
    assert (caught.value.field, caught.value.value) == ("run_id", run_id)


def test_runs_are_listed_oldest_first(tmp_path: Path):
    assert list_runs(tmp_path) == []
    for age, run_id in enumerate(("b", "a")):
        spec = RunFolder.of(tmp_path, run_id).spec
        write_json(spec, {})
        os.utime(spec.parent, (1000 + age, 1000 + age))
    (tmp_path / "runs" / "unstarted").mkdir()
    assert list_runs(tmp_path) == ["b", "a"]
