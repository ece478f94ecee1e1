"""The process in which tools run, apart from the engine: one JSON request a line in, one JSON reply a line out.

Started as `python -m rl_actors.sandbox.tool_host MODULE`; MODULE has a `WORLD`. It holds many worlds, limits its own
memory and each call's time, and ends when its standard input does.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final, TextIO

from rl_actors.environment import ToolFailure, World, render_error, render_observation

MEMORY_LIMIT_BYTES: Final = 1 << 30


class CallTimeoutError(Exception):
    """A tool ran longer than its own limit."""


class ToolHost:
    """Worlds by number, and the operations on them."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._tools = {tool.name: tool for tool in world.tools}
        self._handles: dict[int, Any] = {}
        self._operations: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
            "open": self._open,
            "call": self._call,
            "read_state": self._read_state,
            "close": self._close,
            "ping": lambda _: "pong",
        }

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return {"id", "value"} or {"id", "failure"}; a defect of the host itself is a failure, never a value."""
        try:
            return {"id": request["id"], "value": self._operations[request["op"]](request)}
        # A tool's defect may be anything; the caller treats it as infrastructure.
        except Exception as error:  # noqa: BLE001
            return {"id": request.get("id"), "failure": f"{type(error).__name__}: {error}"}

    def _open(self, request: Mapping[str, Any]) -> int:
        number = int(request["world_id"])
        self._handles[number] = self._world.open(request["world"])
        return number

    def _call(self, request: Mapping[str, Any]) -> dict[str, str]:
        tool = self._tools[request["tool"]]
        handle = self._handles[request["world_id"]]
        try:
            with time_limit(tool.timeout_s):
                value = self._world.functions[tool.name](handle, **request["arguments"])
            content = render_observation(value)
        except ToolFailure as failure:
            return _failed("tool_failure", str(failure))
        except CallTimeoutError:
            return _failed("timeout", "timeout")
        except MemoryError:
            return _failed("memory", "out of memory")
        if len(content) > tool.max_output_chars:
            return _failed("output_too_large", "output too large")
        return {"content": content, "error": ""}

    def _read_state(self, request: Mapping[str, Any]) -> Any:
        return self._world.read_state(self._handles[request["world_id"]], request["selector"])

    def _close(self, request: Mapping[str, Any]) -> bool:
        self._world.close(self._handles.pop(request["world_id"]))
        return True


def _failed(error: str, message: str) -> dict[str, str]:
    return {"content": render_error(message), "error": error}


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise CallTimeoutError in the main thread after `seconds` of wall time."""

    # A signal, not a thread: only it interrupts a tool that computes or sleeps.
    def stop(signum: int, frame: FrameType | None) -> None:
        raise CallTimeoutError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)


def serve(host: ToolHost, lines: TextIO, replies: TextIO) -> None:
    """Answer requests until the input ends."""
    for line in lines:
        replies.write(json.dumps(host.answer(json.loads(line)), separators=(",", ":")) + "\n")
        replies.flush()


def main() -> None:
    """Limit this process, load the workflow's world and serve on the standard streams."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold every open world's rows
    replies = os.fdopen(os.dup(1), "w", encoding="utf8")
    os.dup2(2, 1)  # whatever a tool prints must not look like a reply
    module = importlib.import_module(sys.argv[1])
    serve(ToolHost(module.WORLD), sys.stdin, replies)


if __name__ == "__main__":
    main()
