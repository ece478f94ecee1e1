"""A world whose tools misbehave on request; it runs inside a real tool-host process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rl_actors.environment.tools import ToolFailure, ToolSpec


def echo(handle: dict[str, Any], text: str) -> dict[str, Any]:
    handle["said"].append(text)
    return {"text": text}


def refuse(handle: dict[str, Any], reason: str) -> None:
    raise ToolFailure(reason)


def sleep(handle: dict[str, Any], seconds: float) -> str:
    time.sleep(seconds)
    return "slept"


def spin(handle: dict[str, Any]) -> None:
    while True:
        pass


def hang(handle: dict[str, Any]) -> None:
    """Deaf to the time limit, as a stuck C extension is."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    threading.Event().wait(60)


def eat(handle: dict[str, Any], megabytes: int) -> int:
    return len(bytearray(megabytes << 20))


def big(handle: dict[str, Any], size: int) -> str:
    return "x" * size


def no_json(handle: dict[str, Any]) -> object:
    return object()


def crash(handle: dict[str, Any]) -> None:
    raise RuntimeError("a defect of the tool")


def die(handle: dict[str, Any]) -> None:
    os._exit(7)


def shout(handle: dict[str, Any], text: str) -> str:
    """Print what looks like a reply, from Python and past it."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
    os.write(1, (text + "\n").encode())
    return "ok"


def environment(handle: dict[str, Any]) -> dict[str, str]:
    return dict(os.environ)


def descriptors(handle: dict[str, Any]) -> list[str]:
    names = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            names.append(f"{entry.name}:{entry.readlink()}")
        except OSError:  # the one that lists the folder is gone by now
            continue
    return names


def whereabouts(handle: dict[str, Any]) -> dict[str, Any]:
    return {"pid": os.getpid(), "session": os.getsid(0), "folder": str(Path.cwd())}


def start_child(handle: dict[str, Any]) -> dict[str, Any]:
    return {"pid": subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid}


_FUNCTIONS = (
    echo,
    refuse,
    sleep,
    spin,
    hang,
    eat,
    big,
    no_json,
    crash,
    die,
    shout,
    environment,
    descriptors,
    whereabouts,
    start_child,
)


class StrangeWorld:
    """Remembers what was said in it."""

    tools: Sequence[ToolSpec] = tuple(
        ToolSpec(
            name=function.__name__,
            description="",
            parameters={"type": "object"},
            side_effect="write",
            timeout_s=0.3,
            max_output_chars=20_000,
        )
        for function in _FUNCTIONS
    )
    functions: Mapping[str, Callable[..., Any]] = {function.__name__: function for function in _FUNCTIONS}

    def open(self, world: Mapping[str, Any]) -> dict[str, Any]:
        if world.get("broken"):
            raise KeyError("orders")
        return {"said": list(world.get("said", []))}

    def read_state(self, handle: dict[str, Any], selector: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"said": handle["said"], "padding": "x" * selector.get("padding", 0)}

    def close(self, handle: dict[str, Any]) -> None:
        handle.clear()


WORLD = StrangeWorld()
