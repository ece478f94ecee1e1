"""What a Ray Train worker does, run here without Ray, and what becomes of a job that fails."""

from __future__ import annotations

import itertools
import json
import math
import random
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import ray.train.torch
import torch
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from transformers import AutoModelForCausalLM

from rl_actors.actors import train_jobs
from rl_actors.actors.train_jobs import RewardJob, SftJob, TrainResources, run_reward_job, run_sft_job
from rl_actors.contracts.errors import BadInputError, InfrastructureError, InstabilityError, SeatrialError
from rl_actors.contracts.versions import Calibration
from rl_actors.durable.metrics_log import read_metrics
from rl_actors.models.reward_model import RewardModel
from rl_actors.training.reward_model import PreferencePair, RewardSettings
from rl_actors.training.sft import Example, SftSettings

torch.set_num_threads(1)
RESOURCES = TrainResources(num_workers=1, num_threads=1, gpus_per_worker=0.0, storage="/nowhere")


class Context:
    """Ray Train's word on where this worker stands."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def get_world_rank(self) -> int:
        return self.rank

    def get_world_size(self) -> int:
        return 2


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(ray.train, "get_context", lambda: Context(rank))


def sft_job(base: Path, folder: Path) -> SftJob:
    ids = [tuple(range(20 + 10 * number, 28 + 10 * number)) for number in range(4)]
    return SftJob(
        base=str(base),
        output=str(folder / "sft"),
        metrics=str(folder / "metrics.jsonl"),
        examples=tuple(Example(token_ids=one, loss_mask=(False,) * 4 + (True,) * 4) for one in ids),
        settings=SftSettings(epochs=2, learning_rate=1e-2, batch_tokens=16, max_grad_norm=1.0, seed=0),
    )


def pairs(count: int, seed: int) -> tuple[PreferencePair, ...]:
    rng = random.Random(seed)
    made = []
    for number in range(count):
        body = tuple(rng.randrange(100, 300) for _ in range(5))
        rubric = {"correct": 1.0}
        made.append(
            PreferencePair(
                task_id=f"t{number}", first=(*body, 60), second=(*body, 61), preference=1.0, first_rubric=rubric,
                second_rubric={"correct": 0.0},
            )
        )  # fmt: skip
    return tuple(made)


def reward_job(base: Path, folder: Path) -> RewardJob:
    return RewardJob(
        backbone=str(base),
        output=str(folder / "reward"),
        metrics=str(folder / "metrics.jsonl"),
        criteria=("correct",),
        pairs=pairs(8, 1),
        calibration_pairs=pairs(6, 2),
        settings=RewardSettings(epochs=2, learning_rate=5e-3, batch_pairs=4, seed=0),
    )


@pytest.mark.slow
def test_an_sft_worker_writes_a_policy_and_its_curve(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process_group: None
):
    as_rank(monkeypatch, 0)
    job = sft_job(tiny_dir, tmp_path)
    train_jobs._sft_worker({"job": job, "num_threads": 1})
    rows = read_metrics(job.metrics, "sft")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["loss"]) for row in rows)
    trained: Any = AutoModelForCausalLM.from_pretrained(job.output, dtype=torch.float32)
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    assert not torch.equal(trained.lm_head.weight, base.lm_head.weight)


@pytest.mark.slow
def test_a_reward_worker_writes_model_and_calibration(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process_group: None
):
    as_rank(monkeypatch, 0)
    job = reward_job(tiny_dir, tmp_path)
    train_jobs._reward_worker({"job": job, "num_threads": 1})
    calibration = Calibration(**json.loads((tmp_path / "reward" / "calibration.json").read_text()))
    assert calibration.num_pairs == 6
    assert set(calibration.criterion_mae) == {"correct"}
    assert calibration.temperature == RewardModel.load(job.output).temperature
    assert [row["step"] for row in read_metrics(job.metrics, "reward_model")] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("worker", ["_sft_worker", "_reward_worker"])
def test_only_the_first_rank_writes(
    worker: str, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process_group: None
):
    as_rank(monkeypatch, 1)
    job = sft_job(tiny_dir, tmp_path) if worker == "_sft_worker" else reward_job(tiny_dir, tmp_path)
    getattr(train_jobs, worker)({"job": job, "num_threads": 1})
    assert list(tmp_path.iterdir()) == []


class FakeTrainer:
    """Ray Train's trainer; `fit` runs the worker here, or fails."""

    error: Exception | None = None
    seen: list[dict[str, Any]]

    def __init__(self, worker: Any, **settings: Any) -> None:
        self.seen.append(settings | {"worker": worker})

    def fit(self) -> None:
        if self.error:
            raise self.error


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> type[FakeTrainer]:
    kind = type("Trainer", (FakeTrainer,), {"seen": []})
    monkeypatch.setattr(ray.train.torch, "TorchTrainer", kind)
    return kind


def test_a_job_asks_for_what_the_spec_gives(trainer: type[FakeTrainer], tiny_dir: Path, tmp_path: Path):
    job = sft_job(tiny_dir, tmp_path)
    run_sft_job(job, TrainResources(num_workers=3, num_threads=2, gpus_per_worker=0.5, storage=str(tmp_path)))
    (seen,) = trainer.seen
    assert seen["train_loop_config"] == {"job": job, "num_threads": 2}
    scaling = seen["scaling_config"]
    assert (scaling.num_workers, scaling.use_gpu, scaling.resources_per_worker) == (3, True, {"CPU": 1.0, "GPU": 0.5})
    assert seen["run_config"].storage_path == str(tmp_path)


