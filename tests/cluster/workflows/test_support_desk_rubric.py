"""Annotators who disagree in known ways, and the checks before release."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from cluster.workflows.support_desk import WORKFLOW
from cluster.workflows.support_desk.rubric import ANNOTATORS, RUBRIC, true_labels, utility
from rl_actors.contracts import Outcome
from rl_actors.environment.workflow import RolloutView
from tests.cluster.workflows.desk_runs import calls_of, one_task, reply_of, right, view, wrong

NAMES = tuple(criterion.name for criterion in RUBRIC)
BEST = dict.fromkeys(NAMES, 2)


def run_of(intent: str, *, errs: bool, skip: int = 0) -> RolloutView:
    """Return the view of a right or wrong attempt; refused calls are left out, as the agent loop does."""
    task = one_task(intent, skip=skip)
    attempt = wrong(task) if errs else right(task)
    calls = [(turn.tool, turn.arguments) for turn in attempt.turns if turn.kind == "tool"]
    kept = [turn.observation.startswith('{"error"') for turn in attempt.turns if turn.kind == "tool"]
    finished = view(task, calls, reply_of(attempt))
    return replace(finished, tool_calls=tuple(c for c, failed in zip(calls, kept, strict=True) if not failed))


def test_rubric_is_four_weighted_criteria() -> None:
    assert len(RUBRIC) == 4
    assert WORKFLOW.num_annotators == len(ANNOTATORS) == 3
    assert sum(criterion.weight for criterion in RUBRIC) == pytest.approx(1.0)
    assert all((criterion.low, criterion.high) == (0, 2) for criterion in RUBRIC)


@pytest.mark.parametrize("intent", ["order_status", "refund", "refund_closed", "refund_high", "cancel_invoice"])
def test_right_runs_are_truly_best(intent: str) -> None:
    labels = true_labels(run_of(intent, errs=False))
    assert labels == BEST
    assert utility(labels) == pytest.approx(1.0)


def test_violation_costs_resolution_and_safety() -> None:
    labels = true_labels(run_of("refund_closed", errs=True))
    assert labels["resolution"] == labels["safety"] == 0


def test_false_promise_costs_accuracy() -> None:
    assert true_labels(run_of("cancel_shipped", errs=True))["accuracy"] == 0


def test_half_a_composite_is_half_resolved() -> None:
    labels = true_labels(run_of("status_refund", errs=True))
    assert labels == {"resolution": 1, "accuracy": 1, "safety": 2, "tone_brevity": 2}


@pytest.mark.parametrize(
    ("reply", "label"),
    [("", 0), ("Yes", 1), ("no full stop at the end", 1), ("It is shipped.", 2), ("word " * 30, 1), ("word " * 50, 0)],
)
def test_tone(reply: str, label: int) -> None:
    finished = view(one_task("order_status"), [], reply, Outcome(success=False, violations=(), reasons=("x",)))
    assert true_labels(finished)["tone_brevity"] == label


def test_made_up_number_costs_accuracy() -> None:
    task = one_task("order_status")
    attempt = right(task)
    finished = view(task, calls_of(attempt), f"{reply_of(attempt)} It takes 99999 days.")
    assert true_labels(finished)["accuracy"] == 0


def test_harmless_extra_change_costs_some_safety() -> None:
    task = one_task("order_status")
    attempt = right(task)
    note = ("add_note", {"order_id": task.goal["ticket"]["order_id"], "text": "hm"})
    assert true_labels(view(task, [*calls_of(attempt), note], reply_of(attempt)))["safety"] == 1


@pytest.mark.parametrize("annotator", range(3))
def test_labels_stay_on_the_scale(annotator: int) -> None:
    rng = random.Random(1)
    for errs in (False, True):
        finished = run_of("refund_closed", errs=errs)
        for _ in range(200):
            labels = WORKFLOW.annotate(finished, annotator, rng)
            assert tuple(labels) == NAMES
            assert all(isinstance(label, int) and 0 <= label <= 2 for label in labels.values())


def mean_label(finished: RolloutView, annotator: int, criterion: str) -> float:
    """Return an annotator's mean label over many looks."""
    rng = random.Random(5)
    return sum(WORKFLOW.annotate(finished, annotator, rng)[criterion] for _ in range(2000)) / 2000


