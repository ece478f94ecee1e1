"""The PPO loop over four fakes: the order of calls, what is dropped, what stops it, what is saved."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from rl_actors.algorithms.stability import StabilityLimits
from rl_actors.contracts.errors import AttestationError, InfrastructureError, InstabilityError
from rl_actors.contracts.rollouts import LearnerUpdate, Rollout, Score, TrainingSample
from rl_actors.contracts.tasks import RolloutRequest
from rl_actors.training.ppo import (
    WINDOW_STEPS,
    DivergenceWatch,
    LoopState,
    PpoPorts,
    PpoSchedule,
    requests_for_step,
    require_stable,
    run_ppo,
    run_step,
    summarise,
)
from tests.rl_actors.fakes import BAD, GOOD, make_rollout, make_score, make_task

PLAN = PpoSchedule(num_steps=3, tasks_per_step=2, rollouts_per_task=2, checkpoint_every=2, seed=4)
TASKS = [make_task(f"desk/train/{number}") for number in range(5)]
LIMITS = StabilityLimits()


@dataclass
class Actors:
    """The four protocols at once; every call is written down in order. One tick of the clock per look at it."""

    lose_every: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    gap: float = 0.001
    fail_at: str = ""
    error: Exception = field(default_factory=lambda: AttestationError("stale"))
    log: list[tuple[Any, ...]] = field(default_factory=list)
    requests: list[list[RolloutRequest]] = field(default_factory=list)
    samples: list[list[TrainingSample]] = field(default_factory=list)
    rows: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    temperatures: set[float] = field(default_factory=set)
    saved: dict[int, str] = field(default_factory=dict)
    version: int = 0
    stale: int = 0
    now: float = 0.0

    def ports(self) -> PpoPorts:
        return PpoPorts(source=self, scorer=self, learner=self, sync=self, report=self.report, clock=self.tick)

    def rollouts(self, requests: Sequence[RolloutRequest], temperature: float) -> list[Rollout]:
        self._write("rollouts", len(requests), self.version)
        self.temperatures.add(temperature)
        self.requests.append(list(requests))
        kept = [r for i, r in enumerate(requests) if not self.lose_every or (i + 1) % self.lose_every]
        return [
            make_rollout(
                r.rollout_id,
                task_id=r.task.task_id,
                group_id=r.group_id,
                outcome=GOOD if r.seed % 2 else BAD,
                weights_version=self.version - self.stale,
            )
            for r in kept
        ]

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        self._write("score", len(rollouts))
        return [make_score(rollout.rollout_id, float(rollout.outcome.success)) for rollout in rollouts]

    def update(self, samples: Sequence[TrainingSample]) -> LearnerUpdate:
        self._write("update", len(samples))
        self.samples.append(list(samples))
        self.version += 1
        return LearnerUpdate(weights_version=self.version, metrics={"approx_kl": 0.01, **self.metrics})

    def publish(self, weights_version: int) -> float:
        self._write("publish", weights_version)
        return self.gap

    def save_checkpoint(self, weights_version: int, loop_state: LoopState) -> None:
        self._write("checkpoint", weights_version)
        self.saved[weights_version] = json.dumps(loop_state, allow_nan=False)

    def report(self, step: int, metrics: Any) -> None:
        self._write("report", step)
        self.rows.append((step, dict(metrics)))

    def tick(self) -> float:
        self.now += 1.0
        return self.now

    def _write(self, name: str, *values: Any) -> None:
        self.log.append((name, *values))
        if name == self.fail_at:
            raise self.error


def run(
    actors: Actors,
    *,
    start: int = 0,
    plan: PpoSchedule = PLAN,
    limits: StabilityLimits = LIMITS,
    loop_state: LoopState | None = None,
) -> Actors:
    run_ppo(TASKS, plan, actors.ports(), limits, start=start, loop_state=loop_state)
    return actors


# --- the order of things --------------------------------------------------------------------------


def test_generate_score_train_publish_report_save():
    steps = [
        [("rollouts", 4, step), ("score", 4), ("update", 4), ("publish", step + 1), ("report", step + 1)]
        for step in range(3)
    ]
    steps[1].append(("checkpoint", 2))
    steps[2].append(("checkpoint", 3))
    first = ("checkpoint", 0)  # what a tripwire of the first steps goes back to
    assert run(Actors()).log == [first, *(call for step in steps for call in step)]


def test_no_rollout_is_made_by_weights_that_were_not_published():
    log = run(Actors()).log
    for index, (name, *values) in enumerate(log):
        if name == "rollouts" and values[1] > 0:
            assert ("publish", values[1]) in log[:index]


def test_a_batch_made_by_other_weights_than_attested_is_rejected():
    actors = Actors(version=3, stale=1)
    with pytest.raises(AttestationError, match="sampled by weights version 2, attested is 3; the batch is rejected"):
        run(actors, start=3, plan=replace(PLAN, num_steps=4))
    assert "update" not in [name for name, *_ in actors.log]


def test_rollouts_are_sampled_at_the_temperature_the_learner_scores_at():
    assert run(Actors(), plan=replace(PLAN, temperature=0.7)).temperatures == {0.7}


def test_a_resumed_run_does_only_what_is_left():
    actors = Actors(version=2)
    run(actors, start=2)
    assert actors.log[0] == ("rollouts", 4, 2)
    assert actors.log[-1] == ("checkpoint", 3)
    assert [step for step, _ in actors.rows] == [3]
    whole = run(Actors())
    assert actors.requests[0] == whole.requests[2], "the same requests as without the interruption"


def test_a_run_that_is_done_does_nothing():
    assert run(Actors(), start=3).log == []


@pytest.mark.parametrize(("every", "saved"), [(1, [0, 1, 2, 3]), (2, [0, 2, 3]), (3, [0, 3]), (10, [0, 3])])
def test_the_start_and_the_last_step_are_always_saved(every: int, saved: list[int]):
    plan = PpoSchedule(num_steps=3, tasks_per_step=1, rollouts_per_task=1, checkpoint_every=every, seed=0)
    assert [values[0] for name, *values in run(Actors(), plan=plan).log if name == "checkpoint"] == saved


# --- requests -------------------------------------------------------------------------------------


def test_tasks_are_walked_through_in_order_and_again():
    ids = [[r.task.task_id[-1] for r in requests_for_step(TASKS, PLAN, step)] for step in range(3)]
    assert ids == [list("0011"), list("2233"), list("4400")]


def test_a_group_is_the_attempts_at_one_task():
    requests = requests_for_step(TASKS, PLAN, 0)
    assert [request.group_id for request in requests] == [0, 0, 1, 1]
    by_group = {(request.group_id, request.task.task_id) for request in requests}
    assert len(by_group) == 2


def test_no_two_attempts_of_a_run_share_a_seed_or_a_name():
    requests = [request for step in range(20) for request in requests_for_step(TASKS, PLAN, step)]
    assert len({request.seed for request in requests}) == len(requests)
    assert len({request.rollout_id for request in requests}) == len(requests)


def test_another_seed_is_another_run():
    other = PpoSchedule(num_steps=3, tasks_per_step=2, rollouts_per_task=2, checkpoint_every=2, seed=5)
    mine = {request.seed for step in range(20) for request in requests_for_step(TASKS, PLAN, step)}
    theirs = {request.seed for step in range(20) for request in requests_for_step(TASKS, other, step)}
    assert not mine & theirs


# --- what is lost ---------------------------------------------------------------------------------


def test_what_infrastructure_ate_is_counted_and_never_trained():
    actors = Actors(lose_every=4)
    run(actors)
    assert [len(samples) for samples in actors.samples] == [3, 3, 3]
    assert [metrics["num_dropped"] for _, metrics in actors.rows] == [1.0, 1.0, 1.0]
    asked = [request.rollout_id for request in actors.requests[0]]
    assert [sample.rollout_id for sample in actors.samples[0]] == asked[:3]


def test_nothing_lost_is_zero_dropped():
    assert {metrics["num_dropped"] for _, metrics in run(Actors()).rows} == {0.0}


@pytest.mark.parametrize("part", ["rollouts", "score", "update", "publish"])
def test_a_failing_part_ends_the_run_before_anything_is_saved(part: str):
    actors = Actors(fail_at=part, error=InfrastructureError("gone"))
    with pytest.raises(InfrastructureError, match="gone"):
        run(actors)
    assert actors.log[-1][0] == part
    assert actors.rows == []


def test_an_engine_that_is_not_attested_trains_nothing_more():
    actors = Actors(fail_at="publish")
    with pytest.raises(AttestationError):
        run(actors)
    assert [name for name, *_ in actors.log] == ["checkpoint", "rollouts", "score", "update", "publish"]


def test_scores_and_rollouts_must_match_one_to_one():
    class Forgetful(Actors):
        def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
            return super().score(rollouts)[1:]

    with pytest.raises(ValueError, match="shorter"):
        run(Forgetful())


# --- metrics --------------------------------------------------------------------------------------


def test_a_step_reports_what_a_person_watches():
    actors = Actors(metrics={"entropy": 0.7})
    metrics = run_step(requests_for_step(TASKS, PLAN, 0), actors.ports(), 0, 1.0, DivergenceWatch())
    assert metrics["reward"] == metrics["success"] == 0.5
    assert metrics["violation_rate"] == 0.5
    assert (metrics["entropy"], metrics["approx_kl"]) == (0.7, 0.01)
    assert (metrics["attestation_gap"], metrics["weights_version"]) == (0.001, 1.0)
    assert [metrics[f"{part}_s"] for part in ("generate", "score", "train", "sync")] == [1.0] * 4


def test_a_summary_by_hand():
    rollouts = [
        make_rollout("a", outcome=GOOD, tool_calls=3, tool_errors=1),
        make_rollout("b", outcome=BAD, tool_calls=1, tool_errors=1, status="truncated"),
        make_rollout("c", outcome=BAD, tool_calls=0, status="timeout"),
        make_rollout("d", outcome=GOOD, tool_calls=0),
    ]
    scores = [make_score(name, reward, critic=0.2) for name, reward in zip("abcd", (1.0, 0.0, -0.5, 0.5), strict=True)]
    summary = summarise(rollouts, scores, {"generate_s": 2.0})
    assert summary == pytest.approx(
        {
            "reward": 0.25, "critic_score": 0.2, "success": 0.5, "violation_rate": 0.5, "tool_error_rate": 0.5,
            "truncated_fraction": 0.5, "tokens_per_rollout": 5.0, "tokens_per_s": 10.0,
        }
    )  # fmt: skip


def test_without_a_tool_call_there_is_no_error_rate_to_divide_by():
    summary = summarise([make_rollout(tool_calls=0)], [make_score("r", 1.0)], {"generate_s": 0.0})
    assert summary["tool_error_rate"] == 0.0


# --- stability ------------------------------------------------------------------------------------


@dataclass
class Hacked(Actors):
    """The critic's score climbs from a step on, while the verified outcome stays what it is."""

    begins: int = 0
    slope: float = 1.0 / 3.0

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        climbed = self.slope * max(self.version - self.begins, 0)
        return [replace(score, critic_score=climbed) for score in super().score(rollouts)]


