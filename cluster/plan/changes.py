"""What a changed knob does to the plan: plan again with that knob alone, and list what moved. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import BaseModel

from cluster.plan.estimate import RunPlan, plan_run
from cluster.spec import MEANINGS, Knob, SpecSource, WorkflowSpec, knob_named, leaf_paths, override
from rl_actors.contracts import BadInputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """One quantity of the plan that moves. Example: optimizer_steps of ppo, 50 -> 200."""

    quantity: str
    before: float
    after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One knob's new value and what it moves on its own; `refusal` says why it cannot stand alone."""

    knob: str
    before: Any
    after: Any
    shifts: tuple[Shift, ...] = ()
    refusal: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON, with the sentence that says what arithmetic cannot."""
        return asdict(self) | {"meaning": MEANINGS[self.knob]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A spec against another: each change on its own, and all of them together. `against` names the other spec."""

    against: str
    changes: tuple[Change, ...] = ()
    together: tuple[Shift, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        changes = [change.to_json() for change in self.changes]
        return {"against": self.against, "changes": changes, "together": [asdict(shift) for shift in self.together]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """A knob, its value in a spec, and what half and double of that would do. A knob without numbers has no trials."""

    knob: Knob
    value: Any
    trials: Mapping[str, Change]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        trials = {name: trial.to_json() for name, trial in self.trials.items()}
        return asdict(self.knob) | {"value": self.value, "trials": trials}


def quantities(plan: RunPlan) -> dict[str, float]:
    """Return every number of a plan by name; `ppo.minutes` is one of a stage, `total_minutes` one of the run."""
    found: dict[str, float] = {"params": plan.params, "active_params": plan.active_params}
    found |= {name: n for name, n in asdict(plan.batch).items() if name != "optimizer_steps"}
    for stage in plan.stages:
        numbers = {
            "tokens": stage.tokens,
            "optimizer_steps": stage.optimizer_steps,
            "memory_bytes": stage.total_memory_bytes,
            "cpus": stage.cpus,
            "gpus": stage.gpus,
            "minutes": stage.minutes,
        }
        found |= {f"{stage.stage}.{name}": number for name, number in numbers.items()}
    found |= {"tickets_needed": plan.tickets_needed, "tickets_given": plan.tickets_given}
    return found | {"peak_memory_bytes": plan.peak_memory_bytes, "total_minutes": plan.total_minutes}


def shifts(before: RunPlan, after: RunPlan) -> tuple[Shift, ...]:
    """Return the quantities that differ, in the order of the plan; rounding of the last bits is no difference."""
    old, new = quantities(before), quantities(after)
    moved = [name for name in old if not math.isclose(old[name], new[name], rel_tol=1e-9)]
    return tuple(Shift(quantity=name, before=old[name], after=new[name]) for name in moved)


def compare(before: WorkflowSpec, after: WorkflowSpec, against: str) -> Comparison:
    """Return what each knob that differs does on its own, starting from `before`, and what all do together."""
    old, plan = _values(before), plan_run(before)
    new = _values(after)
    knobs = [knob for knob in leaf_paths(WorkflowSpec) if old[knob] != new[knob]]
    # What nobody set follows from another knob: the ramp from the canary's share.
    chosen = [knob for knob in knobs if _is_set(before, knob) or _is_set(after, knob)]
    changes = tuple(change_alone(before, plan, knob, new[knob]) for knob in chosen)
    return Comparison(against=against, changes=changes, together=shifts(plan, plan_run(after)))


def change_alone(spec: WorkflowSpec, plan: RunPlan, knob: str, value: Any) -> Change:
    """Plan a spec again with one knob at another value; one that is refused alone says why."""
    before = _values(spec)[knob]
    try:
        changed = override(spec, [f"{knob}={json.dumps(value)}"])
    except BadInputError as error:
        return Change(knob=knob, before=before, after=value, refusal=_reason(error, knob))
    return Change(knob=knob, before=before, after=value, shifts=shifts(plan, plan_run(changed)))


def explain(spec: WorkflowSpec, name: str) -> Explanation:
    """Return a knob with its value in a spec and what half and double of it would do. Raises BadInputError."""
    knob = knob_named(name)
    value = _values(spec)[name]
    plan = plan_run(spec)
    others = _half_and_double(value)
    trials = {word: change_alone(spec, plan, name, other) for word, other in others.items() if other != value}
    return Explanation(knob=knob, value=value, trials=trials)


def _half_and_double(value: Any) -> dict[str, int | float]:
    """Return both for a number; whole ones are rounded, halves up, so that 1 has no half."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return {}
    return {"half": (value + 1) // 2 if isinstance(value, int) else value / 2, "double": value * 2}


def _values(spec: WorkflowSpec) -> dict[str, Any]:
    source = SpecSource(name="", tree=spec.model_dump(mode="json"))
    return {knob: source.value(knob) for knob in leaf_paths(WorkflowSpec)}


def _is_set(section: BaseModel, path: str) -> bool:
    """Whether someone wrote this knob down, instead of leaving it to its default."""
    first, _, rest = path.partition(".")
    if first not in section.model_fields_set:
        return False
    return not rest or _is_set(getattr(section, first), rest)


def _reason(error: BadInputError, knob: str) -> str:
    """Name the other knob where it is that one which objects."""
    remedy = error.remedy
    return remedy if error.field == knob else f"{error.field}: {remedy}"
