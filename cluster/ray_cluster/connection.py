"""Connecting to Ray, with its token, and where each actor of a stage goes.

Ray is imported where it is used: a token must be offered before that, and most commands never connect.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cluster.plan import NUM_THREADS, Placement, Role, Stage, check_capacity, local_cpus, reserve
from rl_actors.contracts import BadInputError, InfrastructureError
from rl_actors.ports import listens

if TYPE_CHECKING:
    from rl_actors.actors import Options

RESERVE_TIMEOUT_S: Final = 60.0
CONNECT_TIMEOUT_S: Final = 5.0
TOKEN_REMEDY: Final = (
    "copy the cluster's ~/.ray/auth_token here, or set RAY_AUTH_TOKEN (`ray get-auth-token` prints it on the head)"
)
_TOKEN_MODE: Final = "RAY_AUTH_MODE"
_HOST_PORT: Final = re.compile(r"(?:ray://)?(?P<host>[^:/]+):(?P<port>\d+)")

# Serve's controller always ends by `ray.kill`, and what still asked it then "failed".
_GOODBYE: Final = re.compile(r"Task ServeController\.\w+ failed\..* killed by `ray\.kill`")

WORKER_ENVIRONMENT: Final = {
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": str(NUM_THREADS),
    "PYTHONWARNINGS": "ignore",
    "RAY_TRAIN_V2_ENABLED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def offer_token(environ: MutableMapping[str, str] | None = None, home: Path | None = None) -> None:
    """Let Ray's clients in this process send a token that lies ready; call it before Ray is imported.

    A mode that somebody chose is left alone. A cluster that asks for no token ignores it.
    """
    # `ray start` asks for a token as soon as the machine has one, so every client must offer what it has.
    variables = os.environ if environ is None else environ
    file = Path(variables.get("RAY_AUTH_TOKEN_PATH") or (home or Path.home()) / ".ray" / "auth_token")
    if _TOKEN_MODE not in variables and (variables.get("RAY_AUTH_TOKEN") or file.is_file()):
        variables[_TOKEN_MODE] = "token"


@contextmanager
def connected(address: str, placement: Placement) -> Iterator[None]:
    """Connect to a cluster, or start a local Ray that ends with the run; refuse a spec it could never place.

    Raises:
        BadInputError: the address is none, or the cluster is too small.
        InfrastructureError: nothing answers at the address.
    """
    import ray

    quieten_libraries()
    # Whoever has connected before us, as tests do, keeps the connection.
    is_ours = not ray.is_initialized()
    if is_ours:
        _initialise(address, placement)
    try:
        check_capacity(placement, ray.cluster_resources())
        yield
    finally:
        if is_ours:
            ray.shutdown()


def join(address: str) -> None:
    """Connect to a running cluster and stay; what its workers print belongs into their logs, not on this screen."""
    quieten_libraries()
    _connect("Ray address", address, ignore_reinit_error=True)


def quieten_libraries() -> None:
    """Keep other libraries' progress bars and chatter off the run's own screen; their warnings stay."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    _put_ray_messages_aside()


def _put_ray_messages_aside() -> None:
    """Let Ray's messages about this job go to stderr, but for goodbyes that mean nothing."""
    # On stdout they would stand in the middle of a `--json` answer. Ray has no option for it: this is its own printer.
    from ray._private import worker as ray_worker

    printing = ray_worker.print_to_stdstream
    if getattr(printing, "is_seatrial", False):
        return

    def print_aside(data: Mapping[str, Any], ignore_prefix: bool) -> None:
        lines = [line for line in data["lines"] if not _GOODBYE.match(line)]
        if lines:
            printing({**data, "lines": lines, "is_err": True}, ignore_prefix=ignore_prefix)

    print_aside.is_seatrial = True  # type: ignore[attr-defined]
    ray_worker.print_to_stdstream = print_aside


def _initialise(address: str, placement: Placement) -> None:
    import ray

    runtime_env = {"env_vars": worker_environment(placement)}
    field = "cluster.address" if address else "RAY_ADDRESS"
    address = address or os.environ.get("RAY_ADDRESS", "")
    if address:
        _connect(field, address, runtime_env=runtime_env)
        return
    # One machine is never preempted; the watcher is an actor per job, with three seconds of imports.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    ray.init(
        address="local",  # never a cluster that happens to run on this machine
        num_cpus=local_cpus(placement, os.cpu_count() or 1),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=512 << 20,  # rollouts and weights are small; Ray would take a third of the memory
        runtime_env=runtime_env,
    )


def _connect(field: str, address: str, **options: Any) -> None:
    """Connect to a running cluster."""
    import ray
    from ray.exceptions import AuthenticationError

    # Asked first: Ray itself tries for minutes and ends in a traceback.
    found = _HOST_PORT.fullmatch(address)
    if found and not listens(found["host"], int(found["port"]), CONNECT_TIMEOUT_S):
        raise _unreachable(field, address, f"nobody listens within {CONNECT_TIMEOUT_S:.0f} s")
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except ValueError as error:
        remedy = f"{_first_line(error)}; write host:port, ray://host:port, or auto for the one of this machine"
        raise BadInputError(field, address, remedy) from error
    except AuthenticationError as error:
        raise InfrastructureError(f"{field} = {address!r}: this Ray asks for a token; {TOKEN_REMEDY}") from error
    except (ConnectionError, RuntimeError) as error:
        raise _unreachable(field, address, _first_line(error)) from error


def _unreachable(field: str, address: str, reason: str) -> InfrastructureError:
    remedy = "start one (ray start --head), correct the address, or leave it empty for a Ray of the run's own"
    return InfrastructureError(f"{field} = {address!r}: no Ray cluster answers there ({reason}); {remedy}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def worker_environment(placement: Placement) -> dict[str, str]:
    """Return the environment of every worker process."""
    accelerator = "cuda" if placement.peak["GPU"] else "cpu"
    return {**WORKER_ENVIRONMENT, "DS_ACCELERATOR": accelerator}


def has_room(placement: Placement, stage: Stage, times: int) -> bool:
    """Whether a stage's bundles fit so many times into what the connected cluster has free now."""
    import ray

    # Free now, not in total: other jobs may share the cluster.
    free = ray.available_resources()
    return all(times * needed <= free.get(name, 0.0) for name, needed in placement.demand(stage).items())


@contextmanager
def placed(placement: Placement, stage: Stage) -> Iterator[Options]:
    """Reserve a stage's bundles and yield the function that says where each actor goes."""
    from ray.util.placement_group import remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

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
