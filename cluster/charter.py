"""The answers a charter needs beside the workload, which is `workflow.target`: constraints and rollback path.

Nobody has to write them: what is left out is said by the spec itself, from the numbers that a run is held to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from cluster.spec import WorkflowSpec

MAX_ROLLBACK_S: Final = 300.0
"""Longest way back to stable: the article's five minutes, and the limit of the gate that times the drill."""


def default_charter(spec: WorkflowSpec) -> dict[str, str]:
    """Return the sentences that follow from a spec, by field of the charter."""
    agent = spec.agent
    budget = f"{agent.tool_calls} tool calls, {agent.max_tokens_per_turn} tokens a turn and {agent.timeout_s:g} s"
    rules = f"every reply passes all policy checks, a release all {len(spec.release.gates)} gates"
    return {
        "constraints": f"at most {budget} a request; {rules}",
        "rollback_path": f"all sessions back to the stable policy (first {spec.workflow.baseline}) by one split "
        f"record, within {MAX_ROLLBACK_S:g} s",
    }


def charter_answers(spec: WorkflowSpec) -> Mapping[str, str]:
    """Return the three answers by question: none is ever empty, the spec refuses that."""
    charter = spec.charter
    return {
        "workload": spec.workflow.target,
        "constraints": charter.constraints,
        "rollback_path": charter.rollback_path,
    }
