"""SFT and reward-model training as Ray Train jobs: `TorchTrainer` starts the workers, DeepSpeed trains in them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from ray.train import RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchTrainer

from rl_actors.errors import InfrastructureError
from rl_actors.models.loading import load_backbone, load_causal_lm
from rl_actors.models.reward_model import RewardModel
from rl_actors.training.metrics_log import MetricsLog
from rl_actors.training.reward import PreferencePair, RewardProgress, RewardSettings, calibrate, train_reward_model
from rl_actors.training.sft import Example, SftProgress, SftSettings, train_sft


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResources:
    """How many workers, what each reserves, and how many threads it uses."""

    num_workers: int
    num_threads: int
    gpus_per_worker: float
    storage: str


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
        InfrastructureError: The Ray Train job failed.
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
        run_config=RunConfig(name=name, storage_path=resources.storage),
    )
    try:
        trainer.fit()
    except Exception as error:  # Ray Train raises several unrelated classes for a failed worker
        raise InfrastructureError(f"the {name} job failed on Ray Train: {error}") from error


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
