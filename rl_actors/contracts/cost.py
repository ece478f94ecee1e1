"""What a run costs: one model for the offline suites and for live traffic, so that their costs per success compare."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """What a run costs, in US dollars: tokens in and out per million, tool calls each. Declared, not measured."""

    usd_per_million_tokens_in: float = 0.05
    usd_per_million_tokens_out: float = 0.20
    usd_per_tool_call: float = 0.00001

    def cost(self, *, tokens_in: int, tokens_out: int, tool_calls: int) -> float:
        """Return the cost of one run or of a sum of runs."""
        tokens = tokens_in * self.usd_per_million_tokens_in + tokens_out * self.usd_per_million_tokens_out
        return tokens / 1e6 + tool_calls * self.usd_per_tool_call
