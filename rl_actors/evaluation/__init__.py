"""Offline proof of what a policy can do: suites, the stability of a baseline, and the statistics of both."""

from rl_actors.evaluation.statistics import mcnemar_p_value
from rl_actors.evaluation.suites import (
    SeededAttempt,
    StabilityBounds,
    Suite,
    baseline_stability,
    compare,
    require_stable,
    suite_result,
    with_typical_durations,
)
