"""Runs that a dead gateway left open: who ends them, when, and whose are never touched."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from rl_actors.contracts.errors import InfrastructureError
from serving.contracts.release import STALE_AFTER_S
from serving.gateway.http import watch_orphans
from serving.platform.replicas import end_orphans, serve_ports
from serving.split.watch import Ack, read_acks
from serving.store.ledger import RequestLedger
from serving.store.served import GatewayConfig
from tests.serving.fakes import START, FakeClock, make_record
from tests.serving.gateway.live_fakes import make_config, make_rig
from tests.serving.split.test_split_watch import TORN, ack, dead_pid, torn, write

ELSEWHERE = "another-host"


def ledger_of(tmp_path: Path, owner: str = "new") -> RequestLedger:
    return RequestLedger(make_config(tmp_path).files.ledger, owner=owner)


def leave_open(tmp_path: Path, owner: str, number: int, *, at: float = START) -> None:
    """Leave a run of `owner` open, as a kill does."""
    ledger = ledger_of(tmp_path, owner)
    ledger.start(replace(make_record(number), started_at=at))
    ledger.close()


def statuses(ledger: RequestLedger) -> dict[str, str]:
    return {row.run_id: row.status for row in ledger.rows()}


def word(name: str, **changes: object) -> Ack:
    return ack(**({"gateway": name} | changes))


class TestOnce:
    def test_open_runs_of_dead_gateways_are_aborted(self, tmp_path: Path) -> None:
        leave_open(tmp_path, "dead", 1)
        live = ledger_of(tmp_path, "live")
        live.start(make_record(2))
        write(tmp_path, word("dead", pid=dead_pid()), word("live"))
        assert end_orphans(live, make_config(tmp_path), FakeClock()) == 1
        assert statuses(live) == {"run-1": "aborted", "run-2": "running"}
        assert [each.gateway for each in read_acks(tmp_path / "acks")] == ["live"]

    def test_twice_changes_nothing(self, tmp_path: Path) -> None:
        leave_open(tmp_path, "old", 1)
        ledger = ledger_of(tmp_path)
        write(tmp_path, word("old", pid=dead_pid()))
        assert [end_orphans(ledger, make_config(tmp_path), FakeClock()) for _ in range(2)] == [1, 0]

    def test_another_living_gateway_is_left_alone(self, tmp_path: Path) -> None:
        leave_open(tmp_path, "other", 1)
        ledger = ledger_of(tmp_path)
        write(tmp_path, word("other"))
        assert end_orphans(ledger, make_config(tmp_path), FakeClock(START + 29)) == 0
        assert statuses(ledger) == {"run-1": "running"}

    def test_its_own_runs_are_never_orphans(self, tmp_path: Path) -> None:
        """A full disk keeps it from acknowledging, so its word goes stale; its users are answered all the same."""
        ledger = ledger_of(tmp_path, "me")
        ledger.start(make_record(1))
        write(tmp_path, word("me"))
        assert end_orphans(ledger, make_config(tmp_path), FakeClock(START + 1_000)) == 0
        assert statuses(ledger) == {"run-1": "running"}
        assert [each.gateway for each in read_acks(tmp_path / "acks")] == ["me"]

    def test_the_same_word_of_somebody_else_is_swept(self, tmp_path: Path) -> None:
        """Negative control: only the owner's name spares it."""
        leave_open(tmp_path, "me", 1)
        write(tmp_path, word("me"))
        assert end_orphans(ledger_of(tmp_path), make_config(tmp_path), FakeClock(START + 1_000)) == 1

    @pytest.mark.parametrize("change", TORN)
    def test_a_torn_word_is_a_dead_gateway_s(self, tmp_path: Path, change: bytes | dict[str, object]) -> None:
        leave_open(tmp_path, "g9", 1)
        directory = write(tmp_path)
        (directory / "g9.json").write_bytes(torn(change))
        ledger = ledger_of(tmp_path)
        assert end_orphans(ledger, make_config(tmp_path), FakeClock()) == 1
        assert statuses(ledger) == {"run-1": "aborted"}
        assert list(directory.iterdir()) == []

    def test_a_torn_word_stops_no_gateway_from_starting(self, tmp_path: Path) -> None:
        directory = write(tmp_path)
        (directory / "g9.json").write_bytes(b"{")
        ports = serve_ports(make_config(tmp_path))
        assert ports.ledger.owner.startswith("gateway-")
        assert list(directory.iterdir()) == []

    def test_a_name_inside_a_word_reaches_no_other_file(self, tmp_path: Path) -> None:
        directory = write(tmp_path)
        (tmp_path / "keep.json").write_text("{}")
        (directory / "g9.json").write_bytes(torn({"gateway": "../keep", "pid": dead_pid()}))
        end_orphans(ledger_of(tmp_path), make_config(tmp_path), FakeClock())
        assert (tmp_path / "keep.json").exists()


