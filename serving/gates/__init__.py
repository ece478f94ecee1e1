"""The gates and the statistics they stand on."""

from serving.gates.gates import (
    GATES,
    ArmEvent,
    LiveEvidence,
    check_gate_names,
    evaluate_live,
    evaluate_offline,
    may_enter_canary,
    traffic_result,
)
from serving.gates.statistics import quantile, rate_upper_bound, reliability_score
