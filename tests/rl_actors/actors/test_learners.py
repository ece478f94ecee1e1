"""The learner's ranks: what one joins, how samples are shared, and which checkpoints count."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rl_actors.actors import learners
from rl_actors.actors.learners import (
    LOOP_STATE,
    LearnerGroup,
    LearnerRank,
    PpoLearnerActor,
    complete_checkpoints,
    share_by_group,
)
from rl_actors.contracts.errors import InfrastructureError, InstabilityError
from rl_actors.contracts.rollouts import LearnerUpdate
from rl_actors.learner import PpoLearner
from tests.rl_actors.actors.fake_actors import UNSTABLE_VERSION, FakeLearner, options

needs_ray = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]
PROBES = [[1, 2, 3], [4, 5]]
PLACE = LearnerRank(rank=1, num_ranks=2, master_address="10.0.0.1", master_port=4321, num_threads=1)


# --- one rank -------------------------------------------------------------------------------------


def test_a_rank_joins_its_group_before_it_builds_anything(monkeypatch: pytest.MonkeyPatch):
    order: list[Any] = []
    monkeypatch.setattr(learners, "join_process_group", order.append)
    monkeypatch.setattr(PpoLearner, "__init__", lambda _self, *arguments: order.append(arguments))
    settings: Any = "settings"
    PpoLearnerActor("policy", "reference", settings, PLACE)
    assert order == [PLACE, ("policy", "reference", "settings")]


def test_engines_read_one_copy_of_the_weights_from_the_object_store(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(learners.ray, "put", lambda value: ("reference to", value))
    monkeypatch.setattr(PpoLearner, "weights", lambda _self: {"w": 1})
    assert object.__new__(PpoLearnerActor).put_weights() == ("reference to", {"w": 1})


def test_a_rank_that_resumes_says_which_version_and_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    def load(self: PpoLearner, directory: str) -> tuple[str, ...]:
        self.weights_version = 9
        return (f"random state in {directory}",)

    monkeypatch.setattr(PpoLearner, "load_checkpoint", load)
    assert object.__new__(PpoLearnerActor).resume("there") == (9, ("random state in there",))


@pytest.mark.slow
def test_joining_tells_torch_where_this_rank_stands(process_group: None):
    assert torch.distributed.is_initialized()
    assert (torch.distributed.get_rank(), torch.distributed.get_world_size()) == (0, 1)
    assert {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")} == {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"


# --- the group, without Ray -----------------------------------------------------------------------


def test_only_complete_checkpoints_count_oldest_first(tmp_path: Path):
    for name in ("step_000010", "step_000002", "step_000007.tmp", "stepping", "other"):
        (tmp_path / name).mkdir()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_000002", "step_000010"]


def test_without_checkpoints_there_are_none(tmp_path: Path):
    assert complete_checkpoints(tmp_path) == []
    assert complete_checkpoints(tmp_path / "never made") == []


def training_sample(number: int, *, group: int, length: int) -> Any:
    return SimpleNamespace(rollout_id=f"r{number}", group_id=group, token_ids=(1,) * length)


def test_groups_are_dealt_whole_and_evenly():
    """Attempts at one task are each other's baseline: a rank without the others would compute another one."""
    lengths = {0: 50, 1: 10, 2: 10, 3: 30}
    samples = [training_sample(n, group=n % 4, length=lengths[n % 4]) for n in range(12)]
    shares = share_by_group(samples, 2)
    groups = [{sample.group_id for sample in share} for share in shares]
    assert groups == [{0}, {1, 2, 3}]
    assert sorted(sample.rollout_id for share in shares for sample in share) == sorted(s.rollout_id for s in samples)
    assert share_by_group(samples, 1) != []


def test_a_rank_without_a_group_is_refused():
    with pytest.raises(InfrastructureError, match="1 groups of rollouts came back for 2 learners"):
        share_by_group([training_sample(0, group=3, length=5)], 2)


class LocalGroup(LearnerGroup):
    """The group's own way with checkpoints around one fake rank in this process."""

    def __init__(self, checkpoints: Path, version: int = 0) -> None:
        self._checkpoints = checkpoints
        self.rank = FakeLearner("policy", "reference", None, {"rank": 0})
        self.rank.jump_to(version)

    def _call(self, method: str, *arguments: Any) -> Any:
        return getattr(self.rank, method)(*arguments)


