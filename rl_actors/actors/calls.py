"""Calls to Ray actors: every wait is bounded, and every failure is one line or an error of our own tree."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from rl_actors.contracts import InfrastructureError, SeatrialError

START_TIMEOUT_S = 300.0
LOGS = "its log is under the Ray session's logs/ on its node, and --debug shows the traceback"
_RAISED = re.compile(r"[\w.]*(Error|Exception)\b")
Options = Callable[[str, int], Mapping[str, Any]]
"""(role, rank) -> Ray actor options: placement decides them, this room only passes them on."""


def start_actor(kind: type[Any], options: Mapping[str, Any], *arguments: Any) -> Any:
    """Start an actor and return its handle; it may still be loading."""
    remote: Any = ray.remote(kind)
    return remote.options(**options).remote(*arguments)


def wait_for(references: Sequence[Any], *, timeout_s: float = START_TIMEOUT_S, what: str) -> list[Any]:
    """Return the results of remote calls.

    Raises:
        InfrastructureError: An actor died or did not answer in time. Errors of our own tree pass through unchanged.
    """
    try:
        return ray.get(list(references), timeout=timeout_s)
    except GetTimeoutError as error:
        raise InfrastructureError(f"{what} did not answer within {timeout_s:.0f} s; see the Ray dashboard") from error
    except RayActorError as error:
        raise InfrastructureError(f"{what} died: {one_line(error)}; {LOGS}") from error
    except RayTaskError as error:
        # Ray's error of a known kind passes itself off as its cause, and has forgotten the process.
        pid, address = getattr(error, "pid", None), getattr(error, "ip", None)
        where = f" (pid {pid} on {address})" if pid and address else ""
        cause: BaseException = error
        # Ray wraps an error once per border that it crossed.
        while isinstance(cause, RayTaskError) and isinstance(cause.cause, BaseException):
            cause = cause.cause
        # Ours as itself: it has its own exit code and remedy.
        if isinstance(cause, SeatrialError):
            raise cause from error
        raise InfrastructureError(f"{what} failed: {one_line(cause)}{where}; {LOGS}") from error


def one_line(error: BaseException) -> str:
    """Return type and first line of an exception; of a dead actor the line that says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line[0].isspace()]
    if not isinstance(error, RayActorError):
        return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    # Ray's own traceback comes first, what the actor raised last.
    raised = [line for line in lines if _RAISED.match(line)]
    return (raised or lines or [type(error).__name__])[-1]


def close_actors(actors: Sequence[Any], *, graceful: bool = False) -> None:
    """End actors; a graceful close lets them stop their own processes first, within ten seconds."""
    if graceful:
        ray.wait([actor.close.remote() for actor in actors], num_returns=len(actors), timeout=10.0)
    for actor in actors:
        ray.kill(actor)
