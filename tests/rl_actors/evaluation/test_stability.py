"""A baseline's steadiness over evaluation seeds: figures by hand, and an unstable one refused for each reason."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_actors.contracts.errors import BadDataError, StageRefusedError
from rl_actors.evaluation.suites import (
    BaselineStability,
    SeededAttempt,
    StabilityBounds,
    baseline_stability,
    require_stable,
)

BOUNDS = StabilityBounds(min_finished=0.5, max_seed_sd=0.05, max_within_task=0.2)
STEADY = (1, 1, 1, 1), (0, 0, 0, 0)


def attempts(outcomes: Sequence[Sequence[int]], *, finished: Sequence[Sequence[int]] = ()) -> list[SeededAttempt]:
    """One row of outcomes per task, one column per seed; all finished unless said."""
    return [
        SeededAttempt(
            task_id=f"task-{number}",
            seed=seed,
            is_finished=bool(finished[number][seed]) if finished else True,
            is_success=bool(outcome),
        )
        for number, row in enumerate(outcomes)
        for seed, outcome in enumerate(row)
    ]


def measured(outcomes: Sequence[Sequence[int]], *, finished: Sequence[Sequence[int]] = ()) -> BaselineStability:
    return baseline_stability(attempts(outcomes, finished=finished), BOUNDS)


def refusal(stability: BaselineStability) -> str:
    with pytest.raises(StageRefusedError) as caught:
        require_stable(stability)
    assert caught.value.exit_code == 1
    return str(caught.value)


# --- the figures ------------------------------------------------------------------------------------------------------


def test_the_figures_are_those_computed_by_hand():
    found = measured([(1, 1, 0, 0), (1, 0, 0, 0), (1, 1, 1, 1)], finished=[(1, 1, 0, 1), (1, 1, 1, 1), (1, 0, 1, 0)])
    assert (found.num_tasks, found.num_seeds) == (3, 4)
    assert found.success_by_seed == pytest.approx((1, 2 / 3, 1 / 3, 1 / 3))
    # mean 7/12; squared distances 25/144, 1/144, 9/144, 9/144; divided by 3
    assert found.seed_sd == pytest.approx(math.sqrt(44 / 144 / 3))
    assert found.within_task == pytest.approx((1 / 3 + 1 / 4 + 0) / 3)
    assert found.finished == pytest.approx(9 / 12)


def test_the_limits_leave_room_for_three_standard_errors():
    found = measured([(1, 1, 0, 0), (1, 0, 0, 0), (1, 1, 1, 1)])
    rate = 7 / 12
    assert found.max_seed_sd == pytest.approx(0.05 + 3 * math.sqrt(rate * (1 - rate) / 3))
    assert found.max_within_task == pytest.approx(0.2 + 3 * math.sqrt(1 / 96 / 3))
    assert found.min_finished == 0.5


@pytest.mark.parametrize("num_seeds", [2, 3, 4, 5])
def test_the_room_within_a_task_is_that_of_a_fair_coin(num_seeds: int):
    """The variance of the sample variance over all equally likely outcomes, against the closed form."""
    values = [statistics.variance(map(Fraction, row)) for row in itertools.product((0, 1), repeat=num_seeds)]
    assert statistics.mean(values) == Fraction(1, 4)
    standard_error = math.sqrt(statistics.pvariance(values))
    room = measured([(0,) * num_seeds]).max_within_task - BOUNDS.max_within_task
    assert room == pytest.approx(3 * standard_error)


def test_more_tasks_leave_less_room():
    few, many = measured(STEADY), measured(STEADY * 100)
    assert few.max_seed_sd > many.max_seed_sd > BOUNDS.max_seed_sd
    assert few.max_within_task > many.max_within_task > BOUNDS.max_within_task
    assert (few.seed_sd, few.within_task) == (many.seed_sd, many.within_task) == (0.0, 0.0)


def test_a_task_that_lost_an_attempt_to_infrastructure_is_left_out():
    whole = attempts([(1, 0, 1, 0), (1, 1, 1, 1)])
    assert baseline_stability([*whole, *attempts([(), (), (0, 0, 0)])], BOUNDS) == baseline_stability(whole, BOUNDS)


@pytest.mark.parametrize(
    "given_attempts",
    [
        [],
        attempts([(1,), (0,)]),
        [
            SeededAttempt(task_id=name, seed=seed, is_finished=True, is_success=True)
            for name, seed in (("a", 0), ("b", 1))
        ],
    ],
)
def test_what_compares_no_two_seeds_is_refused(given_attempts: list[SeededAttempt]):
    with pytest.raises(BadDataError, match="two seeds"):
        baseline_stability(given_attempts, BOUNDS)


outcomes_of = st.integers(2, 5).flatmap(
    lambda seeds: st.lists(st.lists(st.integers(0, 1), min_size=seeds, max_size=seeds), min_size=1, max_size=12)
)


@settings(max_examples=100, deadline=None)
@given(rows=outcomes_of, seed=st.integers(0, 99))
def test_order_does_not_matter_and_figures_stay_in_their_bounds(rows: list[list[int]], seed: int):
    given_attempts = attempts(rows)
    found = baseline_stability(given_attempts, BOUNDS)
    random.Random(seed).shuffle(given_attempts)
    again = baseline_stability(given_attempts, BOUNDS)
    assert again.within_task == pytest.approx(found.within_task)
    assert again.success_by_seed == pytest.approx(found.success_by_seed)
    num_seeds = len(rows[0])
    most = (num_seeds // 2) * ((num_seeds + 1) // 2) / num_seeds / (num_seeds - 1)
    assert 0 <= found.within_task <= most + 1e-12
    assert 0 <= found.seed_sd <= math.sqrt(0.5) + 1e-12


# --- the verdict ------------------------------------------------------------------------------------------------------


def test_a_baseline_that_always_ends_alike_is_stable():
    found = measured(STEADY * 50)
    assert found.refusals == ()
    require_stable(found)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_a_baseline_with_some_chance_is_stable(rate: float):
    """Like the desk's: what becomes of half of the tasks is certain, of the others a matter of chance."""
    rng = random.Random(3)
    chance = [tuple(int(rng.random() < rate) for _ in range(4)) for _ in range(176)]
    require_stable(measured([*chance, *STEADY * 88]))


