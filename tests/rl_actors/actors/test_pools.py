"""Groups of actors: what a dead, slow or lying actor becomes, and which checkpoints count."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError

from rl_actors.actors import pools
from rl_actors.actors.attested_sync import AttestedSync
from rl_actors.actors.pools import (
    LOOP_STATE,
    LearnerGroup,
    RolloutPool,
    ScorerPool,
    complete_checkpoints,
    one_line,
    require_enough,
    share_by_group,
    wait_for,
)
from rl_actors.contracts.errors import AttestationError, BadInputError, InfrastructureError, InstabilityError
from rl_actors.contracts.rollouts import LearnerUpdate
from tests.rl_actors.actors.fake_actors import UNSTABLE_VERSION, FakeLearner, FakeScorer, FakeWorker, Troubled

needs_ray = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]
PROBES = [[1, 2, 3], [4, 5]]


# --- without Ray ----------------------------------------------------------------------------------


def test_only_complete_checkpoints_count_oldest_first(tmp_path: Path):
    for name in ("step_000010", "step_000002", "step_000007.tmp", "stepping", "other"):
        (tmp_path / name).mkdir()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_000002", "step_000010"]


def test_without_checkpoints_there_are_none(tmp_path: Path):
    assert complete_checkpoints(tmp_path) == []
    assert complete_checkpoints(tmp_path / "never made") == []


def batch(num_dropped: int) -> Any:
    names = tuple(f"r{number}" for number in range(num_dropped))
    return SimpleNamespace(dropped=names, first_error="engine gone" if names else "")


@pytest.mark.parametrize(("dropped", "requested"), [((0, 0), 8), ((2, 0), 8), ((1, 1), 8), ((0,), 1)])
def test_up_to_a_quarter_may_be_lost(dropped: tuple[int, ...], requested: int):
    require_enough([object()] * requested, [batch(count) for count in dropped])  # type: ignore[arg-type, list-item]


@pytest.mark.parametrize(("dropped", "requested"), [((3, 0), 8), ((0, 3), 8), ((2, 1), 8), ((1,), 1), ((8,), 8)])
def test_more_is_refused_with_the_first_cause(dropped: tuple[int, ...], requested: int):
    with pytest.raises(InfrastructureError, match=r"rollouts were lost twice, the first \(r0\) to: engine gone"):
        require_enough([object()] * requested, [batch(count) for count in dropped])  # type: ignore[arg-type, list-item]


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


class RemoteError(RuntimeError):
    """What a page of a remote traceback ends in."""


PAGE = "\x1b[36mray::Worker.run()\x1b[39m (pid=7, ip=10.0.0.1)\n  File 'a.py', line 3\n    boom()\n"


def crossed(cause: Exception) -> RayTaskError:
    """An error as Ray hands it over: the cause inside, a page as its text."""
    return RayTaskError("run", f"{PAGE}{type(cause).__name__}: {cause}", cause, "worker", 7, "10.0.0.1")


def raising(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def get(_references: Any, timeout: float) -> None:
        raise error

    monkeypatch.setattr(pools.ray, "get", get)


@pytest.mark.parametrize("borders", [1, 2])
def test_a_failed_call_is_one_line_with_its_cause_and_where_to_look(monkeypatch: pytest.MonkeyPatch, borders: int):
    error: Exception = RemoteError("shapes differ: (3,) and (4,)\nand a page more")
    for _ in range(borders):
        error = crossed(error)
    assert "ray::Worker.run()" in str(error), "negative control: Ray's own text is the page"
    raising(monkeypatch, error)
    with pytest.raises(InfrastructureError) as caught:
        wait_for([], timeout_s=1, what="learners")
    said = str(caught.value)
    assert said.startswith("learners failed: RemoteError: shapes differ: (3,) and (4,) (pid 7 on 10.0.0.1); its log ")
    assert "\n" not in said
    assert "ray::" not in said


@pytest.mark.parametrize("borders", [1, 2])
def test_an_error_of_our_own_tree_passes_every_border(monkeypatch: pytest.MonkeyPatch, borders: int):
    own = BadInputError("ppo.epochs", 0, "raise it")
    error: Exception = own
    for _ in range(borders):
        error = crossed(error)
    raising(monkeypatch, error)
    with pytest.raises(BadInputError) as caught:
        wait_for([], timeout_s=1, what="learners")
    assert caught.value is own


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            f"The actor died because of an error raised in its creation task, {PAGE}ValueError: no such device\n  hint",
            "ValueError: no such device",
        ),
        (
            "The actor died unexpectedly before finishing this task.\n\tclass_name: X\n\tpid: 7\nThe node is gone.",
            "The node is gone.",
        ),
        ("", "RayActorError"),
    ],
)
def test_a_dead_actor_is_one_line_that_says_why(monkeypatch: pytest.MonkeyPatch, text: str, said: str):
    raising(monkeypatch, RayActorError(error_msg=text))
    with pytest.raises(InfrastructureError) as caught:
        wait_for([], timeout_s=1, what="learners")
    assert str(caught.value).startswith(f"learners died: {said}; its log is under the Ray session's logs/")


@pytest.mark.parametrize(("error", "said"), [(ValueError("\n a\nb"), "ValueError: b"), (ValueError(), "ValueError")])
def test_an_exception_is_told_in_one_line(error: Exception, said: str):
    assert one_line(error) == said


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
def local_ray() -> Iterator[Any]:
    """A Ray of our own, never one that happens to run on this machine."""
    import ray

    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    yield ray
    ray.shutdown()


def options(role: str, rank: int) -> dict[str, Any]:
    return {"num_cpus": 0.1, "max_concurrency": 4} if role == "rollout_worker" else {"num_cpus": 0.1}


@pytest.fixture(scope="module")
def troubled(local_ray: Any) -> Any:
    return local_ray.remote(Troubled).options(num_cpus=0.1).remote()


class TestWaitFor:
    """Everything that can happen to a remote call becomes a result or one error of our tree."""

    pytestmark = needs_ray

    def test_results_come_back_in_order(self, local_ray: Any, troubled: Any):
        references = [local_ray.put(1), troubled.well.remote(), local_ray.put(3)]
        assert wait_for(references, timeout_s=60, what="actors") == [1, "well", 3]

    def test_a_slow_actor_is_an_infrastructure_error(self, local_ray: Any):
        slow = local_ray.remote(Troubled).options(num_cpus=0.1).remote()
        wait_for([slow.well.remote()], timeout_s=60, what="slow ones")
        with pytest.raises(InfrastructureError, match="slow ones did not answer within 0 s"):
            wait_for([slow.sleep.remote(30)], timeout_s=0.3, what="slow ones")
        local_ray.kill(slow)

    def test_a_dead_actor_is_an_infrastructure_error(self, local_ray: Any):
        dead = local_ray.remote(Troubled).options(num_cpus=0.1).remote()
        call = dead.sleep.remote(30)
        local_ray.kill(dead)
        with pytest.raises(InfrastructureError, match="learners died"):
            wait_for([call], timeout_s=60, what="learners")

    def test_an_error_of_our_own_tree_passes_through_unchanged(self, troubled: Any):
        with pytest.raises(AttestationError, match=r"^worker 3 is stale$"):
            wait_for([troubled.stale.remote()], timeout_s=60, what="actors")

    def test_its_parts_survive_the_way(self, troubled: Any):
        with pytest.raises(BadInputError) as caught:
            wait_for([troubled.bad_input.remote()], timeout_s=60, what="actors")
        assert (caught.value.field, caught.value.value, caught.value.exit_code) == ("ppo.epochs", 0, 2)

    def test_a_defect_in_an_actor_is_an_infrastructure_error_with_its_cause(self, troubled: Any):
        with pytest.raises(InfrastructureError, match=r"(?s)actors failed: .*ZeroDivisionError"):
            wait_for([troubled.defect.remote()], timeout_s=60, what="actors")


def request(number: int, *, group: int, is_lost: bool = False) -> Any:
    return SimpleNamespace(rollout_id=f"r{number}", group_id=group, is_lost=is_lost)


@pytest.fixture(scope="module")
def pool(local_ray: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutPool]:
    """Two fake workers. Closing them leaves a file behind: the graceful way was taken."""
    farewell = tmp_path_factory.mktemp("farewell") / "closed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pools, "RolloutWorker", FakeWorker)
        settings: Any = str(farewell)
        made = RolloutPool("model", settings, num_workers=2, options=options, timeout_s=60)
        yield made
        made.close()
    assert farewell.exists()
    assert made.workers == []


class TestRolloutPool:
    """Requests are shared by group, results come back in order."""

    pytestmark = needs_ray

    def test_groups_stay_together_and_the_order_is_kept(self, pool: RolloutPool):
        requests = [request(number, group=number // 2) for number in range(8)]
        rollouts: list[Any] = pool.rollouts(requests, 1.0)
        assert [rollout.rollout_id for rollout in rollouts] == [f"r{number}" for number in range(8)]
        makers = [rollout.made_by for rollout in rollouts]
        assert len(set(makers)) == 2
        assert all(makers[index] == makers[index + 1] for index in range(0, 8, 2))

    def test_a_lost_one_is_left_out_and_counted(self, pool: RolloutPool):
        before = pool.num_reissued
        requests = [request(number, group=number, is_lost=number == 2) for number in range(4)]
        assert [rollout.rollout_id for rollout in pool.rollouts(requests, 1.0)] == ["r0", "r1", "r3"]
        assert pool.num_reissued == before + 1

    def test_too_many_lost_ones_are_an_error(self, pool: RolloutPool):
        requests = [request(number, group=number, is_lost=number < 2) for number in range(4)]
        with pytest.raises(InfrastructureError, match="2 of 4 rollouts were lost twice"):
            pool.rollouts(requests, 1.0)

    def test_a_worker_without_a_share_is_not_asked(self, pool: RolloutPool):
        rollouts: list[Any] = pool.rollouts([request(0, group=1), request(1, group=3)], 0.5)
        assert len({rollout.made_by for rollout in rollouts}) == 1
        assert {rollout.temperature for rollout in rollouts} == {0.5}


class TestAttestedSync:
    """Published is not believed: proved, resynced or replaced once, or refused."""

    pytestmark = needs_ray

    def sync(self, local_ray: Any, pool: RolloutPool, *per_worker: list[float], **worker: Any) -> AttestedSync:
        for one, gaps in zip(pool.workers, per_worker, strict=True):
            local_ray.get(one.configure.remote(gaps, **worker))
        learners: Any = SimpleNamespace(
            weights=lambda: {"w": 1}, probe=lambda probes: [[-1.0 for _ in row[1:]] for row in probes]
        )
        return AttestedSync(learners, pool, PROBES, tolerance=0.01)

    def published(self, local_ray: Any, pool: RolloutPool) -> list[int]:
        return local_ray.get([worker.times_published.remote() for worker in pool.workers])

    def test_the_largest_gap_of_any_worker_is_reported(self, local_ray: Any, pool: RolloutPool):
        one = self.sync(local_ray, pool, [0.001], [0.004])
        assert one.publish(5) == pytest.approx(0.004)
        assert (one.num_resyncs, self.published(local_ray, pool)) == (0, [1, 1])

    def test_a_worker_that_fails_is_resynced_and_only_that_one(self, local_ray: Any, pool: RolloutPool):
        one = self.sync(local_ray, pool, [0.5, 0.002], [0.001])
        before = list(pool.workers)
        assert one.publish(5) == pytest.approx(0.002)
        assert (one.num_resyncs, self.published(local_ray, pool)) == (1, [2, 1])
        assert pool.workers == before, "wrong numbers cost a resync, not an engine"

    @pytest.mark.parametrize("gap", [0.5, float("nan"), float("-inf")])
    def test_a_worker_that_fails_twice_is_refused(self, local_ray: Any, pool: RolloutPool, gap: float):
        one = self.sync(local_ray, pool, [0.0], [gap, gap])
        with pytest.raises(AttestationError, match="rollout worker 1 does not serve weights version 5"):
            one.publish(5)

    def test_a_worker_that_breaks_is_replaced_and_published_to_again(self, local_ray: Any, pool: RolloutPool):
        one = self.sync(local_ray, pool, [0.0], [0.003])
        local_ray.get(pool.workers[0].break_next_publish.remote())
        broken, well = pool.workers
        assert one.publish(7) == pytest.approx(0.003)
        assert pool.workers[1] == well
        assert pool.workers[0] != broken
        assert (one.num_resyncs, self.published(local_ray, pool)) == (1, [1, 1])

    def test_a_dead_worker_is_replaced_too(self, local_ray: Any, pool: RolloutPool):
        one = self.sync(local_ray, pool, [0.0], [0.0])
        local_ray.kill(pool.workers[1])
        assert one.publish(8) == 0.0
        assert one.num_resyncs == 1

    def test_the_right_numbers_under_the_wrong_version_are_refused(
        self, local_ray: Any, pool: RolloutPool, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(pool, "restart", lambda rank: None)
        one = self.sync(local_ray, pool, [0.0], [0.0], skew=1)
        with pytest.raises(AttestationError, match=r"failed twice .*: it serves weights version 6, published was 5"):
            one.publish(5)


class TestScorerPool:
    """Shared out and put back in order."""

    pytestmark = needs_ray

    def test_scores_are_in_the_order_of_rollouts(self, local_ray: Any, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(pools, "RewardScorer", FakeScorer)
        mix: Any = None
        scorers = ScorerPool("path", "rm-a", mix, num_scorers=2, num_threads=1, options=options)
        rollouts: Any = [SimpleNamespace(rollout_id=f"r{number}") for number in range(5)]
        scores: list[Any] = scorers.score(rollouts)
        assert [score.rollout_id for score in scores] == [f"r{number}" for number in range(5)]
        assert len({score.made_by for score in scores}) == 2
        assert scorers.score([]) == []
        scorers.close()


@pytest.fixture(scope="module")
def group(local_ray: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LearnerGroup]:
    """Two fake ranks; what they saved before a test may lie there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pools, "PpoLearnerActor", FakeLearner)
        patch.setattr(pools, "LearnerRank", lambda **place: place)
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
        assert local_ray.get(group._ranks[1].load_checkpoint.remote(str(group._checkpoints / "step_000010"))) == (
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
