"""Results of an offline evaluation: one policy on one suite, and two policies compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A point estimate with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteResult:
    """One policy on one suite. Costs are in US dollars under `CostModel`; infinite when nothing succeeded."""

    suite: str
    suite_sha256: str
    policy: str
    num_tasks: int
    success: Interval
    success_by_intent: Mapping[str, float]
    tasks_by_intent: Mapping[str, int]
    violations: int
    tokens_in: int
    tokens_out: int
    tool_calls: int
    tool_errors: int
    cost_per_success: float
    p95_duration_ms: float
    success_by_task: Mapping[str, bool]
    violations_by_task: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """Baseline against candidate on every suite; the pairs share task ids and seeds."""

    baseline: Mapping[str, SuiteResult]
    candidate: Mapping[str, SuiteResult]
    success_gain: float
    p_value: float
