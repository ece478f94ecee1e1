"""Paths: a run id cannot leave its folder, and no reader ever sees half a file."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cluster.paths import RunFolder, list_runs, new_run_id, seatrial_home, write_atomic, write_json
from rl_actors.errors import BadInputError


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


def test_a_file_is_written_whole_and_replaced(tmp_path: Path):
    path = tmp_path / "below" / "x.json"
    write_json(path, {"b": "ü", "a": [1]})
    assert json.loads(path.read_text()) == {"b": "ü", "a": [1]}
    assert path.read_text().index('"b"') < path.read_text().index('"a"')
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [item.name for item in path.parent.iterdir()] == ["x.json"]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "x"
    write_atomic(path, b"old")

    def no_space(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["x"]


def test_json_that_is_none_is_refused_before_anything_is_written(tmp_path: Path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x", {"a": float("nan")})
    assert list(tmp_path.iterdir()) == []
