"""The split and its acknowledgements while others write: readers see no part, what fails leaves the old state."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_actors.contracts.errors import InfrastructureError, StageRefusedError, TamperedError
from rl_actors.durable.files import ChainedLog, append_row, file_lock, read_rows, write_atomic
from serving.contracts.release import SplitRecord
from serving.split.record import SplitStore, route, slot_position
from serving.split.watch import SplitWatcher, acknowledged_epoch, is_live, read_acks
from tests.serving.fakes import START, FakeClock, Killed
from tests.serving.split.test_split_watch import ack, write

RECORD = SplitRecord(epoch=1, stable="sft-a", candidate="ppo-b", share=0.25, salt="r1", updated_at=START)


@pytest.fixture
def store(tmp_path: Path) -> SplitStore:
    found = SplitStore(tmp_path / "split")
    found.compare_and_set(RECORD)
    return found


def logged(store: SplitStore) -> list[int]:
    """The epochs in the history file itself, repeats included."""
    return [row["epoch"] for row in read_rows(store.path.parent / "split_history.jsonl")]


class TestRouteBounds:
    def test_a_session_exactly_at_the_share_is_stable_s(self):
        """Positions lie in [0, 1): share 1 takes all of them, and share p the fraction p."""
        position = slot_position(17, "r1")
        at = replace(RECORD, share=position)
        above = replace(RECORD, share=position + 2**-53)
        assert route(at, position, START, 30.0).release_channel == "general"
        assert route(above, position, START, 30.0).release_channel == "canary"

    @pytest.mark.parametrize("behind_s", [0.5, 3600.0])
    def test_a_gateway_whose_clock_is_behind_follows_the_split(self, behind_s: float):
        """A record from the future is fresh: machines disagree, and a slow clock may not switch a canary off."""
        found = route(replace(RECORD, share=1.0), 0.5, START - behind_s, 30.0)
        assert (found.release_channel, found.split_epoch) == ("canary", 1)

    @settings(max_examples=100, deadline=None)
    @given(st.floats(0.0, 1.0, exclude_max=True), st.floats(0.0, 1.0), st.floats(-100.0, 100.0))
    def test_whoever_is_not_canary_is_stable_and_only_a_fresh_record_counts(
        self, position: float, share: float, age_s: float
    ):
        found = route(replace(RECORD, share=share), position, START + age_s, 30.0)
        assert (found.policy_version, found.release_channel) in {("ppo-b", "canary"), ("sft-a", "general")}
        assert found.split_epoch == (0 if age_s > 30.0 else 1)
        assert found.release_channel == "general" or age_s <= 30.0


class TestExclusion:
    @pytest.mark.parametrize(
        "act",
        [
            lambda store: store.refresh(START + 9.0),
            lambda store: store.compare_and_set(replace(RECORD, epoch=2, share=0.0)),
        ],
        ids=["refresh", "compare_and_set"],
    )
    def test_every_change_waits_for_the_lock(self, store: SplitStore, act: Callable[[SplitStore], object]):
        """A refresh that read epoch 1 before and wrote it after a roll back to epoch 2 would bring the canary back."""
        done = threading.Event()
        thread = threading.Thread(target=lambda: (act(store), done.set()))
        with file_lock(store.path.parent / "split.lock"):
            thread.start()
            assert not done.wait(0.1)
            assert store.read() == RECORD
        assert done.wait(10)
        thread.join()
        assert store.read() != RECORD

    def test_readers_see_whole_records_in_order_while_others_write(
        self, store: SplitStore, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(os, "fsync", lambda fd: None)
        seen: list[list[int]] = [[], []]
        finished = threading.Event()

        def read(epochs: list[int]) -> None:
            while not finished.is_set():
                record = store.read()
                epochs.append(record.epoch if record else 0)

        readers = [threading.Thread(target=read, args=(epochs,)) for epochs in seen]
        for reader in readers:
            reader.start()
        for epoch in range(2, 80):
            store.compare_and_set(replace(RECORD, epoch=epoch, candidate="x" * 500 * (epoch % 9) + "c"))
            store.refresh(START + epoch)
        finished.set()
        for reader in readers:
            reader.join()
        for epochs in seen:
            assert epochs
            assert epochs == sorted(epochs)
            assert epochs[0] >= 1

    def test_refresh_changes_no_history_and_returns_what_is_in_force(self, store: SplitStore):
        assert store.refresh(START + 50.0) == replace(RECORD, updated_at=START + 50.0)
        assert logged(store) == [1]
        assert store.history() == {1: replace(RECORD, updated_at=START + 50.0)}


class TestHistory:
    def test_each_epoch_is_logged_once_whatever_was_killed(self, store: SplitStore):
        """Killed twice after the switch; the next writer makes up for its predecessor, and only for it."""
        for epoch in (2, 3):
            with mock.patch.object(ChainedLog, "append", side_effect=Killed), pytest.raises(Killed):
                store.compare_and_set(replace(RECORD, epoch=epoch, share=epoch / 10))
        assert store.history().keys() == {1, 3}
        store.compare_and_set(replace(RECORD, epoch=4))
        store.compare_and_set(replace(RECORD, epoch=5))
        assert logged(store) == [1, 3, 4, 5]
        assert store.history()[3].share == 0.3

    def test_a_torn_last_line_is_no_epoch(self, store: SplitStore):
        store.compare_and_set(replace(RECORD, epoch=2))
        path = store.path.parent / "split_history.jsonl"
        path.write_bytes(path.read_bytes()[:-5])
        assert store.history().keys() == {1, 2}, "the record in force is known without its line"
        store.compare_and_set(replace(RECORD, epoch=3))
        assert logged(store) == [1, 2, 3]

    @pytest.mark.parametrize(
        "row", [{"epoch": 2}, {**asdict(RECORD), "share": 7.0}, {**asdict(RECORD), "colour": "red"}]
    )
    def test_a_line_that_is_no_record_is_named(self, store: SplitStore, row: dict[str, object]):
        ChainedLog(store.path.parent / "split_history.jsonl").append(row)
        with pytest.raises(TamperedError, match=r"split_history\.jsonl"):
            store.history()

    def test_a_refused_epoch_leaves_no_trace(self, store: SplitStore):
        with pytest.raises(StageRefusedError):
            store.compare_and_set(replace(RECORD, epoch=5))
        assert logged(store) == [1]

    @settings(max_examples=40, deadline=None)
    @given(name=st.text(min_size=1), salt=st.text(), share=st.floats(0.0, 1.0), at=st.floats(-1e12, 1e12))
    def test_any_record_comes_back_as_it_was(
        self, tmp_path_factory: pytest.TempPathFactory, name: str, salt: str, share: float, at: float
    ):
        record = SplitRecord(epoch=1, stable=name, candidate=name + "2", share=share, salt=salt, updated_at=at)
        found = SplitStore(tmp_path_factory.mktemp("split"))
        with mock.patch.object(os, "fsync"):
            found.compare_and_set(record)
        assert found.read() == record
        assert found.history() == {1: record}


class TestDurability:
    def test_the_text_is_on_disk_before_its_name_is_and_the_name_before_the_return(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        """Renamed first, a power cut leaves an empty record in force; without the directory, the old one."""
        path, acts = tmp_path / "file.json", []
        write_atomic(path, "old")
        replace_file = Path.replace

        def sync(fd: int) -> None:
            synced = Path(os.readlink(f"/proc/self/fd/{fd}"))
            acts.append("sync the directory" if synced == tmp_path else f"sync {synced.read_text()!r}")

        def rename(source: Path, target: Path) -> Path:
            acts.append(f"rename {source.read_text()!r}")
            return replace_file(source, target)

        monkeypatch.setattr(os, "fsync", sync)
        monkeypatch.setattr(Path, "replace", rename)
        write_atomic(path, "new")
        assert acts == ["sync 'new'", "rename 'new'", "sync the directory"]

    def test_a_disk_that_fails_leaks_no_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        path = tmp_path / "file.json"
        write_atomic(path, "old")
        before = len(os.listdir("/proc/self/fd"))

        def fail(fd: int) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "fsync", fail)
        for _ in range(3):
            with pytest.raises(InfrastructureError, match="Input/output"):
                write_atomic(path, "new")
            with pytest.raises(InfrastructureError, match="Input/output"):
                ChainedLog(tmp_path / "log.jsonl").append({})
        assert len(os.listdir("/proc/self/fd")) == before
        assert path.read_text() == "old"

    def test_a_directory_that_cannot_be_synced_leaks_no_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """The rename is done, so the new text is in force; that it may not last is said, not hidden."""
        path, before = tmp_path / "file.json", len(os.listdir("/proc/self/fd"))

        def fail_on_directories(fd: int) -> None:
            if os.path.isdir(f"/proc/self/fd/{fd}"):
                raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "fsync", fail_on_directories)
        with pytest.raises(InfrastructureError, match="Input/output"):
            write_atomic(path, "new")
        assert len(os.listdir("/proc/self/fd")) == before
        assert path.read_text() == "new"

    def test_a_reader_meets_a_line_that_is_just_being_mended(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """One look at the file decides: a torn line must not be cut at the end that a later look would find."""
        path = tmp_path / "log.jsonl"
        append_row(path, {"n": 1})
        torn = path.read_bytes() + b'{"n": 2, "te'
        looks = iter([torn, path.read_bytes() + b'{"n": 2, "text": "whole"}\n'])
        monkeypatch.setattr(Path, "read_bytes", lambda self: next(looks))
        assert read_rows(path) == [{"n": 1}]
        assert read_rows(path) == [{"n": 1}, {"n": 2, "text": "whole"}]


class TestAcknowledging:
    def watcher(self, tmp_path: Path, store: SplitStore, clock: FakeClock) -> SplitWatcher:
        return SplitWatcher(
            store, tmp_path / "acks", gateway="g1", slot_of=lambda salt, key: 0, stale_after_s=30.0, clock=clock
        )

    def test_what_cannot_be_acknowledged_is_followed_all_the_same(self, tmp_path: Path, store: SplitStore):
        """A full disk may delay the controller's word, never the split itself; afterwards the word is given."""
        watch = self.watcher(tmp_path, store, FakeClock())
        (tmp_path / "acks").write_text("in the way")
        watch.poll()
        assert watch.epoch == 1
        assert watch.stable == "sft-a"
        (tmp_path / "acks").unlink()
        watch.poll()
        assert [found.epoch for found in read_acks(tmp_path / "acks")] == [1]

    @pytest.mark.parametrize(
        "change", [{"share": 7.0}, {"epoch": 0}, {"stable": ""}, {"candidate": ""}, {"colour": "red"}]
    )
    def test_a_record_of_impossible_values_is_damaged_and_ends_no_watch(
        self, tmp_path: Path, store: SplitStore, change: dict[str, object]
    ):
        """Well-formed JSON that could route nowhere: the gateway keeps what it holds and goes on looking."""
        watch = self.watcher(tmp_path, store, FakeClock())
        watch.poll()
        store.path.write_text(json.dumps({**asdict(RECORD), **change}))
        with pytest.raises(TamperedError, match=r"split\.json is not a split record"):
            store.read()
        watch.poll()
        assert watch.epoch == 1
        store.path.write_text(json.dumps(asdict(replace(RECORD, epoch=2))))
        watch.poll()
        assert watch.epoch == 2

    def test_a_record_that_vanished_is_still_the_one_held(self, tmp_path: Path, store: SplitStore):
        watch = self.watcher(tmp_path, store, FakeClock())
        watch.poll()
        store.path.unlink()
        watch.poll()
        assert watch.epoch == 1
        assert watch.is_in_force("ppo-b")

    @pytest.mark.parametrize(("waited_s", "is_new"), [(0.999, False), (1.0, True)])
    def test_the_heartbeat_is_a_second(self, tmp_path: Path, store: SplitStore, waited_s: float, is_new: bool):
        clock = FakeClock()
        watch = self.watcher(tmp_path, store, clock)
        watch.poll()
        clock.sleep(waited_s)
        watch.poll()
        assert (read_acks(tmp_path / "acks")[0].at > START) == is_new

    def test_a_new_epoch_is_acknowledged_whatever_the_clock_does(self, tmp_path: Path, store: SplitStore):
        clock = FakeClock()
        watch = self.watcher(tmp_path, store, clock)
        watch.poll()
        clock.sleep(-7200.0)
        store.compare_and_set(replace(RECORD, epoch=2, share=0.0, updated_at=clock()))
        watch.poll()
        assert acknowledged_epoch(tmp_path / "acks", clock(), 30.0) == 2

    def test_a_gateway_that_leaves_while_others_look_is_gone(self, tmp_path: Path):
        """Its file is listed, and missing when it is opened."""
        directory = write(tmp_path, ack())
        (directory / "g0.json").symlink_to(directory / "gone.json")
        assert [found.gateway for found in read_acks(directory)] == ["g1"]

    def test_half_written_words_are_not_read(self, tmp_path: Path):
        directory = write(tmp_path, ack())
        (directory / "g2.tmp").write_text(json.dumps(asdict(ack(gateway="g2", epoch=1)))[:20])
        assert acknowledged_epoch(directory, START, 30.0) == 3

    @pytest.mark.parametrize(("age_s", "lives"), [(30.0, True), (30.001, False), (-60.0, True)])
    def test_a_gateway_lives_until_its_record_is_stale(self, age_s: float, lives: bool):
        """The same bound as in `route`: exactly as old is still live in both."""
        assert is_live(ack(), START + age_s, 30.0) == lives
        assert (route(replace(RECORD, share=1.0), 0.5, START + age_s, 30.0).release_channel == "canary") == lives

    @pytest.mark.parametrize(("error", "lives"), [(PermissionError(), True), (ProcessLookupError(), False)])
    def test_a_process_that_may_not_be_signalled_exists(
        self, monkeypatch: pytest.MonkeyPatch, error: OSError, lives: bool
    ):
        asked: list[tuple[int, int]] = []

        def kill(pid: int, signal: int) -> None:
            asked.append((pid, signal))
            raise error

        monkeypatch.setattr(os, "kill", kill)
        assert is_live(ack(pid=1), START, 30.0) == lives  # process 1 is always there, and another user's
        assert asked == [(1, 0)], "looking must never end it"
