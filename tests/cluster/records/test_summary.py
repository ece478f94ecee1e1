"""One value tells how a release ended: read from journals and summaries of before, written with their keys."""

from __future__ import annotations

import json

import pytest

from cluster.records.summary import ReleaseOutcome, RunPaths, RunSummary
from rl_actors.durable.codec import decode, encode
from tests.serving.fakes import make_suite

# As earlier versions wrote them: a journal without the share, a summary without the counts.
JOURNALED = {
    "release_id": "r-0", "stable": "sft-1", "candidate": "ppo-1", "outcome": "promoted", "reason": "all gates passed",
    "requests": 400, "failed_requests": 0, "ledger_rows": 400, "first_step_requests": 200,
    "first_step_canary_requests": 12, "canary_requests": 90, "time_to_recovery_s": 0.0, "drill_s": 0.4, "seconds": 30.0,
}  # fmt: skip
SUMMARISED = {
    "candidate": "ppo-1", "outcome": "rolled_back", "reason": "drop", "canary_requests": 71, "observed_share": 0.0487,
    "time_to_recovery_s": 1.4,
}  # fmt: skip
OFFLINE = {
    "suite": "capability", "baseline_success": 0.5, "candidate_success": 0.75, "baseline_violations": 3,
    "candidate_violations": 1,
}  # fmt: skip


def test_a_journal_of_before_still_says_the_share():
    outcome = decode(ReleaseOutcome, JOURNALED)
    assert outcome.observed_share == pytest.approx(0.06)
    assert decode(ReleaseOutcome, encode(outcome)) == outcome
    assert encode(outcome).items() >= JOURNALED.items()


def test_a_summary_of_before_is_read_and_its_share_believed():
    old = {
        "run_id": "r", "workflow": "w", "stages": [], "trained": [], "offline": [OFFLINE], "releases": [SUMMARISED],
        "stable_policy": "sft-1", "bundle_id": "b", "exit_code": 1, "paths": {"folder": "/r"},
    }  # fmt: skip
    found = RunSummary.from_json(old)
    (release,) = found.releases
    assert {name: getattr(release, name) for name in SUMMARISED} == SUMMARISED
    assert (found.stable_policy, found.offline, dict(found.heads)) == ("sft-1", (), {})


def test_a_summary_keeps_the_keys_of_before():
    suites = (make_suite("capability"), make_suite("capability"))
    releases = (decode(ReleaseOutcome, JOURNALED),)
    summary = RunSummary(
        run_id="r", workflow="w", stages=(), trained=(), offline=(suites,), releases=releases,
        stable_policy="", bundle_id="", exit_code=0, paths=RunPaths(folder="/r"),
    )  # fmt: skip
    written = json.loads(json.dumps(summary.to_json()))
    assert written["offline"][0].keys() == OFFLINE.keys()
    assert written["releases"][0].keys() >= SUMMARISED.keys()
    assert RunSummary.from_json(written) == summary
    bare = decode(ReleaseOutcome, {**JOURNALED, "first_step_requests": 0, "first_step_canary_requests": 0})
    assert bare.observed_share == 0.0