def test_without_gpus_none_are_asked_for(trainer: type[FakeTrainer], tiny_dir: Path, tmp_path: Path):
    run_reward_job(reward_job(tiny_dir, tmp_path), RESOURCES)
    scaling = trainer.seen[0]["scaling_config"]
    assert (scaling.use_gpu, scaling.resources_per_worker) == (False, {"CPU": 1.0})


@pytest.mark.parametrize("error", [RuntimeError("worker died\n  File x, line 3"), TimeoutError("no nodes")])
def test_a_failed_job_is_an_infrastructure_error_with_its_cause(
    trainer: type[FakeTrainer], tiny_dir: Path, tmp_path: Path, error: Exception
):
    trainer.error = error
    said = f"the sft job failed on Ray Train: {type(error).__name__}: {str(error).splitlines()[0]}; "
    with pytest.raises(InfrastructureError, match=said) as caught:
        run_sft_job(sft_job(tiny_dir, tmp_path), RESOURCES)
    assert "\n" not in str(caught.value)
    assert "ray status" in str(caught.value), "the remedy"


def test_starting_is_tried_a_few_times_and_a_broken_worker_never_again(
    trainer: type[FakeTrainer], tiny_dir: Path, tmp_path: Path
):
    run_sft_job(sft_job(tiny_dir, tmp_path), RESOURCES)
    limits = trainer.seen[0]["run_config"].failure_config
    assert (limits.max_failures, limits.controller_failure_limit) == (0, train_jobs.START_RETRIES)


def test_ray_trains_own_policy_gives_up_after_as_many_starts():
    """The setting means what we take it for in the installed Ray; its default never gives up."""
    from ray.train import FailureConfig
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.train.v2._internal.execution.failure_handling import FailureDecision
    from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy

    policy, endless = (
        DefaultFailurePolicy(config)
        for config in (FailureConfig(controller_failure_limit=train_jobs.START_RETRIES), FailureConfig())
    )
    error = ControllerError(WorkerGroupStartupTimeoutError(2))
    decisions = [policy.make_decision(error) for _ in range(train_jobs.START_RETRIES + 1)]
    assert decisions == [FailureDecision.RETRY] * train_jobs.START_RETRIES + [FailureDecision.RAISE]
    assert {endless.make_decision(error) for _ in range(50)} == {FailureDecision.RETRY}, "negative control"


def test_no_room_is_one_line_that_says_who_to_ask(trainer: type[FakeTrainer], tiny_dir: Path, tmp_path: Path):
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    trainer.error = ControllerError(WorkerGroupStartupTimeoutError(2))
    with pytest.raises(InfrastructureError, match=r"WorkerGroupStartupTimeoutError: .*2 workers.*ray status") as caught:
        run_sft_job(sft_job(tiny_dir, tmp_path), RESOURCES)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("own", "code"),
    [(BadInputError("sft.batch_tokens", 256, "raise it"), 2), (InstabilityError("non_finite: loss"), 1)],
)
def test_what_a_worker_raised_on_purpose_comes_out_as_itself(
    trainer: type[FakeTrainer], tiny_dir: Path, tmp_path: Path, own: SeatrialError, code: int
):
    """Also when the ranks beside it failed only because of it."""
    trainer.error = WorkerGroupError("a page of text", {0: RuntimeError("connection reset"), 1: own})
    with pytest.raises(type(own)) as caught:
        run_sft_job(sft_job(tiny_dir, tmp_path), RESOURCES)
    assert caught.value is own
    assert (caught.value.exit_code, str(caught.value)) == (code, str(own))


def test_a_defect_in_a_worker_is_named_without_its_page(trainer: type[FakeTrainer], tiny_dir: Path, tmp_path: Path):
    trainer.error = WorkerGroupError("a page\nof text", {3: KeyError("x"), 1: ValueError("bad shape\nmore")})
    with pytest.raises(InfrastructureError, match="on Ray Train: ValueError: bad shape; its log"):
        run_sft_job(sft_job(tiny_dir, tmp_path), RESOURCES)


def test_a_job_that_hangs_is_given_up_with_what_to_look_at(
    trainer: type[FakeTrainer], tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    release = Event()
    monkeypatch.setattr(trainer, "fit", lambda _self: release.wait(30))
    monkeypatch.setattr(train_jobs, "_POLL_S", 0.01)
    job = sft_job(tiny_dir, tmp_path)
    with pytest.raises(InfrastructureError, match=r"no step to .*metrics\.jsonl for 0 s and was given up; ray status"):
        run_sft_job(job, replace(RESOURCES, max_silence_s=0.05))
    release.set()


def test_a_slow_job_that_moves_is_waited_for():
    """Each look finds a new step: the clock starts again, however long it takes in all."""
    outcome: Future[None] = Future()
    looks = iter(range(9))

    def sign() -> int:
        number = next(looks)
        if number == 8:
            outcome.set_result(None)
        return number

    times = itertools.count(0.0, 5.0)
    assert train_jobs.wait_while_moving(outcome, sign, 6.0, clock=lambda: next(times), poll_s=0.0)
    times = itertools.count(0.0, 5.0)
    silent = train_jobs.wait_while_moving(Future(), lambda: 3, 6.0, clock=lambda: next(times), poll_s=0.0)
    assert not silent, "negative control"


def test_a_call_in_a_thread_hands_back_what_it_raised():
    assert train_jobs.start_in_thread(lambda: 3, "three").result(timeout=10) == 3
    with pytest.raises(KeyError, match="x"):
        train_jobs.start_in_thread(lambda: {}["x"], "broken").result(timeout=10)