STATE = {"divergence_watch": [[[0.1 + 0.2, 1 / 3, -5e-324], [1.0, 0.0, 1.0]]]}
WITHOUT_WATCH = "resumed from step_000003 without the window of the reward-outcome watch"


def test_what_the_loop_knew_comes_back_exactly_with_the_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    LocalGroup(tmp_path, 2).save_checkpoint(2, {"divergence_watch": []})
    LocalGroup(tmp_path, 3).save_checkpoint(3, STATE)
    fresh = LocalGroup(tmp_path)
    with caplog.at_level("WARNING"):
        assert fresh.load_newest_checkpoint() == (3, STATE)
    assert fresh.rank.version == 3
    assert "reward-outcome watch" not in caplog.text


def test_a_checkpoint_without_what_the_loop_knew_is_resumed_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    LocalGroup(tmp_path, 3).save_checkpoint(3, STATE)
    (tmp_path / "step_000003" / LOOP_STATE).unlink()
    with caplog.at_level("WARNING"):
        assert LocalGroup(tmp_path).load_newest_checkpoint() == (3, {})
    assert [record.getMessage() for record in caplog.records] == [
        "resumed from step_000003 without its coffee", WITHOUT_WATCH,
    ]  # fmt: skip


def test_a_checkpoint_gets_its_name_only_with_what_the_loop_knows(tmp_path: Path):
    """State that is no JSON is a defect; the checkpoint before it stays the newest."""
    LocalGroup(tmp_path, 3).save_checkpoint(3, STATE)
    with pytest.raises(TypeError, match="not JSON serializable"):
        LocalGroup(tmp_path, 4).save_checkpoint(4, {"divergence_watch": object()})
    assert LocalGroup(tmp_path).load_newest_checkpoint() == (3, STATE)


def test_saving_a_version_again_replaces_what_the_loop_knew(tmp_path: Path):
    LocalGroup(tmp_path, 3).save_checkpoint(3, {"divergence_watch": []})
    LocalGroup(tmp_path, 3).save_checkpoint(3, STATE)
    assert LocalGroup(tmp_path).load_newest_checkpoint() == (3, STATE)


@pytest.mark.parametrize(
    ("saved", "judged", "back_to", "left"),
    [
        ((5, 10), 10, 5, [5]),  # the collapse shows one update later: the newest holds it
        ((5, 10), 12, 10, [5, 10]),
        ((0,), 0, 0, [0]),  # there is no other
        ((5, 10), 5, 5, [5]),
    ],
)
def test_a_restore_goes_back_behind_the_weights_that_tripped(
    tmp_path: Path, saved: tuple[int, ...], judged: int, back_to: int, left: list[int]
):
    group = LocalGroup(tmp_path)
    for version in saved:
        group.rank.jump_to(version)
        group.save_checkpoint(version, STATE)
    calls = list[tuple[Any, ...]]()
    group._call = lambda method, *arguments: calls.append((method, *arguments))  # type: ignore[method-assign]
    group._restore(LearnerUpdate(weights_version=judged + 1, metrics={}, restore_factor=0.5))
    assert calls == [("restore", str(tmp_path / f"step_{back_to:06d}"), 0.5)]
    assert [path.name for path in complete_checkpoints(tmp_path)] == [f"step_{version:06d}" for version in left]


