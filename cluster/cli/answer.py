"""Answers of commands: tables for people or one JSON line for machines, an exit code, and errors as sentences.

Exit codes: 0 ok; 1 a stage or gate said no; 2 bad input; 3 infrastructure or a defect; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import typer

from cluster.records import seatrial_home
from rl_actors.contracts import BadInputError, SeatrialError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


DEBUG_VARIABLE: Final = "SEATRIAL_DEBUG"
INTERRUPTED: Final = 130

# Errors of the operating system, in words that help. All are exit code 3: the machine, not the spec.
_SYSTEM_REMEDIES: Final[Mapping[int, str]] = {
    errno.ENOSPC: "no space left on the disk: free some, or set SEATRIAL_HOME to a larger one",
    errno.EDQUOT: "the disk quota is used up: free some, or set SEATRIAL_HOME elsewhere",
    errno.EADDRINUSE: "the port is in use: stop what listens there (`seatrial status` shows ours), or choose another",
    errno.EACCES: "permission denied: correct the permissions, or set SEATRIAL_HOME to a directory you can write",
    errno.EROFS: "the file system is read-only: set SEATRIAL_HOME to a directory you can write",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n 65536)",
    errno.ENOMEM: "out of memory: close programs, or lower the batch or model size",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """Findings of a command: `data` for machines, `show` for people."""

    data: Mapping[str, Any]
    show: RenderableType | Callable[[Console], None] = ""
    exit_code: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """An early end of a command: the sentence, the exit code and the parts a machine wants apart."""

    message: str
    exit_code: int
    parts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Scene:
    """Circumstances of a command under way; a run fills in how to resume it once it has a folder."""

    as_json: bool = False
    resume: str = ""
    crash_folder: Path | None = None


def answer(work: Callable[[Scene], Reply], as_json: bool) -> None:
    """Do a command's work, print its reply or its fault, and exit with the right code."""
    scene = Scene(as_json=as_json)
    with _clean_stdout(as_json) as write_json_line:
        reply = _attempt(work, scene)
        if as_json:
            write_json_line(_as_json(reply))
        elif isinstance(reply, Fault):
            print_fault(reply)
        else:
            _show(reply)
    raise typer.Exit(reply.exit_code)


def _attempt(work: Callable[[Scene], Reply], scene: Scene) -> Reply | Fault:
    try:
        return work(scene)
    except typer.Exit:
        raise  # Typer's own way out, of `--help` for example
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  the outermost border: nothing may leave as a traceback
        if os.environ.get(DEBUG_VARIABLE, "") not in {"", "0"}:
            traceback.print_exc()
        return fault_of(error, scene)


def fault_of(error: BaseException, scene: Scene) -> Fault:
    """Turn an exception into a sentence with a remedy and an exit code."""
    # Ray raises a task's error as a copy whose text is a remote traceback; `cause` is the original.
    cause = getattr(error, "cause", None)
    error = cause if isinstance(cause, SeatrialError) else error
    if isinstance(error, KeyboardInterrupt):
        message = f"interrupted; to go on: {scene.resume}" if scene.resume else "interrupted"
        return Fault(message=message, exit_code=INTERRUPTED, parts={"resume": scene.resume})
    if isinstance(error, BadInputError):
        parts = {"field": error.field, "value": error.value, "remedy": error.remedy}
        return Fault(message=str(error), exit_code=error.exit_code, parts=parts)
    if isinstance(error, SeatrialError):
        return Fault(message=str(error), exit_code=error.exit_code)
    if isinstance(error, OSError) and error.errno in _SYSTEM_REMEDIES:
        where = f"{error.filename}: " if error.filename else ""
        return Fault(message=where + _SYSTEM_REMEDIES[error.errno], exit_code=3)
    return _defect(error, scene)


def _defect(error: BaseException, scene: Scene) -> Fault:
    """Keep the traceback of an error that nothing of ours was meant to raise in a file, and name it."""
    text = str(error).strip().partition("\n")[0]
    message = f"{type(error).__name__}: {text}" if text else type(error).__name__
    folder = scene.crash_folder or seatrial_home() / "crashes"
    path = folder / f"crash-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.getpid()}.txt"
    trace = "".join(traceback.format_exception(error))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(trace, encoding="utf-8")
    except OSError as unwritable:
        sys.stderr.write(trace)
        return Fault(message=f"unexpected {message} (traceback above; {unwritable})", exit_code=3)
    # The same command again with --resume, where the run had a folder already.
    hint = f"; to go on: {scene.resume}" if scene.resume else ""
    remedy = f"unexpected {message}; the traceback is in {path}{hint}"
    return Fault(message=remedy, exit_code=3, parts={"traceback": str(path), "resume": scene.resume})


def print_fault(fault: Fault) -> None:
    """Print `error: ...` on stderr, red on a terminal."""
    # Imported here and below: rich costs as much as the rest of `validate`.
    from rich.console import Console
    from rich.text import Text

    was_interrupted = fault.exit_code == INTERRUPTED
    line, style = (fault.message, "yellow") if was_interrupted else (f"error: {fault.message}", "red")
    # Text, not markup: a message may hold brackets.
    Console(stderr=True).print(Text(line, style=style), soft_wrap=True)


def _show(reply: Reply) -> None:
    from rich.console import Console

    console = Console()
    if callable(reply.show):
        reply.show(console)
    elif isinstance(reply.show, str):
        # Plain text may hold brackets and paths: no markup, no wrapping.
        console.print(reply.show, markup=False, highlight=False, soft_wrap=True)
    else:
        console.print(reply.show)


def _as_json(reply: Reply | Fault) -> str:
    if isinstance(reply, Fault):
        tree = {"ok": False, "exit_code": reply.exit_code, "error": reply.message, **reply.parts}
    else:
        tree = {"ok": reply.exit_code == 0, "exit_code": reply.exit_code, **reply.data}
    # `default`: a refused value may be of any type.
    return json.dumps(tree, ensure_ascii=False, default=str)


@contextlib.contextmanager
def _clean_stdout(as_json: bool) -> Iterator[Callable[[str], None]]:
    """With `--json`, send everything printed to stderr; yields the writer of the one line on the real stdout."""
    if not as_json:
        yield typer.echo
        return
    # By file descriptor: C libraries and Ray workers write past `sys.stdout`.
    real = sys.stdout
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    lines: list[str] = []
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield lines.append
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        for line in lines:
            typer.echo(line, file=real)
