"""Users in a thread of their own: what they do is told, and when they break it is not silence but an error."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from cluster.simulation import traffic as traffic_thread
from cluster.simulation.traffic import Report, TrafficProgress, TrafficThread
from rl_actors.contracts.errors import InfrastructureError


@dataclass
class FakeDriver:
    """A driver whose progress the test makes up."""

    progress: TrafficProgress = field(default_factory=TrafficProgress)


Script = Callable[[FakeDriver, Callable[[], bool], Callable[[TrafficProgress], None]], None]


def ignore(_stage: str, _done: int, _total: int, _metrics: Mapping[str, float]) -> None:
    """Nobody looks on."""


def start(
    monkeypatch: pytest.MonkeyPatch, script: Script, index: int = 0, report: Report = ignore
) -> tuple[TrafficThread, Any]:
    """Start users that follow a script."""
    seen: list[Sequence[Any]] = []

    def run_traffic(driver: FakeDriver, tasks: Sequence[Any], *, is_over: Any, on_progress: Any) -> None:
        seen.append(tasks)
        script(driver, is_over, on_progress)

    monkeypatch.setattr(traffic_thread, "run_traffic", run_traffic)
    over = threading.Event()
    thread = TrafficThread(FakeDriver(), ["a", "b", "c"], over, report, index)  # type: ignore[arg-type, list-item]
    thread.start()
    return thread, (over, seen)


def test_users_who_ran_out_of_tickets_are_finished_and_healthy(monkeypatch: pytest.MonkeyPatch):
    thread, (_, seen) = start(monkeypatch, lambda driver, is_over, tell: None)
    thread.join(10)
    assert thread.is_finished
    assert seen == [["a", "b", "c"]]
    thread.require_healthy()


def test_users_go_on_until_the_release_is_over(monkeypatch: pytest.MonkeyPatch):
    def wait(_driver: FakeDriver, is_over: Callable[[], bool], _tell: object) -> None:
        while not is_over():
            pause.wait(0.01)

    pause = threading.Event()
    thread, (over, _) = start(monkeypatch, wait)
    assert not thread.is_finished
    thread.require_healthy()
    over.set()
    thread.join(10)
    assert thread.is_finished


@pytest.mark.parametrize("error", [RuntimeError("no host"), KeyboardInterrupt("stop"), SystemExit(3)])
def test_a_broken_driver_is_an_infrastructure_error(monkeypatch: pytest.MonkeyPatch, error: BaseException):
    def broken(*_: object) -> None:
        raise error

    thread, _ = start(monkeypatch, broken)
    thread.join(10)
    assert thread.is_finished
    with pytest.raises(InfrastructureError, match="the traffic driver stopped") as caught:
        thread.require_healthy()
    assert type(error).__name__ in str(caught.value)


def test_an_error_of_our_own_tree_comes_out_as_itself(monkeypatch: pytest.MonkeyPatch):
    def unreached(*_: object) -> None:
        raise InfrastructureError("20 tickets in a row reached no gateway")

    thread, _ = start(monkeypatch, unreached)
    thread.join(10)
    with pytest.raises(InfrastructureError, match=r"^20 tickets in a row"):
        thread.require_healthy()


@pytest.mark.parametrize(("index", "stage"), [(0, "canary"), (1, "failback_drill")])
def test_progress_is_told_under_the_releases_own_stage(monkeypatch: pytest.MonkeyPatch, index: int, stage: str):
    seen: list[Any] = []

    def tell_once(driver: FakeDriver, _is_over: object, tell: Callable[[TrafficProgress], None]) -> None:
        progress = driver.progress
        progress.num_sent, progress.num_answered, progress.num_failed, progress.seconds = 10, 9, 1, 3.0
        progress.answered.update({"general": 6, "canary": 3})
        progress.successes.update({"general": 3, "canary": 3})
        tell(progress)

    thread, _ = start(monkeypatch, tell_once, index, lambda *told: seen.append(told))
    thread.join(10)
    ((name, done, total, metrics),) = seen
    assert (name, done, total) == (stage, 10, 3)
    assert metrics == {
        "requests_per_s": 3.0, "canary": 3.0, "stable_success": 0.5, "canary_success": 1.0, "failed": 1.0,
    }  # fmt: skip
    assert thread.progress.num_sent == 10


def test_users_never_keep_the_process_alive(monkeypatch: pytest.MonkeyPatch):
    thread, _ = start(monkeypatch, lambda driver, is_over, tell: None)
    assert thread.daemon
    thread.join(10)
