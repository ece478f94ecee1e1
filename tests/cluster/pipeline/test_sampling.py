"""A pool is opened with the bounds, the workers and the waiting time of the spec."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.pipeline import sampling
from cluster.pipeline.sampling import agent_limits, open_pool
from cluster.plan.placement import NUM_THREADS
from rl_actors.contracts import Outcome
from tests.cluster.pipeline.fakes import PoolRecorder, make_policy, make_run

SFT = make_policy("/models/sft", "sft-1", "sft")


def test_limits_and_worker_settings_follow_the_spec(home: Path, monkeypatch: pytest.MonkeyPatch):
    recorder = PoolRecorder(lambda _path, _request: Outcome(success=True, violations=(), reasons=()))
    monkeypatch.setattr(sampling, "RolloutPool", recorder)
    run = make_run(home, "agent.tool_calls=3", "agent.max_tokens_per_turn=40", "agent.timeout_s=9.0")
    limits = agent_limits(run.spec)
    assert limits.max_tool_calls == 3
    assert limits.max_turns == 3 + 4
    assert (limits.max_tokens_per_turn, limits.max_context_tokens, limits.timeout_s) == (40, 256, 9.0)
    for changes in ({}, {"num_threads": 1, "wants_routes": True, "num_timeouts": 10}):
        open_pool(run.spec, SFT, lambda _role, _rank: {}, **changes)
    plain, changed = recorder.pools
    assert (plain.model_path, plain.settings.workflow, plain.settings.limits) == (SFT.path, run.workflow_ref, limits)
    assert (plain.settings.num_threads, plain.settings.wants_routes) == (NUM_THREADS, False)
    assert (changed.settings.num_threads, changed.settings.wants_routes) == (1, True)
    assert [pool.options["timeout_s"] for pool in recorder.pools] == [270.0, 90.0]
    assert plain.options["num_workers"] == run.spec.ppo.num_rollout_workers
