"""Groups that teach nothing give way to other tasks: which, how often, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest

from rl_actors.contracts.rollouts import Rollout
from rl_actors.contracts.tasks import RolloutRequest
from rl_actors.training.ppo import PpoSchedule, flat_groups, requests_for_step, run_ppo, sample_groups
from tests.rl_actors.fakes import BAD, GOOD, make_rollout, make_task
from tests.rl_actors.training.test_ppo import LIMITS, Actors

PLAN = PpoSchedule(num_steps=3, tasks_per_step=2, rollouts_per_task=2, checkpoint_every=2, seed=4, resample_rounds=2)
TASKS = [make_task(f"desk/train/{number}") for number in range(18)]
"""Task n of step s, round r is number (r * 3 + s) * 2 + n: no task comes twice."""


@dataclass
class Source:
    """Every group fails as a whole, but for tasks in `mixed`, at which one attempt of two succeeds."""

    mixed: Sequence[int] = ()
    asked: list[list[str]] = field(default_factory=list)

    def rollouts(self, requests: Sequence[RolloutRequest], temperature: float) -> list[Rollout]:
        self.asked.append([request.rollout_id for request in requests])
        return [
            make_rollout(
                r.rollout_id,
                task_id=r.task.task_id,
                group_id=r.group_id,
                outcome=GOOD if r.seed % 2 and int(r.task.task_id.rpartition("/")[2]) in self.mixed else BAD,
            )
            for r in requests
        ]


def sample(source: Source, step: int = 0) -> tuple[list[Rollout], int]:
    first, *others = (requests_for_step(TASKS, PLAN, step, number) for number in range(3))
    return sample_groups(first, others, source, 1.0)


def tasks_of(rollouts: Sequence[Rollout]) -> Mapping[int, set[str]]:
    return {r.group_id: {o.task_id for o in rollouts if o.group_id == r.group_id} for r in rollouts}


def test_groups_with_signal_stay_and_nothing_more_is_asked() -> None:
    source = Source(mixed=(0, 1))
    rollouts, num_resampled = sample(source)
    assert (len(source.asked), num_resampled) == (1, 0)
    assert tasks_of(rollouts) == {0: {"desk/train/0"}, 1: {"desk/train/1"}}


def test_a_flat_group_gives_way_to_another_task_that_teaches() -> None:
    source = Source(mixed=(0, 7))
    rollouts, num_resampled = sample(source)
    assert tasks_of(rollouts) == {0: {"desk/train/0"}, 1: {"desk/train/7"}}
    assert (len(rollouts), num_resampled) == (4, 1)
    assert [len(asked) for asked in source.asked] == [4, 2], "only the flat group was asked again, and only once"


def test_a_group_flat_again_gets_a_second_try_and_no_third() -> None:
    source = Source(mixed=(0, 13))
    rollouts, num_resampled = sample(source)
    assert tasks_of(rollouts)[1] == {"desk/train/13"}
    assert (num_resampled, len(source.asked)) == (1, 3)
    hopeless = Source()
    rollouts, num_resampled = sample(hopeless)
    assert tasks_of(rollouts) == {0: {"desk/train/0"}, 1: {"desk/train/1"}}, "what was first asked for stays"
    assert (num_resampled, [len(asked) for asked in hopeless.asked]) == (0, [4, 4, 4])


def test_a_lone_survivor_is_flat() -> None:
    rollouts = sample(Source(mixed=(0, 1)))[0]
    assert flat_groups(rollouts) == set()
    assert flat_groups(rollouts[:3]) == {1}


def test_no_round_of_a_step_draws_what_another_draws() -> None:
    requests = [r for step in range(3) for number in range(3) for r in requests_for_step(TASKS, PLAN, step, number)]
    assert len({request.seed for request in requests}) == len(requests)
    assert len({request.task.task_id for request in requests}) == len(TASKS)


@pytest.mark.parametrize("rounds", [0, 2])
def test_the_loop_asks_for_as_many_rounds_as_its_plan_says(rounds: int) -> None:
    actors, source = Actors(), Source()
    ports = replace(actors.ports(), source=source)
    with pytest.raises(AssertionError, match="enough"):
        run_ppo(TASKS, replace(PLAN, resample_rounds=rounds), replace(ports, report=_stop), LIMITS)
    assert len(source.asked) == 1 + rounds


def _stop(step: int, metrics: Mapping[str, float]) -> None:
    assert metrics["num_resampled_groups"] == metrics["num_dropped"] == 0.0
    raise AssertionError("enough")
