"""SFT and reward-model training as Ray Train jobs: `TorchTrainer` starts the workers, DeepSpeed trains in them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from rl_actors.actors.calls import LOGS, one_line
from rl_actors.contracts import InfrastructureError, SeatrialError
from rl_actors.durable import MetricsLog
from rl_actors.models import RewardModel, load_backbone, load_causal_lm
from rl_actors.training import (
    Example,
    PreferencePair,
    RewardSettings,
    SftSettings,
    calibrate,
    train_reward_model,
    train_sft,
)

# Ray Train waits a minute for room, each time: five minutes in all, as long as our own actors get.
START_RETRIES = 4
MAX_SILENCE_S = 6 * 3600.0
_POLL_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResources:
    """How many workers, what each reserves, how many threads it uses, and how long the job may go without a step."""

    num_workers: int
    num_threads: int
    gpus_per_worker: float
    storage: str
    max_silence_s: float = MAX_SILENCE_S


@dataclass(frozen=True, slots=True, kw_only=True)
class SftJob:
    """One SFT run: start from `base`, write to `output`, log to `metrics`."""

    base: str
    output: str
    metrics: str
    examples: tuple[Example, ...]
    settings: SftSettings
    drills: tuple[list[Example], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardJob:
    """One reward-model run on the SFT backbone; calibration pairs never train."""

    backbone: str
    output: str
    metrics: str
    criteria: tuple[str, ...]
    pairs: tuple[PreferencePair, ...]
    calibration_pairs: tuple[PreferencePair, ...]
    settings: RewardSettings


def run_sft_job(job: SftJob, resources: TrainResources) -> None:
    """Train and write the policy directory.

    Raises:
        InfrastructureError: The Ray Train job found no room, failed, or logged no step for `max_silence_s`.
        SeatrialError: What a worker raised on purpose, as itself.
    """
    _fit("sft", _sft_worker, job, resources)


def run_reward_job(job: RewardJob, resources: TrainResources) -> None:
    """Train, calibrate and write the reward model with its calibration.json; raises as `run_sft_job` does."""
    _fit("reward_model", _reward_worker, job, resources)


def _fit(
    name: str, worker: Callable[[dict[str, Any]], None], job: SftJob | RewardJob, resources: TrainResources
) -> None:
    # Here and not above: Ray Train takes seconds to import, and every actor's process imports this room.
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    per_worker = {"CPU": 1.0} | ({"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {})
    trainer = TorchTrainer(
        worker,
        train_loop_config={"job": job, "num_threads": resources.num_threads},
        scaling_config=ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=per_worker,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=resources.storage,
            # The limit's own default is to start again for ever: another job may hold the CPUs for days.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=START_RETRIES),
        ),
    )
    # The first rank appends a row a step: a file that does not grow is a job that stands still.
    metrics = Path(job.metrics)
    fit = start_in_thread(trainer.fit, name)
    if not wait_while_moving(fit, lambda: metrics.stat().st_size if metrics.exists() else 0, resources.max_silence_s):
        raise InfrastructureError(
            f"the {name} job wrote no step to {metrics} for {resources.max_silence_s:.0f} s and was given up; "
            "ray status says whether its workers are alive, their logs are under the Ray session's logs/train"
        )
    try:
        fit.result()
    except Exception as error:  # Ray Train raises several unrelated classes for a failed worker
        raise failure_of(name, error) from error


def start_in_thread(call: Callable[[], Any], name: str) -> Future[Any]:
    """Start a call that nothing can interrupt in a thread that may be left behind; returns its outcome to come."""
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised again by whoever asks for the result
            outcome.set_exception(error)

    # In a thread of ours Ray Train also leaves Ctrl-C alone; in the main thread it takes it, and keeps it.
    Thread(target=run, name=f"ray-train-{name}", daemon=True).start()
    return outcome


def wait_while_moving(
    outcome: Future[Any],
    sign: Callable[[], object],
    max_silence_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    poll_s: float | None = None,
) -> bool:
    """Wait for an outcome while `sign` changes now and then; False once it has not for `max_silence_s`."""
    last, since = sign(), clock()
    while not wait([outcome], timeout=_POLL_S if poll_s is None else poll_s).done:
        seen = sign()
        if seen != last:
            last, since = seen, clock()
        elif clock() - since >= max_silence_s:
            return False
    return True


def failure_of(name: str, error: Exception) -> SeatrialError:
    """Return what ended a job: an error of our own tree as a worker raised it, or one line about anything else."""
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    ranked = [failures[rank] for rank in sorted(failures)]
    # One rank's refusal makes the others fail at the next collective: look at all of them.
    for failure in ranked:
        if isinstance(failure, SeatrialError):
            return failure
    cause = ranked[0] if ranked else getattr(error, "controller_failure", error)
    hint = "" if ranked else " ray status says who holds the resources it asks for;"
    return InfrastructureError(f"the {name} job failed on Ray Train: {one_line(cause)};{hint} {LOGS}")


def _join(config: Mapping[str, Any], stage: str) -> tuple[int, int, Callable[[int, Mapping[str, float]], None]]:
    """Cap threads; returns rank, number of ranks and where steps go. Ray Train has already joined the process group."""
    from ray.train import get_context

    os.environ["OMP_NUM_THREADS"] = str(config["num_threads"])
    torch.set_num_threads(config["num_threads"])
    context = get_context()
    log = MetricsLog(config["job"].metrics, stage)
    rank = context.get_world_rank()
    return rank, context.get_world_size(), log.write if rank == 0 else lambda step, metrics: None


def _sft_worker(config: dict[str, Any]) -> None:
    job: SftJob = config["job"]
    rank, num_ranks, report = _join(config, "sft")
    model = load_causal_lm(job.base)
    train_sft(model, job.examples, job.settings, report, drills=job.drills, rank=rank, num_ranks=num_ranks)
    if rank == 0:
        model.save_pretrained(job.output)


def _reward_worker(config: dict[str, Any]) -> None:
    job: RewardJob = config["job"]
    rank, num_ranks, report = _join(config, "reward_model")
    torch.manual_seed(job.settings.seed)
    model = RewardModel(load_backbone(job.backbone), job.criteria)
    train_reward_model(model, job.pairs, job.settings, report, rank=rank, num_ranks=num_ranks)
    if rank == 0:
        calibration = calibrate(model.eval(), job.calibration_pairs)
        model.save(job.output)
        text = json.dumps(asdict(calibration), indent=1)
        (Path(job.output) / "calibration.json").write_text(text, encoding="utf8")
