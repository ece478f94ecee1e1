"""Connecting to Ray, and where each actor of a stage goes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.placement import Placement, Role, Stage, check_capacity, local_cpus, reserve
from cluster.stages.context import NUM_THREADS
from rl_actors.actors.pools import Options

RESERVE_TIMEOUT_S = 60.0
WORKER_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": str(NUM_THREADS),
    "PYTHONWARNINGS": "ignore",
    "RAY_TRAIN_V2_ENABLED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


@contextmanager
def connected(address: str, placement: Placement) -> Iterator[None]:
    """Connect to a cluster, or start a local Ray that ends with the run; refuse a spec it could never place."""
    quieten_libraries()
    is_ours = not ray.is_initialized()
    if is_ours:
        _initialise(address or os.environ.get("RAY_ADDRESS", ""), placement)
    try:
        check_capacity(placement, ray.cluster_resources())
        yield
    finally:
        if is_ours:
            ray.shutdown()


def join(address: str) -> None:
    """Connect to a running cluster and stay; what its workers print belongs into their logs, not on this screen."""
    quieten_libraries()
    ray.init(address, ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)


def quieten_libraries() -> None:
    """Keep other libraries' progress bars and chatter off the run's own screen; their warnings stay."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def _initialise(address: str, placement: Placement) -> None:
    runtime_env = {"env_vars": worker_environment(placement)}
    if address:
        ray.init(address=address, runtime_env=runtime_env, log_to_driver=False, logging_level=logging.ERROR)
        return
    # One machine is never preempted; the watcher is an actor per job, with three seconds of imports.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    ray.init(
        address="local",  # never a cluster that happens to run on this machine
        num_cpus=local_cpus(placement, os.cpu_count() or 1),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=512 << 20,
        runtime_env=runtime_env,
    )


def worker_environment(placement: Placement) -> dict[str, str]:
    """Return the environment of every worker process."""
    accelerator = "cuda" if placement.peak["GPU"] else "cpu"
    return {**WORKER_ENVIRONMENT, "DS_ACCELERATOR": accelerator}


def has_room(placement: Placement, stage: Stage, times: int) -> bool:
    """Whether a stage's bundles fit so many times into what the connected cluster has free now."""
    free = ray.available_resources()
    return all(times * needed <= free.get(name, 0.0) for name, needed in placement.demand(stage).items())


@contextmanager
def placed(placement: Placement, stage: Stage) -> Iterator[Options]:
    """Reserve a stage's bundles and yield the function that says where each actor goes."""
    group = reserve(placement, stage, timeout_s=RESERVE_TIMEOUT_S)

    def options(role: str, rank: int) -> Mapping[str, Any]:
        known: Role = role  # pyright: ignore[reportAssignmentType]
        index = placement.index(stage, known, rank)
        bundle = placement.bundles(stage)[index]
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
        return {"num_cpus": bundle.cpus, "num_gpus": bundle.gpus, "scheduling_strategy": strategy}

    try:
        yield options
    finally:
        remove_placement_group(group)
