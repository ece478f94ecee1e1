"""The parts that a user brings: tasks, tools, an expert, annotators and a verifier."""

from rl_actors.environment.tools import (
    PLAN_ACCEPTED,
    PLAN_TOOL,
    SideEffect,
    ToolFailure,
    ToolSpec,
    World,
    render_error,
    render_observation,
)
from rl_actors.environment.workflow import (
    Annotator,
    Demonstrator,
    RolloutView,
    RubricCriterion,
    TaskSource,
    Verifier,
    Workflow,
    WorkflowRef,
)
