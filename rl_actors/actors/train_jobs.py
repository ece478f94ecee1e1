"""SFT and reward-model training as Ray Train jobs: `TorchTrainer` starts the workers, DeepSpeed trains in them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchTrainer

from rl_actors.actors.pools import LOGS, one_line
from rl_actors.contracts import InfrastructureError, SeatrialError
from rl_actors.durable import MetricsLog
from rl_actors.models import RewardModel, load_backbone, load_causal_lm
from rl_actors.training import (
    Example,
    PreferencePair,
    RewardProgress,
    RewardSettings,
    SftProgress,
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
    _fit("sft", _sft_worker, {"job": job, "num_threads": resources.num_threads}, resources)


def run_reward_job(job: RewardJob, resources: TrainResources) -> None:
    """Train, calibrate and write the reward model; its calibration lies beside it as calibration.json."""
    _fit("reward_model", _reward_worker, {"job": job, "num_threads": resources.num_threads}, resources)


def _fit(
    name: str, worker: Callable[[dict[str, Any]], None], config: Mapping[str, Any], resources: TrainResources
) -> None:
    per_worker = {"CPU": 1.0} | ({"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {})
    trainer = TorchTrainer(
        worker,
        train_loop_config=dict(config),
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
    metrics = Path(config["job"].metrics)
    fit = in_thread(trainer.fit, name)
    if not ends(fit, lambda: metrics.stat().st_size if metrics.exists() else 0, resources.max_silence_s):
        raise InfrastructureError(
            f"the {name} job wrote no step to {metrics} for {resources.max_silence_s:.0f} s and was given up; "
            "ray status says whether its workers are alive, their logs are under the Ray session's logs/train"
        )
    try:
        fit.result()
    except Exception as error:  # Ray Train raises several unrelated classes for a failed worker
        raise failure_of(name, error) from error


def in_thread(call: Callable[[], Any], name: str) -> Future[Any]:
    """Start a call that nothing can interrupt in a thread that may be left behind; returns its outcome to come.

    In a thread of ours Ray Train also leaves Ctrl-C alone; in the main thread it takes it, and keeps it.
    """
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised again by whoever asks for the result
            outcome.set_exception(error)

    Thread(target=run, name=f"ray-train-{name}", daemon=True).start()
    return outcome


def ends(
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


def _prepare_worker(num_threads: int) -> tuple[int, int]:
    """Cap threads and return (rank, number of ranks); Ray Train has already joined the process group."""
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    torch.set_num_threads(num_threads)
    context = get_context()
    return context.get_world_rank(), context.get_world_size()


def _sft_worker(config: dict[str, Any]) -> None:
    job: SftJob = config["job"]
    rank, num_ranks = _prepare_worker(config["num_threads"])
    model = load_causal_lm(job.base)
    log = MetricsLog(job.metrics, "sft")

    def report(progress: SftProgress) -> None:
        if rank == 0:
            log.write(progress.step, asdict(progress))

    train_sft(model, job.examples, job.settings, report, drills=job.drills, rank=rank, num_ranks=num_ranks)
    if rank == 0:
        model.save_pretrained(job.output)


def _reward_worker(config: dict[str, Any]) -> None:
    job: RewardJob = config["job"]
    rank, num_ranks = _prepare_worker(config["num_threads"])
    torch.manual_seed(job.settings.seed)
    model = RewardModel(load_backbone(job.backbone), job.criteria)
    log = MetricsLog(job.metrics, "reward_model")

    def report(progress: RewardProgress) -> None:
        if rank == 0:
            log.write(progress.step, asdict(progress))

    train_reward_model(model, job.pairs, job.settings, report, rank=rank, num_ranks=num_ranks)
    if rank == 0:
        calibration = calibrate(model.eval(), job.calibration_pairs)
        model.save(job.output)
        write_calibration(job.output, asdict(calibration))


def write_calibration(directory: str, calibration: Mapping[str, Any]) -> None:
    """Write what the reward model was accepted on beside its weights."""
    import json

    (Path(directory) / "calibration.json").write_text(json.dumps(calibration, indent=1), encoding="utf8")
