"""Polling the split, acknowledging it, and what counts as a live gateway."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from rl_actors.contracts.errors import InfrastructureError
from serving.contracts.release import SplitRecord
from serving.split.record import Route, SplitStore, slot_position
from serving.split.watch import Ack, SlotOf, SplitWatcher, acknowledged_epoch, is_live, read_acks
from tests.serving.fakes import START, FakeClock, FakeSlots


def record(epoch: int, share: float = 0.0, at: float = START) -> SplitRecord:
    return SplitRecord(
        epoch=epoch, stable="sft-a", candidate="ppo-b" if share else "", share=share, salt="s", updated_at=at
    )


def watcher(
    tmp_path: Path, clock: FakeClock, gateway: str = "g1", slot_of: SlotOf = lambda salt, session_key: 0
) -> SplitWatcher:
    return SplitWatcher(
        SplitStore(tmp_path / "split"),
        tmp_path / "acks",
        gateway=gateway,
        slot_of=slot_of,
        stale_after_s=30.0,
        clock=clock,
    )


def routed(watch: SplitWatcher, session_key: str = "someone") -> Route:
    return asyncio.run(watch.route(session_key))


def put(tmp_path: Path, *records: SplitRecord) -> None:
    for each in records:
        SplitStore(tmp_path / "split").compare_and_set(each)


def ack(**changes: object) -> Ack:
    import socket

    values = {"gateway": "g1", "host": socket.gethostname(), "pid": os.getpid(), "epoch": 3, "at": START}
    return Ack(**(values | changes))  # type: ignore[arg-type]


def write(tmp_path: Path, *acks: Ack) -> Path:
    directory = tmp_path / "acks"
    directory.mkdir(exist_ok=True)
    for each in acks:
        (directory / f"{each.gateway}.json").write_text(json.dumps(asdict(each)))
    return directory


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    return process.pid


TORN: tuple[bytes | dict[str, object], ...] = (
    b"", b"{", b"[]", b"null", b'{"gateway": "g9"}', b"\x00" * 60, b"\xff\xfe", {"at": "now"}, {"at": float("nan")},
    {"at": float("inf")}, {"at": None}, {"epoch": "3"}, {"epoch": 3.5}, {"epoch": True}, {"pid": 0}, {"pid": -1},
    {"pid": 2**40}, {"pid": "7"}, {"host": None}, {"gateway": "other"}, {"gateway": "../g9"}, {"colour": "red"},
)  # fmt: skip


def torn(change: bytes | dict[str, object]) -> bytes:
    """The bytes themselves, or the word of gateway g9 with values that no gateway writes."""
    return change if isinstance(change, bytes) else json.dumps(asdict(ack(gateway="g9")) | change).encode()


class TestWatcher:
    def test_routes_by_the_record_it_acknowledged(self, tmp_path: Path) -> None:
        watch = watcher(tmp_path, FakeClock())
        put(tmp_path, record(1))
        watch.poll()
        assert routed(watch).policy_version == "sft-a"
        assert [each.epoch for each in read_acks(tmp_path / "acks")] == [1]

    def test_before_the_first_record(self, tmp_path: Path) -> None:
        watch = watcher(tmp_path, FakeClock())
        watch.poll()
        assert watch.epoch == 0
        with pytest.raises(InfrastructureError, match="seatrial up"):
            routed(watch)

    def test_a_session_goes_where_its_slot_lies(self, tmp_path: Path) -> None:
        slots = FakeSlots()
        watch = watcher(tmp_path, FakeClock(), slot_of=slots)
        put(tmp_path, record(1), record(2, 0.3))
        watch.poll()
        first = {key: routed(watch, key).release_channel for key in (f"user-{i}" for i in range(200))}
        assert [channel == "canary" for channel in first.values()] == [
            slot_position(slot, "s") < 0.3 for slot in range(200)
        ]
        assert {key: routed(watch, key).release_channel for key in reversed(first)} == first

    def test_with_nobody_to_serve_no_slot_is_looked_up(self, tmp_path: Path) -> None:
        """A roll back needs one write and nothing else: not the ledger either."""

        def broken(salt: str, session_key: str) -> int:
            raise InfrastructureError("the ledger is locked")

        watch = watcher(tmp_path, FakeClock(), slot_of=broken)
        put(tmp_path, record(1))
        watch.poll()
        assert routed(watch).policy_version == "sft-a"
        put(tmp_path, record(2, 0.5))
        watch.poll()
        with pytest.raises(InfrastructureError, match="locked"):
            routed(watch)

    def test_a_roll_back_while_the_slot_is_read_counts(self, tmp_path: Path) -> None:
        watch = watcher(tmp_path, FakeClock(), slot_of=lambda salt, key: self.change(tmp_path, watch, record(3)))
        put(tmp_path, record(1), record(2, 1.0))
        watch.poll()
        found = routed(watch)
        assert (found.policy_version, found.release_channel, found.split_epoch) == ("sft-a", "general", 3)

    def test_another_release_while_the_slot_is_read_enters_no_comparison(self, tmp_path: Path) -> None:
        """The slot is of the release before: by it, the session would be no random member of an arm."""
        other = replace(record(3, 1.0), salt="next")
        watch = watcher(tmp_path, FakeClock(), slot_of=lambda salt, key: self.change(tmp_path, watch, other))
        put(tmp_path, record(1), record(2, 1.0))
        watch.poll()
        found = routed(watch)
        assert (found.policy_version, found.release_channel, found.split_epoch) == ("sft-a", "general", 0)

    @staticmethod
    def change(tmp_path: Path, watch: SplitWatcher, to: SplitRecord) -> int:
        put(tmp_path, to)
        watch.poll()
        return 0

    def test_acknowledges_only_what_it_routes_by(self, tmp_path: Path) -> None:
        watch = watcher(tmp_path, FakeClock())
        put(tmp_path, record(1))
        watch.poll()
        put(tmp_path, record(2, 0.5))
        assert read_acks(tmp_path / "acks")[0].epoch == 1
        assert watch.epoch == 1
        watch.poll()
        assert read_acks(tmp_path / "acks")[0].epoch == 2

    def test_new_epoch_is_acknowledged_at_once_an_old_one_by_heartbeat(self, tmp_path: Path) -> None:
        clock = FakeClock()
        watch = watcher(tmp_path, clock)
        put(tmp_path, record(1))
        times = []
        for _ in range(6):
            watch.poll()
            times.append(read_acks(tmp_path / "acks")[0].at - START)
            clock.sleep(0.4)
        assert times == pytest.approx([0.0, 0.0, 0.0, 1.2, 1.2, 1.2])

    def test_unreadable_record_keeps_the_old_one_until_it_is_stale(self, tmp_path: Path) -> None:
        clock = FakeClock()
        watch = watcher(tmp_path, clock)
        put(tmp_path, record(1), record(2, 0.99))
        watch.poll()
        (tmp_path / "split" / "split.json").write_text("{broken")
        watch.poll()
        assert routed(watch).release_channel == "canary"
        clock.sleep(31.0)
        watch.poll()
        assert routed(watch).release_channel == "general"

    def test_unreadable_record_is_not_acknowledged(self, tmp_path: Path) -> None:
        clock = FakeClock()
        watch = watcher(tmp_path, clock)
        put(tmp_path, record(1))
        watch.poll()
        (tmp_path / "split" / "split.json").write_text("{broken")
        clock.sleep(5.0)
        watch.poll()
        assert read_acks(tmp_path / "acks")[0].at == START

    @pytest.mark.parametrize(
        ("share", "version", "is_in_force"),
        [(0.5, "ppo-b", True), (0.5, "sft-a", True), (0.0, "ppo-b", False), (0.0, "sft-a", True), (0.5, "x", False)],
    )
    def test_what_is_in_force(self, tmp_path: Path, share: float, version: str, is_in_force: bool) -> None:
        watch = watcher(tmp_path, FakeClock())
        assert not watch.is_in_force(version)
        put(tmp_path, record(1, share))
        watch.poll()
        assert watch.is_in_force(version) == is_in_force

    def test_leave_twice(self, tmp_path: Path) -> None:
        watch = watcher(tmp_path, FakeClock())
        put(tmp_path, record(1))
        watch.poll()
        watch.leave()
        watch.leave()
        assert read_acks(tmp_path / "acks") == ()

    def test_watch_polls_until_cancelled(self, tmp_path: Path) -> None:
        watch = watcher(tmp_path, FakeClock())
        put(tmp_path, record(1))

        async def run() -> None:
            task = asyncio.create_task(watch.watch(0.005))
            while watch.epoch != 1:
                await asyncio.sleep(0.005)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        asyncio.run(asyncio.wait_for(run(), 5.0))


class TestAcknowledgedEpoch:
    def test_is_the_lowest_of_live_gateways(self, tmp_path: Path) -> None:
        directory = write(tmp_path, ack(epoch=5), ack(gateway="g2", epoch=3))
        assert acknowledged_epoch(directory, START + 1, 30.0) == 3

    def test_killed_gateway_on_this_machine_holds_nothing_up(self, tmp_path: Path) -> None:
        directory = write(tmp_path, ack(epoch=5), ack(gateway="g2", epoch=3, pid=dead_pid()))
        assert acknowledged_epoch(directory, START + 1, 30.0) == 5

    def test_silent_gateway_counts_until_its_record_is_stale(self, tmp_path: Path) -> None:
        directory = write(tmp_path, ack(epoch=5, at=START + 25), ack(gateway="g2", epoch=3))
        assert acknowledged_epoch(directory, START + 29, 30.0) == 3
        assert acknowledged_epoch(directory, START + 31, 30.0) == 5

    def test_gateway_elsewhere_is_judged_by_its_word_alone(self) -> None:
        away = ack(host="elsewhere", pid=dead_pid())
        assert is_live(away, START + 1, 30.0)
        assert not is_live(away, START + 31, 30.0)

    def test_gateway_of_another_user_exists(self) -> None:
        assert is_live(ack(pid=1), START, 30.0)

    def test_nobody_is_no_pass(self, tmp_path: Path) -> None:
        with pytest.raises(InfrastructureError, match="no gateway is alive"):
            acknowledged_epoch(tmp_path / "none", START, 30.0)

    def test_gateway_without_a_record_has_acknowledged_nothing(self, tmp_path: Path) -> None:
        directory = write(tmp_path, ack(epoch=4), ack(gateway="g2", epoch=0))
        assert acknowledged_epoch(directory, START, 30.0) == 0

    @pytest.mark.parametrize("change", TORN)
    def test_a_torn_word_is_nobody_s(self, tmp_path: Path, change: bytes | dict[str, object]) -> None:
        """Left by a power cut: it stops no gateway and no controller, acknowledges nothing, and holds nothing up."""
        directory = write(tmp_path, ack(epoch=5))
        (directory / "g9.json").write_bytes(torn(change))
        read = {each.gateway: each for each in read_acks(directory)}
        assert set(read) == {"g1", "g9"}
        assert (read["g9"].epoch, is_live(read["g9"], START, 30.0)) == (0, False)
        assert acknowledged_epoch(directory, START, 30.0) == 5

    def test_a_sound_word_in_the_same_place_counts(self, tmp_path: Path) -> None:
        """Negative control of the torn ones: the same file, whole, is a live gateway that holds the epoch up."""
        directory = write(tmp_path, ack(epoch=5))
        (directory / "g9.json").write_bytes(torn({}))
        assert acknowledged_epoch(directory, START, 30.0) == 3

    def test_torn_words_alone_are_no_gateway(self, tmp_path: Path) -> None:
        directory = write(tmp_path)
        (directory / "g9.json").write_bytes(b"")
        with pytest.raises(InfrastructureError, match="no gateway is alive"):
            acknowledged_epoch(directory, START, 30.0)

    def test_a_word_that_may_not_be_read_is_named(self, tmp_path: Path) -> None:
        (write(tmp_path) / "g9.json").mkdir()
        with pytest.raises(InfrastructureError, match=r"g9\.json.*permissions"):
            read_acks(tmp_path / "acks")

    def test_the_next_heartbeat_mends_a_torn_word(self, tmp_path: Path) -> None:
        clock = FakeClock()
        watch = watcher(tmp_path, clock)
        put(tmp_path, record(1))
        watch.poll()
        (tmp_path / "acks" / "g1.json").write_bytes(b"\x00" * 40)
        clock.sleep(1.0)
        watch.poll()
        assert acknowledged_epoch(tmp_path / "acks", clock(), 30.0) == 1
