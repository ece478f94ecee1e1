"""How a run samples its policies: the agent's bounds, the rollout workers, and a pool of them."""

from __future__ import annotations

from typing import Final

from cluster.plan import NUM_THREADS
from cluster.spec import WorkflowSpec
from cluster.workflows import locate_workflow
from rl_actors.actors import Options, RolloutPool, RolloutWorkerSettings
from rl_actors.contracts import AgentLimits, PolicyVersion

# Longest pass over a suite or over preference tasks, in time-outs of one request: workers run many at a time.
TIMEOUTS_A_PASS: Final = 30


def agent_limits(spec: WorkflowSpec) -> AgentLimits:
    """Return the agent's hard bounds, the same in training, evaluation and serving."""
    agent = spec.agent
    return AgentLimits(
        max_turns=agent.max_turns,
        max_tool_calls=agent.tool_calls,
        max_tokens_per_turn=agent.max_tokens_per_turn,
        max_context_tokens=spec.model.max_length,
        timeout_s=agent.timeout_s,
    )


def open_pool(
    spec: WorkflowSpec,
    policy: PolicyVersion,
    options: Options,
    *,
    num_threads: int = NUM_THREADS,
    wants_routes: bool = False,
    num_timeouts: int = TIMEOUTS_A_PASS,
) -> RolloutPool:
    """Start the rollout workers of a policy, on engines loaded from its own directory."""
    settings = RolloutWorkerSettings(
        workflow=locate_workflow(spec.workflow.name),
        limits=agent_limits(spec),
        num_tool_hosts=1,
        num_threads=num_threads,
        wants_routes=wants_routes,
    )
    return RolloutPool(
        policy.path,
        settings,
        num_workers=spec.ppo.num_rollout_workers,
        options=options,
        timeout_s=spec.agent.timeout_s * num_timeouts,
    )
