"""Every exception seatrial raises on purpose.

SeatrialError
├── BadInputError            what the user gave is wrong; exit code 2
│   └── BadDataError         a row, file or directory of the user's data is wrong; exit code 2
├── StageRefusedError        a stage or gate said no; exit code 1
├── InstabilityError         training was stopped by a tripwire; exit code 1
├── InfrastructureError      a disk, process, port or peer failed; exit code 3
│   ├── EngineError          the inference engine died or did not answer in time
│   ├── ToolHostError        a tool host died; its open worlds are lost
│   └── AttestationError     an engine could not prove that it serves the published weights
└── TamperedError            something frozen changed after it was hashed; exit code 3
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SeatrialError(Exception):
    """Root of the tree; carries the process exit code."""

    exit_code = 3


class BadInputError(SeatrialError):
    """Names the field, the value found and the remedy; nothing was started."""

    exit_code = 2

    def __init__(self, field: str, value: object, remedy: str) -> None:
        super().__init__(f"{field} = {value!r}: {remedy}")
        self.field, self.value, self.remedy = field, value, remedy

    def __reduce__(self) -> tuple[type, tuple[str, object, str]]:
        # Ray pickles a task's error to raise it in the driver; Exception would rebuild it from the one joined message.
        return type(self), (self.field, self.value, self.remedy)


class BadDataError(BadInputError):
    """A row, file or directory the user handed over is wrong."""


class StageRefusedError(SeatrialError):
    """A stage or gate said no; the message is the reason."""

    exit_code = 1


class InstabilityError(SeatrialError):
    """A tripwire stopped training; the message starts with its reason code."""

    exit_code = 1


class InfrastructureError(SeatrialError):
    """A disk, process, port or peer failed; never turned into data."""


class EngineError(InfrastructureError):
    """The inference engine died or did not answer within its bound."""


class ToolHostError(InfrastructureError):
    """A tool host died; the worlds it held are lost and their rollouts must be re-issued."""


class AttestationError(InfrastructureError):
    """An engine could not prove that it serves the published weights."""


class TamperedError(SeatrialError):
    """Something frozen changed after it was hashed."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return the most similar choice, or nothing when none is similar."""
    by_lower = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(str(word).lower(), by_lower, n=1, cutoff=0.5)
    return by_lower[found[0]] if found else ""


def unknown_name(word: str, choices: Iterable[str]) -> str:
    """Return the remedy for a name outside a closed list."""
    names = list(choices)
    best = nearest(word, names)
    hint = f"did you mean {best!r}? " if best else ""
    return f"unknown name; {hint}valid: {', '.join(names)}"
