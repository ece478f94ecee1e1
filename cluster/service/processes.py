"""Long-living processes of a service: started apart from us, found again by pid and birth, stopped exactly."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
import psutil

from cluster.registry import without_credentials
from rl_actors.contracts import InfrastructureError

PROBE_TIMEOUT_S: Final = 2.0
MAX_WORDS: Final = 300
ERROR_LINE: Final = re.compile(r"[\w.]*(Error|Exception): ")
STOP_S: Final = 15.0
KILLED_S: Final = 5.0
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessMark:
    """The identity of a process: its pid and its birth."""

    # A pid alone is reused: a process is ours only while its birth is the one that was recorded.
    pid: int
    birth: str

    def find(self) -> psutil.Process | None:
        """Return this very process if it runs; a zombie and another process under the same pid do not count."""
        with suppress(psutil.Error, ValueError):
            process = psutil.Process(self.pid)
            if self.birth and _birth_of(process) == self.birth:
                return process
        return None

    @property
    def is_alive(self) -> bool:
        """Whether this very process runs."""
        return self.find() is not None


def mark_of(pid: int) -> ProcessMark:
    """Return the mark of a process; one that is gone already is never alive."""
    birth = ""
    with suppress(psutil.Error, ValueError):
        birth = _birth_of(psutil.Process(pid))
    return ProcessMark(pid=pid, birth=birth)


def _birth_of(process: psutil.Process) -> str:
    """Return the boot id and start tick; nothing for a zombie."""
    if not _runs(process):
        return ""
    # Ticks since the boot: the start by the clock moves when somebody sets the clock.
    since_boot = process.create_time() - psutil.boot_time()
    return f"{_BOOT_ID.read_text().strip()}/{round(since_boot * os.sysconf('SC_CLK_TCK'))}"


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() not in {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}
    return False


def start_process(command: Sequence[str], log: Path, environ: Mapping[str, str] | None = None) -> ProcessMark:
    """Start a command in a session of its own, so that it outlives us and our terminal."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(environ or {}),
            start_new_session=True,
        )
    # Popen would warn that its process still runs when it is collected; ours is meant to.
    process.returncode = 0
    return mark_of(process.pid)


def wait_until(
    what: str,
    answers: Callable[[], bool],
    process: ProcessMark,
    log: Path,
    *,
    timeout_s: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Wait until a started process answers. Raises InfrastructureError with its last words when it does not."""
    deadline = clock() + timeout_s
    while not answers():
        if not process.is_alive:
            raise InfrastructureError(f"{what} ended while starting: {log_tail(log)}")
        if clock() > deadline:
            raise InfrastructureError(f"{what} did not answer within {timeout_s:g} s: {log_tail(log)}")
        sleep(0.25)


def http_ok(url: str) -> bool:
    """Whether a URL answers with a success within two seconds."""
    try:
        # Proxies of the environment are for the outside world; these are addresses of this machine.
        return httpx.get(url, timeout=PROBE_TIMEOUT_S, follow_redirects=True, trust_env=False).is_success
    except (httpx.HTTPError, httpx.InvalidURL):
        return False


def log_tail(log: Path) -> str:
    """Return the last error in a log, or else its last line, without credentials, and where the rest is."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if ERROR_LINE.match(line)]
    words = without_credentials((errors or lines or ["nothing"])[-1])
    return f"{words[:MAX_WORDS]} (see {log})"


def stop_processes(marks: Iterable[ProcessMark], *, timeout_s: float = STOP_S) -> list[int]:
    """End these processes and everything below them; returns the pids that were alive. Nothing else is touched."""
    # SIGTERM to the roots, so that each can end its own children; SIGKILL for whatever is left after `timeout_s`.
    roots = [process for mark in marks if (process := mark.find()) is not None]
    family = [*roots]
    for root in roots:
        with suppress(psutil.NoSuchProcess):
            family += root.children(recursive=True)
            root.terminate()
    for process in _left_after(timeout_s, family):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    # A kill takes effect when the kernel gets to it; a port is free only after that.
    _left_after(KILLED_S, family)
    psutil.wait_procs(roots, timeout=0)  # takes note of the end of those that are our own children
    return [root.pid for root in roots]


def _left_after(timeout_s: float, processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    # Not `wait_procs`: it waits for zombies too, which only their parent can end.
    deadline = time.monotonic() + timeout_s
    while (left := [process for process in processes if _runs(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left
