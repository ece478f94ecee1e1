"""What a policy can do, proved: suites, the stability of a baseline, and the statistics of both."""

from rl_actors.evaluation.stability import SeededAttempt, StabilityBounds, baseline_stability, require_stable
from rl_actors.evaluation.statistics import mcnemar_p_value
from rl_actors.evaluation.suites import Suite, compare, suite_result, with_typical_durations