def test_nothing_to_resume_is_nothing_to_remember(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("WARNING"):
        assert LocalGroup(tmp_path).load_newest_checkpoint() == (0, {})
    assert caplog.text == ""


# --- with a small local Ray -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def group(local_ray: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LearnerGroup]:
    """Two fake ranks; what they saved before a test may lie there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learners, "PpoLearnerActor", FakeLearner)
        patch.setattr(learners, "LearnerRank", lambda **place: place)
        settings: Any = None
        made = LearnerGroup(
            "policy", "reference", settings, num_ranks=2, num_threads=1, options=options,
            checkpoints=tmp_path_factory.mktemp("checkpoints"),
        )  # fmt: skip
    yield made
    made.close()


class TestLearnerGroup:
    """Ranks act as one; a checkpoint is complete or absent."""

    pytestmark = needs_ray

    def jump_to(self, local_ray: Any, group: LearnerGroup, version: int) -> None:
        local_ray.get([rank.jump_to.remote(version) for rank in group._ranks])

    def names(self, group: LearnerGroup) -> list[str]:
        return sorted(path.name for path in group._checkpoints.iterdir())

    def test_ranks_share_the_samples_and_the_first_reports(self, group: LearnerGroup):
        samples: Any = [training_sample(number, group=number // 2, length=10) for number in range(8)]
        update = group.update(samples)
        assert update.metrics == {"num": 4, "rank": 0, "restores": 0}
        assert group.weights() == {"version": 1}
        assert group.probe(PROBES) == [[-1.0, -1.0], [-1.0]]

    def test_without_a_checkpoint_a_run_starts_at_zero(self, group: LearnerGroup):
        assert group.load_newest_checkpoint() == (0, {})

    def test_the_newest_two_are_kept_and_the_newest_is_loaded(self, local_ray: Any, group: LearnerGroup):
        for version in (2, 4, 10):
            self.jump_to(local_ray, group, version)
            group.save_checkpoint(version, {"divergence_watch": [[[version / 3], [1.0]]]})
        assert self.names(group) == ["step_000004", "step_000010"]
        self.jump_to(local_ray, group, 77)
        assert group.load_newest_checkpoint() == (10, {"divergence_watch": [[[10 / 3], [1.0]]]})
        assert local_ray.get(group._ranks[1].resume.remote(str(group._checkpoints / "step_000010"))) == (
            10,
            ("its coffee",),
        )

    def test_saving_again_replaces(self, local_ray: Any, group: LearnerGroup):
        self.jump_to(local_ray, group, 11)
        group.save_checkpoint(10, STATE)
        assert (group._checkpoints / "step_000010" / "rank0").read_text() == "11"

    def test_a_checkpoint_that_was_cut_off_is_not_one(self, local_ray: Any, group: LearnerGroup):
        self.jump_to(local_ray, group, 11)
        group.save_checkpoint(11, STATE)
        self.jump_to(local_ray, group, 99)
        with pytest.raises(InfrastructureError, match="disk full"):
            group.save_checkpoint(12, {})
        (group._checkpoints / "step_000012.tmp").mkdir(exist_ok=True)
        assert group.load_newest_checkpoint() == (11, STATE)
        assert "step_000012" not in self.names(group)

    def test_what_could_not_be_restored_is_named(self, group: LearnerGroup, caplog: pytest.LogCaptureFixture):
        with caplog.at_level("WARNING"):
            group.load_newest_checkpoint()
        assert "resumed from step_000011 without its coffee" in caplog.text
        assert "reward-outcome watch" not in caplog.text

    def test_an_unstable_update_puts_every_rank_back(self, local_ray: Any, group: LearnerGroup):
        samples: Any = [training_sample(number, group=number // 2, length=10) for number in range(8)]
        self.jump_to(local_ray, group, UNSTABLE_VERSION - 1)
        assert group.update(samples).restore_factor == 0.5
        after = local_ray.get([rank.update.remote(samples) for rank in group._ranks])
        assert [update.metrics["restores"] for update in after] == [1, 1]

    def test_without_a_checkpoint_there_is_nothing_to_go_back_to(self, local_ray: Any, group: LearnerGroup):
        samples: Any = [training_sample(number, group=number // 2, length=10) for number in range(8)]
        kept, group._checkpoints = group._checkpoints, group._checkpoints / "empty"
        group._checkpoints.mkdir()
        self.jump_to(local_ray, group, UNSTABLE_VERSION - 1)
        with pytest.raises(InstabilityError, match=r"^entropy_collapse: .*no checkpoint to go back to"):
            group.update(samples)
        group._checkpoints = kept

    def test_a_policy_is_written_by_every_rank(self, group: LearnerGroup, tmp_path: Path):
        group.save_policy(str(tmp_path))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["policy0", "policy1"]
