"""Results of an offline evaluation: one policy on one suite, two policies compared, and what a request costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Declared prices in US dollars: tokens in and out per million, tool calls each."""

    # One model for the offline suites and for live traffic, or their costs per success would not compare.
    usd_per_million_tokens_in: float = 0.05
    usd_per_million_tokens_out: float = 0.20
    usd_per_tool_call: float = 0.00001

    def cost(self, *, tokens_in: int, tokens_out: int, tool_calls: int) -> float:
        """Return the cost of one request or of a sum of requests."""
        tokens = tokens_in * self.usd_per_million_tokens_in + tokens_out * self.usd_per_million_tokens_out
        return tokens / 1e6 + tool_calls * self.usd_per_tool_call


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
