"""Long-living processes of a service: started apart from us, found again by pid and birth, stopped exactly.

A pid alone is not an identity: it is reused. A process is ours only while its birth (boot id and start tick, from
/proc) is the one that was recorded.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rl_actors.errors import InfrastructureError

PROC: Final = Path("/proc")
MAX_WORDS: Final = 300
ERROR_LINE: Final = re.compile(r"[\w.]*(Error|Exception): ")
STOP_S: Final = 15.0
KILLED_S: Final = 5.0
_PARENT_FIELD, _START_FIELD = 1, 19


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessMark:
    """Which process: its pid and its birth."""

    pid: int
    birth: str

    @property
    def is_alive(self) -> bool:
        """Whether this very process runs; a zombie and another process under the same pid do not count."""
        return bool(self.birth) and birth_of(self.pid) == self.birth


def mark_of(pid: int) -> ProcessMark:
    """Return the mark of a process; one that is gone already is never alive."""
    return ProcessMark(pid=pid, birth=birth_of(pid))


def birth_of(pid: int) -> str:
    """Return the boot id and start tick of a live process, or nothing."""
    fields = _stat(pid)
    if not fields or fields[0] in {"Z", "X"}:
        return ""
    boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{fields[_START_FIELD]}"


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the command's name, which may itself hold spaces and brackets."""
    try:
        text = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def descendants(pid: int) -> list[ProcessMark]:
    """Return all processes below one, nearest first."""
    parents = {int(entry.name): _stat(int(entry.name)) for entry in PROC.iterdir() if entry.name.isdigit()}
    children: dict[int, list[int]] = {}
    for child, fields in parents.items():
        if fields:
            children.setdefault(int(fields[_PARENT_FIELD]), []).append(child)
    found, queue = [], list(children.get(pid, ()))
    while queue:
        child = queue.pop(0)
        found.append(mark_of(child))
        queue += children.get(child, ())
    return found


def start_process(command: Sequence[str], log: Path, environ: Mapping[str, str] | None = None) -> ProcessMark:
    """Start a command in a session of its own, so that it outlives us and our terminal."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | dict(environ or {})
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
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
            raise InfrastructureError(f"{what} ended while starting: {last_words(log)}")
        if clock() > deadline:
            raise InfrastructureError(f"{what} did not answer within {timeout_s:g} s: {last_words(log)}")
        sleep(0.25)


def last_words(log: Path) -> str:
    """Return the last error in a log, or else its last line, and where the rest is."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if ERROR_LINE.match(line)]
    words = (errors or lines or ["nothing"])[-1]
    return f"{words[:MAX_WORDS]} (see {log})"


def stop_processes(
    marks: Iterable[ProcessMark],
    *,
    timeout_s: float = STOP_S,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[int]:
    """End these processes and everything below them; returns the pids that were alive. Nothing else is touched.

    SIGTERM to each, so that it can end its own children; SIGKILL for whatever is left after `timeout_s`.
    """
    roots = [mark for mark in marks if mark.is_alive]
    family = [*roots, *(child for root in roots for child in descendants(root.pid))]
    for root in roots:
        _send(root, signal.SIGTERM)
    deadline = clock() + timeout_s
    while any(mark.is_alive for mark in family) and clock() < deadline:
        sleep(0.1)
    for mark in family:
        _send(mark, signal.SIGKILL)
    # A kill takes effect when the kernel gets to it; a port is free only after that.
    deadline = clock() + KILLED_S
    while any(mark.is_alive for mark in family) and clock() < deadline:
        sleep(0.02)
    for root in roots:
        _reap(root.pid)
    return [root.pid for root in roots]


def _send(mark: ProcessMark, number: signal.Signals) -> None:
    if mark.is_alive:
        with suppress(ProcessLookupError):
            os.kill(mark.pid, number)


def _reap(pid: int) -> None:
    """Take note of a child's end when it is our own child; otherwise init does."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