LONG = PpoSchedule(num_steps=20, tasks_per_step=2, rollouts_per_task=2, checkpoint_every=1, seed=0)


def test_a_hacked_reward_stops_after_its_row_was_written_and_before_its_state_is_saved():
    actors = Hacked()
    with pytest.raises(InstabilityError, match=r"^reward_outcome_divergence: "):
        run(actors, plan=LONG)
    last = actors.rows[-1][0]
    assert last == 2 * WINDOW_STEPS, "as soon as two windows can be compared"
    assert max(values[0] for name, *values in actors.log if name == "checkpoint") == last - 1
    assert actors.rows[-1][1]["reward_outcome_divergence"] > 1.0


def test_a_critic_that_rises_with_the_outcome_stops_nothing():
    """Negative control: the same climb, where what is verified climbs as well."""

    class Honest(Hacked):
        def rollouts(self, requests: Sequence[RolloutRequest], temperature: float) -> list[Rollout]:
            outcome = GOOD if self.version >= WINDOW_STEPS else BAD
            return [replace(rollout, outcome=outcome) for rollout in super().rollouts(requests, temperature)]

    assert len(run(Honest(), plan=LONG).rows) == LONG.num_steps


LATE = 2 * WINDOW_STEPS + 2  # the first step of the climb: both windows are full by then
FIRES = LATE + 3


