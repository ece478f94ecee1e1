"""What a run will need, before it starts: estimates, placement, preflight."""

from cluster.plan.estimate import (
    BatchPlan,
    Change,
    Comparison,
    Explanation,
    RunPlan,
    Shift,
    compare,
    explain,
    plan_run,
)
from cluster.plan.memory import PARTS, shape_of, zero_stage
from cluster.plan.placement import (
    NUM_THREADS,
    Placement,
    Role,
    Stage,
    check_capacity,
    local_cpus,
    place,
    reserve,
    threads_each,
)
from cluster.plan.preflight import (
    PreflightItem,
    becomes_free,
    check_machine,
    check_model,
    probe_machine,
    require_ready,
)
from cluster.plan.workload import Workload, check_workflow, measure_workload
