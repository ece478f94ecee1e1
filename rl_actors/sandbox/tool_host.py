"""The process in which tools run, apart from the engine: one JSON request a line in, one JSON reply a line out.

Started as `python -m rl_actors.sandbox.tool_host MODULE`; MODULE has a `WORLD`. It holds many worlds, limits its own
memory and each call's time, and ends when its standard input does. Nothing but replies goes to standard output.
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
from typing import Any, TextIO

from rl_actors.environment import ToolFailure, ToolSpec, World, render_observation

MEMORY_LIMIT_BYTES = 1 << 30


class CallTimeoutError(Exception):
    """A tool ran longer than its own limit."""


class ToolHost:
    """Worlds by number, and the operations on them."""

    def __init__(self, world: World) -> None:
        """Hold the workflow's world implementation; nothing is open yet."""
        self._world = world
        self._tools = {tool.name: tool for tool in world.tools}
        self._handles: dict[int, Any] = {}
        self._operations: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
            "open": self._open,
            "call": self._call,
            "read_state": self._read_state,
            "close": self._close,
            "ping": lambda request: "pong",
        }

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return {"id", "value"} or {"id", "failure"}; a defect of the host itself is a failure, never a value."""
        try:
            return {"id": request["id"], "value": self._operations[request["op"]](request)}
        except Exception as error:  # noqa: BLE001 - reported to the caller, who treats it as infrastructure
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
            return _bounded(render_observation(value), tool)
        except ToolFailure as failure:
            return {"content": render_observation({"error": str(failure)}), "error": "tool_failure"}
        except CallTimeoutError:
            return {"content": render_observation({"error": "timeout"}), "error": "timeout"}
        except MemoryError:
            return {"content": render_observation({"error": "out of memory"}), "error": "memory"}

    def _read_state(self, request: Mapping[str, Any]) -> Any:
        return self._world.read_state(self._handles[request["world_id"]], request["selector"])

    def _close(self, request: Mapping[str, Any]) -> bool:
        self._world.close(self._handles.pop(request["world_id"]))
        return True


def _bounded(content: str, tool: ToolSpec) -> dict[str, str]:
    """Return the content, or an error when it is larger than the tool may answer."""
    if len(content) <= tool.max_output_chars:
        return {"content": content, "error": ""}
    return {"content": render_observation({"error": "output too large"}), "error": "output_too_large"}


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise CallTimeoutError in the main thread after `seconds` of wall time."""

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
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(1), "w", encoding="utf8")
    os.dup2(2, 1)  # whatever a tool prints must not look like a reply
    module = importlib.import_module(sys.argv[1])
    serve(ToolHost(module.WORLD), sys.stdin, replies)


if __name__ == "__main__":
    main()
