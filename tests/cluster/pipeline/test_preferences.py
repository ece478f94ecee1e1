"""Preference data: pairs of different runs of one task, labelled by annotators, with calibration tasks kept apart."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from cluster.pipeline import preferences, sampling
from cluster.pipeline.preferences import collect_preferences, label_rows, preference_rows, read_pairs, sample_baseline
from cluster.pipeline.snapshot import read_table, read_tasks, write_snapshot
from rl_actors.contracts import Outcome, Task
from rl_actors.contracts.errors import BadDataError, InfrastructureError, StageRefusedError, TamperedError
from rl_actors.contracts.rollouts import Rollout, RolloutStatus
from rl_actors.contracts.versions import DataSnapshot, PolicyVersion
from rl_actors.durable.metrics_log import read_metrics
from rl_actors.environment.workflow import RolloutView, RubricCriterion
from tests.cluster.pipeline.fakes import (
    DeskRun,
    FaultyDesk,
    Places,
    PoolRecorder,
    desk_rollout,
    freeze_data,
    make_policy,
    make_run,
    watch_of,
)

GOOD = Outcome(success=True, violations=(), reasons=())
BASELINE = make_policy("/models/sft", "sft-1", "sft")
RUBRIC = (
    RubricCriterion(name="resolution", question="Handled?", low=0, high=2, weight=0.7),
    RubricCriterion(name="tone", question="Polite?", low=1, high=5, weight=0.3),
)


@pytest.fixture(scope="session")
def tasks(snapshot: DataSnapshot) -> list[Task]:
    return read_tasks(snapshot, "train")


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> PoolRecorder:
    recorder = PoolRecorder(lambda _path, _request: GOOD)
    monkeypatch.setattr(sampling, "RolloutPool", recorder)
    return recorder


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> Places:
    recorder = Places()
    monkeypatch.setattr(preferences, "placed", recorder)
    return recorder


def test_every_task_is_attempted_several_times_each_with_a_seed_of_its_own(
    run: DeskRun, tasks: list[Task], pools: PoolRecorder, places: Places
):
    rollouts = sample_baseline(run.spec, BASELINE, tasks[:3])
    (pool,) = pools.pools
    count = run.spec.reward.rollouts_per_task
    assert [request.task for request in pool.requests] == [task for task in tasks[:3] for _ in range(count)]
    assert [request.group_id for request in pool.requests] == [index for index in range(3) for _ in range(count)]
    assert len({request.seed for request in pool.requests}) == 3 * count
    assert len({rollout.rollout_id for rollout in rollouts}) == 3 * count
    assert (pool.model_path, pool.temperatures) == (BASELINE.path, [run.spec.ppo.temperature])
    assert (pool.settings.workflow, pool.settings.limits) == (run.workflow_ref, run.limits)
    assert pool.options["num_workers"] == run.spec.ppo.num_rollout_workers
    assert (places.stages, places.open, pool.is_closed) == (["offline_eval"], 0, True)


def test_workers_are_stopped_when_sampling_fails(run: DeskRun, tasks: list[Task], pools: PoolRecorder, places: Places):
    pools.breaks = True
    with pytest.raises(InfrastructureError, match="workers died"):
        sample_baseline(run.spec, BASELINE, tasks[:2])
    assert pools.pools[0].is_closed
    assert places.open == 0


# --- the whole stage on attempts of two kinds -------------------------------------------------------------------------


class Sampler:
    """In place of the baseline: the expert's right and wrong attempts in turn, two of them with equal tokens.

    `changed` changes an attempt by its seed; a sampler that is steady makes right attempts only.
    """

    def __init__(
        self,
        tokens: Sequence[int] = (10, 11, 12, 12),
        *,
        is_steady: bool = False,
        changed: Callable[[int, int, Rollout], Rollout] = lambda _task, _seed, rollout: rollout,
    ) -> None:
        self.tokens, self.is_steady, self.changed, self.asked = tokens, is_steady, changed, list[Task]()

    def __call__(self, _spec: object, _baseline: PolicyVersion, tasks: Sequence[Task]) -> list[Rollout]:
        self.asked = list(tasks)
        return [
            self.changed(
                number,
                index,
                desk_rollout(task, f"{task.task_id}#{index}", (token,), is_good=self.is_steady or index % 2 == 0),
            )
            for number, task in enumerate(tasks)
            for index, token in enumerate(self.tokens)
        ]


def collect(
    run: DeskRun, snapshot: DataSnapshot, monkeypatch: pytest.MonkeyPatch, sampler: Sampler | None = None
) -> tuple[DataSnapshot, Sampler]:
    sampler = sampler or Sampler()
    monkeypatch.setattr(preferences, "sample_baseline", sampler)
    note = run.watch.note
    return collect_preferences(run.spec, run.folder, run.workflow, snapshot, BASELINE, note), sampler


def rows(frozen: DataSnapshot, table: str) -> list[dict[str, Any]]:
    return read_table(frozen.path, table)


def test_train_and_calibration_tasks_are_disjoint(
    run: DeskRun, snapshot: DataSnapshot, monkeypatch: pytest.MonkeyPatch
):
    frozen, sampler = collect(run, snapshot, monkeypatch)
    splits = {split: {t.task_id for t in sampler.asked if t.split == split} for split in ("train", "calibration")}
    assert {task.split for task in sampler.asked} == {"train", "calibration"}
    found = {
        split: {pair.task_id for pair in read_pairs(frozen, run.workflow.rubric, split)}
        for split in ("train", "calibration")
    }
    assert found == splits
    assert not found["train"] & found["calibration"]
    assert all(found.values())


def test_never_a_pair_of_two_tasks(run: DeskRun, snapshot: DataSnapshot, monkeypatch: pytest.MonkeyPatch):
    frozen, _ = collect(run, snapshot, monkeypatch)
    task_of = {row["rollout_id"]: row["task_id"] for row in rows(frozen, "rollouts")}
    choices = rows(frozen, "preferences")
    assert choices
    for row in choices:
        assert task_of[row["first_rollout_id"]] == task_of[row["second_rollout_id"]] == row["task_id"]


def test_equal_runs_give_no_pair(run: DeskRun, snapshot: DataSnapshot, monkeypatch: pytest.MonkeyPatch):
    frozen, _ = collect(run, snapshot, monkeypatch, Sampler(tokens=(10, 10, 11)))
    tokens = {row["rollout_id"]: row["token_ids"] for row in rows(frozen, "rollouts")}
    pairs = {(row["first_rollout_id"], row["second_rollout_id"]) for row in rows(frozen, "preferences")}
    assert pairs
    assert all(tokens[first] != tokens[second] for first, second in pairs)


def test_a_task_whose_runs_are_all_equal_gives_nothing(
    run: DeskRun, snapshot: DataSnapshot, monkeypatch: pytest.MonkeyPatch
):
    frozen, _ = collect(run, snapshot, monkeypatch, Sampler(tokens=(10, 10, 10, 10)))
    assert frozen.num_rows["preferences"] == 0
    assert read_pairs(frozen, run.workflow.rubric, "train") == ()


def test_a_task_gives_at_most_one_pair_per_run(run: DeskRun, snapshot: DataSnapshot, monkeypatch: pytest.MonkeyPatch):
    frozen, sampler = collect(run, snapshot, monkeypatch, Sampler(tokens=(10, 11, 12, 13)))
    pairs = read_pairs(frozen, run.workflow.rubric, "train")
    counts = {task.task_id: sum(pair.task_id == task.task_id for pair in pairs) for task in sampler.asked}
    assert {counts[task.task_id] for task in sampler.asked if task.split == "train"} == {4}


def test_about_as_many_pairs_as_the_spec_asks_for(home: Path, snapshot: DataSnapshot, monkeypatch: pytest.MonkeyPatch):
    run = make_run(home, "reward.num_pairs=40")
    frozen, _ = collect(run, snapshot, monkeypatch, Sampler(tokens=(10, 11, 12, 13), is_steady=True))
    numbers = {split: len(read_pairs(frozen, run.workflow.rubric, split)) for split in ("train", "calibration")}
    assert 22 <= numbers["train"] <= 25  # 55 % of 40, up to one task more
    assert 18 <= numbers["calibration"] <= 21


def test_every_run_is_labelled_by_every_annotator(
    run: DeskRun, snapshot: DataSnapshot, monkeypatch: pytest.MonkeyPatch
):
    frozen, sampler = collect(run, snapshot, monkeypatch)
    per_run = run.workflow.num_annotators * len(run.workflow.rubric)
    assert frozen.num_rows["rollouts"] == 4 * len(sampler.asked)
    assert frozen.num_rows["rubric_labels"] == frozen.num_rows["rollouts"] * per_run
    labels = rows(frozen, "rubric_labels")
    assert len({(row["rollout_id"], row["criterion"], row["annotator"]) for row in labels}) == len(labels)


def test_equal_runs_of_the_stage_freeze_equal_data(home: Path, snapshot: DataSnapshot, monkeypatch: pytest.MonkeyPatch):
    first, _ = collect(make_run(home, run_id="run-1"), snapshot, monkeypatch)
    second, _ = collect(make_run(home, run_id="run-2"), snapshot, monkeypatch)
    third, _ = collect(make_run(home, "seed=9", run_id="run-3"), snapshot, monkeypatch)
    assert first.sha256 == second.sha256
    assert first.sha256 != third.sha256


def test_the_better_run_is_preferred_and_rated_higher(
    run: DeskRun, snapshot: DataSnapshot, monkeypatch: pytest.MonkeyPatch
):
    """The annotators err, but a reward model must be able to learn from them: on the whole they are right."""
    frozen, _ = collect(run, snapshot, monkeypatch, Sampler(tokens=(10, 11)))
    pairs = read_pairs(frozen, run.workflow.rubric, "train")
    told_apart = [pair for pair in pairs if pair.first_rubric["resolution"] != pair.second_rubric["resolution"]]
    agrees = [
        (pair.preference > 0.5) == (pair.first_rubric["resolution"] > pair.second_rubric["resolution"])
        for pair in told_apart
    ]
    assert len(told_apart) > len(pairs) / 2
    assert sum(agrees) > 0.7 * len(agrees)


def test_a_label_off_the_scale_is_refused_and_nothing_is_frozen(
    run: DeskRun, snapshot: DataSnapshot, monkeypatch: pytest.MonkeyPatch
):
    class Generous(FaultyDesk):
        def annotate(self, run: RolloutView, annotator: int, rng: random.Random) -> dict[str, int]:
            return dict.fromkeys(super().annotate(run, annotator, rng), 3)

    run.workflow = Generous()
    with pytest.raises(BadDataError, match=r"rated 0\.\.2"):
        collect(run, snapshot, monkeypatch)
    assert not run.folder.snapshots.exists()


# --- stability of the baseline ----------------------------------------------------------------------------------------

MANY = ("data.num_train=60", "data.num_calibration=40", "reward.num_pairs=300")
BAD = Outcome(success=False, violations=(), reasons=("wrong",))


def many_tasks(home: Path) -> tuple[DeskRun, DataSnapshot]:
    """A run with 76 tasks to sample: enough for the bounds to say something."""
    run = make_run(home, *MANY)
    return run, freeze_data(run)


ENDINGS: tuple[RolloutStatus, ...] = ("ok", "tool_budget", "truncated", "tool_budget")
COIN = tuple(combinations(range(4), 2))  # two of four seeds, each pair as often as any other


def ended(*, success: bool, status: RolloutStatus = "ok") -> Callable[[Rollout], Rollout]:
    return lambda rollout: replace(rollout, outcome=GOOD if success else BAD, status=status)


# By task number and seed: what each of the three bounds is there for.
UNSTABLE: dict[str, Callable[[int, int, Rollout], Rollout]] = {
    "came to an answer": lambda _task, seed, rollout: ended(success=False, status=ENDINGS[seed])(rollout),
    "success by seed": lambda task, seed, rollout: ended(success=task % 2 == 0 or seed == 3)(rollout),
    "the same task": lambda task, seed, rollout: ended(success=seed in COIN[task % len(COIN)])(rollout),
}


@pytest.mark.parametrize("reason", UNSTABLE)
def test_an_unstable_baseline_is_refused_before_anyone_labels_its_runs(
    home: Path, monkeypatch: pytest.MonkeyPatch, reason: str
):
    class Idle(FaultyDesk):
        def annotate(self, run: RolloutView, annotator: int, rng: random.Random) -> dict[str, int]:
            raise AssertionError("nobody is asked about an unstable baseline")

    run, snapshot = many_tasks(home)
    before = sorted(run.folder.snapshots.iterdir())
    run.workflow = Idle()
    sampler = Sampler(changed=UNSTABLE[reason], is_steady=True)
    with pytest.raises(StageRefusedError, match=reason) as caught:
        run.stage("preferences", {}, lambda: collect(run, snapshot, monkeypatch, sampler)[0], DataSnapshot)
    assert str(caught.value).count("(at ") == 1
    assert "sft.epochs" in str(caught.value)
    assert not run.journal.records
    assert sorted(run.folder.snapshots.iterdir()) == before


def test_a_stable_baseline_passes_and_its_figures_can_be_read(home: Path, monkeypatch: pytest.MonkeyPatch):
    run, snapshot = many_tasks(home)
    steady = Sampler(changed=lambda task, _seed, rollout: ended(success=task % 2 == 0)(rollout), is_steady=True)
    collect(run, snapshot, monkeypatch, steady)
    written = json.loads((run.folder.evaluations / "baseline_stability.json").read_text())
    assert (written["num_seeds"], written["num_tasks"]) == (4, len(steady.asked))
    assert (written["seed_sd"], written["within_task"], written["finished"]) == (0, 0, 1)
    assert any("baseline over 4 seeds" in note for note in watch_of(run).notes)
    (row,) = read_metrics(run.folder.metrics, "preferences")
    assert (row["seed_sd"], row["within_task"], row["finished"]) == (0, 0, 1)


def test_the_figures_of_a_refused_baseline_can_be_read(home: Path, monkeypatch: pytest.MonkeyPatch):
    run, snapshot = many_tasks(home)
    with pytest.raises(StageRefusedError):
        collect(run, snapshot, monkeypatch, Sampler(changed=UNSTABLE["the same task"], is_steady=True))
    written = json.loads((run.folder.evaluations / "baseline_stability.json").read_text())
    assert written["within_task"] == pytest.approx(1 / 3)
    assert written["within_task"] > written["max_within_task"]


# --- rows -------------------------------------------------------------------------------------------------------------


def test_label_rows_name_run_criterion_and_annotator(run: DeskRun, tasks: list[Task]):
    rollout = desk_rollout(tasks[0], "r1", (5,))
    found = list(label_rows(run.workflow, rollout, tasks[0], random.Random(0)))
    criteria = [criterion.name for criterion in run.workflow.rubric]
    assert [(row["annotator"], row["criterion"]) for row in found] == [
        (annotator, name) for annotator in range(run.workflow.num_annotators) for name in criteria
    ]
    assert {(row["task_id"], row["rollout_id"]) for row in found} == {(tasks[0].task_id, "r1")}
    scale = {criterion.name: range(criterion.low, criterion.high + 1) for criterion in run.workflow.rubric}
    assert all(row["label"] in scale[row["criterion"]] for row in found)


def test_preference_rows_ask_every_annotator_once(run: DeskRun, tasks: list[Task]):
    pair = desk_rollout(tasks[0], "good", (5,)), desk_rollout(tasks[0], "bad", (6,), is_good=False)
    found = list(preference_rows(run.workflow, pair, {tasks[0].task_id: tasks[0]}, random.Random(0)))
    assert [row["annotator"] for row in found] == list(range(run.workflow.num_annotators))
    assert {(row["first_rollout_id"], row["second_rollout_id"]) for row in found} == {("good", "bad")}
    assert {row["prefers_first"] for row in found} <= {0, 1}


def test_annotators_see_what_happened(run: DeskRun, tasks: list[Task]):
    seen: list[RolloutView] = []

    class Spy(FaultyDesk):
        def annotate(self, run: RolloutView, annotator: int, rng: random.Random) -> dict[str, int]:
            seen.append(run)
            return dict(super().annotate(run, annotator, rng))

    run.workflow = Spy()
    rollout = desk_rollout(tasks[0], "r1", (5,))
    list(label_rows(run.workflow, rollout, tasks[0], random.Random(0)))
    assert {(view.reply, view.num_turns) for view in seen} == {(rollout.reply, len(rollout.turns))}
    assert all(len(view.tool_calls) == len(rollout.turns) - 1 for view in seen)


# --- pairs ------------------------------------------------------------------------------------------------------------


def freeze(directory: Path, votes: Sequence[int], labels: Sequence[tuple[str, str, int]]) -> DataSnapshot:
    """Two runs of a train task and two of a calibration task; votes and (run, criterion, label) are of the first."""
    rollouts = [
        {"rollout_id": name, "task_id": task, "split": split, "success": 1, "token_ids": [1, number]}
        for number, (name, task, split) in enumerate(
            [("a", "t", "train"), ("b", "t", "train"), ("c", "k", "calibration"), ("d", "k", "calibration")]
        )
    ]
    choices = [
        {
            "task_id": "t",
            "first_rollout_id": "a",
            "second_rollout_id": "b",
            "annotator": annotator,
            "prefers_first": vote,
        }
        for annotator, vote in enumerate(votes)
    ]
    choices.append(
        {"task_id": "k", "first_rollout_id": "c", "second_rollout_id": "d", "annotator": 0, "prefers_first": 1}
    )
    given = [*labels, ("c", "tone", 1), ("d", "tone", 5)]
    rated = [
        {"task_id": "t", "rollout_id": run, "criterion": criterion, "annotator": 0, "label": label}
        for run, criterion, label in given
    ]
    tables = {"rollouts": rollouts, "preferences": choices, "rubric_labels": rated}
    return write_snapshot(directory, tables)


def test_choices_become_their_mean_and_labels_their_mean_on_0_to_1(tmp_path: Path):
    labels = [
        ("a", "resolution", 2),
        ("a", "resolution", 1),
        ("a", "tone", 5),
        ("b", "resolution", 0),
        ("b", "tone", 2),
    ]
    (pair,) = read_pairs(freeze(tmp_path, (1, 0, 1), labels), RUBRIC, "train")
    assert pair.preference == pytest.approx(2 / 3)
    assert pair.first_rubric == pytest.approx({"resolution": 0.75, "tone": 1.0})
    assert pair.second_rubric == pytest.approx({"resolution": 0.0, "tone": 0.25})
    assert (pair.task_id, pair.first, pair.second) == ("t", (1, 0), (1, 1))


def test_the_ends_of_the_scale_are_0_and_1(tmp_path: Path):
    frozen = freeze(tmp_path, (1,), [("a", "tone", 1), ("b", "tone", 5)])
    (pair,) = read_pairs(frozen, RUBRIC, "train")
    assert (pair.first_rubric, pair.second_rubric) == ({"tone": 0.0}, {"tone": 1.0})


def test_only_pairs_of_the_split_are_read(tmp_path: Path):
    frozen = freeze(tmp_path, (1,), [("a", "tone", 1), ("b", "tone", 5)])
    assert [pair.task_id for pair in read_pairs(frozen, RUBRIC, "calibration")] == ["k"]
    assert [pair.task_id for pair in read_pairs(frozen, RUBRIC, "train")] == ["t"]
    assert read_pairs(frozen, RUBRIC, "held_out") == ()


def test_changed_preferences_are_never_read(tmp_path: Path):
    frozen = freeze(tmp_path, (1,), [("a", "tone", 1), ("b", "tone", 5)])
    with pytest.raises(TamperedError):
        read_pairs(replace(frozen, sha256="0" * 64), RUBRIC, "train")
