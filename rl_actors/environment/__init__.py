"""What a user brings: tasks, tools, an expert, annotators and a verifier."""

from rl_actors.environment.tools import (
    PLAN_TOOL,
    SideEffect,
    ToolFailure,
    ToolSpec,
    World,
    render_error,
    render_observation,
    render_plan_accepted,
)
from rl_actors.environment.workflow import RolloutView, RubricCriterion, Workflow, WorkflowRef
