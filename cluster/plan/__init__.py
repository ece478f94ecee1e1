"""What a run will need, before it starts: estimates, placement, preflight."""

from cluster.plan.changes import Change, Comparison, Explanation, Shift, compare, explain
from cluster.plan.estimate import BatchPlan, RunPlan, plan_run
from cluster.plan.memory import PARTS
from cluster.plan.model_shape import shape_of, zero_stage
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
    check_workflow,
    probe_machine,
    require_ready,
)
from cluster.plan.workload import Workload, measure_workload
