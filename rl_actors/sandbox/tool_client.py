"""The engine's side of the tool hosts: a pool of processes, worlds spread over them, every wait bounded.

A host that dies or hangs takes its open worlds with it: their callers get ToolHostError (infrastructure, never an
observation) and the pool starts a fresh process. The sandbox plugs in here: `host_command` is the seam.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from rl_actors.contracts import ToolHostError, ToolResult

SANDBOX_LEVEL = "process"  # a process of its own with limits; no namespace or seccomp filter yet


_MAX_LINE = 1 << 22


_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "SEATRIAL_WORKFLOWS")


def host_command(module: str) -> list[str]:
    """Return the command that starts one tool host; a sandbox wraps this. `-P`: no module of the working directory."""
    return [sys.executable, "-P", "-m", "rl_actors.sandbox.tool_host", module]


def host_environment() -> dict[str, str]:
    """Return the environment of a tool host: no secret of ours is in it."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return {**kept, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONHASHSEED": "0"}


class ToolHostProcess:
    """One host process, the leader of its own session, in a directory of its own; and the replies it owes."""

    def __init__(self, process: asyncio.subprocess.Process, directory: str) -> None:
        """Start reading replies; `directory` goes with the process."""
        self._process, self._directory = process, directory
        self._owed: dict[int, asyncio.Future[Any]] = {}
        self._ids = itertools.count()
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, command: Sequence[str]) -> ToolHostProcess:
        """Spawn the process with no inherited descriptor, in a directory that nobody else can write."""
        directory = tempfile.mkdtemp(prefix="seatrial-tools-")
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                cwd=directory,
                env=host_environment(),
                close_fds=True,
                start_new_session=True,
                limit=_MAX_LINE,
            )
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        return cls(process, directory)

    @property
    def alive(self) -> bool:
        """True while the process can answer."""
        return self._process.returncode is None and not self._reader.done()

    async def request(self, timeout_s: float, **fields: Any) -> Any:
        """Send one request and return its value.

        Raises:
            ToolHostError: The host died, failed or did not answer in time (then it is killed).
        """
        number = next(self._ids)
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._owed[number] = reply
        try:
            self._write({"id": number, **fields})
            return await asyncio.wait_for(reply, timeout_s)
        except TimeoutError:
            self.kill()
            raise ToolHostError(f"tool host did not answer {fields['op']!r} within {timeout_s:.1f} s") from None
        finally:
            self._owed.pop(number, None)

    def kill(self) -> None:
        """End the process and what it started at once; whoever waits gets ToolHostError."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def close(self) -> None:
        """Kill and wait."""
        self.kill()
        await self._process.wait()
        await asyncio.gather(self._reader, return_exceptions=True)

    def _write(self, message: Mapping[str, Any]) -> None:
        if self._process.stdin is None or not self.alive:
            raise ToolHostError("tool host has died")
        self._process.stdin.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    async def _read(self) -> None:
        """Settle replies until the output ends, or a line is too long or no JSON: then nothing after it counts."""
        assert self._process.stdout is not None
        try:
            with suppress(ValueError):
                while line := await self._process.stdout.readline():
                    self._settle(json.loads(line))
        finally:
            self.kill()
            shutil.rmtree(self._directory, ignore_errors=True)
            for reply in self._owed.values():
                if not reply.done():
                    reply.set_exception(ToolHostError("tool host died before it answered"))

    def _settle(self, message: Mapping[str, Any]) -> None:
        reply = self._owed.get(message["id"])
        if reply is None or reply.done():
            return
        if "failure" in message:
            reply.set_exception(ToolHostError(f"tool host failed: {message['failure']}"))
        else:
            reply.set_result(message["value"])


class OpenWorld:
    """One open world: calls, final state, close. Also an async context manager."""

    def __init__(self, host: ToolHostProcess, world_id: int, wait_s: float, clock: Callable[[], float]) -> None:
        """Remember where the world lives; `wait_s` bounds everything but a tool's own limit."""
        self._host, self._world_id, self._wait_s, self._clock = host, world_id, wait_s, clock

    async def call(self, tool: str, arguments: Mapping[str, Any]) -> ToolResult:
        """Run one tool that the executor has already approved."""
        started = self._clock()
        value = await self._host.request(
            self._wait_s, op="call", world_id=self._world_id, tool=tool, arguments=dict(arguments)
        )
        duration_ms = (self._clock() - started) * 1000.0
        return ToolResult(content=value["content"], error=value["error"], duration_ms=duration_ms)

    async def read_state(self, selector: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the rows that decide the outcome."""
        return await self._host.request(self._wait_s, op="read_state", world_id=self._world_id, selector=dict(selector))

    async def __aenter__(self) -> OpenWorld:
        """Return the world itself."""
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Close the world; a dead host has already forgotten it."""
        with suppress(ToolHostError):
            await self._host.request(self._wait_s, op="close", world_id=self._world_id)


class ToolHostPool:
    """A few tool hosts of one workflow; worlds go to them in turn."""

    def __init__(
        self, module: str, *, num_hosts: int, wait_s: float = 30.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start nothing yet: hosts start at first use, on the caller's event loop."""
        self._command = host_command(module)
        self._hosts: list[ToolHostProcess | None] = [None] * num_hosts
        self._locks = [asyncio.Lock() for _ in range(num_hosts)]
        self._ids = itertools.count()
        self._wait_s, self._clock = wait_s, clock

    async def open(self, world: Mapping[str, Any]) -> OpenWorld:
        """Open a world on the next host, starting or replacing the host when needed."""
        world_id = next(self._ids)
        host = await self._host(world_id % len(self._hosts))
        await host.request(self._wait_s, op="open", world_id=world_id, world=dict(world))
        return OpenWorld(host, world_id, self._wait_s, self._clock)

    async def close(self) -> None:
        """Stop every host."""
        for host in self._hosts:
            if host is not None:
                await host.close()
        self._hosts = [None] * len(self._hosts)

    async def _host(self, index: int) -> ToolHostProcess:
        async with self._locks[index]:
            host = self._hosts[index]
            if host is None or not host.alive:
                host = await ToolHostProcess.start(self._command)
                self._hosts[index] = host
            return host
