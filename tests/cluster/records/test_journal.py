"""The journal: finished work is never done again, never altered, and survives a kill at any byte."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.records.journal import Journal, lock_run
from rl_actors.contracts.errors import InfrastructureError, TamperedError
from rl_actors.durable.hashing import canonical_json, sha256_bytes, sha256_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    path: str
    steps: tuple[int, ...]
    metrics: Mapping[str, float]


MADE = Made(path="sft", steps=(1, 2), metrics={"loss": 0.5, "best": math.inf})


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 1.5
        return self.now


def never() -> Made:
    raise AssertionError("computed again")


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "weights.bin").write_bytes(b"weights")
    (tmp_path / "sft" / "config.json").write_text("{}")
    (tmp_path / "eval.json").write_text("1")
    return tmp_path


def open_journal(run_folder: Path) -> Journal:
    return Journal(run_folder / "journal.jsonl", clock=Clock())


def run_sft(journal: Journal, compute: Callable[[], Made] = never, seed: int = 0) -> Made:
    return journal.run_stage("sft", {"seed": seed}, compute, Made, lambda made: [made.path, "eval.json"])


def test_a_finished_stage_is_returned_and_not_computed_again(run_folder: Path):
    assert run_sft(open_journal(run_folder), lambda: MADE) == MADE
    before = (run_folder / "journal.jsonl").read_bytes()
    assert run_sft(open_journal(run_folder)) == MADE
    assert (run_folder / "journal.jsonl").read_bytes() == before


def test_a_record_says_what_was_made_and_when(run_folder: Path):
    journal = open_journal(run_folder)
    run_sft(journal, lambda: MADE)
    (record,) = journal.records
    assert record.stage == "sft"
    assert (record.started_at, record.finished_at, record.seconds) == (1001.5, 1003.0, 1.5)
    assert record.output_digest == sha256_json(record.output)
    assert set(record.artifacts) == {"sft/", "sft/weights.bin", "sft/config.json", "eval.json"}
    assert record.artifacts["sft/weights.bin"] == sha256_bytes(b"weights")
    assert open_journal(run_folder).records == journal.records


def test_other_inputs_are_another_piece_of_work(run_folder: Path):
    journal = open_journal(run_folder)
    run_sft(journal, lambda: MADE)
    calls = []
    run_sft(journal, lambda: calls.append(1) or MADE, seed=1)
    assert calls == [1]
    assert [record.stage for record in open_journal(run_folder).records] == ["sft", "sft"]
    assert run_sft(open_journal(run_folder), seed=0) == run_sft(open_journal(run_folder), seed=1) == MADE


def test_equal_inputs_have_equal_digests_whatever_their_container(run_folder: Path):
    journal = open_journal(run_folder)
    journal.run_stage("s", {"a": (1, 2), "b": Path("x")}, lambda: 3, int)
    assert journal.run_stage("s", {"b": "x", "a": [1, 2]}, never, int) == 3


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt()])
def test_a_stage_that_raises_leaves_no_record(run_folder: Path, error: BaseException):
    def fail() -> Made:
        raise error

    journal = open_journal(run_folder)
    with pytest.raises(type(error)):
        run_sft(journal, fail)
    assert journal.records == []
    assert not (run_folder / "journal.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda folder: (folder / "sft/weights.bin").write_bytes(b"other"), "weights.bin: changed"),
        (lambda folder: (folder / "sft/weights.bin").unlink(), "weights.bin: left by finished stage 'sft', is gone"),
        (lambda folder: (folder / "sft/extra").write_text(""), "sft: has other files"),
        (lambda folder: (folder / "eval.json").write_text("2"), "eval.json: changed"),
    ],
)
def test_a_changed_artifact_is_refused_by_name(run_folder: Path, change: Callable[[Path], object], named: str):
    run_sft(open_journal(run_folder), lambda: MADE)
    change(run_folder)
    with pytest.raises(TamperedError, match=named):
        run_sft(open_journal(run_folder))


def test_an_artifact_must_be_inside_the_run_folder(run_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    outside = tmp_path_factory.mktemp("outside")
    for path in (outside, run_folder / "nothing", "../x"):
        with pytest.raises(InfrastructureError, match="inside the run folder"):
            open_journal(run_folder).run_stage("s", {}, lambda: 1, int, lambda _, path=path: [path])


def test_a_torn_last_line_is_cut_off_at_every_byte(run_folder: Path):
    path = run_folder / "journal.jsonl"
    run_sft(open_journal(run_folder), lambda: MADE)
    first = path.read_bytes()
    run_sft(open_journal(run_folder), lambda: MADE, seed=1)
    both = path.read_bytes()
    for end in range(len(first), len(both)):
        path.write_bytes(both[:end])
        journal = open_journal(run_folder)
        assert len(journal.records) == 1
        assert path.read_bytes() == both[:end], "reading must not write: another process may be appending"
        run_sft(journal, lambda: MADE, seed=2)
        assert path.read_bytes().startswith(first)
        assert len(open_journal(run_folder).records) == 2


@pytest.mark.parametrize(
    "edit",
    [
        lambda lines: [lines[0].replace(b'"sft"', b'"ppo"', 1), lines[1]],
        lambda lines: [lines[0].replace(b"0.5", b"0.6"), lines[1]],
        lambda lines: [lines[1]],
        lambda lines: [lines[1], lines[0]],
        lambda lines: [b"{}\n", *lines],
        lambda lines: [b"[]\n", *lines],
        lambda lines: [b"\x00\xff\n", *lines],
    ],
)
def test_a_changed_removed_or_moved_record_is_refused(run_folder: Path, edit: Callable[[list[bytes]], list[bytes]]):
    path = run_folder / "journal.jsonl"
    for seed in (0, 1):
        run_sft(open_journal(run_folder), lambda: MADE, seed=seed)
    path.write_bytes(b"".join(edit(path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(TamperedError, match=r"journal.jsonl, line 1|journal.jsonl, line 2"):
        open_journal(run_folder)


def test_the_journal_is_plain_json_with_one_object_a_line(run_folder: Path):
    run_sft(open_journal(run_folder), lambda: MADE)
    (line,) = (run_folder / "journal.jsonl").read_text().splitlines()
    assert "Infinity" in line

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(line, parse_constant=refuse)["output"]["steps"] == [1, 2]


def _hold_until_killed(folder: Path, ready: multiprocessing.connection.Connection) -> None:
    with lock_run(folder):
        ready.send(os.getpid())
        signal.pause()


def test_two_processes_cannot_run_one_folder_and_a_kill_releases_it(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=_hold_until_killed, args=(tmp_path, there))
    child.start()
    try:
        assert here.poll(60)
        pid = here.recv()
        with pytest.raises(InfrastructureError, match=f"in use by process {pid}"), lock_run(tmp_path):
            pass
    finally:
        child.kill()
        child.join(10)
    with lock_run(tmp_path), pytest.raises(InfrastructureError, match=str(os.getpid())), lock_run(tmp_path):
        pass
    with lock_run(tmp_path):
        pass


def _run_and_die(folder: Path) -> None:
    """Finish one stage, then be killed in the middle of the second."""

    def die() -> Made:
        (folder / "half").write_text("unfinished")
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("still alive")

    with lock_run(folder):
        journal = Journal(folder / "journal.jsonl")
        run_sft(journal, lambda: MADE)
        journal.run_stage("ppo", {"seed": 0}, die, Made)


def test_a_run_killed_in_a_stage_resumes_after_the_last_finished_one(run_folder: Path):
    child = multiprocessing.get_context("spawn").Process(target=_run_and_die, args=(run_folder,))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    finished = (run_folder / "journal.jsonl").read_bytes()
    with lock_run(run_folder):
        journal = Journal(run_folder / "journal.jsonl")
        assert [record.stage for record in journal.records] == ["sft"]
        assert run_sft(journal) == MADE
        assert journal.run_stage("ppo", {"seed": 0}, lambda: MADE, Made) == MADE
    assert (run_folder / "journal.jsonl").read_bytes().startswith(finished)
    assert [record.stage for record in Journal(run_folder / "journal.jsonl").records] == ["sft", "ppo"]


def test_a_failed_write_leaves_a_journal_that_can_go_on(run_folder: Path, monkeypatch: pytest.MonkeyPatch):
    journal = open_journal(run_folder)
    run_sft(journal, lambda: MADE)

    def no_space(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(InfrastructureError, match="No space"):
            run_sft(journal, lambda: MADE, seed=1)
    assert len(journal.records) == 1
    run_sft(journal, lambda: MADE, seed=2)
    assert len(open_journal(run_folder).records) == 2


def test_a_journal_that_an_older_version_wrote_is_read_and_goes_on(run_folder: Path):
    """It spelled its lines canonically, the chain among the other keys; the rule of the chain is the same."""
    path, before = run_folder / "journal.jsonl", ""
    for seed in (0, 1):
        body = {
            "stage": "s", "input_digest": sha256_json({"stage": "s", "inputs": seed}), "output": "Infinity",
            "output_digest": sha256_json("Infinity"), "artifacts": {}, "started_at": 1.0, "finished_at": 2.0,
            "seconds": 1.0,
        }  # fmt: skip
        before = sha256_bytes((before + canonical_json(body)).encode())
        with path.open("a") as file:
            file.write(canonical_json({**body, "chain": before}) + "\n")
    old = path.read_bytes()
    journal = open_journal(run_folder)
    assert journal.run_stage("s", 1, never, float) == math.inf
    journal.run_stage("s", 2, lambda: 3.0, float)
    assert path.read_bytes().startswith(old)
    assert [record.output for record in open_journal(run_folder).records] == ["Infinity", "Infinity", 3.0]
    path.write_bytes(old.replace(b'"seconds":1.0', b'"seconds":1.5', 1))
    with pytest.raises(TamperedError, match="line 1"):
        open_journal(run_folder)


def test_a_record_without_a_chain_is_refused(run_folder: Path):
    """Other logs take lines from before there were chains; the journal has always had them."""
    path = run_folder / "journal.jsonl"
    run_sft(open_journal(run_folder), lambda: MADE)
    row = json.loads(path.read_text())
    del row["chain"]
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(TamperedError, match=r"line 1: a finished record was changed \(it has no chain"):
        open_journal(run_folder)
