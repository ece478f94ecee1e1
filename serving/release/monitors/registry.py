"""The register of monitors, and one look at a canary through all of them and the gates.

Adding a monitor is adding one module to this folder, with `@alarm` or `@comparison` above a function that is a
`Monitor`: the folder's `__init__.py` imports every module (pkgutil). What its results lead to is the state machine's:
one `fail` rolls back, one `invalid` halts, and no monitor has to pass.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final, Protocol

from serving.contracts import GateResults, LiveEvidence, ReleasePlan
from serving.gates import GATES


class Monitor(Protocol):
    """Watches a canary besides the gates: returns what it found, nothing while all is well."""

    def __call__(self, evidence: LiveEvidence, plan: ReleasePlan) -> GateResults:
        """Look once. A result's gate is the name it bears in the decision log."""
        ...


ALARMS: Final[list[Monitor]] = []
COMPARISONS: Final[list[Monitor]] = []


def alarm(watch: Monitor) -> Monitor:
    """Register a monitor that outranks comparisons: its `fail` decides alone, its `invalid` makes them all invalid."""
    ALARMS.append(watch)
    return watch


def comparison(watch: Monitor) -> Monitor:
    """Register a monitor that holds the arms against each other, and so stands on the split, as gates do."""
    COMPARISONS.append(watch)
    return watch


def evaluate_live(evidence: LiveEvidence, plan: ReleasePlan) -> GateResults:
    """Look once at a canary: through every alarm, the gates of the plan, and every other monitor."""
    alarms = [result for watch in ALARMS for result in watch(evidence, plan)]
    # Harm that needs no comparison to be proven must not wait for a split that can be trusted.
    if failed := tuple(result for result in alarms if result.verdict == "fail"):
        return failed
    gates = [GATES[name].live(evidence, plan) for name in plan.rules if name in plan.gates]
    compared = [*gates, *(result for watch in COMPARISONS for result in watch(evidence, plan))]
    broken = next((result for result in alarms if result.verdict == "invalid"), None)
    if broken is not None:
        # Each is written as invalid, so that no later reader of the log takes one for a verdict on the candidate.
        void = {"verdict": "invalid", "reason": broken.reason, "evidence": broken.evidence}
        compared = [replace(result, **void) for result in compared]
        alarms.remove(broken)
    return (*compared, *alarms)
