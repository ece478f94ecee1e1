"""The gates, each one file that registers itself, and the statistics they stand on."""

from serving.gates.registry import (
    GATES,
    check_gate_names,
    evaluate_offline,
    import_modules,
    may_enter_canary,
)
from serving.gates.statistics import quantile, rate_upper_bound, reliability_score, sample_ratio_check

import_modules(__path__, __name__)
