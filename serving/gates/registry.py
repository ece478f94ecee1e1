"""The register of release gates: each is one module of this folder, with a live form and most with an offline one.

Adding a gate is adding such a file, with `@gate("its_name", offline=...)` above its live form: the door of this room
imports every module of the folder (pkgutil). A spec may then name it beside the article's four, and
`seatrial plan --explain release.gates` lists it; the brief shows its name where a locale has no words for it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, TypeVar

from rl_actors.contracts import BadInputError, EvalReport, unknown_name
from serving.contracts import Evidence, GateResult, GateResults, LiveEvidence, ReleasePlan, Verdict

Seen = TypeVar("Seen")

# No data is `inconclusive`, never `pass`. A fail uses alpha / (number of rules), because any one of them rolls back; a
# pass uses alpha, because all are needed.
Finding = tuple[Verdict, str, Evidence]
"""A verdict, its reason as a sentence, and the numbers behind it: a gate's result but for the gate's name."""

Live = Callable[[LiveEvidence, ReleasePlan], Finding]
Offline = Callable[[EvalReport, ReleasePlan], Finding]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """One gate in both forms; `offline` is None where only a deployment can answer."""

    live: Callable[[LiveEvidence, ReleasePlan], GateResult]
    offline: Callable[[EvalReport, ReleasePlan], GateResult] | None


GATES: Final[dict[str, Gate]] = {}


def gate(name: str, *, offline: Offline | None = None) -> Callable[[Live], Live]:
    """Register the live form below, and the offline form given, as a gate. Raises ValueError for a name twice."""

    def register(live: Live) -> Live:
        # A second gate of the same name would quietly replace a check that releases rely on.
        if name in GATES:
            raise ValueError(f"gate {name!r} is registered twice")
        GATES[name] = Gate(live=_named(name, live), offline=offline and _named(name, offline))
        return live

    return register


def _named(name: str, find: Callable[[Seen, ReleasePlan], Finding]) -> Callable[[Seen, ReleasePlan], GateResult]:
    def evaluate(seen: Seen, plan: ReleasePlan) -> GateResult:
        verdict, reason, evidence = find(seen, plan)
        return GateResult(gate=name, verdict=verdict, reason=reason, evidence=evidence)

    return evaluate


def import_modules(folder: Iterable[str], package: str) -> None:
    """Import every module of a package's folder, so that what registers itself there is registered."""
    for module in pkgutil.iter_modules(folder, f"{package}."):
        importlib.import_module(module.name)


def check_gate_names(plan: ReleasePlan) -> None:
    """Refuse a plan with an unknown gate or stop rule, naming the nearest one."""
    for name in plan.rules:
        if name not in GATES:
            raise BadInputError("gate", name, unknown_name(name, GATES))


def evaluate_offline(report: EvalReport, plan: ReleasePlan) -> GateResults:
    """Evaluate those gates and stop rules of the plan that a report can answer, before any traffic."""
    return tuple(offline(report, plan) for name in plan.rules if (offline := GATES[name].offline))


def may_enter_canary(results: GateResults, plan: ReleasePlan) -> bool:
    """Whether the offline results allow live traffic: every gate passed and no stop rule failed."""
    gates = [result for result in results if result.gate in plan.gates]
    return bool(gates) and all(r.verdict == "pass" for r in gates) and all(r.verdict != "fail" for r in results)