def test_one_that_rarely_answers_is_refused():
    finished = [(1, 0, 0, 0)] * 100
    message = refusal(measured([(0, 0, 0, 0)] * 100, finished=finished))
    assert "25.0% of its attempts came to an answer (at least 50%)" in message
    assert "sft.epochs" in message
    assert "sft.learning_rate" in message
    assert "4 seeds x 100 tasks" in message


@pytest.mark.parametrize(("num_finished", "is_stable"), [(2, True), (1, False)])
def test_half_of_the_attempts_is_enough(num_finished: int, is_stable: bool):
    finished = [(1,) * num_finished + (0,) * (4 - num_finished)]
    assert (measured([(1, 1, 1, 1)], finished=finished).refusals == ()) == is_stable


def test_one_whose_success_depends_on_the_seed_is_refused():
    """Three tasks in ten succeed under the last two seeds only; each task by itself is steady enough."""
    found = measured([(0, 0, 1, 1)] * 120 + [(1, 1, 1, 1)] * 140 + [(0, 0, 0, 0)] * 140)
    message = refusal(found)
    assert found.refusals[0] in message
    assert "success by seed is 35.0%, 35.0%, 65.0%, 65.0%: sd 0.173 (at most 0.125)" in message
    assert len(found.refusals) == 1


def test_one_that_tosses_a_coin_for_each_task_is_refused():
    """Its success rate is the same under every seed: only the figure within a task tells."""
    toss = list(itertools.product((0, 1), repeat=4)) * 22
    found = measured(toss)
    assert found.seed_sd == pytest.approx(0.0)
    assert found.within_task == pytest.approx(0.25)
    assert "one and the same task has variance 0.250 (at most 0.216)" in refusal(found)
    assert len(found.refusals) == 1


def test_every_reason_is_given_at_once():
    message = refusal(measured([(0, 0, 1, 1)] * 400, finished=[(0, 0, 0, 1)] * 400))
    assert message.count("(at ") == 3


def test_a_handful_of_tasks_proves_nothing_against_it():
    require_stable(measured([(1, 0, 1, 0)] * 5))


def test_a_line_says_figures_and_limits():
    line = str(measured(STEADY * 50))
    assert "4 seeds x 100 tasks: success 50.0%" in line
    assert "sd 0.000 (limit 0.200)" in line
    assert "finished 100.0% (limit 50%)" in line