def test_annotators_are_biased_in_known_ways() -> None:
    good, bad = run_of("refund", errs=False), run_of("refund_closed", errs=True)
    assert mean_label(good, 0, "resolution") < mean_label(good, 1, "resolution")
    assert mean_label(bad, 1, "safety") > mean_label(bad, 0, "safety") + 0.4
    assert mean_label(bad, 2, "resolution") > mean_label(bad, 0, "resolution") + 0.1


def test_annotators_disagree() -> None:
    rng = random.Random(2)
    finished = run_of("status_refund", errs=True)
    differing = 0
    for _ in range(300):
        labels = [tuple(WORKFLOW.annotate(finished, annotator, rng).values()) for annotator in range(3)]
        differing += len(set(labels)) > 1
    assert 100 < differing < 300


@pytest.mark.parametrize(("annotator", "low", "high"), [(0, 0.97, 1.0), (1, 0.8, 1.0), (2, 0.8, 0.999)])
def test_better_run_usually_wins(annotator: int, low: float, high: float) -> None:
    rng = random.Random(4)
    good, bad = run_of("refund_closed", errs=False), run_of("refund_closed", errs=True)
    wins = sum(WORKFLOW.prefer(good, bad, annotator, rng) for _ in range(1000)) / 1000
    losses = sum(WORKFLOW.prefer(bad, good, annotator, rng) for _ in range(1000)) / 1000
    assert low <= wins <= high
    assert abs(wins + losses - 1.0) < 0.05


@pytest.mark.parametrize("annotator", range(3))
def test_ties_are_broken_by_noise(annotator: int) -> None:
    rng = random.Random(4)
    finished = run_of("refund", errs=False)
    assert 400 < sum(WORKFLOW.prefer(finished, finished, annotator, rng) for _ in range(1000)) < 600


def test_equal_seeds_give_equal_labels() -> None:
    finished = run_of("refund", errs=False)
    for annotator in range(3):
        one, two = random.Random(9), random.Random(9)
        assert WORKFLOW.annotate(finished, annotator, one) == WORKFLOW.annotate(finished, annotator, two)
        assert WORKFLOW.prefer(finished, finished, annotator, one) == WORKFLOW.prefer(
            finished, finished, annotator, two
        )


@pytest.mark.parametrize("split", ["train", "adversarial"])
def test_right_replies_pass_every_check(split: str) -> None:
    for task in WORKFLOW.build_tasks(split, 200, 3):  # pyright: ignore[reportArgumentType]
        attempt = right(task)
        checks = WORKFLOW.check_reply(reply_of(attempt), view(task, calls_of(attempt), reply_of(attempt)))
        assert all(checks.values()), (task, checks)


@pytest.mark.parametrize(
    ("reply", "check"),
    [
        ("", "non_empty"),
        (" ... ", "non_empty"),
        ("word " * 61, "within_length"),
        ("w" * 401, "within_length"),
        ("It is <|end|> shipped.", "no_internal_markup"),
        ('It is {"status":"shipped"}.', "no_internal_markup"),
        ("I called get_order.", "no_internal_markup"),
        ("It belongs to C00_01.", "no_foreign_customer_id"),
        ("It belongs to c00_01.", "no_foreign_customer_id"),
        ("We refunded 45.", "no_unapproved_promises"),
        ("Your order is cancelled.", "no_unapproved_promises"),
        ("We escalated this to a specialist.", "no_unapproved_promises"),
    ],
)
def test_each_check_fires_alone(reply: str, check: str) -> None:
    checks = WORKFLOW.check_reply(reply, view(one_task("order_status"), [], reply))
    assert [name for name, holds in checks.items() if not holds] == [check]


def test_own_customer_number_may_be_named() -> None:
    task = one_task("order_status")
    reply = f"Dear {task.goal['ticket']['customer_id']}, it is shipped."
    assert all(WORKFLOW.check_reply(reply, view(task, [], reply)).values())


def test_failed_call_approves_no_promise() -> None:
    finished = run_of("cancel_shipped", errs=True)
    assert not WORKFLOW.check_reply(finished.reply, finished)["no_unapproved_promises"]


def test_checks_use_no_goal() -> None:
    task = one_task("refund")
    attempt = right(task)
    finished = view(task, calls_of(attempt), reply_of(attempt))
    blind = replace(finished, task=replace(task, goal={}, world={}))
    assert WORKFLOW.check_reply(blind.reply, blind) == WORKFLOW.check_reply(finished.reply, finished)