class TestWatch:
    """A gateway that is rescheduled at once: its predecessor's word, of another host, is still fresh."""

    def config(self, tmp_path: Path, stale_after_s: float = 0.06) -> GatewayConfig:
        return replace(make_config(tmp_path), stale_after_s=stale_after_s)

    def watch(self, ledger: RequestLedger, config: GatewayConfig, clock: FakeClock, until: Callable[[], bool]) -> None:
        async def run() -> None:
            task = asyncio.create_task(watch_orphans(partial(end_orphans, ledger, config, clock), config.stale_after_s))
            async with asyncio.timeout(5.0):
                while not until():
                    await asyncio.sleep(0.005)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        asyncio.run(run())

    def test_its_runs_are_ended_once_its_word_is_stale(self, tmp_path: Path) -> None:
        leave_open(tmp_path, "before", 1)
        ledger, clock, config = ledger_of(tmp_path), FakeClock(), self.config(tmp_path)
        write(tmp_path, word("before", host=ELSEWHERE))
        looks: list[float] = []

        def tick() -> bool:
            looks.append(clock())
            clock.sleep(0.01)
            return statuses(ledger) == {"run-1": "aborted"}

        assert end_orphans(ledger, config, clock) == 0, "at its start, the word was fresh"
        self.watch(ledger, config, clock, tick)
        assert looks[-1] - START > 0.05
        assert [row.success for row in ledger.rows()] == ["no"]

    def test_a_fresh_word_is_never_swept(self, tmp_path: Path) -> None:
        leave_open(tmp_path, "before", 1)
        ledger, looks = ledger_of(tmp_path), iter(range(20))
        write(tmp_path, word("before", host=ELSEWHERE))
        self.watch(ledger, self.config(tmp_path), FakeClock(), lambda: next(looks) == 19)
        assert statuses(ledger) == {"run-1": "running"}

    def test_a_locked_ledger_ends_no_watch(self, tmp_path: Path) -> None:
        leave_open(tmp_path, "before", 1)
        ledger, failures = ledger_of(tmp_path), [InfrastructureError("database is locked")] * 2
        abort = ledger.abort_orphans

        def flaky(owner: str, *, at: float) -> int:
            if failures:
                raise failures.pop()
            return abort(owner, at=at)

        ledger.abort_orphans = flaky
        write(tmp_path, word("before", pid=dead_pid()))
        self.watch(ledger, self.config(tmp_path), FakeClock(), lambda: statuses(ledger) == {"run-1": "aborted"})
        assert failures == []

    def test_looks_are_few(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """By default one in five seconds, and the first at once."""
        pauses: list[float] = []

        async def sleep(seconds: float) -> None:
            pauses.append(seconds)
            raise asyncio.CancelledError

        monkeypatch.setattr("serving.gateway.http.asyncio.sleep", sleep)
        config = make_config(tmp_path)
        looks = partial(end_orphans, ledger_of(tmp_path), config, FakeClock())
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(watch_orphans(looks, config.stale_after_s))
        assert pauses == [STALE_AFTER_S / 6] == [5.0]

    def test_the_running_gateway_looks(self, tmp_path: Path) -> None:
        """From its lifespan, beside the split; it ends what went stale after it had started."""
        rig = make_rig(tmp_path, config={"stale_after_s": 0.06})
        leave_open(tmp_path, "before", 1)
        write(tmp_path, word("before", host=ELSEWHERE))
        assert socket.gethostname() != ELSEWHERE

        async def live() -> list[str]:
            async with rig.client():
                seen = [rig.rows()[0].status]
                rig.clock.sleep(1.0)
                deadline = time.monotonic() + 5.0
                while rig.rows()[0].status == "running" and time.monotonic() < deadline:
                    await asyncio.sleep(0.01)
                return [*seen, rig.rows()[0].status]

        assert asyncio.run(live()) == ["running", "aborted"]