def stopped(actors: Hacked, *, start: int = 0, loop_state: LoopState | None = None) -> dict[int, float]:
    """Run until the watch fires; returns the divergence by step."""
    with pytest.raises(InstabilityError, match=r"^reward_outcome_divergence: "):
        run(actors, start=start, plan=LONG, loop_state=loop_state)
    return {step: metrics["reward_outcome_divergence"] for step, metrics in actors.rows}


@pytest.mark.parametrize("cut", [1, WINDOW_STEPS, 2 * WINDOW_STEPS - 1, 2 * WINDOW_STEPS, LATE, FIRES - 1])
def test_a_resumed_watch_fires_at_the_same_step(cut: int):
    whole = Hacked(begins=LATE)
    seen = stopped(whole)
    resumed = Hacked(begins=LATE, version=cut)
    again = stopped(resumed, start=cut, loop_state=json.loads(whole.saved[cut]))
    assert max(again) == max(seen) == FIRES
    assert again == {step: divergence for step, divergence in seen.items() if step > cut}, "to the last bit"
    kept = {version: state for version, state in whole.saved.items() if version > cut}
    assert resumed.saved == kept, "and the next resume goes on from the same state"


@pytest.mark.parametrize("cut", [WINDOW_STEPS + 2, 2 * WINDOW_STEPS, LATE, FIRES - 1])
@pytest.mark.parametrize("nothing", [None, {}])
def test_a_watch_that_lost_its_window_fires_later(cut: int, nothing: LoopState | None):
    """Negative control: it compares the hacked steps with the hacked steps."""
    again = stopped(Hacked(begins=LATE, version=cut), start=cut, loop_state=nothing)
    assert max(again) >= cut + 2 * WINDOW_STEPS > FIRES


