"""The watch of reward against outcome: what it remembers, and that a watch made from it is the same watch."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_actors.contracts.rollouts import Rollout, Score
from rl_actors.training.ppo import WINDOW_STEPS, DivergenceWatch
from tests.rl_actors.fakes import BAD, GOOD, make_rollout, make_score

FULL = 2 * WINDOW_STEPS
Steps = list[list[tuple[float, bool]]]


def step_of(attempts: Sequence[tuple[float, bool]]) -> tuple[list[Rollout], list[Score]]:
    """Rollouts and scores of (critic score, success) pairs."""
    rollouts = [make_rollout(f"r{n}", outcome=GOOD if success else BAD) for n, (_, success) in enumerate(attempts)]
    return rollouts, [make_score(f"r{n}", 0.0, critic=critic) for n, (critic, _) in enumerate(attempts)]


def watched(steps: Steps, watch: DivergenceWatch) -> list[float]:
    return [watch.observe(*step_of(attempts)) for attempts in steps]


def rising(num_steps: int) -> Steps:
    """The critic's score climbs by thirds, one of two attempts succeeds."""
    return [[(step / 3, True), (step / 3, False)] for step in range(num_steps)]


def through_json(watch: DivergenceWatch) -> DivergenceWatch:
    return DivergenceWatch(json.loads(json.dumps(watch.seen, allow_nan=False)))


def test_a_new_watch_has_seen_nothing():
    assert DivergenceWatch().seen == []


def test_it_says_nothing_until_two_windows_do_not_overlap():
    found = watched(rising(FULL + 1), DivergenceWatch())
    assert found[: FULL - 1] == [0.0] * (FULL - 1)
    assert min(found[FULL - 1 :]) > 1.0


def test_it_keeps_the_first_steps_and_the_latest():
    watch = DivergenceWatch()
    watched(rising(30), watch)
    first, latest = range(WINDOW_STEPS), range(30 - WINDOW_STEPS, 30)
    assert [critic for critic, _ in watch.seen] == [[step / 3, step / 3] for step in (*first, *latest)]
    assert {tuple(outcome) for _, outcome in watch.seen} == {(1.0, 0.0)}


@pytest.mark.parametrize("cut", [0, 1, WINDOW_STEPS, FULL - 1, FULL, FULL + 3])
def test_a_watch_goes_on_where_another_stopped(cut: int):
    steps = rising(FULL + 6)
    before, whole = DivergenceWatch(), DivergenceWatch()
    watched(steps[:cut], before)
    assert watched(steps[cut:], through_json(before)) == watched(steps, whole)[cut:]
    if cut > 0:
        assert watched(steps[cut:], DivergenceWatch()) != watched(steps[cut:], before), "negative control: a new watch"


def test_what_was_seen_does_not_change_with_what_is_seen_later():
    watch = DivergenceWatch()
    watched(rising(FULL), watch)
    kept = watch.seen
    text = json.dumps(kept)
    watched(rising(3), watch)
    assert json.dumps(kept) == text != json.dumps(watch.seen)


def test_two_watches_of_one_state_share_nothing():
    state = [([0.5], [1.0])]
    one, other = DivergenceWatch(state), DivergenceWatch(state)
    watched(rising(2), one)
    assert (len(one.seen), len(other.seen), len(state)) == (3, 1, 1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.floats(-1e6, 1e6), st.booleans()), min_size=1, max_size=3), min_size=1, max_size=FULL + 5
    ),
    st.integers(0, FULL + 5),
)
def test_its_state_is_plain_json_and_exact(steps: Steps, cut: int):
    watch = DivergenceWatch()
    watched(steps[:cut], watch)
    again = through_json(watch)
    assert json.loads(json.dumps(watch.seen)) == [list(window) for window in watch.seen]
    assert again.seen == watch.seen
    assert watched(steps[cut:], again) == watched(steps[cut:], watch)
