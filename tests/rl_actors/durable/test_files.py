"""Files are replaced whole or not at all, rows are appended whole, and what a kill tore costs itself alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rl_actors.contracts.errors import InfrastructureError
from rl_actors.durable.files import append_row, read_rows, shared_rows, write_atomic, write_json


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
    with pytest.raises(InfrastructureError, match=r"x: .*No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["x"]


def test_json_that_is_none_is_refused_before_anything_is_written(tmp_path: Path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x", {"a": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_replacement_that_need_not_outlive_a_power_cut_syncs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def never(_descriptor: int) -> None:
        raise AssertionError("synced")

    monkeypatch.setattr(os, "fsync", never)
    write_atomic(tmp_path / "x", "old", is_synced=False)
    write_atomic(tmp_path / "x", "new", is_synced=False)
    assert (tmp_path / "x").read_text() == "new"
    assert [item.name for item in tmp_path.iterdir()] == ["x"]


def test_a_line_torn_in_a_shared_file_stays_for_it_may_be_another_s(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    append_row(path, {"n": 1}, is_shared=True)
    with path.open("a") as other:
        other.write('{"n": 2')
        other.flush()
        append_row(path, {"n": 3}, is_shared=True)
        append_row(path, {"n": 4}, is_shared=True)
    assert [row["n"] for row in shared_rows(path)] == [1, 4]
    assert b'{"n": 2' in path.read_bytes()


def test_a_line_torn_in_a_file_of_ones_own_is_cut_off(tmp_path: Path):
    """Control: in the same file with one writer, the torn line costs nobody a row."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"n": 1}\n{"n": 2')
    append_row(path, {"n": 3})
    assert [row["n"] for row in read_rows(path)] == [1, 3]


def test_a_row_goes_out_in_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """So that lines of several processes do not mix, however long they are."""
    import io

    from rl_actors.durable import files

    class Counting(io.FileIO):
        def write(self, data: object) -> int:  # type: ignore[override]
            sizes.append(len(data))  # type: ignore[arg-type]
            return super().write(data)  # type: ignore[arg-type]

    sizes: list[int] = []
    monkeypatch.setattr(files.io, "FileIO", Counting)
    append_row(tmp_path / "log.jsonl", {"text": "x" * 100_000}, is_shared=True)
    assert sizes == [(tmp_path / "log.jsonl").stat().st_size]