def test_every_checkpoint_holds_what_the_loop_had_seen_by_then():
    saved = run(Actors(), plan=replace(LONG, num_steps=10)).saved
    sizes = {version: len(json.loads(text)["divergence_watch"]) for version, text in saved.items()}
    assert sizes == {version: min(version, 2 * WINDOW_STEPS) for version in range(11)}


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ({"policy_loss": float("nan")}, "non_finite"),
        ({"value_loss": float("inf")}, "non_finite"),
        ({"entropy": 0.0001}, "entropy_collapse"),
    ],
)
def test_what_no_later_step_can_heal_stops_the_run(metrics: dict[str, float], reason: str):
    actors = Actors(metrics=metrics)
    with pytest.raises(InstabilityError, match=f"^{reason}: .*last good state"):
        run(actors)
    assert [values[0] for name, *values in actors.log if name == "checkpoint"] == [0]


@dataclass
class Tripped(Actors):
    """Every update says which tripwires it met, and what it did."""

    trips: tuple[str, ...] = ()
    restore_factor: float = 0.0

    def update(self, samples: Sequence[TrainingSample]) -> LearnerUpdate:
        return replace(super().update(samples), trips=self.trips, restore_factor=self.restore_factor)


def test_what_the_learner_acted_on_is_recorded_and_the_run_goes_on():
    poison, thin = "non_finite: policy_loss = nan, limit inf", "entropy_collapse: entropy = 0.0001, limit 0.0005"
    metrics = {"policy_loss": float("nan"), "entropy": 0.0001}
    actors = run(Tripped(trips=(poison, poison, thin), restore_factor=0.5, metrics=metrics))
    assert len(actors.rows) == 3
    row = actors.rows[0][1]
    assert (row["trip_non_finite"], row["trip_entropy_collapse"], row["restored"]) == (2, 1, 1.0)
    assert run(Actors()).rows[0][1]["restored"] == 0.0


def test_what_tripped_is_told_with_its_step_values_and_limits():
    thin, told = "entropy_collapse: entropy = 0.0001, limit 0.0005", list[tuple[int, tuple[str, ...]]]()
    actors = Tripped(trips=(thin,), restore_factor=0.5)
    run_ppo(
        TASKS, PLAN, replace(actors.ports(), report_trips=lambda step, trips: told.append((step, tuple(trips)))), LIMITS
    )
    assert told == [(1, (thin,)), (2, (thin,)), (3, (thin,))]


@dataclass
class Ending(Actors):
    """A learner that ends the run from within an update: there is no row of metrics."""

    def update(self, samples: Sequence[TrainingSample]) -> LearnerUpdate:
        raise InstabilityError("repeated_restores: restores = 3, limit 2")


def test_the_trip_that_ends_a_run_is_told_before_it_ends():
    told = list[tuple[int, tuple[str, ...]]]()
    ports = replace(Ending().ports(), report_trips=lambda step, trips: told.append((step, tuple(trips))))
    with pytest.raises(InstabilityError, match="repeated_restores"):
        run_ppo(TASKS, PLAN, ports, LIMITS)
    assert told == [(1, ("repeated_restores: restores = 3, limit 2",))]


def test_what_the_learner_already_acted_on_does_not_stop_the_run():
    """A large gradient norm or ratio costs a minibatch or the rest of an update, inside the learner."""
    assert len(run(Actors(metrics={"grad_norm": 1e4, "ratio_max": 1e4})).rows) == 3


def test_a_limit_that_is_off_stops_nothing():
    metrics = {"reward_outcome_divergence": 1.5}
    require_stable(metrics, StabilityLimits(max_reward_outcome_divergence=None))
    with pytest.raises(InstabilityError) as caught:
        require_stable(metrics, LIMITS)
    assert caught.value.exit_code == 1
