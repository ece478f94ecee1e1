"""The process sandbox: a pool of tool hosts, worlds spread over them, every wait bounded.

A host that dies or hangs takes its open worlds with it: their callers get ToolHostError (infrastructure, never an
observation) and the pool starts a fresh process.
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
from typing import Any, Final, Self

from rl_actors.contracts import ToolHostError, ToolResult

_MAX_LINE: Final = 1 << 22
_KEPT_VARIABLES: Final = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "SEATRIAL_WORKFLOWS")


def host_command(module: str) -> list[str]:
    """Return the command that starts one tool host."""
    # -P: no module of the working directory is imported, or whoever can write there runs code with our rights.
    return [sys.executable, "-P", "-m", "rl_actors.sandbox.tool_host", module]


def host_environment() -> dict[str, str]:
    """Return the environment of a tool host."""
    # Named, not inherited: keys and tokens of ours must not reach a tool. Seed 0: sets iterate alike in every host.
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return {**kept, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONHASHSEED": "0"}


class ToolHostProcess:
    """One host process and the replies it owes; its `directory` goes with it."""

    def __init__(self, process: asyncio.subprocess.Process, directory: str) -> None:
        self._process, self._directory = process, directory
        self._owed: dict[int, asyncio.Future[Any]] = {}
        self._ids = itertools.count()
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, command: Sequence[str]) -> Self:
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
                start_new_session=True,  # a signal to our group spares it, and killing its group ends its children
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
        """End the process and wait until it is gone."""
        self.kill()
        await self._process.wait()
        await asyncio.gather(self._reader, return_exceptions=True)

    def _write(self, message: Mapping[str, Any]) -> None:
        if self._process.stdin is None or not self.alive:
            raise ToolHostError("tool host has died")
        self._process.stdin.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    async def _read(self) -> None:
        """Settle replies until the output ends."""
        assert self._process.stdout is not None
        try:
            # Too long a line, or no JSON: half a reply cannot be resynchronised, so nothing after it counts.
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
        if reply is None or reply.done():  # late: its caller was cancelled or has given up
            return
        if "failure" in message:
            reply.set_exception(ToolHostError(f"tool host failed: {message['failure']}"))
        else:
            reply.set_result(message["value"])


class ProcessWorld:
    """One world in a host process; `wait_s` bounds everything but a tool's own limit."""

    def __init__(self, host: ToolHostProcess, world_id: int, wait_s: float, clock: Callable[[], float]) -> None:
        self._host, self._world_id, self._wait_s, self._clock = host, world_id, wait_s, clock

    async def call(self, tool: str, arguments: Mapping[str, Any]) -> ToolResult:
        """Run one tool that the executor has already approved."""
        started = self._clock()
        value = await self._request("call", tool=tool, arguments=dict(arguments))
        duration_ms = (self._clock() - started) * 1000.0
        return ToolResult(content=value["content"], error=value["error"], duration_ms=duration_ms)

    async def read_state(self, selector: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the rows that decide the outcome."""
        return await self._request("read_state", selector=dict(selector))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        with suppress(ToolHostError):  # a dead host has already forgotten it
            await self._request("close")

    async def _request(self, op: str, **fields: Any) -> Any:
        return await self._host.request(self._wait_s, op=op, world_id=self._world_id, **fields)


class ProcessSandbox:
    """A few tool hosts of one workflow; worlds go to them in turn."""

    level = "process"  # a process of its own with limits; no namespace or seccomp filter yet

    def __init__(
        self, module: str, *, num_hosts: int, wait_s: float = 30.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        # Hosts start at first use: before that there may be no event loop to read them on.
        self._command = host_command(module)
        self._hosts: list[ToolHostProcess | None] = [None] * num_hosts
        self._locks = [asyncio.Lock() for _ in range(num_hosts)]
        self._ids = itertools.count()
        self._wait_s, self._clock = wait_s, clock

    async def open(self, world: Mapping[str, Any]) -> ProcessWorld:
        """Open a world on the next host, starting or replacing the host when needed."""
        world_id = next(self._ids)
        host = await self._running_host(world_id % len(self._hosts))
        await host.request(self._wait_s, op="open", world_id=world_id, world=dict(world))
        return ProcessWorld(host, world_id, self._wait_s, self._clock)

    async def close(self) -> None:
        """Stop every host."""
        for host in self._hosts:
            if host is not None:
                await host.close()
        self._hosts = [None] * len(self._hosts)

    async def _running_host(self, index: int) -> ToolHostProcess:
        async with self._locks[index]:  # two worlds opened at once must not start two processes for one place
            host = self._hosts[index]
            if host is None or not host.alive:
                host = await ToolHostProcess.start(self._command)
                self._hosts[index] = host
            return host
