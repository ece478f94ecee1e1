"""Suites: a hash over everything a task is, reports that are whole, and a paired comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from scipy.stats import binom

from rl_actors.contracts import Outcome
from rl_actors.contracts.errors import InfrastructureError, TamperedError
from rl_actors.contracts.reports import CostModel, SuiteResult
from rl_actors.contracts.rollouts import Rollout
from rl_actors.evaluation.suites import Suite, compare, suite_result
from tests.rl_actors.fakes import BAD, GOOD, make_rollout, make_task

WRONG = Outcome(success=False, violations=(), reasons=("no refund row",))
TASKS = tuple(make_task(f"desk/held_out/{n}", intent="pay" if n < 3 else "look", seed=n) for n in range(4))
SUITE = Suite(name="capability", tasks=TASKS)
COST = CostModel(usd_per_million_tokens_in=1.0, usd_per_million_tokens_out=10.0, usd_per_tool_call=0.001)


def attempts(*outcomes: Outcome, suite: Suite = SUITE, **changes: Any) -> list[Rollout]:
    return [
        make_rollout(f"{task.task_id}#0", task_id=task.task_id, intent=task.intent, outcome=outcome, **changes)
        for task, outcome in zip(suite.tasks, outcomes, strict=True)
    ]


def result(*outcomes: Outcome, policy: str = "sft", suite: Suite = SUITE, **changes: Any) -> SuiteResult:
    return suite_result(suite, policy, attempts(*outcomes, suite=suite, **changes), COST)


# --- the suite ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "edit",
    [
        {"prompt": "another"},
        {"world": {"orders": [{"id": "1"}]}},
        {"goal": {"selector": {}, "facts": ["x"]}},
        {"seed": 99},
        {"intent": "refund"},
        {"task_id": "desk/held_out/x"},
        {"split": "frozen"},
        {"workflow": "other"},
    ],
    ids=lambda edit: next(iter(edit)),
)
def test_any_edit_of_any_task_changes_the_hash(edit: dict[str, Any]):
    assert Suite(name="capability", tasks=(*TASKS[:3], replace(TASKS[3], **edit))).sha256 != SUITE.sha256


def test_adding_leaving_out_and_reordering_change_the_hash():
    others = [(*TASKS, TASKS[0]), TASKS[:3], TASKS[::-1]]
    assert len({Suite(name="capability", tasks=tasks).sha256 for tasks in others} | {SUITE.sha256}) == 4


def test_the_hash_is_of_the_content_alone():
    reordered = [replace(task, world=dict(reversed(list(task.world.items())))) for task in TASKS]
    assert Suite(name="another name", tasks=tuple(reordered)).sha256 == SUITE.sha256
    assert SUITE.sha256 == Suite(name="capability", tasks=TASKS).sha256


def test_every_policy_gets_the_same_tasks_with_the_same_seeds():
    requests = SUITE.requests(7)
    assert requests == SUITE.requests(7)
    assert [request.task for request in requests] == list(TASKS)
    assert len({request.seed for request in requests}) == 4
    assert {r.seed for r in requests}.isdisjoint(r.seed for r in SUITE.requests(8))
    assert all(0 <= request.seed < 2**31 for request in SUITE.requests(10**9))


# --- one result -----------------------------------------------------------------------------------


def test_a_result_by_hand():
    found = result(GOOD, GOOD, WRONG, BAD, tool_errors=1)
    assert (found.suite, found.policy, found.num_tasks, found.suite_sha256) == ("capability", "sft", 4, SUITE.sha256)
    assert found.success.mean == 0.5
    assert found.success.low < 0.5 < found.success.high
    assert found.success_by_intent == {"look": 0.0, "pay": pytest.approx(2 / 3)}
    assert found.tasks_by_intent == {"look": 1, "pay": 3}
    assert found.violations == 1
    assert found.violations_by_task == {"desk/held_out/3": ("refund_without_owner",)}
    assert list(found.success_by_task.values()) == [True, True, False, False]
    assert (found.tokens_in, found.tokens_out, found.tool_calls, found.tool_errors) == (28, 20, 8, 4)


def test_cost_is_spread_over_successes():
    spent = (28 * 1.0 + 20 * 10.0) / 1e6 + 8 * 0.001
    assert result(GOOD, WRONG, WRONG, WRONG).cost_per_success == pytest.approx(spent)
    assert result(GOOD, GOOD, WRONG, WRONG).cost_per_success == pytest.approx(spent / 2)


def test_without_a_success_the_cost_is_infinite_and_not_zero():
    assert result(WRONG, WRONG, BAD, BAD).cost_per_success == math.inf
    free = suite_result(SUITE, "sft", attempts(WRONG, WRONG, WRONG, WRONG), CostModel(
        usd_per_million_tokens_in=0.0, usd_per_million_tokens_out=0.0, usd_per_tool_call=0.0,
    ))  # fmt: skip
    assert free.cost_per_success == math.inf


def test_cost_adds_up():
    parts = [COST.cost(tokens_in=100, tokens_out=10, tool_calls=1), COST.cost(tokens_in=50, tokens_out=5, tool_calls=2)]
    assert COST.cost(tokens_in=150, tokens_out=15, tool_calls=3) == pytest.approx(sum(parts))


def test_the_slow_end_of_durations_is_the_nearest_rank():
    suite = Suite(name="s", tasks=tuple(make_task(f"t/{n}") for n in range(40)))
    rollouts = [make_rollout(f"r{n}", task_id=f"t/{n}", duration_ms=float(n)) for n in range(40)]
    assert suite_result(suite, "sft", rollouts, COST).p95_duration_ms == 37.0


@pytest.mark.parametrize("lost", [1, 3])
def test_a_missing_rollout_is_never_a_smaller_suite(lost: int):
    rollouts = attempts(GOOD, GOOD, GOOD, GOOD)[: 4 - lost]
    with pytest.raises(InfrastructureError, match=f"capability: {lost} tasks lost.*desk/held_out/"):
        suite_result(SUITE, "sft", rollouts, COST)


def test_a_task_attempted_twice_does_not_stand_in_for_one_that_was_lost():
    rollouts = attempts(GOOD, GOOD, GOOD, WRONG)
    with pytest.raises(InfrastructureError, match=r"1 tasks lost.*desk/held_out/3"):
        suite_result(SUITE, "sft", [*rollouts[:3], rollouts[0]], COST)


def test_order_does_not_matter():
    rollouts = attempts(GOOD, GOOD, WRONG, BAD)
    assert suite_result(SUITE, "sft", rollouts[::-1], COST).success == result(GOOD, GOOD, WRONG, BAD).success


# --- the comparison -------------------------------------------------------------------------------


def report(before: SuiteResult, after: SuiteResult) -> Any:
    return compare({"capability": before}, {"capability": after}, "capability")


def outcomes(pattern: str) -> list[Outcome]:
    return [GOOD if mark == "+" else WRONG for mark in pattern]


WIDE = Suite(name="capability", tasks=tuple(make_task(f"desk/held_out/{n:02d}") for n in range(20)))


def wide(pattern: str, policy: str = "sft") -> SuiteResult:
    return result(*outcomes(pattern), suite=WIDE, policy=policy)


@pytest.mark.parametrize(
    ("before", "after", "p"),
    [
        ("-" * 10 + "+" * 10, "+" * 20, 2.0**-10),  # ten gained, none lost
        ("+" * 20, "-" * 10 + "+" * 10, 1.0),  # ten lost
        ("+-" * 10, "-+" * 10, float(binom.cdf(10, 20, 0.5))),  # ten gained, ten lost
        ("+" * 20, "+" * 20, 1.0),  # nothing was shown
    ],
)
def test_p_speaks_for_the_candidate_being_better(before: str, after: str, p: float):
    found = report(wide(before), wide(after, "ppo"))
    assert found.p_value == pytest.approx(p)
    assert found.success_gain == pytest.approx((after.count("+") - before.count("+")) / 20)


def test_pairs_are_matched_by_task_and_not_by_position():
    before, after = wide("+" * 10 + "-" * 10), wide("+" * 10 + "-" * 10, "ppo")
    shuffled = replace(after, success_by_task=dict(reversed(list(after.success_by_task.items()))))
    assert report(before, shuffled).p_value == 1.0


def test_all_suites_are_in_the_report():
    frozen = Suite(name="frozen", tasks=TASKS[:2])
    results: Mapping[str, SuiteResult] = {
        "capability": result(GOOD, GOOD, WRONG, WRONG), "frozen": result(GOOD, WRONG, suite=frozen),
    }  # fmt: skip
    found = compare(results, results, "capability")
    assert set(found.baseline) == set(found.candidate) == {"capability", "frozen"}


def test_two_different_suites_are_never_compared():
    """Equal task ids are not enough: an edited task under the old id would pass unseen."""
    edited = Suite(name="capability", tasks=(*TASKS[:3], replace(TASKS[3], prompt="easier")))
    with pytest.raises(TamperedError, match="capability"):
        report(result(GOOD, GOOD, WRONG, WRONG), result(GOOD, GOOD, GOOD, GOOD, suite=edited))


def test_a_suite_only_one_policy_ran_is_never_compared():
    one = result(GOOD, GOOD, WRONG, WRONG)
    with pytest.raises(TamperedError, match="frozen"):
        compare({"capability": one, "frozen": one}, {"capability": one}, "capability")
