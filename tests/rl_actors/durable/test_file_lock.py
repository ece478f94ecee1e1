"""The lock between processes: one holder at a time, a bounded wait, and nothing left behind by a kill."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rl_actors.contracts.errors import InfrastructureError
from rl_actors.durable import files
from rl_actors.durable.files import file_lock
from tests.serving.fakes import START, FakeClock

HOLD = """
import sys, time
from pathlib import Path
from rl_actors.durable.files import file_lock
with file_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def held_elsewhere(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process holds the lock until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@contextmanager
def held_here(path: Path) -> Iterator[int]:
    """A second descriptor of this process holds the lock: to flock it is somebody else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def test_another_process_is_waited_for_only_so_long_and_a_kill_frees_the_lock(tmp_path: Path):
    path = tmp_path / "lock"
    with held_elsewhere(path) as process:
        started = time.monotonic()
        named = rf"lock: in use by process {process.pid} \(waited 0\.1 s\); let it finish"
        refused = pytest.raises(InfrastructureError, match=named)
        with refused, file_lock(path, timeout_s=0.1):
            raise AssertionError("two hold the lock")
        assert 0.1 <= time.monotonic() - started < 5.0
        process.kill()
        process.wait()
        with file_lock(path, timeout_s=5.0):
            pass


def test_the_default_bound_is_a_minute_on_the_given_clock(tmp_path: Path):
    clock, path = FakeClock(), tmp_path / "lock"
    refused = pytest.raises(InfrastructureError, match=r"in use by process unknown \(waited 60 s\)")
    with held_here(path), refused, file_lock(path, clock=clock, sleep=clock.sleep):
        pass
    assert clock.now - START == pytest.approx(60.0, abs=0.1)


def test_a_lock_that_is_let_go_in_time_is_taken(tmp_path: Path):
    """Negative control of the bound: a slow holder is no stuck one."""
    clock, path = FakeClock(), tmp_path / "lock"
    with held_here(path) as descriptor:

        def sleep(seconds: float) -> None:
            clock.sleep(seconds)
            if clock.now - START > 30.0:
                fcntl.flock(descriptor, fcntl.LOCK_UN)

        with file_lock(path, clock=clock, sleep=sleep):
            assert 30.0 < clock.now - START < 31.0


@pytest.mark.parametrize("timeout_s", [0.0, 60.0])
def test_a_free_lock_is_taken_at_once(tmp_path: Path, timeout_s: float):
    def never(seconds: float) -> None:
        raise AssertionError(f"waited {seconds} s for nobody")

    with file_lock(tmp_path / "lock", timeout_s=timeout_s, sleep=never):
        pass


def test_it_is_free_again_after_an_error_inside(tmp_path: Path):
    with pytest.raises(KeyError), file_lock(tmp_path / "lock"):
        raise KeyError
    with file_lock(tmp_path / "lock", timeout_s=0.0):
        pass


def test_a_file_system_without_locks_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It would be refused after a minute too, but as if a process held it."""

    def flock(file: Any, flags: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with pytest.raises(InfrastructureError, match="No locks available"), file_lock(tmp_path / "lock"):
        pass


def test_threads_take_turns(tmp_path: Path):
    inside, most = [0], [0]

    def work() -> None:
        for _ in range(5):
            with file_lock(tmp_path / "lock", timeout_s=20.0, sleep=lambda _: time.sleep(0.001)):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.001)
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
